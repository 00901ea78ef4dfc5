"""How every directory that a stage makes comes to be: stores, prediction sets, votes and evaluations.

Finished? Then there is nothing to do. Else lock; remove leftovers; finished by now? build; check the lock; publish.

A finished directory holds a manifest that is also its marker: the format, the kind of the directory, the key that it
was made from, and every other file with its size. Only a directory with such a marker is ever replaced, only by one of
its own kind, and only while it holds nothing but the files that were made with it.
"""

import errno
import glob
import hashlib
import json
import logging
import math
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stas import paths
from stas.errors import InputDataError, UsageError
from stas.system.files import exchange, read_json, remove_leftovers, sync_files, sync_path, write_json
from stas.system.locks import lock
from stas.system.untrusted import shown

log = logging.getLogger(__name__)

SHOWN = 10  # cases named in a message; more would hide the message
BYSTANDERS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file browsers leave in any directory they show

Kind = Literal["store", "prediction set", "vote", "evaluation"]
# Of what a directory holds; raised when it can no longer be read as before.
FORMATS: dict[Kind, int] = {"store": 2, "prediction set": 2, "vote": 2, "evaluation": 2}


@dataclass(frozen=True)
class Output:
    """A directory to be made.

    Attributes:
        directory: its final place.
        kind: what it is; the manifest says so.
        key: what it is made from, as JSON. Equal keys mean equal content.
    """

    directory: Path
    kind: Kind
    key: Any


@contextmanager
def building(output: Output, patience: float = math.inf, keep: bool = False) -> Iterator[Path | None]:
    """A partial directory that is published if the block succeeds.

    The block writes files, which need not be synced, and last the manifest (`write_manifest`).

    Args:
        output: what is to be made.
        patience: seconds to wait for another process that is making it.
        keep: where the block fails, keep the partial directory for the next attempt at the same key to resume from.

    Yields:
        The partial directory; None where the output is finished, perhaps by another process that was waited for.

    Raises:
        UsageError: before the block, if the directory may not be replaced (see `check_replaceable`).
        StoppedEarly: the lock is held by another process, or was lost during the block.
    """
    final = output.directory
    if is_settled(output):
        yield None
        return
    check_replaceable(final, output.kind)
    with lock(paths.lock_file(final), patience) as held:
        partial = _beside(final, hashlib.sha256(_as_json(output.key).encode()).hexdigest()[:12], "partial")
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
                shutil.rmtree(partial, ignore_errors=True)


def write_manifest(directory: Path, output: Output, finished: bool = True, **content: Any) -> None:
    """Write the manifest of a partial directory, after all of its other files.

    Args:
        directory: where the files are.
        output: what they will be.
        finished: False for a result that is worth publishing but should be made again at the next opportunity.
        **content: what the manifest says besides.
    """
    files = {str(path.relative_to(directory)): path.stat().st_size for path in _files(directory)}
    files.pop(paths.manifest_file(directory).name, None)
    head = {"format": FORMATS[output.kind], "kind": output.kind, "key": output.key if finished else None}
    write_json(paths.manifest_file(directory), head | content | {"files": files})


def read_manifest(directory: Path, *kinds: Kind) -> dict[str, Any]:
    """The manifest of a directory that was made here.

    Args:
        directory: the directory.
        kinds: what it may be.

    Raises:
        InputDataError: no manifest, or not one of these kinds in their present formats.
    """
    content = read_json(paths.manifest_file(directory))
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise InputDataError(
            f"{paths.manifest_file(directory)}: not a manifest: remove the directory and make it again"
        )
    kind, found = content.get("kind"), content.get("format")
    if kind not in kinds:
        raise InputDataError(f"{directory}: a {shown(kind)}, not a {' or '.join(kinds)}: name another")
    if found != FORMATS[kind]:
        raise InputDataError(
            f"{directory}: a {kind} of format {shown(found)}, and this version reads {FORMATS[kind]}: "
            "remove it and make it again"
        )
    return content


def is_finished(output: Output) -> bool:
    """Whether the directory was made from exactly this key and every file is there in its size."""
    try:
        content = read_manifest(output.directory, output.kind)
    except InputDataError:
        return False
    same = content.get("key") == json.loads(_as_json(output.key))  # as JSON gives it back: tuples become lists
    return same and not _differences(output.directory, content["files"])


