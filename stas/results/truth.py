"""The true masks of a directory: LabelMe JSON files, or mask PNGs if it has no JSON."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stas.data.annotations import MAX_FILE_BYTES, Annotation, rasterise, read_labelme
from stas.data.images import MAX_IMAGE_BYTES, read_grey
from stas.data.listing import SAME_NAME, fold, list_images
from stas.errors import InputDataError
from stas.results.foreground import refuse_colour, two_valued
from stas.results.predictions import Grey, changed, read_once
from stas.system.files import sha256
from stas.system.printing import named
from stas.system.threads import in_threads
from stas.system.untrusted import shown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truth:
    """The true masks of a directory.

    Attributes:
        directory: where they are.
        files: LabelMe JSON or mask PNG by stem.
        hashes: the SHA-256 of each of these files, by stem.
        label: the LabelMe label that is foreground.
        threshold: in a mask that is not of two values, every value above this is foreground; None: refuse such a mask.
    """

    directory: Path
    files: dict[str, Path]
    hashes: dict[str, str]
    label: str
    threshold: float | None


@dataclass(frozen=True)
class TrueMask:
    """The truth of one case.

    Attributes:
        mask: (height, width), bool.
        labels: the number of shapes of each label; empty for a PNG.
    """

    mask: NDArray[np.bool_]
    labels: Counter[str]


def list_truth(directory: Path, label: str, stems: Sequence[str], threshold: float | None) -> Truth:
    """The truth of every prediction. JSON wins, because a PNG beside a JSON is its image.

    Raises:
        InputDataError: a prediction has no truth or, under one name, two; names the first.
    """
    if not directory.is_dir():
        raise InputDataError(f"{directory}: not a directory; give the directory of LabelMe JSON files or mask PNGs")
    annotations = _list_json(directory)
    files = annotations or list_images(directory, (".png",))
    missing = [stem for stem in stems if stem not in files]
    if missing:
        needed = "<stem>.json" if annotations else "<stem>.json or <stem>.png"
        raise InputDataError(
            f"{directory}: no truth for {len(missing)} of {len(stems)} predictions ({named(missing)}): add {needed} "
            "for each, or leave these predictions out"
        )
    if annotations:
        _refuse_second_truth(directory, stems)
    if len(files) > len(stems):
        log.info("%d of %d truths have predictions; only these are scored", len(stems), len(files))
    files = {stem: files[stem] for stem in stems}
    most = MAX_FILE_BYTES if annotations else MAX_IMAGE_BYTES
    hashes = in_threads(lambda path: sha256(path, most), list(files.values()), "hashing")
    return Truth(directory, files, dict(zip(stems, hashes, strict=True)), label, threshold)


def read_truth(truth: Truth, stem: str, size: tuple[int, int]) -> TrueMask:
    """The true mask of a case, checked against the predictions' size, (height, width).

    Raises:
        InputDataError: not readable, of another size, or a picture that is not a mask.
        StoppedEarly: the file changed since it was hashed.
    """
    path = truth.files[stem]
    labels: Counter[str] = Counter()
    if path.suffix.lower() == ".json":
        annotation = _read_json(path, truth.hashes[stem])
        found, labels = annotation.size or size, annotation.labels
        mask = rasterise(annotation.shapes, size, truth.label, path) if found == size else None
    else:
        values, content = read_once(path)
        if content != truth.hashes[stem]:
            raise changed(path)
        mask = _foreground(values, truth.threshold, path)
        found = mask.shape
    if mask is None or found != size:
        raise InputDataError(
            f"{path}: the truth of {stem} is {found[1]} x {found[0]} pixels (width x height), but its predictions are "
            f"{size[1]} x {size[0]}: both must have the image's own size"
        )
    return TrueMask(mask, labels)


def unknown_label(truth: Truth, labels: Iterable[Counter[str]]) -> str | None:
    """A warning if shapes were drawn, but none with the label that is scored; None otherwise."""
    found = sum(labels, Counter())
    if not found or truth.label in found:
        return None
    listed = named(f"{shown(name)} ({count})" for name, count in found.most_common())
    return (
        f"{truth.directory}: no shape has the label {shown(truth.label)}, so every prediction is scored against an "
        f"empty truth; the labels there (and how many shapes) are {listed}: is --label right?"
    )


def _list_json(directory: Path) -> dict[str, Path]:
    """The JSON files of a directory by stem, whatever the case of their suffix."""
    found: dict[str, Path] = {}
    folded: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() != ".json" or path.name == "manifest.json" or path.name.startswith("."):
            continue
        other = folded.setdefault(fold(path.stem), path)
        if other != path:
            note = "" if other.stem == path.stem else SAME_NAME
            raise InputDataError(
                f"{directory}: {other.name} and {path.name} both annotate {path.stem!r}{note}: keep one of the two"
            )
        found[path.stem] = path
    return found


def _refuse_second_truth(directory: Path, stems: Sequence[str]) -> None:
    """Refuse a mask beside an annotation of the same case: either could be the truth. Its image may lie there."""
    there = {path.stem: path for path in directory.iterdir() if path.suffix.lower() == ".png"}
    beside = [there[stem] for stem in stems if stem in there]
    masks = [path for path, is_mask in zip(beside, in_threads(_is_mask, beside, "reading"), strict=True) if is_mask]
    if masks:
        raise InputDataError(
            f"{directory}: {len(masks)} annotations have a mask of the same name beside them "
            f"({named(path.name for path in masks)}), and either could be the truth: move the JSON files or the masks "
            "to another directory"
        )


def _is_mask(path: Path) -> bool:
    """Whether a PNG has exactly two values, one of them 0."""
    try:
        values = read_grey(path)
    except InputDataError:
        return False
    return bool(values.min(initial=0) == 0 < values.max(initial=0) and (values == 0).any() and two_valued(values))


def _read_json(path: Path, expected: str) -> Annotation:
    annotation = read_labelme(path)
    if sha256(path, MAX_FILE_BYTES) != expected:
        raise changed(path)
    return annotation


def _foreground(values: Grey, threshold: float | None, path: Path) -> NDArray[np.bool_]:
    """The foreground of a truth's mask. A mask of two values needs no threshold, which may be for the predictions."""
    if two_valued(values):
        return values > 0
    refuse_colour(path)
    if threshold is None:
        raise InputDataError(
            f"{path}: has values other than 0 and one other, so it may be a photograph or probabilities, not a mask: "
            "give the directory with the masks, or --threshold to take every value above it as foreground, such as 127"
        )
    if threshold >= (top := np.iinfo(values.dtype).max):
        raise InputDataError(f"{path}: its values go up to {top}, so none is above --threshold {threshold}")
    return values > threshold
