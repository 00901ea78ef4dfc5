"""A run that was stopped or killed ends with the same bits as one that was not; one that fails says why."""

import json
import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stas import train as train_module
from stas.config import Recipe
from stas.data.store import Store
from stas.errors import EXIT_FAILED, EXIT_RESUMABLE, StoppedEarly, TrainingError
from stas.models.checkpoint import load_checkpoint
from stas.paths import RunPaths, Workspace, lock_file
from stas.train import train
from stas.training.metrics_log import read_metrics
from tests.support.launch import PATIENCE, QUIET, started, stas, wait_until
from tests.support.runs import assert_same_run, changed, recipe_file

pytestmark = pytest.mark.slow


def start(*arguments: object, ranks: int = 1) -> AbstractContextManager[subprocess.Popen[str]]:
    return started([sys.executable, "-m", "stas", "launch", "--processes", str(ranks), *map(str, arguments)])


def position(run: RunPaths) -> tuple[int, int]:
    """Epochs done and steps of the next one, by the newest checkpoint."""
    try:
        state = load_checkpoint(run.checkpoint("last")).metadata["state"]
    except ValueError:  # none yet, or it is just being replaced
        return (0, 0)
    return state["epoch"], state["step"]


def epochs_logged(run: RunPaths) -> int:
    return len(read_metrics(run.metrics)) if run.metrics.exists() else 0


def wait_for_epochs(process: subprocess.Popen[str], run: RunPaths, count: int) -> bool:
    """Whether the process still runs when `count` epochs are done."""
    wait_until(lambda: epochs_logged(run) >= count or process.poll() is not None, f"{count} epochs")
    return process.poll() is None


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if "RANK" in child.environ() and "train" in child.cmdline()]
    return sorted(ranks, key=lambda child: int(child.environ()["RANK"]))


def endless_recipe(tiny: Recipe) -> Recipe:
    """7 images, 4 steps an epoch, and as many epochs as it takes until the test has seen what it waits for."""
    return changed(tiny, train={"epochs": 1_000_000, "batch": 2})


def two_more_epochs(recipe: Recipe, run: RunPaths) -> Recipe:
    """The recipe with an end, soon after where the run was stopped."""
    return changed(recipe, train={"epochs": epochs_logged(run) + 2})


def test_two_ranks_stopped_twice_by_a_signal_to_one_rank_equal_two_never_stopped(
    store_workspace: Workspace, tiny: Recipe, tmp_path: Path
):
    path = recipe_file(endless_recipe(tiny), tmp_path)
    again = ["train", "--recipe", path, "--workspace", store_workspace.root, "--run"]
    whole, parts = store_workspace.run("pair-whole"), store_workspace.run("pair-parts")
    for number, sent in enumerate((signal.SIGTERM, signal.SIGUSR1)):
        with start(*again, "pair-parts", ranks=2) as process:
            assert wait_for_epochs(process, parts, epochs_logged(parts) + 2), process.communicate()[1]
            ranks_of(process)[1 - number].send_signal(sent)
            _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == EXIT_RESUMABLE, said
    recipe_file(two_more_epochs(endless_recipe(tiny), parts), tmp_path)
    for run in ("pair-whole", "pair-parts"):
        assert stas("launch", "--processes", 2, *again, run).returncode == 0
    assert_same_run(whole, parts)


def stop_within_validation(images: int) -> None:
    """Have SIGTERM sent to this process while the given image, counted over the run, is validated."""
    read, count = Store.full_mask, [0]

    def read_and_signal(self: Store, index: int, label: str | None = None) -> Any:
        count[0] += 1
        if count[0] == images:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, index)

    Store.full_mask = read_and_signal


