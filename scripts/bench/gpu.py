"""Measure training and inference of the reference encoders on one GPU, against its peak and against the rivals.

python -m scripts.bench.gpu --out FILE [--minutes 10] [--quick]

The most important parts come first; those that no time is left for are noted as skipped. Results are written after each
measurement, so an interrupted run keeps them. Without a GPU everything runs on the CPU, to try it out (--quick).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from scripts.bench import rivals
from scripts.bench.gpu_steps import (
    Bench,
    Variant,
    build_run,
    datasheet,
    feed,
    forward_flops,
    make_bench,
    measured_product,
    peak_gib,
    resident_batch,
    seconds,
    step,
)
from scripts.bench.measure import machine
from stas.infer import infer
from stas.models.checkpoint import save_checkpoint, take_snapshot
from stas.system.files import write_json
from stas.system.resources import GIB

Result = dict[str, Any]
EAGER = [Variant(precision, last) for precision in ("bf16", "tf32", "fp32") for last in (False, True)]
COMPILED = [Variant(precision, last, True) for precision in ("bf16", "tf32") for last in (True, False)]
COMPILING = 150  # seconds that compiling a large network may take


class Report:
    """The results so far, written to disk after each one, and the time that is left."""

    def __init__(self, out: Path, minutes: float) -> None:
        self._out = out
        self._end = time.monotonic() + 60 * minutes
        self.content: dict[str, Any] = {"machine": machine(), "results": [], "notes": []}

    def measure(self, what: str, call: Callable[[], Result], needs: float = 20) -> Result | None:
        """Add the result of `call`, unless fewer than `needs` seconds are left or it fails, which is noted."""
        began, result = time.monotonic(), None
        if self._end - began < needs:
            self.note(f"{what}: skipped: {max(0, self._end - began):.0f} s are left, and it may need {needs:.0f}")
            return None
        try:
            result = call()
        except torch.OutOfMemoryError as error:
            self.note(f"{what}: out of memory: {str(error).splitlines()[0]}")
        except Exception as error:  # GPU time may be short, so measure the rest anyway
            self.note(f"{what}: failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        else:
            self.content["results"].append({"what": what} | result | {"took_s": time.monotonic() - began})
            shown = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
            )
            print(f"{what}: {shown}", flush=True)
        write_json(self._out, self.content)
        return result

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.content["notes"].append(text)
        write_json(self._out, self.content)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="write the results there as JSON")
    parser.add_argument("--minutes", type=float, default=10, help="total time allowed (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small encoder at 64 x 64, to see that everything works")
    options = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # every figure is for one GPU, the rivals' too
    report = Report(options.out, options.minutes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        report.note("no GPU: the figures mean nothing")
    with tempfile.TemporaryDirectory(prefix="stas-bench-") as scratch:
        run(make_bench(Path(scratch), device, options.quick), report)
    return 0


def run(bench: Bench, report: Report) -> None:
    """All parts, the most important first."""
    names = ("lite0",) if bench.quick else ("efficientnet_b6_ns", "efficientnetv2_m", "eca_nfnet_l2")
    product = report.measure("bf16 product", lambda: _product(bench)) or {}
    best: dict[str, Variant] = {}
    for name, variant in ((name, variant) for variant in EAGER[:2] for name in names):
        _note_best(best, name, variant, report, _trained(bench, report, name, variant, product))
    for name in names:
        report.measure(f"stall, {name}", lambda name=name: _stall(bench, name, best[name]), needs=40)
    report.measure(f"rivals, {names[0]}", lambda: _rivals(bench, names[0]), needs=60)
    for name in names:
        report.measure(f"infer, {name}", lambda name=name: _infer(bench, name, best[name]))
        report.measure(f"memory, {name}", lambda name=name: _memory(bench, name, best[name]))
        report.measure(f"optimizer, {name}", lambda name=name: _optimizer(bench, name))
    for name, variant in _in_turn(names):
        _note_best(best, name, variant, report, _trained(bench, report, name, variant, product))


def _in_turn(names: tuple[str, ...]) -> Iterator[tuple[str, Variant]]:
    """The remaining variants: the most promising compiled one, then those that only complete the table."""
    compiled = COMPILED if torch.cuda.is_available() else []  # on a CPU, compiling takes minutes
    for variant in (*compiled[:1], *EAGER[2:], *compiled[1:]):
        for name in names:
            yield name, variant


def _trained(bench: Bench, report: Report, name: str, variant: Variant, product: Result) -> Result | None:
    needs = COMPILING if variant.compiled else 20
    return report.measure(f"train, {name}, {variant}", lambda: _train(bench, name, variant, product), needs)


def _note_best(best: dict[str, Variant], name: str, variant: Variant, report: Report, result: Result | None) -> None:
    """Keep the fastest variant of each encoder, also in the results."""
    fastest = report.content.setdefault("fastest", {})
    rate = "resident_images_per_s"
    if result and result[rate] > fastest.get(name, {rate: 0})[rate]:
        fastest[name] = {"variant": str(variant), rate: result[rate]}
        best[name] = variant
    best.setdefault(name, variant)


def _product(bench: Bench) -> Result:
    return {"tflops": measured_product(bench.device, 256 if bench.quick else 8192)}


def _train(bench: Bench, name: str, variant: Variant, product: Result) -> Result:
    """Images per second on a batch that is on the device, and the share of the peak that this is."""
    run = build_run(bench, name, variant)
    batch = resident_batch(run)
    flops = 3 * forward_flops(run, batch)  # the backward pass costs about two forward passes
    began = time.perf_counter()
    step(run, batch)
    first = time.perf_counter() - began
    taken = seconds(lambda: step(run, batch), bench.device, repeats=2 if bench.quick else 8)
    rate = batch.total / taken
    reached = rate * flops / 1e12
    return {
        "resident_images_per_s": rate,
        "batch": batch.total,
        "first_step_s": first,  # including compilation
        "gflop_an_image": flops / 1e9,
        "tflops": reached,
        "share_of_datasheet": _share(reached, datasheet(bench.device).get(variant.precision)),
        "share_of_measured_bf16_product": _share(reached, product.get("tflops")),
        "peak_gib": peak_gib(bench.device),
    }


def _share(reached: float, peak: float | None) -> float | None:
    return reached / peak if peak else None


def _stall(bench: Bench, name: str, variant: Variant) -> Result:
    """The share of a step's time spent waiting for data, with and without the samples on the device."""
    run = build_run(bench, name, variant)
    batch, steps = resident_batch(run), 3 if bench.quick else 20
    calls = {
        "resident batch": lambda: [step(run, batch) for _ in range(steps)],
        "samples on the device": feed(run, True, steps),
        "samples from the store": feed(run, False, steps),
    }
    taken = {what: seconds(call, bench.device, repeats=3, warm_up=1) / steps for what, call in calls.items()}
    resident = taken["resident batch"]
    return {
        "variant": str(variant),
        "step_s": resident,
        "images_per_s": batch.total / taken["samples on the device"],
        "stall_on_device": 1 - resident / taken["samples on the device"],
        "stall_from_store": 1 - resident / taken["samples from the store"],
    }


