"""The one way to publish a directory of results: stores, prediction sets, votes, evaluations and mask sets.

Finished? Then there is nothing to do. If not: lock; remove leftovers; finished by now? build; check the lock; publish.

A finished directory contains a manifest that marks it as ours: the format, the kind of directory, the key that it was
made from, the size and SHA-256 of every other file, and, in its last line, a checksum of itself. We only replace
directories with this marker, only by one of the same kind, and only if they contain nothing but the files they were
published with.
"""

import errno
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stas import paths
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.system.files import exchange, read_json, remove_leftovers, sha256, sync_files, sync_path
from stas.system.locks import lock
from stas.system.printing import named
from stas.system.sealed import check_room, read_sealed, write_sealed
from stas.system.threads import in_threads
from stas.system.untrusted import shown

log = logging.getLogger(__name__)

MISSING = "missing"
BYSTANDERS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # left by file browsers in any directory they show

Kind = Literal["store", "prediction set", "vote", "evaluation", "mask set"]
# Raise the number when older directories of this kind can no longer be read.
FORMATS: dict[Kind, int] = {"store": 3, "prediction set": 3, "vote": 3, "evaluation": 3, "mask set": 1}
KEY_SHARE = 8  # times the values of its key that a manifest may have in all: each image has its size and hashes too


@dataclass(frozen=True)
class Output:
    """A directory to be built and published.

    Attributes:
        directory: its final place.
        kind: recorded in the manifest.
        key: everything it is made from, as JSON. Equal keys mean equal content.
    """

    directory: Path
    kind: Kind
    key: Any


@contextmanager
def building(output: Output, patience: float = math.inf, keep: bool = False) -> Iterator[Path | None]:
    """Build a partial directory, and publish it if the block succeeds.

    The block writes files, which need not be synced, and then the manifest (`write_manifest`).

    Args:
        output: the directory to publish.
        patience: seconds to wait for another process that is building it.
        keep: if the block fails, keep the partial directory, so that the next attempt at the same key can resume.

    Yields:
        The partial directory; None if the output is finished, perhaps by another process while this one waited.

    Raises:
        UsageError: before the block, if the directory may not be replaced (see `check_replaceable`), or if it is made
            from so much that its manifest could not be read again.
        StoppedEarly: the lock is held by another process, or was lost during the block.
    """
    final = output.directory
    if is_settled(output):
        yield None
        return
    check_replaceable(final, output.kind)
    check_room(paths.manifest_file(final), output.key, KEY_SHARE)
    with lock(paths.lock_file(final), patience) as held:
        partial = _beside(final, hashlib.sha256(json.dumps(output.key).encode()).hexdigest()[:12], "partial")
        _remove_leftovers(final, partial if keep and not is_finished(output) else None)
        if is_finished(output):
            yield None
            return
        _resume(replace(output, directory=partial))
        try:
            yield partial
            sync_files(partial)
            held.check()
            _publish(partial, output)
        finally:
            if not keep:
                _remove(partial)


def write_manifest(
    directory: Path, output: Output, finished: bool = True, known: Mapping[str, str] | None = None, **content: Any
) -> None:
    """Write the manifest of a partial directory, after all of its other files, which are hashed here.

    Args:
        directory: where the files are.
        output: the directory to publish them as.
        finished: False for a result that is worth publishing, but that the next run should make again.
        known: the SHA-256 of files that the caller hashed as it wrote them, by relative name.
        **content: further entries of the manifest.

    Raises:
        UsageError: the manifest would be too large to be read again.
    """
    files = _sizes(directory)
    hashes = dict(known or {})
    unknown = [name for name, size in files.items() if size is not None and name not in hashes]
    found = in_threads(lambda name: sha256(directory / name), unknown, "hash")
    hashes |= zip(unknown, found, strict=True)
    head = {"format": FORMATS[output.kind], "kind": output.kind, "key": output.key if finished else None}
    write_sealed(paths.manifest_file(directory), head | content | {"files": files, "sha256": hashes})


