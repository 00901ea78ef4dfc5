"""Readings of memory and GPUs."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from stas.system import resources
from stas.system.resources import cgroup_memory, cores, usage, visible_gpus


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_usage_reads_this_process_and_node():
    readings = usage()
    assert all(isinstance(value, float) for value in readings.values())
    assert readings["host_rss_gib"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.2)
    assert readings["host_total_gib"] == psutil.virtual_memory().total / 2**30
    assert 0 < readings["host_available_gib"] < readings["host_total_gib"]


def test_usage_reads_shared_memory(monkeypatch: pytest.MonkeyPatch):
    """The readings are given: other processes, of other tests too, use the real memory meanwhile."""
    readings = {"/dev/shm": SimpleNamespace(total=64 * 2**30, used=8 * 2**20, free=0)}
    monkeypatch.setattr(resources.shutil, "disk_usage", readings.__getitem__)
    assert {key: value for key, value in usage().items() if key.startswith("shm")} == {
        "shm_total_gib": 64.0,
        "shm_used_gib": 8 / 1024,
    }


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this system")
def test_usage_reads_the_shared_memory_of_this_machine():
    readings = usage()
    assert 0 <= readings["shm_used_gib"] <= readings["shm_total_gib"]


def test_a_missing_reading_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def missing(path: str):
        raise FileNotFoundError(path)

    monkeypatch.setattr(resources.shutil, "disk_usage", missing)
    monkeypatch.setitem(sys.modules, "psutil", None)  # importing it raises ImportError
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert not [key for key in usage() if key.startswith(("host_", "shm_", "gpu"))]


def test_cgroup_version_2_takes_the_tightest_parent(tmp_path: Path):
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    root = _tree(
        tmp_path / "fs",
        {
            "job/step/memory.max": "max\n",
            "job/memory.max": "3000\n",
            "job/memory.current": "1200\n",
            "memory.max": "9000\n",
            "memory.current": "8000\n",
        },
    )
    assert cgroup_memory(tmp_path / "cgroup", root) == (1200, 3000)


def test_cgroup_version_1_knows_its_sign_for_no_limit(tmp_path: Path):
    (tmp_path / "cgroup").write_text("5:devices:/x\n4:cpuset,memory:/job\n0::/\n")
    root = _tree(tmp_path / "fs", {"memory/job/memory.limit_in_bytes": "9223372036854771712\n"})
    assert cgroup_memory(tmp_path / "cgroup", root) is None
    _tree(
        root, {"memory/job/memory.limit_in_bytes": "4096\n", "memory/job/memory.usage_in_bytes": "1024\n"}
    )  # limited now
    assert cgroup_memory(tmp_path / "cgroup", root) == (1024, 4096)


def test_cgroup_of_a_container_is_the_root(tmp_path: Path):
    (tmp_path / "cgroup").write_text("0::/kubepods/pod1/not-visible-inside\n")
    root = _tree(tmp_path / "fs", {"memory.max": "2048", "memory.current": "7"})
    assert cgroup_memory(tmp_path / "cgroup", root) == (7, 2048)


def test_no_cgroups_at_all(tmp_path: Path):
    assert cgroup_memory(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2,0", [2, 0]),
        ("1,7,0", [1]),  # 7 is no GPU of four: CUDA ignores it and all after it
        ("-1", []),
        ("GPU-8f6c, MIG-12", ["GPU-8f6c", "MIG-12"]),
    ],
)
def test_visible_gpus(visible: str | None, expected: list[int | str]):
    assert visible_gpus(4, visible) == expected


class FakeNvml(ModuleType):
    """NVIDIA's library on a node with two GPUs, the second of which, like a MIG instance, reports no utilisation."""

    class NVMLError(Exception):
        pass

    open = 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int):
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int):
        return SimpleNamespace(used=(handle + 1) * 2**30, total=32 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: int):
        if handle == 1:
            raise self.NVMLError("not supported")
        return SimpleNamespace(gpu=87)


def test_gpus_are_numbered_as_cuda_shows_them(monkeypatch: pytest.MonkeyPatch):
    fake = FakeNvml("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert {key: value for key, value in usage().items() if key.startswith("gpu")} == {
        "gpu0_used_gib": 2.0,
        "gpu0_total_gib": 32.0,
        "gpu1_used_gib": 1.0,
        "gpu1_total_gib": 32.0,
        "gpu1_util_percent": 87.0,
    }
    assert fake.open == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"pod/cpu.max": "150000 100000\n"}, 2),  # a core and a half: two threads
        ({"pod/cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "100000 100000\n", "pod/cpu.max": "400000 100000\n"}, 1),  # the parent binds
        ({"cpu/pod/cpu.cfs_quota_us": "300000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/pod/cpu.cfs_quota_us": "-1\n", "cpu/pod/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_cores_are_those_of_the_container(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    membership = tmp_path / "membership"
    membership.write_text("3:cpu,cpuacct:/pod\n" if any(name.startswith("cpu/") for name in files) else "0::/pod\n")
    assert cores(membership, tmp_path) == expected


def test_freed_memory_is_kept():
    """Pages that the process had to ask for while it makes and forgets 8 MB, fifty times."""
    code = (
        "import resource, sys, numpy; from stas.system.resources import keep_freed_memory\n"
        "if sys.argv[1:]: keep_freed_memory()\n"
        "numpy.ones(2**20), numpy.ones(2**20)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(50): numpy.ones(2**20), numpy.ones(2**20)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    command = [sys.executable, "-c", code]
    given_back, kept = (int(subprocess.check_output([*command, *extra])) for extra in ([], ["keep"]))
    assert kept < given_back / 10
