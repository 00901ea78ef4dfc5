"""LabelMe annotations, version 3 to 5: read, validate and rasterise them, and find their images.

Messages read 'file: what was found and required: remedy'.
"""

import base64
import binascii
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stas.data.images import MAX_SIDE
from stas.data.listing import IMAGE_SUFFIXES
from stas.errors import InputDataError, UnreadableError
from stas.system.untrusted import parse_json, read_bounded, refusal, shown, stop_if_passing

# The fewest and the most points of each shape type.
SHAPE_TYPES: dict[str, tuple[int, float]] = {
    "polygon": (3, math.inf),
    "rectangle": (2, 2),
    "circle": (2, 2),
    "line": (2, 2),
    "linestrip": (2, math.inf),
    "point": (1, 1),
}
LINE_WIDTH = 10  # pixels; LabelMe's width for lines and line strips in a mask
POINT_RADIUS = 5  # pixels; LabelMe's radius for points
MAX_COORDINATE = 100_000  # pixels; Pillow needs minutes for a circle of a million
MAX_FILE_BYTES = 256 * 1024 * 1024  # including embedded images
# Limit on the pixel rows that the edges of one annotation's shapes cross, plus the equivalent in pixels filled: each
# takes Pillow up to a microsecond. 10^6 points along an outline cross about 2 million rows; so do 10^5 nuclei.
MAX_DRAWING = 20_000_000
FILLED_AT_ONCE = 4096  # pixels filled in the time that an edge takes to cross a row


@dataclass(frozen=True, eq=False)
class Shape:
    """One drawn object.

    Attributes:
        label: the object's class.
        kind: one of SHAPE_TYPES.
        points: (N, 2), float64, finite, x and y in pixels. A circle has its centre and a point on its edge; a
            rectangle has two opposite corners.
    """

    label: str
    kind: str
    points: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Annotation:
    """The content of a LabelMe file.

    Attributes:
        shapes: the objects of all labels.
        size: (height, width) in pixels after EXIF orientation; LabelMe before 3.16 did not write it.
        image_path: the image's path as written, often relative to the annotation, and not to be trusted.
        image_data: the bytes of the embedded image file.
    """

    shapes: tuple[Shape, ...]
    size: tuple[int, int] | None = None
    image_path: str | None = None
    image_data: bytes | None = None

    @property
    def labels(self) -> Counter[str]:
        """The number of shapes of each label."""
        return Counter(shape.label for shape in self.shapes)


def read_labelme(path: Path) -> Annotation:
    """Read and validate a LabelMe JSON file.

    Raises:
        InputDataError: the file is not readable or not LabelMe's structure, or a shape has an unknown type, too few
            or too many points for its type, or points that are not finite; names file, shape and value.
    """
    content = read_bounded(path, MAX_FILE_BYTES)
    try:
        values = parse_json(content)
    except ValueError as error:
        raise InputDataError(f"{path}: not readable as JSON ({error}): save it again with LabelMe") from error
    del content  # may be most of this process's memory
    if not isinstance(values, dict) or not isinstance(values.get("shapes"), list):
        raise InputDataError(f"{path}: no list of 'shapes', so not a LabelMe annotation: move it out of the directory")
    image_path = values.get("imagePath")
    if not (image_path is None or isinstance(image_path, str)):
        raise InputDataError(f"{path}: imagePath {shown(image_path)} is not text: save it again with LabelMe")
    return Annotation(
        shapes=tuple(_shape(f"{path}: shape {number}", shape) for number, shape in enumerate(values["shapes"], 1)),
        size=_declared_size(path, values),
        image_path=image_path,
        image_data=_embedded_image(path, values.get("imageData")),
    )


def rasterise(
    shapes: Sequence[Shape], size: tuple[int, int], label: str, source: Path | None = None
) -> NDArray[np.bool_]:
    """Draw the shapes of one label on one Pillow canvas, each as LabelMe's own `shape_to_mask` does.

    Args:
        shapes: shapes of other labels are ignored.
        size: (height, width) of the image in pixels.
        label: the label that is foreground.
        source: the annotation, named in errors.

    Returns:
        (height, width), bool, the union of the shapes, clipped to the image.

    Raises:
        InputDataError: drawing them all would take longer than MAX_DRAWING allows, which is half a minute.
    """
    height, width = size
    drawn = [shape for shape in shapes if shape.label == label]
    if sum(_drawing(shape, size) for shape in drawn) > MAX_DRAWING:
        points = sum(len(shape.points) for shape in drawn)
        raise InputDataError(
            f"{source or 'annotation'}: {len(drawn)} shapes with {points} points cross an image of {width} x "
            f"{height} pixels too often to be drawn: simplify them, or annotate with a mask PNG"
        )
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for shape in drawn:
        _draw(draw, shape)
    return np.asarray(canvas) > 0


def find_image(annotation_path: Path, annotation: Annotation, images: Sequence[Path]) -> Path | bytes | None:
    """Find the image an annotation was drawn on.

    In this order: an image with the annotation's stem in one of `images`; the annotation's imagePath, which may contain
    '..', be absolute or be a Windows path, if it leads to a file inside one of `images` or the annotation's own
    directory; the bare file name of imagePath in one of `images`; the embedded image.

    Args:
        annotation_path: the annotation's file.
        annotation: its content.
        images: directories of images.

    Returns:
        A file, the bytes of the embedded image file, or None if there is no image.
    """
    for directory in images:
        for suffix in IMAGE_SUFFIXES:
            for name in (annotation_path.stem + suffix, annotation_path.stem + suffix.upper()):
                if _is_file(directory / name):
                    return directory / name
    if annotation.image_path:
        written = annotation.image_path.replace("\\", "/")
        name = written.rpartition("/")[2]
        for candidate in (_contained(annotation_path.parent, written, images), *(place / name for place in images)):
            if candidate and _is_file(candidate):
                return candidate
    return annotation.image_data


