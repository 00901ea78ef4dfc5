import time

import numpy as np
import pytest
import torch

from stas.config import Data
from stas.data.store import Store, open_store
from stas.data.tiles import Box
from stas.system.threads import prefetch
from stas.training.augment import draw_changes, draw_window
from stas.training.loader import BUFFERS, Batch, SampleCache, epoch_batches, rank_share, steps_per_epoch
from tests.support.stores import build_scaled


def batches(workspace, recipe, rank=0, ranks=1, epoch=0, first=0):
    store = open_store(workspace, recipe.data)
    pixels = SampleCache(store, range(len(store)), torch.device("cpu"))
    return list(epoch_batches(pixels, range(len(store)), recipe.train, recipe.augment, epoch, rank, ranks, first))


def test_an_epoch_holds_every_sample_once(store_workspace, tiny):
    seen = [stem for batch in batches(store_workspace, tiny) for stem in batch.stems]
    assert sorted(seen) == [f"sample_{index:04}" for index in range(10)]
    other = [stem for batch in batches(store_workspace, tiny, epoch=1) for stem in batch.stems]
    assert sorted(other) == sorted(seen) and other != seen  # another order every epoch


def test_shapes_ranges_and_the_short_last_batch(store_workspace, tiny):
    *_, last = made = batches(store_workspace, tiny)
    assert len(made) == steps_per_epoch(10, 4) == 3
    assert made[0].images.shape == (4, 64, 64, 3) and made[0].masks.shape == (4, 64, 64)
    assert made[0].images.dtype == made[0].masks.dtype == torch.uint8
    assert torch.all(made[0].low < made[0].high)
    assert (last.total, last.images.shape[0]) == (2, 2)


def test_ranks_cut_the_same_batches(store_workspace, tiny):
    """What one process sees is what three see together, augmentation included; padding has weight 0."""
    alone = batches(store_workspace, tiny)
    shares = [batches(store_workspace, tiny, rank, 3) for rank in range(3)]
    for step, whole in enumerate(alone):
        parts = [share[step] for share in shares]
        assert {part.images.shape[0] for part in parts} == {2}  # of 4, and of the 2 of the last batch
        assert {part.total for part in parts} == {whole.total}
        real = torch.cat([part.weights for part in parts]).bool()
        assert torch.equal(torch.cat([part.images for part in parts])[real], whole.images)
        assert torch.equal(torch.cat([part.masks for part in parts])[real], whole.masks)
        assert torch.equal(torch.cat([part.changes.gain for part in parts])[real], whole.changes.gain)


def test_beginning_within_an_epoch_gives_the_rest_of_it(store_workspace, tiny):
    whole, rest = batches(store_workspace, tiny), batches(store_workspace, tiny, first=1)
    assert [batch.stems for batch in rest] == [batch.stems for batch in whole[1:]]
    assert torch.equal(rest[0].images, whole[1].images)


def test_a_batch_holds_its_samples_pixels_and_range(store_workspace, tiny):
    store = open_store(store_workspace, tiny.data)
    batch = batches(store_workspace, tiny)[1]
    for position, stem in enumerate(batch.stems):
        index = [sample["stem"] for sample in store.samples].index(stem)
        assert torch.equal(batch.images[position], torch.from_numpy(store.image(index)))
        assert torch.equal(batch.masks[position], torch.from_numpy(store.mask(index)))
        entry = store.samples[index]
        assert (batch.low[position], batch.high[position]) == (entry["min"], entry["max"])


def test_rank_share_by_hand():
    assert rank_share([7, 8, 9], 0, 2) == ([7, 8], [1, 1])
    assert rank_share([7, 8, 9], 1, 2) == ([9, 7], [1, 0])
    assert rank_share([7], 3, 4) == ([7], [0])
    assert rank_share([7], 0, 1, least=2) == ([7, 7], [1, 0])
    assert rank_share([7, 8, 9], 1, 4, least=2) == ([9, 7], [1, 0])
    assert rank_share([7, 8, 9], 3, 4, least=2) == ([7, 7], [0, 0])


def test_no_share_of_a_batch_is_a_single_image_unless_all_are(store_workspace, tiny):
    """Nine images in batches of four leave one over, which DeepLabV3+ could not normalise alone."""
    store = open_store(store_workspace, tiny.data)
    pixels = SampleCache(store, range(9), torch.device("cpu"))
    *_, last = epoch_batches(pixels, range(9), tiny.train, tiny.augment, 0, 0, 1)
    assert (last.total, last.images.shape[0], last.weights.tolist()) == (1, 2, [1, 0])
    assert last.stems[0] == last.stems[1]
    one = tiny.model_copy(update={"train": tiny.train.model_copy(update={"batch": 1})})
    assert {batch.images.shape[0] for batch in epoch_batches(pixels, range(9), one.train, one.augment, 0, 0, 1)} == {1}


def one_by_one(workspace, recipe):
    """The batches of an epoch, of one image each."""
    store = open_store(workspace, recipe.data)
    train = recipe.train.model_copy(update={"batch": 1})
    cache = SampleCache(store, range(len(store)), torch.device("cpu"))
    return epoch_batches(cache, range(len(store)), train, recipe.augment, 0, 0, 1)


