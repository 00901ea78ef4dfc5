"""Train one member of the ensemble: alone or under torchrun, on CPU or GPU, the same code.

stas train --recipe NAME --workspace WS
stas launch train --recipe NAME --workspace WS     (one rank per GPU)
"""

import json
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stas import distributed
from stas.checkpoint import load_newest, restore_optimizer, save_checkpoint, save_last
from stas.config import Recipe, dump_recipe, parse_recipe
from stas.curves import draw_curves
from stas.distributed import Ranks
from stas.errors import StoppedEarly, UsageError
from stas.files import write_json, write_text
from stas.loader import epoch_batches, prefetch, steps_per_epoch
from stas.losses import build_loss
from stas.metrics import confusion, dice
from stas.model import build_network
from stas.optim import build_optimizer, rate_factor, set_learning_rate
from stas.paths import RunPaths, Workspace
from stas.progress import MetricsLog, bar, epoch_line, time_left
from stas.resources import usage
from stas.split import split_samples
from stas.store import Store, open_store
from stas.transforms import normalise, scale_intensity

log = logging.getLogger(__name__)
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Progress:
    """Where a run stands. All of it is in the checkpoint."""

    epoch: int = 0  # epochs done
    step: int = 0  # steps done in the epoch under way
    loss_sum: float = 0.0  # over this rank's images of the epoch under way
    elapsed: float = 0.0  # seconds over all parts of the run
    best_loss: float = math.inf
    best_epoch: int = 0
    epoch_seconds: float = 0.0  # what the last epoch took

    def ended(self, epochs: int, limit: float) -> bool:
        """Whether the last epoch is done, or another would outrun the time limit."""
        return self.epoch >= epochs or self.elapsed + self.epoch_seconds > limit


@dataclass(frozen=True)
class Job:
    """What stays the same during a run."""

    recipe: Recipe
    run: RunPaths
    ranks: Ranks
    store: Store
    training: list[int]  # positions in the store
    validation: list[int]
    network: nn.Module
    parallel: nn.Module  # the network, or its wrapper that averages gradients over the ranks
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    loss: Callable[[Tensor, Tensor], Tensor]


def train(recipe: Recipe, workspace: Workspace, run: str | None = None, time_limit: float | None = None) -> None:
    """Train `recipe` to its last epoch, going on from the run's newest checkpoint where there is one.

    Args:
        recipe: what to train.
        workspace: where its store is and the run's files go.
        run: name of the run; the recipe's where None.
        time_limit: seconds that the run may take over all its parts; it ends well when they are spent.

    Raises:
        StoppedEarly: SIGTERM or SIGUSR1 came; a checkpoint is written and the same command goes on.
        UsageError: the run exists with another recipe; no store; a batch smaller than the number of ranks.
    """
    paths = workspace.run(run or recipe.name)
    with distributed.join_ranks() as ranks, _stop_signal() as stop:
        job, progress = _set_up(recipe, workspace, paths, ranks)
        epochs, limit = recipe.train.epochs, math.inf if time_limit is None else time_limit
        if progress.ended(epochs, limit):
            log.info("%s: %d of %d epochs are done; nothing to do", paths.root, progress.epoch, epochs)
            return
        metrics = MetricsLog(paths.metrics, paths.tensorboard, progress.epoch) if ranks.first else None
        while not distributed.any_rank(progress.ended(epochs, limit)):
            began = time.monotonic()
            before = progress.elapsed
            train_loss, images = _train_epoch(job, progress, stop, began, limit)
            if distributed.any_rank(stop.is_set()):
                progress.elapsed = before + time.monotonic() - began
                _save(job, progress)
                raise StoppedEarly(f"{paths.root}: stopped in epoch {progress.epoch + 1}; the same command goes on")
            val_loss, val_dice = validate(job)
            progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
            progress.elapsed = before + time.monotonic() - began
            seconds = progress.epoch_seconds = progress.elapsed - before
            best = val_loss < progress.best_loss
            if best:
                progress.best_loss, progress.best_epoch = val_loss, progress.epoch
            record: dict[str, Any] = {
                "epoch": progress.epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_dice": val_dice,
                "lr": job.optimizer.param_groups[0]["lr"],
                "images_per_second": images / seconds,
                "seconds": seconds,
                "elapsed": progress.elapsed,
                "best": best,
            }
            _check_finite(record, paths)
            if metrics:  # before the checkpoint: going on from an older one cuts the line off again
                metrics.append(record | usage())
                draw_curves(metrics.records, paths.curves, title=paths.root.name)
                log.info("%s", epoch_line(record, epochs, time_left(metrics.records, epochs)))
            _save(job, progress, best)
        if progress.epoch < epochs:
            log.warning("%s: the time limit ends the run after %d of %d epochs", paths.root, progress.epoch, epochs)
        log.info("%s: best epoch %d, validation loss %.4f", paths.root, progress.best_epoch, progress.best_loss)


