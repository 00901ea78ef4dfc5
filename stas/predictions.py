"""Sets of predictions on disk: one mask per image, a manifest, and what several sets must have in common.

A set made here has 0/255 masks and a manifest:
    {"key": what it was made from, "images": {stem: {"height": int, "width": int}}, ...}
Sets of other makers need neither: any directory of mask PNGs is one.
"""

import errno
import glob
import hashlib
import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stas import paths
from stas.errors import InputDataError, UsageError
from stas.files import exchange, read_json, sha256, sync_files, sync_path, write_json
from stas.images import MAX_IMAGE_BYTES, grey_size, is_plain_stem, list_images, read_grey
from stas.locks import lock
from stas.resources import cores

log = logging.getLogger(__name__)

SHOWN = 10  # cases named in a message; more would hide the message
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Member:
    """One set of predictions.

    Attributes:
        name: its directory's name, with as many parents as make it unique among the members.
        directory: where it lies.
        images: its mask files by stem, sorted.
    """

    name: str
    directory: Path
    images: dict[str, Path]


@dataclass(frozen=True)
class Members:
    """Sets of predictions of the same images.

    Attributes:
        members: in the order given.
        sizes: (height, width) in pixels by stem, sorted; the same in every member.
    """

    members: list[Member]
    sizes: dict[str, tuple[int, int]]

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    @property
    def stems(self) -> list[str]:
        return list(self.sizes)


