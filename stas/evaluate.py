"""Scores of predictions against a truth: a table, CSV, JSON, and pictures of the worst, middle and best cases."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stas.config import Data
from stas.data.annotations import find_image, rasterise, read_labelme
from stas.data.images import list_images, read_image, read_member_mask
from stas.errors import InputDataError, UsageError
from stas.results.metrics import bootstrap_interval, confusion, dice, iou, mean_dice, pooled_dice, precision, recall
from stas.results.predictions import Members, digest, list_members, log_graded
from stas.results.sheets import Case, Picked, draw_overview, draw_sheet, pick_cases
from stas.system.files import atomic_write, read_json, write_json, write_text
from stas.system.printing import csv_cell, say
from stas.system.publish import Output, building, check_replaceable, named, write_manifest
from stas.system.threads import in_threads

log = logging.getLogger(__name__)

SEED, RESAMPLES, LEVEL = 0, 2000, 0.95
SUMMARY = "summary.json"
COUNTED = ("true_positives", "false_positives", "false_negatives")
SCORED = {"dice": dice, "iou": iou, "precision": precision, "recall": recall}
LEGEND = (
    "mean per-image: every image has the same weight; pooled: every pixel of all images has the same weight.\n"
    "An image whose truth and prediction are both empty counts as 1. Intervals: 95 % bootstrap over images."
)


@dataclass(frozen=True)
class Truth:
    """The true masks of a directory.

    Attributes:
        directory: where they are.
        files: LabelMe JSON or mask PNG by stem.
        label: the LabelMe label that is foreground.
    """

    directory: Path
    files: dict[str, Path]
    label: str


def evaluate(
    predictions: Sequence[Path],
    truth: Path,
    out: Path,
    images: Path | None = None,
    label: str | None = None,
    threshold: float | None = None,
    sheets: int = 9,
) -> dict[str, Any]:
    """Score prediction sets, print a table, and write scores.csv, summary.json, sheets.png and sheets/.

    Args:
        predictions: directories of mask PNGs of the same images; the last one (the vote) decides which cases
            are drawn.
        truth: directory of LabelMe JSON files or, without any, mask PNGs (above 0 is foreground), named like the masks.
        out: the new directory; an identical earlier evaluation is kept.
        images: the original images for the pictures; by default those the LabelMe files point to.
        label: the LabelMe label that is foreground; by default the one in the predictions' manifests.
        threshold: a prediction is foreground above this value; above 0 by default (see `read_member_mask`).
        sheets: how many cases to draw, a third each of the worst, the middle and the best.

    Returns:
        The content of summary.json; scores by member under "members".

    Raises:
        UsageError: no predictions, or `out` is not an evaluation.
        InputDataError: predictions without truth, or with different cases or sizes; names them.
    """
    if not predictions:
        raise UsageError("no predictions given: name at least one directory of mask PNGs")
    check_replaceable(out, "evaluation")
    listed = list_members(predictions)
    truths = _list_truth(truth, _label(label, listed), listed.stems)
    output = Output(out, "evaluation", _key(listed, truths, images, threshold, sheets))
    with building(output) as partial:
        if partial is None:
            log.info("%s: these predictions are already scored against this truth, nothing to do", out)
            summary = read_json(out / SUMMARY)
        else:
            counts = _count(listed, truths, threshold)
            summary = _summarise(listed, counts, truths)
            write_json(partial / SUMMARY, summary)
            write_text(partial / "scores.csv", _csv(listed, counts))
            complete = _draw(partial, listed, truths, counts, images, threshold, sheets)
            # Not finished while a sheet lacks its image: the next run looks for the image again.
            write_manifest(partial, output, finished=complete)
    try:
        text = table(summary)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # from an earlier evaluation, not yet checked
        raise InputDataError(
            f"{out / SUMMARY}: not a summary of scores ({error!r}): delete {out} and run the command again"
        ) from error
    say(f"{text}\nscores: {out / 'scores.csv'}, {out / SUMMARY}")
    if (out / "sheets.png").is_file():
        say(f"pictures: {out / 'sheets.png'}, {out / 'sheets'}")
    return summary


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


def _label(given: str | None, listed: Members) -> str:
    """The truth's label: the one given, else the predictions', else (for predictions from elsewhere) the default."""
    if given is not None and listed.label is not None and given != listed.label:
        raise UsageError(f"--label {given}: the predictions outline {listed.label!r}: leave --label out")
    return given or listed.label or Data().label


def _list_truth(directory: Path, label: str, stems: Sequence[str]) -> Truth:
    """The truth of every prediction. JSON wins, because a PNG beside a JSON is its image."""
    if not directory.is_dir():
        raise InputDataError(f"{directory}: not a directory; give the directory of LabelMe JSON files or mask PNGs")
    files = {path.stem: path for path in sorted(directory.glob("*.json")) if path.name != "manifest.json"}
    files = files or list_images(directory, (".png",))
    missing = [stem for stem in stems if stem not in files]
    if missing:
        raise InputDataError(
            f"{directory}: no truth for {len(missing)} of {len(stems)} predictions ({named(missing)}): add "
            "<stem>.json or <stem>.png for each, or leave these predictions out"
        )
    if len(files) > len(stems):
        log.info("%d of %d truths have predictions; only these are scored", len(stems), len(files))
    return Truth(directory, {stem: files[stem] for stem in stems}, label)


def _key(listed: Members, truths: Truth, images: Path | None, threshold: float | None, sheets: int) -> dict[str, Any]:
    """The inputs that determine an evaluation."""
    sources = [list(member.images.values()) for member in listed.members] + [list(truths.files.values())]
    *members, truth = in_threads(digest, sources, "hashing")
    return {
        "members": [{"name": name, "sha256": value} for name, value in zip(listed.names, members, strict=True)],
        "truth": {"directory": str(truths.directory), "label": truths.label, "sha256": truth},
        "options": {"images": images and str(images.resolve()), "threshold": threshold, "sheets": sheets},
    }


def _read_truth(truths: Truth, stem: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The true mask of a case, (height, width), bool, checked against the predictions' size."""
    path = truths.files[stem]
    if path.suffix == ".json":
        annotation = read_labelme(path)
        found = annotation.size or size
        mask = rasterise(annotation.shapes, size, truths.label, path) if found == size else None
    else:
        mask, _ = read_member_mask(path)
        found = mask.shape
    if mask is None or found != size:
        raise InputDataError(
            f"{path}: the truth of {stem} is {found[1]} x {found[0]} pixels (width x height), but its predictions are "
            f"{size[1]} x {size[0]}: both must have the image's own size"
        )
    return mask


