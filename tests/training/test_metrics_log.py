"""Metrics on disk and in TensorBoard, and the log line per epoch."""

import errno
import json
import math
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stas.errors import InputDataError, StoppedEarly
from stas.training import metrics_log
from stas.training.metrics_log import MetricsLog, clock, epoch_line, read_metrics, time_left


def _record(epoch: int, **values):
    return {"epoch": epoch, "train_loss": 1 / epoch, "best": True, **values}


def test_metrics_are_on_disk_line_by_line(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    log.append(_record(1))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [_record(1)]
    log.append(_record(2))
    assert read_metrics(tmp_path / "metrics.jsonl") == log.records == [_record(1), _record(2)]
    log.close()


def test_resume_cuts_off_later_epochs_and_a_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(_record(epoch)) + "\n" for epoch in (1, 2, 3)) + '{"epoch": 4, "trai')
    with MetricsLog(path, tmp_path / "tensorboard", keep_epochs=2) as log:
        assert log.records == [_record(1), _record(2)]
        log.append(_record(3, again=1))
    assert read_metrics(path) == [_record(1), _record(2), _record(3, again=1)]


def test_a_fresh_start_forgets_the_former_run(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(_record(1)) + "\n")
    MetricsLog(path, tmp_path / "tensorboard").close()
    assert read_metrics(path) == []


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path: Path):
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as log:
        log.append({"epoch": 1, "train_loss": math.nan, "val_loss": math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1, "train_loss": null, "val_loss": null}\n'
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["epoch"] == 1
    assert math.isnan(record["train_loss"])
    assert math.isnan(record["val_loss"])


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    assert read_metrics(path) == [{"epoch": 1}, {"epoch": 3}]
    assert re.search(r"metrics\.jsonl: line 2 is not a record", caplog.text)
    with pytest.raises(InputDataError, match=r"none\.jsonl: no readable metrics"):
        read_metrics(tmp_path / "none.jsonl")


def test_tensorboard_has_the_same_scalars_and_no_epoch_twice(tmp_path: Path):
    path, events = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    with MetricsLog(path, events) as log:
        for epoch in (1, 2, 3):
            log.append(_record(epoch))
    with MetricsLog(path, events, keep_epochs=2) as log:  # epoch 3 came after the last checkpoint: it runs again
        log.append(_record(3, train_loss=9.0))
    read = EventAccumulator(str(events)).Reload()
    assert read.Tags()["scalars"] == ["train_loss"]
    points = [(event.step, event.value) for event in read.Scalars("train_loss")]
    assert points == [(1, 1.0), (2, 0.5), (3, 9.0)]


RECORD = {
    "epoch": 7,
    "train_loss": 0.41234,
    "val_loss": 0.39876,
    "val_dice": 0.71,
    "lr": 1e-4,
    "images_per_second": 35.25,
    "seconds": 24.31,
    "best": True,
}


def test_tensorboard_names_its_directory_when_its_first_write_is_refused(tmp_path: Path, monkeypatch):
    def failing(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(metrics_log, "SummaryWriter", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "events")
    assert caught.value.filename == str(tmp_path / "events")


def test_metrics_that_a_disk_does_not_give_for_now_are_not_called_unreadable(tmp_path: Path, monkeypatch):
    def failing(_: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(StoppedEarly, match="this machine could not read it"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_epoch_line():
    assert epoch_line(RECORD, 500, 3725.4) == (
        "epoch   7/500  train loss 0.4123  validation loss 0.3988  Dice 0.7100  lr 1.00e-04  35.2 images/s  "
        "24.3 s/epoch  left 1:02:05  * best so far"
    )


def test_epoch_line_without_validation_or_estimate():
    line = epoch_line({"epoch": 2, "train_loss": math.nan, "best": False}, 9, math.nan)
    assert line.startswith("epoch 2/9  train loss nan  validation loss -  Dice -")
    assert line.endswith("left unknown")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3599, "0:59:59"),
        (36000, "10:00:00"),
        (90061, "25:01:01"),
        (math.inf, "unknown"),
    ],
)
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


def test_time_left_is_the_mean_of_recent_epochs_times_those_to_go():
    records = [{"epoch": epoch + 1, "seconds": seconds} for epoch, seconds in enumerate([100.0, 10.0, 20.0, 30.0])]
    assert time_left(records, epochs=10, recent=3) == 6 * 20
    assert time_left(records, epochs=10) == 6 * 40
    assert time_left(records, epochs=4) == 0
    assert math.isnan(time_left([], epochs=4))
