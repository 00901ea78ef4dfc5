"""Locks left by other processes."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from stas.system.locks import Holder


def leave(path: Path, silent: float, machine: str = "other pid:[1]") -> Holder:
    """A lock whose holder, by default on another machine, gave its last sign of life `silent` seconds ago."""
    left = Holder(os.urandom(16).hex(), "node7", machine, 1, "1", "2026-01-01 00:00:00 UTC")
    path.write_text(json.dumps(asdict(left)))
    last = time.time() - silent
    os.utime(path, (last, last))
    return left
