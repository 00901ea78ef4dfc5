"""The benchmarks' inputs: made images of the contest's size, their annotations, and three members' masks."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.make_sample import make_sample
from stas.config import Recipe
from stas.data.annotations import rasterise, read_labelme
from stas.data.images import write_mask
from stas.paths import Workspace, mask_file
from stas.preprocess import preprocess

SCALE = 2.0  # 1716 x 942 pixels, the contest's size, in five of eight images
OFF_BY = (0, 12, -12)  # pixels by which each member's mask is shifted, so that members mostly agree


@dataclass(frozen=True)
class Site:
    """A benchmark's scratch directory, and the files it reads."""

    scratch: Path
    out: Path  # for results
    images: Path  # JPEGs, 1716 x 942 (width x height)
    annotations: Path  # LabelMe JSON of the same stems
    members: list[Path]  # three directories of mask PNGs of the same stems, at the images' size
    quick: bool  # few and small, to see that everything works; the figures then mean nothing

    @property
    def stems(self) -> list[str]:
        return sorted(path.stem for path in self.images.glob("*.jpg"))

    @property
    def repeats(self) -> int:
        return 1 if self.quick else 7


def make_site(scratch: Path, out: Path, quick: bool = False) -> Site:
    """Make the files under `scratch`: 16 images, or 3 small ones if `quick`."""
    made = scratch / "made"
    make_sample(made, 4 if quick else 25, seed=0, scale=0.5 if quick else SCALE)
    site = Site(
        scratch,
        out,
        made / "Train_Images",
        made / "Train_Annotations",
        [scratch / f"member{number}" for number in range(len(OFF_BY))],
        quick,
    )
    for stem in site.stems:
        path = site.annotations / f"{stem}.json"
        annotation = read_labelme(path)
        assert annotation.size
        if annotation.size[1] != 2 * 429 * (0.5 if quick else SCALE):  # the few with another shape
            (site.images / f"{stem}.jpg").unlink()
            path.unlink()
            continue
        mask = rasterise(annotation.shapes, annotation.size, "STAS", path)
        for member, pixels in zip(site.members, OFF_BY, strict=True):
            write_mask(mask_file(member, stem), np.roll(mask, pixels, (0, 1)))
    return site


def make_store(site: Site, root: Path, recipe: Recipe, count: int) -> Workspace:
    """A workspace at `root` whose store for `recipe` holds `count` samples (see `multiplied`)."""
    images, annotations = (multiplied(source, root / source.name, count) for source in (site.images, site.annotations))
    preprocess([images], [annotations], Workspace(root), recipe.data)
    return Workspace(root)


def multiplied(directory: Path, target: Path, count: int) -> Path:
    """`count` files in `target`, hard links to those of `directory` in turn, each under its own name."""
    files = sorted(path for path in directory.iterdir() if path.name != "manifest.json")
    target.mkdir(parents=True)
    for index in range(count):
        source = files[index % len(files)]
        (target / f"case_{index:05d}{source.suffix}").hardlink_to(source)
    return target
