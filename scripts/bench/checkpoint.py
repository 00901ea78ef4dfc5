"""Writing a checkpoint during training: its processor time, and how long it keeps another thread from running."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save

from scripts.bench.measure import Row
from scripts.bench.site import Site
from stas.models.checkpoint import Snapshot, save_checkpoint, take_snapshot
from stas.paths import Workspace
from stas.system.files import atomic_write


def measure(site: Site) -> Iterator[Row]:
    snapshot = _snapshot("lite0" if site.quick else "b6")
    path = Workspace(site.scratch).run("bench").checkpoint("last")

    def whole() -> None:
        with atomic_write(path) as file:
            file.write(save(snapshot.tensors))

    writers = {"streaming": lambda: save_checkpoint(path, snapshot), "safetensors.torch.save": whole}
    cost: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    for round_ in range(site.repeats + 1):
        for name, write in writers.items():
            measured = _cost(write)
            if round_:
                cost[name].append(measured)
    seconds = {name: statistics.median(processor for processor, _ in of) for name, of in cost.items()}
    stalls = {name: statistics.median(stall for _, stall in of) for name, of in cost.items()}
    size = sum(tensor.nbytes for tensor in snapshot.tensors.values()) / 2**20
    note = f"{len(snapshot.tensors)} tensors of {size:.0f} MiB; both synced to disk, only streaming has a checksum"
    yield _row("train: processor time of streaming a checkpoint / safetensors.torch.save's", seconds, 0.7, note)
    note = "the longest time in which a thread that wants to run every millisecond did not"
    yield _row("train: another thread's stall beside it / beside safetensors.torch.save", stalls, 0.2, note)


def _row(what: str, seconds: dict[str, float], target: float, note: str) -> Row:
    value = seconds["streaming"] / seconds["safetensors.torch.save"]
    return Row(what, value, target, at_least=False, detail={f"{name}, s": s for name, s in seconds.items()}, note=note)


def _cost(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of processor time, and of another thread's longest stall."""
    turns, done = [time.perf_counter()], threading.Event()

    def run() -> None:
        while not done.is_set():
            time.sleep(0.001)
            turns.append(time.perf_counter())

    thread = threading.Thread(target=run)
    thread.start()
    began = time.process_time()
    call()
    processor = time.process_time() - began
    done.set()
    thread.join()
    return processor, max(after - before for before, after in pairwise(turns))


def _snapshot(encoder: str) -> Snapshot:
    """A snapshot of an untrained network, with the two running averages of an optimiser like Adam."""
    network = smp.DeepLabV3Plus(f"tu-tf_efficientnet_{encoder}", encoder_weights=None)
    optimizer = torch.optim.Adam(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return take_snapshot(network, {}, optimizer)
