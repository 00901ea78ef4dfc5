"""Reading files that come from strangers: how large they may be, and how little of them is repeated in a message.

The readers of JSON, YAML, images, stores and checkpoints stand on these few functions, so that no file makes a reader
wait, or take more than a bounded amount of memory, before it has been looked at.
"""

import json
import reprlib
import stat
from pathlib import Path
from typing import Any

import yaml

from stas.errors import InputDataError

# A parsed value takes up to 150 bytes for each bracket, comma and colon: 1 GiB. A polygon of 10^6 points has 3 million.
MAX_JSON_VALUES = 7_000_000
MAX_JSON_BYTES = 256 * 1024 * 1024  # a manifest has half a kilobyte for each sample
MAX_YAML_BYTES = 64 * 1024  # a recipe has one or two kilobytes; PyYAML takes a second for these

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def check_file(path: Path, most: int) -> int:
    """The size in bytes of a file that may be opened: not a pipe or device, on which reading never ends.

    Links are followed, because data sets are often directories of links.

    Raises:
        InputDataError: not a regular file, missing, or larger than `most` bytes.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputDataError(f"{path}: not readable ({error}): look at its name and permissions") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputDataError(f"{path}: not readable, because it is not a regular file: take it out of the directory")
    if found.st_size > most:
        raise InputDataError(f"{path}: {found.st_size} bytes, more than {most}: use a smaller file")
    return found.st_size


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        InputDataError: as `check_file`, or not readable.
    """
    size = check_file(path, most)
    try:
        with open(path, "rb") as file:
            content = file.read(size + 1)
            if len(content) > size:  # it has grown since it was looked at
                content += file.read(most + 1 - len(content))
    except OSError as error:
        raise InputDataError(f"{path}: not readable ({error}): look at its permissions and its disk") from error
    if len(content) > most:
        raise InputDataError(f"{path}: more than {most} bytes: use a smaller file")
    return content


def parse_json(content: bytes) -> Any:
    """Parse JSON, in memory of at most 8 times its size plus 1 GiB.

    Raises:
        ValueError: not JSON, too deeply nested, or of more than MAX_JSON_VALUES values; says so in a line.
    """
    values = sum(content.count(mark) for mark in b"[{,:")  # of those in strings, too: base64 has none of them
    if values > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES} values")
    try:
        # Not a UTF-16 or UTF-32 text, which json would detect: nobody writes those, and they take four times as much.
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("too deeply nested") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines can stand for more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"an alias (*) in line {mark.line + 1}: write the value out instead")
        return super().compose_node(parent, index)


def parse_yaml(content: bytes | str) -> Any:
    """Parse YAML of plain values: no tags that make objects, no aliases.

    Raises:
        ValueError: not such YAML, too deeply nested, or more than MAX_YAML_BYTES; says so in a line.
    """
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"more than {MAX_YAML_BYTES} bytes")
    try:
        return yaml.load(content, _PlainLoader)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    except Exception as error:  # PyYAML's own, and what its constructors raise for 2001-99-99 or !!int x
        raise ValueError(" ".join(str(error)[:500].split()) or type(error).__name__) from error


def shown(value: Any) -> str:
    """A value for a message: its repr, at most some 60 characters of it, made without making all of it."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # a number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
