"""Validation against MONAI's own loss and metric, image by image."""

from statistics import mean
from threading import Event

import numpy as np
import pytest
import torch
from monai.losses.dice import DiceLoss
from monai.metrics.meandice import DiceMetric
from torch.nn.functional import interpolate

from stas.config import Recipe
from stas.paths import Workspace
from stas.system.distributed import Ranks
from stas.training.run import TrainingRun, set_up
from stas.training.validate import validate
from tests.support.runs import changed


@pytest.fixture
def run(store_workspace: Workspace, tiny: Recipe) -> TrainingRun:
    """3 images for validation, in a batch of 2 and one of 1; dropout, which must be off."""
    recipe = changed(tiny, loss={"bce": 0.0}, train={"batch": 2})
    return set_up(recipe, store_workspace, store_workspace.run("validate"), Ranks(0, 1, torch.device("cpu")))[0]


def by_hand(run: TrainingRun) -> tuple[list[float], list[float]]:
    """Loss and Dice of each validation image at its original size."""
    loss, metric = DiceLoss(sigmoid=True), DiceMetric()
    losses: list[float] = []
    scores: list[float] = []
    run.network.eval()
    for index in run.validation:
        entry = run.store.samples[index]
        scaled = (run.store.image(index).astype(np.float32) - entry["min"]) / (entry["max"] - entry["min"])
        with torch.no_grad():
            logits = run.network(torch.from_numpy(scaled).permute(2, 0, 1)[None])
        truth = torch.from_numpy(run.store.full_mask(index)).float()[None, None]
        full = interpolate(logits, truth.shape[2:], mode="bilinear")
        losses.append(loss(full, truth).item())
        scores.append(metric((full.sigmoid() > 0.5).float(), truth).item())  # pyright: ignore[reportAttributeAccessIssue]
    return losses, scores


def test_every_image_weighs_the_same(run: TrainingRun):
    losses, scores = by_hand(run)
    assert len(losses) == 3 and 0 < mean(scores) < 1
    run.network.train()
    found = validate(run, Event())
    assert found == pytest.approx((mean(losses), mean(scores)), rel=1e-5)
    of_batches = mean([mean(losses[:2]), losses[2]])
    assert found and abs(found[0] - of_batches) > 1e-4, "the mean over batches would be told from it"


def test_nothing_is_learnt_from_validation(run: TrainingRun):
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    validate(run, Event())
    assert all(torch.equal(value, before[name]) for name, value in run.network.state_dict().items())
    assert all(value.grad is None for value in run.network.parameters())


def test_a_stop_ends_it(run: TrainingRun):
    stop = Event()
    stop.set()
    assert validate(run, stop) is None
