"""An epoch of training by several ranks on this machine, over gloo."""

import multiprocessing
import os
import socket
import statistics
import time
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stas.config import Recipe
from stas.data.store import Store
from stas.system import distributed
from stas.system.threads import prefetch
from stas.training.loader import SampleCache, epoch_batches
from stas.training.losses import build_loss
from stas.training.optim import build_optimizer
from stas.training.transforms import prepare


def epoch_seconds(store: Path, recipe: Recipe, samples: int, ranks: int) -> float:
    """Seconds that `ranks` new processes take for an epoch: the median of three, after a warm-up."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    arguments = (store, recipe, samples, ranks, port, results)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    seconds = max(results.get(timeout=300) for _ in processes)  # they wait for each other, so they differ little
    for process in processes:
        process.join()
    return seconds


def _rank(rank: int, store: Path, recipe: Recipe, samples: int, ranks: int, port: int, results: "Queue[float]") -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    with distributed.join_ranks() as joined:
        network: nn.Module = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 1, 1), nn.Upsample(None, 2)
        )
        parallel = DistributedDataParallel(network) if ranks > 1 else network
        optimizer = build_optimizer(network.parameters(), recipe.optimizer)
        loss = build_loss(recipe.loss)
        pixels, sections = SampleCache(Store(store), range(samples), joined.device), (recipe.train, recipe.augment)
        taken = []
        for epoch in range(4):
            distributed.barrier()
            began = time.perf_counter()
            batches = epoch_batches(pixels, range(samples), *sections, epoch, joined.rank, joined.size)
            for batch in prefetch(batches):
                images, masks = prepare(batch, recipe.data, recipe.augment, recipe.train.channels_last)
                optimizer.zero_grad()
                loss(parallel(images), masks).mean().backward()
                optimizer.step()
            taken.append(time.perf_counter() - began)
    results.put(statistics.median(taken[1:]))