def _count(listed: Members, truths: Truth, threshold: float | None) -> NDArray[np.int64]:
    """True positives, false positives and false negatives, (members, images, 3)."""

    def one_image(stem: str) -> list[tuple[tuple[int, int, int], bool]]:
        truth = _read_truth(truths, stem, listed.sizes[stem])
        masks = [read_member_mask(member.images[stem], threshold) for member in listed.members]
        return [(confusion(mask, truth), graded) for mask, graded in masks]

    results = in_threads(one_image, listed.stems, "scores")
    for index, name in enumerate(listed.names):
        log_graded(name, sum(image[index][1] for image in results), len(results))
    return np.array([[image[index][0] for image in results] for index in range(len(listed.members))], np.int64)


def _summarise(listed: Members, counts: NDArray[np.int64], truths: Truth) -> dict[str, Any]:
    """Scores over all images, by member; counts are (members, images, 3)."""
    return {
        "truth": str(truths.directory),
        "images": len(listed.stems),
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


def _csv(listed: Members, counts: NDArray[np.int64]) -> str:
    """One row per image and member; counts are (members, images, 3)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "member", "height", "width", *COUNTED, *SCORED])
    for index, (stem, size) in enumerate(listed.sizes.items()):
        for name, row in zip(listed.names, counts[:, index], strict=True):
            scores = [f"{score(row):.6f}" for score in SCORED.values()]
            writer.writerow([csv_cell(stem), csv_cell(name), *size, *map(int, row), *scores])
    return text.getvalue()


def _draw(
    out: Path,
    listed: Members,
    truths: Truth,
    counts: NDArray[np.int64],
    images: Path | None,
    threshold: float | None,
    total: int,
) -> bool:
    """Draw sheets of the cases picked by the last member's Dice. Return whether each has its image.

    Cases with empty truth and empty prediction show nothing: they are drawn only if there are no others.
    """
    last = counts[-1]
    shown = np.flatnonzero(last.sum(axis=1)) if last.any() else np.arange(len(last))
    picked = [item._replace(case=int(shown[item.case])) for item in pick_cases(dice(last[shown]).tolist(), total)]
    originals = list_images(images) if images else {}

    def case_of(item: Picked) -> Case:
        stem = listed.stems[item.case]
        size = listed.sizes[stem]
        rank = f"{item.group} case {item.number} of {len(last)} images"
        score = f"by the Dice of {listed.names[-1]}, here {dice(last[item.case]):.3f}"
        masks = {member.name: read_member_mask(member.images[stem], threshold)[0] for member in listed.members}
        title = f"{stem}: {rank} {score} ({size[1]} x {size[0]} pixels, width x height)"
        return Case(title, _original(truths, stem, size, originals), _read_truth(truths, stem, size), masks)

    def one_sheet(item: Picked) -> tuple[bool, Image.Image | None]:
        case = case_of(item)
        _save(draw_sheet(case), out / "sheets" / f"{item.group}_{item.number}_{listed.stems[item.case]}.png")
        return case.image is not None, draw_sheet(case, wrap=False) if item.number == 1 else None

    drawn = in_threads(one_sheet, picked, "sheets")
    if drawn:
        _save(draw_overview([first for _, first in drawn if first]), out / "sheets.png")
    return all(complete for complete, _ in drawn)


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as file:
        picture.save(file, "PNG", compress_level=3)


def _original(truths: Truth, stem: str, size: tuple[int, int], originals: dict[str, Path]) -> NDArray[np.uint8] | None:
    """The original image of a case, (height, width, 3); None, after a warning, if none has its size."""
    source: Path | bytes | None = originals.get(stem)
    path = truths.files[stem]
    try:
        if source is None and path.suffix == ".json":
            source = find_image(path, read_labelme(path), [])
        if source is None:
            log.warning(
                "%s: no image for its sheet, drawing grey: give the directory of the images with --images", stem
            )
            return None
        image = read_image(source)
    except InputDataError as error:
        log.warning("%s: no image for its sheet, drawing grey: %s", stem, error)
        return None
    if image.shape[:2] != size:
        log.warning(
            "%s: its image is %d x %d pixels (width x height), not the size of its masks; drawing grey",
            stem,
            image.shape[1],
            image.shape[0],
        )
        return None
    return image
