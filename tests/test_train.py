import itertools
import json
import signal
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import yaml

from stas.errors import EXIT_RESUMABLE, UsageError
from stas.evaluate import evaluate
from stas.infer import infer
from stas.models.checkpoint import load_checkpoint
from stas.paths import Workspace
from stas.preprocess import preprocess
from stas.recipe import parse_recipe
from stas.system.distributed import Ranks
from stas.train import train
from stas.training.metrics_log import read_metrics
from stas.training.run import TrainState
from tests.support.launch import command, started, stas
from tests.support.runs import assert_same_run, changed, figures, recipe_file, weights


def test_a_run_learns_and_writes_all_its_files(store_workspace, tiny):
    train(changed(tiny, train={"epochs": 12}), store_workspace, "learns")
    run = store_workspace.run("learns")
    records = read_metrics(run.metrics)
    assert [record["epoch"] for record in records] == list(range(1, 13))
    assert records[-1]["train_loss"] < 0.9 * records[0]["train_loss"]
    assert {"host_rss_gib", "shm_used_gib", "images_per_second", "elapsed"} <= records[0].keys()
    best = min(records, key=lambda record: record["val_loss"])
    saved = load_checkpoint(run.checkpoint("best"))
    assert saved.metadata["state"]["best_epoch"] == saved.metadata["state"]["epoch"] == best["epoch"]
    assert not saved.optimizer
    split = json.loads(run.split.read_text())
    assert sorted(split["training"] + split["validation"]) == [f"sample_{index:04}" for index in range(10)]
    assert saved.metadata["validation"] == split["validation"] and len(split["validation"]) == 3
    assert parse_recipe(yaml.safe_load(run.recipe.read_text()), "written").train.epochs == 12
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    assert any(run.tensorboard.glob("events.out.tfevents.*"))


def test_a_recipe_at_a_scale_trains_on_windows_and_predicts_whole_images(sample, tiny, tmp_path):
    """Held-out scores from training equal those of the masks, which are made from files instead of the store."""
    workspace = Workspace(tmp_path)
    recipe = changed(tiny, data={"scale": 0.3}, train={"epochs": 4})
    preprocess([sample / "Train_Images"], [sample / "Train_Annotations"], workspace, recipe.data, workers=2)
    train(recipe, workspace, "scaled")
    records = read_metrics(workspace.run("scaled").metrics)
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    out = infer("scaled", sample / "Train_Images", workspace, checkpoint="last", held_out=True)
    scores = evaluate([out], sample / "Train_Annotations", tmp_path / "scores", sheets=0)
    assert scores["members"]["scaled"]["mean_dice"] == pytest.approx(records[-1]["val_dice"], abs=2e-3)


def test_two_parts_equal_one_whole(store_workspace, tiny, caplog):
    whole, parts = store_workspace.run("whole"), store_workspace.run("parts")
    train(changed(tiny, train={"epochs": 4}), store_workspace, "whole")
    train(changed(tiny, train={"epochs": 2}), store_workspace, "parts")
    train(changed(tiny, train={"epochs": 4}), store_workspace, "parts")
    assert_same_run(whole, parts)
    before = parts.checkpoint("last").stat().st_mtime_ns
    with caplog.at_level("INFO", "stas"):
        train(changed(tiny, train={"epochs": 4}), store_workspace, "parts")
    assert "nothing to do" in caplog.text and parts.checkpoint("last").stat().st_mtime_ns == before


def test_a_run_does_not_resume_with_another_recipe(store_workspace, tiny):
    train(tiny, store_workspace, "other")
    with pytest.raises(UsageError, match=r"optimizer\.lr: 0\.01 before, 0\.5 now"):
        train(changed(tiny, optimizer={"lr": 0.5}), store_workspace, "other")
    cosine = changed(tiny, schedule={"name": "cosine"})
    train(cosine, store_workspace, "cosine")
    with pytest.raises(UsageError, match=r"train\.epochs: 2 before, 3 now"):  # learning rates depend on the epochs
        train(changed(cosine, train={"epochs": 3}), store_workspace, "cosine")


