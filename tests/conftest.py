"""Shared fixtures."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images, annotations and published masks, which are not part of the project."""
    root = Path(os.environ.get("STAS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data" / "stas"))
    if not (root / "Predictions").is_dir():
        pytest.skip(f"no real images at {root}; set STAS_TEST_DATA to a directory with Train_Images and Predictions")
    return root
