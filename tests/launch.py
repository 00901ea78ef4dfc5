"""Start `stas` as its users do: in processes of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence


def stas(*arguments: object, ranks: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, alone or as `ranks` processes under torchrun."""
    return subprocess.run(
        command(arguments, ranks), env=os.environ | QUIET | environment, capture_output=True, text=True, timeout=600
    )


def command(arguments: Sequence[object], ranks: int = 0) -> list[str]:
    stage = ["stas", *map(str, arguments)]
    if not ranks:
        return [sys.executable, "-m", *stage]
    # "--" keeps torchrun from reading --run as an option of its own.
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
