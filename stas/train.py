"""Train one member of the ensemble. One process or several ranks, CPU or GPU: the code is the same.

stas train --recipe NAME --workspace WS
stas launch train --recipe NAME --workspace WS     (one rank per GPU)
"""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import Event
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from stas.config import Recipe
from stas.errors import StoppedEarly, TrainingError
from stas.models.checkpoint import CheckpointWriter, remove_leftovers, take_snapshot
from stas.models.predict import autocast
from stas.paths import Workspace, lock_file
from stas.system import distributed
from stas.system.files import append_json_line
from stas.system.locks import PATIENCE, lock
from stas.system.resources import GIB, usage
from stas.system.stop import SIGNALS, stop_asked
from stas.system.threads import bar, prefetch
from stas.training.curves import draw_curves
from stas.training.loader import Batch, epoch_batches, steps_per_epoch
from stas.training.metrics_log import MetricsLog, Record, epoch_line, read_metrics, time_left
from stas.training.optim import rate_factor, set_learning_rate
from stas.training.run import TrainingRun, TrainState, set_up
from stas.training.transforms import prepare
from stas.training.validate import validate

log = logging.getLogger(__name__)


class Clock:
    """Seconds a run has taken over all its parts, and seconds since its last checkpoint."""

    def __init__(self, elapsed: float, limit: float, checkpoint_every: float) -> None:
        self._began = time.monotonic() - elapsed
        self._saved = time.monotonic()
        self._drawn = -math.inf
        self._checkpoint_every = checkpoint_every
        self.limit = limit

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def saved(self) -> None:
        self._saved = time.monotonic()

    def checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved > self._checkpoint_every

    def picture_due(self) -> bool:
        """True at most once every ten seconds: an epoch may be shorter than drawing its curve."""
        due = time.monotonic() - self._drawn > 10
        if due:
            self._drawn = time.monotonic()
        return due


def train(
    recipe: Recipe,
    workspace: Workspace,
    name: str | None = None,
    time_limit: float | None = None,
    checkpoint_every: float = 600,
    device: str = "auto",
) -> None:
    """Train `recipe` to its last epoch, resuming from the run's newest checkpoint if there is one.

    Args:
        recipe: the recipe to train.
        workspace: where the store is and where the run's files go.
        name: the run's name; None means the recipe's name.
        time_limit: seconds the run may take over all its parts; it ends cleanly when they are used up.
        checkpoint_every: seconds between checkpoints within an epoch; every epoch also ends with one.
        device: cuda, cpu or auto; see `join_ranks`.

    Raises:
        MachineError: `device` is cuda, and there is no GPU.
        StoppedEarly: SIGTERM or SIGUSR1 arrived; a checkpoint is written, and the same command resumes. Or another
            process is training this run, and still was after some minutes of waiting.
        TrainingError: the loss is not finite, or the GPU runs out of memory.
        InputDataError: a checkpoint that the run wrote is missing or damaged.
        UsageError: the run exists with another recipe, store or split; there is no store; the batch is smaller than the
            rank count.
    """
    paths = workspace.run(name or recipe.name)
    with (
        distributed.join_ranks(device) as ranks,
        distributed.entered_by_first(ranks, lock(lock_file(paths.root), PATIENCE)) as held,
        _stop_signal() as stop,
        ExitStack() as files,
    ):
        if held:
            remove_leftovers(paths)
        distributed.barrier()  # no rank may read a checkpoint while it is being renamed
        epochs, limit = recipe.train.epochs, math.inf if time_limit is None else time_limit
        run, state = set_up(recipe, workspace, paths, ranks, limit)
        if state.ended(epochs, limit):
            if ranks.first:
                _complete_metrics(run, state)
            log.info("%s: %d of %d epochs finished; nothing to do", paths.root, state.epoch, epochs)
            return
        metrics = None
        if ranks.first:
            metrics = files.enter_context(MetricsLog(paths.metrics, paths.tensorboard, state.epoch, run.newest_record))
        clock = Clock(state.elapsed, limit, checkpoint_every)
        writer = files.enter_context(CheckpointWriter(paths, held))
        while not distributed.any_rank(state.ended(epochs, limit))[0]:
            with _explain_out_of_memory(run):
                train_loss, images = _train_epoch(run, state, stop, clock, writer)
                scores = validate(run, stop)
            if scores is None:
                _stop_early(run, state, clock, writer)
            val_loss, val_dice = scores
            _end_epoch(run, state, clock, val_loss)
            best = state.best_epoch == state.epoch
            record: Record = {
                "epoch": state.epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_dice": val_dice,
                "lr": run.optimizer.param_groups[0]["lr"],
                "images_per_second": images / state.epoch_seconds,
                "seconds": state.epoch_seconds,
                "elapsed": state.elapsed,
                "best": best,
            }
            record |= usage()
            _save(run, state, clock, writer, best, record)  # first, so that metrics that fail do not cost the epoch
            if metrics:
                if not metrics.records:
                    writer.wait()  # a run with metrics has a checkpoint: without one it is not started again
                metrics.append(record)
                if clock.picture_due() or state.ended(epochs, limit):
                    draw_curves(metrics.records, paths.curves, title=paths.root.name)
                log.info("%s", epoch_line(record, epochs, time_left(metrics.records, epochs)))
        _finish_writing(writer)
        if state.epoch < epochs:
            log.warning("%s: time limit reached after %d of %d epochs", paths.root, state.epoch, epochs)
        log.info("%s: best epoch %d, validation loss %.4f", paths.root, state.best_epoch, state.best_loss)


