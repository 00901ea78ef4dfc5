"""Set up a training run: network, optimiser, samples, and progress so far."""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stas.config import Recipe, Train
from stas.data.split import split_samples, warn_of_shared_images
from stas.data.store import Store, open_store
from stas.errors import StoppedEarly, UsageError
from stas.models.checkpoint import fitting, load_newest, restore_optimizer
from stas.models.network import Compiled, build_network, place
from stas.models.trial import check_batch
from stas.models.weights import pretrained_weights
from stas.paths import RunPaths, Workspace
from stas.recipe import dump_recipe, parse_recipe
from stas.system import distributed
from stas.system.distributed import Ranks
from stas.system.files import write_json, write_text
from stas.training.loader import SampleCache
from stas.training.losses import build_loss
from stas.training.metrics_log import Record, finite
from stas.training.optim import build_optimizer
from stas.training.resume import check_best, check_never_saved, check_same_recipe, check_same_split

log = logging.getLogger(__name__)
COMPILE_WORTH = 600  # seconds of a time limit that must be left to start compiling, which takes minutes


@dataclass
class TrainState:
    """A run's progress. All of it is in the checkpoint."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps in the current epoch
    images: int = 0  # of all ranks, in the steps of the current epoch that were not skipped
    loss_sum: float = 0.0  # over this rank's share of them
    elapsed: float = 0.0  # seconds over all parts of the run
    best_loss: float = math.inf
    best_epoch: int = 0
    epoch_seconds: float = 0.0  # duration of the last epoch
    bad_steps: int = 0  # steps skipped because the loss or gradient was not finite

    def ended(self, epochs: int, limit: float) -> bool:
        """Whether the last epoch is finished, or another would exceed the time limit."""
        return self.epoch >= epochs or self.elapsed + self.epoch_seconds > limit

    def to_json(self) -> dict[str, Any]:
        """JSON for a checkpoint. Every rank must call this, because it gathers all ranks' loss sums."""
        return asdict(self) | {"loss_sum": distributed.gather(self.loss_sum)}

    @classmethod
    def from_json(cls, values: dict[str, Any], ranks: Ranks) -> "TrainState":
        """Restore from a checkpoint. If the number of ranks has changed, the first rank takes the whole sum."""
        sums = values["loss_sum"]
        mine = sums[ranks.rank] if len(sums) == ranks.size else sum(sums) if ranks.first else 0.0
        numbers = [*values.values(), *sums]
        numbers.remove(sums)
        if not all(type(number) in (int, float) and number >= 0 for number in numbers):
            raise ValueError(f"state {values} holds something other than non-negative numbers")
        return replace(cls(**values), loss_sum=mine)


@dataclass(frozen=True)
class TrainingRun:
    """Everything that stays the same during a run."""

    recipe: Recipe
    paths: RunPaths
    ranks: Ranks
    store: Store
    cache: SampleCache
    training: list[int]  # positions in the store
    validation: list[int]
    network: nn.Module
    parallel: nn.Module  # the network, or its wrapper that averages gradients over the ranks
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    loss: Callable[[Tensor, Tensor], Tensor]
    weights: dict[str, Any] | None  # the pretrained ones that it began with; see Pretrained
    newest_record: Record | None = None  # of the last finished epoch, if its checkpoint has it

    def metadata(self, state: TrainState, record: Record | None = None) -> dict[str, Any]:
        """A checkpoint's content besides the tensors. Every rank must call this.

        `record` is the metrics of the epoch that has just finished: they are written after the checkpoint.
        """
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "run": self.paths.root.name,
            "store": self.store.key,
            "validation": [self.store.samples[index]["stem"] for index in self.validation],
            "weights": self.weights,
            "state": state.to_json(),
            "scaler": self.scaler.state_dict(),
            "record": record and finite(record),
        }


