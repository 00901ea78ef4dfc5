"""What a store is made for. Recipes that agree on it share a store, whatever else they differ in."""

from dataclasses import dataclass

from stas.config import Data

TILE = 512, 512  # 0.8 MB: a window of 800 x 800 lies on seven, on average, and the rest of their pixels is a waste


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """Labels, and the size or the scale at which images and masks are stored.

    Attributes:
        labels: each of them has masks of its own in the store.
        size: (height, width) in pixels of every stored image; None where they have a scale.
        scale: a stored image's share of the original's height and width, above 0, up to 1; None where they have a size.
    """

    labels: tuple[str, ...]
    size: tuple[int, int] | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        assert self.labels
        assert (self.size is None) != (self.scale is None)

    def __str__(self) -> str:
        """As messages say it."""
        where = f"{self.size[0]} x {self.size[1]} pixels" if self.size else f"scale {self.scale}"
        return f"label {', '.join(self.labels)} at {where}"

    @property
    def form(self) -> str:
        """The size or scale as a part of a file's name."""
        return f"{self.size[0]}x{self.size[1]}" if self.size else f"scale{self.scale}"

    @property
    def tile(self) -> tuple[int, int]:
        """(height, width) of a tile in pixels: what is always read whole is stored whole."""
        return self.size or TILE

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which an image of `height` x `width` pixels is stored."""
        if self.size:
            return self.size
        assert self.scale
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))


def store_spec(data: Data) -> StoreSpec:
    """What a recipe's store is made for."""
    return StoreSpec((data.label,), None if data.scale else data.size, data.scale)
