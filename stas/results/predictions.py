"""Prediction sets on disk: one mask per image, and checks that several sets belong together.

A set made by `stas` has 0/255 masks and a manifest with
    "label": the label of the foreground, "images": {stem: {"height": int, "width": int}}
in addition to the keys of every manifest (see stas/system/publish.py). Sets from elsewhere need neither: any directory
of mask PNGs is one.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stas import paths
from stas.data.images import MAX_IMAGE_BYTES, grey_size, is_graded, list_images, read_grey
from stas.errors import InputDataError, UsageError
from stas.system.files import sha256
from stas.system.printing import is_plain
from stas.system.publish import SHOWN, Output, named, read_manifest, write_manifest
from stas.system.threads import in_threads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One prediction set.

    Attributes:
        name: its directory's name, with enough parents to be unique among the members.
        directory: where it is.
        images: its mask files by stem, sorted.
        label: the label that its masks outline, if its manifest names one.
    """

    name: str
    directory: Path
    images: dict[str, Path]
    label: str | None


@dataclass(frozen=True)
class Members:
    """Prediction sets of the same images.

    Attributes:
        members: in the order given.
        sizes: (height, width) in pixels by stem, sorted; the same in every member.
        label: the label that their masks outline; None if no member's manifest names one.
    """

    members: list[Member]
    sizes: dict[str, tuple[int, int]]
    label: str | None

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    @property
    def stems(self) -> list[str]:
        return list(self.sizes)


def write_set_manifest(
    partial: Path, output: Output, label: str | None, sizes: Mapping[str, tuple[int, int]], probabilities: bool
) -> None:
    """Write the manifest of a finished prediction set or vote.

    Args:
        partial: where its files are.
        output: the set to publish.
        label: the label of the foreground; None if its members' manifests name none.
        sizes: (height, width) of each mask in pixels, by stem.
        probabilities: whether it has probabilities beside the masks.
    """
    images = {stem: {"height": height, "width": width} for stem, (height, width) in sizes.items()}
    write_manifest(partial, output, label=label, images=images, probabilities=probabilities)


def list_members(directories: Sequence[Path]) -> Members:
    """List prediction sets and check that they belong together.

    Raises:
        UsageError: one directory given twice.
        InputDataError: a directory is missing or has no PNG, or labels, stems or sizes differ; names the members and
            cases.
    """
    names = _unique_names(directories)
    missing = [
        f"{name}: no {directory}" for name, directory in zip(names, directories, strict=True) if not directory.is_dir()
    ]
    if missing:
        raise InputDataError(
            f"{len(missing)} of {len(names)} members are missing:\n  " + "\n  ".join(missing) + "\n"
            "Predict them, or leave them out"
        )
    members = [
        Member(name, directory, list_images(directory, (".png",)), _label(directory))
        for name, directory in zip(names, directories, strict=True)
    ]
    first, *others = members
    problems = [problem for other in others if (problem := _stem_difference(first, other))]
    if problems:
        raise InputDataError("the members have different cases:\n  " + "\n  ".join(problems))
    return Members(members, _common_sizes(members), _common_label(members))


def log_graded(name: str, graded: int, total: int) -> None:
    """Log, once per member, that `graded` of its `total` masks were thresholded at above 0."""
    if graded:
        log.info(
            "%s: %d of %d masks have values other than 0 and 255; every value above 0 was taken as foreground "
            "(--threshold changes this)",
            name,
            graded,
            total,
        )


def digest(files: Iterable[Path]) -> str:
    """One SHA-256 of many files: of the lines '<name> <sha256 of the file>' in the given order."""
    lines = "".join(f"{path.name} {sha256(path, MAX_IMAGE_BYTES)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def pixel_digest(masks: Sequence[Path], workers: int | None = None) -> str:
    """One SHA-256 of many masks: of their names, sizes and pixels in the given order.

    It does not depend on how the files were compressed: ISA-L's bytes differ by kind of processor.

    Raises:
        InputDataError: a mask cannot be read.
    """
    hashes = in_threads(_pixel_sha256, masks, "hashing", workers)
    lines = "".join(f"{path.name} {value}\n" for path, value in zip(masks, hashes, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _pixel_sha256(path: Path) -> str:
    values = read_grey(path)
    top = None if is_graded(values) else values.max(initial=0)
    hashed = hashlib.sha256(f"{values.shape} {values.dtype} {top}\n".encode())
    # Two values fit eight pixels in a byte: otherwise hashing takes most of the time.
    hashed.update((np.ascontiguousarray(values) if top is None else np.packbits(values)).data)
    return hashed.hexdigest()


def _unique_names(directories: Sequence[Path]) -> list[str]:
    resolved = [directory.resolve() for directory in directories]
    for directory in resolved:
        if resolved.count(directory) > 1:
            raise UsageError(f"{directory}: given more than once; each member counts once")
    longest = max((len(directory.parts) for directory in resolved), default=0)
    names = [str(directory) for directory in resolved]
    for depth in range(1, longest):
        shorter = ["/".join(directory.parts[-depth:]) for directory in resolved]
        if len(set(shorter)) == len(shorter):
            names = shorter
            break
    for name in names:
        if not is_plain(name):
            raise UsageError(
                f"{name!r}: not UTF-8, or line breaks or other control characters in it, which the name of a member in "
                "tables and manifests cannot have: rename the directory"
            )
    return names


def _label(directory: Path) -> str | None:
    """The label in a set's manifest; None for a set from elsewhere."""
    if not paths.manifest_file(directory).is_file():
        return None
    try:
        label = read_manifest(directory, "prediction set", "vote").get("label")
    except InputDataError:
        return None
    return label if isinstance(label, str) else None


def _common_label(members: Sequence[Member]) -> str | None:
    labels = {member.label: member.name for member in members if member.label is not None}
    if len(labels) > 1:
        listed = ", ".join(f"{label} in {name}" for label, name in labels.items())
        raise InputDataError(f"the members' masks outline different labels: {listed}: give members of the same label")
    return next(iter(labels), None)


def _stem_difference(first: Member, other: Member) -> str | None:
    """How the stems of `other` differ from those of `first`; None if they do not."""
    lacking = sorted(first.images.keys() - other.images.keys())
    extra = sorted(other.images.keys() - first.images.keys())
    parts = []
    if lacking:
        parts.append(f"lacks {len(lacking)} ({named(lacking)})")
    if extra:
        parts.append(f"has {len(extra)} extra ({named(extra)})")
    return f"{other.name}, compared with {first.name}, {' and '.join(parts)}" if parts else None


def _common_sizes(members: Sequence[Member]) -> dict[str, tuple[int, int]]:
    first = members[0]
    sizes = {stem: grey_size(path) for stem, path in first.images.items()}
    problems = []
    for other in members[1:]:
        for stem, path in other.images.items():
            if (size := grey_size(path)) != sizes[stem]:
                problems.append(f"{stem}: {_size(sizes[stem])} in {first.name}, {_size(size)} in {other.name}")
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputDataError(
            "the members' masks differ in size (width x height):\n  " + "\n  ".join(problems[:SHOWN]) + more
        )
    return sizes


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