def read_manifest(directory: Path, *kinds: Kind) -> dict[str, Any]:
    """The manifest of a published directory.

    Args:
        directory: the directory.
        kinds: the kinds it may be.

    Raises:
        InputDataError: no manifest, not one of these kinds in its current format, or damaged.
    """
    content, intact = read_sealed(paths.manifest_file(directory))
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise InputDataError(f"{paths.manifest_file(directory)}: not a manifest of stas: use another directory")
    kind, found = content.get("kind"), content.get("format")
    if kind not in kinds:
        raise InputDataError(f"{directory}: its kind is {shown(kind)}, not {' or '.join(kinds)}: use another directory")
    if found != FORMATS[kind]:
        raise InputDataError(
            f"{directory}: {kind} of format {shown(found)}, but this version reads format {FORMATS[kind]}: "
            "move it away and create it again"
        )
    if not intact or not isinstance(content.get("sha256"), dict):
        raise InputDataError(
            f"{paths.manifest_file(directory)}: damaged, or changed by hand: its content does not match its checksum: "
            f"restore it, or move {directory} away and create it again"
        )
    return content


def is_finished(output: Output) -> bool:
    """Whether the directory was made from exactly this key, and every file is there with its recorded size."""
    try:
        content = read_manifest(output.directory, output.kind)
    except InputDataError:
        return False
    if content.get("key") != json.loads(json.dumps(output.key)):  # as JSON returns it: tuples become lists
        return False
    sizes = _sizes(output.directory)
    return all(sizes.get(name) == size for name, size in content["files"].items())


def damage(directory: Path, *kinds: Kind) -> list[str]:
    """What is wrong with a published directory, after reading all of it; empty if nothing is.

    Args:
        directory: the directory.
        kinds: the kinds it may be.

    Raises:
        InputDataError: see `read_manifest`.
    """
    problems = _problems(directory, read_manifest(directory, *kinds), _hash_or_error)
    return [f"{name}: {problem}" for name, problem in problems.items()]


def _problems(
    directory: Path, content: dict[str, Any], hashed: Callable[[Path], str | BaseException]
) -> dict[str, str]:
    """What is wrong with each file of a directory, by relative name, given its manifest.

    All are read, because a mask that somebody corrected may have the same size. `hashed` gives a file's SHA-256, or
    why it cannot be read.
    """
    recorded, sizes = content["files"], _sizes(directory)
    problems = dict.fromkeys((name for name in recorded if name not in sizes), MISSING)
    problems |= {name: "added since it was made" for name in sizes if name not in recorded}
    problems |= {
        name: f"{size} bytes instead of {shown(recorded[name])}"
        for name, size in sizes.items()
        if name not in problems and (size is None or size != recorded[name])
    }
    same = [name for name in sizes if name not in problems]
    hashes = in_threads(lambda name: hashed(directory / name), same, "hash")
    return problems | {
        name: "damaged" if isinstance(found, str) else str(found)
        for name, found in zip(same, hashes, strict=True)
        if found != content["sha256"].get(name)
    }


def _hash_or_error(path: Path) -> str | BaseException:
    """A file's SHA-256, or why the disk did not give it."""
    try:
        return sha256(path)
    except (InputDataError, StoppedEarly, OSError) as error:
        return error


def is_settled(output: Output) -> bool:
    """Whether the directory is finished, no process is working on it, and no killed process left files beside it."""
    final = output.directory
    locks = final.parent.glob(f"{glob.escape(paths.lock_file(final).name)}*")
    return is_finished(output) and not [*_leftovers(final, "old"), *_leftovers(final, "partial"), *locks]


def check_replaceable(directory: Path, kind: Kind) -> None:
    """Refuse to replace anything we did not make: a mistyped name must never delete someone's files.

    Raises:
        UsageError: there is a file, a directory of another kind or without our manifest, or a directory in which a
            file was added or changed since it was made.
        StoppedEarly: this machine could not read a file for now, so it is not known whether it was changed.
    """
    if directory.name in ("", ".."):
        raise UsageError(f"{directory}: has no name of its own: name a new directory, such as {directory / 'results'}")
    remedy = "it will not be replaced: use another name, or move it away"
    if not directory.exists() and not directory.is_symlink():
        return
    if directory.is_symlink() or not directory.is_dir():
        raise UsageError(f"{directory}: not a directory made by stas; {remedy}")
    while True:
        try:
            content = read_manifest(directory, kind)
        except InputDataError as error:
            if not _files(directory):
                return
            raise UsageError(f"{directory}: not known to be stas's own {kind} ({error}); {remedy}") from error
        problems = _problems(directory, content, sha256)
        foreign = sorted(name for name, problem in problems.items() if problem != MISSING)
        if not foreign:
            return
        if read_json(paths.manifest_file(directory)) == content:  # otherwise another process has just replaced it
            break
    raise UsageError(f"{directory}: files were added or changed since it was made ({named(foreign)}); {remedy}")


