"""AdaBelief's step over lists of tensors, compared with adabelief-pytorch's loop over each tensor."""

from collections.abc import Iterator, Sequence

import segmentation_models_pytorch as smp
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from scripts.bench import rivals
from scripts.bench.measure import Row, interleaved, one_thread
from scripts.bench.site import Site
from stas.training.adabelief import AdaBelief

SMALL = [(64 * (1 + index % 16),) for index in range(600)]  # here a step is nothing but call overhead
STEPS = 10  # timed together, at a few ms each


def measure(site: Site) -> Iterator[Row]:
    small = SMALL[:20] if site.quick else SMALL
    yield _row("AdaBelief step / adabelief-pytorch's: many small tensors", small, 0.5, site)
    network = smp.DeepLabV3Plus("tu-tf_efficientnet_lite0", encoder_weights=None)
    real = [tuple(parameter.shape) for parameter in network.parameters()]
    yield _row("AdaBelief step / adabelief-pytorch's: DeepLabV3+ lite0", real, 1.0, site)


def _row(what: str, shapes: Sequence[Sequence[int]], target: float, site: Site) -> Row:
    ours, theirs = _parameters(shapes), _parameters(shapes)
    one = AdaBelief(ours, lr=1e-4, betas=(0.9, 0.99), eps=1e-16, weight_decay=1e-4, rectify=False)
    other = rivals.adabelief(theirs)

    def steps(optimizer: Optimizer) -> None:
        for _ in range(STEPS):
            optimizer.step()

    with one_thread():  # time the calls: with small tensors, threads mostly wait for each other
        seconds = interleaved({"ours": lambda: steps(one), "theirs": lambda: steps(other)}, site.repeats)
    same = all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))
    detail = {f"{name} ms": 1e3 * value / STEPS for name, value in seconds.items()}
    detail |= {"tensors": len(shapes), "elements": sum(parameter.numel() for parameter in ours)}
    note = f"parameters bit-identical after {STEPS * (site.repeats + 1)} steps: {'yes' if same else 'NO'}"
    return Row(what, seconds["ours"] / seconds["theirs"], target, at_least=False, detail=detail, note=note)


def _parameters(shapes: Sequence[Sequence[int]]) -> list[Parameter]:
    random = torch.Generator().manual_seed(0)
    parameters = [Parameter(torch.randn(tuple(shape), generator=random)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=random)
    return parameters
