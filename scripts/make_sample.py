"""Make sample data: pictures that look like H&E stained lung, with outlined tumour clusters in the air spaces.

They contain no patient's tissue, so they can be shipped and shown. Light is absorbed by four layers of dye
(haematoxylin, eosin, blood, pigment), as on a real slide. A tumour mass, the lining of some alveoli, macrophages and
blood are there to be confused with the clusters; only the clusters are annotated.

    python scripts/make_sample.py DIR [--images 40] [--seed 0] [--size-scale 1.0]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from stas.errors import UsageError
from stas.system.files import atomic_write, write_json

Array = NDArray[Any]
LABEL = "STAS"
# (height, width) in pixels of successive images at scale 1
SIZES = ((471, 858), (471, 858), (700, 700), (471, 858), (800, 600), (471, 858), (420, 1000), (471, 858))
REFERENCE = 471 * 858  # at this area one unit of length is one pixel
BLUE, PINK, BLOOD, PIGMENT = range(4)
# absorbance of red, green and blue light by one unit of each layer
DYES = np.array([[0.66, 0.74, 0.30], [0.13, 0.60, 0.27], [0.12, 1.45, 0.80], [0.50, 0.62, 0.75]])
NO_STAS = 1 / 8  # share of images without a cluster
LENGTHS = (12.0, 300.0)  # of the smallest and largest clusters, in units


def noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Array:
    """Smooth noise (height, width), float32, about mean 0 and deviation 0.8, with features of `cell` pixels."""
    rows, columns = height / cell, width / cell
    grid = rng.standard_normal((int(rows) + 4, int(columns) + 4)).astype(np.float32)
    box = (1, 1, 1 + columns, 1 + rows)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC, box=box))


def fill(polygon: Array, height: int, width: int, border: float = 0.0) -> Array:
    """Rasterise a polygon (N, 2) of x, y in pixels, grown by `border`, as a soft-edged float32 mask of 0 to 1."""
    image = Image.new("L", (width, height))
    points = [(float(x), float(y)) for x, y in polygon]
    draw = ImageDraw.Draw(image)
    draw.polygon(points, fill=255)
    if border:
        draw.line([*points, points[0]], fill=255, width=round(2 * border), joint="curve")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.7 + border / 3)), np.float32) / 255


def stamp(layer: Array, x: float, y: float, axes: tuple[float, float], angle: float, peak: float, slope: float) -> None:
    """Lay an ellipse over `layer` (height, width), float32, in place, keeping the larger value.

    The centre (it may be outside) and the half axes are in pixels, the first axis' `angle` in radians. The ellipse
    rises from 0 at its edge to `peak`; at `slope` 1 it is a cone, at 3 a disc with a soft edge.
    """
    reach = int(max(axes) * 1.3) + 2
    left, top = max(int(x) - reach, 0), max(int(y) - reach, 0)
    target = layer[top : max(int(y) + reach + 1, 0), left : max(int(x) + reach + 1, 0)]
    if not target.size:
        return
    dy = np.arange(top, top + target.shape[0], dtype=np.float32)[:, None] - y
    dx = np.arange(left, left + target.shape[1], dtype=np.float32)[None] - x
    cos, sin = np.cos(angle), np.sin(angle)
    distance = np.hypot((dx * cos + dy * sin) / axes[0], (dy * cos - dx * sin) / axes[1])
    np.maximum(target, peak * np.clip((1 - distance) * slope, 0, 1), out=target)


def sites(rng: np.random.Generator, height: int, width: int, spacing: float) -> Array:
    """Evenly crowded random points (N, 2) of x, y in pixels: a jittered hexagonal grid."""
    rows, columns = int(height / spacing / 0.87) + 2, int(width / spacing) + 2
    y, x = np.mgrid[:rows, :columns].astype(float)
    points = np.stack([x + (y % 2) / 2, y * 0.87], -1).reshape(-1, 2) + rng.uniform(-0.36, 0.36, (rows * columns, 2))
    points = (points - 0.5) * spacing
    return points[((points >= 0) & (points < (width, height))).all(1)]


def at(layer: Array, points: Array) -> Array:
    """Values of `layer` (height, width) at points (N, 2) of x, y inside it."""
    x, y = points.astype(int).T
    return layer[y, x]


def alveoli(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Depth inside the tissue in units, float32 (height, width): above 0 in the septa, below in the air spaces.

    The septa are the borders of a warped Voronoi diagram, thin or torn in some places and thick in others.
    """
    rows, columns = int(height / unit / 3) + 1, int(width / unit / 3) + 1
    spacing = rng.uniform(27, 46)
    warped = [noise(rng, rows, columns, cell) * cell / 5 for cell in (30, 30, 9, 9)]
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    y, x = y + warped[0] + warped[2], x + warped[1] + warped[3]
    count = int((rows + 40) * (columns + 40) / spacing**2) + 2
    seeds = rng.uniform(-20, (columns + 20, rows + 20), (count, 2)).astype(np.float32)
    nearest = np.partition([np.hypot(x - cx, y - cy) for cx, cy in seeds], 1, axis=0)
    wall = (nearest[1] - nearest[0]) * 1.5
    thick = noise(rng, rows, columns, 26)
    depth = 5.5 + 4.5 * thick + 34 * np.clip(thick - rng.uniform(0.5, 1.1), 0, 1) - wall
    enlarged = Image.fromarray(depth.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(enlarged) + 1.3 * noise(rng, height, width, 5 * unit) + 0.6 * noise(rng, height, width, 2 * unit)


def mass(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Depth in units, as in `alveoli`, inside a solid tumour that grows in from an edge."""
    corner = rng.integers(0, 2, 2) * (width, height)
    along = rng.integers(0, 2)
    corner[along] = rng.uniform(0, (width, height)[along])
    y, x = np.ogrid[:height, :width]
    radius = rng.uniform(120, 260)
    for size, cell in ((28, 70), (11, 20), (3, 7)):
        radius = radius + size * noise(rng, height, width, cell * unit)
    return (radius - np.hypot(x - corner[0], y - corner[1]) / unit).astype(np.float32)


def nests(rng: np.random.Generator, solid: Array, glands: Array, unit: float) -> Array:
    """Where tumour cells are in the mass, 0 to 1: neither in its stroma nor in the hollows of its glands."""
    height, width = solid.shape
    stroma = 4 * noise(rng, height, width, 35 * unit) + 3
    return np.clip(np.minimum(np.minimum(solid / 3 - 1, stroma), -9 * glands), 0, 1)


def lining(rng: np.random.Generator, depth: Array, unit: float) -> Array:
    """Where tumour cells grow along the walls of alveoli, 0 to 1; only on septa: on a shred they would look free."""
    tissue = Image.fromarray(((depth > 0) * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(14 * unit))
    height, width = depth.shape
    patches = 5 * (noise(rng, height, width, 70 * unit) - rng.uniform(0.3, 1.7))
    here = np.minimum(patches, np.asarray(tissue) / 25 - 3.5)
    return np.clip(np.minimum(here, 6 - np.abs(depth + 1)), 0, 1)


def tuft(rng: np.random.Generator, length: float) -> Array:
    """Outline (N, 2) in units, around the origin, of a bent and lobed cluster `length` units long.

    A lobed circle is stretched, then bent; neither step can make the outline cross itself.
    """
    slender = max(rng.uniform(0.45, 0.95) * (1 - length / 600), min(14 / length, 1))
    theta = np.linspace(0, 2 * np.pi, max(int(length / 1.5), 14), endpoint=False)
    waves = np.arange(2, 8)[:, None]
    lobes = np.cos(waves * theta + rng.uniform(0, 2 * np.pi, waves.shape)) * rng.normal(0, 0.3, waves.shape) / waves
    knobs = np.abs(np.sin(theta * int(length / 9) / 2))
    radius = np.clip(1 + lobes.sum(0) * min(length / 60, 1), 0.5, 1.4) + 3 / length * knobs
    blunt = radius / (np.abs(np.cos(theta)) ** 3 + np.abs(np.sin(theta)) ** 3) ** (1 / 3)
    x, y = blunt * np.cos(theta), blunt * np.sin(theta) * slender
    y = y + rng.uniform(-0.5, 0.5) * (1 - slender) * x**2 + rng.uniform(0, 0.12) * np.sin(4 * x)
    turn = rng.uniform(0, 2 * np.pi)
    outline = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], 1)
    outline *= length / np.ptp(x)
    return outline - (outline.min(0) + outline.max(0)) / 2


def place(rng: np.random.Generator, polygon: Array, depth: Array, blocked: Array, unit: float) -> Array | None:
    """Move `polygon` (N, 2), in units, to the emptiest of some random places, in pixels; shrink it if it fits none.

    `depth` (height, width) is as in `alveoli`: the lower, the emptier. Nothing is placed where `blocked` is true.
    """
    height, width = depth.shape
    for shrink in (1.0, 0.7, 0.5, 0.3):
        shape = polygon * shrink * unit
        low, high = 4 - shape.min(0), (width - 5, height - 5) - shape.max(0)
        if (low >= high).any():
            continue
        if shrink < 1 and np.ptp(shape, 0).max() < LENGTHS[0] * unit:
            break
        probes = np.concatenate([shape, shape * 0.5])
        centres = rng.uniform(low, high, (40, 2))
        free = [centre for centre in centres if not at(blocked, probes + centre).any()]
        if free:
            return shape + min(free, key=lambda centre: float(at(depth, probes + centre).clip(-20, 20).mean()))
    return None


def paint_tissue(rng: np.random.Generator, layers: Array, depth: Array, unit: float) -> None:
    """Draw fibres and nuclei where `depth` (height, width) is above 0."""
    height, width = depth.shape
    cover = np.clip(depth * unit / 1.5 + 0.5, 0, 1)
    cloud = noise(rng, height, width, 40 * unit)
    fibres = np.sin(0.75 * depth + 4 * noise(rng, height, width, 14 * unit)) + noise(rng, height, width, 3 * unit)
    layers[PINK] = cover * np.clip(0.85 + 0.17 * fibres + 0.12 * cloud, 0.25, 2)
    layers[BLUE] = cover * np.clip(0.13 + 0.04 * fibres - 0.05 * cloud, 0, 1)
    points = sites(rng, height, width, 7.5 * unit)
    inside, crowd = at(depth, points), at(noise(rng, height, width, 60 * unit), points)
    points = points[(inside > 1) & (rng.random(len(points)) < 0.42 + 0.3 * crowd)]
    slope_y, slope_x = np.gradient(depth)
    along = np.arctan2(at(slope_x, points), -at(slope_y, points)) + rng.normal(0, 0.3, len(points))
    for (x, y), angle, kind in zip(points, along, rng.random(len(points)), strict=True):
        axes = (2.7, 2.4) if kind < 0.4 else (4.8 - kind, 1.1 + kind)
        stamp(layers[BLUE], x, y, (axes[0] * unit, axes[1] * unit), angle, rng.uniform(0.75, 1.35), 2.2)


def paint_tumour(rng: np.random.Generator, layers: Array, mask: Array, unit: float) -> None:
    """Fill `mask` (height, width), 0 to 1, with crowded tumour cells: pale borders, large dark nuclei."""
    rows, columns = np.nonzero(mask > 0.5)
    if not rows.size:
        return
    window = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    mask, layers = mask[window], layers[(slice(None), *window)]
    height, width = mask.shape
    small = mask.sum() < 900 * unit**2  # so few cells must be denser to fill their outline
    points = sites(rng, height, width, (8 if small else 10.5) * unit)
    points = points[at(mask, points) > 0.5]
    if not len(points):
        points = np.array([[width / 2, height / 2]])
    cones, nuclei, hollow = np.zeros((3, height, width), np.float32)
    for x, y in points:
        stamp(cones, x, y, (9.5 * unit, 9.5 * unit), 0, 1, 1)
        angle, long, dark = rng.uniform(0, np.pi), rng.uniform(3.3, 5.2) * unit, rng.uniform(0.95, 1.6)
        wide = rng.uniform(0.65, 0.95) * long
        stamp(nuclei, x, y, (long, wide), angle, dark, 3)
        stamp(hollow, x, y, (long * 0.8, wide * 0.8), angle, rng.uniform(0, 0.45) * dark, 2)
    cloud = 1 + 0.13 * noise(rng, height, width, 16 * unit)
    grain = cloud + 0.2 * noise(rng, height, width, 1.7 * unit)
    mask = mask * np.clip((cones - 0.12) * 9, 0, 1)
    body = np.clip(0.45 + 1.3 * cones, 0, 1) * grain
    layers[PINK] += mask * (0.85 * body * cloud - layers[PINK])
    layers[BLUE] += mask * (np.maximum(0.36 * body, (nuclei - hollow) * grain) - layers[BLUE])


def paint_loose(rng: np.random.Generator, layers: Array, air: Array, vessels: Array, unit: float) -> None:
    """Scatter macrophages in `air` and red blood cells in `air` and `vessels`, both bool (height, width)."""
    height, width = air.shape
    points = rng.uniform(0, (width, height), (int(height * width / (11 * unit) ** 2), 2))
    crowd = rng.uniform(0.01, 0.05) * np.exp(2 * at(noise(rng, height, width, 90 * unit), points)) - 0.04
    for x, y in points[at(air, points) & (rng.random(len(points)) < np.clip(crowd, 0, 0.5))]:
        axes = tuple(rng.uniform(4.8, 8, 2) * unit)
        angle, (dx, dy) = rng.uniform(0, np.pi), rng.normal(0, 1.7 * unit, 2)
        stamp(layers[PINK], x, y, axes, angle, rng.uniform(0.35, 0.6), 3)
        stamp(layers[BLUE], x, y, axes, angle, rng.uniform(0.12, 0.3), 3)
        stamp(layers[PIGMENT], x - dx, y - dy, (axes[0] * 0.7, axes[1] * 0.7), angle, rng.uniform(0, 0.6) ** 2, 1.5)
        stamp(layers[BLUE], x + dx, y + dy, (2.7 * unit, 2.2 * unit), angle, rng.uniform(0.7, 1.2), 2.5)
    points = rng.uniform(0, (width, height), (int(height * width / (4.6 * unit) ** 2), 2))
    crowd = at(noise(rng, height, width, 80 * unit), points) - rng.uniform(0.9, 1.7)
    crowd = np.where(at(vessels, points), 0.9, at(air, points) * np.clip(crowd, 0.003, 0.7))
    for x, y in points[rng.random(len(points)) < crowd]:
        stamp(layers[BLOOD], x, y, (2.6 * unit, 2.1 * unit), rng.uniform(0, np.pi), rng.uniform(0.5, 0.95), 2.5)


def develop(rng: np.random.Generator, layers: Array, unit: float) -> Array:
    """Shine light through the dyes (4, height, width); returns RGB uint8 (height, width, 3).

    Every slide has its own strength and hue of stain, lamp, focus and noise.
    """
    strength = np.array([rng.uniform(0.8, 1.25), rng.uniform(0.75, 1.3), rng.uniform(0.8, 1.1), 1])
    dyes = DYES * strength[:, None] * (1 + 0.09 * rng.standard_normal((4, 3)))
    lamp = np.array([241, 239, 243]) * rng.uniform(0.94, 1.02) + rng.uniform(-2, 2, 3)
    height, width = layers.shape[1:]
    light = lamp * np.exp(-np.einsum("dhw,dc->hwc", layers, dyes.astype(np.float32), optimize=True))
    focus = ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8) * unit)
    sharp = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8)).filter(focus)
    shaded = np.asarray(sharp, np.float32) + 1.2 * noise(rng, height, width, 200 * unit)[..., None]
    return np.clip(shaded + 2.2 * rng.standard_normal((height, width, 1), np.float32), 0, 255).astype(np.uint8)


def draw_tissue(rng: np.random.Generator, height: int, width: int) -> tuple[Array, list[Array]]:
    """Draw one image; its area decides the magnification, so that all show about the same amount of tissue.

    Args:
        rng: source of everything random.
        height: in pixels, 64 or more.
        width: the same.

    Returns:
        RGB uint8 (height, width, 3), and every cluster's outline: float (N, 2) of x, y in pixels, inside the image.
    """
    unit = (height * width / REFERENCE) ** 0.5
    depth = alveoli(rng, height, width, unit)
    solid = mass(rng, height, width, unit) if rng.random() < 0.45 else np.full_like(depth, -1000)
    blocked = solid > -25
    outlines = []
    for _ in range(0 if rng.random() < NO_STAS else rng.integers(1, 7)):
        length = LENGTHS[0] * (LENGTHS[1] / LENGTHS[0]) ** rng.beta(1.4, 1.7)
        outline = place(rng, tuft(rng, length), depth, blocked, unit)
        if outline is not None:
            outlines.append(outline)
            blocked = blocked | (fill(outline, height, width, 14 * unit) > 0.1)
    masks = [fill(outline, height, width) for outline in outlines]
    for outline in outlines:
        room = fill(outline, height, width, rng.uniform(7, 18) * unit)
        depth = depth * (1 - room) - 9 * room
    layers = np.zeros((4, height, width), np.float32)
    glands = noise(rng, height, width, 24 * unit) - 1.25
    vessels = (depth > 2) & (solid < -5) & (noise(rng, height, width, 22 * unit) > 1.2)
    depth = np.maximum(depth, np.minimum(solid, -25 * glands))
    paint_tissue(rng, layers, depth, unit)
    paint_tumour(rng, layers, np.maximum(nests(rng, solid, glands, unit), lining(rng, depth, unit)), unit)
    air = (depth < -5) & (sum(masks, np.zeros_like(depth)) == 0)
    paint_loose(rng, layers, air, vessels, unit)
    for mask in masks:
        paint_tumour(rng, layers, mask, unit)
    return develop(rng, layers, unit), [trace(rng, outline, height, width) for outline in outlines]


def trace(rng: np.random.Generator, outline: Array, height: int, width: int) -> Array:
    """Outline (N, 2) as a hand would draw it: every other point, a little off, inside the image."""
    drawn = outline[:: 2 if len(outline) > 40 else 1]
    drawn = drawn + rng.normal(0, 0.6, drawn.shape)
    return drawn.clip(0, (width - 1, height - 1)).round(2)


def shape(polygon: Array) -> dict[str, Any]:
    """Describe an outline (N, 2) as LabelMe does: as a polygon, or as a circle if it is nearly one."""
    centre = polygon.mean(0)
    radii = np.hypot(polygon[:, 0] - centre[0], polygon[:, 1] - centre[1])
    kind, points = "polygon", polygon
    if radii.std() < 0.1 * radii.mean():
        kind, points = "circle", np.array([centre, (centre[0] + radii.mean(), centre[1])]).round(2)
    return {"label": LABEL, "points": points.tolist(), "group_id": None, "shape_type": kind, "flags": {}}


def make_sample(directory: Path, images: int, seed: int, scale: float = 1.0) -> None:
    """Write `Train_Images/<stem>.jpg` and `Train_Annotations/<stem>.json` (LabelMe 5) into `directory`.

    Args:
        directory: created if it does not exist.
        images: how many; image i does not depend on this number.
        seed: 0 or more; the same seed makes the same files.
        scale: magnification; at 1 most images are 858 x 471 pixels.

    Raises:
        UsageError: an argument is out of its range.
    """
    if images < 1 or seed < 0 or not 0.2 <= scale <= 8:
        raise UsageError(f"images {images}, seed {seed}, scale {scale}: need images >= 1, seed >= 0, scale 0.2 to 8")
    for index in range(images):
        height, width = (round(side * scale) for side in SIZES[index % len(SIZES)])
        pixels, polygons = draw_tissue(np.random.default_rng([seed, index]), height, width)
        stem = f"sample_{index:04d}"
        with atomic_write(directory / "Train_Images" / f"{stem}.jpg") as file:
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
        annotation = {
            "version": "5.1.1",
            "flags": {},
            "shapes": [shape(polygon) for polygon in polygons],
            "imagePath": f"../Train_Images/{stem}.jpg",
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        write_json(directory / "Train_Annotations" / f"{stem}.json", annotation)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make H&E-like sample images with LabelMe annotations.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size-scale", type=float, default=1.0, help="magnification; 1: mostly 858 x 471 pixels")
    options = parser.parse_args()
    try:
        make_sample(options.directory, options.images, options.seed, options.size_scale)
    except UsageError as error:
        parser.error(str(error))
    print(f"{options.images} images in {options.directory}")


if __name__ == "__main__":
    main()
