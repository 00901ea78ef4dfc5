"""The benchmarks run and report their measurements, and the pages quote them correctly."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.__main__ import PARTS
from scripts.bench.growth import exponent
from scripts.bench.measure import Row, interleaved
from scripts.bench.report import figure, markdown
from tests.support.launch import PATIENCE

DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
# Lines of the README's section on speed, and the rows they quote.
QUOTED = {
    "Samples into the training step": "samples into the step / by the original chain from JPEG",
    "Samples scaled and augmented on this CPU": "samples scaled and augmented on this CPU / by nnU-Net v2's loader",
    "An AdaBelief step over many small tensors": "AdaBelief step / adabelief-pytorch's: many small tensors",
}


def test_candidates_run_alternately_and_the_median_counts(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr("scripts.bench.measure.time.perf_counter", lambda: now[0])

    def call(name: int, takes: list[float]) -> None:
        calls.append(name)
        now[0] += takes.pop(0)

    one, two = [9.0, 0.5, 0.1, 0.2], [9.0, 0.3, 0.3, 4.0]
    seconds = interleaved({"one": lambda: call(1, one), "two": lambda: call(2, two)}, repeats=3)
    assert calls == [1, 2] * 4  # the first round does not count
    assert seconds == pytest.approx({"one": 0.2, "two": 0.3})


@pytest.mark.parametrize(("value", "at_least", "reached"), [(2, True, True), (1.9, True, False), (1.9, False, True)])
def test_a_target_is_a_minimum_or_a_maximum(value, at_least, reached):
    assert Row("what", value, target=2, at_least=at_least).reached is reached


def test_exponent_by_hand():
    assert exponent({1: 3.0, 10: 30.0, 100: 300.0}) == pytest.approx(1)
    assert exponent({1: 3.0, 10: 3.0}) == pytest.approx(0)


def test_the_page_is_generated_from_the_figures():
    content = json.loads((DOCS / "benchmarks.json").read_text())
    assert not content["quick"]
    assert (DOCS / "benchmarks.md").read_text() == markdown(content), "make it again with `make bench OUT=docs`"
    assert all(math.isfinite(row["value"]) for row in content["rows"])


def test_the_readme_quotes_only_measured_figures():
    rows = {row["what"]: row for row in json.loads((DOCS / "benchmarks.json").read_text())["rows"]}
    section = README.read_text().split("\n## Speed\n")[1].split("\n## ")[0]
    lines = dict(re.findall(r"^- ([^:]+): ([\d.]+ x) as ", section, re.MULTILINE))
    assert lines == {line: figure(rows[what]) for line, what in QUOTED.items()}


@pytest.mark.slow
def test_every_part_runs_and_every_row_is_written(tmp_path):
    line = [sys.executable, "-m", "scripts.bench", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=5 * PATIENCE, cwd=DOCS.parent)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "benchmarks.json").read_text())
    wanted = {row["what"].split(",")[0] for row in json.loads((DOCS / "benchmarks.json").read_text())["rows"]}
    kinds = [what.split()[0].strip(":") for what in wanted]
    found = [row["what"].split()[0].strip(":") for row in content["rows"]]
    assert set(found) == set(kinds), PARTS
    assert all(row["detail"] or row["note"] or row["unit"] for row in content["rows"])
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert len(done.stdout.splitlines()) == len(content["rows"]) + 2  # only the table, and where the results are


@pytest.mark.slow
def test_the_gpu_script_runs_on_the_cpu(tmp_path):
    line = [sys.executable, "-m", "scripts.bench.gpu", "--quick", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=5 * PATIENCE, cwd=DOCS.parent)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    measured = " ".join(result["what"] for result in content["results"])
    for part in ("bf16 product", "train", "stall", "rivals", "infer", "optimizer"):
        assert part in measured, content["notes"]
    assert not [note for note in content["notes"] if "failed" in note]
