"""LabelMe annotations, version 3 to 5: read, validate, rasterise, and find the image they belong to.

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

from stas.data.images import IMAGE_SUFFIXES, MAX_SIDE
from stas.errors import InputDataError
from stas.system.untrusted import parse_json, read_bounded, shown

# Each shape type with the fewest and the most points it may have.
SHAPE_TYPES: dict[str, tuple[int, float]] = {
    "polygon": (3, math.inf),
    "rectangle": (2, 2),
    "circle": (2, 2),
    "line": (2, 2),
    "linestrip": (2, math.inf),
    "point": (1, 1),
}
LINE_WIDTH = 10  # pixels, as LabelMe draws lines and line strips into a mask
POINT_RADIUS = 5  # pixels, likewise
MAX_COORDINATE = 100_000  # pixels; Pillow needs minutes for a circle of a million
MAX_FILE_BYTES = 256 * 1024 * 1024  # images embedded in it included
# Rows of pixels that the edges of one annotation's shapes may cross, and rows' worth of pixels that they fill: each
# takes Pillow up to a microsecond. 10^6 points that follow an outline cross some 2 million; 10^5 nuclei as many.
MAX_DRAWING = 20_000_000
FILLED_AT_ONCE = 4096  # pixels that are filled as fast as an edge crosses a row


@dataclass(frozen=True, eq=False)
class Shape:
    """One drawn object.

    Attributes:
        label: the object's class.
        kind: one of SHAPE_TYPES.
        points: (N, 2), float64, finite, x and y in pixels. A circle's are its centre and a point on its edge,
            a rectangle's two opposite corners.
    """

    label: str
    kind: str
    points: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Annotation:
    """What a LabelMe file says.

    Attributes:
        shapes: the objects, of every label.
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
        """How many shapes each label has."""
        return Counter(shape.label for shape in self.shapes)


def read_labelme(path: Path) -> Annotation:
    """Read and validate a LabelMe JSON file.

    Raises:
        InputDataError: not readable, not LabelMe's structure, an unknown shape type, too few or too many points
            for the type, or points that are not finite; names file, shape and value.
    """
    content = read_bounded(path, MAX_FILE_BYTES)
    try:
        values = parse_json(content)
    except ValueError as error:
        raise InputDataError(f"{path}: not readable as JSON ({error}): save it again with LabelMe") from error
    del content  # which may be the greater part of this process's memory
    if not isinstance(values, dict) or not isinstance(values.get("shapes"), list):
        raise InputDataError(f"{path}: no list of 'shapes', so not a LabelMe annotation: take it out of the directory")
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
    """Draw the shapes of one label as LabelMe's own `shape_to_mask` draws each, all on one Pillow canvas.

    Args:
        shapes: shapes of other labels are passed over.
        size: (height, width) of the image in pixels.
        label: the label that is foreground.
        source: the annotation, named in an error.

    Returns:
        (height, width), bool, the union of the shapes; what lies outside of the image is cut off.

    Raises:
        InputDataError: to draw them all takes longer than MAX_DRAWING allows, which is half a minute.
    """
    height, width = size
    drawn = [shape for shape in shapes if shape.label == label]
    if sum(_drawing(shape, size) for shape in drawn) > MAX_DRAWING:
        points = sum(len(shape.points) for shape in drawn)
        raise InputDataError(
            f"{source or 'annotation'}: {len(drawn)} shapes of {points} points that cross an image of {width} x "
            f"{height} pixels too often to be drawn: simplify them, or annotate with a mask PNG"
        )
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for shape in drawn:
        _draw(draw, shape)
    return np.asarray(canvas) > 0


