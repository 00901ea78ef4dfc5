"""Scores of predictions against a truth: a table, CSV, JSON, and pictures of the worst, middle and best cases."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stas.config import Data
from stas.data.annotations import find_image, read_labelme
from stas.data.images import MAX_IMAGE_BYTES, read_image
from stas.data.listing import list_images
from stas.errors import InputDataError, UsageError
from stas.paths import Workspace
from stas.results.foreground import Seen, check_threshold, foreground, log_seen
from stas.results.metrics import confusion, dice
from stas.results.predictions import Member, Members, changed, digest, list_members, read_once
from stas.results.provenance import check_present, check_unchanged, check_vote_of
from stas.results.scores import csv_of, summarise, table
from stas.results.sheets import Case, Picked, draw_overview, draw_sheet, pick_cases
from stas.results.truth import Truth, list_truth, read_truth, unknown_label
from stas.system.files import atomic_write, read_json, sha256, write_json, write_text
from stas.system.printing import say
from stas.system.publish import Output, building, check_replaceable, write_manifest
from stas.system.threads import in_threads

log = logging.getLogger(__name__)

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Scored:
    """What is scored, as it was when it was first read.

    Attributes:
        listed: the predictions.
        hashes: the SHA-256 of each mask's file, by member and stem.
        truth: the true masks.
        threshold: a prediction is foreground above this value; None: above 0.
    """

    listed: Members
    hashes: dict[str, dict[str, str]]
    truth: Truth
    threshold: float | None


def evaluate(
    predictions: Sequence[Path],
    truth: Path,
    out: Path,
    images: Path | None = None,
    label: str | None = None,
    threshold: float | None = None,
    sheets: int = 9,
    workspace: Workspace | None = None,
    runs: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Score prediction sets, print a table, and write scores.csv, summary.json, sheets.png and sheets/.

    Args:
        predictions: directories of mask PNGs of the same images; the last one (the vote) decides which cases
            are drawn.
        truth: directory of LabelMe JSON files or, without any, mask PNGs of 0 and one other value, named like the
            predictions.
        out: the new directory; an identical earlier evaluation is kept.
        images: the original images for the pictures; by default those the LabelMe files point to.
        label: the LabelMe label that is foreground; by default the one in the predictions' manifests.
        threshold: a prediction is foreground above this value, in its file's own units, and so is a true mask that
            has more than two values; by default a prediction above 0, and no such true mask is accepted.
        sheets: how many cases to draw, a third each of the worst, the middle and the best.
        workspace: where the runs are whose present checkpoints the predictions must be of; None: do not compare them.
        runs: with `workspace`, the run of each of the predictions; None for a vote.

    Returns:
        The content of summary.json; scores by member under "members".

    Raises:
        UsageError: no predictions, an impossible threshold, or `out` is not an evaluation.
        InputDataError: predictions without truth, with different cases or sizes, not as their manifest records them,
            or not of their run's present checkpoint; or a truth that is not a mask; names them.
        StoppedEarly: a file changed while it was read.
    """
    if not predictions:
        raise UsageError("no predictions given: name at least one directory of mask PNGs")
    if sheets < 0:
        raise UsageError(f"--sheets {sheets}: give the number of pictures, 0 for none")
    check_threshold(threshold)
    check_replaceable(out, "evaluation")
    listed = list_members(predictions)
    if workspace:
        check_present(listed.members, workspace, runs)
    check_vote_of(listed.members)
    truths = list_truth(truth, _label(label, listed), listed.stems, threshold)
    scored = Scored(listed, {member.name: _hashes(member) for member in listed.members}, truths, threshold)
    output = Output(out, "evaluation", _key(scored, images, sheets))
    with building(output) as partial:
        if partial is None:
            log.info("%s: these predictions are already scored against this truth, nothing to do", out)
            summary = read_json(out / SUMMARY)
        else:
            counts, warnings = _count(scored)
            summary = summarise(listed, truths.directory, counts, warnings)
            write_json(partial / SUMMARY, summary)
            write_text(partial / "scores.csv", csv_of(listed, counts))
            complete = _draw(partial, scored, counts, images, sheets)
            # Not finished while a sheet lacks its image: the next run looks for the image again.
            write_manifest(partial, output, finished=complete)
    try:
        text, warnings = table(summary), list(map(str, summary["warnings"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # from an earlier evaluation, not yet checked
        raise InputDataError(
            f"{out / SUMMARY}: not a summary of scores ({error!r}): delete {out} and run the command again"
        ) from error
    for warning in warnings:
        log.warning("%s", warning)
    say(f"{text}\nscores: {out / 'scores.csv'}, {out / SUMMARY}")
    if (out / "sheets.png").is_file():
        say(f"pictures: {out / 'sheets.png'}, {out / 'sheets'}")
    return summary


def _label(given: str | None, listed: Members) -> str:
    """The truth's label: the one given, else the predictions', else (for predictions from elsewhere) the default."""
    if given is not None and listed.label is not None and given != listed.label:
        raise UsageError(f"--label {given}: the predictions outline {listed.label!r}: leave --label out")
    return given or listed.label or Data().label


def _hashes(member: Member) -> dict[str, str]:
    """The SHA-256 of a member's masks by stem; refuse masks that are not its own."""
    paths = list(member.images.values())
    found = in_threads(lambda path: sha256(path, MAX_IMAGE_BYTES), paths, "hashing")
    check_unchanged(member, dict(zip((path.name for path in paths), found, strict=True)))
    return dict(zip(member.images, found, strict=True))


def _key(scored: Scored, images: Path | None, sheets: int) -> dict[str, Any]:
    """The inputs that determine an evaluation."""
    truth = scored.truth
    members = {
        member.name: digest(member.images.values(), scored.hashes[member.name].values())
        for member in scored.listed.members
    }
    return {
        "members": [{"name": name, "sha256": value} for name, value in members.items()],
        "truth": {
            "directory": str(truth.directory),
            "label": truth.label,
            "sha256": digest(truth.files.values(), truth.hashes.values()),
        },
        "options": {"images": images and str(images.resolve()), "threshold": scored.threshold, "sheets": sheets},
    }


def _masks(scored: Scored, stem: str) -> list[tuple[NDArray[np.bool_], Seen]]:
    """The members' masks of a case, (height, width), bool.

    Raises:
        StoppedEarly: a file changed since it was hashed.
    """
    found = []
    for member in scored.listed.members:
        path = member.images[stem]
        values, content = read_once(path)
        if content != scored.hashes[member.name][stem] or values.shape != scored.listed.sizes[stem]:
            raise changed(path)
        found.append(foreground(values, scored.threshold, path))
    return found


def _count(scored: Scored) -> tuple[NDArray[np.int64], list[str]]:
    """True positives, false positives and false negatives, (members, images, 3), and warnings."""
    listed = scored.listed

    def one_image(stem: str) -> tuple[list[tuple[int, int, int]], list[Seen], Counter[str]]:
        truth = read_truth(scored.truth, stem, listed.sizes[stem])
        masks, seen = zip(*_masks(scored, stem), strict=True)
        return [confusion(mask, truth.mask) for mask in masks], list(seen), truth.labels

    counts, seen, labels = zip(*in_threads(one_image, listed.stems, "scores"), strict=True)
    log_seen(listed.names, seen)
    warning = unknown_label(scored.truth, labels)
    return np.array(counts, np.int64).swapaxes(0, 1), [warning] if warning else []


def _draw(out: Path, scored: Scored, counts: NDArray[np.int64], images: Path | None, total: int) -> bool:
    """Draw sheets of the cases picked by the last member's Dice. Return whether each has its image.

    Cases with empty truth and empty prediction show nothing: they are drawn only if there are no others.
    """
    listed, truths, last = scored.listed, scored.truth, counts[-1]
    shown = np.flatnonzero(last.sum(axis=1)) if last.any() else np.arange(len(last))
    picked = [item._replace(case=int(shown[item.case])) for item in pick_cases(dice(last[shown]).tolist(), total)]
    originals = list_images(images) if images else {}

    def case_of(item: Picked) -> Case:
        stem = listed.stems[item.case]
        size = listed.sizes[stem]
        rank = f"{item.group} case {item.number} of {len(last)} images"
        score = f"by the Dice of {listed.names[-1]}, here {dice(last[item.case]):.3f}"
        masks = dict(zip(listed.names, (mask for mask, _ in _masks(scored, stem)), strict=True))
        title = f"{stem}: {rank} {score} ({size[1]} x {size[0]} pixels, width x height)"
        return Case(title, _original(truths, stem, size, originals), read_truth(truths, stem, size).mask, masks)

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
        if source is None and path.suffix.lower() == ".json":
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
