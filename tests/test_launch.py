"""`stas launch`: ranks, their common exit code, and signals, with real processes."""

import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from stas.config import Recipe
from stas.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE, EXIT_USAGE, MachineError
from stas.infer import infer
from stas.launch import _ended, _lost, _ranks, launch, worst_exit_code
from stas.models.checkpoint import load_checkpoint
from stas.paths import Workspace
from stas.train import train
from stas.training.metrics_log import read_metrics
from tests.support.launch import PATIENCE, started, stas


@pytest.mark.parametrize(
    ("codes", "stopped", "expected"),
    [
        ([0, 0], False, EXIT_OK),
        ([0, 0], True, EXIT_OK),  # the signal came after all had finished
        ([75, 75], True, EXIT_RESUMABLE),
        ([75, 75], False, EXIT_RESUMABLE),  # another node got the signal
        ([None, 75], False, EXIT_RESUMABLE),  # torchrun killed a rank that was slower to stop
        ([1, None], True, 1),  # the checkpoint could not be written
        ([None, None], True, EXIT_RESUMABLE),  # killed during start-up
        ([None, 0], False, 1),
        ([2, None], False, EXIT_USAGE),
        ([None, 3], True, EXIT_BAD_INPUT),
    ],
)
def test_one_exit_code_for_all_ranks(codes: list[int | None], stopped: bool, expected: int):
    assert worst_exit_code(codes, stopped) == expected


@pytest.mark.parametrize(
    ("said", "alive", "lost"),
    [
        ("", True, False),  # running
        ("", False, True),  # killed
        ("1", True, True),  # failed, but its process hangs
        ("2", False, True),
        ("0", False, False),
        ("0", True, False),
        ("75", False, False),
    ],
)
def test_who_counts_as_lost(said: str, alive: bool, lost: bool, tmp_path: Path):
    with subprocess.Popen(["sleep", "600" if alive else "0"]) as rank:
        (tmp_path / str(rank.pid)).write_text(said)
        while not alive and not _ended(rank.pid):
            time.sleep(0.01)
        assert _lost(tmp_path, rank.pid) == lost
        rank.kill()
        rank.wait()
        assert _ended(rank.pid), "also when somebody has waited for it"


def start(arguments: list[object]) -> AbstractContextManager[subprocess.Popen[str]]:
    return started([sys.executable, "-m", "stas", "launch", *map(str, arguments)])


def recipe_file(recipe: Recipe, path: Path, epochs: int) -> Path:
    values = recipe.model_dump(mode="json")
    values["train"]["epochs"] = epochs
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_stage_of_one_process_runs_without_torchrun(tmp_path: Path):
    done = stas("launch", "vote", "--members", tmp_path / "a", tmp_path / "b", tmp_path / "c", "--out", tmp_path / "o")
    assert done.returncode == EXIT_BAD_INPUT
    assert "3 of 3 members are missing" in done.stderr


def test_a_wrong_option_of_a_stage_of_several_ranks_is_exit_code_2():
    done = stas("launch", "--processes", 2, "train", "--recipe", "lite0", "--bogus", 1)
    assert done.returncode == EXIT_USAGE and "--bogus" in done.stderr


def test_several_nodes_need_a_place_to_meet():
    done = stas("launch", "--nodes", 2, "train", "--recipe", "lite0", "--workspace", "w")
    assert done.returncode == EXIT_USAGE and "--rendezvous HOST:PORT" in done.stderr
    assert "--node INDEX, from 0 to 1" in done.stderr


