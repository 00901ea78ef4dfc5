"""How fast a store is made, compared with its decoding, drawing and resizing alone, and two processes against one."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scripts.bench.measure import Row, interleaved
from scripts.bench.pictures import fastest_resize
from scripts.bench.site import Site, multiplied
from stas.paths import Workspace
from stas.preprocess import preprocess
from stas.recipe import load_recipe

SIDE = 800  # pixels, the reference recipe's

Polygon = list[tuple[float, float]]


def measure(site: Site) -> Iterator[Row]:
    count = 6 if site.quick else 240
    place = site.scratch / "preprocess"
    images = multiplied(site.images, place / "images", count)
    annotations = multiplied(site.annotations, place / "annotations", count)
    pairs = [(path, polygons(annotations / f"{path.stem}.json")) for path in sorted(images.iterdir())]
    recipe = load_recipe("lite0", [f"data.size={SIDE}"])
    library, resize = fastest_resize(decoded(pairs[0][0]), (SIDE, SIDE))

    def limit() -> None:
        for path, drawn in pairs:
            image = decoded(path)
            draw(drawn, (image.shape[1], image.shape[0]))
            resize(image)

    def stage(workers: int) -> None:
        shutil.rmtree(place / "workspace", ignore_errors=True)
        preprocess([images], [annotations], Workspace(place / "workspace"), recipe.data, workers=workers)

    seconds = interleaved(
        {"limit": limit, "one process": lambda: stage(1), "two processes": lambda: stage(2)}, min(3, site.repeats)
    )
    detail = {f"{name}, ms an image": 1000 * value / count for name, value in seconds.items()}
    one = seconds["one process"]
    note = (
        f"limit: JPEG decoded and polygons drawn by Pillow, the image resized by {library}; the stage also hashes, "
        "resizes the mask, compresses the full mask and writes the store"
    )
    yield Row("preprocess: limit / time of an image", seconds["limit"] / one, 0.85, detail=detail, note=note)
    yield Row(f"preprocess {count} images: one process's time / two's", one / seconds["two processes"], 1.8)


def decoded(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


def polygons(path: Path) -> list[Polygon]:
    return [[(x, y) for x, y in shape["points"]] for shape in json.loads(path.read_text())["shapes"]]


def draw(polygons: list[Polygon], size: tuple[int, int]) -> NDArray[np.bool_]:
    """All of them on one canvas of (width, height)."""
    canvas = Image.new("L", size)
    for polygon in polygons:
        ImageDraw.Draw(canvas).polygon(polygon, outline=1, fill=1)
    return np.asarray(canvas) > 0