def remove_abandoned(parent: Path, seconds: float) -> None:
    """Remove partial directories that nobody has written to for `seconds`, whose keys may never be built again."""
    for partial in parent.glob(".*.partial"):
        final = re.fullmatch(r"\.(.+)\.[0-9a-f]{12}\.partial", partial.name)
        if not final or not partial.is_dir() or paths.lock_file(parent / final[1]).exists():
            continue
        try:
            newest = max(entry.stat().st_mtime for entry in (partial, *partial.rglob("*")))
        except FileNotFoundError:  # its process has just published or removed it
            continue
        if time.time() - newest > seconds:
            log.info("%s: removed; a process was killed while building it", partial)
            _remove(partial)


def _publish(partial: Path, output: Output) -> None:
    """Give a finished directory its final name, replacing an older one.

    Other processes see either the older one or this one. If the file system cannot swap two names (NFS), they may
    briefly see neither; `_remove_leftovers` restores the old one if this process is killed at that moment.
    """
    final, aside = output.directory, _beside(output.directory, uuid.uuid4().hex[:12], "old")
    assert paths.manifest_file(partial).is_file(), "the block must write the manifest"
    sync_path(partial)
    while True:
        check_replaceable(output.directory, output.kind)
        try:
            partial.rename(final)
            break
        except OSError as error:  # only these two mean that there is an older result
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if exchange(partial, final):
                partial.rename(aside)  # under its old name it could be mistaken for work to resume
                break
            final.rename(aside)
        except FileNotFoundError:  # another process is publishing the same name
            continue
    sync_path(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(final: Path, keep: Path | None) -> None:
    """Remove or restore what killed processes left beside a directory. The caller must hold the lock."""
    for aside in _leftovers(final, "old"):
        whole = paths.manifest_file(aside).is_file() and not aside.is_symlink()
        if whole and not final.exists():  # killed between the two renames of `_publish`
            aside.rename(final)
            log.warning("%s: restored; a process was killed while replacing it", final)
        else:
            _remove(aside)
    for partial in _leftovers(final, "partial"):
        # A link could lead to someone's files, which resuming would change.
        if partial != keep or partial.is_symlink() or not partial.is_dir():
            _remove(partial)


def _remove(path: Path) -> None:
    """Remove a directory tree; of a link, only the link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _resume(output: Output) -> None:
    """Create the partial directory, or take over the one that a killed process left."""
    partial = output.directory
    if paths.manifest_file(partial).exists() and not is_finished(output):  # an older result, just swapped out
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    for directory in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        remove_leftovers(directory)


def _sizes(directory: Path) -> dict[str, int | None]:
    """The size (see `_size`) of every file below a directory but its manifest, by relative name, sorted."""
    own = paths.manifest_file(directory)
    return {str(path.relative_to(directory)): _size(path) for path in _files(directory) if path != own}


def _files(directory: Path) -> list[Path]:
    """All files and links below a directory, sorted, except those left by file browsers."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # another process has just replaced it
            raise error

    found: list[Path] = []
    for place, directories, files in os.walk(directory, onerror=refuse):
        links = [name for name in directories if Path(place, name).is_symlink()]
        found += [Path(place, name) for name in (*files, *links) if name not in BYSTANDERS]
    return sorted(found)


def _size(path: Path) -> int | None:
    """A file's size in bytes; None for anything else, such as a link that leads to no file."""
    try:
        return path.stat().st_size if path.is_file() else None
    except FileNotFoundError:  # another process has just replaced the directory
        return None


def _leftovers(final: Path, suffix: str) -> list[Path]:
    """Directories that processes working on `final` keep beside it, but none of another set such as `<final>.tta`."""
    name = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{12}}\.{suffix}")
    return sorted(path for path in final.parent.glob(f".*.{suffix}") if name.fullmatch(path.name))


def _beside(final: Path, tag: str, suffix: str) -> Path:
    return final.with_name(f".{final.name}.{tag}.{suffix}")
