"""A run goes on only with the images, the weights and the history that it recorded."""

import json
import os
from pathlib import Path

import pytest

from stas.config import Recipe
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.infer import infer
from stas.models.checkpoint import load_checkpoint
from stas.paths import RunPaths, Workspace
from stas.train import train
from stas.training.metrics_log import MetricsLog, read_metrics
from tests.support.runs import assert_same_run, changed


def content(run: RunPaths) -> dict[str, bytes]:
    files = (path for path in run.root.rglob("*") if path.is_file() and "tfevents" not in path.name)
    return {str(path.relative_to(run.root)): path.read_bytes() for path in files}


@pytest.fixture
def done(store_workspace: Workspace, tiny: Recipe) -> RunPaths:
    """A finished run of two epochs."""
    train(tiny, store_workspace, "done")
    return store_workspace.run("done")


@pytest.fixture
def listed(tiny: Recipe, tmp_path: Path) -> Recipe:
    """A recipe whose held-out images are listed in a file."""
    file = tmp_path / "held-out.txt"
    file.write_text("sample_0000\nsample_0001\nsample_0002\n")
    return changed(tiny, data={"split": {"kind": "list", "file": str(file)}})


@pytest.mark.parametrize("epochs", [2, 4])  # finished, or with epochs to go
def test_a_split_list_that_was_edited_is_refused(store_workspace: Workspace, listed: Recipe, epochs: int):
    train(listed, store_workspace, "listed")
    run = store_workspace.run("listed")
    before = content(run)
    assert listed.data.split.file
    listed.data.split.file.write_text("sample_0001\nsample_0002\nsample_0005\n")
    with pytest.raises(UsageError) as refused:
        train(changed(listed, train={"epochs": epochs}), store_workspace, "listed")
    said = str(refused.value)
    assert "trained on sample_0005, which the split now holds out" in said
    assert "held out sample_0000, which the split now trains on" in said
    assert f"the run's own list is in {run.split}" in said and "--run" in said
    assert content(run) == before
    listed.data.split.file.write_text("# the same images in another order\nsample_0002\nsample_0001\n\nsample_0000\n")
    train(listed, store_workspace, "listed")


def test_held_out_images_are_those_of_the_checkpoint(store_workspace: Workspace, listed: Recipe, sample: Path):
    train(listed, store_workspace, "listed")
    assert listed.data.split.file
    listed.data.split.file.write_text("sample_0007\n")
    out = infer("listed", sample / "Train_Images", store_workspace, held_out=True)
    assert sorted(path.stem for path in out.glob("*.png")) == ["sample_0000", "sample_0001", "sample_0002"]


def test_ranks_that_read_different_splits_are_refused(store_workspace: Workspace, tiny: Recipe, monkeypatch):
    def gather(value: object) -> list[object]:
        return [value, ["other", []]] if isinstance(value, list) else [value]

    monkeypatch.setattr("stas.system.distributed.gather_objects", gather)
    with pytest.raises(StoppedEarly, match="not every rank read the same store and split"):
        train(tiny, store_workspace, "apart")


def test_best_weights_that_are_gone_are_missed(store_workspace: Workspace, tiny: Recipe, done: RunPaths):
    best = done.checkpoint("best")
    saved = best.read_bytes()
    best.unlink()
    for epochs in (2, 4):
        with pytest.raises(InputDataError, match=r"best\.safetensors: .*missing.*--checkpoint last.*--run"):
            train(changed(tiny, train={"epochs": epochs}), store_workspace, "done")
    best.write_bytes(saved[:-1])
    with pytest.raises(InputDataError, match=r"best\.safetensors: .*not a readable checkpoint.*--checkpoint last"):
        train(tiny, store_workspace, "done")
    best.write_bytes(saved)
    train(tiny, store_workspace, "done")


def test_best_weights_of_another_run_or_an_older_epoch_are_refused(
    store_workspace: Workspace, tiny: Recipe, done: RunPaths
):
    other = store_workspace.run("other")
    train(changed(tiny, train={"seed": 1, "epochs": 1}), store_workspace, "other")
    best = done.checkpoint("best")
    own = best.read_bytes()
    best.write_bytes(other.checkpoint("best").read_bytes())
    with pytest.raises(InputDataError, match=r"best\.safetensors: .*are of run 'other'"):
        train(tiny, store_workspace, "done")
    best.write_bytes(own)
    best_epoch = load_checkpoint(best).metadata["state"]["best_epoch"]
    train(changed(tiny, train={"epochs": 12}), store_workspace, "done")
    assert load_checkpoint(best).metadata["state"]["best_epoch"] > best_epoch
    best.write_bytes(own)
    with pytest.raises(InputDataError, match=rf"best\.safetensors: .*are of epoch {best_epoch}"):
        train(changed(tiny, train={"epochs": 12}), store_workspace, "done")


def test_last_weights_that_are_gone_or_damaged_are_made_again(store_workspace: Workspace, tiny: Recipe, caplog):
    for number, name in enumerate(("whole", "gone", "damaged")):
        train(changed(tiny, train={"epochs": 3}), store_workspace, name)
        last = store_workspace.run(name).checkpoint("last")
        if number == 1:
            last.unlink()
        elif number == 2:
            last.write_bytes(last.read_bytes()[:-1])
        caplog.clear()
        with caplog.at_level("INFO", "stas"):
            train(changed(tiny, train={"epochs": 3}), store_workspace, name)
        assert ("nothing to do" in caplog.text) == (name == "whole")
        assert_same_run(store_workspace.run("whole"), store_workspace.run(name))


