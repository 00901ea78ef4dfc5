"""Shared fixtures."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

# One thread per process, set before torch is imported. The last digits of sums depend on the number of threads, and
# the tests compare runs of this process bit for bit with those of others (`QUIET` in tests/support/launch.py).
os.environ["OMP_NUM_THREADS"] = "1"

from scripts.make_sample import make_sample
from stas.config import Recipe
from stas.paths import Workspace
from stas.preprocess import preprocess
from stas.recipe import parse_recipe
from tests.support.containers import base_image, image  # noqa: F401  fixtures
from tests.support.runs import TINY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how to repeat the order of this run, because pytest-randomly prints nothing with -q."""
    seed = config.getoption("randomly_seed", None)
    if config.getoption("randomly_reorganize", False):
        terminalreporter.write_line(f"random order: --randomly-seed={seed} repeats it")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images, annotations and published masks, which are not part of the repository."""
    root = Path(os.environ.get("STAS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data" / "stas"))
    if not (root / "Predictions").is_dir():
        pytest.skip(f"no real images at {root}; set STAS_TEST_DATA to a directory with Train_Images and Predictions")
    return root


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small generated images with annotations."""
    root = tmp_path_factory.mktemp("sample")
    make_sample(root, images=10, seed=1, scale=0.3)
    return root


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """A recipe that trains in a second."""
    return parse_recipe(TINY, "conftest")


@pytest.fixture(scope="session")
def prepared(sample: Path, tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The workspace whose store all others share; nothing else is written to it."""
    workspace = Workspace(tmp_path_factory.mktemp("prepared"))
    preprocess([sample / "Train_Images"], [sample / "Train_Annotations"], workspace, tiny.data, workers=1)
    return workspace


@pytest.fixture(scope="session")
def new_workspace(prepared: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Workspace]:
    """Return a function that makes a workspace with only the sample's store."""

    def make() -> Workspace:
        workspace = Workspace(tmp_path_factory.mktemp("workspace"))
        shutil.copytree(prepared.stores, workspace.stores, copy_function=_copy_or_link)
        return workspace

    return make


@pytest.fixture
def store_workspace(new_workspace: Callable[[], Workspace]) -> Workspace:
    """This test's own workspace with the sample's store; no other test sees its runs and predictions."""
    return new_workspace()


def _copy_or_link(source: str, target: str) -> None:
    """Copy a store's small files, and link its data with a symbolic link.

    A store resolves the link before it opens the file, so a process maps the data once for all workspaces.
    """
    if source.endswith(".mdb"):
        Path(target).symlink_to(source)
    else:
        shutil.copy2(source, target)
