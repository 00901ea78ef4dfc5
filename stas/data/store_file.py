"""A store's data file as LMDB may map it: on local disk, checked page by page, opened once in each process.

LMDB maps its file into memory, which its documentation forbids on remote file systems: there the file is copied to
local disk before it is read.

LMDB trusts what it maps: one wrong page number ends the process with a signal. So the pages are walked as plain bytes
first. This is a defence against stores that strangers made to do harm: the manifest's hashes find damage, but a
stranger writes the manifest, too.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path

import lmdb
from lmdb.verify import VerifyError, verify

from stas.errors import InputDataError, UsageError
from stas.paths import cache_directory
from stas.system.files import atomic_write, remove_leftovers

log = logging.getLogger(__name__)

MAKE_AGAIN = "delete the store and run `stas preprocess` again"
COPY_BLOCK = 16 << 20

_environments: dict[Path, tuple[int, lmdb.Environment]] = {}
_opening = threading.Lock()


def environment(file: Path) -> lmdb.Environment:
    """The process's environment for a file: LMDB allows one, and none that was opened before a fork.

    Raises:
        InputDataError: the file is not what LMDB writes.
    """
    process, opened = _environments.get(file, (0, None))
    if opened is not None and process == os.getpid():
        return opened
    with _opening:
        process, opened = _environments.get(file, (0, None))
        if opened is not None and process == os.getpid():
            return opened
        if opened is not None:
            opened.close()  # the parent's own stays open
            del _environments[file]
        opened = _open(file)
        _environments[file] = (os.getpid(), opened)
        return opened


def close(file: Path) -> None:
    """Let go of a file; `environment` opens it again."""
    with _opening:
        _, opened = _environments.pop(file, (0, None))
        if opened is not None:
            opened.close()


def local_copy(data: Path, key: str, size: int) -> Path:
    """A node-local copy of a data file on a network file system, which is read once in sequence.

    Args:
        data: the file.
        key: its store's key, which names the copy.
        size: its bytes; a copy of another size is made again.

    Raises:
        UsageError: no room for it.
    """
    cache = _cache()
    copy = cache.resolve() / f"{key}.mdb"
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # all ranks of a node come at once, and one copy is enough
        if not copy.is_file() or copy.stat().st_size != size:
            log.info("copying %s to %s, because LMDB must not be read on a network file system", data, copy)
            remove_leftovers(cache, f".{copy.name}.*.tmp")
            try:
                copy_file(data, copy)
            except OSError as error:
                raise UsageError(
                    f"{data}: cannot be copied to {copy} ({error}): give a roomy local disk with STAS_CACHE_DIR"
                ) from error
    return copy


def local_disk() -> Path:
    """A directory on local disk, where LMDB may work."""
    directory = cache_directory() or Path(tempfile.gettempdir())
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def copy_file(source: Path, target: Path) -> None:
    """Copy a file from end to end, atomically."""
    with source.open("rb") as file, atomic_write(target) as copy:
        shutil.copyfileobj(file, copy, COPY_BLOCK)


def _open(file: Path) -> lmdb.Environment:
    _check_pages(file)
    try:
        # Samples are read in any order, but each is megabytes in one piece: without readahead, a store that is not
        # in memory yet comes page by page, 16 times as slowly.
        return lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=True)
    except (lmdb.Error, OSError) as error:
        raise InputDataError(f"{file}: not readable as a store's data ({error}): {MAKE_AGAIN}") from error


def _check_pages(file: Path) -> None:
    """Refuse a file that LMDB must not map. The file must not change while it is open.

    A walk takes a millisecond a sample, so a good file is remembered by its inode, size and times. No changed or
    foreign file can have the same ones, because the kernel sets the last of the times.
    """
    mark = _mark(file)
    if mark and mark.exists():
        return
    if problem := _first_problem(file):
        raise InputDataError(f"{file}: not a data file as LMDB writes it ({problem}): {MAKE_AGAIN}")
    try:
        if mark:
            mark.touch()
    except OSError as error:
        log.debug("%s: not remembered as checked (%s)", file, error)


def _mark(file: Path) -> Path | None:
    """The empty file that says `file` was checked; None where nothing can be written."""
    try:
        cache = _cache()
    except OSError:
        return None
    found = file.stat()
    identity = [str(file), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    return cache / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.checked"


def _first_problem(file: Path) -> str | None:
    """What py-lmdb's own verifier, which reads the pages as plain bytes, finds wrong with them."""
    try:
        problems = verify(str(file), subdir=False)
    except (VerifyError, OSError) as error:
        return str(error)
    except Exception as error:  # a gap in the verifier is a damaged file, too
        return f"{type(error).__name__}: {error}"
    return str(problems[0]) if problems else None


def _cache() -> Path:
    """This user's own directory on local disk."""
    cache = local_disk() / f"stas-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    return cache
