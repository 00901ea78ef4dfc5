"""Files that are either the old version or the new one, never half of one."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from stas.errors import InputDataError
from stas.system.untrusted import MAX_JSON_BYTES, check_file, parse_json, read_bounded

SYNCED_AT_ONCE = 16


@contextmanager
def atomic_write(path: Path, synced: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path`, synced to disk, only if the block succeeds.

    Where not `synced`, it may be empty after a power cut: for a directory that `sync_files` precedes its own renaming.

    The temporary file stands in the same directory, because a rename is atomic only within one
    file system. Its name is made up: two pods of one Job share a host name and have the same process numbers.
    """
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with open(temporary, "wb") as file:
                yield file
                if synced:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # on a volume that is read-only by now; what went wrong before is to be told
                temporary.unlink(missing_ok=True)
            raise
        if synced:
            sync_path(path.parent)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Name the file in errors of writing, which the system leaves nameless."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def disk_trouble(error: OSError) -> str | None:
    """What a person can do about a disk that is full, read-only or failing; None where an error is none of these."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    return f"{path or 'a file'}: {error.strerror}{_room(path) if error.errno == errno.ENOSPC else ''}: {remedy}"


_KEPT = "What was complete before is kept, and the same command goes on from it"
_REMEDIES = {
    errno.ENOSPC: f"free some space there, or take a larger volume. {_KEPT}",
    errno.EDQUOT: f"remove what is not needed, or ask for a larger quota. {_KEPT}",
    errno.EROFS: f"mount the volume for writing, or give another directory. {_KEPT}",
    errno.EACCES: f"let this user write there, or give another directory. {_KEPT}",
    errno.EPERM: f"let this user write there, or give another directory. {_KEPT}",
    errno.EIO: f"the disk or its network failed; look at the kernel's log. {_KEPT}",
    errno.ESTALE: f"the file server lost the file; mount the volume again. {_KEPT}",
}


def _room(path: Path | None) -> str:
    try:
        usage = shutil.disk_usage(next(parent for parent in (path or Path()).absolute().parents if parent.is_dir()))
    except (OSError, StopIteration):
        return ""
    return f" ({usage.free / 2**20:.1f} of {usage.total / 2**20:.0f} MiB are free)"


def remove_leftovers(directory: Path, pattern: str = ".*.tmp") -> None:
    """Remove what killed processes have left in a directory. Only who holds its lock may do so."""
    for path in directory.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; false where the system or the file system cannot, as on NFS."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOENT):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def sync_path(path: Path) -> None:
    """Make what is in a file, or the names in a directory, survive a power cut."""
    with named_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_files(directory: Path) -> None:
    """Bring all that lies under a directory to disk: many at once share the disk's few slow steps."""
    with ThreadPoolExecutor(SYNCED_AT_ONCE) as threads:
        for _ in threads.map(sync_path, [directory, *directory.rglob("*")]):
            pass


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically, and piece by piece: all at once takes several times its size."""
    with atomic_write(path) as file:
        for piece in json.JSONEncoder(indent=1, ensure_ascii=False).iterencode(value):
            file.write(piece.encode())
        file.write(b"\n")


def append_json_line(path: Path, value: Any) -> None:
    """Append `value` as one line of JSON; on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read a JSON file; raise InputDataError naming the file where it is not one."""
    content = read_bounded(path, MAX_JSON_BYTES)
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputDataError(f"{path}: not readable as JSON ({error}): restore it, or make it again") from error


def sha256(path: Path, most: int = sys.maxsize) -> str:
    """The file's SHA-256 in hexadecimal; raise InputDataError where it is no regular file of at most `most` bytes."""
    check_file(path, most)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
