import numpy as np
import pytest

from stas.results.metrics import bootstrap_interval, confusion, dice, iou, mean_dice, pooled_dice, precision, recall

PREDICTION = np.array([[1, 1, 0], [0, 1, 0]], bool)
TRUTH = np.array([[1, 0, 0], [1, 1, 1]], bool)


def test_confusion_counts_pixels():
    assert confusion(PREDICTION, TRUTH) == (2, 1, 2)


@pytest.mark.parametrize(
    ("score", "expected"),
    [(dice, 4 / 7), (iou, 2 / 5), (precision, 2 / 3), (recall, 2 / 4)],
)
def test_scores_of_hand_counted_pixels(score, expected):
    assert score((2, 1, 2)) == pytest.approx(expected)


@pytest.mark.parametrize("score", [dice, iou, precision, recall])
def test_both_empty_counts_as_one(score):
    assert score((0, 0, 0)) == 1


@pytest.mark.parametrize("score", [dice, iou, precision, recall])
@pytest.mark.parametrize("counts", [(0, 5, 0), (0, 0, 5)])
def test_one_empty_counts_as_zero(score, counts):
    assert score(counts) == 0


def test_mean_weighs_images_and_pooled_weighs_pixels():
    counts = [[1, 0, 0], [50, 50, 50]]  # a small image that is right, a large one with Dice 0.5
    assert mean_dice(counts) == pytest.approx(0.75)
    assert pooled_dice(counts) == pytest.approx(2 * 51 / (2 * 51 + 100))


def test_scores_keep_leading_axes():
    counts = np.array([[[1, 0, 0], [0, 1, 0]], [[1, 1, 1], [0, 0, 0]]])
    np.testing.assert_allclose(dice(counts), [[1, 0], [0.5, 1]])
    np.testing.assert_allclose(mean_dice(counts), [0.5, 0.75])
    np.testing.assert_allclose(pooled_dice(counts), [2 / 3, 0.5])


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    # 200 right and 200 wrong images: the mean's standard error is 0.5 / 20 = 0.025
    counts = [[1, 0, 0], [0, 1, 1]] * 200
    low, high = bootstrap_interval(mean_dice, counts, seed=1)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


def test_bootstrap_interval_depends_on_the_seed_only():
    counts = np.random.default_rng(0).integers(1, 100, (30, 3))
    assert bootstrap_interval(pooled_dice, counts, seed=3) == bootstrap_interval(pooled_dice, counts, seed=3)
    assert bootstrap_interval(pooled_dice, counts, seed=3) != bootstrap_interval(pooled_dice, counts, seed=4)


def test_bootstrap_interval_of_one_image_is_its_score():
    assert bootstrap_interval(mean_dice, [[1, 1, 1]]) == (0.5, 0.5)
