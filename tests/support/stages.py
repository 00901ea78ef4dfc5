"""Every stage as a command, on a workspace that has what each needs."""

from pathlib import Path

import pytest

from stas.config import Recipe
from stas.infer import infer
from stas.paths import Workspace
from stas.preprocess import preprocess
from stas.train import train


def content(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.parts) and "tfevents" not in path.name
    }


def stages(sample: Path, recipe: Path, workspace: Path) -> dict[str, tuple[object, ...]]:
    images, annotations = sample / "Train_Images", sample / "Train_Annotations"
    where = ("--workspace", workspace)
    sets = [workspace / "predictions" / name for name in ("one", "two", "three")]
    return {
        "preprocess": ("preprocess", "--images", images, "--annotations", annotations, "--recipe", recipe, *where),
        "train": ("train", "--recipe", recipe, "--run", "run", *where),
        "infer": ("infer", "--run", "member", "--images", images, *where, "--name", "new"),
        "vote": ("vote", "--members", *sets, "--out", workspace / "vote"),
        "evaluate": ("evaluate", "--predictions", *sets, "--truth", annotations, "--out", workspace / "scores"),
    }


@pytest.fixture(scope="module")
def finished(sample: Path, tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a store, a run and three prediction sets."""
    workspace = Workspace(tmp_path_factory.mktemp("finished"))
    preprocess([sample / "Train_Images"], [sample / "Train_Annotations"], workspace, tiny.data, workers=1)
    train(tiny, workspace, "member")
    for name in ("one", "two", "three"):
        infer("member", sample / "Train_Images", workspace, name)
    return workspace
