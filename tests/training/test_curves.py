"""The picture of a training run."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stas.training.curves import best_epoch, draw_curves

NAN = math.nan
TRAIN, VALIDATION, DICE, BEST = (0xE6, 0x9F, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0xD5, 0x5E, 0x00)


def _records(losses: list[float]):
    return [
        {"epoch": epoch, "train_loss": 1.0 / epoch, "val_loss": loss, "val_dice": 1 - loss}
        for epoch, loss in enumerate(losses, start=1)
    ]


def _picture(tmp_path: Path, losses: list[float]) -> np.ndarray:
    draw_curves(_records(losses), tmp_path / "curves.png", "a run")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    return np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))


def _pixels(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """(row, column) of every pixel of nearly this colour: lines between two pixels are a little paler."""
    return np.argwhere((np.abs(picture.astype(int) - color) < 60).all(axis=-1))


@pytest.mark.parametrize(
    ("losses", "best"),
    [([0.9, 0.4, 0.6], 2), ([0.4, 0.4], 1), ([NAN, 0.8, NAN], 2), ([math.inf, 0.8], 2), ([NAN, NAN], None)],
)
def test_best_epoch_has_the_lowest_finite_validation_loss(losses: list[float], best: int | None):
    found = best_epoch(_records(losses))
    assert (found["epoch"] if found else None) == best


def test_best_epoch_ignores_records_without_validation():
    assert best_epoch([{"epoch": 1, "train_loss": 0.1}]) is None


def test_all_curves_are_drawn_and_the_best_epoch_is_marked_where_it_is(tmp_path: Path):
    picture = _picture(tmp_path, [0.9, 0.8, 0.2, 0.7, 0.8])
    for color in (TRAIN, VALIDATION, DICE):
        assert len(_pixels(picture, color)) > 300
    columns = [_pixels(_picture(tmp_path, losses), BEST)[:, 1] for losses in ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])]
    mark = [np.bincount(column).argmax() for column in columns]  # the dashed line is the fullest column
    assert mark[0] < 0.3 * picture.shape[1]
    assert mark[1] > 0.8 * picture.shape[1]


@pytest.mark.parametrize("losses", [[0.5], [NAN], [NAN, 0.5, NAN], [math.inf, 0.5], [0.5] * 100])
def test_one_epoch_nan_and_many_epochs_can_be_drawn(tmp_path: Path, losses: list[float]):
    picture = _picture(tmp_path, losses)
    assert (len(_pixels(picture, BEST)) > 0) == any(map(math.isfinite, losses))


def test_a_single_epoch_is_visible(tmp_path: Path):
    legend_only = len(_pixels(_picture(tmp_path, [NAN]), VALIDATION))
    assert len(_pixels(_picture(tmp_path, [0.5]), VALIDATION)) > legend_only


def test_a_failed_drawing_leaves_the_former_picture(tmp_path: Path):
    _picture(tmp_path, [0.5])
    before = (tmp_path / "curves.png").read_bytes()
    with pytest.raises(ValueError, match="could not convert"):
        draw_curves([{"epoch": 1, "train_loss": "high"}], tmp_path / "curves.png", "a run")
    assert (tmp_path / "curves.png").read_bytes() == before
