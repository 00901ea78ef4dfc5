"""The optimiser, and the learning rate at each step."""

import math
from collections.abc import Iterable

from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW
from torch.optim import Optimizer as TorchOptimizer

from stas.config import Optimizer, Schedule
from stas.training.adabelief import AdaBelief


def build_optimizer(parameters: Iterable[Parameter], spec: Optimizer) -> TorchOptimizer:
    """Build the optimiser of a recipe over `parameters`."""
    if spec.name == "sgd":
        return SGD(
            parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov
        )
    if spec.name == "adabelief":
        return AdaBelief(
            parameters,
            lr=spec.lr,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            weight_decouple=spec.weight_decouple,
            rectify=spec.rectify,
        )
    optimizer = {"adam": Adam, "adamw": AdamW}[spec.name]
    return optimizer(parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)


def set_learning_rate(optimizer: TorchOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate at `step` (from 0) of `steps`, relative to `optimizer.lr`.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    rising = round(schedule.warmup * steps)
    if step < rising:
        share = step / rising
        if schedule.name == "onecycle":
            share = (1 - math.cos(math.pi * share)) / 2
        return schedule.start + (1 - schedule.start) * share
    if schedule.name == "constant":
        return 1.0
    share = (step - rising) / max(1, steps - 1 - rising)
    return schedule.end + (1 - schedule.end) * (1 + math.cos(math.pi * share)) / 2
