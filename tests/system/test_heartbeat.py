"""A rank that is alive but makes no progress is named and ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stas.config import Recipe
from stas.errors import EXIT_FAILED
from stas.models.checkpoint import load_checkpoint
from stas.paths import Workspace
from stas.system import heartbeat
from stas.system.heartbeat import Pulse, hung
from stas.training.metrics_log import read_metrics
from tests.support.launch import PATIENCE, started, wait_until
from tests.support.runs import changed, recipe_file

ME, OTHER = (0, os.getpid()), (1, os.getppid())


@pytest.mark.parametrize(
    ("mine", "other", "found"),
    [
        (Pulse(5, 0, True), Pulse(4, 1), [OTHER]),  # I wait for it
        (Pulse(5, 2), Pulse(5, 1), [OTHER]),  # I have a batch and wait in the backward pass; it has none
        (Pulse(5, 9), Pulse(6, 0), [ME]),
        (Pulse(5, 1), Pulse(5, 1), [ME, OTHER]),
        (Pulse(5, 0, True), Pulse(5, 0, True), []),  # for a rank on another node
    ],
)
def test_who_hangs_if_all_are_silent(mine: Pulse, other: Pulse, found: list[tuple[int, int]]):
    assert hung({ME: mine, OTHER: other}, {ME: 60.0, OTHER: 60.0}, stalled_after=60) == found
    assert hung({ME: mine, OTHER: other}, {ME: 50.0, OTHER: 50.0}, stalled_after=60) == []


def test_a_rank_that_works_on_is_not_hung():
    assert hung({ME: Pulse(5, 1), OTHER: Pulse(5, 3)}, {ME: 0.0, OTHER: 60.0}, stalled_after=60) == [OTHER]


def test_a_stopped_process_is_named_rather_than_its_equals():
    with subprocess.Popen(["sleep", str(PATIENCE)]) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        stopped = (1, process.pid)
        assert hung({ME: Pulse(5, 1), stopped: Pulse(5, 1)}, {ME: 60.0, stopped: 60.0}, stalled_after=60) == [stopped]
        process.kill()


def test_a_rank_reports_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STAS_HEARTBEAT_DIR", str(tmp_path))
    monkeypatch.setattr(heartbeat, "_mine", Pulse())
    heartbeat.start(3)

    def seen() -> tuple[int, int, bool]:
        ((key, pulse),) = heartbeat._pulses(tmp_path).items()
        assert key == (3, os.getpid())
        return pulse.meetings, pulse.beats, pulse.waiting

    assert seen() == (0, 1, False)
    with heartbeat.waiting():
        assert seen() == (1, 0, True)
    heartbeat.beat()
    assert seen() == (2, 1, False)
    heartbeat.end(3)
    assert not list(tmp_path.iterdir())
    heartbeat.beat()  # without a launcher
    with heartbeat.waiting():
        pass


# Rank 1 stops in the middle of a step, or in its loader, once it has taken a few steps.
STUCK = """
import os

if os.environ.get("RANK") == "1":
    import signal
    import sys
    import time
    from stas import train
    from stas.training import loader

    def stuck(real, act, *before):
        count = [0]
        def step(*arguments, **named):
            count[0] += 1
            if count[0] == 9:
                act()
            return real(*arguments, **named)
        return step

    if {loads}:
        loader.SampleCache.take = stuck(loader.SampleCache.take, lambda: time.sleep(600))
    else:
        train.prepare = stuck(train.prepare, lambda: os.kill(os.getpid(), signal.SIGSTOP))
"""


@pytest.mark.slow
@pytest.mark.parametrize("loads", [True, False], ids=["in the loader", "stopped"])
def test_a_hung_rank_is_named_and_ends_the_job(
    store_workspace: Workspace, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: bool
):
    (tmp_path / "sitecustomize.py").write_text(STUCK.format(loads=loads))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    path, run = recipe_file(changed(tiny, train={"epochs": 100_000}), tmp_path), store_workspace.run("hung")
    stage = ["train", "--recipe", path, "--workspace", store_workspace.root, "--run", "hung"]
    line = ["launch", "--processes", 2, "--stalled-after", "15s", *stage]
    began = time.monotonic()
    with started([sys.executable, "-m", "stas", *map(str, line)]) as process:
        wait_until(lambda: run.metrics.exists() or process.poll() is not None, "training")
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_FAILED, said
    assert "rank 1 (process " in said and "made no progress" in said, said
    assert "rank 0 (process " not in said, said
    # 7 images in batches of 4 make two steps an epoch.
    epochs = load_checkpoint(run.checkpoint("last")).metadata["state"]["epoch"]
    assert epochs >= 2 and len(read_metrics(run.metrics)) >= epochs
    assert time.monotonic() - began < PATIENCE / 2
