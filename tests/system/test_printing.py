"""Nothing that a stranger names a file can control a terminal, forge a line of a log, or become a formula."""

import csv
import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stas.system import printing
from stas.system.files import append_json_line, read_json, write_json

STAS = Path(__file__).parents[2] / "stas"
HOSTILE = [
    "\x1b[2J",  # clear the screen
    "\x9b2J",  # the same in one character
    "\x1b]52;c;cm0gLXJmIH4=\x07",  # write to the clipboard
    "\x1b]0;title\x1b\\",
    "a\rb",
    "a\b\b",
    "\0",
    "\x7f",
    "\u202egnp.exe",  # shown from right to left
    "\u2066a\u2069",
    "a\u2028b",
    "a\x85b",
    "caf\udce9",  # a byte that is not UTF-8
]
FORGED = "a\n12:00:00 INFO epoch 500/500 done"
CONTROL = re.compile("[^\n\t -~\xa0-\u1fff]")


def logged(message: str, *arguments: object) -> str:
    record = logging.LogRecord("stas", logging.INFO, "file.py", 1, message, arguments, None)
    formatter = printing._Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    return formatter.format(record)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_no_text_controls_a_terminal(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    printing.say(f"vote of {name}: 3 masks")
    printing.complain(f"{name}: not readable")
    write_json(tmp_path / "one.json", {name: [name]})
    append_json_line(tmp_path / "many.jsonl", {name: name})
    said = capsys.readouterr()
    files = [(tmp_path / file).read_text("utf-8") for file in ("one.json", "many.jsonl")]
    for text in (said.out, said.err, logged("%s: 3 masks", name), *files):
        assert not CONTROL.search(text), ascii(text)
    assert read_json(tmp_path / "one.json") == {name: [name]}
    assert json.loads((tmp_path / "many.jsonl").read_text()) == {name: name}
    assert not printing.is_plain(name)


def test_plain_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]):
    for name in ("S-21 (2).tif", "切片 7", "Präparat", "zero\u200dwidth", "🔬"):
        assert printing.is_plain(name) and logged("%s", name).endswith(f"INFO {name}")
        printing.say(name)
        assert capsys.readouterr().out == f"{name}\n"


def test_a_line_break_forges_no_entry(capsys: pytest.CaptureFixture[str]):
    printing.complain(f"{FORGED}\nstas: all done")
    for text in (capsys.readouterr().err, logged("%s: left out", FORGED)):
        _, *others = text.splitlines()
        assert others and all(line.startswith("  ") for line in others), text


def test_a_traceback_forges_no_entry(capsys: pytest.CaptureFixture[str]):
    try:
        raise RuntimeError(f"{FORGED}\x1b[2J")
    except RuntimeError:
        printing.report_bug()
    said = capsys.readouterr().err
    assert "\n12:00:00" not in said and "\x1b" not in said
    assert "RuntimeError: a" in said and "report" in said


def test_a_megabyte_is_shortened_and_keeps_its_remedy(capsys: pytest.CaptureFixture[str]):
    text = f"{'x' * 10**6}: not readable: rename it"
    printing.complain(text)
    for said in (capsys.readouterr().err, logged("%s", text)):
        assert len(said) < 21_000
        assert said.rstrip().endswith("rename it") and "characters left out" in said


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\uff1d1", "'=1", "''", "plain", "a=1", ""])
def test_no_cell_is_a_formula_and_each_is_recoverable(text: str):
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerow([printing.csv_cell(text), "1"])
    (cell, _), *_ = csv.reader(io.StringIO(written.getvalue(), newline=""))
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\uff1d"))
    assert (cell[1:] if cell.startswith("'") else cell) == text


def test_only_this_module_prints():
    """Otherwise somebody will forget."""
    elsewhere = [
        f"{path.relative_to(STAS)}:{number}"
        for path in STAS.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if path.name != "printing.py" and re.search(r"(?<![\w.])print\(|sys\.std(out|err)\b|basicConfig", line)
    ]
    assert not elsewhere, "use stas.system.printing"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_never_becomes_a_file(closed: str, tmp_path: Path):
    """The next file that is opened would get the number of standard error, and with it all messages."""
    code = (
        "from stas.system import printing; printing.open_standard_streams()\n"
        f"file = open({str(tmp_path / 'data')!r}, 'w'); assert file.fileno() > 2\n"
        "printing.say('out'); printing.complain('error')"
    )
    subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], check=True, timeout=60)
    assert (tmp_path / "data").read_text() == ""


def test_only_ten_cases_are_named():
    assert printing.named("abc") == "a, b, c"
    assert printing.named("abcdefghijkl") == "a, b, c, d, e, f, g, h, i, j and 2 more"
    assert printing.itemised(list("abc")) == "\n  a\n  b\n  c"
    assert printing.itemised(list("abcdefghijkl")).endswith("\n  j\n  and 2 more")


def test_a_thread_that_meets_a_full_disk_says_so_in_a_line():
    script = (
        "import threading\n"
        "from stas.system.printing import start_logging\n"
        "start_logging()\n"
        "def fail(error):\n"
        "    raise error\n"
        "for error in (OSError(28, 'No space left on device'), MemoryError()):\n"
        "    thread = threading.Thread(target=fail, args=(error,))\n"
        "    thread.start()\n"
        "    thread.join()\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    assert "Traceback" not in said
    assert "a thread ended: [Errno 28] No space left on device" in said and "a thread ended: memory ran out" in said