def is_settled(output: Output) -> bool:
    """Whether the directory is finished, and nobody is at work, or was killed at work, beside it."""
    final = output.directory
    locks = final.parent.glob(f"{glob.escape(paths.lock_file(final).name)}*")
    return is_finished(output) and not [*_left(final, "old"), *_left(final, "partial"), *locks]


def check_replaceable(directory: Path, kind: Kind) -> None:
    """Refuse to replace what was not made here, so that a mistyped name never removes anybody's files.

    Raises:
        UsageError: the place is taken by a file, by a directory of another kind or without our manifest, or by one
            that holds a file which was added or changed since it was made.
    """
    remedy = "it will not be replaced: give another name, or move it away"
    if not directory.exists() and not directory.is_symlink():
        return
    if directory.is_symlink() or not directory.is_dir():
        raise UsageError(f"{directory}: not a directory of stas's own; {remedy}")
    found = _files(directory)
    if not found:
        return
    try:
        content = read_manifest(directory, kind)
    except InputDataError as error:
        raise UsageError(f"{directory}: not known to be a {kind} made by stas ({error}); {remedy}") from error
    recorded = content["files"]
    names = {str(path.relative_to(directory)): path for path in found if path != paths.manifest_file(directory)}
    foreign = [name for name, path in names.items() if recorded.get(name) != path.stat().st_size]
    if foreign:
        raise UsageError(f"{directory}: holds what was added or changed since it was made ({named(foreign)}); {remedy}")


def named(cases: Iterable[str]) -> str:
    """The first cases by name, and how many more there are."""
    listed = list(cases)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _publish(partial: Path, output: Output) -> None:
    """Give a finished directory its final name, in place of an older one.

    Another process sees the older one or this one. Where the file system cannot swap two names (NFS), it may for a
    moment see none; `_remove_leftovers` brings the old one back if this process is killed then.
    """
    final, aside = output.directory, _beside(output.directory, uuid.uuid4().hex[:12], "old")
    assert paths.manifest_file(partial).is_file(), "the block must write the manifest"
    sync_path(partial)
    while True:
        check_replaceable(output.directory, output.kind)
        try:
            partial.rename(final)
            break
        except OSError as error:  # only these two say that an older result is there
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if exchange(partial, final):
                partial.rename(aside)  # under its old name it could be taken for work to resume
                break
            final.rename(aside)
        except FileNotFoundError:  # another process publishes the same name at this moment
            continue
    sync_path(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(final: Path, keep: Path | None) -> None:
    """Remove what killed processes left beside a directory, or put it back. The caller must hold the lock."""
    for aside in _left(final, "old"):
        if not final.exists():  # killed between the two renames of `_publish`
            aside.rename(final)
            log.warning("%s: brought back; a process was killed while it replaced it", final)
        shutil.rmtree(aside, ignore_errors=True)
    for partial in _left(final, "partial"):
        if partial != keep:
            shutil.rmtree(partial, ignore_errors=True)


def _resume(output: Output) -> None:
    """Make the partial directory, or take over what a killed process finished of it."""
    partial = output.directory
    if paths.manifest_file(partial).exists() and not is_finished(output):  # an older one that had just been swapped out
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    for directory in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        remove_leftovers(directory)


def _differences(directory: Path, recorded: dict[str, Any]) -> bool:
    """Whether a recorded file is missing or has another size."""
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in _files(directory)}
    return any(sizes.get(name) != size for name, size in recorded.items())


def _files(directory: Path) -> list[Path]:
    """All files below a directory, sorted, without those of file browsers."""
    return sorted(path for path in directory.rglob("*") if not path.is_dir() and path.name not in BYSTANDERS)


def _left(final: Path, suffix: str) -> list[Path]:
    """What processes at work on `final` keep beside it. A set called `lite0.tta` is not the business of `lite0`."""
    name = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{12}}\.{suffix}")
    return sorted(path for path in final.parent.glob(f".*.{suffix}") if name.fullmatch(path.name))


def _beside(final: Path, tag: str, suffix: str) -> Path:
    return final.with_name(f".{final.name}.{tag}.{suffix}")


def _as_json(key: Any) -> str:
    return json.dumps(key)
