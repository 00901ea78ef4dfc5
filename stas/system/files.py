"""Atomic writes: a file is either the old version or the new one, never half of one."""

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

from stas.errors import EXIT_FAILED, EXIT_USAGE, KEPT, InputDataError
from stas.system.heartbeat import beat
from stas.system.printing import escaped_json
from stas.system.untrusted import MAX_JSON_BYTES, check_file, parse_json, read_bounded, refusal

SYNCED_AT_ONCE = 16


@contextmanager
def atomic_write(path: Path, synced: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path`, synced to disk, only if the block succeeds.

    If not `synced`, the file may be empty after a power cut: for directories that `sync_files` syncs before they are
    renamed.

    The temporary file is in the same directory, because a rename is atomic only within one file system. Its name is
    random: two pods of one Job share a host name and have the same process numbers.
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
            with suppress(OSError):  # on a volume that has become read-only; report the first error instead
                temporary.unlink(missing_ok=True)
            raise
        if synced:
            sync_path(path.parent)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the file's name to write errors, which the system leaves out."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def system_trouble(error: OSError) -> tuple[str, int] | None:
    """What the system refused, with the file and a remedy, and the exit code for it.

    None for an error that has no number, such as those that libraries make up.
    """
    if error.errno is None:
        return None
    if error.errno in _REMEDIES:
        return _told(error, _REMEDIES[error.errno]), EXIT_FAILED
    if error.errno in _NAME_REMEDIES:
        return _told(error, _NAME_REMEDIES[error.errno]), EXIT_USAGE
    return _told(error, f"make sure that it is there and that this user may use it. {KEPT}"), EXIT_FAILED


def _told(error: OSError, remedy: str) -> str:
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    return f"{path or _unnamed()}: {error.strerror}{_free_space(path) if error.errno == errno.ENOSPC else ''}: {remedy}"


def _unnamed() -> str:
    """What an error without a file name is about."""
    try:
        Path.cwd()
    except OSError:
        return "the current directory"
    return "a file"


_REMEDIES = {
    errno.ENOSPC: f"free some space there, or use a larger volume. {KEPT}",
    errno.EDQUOT: f"delete files you do not need, or ask for a larger quota. {KEPT}",
    errno.EFBIG: f"raise the limit on the size of files (ulimit -f), or use another file system. {KEPT}",
    errno.EROFS: f"mount the volume for writing, or use another directory. {KEPT}",
    errno.EACCES: f"let this user read and write there, or use another directory. {KEPT}",
    errno.EPERM: f"let this user read and write there, or use another directory. {KEPT}",
    errno.EIO: f"the disk or its network failed; check the kernel log. {KEPT}",
    errno.ESTALE: f"the file server lost the file; mount the volume again. {KEPT}",
    errno.EMFILE: f"raise the limit on open files (ulimit -n). {KEPT}",
    errno.ENFILE: f"close other programs: this machine has no more open files to give. {KEPT}",
    errno.EAGAIN: f"raise the limit on processes (ulimit -u), or use fewer workers. {KEPT}",
}
_NAME_REMEDIES = {
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOTDIR: "a file is where a directory is needed: name another directory, or move the file away",
    errno.EEXIST: "something else has this name: name another directory, or move it away",
    errno.EISDIR: "a directory is where a file is needed: name a file, or move the directory away",
    errno.ELOOP: "its links lead in a circle: remove one of them",
}


def _free_space(path: Path | None) -> str:
    try:
        usage = shutil.disk_usage(next(parent for parent in (path or Path()).absolute().parents if parent.is_dir()))
    except (OSError, StopIteration):
        return ""
    return f" ({usage.free / 2**20:.1f} of {usage.total / 2**20:.0f} MiB free)"


def remove_leftovers(directory: Path, pattern: str = ".*.tmp") -> None:
    """Remove files that killed processes left in a directory. The caller must hold its lock."""
    for path in directory.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; false if the system or the file system cannot, as on NFS."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOENT):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's headers


def sync_path(path: Path) -> None:
    """Sync a file's content, or a directory's names, so that they survive a power cut."""
    with named_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_files(directory: Path) -> None:
    """Sync everything under a directory, many files in parallel: they share the disk's slow flushes."""
    with ThreadPoolExecutor(SYNCED_AT_ONCE) as threads:
        for _ in threads.map(sync_path, [directory, *directory.rglob("*")]):
            pass


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Piece by piece: one string would take several times its size."""
    with atomic_write(path) as file:
        for piece in json.JSONEncoder(indent=1, ensure_ascii=False).iterencode(value):
            file.write(escaped_json(piece).encode())
        file.write(b"\n")


def append_json_line(path: Path, value: Any) -> None:
    """Append `value` as one line of JSON; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(escaped_json(json.dumps(value, ensure_ascii=False)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read a JSON file; raise InputDataError naming the file if it is not valid."""
    return parse_json_file(path, read_bounded(path, MAX_JSON_BYTES))


def parse_json_file(path: Path, content: bytes) -> Any:
    """Parse the content of a JSON file; raise InputDataError naming the file if it is not valid."""
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputDataError(f"{path}: not readable as JSON ({error}): restore it, or create it again") from error


def sha256(path: Path, most: int = sys.maxsize) -> str:
    """The file's SHA-256 in hexadecimal.

    Raises:
        InputDataError: not a regular file of at most `most` bytes.
        StoppedEarly: this machine could not read it for now (see `stop_if_passing`).
    """
    check_file(path, most)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                beat()
    except OSError as error:
        raise refusal(path, error) from error
    return digest.hexdigest()
