"""Timing: the things compared run in turn, round after round, and their medians make one row of the table."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from stas.system.resources import GIB, cores


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio (or seconds) and its target."""

    what: str
    value: float
    target: float
    at_least: bool = True  # or at most
    unit: str = "x"  # x: a ratio within this run; s: seconds
    detail: Mapping[str, float] = field(default_factory=dict)  # measurements by name, with unit
    note: str = ""  # how the limit is composed, or why the target is missed

    @property
    def reached(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "at_least": self.at_least,
            "reached": self.reached,
            "detail": dict(self.detail),
            "note": self.note,
        }


def interleaved(timed: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, called in turn `repeats` times after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(repeats + 1):
        for name, call in timed.items():
            began = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def named_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Label seconds for a row's detail."""
    return {f"{name}, s": value for name, value in seconds.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread."""
    import torch  # as in `machine`

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def machine() -> dict[str, Any]:
    """The machine and the versions that the figures depend on."""
    import torch  # not at the top: each worker process of preprocess imports the main module, and so this one

    names = ("adabelief-pytorch", "isal", "lmdb", "monai", "numpy", "pillow")
    names += ("segmentation-models-pytorch", "timm", "torch")
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
    except OSError:
        names = set()
    return ", ".join(sorted(names)) or platform.processor() or "unknown"
