"""Checkpoints: one safetensors file each, with the recipe and all other facts as JSON in its header.

A training checkpoint holds network and optimiser; the best one holds the network only. Random state is not in it,
because every random draw is a function of seed, epoch, step and index. Loading one executes nothing.
"""

import json
import logging
import os
from collections.abc import Mapping
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
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    facts: dict[str, Any]  # recipe, position, scores; see stas.train
    network: dict[str, Tensor]
    optimizer: dict[str, Tensor | float]  # by "<parameter index>.<key>"; empty in the best checkpoint


def save_checkpoint(
    path: Path, network: nn.Module, facts: Mapping[str, Any], optimizer: Optimizer | None = None
) -> None:
    """Write a checkpoint atomically; `facts` must be JSON."""
    tensors = {f"network.{name}": value.detach().cpu() for name, value in network.state_dict().items()}
    scalars: dict[str, Any] = {}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value.detach().cpu()
                else:
                    scalars[f"{index}.{key}"] = value
    header = {"stas": json.dumps({"format": FORMAT, "facts": dict(facts), "optimizer": scalars})}
    with atomic_write(path) as file:
        file.write(save({name: value.contiguous() for name, value in tensors.items()}, header))


def save_last(run: RunPaths, network: nn.Module, facts: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Write the checkpoint to resume from, keeping the one before as `previous`.

    Cut off between the renames, `next` is left, and `load_newest` looks for it first.
    """
    last = run.checkpoint("last")
    save_checkpoint(run.checkpoint("next"), network, facts, optimizer)
    if last.exists():
        os.replace(last, run.checkpoint("previous"))
    os.replace(run.checkpoint("next"), last)


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
    optimizer = {**_with_prefix(tensors, "optimizer."), **header["optimizer"]}
    return Checkpoint(header["facts"], _with_prefix(tensors, "network."), optimizer)


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


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
