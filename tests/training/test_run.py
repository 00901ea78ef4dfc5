"""Setting up a run: new, resumed, or refused because its recipe or store changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from stas.config import Recipe
from stas.data.store import open_store
from stas.errors import InputDataError, UsageError
from stas.models.checkpoint import save_checkpoint, save_last, take_snapshot
from stas.paths import RunPaths, Workspace
from stas.preprocess import preprocess
from stas.recipe import parse_recipe
from stas.system.distributed import Ranks
from stas.training.run import TrainingRun, TrainState, set_up
from tests.support.runs import changed

ALONE = Ranks(0, 1, torch.device("cpu"))
HALFWAY = TrainState(epoch=1, step=1, images=4, loss_sum=2.5, elapsed=30.0, best_loss=0.5, best_epoch=1, bad_steps=1)


def saved(recipe: Recipe, workspace: Workspace, paths: RunPaths) -> TrainingRun:
    """A run with a checkpoint after one step."""
    run, _ = set_up(recipe, workspace, paths, ALONE)
    loss = run.loss(run.network(torch.rand(1, 3, 64, 64)), torch.ones(1, 1, 64, 64)).sum()
    loss.backward()
    run.optimizer.step()
    snapshot = take_snapshot(run.network, run.metadata(HALFWAY), run.optimizer)
    save_checkpoint(paths.checkpoint("best"), snapshot.network_only())
    save_last(paths, snapshot)
    return run


def test_a_new_run_says_what_it_is(store_workspace: Workspace, tiny: Recipe):
    paths = store_workspace.run("new-run")
    run, state = set_up(tiny, store_workspace, paths, ALONE)
    assert state == TrainState()
    assert parse_recipe(yaml.safe_load(paths.recipe.read_text()), "written") == tiny
    split = json.loads(paths.split.read_text())
    assert split["store"] == run.store.key
    assert [run.store.samples[index]["stem"] for index in run.validation] == split["validation"]
    assert sorted(run.training + run.validation) == list(range(len(run.store)))


def test_metadata_restores_the_run(store_workspace: Workspace, tiny: Recipe):
    paths = store_workspace.run("again-run")
    run = saved(tiny, store_workspace, paths)
    metadata = json.loads(json.dumps(run.metadata(HALFWAY)))
    assert parse_recipe(metadata["recipe"], "metadata") == tiny
    assert TrainState.from_json(metadata["state"], ALONE) == HALFWAY
    again, state = set_up(tiny, store_workspace, paths, ALONE)
    assert state == HALFWAY and again.training == run.training
    for name, value in run.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value), name
    for index, state in run.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(
                torch.as_tensor(again.optimizer.state_dict()["state"][index][key]), torch.as_tensor(value)
            )


def test_a_sum_over_other_ranks_stays_the_same():
    values = HALFWAY.to_json() | {"loss_sum": [1.0, 2.0, 4.0]}
    device = torch.device("cpu")
    assert [TrainState.from_json(values, Ranks(rank, 3, device)).loss_sum for rank in range(3)] == [1.0, 2.0, 4.0]
    assert [TrainState.from_json(values, Ranks(rank, 2, device)).loss_sum for rank in range(2)] == [7.0, 0.0]
    with pytest.raises(ValueError, match="something other than non-negative numbers"):
        TrainState.from_json(values | {"step": -1}, ALONE)


def test_another_recipe_is_refused(store_workspace: Workspace, tiny: Recipe):
    paths = store_workspace.run("other-run")
    saved(tiny, store_workspace, paths)
    with pytest.raises(UsageError, match=r"loss\.bce: 1\.0 before, 0\.5 now\nGive the run another name with --run"):
        set_up(changed(tiny, loss={"bce": 0.5}), store_workspace, paths, ALONE)
    for same in ({"infer": {"threshold": 0.3}}, {"train": {"epochs": 50}}):
        assert set_up(changed(tiny, **same), store_workspace, paths, ALONE)[1] == HALFWAY


def test_a_run_goes_on_with_the_store_it_began_with(
    sample: Path, tiny: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    workspace, fewer = Workspace(tmp_path / "workspace"), tmp_path / "fewer"
    preprocess([sample / "Train_Images"], [sample / "Train_Annotations"], workspace, tiny.data, workers=1)
    paths = workspace.run("moved")
    run = saved(tiny, workspace, paths)
    shutil.copytree(sample, fewer)
    for directory in ("Train_Images", "Train_Annotations"):
        min((fewer / directory).iterdir()).unlink()
    preprocess([fewer / "Train_Images"], [fewer / "Train_Annotations"], workspace, tiny.data, workers=1)
    assert open_store(workspace, tiny.data).key != run.store.key
    again, state = set_up(tiny, workspace, paths, ALONE)
    assert (again.store.key, again.training, again.validation) == (run.store.key, run.training, run.validation)
    assert state == HALFWAY
    assert f"{run.store.key}: the run goes on with the store that it began with; {workspace.root}" in caplog.text
    run.store.close()
    shutil.rmtree(run.store.directory)
    with pytest.raises(UsageError, match=rf"{run.store.key}: no longer there, .*: make it again by running `stas pre"):
        set_up(tiny, workspace, paths, ALONE)
    preprocess([sample / "Train_Images"], [sample / "Train_Annotations"], workspace, tiny.data, workers=1)
    assert set_up(tiny, workspace, paths, ALONE)[0].training == run.training


@pytest.mark.parametrize("key", ["../../elsewhere", "", None, 7])
def test_a_checkpoint_that_names_no_store_is_refused(store_workspace: Workspace, tiny: Recipe, key: object):
    paths = store_workspace.run("no-store")
    run, _ = set_up(tiny, store_workspace, paths, ALONE)
    snapshot = take_snapshot(run.network, run.metadata(HALFWAY) | {"store": key}, run.optimizer)
    save_checkpoint(paths.checkpoint("best"), snapshot)
    save_last(paths, snapshot)
    with pytest.raises((InputDataError, UsageError), match=r"names no store|no longer there"):
        set_up(tiny, store_workspace, paths, ALONE)


def test_a_run_ends_with_its_epochs_or_its_time():
    assert not TrainState(epoch=1, elapsed=50, epoch_seconds=49).ended(epochs=2, limit=100)
    assert TrainState(epoch=2).ended(epochs=2, limit=100)
    assert TrainState(epoch=1, elapsed=52, epoch_seconds=49).ended(epochs=2, limit=100), "another epoch would outrun it"