def _train_epoch(job: Job, progress: Progress, stop: Event, began: float, limit: float) -> tuple[float, int]:
    """Run the epoch's remaining steps; return the mean loss over its images and the number of images seen now."""
    recipe, ranks = job.recipe, job.ranks
    steps = steps_per_epoch(len(job.training), recipe.train.batch)
    batches = epoch_batches(
        job.store, job.training, recipe, progress.epoch, ranks.rank, ranks.size, first=progress.step
    )
    memory_format = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    seen = 0
    job.parallel.train()
    for batch in bar(prefetch(batches), steps - progress.step, f"epoch {progress.epoch + 1}", show=ranks.first):
        batch = batch.to(ranks.device)
        step = progress.epoch * steps + progress.step
        rate = rate_factor(recipe.schedule, step, steps * recipe.train.epochs)
        set_learning_rate(job.optimizer, recipe.optimizer.lr * rate)
        _seed_step(recipe.train.seed, step, ranks.rank)

        job.optimizer.zero_grad(set_to_none=True)
        with _autocast(recipe, ranks.device):
            logits = job.parallel(batch.images.contiguous(memory_format=memory_format))
        per_image = job.loss(logits, batch.masks) * batch.weights
        loss = per_image.sum() * ranks.size / batch.total  # DDP divides by the ranks: the mean over the global batch
        job.scaler.scale(loss).backward()
        job.scaler.step(job.optimizer)
        job.scaler.update()

        progress.loss_sum += per_image.detach().sum().item()
        progress.step += 1
        seen += batch.total
        if distributed.any_rank(stop.is_set() or progress.elapsed + time.monotonic() - began > limit):
            break
    images = min(progress.step * recipe.train.batch, len(job.training))
    return distributed.sum_over_ranks([progress.loss_sum])[0] / images, seen


@torch.no_grad()
def validate(job: Job) -> tuple[float, float]:
    """Mean over the validation images of loss and of Dice, both at each image's original size.

    Every rank takes its share and no image is counted twice. The reference averaged over batches, so that the images
    of a short last batch weighed more; here every image weighs the same. Dice is 1 where both masks are empty.
    """
    distributed.copy_from_first(job.network)
    job.network.eval()
    data = job.recipe.data
    losses = scores = 0.0
    share = job.validation[job.ranks.rank :: job.ranks.size]
    size = -(-job.recipe.train.batch // job.ranks.size)
    for start in range(0, len(share), size):
        indices = share[start : start + size]
        entries = [job.store.samples[index] for index in indices]
        images = torch.stack(
            [
                normalise(scale_intensity(job.store.image(index), entry["min"], entry["max"], data), data)
                for index, entry in zip(indices, entries, strict=True)
            ]
        )
        with _autocast(job.recipe, job.ranks.device):
            logits = job.network(images.to(job.ranks.device)).float()
        for index, logit in zip(indices, logits, strict=True):
            truth = job.store.full_mask(index)
            full = interpolate(logit[None], truth.shape, mode="bilinear")
            target = torch.from_numpy(truth).to(job.ranks.device)[None, None]
            losses += job.loss(full, target).item()
            scores += float(dice(confusion((full[0, 0] > 0).cpu().numpy(), truth)))
    total_loss, total_dice, count = distributed.sum_over_ranks([losses, scores, len(share)])
    return total_loss / count, total_dice / count


def _set_up(recipe: Recipe, workspace: Workspace, paths: RunPaths, ranks: Ranks) -> tuple[Job, Progress]:
    if recipe.train.batch < ranks.size:
        raise UsageError(f"train.batch = {recipe.train.batch} images over {ranks.size} ranks: give each at least one")
    saved = load_newest(paths)
    progress = Progress(**saved.facts["progress"]) if saved else Progress()
    if saved:
        _check_same_recipe(recipe, parse_recipe(saved.facts["recipe"], str(paths.root)), paths)
    store = open_store(workspace, recipe.data)
    if saved and saved.facts["store"] != store.key:
        raise UsageError(
            f"{paths.root} was trained on store {saved.facts['store']}, the newest is {store.key}: "
            "the data changed; begin a new run with --run"
        )
    training, validation = split_samples(store.samples, recipe.data.split)
    torch.manual_seed(recipe.train.seed)
    network = build_network(recipe.model, recipe.data.size, pretrained=saved is None)
    if saved:
        network.load_state_dict(saved.network)
    network.to(ranks.device)
    if recipe.train.channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = build_optimizer(network.parameters(), recipe.optimizer)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=recipe.train.precision == "fp16")
    if saved:
        restore_optimizer(optimizer, saved.optimizer)
        scaler.load_state_dict(saved.facts["scaler"])
        progress.loss_sum = progress.loss_sum if ranks.first else 0.0  # saved as the sum over the ranks
        log.info("%s: going on after epoch %d, step %d", paths.root, progress.epoch, progress.step)
    elif ranks.first:
        write_text(paths.recipe, dump_recipe(recipe))
        stems = {
            part: [store.samples[i]["stem"] for i in part_of]
            for part, part_of in (("training", training), ("validation", validation))
        }
        write_json(paths.split, {"store": store.key} | stems)
    log.info("%s: %d ranks on %s", paths.root, ranks.size, ranks.device.type)
    parallel = _parallel(network, recipe, ranks)
    loss = build_loss(recipe.loss)
    return Job(recipe, paths, ranks, store, training, validation, network, parallel, optimizer, scaler, loss), progress


