"""The entry point: what the current directory cannot do, and signals from the first line to the last."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from stas.config import Recipe
from stas.errors import EXIT_OK, EXIT_RESUMABLE
from stas.paths import Workspace
from tests.support.launch import PATIENCE, QUIET, started, wait_until

ROOT = Path(__file__).parents[1]
# Modules that Python, torch or stas import: from the standard library, compiled ones, packages, and stas itself.
SHADOWS = ("yaml", "torch", "numpy", "signal", "random", "psutil", "argparse", "multiprocessing", "runpy", "pkgutil")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A current directory whose modules leave a file beside it if they are run."""
    directory = tmp_path / "cwd"
    directory.mkdir()
    code = (
        "import os\nopen({!r} + __name__.partition('.')[0], 'w').write(str(os.getpid()))\nraise ImportError('trap')\n"
    )
    for name in SHADOWS:
        (directory / f"{name}.py").write_text(code.format(f"{tmp_path}/ran-"))
    (directory / "stas").mkdir()
    (directory / "stas" / "__init__.py").write_text(code.format(f"{tmp_path}/ran-"))
    return directory


def caught(trap: Path) -> list[str]:
    return sorted(path.name for path in trap.parent.glob("ran-*"))


def run_in(trap: Path, *line: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    variables = inherited | QUIET | environment
    variables.setdefault("PYTHONPATH", str(ROOT))
    return subprocess.run(
        list(map(str, line)), cwd=trap, env=variables, capture_output=True, text=True, timeout=PATIENCE
    )


def script(directory: Path) -> Path:
    """What pip makes of the entry point in pyproject.toml."""
    found = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("stas = "))
    module, name = found.split('"')[1].split(":")
    path = directory / "bin" / "stas"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {name}\n"
        f"if __name__ == '__main__':\n    sys.exit({name}())\n"
    )
    path.chmod(0o755)
    return path


def test_python_m_runs_nothing_of_the_current_directory(trap: Path):
    # Python imports these before it comes to our first line: only -P helps.
    for name in ("runpy.py", "pkgutil.py", "stas/__init__.py"):
        (trap / name).unlink()
    (trap / "stas").rmdir()
    done = run_in(trap, sys.executable, "-m", "stas", "recipes")
    assert done.returncode == EXIT_OK and not caught(trap), done.stderr


@pytest.mark.parametrize("path", [f":{ROOT}", f"{ROOT}:", f".:{ROOT}"])
def test_an_empty_entry_of_pythonpath_does_not_stand_for_the_current_directory(trap: Path, path: str):
    for name in ("runpy.py", "pkgutil.py", "signal.py", "stas/__init__.py"):
        (trap / name).unlink()
    (trap / "stas").rmdir()
    done = run_in(trap, script(trap.parent), "launch", "recipes", PYTHONPATH=path)
    assert done.returncode == EXIT_OK and not caught(trap), done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no -P")
def test_python_p_m_runs_nothing_of_the_current_directory(trap: Path):
    done = run_in(trap, sys.executable, "-P", "-m", "stas", "recipes")
    assert done.returncode == EXIT_OK and not caught(trap), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 starts helpers that look there")
def test_a_stage_and_its_workers_run_nothing_of_the_current_directory(trap: Path, sample: Path):
    training = ["--images", sample / "Train_Images", "--annotations", sample / "Train_Annotations"]
    made = ["--recipe", "lite0", "--set", "data.size=64", "--workers", 2, "--workspace", trap.parent / "workspace"]
    done = run_in(trap, script(trap.parent), "launch", "preprocess", *training, *made)
    assert done.returncode == EXIT_OK and not caught(trap), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "infer"])
def test_ranks_run_nothing_of_the_current_directory(stage: str, trap: Path, sample: Path):
    wanted = ["--recipe", "lite0"] if stage == "train" else ["--run", "none", "--images", sample / "Train_Images"]
    wanted += ["--workspace", trap.parent / "workspace"]
    done = run_in(trap, script(trap.parent), "launch", "--processes", 2, stage, *wanted)
    assert not caught(trap), done.stderr
    assert "preprocess" in done.stderr or "none" in done.stderr, "the ranks did not get as far as their stage"


def endless(recipe: Recipe, directory: Path) -> Path:
    values = recipe.model_dump(mode="json")
    values["train"]["epochs"] = 100_000
    path = directory / "endless.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether a process catches SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("seconds", [0, 0.1, 0.5, 1, 2, 4, 8])
def test_sigterm_at_any_moment_of_a_training_is_75(
    processes: int, seconds: float, store_workspace: Workspace, tiny: Recipe, tmp_path: Path
):
    line = [
        sys.executable,
        "-m",
        "stas",
        "launch",
        "--processes",
        processes,
        "train",
        "--recipe",
        endless(tiny, tmp_path),
    ]
    line += ["--workspace", store_workspace.root, "--run", f"any-moment-{processes}-{seconds}"]
    with started(list(map(str, line))) as process:
        wait_until(lambda: listens(process), "the first line")
        time.sleep(seconds)
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == EXIT_RESUMABLE and "Traceback" not in said, said
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.3, 1, 2, 3])
def test_sigterm_at_any_moment_of_a_stage_is_75_or_its_own_code(seconds: float, sample: Path, tmp_path: Path):
    line = [sys.executable, "-m", "stas", "launch", "preprocess", "--recipe", "lite0", "--set", "data.size=64"]
    line += ["--workers", 1, "--images", sample / "Train_Images", "--annotations", sample / "Train_Annotations"]
    with started([*map(str, line), "--workspace", str(tmp_path)]) as process:
        wait_until(lambda: listens(process), "the first line")
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[1]
    published = any((tmp_path / "stores").glob("*/manifest.json"))
    assert process.returncode == (EXIT_OK if published else EXIT_RESUMABLE) and "Traceback" not in said, said
