"""One entry point, one list of members, one place for each setting: the launchers must agree and repeat nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from stas.config import Recipe
from stas.ensemble import load_ensemble
from stas.launch import SHUTDOWN_TIMEOUT

ROOT = Path(__file__).parents[1]
SBATCH = sorted((ROOT / "slurm").glob("*.sbatch"))
JOB_FILES = [
    *(ROOT / "slurm").iterdir(),
    *(path for path in (ROOT / "k8s").rglob("*") if path.is_file()),
    *(path for path in (ROOT / "docker").iterdir() if path.is_file() and path.suffix not in (".lock", ".py")),
    ROOT / "scripts" / "submit_slurm",
    ROOT / "scripts" / "submit_k8s",
]
MEMBERS = len(load_ensemble("reference").runs)


def option(path: Path, name: str) -> str | None:
    """An sbatch option in a batch script."""
    found = re.search(rf"^#SBATCH --{name}=(\S+)", path.read_text(), re.MULTILINE)
    return found and found[1]


def job(stage: str) -> dict:
    return yaml.safe_load((ROOT / "k8s" / "base" / f"{stage}.yaml").read_text())


def settings(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every key of a recipe, such as optimizer.lr."""
    names = set()
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        section = isinstance(kind, type) and issubclass(kind, BaseModel)
        names |= settings(kind, f"{prefix}{name}.") if section else {f"{prefix}{name}"}
    return names


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_hyperparameter_in_a_job_file(path: Path):
    text = path.read_text()
    assert "--set" not in text, f"{path}: a recipe is the only place for hyperparameters"
    dotted = [key for key in settings(Recipe) if "." in key and re.search(rf"\b{re.escape(key)}\b", text)]
    # Also the last parts, if they are assigned a value: lr=, epochs: ...
    words = {key.split(".")[-1] for key in settings(Recipe)} - {"name", "summary", "label", "size", "file", "options"}
    given = [word for word in words if re.search(rf"(?<![\w-])(--)?{word}\s*[=:]\s*\"?[\d.\[]", text)]
    assert not dotted and not given, f"{path}: a recipe is the only place for {dotted + given}"


@pytest.mark.parametrize("stage", ["train", "infer"])
def test_an_array_has_one_task_for_each_member(stage: str):
    expected = f"0-{MEMBERS - 1}"
    found = option(ROOT / "slurm" / f"{stage}.sbatch", "array")
    assert found == expected, f"change #SBATCH --array of slurm/{stage}.sbatch to {expected}"


def test_an_indexed_job_has_one_index_for_each_member():
    found = job("train")["spec"]["completions"]
    assert found == MEMBERS, f"change completions in k8s/base/train.yaml to {MEMBERS}"


@pytest.mark.parametrize("stage", ["train", "infer"])
def test_every_launcher_asks_for_the_same_gpus(stage: str):
    container = job(stage)["spec"]["template"]["spec"]["containers"][0]
    slurm = option(ROOT / "slurm" / f"{stage}.sbatch", "gpus-per-node")
    for amounts in container["resources"].values():
        assert amounts["nvidia.com/gpu"] == slurm, f"slurm/{stage}.sbatch and k8s/base/{stage}.yaml differ in GPUs"
        assert amounts["cpu"] == option(ROOT / "slurm" / f"{stage}.sbatch", "cpus-per-task")


def test_overlays_keep_the_number_of_gpus_or_use_none():
    for path in (ROOT / "k8s" / "overlays").rglob("*.yaml"):
        for count in re.findall(r"nvidia\.com/gpu: *\"?([^\s\",}]+)", path.read_text()):
            assert count in (option(ROOT / "slurm" / "train.sbatch", "gpus-per-node"), "null"), path


def test_torchrun_starts_in_one_file():
    files = [*JOB_FILES, *(ROOT / "stas").rglob("*.py"), ROOT / "Makefile", ROOT / "scripts" / "demo"]
    start = re.compile(r"^\s*(exec |srun )?torchrun |(-m|from|import) torch\.distributed\.run", re.MULTILINE)
    assert [path.name for path in files if start.search(path.read_text())] == ["launch.py"]


def test_every_launcher_ends_in_the_same_entry_point():
    assert "python3 -P -m stas launch" in (ROOT / "docker" / "entrypoint.sh").read_text()
    assert 'ENTRYPOINT ["/usr/local/bin/entrypoint.sh"]' in (ROOT / "docker" / "Dockerfile").read_text()
    slurm = (ROOT / "slurm" / "job.sh").read_text()
    assert re.search(r"bare\) launch=\(stas launch\)", slurm) and "entry=/usr/local/bin/entrypoint.sh" in slurm
    for path in SBATCH:
        code = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert all(
            re.match(r'source "\$SLURM_SUBMIT_DIR/slurm/job.sh"|(all_)?predicted$|stage |member=| +--', line)
            for line in code
        ), path
    for path in (ROOT / "k8s").rglob("*.yaml"):
        assert not re.search(r"^\s*(- )?command:", path.read_text(), re.M), (
            f"{path}: the image's entry point, with args"
        )


def test_each_grace_period_is_long_enough_for_its_work():
    pod = yaml.safe_load((ROOT / "k8s" / "base" / "every-job.yaml").read_text())["spec"]["template"]["spec"]
    for path in SBATCH:
        signal = option(path, "signal")
        assert signal and signal.startswith("B:USR1@")
        assert SHUTDOWN_TIMEOUT < pod["terminationGracePeriodSeconds"] < int(signal.removeprefix("B:USR1@")), path


def test_python_does_not_depend_on_a_scheduler():
    for path in (ROOT / "stas").rglob("*.py"):
        assert not re.search(r"SLURM_|JOB_COMPLETION_INDEX|KUBERNETES_", path.read_text()), path


@pytest.mark.parametrize(
    ("variables", "reader"),
    [(r"environ[^\n]*STAS_", "paths.py"), (r"environ[^\n]*\"(RANK|WORLD_SIZE|LOCAL_RANK)", "distributed.py")],
)
def test_locations_and_ranks_are_each_read_in_one_file(variables: str, reader: str):
    readers = [path.name for path in (ROOT / "stas").rglob("*.py") if re.search(variables, path.read_text())]
    assert readers == [reader]