def _rivals(bench: Bench, name: str) -> Result:
    """Images per second of both rivals, fed from JPEGs in their own way, with the same encoder, size and batch."""
    recipe = bench.recipe(name, Variant("fp32", False))
    assert recipe.model.encoder
    images = sorted(bench.site.images.iterdir())
    masks = rivals.mask_files(bench.site.annotations, bench.site.scratch / "masks")
    batch = recipe.train.batch
    whole = min(len(images), 48) // batch * batch  # a last batch of one would fail in batch normalisation
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False  # torch's defaults
    result: Result = {"batch": batch}
    for what, load, build, advance in (
        ("original", rivals.original_loader, rivals.original_network, rivals.original_step),
        ("competent", rivals.competent_loader, rivals.competent_network, rivals.competent_step),
    ):
        given = rivals.batches(load(images[:whole], masks[:whole], bench.size, batch))
        network = build(recipe.model.encoder, bench.device).train()
        optimizer = rivals.adabelief(network.parameters())
        taken = seconds(
            lambda advance=advance, network=network, optimizer=optimizer, given=given: advance(
                network, optimizer, next(given), bench.device
            ),
            bench.device,
            repeats=2 if bench.quick else 10,
        )
        result[f"{what}_images_per_s"] = batch / taken
    return result


def _infer(bench: Bench, name: str, variant: Variant) -> Result:
    """Images of the contest's size per second, from the start of the stage to the last PNG."""
    run = build_run(bench, name, variant)
    infer_run, count = f"infer-{name}", len(list(bench.site.images.iterdir()))
    metadata = {"recipe": run.recipe.model_dump(mode="json"), "validation": []}
    save_checkpoint(bench.workspace.run(infer_run).checkpoint("best"), take_snapshot(run.network, metadata))
    taken = []
    for number in range(2):  # the first also warms up
        began = time.perf_counter()
        infer(infer_run, bench.site.images, bench.workspace, name=f"{infer_run}-{number}")
        taken.append(time.perf_counter() - began)
    return {"variant": str(variant), "images": count, "images_per_s": count / taken[1], "first_time_s": taken[0]}


def _memory(bench: Bench, name: str, variant: Variant) -> Result:
    """Images per GiB, from the peaks with the recipe's batch and with twice that batch."""
    if bench.device.type == "cpu":
        return {"variant": str(variant)}
    peaks = []
    small = bench.recipe(name, variant).train.batch
    for batch in (small, 2 * small):
        run = build_run(bench, name, variant, batch)
        given = resident_batch(run)
        for _ in range(2):
            step(run, given)
        peaks.append(torch.cuda.max_memory_allocated(bench.device) / GIB)
        del run, given
    an_image = (peaks[1] - peaks[0]) / small
    fixed = peaks[0] - small * an_image
    total = torch.cuda.get_device_properties(bench.device).total_memory / GIB
    return {
        "variant": str(variant),
        "gib_an_image": an_image,
        "gib_fixed": fixed,
        "images_a_gib": 1 / an_image,
        "device_gib": total,
        "largest_batch_extrapolated": int((total - fixed) / an_image),
    }


def _optimizer(bench: Bench, name: str) -> Result:
    """Milliseconds for one update of all weights, ours and adabelief-pytorch's."""
    run = build_run(bench, name, Variant("fp32", False))
    for parameter in run.network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    other = rivals.adabelief(run.network.parameters())
    repeats = 3 if bench.quick else 20
    ours, theirs = (1000 * seconds(optimizer.step, bench.device, repeats) for optimizer in (run.optimizer, other))
    return {"kind": run.recipe.optimizer.name, "ms": ours, "adabelief_pytorch_ms": theirs, "ratio": ours / theirs}


if __name__ == "__main__":
    sys.exit(main())
