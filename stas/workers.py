"""Samples made in several processes. Their pixels come back in shared memory: through a pipe, they take 5 ms each."""

import multiprocessing
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from ctypes import Array
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stas.errors import InputDataError, UsageError
from stas.resources import keep_freed_memory
from stas.store import Sample, Skipped
from stas.store_writer import Record

Item = TypeVar("Item")
Place = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # of an image (height, width, 3) and its mask (height, width)


def records(
    make: Callable[[Item], Record | Skipped], items: Sequence[Item], size: tuple[int, int], workers: int
) -> Iterator[Record | Skipped]:
    """Map `make` over processes, in order, with at most two results a worker in flight, so that memory stays flat.

    Args:
        make: a function of a module, called once per item. One worker means that this process calls it.
        items: the items.
        size: (height, width) of the records' images in pixels.
        workers: processes.

    Yields:
        What was made. A record's pixels are others when the next one has been asked for.

    Raises:
        InputDataError: a worker was killed.
        UsageError: too little shared memory for so many workers.
    """
    if workers == 1:
        yield from map(make, items)
        return
    # Not fork: the caller may have threads. The server imports the module once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([make.__module__])
    count = min(2 * workers, len(items))
    needed = count * size[0] * size[1] * 4  # bytes
    _check_room(needed, workers)
    shared = context.RawArray("B", needed)
    places = _places(shared, size)
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(shared, size))
    waiting: deque[tuple[int, Future[tuple[Sample, bytes] | Skipped]]] = deque()

    def first() -> Record | Skipped:
        place, future = waiting.popleft()
        made = future.result()
        return Record(made[0], *places[place], made[1]) if isinstance(made, tuple) else made

    try:
        for index, item in enumerate(items):
            if len(waiting) == count:
                yield first()
            place = index % count
            waiting.append((place, pool.submit(_make, make, item, place)))
        while waiting:
            yield first()
    except BrokenProcessPool as error:
        raise InputDataError(
            "a worker process was killed, most likely for want of memory: give fewer with --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _check_room(needed: int, workers: int) -> None:
    """Refuse what would end this process by a signal: multiprocessing takes files in one of these for shared memory."""
    room = [shutil.disk_usage(path).free for path in ("/dev/shm", tempfile.gettempdir()) if Path(path).is_dir()]
    if max(room) < needed:
        raise UsageError(
            f"{workers} workers need {needed / 2**20:.0f} MiB in /dev/shm or {tempfile.gettempdir()}, where "
            f"{max(room) / 2**20:.0f} are free: give fewer with --workers, or more room with TMPDIR"
        )


def _places(shared: "Array[Any]", size: tuple[int, int]) -> list[Place]:
    image, mask = size[0] * size[1] * 3, size[0] * size[1]
    rows = np.frombuffer(memoryview(shared), np.uint8).reshape(-1, image + mask)
    return [(row[:image].reshape(*size, 3), row[image:].reshape(size)) for row in rows]


_own: list[Place] = []  # of a worker process: the places it may write to


def _prepare(shared: "Array[Any]", size: tuple[int, int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    keep_freed_memory()
    _own[:] = _places(shared, size)


def _make(make: Callable[[Item], Record | Skipped], item: Item, place: int) -> tuple[Sample, bytes] | Skipped:
    made = make(item)
    if not isinstance(made, Record):
        return made
    image, mask = _own[place]
    image[...], mask[...] = made.image, made.mask
    return made.sample, made.full_mask