def _complete_metrics(run: TrainingRun, state: TrainState) -> None:
    """Add the last epoch to a finished run's metrics, if a kill came between its checkpoint and its metrics."""
    paths = run.paths
    recorded = read_metrics(paths.metrics) if paths.metrics.exists() else []
    if run.newest_record and run.newest_record not in recorded:
        with MetricsLog(paths.metrics, paths.tensorboard, state.epoch, run.newest_record) as metrics:
            recorded = metrics.records
    if recorded and not paths.curves.exists():
        draw_curves(recorded, paths.curves, title=paths.root.name)


def _train_epoch(
    run: TrainingRun, state: TrainState, stop: Event, clock: Clock, writer: CheckpointWriter
) -> tuple[float, int]:
    """Run the epoch's remaining steps; return its mean loss per image and the number of images seen in this call."""
    recipe, ranks = run.recipe, run.ranks
    steps = steps_per_epoch(len(run.training), recipe.train.batch)
    batches = epoch_batches(
        run.cache,
        run.training,
        recipe.train,
        recipe.augment,
        state.epoch,
        ranks.rank,
        ranks.size,
        first=state.step,
    )
    seen = 0
    run.parallel.train()
    # All ranks stop at the same step, so they look at `stop` themselves.
    for batch in bar(prefetch(batches), steps - state.step, f"epoch {state.epoch + 1}", show=ranks.first, stops=False):
        stopping, due, spent = train_step(run, state, batch.to(ranks.device), steps, stop, clock)
        seen += batch.total
        if stopping:
            _stop_early(run, state, clock, writer)
        if spent:
            break
        if due:
            _save(run, state, clock, writer)
    total = distributed.sum_over_ranks([state.loss_sum])[0]
    return total / state.images if state.images else math.nan, seen


def train_step(
    run: TrainingRun, state: TrainState, batch: Batch, steps: int, stop: Event, clock: Clock
) -> tuple[bool, bool, bool]:
    """Take one of the epoch's `steps`; return whether to stop, whether a checkpoint is due and whether time is up."""
    recipe, ranks = run.recipe, run.ranks
    step = state.epoch * steps + state.step
    rate = rate_factor(recipe.schedule, step, steps * recipe.train.epochs)
    set_learning_rate(run.optimizer, recipe.optimizer.lr * rate)
    _seed_step(recipe.train.seed, step, ranks.rank)
    # A NaN would stay in the running statistics of the normalisation layers.
    buffers = [buffer.clone() for buffer in run.network.buffers()] if recipe.train.max_bad_steps else []
    images, masks = prepare(batch, recipe.data, recipe.augment, recipe.train.channels_last)

    run.optimizer.zero_grad(set_to_none=True)
    with autocast(ranks.device, recipe.train.precision):
        logits = run.parallel(images)
    per_image = run.loss(logits, masks) * batch.weights
    # DDP divides gradients by the number of ranks; this leaves the mean over the global batch.
    loss = per_image.sum() * ranks.size / batch.total
    run.scaler.scale(loss).backward()

    checked: list[Tensor] = [per_image.detach().sum()]
    if not run.scaler.is_enabled():  # the fp16 scaler checks gradients itself and lowers its scale
        gradients = [value.grad for value in run.network.parameters() if value.grad is not None]
        checked.append(torch.nn.utils.get_total_norm(gradients))
    finite = bool(torch.stack([value.float() for value in checked]).isfinite().all())
    # All ranks must agree; otherwise some would wait in the next step for those that stopped.
    bad, stopping, due, spent = distributed.any_rank(
        not finite,
        stop.is_set(),
        ranks.first and clock.checkpoint_due(),
        clock.elapsed() > clock.limit,
    )

    if bad:
        _skip(run, state, batch, buffers)
    else:
        run.scaler.step(run.optimizer)
        run.scaler.update()
        _check_scale(run)
        state.loss_sum += checked[0].item()
        state.images += batch.total
    state.step += 1
    return stopping, due, spent


