"""Resize by area averages, as MONAI does, and pad by reflection."""

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 32  # of the result, so that the sums stay in the CPU cache


def area_resize(
    array: NDArray[np.uint8] | NDArray[np.bool_] | NDArray[np.float32], size: tuple[int, int], scale: int | None = None
) -> NDArray:
    """Resize as MONAI's Resize does in its default mode 'area', which is torch's adaptive_avg_pool2d.

    Output pixel i is the plain mean of input pixels floor(i * in / out) to ceil((i + 1) * in / out), so a pixel on a
    border counts fully on both sides. OpenCV's INTER_AREA weights it by overlap: up to 17 grey levels off.

    Args:
        array: (height, width) or (height, width, channels); smaller or larger than `size`.
        size: (height, width) of the result.
        scale: multiply the result by this and round it to uint8, for storage.

    Returns:
        The same number of dimensions; float32 in the units of `array` (bool as 0 and 1), or uint8 if `scale` is given.
    """
    channels = array.shape[2] if array.ndim == 3 else 1
    top, tall = _bins(array.shape[0], size[0])
    left, wide = _bins(array.shape[1], size[1])
    kind = _sum_type(array.dtype, int(tall.max()) * int(wide.max()))
    starts = (left[:, None] * channels + np.arange(channels)).ravel()
    counts = np.repeat(wide, channels)
    flat = array.reshape(array.shape[0], -1)
    result = np.empty((size[0], len(starts)), np.float32 if scale is None else np.uint8)
    for count in np.unique(tall):
        areas = (count * counts).astype(np.float32)
        rows = np.flatnonzero(tall == count)
        for block in np.split(rows, range(ROWS_AT_ONCE, len(rows), ROWS_AT_ONCE)):
            if array.dtype == np.bool_ and not array[top[block[0]] : top[block[-1]] + count].any():
                result[block] = 0  # most blocks of a mask are empty
                continue
            sums: NDArray = flat.take(top[block], 0).astype(kind)
            for further in range(1, count):
                sums += flat.take(top[block] + further, 0)
            sums = _sum_columns(sums, starts, counts, channels)
            means = np.divide(sums, areas, dtype=np.float32)
            if scale is not None:
                means *= np.float32(scale)
                np.rint(means, out=means)
            result[block] = means
    return result.reshape(*size, *array.shape[2:])


def reflect(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pad pixels, (height, width) or (height, width, channels), by reflection to at least `size` (height, width)."""
    down, across = (max(0, want - have) for want, have in zip(size, pixels.shape, strict=False))
    margins = (down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0)
    # Not numpy's "reflect": it leaves out the edge, so it has nothing to reflect in a single row.
    return np.pad(pixels, margins[: pixels.ndim], mode="symmetric")


def _bins(before: int, after: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The first input pixel and the number of input pixels of each of `after` output pixels."""
    positions = np.arange(after)
    starts = positions * before // after
    return starts, -(-(positions + 1) * before // after) - starts


def _sum_type(kind: np.dtype, count: int) -> type[np.generic]:
    """The narrowest type that can add `count` values of type `kind` exactly."""
    if kind not in (np.uint8, np.bool_):
        return np.float64
    most = count * (255 if kind == np.uint8 else 1)
    return next(sums for sums in (np.uint8, np.uint16, np.uint32, np.uint64) if most <= np.iinfo(sums).max)


def _sum_columns(array: NDArray, starts: NDArray[np.intp], counts: NDArray[np.intp], channels: int) -> NDArray:
    """Sum `counts[i]` entries of each row of a 2-D array, starting at `starts[i]`, in steps of `channels`.

    Fetching single entries is slow. So sum the runs that start at every entry, for both counts that occur, and fetch
    each wanted sum once.
    """
    shorter = int(counts.min())  # the others are longer by one
    length = array.shape[1]
    runs = np.empty((len(array), 2, length), array.dtype)  # entries without enough neighbours are never fetched
    short, long = runs[:, 0], runs[:, 1]
    short[...] = array
    for step in range(channels, shorter * channels, channels):
        short[:, :-step] += array[:, step:]
    step = shorter * channels
    np.add(short[:, :-step], array[:, step:], out=long[:, :-step])
    places = np.where(counts > shorter, starts + length, starts)
    return runs.reshape(len(array), -1).take(places, 1)
