"""Small stores of noise."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stas.data.store import Store
from stas.data.store_spec import StoreSpec
from stas.data.store_writer import Source, build_store, make_record

SIZE = (32, 40)
SPEC = StoreSpec(("STAS",), SIZE)


def source(stem: str) -> Source:
    return Source(stem=stem, image=f"{stem}.jpg", image_sha256="0", annotation=f"{stem}.json", annotation_sha256="1")


def of_size(side: int) -> StoreSpec:
    return StoreSpec(("STAS",), (side, side))


def picture(seed: int, height=50, width=70) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(5, 250, (height, width, 3), np.uint8), random.random((height, width)) < 0.3


def build(directory: Path, count=3, **options) -> Store:
    with build_store(directory, SPEC, **options) as writer:
        assert writer
        for seed in range(count):
            writer.add(make_record(source(f"s{seed}"), *picture(seed), SPEC))
    return Store(directory, network=False)


def scaled(scale: float) -> StoreSpec:
    return StoreSpec(("STAS",), scale=scale)


def build_scaled(directory: Path, scale: float, shapes: Sequence[tuple[int, int]]) -> Store:
    """A store of one image for each shape, (height, width)."""
    with build_store(directory, scaled(scale)) as writer:
        assert writer
        for seed, shape in enumerate(shapes):
            writer.add(make_record(source(f"s{seed}"), *picture(seed, *shape), scaled(scale)))
    return Store(directory, network=False)