@pytest.mark.slow
def test_ranks_that_refuse_a_recipe_give_its_exit_code(store_workspace: Workspace, tiny: Recipe, tmp_path: Path):
    path = recipe_file(tiny, tmp_path / "tiny.yaml", epochs=1)
    done = stas(
        *("launch", "--processes", 2, "train", "--recipe", path, "--workspace", store_workspace.root),
        *("--run", "refused", "--set", "train.batch=1"),
    )
    assert done.returncode == EXIT_USAGE
    assert "1 images over 2 ranks" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_stops_all_ranks_at_one_step(
    store_workspace: Workspace, tiny: Recipe, tmp_path: Path, sent: signal.Signals
):
    run = store_workspace.run(f"launched-{sent.name}")
    path = recipe_file(tiny, tmp_path / "tiny.yaml", epochs=100_000)
    again = ["--processes", 2, "train", "--recipe", path, "--workspace", store_workspace.root, "--run", run.root.name]
    with start(again) as process:
        while not run.metrics.exists() or len(read_metrics(run.metrics)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(sent)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_RESUMABLE, said
    # 7 images in batches of 4 make two steps an epoch, so a loss summed over both ranks belongs to one of them.
    assert load_checkpoint(run.checkpoint("last")).metadata["state"]["epoch"] >= 2
    assert "run the same command again to resume" in said


@pytest.mark.slow
def test_two_launchers_meet_and_train_as_two_nodes(store_workspace: Workspace, tiny: Recipe, tmp_path: Path):
    path = recipe_file(tiny, tmp_path / "tiny.yaml", epochs=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    node = ["--nodes", 2, "--processes", 1, "--rendezvous", place, "--job", "both"]
    arguments = ["train", "--recipe", path, "--workspace", store_workspace.root, "--run", "two-nodes"]
    with start([*node, "--node", 1, *arguments]) as second, start([*node, "--node", 0, *arguments]) as first:
        said = first.communicate(timeout=PATIENCE)[1] + second.communicate(timeout=PATIENCE)[1]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert len(re.findall(r"epoch +2/2", said)) == 1  # one rank logs


@pytest.mark.parametrize("stage", ["train", "infer"])
@pytest.mark.parametrize("asked", [("--gpus", 4), ("--gpus", "all"), ("--gpus", 2, "--processes", 2)])
def test_gpus_that_were_asked_for_must_be_there(stage: str, asked: tuple[object, ...], tmp_path: Path):
    which = ("--recipe", "lite0") if stage == "train" else ("--run", "r", "--images", tmp_path)
    done = stas("launch", *asked, stage, *which, "--workspace", tmp_path)
    assert done.returncode == 1
    assert f"stas: --gpus {asked[1]}: this process sees 0 GPUs" in done.stderr and "--gpus 0" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_stage_that_needs_a_gpu_does_not_run_on_the_cpu(store_workspace: Workspace, tiny: Recipe):
    train(tiny, store_workspace, "cpu", device="cpu")
    (images := store_workspace.root / "images").mkdir()
    Image.new("RGB", (40, 40)).save(images / "one.png")
    for stage in (
        lambda: train(tiny, store_workspace, "r", device="cuda"),
        lambda: infer("cpu", images, store_workspace, device="cuda"),
    ):
        with pytest.raises(MachineError, match=r"--device cuda: process 0 .* torch sees 0.*--device cpu"):
            stage()
    assert not store_workspace.run("r").checkpoint("last").exists()


@pytest.mark.parametrize(
    ("processes", "gpus", "found", "ranks"),
    [(None, None, 0, 1), (None, None, 3, 3), (4, None, 0, 4), (None, 2, 4, 2), (None, "all", 3, 3), (1, 4, 4, 1),
     (4, 0, 4, 4), (None, 0, 4, 1), (None, 4, 3, None), (4, "all", 3, None), (3, 2, 2, None), (4, 4, 0, None)],
)  # fmt: skip
def test_ranks_by_processes_and_gpus(
    processes: int | None, gpus: Any, found: int, ranks: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stas.launch._gpus", lambda: found)
    if ranks is None:
        with pytest.raises(MachineError, match=f"--gpus {gpus}: this process sees {found} GPUs"):
            _ranks(processes, gpus)
    else:
        assert _ranks(processes, gpus) == ranks


def test_a_launcher_without_gpus_says_that_it_wants_the_cpu(monkeypatch: pytest.MonkeyPatch):
    ran: list[list[str]] = []
    monkeypatch.setattr("stas.launch._gpus", lambda: 2)
    monkeypatch.setattr("stas.launch.signal.signal", lambda *_: None)
    for gpus in (0, None):
        launch(["train", "--recipe", "r"], lambda stage: ran.append(list(stage)) or 0, print, processes=1, gpus=gpus)
    assert ran == [["train", "--device", "cpu", "--recipe", "r"], ["train", "--recipe", "r"]]