def _drawing(shape: Shape, size: tuple[int, int]) -> float:
    """The time to draw a shape, in units of one edge crossing one row of pixels."""
    low, high = shape.points.min(axis=0), shape.points.max(axis=0)
    rows = np.clip(shape.points[:, 1], -1, size[0])
    if shape.kind in ("circle", "point"):
        radius = float(np.hypot(*(shape.points[-1] - shape.points[0]))) or POINT_RADIUS
        low, high = shape.points[0] - radius, shape.points[0] + radius
        crossed = 2 * radius  # Pillow follows the whole outline, even outside the image
    elif shape.kind == "polygon":
        crossed = float(np.abs(np.diff(rows, append=rows[:1])).sum()) + len(rows)
    else:
        crossed = float(np.abs(np.diff(rows)).sum()) + LINE_WIDTH * len(rows)
    inside = np.clip([low, high], 0, (size[1], size[0]))
    return crossed + float(np.prod(inside[1] - inside[0])) / FILLED_AT_ONCE


def _draw(draw: ImageDraw.ImageDraw, shape: Shape) -> None:
    points = [(float(x), float(y)) for x, y in shape.points]
    if shape.kind == "polygon":
        draw.polygon(points, outline=1, fill=1)
    elif shape.kind == "rectangle":
        low, high = shape.points.min(axis=0), shape.points.max(axis=0)
        draw.rectangle([*map(float, low), *map(float, high)], outline=1, fill=1)
    elif shape.kind == "circle":
        (x, y), (edge_x, edge_y) = points
        radius = math.sqrt((x - edge_x) ** 2 + (y - edge_y) ** 2)  # not hypot, which rounds differently from LabelMe
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)
    elif shape.kind == "point":
        ((x, y),) = points
        radius = POINT_RADIUS
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)
    else:
        draw.line(points, fill=1, width=LINE_WIDTH)


def _shape(where: str, value: Any) -> Shape:
    """Validate one entry of 'shapes'; `where` begins its error messages."""
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        raise InputDataError(f"{where} has no label: save it again with LabelMe")
    kind = value.get("shape_type") or "polygon"  # LabelMe before 3.5 had only polygons and did not write the type
    if not isinstance(kind, str) or kind not in SHAPE_TYPES:
        raise InputDataError(
            f"{where} is of type {shown(kind)}, not one of {', '.join(SHAPE_TYPES)}: draw it as one of these"
        )
    points = _points(where, value.get("points"))
    fewest, most = SHAPE_TYPES[kind]
    if not fewest <= len(points) <= most:
        needed = f"{fewest} or more" if most == math.inf else f"exactly {fewest}"
        raise InputDataError(
            f"{where}, a {kind}, has {len(points)} points but needs {needed}: draw it again or delete it"
        )
    return Shape(value["label"], kind, points)


def _points(where: str, value: Any) -> NDArray[np.float64]:
    if not isinstance(value, list):
        raise InputDataError(f"{where} has no list of points: save it again with LabelMe")
    for point in value:
        if not (isinstance(point, list) and len(point) == 2 and all(type(number) in (int, float) for number in point)):
            raise InputDataError(f"{where} has the point {shown(point)}, not a pair of numbers: draw it again")
        if not all(abs(number) <= MAX_COORDINATE for number in point):  # also false for NaN
            raise InputDataError(
                f"{where} has the point {shown(point)}, not finite and within {MAX_COORDINATE} pixels: draw it again"
            )
    return np.array(value, np.float64).reshape(-1, 2)


def _declared_size(path: Path, values: dict[str, Any]) -> tuple[int, int] | None:
    sides = values.get("imageHeight"), values.get("imageWidth")
    if sides == (None, None):
        return None
    if not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise InputDataError(
            f"{path}: imageHeight {shown(sides[0])} and imageWidth {shown(sides[1])} are not two whole numbers "
            f"above 0 and up to {MAX_SIDE}: save it again with LabelMe"
        )
    return sides  # pyright: ignore[reportReturnType]


def _embedded_image(path: Path, value: Any) -> bytes | None:
    if value is None or value == "":
        return None
    try:
        # Not split and join: with a blank after every letter, that would take fifty times the memory.
        return base64.b64decode(value.encode("ascii").translate(None, b" \t\r\n\v\f"), validate=True)
    except (AttributeError, binascii.Error, ValueError) as error:
        raise InputDataError(f"{path}: imageData is not base64 ({error}): save it again with LabelMe") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError) as error:  # an impossible file name, if nothing worse
        problem = refusal(path, error)
        if isinstance(problem, UnreadableError):
            raise problem from error
        return False


def _contained(base: Path, written: str, images: Sequence[Path]) -> Path | None:
    """The file `written`, relative to `base`, if it is inside `base` or one of `images` after following links.

    Compares the text of the paths first: even a `stat` of a path outside could mount a network share.
    """
    try:
        within = [directory.resolve() for directory in (*images, base)]
        path = Path(os.path.normpath(within[-1] / written))
        named = [*within, *(Path(os.path.normpath(directory.absolute())) for directory in (*images, base))]
        if any(path.is_relative_to(place) for place in named):
            resolved = path.resolve()
            if any(resolved.is_relative_to(place) for place in within):
                return path
    except (OSError, ValueError, RuntimeError) as error:  # an impossible file name, or a loop of links
        stop_if_passing(base / written, error)
    return None
