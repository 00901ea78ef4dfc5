"""Scores of masks, all computed from three pixel counts.

Counts are [true positives, false positives, false negatives] along the last axis of an integer array. If truth
and prediction are both empty, every score is 1: the prediction is right. Otherwise a score with a zero
denominator (precision of an empty prediction, recall of an empty truth) is 0: the prediction is all wrong.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]
Scores = NDArray[np.float64]


def confusion(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Count pixels.

    Args:
        prediction: (height, width), bool.
        truth: the same shape, bool.

    Returns:
        True positives, false positives, false negatives.
    """
    assert prediction.shape == truth.shape, (prediction.shape, truth.shape)
    both = int(np.count_nonzero(prediction & truth))
    return both, int(np.count_nonzero(prediction)) - both, int(np.count_nonzero(truth)) - both


def dice(counts: ArrayLike) -> Scores:
    """2 TP / (2 TP + FP + FN) of counts (..., 3), as (...)."""
    tp, fp, fn = _split(counts)
    return _ratio(2 * tp, 2 * tp + fp + fn, tp + fp + fn)


def iou(counts: ArrayLike) -> Scores:
    """TP / (TP + FP + FN), intersection over union, of counts (..., 3), as (...)."""
    tp, fp, fn = _split(counts)
    return _ratio(tp, tp + fp + fn, tp + fp + fn)


def precision(counts: ArrayLike) -> Scores:
    """TP / (TP + FP), the share of the prediction that is true, of counts (..., 3), as (...)."""
    tp, fp, fn = _split(counts)
    return _ratio(tp, tp + fp, tp + fp + fn)


def recall(counts: ArrayLike) -> Scores:
    """TP / (TP + FN), the share of the truth that is found, of counts (..., 3), as (...)."""
    tp, fp, fn = _split(counts)
    return _ratio(tp, tp + fn, tp + fp + fn)


def mean_dice(counts: ArrayLike) -> Scores:
    """Mean of the images' Dice, of counts (..., images, 3), as (...): every image has the same weight."""
    return dice(counts).mean(axis=-1)


def pooled_dice(counts: ArrayLike) -> Scores:
    """Dice of all images' pixels together, of counts (..., images, 3), as (...): every pixel has the same weight."""
    return dice(np.asarray(counts).sum(axis=-2))


def bootstrap_interval(
    statistic: Callable[[NDArray], Scores],
    values: ArrayLike,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval over images.

    Args:
        statistic: maps drawn values, (resamples, images, ...), to (resamples,), such as `pooled_dice` of counts.
        values: (images, ...), such as each image's Dice, which is quicker than its counts; at least one image.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many times to draw as many images as there are, with replacement.
        level: share of the resampled values inside the interval.

    Returns:
        Lower and upper bound.
    """
    values = np.asarray(values)
    images = len(values)
    assert images > 0, "no image to draw from"
    random = np.random.default_rng(seed)
    chunk = max(1, 1_000_000 // images)  # bounds memory to 24 MB of counts, however many images
    found = [
        statistic(values[random.integers(images, size=(min(chunk, resamples - done), images))])
        for done in range(0, resamples, chunk)
    ]
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _split(counts: ArrayLike) -> tuple[Counts, Counts, Counts]:
    array = np.asarray(counts, dtype=np.int64)
    return array[..., 0], array[..., 1], array[..., 2]


def _ratio(numerator: Counts, denominator: Counts, union: Counts) -> Scores:
    return np.where(union == 0, 1.0, numerator / np.maximum(denominator, 1))
