"""Make samples in several processes. Pixels return through shared memory: a pipe would take 5 ms per sample."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import Array
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stas.data.store_manifest import Sample, Skipped
from stas.data.store_writer import Record
from stas.errors import EXIT_FAILED, StoppedEarly, UsageError
from stas.system.resources import keep_freed_memory
from stas.system.stop import check_stop

Item = TypeVar("Item")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # left to the parent


def records(
    make: Callable[[Item], Record | Skipped], items: Sequence[Item], largest: tuple[int, int], workers: int
) -> Iterator[Record | Skipped]:
    """Map `make` over processes, in order, with at most two results per worker in flight to bound memory.

    Args:
        make: a module-level function, called once per item. With one worker, this process calls it.
        items: the items.
        largest: (height, width) in pixels of the largest stored image.
        workers: number of processes.

    Yields:
        The results. Arrays are reused: copy before asking for the next item.

    Raises:
        StoppedEarly: a worker was killed.
        UsageError: not enough shared memory for this many workers.
    """
    if workers == 1:
        yield from map(make, items)
        return
    # Not fork: the caller may have threads. The server imports the module once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([make.__module__])
    resource_tracker.ensure_running()  # which would let SIGTERM through again, if it were started in the block
    with _held_back():
        forkserver.ensure_running()
    count = min(2 * workers, len(items))
    each = largest[0] * largest[1] * 4  # bytes of an image and its mask
    needed = count * each
    _check_space(needed, workers)
    shared = context.RawArray("B", needed)
    places = _places(shared, each)
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(shared, each))
    waiting: deque[tuple[int, Future[tuple[Sample, bytes] | Skipped]]] = deque()

    def first() -> Record | Skipped:
        place, future = waiting.popleft()
        made = future.result()
        if not isinstance(made, tuple):
            return made
        sample, full_mask = made
        return Record(sample, *_image_and_mask(places[place], sample["stored"]), full_mask)

    try:
        for index, item in enumerate(items):
            if len(waiting) == count:
                yield first()
            place = index % count
            waiting.append((place, _submit(pool, make, item, place)))
        while waiting:
            yield first()
    except (BrokenProcessPool, _NotStartedError) as error:
        check_stop()  # a signal to the whole group may have ended a worker first
        raise StoppedEarly(
            "a worker process was killed, probably because memory ran out: use fewer workers (--workers), or give this "
            "job more memory, and run the same command again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _NotStartedError(Exception):
    """The fork server died, so no worker can be started."""


def _submit(
    pool: ProcessPoolExecutor, make: Callable[[Item], Record | Skipped], item: Item, place: int
) -> Future[tuple[Sample, bytes] | Skipped]:
    try:
        return pool.submit(_make, make, item, place)
    except (EOFError, ConnectionError) as error:  # all that is seen of a server that ended, mostly for want of memory
        raise _NotStartedError from error


@contextmanager
def _held_back() -> Iterator[None]:
    """Hold back signals. A process started in the block never gets them, nor do its children.

    The fork server handles none: a SIGTERM to the whole job would end it before it has started the workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_space(needed: int, workers: int) -> None:
    """Refuse if space is short: multiprocessing keeps shared memory in a file there, and a full disk would kill us."""
    free = [shutil.disk_usage(path).free for path in ("/dev/shm", tempfile.gettempdir()) if Path(path).is_dir()]
    if max(free) < needed:
        raise UsageError(
            f"{workers} workers need {needed / 2**20:.0f} MiB in /dev/shm or {tempfile.gettempdir()}, but only "
            f"{max(free) / 2**20:.0f} MiB are free: use fewer workers (--workers), or set TMPDIR to a larger disk"
        )


def _places(shared: "Array[Any]", each: int) -> list[NDArray[np.uint8]]:
    return list(np.frombuffer(memoryview(shared), np.uint8).reshape(-1, each))


def _image_and_mask(place: NDArray[np.uint8], shape: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Views of an image (height, width, 3) and its mask (height, width) at the start of a place."""
    pixels = shape[0] * shape[1]
    assert pixels * 4 <= len(place)
    return place[: pixels * 3].reshape(*shape, 3), place[pixels * 3 : pixels * 4].reshape(shape)


_own: list[NDArray[np.uint8]] = []  # in a worker process: the places it may write to


def _prepare(shared: "Array[Any]", each: int) -> None:
    # A terminal, Slurm and docker signal every process; the parent stops the workers, and `_end_with_parent` them too.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    keep_freed_memory()
    _own[:] = _places(shared, each)


def _end_with_parent() -> None:
    """Exit at once when the parent is gone, even if it was killed: a worker would wait for tasks for ever.

    Not by the kernel's PR_SET_PDEATHSIG: the process that forked this one is the fork server, which outlives us.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(EXIT_FAILED)


def _make(make: Callable[[Item], Record | Skipped], item: Item, place: int) -> tuple[Sample, bytes] | Skipped:
    made = make(item)
    if not isinstance(made, Record):
        return made
    image, mask = _image_and_mask(_own[place], made.sample["stored"])
    image[...], mask[...] = made.image, made.mask
    return made.sample, made.full_mask
