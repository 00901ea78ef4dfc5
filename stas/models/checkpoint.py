"""Checkpoints: one safetensors file each, with the recipe and all other metadata as JSON in its header.

A training checkpoint holds the network and the optimiser; the best one holds only the network. No random state is
stored, because every random draw is a function of seed, epoch, step and index. Loading a checkpoint executes no code.
The last tensor, `checksum`, is the SHA-256 of every byte before it.
"""

import errno
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

from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.models.checksum import CHECKSUM_BYTES, MAX_BYTES
from stas.paths import RunPaths
from stas.system import files
from stas.system.files import atomic_write
from stas.system.locks import Lock
from stas.system.resources import memory_trouble
from stas.system.untrusted import check_file, parse_json, stop_if_passing, system_error

log = logging.getLogger(__name__)
FORMAT = 4
CHECKSUM = "checksum"
BLOCK = 1 << 20
NETWORK, OPTIMIZER = "network.", "optimizer."  # prefixes of the tensors' names
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WHOLE = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
DTYPES = _FLOATS | _WHOLE | {torch.bool: "BOOL"}  # as safetensors names them


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file."""

    metadata: dict[str, Any]  # recipe, position, scores; see stas.train
    network: dict[str, Tensor]
    optimizer: dict[str, Tensor | float]  # by "<parameter index>.<key>"; empty in the best checkpoint
    sha256: str  # of the file
    checksum: str  # the SHA-256 at its end, of everything before (see `written_checksum`)


@dataclass(frozen=True)
class Snapshot:
    """A network and its optimiser at one step, copied to the CPU so that training continues during the write."""

    metadata: Mapping[str, Any]  # JSON
    tensors: dict[str, Tensor]
    scalars: dict[str, float]  # of the optimiser's state

    def network_only(self) -> "Snapshot":
        """The same without the optimiser, for the best checkpoint."""
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
    """Write a checkpoint atomically, one tensor at a time.

    `safetensors.torch.save` would stall training: it holds the interpreter's lock while copying all of them.
    """
    metadata = {"format": FORMAT, "metadata": dict(snapshot.metadata), "optimizer": snapshot.scalars}
    # Descending element sizes keep every tensor aligned; torch needs that to read it in place.
    tensors = dict(sorted(snapshot.tensors.items(), key=lambda item: -item[1].element_size()))
    checksum = hashlib.sha256()
    with atomic_write(path) as file:
        for part in _parts(metadata, tensors):
            checksum.update(part)
            file.write(part)
        file.write(checksum.digest())


def _parts(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """All parts of a safetensors file except the checksum at its end."""
    header: dict[str, Any] = {"__metadata__": {"stas": json.dumps(metadata)}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = _entry(DTYPES[tensor.dtype], tensor.shape, end, tensor.nbytes)
        end += tensor.nbytes
    header[CHECKSUM] = _entry("U8", [CHECKSUM_BYTES], end, CHECKSUM_BYTES)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors start aligned
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _entry(dtype: str, shape: Sequence[int], begin: int, length: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + length]}


def save_last(run: RunPaths, snapshot: Snapshot) -> None:
    """Write the checkpoint to resume from, keeping the old one as `previous`.

    A kill between the renames leaves `next`; `load_newest` looks for it first, and `remove_leftovers` finishes the job.
    """
    save_checkpoint(run.checkpoint("next"), snapshot)
    _move_up(run)


def _move_up(run: RunPaths) -> None:
    last = run.checkpoint("last")
    if last.exists():
        os.replace(last, run.checkpoint("previous"))
    os.replace(run.checkpoint("next"), last)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time, while training continues.

    Given the run's lock, it checks it before every write, so as not to overwrite another process's checkpoint.
    """

    def __init__(self, run: RunPaths, held: Lock | None = None) -> None:
        self._run = run
        self._held = held
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def write(self, snapshot: Snapshot, best: bool) -> None:
        """Start writing `last` and, if it is the best so far, `best`, once the previous write is complete.

        Raises:
            StoppedEarly: the run's lock was lost, and another process may be writing.
        """
        self.wait()
        if self._held:
            self._held.check()
        self._writing = self._thread.submit(self._write, snapshot, best)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the write. Raise its error, or only log it if another exception is already propagating."""
        try:
            self.wait()
        except (Exception, StoppedEarly) as error:
            if kind is None:
                raise
            log.error("%s: the last checkpoint was not written: %s", self._run.root, error)

    def wait(self) -> None:
        """Wait until everything is on disk; raise any error from writing."""
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
    """Finish or remove what a killed process left half done in a run. The caller must hold the run's lock."""
    for directory in (run.root, run.checkpoint("last").parent):
        files.remove_leftovers(directory)
    if run.checkpoint("next").exists():
        _move_up(run)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        InputDataError: missing, damaged, or not made by stas.
        StoppedEarly: this machine could not read it for now, or has too little memory.
    """
    if not path.exists():
        raise InputDataError(f"{path}: no such checkpoint; train the run first, or name another with --run")
    check_file(path, MAX_BYTES)
    try:
        while True:
            with open(path, "rb") as file, safe_open(path, "pt") as opened:
                header = parse_json((opened.metadata() or {})["stas"].encode())
                if header["format"] != FORMAT:
                    raise ValueError(
                        f"format {header['format']} is from another version of stas; this one reads {FORMAT}"
                    )
                metadata, scalars = dict(header["metadata"]), dict(header["optimizer"])
                sha256 = _checked_sum(file)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
                checksum = bytes(tensors[CHECKSUM].tolist()).hex()
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break  # otherwise training has replaced it meanwhile
    except InputDataError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
        if isinstance(error, FileNotFoundError) and path.exists():  # safetensors says so whenever it cannot open it
            error = OSError(errno.EIO, str(error))
        stop_if_passing(path, MemoryError() if memory_trouble(error) else system_error(error))
        raise InputDataError(
            f"{path}: not a readable checkpoint of stas ({error}): use another, or train again"
        ) from error
    optimizer = {**_with_prefix(tensors, OPTIMIZER), **scalars}
    return Checkpoint(metadata, _with_prefix(tensors, NETWORK), optimizer, sha256, checksum)


@contextmanager
def fitting(checkpoint: Path | str) -> Iterator[None]:
    """Turn any error in using a checkpoint's content into one that names the checkpoint.

    Raises:
        InputDataError: the content is wrong, although the file is intact.
    """
    try:
        yield
    except (UsageError, InputDataError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise InputDataError(
            f"{checkpoint}: the checkpoint does not fit ({type(error).__name__}: {str(error)[:500]}): "
            "use another, or train again"
        ) from error


def load_newest(run: RunPaths, set_aside: bool = True) -> Checkpoint | None:
    """The newest checkpoint to resume from, or the previous one if it is damaged; None if there is none.

    With `set_aside`, a damaged one is renamed; otherwise it would replace the good one at the next save. One that the
    disk failed to read keeps its name: the disk may recover.
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
            log.warning("%s. Resuming from %s instead; a damaged file is kept as %s", error, path, aside.name)
            if set_aside and not isinstance(error.__cause__, OSError):
                with suppress(OSError):  # on a read-only volume, the next write reports it
                    bad.rename(aside)
        return checkpoint
    for error in damaged.values():
        raise error
    return None


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Tensor | float]) -> None:
    """Restore saved optimiser state, each tensor in its parameter's memory format."""
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
    """The SHA-256 of a checkpoint file, after checking its content against its own checksum.

    Raises:
        ValueError: they do not match.
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
