"""Ranks: the only reader of torchrun's variables, and the collectives that we use."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from stas.errors import EXIT_FAILED, MachineError, StoppedEarly
from stas.paths import status_file
from stas.system import heartbeat

log = logging.getLogger(__name__)
# The launcher ends a rank that hangs long before (`stas launch --stalled-after`). This ends the ranks that wait for one
# on another node, whose launcher may hang with it.
GROUP_TIMEOUT = timedelta(hours=1)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one rank that writes files and logs."""
        return self.rank == 0

    def share(self, count: int) -> int:
        """The largest number of items any rank gets when `count` items are divided evenly."""
        return -(-count // self.size)


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the other ranks if torchrun started this process; otherwise be the only rank.

    Tensors on a GPU use NCCL; small metadata on the CPU always use gloo.

    Args:
        device: cuda: this rank's own GPU; cpu; auto: the GPU if there is one.

    Raises:
        MachineError: cuda, and this process sees no GPU of its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _choose_device(device, local)
    if rank:
        logging.getLogger("stas").setLevel(logging.WARNING)
    if size > 1:
        heartbeat.start(rank)
        with heartbeat.waiting():
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=GROUP_TIMEOUT)
    try:
        yield Ranks(rank, size, chosen)
    except Exception as error:
        if size > 1:
            log.error("rank %d of %d: %s: %s", rank, size, type(error).__name__, error)
            if status := status_file():  # now: destroying the group below may wait for ranks that wait for this one
                status.write_text(str(EXIT_FAILED))
        raise
    finally:
        if size > 1:
            heartbeat.end(rank)
            dist.destroy_process_group()


def _choose_device(device: str, local: int) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not available):
        return torch.device("cpu")
    found = torch.cuda.device_count() if available else 0
    if found <= local:
        raise MachineError(
            f"--device {device}: process {local} of this node needs GPU {local}, and torch sees {found}: run "
            "nvidia-smi and `stas doctor` on this node, give the GPUs to the job or the container, or say --device cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def entered_by_first(ranks: Ranks, context: AbstractContextManager[T]) -> Iterator[T | None]:
    """Enter a context on the first rank only, and leave it once all ranks are done; the others get None.

    Raises:
        StoppedEarly: on the other ranks, if the first could not enter or leave; the first raises its own error.
    """
    with ExitStack() as stack:
        value = failure = None
        if ranks.first:
            try:
                value = stack.enter_context(context)
            except (Exception, StoppedEarly) as error:
                failure = error
        _agree(failure, "start")
        yield value
        barrier()
        try:
            stack.close()
        except (Exception, StoppedEarly) as error:
            failure = error
        # The others must not end before the first has published, and must learn if it could not.
        _agree(failure, "finish")


def _agree(failure: BaseException | None, what: str) -> None:
    """Raise the first rank's failure there, and StoppedEarly on the others, once all ranks know of it."""
    failed = any_rank(failure is not None)[0]
    if failure:
        raise failure
    if failed:
        raise StoppedEarly(f"the first rank could not {what}; its own message says why")


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks, in double precision."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    with heartbeat.waiting():
        dist.all_reduce(total)
    return total.tolist()


def any_rank(*flags: bool) -> list[bool]:
    """Whether any rank set each flag. All ranks get the same answers, so they all stop at the same step."""
    return [total > 0 for total in sum_over_ranks([float(flag) for flag in flags])]


def gather(value: float) -> list[float]:
    """Every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [0.0] * dist.get_world_size()
    values[dist.get_rank()] = value
    return sum_over_ranks(values)


def gather_objects(value: T) -> list[T]:
    """Every rank's value, which JSON can hold, in rank order. Slow: for rare events.

    Not torch's `all_gather_object`: that unpickles what comes over the network, and a pickle can run commands.
    """
    if not dist.is_initialized():
        return [value]
    said = json.dumps(value).encode()
    assert json.loads(said) == value, "it would come back as something else, such as a tuple as a list"
    lengths = [int(length) for length in gather(len(said))]
    mine = torch.zeros(max(lengths), dtype=torch.uint8)
    mine[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    every = [torch.zeros_like(mine) for _ in lengths]
    with heartbeat.waiting():
        dist.all_gather(every, mine)
    return [json.loads(bytes(one[:length].tolist())) for one, length in zip(every, lengths, strict=True)]


def broadcast(value: T) -> T:
    """The first rank's value, which JSON can hold, on all ranks; values from the others are ignored. Slow."""
    return gather_objects(value)[0]


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give every rank the first rank's buffers (running statistics): the reference kept those of one GPU."""
    if dist.is_initialized():
        with heartbeat.waiting():
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        sum_over_ranks([0.0])
