"""Prediction sets on disk: one mask per image, and checks that several sets belong together.

A set made by `stas` has 0/255 masks and a manifest with
    "label": the label of the foreground, "images": {stem: {"height": int, "width": int}}, "probabilities": bool
in addition to the keys of every manifest (see stas/system/publish.py). Sets from elsewhere need no manifest: any
directory of mask PNGs is one.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stas.data.images import MAX_IMAGE_BYTES, MAX_PIXELS, MAX_SIDE, grey_size, is_graded, read_grey
from stas.data.listing import list_images
from stas.data.png import decode_grey
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.results.provenance import Made, check_same_images, read_made
from stas.system.files import sha256
from stas.system.printing import is_plain, itemised, named
from stas.system.publish import Output, write_manifest
from stas.system.threads import in_threads
from stas.system.untrusted import read_bounded, resolved

log = logging.getLogger(__name__)

Grey = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Member:
    """One prediction set.

    Attributes:
        name: its directory's name, with enough parents to be unique among the members.
        directory: where it is.
        images: its mask files by stem, sorted.
        made: what its manifest says; None if it has no manifest.
    """

    name: str
    directory: Path
    images: dict[str, Path]
    made: Made | None

    @property
    def label(self) -> str | None:
        """The label that its masks outline, if its manifest names one."""
        return self.made and self.made.label


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
        InputDataError: a directory is missing or has no PNG, or has a manifest that is not a prediction set's; or
            labels, stems, sizes or the images that the masks are of differ; names the members and cases.
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
        Member(name, directory, list_images(directory, (".png",)), read_made(directory))
        for name, directory in zip(names, directories, strict=True)
    ]
    first, *others = members
    problems = [problem for other in others if (problem := _stem_difference(first, other))]
    if problems:
        raise InputDataError("the members have different cases:\n  " + "\n  ".join(problems))
    check_same_images(members)
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


def read_once(path: Path) -> tuple[Grey, str]:
    """The values of a mask or probability file (see `read_grey`), and the SHA-256 of the very bytes they are from.

    Raises:
        InputDataError: see `read_grey`.
        StoppedEarly: the file changed while it was read.
    """
    content = read_bounded(path, MAX_IMAGE_BYTES)
    values = decode_grey(content, MAX_PIXELS, MAX_SIDE)
    if values is None:
        values = read_grey(path)
        if read_bounded(path, MAX_IMAGE_BYTES) != content:
            raise changed(path)
    return values, hashlib.sha256(content).hexdigest()


def changed(path: Path) -> StoppedEarly:
    """The error for a file that is not the one that was hashed before."""
    return StoppedEarly(f"{path} was changed while it was read: run the same command again")


def digest(files: Iterable[Path], hashes: Iterable[str] | None = None) -> str:
    """One SHA-256 of many files: of the lines '<name> <hash>' in the given order.

    Args:
        files: the files.
        hashes: of each; by default the SHA-256 of its content.
    """
    files = list(files)
    values = [sha256(path, MAX_IMAGE_BYTES) for path in files] if hashes is None else hashes
    lines = "".join(f"{path.name} {value}\n" for path, value in zip(files, values, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def pixel_hashes(masks: Sequence[Path], workers: int | None = None) -> list[tuple[str, str]]:
    """The SHA-256 of each mask's size and pixels, and of its file.

    The first does not depend on how the file was compressed: ISA-L's bytes differ by kind of processor.

    Raises:
        InputDataError: a mask cannot be read.
        StoppedEarly: a mask changed while it was read.
    """

    def hashes(path: Path) -> tuple[str, str]:
        values, content = read_once(path)
        return _pixel_sha256(values), content

    return in_threads(hashes, masks, "hashing", workers)


def _pixel_sha256(values: Grey) -> str:
    top = None if is_graded(values) else values.max(initial=0)
    hashed = hashlib.sha256(f"{values.shape} {values.dtype} {top}\n".encode())
    # Two values fit eight pixels in a byte: otherwise hashing takes most of the time.
    hashed.update((np.ascontiguousarray(values) if top is None else np.packbits(values)).data)
    return hashed.hexdigest()


def _unique_names(directories: Sequence[Path]) -> list[str]:
    places = [resolved(directory) for directory in directories]
    for directory in places:
        if places.count(directory) > 1:
            raise UsageError(f"{directory}: given more than once; each member counts once")
    longest = max((len(directory.parts) for directory in places), default=0)
    names = [str(directory) for directory in places]
    for depth in range(1, longest):
        shorter = ["/".join(directory.parts[-depth:]) for directory in places]
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
        raise InputDataError(f"the members' masks differ in size (width x height):{itemised(problems)}")
    return sizes


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
