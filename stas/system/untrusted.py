"""Read files from strangers: limit their size, and quote little of them in messages.

The readers of JSON, YAML, images, stores and checkpoints use these functions, so no file can make a reader hang or use
unbounded memory before it has been checked.
"""

import errno
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

import yaml

from stas.errors import InputDataError, StoppedEarly, UnreadableError

# Parsing takes up to 150 bytes per bracket, comma and colon: 1 GiB. A polygon of 10^6 points has 3 million.
MAX_JSON_VALUES = 7_000_000
MAX_JSON_BYTES = 256 * 1024 * 1024  # a manifest has half a kilobyte per sample
MAX_YAML_BYTES = 64 * 1024  # a recipe has one or two kilobytes; PyYAML takes a second for 64

# True of the file or its name, whatever machine reads it. Any other error is a trouble of this machine and may pass.
_OF_THE_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENXIO,
    errno.ENODEV, errno.EFBIG, errno.EOVERFLOW,
}  # fmt: skip
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_REMEDIES = {
    errno.ENOMEM: "give it more memory, or use fewer workers",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or use fewer workers",
    errno.ENFILE: "close other programs, because this machine has too many files open",
    errno.ESTALE: "mount the volume again",
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def check_file(path: Path, most: int) -> int:
    """Check that a file is safe to open, and return its size in bytes. Reading a pipe or device might never end.

    Links are followed, because data sets are often directories of links.

    Raises:
        InputDataError: not a regular file, missing, or larger than `most` bytes.
        StoppedEarly: this machine could not look at it for now (see `stop_if_passing`).
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        raise refusal(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise InputDataError(f"{path}: not readable, because it is not a regular file: move it out of the directory")
    if found.st_size > most:
        raise InputDataError(f"{path}: {found.st_size} bytes, more than {most}: use a smaller file")
    return found.st_size


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        InputDataError: see `check_file`, or not readable.
        StoppedEarly: this machine could not read it for now (see `stop_if_passing`).
    """
    size = check_file(path, most)
    try:
        with open(path, "rb") as file:
            content = file.read(size + 1)
            if len(content) > size:  # it has grown since it was checked
                content += file.read(most + 1 - len(content))
    except OSError as error:
        raise refusal(path, error) from error
    if len(content) > most:
        raise InputDataError(f"{path}: more than {most} bytes: use a smaller file")
    return content


def refusal(path: Path, error: OSError | ValueError) -> InputDataError:
    """The error to raise because a file cannot be opened or read; UnreadableError if this user may not.

    Raises:
        StoppedEarly: the fault is not the file's (see `stop_if_passing`).
    """
    stop_if_passing(path, error)
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return UnreadableError(f"{path}: not readable ({error}): let this user read it, or move it away")
    return InputDataError(f"{path}: not readable ({error}): check its name and permissions")


def stop_if_passing(path: Path | str, error: BaseException) -> None:
    """Stop if an error may pass, such as a failing disk or want of memory: it does not make the file a bad one.

    Raises:
        StoppedEarly: names file, error and remedy.
    """
    number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno if isinstance(error, OSError) else None
    if number is None or number in _OF_THE_FILE or number in _FORBIDDEN:
        return
    remedy = _REMEDIES.get(number, "check the disk, its network and the kernel log")
    raise StoppedEarly(
        f"{path}: this machine could not read it ({os.strerror(number)}), so nothing is known about the file: "
        f"{remedy}. Run the same command again; if only this file fails, restore it or move it away"
    ) from error


def resolved(path: Path) -> Path:
    """The path with its links followed; only made absolute if they form a loop.

    Raises:
        StoppedEarly: this machine could not follow them for now (see `stop_if_passing`).
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        stop_if_passing(path, error)
        return path.absolute()


def count_values(content: bytes) -> int:
    """About how many values JSON has: its brackets, commas and colons. Those in strings count too; base64 has none."""
    return sum(content.count(mark) for mark in b"[{,:")


def system_error(error: Exception) -> Exception:
    """The system's error that a library, which has no numbers for them, names in its message; else the error itself."""
    passing = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return next((OSError(each, str(error)) for each in passing if os.strerror(each) in str(error)), error)


def parse_json(content: bytes) -> Any:
    """Parse JSON, using at most 8 times its size plus 1 GiB of memory.

    Raises:
        ValueError: not JSON, too deeply nested, or more than MAX_JSON_VALUES values; the message is one line.
    """
    if count_values(content) > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES} values")
    try:
        # Not json's own detection of UTF-16 and UTF-32: nobody writes those, and they take four times the memory.
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("too deeply nested") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can expand to more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"an alias (*) in line {mark.line + 1}: write the value out instead")
        return super().compose_node(parent, index)


def parse_yaml(content: bytes | str) -> Any:
    """Parse YAML of plain values: no tags that create objects, no aliases.

    Raises:
        ValueError: not plain YAML, too deeply nested, or more than MAX_YAML_BYTES; the message is one line.
    """
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"more than {MAX_YAML_BYTES} bytes")
    try:
        return yaml.load(content, _PlainLoader)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    except Exception as error:  # PyYAML's own, and those of its constructors for 2001-99-99 or !!int x
        raise ValueError(" ".join(str(error)[:500].split()) or type(error).__name__) from error


def shown(value: Any) -> str:
    """A short repr of a value for a message, about 60 characters, without building the whole repr."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # a number with more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
