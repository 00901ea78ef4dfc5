"""Shared fixtures."""

import os
from pathlib import Path

import pytest

# One thread a process, before torch is imported: sums differ in their last digits with the number of threads, and the
# tests compare runs of this process with those of others (`QUIET` in tests/launch.py) to the bit.
os.environ["OMP_NUM_THREADS"] = "1"

from scripts.make_sample import make_sample
from stas.config import Recipe, parse_recipe
from stas.paths import Workspace
from stas.preprocess import preprocess
from tests.containers import base_image, image  # noqa: F401  fixtures

TINY = {
    "name": "tiny",
    "data": {"size": 64, "split": {"kind": "fraction", "fraction": 0.3}},
    # No batch normalisation, whose statistics are each rank's own: ranks and single process must agree.
    "model": {
        "library": "monai",
        "architecture": "UNet",
        "options": {"channels": [4, 8], "strides": [2], "norm": "INSTANCE", "dropout": 0.1},
    },
    "loss": {"dice": 1.0, "bce": 1.0},
    "optimizer": {"name": "adabelief", "lr": 0.01},
    "augment": {"dihedral": True, "color": 0.5},
    "train": {"batch": 4, "epochs": 2},
}


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images, annotations and published masks, which are not part of the project."""
    root = Path(os.environ.get("STAS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data" / "stas"))
    if not (root / "Predictions").is_dir():
        pytest.skip(f"no real images at {root}; set STAS_TEST_DATA to a directory with Train_Images and Predictions")
    return root


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small made images with annotations."""
    root = tmp_path_factory.mktemp("sample")
    make_sample(root, images=10, seed=1, scale=0.3)
    return root


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """A recipe that trains in a second."""
    return parse_recipe(TINY, "conftest")


@pytest.fixture(scope="session")
def store_workspace(sample: Path, tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with the sample's store; tests that train use runs of their own names."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    preprocess([sample / "Train_Images"], [sample / "Train_Annotations"], workspace, tiny.data, workers=1)
    return workspace
