"""The one forward pass: symmetries, precision, windows, and one image at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stas.config import Data
from stas.models.inputs import as_input
from stas.models.predict import Picture, Settings, mean_over_symmetries, predict_logits, shrink

PLAIN = Settings(Data(size=(32, 32)), "fp32", channels_last=False, tta=False)


class Mean(nn.Module):
    """Marks its input's brightness everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)


class Corner(nn.Module):
    """Prefers the top left corner."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros_like(images[:, :1])
        logits[..., 0, 0] = 8.0
        return logits


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)).eval()


def picture(height: int = 70, width: int = 90) -> Picture:
    image = np.random.default_rng(0).integers(20, 230, (height, width, 3)).astype(np.uint8)
    return shrink(image, PLAIN.data)


def test_each_symmetry_is_undone():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mean_over_symmetries(Mean(), image), image.mean(1, keepdim=True))
    corners = mean_over_symmetries(Corner(), image)[0, 0]
    assert [corners[y, x].item() for y, x in ((0, 0), (0, 7), (7, 0), (7, 7))] == [2, 2, 2, 2]
    assert corners.sum() == 8


def test_logits_have_the_images_own_size_and_are_those_of_the_network(network: nn.Module):
    given = picture()
    logits = predict_logits(network, given, PLAIN)
    assert logits.shape == given.size == (70, 90) and logits.dtype == torch.float32
    low, high = torch.tensor([given.low]), torch.tensor([given.high])
    inputs = as_input(torch.from_numpy(given.pixels)[None], low, high, PLAIN.data, channels_last=False)
    with torch.no_grad():
        expected = interpolate(network(inputs), (70, 90), mode="bilinear")[0, 0]
    assert torch.equal(logits, expected)


def test_a_picture_holds_what_the_store_would():
    image = np.full((64, 64, 3), 7, np.uint8)
    image[0, 0] = 200
    shrunk = shrink(image, PLAIN.data)
    assert shrunk.pixels.shape == (32, 32, 3) and shrunk.pixels.dtype == np.uint8
    assert (shrunk.low, shrunk.high, shrunk.size) == (7, 200, (64, 64))
    assert shrunk.pixels.max() < 200, "the extremes are those before the resize"


AT_SCALE = Settings(Data(size=(32, 48), scale=0.5), "fp32", channels_last=False, tta=False)


class Brightness(nn.Module):
    """Gives each pixel's first channel, whatever the window, and remembers the windows' sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))  # says which device the network is on
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.add(tuple(images.shape))
        return images[:, :1].clone()


@pytest.mark.parametrize(("height", "width"), [(200, 300), (64, 96), (64, 300), (30, 50), (2, 2)])
@pytest.mark.parametrize("tta", [False, True])
def test_at_a_scale_windows_of_the_networks_size_cover_the_image(height: int, width: int, tta: bool):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    given, network = shrink(image, AT_SCALE.data), Brightness()
    assert given.pixels.shape == (height // 2, width // 2, 3)
    logits = predict_logits(network, given, replace(AT_SCALE, tta=tta))
    assert network.seen <= {(1, 3, 32, 48), (1, 3, 48, 32)}
    scaled = (torch.from_numpy(given.pixels).float() - given.low) / (given.high - given.low)
    expected = interpolate(scaled.permute(2, 0, 1)[None, :1], (height, width), mode="bilinear")[0, 0]
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_network_predicts_in_the_precision_that_it_was_trained_in(network: nn.Module, precision):
    seen = []
    network[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))  # pyright: ignore
    settings = Settings(PLAIN.data, precision, channels_last=False, tta=False)
    logits = predict_logits(network, picture(), settings)
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, predict_logits(network, picture(), PLAIN), atol=0.05)
