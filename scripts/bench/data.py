"""How fast training samples reach the step, compared with the original chain and with memcpy, and during a step."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch

from scripts.bench.gpu_steps import step
from scripts.bench.measure import Row, interleaved
from scripts.bench.rivals import batches, mask_files, nnunet_rate, original_loader
from scripts.bench.site import Site, make_store
from stas.data.store import open_store
from stas.recipe import load_recipe
from stas.system.distributed import Ranks
from stas.system.threads import prefetch
from stas.training.loader import Batch, SampleCache, epoch_batches
from stas.training.run import set_up
from stas.training.transforms import prepare

CPU = torch.device("cpu")
SPLIT = "data.split={kind: fraction, fraction: 0.1}"


def measure(site: Site) -> Iterator[Row]:
    yield from _loading(site)
    yield _beside_the_step(site)


def _loading(site: Site) -> Iterator[Row]:
    """Samples per second at the reference's size, in the reference's batches."""
    side, count = (64, 8) if site.quick else (800, 160)
    recipe = load_recipe("efficientnet_b6_ns", [f"data.size={side}", SPLIT])
    store = open_store(make_store(site, site.scratch / recipe.name, recipe, count), recipe.data)
    pixels, everything, sections = SampleCache(store, range(count), CPU), range(count), (recipe.train, recipe.augment)
    made = list(islice(epoch_batches(SampleCache(store, everything, CPU), everything, *sections, 0, 0, 1), 2))
    source = np.ones((count, side * side * 4), np.uint8)
    target = np.empty_like(source[: recipe.train.batch])
    files = [site.images / f"{stem}.jpg" for stem in site.stems]
    masks = site.scratch / "rival"
    rival = batches(original_loader(files, mask_files(site.annotations, masks), side, len(files)))

    def copy() -> None:
        for first in range(0, count, len(target)):
            rows = source[first : first + len(target)]
            np.copyto(target[: len(rows)], rows)

    seconds = interleaved(
        {
            "stas": lambda: _exhaust(prefetch(epoch_batches(pixels, everything, *sections, 0, 0, 1))),
            "copy": copy,
            "prepare": lambda: [
                prepare(batch, recipe.data, recipe.augment, recipe.train.channels_last) for batch in made
            ],
            "original": lambda: next(rival),
        },
        site.repeats,
    )
    rates = {
        "stas": count / seconds["stas"],
        "copy": count / seconds["copy"],
        "prepare": sum(batch.total for batch in made) / seconds["prepare"],
        "original": len(files) / seconds["original"],
    }
    both = 1 / (1 / rates["stas"] + 1 / rates["prepare"])
    yield Row(
        "samples into the step / by the original chain from JPEG",
        value=rates["stas"] / rates["original"],
        target=100,
        detail={
            "samples/s": rates["stas"],
            "original, samples/s": rates["original"],
        },
        note="Into the step go the store's bytes; scaling and augmentation are the first thing done on the device.",
    )
    yield Row(
        "samples scaled and augmented on this CPU / by the original chain",
        value=both / rates["original"],
        target=1,
        detail={"samples/s": both, "original, samples/s": rates["original"]},
        note="The target is the rival; what remains is the scaling to fp32, which a GPU does in its own memory.",
    )
    batch, some = (2, 2) if site.quick else (recipe.train.batch, 16)
    nnunet = nnunet_rate(site.images, masks, site.scratch / "nnunet", side, batch, some)
    if nnunet:
        yield Row(
            "samples scaled and augmented on this CPU / by nnU-Net v2's loader",
            value=both / nnunet,
            target=1,
            detail={"samples/s": both, "nnU-Net, samples/s": nnunet},
            note="nnU-Net crops instead of resizing, and changes more; it uses a process for each core.",
        )
    yield Row(
        "samples into the step / memcpy of the same bytes",
        value=rates["stas"] / rates["copy"],
        target=0.5,
        detail={"samples/s": rates["stas"], "memcpy, samples/s": rates["copy"]},
        note="Batches of 16 at 800 x 800, from the mapped store; memcpy of as many bytes into one batch, used again.",
    )


def _beside_the_step(site: Site) -> Row:
    """The step's time with a resident batch and with batches from the store, in alternating blocks of steps."""
    steps = 2 if site.quick else 4
    recipe = load_recipe("lite0", [SPLIT, *(["data.size=64"] if site.quick else [])])
    workspace = make_store(site, site.scratch / recipe.name, recipe, 8 if site.quick else 40)
    run, _ = set_up(recipe, workspace, workspace.run("bench"), Ranks(0, 1, CPU))
    run.network.train()
    alone = SampleCache(run.store, run.training, CPU)
    resident = next(epoch_batches(alone, run.training, recipe.train, recipe.augment, 0, 0, 1))

    def train_on(given: Iterable[Batch]) -> None:
        for batch in given:
            step(run, batch)

    def fresh() -> Iterator[Batch]:
        return islice(epoch_batches(run.cache, run.training, recipe.train, recipe.augment, 0, 0, 1), steps)

    seconds = interleaved(
        {"resident": lambda: train_on([resident] * steps), "store": lambda: train_on(prefetch(fresh()))},
        1 if site.quick else 4,
    )
    return Row(
        "step on a resident batch / step with real data, lite0",
        value=seconds["resident"] / seconds["store"],
        target=0.97,
        detail={name: value / steps for name, value in seconds.items()},
        note="Seconds a step of 4 images at 352 x 640; each block of steps begins with an empty queue.",
    )


def _exhaust(items: Iterable[object]) -> None:
    for _ in items:
        pass
