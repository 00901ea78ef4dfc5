"""The record beside a file of pretrained weights: which bytes it holds and where they came from.

`stas weights` writes FILE.safetensors and FILE.safetensors.json. The record is a pin: while it is there, neither
another file nor another revision from the hub takes the file's place. A file that the user put there has none.
"""

import hashlib
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stas.errors import InputDataError, UsageError
from stas.system.files import atomic_write, sha256, write_json
from stas.system.untrusted import parse_json, read_bounded, shown

MAX_RECORD_BYTES = 64 * 1024  # it has a few hundred
_SHA256, _COMMIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")
_NAME = re.compile(r"[\w.-]{1,100}(/[\w.-]{1,100})?", re.ASCII)  # of a repository


@dataclass(frozen=True)
class WeightsRecord:
    """What is known of a file of weights.

    Attributes:
        sha256: of the file, in hexadecimal.
        repository: on the Hugging Face hub; None if it did not come from there.
        commit: of that repository, 40 hexadecimal digits.
        pickle: the SHA-256 of the pickle that it was converted from, if it was.
    """

    sha256: str
    repository: str | None = None
    commit: str | None = None
    pickle: str | None = None

    def __str__(self) -> str:
        hub = f", {self.repository} at commit {self.commit}" if self.repository else ""
        pickle = f", converted from the pickle {self.pickle}" if self.pickle else ""
        return f"SHA-256 {self.sha256}{hub}{pickle}"


def record_file(weights: Path) -> Path:
    """The record of a file of weights."""
    return weights.with_name(f"{weights.name}.json")


def read_record(weights: Path) -> WeightsRecord | None:
    """The record of a file of weights, which itself may be missing; None if it has none.

    Raises:
        InputDataError: the record is damaged.
    """
    path = record_file(weights)
    if not os.path.lexists(path):
        return None
    content = read_bounded(path, MAX_RECORD_BYTES)
    try:
        return _parse(parse_json(content))
    except ValueError as error:
        raise InputDataError(
            f"{path}: not readable as the record of {weights.name} ({error}): restore it, or delete both files and "
            f"run `stas weights fetch {weights.parent}`"
        ) from error


def _parse(values: Any) -> WeightsRecord:
    if not isinstance(values, dict):
        raise ValueError(f"{shown(values)} instead of an object")
    for key, pattern in (("sha256", _SHA256), ("repository", _NAME), ("commit", _COMMIT), ("pickle", _SHA256)):
        value = values.get(key)
        if (key == "sha256" or value is not None) and not (isinstance(value, str) and pattern.fullmatch(value)):
            raise ValueError(f"{key} is {shown(value)}")
    if (values.get("repository") is None) != (values.get("commit") is None):
        raise ValueError("repository and commit belong together")
    return WeightsRecord(values["sha256"], values.get("repository"), values.get("commit"), values.get("pickle"))


def check_recorded(found: WeightsRecord, file: Path, weights: Path) -> WeightsRecord:
    """Compare a file that was found with the record of the one that is expected.

    Args:
        found: what is known of the file.
        file: where it was found, for the message.
        weights: the file of weights, which may be missing, whose record counts.

    Returns:
        The record; if there is none, `found`.

    Raises:
        UsageError: the file is another one.
        InputDataError: the record is damaged.
    """
    record = read_record(weights)
    if record and record.sha256 != found.sha256:
        raise UsageError(
            f"{file}: not the weights that {record_file(weights)} names ({found}, instead of {record}).\n"
            f"To get those, delete {weights} and run `stas weights fetch {weights.parent}`; to use these from now on, "
            "delete the record"
        )
    return record or found


def write_weights(weights: Path, content: bytes, **origin: str | None) -> WeightsRecord:
    """Write safetensors and their record. The same content may be written again.

    Args:
        weights: the file to write.
        content: of the file.
        origin: repository, commit and pickle, see `WeightsRecord`.

    Raises:
        UsageError: other weights are there, or the record that is there names other weights.
        InputDataError: the record that is there is damaged.
    """
    record = WeightsRecord(hashlib.sha256(content).hexdigest(), **origin)
    check_recorded(record, weights, weights)
    if os.path.lexists(weights) and sha256(weights) != record.sha256:
        raise UsageError(f"{weights}: other weights are there: move them away, or choose another name")
    # The record first: if this is killed in between, the next attempt must get the same weights.
    write_json(record_file(weights), asdict(record))
    with atomic_write(weights) as file:
        file.write(content)
    return record
