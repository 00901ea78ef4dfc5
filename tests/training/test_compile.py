"""Training with torch.compile, and without it where compiling fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from stas.config import Recipe
from stas.paths import Workspace
from stas.training.metrics_log import read_metrics
from tests.support.launch import PATIENCE, stas
from tests.support.runs import changed, recipe_file

pytestmark = pytest.mark.slow


def losses(workspace: Workspace, run: str) -> list[float]:
    return [record["train_loss"] for record in read_metrics(workspace.run(run).metrics)]


def train(workspace: Workspace, recipe: Recipe, run: str, directory: Path, *options: str, **environment: str) -> str:
    again = ["train", "--recipe", recipe_file(recipe, directory), "--workspace", workspace.root, "--run", run, *options]
    done = stas(*again, ranks=0, **environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_compiled_it_learns_the_same_and_without_a_compiler_too(
    store_workspace: Workspace, tiny: Recipe, tmp_path: Path
):
    train(store_workspace, tiny, "eager", tmp_path)
    recipe = changed(tiny, train={"compile": True})
    train(store_workspace, recipe, "compiled", tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "one"))
    assert list((tmp_path / "one").rglob("*.so")), "nothing was compiled"
    log = train(
        store_workspace, recipe, "broken", tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "two"), CXX="/bin/false"
    )
    assert "WON'T CONVERT" in log
    assert losses(store_workspace, "broken") == losses(store_workspace, "eager")
    assert losses(store_workspace, "compiled") == pytest.approx(losses(store_workspace, "eager"), abs=1e-3)


def test_only_batches_of_one_size_are_compiled():
    code = (
        "import torch; from stas.models.network import Compiled\n"
        "from torch._dynamo.utils import counters\n"
        "network = Compiled(torch.nn.Conv2d(3, 1, 3), batch=4)\n"
        "for batch in (3, 4, 4, 2, 4): assert network(torch.ones(batch, 3, 8, 8)).shape[0] == batch\n"
        "assert len(list(network.parameters())) == 2\n"
        "print(counters['stats']['unique_graphs'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "1\n", done.stderr


def test_near_the_time_limit_nothing_is_compiled(store_workspace: Workspace, tiny: Recipe, tmp_path: Path):
    recipe = changed(tiny, train={"compile": True})
    log = train(store_workspace, recipe, "limited", tmp_path, "--time-limit", "599s")
    assert "not compiled, because only 599 s" in log