def set_up(
    recipe: Recipe, workspace: Workspace, paths: RunPaths, ranks: Ranks, limit: float = math.inf
) -> tuple[TrainingRun, TrainState]:
    """Build a run, or resume it from its newest checkpoint; `limit` is the seconds that all its parts may take.

    Raises:
        InputDataError: a checkpoint that the run wrote is missing or damaged.
        UsageError: the run exists with another recipe or split; there is no store, or the one that it began with is
            gone; the batch is smaller than the number of ranks.
    """
    if recipe.train.batch < ranks.size:
        raise UsageError(
            f"train.batch = {recipe.train.batch} images over {ranks.size} ranks: give each rank at least one"
        )
    saved = load_newest(paths, set_aside=ranks.first)
    if len(set(distributed.gather_objects(saved and saved.sha256))) > 1:
        raise StoppedEarly(
            f"{paths.root}: not every rank could read the same newest checkpoint (the log says why); run the same "
            "command again to resume"
        )
    with fitting(paths.root):
        state = TrainState.from_json(saved.metadata["state"], ranks) if saved else TrainState()
        if saved:
            check_same_recipe(recipe, parse_recipe(saved.metadata["recipe"], str(paths.root)), paths)
            check_best(paths, saved, state.best_epoch, ranks)
    if not saved:
        check_never_saved(paths)
    store = open_store(workspace, recipe.data, str(saved.metadata.get("store")) if saved else None)
    training, validation = split_samples(store.samples, recipe.data.split)
    with fitting(paths.root):
        check_same_split(paths, saved and saved.metadata, store, validation)
    if ranks.first:
        warn_of_shared_images(store.samples, training, validation)
    torch.manual_seed(recipe.train.seed)
    weights = None if saved else pretrained_weights(recipe.model)
    network = build_network(recipe.model, recipe.data.size, pretrained=weights, turned=recipe.infer.tta)
    check_batch(network, recipe.model, recipe.data.size, ranks.share(recipe.train.batch))
    if saved:
        with fitting(paths.root):
            network.load_state_dict(saved.network)
    place(network, ranks.device, recipe.train.channels_last)
    optimizer = build_optimizer(network.parameters(), recipe.optimizer)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=recipe.train.precision == "fp16")
    if saved:
        with fitting(paths.root):
            restore_optimizer(optimizer, saved.optimizer)
            scaler.load_state_dict(saved.metadata["scaler"])
        log.info("%s: resuming after epoch %d, step %d", paths.root, state.epoch, state.step)
    elif ranks.first:
        write_text(paths.recipe, dump_recipe(recipe))
        stems = {
            part: [store.samples[i]["stem"] for i in part_of]
            for part, part_of in (("training", training), ("validation", validation))
        }
        write_json(paths.split, {"store": store.key} | stems)
    if weights:
        log.info("%s: begins with the pretrained weights %s", paths.root, weights)
    log.info("%s: %d ranks on %s", paths.root, ranks.size, ranks.device.type)
    run = TrainingRun(
        recipe=recipe,
        paths=paths,
        ranks=ranks,
        store=store,
        cache=SampleCache(store, training, ranks.device, recipe.data.size),
        training=training,
        validation=validation,
        network=network,
        parallel=_parallel(network, recipe.train, ranks, limit - state.elapsed),
        optimizer=optimizer,
        scaler=scaler,
        loss=build_loss(recipe.loss),
        weights=saved.metadata.get("weights") if saved else weights and weights.to_json(),
        newest_record=saved and saved.metadata.get("record"),
    )
    return run, state


def _parallel(network: nn.Module, train: Train, ranks: Ranks, left: float) -> nn.Module:
    parallel = network
    if train.compile and left < COMPILE_WORTH:
        log.warning("train.compile: not compiled, because only %.0f s of the time limit are left", left)
    elif train.compile:
        parallel = Compiled(network, batch=ranks.share(train.batch))
    if ranks.size == 1:
        return parallel
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.14 renames broadcast_buffers; 2.6 knows only the old name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            parallel,
            device_ids=devices,
            broadcast_buffers=False,  # each rank keeps its own running statistics until validation takes rank 0's
            gradient_as_bucket_view=True,
            static_graph=True,
        )
