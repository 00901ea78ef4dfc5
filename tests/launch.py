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
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return [sys.executable, *torchrun, "-m", "--", "stas", *map(str, arguments)]


QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
