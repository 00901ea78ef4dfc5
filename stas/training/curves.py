"""The picture of a training run: losses and validation Dice over the epochs, with the best epoch marked."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stas.system.files import atomic_write

# Okabe and Ito's colours, which colour-blind people can tell apart.
_TRAIN, _VALIDATION, _DICE, _BEST = "#E69F00", "#0072B2", "#009E73", "#D55E00"


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw train and validation loss above the validation Dice, as PNG, atomically.

    Args:
        records: one per epoch, at least one, with the keys epoch, train_loss, val_loss and val_dice; a missing key
            or NaN leaves a gap.
        path: the PNG to write.
        title: text above the picture.
    """
    assert records, "curves need at least one epoch"
    epochs = [record["epoch"] for record in records]
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    losses, dice = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _plot(losses, epochs, _column(records, "train_loss"), _TRAIN, "training")
    _plot(losses, epochs, _column(records, "val_loss"), _VALIDATION, "validation")
    _plot(dice, epochs, _column(records, "val_dice"), _DICE, "validation")
    best = best_epoch(records)
    if best is not None:
        _mark(losses, best["epoch"], best["val_loss"], f"best epoch {best['epoch']}: {best['val_loss']:.4f}")
        value = best.get("val_dice")
        if value is not None and math.isfinite(value):
            _mark(dice, best["epoch"], value, f"best epoch {best['epoch']}: {value:.4f}")
    losses.set_ylabel("loss")
    dice.set_ylabel("validation Dice\n(mean per image)")
    dice.set_ylim(-0.02, 1.02)  # the same in every picture, so that runs can be compared at a glance
    dice.set_xlabel("epoch")
    dice.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (losses, dice):
        _style(axes, epochs)
    figure.suptitle(title)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def best_epoch(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record with the lowest finite validation loss, the earliest if tied; None if there is none."""
    finite = [record for record in records if math.isfinite(_value(record, "val_loss"))]
    return min(finite, key=lambda record: record["val_loss"], default=None)


def _value(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return math.nan if value is None else float(value)


def _column(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [_value(record, key) for record in records]


def _plot(axes: Axes, epochs: list[int], values: list[float], color: str, label: str) -> None:
    """Draw a line, with dots while there are few epochs: a single point has no line."""
    marker = "o" if len(epochs) <= 40 else None
    axes.plot(epochs, values, color=color, label=label, linewidth=1.6, marker=marker, markersize=3.5)


def _mark(axes: Axes, epoch: int, value: float, label: str) -> None:
    axes.axvline(epoch, color=_BEST, linewidth=1, linestyle="--", zorder=1)
    axes.plot(
        [epoch],
        [value],
        color=_BEST,
        marker="*",
        markersize=13,
        markerfacecolor="none",
        linestyle="none",
        label=label,
        zorder=5,
    )


def _style(axes: Axes, epochs: list[int]) -> None:
    margin = max(0.5, 0.02 * (epochs[-1] - epochs[0]))
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", framealpha=0.9)
