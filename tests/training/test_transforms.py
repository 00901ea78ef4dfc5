import numpy as np
import pytest
import torch
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import ScaleIntensity
from monai.transforms.spatial.array import Resize
from monai.transforms.utility.array import EnsureChannelFirst

from stas.config import Data
from stas.data.resize import area_resize
from stas.data.store import open_store
from stas.models.inputs import as_input, normalise, scale_intensity
from stas.training.loader import SampleCache, epoch_batches
from stas.training.transforms import prepare


def prepared(batch, recipe):
    return prepare(batch, recipe.data, recipe.augment, recipe.train.channels_last)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_scaling_is_each_images_own_minimum_and_maximum():
    image = torch.tensor([[[10, 20, 30]], [[50, 60, 110]]], dtype=torch.uint8)  # (2, 1, 3)
    images, low, high = torch.stack([image, image, image]), numbers(10, 0, 7), numbers(110, 255, 7)
    scaled = scale_intensity(images, low, high, "minmax", False)
    assert scaled.shape == (3, 3, 2, 1)
    assert scaled[0, :, :, 0].T.flatten().tolist() == pytest.approx([0, 0.1, 0.2, 0.4, 0.5, 1])
    assert scaled[1, 2, 1, 0].item() == pytest.approx(110 / 255)
    assert scaled[2].abs().sum() == 0  # an image of one value
    unit = scale_intensity(images, low, high, "unit", False)
    assert torch.equal(unit, images.permute(0, 3, 1, 2) / 255)


def test_the_stored_way_is_monais_way_within_rounding():
    """MONAI scales at full size, then averages; the store averages, rounds to 8 bit, then scales."""
    image = np.random.default_rng(0).integers(30, 220, (94, 171, 3)).astype(np.uint8)
    steps = [EnsureChannelFirst(channel_dim=-1), ScaleIntensity(), Resize((80, 80), mode="area")]
    monais = Compose(steps)(image.astype(np.float32))
    small = torch.from_numpy(area_resize(image, (80, 80)).round().astype(np.uint8))
    ours = scale_intensity(small[None], numbers(image.min()), numbers(image.max()), "minmax", False)[0]
    assert np.abs(np.asarray(monais) - ours.numpy()).max() <= 0.5 / (219 - 30) + 1e-5


def test_normalise_by_hand():
    data = Data(mean=(0.5, 0.25, 0), std=(0.5, 1, 2))
    assert normalise(torch.ones(1, 3, 1, 1), data).flatten().tolist() == [1, 0.75, 0.5]
    assert normalise(torch.ones(3, 1, 1), Data()).sum() == 3


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_network_gets_the_recipes_memory_format(channels_last):
    images = torch.randint(256, (2, 4, 5, 3), dtype=torch.uint8)
    data = Data(mean=(0, 0, 0), std=(1, 1, 1))
    given = as_input(images, numbers(0, 0), numbers(255, 255), data, channels_last)
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    assert given.shape == (2, 3, 4, 5) and given.is_contiguous(memory_format=format_)


def batches(cache, recipe, epoch=0):
    return epoch_batches(cache, range(10), recipe.train, recipe.augment, epoch, 0, 1)


def test_training_and_inference_see_the_same_where_nothing_is_changed(store_workspace, tiny):
    plain = tiny.model_copy(update={"augment": type(tiny.augment)()})
    cache = SampleCache(open_store(store_workspace, plain.data), range(10), torch.device("cpu"))
    batch = next(batches(cache, plain))
    images, masks = prepared(batch, plain)
    assert torch.equal(images, as_input(batch.images, batch.low, batch.high, plain.data, False))
    assert images.shape == (4, 3, 64, 64) and masks.shape == (4, 1, 64, 64)
    assert images.dtype == masks.dtype == torch.float32
    assert torch.equal(masks[:, 0], batch.masks / 255)


def test_a_batch_that_is_changed_is_each_sample_changed(store_workspace, tiny):
    """Of a batch and of a sample alone, the network sees the same."""
    cache = SampleCache(open_store(store_workspace, tiny.data), range(10), torch.device("cpu"))
    one = tiny.model_copy(update={"train": tiny.train.model_copy(update={"batch": 1})})
    together = prepared(next(batches(cache, tiny)), tiny)
    alone = [prepared(batch, one) for _, batch in zip(range(4), batches(cache, one), strict=False)]
    for part in (0, 1):
        assert torch.allclose(together[part], torch.cat([sample[part] for sample in alone]), atol=1e-6)
    assert not torch.equal(together[0], prepared(next(batches(cache, tiny, epoch=1)), tiny)[0])
