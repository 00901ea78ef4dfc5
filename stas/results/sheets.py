"""Pictures for the pathologist: one case per sheet, with the outlines of the truth and of every member.

The first row shows the whole image, the second an enlarged part. A prediction is a yellow line over the truth's
thinner cyan one, so cyan shows where they differ. Colour-blind viewers can tell the two colours apart, and with their
dark edges both stand out from pink, purple and white.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stas.results.metrics import confusion, dice, precision, recall

Mask = NDArray[np.bool_]
Group = Literal["worst", "middle", "best"]
Color = tuple[int, int, int]

TRUTH: Color = (0, 215, 255)
PREDICTION: Color = (255, 225, 0)
HALO: Color = (15, 10, 25)
FRAME: Color = (255, 255, 255)
INK: Color = (20, 20, 20)
FAINT: Color = (95, 95, 95)
TISSUE: Color = (205, 150, 190)
NO_IMAGE: Color = (150, 150, 150)

SCREEN = 1.6  # width / height of a typical screen
PANEL = 520  # longer side of a panel in pixels
NARROWEST = 300  # width of a column, so that its title fits above a tall image
GAP = 14
TEXT = 19
TITLE = 62  # height of a column's two lines of text
THICK, THIN, EDGE = 1.7, 1.2, 1.3  # half widths of the lines and the width of their dark edge, in pixels
OVERSAMPLING = 2  # lines are drawn at twice the size and averaged down


class Box(NamedTuple):
    """A region of an image in pixels; right and bottom are not part of it."""

    left: int
    top: int
    right: int
    bottom: int


class Picked(NamedTuple):
    """A case to draw."""

    group: Group
    number: int  # from 1; worst 1 is the worst of all and best 1 the best
    case: int  # its index in the scores


@dataclass(frozen=True)
class Case:
    """The content of a sheet.

    Attributes:
        title: the sheet's headline.
        image: (height, width, 3), uint8, RGB; None: draw grey.
        truth: (height, width), bool.
        masks: each member's mask by name, in order, (height, width), bool.
    """

    title: str
    image: NDArray[np.uint8] | None
    truth: Mask
    masks: dict[str, Mask]


def pick_cases(scores: Sequence[float], total: int) -> list[Picked]:
    """Choose the worst, the middle and the best cases, a third each, none twice.

    Args:
        scores: one per case; equal ones keep their order.
        total: how many to choose; if three does not divide it, the worst get one more, then the best.
    """
    order = [int(index) for index in np.argsort(np.asarray(scores), kind="stable")]
    total = min(total, len(order))
    worst, best, middle = ((total + rest) // 3 for rest in (2, 1, 0))
    start = min(max((len(order) - middle) // 2, worst), len(order) - best - middle)
    groups: dict[Group, list[int]] = {
        "worst": order[:worst],
        "middle": order[start : start + middle],
        "best": order[::-1][:best],
    }
    return [
        Picked(group, number, index)
        for group, indices in groups.items()
        for number, index in enumerate(indices, start=1)
    ]


def draw_sheet(case: Case, wrap: bool = True) -> Image.Image:
    """Draw one case: the image, the truth and each member, whole and, below that, enlarged.

    Args:
        case: what to show.
        wrap: arrange the columns in two rows if that brings the sheet closer to a screen's proportions.
    """
    height, width = case.truth.shape
    image = Image.new("RGB", (width, height), NO_IMAGE) if case.image is None else Image.fromarray(case.image)
    region = region_of_interest(case.truth, list(case.masks.values()))
    titles = _panel_titles(case)
    panel_width, panel_height = _fitted((width, height))
    column_size = max(panel_width, NARROWEST) + GAP, TITLE + (panel_height + GAP) * (1 if region is None else 2)
    columns = _columns(len(titles), column_size) if wrap else len(titles)
    head = 4 * TEXT + GAP
    bands = math.ceil(len(titles) / columns)
    sheet = Image.new("RGB", (GAP + column_size[0] * columns, head + column_size[1] * bands), "white")
    _headline(sheet, case.title, marked=region is not None)
    for number, (name, detail) in enumerate(titles):
        band, column = divmod(number, columns)
        left, top = GAP + column * column_size[0], head + band * column_size[1]
        _panel_title(sheet, (left, top), name, detail, column_size[0] - GAP)
        masks = _panel_masks(case, number)
        panel = _panel(image, Box(0, 0, width, height), (panel_width, panel_height), *masks)
        if region is not None:
            _mark(panel, region, panel_width / width)
            enlarged = _panel(image, region, (panel_width, panel_height), *masks)
            if column == 0:
                _caption(enlarged, f"enlarged {width / (region.right - region.left):.1f} x")
            sheet.paste(enlarged, (left, top + TITLE + panel_height + GAP))
        sheet.paste(panel, (left, top + TITLE))
    return sheet


def draw_overview(sheets: Sequence[Image.Image]) -> Image.Image:
    """Stack sheets on one page, with a line between them."""
    page = Image.new(
        "RGB", (max(sheet.width for sheet in sheets), sum(sheet.height + GAP for sheet in sheets)), "white"
    )
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height + GAP
        ImageDraw.Draw(page).line((0, top - GAP // 2, page.width, top - GAP // 2), fill=FAINT, width=2)
    return page


def region_of_interest(truth: Mask, masks: Sequence[Mask]) -> Box | None:
    """The part of the image to enlarge, in the image's own proportions.

    If all foreground with a margin fits into half of the image's width and height, the region holds all of it.
    Otherwise it is the half-size region with the most foreground, where pixels that the last mask gets wrong count
    three times.

    Args:
        truth: (height, width), bool.
        masks: the members' masks, of the same shape.

    Returns:
        A region at least an eighth and at most half as wide and high as the image; None if all masks are empty.
    """
    height, width = truth.shape
    union = np.logical_or.reduce([truth, *masks])
    if not union.any():
        return None
    rows, columns = np.flatnonzero(union.any(axis=1)), np.flatnonzero(union.any(axis=0))
    share = 1.3 * max((rows[-1] - rows[0] + 1) / height, (columns[-1] - columns[0] + 1) / width)
    if share > 0.5:
        wrong = truth ^ masks[-1] if masks else np.zeros_like(truth)
        return _busiest(union + 2 * wrong.astype(np.int64))
    share = max(share, 1 / 8)
    middle = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    return _centred(*middle, round(share * height), round(share * width), truth.shape)


def _busiest(weight: NDArray[np.int64]) -> Box:
    """The half-size region with the highest sum of (height, width) weights, with its contents in the middle."""
    height, width = weight.shape
    tall, wide = max(1, height // 2), max(1, width // 2)
    sums = np.zeros((height + 1, width + 1), np.int64)
    sums[1:, 1:] = weight.cumsum(axis=0).cumsum(axis=1)
    inside = sums[tall:, wide:] - sums[:-tall, wide:] - sums[tall:, :-wide] + sums[:-tall, :-wide]
    best = np.argwhere(inside == inside.max())
    top, left = best[len(best) // 2]
    rows, columns = np.nonzero(weight[top : top + tall, left : left + wide])
    return _centred(
        top + (rows.min() + rows.max()) / 2, left + (columns.min() + columns.max()) / 2, tall, wide, weight.shape
    )


def _centred(row: float, column: float, tall: int, wide: int, shape: tuple[int, ...]) -> Box:
    """A box of a given size around a point, shifted to stay inside an image of shape (height, width)."""
    height, width = shape
    tall, wide = max(tall, 1), max(wide, 1)
    top = int(min(max(row - tall / 2, 0), height - tall))
    left = int(min(max(column - wide / 2, 0), width - wide))
    return Box(left, top, left + wide, top + tall)


def _columns(panels: int, column_size: tuple[int, int]) -> int:
    """How many columns to put in a row: all or half, whichever comes closer to a screen's proportions."""
    half = math.ceil(panels / 2)
    wide = panels * column_size[0] / column_size[1]
    wrapped = half * column_size[0] / (2 * column_size[1])
    return half if abs(math.log(wrapped / SCREEN)) < abs(math.log(wide / SCREEN)) else panels