def _parallel(network: nn.Module, recipe: Recipe, ranks: Ranks) -> nn.Module:
    parallel = torch.compile(network) if recipe.train.compile else network
    if ranks.size == 1:
        return parallel  # pyright: ignore[reportReturnType]
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.14 renames broadcast_buffers; 2.6 knows only the old name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            parallel,  # pyright: ignore[reportArgumentType]
            device_ids=devices,
            broadcast_buffers=False,  # each rank keeps its own running statistics until validation takes the first's
            gradient_as_bucket_view=True,
            static_graph=True,
        )


def _save(job: Job, progress: Progress, best: bool = False) -> None:
    """Write the last and, where it is the new best, the best checkpoint."""
    total = distributed.sum_over_ranks([progress.loss_sum])[0]
    distributed.copy_from_first(job.network)
    if job.ranks.first:
        facts = {
            "recipe": job.recipe.model_dump(mode="json"),
            "run": job.run.root.name,
            "store": job.store.key,
            "validation": [job.store.samples[index]["stem"] for index in job.validation],
            "progress": asdict(progress) | {"loss_sum": total},
            "scaler": job.scaler.state_dict(),
        }
        if best:
            save_checkpoint(job.run.checkpoint("best"), job.network, facts)
        save_last(job.run, job.network, facts, job.optimizer)
    distributed.barrier()


def _autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, PRECISION[recipe.train.precision], enabled=recipe.train.precision != "fp32")


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Make the network's own random draws (dropout, stochastic depth) a function of the step, also after a resume."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def _check_same_recipe(recipe: Recipe, saved: Recipe, paths: RunPaths) -> None:
    """Refuse another recipe; other inference settings, and more epochs at a constant rate, are the same training."""
    same_rates = recipe.schedule.name == "constant" and not recipe.schedule.warmup
    changed = [
        f"{section}.{key}: {old!r} before, {new!r} now"
        for section in ("data", "model", "loss", "optimizer", "schedule", "augment", "train")
        for (key, old), (_, new) in zip(getattr(saved, section), getattr(recipe, section), strict=True)
        if old != new and not (same_rates and (section, key) == ("train", "epochs"))
    ]
    if changed:
        raise UsageError(
            f"{paths.root} was begun with another recipe:\n  " + "\n  ".join(changed) + "\nGive the run another name "
            "with --run, or the settings that it was begun with"
        )


def _check_finite(record: dict[str, Any], paths: RunPaths) -> None:
    if not math.isfinite(record["train_loss"] + record["val_loss"]):
        raise RuntimeError(
            f"{paths.root}: loss is not finite in epoch {record['epoch']}: {json.dumps(record)}. The checkpoint of the "
            "epoch before is kept; lower optimizer.lr, or use train.precision=bf16 or fp32"
        )


@contextmanager
def _stop_signal() -> Iterator[Event]:
    """An event that SIGTERM and SIGUSR1 set. The handler only sets it; the step loop asks all ranks."""
    stop = Event()
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
