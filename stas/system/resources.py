"""Resources that this process, its node and its GPUs are using, and how much freed memory malloc keeps.

Unavailable readings are omitted.
"""

import ctypes
import errno
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stas.errors import KEPT

GIB = 2**30
# How torch, LMDB and the dynamic linker say it.
_NO_MEMORY = re.compile("(can't|cannot) allocate memory|not enough memory|std::bad_alloc|failed to map segment", re.I)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def usage() -> dict[str, float]:
    """Take all readings; a missing one never raises.

    Returns:
        Flat mapping; memory in GiB, utilisation in percent of time:
        host_rss_gib (this process), host_used_gib, host_available_gib, host_total_gib (the node),
        cgroup_used_gib and cgroup_limit_gib (only where the limit is below the node's memory),
        shm_used_gib, shm_total_gib, and for each visible GPU gpu0_used_gib, gpu0_total_gib, gpu0_util_percent.
    """
    return {**_host(), **_shared_memory(), **_gpus()}


def cores(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of cores this process may use: its CPU affinity, or its container's CPU limit if that is lower."""
    shares = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for directory in _control_groups("cpu", membership, root):
        # Version 2 says "quota period" in one file, version 1 has a file for each, with a quota of -1 for none.
        names = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota, period = [*" ".join(_text(directory / name) for name in names).split(), "", ""][:2]
        if quota.isdigit() and period.isdigit():
            shares.append(math.ceil(int(quota) / int(period)))
    return max(1, min(shares))


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for the next image, up to 128 MiB in each thread's arena.

    Otherwise each image's arrays are returned to the system and mapped again page by page, which takes as long as
    processing them. Does nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest value it accepts
        mallopt(_TRIM_THRESHOLD, 128 << 20)


def memory_trouble(error: Exception) -> str | None:
    """The problem and its remedy if there was no memory for an array, a thread or a library; None for another error."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or _NO_MEMORY.search(text):
        return (
            f"memory ran out ({text or type(error).__name__}): raise the limit on memory (ulimit -v, or the job's), "
            f"use fewer --workers, or lower train.batch. {KEPT}"
        )
    if isinstance(error, RuntimeError) and "start new thread" in text:
        return (
            f"no thread could be started ({text}): raise the limits on processes (ulimit -u) and memory (ulimit -v), "
            f"or use fewer --workers. {KEPT}"
        )
    return None


def cgroup_memory(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> tuple[int, int] | None:
    """(bytes used, bytes allowed) of the tightest memory limit above this process, cgroup version 1 or 2.

    None if nothing limits the memory.
    """
    found = []
    for directory in _control_groups("memory", membership, root):
        for used_name, limit_name in (
            ("memory.current", "memory.max"),
            ("memory.usage_in_bytes", "memory.limit_in_bytes"),
        ):
            limit = _text(directory / limit_name).strip()
            if limit.isdigit() and int(limit) < 2**60:  # version 1 writes "no limit" as nearly 2**63
                used = _text(directory / used_name).strip()
                found.append((int(limit), int(used) if used.isdigit() else 0))
    if not found:
        return None
    limit, used = min(found)
    return used, limit


def visible_gpus(count: int, visible: str | None) -> list[int | str]:
    """The GPUs visible to CUDA, in its order, as NVML index or UUID.

    Args:
        count: number of GPUs according to NVML.
        visible: CUDA_VISIBLE_DEVICES; None if it is not set. As in CUDA, its first invalid entry ends the list.
    """
    if visible is None:
        return list(range(count))
    gpus: list[int | str] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            gpus.append(entry)
        elif entry.isdigit() and int(entry) < count:
            gpus.append(int(entry))
        else:
            break
    return gpus


@contextmanager
def nvml() -> Iterator[Any]:
    """Open NVIDIA's management library for the block.

    Raises:
        ImportError: the package nvidia-ml-py is missing.
        pynvml.NVMLError: there is no driver.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _control_groups(controller: str, membership: Path, root: Path) -> Iterator[Path]:
    """The directories of this process's control groups, version 1 or 2, from its own up to the root.

    The limits of parents apply too. Inside a container the group's path may not exist under the root; then only the
    root counts.
    """
    for line in _text(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        own = base / group.lstrip("/")
        for directory in (own, *own.parents):
            yield directory
            if directory == base:
                break


def _host() -> dict[str, float]:
    readings: dict[str, float] = {}
    with suppress(Exception):  # psutil has its own exceptions, and may not be installed
        import psutil

        memory = psutil.virtual_memory()
        readings["host_rss_gib"] = psutil.Process().memory_info().rss / GIB
        readings["host_used_gib"] = memory.used / GIB
        readings["host_available_gib"] = memory.available / GIB
        readings["host_total_gib"] = memory.total / GIB
    cgroup = cgroup_memory()
    if cgroup is not None and cgroup[1] / GIB < readings.get("host_total_gib", float("inf")):
        readings["cgroup_used_gib"], readings["cgroup_limit_gib"] = cgroup[0] / GIB, cgroup[1] / GIB
    return readings


def _shared_memory() -> dict[str, float]:
    with suppress(OSError):
        disk = shutil.disk_usage("/dev/shm")
        return {"shm_used_gib": disk.used / GIB, "shm_total_gib": disk.total / GIB}
    return {}


def _gpus() -> dict[str, float]:
    """Readings of each visible GPU; MIG instances have memory but no utilisation."""
    readings: dict[str, float] = {}
    with suppress(Exception), nvml() as library:  # no package, no driver, or a GPU that has fallen off the bus
        gpus = visible_gpus(library.nvmlDeviceGetCount(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        for number, gpu in enumerate(gpus):
            with suppress(library.NVMLError):
                by_index = isinstance(gpu, int)
                find = library.nvmlDeviceGetHandleByIndex if by_index else library.nvmlDeviceGetHandleByUUID
                handle = find(gpu)
                memory = library.nvmlDeviceGetMemoryInfo(handle)
                readings[f"gpu{number}_used_gib"] = memory.used / GIB
                readings[f"gpu{number}_total_gib"] = memory.total / GIB
                readings[f"gpu{number}_util_percent"] = float(library.nvmlDeviceGetUtilizationRates(handle).gpu)
    return readings


def _text(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text()
    return ""
