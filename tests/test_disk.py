"""Full and read-only volumes, made for real where root may mount; the calls one by one are in test_chaos.py."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stas.config import Recipe
from stas.files import disk_trouble, exchange
from stas.infer import infer
from stas.paths import Workspace
from stas.preprocess import preprocess
from stas.train import train
from tests.launch import stas
from tests.test_train import recipe_file

pytestmark = pytest.mark.slow


def test_only_what_a_person_can_mend_is_told_without_traceback():
    told = disk_trouble(OSError(errno.ENOSPC, "No space left on device", "/tmp/gone/a.png"))
    assert told and told.startswith("/tmp/gone/a.png: No space left on device (") and "the same command goes on" in told
    assert disk_trouble(OSError(errno.EROFS, "Read-only file system")) is not None
    assert disk_trouble(OSError(errno.EBADF, "Bad file descriptor")) is None
    assert disk_trouble(OSError("no number")) is None


def test_exchange(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    assert not exchange(tmp_path / "a", tmp_path / "none")


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, without room for more than a workspace of the tests."""
    directory = tmp_path / "volume"
    directory.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", directory], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def remount(directory: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", directory], check=True)


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
    """A workspace with a store, a run and three sets of predictions."""
    workspace = Workspace(tmp_path_factory.mktemp("finished"))
    preprocess([sample / "Train_Images"], [sample / "Train_Annotations"], workspace, tiny.data, workers=1)
    train(tiny, workspace, "member")
    for name in ("one", "two", "three"):
        infer("member", sample / "Train_Images", workspace, name)
    return workspace


@pytest.mark.parametrize("stage", ["preprocess", "train", "infer", "vote", "evaluate"])
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_volume_that_cannot_be_written(volume, finished, sample, tiny, tmp_path, stage, kind):
    workspace = volume / "ws"
    shutil.copytree(finished.root, workspace)
    if stage == "preprocess":
        shutil.rmtree(workspace / "stores")
    command = stages(sample, recipe_file(tiny, tmp_path), workspace)[stage]
    before = content(workspace)
    if kind == "full":
        for size in (1 << 20, 4096):
            with (volume / f"filler{size}").open("wb", buffering=0) as filler:
                while True:
                    try:
                        filler.write(bytes(size))
                    except OSError:
                        break
        os.truncate(volume / "filler1048576", max(0, (volume / "filler1048576").stat().st_size - 40960))
    else:
        remount(volume, "ro")
    done = stas(*command)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    words = "No space left on device .* MiB are free" if kind == "full" else "Read-only file system: mount the volume"
    assert re.search(rf"^stas: {volume}.*{words}", done.stderr, re.M), done.stderr
    after = content(workspace)
    assert {name: after[name] for name in before} == before
    if kind == "full":
        for filler in volume.glob("filler*"):
            filler.unlink()
    else:
        remount(volume, "rw")
    done = stas(*command)
    assert done.returncode == 0, done.stderr
    assert not list(workspace.rglob(".*"))
