"""Rectangles of an image, and the tiles in which it is stored."""

from collections.abc import Iterator
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def within(self, outer: "Box") -> bool:
        """Whether this box is not empty and lies inside `outer`."""
        down = outer.top <= self.top and 1 <= self.height <= outer.top + outer.height - self.top
        return down and outer.left <= self.left and 1 <= self.width <= outer.left + outer.width - self.left

    def common(self, other: "Box") -> "Box":
        """The intersection with `other`; they must overlap."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom = min(self.top + self.height, other.top + other.height)
        right = min(self.left + self.width, other.left + other.width)
        return Box(top, left, bottom - top, right - left)

    def slices(self, outer: "Box") -> tuple[slice, slice]:
        """Its slices in an array of the pixels of `outer`."""
        top, left = self.top - outer.top, self.left - outer.left
        return slice(top, top + self.height), slice(left, left + self.width)


def whole(shape: tuple[int, int]) -> Box:
    """The box of a whole image of this (height, width)."""
    return Box(0, 0, *shape)


def tiles(shape: tuple[int, int], side: tuple[int, int], box: Box) -> Iterator[tuple[str, Box]]:
    """Yield the tiles that a box overlaps.

    Args:
        shape: (height, width) of the image in pixels.
        side: (height, width) of a tile; the last of a row or column may be smaller.
        box: must be within the image.

    Yields:
        The tile's name, which is its row and column among the tiles, and its box in the image.
    """
    for row in range(box.top // side[0], -(-(box.top + box.height) // side[0])):
        for column in range(box.left // side[1], -(-(box.left + box.width) // side[1])):
            top, left = row * side[0], column * side[1]
            yield f"{row}/{column}", Box(top, left, min(side[0], shape[0] - top), min(side[1], shape[1] - left))
