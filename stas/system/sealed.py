"""Sealed JSON files: the last line holds the SHA-256 of every byte before it, so that no flipped bit goes unseen."""

import hashlib
import json
from pathlib import Path
from typing import Any

from stas.errors import UsageError
from stas.system.files import atomic_write, parse_json_file
from stas.system.untrusted import MAX_JSON_BYTES, MAX_JSON_VALUES, count_values, read_bounded

_BEFORE, _AFTER = b',\n "checksum": "', b'"\n}\n'
_LENGTH = len(_BEFORE) + hashlib.sha256().digest_size * 2 + len(_AFTER)


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with a checksum as its last entry, atomically.

    Raises:
        UsageError: it would be too large for `read_sealed`.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False).encode()
    _check(path, len(text) + _LENGTH, count_values(text))
    body = text.removesuffix(b"\n}")
    assert content and body != text
    with atomic_write(path) as file:
        file.write(body)
        file.write(seal(body))


def seal(body: bytes) -> bytes:
    """The end of a file that begins with `body`, which is an object without its last bracket."""
    return _BEFORE + hashlib.sha256(body).hexdigest().encode() + _AFTER


def read_sealed(path: Path) -> tuple[Any, bool]:
    """Read a JSON file, and whether it is just as `write_sealed` wrote it.

    A file without a checksum is read too, because earlier versions wrote none: look at its format first.

    Raises:
        InputDataError: it is not readable as JSON.
    """
    text = read_bounded(path, MAX_JSON_BYTES)
    body, end = text[:-_LENGTH], text[-_LENGTH:]
    return parse_json_file(path, text), end == seal(body)


def check_room(path: Path, value: Any, share: int) -> None:
    """Refuse, before the work, what would not fit a sealed file that is `share` times the size of `value` as JSON.

    Raises:
        UsageError: it would be too large for `read_sealed`.
    """
    text = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    _check(path, len(text), count_values(text) * share)


def _check(path: Path, size: int, values: int) -> None:
    if size > MAX_JSON_BYTES or values > MAX_JSON_VALUES:
        raise UsageError(
            f"{path}: would have {size} bytes and {values} values, but at most {MAX_JSON_BYTES} and {MAX_JSON_VALUES} "
            "can be read again: divide the images among several directories"
        )
