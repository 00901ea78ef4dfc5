"""Training metrics: JSON lines, TensorBoard events, and a log line per epoch."""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from stas.errors import InputDataError
from stas.system.files import atomic_write, named_errors
from stas.system.printing import named
from stas.system.untrusted import parse_json, stop_if_passing

log = logging.getLogger(__name__)
Record = dict[str, Any]


class MetricsLog:
    """One JSON object per epoch, appended to a file and to TensorBoard's events.

    The file is first truncated to `keep_epochs` epochs, so that a resumed run records every epoch once. Damaged lines
    among them are left as they are. Only one rank of a run may open it.

    Args:
        path: the file.
        tensorboard_dir: where the events go.
        keep_epochs: number of finished epochs.
        newest: the record of the last finished epoch, from its checkpoint; appended if the file does not have it.
    """

    def __init__(self, path: Path, tensorboard_dir: Path, keep_epochs: int = 0, newest: Record | None = None) -> None:
        lines = _read_lines(path) if keep_epochs and path.exists() else []
        kept = [(line, record) for line, record in lines if record is None or record["epoch"] <= keep_epochs]
        with atomic_write(path) as file:
            file.writelines(line + b"\n" for line, _ in kept)
        self.records = [record for _, record in kept if record]  # of all epochs so far, over all parts of the run
        self._path = path
        # Unbuffered, because a failed write in a buffer would fail again at close.
        self._file = path.open("ab", buffering=0)
        with named_errors(tensorboard_dir):
            self._events = SummaryWriter(str(tensorboard_dir), purge_step=keep_epochs + 1)
        newest = _as_record(newest)
        if newest and newest["epoch"] == keep_epochs and keep_epochs not in (each["epoch"] for each in self.records):
            self.append(newest)
        if len(kept) < keep_epochs and len(self.records) < keep_epochs:
            log.warning("%s: has %d of %d finished epochs; the others were lost", path, len(self.records), keep_epochs)

    def append(self, record: Record) -> None:
        """Append one epoch; it is on disk when this returns. The key `epoch` (from 1) is the step of the events."""
        with named_errors(self._path):
            line = memoryview(_line(record))
            while line:  # a disk that fills up takes a part and refuses the rest
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        self.records.append(record)
        with named_errors(Path(self._events.log_dir)):
            for key, value in record.items():
                if key != "epoch" and isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._events.add_scalar(key, value, record["epoch"])
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        with named_errors(Path(self._events.log_dir)):
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """The epochs' records in order; null, written for a number that is not finite, becomes NaN.

    A half-written last line, left by a killed process, is ignored; so are damaged lines, with one warning that names
    them.

    Raises:
        InputDataError: the file is missing or cannot be read.
    """
    return [record for _, record in _read_lines(path) if record]


def _read_lines(path: Path) -> list[tuple[bytes, Record | None]]:
    """Each line with its record, None if it is damaged; without a half-written last line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        stop_if_passing(path, error)
        raise InputDataError(f"{path}: no readable metrics ({error}): give the directory of a trained run") from error
    lines = [(line, _parsed(line)) for line in content.split(b"\n")]
    if not lines[-1][1]:
        lines.pop()
    damaged = [f"line {number}" for number, (_, record) in enumerate(lines, start=1) if record is None]
    if damaged:
        what = "is not a record" if len(damaged) == 1 else "are not records"
        log.warning("%s: %s %s of an epoch, and left out", path, named(damaged), what)
    return lines


def _parsed(line: bytes) -> Record | None:
    try:
        return _as_record(parse_json(line))
    except ValueError:
        return None


def _as_record(value: Any) -> Record | None:
    """A record with NaN for null; None if it is not an object of numbers with an epoch from 1."""
    if not isinstance(value, dict) or type(value.get("epoch")) is not int or value["epoch"] < 1:
        return None
    try:
        sizes = [abs(float(number)) for number in value.values() if number is not None]
    except (TypeError, ValueError, OverflowError):
        return None
    if any(isinstance(number, str) for number in value.values()) or any(math.isinf(size) for size in sizes):
        return None
    return {key: math.nan if number is None else number for key, number in value.items()}


def epoch_line(record: Record, epochs: int, seconds_left: float) -> str:
    """One log line: the epoch's results, its speed, and the time left.

    Args:
        record: keys epoch (from 1), train_loss, val_loss, val_dice, lr, images_per_second, seconds (whole epoch)
            and best (bool); a missing one shows as a dash.
        epochs: total number of epochs in the run.
        seconds_left: estimate for the remaining epochs; NaN if there is none.
    """
    parts = [
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}",
        f"train loss {_number(record, 'train_loss', '.4f')}",
        f"validation loss {_number(record, 'val_loss', '.4f')}",
        f"Dice {_number(record, 'val_dice', '.4f')}",
        f"lr {_number(record, 'lr', '.2e')}",
        f"{_number(record, 'images_per_second', '.1f')} images/s",
        f"{_number(record, 'seconds', '.1f')} s/epoch",
        f"left {clock(seconds_left)}",
    ]
    return "  ".join(parts) + ("  * best so far" if record.get("best") else "")


def time_left(records: Sequence[Record], epochs: int, recent: int = 5) -> float:
    """Estimate the seconds until epoch `epochs` is finished, from the mean `seconds` of the last `recent` epochs.

    NaN if there are none.
    """
    seconds = [record["seconds"] for record in records[-recent:] if "seconds" in record]
    return (epochs - records[-1]["epoch"]) * sum(seconds) / len(seconds) if seconds else math.nan


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss; "unknown" for NaN and infinity."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def finite(record: Record) -> Record:
    """A record for strict JSON, which has no NaN and no infinity: null instead."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _line(record: Record) -> bytes:
    """A record as one line of strict JSON."""
    return json.dumps(finite(record), allow_nan=False).encode() + b"\n"


def _number(record: Record, key: str, style: str) -> str:
    value = record.get(key)
    return "-" if value is None else format(value, style)