def _panel_titles(case: Case) -> list[tuple[str, str]]:
    """Name and second line of each column."""
    titles = [("image", ""), ("truth", f"{100 * case.truth.mean():.2g} % of the image")]
    for name, mask in case.masks.items():
        counts = confusion(mask, case.truth)
        scores = f"Dice {dice(counts):.3f}, precision {precision(counts):.2f}, recall {recall(counts):.2f}"
        titles.append((name, scores))
    return titles


def _panel_masks(case: Case, column: int) -> tuple[Mask | None, Mask | None]:
    """The truth and the prediction that a column outlines."""
    if column == 0:
        return None, None
    return case.truth, None if column == 1 else list(case.masks.values())[column - 2]


def _panel(
    image: Image.Image, box: Box, size: tuple[int, int], truth: Mask | None, prediction: Mask | None
) -> Image.Image:
    """The box of the image at a size, (width, height) in pixels, with outlines."""
    panel = image.resize(size, Image.Resampling.LANCZOS, box=box)
    if truth is not None:
        _outline(panel, truth, box, TRUTH, THICK if prediction is None else THIN)
    if prediction is not None:
        _outline(panel, prediction, box, PREDICTION, THICK)
    return panel


def _outline(panel: Image.Image, mask: Mask, box: Box, color: Color, half_width: float) -> None:
    """Draw the outline of the part of a mask in `box`, with a dark edge."""
    edge = _boundary(mask, box, (panel.width * OVERSAMPLING, panel.height * OVERSAMPLING))
    for radius, shade in ((half_width + EDGE, HALO), (half_width, color)):
        line = _thickened(edge, radius * OVERSAMPLING)
        opacity = Image.fromarray(line.astype(np.uint8) * 255).resize(panel.size, Image.Resampling.BOX)
        panel.paste(shade, mask=opacity)


