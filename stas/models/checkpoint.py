"""Checkpoints: one safetensors file each, with the recipe and all other metadata as JSON in its header.

A training checkpoint holds network and optimiser; the best one holds the network only. Random state is not in it,
because every random draw is a function of seed, epoch, step and index. Loading one executes nothing.
The last tensor, `checksum`, is the SHA-256 of every byte before it.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from stas.errors import InputDataError, UsageError
from stas.paths import RunPaths
from stas.system import files
from stas.system.files import atomic_write
from stas.system.locks import Lock
from stas.system.untrusted import check_file, parse_json

log = logging.getLogger(__name__)
FORMAT = 4
CHECKSUM, CHECKSUM_BYTES = "checksum", hashlib.sha256().digest_size
MAX_BYTES = 32 << 30  # some minutes of hashing; the largest networks of the recipes take 2 GiB with their optimiser
BLOCK = 1 << 20
NETWORK, OPTIMIZER = "network.", "optimizer."  # prefixes of the tensors' names
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WHOLE = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
DTYPES = _FLOATS | _WHOLE | {torch.bool: "BOOL"}  # as safetensors names them


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    metadata: dict[str, Any]  # recipe, position, scores; see stas.train
    network: dict[str, Tensor]
    optimizer: dict[str, Tensor | float]  # by "<parameter index>.<key>"; empty in the best checkpoint
    sha256: str  # of the file


@dataclass(frozen=True)
class Snapshot:
    """A network and its optimiser at one step, copied to the CPU, so that training can go on while it is written."""

    metadata: Mapping[str, Any]  # JSON
    tensors: dict[str, Tensor]
    scalars: dict[str, float]  # of the optimiser's state

    def network_only(self) -> "Snapshot":
        """The same without the optimiser, as the best checkpoint has it."""
        tensors = {name: value for name, value in self.tensors.items() if name.startswith(NETWORK)}
        return Snapshot(self.metadata, tensors, {})


def take_snapshot(network: nn.Module, metadata: Mapping[str, Any], optimizer: Optimizer | None = None) -> Snapshot:
    """Copy the state of a network and its optimiser; `metadata` must be JSON."""
    tensors = {f"{NETWORK}{name}": _copy(value) for name, value in network.state_dict().items()}
    scalars: dict[str, float] = {}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{index}.{key}"] = _copy(value)
                else:
                    scalars[f"{index}.{key}"] = value
    return Snapshot(metadata, tensors, scalars)


def save_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint atomically, a tensor at a time.

    `safetensors.torch.save` copies all of them while it holds the interpreter's lock, and training would wait for it.
    """
    metadata = {"format": FORMAT, "metadata": dict(snapshot.metadata), "optimizer": snapshot.scalars}
    # Descending sizes of elements keep every tensor aligned, which torch needs to read it in place.
    tensors = dict(sorted(snapshot.tensors.items(), key=lambda item: -item[1].element_size()))
    checksum = hashlib.sha256()
    with atomic_write(path) as file:
        for part in _parts(metadata, tensors):
            checksum.update(part)
            file.write(part)
        file.write(checksum.digest())


