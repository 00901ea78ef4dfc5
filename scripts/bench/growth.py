"""How cost grows with images, size, members and ranks: fitted exponents, and a picture of them, growth.png.

Cost is modelled as a constant times x to some exponent, fitted by a line through the logarithms; 1 is linear.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from scripts.bench.growth_ranks import epoch_seconds
from scripts.bench.measure import Row, interleaved
from scripts.bench.site import Site, make_store, multiplied
from scripts.make_sample import make_sample
from stas.config import Recipe
from stas.data.pairs import find_pairs
from stas.data.store import Store, open_store
from stas.data.store_spec import store_spec
from stas.paths import Workspace
from stas.preprocess import Task, preprocess
from stas.preprocess import make_sample as make_stored
from stas.recipe import load_recipe
from stas.system.resources import cores
from stas.training.loader import SampleCache, epoch_batches
from stas.training.transforms import prepare
from stas.vote import vote

CHANGES = ("data.split.kind=fraction",)
# Runs a command and prints its processor seconds and peak in KiB. The kernel counts the parent of a fork into the peak,
# so the parent must be small.
MEASURED = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
)
Curve = dict[int, float]  # cost by size


def measure(site: Site) -> Iterator[Row]:
    panels: dict[str, dict[str, Curve]] = {}
    yield from _images(site, panels)
    yield from _size(site, panels)
    yield from _members(site, panels)
    yield from _ranks(site, panels)
    _draw(panels, site.out / "growth.png")


def exponent(curve: Mapping[int, float]) -> float:
    """The slope of the best-fitting line through the logarithms."""
    costs = np.maximum(list(curve.values()), 1e-9)  # a difference of two times may be below 0
    return float(np.polyfit(np.log(list(curve)), np.log(costs), 1)[0])


def _images(site: Site, panels: dict[str, dict[str, Curve]]) -> Iterator[Row]:
    """`stas preprocess` as one process, with small images under many names."""
    counts, size = ((8, 16, 32), 64) if site.quick else ((100, 1000, 10_000), 256)
    made = site.scratch / "growth"
    make_sample(made, 4 if site.quick else 40, seed=1, scale=0.5)
    seconds, memory = {}, {}
    for count in counts:
        root = made / str(count)
        multiplied(made / "Train_Images", root / "images", count)
        multiplied(made / "Train_Annotations", root / "annotations", count)
        seconds[count], memory[count] = _run_preprocess(root, size)
    panels["images"] = {"preprocess, processor seconds": seconds, "its peak memory, MiB": memory}
    detail = {f"{count} images, s": value for count, value in seconds.items()}
    later = {count: seconds[count] - seconds[counts[0]] for count in counts[1:]}
    yield _row(
        "growth: preprocess processor seconds by images",
        {n - counts[0]: s for n, s in later.items()},
        1.05,
        detail,
        "Beyond those of the smallest number, a good part of which is the start of the process.",
    )
    detail = {f"{count} images, MiB": value for count, value in memory.items()}
    each = 1024 * (memory[counts[-1]] - memory[counts[0]]) / (counts[-1] - counts[0])
    note = (
        f"The resident set of one process. Its lists of files and samples, and the manifest made of them, grow by "
        f"{each:.1f} KiB a sample; pixels are not kept."
    )
    yield _row("growth: preprocess peak memory by images", memory, 0.1, detail, note)


def _run_preprocess(root: Path, size: int) -> tuple[float, float]:
    """Processor seconds and peak resident set in MiB of one process; wall time would include other work."""
    command = [sys.executable, "-m", "stas", "preprocess", "--images", root / "images"]
    command += ["--annotations", root / "annotations", "--workspace", root, "--workers", "1"]
    command += ["--set", f"data.size={size}", "--set", "data.split.kind=fraction"]
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], check=True, capture_output=True, text=True)
    used, peak = done.stdout.split()
    return float(used), int(peak) / 1024


def _size(site: Site, panels: dict[str, dict[str, Curve]]) -> Iterator[Row]:
    """Making one stored sample of a 1716 x 942 image, and one sample of a training batch."""
    sizes, batch = ((64, 128), 2) if site.quick else ((256, 512, 800, 1200, 1600), 4)
    root = site.scratch / "growth" / "size"
    images, annotations = (multiplied(source, root / source.name, batch) for source in (site.images, site.annotations))
    pairs, _ = find_pairs([images], [annotations])
    timed: dict[str, Callable[[], object]] = {}
    for size in sizes:
        recipe = load_recipe("efficientnet_b6_ns", [f"data.size={size}", f"train.batch={batch}", *CHANGES])
        store = Store(preprocess([images], [annotations], Workspace(root), recipe.data, workers=1))
        timed[f"store {size}"] = _store_sample(Task(pairs[0], store_spec(recipe.data)))
        timed[f"read {size}"] = _read_batch(store, recipe)
    medians = interleaved(timed, site.repeats)
    made = {size * size: 1000 * medians[f"store {size}"] for size in sizes}
    read = {size * size: 1000 * medians[f"read {size}"] / batch for size in sizes}
    panels["pixels of the square"] = {"make a sample, ms": made, "read one for training, ms": read}
    for what, curve in (("store", made), ("read", read)):
        detail = {f"{size} x {size}, ms": curve[size * size] for size in sizes}
        note = (
            "Decoding the JPEG and drawing the mask stay the same."
            if what == "store"
            else "Small batches fit the cache."
        )
        yield _row(f"growth: milliseconds to {what} a sample by pixels", curve, 1.05, detail, note)


def _store_sample(task: Task) -> Callable[[], object]:
    return lambda: make_stored(task)


def _read_batch(store: Store, recipe: Recipe) -> Callable[[], object]:
    """The only batch of a short epoch, read and prepared for the network on the CPU."""
    samples, device = range(len(store)), torch.device("cpu")
    pixels = SampleCache(store, samples, device)

    def read() -> object:
        batch = next(epoch_batches(pixels, samples, recipe.train, recipe.augment, 0, 0, 1))
        return prepare(batch, recipe.data, recipe.augment, recipe.train.channels_last)

    return read


def _members(site: Site, panels: dict[str, dict[str, Curve]]) -> Iterator[Row]:
    """A vote of 3 or more members, all on the same images."""
    counts = (3, 5) if site.quick else (3, 5, 7, 9, 11, 13, 15)
    members = []
    for number in range(max(counts)):
        source = site.members[number % len(site.members)]
        members.append(multiplied(source, site.scratch / "growth" / f"member{number}", len(site.stems)))
    repeats = iter(range(1000))

    def voted(count: int) -> Callable[[], object]:
        return lambda: vote(members[:count], site.scratch / "growth" / f"vote{next(repeats)}", workers=1)

    medians = interleaved({str(count): voted(count) for count in counts}, min(site.repeats, 3))
    curve = {count: 1000 * medians[str(count)] / len(site.stems) for count in counts}
    panels["members"] = {"vote on an image, ms": curve}
    detail = {f"{count} members, ms": value for count, value in curve.items()}
    yield _row("growth: vote milliseconds an image by members", curve, 1.05, detail, "One thread.")


def _ranks(site: Site, panels: dict[str, dict[str, Curve]]) -> Iterator[Row]:
    """An epoch of a tiny network with the same global batch, over gloo, one thread per rank."""
    size, samples = (64, 8) if site.quick else (800, 64)
    recipe = load_recipe("efficientnet_b6_ns", [f"data.size={size}", *CHANGES, "train.batch=8"])
    root = site.scratch / "growth" / "ranks"
    store = open_store(make_store(site, root, recipe, samples), recipe.data).directory
    counts = (1, 2) if site.quick else (1, 2, 4)
    curve = {ranks: samples / epoch_seconds(store, recipe, samples, ranks) for ranks in counts}
    panels["ranks"] = {"training samples a second": curve}
    yield Row(
        "growth: training samples a second, 2 ranks against 1",
        value=curve[2] / curve[1],
        target=1.6,
        detail={f"{ranks} ranks, samples/s": value for ranks, value in curve.items()},
        note=f"A tiny network over gloo, on {cores()} cores. One rank reads on a second thread beside its own.",
    )


def _row(what: str, curve: Mapping[int, float], target: float, detail: Mapping[str, float], note: str) -> Row:
    return Row(what, exponent(curve), target, at_least=False, unit="exponent", detail=detail, note=note)


def _draw(panels: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    """One panel for each thing that grows, both axes logarithmic, with a dashed line of slope 1 below each curve."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (what, curves) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        x = list(next(iter(curves.values())))
        for name, curve in curves.items():
            y = list(curve.values())
            (line,) = axes.loglog(x, y, "o-", label=name)
            axes.loglog(x, [y[0] * value / x[0] for value in x], "--", color=line.get_color(), alpha=0.4)
        axes.set_xlabel(what)
        axes.set_xticks(x, [_short(value) for value in x], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("How cost grows; dashed: linear")
    figure.savefig(path, dpi=100)


def _short(value: int) -> str:
    """The pixels of a square by its side, other numbers as they are."""
    side = round(value**0.5)
    return f"{side}²" if value > 1000 and side * side == value and value not in (10_000,) else f"{value:,}"
