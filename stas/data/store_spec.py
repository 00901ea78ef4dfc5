"""The parameters of a store. Recipes with the same ones share a store, however else they differ."""

from dataclasses import dataclass

from stas.config import Data

TILE = 512, 512  # 0.8 MB: a window of 800 x 800 overlaps seven on average, and their other pixels are read in vain


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """Labels, and the size or scale at which images and masks are stored.

    Attributes:
        labels: each has its own masks in the store.
        size: (height, width) in pixels of every stored image; None if there is a scale.
        scale: factor from the original's height and width to the stored image's, above 0, up to 1; None if there is a
            size.
    """

    labels: tuple[str, ...]
    size: tuple[int, int] | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        assert self.labels
        assert (self.size is None) != (self.scale is None)

    def __str__(self) -> str:
        """The text for messages; sizes are width x height."""
        where = f"{self.size[1]} x {self.size[0]} pixels" if self.size else f"scale {self.scale}"
        return f"label {', '.join(self.labels)} at {where}"

    @property
    def form(self) -> str:
        """The size (height x width) or scale, as part of a file's name."""
        return f"{self.size[0]}x{self.size[1]}" if self.size else f"scale{self.scale}"

    @property
    def tile(self) -> tuple[int, int]:
        """(height, width) of a tile in pixels. Images that are always read whole are one tile."""
        return self.size or TILE

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which an image of this height and width is stored."""
        if self.size:
            return self.size
        assert self.scale
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))


def store_spec(data: Data) -> StoreSpec:
    """The spec of a recipe's store."""
    return StoreSpec((data.label,), None if data.scale else data.size, data.scale)