def _parts(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """All of a safetensors file but the checksum at its end."""
    header: dict[str, Any] = {"__metadata__": {"stas": json.dumps(metadata)}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = _entry(DTYPES[tensor.dtype], tensor.shape, end, tensor.nbytes)
        end += tensor.nbytes
    header[CHECKSUM] = _entry("U8", [CHECKSUM_BYTES], end, CHECKSUM_BYTES)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin aligned
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _entry(dtype: str, shape: Sequence[int], begin: int, length: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + length]}


def save_last(run: RunPaths, snapshot: Snapshot) -> None:
    """Write the checkpoint to resume from, keeping the one before as `previous`.

    A kill between the renames leaves `next`: `load_newest` looks for it first, and `remove_leftovers` finishes the job.
    """
    save_checkpoint(run.checkpoint("next"), snapshot)
    _move_up(run)


def _move_up(run: RunPaths) -> None:
    last = run.checkpoint("last")
    if last.exists():
        os.replace(last, run.checkpoint("previous"))
    os.replace(run.checkpoint("next"), last)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on.

    With the run's lock it stops before it writes over what another process has made meanwhile.
    """

    def __init__(self, run: RunPaths, held: Lock | None = None) -> None:
        self._run = run
        self._held = held
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def write(self, snapshot: Snapshot, best: bool) -> None:
        """Begin to write `last` and, where it is the best so far, `best`; the one before is complete then.

        Raises:
            StoppedEarly: the run's lock is lost, and another process may be writing.
        """
        self.wait()
        if self._held:
            self._held.check()
        self._writing = self._thread.submit(self._write, snapshot, best)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let nothing be written after this; what went wrong is raised unless something else is on its way."""
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            log.error("%s: the last checkpoint was not written: %s", self._run.root, error)

    def wait(self) -> None:
        """Wait until everything is on disk; raise what went wrong."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def _write(self, snapshot: Snapshot, best: bool) -> None:
        if self._held:
            self._held.check()
        if best:
            save_checkpoint(self._run.checkpoint("best"), snapshot.network_only())
        save_last(self._run, snapshot)


def remove_leftovers(run: RunPaths) -> None:
    """End or remove what a killed process has left half done in a run. Only who holds the run's lock may do so."""
    for directory in (run.root, run.checkpoint("last").parent):
        files.remove_leftovers(directory)
    if run.checkpoint("next").exists():
        _move_up(run)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        InputDataError: missing, damaged, or not made by stas.
    """
    if not path.exists():
        raise InputDataError(f"{path}: no such checkpoint; train the run first, or name another with --run")
    check_file(path, MAX_BYTES)
    try:
        while True:
            with open(path, "rb") as file, safe_open(path, "pt") as opened:
                header = parse_json((opened.metadata() or {})["stas"].encode())
                if header["format"] != FORMAT:
                    raise ValueError(f"format {header['format']} of another version of stas, this one reads {FORMAT}")
                metadata, scalars = dict(header["metadata"]), dict(header["optimizer"])
                sha256 = _checked_sum(file)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break  # else training has put a newer one there meanwhile
    except InputDataError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
        raise InputDataError(
            f"{path}: not a readable checkpoint of stas ({error}): use another, or train again"
        ) from error
    optimizer = {**_with_prefix(tensors, OPTIMIZER), **scalars}
    return Checkpoint(metadata, _with_prefix(tensors, NETWORK), optimizer, sha256)


@contextmanager
def fitting(checkpoint: Path | str) -> Iterator[None]:
    """Turn what goes wrong where a checkpoint's content is put to use into an error that names it.

    Raises:
        InputDataError: the content is not what it should be, though the file is whole.
    """
    try:
        yield
    except (UsageError, InputDataError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise InputDataError(
            f"{checkpoint}: its checkpoint does not fit ({type(error).__name__}: {str(error)[:500]}): "
            "use another, or train again"
        ) from error


def load_newest(run: RunPaths, set_aside: bool = True) -> Checkpoint | None:
    """The newest checkpoint to resume from, or the one before where it is damaged; None where there is none.

    A damaged one gets another name where `set_aside`, so that it does not take the place of the good one at the next
    save. One that could not be read just now keeps its name: the disk may come back.
    """
    damaged: dict[Path, InputDataError] = {}
    for which in ("next", "last", "previous"):
        path = run.checkpoint(which)
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path)
        except InputDataError as error:
            damaged[path] = error
            continue
        for bad, error in damaged.items():
            aside = bad.with_suffix(".damaged")
            log.warning("%s. Going on from %s instead; a damaged one is kept as %s", error, path, aside.name)
            if set_aside and not isinstance(error.__cause__, OSError):
                with suppress(OSError):  # on a read-only volume the next write will say so
                    bad.rename(aside)
        return checkpoint
    for error in damaged.values():
        raise error
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


def _checked_sum(file: BinaryIO) -> str:
    """The SHA-256 of a checkpoint file, once its own checksum is found to match its content.

    Raises:
        ValueError: it does not match.
    """
    left = os.fstat(file.fileno()).st_size - CHECKSUM_BYTES
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(BLOCK, left))):
        digest.update(block)
        left -= len(block)
    written = file.read(CHECKSUM_BYTES)
    if digest.digest() != written:
        raise ValueError("damaged: its content does not match its checksum")
    digest.update(written)
    return digest.hexdigest()


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
