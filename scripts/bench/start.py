"""How long a user waits for `stas --help`, and for the first training step of the three large encoders.

python -m scripts.bench.start RECIPE WORKSPACE RUN SETTING ...    train up to that step, as the measurement does
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from scripts.bench.measure import Row, interleaved
from scripts.bench.site import Site, make_store
from stas.paths import Workspace
from stas.recipe import load_recipe
from stas.train import train

LARGE = ("efficientnet_b6_ns", "efficientnetv2_m", "eca_nfnet_l2")
HELP = (sys.executable, "-m", "stas", "--help")
STEP = "the first step begins"  # this program's last line


def measure(site: Site) -> Iterator[Row]:
    yield _help(site)
    names = ("lite0",) if site.quick else LARGE
    changes = [
        "model.weights=null",  # as in a resumed run; reading a file of weights takes a second or two more
        "data.split.kind=fraction",
        f"data.size={64 if site.quick else 800}",
        *(["train.batch=2"] if site.quick else []),
    ]
    workspace = site.scratch / "start"
    count = 4 if site.quick else 40
    make_store(site, workspace, load_recipe(names[0], changes), count)
    for name in names:
        yield _first_step(site, name, workspace, changes)


def _help(site: Site) -> Row:
    """`stas --help` in a new process, and an empty program for comparison."""
    empty = (sys.executable, "-c", "pass")
    seconds = interleaved({"help": lambda: _silent(HELP), "python": lambda: _silent(empty)}, 2 * site.repeats)
    return Row(
        "stas --help",
        value=seconds["help"],
        target=0.3,
        at_least=False,
        unit="s",
        detail={"an empty Python program, s": seconds["python"]},
    )


def _silent(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _first_step(site: Site, name: str, workspace: Path, changes: list[str]) -> Row:
    """From the start of Python to the first step's forward pass, with a store whose pages are in memory."""
    taken = []
    repeats = 1 if site.quick else 3
    for number in range(repeats + 1):
        arguments = [name, str(workspace), f"{name}-{number}", *changes]
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, "-m", "scripts.bench.start", *arguments], stdout=subprocess.PIPE) as run:
            assert run.stdout
            found = any(line.decode().strip() == STEP for line in run.stdout)
            taken.append(time.perf_counter() - began)
        assert found, f"{name} ended before its first step"
    return Row(
        f"train: start to first step, {name}",
        value=statistics.median(taken[1:]),
        target=15,
        at_least=False,
        unit="s",
        detail={"the first time, s": taken[0]},
        note="Process, imports, network with random weights, store, first batch; up to the first forward pass.",
    )


def main() -> None:
    """Train as `stas train` does, and exit at the first forward pass."""
    name, workspace, run, *changes = sys.argv[1:]

    def stop(_: nn.Module, inputs: tuple[object, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].dim() == 4:
            print(STEP, flush=True)
            os._exit(0)  # a step of a large encoder takes a minute on a CPU

    nn.modules.module.register_module_forward_pre_hook(stop)
    train(load_recipe(name, changes), Workspace(Path(workspace)), run)


if __name__ == "__main__":
    main()