def _boundary(mask: Mask, box: Box, size: tuple[int, int]) -> Mask:
    """The foreground pixels beside background, after resizing `box` to (width, height).

    An outline is closed at the image's edge, and left open where an enlarged box cuts it.
    """
    whole = (box.bottom - box.top, box.right - box.left) == mask.shape
    shrinks = size[0] < box.right - box.left
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    resized = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, resampling, box=box))
    filled = resized > 0 if shrinks else resized > 127  # shrinking must not lose a small cluster of cells
    padded = np.pad(filled, 1, "constant" if whole else "edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return filled & ~inner


def _thickened(edge: Mask, radius: float) -> Mask:
    """Every pixel within `radius` of an edge pixel."""
    reach = int(radius)
    height, width = edge.shape
    padded = np.pad(edge, reach)
    result = np.zeros_like(edge)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            if down * down + right * right <= radius * radius:
                result |= padded[reach + down : reach + down + height, reach + right : reach + right + width]
    return result


def _mark(panel: Image.Image, region: Box, scale: float) -> None:
    """Frame, in a whole-image panel, the region that is enlarged below."""
    left, top, right, bottom = (round(scale * edge) for edge in region)
    draw = ImageDraw.Draw(panel)
    draw.rectangle((left - 1, top - 1, right, bottom), outline=HALO, width=4)
    draw.rectangle((left, top, right - 1, bottom - 1), outline=FRAME, width=2)


def _caption(panel: Image.Image, text: str) -> None:
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(TEXT - 2)
    left, top, right, bottom = draw.textbbox((8, panel.height - 8), text, font, "ld")
    draw.rectangle((left - 5, top - 4, right + 5, bottom + 4), fill=HALO)
    draw.text((8, panel.height - 8), text, FRAME, font, "ld")


def _headline(sheet: Image.Image, title: str, marked: bool) -> None:
    """Draw the sheet's title and, below it, the legend."""
    draw = ImageDraw.Draw(sheet)
    large, font = ImageFont.load_default(TEXT + 5), ImageFont.load_default(TEXT)
    draw.text((GAP, GAP + TEXT), _shortened(title, large, sheet.width - 2 * GAP), INK, large, "lm")
    left, middle = GAP, GAP + 3 * TEXT
    entries = [("prediction", PREDICTION), ("truth (thin: where a prediction differs from it)", TRUTH)]
    for text, color in entries:
        draw.rectangle((left, middle - 4, left + 36, middle + 4), fill=color, outline=HALO, width=2)
        draw.text((left + 46, middle), text, INK, font, "lm")
        left += 46 + round(draw.textlength(text, font)) + 2 * GAP
    if marked:
        draw.rectangle((left, middle - 9, left + 36, middle + 9), fill=TISSUE, outline=HALO, width=4)
        draw.rectangle((left + 1, middle - 8, left + 35, middle + 8), outline=FRAME, width=2)
        draw.text((left + 46, middle), "enlarged below", INK, font, "lm")


def _panel_title(sheet: Image.Image, at: tuple[int, int], name: str, detail: str, width: int) -> None:
    draw = ImageDraw.Draw(sheet)
    left, top = at
    font = ImageFont.load_default(TEXT + 1)
    draw.text((left, top + TEXT), _shortened(name, font, width), INK, font, "lm", stroke_width=0.4, stroke_fill=INK)
    small = ImageFont.load_default(TEXT - 1)
    draw.text((left, top + 2 * TEXT + 6), _shortened(detail, small, width), FAINT, small, "lm")


def _shortened(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> str:
    """Shorten a text in its middle until it fits a width in pixels."""
    kept = len(text)
    short = text
    while font.getlength(short) > width and kept > 2:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return short


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a panel for an image of this (width, height): the same proportions, the longer side PANEL."""
    scale = PANEL / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