@pytest.mark.parametrize("left", [(), ("best",)])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again(
    store_workspace: Workspace, tiny: Recipe, done: RunPaths, left: tuple[str, ...]
):
    for which in {"best", "last", "previous"} - set(left):
        done.checkpoint(which).unlink()
    before = content(done)
    with pytest.raises(InputDataError, match=rf"{done.root}: .*no checkpoint.*--run.*move"):
        train(tiny, store_workspace, "done")
    assert content(done) == before


def test_best_weights_of_a_later_epoch_alone_do_not_start_again(
    store_workspace: Workspace, tiny: Recipe, done: RunPaths
):
    train(changed(tiny, train={"epochs": 12}), store_workspace, "done")
    for which in ("last", "previous"):
        done.checkpoint(which).unlink()
    done.metrics.unlink()
    assert load_checkpoint(done.checkpoint("best")).metadata["state"]["epoch"] > 1
    with pytest.raises(InputDataError, match="no checkpoint"):
        train(tiny, store_workspace, "done")


def test_a_run_killed_before_its_first_checkpoint_starts_again(store_workspace: Workspace, tiny: Recipe, monkeypatch):
    """What a kill leaves: before the first epoch, after its best weights, and after its checkpoint."""
    train(tiny, store_workspace, "whole")

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    for name, victim in (
        ("at-the-start", "stas.train._train_epoch"),
        ("after-best", "stas.models.checkpoint.save_last"),
        ("after-the-checkpoint", "stas.training.metrics_log.MetricsLog.append"),
        ("at-the-picture", "stas.train.draw_curves"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(victim, killed)
            with pytest.raises(Killed):
                train(tiny, store_workspace, name)
        train(tiny, store_workspace, name)
        assert_same_run(store_workspace.run("whole"), store_workspace.run(name))


def test_the_first_line_of_metrics_comes_after_the_first_checkpoint(
    store_workspace: Workspace, tiny: Recipe, monkeypatch
):
    """Otherwise a run that was killed between them would look like one whose checkpoints are gone."""
    seen = []
    run, append = store_workspace.run("ordered"), MetricsLog.append

    def look(self: MetricsLog, record: dict) -> None:
        seen.append(run.checkpoint("last").exists())
        append(self, record)

    monkeypatch.setattr(MetricsLog, "append", look)
    train(tiny, store_workspace, "ordered")
    assert seen[0] and len(seen) == 2


def test_a_kill_between_the_last_checkpoint_and_its_metrics_leaves_no_gap(
    store_workspace: Workspace, tiny: Recipe, done: RunPaths
):
    lines = done.metrics.read_bytes().splitlines(keepends=True)
    done.metrics.write_bytes(b"".join(lines[:-1]))
    done.curves.unlink()
    train(tiny, store_workspace, "done")
    assert done.metrics.read_bytes().splitlines(keepends=True) == lines and done.curves.exists()


def test_lost_metrics_of_finished_epochs_are_missed(store_workspace: Workspace, tiny: Recipe, done: RunPaths, caplog):
    done.metrics.unlink()
    train(changed(tiny, train={"epochs": 4}), store_workspace, "done")
    assert f"{done.metrics}: has 1 of 2 finished epochs" in caplog.text
    assert [record["epoch"] for record in read_metrics(done.metrics)] == [2, 3, 4]


def test_metrics_that_cannot_be_written_cost_no_epoch(store_workspace: Workspace, tiny: Recipe, monkeypatch):
    recipe = changed(tiny, train={"epochs": 4})
    train(recipe, store_workspace, "whole")
    run, append = store_workspace.run("parts"), MetricsLog.append

    def full(self: MetricsLog, record: dict) -> None:
        if record["epoch"] == 3:
            raise OSError(28, os.strerror(28), str(run.metrics))
        append(self, record)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(MetricsLog, "append", full)
        train(recipe, store_workspace, "parts")
    assert load_checkpoint(run.checkpoint("last")).metadata["state"]["epoch"] == 3
    assert [record["epoch"] for record in read_metrics(run.metrics)] == [1, 2]
    train(recipe, store_workspace, "parts")
    assert_same_run(store_workspace.run("whole"), run)


@pytest.mark.parametrize(
    "damaged",
    [b"\xff\xfe garbage", b'{"epoch": 2}x', b'{"epoch": "two"}', b'{"epoch": 2, "seconds": "long"}', b"[" * 5000],
)
def test_a_damaged_line_of_metrics_is_named_kept_and_left_out(
    store_workspace: Workspace, tiny: Recipe, damaged: bytes, caplog
):
    train(changed(tiny, train={"epochs": 3}), store_workspace, "lines")
    run = store_workspace.run("lines")
    lines = run.metrics.read_bytes().splitlines()
    run.metrics.write_bytes(b"\n".join([lines[0], damaged, lines[2], b""]))
    train(changed(tiny, train={"epochs": 5}), store_workspace, "lines")
    (said,) = [record.message for record in caplog.records if "line 2" in record.message]
    assert str(run.metrics) in said
    after = run.metrics.read_bytes().splitlines()
    assert after[:3] == [lines[0], damaged, lines[2]] and len(after) == 5
    assert [json.loads(line)["epoch"] for line in after[2:]] == [3, 4, 5]
    assert [record["epoch"] for record in read_metrics(run.metrics)] == [1, 3, 4, 5]
