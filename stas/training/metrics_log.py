"""Training metrics: JSON lines, TensorBoard events, and a log line per epoch."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from stas.errors import InputDataError
from stas.system.files import named_errors, write_text

Record = dict[str, Any]


class MetricsLog:
    """One JSON object per epoch, appended to a file and to TensorBoard's events.

    The file is first truncated to `keep_epochs` epochs, so that a resumed run records every epoch once.
    Only one rank of a run may open it.
    """

    def __init__(self, path: Path, tensorboard_dir: Path, keep_epochs: int = 0) -> None:
        kept = [record for record in read_metrics(path) if record["epoch"] <= keep_epochs] if path.exists() else []
        write_text(path, "".join(_line(record) for record in kept))
        self.records = read_metrics(path)  # of all epochs so far, over all parts of the run
        self._path = path
        # Unbuffered, because a failed write in a buffer would fail again at close.
        self._file = path.open("ab", buffering=0)
        self._events = SummaryWriter(str(tensorboard_dir), purge_step=keep_epochs + 1)

    def append(self, record: Record) -> None:
        """Append one epoch; it is on disk when this returns. The key `epoch` (from 1) is the step of the events."""
        with named_errors(self._path):
            line = memoryview(_line(record).encode())
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

    A half-written last line, left by a killed process, is ignored.

    Raises:
        InputDataError: the file is missing, or another line is not a record; the message names file and line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputDataError(f"{path}: no readable metrics ({error}): give the directory of a trained run") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
                raise ValueError("not an object with an integer 'epoch'")
        except ValueError as error:
            if number == len(lines):
                break
            raise InputDataError(f"{path}: line {number} is not a record ({error}): remove the line") from error
        records.append({key: math.nan if value is None else value for key, value in record.items()})
    return records


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

    NaN before the first epoch.
    """
    seconds = [record["seconds"] for record in records[-recent:]]
    return (epochs - records[-1]["epoch"]) * sum(seconds) / len(seconds) if seconds else math.nan


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss; "unknown" for NaN and infinity."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _line(record: Record) -> str:
    """A record as one line of strict JSON, which has no NaN and no infinity."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _number(record: Record, key: str, style: str) -> str:
    value = record.get(key)
    return "-" if value is None else format(value, style)
