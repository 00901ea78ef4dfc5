"""Ranks that hang: each rank reports its progress to the launcher, which ends a rank that makes none and names it.

A rank that hangs, in a loader on a dead file server or in a faulty driver, makes all others wait in a collective. So
every rank counts its steps in a small file that it maps into memory, and says whether it waits for others. The one that
is behind and does not wait is the one that hangs.
"""

import logging
import mmap
import os
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from stas.paths import HEARTBEAT_DIRECTORY, heartbeat_file

log = logging.getLogger(__name__)

# Seconds without progress after which a rank counts as hung. Longer than any step that works: torch.compile takes
# minutes in the first one, and a rank may wait for a lock for `stas.system.locks.PATIENCE`.
STALLED_AFTER = 1200.0
Rank = tuple[int, int]  # its number and its process
LAYOUT = struct.Struct("=qqq")


@dataclass(order=True)
class Pulse:
    """A rank's progress. Meetings come first in any comparison, because they are the same on all ranks.

    Attributes:
        meetings: collectives entered and left.
        beats: progress since the last of them.
        waiting: whether the rank is inside a collective.
    """

    meetings: int = 0
    beats: int = 0
    waiting: bool = False


_mine = Pulse()
_memory: dict[int, mmap.mmap] = {}  # by process, because a forked one is not the rank


def start(rank: int) -> None:
    """Report this process's progress to the launcher, if there is one."""
    if path := heartbeat_file(rank):
        path.write_bytes(bytes(LAYOUT.size))
        with path.open("r+b") as file:
            _memory[os.getpid()] = mmap.mmap(file.fileno(), LAYOUT.size)
        beat()


def end(rank: int) -> None:
    """Stop reporting: this rank is done."""
    if _memory.pop(os.getpid(), None) and (path := heartbeat_file(rank)):
        path.unlink(missing_ok=True)


def beat() -> None:
    """Report that this process does something new: a batch, an image, a block of a file."""
    if os.getpid() in _memory:
        _mine.beats += 1
        _report()


@contextmanager
def waiting() -> Iterator[None]:
    """Report that this process waits for other ranks for as long as the block runs."""
    if os.getpid() not in _memory:
        yield
        return
    _meet(True)
    try:
        yield
    finally:
        _meet(False)


def _meet(wait: bool) -> None:
    _mine.meetings, _mine.beats, _mine.waiting = _mine.meetings + 1, 0, wait
    _report()


def _report() -> None:
    LAYOUT.pack_into(_memory[os.getpid()], 0, _mine.meetings, _mine.beats, _mine.waiting)


@contextmanager
def hung_ranks_ended(stalled_after: float, nodes: int, ended: Callable[[int], bool]) -> Iterator[None]:
    """End this node's ranks that hang, for as long as the block runs; the processes that it starts are the ranks.

    Args:
        stalled_after: seconds without progress after which a rank counts as hung.
        nodes: how many nodes the job has.
        ended: whether the process with this number has ended.
    """
    over = Event()
    with tempfile.TemporaryDirectory(prefix="stas-heartbeat-") as directory:
        os.environ[HEARTBEAT_DIRECTORY] = directory
        watch = Thread(target=_watch, args=(Path(directory), stalled_after, nodes, ended, over), daemon=True)
        watch.start()
        try:
            yield
        finally:
            del os.environ[HEARTBEAT_DIRECTORY]
            over.set()
            watch.join()


def _watch(directory: Path, stalled_after: float, nodes: int, ended: Callable[[int], bool], over: Event) -> None:
    tick = min(5.0, stalled_after / 4)
    before: dict[Rank, Pulse] = {}
    silent: dict[Rank, float] = {}
    while not over.wait(tick):
        now = {key: pulse for key, pulse in _pulses(directory).items() if not ended(key[1])}
        # Counted in ticks: if the whole job was suspended, this thread was, too.
        silent = {key: silent.get(key, 0.0) + tick if before.get(key) == pulse else 0.0 for key, pulse in now.items()}
        before = now
        for rank, process in hung(now, silent, stalled_after):
            elsewhere = ", unless it waits for one on another node" if nodes > 1 else ""
            log.error(
                "rank %d (process %d) has made no progress for %.0f s: it hangs%s. Ending all ranks; the last "
                "checkpoint is kept, and the same command resumes. If it was only slow, raise --stalled-after",
                rank,
                process,
                silent[rank, process],
                elsewhere,
            )
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)  # one that is stopped, or inside a driver, hears nothing else
            (directory / f"{rank}.{process}").unlink(missing_ok=True)


def hung(pulses: dict[Rank, Pulse], silent: dict[Rank, float], stalled_after: float) -> list[Rank]:
    """The ranks that hang: silent for `stalled_after` seconds, not waiting, and not ahead of another such rank.

    A rank that waits for a hung one in the backward pass does not know that it waits; but it is ahead of one that hangs
    before that pass. Of ranks that are equally far, a process that is stopped or blocked in the kernel is named.
    """
    stalled = {key: each for key, each in pulses.items() if not each.waiting and silent[key] >= stalled_after}
    if not stalled:
        return []
    behind = [key for key, each in stalled.items() if each == min(stalled.values())]
    return [key for key in behind if _state(key[1]) in "TtDZ"] or behind


def _pulses(directory: Path) -> dict[Rank, Pulse]:
    """Every rank's progress, by rank and process."""
    found: dict[Rank, Pulse] = {}
    for path in directory.iterdir():
        rank, process = map(int, path.name.split("."))
        with suppress(FileNotFoundError):
            content = path.read_bytes()
            if len(content) == LAYOUT.size and any(content):  # otherwise it is just starting
                meetings, beats, wait = LAYOUT.unpack(content)
                found[rank, process] = Pulse(meetings, beats, bool(wait))
    return found


def _state(process: int) -> str:
    """The kernel's letter for what a process does; a space if it cannot be read."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return " "