def test_a_batch_is_kept_until_the_ring_comes_round(store_workspace, tiny):
    batches = one_by_one(store_workspace, tiny)
    held = next(batches)
    images, masks = held.images.clone(), held.masks.clone()
    for _ in range(BUFFERS - 1):
        next(batches)
        assert torch.equal(held.images, images) and torch.equal(held.masks, masks)
    again = next(batches)
    assert again.images.data_ptr() == held.images.data_ptr()  # and no more memory is taken than that
    assert again.masks.data_ptr() == held.masks.data_ptr()


def test_a_slow_step_sees_its_own_batch_while_later_ones_are_made(store_workspace, tiny):
    store = open_store(store_workspace, tiny.data)
    index = {sample["stem"]: position for position, sample in enumerate(store.samples)}
    for batch in prefetch(one_by_one(store_workspace, tiny)):
        time.sleep(0.03)  # in which the thread makes as many as it may
        assert torch.equal(batch.images[0], torch.from_numpy(store.image(index[batch.stems[0]])))


def test_the_short_last_batch_leaves_room_for_whole_ones(store_workspace, tiny):
    store = open_store(store_workspace, tiny.data)
    cache = SampleCache(store, range(10), torch.device("cpu"))
    for count in (2, 4, 3) * BUFFERS:
        images, masks = cache.take(range(count), [(0,)] * count)
        assert images.shape == (count, 64, 64, 3) and masks.shape == (count, 64, 64)
        assert torch.equal(images[-1], torch.from_numpy(store.image(count - 1)))


def test_a_wrong_size_has_no_store(store_workspace):
    with pytest.raises(ValueError, match="stas preprocess"):
        open_store(store_workspace, Data(size=(96, 96)))


@pytest.fixture(scope="module")
def scaled_store(tmp_path_factory) -> Store:
    """Larger than the window of 64 x 64, smaller on one side, on both, and of a single pixel."""
    return build_scaled(tmp_path_factory.mktemp("scaled") / "key", 1.0, [(90, 200), (40, 130), (20, 9), (1, 1)])


def windows(store, recipe, epoch=0, rank=0, ranks=1) -> list[Batch]:
    cache = SampleCache(store, range(len(store)), torch.device("cpu"), recipe.data.size)
    return list(epoch_batches(cache, range(len(store)), recipe.train, recipe.augment, epoch, rank, ranks))


def test_a_training_window_is_a_part_of_its_sample(scaled_store, tiny):
    places = set()
    for epoch in range(20):
        (batch,) = windows(scaled_store, tiny, epoch)
        assert batch.images.shape == (4, 64, 64, 3) and batch.masks.shape == (4, 64, 64)
        position = batch.stems.index("s0")
        whole_image, whole_mask = scaled_store.image(0), scaled_store.mask(0)
        first = batch.images[position, 0, 0].numpy()
        found = [
            (top, left)
            for top, left in np.argwhere((whole_image == first).all(-1)).tolist()
            if np.array_equal(whole_image[top : top + 64, left : left + 64], batch.images[position].numpy())
        ]
        ((top, left),) = found
        assert np.array_equal(whole_mask[top : top + 64, left : left + 64], batch.masks[position].numpy())
        places.add((top, left))
    assert len(places) > 15


def test_a_training_window_depends_on_seed_epoch_and_index_alone(scaled_store, tiny):
    (alone,), (again,) = windows(scaled_store, tiny), windows(scaled_store, tiny)
    assert torch.equal(alone.images, again.images)
    shares = [windows(scaled_store, tiny, rank=rank, ranks=2)[0] for rank in range(2)]
    assert torch.equal(torch.cat([share.images for share in shares]), alone.images)
    assert torch.equal(torch.cat([share.masks for share in shares]), alone.masks)
    other = windows(scaled_store, tiny, epoch=1)[0]
    one, two = alone.stems.index("s0"), other.stems.index("s0")
    assert not torch.equal(alone.images[one], other.images[two])


def test_windows_leave_the_other_draws_as_they_were(scaled_store, tiny):
    (batch,) = windows(scaled_store, tiny)
    seeds = [(tiny.train.seed, 0, int(stem[1:])) for stem in batch.stems]
    assert torch.equal(batch.changes.gain, draw_changes(tiny.augment, seeds).gain)


@pytest.mark.parametrize(("index", "rows", "columns"), [(1, 40, 64), (2, 20, 9), (3, 1, 1)])
def test_an_image_smaller_than_the_window_is_reflected_around(scaled_store, tiny, index, rows, columns):
    (batch,) = windows(scaled_store, tiny)
    position = batch.stems.index(f"s{index}")
    image, mask = batch.images[position].numpy(), batch.masks[position].numpy()
    top, left = (64 - rows) // 2, (64 - columns) // 2
    inner = image[top : top + rows, left : left + columns]
    assert np.array_equal(
        np.pad(inner, ((top, 64 - rows - top), (left, 64 - columns - left), (0, 0)), "symmetric"), image
    )
    if columns < 64:
        assert np.array_equal(inner, scaled_store.image(index))
        assert np.array_equal(mask[top : top + rows, left : left + columns], scaled_store.mask(index))


def test_drawn_windows_reach_every_place():
    drawn = [draw_window((10, 7), (8, 5), (0, 0, number, 1)) for number in range(300)]
    assert {(box.top, box.left) for box in drawn} == {(top, left) for top in range(3) for left in range(3)}
    assert {(box.height, box.width) for box in drawn} == {(8, 5)}
    assert draw_window((4, 9), (8, 9), (0,)) == Box(0, 0, 4, 9)