def find_image(annotation_path: Path, annotation: Annotation, images: Sequence[Path]) -> Path | bytes | None:
    """Find the image an annotation was drawn on.

    In this order: an image of the annotation's stem in a directory of `images`; the annotation's imagePath, which may
    hold '..', be absolute or a Windows path, if it leads to a file inside of one of `images` or of the annotation's own
    directory; its bare name in one of `images`; the embedded image.

    Args:
        annotation_path: where the annotation was read.
        annotation: its content.
        images: directories of images.

    Returns:
        A file, the bytes of the embedded image file, or None if there is neither.
    """
    for directory in images:
        for suffix in IMAGE_SUFFIXES:
            for name in (annotation_path.stem + suffix, annotation_path.stem + suffix.upper()):
                if (directory / name).is_file():
                    return directory / name
    if annotation.image_path:
        written = annotation.image_path.replace("\\", "/")
        name = written.rpartition("/")[2]
        for candidate in (_contained(annotation_path.parent, written, images), *(place / name for place in images)):
            if candidate and _is_file(candidate):
                return candidate
    return annotation.image_data


def _drawing(shape: Shape, size: tuple[int, int]) -> float:
    """How long a shape takes to draw, in units of an edge that crosses a row of pixels."""
    low, high = shape.points.min(axis=0), shape.points.max(axis=0)
    rows = np.clip(shape.points[:, 1], -1, size[0])
    if shape.kind in ("circle", "point"):
        radius = float(np.hypot(*(shape.points[-1] - shape.points[0]))) or POINT_RADIUS
        low, high = shape.points[0] - radius, shape.points[0] + radius
        crossed = 2 * radius  # Pillow walks around all of it, also outside of the image
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
        radius = math.sqrt((x - edge_x) ** 2 + (y - edge_y) ** 2)  # not hypot, which rounds otherwise than LabelMe
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)
    elif shape.kind == "point":
        ((x, y),) = points
        radius = POINT_RADIUS
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)
    else:
        draw.line(points, fill=1, width=LINE_WIDTH)


def _shape(where: str, value: Any) -> Shape:
    """Validate one entry of 'shapes'; `where` is the beginning of an error."""
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        raise InputDataError(f"{where} has no label: save it again with LabelMe")
    kind = value.get("shape_type") or "polygon"  # LabelMe before 3.5 knew nothing else and did not write it
    if not isinstance(kind, str) or kind not in SHAPE_TYPES:
        raise InputDataError(
            f"{where} is of type {shown(kind)}, none of {', '.join(SHAPE_TYPES)}: draw it as one of these"
        )
    points = _points(where, value.get("points"))
    fewest, most = SHAPE_TYPES[kind]
    if not fewest <= len(points) <= most:
        needed = f"{fewest} or more" if most == math.inf else f"exactly {fewest}"
        raise InputDataError(
            f"{where}, a {kind}, has {len(points)} points and needs {needed}: draw it anew or delete it"
        )
    return Shape(value["label"], kind, points)


def _points(where: str, value: Any) -> NDArray[np.float64]:
    if not isinstance(value, list):
        raise InputDataError(f"{where} has no list of points: save it again with LabelMe")
    for point in value:
        if not (isinstance(point, list) and len(point) == 2 and all(type(number) in (int, float) for number in point)):
            raise InputDataError(f"{where} has the point {shown(point)}, not a pair of numbers: draw it anew")
        if not all(abs(number) <= MAX_COORDINATE for number in point):  # false for NaN, too
            raise InputDataError(
                f"{where} has the point {shown(point)}, not finite and within {MAX_COORDINATE} pixels: draw it anew"
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
        # Not split and joined: white space between single letters would take fifty times their memory.
        return base64.b64decode(value.encode("ascii").translate(None, b" \t\r\n\v\f"), validate=True)
    except (AttributeError, binascii.Error, ValueError) as error:
        raise InputDataError(f"{path}: imageData is not base64 ({error}): save it again with LabelMe") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _contained(base: Path, written: str, images: Sequence[Path]) -> Path | None:
    """The file that `written`, seen from `base`, names, if it lies in `base` or one of `images`, its links followed.

    Decided by the words first: to look at a path outside, on a share that is mounted by being looked at, is a read.
    """
    try:
        within = [directory.resolve() for directory in (*images, base)]
        path = Path(os.path.normpath(within[-1] / written))
        named = [*within, *(Path(os.path.normpath(directory.absolute())) for directory in (*images, base))]
        if any(path.is_relative_to(place) for place in named):
            resolved = path.resolve()
            if any(resolved.is_relative_to(place) for place in within):
                return path
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
        pass
    return None
