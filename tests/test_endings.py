"""However a command is misused or cut short, it ends with its own exit code and a sentence, never with a traceback."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stas.data.images import write_mask
from tests.support.launch import PATIENCE, QUIET

VOTE = "stas vote --members one two three --out out"
STORE = "stas preprocess --images one --annotations two"  # unlike train, it starts without torch
LONG = "x" * 231
REPORT = "stopped by an error that it did not expect"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with three prediction sets and a file."""
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        write_mask(tmp_path / name / "image.png", np.eye(8, dtype=bool))
    (tmp_path / "file").write_text("")
    return tmp_path


def shell(line: str, here: Path, **environment: str) -> tuple[int, str]:
    """Run a line of bash in which `stas` is the command; return its exit code and what it wrote to stderr."""
    script = f'set -o pipefail; stas() {{ "{sys.executable}" -m stas "$@"; }}; {line}'
    variables = os.environ | QUIET | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment
    run = subprocess.run(["bash", "-c", script], cwd=here, env=variables, capture_output=True, timeout=PATIENCE)
    return run.returncode, run.stderr.decode()


WRONG_VALUES = [
    *(
        (f"{VOTE} {option}={value!r}", f"{option}: {value!r} is not a")
        for option in ("--workers", "--weights")
        for value in ("nan", "inf", "", "-inf", "1e400", "x")
    ),
    *((f"{VOTE} --threshold={value}", "give a number from 0 to 65534") for value in ("nan", "inf", "-inf", "1e400")),
    *((f"{VOTE} --threshold={value!r}", "invalid float value") for value in ("", "x")),
    *((f"{VOTE} --workers={value}", "is not a whole number from 1") for value in ("-1", "0", "1.5", "9" * 5000)),
    *((f"stas launch {option} train", "is not a whole number") for option in ("--nodes 0", "--nodes=-1")),
    *((f"stas launch {option} train", "is not a whole number") for option in ("--processes 0", "--node=-1")),
    ("stas train --recipe lite0 --workspace w --time-limit 1e30", "is not a time"),
    ("stas train --ensemble small --member=-1 --workspace w", "is not a whole number from 0"),
    ("stas evaluate --predictions one --truth two --out o --sheets=-1", "is not a whole number from 0"),
]
WRONG_NAMES = [
    ("stas vote --members one two three --out ''", "is empty"),
    ("stas vote --members one two '' --out o", "is empty"),
    (f"stas vote --members one two three --out {LONG}", "too long"),
    (f"stas vote --members one two three --out {'long/' * 1000}o", "too long"),
    ("stas vote --members one two three --out file/o", "Not a directory"),
    ("stas vote --members one two three --out file", "it will not be replaced"),
    ("stas vote --members one two three --workspace w --out w", "name a directory of its own"),
    ("stas vote --members one two three --workspace w --out w/runs", "name a directory of its own"),
    ("stas vote --members one two three --workspace w --out w/stores/o", "name a directory of its own"),
    ("stas evaluate --predictions one --truth two --workspace w --out w/predictions", "name a directory of its own"),
    (f"{STORE} --recipe lite0 --workspace w --masks w/runs", "name a directory of its own"),
    (f"LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 {VOTE}", "file names are read as ascii"),
    ("ln -s loop loop; stas vote --members one two three --out loop/o", "symbolic links"),
    ("ln -s loop loop; stas vote --members one loop three --out o", "symbolic links"),
    ("mkdir .out.lock; " + VOTE, "a directory is where a file is needed"),
    (r"stas vote --members one two three --out $'caf\xe9'", "not UTF-8"),
    (r"mv three $'thr\nee'; stas vote --members one two thr* --out o", "rename the directory"),
    (r"mv three $'thr\x1b[2Jee'; stas vote --members one two thr* --out o", "rename the directory"),
    (f"{STORE} --recipe one --workspace w", "give a YAML file"),
    (f"{STORE} --recipe {LONG * 2}.yaml --workspace w", "use a shorter name"),
    (f"mkfifo pipe.yaml; {STORE} --recipe pipe.yaml --workspace w", "give a YAML file"),
    ("stas train --recipe '' --workspace w", "is not a name"),
    ("stas train --recipe lite0 --run '' --workspace w", "is not a name"),
    ("stas train --recipe lite0 --workspace ''", "is empty"),
    (f"STAS_WORKSPACE=$'caf\\xe9' {STORE}", "not UTF-8"),
    ("stas weights convert /dev/zero out.safetensors --allow-pickle", "not a regular file"),
    ("mkfifo p.pth; stas weights convert p.pth out.safetensors --allow-pickle", "not a regular file"),
]
BAD_INPUT = [
    (r"cp one/image.png $'one/caf\xe9.png'; " + VOTE, "not UTF-8: rename it"),
    (r"cp one/image.png $'one/a\nb.png'; " + VOTE, "line breaks or other control characters: rename it"),
    (r"cp one/image.png $'one/\x1b[2J.png'; " + VOTE, "control characters: rename it"),
    ("for set in one two three; do mkfifo $set/pipe.png; done; " + VOTE, "not a regular file"),
    ("for set in one two three; do ln -s /dev/zero $set/zero.png; done; " + VOTE, "not a regular file"),
    ("stas vote --members one file three --out out", "members are missing"),
]
REFUSED_BY_THE_SYSTEM = [
    ("mkdir gone; cd gone; rmdir ../gone; stas vote --members ../one ../two --out o", "the current directory"),
    ("ulimit -f 0; " + VOTE + " 2>&1 | cat >&2", "ulimit -f"),
    ("ulimit -v 150000; export OPENBLAS_NUM_THREADS=1; " + VOTE, "ulimit -v"),
    ("ulimit -v 2000000; stas train --recipe lite0 --workspace w", "ulimit -v"),
    (
        f"cp one/image.png one/b.png; cp two/image.png two/b.png; ulimit -n 9; {STORE} --workspace w --workers 2 "
        "--set data.size=64 --set data.split.kind=fraction",
        "ulimit -n",
    ),
    ("stas members small >/dev/full", "could not be written"),
    ("stas recipes >/dev/full", "could not be written"),
]
HARMLESS = [
    f"{VOTE} >&-",
    f"{VOTE} 2>&-",
    f"{VOTE} <&- >&- 2>&-",
    f"{VOTE} | true",
    f"{VOTE} 2>&1 | true",
    f"{VOTE} >/dev/full",
    f"{VOTE} 2>/dev/full",
    f"{VOTE} >/dev/full 2>/dev/full",
    f"env -u HOME {sys.executable} -m {VOTE}",
    f"TMPDIR=/nowhere {VOTE}",
    f"LC_ALL=C PYTHONIOENCODING=ascii {VOTE}",
    "mv one é; PYTHONIOENCODING=ascii stas vote --members é two three --out out",
    f"mkfifo .out.lock; touch -d yesterday .out.lock; {VOTE}",
]