def _skip(run: TrainingRun, state: TrainState, batch: Batch, buffers: list[Tensor]) -> None:
    """Skip a step whose loss or gradient is not finite; fail if there are more than the recipe allows."""
    state.bad_steps += 1
    samples = sorted({stem for stems in distributed.gather_objects(batch.stems) for stem in stems})
    where = f"{run.paths.root}: loss or gradient is not finite in epoch {state.epoch + 1}, step {state.step + 1}"
    if run.ranks.first:
        append_json_line(run.paths.bad_steps, {"epoch": state.epoch + 1, "step": state.step + 1, "samples": samples})
    allowed = run.recipe.train.max_bad_steps
    if state.bad_steps > allowed:
        raise TrainingError(
            f"{where}, on samples {', '.join(samples)} (recorded in {run.paths.bad_steps}). {allowed} such steps may "
            "be skipped (train.max_bad_steps). The last checkpoint is kept; check these samples, lower optimizer.lr, "
            "or use train.precision=bf16 or fp32"
        )
    for buffer, before in zip(run.network.buffers(), buffers, strict=True):
        buffer.copy_(before)
    log.warning("%s: step skipped (%d of at most %d); samples %s", where, state.bad_steps, allowed, ", ".join(samples))


def _check_scale(run: TrainingRun) -> None:
    """Fail once the fp16 scale is below 1, where it no longer helps. The scaler halves it at every step it skips."""
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1:
        raise TrainingError(
            f"{run.paths.root}: gradients are not finite even with the loss scaled by "
            f"{run.scaler.get_scale():g}. The last checkpoint is kept; use train.precision=bf16 or fp32"
        )


def _end_epoch(run: TrainingRun, state: TrainState, clock: Clock, val_loss: float) -> None:
    """Count the epoch as finished; fail if its validation loss is not finite."""
    if not math.isfinite(val_loss):
        raise TrainingError(
            f"{run.paths.root}: the validation loss is {val_loss} after epoch {state.epoch + 1}. The previous "
            "epoch's checkpoint is kept; lower optimizer.lr, or use train.precision=bf16 or fp32"
        )
    elapsed = clock.elapsed()
    state.epoch_seconds, state.elapsed = elapsed - state.elapsed, elapsed
    state.epoch, state.step, state.images, state.loss_sum = state.epoch + 1, 0, 0, 0.0
    if val_loss < state.best_loss:
        state.best_loss, state.best_epoch = val_loss, state.epoch


def _save(
    run: TrainingRun,
    state: TrainState,
    clock: Clock,
    writer: CheckpointWriter,
    best: bool = False,
    record: Record | None = None,
) -> None:
    """Start writing the last checkpoint and, if this is a new best, the best one. Every rank must call this."""
    distributed.broadcast_buffers(run.network)
    metadata = run.metadata(replace(state, elapsed=clock.elapsed()), record)
    if run.ranks.first:
        writer.write(take_snapshot(run.network, metadata, run.optimizer), best)
    clock.saved()


def _stop_early(run: TrainingRun, state: TrainState, clock: Clock, writer: CheckpointWriter) -> NoReturn:
    """Save the current epoch: the steps so far, or all of them if only validation remains."""
    _save(run, state, clock, writer)
    _finish_writing(writer)
    raise StoppedEarly(f"{run.paths.root}: stopped in epoch {state.epoch + 1}; run the same command again to resume")


def _finish_writing(writer: CheckpointWriter) -> None:
    """Wait until the first rank's checkpoint is on disk. Otherwise torchrun kills rank 0 mid-write."""
    writer.wait()
    distributed.barrier()


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Make the network's own random draws (dropout, stochastic depth) a function of the step, even after resuming."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


@contextmanager
def _explain_out_of_memory(run: TrainingRun) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        device = run.ranks.device
        peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else math.nan
        height, width = run.recipe.data.size
        images = run.ranks.share(run.recipe.train.batch)
        raise TrainingError(
            f"{run.paths.root}: out of GPU memory with {images} images of {width} x {height} pixels (width x height) "
            f"on each of {run.ranks.size} ranks, peak {peak:.1f} GiB: lower train.batch ({run.recipe.train.batch} over "
            "all ranks) or data.size, use more GPUs, or use train.precision=bf16"
        ) from error


@contextmanager
def _stop_signal() -> Iterator[Event]:
    """An event that SIGTERM and SIGUSR1 set, or have set. Training and validation check it, together with all ranks."""
    stop = Event()
    before = [signal.signal(number, lambda *_: stop.set()) for number in SIGNALS]
    if stop_asked():  # while torch was imported, say
        stop.set()
    try:
        yield stop
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
