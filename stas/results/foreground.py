"""Which values of a mask file are foreground, and what the user should know about that choice."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stas.data.images import is_graded, read_image
from stas.errors import InputDataError, UsageError
from stas.results.predictions import Grey, log_graded

log = logging.getLogger(__name__)

MAX_VALUE = 65535  # of a 16-bit mask


class Seen(NamedTuple):
    """What was noticed in one mask.

    Attributes:
        graded: no threshold was given, and the values are not only 0 and one of 1, 255 and 65535.
        lost: a threshold was given, and it turned a mask with values above 0 into an empty one.
        kept: a threshold was given, and some values are above it.
    """

    graded: bool = False
    lost: bool = False
    kept: bool = False


def check_threshold(threshold: float | None) -> None:
    """Refuse a threshold that no mask can have.

    Raises:
        UsageError: not a number from 0 up to, but not including, 65535.
    """
    if threshold is not None and not 0 <= threshold < MAX_VALUE:  # also false for NaN
        raise UsageError(
            f"--threshold {threshold}: give a number from 0 to {MAX_VALUE - 1} in the masks' own units, which go up to "
            f"1, 255 or {MAX_VALUE}; half of 255 is 127"
        )


def foreground(values: Grey, threshold: float | None, path: Path) -> tuple[NDArray[np.bool_], Seen]:
    """The foreground of a mask file.

    Args:
        values: (height, width), uint8 or uint16.
        threshold: foreground is every value above it, in the file's own units; by default every value above 0.
        path: the file, named in errors.

    Returns:
        (height, width), bool; and what the user should know about it (`log_seen`).

    Raises:
        InputDataError: a photograph, not a mask; or a threshold in other units than the file's.
    """
    if threshold is None:
        graded = is_graded(values)
        if graded:
            refuse_colour(path)
        return values > 0, Seen(graded=graded)
    _check_units(values, threshold, path)
    mask = values > threshold
    kept = bool(mask.any())
    return mask, Seen(lost=not kept and bool(values.any()), kept=kept)


def log_seen(names: Sequence[str], seen: Sequence[Sequence[Seen]]) -> None:
    """Log, once per member, what was noticed in its masks; `seen` is by image, then by member."""
    counts = np.array(seen, np.int64).sum(axis=0)  # (members, 3)
    for name, (graded, lost, kept) in zip(names, counts.tolist(), strict=True):
        log_graded(name, graded, len(seen))
        if lost and not kept:
            log.warning(
                "%s: no value is above --threshold, so all %d masks are taken as empty, but %d have values above 0: "
                "give it in the masks' own units",
                name,
                len(seen),
                lost,
            )


def two_valued(values: Grey) -> bool:
    """Whether there are only 0 and at most one other value, as in a mask."""
    return not is_graded(values) or bool(((values == 0) | (values == values.max())).all())


def refuse_colour(path: Path) -> None:
    """Refuse a picture with colours.

    Raises:
        InputDataError: the red, green and blue of some pixel differ.
    """
    try:
        colours = read_image(path)
    except InputDataError:  # 16-bit grey
        return
    if (colours != colours[..., :1]).any() and not _two_colours(colours):
        raise InputDataError(f"{path}: a picture in colour, not a mask: give the directory with the masks")


def _two_colours(colours: NDArray[np.uint8]) -> bool:
    """Whether a picture has one colour beside black, as masks of some programs do."""
    packed = colours.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    return bool(((packed == 0) | (packed == packed.max())).all())


def _check_units(values: Grey, threshold: float, path: Path) -> None:
    top = np.iinfo(values.dtype).max
    if threshold >= top:
        raise InputDataError(
            f"{path}: its values go up to {top}, so none is above --threshold {threshold}: give it in the mask's units"
        )
    if 0 < threshold < 1 and is_graded(values):
        raise InputDataError(
            f"{path}: its values go up to {values.max()}, so --threshold {threshold} would take every one above 0: "
            f"give it in the mask's own units; half of {top} is {top // 2}"
        )
