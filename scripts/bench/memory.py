"""How much memory the samples take on a node: four ranks that read one store, and four that each cache the samples.

A page that several processes map is counted once: a process's proportional set size (PSS, of the kernel's
/proc/PID/smaps_rollup) has each of its pages divided by the number of processes that map it.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil

from scripts.bench.measure import Row
from scripts.bench.site import Site, make_store
from stas.data.store import Store, open_store
from stas.paths import store_data
from stas.recipe import load_recipe

MIB = 2**20
Files = tuple[list[Path], list[Path]]  # images, masks
Prepare = Callable[..., Callable[[], object]]


def measure(site: Site) -> Iterator[Row]:
    from scripts.bench.rivals import mask_files

    size, samples, cached, ranks = (64, 12, 2, 2) if site.quick else (800, 80, 16, 4)
    recipe = load_recipe("efficientnet_b6_ns", [f"data.size={size}", "data.split.kind=fraction"])
    directory = open_store(make_store(site, site.scratch / "memory", recipe, samples), recipe.data).directory
    files = [site.images / f"{stem}.jpg" for stem in site.stems], mask_files(site.annotations, site.scratch / "masks")
    files = files[0][:cached], files[1][:cached]
    one, four = (_grown(count, read_store, directory) for count in (1, ranks))
    rival_one, rival_four = (_grown(count, fill_cache, (files, size)) for count in (1, ranks))
    yield Row(
        f"memory: pages of {ranks} ranks beyond one's, in copies of the data",
        value=sum(four) / sum(one) - 1,
        target=0.1,
        at_least=False,
        detail={
            "store MiB": store_data(directory).stat().st_size / MIB,
            "one rank MiB": sum(one) / MIB,
            f"{ranks} ranks MiB": sum(four) / MIB,
            "one rank MiB a sample": sum(one) / MIB / samples,
            "copies beyond one with CacheDataset": sum(rival_four) / sum(rival_one) - 1,
            "CacheDataset, one rank MiB a sample": sum(rival_one) / MIB / cached,
        },
        note="Proportional set size after reading all samples less that before. The rival keeps float32, in each rank.",
    )


def read_store(directory: Path) -> Callable[[], object]:
    """Open a store; the returned function reads every sample and keeps none, as training does."""
    store = Store(directory)

    def read() -> int:
        return sum(int(store.image(index)[0, 0, 0]) + int(store.mask(index)[0, 0]) for index in range(len(store)))

    store.image(0)  # LMDB and its checks are loaded
    return read


def fill_cache(source: tuple[Files, int]) -> Callable[[], object]:
    """Load the rival; the returned function caches every sample."""
    from scripts.bench.rivals import competent_loader  # not needed by the store's readers

    (images, masks), size = source
    competent_loader(images[:1], masks[:1], size, 1)
    return lambda: competent_loader(images, masks, size, 1)


def _grown(ranks: int, prepare: Prepare, source: object) -> list[int]:
    """Bytes by which each of `ranks` simultaneous new processes has grown after reading everything."""
    context = multiprocessing.get_context("spawn")  # like torchrun's processes, they share only files
    barrier, results = context.Barrier(ranks), context.Queue()
    processes = [context.Process(target=_rank, args=(prepare, source, barrier, results)) for _ in range(ranks)]
    for process in processes:
        process.start()
    grown = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return grown


def _rank(prepare: Prepare, source: object, barrier: Barrier, results: "Queue[int]") -> None:
    read = prepare(source)
    barrier.wait()
    before = psutil.Process().memory_full_info().pss
    barrier.wait()
    kept = read()
    barrier.wait()
    after = psutil.Process().memory_full_info().pss
    barrier.wait()  # a process that exits gives up its share of the pages, so wait until all have counted
    del kept
    results.put(after - before)
