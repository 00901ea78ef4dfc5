"""Scores of prediction sets as a summary, a table and CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stas.results.metrics import bootstrap_interval, dice, iou, mean_dice, pooled_dice, precision, recall
from stas.results.predictions import Members
from stas.system.printing import csv_cell

SEED, RESAMPLES, LEVEL = 0, 2000, 0.95
COUNTED = ("true_positives", "false_positives", "false_negatives")
SCORED = {"dice": dice, "iou": iou, "precision": precision, "recall": recall}
LEGEND = (
    "mean per-image: every image has the same weight; pooled: every pixel of all images has the same weight.\n"
    "An image whose truth and prediction are both empty counts as 1. Intervals: 95 % bootstrap over images."
)


def summarise(listed: Members, truth: Path, counts: NDArray[np.int64], warnings: Sequence[str]) -> dict[str, Any]:
    """The content of summary.json: scores over all images, by member.

    Args:
        listed: the predictions.
        truth: the directory of the truth.
        counts: (members, images, 3): true positives, false positives and false negatives, in pixels.
        warnings: to print with the scores.
    """
    return {
        "truth": str(truth),
        "images": len(listed.stems),
        "warnings": list(warnings),
        "both_empty_counts_as": 1,
        "interval": {"level": LEVEL, "method": f"percentile bootstrap over images, {RESAMPLES} resamples, seed {SEED}"},
        "members": {
            name: _member_scores(listed.stems, member) for name, member in zip(listed.names, counts, strict=True)
        },
    }


def _member_scores(stems: Sequence[str], counts: NDArray[np.int64]) -> dict[str, Any]:
    """Scores of one member; counts are (images, 3). mean_*, median_* and worst_* are over images' own scores."""
    scores = dice(counts)
    pooled = counts.sum(axis=0)
    return {
        "mean_dice": float(mean_dice(counts)),
        "mean_dice_interval": bootstrap_interval(lambda drawn: drawn.mean(axis=-1), scores, SEED, RESAMPLES, LEVEL),
        "pooled_dice": float(pooled_dice(counts)),
        "pooled_dice_interval": bootstrap_interval(pooled_dice, counts, SEED, RESAMPLES, LEVEL),
        "median_dice": float(np.median(scores)),
        "worst_dice": float(scores.min()),
        "worst_image": stems[int(scores.argmin())],
        "mean_iou": float(iou(counts).mean()),
        "mean_precision": float(precision(counts).mean()),
        "mean_recall": float(recall(counts).mean()),
        "pooled_iou": float(iou(pooled)),
        "pooled_precision": float(precision(pooled)),
        "pooled_recall": float(recall(pooled)),
        "both_empty": int(np.count_nonzero(counts.sum(axis=1) == 0)),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary's scores as text: a headline, a row per member, and what the numbers mean."""
    rows: list[tuple[str, ...]] = [
        ("", "mean per-image", "pooled", "mean", "mean", "mean", "median", "worst"),
        ("member", "Dice [95 % CI]", "Dice [95 % CI]", "IoU", "precision", "recall", "Dice", "Dice (image)"),
    ]
    for name, scores in summary["members"].items():
        worst = f"{scores['worst_dice']:.3f} ({scores['worst_image']})"
        plain = [f"{scores[what]:.3f}" for what in ("mean_iou", "mean_precision", "mean_recall", "median_dice")]
        rows.append((name, _with_interval(scores, "mean_dice"), _with_interval(scores, "pooled_dice"), *plain, worst))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(2, "-" * max(map(len, lines)))
    counts = {name: scores["both_empty"] for name, scores in summary["members"].items()}
    empty = ", ".join(f"{name} {count}" for name, count in counts.items()) if any(counts.values()) else "none"
    header = f"{summary['images']} images, per-image and pooled scores against {summary['truth']}"
    return "\n".join([header, *lines, LEGEND, f"Images with truth and prediction both empty: {empty}."])


def _with_interval(scores: dict[str, Any], what: str) -> str:
    low, high = scores[f"{what}_interval"]
    return f"{scores[what]:.3f} [{low:.3f}, {high:.3f}]"


def csv_of(listed: Members, counts: NDArray[np.int64]) -> str:
    """The content of scores.csv: a row per image and member; counts as in `summarise`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "member", "height", "width", *COUNTED, *SCORED])
    for index, (stem, size) in enumerate(listed.sizes.items()):
        for name, row in zip(listed.names, counts[:, index], strict=True):
            scores = [f"{score(row):.6f}" for score in SCORED.values()]
            writer.writerow([csv_cell(stem), csv_cell(name), *size, *map(int, row), *scores])
    return text.getvalue()