def list_members(directories: Sequence[Path]) -> Members:
    """List sets of predictions and check that they belong together.

    Raises:
        UsageError: one directory given twice.
        InputDataError: no directory or no PNG in it; stems or sizes differ; names the members and cases.
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
        Member(name, directory, list_images(directory, (".png",)))
        for name, directory in zip(names, directories, strict=True)
    ]
    first, *others = members
    problems = [problem for other in others if (problem := _stem_difference(first, other))]
    if problems:
        raise InputDataError("the members hold different cases:\n  " + "\n  ".join(problems))
    return Members(members, _common_sizes(members))


def read_member_mask(path: Path, threshold: float | None = None) -> tuple[NDArray[np.bool_], bool]:
    """Read a mask of any maker: mode 1, L, P, RGB(A) or 16-bit grey.

    Args:
        path: the mask.
        threshold: foreground is every value above it, in the file's own units (0 to 255, or 0 to 65535);
            by default every value above 0.

    Returns:
        mask: (height, width), bool.
        graded: no threshold was given and the values are not only 0 and one of 1, 255 and 65535, so that
            "above 0" was a choice, to be told to people (`log_graded`).
    """
    values = read_grey(path)
    if threshold is not None:
        return values > threshold, False
    return values > 0, _is_graded(values)


def _is_graded(values: NDArray[np.uint8] | NDArray[np.uint16]) -> bool:
    """Whether there are other values than 0 and 1, or than 0 and the highest of the type."""
    signed = values.view(np.int8 if values.dtype == np.uint8 else np.int16)  # in which the highest is -1
    if signed.min(initial=0) >= -1 and signed.max(initial=0) <= 0:
        return False
    return bool(values.max(initial=0) > 1)


def log_graded(name: str, graded: int, total: int) -> None:
    """Say once for a member that `graded` of its `total` masks were cut at above 0."""
    if graded:
        log.info(
            "%s: %d of %d masks have values other than 0 and 255; every value above 0 was taken as foreground "
            "(--threshold sets another rule)",
            name,
            graded,
            total,
        )


def digest(files: Iterable[Path]) -> str:
    """One SHA-256 for many files: of the lines '<name> <sha256 of the file>' in the given order."""
    lines = "".join(f"{path.name} {sha256(path, MAX_IMAGE_BYTES)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def pixel_digest(masks: Sequence[Path], workers: int | None = None) -> str:
    """One SHA-256 for many masks, of their names, sizes and pixels in the given order.

    Files of the same pixels have the same, whoever packed them: ISA-L's bytes depend on the kind of processor.

    Raises:
        InputDataError: a mask cannot be read.
    """
    hashes = in_threads(_pixel_sha256, masks, "hashing", workers)
    lines = "".join(f"{path.name} {value}\n" for path, value in zip(masks, hashes, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _pixel_sha256(path: Path) -> str:
    values = read_grey(path)
    top = None if _is_graded(values) else values.max(initial=0)
    hashed = hashlib.sha256(f"{values.shape} {values.dtype} {top}\n".encode())
    # Eight pixels a byte where there are two values only: hashing is most of the time otherwise.
    hashed.update((np.ascontiguousarray(values) if top is None else np.packbits(values)).data)
    return hashed.hexdigest()


def write_manifest(directory: Path, values: dict[str, Any]) -> None:
    """Write a manifest; `values` holds at least "key" and "images" (see the head of this file)."""
    assert {"key", "images"} <= values.keys()
    write_json(paths.manifest(directory), values)


def is_finished(directory: Path, key: dict[str, Any]) -> bool:
    """Whether `directory` was made from exactly `key` and every mask of its manifest is there.

    A manifest with a true "probabilities" must have these too. A manifest that cannot be read is not finished.
    """
    try:
        manifest = read_json(paths.manifest(directory))
    except InputDataError:
        return False
    if not isinstance(manifest, dict) or not isinstance(stems := manifest.get("images"), dict):
        return False
    if not all(is_plain_stem(stem) for stem in stems):  # none is looked for outside of the directory
        return False
    same = manifest.get("key") == json.loads(json.dumps(key))  # as JSON would give it back: tuples become lists
    files = [paths.prediction(directory, stem) for stem in stems]
    if manifest.get("probabilities"):
        files += [paths.probability(directory, stem) for stem in stems]
    return same and all(file.is_file() for file in files)


def check_replaceable(directory: Path) -> None:
    """Refuse to replace what was not made here, so that a mistyped --out never removes somebody's files.

    Raises:
        UsageError: `directory` is a file, or holds files but no manifest.
    """
    if directory.is_dir():
        if any(directory.iterdir()) and not paths.manifest(directory).is_file():
            raise UsageError(
                f"{directory}: holds files but no {paths.manifest(directory).name}, so it is not an earlier result "
                "and will not be replaced: give a new directory"
            )
    elif directory.exists() or directory.is_symlink():
        raise UsageError(f"{directory}: exists and is not a directory: give a new directory")


def publish(partial: Path, final: Path) -> None:
    """Give a finished directory its final name; an older result of that name is moved aside, then removed.

    A process that is killed in between leaves the old result or the new one under `final`. Where the file system
    cannot swap two names (NFS), it may also leave none; `tidy` brings the old one back then.

    Raises:
        UsageError: `final` was not made here (see `check_replaceable`).
    """
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.old")
    sync_path(partial)
    while True:
        check_replaceable(final)
        try:
            partial.rename(final)
            break
        except OSError as error:  # only these two say that an older result is there
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if exchange(partial, final):
                partial.rename(aside)  # or it could be taken for work to go on with
                break
            final.rename(aside)
        except FileNotFoundError:  # another process publishes the same name at this moment
            continue
    sync_path(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def tidy(final: Path, keep: Path | None = None) -> None:
    """Bring back or clear away what a killed process left beside `final`. Only who holds its lock may do so.

    Args:
        final: the directory that the process was to make.
        keep: a partial directory to go on with.
    """
    for aside in _beside(final, "old"):
        if not final.exists():  # killed between the two renames of `publish`
            aside.rename(final)
            log.warning("%s: brought back; a process was killed while it replaced it", final)
        shutil.rmtree(aside, ignore_errors=True)
    for partial in _beside(final, "partial"):
        if partial != keep:
            shutil.rmtree(partial, ignore_errors=True)


def is_settled(directory: Path, key: dict[str, Any]) -> bool:
    """Whether `directory` is finished (see `is_finished`), and nobody is at work or was killed beside it."""
    locks = directory.parent.glob(f"{glob.escape(paths.lock(directory).name)}*")
    beside = [*_beside(directory, "old"), *_beside(directory, "partial"), *locks]
    return is_finished(directory, key) and not beside


def _beside(final: Path, kind: str) -> list[Path]:
    """What a process at work on `final` keeps beside it. A set called `lite0.tta` is not the business of `lite0`."""
    name = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{12}}\.{kind}")
    return sorted(path for path in final.parent.glob(f".*.{kind}") if name.fullmatch(path.name))


@contextmanager
def building(final: Path, key: dict[str, Any]) -> Iterator[Path | None]:
    """A partial directory beside `final` that is published if the block succeeds and removed if it fails.

    What is written there is synced all at once before. None where `final` has been made from `key` already, also by
    another process that was waited for.

    Raises:
        UsageError: before the block, if `final` may not be replaced.
    """
    check_replaceable(final)
    if is_settled(final, key):
        yield None
        return
    with lock(paths.lock(final)) as held:
        tidy(final)
        if is_finished(final, key):
            yield None
            return
        partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.partial")
        partial.mkdir(parents=True)
        try:
            yield partial
            sync_files(partial)
            held.check()
            publish(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], task: str, workers: int | None = None
) -> list[Result]:
    """`function` of every item, in order, in threads (Pillow decodes without the interpreter lock).

    Args:
        function: called once per item.
        items: the items.
        task: named by the progress bar.
        workers: number of threads; by default the processors this process may use.
    """
    with ThreadPoolExecutor(workers or cores()) as pool:
        return list(tqdm(pool.map(function, items), desc=task, total=len(items), disable=None, leave=False))


def named(cases: Iterable[str]) -> str:
    """The first cases by name, and how many more there are."""
    listed = list(cases)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _unique_names(directories: Sequence[Path]) -> list[str]:
    resolved = [directory.resolve() for directory in directories]
    for directory in resolved:
        if resolved.count(directory) > 1:
            raise UsageError(f"{directory}: given more than once; each member counts once")
    longest = max((len(directory.parts) for directory in resolved), default=0)
    for depth in range(1, longest):
        names = ["/".join(directory.parts[-depth:]) for directory in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(directory) for directory in resolved]


def _stem_difference(first: Member, other: Member) -> str | None:
    """What `other` lacks or has besides, compared with `first`; None where there is nothing."""
    lacking = sorted(first.images.keys() - other.images.keys())
    besides = sorted(other.images.keys() - first.images.keys())
    parts = []
    if lacking:
        parts.append(f"lacks {len(lacking)} ({named(lacking)})")
    if besides:
        parts.append(f"has {len(besides)} besides ({named(besides)})")
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
            "the members' masks differ in size (height x width):\n  " + "\n  ".join(problems[:SHOWN]) + more
        )
    return sizes


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
