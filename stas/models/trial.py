"""Whether a network takes its input: one forward pass before hours of work. It costs no memory and half a second."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stas.config import Model
from stas.errors import UsageError
from stas.system.resources import memory_trouble

NEARBY = (32, 64, 128)  # sizes divisible by these suit most architectures
USUAL = ((224, 224), (256, 256), (384, 384), (512, 512))  # of networks that take only one size


def check_size(network: nn.Module, model: Model, size: tuple[int, int], turned: bool = False) -> None:
    """Check that a network turns an image of (height, width) pixels into logits of the same size.

    Args:
        network: as it was built; it is left as it is.
        model: the recipe's section, for the message.
        size: (height, width) of its input.
        turned: whether this is the recipe's size turned by 90 degrees.

    Raises:
        UsageError: it does not; the message says why, and which size works.
    """
    error = _why_not(network, size)
    if error is None:
        return
    if memory_trouble(error):
        raise error
    what = f"{model.architecture}{f' with encoder {model.encoder}' if model.encoder else ''}"
    if turned:
        raise UsageError(
            f"data.size: {what} takes {size[0]} x {size[1]} pixels (width x height), but not {size[1]} x {size[0]}, "
            f"into which test-time augmentation turns them ({_line(error)}): use a square data.size, or leave out the "
            "augmentation (--no-tta, infer.tta: false)"
        ) from error
    works = next((each for each in _others(size) if _try(network, each, _run_on_meta) is None), None)
    if works is None and isinstance(error, UsageError):  # not the size, but the architecture
        raise error
    remedy = f"{works[1]} x {works[0]} works" if works else "choose another size or other model.options"
    raise UsageError(
        f"data.size: {size[1]} x {size[0]} pixels (width x height) do not suit {what} ({_line(error)}): {remedy}"
    ) from error


def check_batch(network: nn.Module, model: Model, size: tuple[int, int], share: int) -> None:
    """Check that a network can be trained on `share` images at a time.

    Raises:
        UsageError: it normalises a value per image over the batch, which a single image does not allow.
    """
    if share > 1:
        return
    network.train()
    try:
        _run_on_meta(network, size)
    except ValueError as error:
        raise UsageError(
            f"train.batch: {model.architecture} cannot be trained on a single image at a time ({_line(error)}): give "
            "each rank at least 2"
        ) from error
    except Exception:  # the meta device may not know an operation
        return


def _why_not(network: nn.Module, size: tuple[int, int]) -> Exception | None:
    """Why a network does not take images of a size, or None."""
    if _try(network, size, _run_on_meta) is None:
        return None
    # The meta device may not know an operation, so only a real pass decides.
    return _try(network, size, lambda network, size: network(torch.zeros(1, 3, *size)))


def _try(
    network: nn.Module, size: tuple[int, int], run: Callable[[nn.Module, tuple[int, int]], Any]
) -> Exception | None:
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            logits = run(network, size)
    except Exception as error:  # each network has its own
        return error
    finally:
        network.train(training)
    if isinstance(logits, Tensor) and logits.shape == (1, 1, *size):
        return None
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    return ValueError(f"it returns {found} instead of {(1, 1, *size)}")


def _run_on_meta(network: nn.Module, size: tuple[int, int]) -> Any:
    """A forward pass without memory or arithmetic: only shapes."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    with torch.no_grad(), torch.device("meta"):
        return functional_call(network, state, (torch.zeros(1, 3, *size),))


def _others(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    for step in NEARBY:
        yield -(-size[0] // step) * step, -(-size[1] // step) * step
    yield from USUAL


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
