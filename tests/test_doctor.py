"""The report on a machine: each check on hand-made input, and the whole report on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stas import doctor as module
from stas.config import Recipe
from stas.doctor import (
    PACKAGES,
    Driver,
    architecture,
    architecture_supported,
    devices,
    doctor,
    free_space,
    memory,
    no_device,
    packages,
    precision,
    python_version,
    shared_memory,
    weights,
    workspace_findings,
    writable,
)
from stas.recipe import load_recipe

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "arch_list", "supported"),
    [
        ((9, 0), CUDA_13, True),  # exact
        ((8, 6), ["sm_80"], True),  # same major, older minor
        ((8, 0), ["sm_86"], False),  # same major, newer minor
        ((9, 0), ["sm_80", "sm_86"], False),  # binaries do not cross majors
        ((9, 0), ["sm_80", "compute_80"], True),  # PTX runs on newer GPUs
        ((8, 0), ["compute_90"], False),  # but not on older ones
        ((12, 1), CUDA_13, True),
        ((10, 3), ["sm_100"], True),  # two digits before the minor
        ((10, 0), ["sm_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),  # a: exactly that GPU, even for PTX
        ((10, 3), ["sm_100f", "gfx90a"], True),  # f: all of its major version
        ((12, 0), ["compute_100f"], False),
        ((7, 0), CUDA_13, False),  # V100
        ((7, 0), CUDA_12_6, True),
        ((7, 0), [], False),
    ],
)
def test_architecture_supported(capability: tuple[int, int], arch_list: list[str], supported: bool):
    assert architecture_supported(capability, arch_list) is supported


def test_a_v100_on_cuda_13_fails_and_is_sent_to_an_older_image():
    finding = architecture("GPU 0", "Tesla V100", (7, 0), CUDA_13)
    assert finding.status == "FAIL"
    assert "compute capability 7.0, but this torch has code for sm_75 sm_80" in finding.found
    assert "older image" in finding.remedy
    assert "BASE_IMAGE=" in finding.remedy
    assert architecture("GPU 0", "Tesla V100", (7, 0), CUDA_12_6).status == "ok"


def test_a_gpu_newer_than_torch_is_sent_to_a_newer_image():
    finding = architecture("GPU 0", "B200", (10, 0), CUDA_12_6)
    assert finding.status == "FAIL"
    assert "newer image" in finding.remedy


@pytest.mark.parametrize(
    ("driver", "built_for", "status", "found"),
    [
        (None, "13.0", "warn", "none"),
        (Driver("570.1", (12, 8), 0), "13.0", "warn", "none"),  # hidden by CUDA_VISIBLE_DEVICES
        (Driver("570.1", (12, 8), 4), "13.0", "FAIL", "built for CUDA 13.0, and the driver supports CUDA up to 12.8"),
        (Driver("570.1", (12, 8), 4), None, "FAIL", "without CUDA"),
        (Driver("535.1", (12, 2), 1), "12.6", "FAIL", "error 802"),  # same major version: the cause is elsewhere
    ],
)
def test_no_device(driver: Driver | None, built_for: str | None, status: str, found: str):
    finding = no_device(driver, built_for, ["CUDA initialization: error 802\nmore"])
    assert finding.status == status
    assert found in finding.found
    assert finding.remedy


@pytest.mark.parametrize(
    ("wanted", "capabilities", "status", "remedy"),
    [
        ("fp16", [], "warn", "bf16"),
        ("fp16", [(7, 0)], "ok", ""),
        ("bf16", [], "ok", ""),
        ("bf16", [(8, 0), (9, 0)], "ok", ""),
        ("bf16", [(9, 0), (7, 5)], "warn", "fp16"),
        ("fp32", [(7, 0)], "ok", ""),
    ],
)
def test_precision(wanted: str, capabilities: list[tuple[int, int]], status: str, remedy: str):
    finding = precision(wanted, capabilities)
    assert finding.status == status
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("version", "status"), [((3, 9), "FAIL"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "warn"), ((4, 0), "warn")]
)
def test_python_version(version: tuple[int, int], status: str):
    assert python_version(version).status == status


@pytest.mark.parametrize(("gib", "status"), [(None, "warn"), (0.0625, "warn"), (1.0, "ok"), (112.0, "ok")])
def test_shared_memory(gib: float | None, status: str):
    finding = shared_memory(gib)
    assert finding.status == status
    assert ("--shm-size" in finding.remedy) == (status == "warn")


def test_low_memory_and_disk_space_give_warnings():
    assert [memory(gib, "").status for gib in (3.9, 4.0)] == ["warn", "ok"]
    assert [free_space(gib, (800, 800)).status for gib in (4.9, 5.0)] == ["warn", "ok"]
    assert "2.4 MiB per image at 1600 x 400" in free_space(1.0, (400, 1600)).remedy  # 1600 * 400 * 4 / 2**20


def test_packages_are_those_of_pyproject():
    text = (Path(module.__file__).parents[1] / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block
    required = dict(re.findall(r'"([A-Za-z0-9-]+)>=([0-9.]+?)(?:\.0a0)?"', block[1]))  # 2.6.0a0 sorts before 2.6
    assert len(required) == len(block[1].strip().splitlines())
    assert {name: oldest for name, oldest in PACKAGES.items() if oldest} == required


def _installed(directory: Path, name: str, version: str) -> None:
    """Write the metadata of a distribution as pip does."""
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_packages_missing_old_and_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _installed(tmp_path, "torch", "2.6.0a0+df5bbc09d1")  # the version in NVIDIA's image of December 2024
    _installed(tmp_path, "numpy", "1.25.2")
    _installed(tmp_path, "broken_binary", "1.0")
    (tmp_path / "broken_binary.py").write_text("raise OSError('libcudart.so.13: cannot open\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    wanted = {"torch": "2.6", "numpy": "1.26", "broken-binary": "1", "surely-not-installed": "3.1"}
    monkeypatch.setattr(module, "PACKAGES", wanted)
    monkeypatch.setattr(module, "_LOADED", {"broken-binary": "broken_binary"})
    found = {finding.what: finding for finding in packages()}
    assert found["torch"].status == "ok"
    assert (found["numpy"].status, found["numpy"].found) == ("FAIL", "1.25.2, but 1.26 or newer is needed")
    broken = found["broken-binary"]
    assert (broken.status, broken.found) == ("FAIL", "1.0 does not load: OSError: libcudart.so.13: cannot open")
    missing = found["surely-not-installed"]
    assert (missing.status, missing.found) == ("FAIL", "not installed, 3.1 or newer is needed")
    assert all(finding.remedy for finding in found.values() if finding.status == "FAIL")


def test_a_workspace_that_does_not_exist_yet_is_checked_where_it_will_be(tmp_path: Path):
    findings = {finding.what: finding for finding in workspace_findings(tmp_path / "new" / "er", None)}
    assert findings["directory"].found == f"{tmp_path / 'new' / 'er'}, to be created in {tmp_path}, writable"
    assert set(findings) == {"directory", "free disk", "file system"}
    assert not list(tmp_path.iterdir())


def test_a_workspace_that_cannot_be_written_fails(tmp_path: Path):
    (tmp_path / "file").touch()
    finding = writable(tmp_path / "file", tmp_path / "file")  # not even root can make a file in a file
    assert finding.status == "FAIL"
    assert "not writable" in finding.found


def test_a_network_file_system_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kinds = {"nfs4": "warn", "ext4": "ok"}
    for kind, status in kinds.items():
        monkeypatch.setattr("stas.system.filesystems.file_system_type", lambda path, kind=kind: kind)
        (finding,) = [finding for finding in workspace_findings(tmp_path, None) if finding.what == "file system"]
        assert finding.status == status
        assert kind in finding.found
        assert ("STAS_CACHE_DIR" in finding.remedy) == (status == "warn")


def test_weights_are_not_checked_without_a_recipe():
    (finding,) = weights(None)
    assert finding.status == "ok"


def test_weights_that_do_not_exist_fail():
    recipe = Recipe.model_validate({"name": "mine", "model": {"encoder": "tu-resnet18", "weights": "imagenet"}})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"encoder": "tu-no_such_model"})})
    (finding,) = weights(recipe)
    assert finding.status == "FAIL"
    assert "no_such_model" in finding.found
    assert finding.remedy


def test_lite0_can_run_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    can_run = doctor(tmp_path, load_recipe("lite0"))
    report = capsys.readouterr().out
    assert can_run, report
    assert "0 FAIL" in report
    assert not re.search(r"^  FAIL", report, re.MULTILINE)
    for title in ("Software", "Machine", "Devices", "Workspace", "Pretrained weights"):
        assert f"\n{title}\n" in f"\n{report}"
    lines = [line for line in report.splitlines() if re.match(r"  (ok  |warn|FAIL)  ", line)]
    assert len(lines) > 25
    assert all(line[40:42] == "  " and line[42] != " " for line in lines), "columns are not aligned"


@pytest.mark.slow
def test_a_recipe_whose_weights_are_unavailable_fails(tmp_path: Path):
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "STAS_WEIGHTS_DIR"):
        offline.pop(name, None)
    code = (
        "import sys; from stas.recipe import load_recipe; from stas.doctor import doctor; "
        "sys.exit(not doctor(None, load_recipe('efficientnet_b6_ns')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (failure,) = re.findall(r"^  FAIL.*", done.stdout, re.MULTILINE)
    assert "tf_efficientnet_b6" in failure
    assert "STAS_WEIGHTS_DIR" in done.stdout
    assert "recipe efficientnet_b6_ns cannot run here" in done.stdout


def test_gpus_of_two_kinds(monkeypatch: pytest.MonkeyPatch):
    cards = [
        SimpleNamespace(name="Tesla V100-SXM2-32GB", major=7, minor=0, total_memory=32 * 2**30),
        SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30),
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(cards))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: cards[number])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda number: (cards[number].major, cards[number].minor))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: CUDA_13)
    found = {finding.what: finding for finding in devices(load_recipe("lite0", ["train.precision=bf16"]).train)}
    assert found["GPU 0"].status == "FAIL"
    assert found["GPU 0"].found.startswith("Tesla V100-SXM2-32GB, 32.0 GiB")
    assert found["GPU 1"].status == "ok"
    assert found["precision"].status == "warn"  # one of the two lacks bf16
    assert "GPU" not in found


def test_the_report_continues_without_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PACKAGES", {"torch": "2.6"})  # no others: they would stay loaded without torch
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ImportError
    assert doctor(None, None) is False
    report = capsys.readouterr().out
    assert re.search(r"^  FAIL  torch  .*does not load", report, re.MULTILINE)
    assert re.search(r"^  FAIL  devices .*cannot be checked", report, re.MULTILINE)
    assert "\nPretrained weights\n" in report
