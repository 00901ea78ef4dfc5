"""Start `stas` in separate processes, as its users do."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

PATIENCE = 600.0  # seconds until a test gives up: a busy machine may take many times as long as a quiet one


def stas(*arguments: object, ranks: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command and wait for it, alone or as `ranks` processes under torchrun."""
    line, variables = command(arguments, ranks), os.environ | QUIET | environment
    return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=PATIENCE)


@contextmanager
def started(line: Sequence[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A running process. At the end it and its children are killed, so that a failed test does not hang."""
    with subprocess.Popen(line, env=os.environ | QUIET | environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition that another process fulfils; fail after `seconds`."""
    end, pause = time.monotonic() + seconds, 0.01
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(pause)
        pause = min(1.5 * pause, 0.2)


def command(arguments: Sequence[object], ranks: int = 0) -> list[str]:
    stage = ["stas", *map(str, arguments)]
    if not ranks:
        return [sys.executable, "-m", *stage]
    # "--" keeps torchrun from reading --run as its own option.
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "--",
        *stage,
    ]


QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