def refused(line: str, said: str, code: int, here: Path) -> None:
    ended, error = shell(line, here)
    assert (ended, said in error) == (code, True), error
    assert "Traceback" not in error and REPORT not in error, error
    assert not (here / "out" / "manifest.json").exists()


@pytest.mark.parametrize(("line", "said"), WRONG_VALUES)
def test_a_value_out_of_range_is_refused_with_the_range(line: str, said: str, here: Path):
    refused(line, said, 2, here)


@pytest.mark.parametrize(("line", "said"), WRONG_NAMES)
def test_a_path_or_name_that_cannot_be_used_is_refused(line: str, said: str, here: Path):
    refused(line, said, 2, here)


@pytest.mark.parametrize(("line", "said"), BAD_INPUT)
def test_a_file_that_cannot_be_used_is_named_before_the_work(line: str, said: str, here: Path):
    refused(line, said, 3, here)


@pytest.mark.parametrize(("line", "said"), REFUSED_BY_THE_SYSTEM)
def test_what_the_system_refuses_is_one_sentence_with_a_remedy(line: str, said: str, here: Path):
    refused(line, said, 1, here)


@pytest.mark.parametrize("line", HARMLESS)
def test_work_that_is_done_stays_done_whatever_becomes_of_its_streams(line: str, here: Path):
    code, error = shell(line, here)
    assert code == 0, error
    assert "Traceback" not in error and "Exception ignored" not in error
    assert (here / "out" / "image.png").is_file()


@pytest.mark.parametrize("command", ["--help", "--version", "recipes", "members small", "vote --help", "doctor"])
def test_a_reader_that_has_read_enough_is_no_failure(command: str, here: Path):
    code, error = shell(f"stas {command} | true", here)
    assert code == 0 and not error


def test_a_bug_still_shows_its_traceback_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from stas.cli import main

    def broken(*_: object, **__: object) -> None:
        raise KeyError("tile\x1b[2J")

    monkeypatch.setattr("stas.vote.vote", broken)
    assert main(["vote", "--members", "a", "b", "c", "--out", "o"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "KeyError" in said and REPORT in said and "\x1b" not in said


@pytest.fixture
def as_another_user(here: Path) -> Callable[[str], tuple[int, str]]:
    if os.getuid():
        return lambda line: shell(line, here)
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    # Root may write anywhere, unless it gives up that right.
    drop = "setpriv --bounding-set=-all --inh-caps=-all --securebits=+noroot,+noroot_locked"
    return lambda line: shell(line.replace("stas ", f'{drop} "{sys.executable}" -m stas ', 1), here)


def test_a_directory_that_may_not_be_written_is_named(here: Path, as_another_user: Callable[[str], tuple[int, str]]):
    (here / "closed").mkdir(mode=0o500)
    code, error = as_another_user("stas vote --members one two three --out closed/out")
    assert code == 1 and "closed" in error and "let this user" in error and "Traceback" not in error, error
