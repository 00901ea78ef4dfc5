"""Networks: images (N, 3, H, W) float32 to foreground logits (N, 1, H, W)."""

import inspect
from typing import Any, cast

import monai.networks.nets
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from stas.config import Model
from stas.errors import UsageError
from stas.models.loaded import check_filled, watched_loading
from stas.models.trial import check_size
from stas.models.weights import TIMM, Pretrained, encoder_arguments, load_encoder_weights, pretrained_weights
from stas.system.resources import memory_trouble


def build_network(
    model: Model, size: tuple[int, int], pretrained: bool | Pretrained | None, turned: bool = False
) -> nn.Module:
    """Build the network of a recipe, and try it on its input's size.

    The reference also built an auxiliary classification head that no loss ever reached; it is left out.

    Args:
        model: the recipe's `model` section.
        size: (height, width) of its input in pixels; some architectures need it.
        pretrained: load the encoder's weights: these, or True to look for them; False or None if a checkpoint's are
            loaded afterwards.
        turned: whether the input is also turned by 90 degrees, as in test-time augmentation.

    Raises:
        UsageError: an unknown architecture or encoder, options or a size that do not fit it, or weights that are
            unavailable or do not fill the encoder.
        InputDataError: the weights' record is damaged.
    """
    weights = pretrained_weights(model) if pretrained is True else pretrained or None
    network = _build_smp(model, size, weights) if model.library == "smp" else _build_monai(model, size)
    check_size(network, model, size)
    if turned and size[0] != size[1]:
        check_size(network, model, (size[1], size[0]), turned=True)
    return network


def place(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move a network to a device, in the recipe's memory format."""
    network.to(device)
    if channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network


def _build_smp(model: Model, size: tuple[int, int], weights: Pretrained | None) -> nn.Module:
    architectures = {name: value for name, value in vars(smp).items() if hasattr(value, "check_input_shape")}
    if model.architecture not in architectures:
        raise UsageError(f"model.architecture = {model.architecture!r}: smp has {', '.join(sorted(architectures))}")
    architecture = architectures[model.architecture]
    valid = inspect.signature(architecture).parameters.keys() - {"kwargs"}
    unknown = model.options.keys() - valid
    if unknown and not (model.encoder or "").startswith(TIMM):  # smp passes others on to timm, or silently drops them
        raise UsageError(
            f"model.options: {model.architecture} does not know {', '.join(sorted(unknown))}; valid: {sorted(valid)}"
        )
    arguments = encoder_arguments(model, weights)
    try:
        with watched_loading() as loaded:
            network = architecture(encoder_name=model.encoder, in_channels=3, classes=1, **arguments, **model.options)
            if weights:
                load_encoder_weights(network.encoder, model, weights)
    except UsageError:
        raise
    except (TypeError, ValueError, AssertionError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        if memory_trouble(error):
            raise
        source = f" (weights: {weights})" if weights else ""
        raise UsageError(
            f"{model.architecture} with encoder {model.encoder!r} and options {model.options} cannot be built"
            f"{source}: {error}"
        ) from error
    stride = network.encoder.output_stride if network.requires_divisible_input_shape else 1
    if any(side % stride for side in size):
        raise UsageError(
            f"data.size: {size[1]} x {size[0]} pixels (width x height) do not suit {model.architecture}: "
            f"make both divisible by {stride}"
        )
    if weights:
        check_filled(network.encoder, loaded, str(weights.file), model.encoder or "")
    return network


def _build_monai(model: Model, size: tuple[int, int]) -> nn.Module:
    architecture: Any = getattr(monai.networks.nets, model.architecture, None)
    parameters = inspect.signature(architecture).parameters if inspect.isclass(architecture) else {}
    if "out_channels" not in parameters:
        raise UsageError(
            f"model.architecture = {model.architecture!r}: monai.networks.nets has no network of that name that takes "
            "out_channels: choose one that does, such as UNet, UNETR, SwinUNETR or ViTAutoEnc"
        )
    given = {"spatial_dims": 2, "in_channels": 3, "out_channels": 1, "img_size": size}
    arguments = {key: value for key, value in given.items() if key in parameters} | model.options
    try:
        return FirstOutput(cast(nn.Module, architecture(**arguments)))
    except (TypeError, ValueError, AssertionError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        if memory_trouble(error):
            raise
        raise UsageError(
            f"MONAI's {model.architecture} with {arguments} cannot be built: {error}; correct model.options"
        ) from error


class FirstOutput(nn.Module):
    """Keeps only the prediction; some MONAI networks also return hidden states after it.

    Raises:
        UsageError: the network's output is not a one-channel image of the input's size.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images)
        logits = output[0] if isinstance(output, tuple) else output
        expected = (len(images), 1, *images.shape[-2:])
        if logits.shape != expected:
            raise UsageError(
                f"model.architecture: {type(self.network).__name__} returns {tuple(logits.shape)} for images of "
                f"{tuple(images.shape)}, but segmentation needs {expected}: choose another, such as UNet"
            )
        return logits


class Compiled(nn.Module):
    """A network compiled for one batch size. Other sizes are rare and run uncompiled: compiling again takes minutes.

    Falls back to eager, with the compiler's warning, wherever the compiler fails.
    """

    def __init__(self, network: nn.Module, batch: int) -> None:
        super().__init__()
        torch._dynamo.config.suppress_errors = True  # pyright: ignore[reportAttributeAccessIssue]
        self.network = network
        self._batch = batch
        self._compiled = torch.compile(network.forward, dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        return self._compiled(images) if len(images) == self._batch else self.network(images)
