"""Parts of the GPU measurements: a training run on made samples, its step, the clock, and the peaks."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from threading import Event

import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.bench.site import Site, multiplied
from scripts.make_sample import make_sample
from stas.config import Recipe
from stas.paths import Workspace
from stas.preprocess import preprocess
from stas.recipe import load_recipe
from stas.system.distributed import Ranks
from stas.system.resources import GIB
from stas.system.threads import prefetch
from stas.train import Clock, train_step
from stas.training.loader import Batch, SampleCache, epoch_batches
from stas.training.run import TrainingRun, TrainState, set_up
from stas.training.transforms import prepare

# Datasheets' dense TFLOP/s (of the SXM form if there are several) by part of the device's name, longest first.
DATASHEET = {
    "H100 PCIe": {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0},
    "H200": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4},
    "H100": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4},
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0},
    "L40S": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0},
    "V100": {"fp32": 15.7},
}
RANKS = 4  # the recipes' batches are those of four GPUs
SPLIT = "data.split={kind: fraction, fraction: 0.1}"
_runs = count()


@dataclass(frozen=True)
class Variant:
    """How a network is computed."""

    precision: str  # fp32, tf32 or bf16
    channels_last: bool
    compiled: bool = False

    def __str__(self) -> str:
        return self.precision + ", channels_last" * self.channels_last + ", compiled" * self.compiled

    def settings(self) -> list[str]:
        """Its changes to a recipe."""
        precision = "fp32" if self.precision == "tf32" else self.precision
        layout = f"train.channels_last={str(self.channels_last).lower()}"
        return [f"train.precision={precision}", layout, f"train.compile={str(self.compiled).lower()}"]


@dataclass(frozen=True)
class Bench:
    """Shared by all parts."""

    site: Site  # its images are of the contest's size; no members
    workspace: Workspace
    device: torch.device
    samples: int  # in the store

    @property
    def quick(self) -> bool:
        return self.site.quick

    @property
    def size(self) -> int:
        return 64 if self.quick else 800

    def recipe(self, name: str, variant: Variant, batch: int | None = None) -> Recipe:
        """A reference recipe as one of its four GPUs sees it, with random weights."""
        batch = batch or (2 if self.quick else load_recipe(name).train.batch // RANKS)
        changes = [f"data.size={self.size}", SPLIT, "model.weights=null", f"train.batch={batch}"]
        return load_recipe(name, [*changes, *variant.settings()])


def make_bench(scratch: Path, device: torch.device, quick: bool) -> Bench:
    """Make images, annotations and one store; needs no GPU."""
    made, samples = scratch / "made", 10 if quick else 96
    make_sample(made, 2 if quick else 8, seed=0, scale=0.5 if quick else 2.0)
    images, annotations = (
        multiplied(made / name, scratch / name, samples) for name in ("Train_Images", "Train_Annotations")
    )
    site = Site(scratch, scratch, images, annotations, [], quick)
    bench = Bench(site, Workspace(scratch / "workspace"), device, samples)
    recipe = bench.recipe("efficientnet_b6_ns", Variant("fp32", False))
    preprocess([images], [annotations], bench.workspace, recipe.data)
    return bench


def build_run(bench: Bench, name: str, variant: Variant, batch: int | None = None) -> TrainingRun:
    """A new run of one rank on the device, in training mode."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # By default a GPU's convolutions use TF32, but its matrix products do not.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = variant.precision != "fp32"
    run = bench.workspace.run(f"run{next(_runs)}")
    run, _ = set_up(bench.recipe(name, variant, batch), bench.workspace, run, Ranks(0, 1, bench.device))
    run.parallel.train()
    return run


def resident_batch(run: TrainingRun) -> Batch:
    """The first batch of an epoch, on the device."""
    recipe, device = run.recipe, run.ranks.device
    alone = SampleCache(run.store, run.training, device, resident_share=0.0)
    return next(epoch_batches(alone, run.training, recipe.train, recipe.augment, 0, 0, 1)).to(device)


def step(run: TrainingRun, batch: Batch) -> None:
    """One training step as `stas train` makes it."""
    train_step(run, TrainState(), batch, 1, Event(), Clock(0, math.inf, math.inf))


def feed(run: TrainingRun, on_device: bool, steps: int) -> Callable[[], object]:
    """A function that makes `steps` steps on samples that are on the device, or that come from the store each time."""
    pixels = SampleCache(run.store, run.training, run.ranks.device, resident_share=1.0 if on_device else 0.0)
    recipe = run.recipe
    whole = run.training[: len(run.training) // recipe.train.batch * recipe.train.batch]  # no short last batch

    def feed_steps() -> None:
        epochs = (epoch_batches(pixels, whole, recipe.train, recipe.augment, epoch, 0, 1) for epoch in count())
        for batch in prefetch(islice(chain.from_iterable(epochs), steps)):
            step(run, batch.to(run.ranks.device))

    return feed_steps


def forward_flops(run: TrainingRun, batch: Batch) -> float:
    """Floating-point operations of one image's forward pass, counting a multiplication and an addition as two."""
    images, _ = prepare(batch, run.recipe.data, run.recipe.augment, run.recipe.train.channels_last)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run.network(images)
    return counter.get_total_flops() / len(images)


def seconds(call: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 3) -> float:
    """Median seconds of `call`, with the device synchronised after each."""
    taken = []
    for number in range(warm_up + repeats):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        if number >= warm_up:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float | None:
    """Peak memory of tensors since the run was built."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


def datasheet(device: torch.device) -> dict[str, float]:
    """The device's dense TFLOP/s by precision; empty if its name is not known."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    return next((figures for part, figures in DATASHEET.items() if part in name), {})


def measured_product(device: torch.device, side: int) -> float:
    """TFLOP/s of a bf16 product of two square matrices."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, device, repeats=20) / 1e12
