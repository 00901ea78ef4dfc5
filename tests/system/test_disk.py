"""Full and read-only volumes, real ones where root may mount. Single calls are in tests/test_chaos.py."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stas.errors import EXIT_FAILED
from stas.system.files import exchange, system_trouble
from tests.support.launch import stas
from tests.support.runs import recipe_file
from tests.support.stages import content, finished, stages  # noqa: F401  a fixture

pytestmark = pytest.mark.slow


def test_what_the_system_refuses_is_told_without_traceback():
    trouble = system_trouble(OSError(errno.ENOSPC, "No space left on device", "/tmp/gone/a.png"))
    assert trouble and trouble[1] == EXIT_FAILED
    assert trouble[0].startswith("/tmp/gone/a.png: No space left on device (")
    assert "run the same command again to resume" in trouble[0]
    assert system_trouble(OSError(errno.EROFS, "Read-only file system")) is not None
    assert system_trouble(OSError("no number")) is None


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


@pytest.mark.parametrize("stage", ["preprocess", "train", "infer", "vote", "evaluate"])
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_volume_that_cannot_be_written(volume, finished, sample, tiny, tmp_path, stage, kind):  # noqa: F811
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
    words = "No space left on device .* MiB free" if kind == "full" else "Read-only file system: mount the volume"
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
