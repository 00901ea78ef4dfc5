"""Work in threads, and progress bars. Pillow, numpy, hashing and torch release the GIL, so threads run in parallel."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from stas.system.heartbeat import beat
from stas.system.resources import cores
from stas.system.stop import check_stop

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
PREFETCHED = 2  # items prepared in advance by default


def bar(items: Iterable[T], total: int, description: str, show: bool = True, stops: bool = True) -> Iterator[T]:
    """Iterate over `items` with a temporary progress bar; no bar unless `show` is set and stderr is a terminal.

    Each item is progress for the launcher, too.

    Raises:
        StoppedEarly: before an item, if a signal asked this process to stop; never if `stops` is unset.
    """
    disable = None if show else True  # None: tqdm checks whether stderr is a terminal
    for item in tqdm(items, description, total, leave=False, disable=disable, dynamic_ncols=True):
        beat()
        if stops:
            check_stop()
        yield item


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], task: str, workers: int | None = None
) -> list[Result]:
    """Apply `function` to every item in threads, with a progress bar; results are in order.

    Args:
        function: called once per item.
        items: the items.
        task: the progress bar's label.
        workers: number of threads; by default one per core that this process may use.
    """
    pool = ThreadPoolExecutor(workers or cores())
    try:
        return list(bar(pool.map(function, items), len(items), task))
    finally:
        pool.shutdown(cancel_futures=True)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Apply `function` to every item in threads, in order, at most twice `workers` ahead, which bounds memory."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch(items: Iterator[T], depth: int = PREFETCHED) -> Generator[T, None, None]:
    """Yield from `items`, prepared up to `depth` ahead in a thread while the caller works.

    While the caller has one item, `depth` are waiting and one more is being prepared.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    closed = threading.Event()

    def put(value: tuple[T | None, BaseException | None, bool]) -> bool:
        while not closed.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:
            put((None, error, True))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error, end = ready.get()
            if error is not None:
                raise error
            if end:
                return
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
