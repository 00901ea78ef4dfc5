"""Area averages, by hand and against torch."""

import tracemalloc

import numpy as np
import pytest
import torch

from stas.data.resize import area_resize, reflect
from tests.support.stores import picture


def area(array: np.ndarray, size) -> np.ndarray:
    """The resize of torch, of an array (h, w, c)."""
    tensor = torch.from_numpy(array.astype(np.float64)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(tensor, size=size, mode="area")[0].permute(1, 2, 0).numpy()


def test_area_resize_by_hand():
    halves = area_resize(np.array([[0, 4, 10, 20], [8, 0, 30, 40]], np.uint8), (1, 2))
    assert halves.tolist() == [[3, 25]]
    thirds = area_resize(np.array([[6, 30, 90]], np.uint8), (1, 2))  # the middle pixel counts fully on both sides
    assert thirds.tolist() == [[18, 60]]
    larger = area_resize(np.array([[0, 10]], np.uint8), (1, 3))
    assert larger.tolist() == [[0, 5, 10]]
    assert area_resize(np.array([[True, False]]), (1, 1)).tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((94, 171), (80, 80)),
        ((50, 70), (64, 200)),
        ((33, 65), (32, 32)),
        ((800, 900), (32, 33)),
        ((7, 5), (7, 5)),
        ((2, 3000), (32, 9)),
    ],
)
def test_area_resize_is_that_of_torch(before, after):
    image, mask = picture(0, *before)
    assert np.abs(area_resize(image, after) - area(image, after)).max() < 1e-4
    assert np.abs(area_resize(mask, after) - area(mask[..., None], after)[..., 0]).max() < 1e-6
    values = (image / 255).astype(np.float32)
    assert np.abs(area_resize(values, after) - area(values, after)).max() < 1e-6
    assert area_resize(image, after).dtype == np.float32


@pytest.mark.parametrize("after", [100, 150])
def test_area_resize_finds_a_single_row_of_a_mask_wherever_it_is(after):
    for row in range(130):
        mask = np.zeros((130, 3), bool)
        mask[row, 1] = True
        expected = area(mask[..., None], (after, 2))[..., 0]
        assert np.abs(area_resize(mask, (after, 2)) - expected).max() < 1e-6


@pytest.mark.parametrize("before", [(65_535, 1), (1, 65_535), (3000, 1000)])
def test_area_resize_works_in_blocks(before):
    image = np.zeros((*before, 3), np.uint8)
    tracemalloc.start()
    try:
        area_resize(image, (800, 800), scale=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_reflection_by_hand():
    row = np.array([[1, 2]], np.uint8)
    assert reflect(row, (1, 2)).tolist() == [[1, 2]]
    assert reflect(row, (1, 5)).tolist() == [[1, 1, 2, 2, 1]]  # the odd column goes to the right
    assert reflect(row, (2, 1)).tolist() == [[1, 2], [1, 2]]
    assert reflect(np.dstack([row, 3 * row]), (1, 3)).tolist() == [[[1, 3], [2, 6], [2, 6]]]
