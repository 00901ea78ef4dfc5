"""A store's data file, safe for LMDB to map: on local disk, checked page by page, opened once per process.

LMDB maps its file into memory, which its documentation forbids on remote file systems. There the file is first copied
to local disk.

LMDB trusts the file it maps: one wrong page number kills the process with a signal. So the pages are first checked as
plain bytes. This protects against malicious stores: the manifest's hashes find damage, but an attacker also writes the
manifest.
"""

import fcntl
import hashlib
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import lmdb
from lmdb.verify import VerifyError, verify

from stas.errors import InputDataError, UsageError
from stas.paths import cache_directory
from stas.system import heartbeat
from stas.system.files import atomic_write, remove_leftovers
from stas.system.untrusted import stop_if_passing, system_error

log = logging.getLogger(__name__)

MAKE_AGAIN = "delete the store and run `stas preprocess` again"
COPY_BLOCK = 16 << 20
NAMES = 9  # of a directory that are tried one after the other

_environments: dict[Path, tuple[int, lmdb.Environment]] = {}
_opening = threading.Lock()


def environment(file: Path) -> lmdb.Environment:
    """This process's environment for a file: LMDB allows one per process, and not one opened before a fork.

    Raises:
        InputDataError: the file was not written by LMDB.
    """
    process, opened = _environments.get(file, (0, None))
    if opened is not None and process == os.getpid():
        return opened
    with _opening:
        process, opened = _environments.get(file, (0, None))
        if opened is not None and process == os.getpid():
            return opened
        if opened is not None:
            opened.close()  # the parent's own copy stays open
            del _environments[file]
        opened = _open(file)
        _environments[file] = (os.getpid(), opened)
        return opened


def close(file: Path) -> None:
    """Close a file; `environment` opens it again."""
    with _opening:
        _, opened = _environments.pop(file, (0, None))
        if opened is not None:
            opened.close()


def local_copy(data: Path, key: str, size: int, sha256: str) -> Path:
    """A node-local copy of a data file on a network file system, made in one sequential read.

    Args:
        data: the file.
        key: its store's key, which names the copy.
        size: its size in bytes; a copy of another size, or one that others could have changed, is replaced.
        sha256: of the file; a copy with another is not kept.

    Raises:
        InputDataError: what was read has another SHA-256.
        UsageError: not enough space for it.
    """
    cache = _cache()
    copy = cache.resolve() / f"{key}.mdb"
    with (cache / f"{key}.lock").open("w") as lock:
        with heartbeat.waiting():
            fcntl.flock(lock, fcntl.LOCK_EX)  # all ranks of a node arrive together, and one copy is enough
        if not _is_own(copy, stat.S_ISREG) or copy.stat().st_size != size:
            log.info("copying %s to %s, because LMDB must not read from a network file system", data, copy)
            remove_leftovers(cache, f".{copy.name}.*.tmp")
            try:
                found = copy_file(data, copy)
            except OSError as error:
                raise UsageError(
                    f"{data}: cannot be copied to {copy} ({error}): set STAS_CACHE_DIR to a larger local disk"
                ) from error
            copy.chmod(0o600)  # whatever the umask: a copy that others could write is not trusted
            if found != sha256:
                copy.unlink()
                raise InputDataError(f"{data}: damaged: its content does not match the manifest: {MAKE_AGAIN}")
    return copy


def local_disk() -> Path:
    """A directory on local disk, where LMDB can work."""
    directory = cache_directory() or Path(tempfile.gettempdir())
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def own_directory(name: str) -> Path:
    """A directory on local disk that only this user can change, made if it is not there.

    In a shared temporary directory anybody can make one of this name first, to have us read what they put there. Such
    a one is not used, but another name.

    Raises:
        UsageError: all names are taken.
    """
    directories = [local_disk() / name, *(local_disk() / f"{name}-{number}" for number in range(2, NAMES + 1))]
    for directory in directories:
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        if _is_own(directory, stat.S_ISDIR):
            return directory
        log.warning("%s: not used, because it is a link, another user's, or others can write to it", directory)
    raise UsageError(
        f"{directories[0]}: it, and those with -2 to -{NAMES} added, are links, another user's, or others can write "
        "to them: set STAS_CACHE_DIR to a local directory of your own"
    )


def copy_file(source: Path, target: Path) -> str:
    """Copy a file sequentially and atomically; return the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as file, atomic_write(target) as copy:
        while block := file.read(COPY_BLOCK):
            digest.update(block)
            copy.write(block)
            heartbeat.beat()
    return digest.hexdigest()


def _open(file: Path) -> lmdb.Environment:
    _check_pages(file)
    try:
        # Samples are read in any order, but each is megabytes in one piece: without readahead, a store that is not
        # yet in memory is read page by page, 16 times as slowly.
        return lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=True)
    except (lmdb.Error, OSError) as error:
        stop_if_passing(file, system_error(error))
        raise InputDataError(f"{file}: not readable as a store's data ({error}): {MAKE_AGAIN}") from error


def _check_pages(file: Path) -> None:
    """Refuse a file that LMDB must not map. The file must not change while it is open.

    The check takes a millisecond a sample, so a good file is remembered by its inode, size and times. No changed or
    foreign file can have the same ones, because the kernel sets the change time.
    """
    mark = _mark(file)
    if mark and _is_own(mark, stat.S_ISREG):
        return
    if problem := _first_problem(file):
        raise InputDataError(f"{file}: not a data file written by LMDB ({problem}): {MAKE_AGAIN}")
    try:
        if mark:
            mark.touch(mode=0o600)
    except OSError as error:
        log.debug("%s: not remembered as checked (%s)", file, error)


def _mark(file: Path) -> Path | None:
    """The empty file that marks `file` as checked; None if nothing can be written."""
    try:
        cache = _cache()
    except (OSError, UsageError):
        return None
    found = file.stat()
    identity = [str(file), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    return cache / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.checked"


def _first_problem(file: Path) -> str | None:
    """The first problem found by py-lmdb's own verifier, which reads the pages as plain bytes."""
    try:
        problems = verify(str(file), subdir=False)
    except (VerifyError, OSError) as error:
        stop_if_passing(file, error)
        return str(error)
    except Exception as error:  # if the verifier itself fails, the file is damaged too
        stop_if_passing(file, error)
        return f"{type(error).__name__}: {error}"
    return str(problems[0]) if problems else None


def _cache() -> Path:
    """This user's own directory on local disk."""
    return own_directory(f"stas-{os.geteuid()}")


def _is_own(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is of a kind (`stat.S_ISDIR` or `stat.S_ISREG`), this user's, and not for others to write."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
