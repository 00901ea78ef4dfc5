"""Checkpoints: one safetensors file each, with the recipe and all other facts as JSON in its header.

A training checkpoint holds network and optimiser; the best one holds the network only. Random state is not in it,
because every random draw is a function of seed, epoch, step and index. Loading one executes nothing.
"""

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from stas.errors import InputDataError
from stas.files import atomic_write
from stas.paths import RunPaths

log = logging.getLogger(__name__)
FORMAT = 2
NETWORK, OPTIMIZER = "network.", "optimizer."  # prefixes of the tensors' names


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    facts: dict[str, Any]  # recipe, position, scores; see stas.train
    network: dict[str, Tensor]
    optimizer: dict[str, Tensor | float]  # by "<parameter index>.<key>"; empty in the best checkpoint


@dataclass(frozen=True)
class Snapshot:
    """A network and its optimiser at one step, copied to the CPU, so that training can go on while it is written."""

    facts: Mapping[str, Any]  # JSON
    tensors: dict[str, Tensor]
    scalars: dict[str, float]  # of the optimiser's state

    def network_only(self) -> "Snapshot":
        """The same without the optimiser, as the best checkpoint has it."""
        tensors = {name: value for name, value in self.tensors.items() if name.startswith(NETWORK)}
        return Snapshot(self.facts, tensors, {})


def take_snapshot(network: nn.Module, facts: Mapping[str, Any], optimizer: Optimizer | None = None) -> Snapshot:
    """Copy the state of a network and its optimiser; `facts` must be JSON."""
    tensors = {f"{NETWORK}{name}": _copy(value) for name, value in network.state_dict().items()}
    scalars: dict[str, float] = {}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{index}.{key}"] = _copy(value)
                else:
                    scalars[f"{index}.{key}"] = value
    return Snapshot(facts, tensors, scalars)


def save_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint atomically."""
    facts = {"format": FORMAT, "facts": dict(snapshot.facts), "optimizer": snapshot.scalars}
    with atomic_write(path) as file:
        file.write(save(snapshot.tensors, {"stas": json.dumps(facts)}))


def save_last(run: RunPaths, snapshot: Snapshot) -> None:
    """Write the checkpoint to resume from, keeping the one before as `previous`.

    Cut off between the renames, `next` is left, and `load_newest` looks for it first.
    """
    last = run.checkpoint("last")
    save_checkpoint(run.checkpoint("next"), snapshot)
    if last.exists():
        os.replace(last, run.checkpoint("previous"))
    os.replace(run.checkpoint("next"), last)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on."""

    def __init__(self, run: RunPaths) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def write(self, snapshot: Snapshot, best: bool) -> None:
        """Begin to write `last` and, where it is the best so far, `best`; the one before is complete then."""
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot, best)

    def wait(self) -> None:
        """Wait until everything is on disk; raise what went wrong."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def _write(self, snapshot: Snapshot, best: bool) -> None:
        if best:
            save_checkpoint(self._run.checkpoint("best"), snapshot.network_only())
        save_last(self._run, snapshot)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        InputDataError: missing, damaged, or not made by stas.
    """
    if not path.is_file():
        raise InputDataError(f"{path}: no such checkpoint; train the run first, or name another with --run")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["stas"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputDataError(
            f"{path}: not a readable checkpoint of stas ({error}): use another, or train again"
        ) from error
    if header["format"] != FORMAT:
        raise InputDataError(f"{path}: checkpoint format {header['format']}, this version reads {FORMAT}")
    optimizer = {**_with_prefix(tensors, OPTIMIZER), **header["optimizer"]}
    return Checkpoint(header["facts"], _with_prefix(tensors, NETWORK), optimizer)


def load_newest(run: RunPaths) -> Checkpoint | None:
    """The newest checkpoint to resume from, or the one before where it is damaged; None where there is none."""
    damaged = None
    for which in ("next", "last", "previous"):
        path = run.checkpoint(which)
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path)
        except InputDataError as error:
            damaged = error
            log.warning("%s", error)
            continue
        if damaged:
            log.warning("going on from %s instead", path)
        return checkpoint
    if damaged:
        raise damaged
    return None


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Tensor | float]) -> None:
    """Put saved optimiser state back, in the memory format of its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in saved.items():
        index, key = name.split(".", 1)
        like = parameters[int(index)]
        if isinstance(value, Tensor) and value.dim():
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