@pytest.mark.slow
def test_the_time_limit_ends_a_run_cleanly(store_workspace, tiny, monkeypatch):
    ticks = itertools.count()  # a clock that is independent of the machine's load: each reading takes 50 ms
    monkeypatch.setattr("stas.train.time", SimpleNamespace(monotonic=lambda: next(ticks) * 0.05))
    run = store_workspace.run("limited")
    endless = changed(tiny, train={"epochs": 100_000})
    train(endless, store_workspace, "limited", time_limit=3)
    done = read_metrics(run.metrics)
    assert 1 <= len(done) < 1000
    assert load_checkpoint(run.checkpoint("best")).metadata["state"]["elapsed"] < 6
    train(endless, store_workspace, "limited", time_limit=3)  # the time is used up: earlier parts count
    assert len(read_metrics(run.metrics)) == len(done)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(store_workspace, tiny, precision):
    train(changed(tiny, train={"precision": precision, "epochs": 4}), store_workspace, precision)
    losses = [record["train_loss"] for record in read_metrics(store_workspace.run(precision).metrics)]
    assert losses[-1] < losses[0]
    scaler = load_checkpoint(store_workspace.run(precision).checkpoint("last")).metadata["scaler"]
    assert bool(scaler) == (precision == "fp16")


def test_batch_normalisation_and_every_optimiser_resume(store_workspace, tiny):
    for name in ("adam", "adamw", "sgd"):
        recipe = changed(
            tiny,
            model={"options": {"channels": [4, 8], "strides": [2], "norm": "BATCH"}},
            optimizer={"name": name, "eps": 1e-8},
            train={"channels_last": True},
        )
        train(changed(recipe, train={"epochs": 3}), store_workspace, f"{name}-whole")
        train(changed(recipe, train={"epochs": 1}), store_workspace, f"{name}-parts")
        train(changed(recipe, train={"epochs": 3}), store_workspace, f"{name}-parts")
        assert_same_run(store_workspace.run(f"{name}-whole"), store_workspace.run(f"{name}-parts"))


@pytest.mark.slow
def test_a_last_batch_of_one_image_trains(store_workspace, tiny):
    """DeepLabV3+ pools an image to one value per channel and normalises it over the batch."""
    model = {"library": "smp", "architecture": "DeepLabV3Plus", "encoder": "resnet18", "weights": None, "options": {}}
    recipe = changed(tiny, model=model, train={"batch": 3, "epochs": 1})  # 7 images
    train(recipe, store_workspace, "one-over")
    assert len(figures(store_workspace.run("one-over"))) == 1


def test_two_ranks_train_as_one(store_workspace, tiny, tmp_path):
    """7 training samples in batches of 4 and 3, so the last batch does not divide evenly."""
    options = tiny.model.options | {"dropout": 0.0}  # dropout rightly differs between ranks
    # SGD, because the gradient of a bias before a normalisation is rounding noise, which AdaBelief turns into steps.
    recipe = changed(tiny, model={"options": options}, optimizer={"name": "sgd"}, train={"epochs": 3})
    train(recipe, store_workspace, "one-rank")
    path = recipe_file(recipe, tmp_path)
    done = stas("train", "--recipe", path, "--workspace", store_workspace.root, "--run", "two-ranks", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = store_workspace.run("one-rank"), store_workspace.run("two-ranks")
    for alone, together in zip(figures(one), figures(two), strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)
    for name, value in weights(one).items():
        assert torch.allclose(weights(two)[name], value, rtol=1e-3, atol=1e-4), name
    assert done.stderr.count("epoch 3/3") == 1  # one rank logs


def test_more_ranks_than_images_in_a_batch_is_refused(store_workspace, tiny, monkeypatch):
    from contextlib import nullcontext

    from stas.system import distributed

    monkeypatch.setattr(distributed, "join_ranks", lambda *_: nullcontext(Ranks(0, 8, torch.device("cpu"))))
    with pytest.raises(UsageError, match=r"train\.batch = 4 images over 8 ranks"):
        train(tiny, store_workspace, "narrow")


@pytest.mark.slow
def test_stopped_within_an_epoch_and_started_again_equals_never_stopped(store_workspace, tiny, tmp_path):
    endless = changed(tiny, train={"epochs": 1_000_000, "batch": 1})
    path = recipe_file(endless, tmp_path)
    again = ["train", "--recipe", path, "--workspace", store_workspace.root, "--run", "stopped"]
    run = store_workspace.run("stopped")
    with started(command(again)) as process:
        while not run.metrics.exists() or len(read_metrics(run.metrics)) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
    assert process.returncode == EXIT_RESUMABLE, stderr
    assert "run the same command again to resume" in stderr
    recipe = changed(endless, train={"epochs": len(read_metrics(run.metrics)) + 2})
    for name in ("unstopped", "stopped"):
        train(recipe, store_workspace, name)
    assert_same_run(store_workspace.run("unstopped"), run)


def test_progress_is_json():
    assert TrainState(**json.loads(json.dumps(asdict(TrainState())))) == TrainState()