def test_stopped_within_a_validation_equals_never_stopped(
    store_workspace: Workspace, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
):
    """3 images for validation, one at a time: the second epoch's second is image 5."""
    options = {"channels": [4, 8], "strides": [2], "norm": "BATCH"}
    recipe = changed(tiny, model={"options": options}, train={"epochs": 4, "batch": 1})
    train(recipe, store_workspace, "validated")
    run = store_workspace.run("stopped-validating")
    monkeypatch.setattr(Store, "full_mask", Store.full_mask)  # to be put back
    stop_within_validation(5)
    with pytest.raises(StoppedEarly, match="stopped in epoch 2; run the same command again to resume"):
        train(recipe, store_workspace, run.root.name)
    assert position(run) == (1, 7) and len(read_metrics(run.metrics)) == 1, "all 7 steps, not validated"
    monkeypatch.undo()
    train(recipe, store_workspace, run.root.name)
    assert_same_run(store_workspace.run("validated"), run)


def test_two_ranks_stopped_within_a_validation_equal_two_never_stopped(
    store_workspace: Workspace, tiny: Recipe, tmp_path: Path
):
    """Of 3 images the second rank has one: it is told to stop when it has no more, and the first still has one."""
    path = recipe_file(changed(tiny, train={"epochs": 4, "batch": 2}), tmp_path)
    again = ["train", "--recipe", path, "--workspace", store_workspace.root, "--run"]
    whole, parts = store_workspace.run("pair-validated"), store_workspace.run("pair-stopped-validating")
    assert stas("launch", "--processes", 2, *again, whole.root.name).returncode == 0
    script = tmp_path / "stops.py"
    script.write_text(
        "import os, sys\nfrom stas.cli import main\nfrom tests.training.test_resume import stop_within_validation\n"
        "if os.environ['RANK'] == '1': stop_within_validation(2)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--",
        str(script),
    ]
    environment = os.environ | QUIET | {"PYTHONPATH": str(Path.cwd())}
    stage = [*map(str, again), parts.root.name]
    stopped = subprocess.run([*torchrun, *stage], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert "stopped in epoch 2; run the same command again to resume" in stopped.stderr, stopped.stderr
    assert position(parts) == (1, 4) and len(read_metrics(parts.metrics)) == 1, "all 4 steps, not validated"
    assert stas("launch", "--processes", 2, *again, parts.root.name).returncode == 0
    assert_same_run(whole, parts)


def test_killed_again_and_again_equals_never_killed(store_workspace: Workspace, tiny: Recipe, tmp_path: Path):
    """kill -9 as soon as a checkpoint within an epoch is seen, while more of them are being written."""
    recipe = endless_recipe(tiny)
    path = recipe_file(recipe, tmp_path)
    again = ["train", "--recipe", path, "--workspace", store_workspace.root, "--run", "kill-parts"]
    again += ["--checkpoint-every", "0.01s"]
    run = store_workspace.run("kill-parts")
    for _ in range(3):
        with start(*again) as process:
            assert wait_for_epochs(process, run, epochs_logged(run) + 2), process.communicate()[1]
            while process.poll() is None and not position(run)[1]:  # until a checkpoint within an epoch is seen
                pass
            process.kill()
        assert process.returncode == -signal.SIGKILL
    recipe = two_more_epochs(recipe, run)
    for name in ("kill-whole", "kill-parts"):
        train(recipe, store_workspace, name)
    assert_same_run(store_workspace.run("kill-whole"), run)


def test_the_scaler_of_fp16_resumes(store_workspace: Workspace, tiny: Recipe):
    recipe = changed(tiny, train={"precision": "fp16", "epochs": 4})
    train(recipe, store_workspace, "scaled-whole")
    train(changed(recipe, train={"epochs": 2}), store_workspace, "scaled-parts")
    train(recipe, store_workspace, "scaled-parts")
    assert_same_run(store_workspace.run("scaled-whole"), store_workspace.run("scaled-parts"))
    scalers = [load_checkpoint(store_workspace.run(f"scaled-{kind}").checkpoint("last")) for kind in ("whole", "parts")]
    assert scalers[0].metadata["scaler"] == scalers[1].metadata["scaler"]


def test_a_killed_rank_ends_the_others_and_the_log_names_it(store_workspace: Workspace, tiny: Recipe, tmp_path: Path):
    path = recipe_file(endless_recipe(tiny), tmp_path)
    run = store_workspace.run("orphan")
    with start("train", "--recipe", path, "--workspace", store_workspace.root, "--run", "orphan", ranks=2) as process:
        assert wait_for_epochs(process, run, 2)
        ranks = ranks_of(process)
        ranks[1].kill()
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_FAILED
    assert "forcefully exiting" not in said, "torchrun waited for its time limit"
    assert not any(rank.is_running() for rank in ranks)
    assert "rank      : 1" in said and "SIGKILL" in said, said


def test_ranks_end_with_a_launcher_that_was_killed(store_workspace: Workspace, tiny: Recipe, tmp_path: Path):
    path = recipe_file(endless_recipe(tiny), tmp_path)
    run = store_workspace.run("left")
    with start("train", "--recipe", path, "--workspace", store_workspace.root, "--run", "left", ranks=2) as process:
        assert wait_for_epochs(process, run, 2)
        ranks = ranks_of(process)
        process.kill()
        wait_until(lambda: all(not rank.is_running() or rank.status() == "zombie" for rank in ranks), "both ranks' end")
    assert not lock_file(run.root).exists()
    assert position(run) > (2, 0)


# Rank 1 waits in a C function, as it would inside NCCL, where a signal only sets a flag. Rank 0 fails and waits for its
# peer before it ends, as NCCL may make it; or it waits to be killed.
DEAF = """
import os
from pathlib import Path

if "RANK" in os.environ:
    import ctypes
    from stas.system import distributed
    from stas import train

    def wait(*_):
        Path({directory!r}, os.environ["RANK"]).touch()
        while True:
            ctypes.CDLL(None).sleep(600)

    def fail(*_):
        raise KeyError("lost")

    train.train_step = wait
    if os.environ["RANK"] == "0" and {fails}:
        train.train_step = fail
        distributed.dist.destroy_process_group = wait
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_lost_rank_ends_one_that_hears_no_signal(
    store_workspace: Workspace, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
):
    """torchrun would wait for two minutes, or for ever."""
    (tmp_path / "sitecustomize.py").write_text(DEAF.format(directory=str(tmp_path), fails=fails))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    path = recipe_file(tiny, tmp_path)
    with start("train", "--recipe", path, "--workspace", store_workspace.root, "--run", "deaf", ranks=2) as process:
        both = [tmp_path / rank for rank in "01"]
        wait_until(lambda: process.poll() is not None or all(path.exists() for path in both), "both ranks")
        assert process.poll() is None, process.communicate()[1]
        ranks = ranks_of(process)
        if not fails:
            ranks[0].kill()
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_FAILED
    assert not any(rank.is_running() for rank in ranks)
    assert f"process {ranks[1].pid} is still running after rank process {ranks[0].pid} was lost" in said, said
    assert ("rank 0 of 2: KeyError: 'lost'" if fails else "rank      : 0") in said, said


def test_an_exception_is_logged_with_its_rank(tmp_path: Path):
    script = tmp_path / "fails.py"
    script.write_text(
        "from stas.system import distributed\n"
        "with distributed.join_ranks() as ranks:\n"
        "    if ranks.rank == 1: raise KeyError('lost')\n"
        "    distributed.barrier()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | QUIET | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0
    assert "rank 1 of 2: KeyError: 'lost'" in done.stderr


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the network give NaN in these steps of the run."""
    step, count = train_module.train_step, [0]

    def with_poison(run, state, batch, *rest):
        count[0] += 1
        if count[0] in steps:
            batch.low.fill_(torch.nan)  # from which the images are scaled
        return step(run, state, batch, *rest)

    monkeypatch.setattr(train_module, "train_step", with_poison)


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(
    store_workspace: Workspace, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
):
    poisoned(monkeypatch, {3})
    run = store_workspace.run("poisoned")
    with pytest.raises(TrainingError, match=r"not finite in epoch 2, step 1, on samples sample_\d+, .*max_bad_steps"):
        train(tiny, store_workspace, "poisoned")
    record = json.loads(run.bad_steps.read_text())
    assert (record["epoch"], record["step"]) == (2, 1) and len(record["samples"]) == 4
    assert position(run) == (1, 0), "the checkpoint before is kept"


def test_a_bounded_number_of_bad_steps_is_skipped(
    store_workspace: Workspace, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
):
    # Batch normalisation would keep the bad values in its running statistics.
    options = {"channels": [4, 8], "strides": [2], "norm": "BATCH"}
    recipe = changed(tiny, model={"options": options}, train={"epochs": 3, "max_bad_steps": 2})
    poisoned(monkeypatch, {2, 3})
    train(recipe, store_workspace, "skipping")
    run = store_workspace.run("skipping")
    saved = load_checkpoint(run.checkpoint("last"))
    assert saved.metadata["state"]["bad_steps"] == 2
    assert all(bool(value.isfinite().all()) for value in saved.network.values())
    assert len(run.bad_steps.read_text().splitlines()) == 2
    poisoned(monkeypatch, {1, 2, 3})
    with pytest.raises(TrainingError, match="2 such steps may be skipped"):
        train(recipe, store_workspace, "skipping-too-often")


def test_memory_that_does_not_suffice_names_what_to_lower(
    store_workspace: Workspace, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
):
    """The allocator's error is made; that its message arrives complete is tested."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_module, "train_step", full)
    with pytest.raises(
        TrainingError,
        match=r"4 images of 64 x 64 pixels \(width x height\) on each of 1 ranks, peak .*lower train\.batch \(4",
    ):
        train(tiny, store_workspace, "full")


def test_two_trainings_of_one_run_take_turns(store_workspace: Workspace, tiny: Recipe, tmp_path: Path):
    path = recipe_file(endless_recipe(tiny), tmp_path)
    again = ["train", "--recipe", path, "--workspace", store_workspace.root, "--run", "twice"]
    run = store_workspace.run("twice")
    with start(*again) as first, start(*again) as second:
        assert wait_for_epochs(first, run, 1)  # one of the two, whichever
        holder = json.loads(lock_file(run.root).read_text())["pid"]
        holding, waiting = (first, second) if holder == first.pid else (second, first)
        assert waiting.stderr
        said = next(line for line in waiting.stderr if "in use by" in line)
        assert f"in use by host {os.uname().nodename}, process {holder}, since" in said
        holding.send_signal(signal.SIGTERM)
        assert holding.wait(PATIENCE) == EXIT_RESUMABLE
        done = len(read_metrics(run.metrics))
        assert wait_for_epochs(waiting, run, done + 2)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(PATIENCE) == EXIT_RESUMABLE
    records = [record["epoch"] for record in read_metrics(run.metrics)]
    assert records == list(range(1, len(records) + 1)), "no epoch twice, none left out"


def test_a_training_that_lost_its_lock_writes_nothing_more(
    store_workspace: Workspace, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
):
    """As after a freeze of minutes: somebody else holds the run's lock by then."""
    run, ended = store_workspace.run("robbed"), train_module._end_epoch

    def robbed(run, state, clock, val_loss):
        ended(run, state, clock, val_loss)
        if state.epoch == 2:
            file = lock_file(run.paths.root)
            file.write_text(json.dumps(json.loads(file.read_text()) | {"token": "0" * 32}))

    monkeypatch.setattr(train_module, "_end_epoch", robbed)
    with pytest.raises(StoppedEarly, match="lost its lock"):
        train(changed(tiny, train={"epochs": 5}), store_workspace, "robbed")
    assert position(run) == (1, 0)
