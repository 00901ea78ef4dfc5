"""How ranks exchange values, alone and as two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stas.system import distributed
from tests.support.launch import PATIENCE, QUIET

TWO_RANKS = """
import json, sys, torch
from stas.system import distributed
with distributed.join_ranks() as ranks:
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(ranks.rank + 5.0)
    distributed.broadcast_buffers(norm)
    said = {
        "rank": ranks.rank, "size": ranks.size, "first": ranks.first, "device": ranks.device.type,
        "sum": distributed.sum_over_ranks([ranks.rank + 1.0, 10.0]),
        "second stops": distributed.any_rank(ranks.rank == 1)[0],
        "none stops": distributed.any_rank(False)[0],
        "gathered": [distributed.gather(ranks.rank + 0.5), distributed.gather_objects("ab"[ranks.rank])],
        "mean": norm.running_mean.tolist(),
    }
    open(f"{sys.argv[1]}/{ranks.rank}.json", "w").write(json.dumps(said))
"""


def run_two_ranks(code: str, directory: Path) -> None:
    """Run a script as two ranks, with the directory that its results go to as its argument."""
    script = directory / "ranks.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | QUIET | {"PYTHONPATH": str(Path.cwd())}
    subprocess.run([*torchrun, script, directory], env=environment, check=True, timeout=PATIENCE)


def test_one_process_is_the_only_rank():
    with distributed.join_ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert distributed.sum_over_ranks([1.5, 2.0]) == [1.5, 2.0]
        assert distributed.any_rank(True, False) == [True, False]
        assert distributed.gather(2.5) == [2.5] and distributed.gather_objects("a") == ["a"]
        distributed.barrier()


@pytest.mark.slow
def test_two_ranks_agree(tmp_path: Path):
    run_two_ranks(TWO_RANKS, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["rank"], first["first"], second["rank"], second["first"]) == (0, True, 1, False)
    for said in (first, second):
        assert said["size"] == 2 and said["device"] == "cpu"
        assert said["gathered"] == [[0.5, 1.5], ["a", "b"]]
        assert said["sum"] == [3.0, 20.0]
        assert said["second stops"] and not said["none stops"]
        assert said["mean"] == [5.0, 5.0], "the first rank's statistics"


LEFT_BY_FIRST = """
import sys
from contextlib import contextmanager
from stas.errors import StoppedEarly
from stas.system import distributed

@contextmanager
def publishing():
    yield "the lock"
    raise StoppedEarly("the lock is lost")

with distributed.join_ranks() as ranks:
    try:
        with distributed.entered_by_first(ranks, publishing()) as held:
            assert (held is not None) == ranks.first
    except StoppedEarly as error:
        open(f"{sys.argv[1]}/{ranks.rank}", "w").write(str(error))
"""


@pytest.mark.slow
def test_all_ranks_learn_that_the_first_could_not_publish(tmp_path: Path):
    """Else the others would end with an error of their own, and the job with 1 instead of 75."""
    run_two_ranks(LEFT_BY_FIRST, tmp_path)
    assert (tmp_path / "0").read_text() == "the lock is lost"
    assert "the first rank could not finish" in (tmp_path / "1").read_text()
