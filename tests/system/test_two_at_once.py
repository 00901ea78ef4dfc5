"""Every stage started twice at once, or again after a kill, in real processes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from stas import paths
from stas.config import Recipe
from stas.paths import Workspace
from tests.support.launch import PATIENCE, QUIET, command, wait_until
from tests.support.lock_files import leave
from tests.support.runs import recipe_file
from tests.support.stages import content, finished, stages  # noqa: F401  a fixture

pytestmark = pytest.mark.slow
STAGES = ["preprocess", "train", "infer", "vote", "evaluate"]
# Code for a separate process: it sends itself SIGSTOP at its first file operation in a directory that has a lock.
STOP_WITH_LOCK = """
import os, signal, sys
from pathlib import Path

root, busy = os.environ.pop("STOP_WITH_LOCK_IN", None), []

def look(event, arguments):
    if busy or not event.startswith(("open", "os.")) or not arguments or not str(arguments[0]).startswith(root):
        return
    busy.append(True)
    if any(path.name.endswith(".lock") for path in Path(root).rglob(".*")):
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        busy.clear()

if root:
    sys.addaudithook(look)
"""
BUSY = "in use by host {host}, process {pid}, since "

RANKS = """
import sys
from pathlib import Path
from stas.system import distributed
from stas.errors import StoppedEarly
from stas.system.locks import lock
with distributed.join_ranks() as ranks:
    try:
        with distributed.entered_by_first(ranks, lock(Path(sys.argv[1]), patience=0.3)) as held:
            print(f"rank {ranks.rank} works, holds {held is not None}\\n", end="", flush=True)
            distributed.barrier()
    except StoppedEarly as error:
        print(f"rank {ranks.rank} stops: {error}\\n", end="", flush=True)
"""


@pytest.fixture
def workspace(finished: Workspace, tmp_path: Path, request: pytest.FixtureRequest) -> Workspace:  # noqa: F811
    workspace = Workspace(tmp_path / "ws")
    shutil.copytree(finished.root, workspace.root)
    if request.node.callspec.params["stage"] == "preprocess":
        shutil.rmtree(workspace.stores)
    return workspace


def start(arguments: tuple[object, ...], **environment: str) -> subprocess.Popen[str]:
    variables = os.environ | QUIET | environment
    return subprocess.Popen(command(arguments), env=variables, stderr=subprocess.PIPE, text=True)


def wait_for_stop(process: subprocess.Popen[str]) -> None:
    def stopped() -> bool:
        assert process.poll() is None, process.communicate()
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED

    wait_until(stopped, "the first to have its lock")


@pytest.mark.parametrize("stage", STAGES)
def test_one_works_and_the_other_waits_or_finds_it_done(workspace, sample, tiny: Recipe, tmp_path, stage):
    arguments = stages(sample, recipe_file(tiny, tmp_path), workspace.root)[stage]
    both = [start(arguments) for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert not any("Traceback" in text for text in said)
    once = content(workspace.root)
    assert start(arguments).wait() == 0
    assert content(workspace.root) == once
    assert not list(workspace.root.rglob(".*"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_next_start_takes_over_from_a_killed_one(workspace, sample, tiny: Recipe, tmp_path, stage):
    arguments = stages(sample, recipe_file(tiny, tmp_path), workspace.root)[stage]
    (tmp_path / "sitecustomize.py").write_text(STOP_WITH_LOCK)
    variables = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "STOP_WITH_LOCK_IN": str(workspace.root)}
    with start(arguments, **variables) as process:
        wait_for_stop(process)  # while the second waits, it says who holds the lock
        with start(arguments) as second:
            assert second.stderr
            lines = [second.stderr.readline()]
            while "waiting" not in lines[-1]:
                assert lines[-1], lines
                lines.append(second.stderr.readline())
            assert BUSY.format(host=os.uname().nodename, pid=process.pid) in lines[-1]
            process.send_signal(signal.SIGKILL)
            rest = second.stderr.read()
            assert second.wait() == 0, rest
            assert f"taken over from host {os.uname().nodename}, process {process.pid}" in rest
    assert not list(workspace.root.rglob(".*"))


def test_the_first_rank_takes_the_lock_and_the_others_learn_the_outcome(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    path = paths.lock_file(tmp_path / "run")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, path]

    def said() -> list[str]:
        done = subprocess.run(run, env=os.environ | QUIET, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))

    assert said() == ["rank 0 works, holds True", "rank 1 works, holds False"]
    leave(path, silent=0)
    first, second = said()
    assert "rank 0 stops" in first and "in use by host node7, process 1, since 2026-01-01" in first
    assert "rank 1 stops" in second and "the first rank could not start" in second
