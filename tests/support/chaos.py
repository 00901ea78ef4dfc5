"""Faults at system calls: strace kills a stage in a forked process at the N-th call of a kind, or makes the call fail.

Only calls that may change the directory under test are tried, because a kill between two of them has the same effect as
at the second. Thread pools run their work immediately in the caller, so the N-th call is always the same one.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from stas import cli, infer
from stas.models import checkpoint
from stas.system import files, threads
from stas.training import metrics_log
from tests.support.launch import PATIENCE

CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,fsync,fdatasync,msync,ftruncate,truncate,fallocate,rename,"
    "renameat,renameat2,link,linkat,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,utimensat,sendfile,copy_file_range"
)
READS = re.compile(r"^(open|openat)\(.*O_RDONLY")
CRASHED = 99


class Inline:
    """An executor that does the work immediately, in the caller."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None: ...

    def map(self, function: Callable[..., Any], *items: Any) -> Iterator[Any]:
        return map(function, *items)


@dataclass(frozen=True)
class Call:
    """One system call of a run: the `number`-th of its kind in its thread."""

    name: str
    number: int
    text: str


@dataclass(frozen=True)
class Outcome:
    code: int  # exit code, or the negative signal number
    said: str  # text on stderr


@dataclass
class Scenario:
    """A stage, its initial state, and what must hold after a fault at any call.

    Attributes:
        prepare: makes the initial state in the given directory.
        work: the stage; running it again resumes it.
        units: patterns of final names: files, or directories that must appear complete.
        check: further conditions after a fault.
        may_miss: units that may be missing for a moment.
        finished: what must be equal at the end with and without a fault; by default the bytes of every unit.
    """

    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    units: tuple[str, ...]
    check: Callable[[Path], None] = lambda root: None
    may_miss: tuple[str, ...] = ()
    finished: Callable[[Path], Any] | None = None
    exact: bool = True  # whether every unit must equal the old or the new one byte for byte


@dataclass
class Walk:
    """The faults of one scenario, and their outcomes."""

    scenario: Scenario
    root: Path  # the stage's directory; always the same path
    faults: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.template = self.root.with_name("template")
        self.template.mkdir()
        self.root.mkdir()
        self.scenario.prepare(self.root)
        shutil.copytree(self.root, self.template, dirs_exist_ok=True)
        self.old = self._units()
        self.calls = self._record()
        self.new = self._units()
        self.end = self._end()
        assert not hidden(self.root), hidden(self.root)

    def kill_at(self, call: Call) -> None:
        """Kill the stage instead of letting it make a call; then let it resume."""
        outcome = self._with_fault(call, "signal=KILL")
        assert outcome.code == -signal.SIGKILL, f"{call}: not reached, {outcome}"
        self._survives(call)

    def refuse(self, call: Call, error: str, words: str) -> None:
        """Make one call fail; the stage must report it, or finish its work anyway."""
        outcome = self._with_fault(call, f"error={error}")
        assert outcome.code in (0, 1), f"{call}: {outcome}"
        assert "Traceback" not in outcome.said, f"{call}: {outcome.said}"
        if outcome.code:
            assert re.search(words, outcome.said, re.M), f"{call}: {outcome}"
            self.refused["told"] += 1
        else:
            self.refused["unhurt"] += 1
        self._survives(call)

    def _with_fault(self, call: Call, fault: str) -> Outcome:
        self._restore()
        self.faults += 1
        options = ["-e", f"trace={call.name}", "-e", f"inject={call.name}:{fault}:when={call.number}"]
        return run(self.scenario.work, self.root, [*options, "-o", "/dev/null"])

    def _survives(self, call: Call) -> None:
        try:
            self._is_whole()
            again = run(self.scenario.work, self.root)
            assert again.code == 0, again
            assert self._end() == self.end
            assert not hidden(self.root), hidden(self.root)
        except Exception as error:
            raise AssertionError(f"after a fault at {call}") from error

    def _is_whole(self) -> None:
        """Every unit is the old or the new one, and a unit that exists before and after the stage is not missing."""
        found = self._units()
        known = {*self.old.values(), *self.new.values()}
        for name, content in found.items():
            assert content in known or not self.scenario.exact, f"{name} is neither the old nor the new one"
        missing = self.old.keys() & self.new.keys() - found.keys()
        assert all(any(Path(name).match(pattern) for pattern in self.scenario.may_miss) for name in missing), missing
        self.scenario.check(self.root)

    def _record(self) -> list[Call]:
        log = self.root.with_name("trace")
        outcome = run(self.scenario.work, self.root, ["-y", "-s", "0", "-e", f"trace={CALLS}", "-o", str(log)])
        assert outcome.code == 0, outcome
        counts: Counter[tuple[str, str]] = Counter()
        calls: dict[tuple[str, int], Call] = {}
        for line in log.read_text(errors="replace").splitlines():
            if found := re.match(r"(\d+) +((\w+)\(.*)", line):
                thread, text, name = found.groups()
                counts[thread, name] += 1
                if str(self.root) in text and not READS.match(text):
                    calls.setdefault((name, counts[thread, name]), Call(name, counts[thread, name], text))
        return list(calls.values())

    def _restore(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.template, self.root)

    def _units(self) -> dict[str, str]:
        """The digest of every unit, by name."""
        paths = [path for pattern in self.scenario.units for path in self.root.glob(pattern)]
        return {str(path.relative_to(self.root)): digest(path) for path in paths if not path.name.startswith(".")}

    def _end(self) -> Any:
        return self.scenario.finished(self.root) if self.scenario.finished else self._units()


def digest(path: Path) -> str:
    """The SHA-256 of a file, or of all files in a directory with their names."""
    if path.is_file():
        return sha256(path.read_bytes()).hexdigest()
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    return sha256("".join(f"{entry.relative_to(path)} {digest(entry)}\n" for entry in files).encode()).hexdigest()


def hidden(root: Path) -> list[Path]:
    """Hidden files, which must be gone when the stage has finished."""
    return [path for path in root.rglob(".*") if path.name not in (".", "..")]


def run(work: Callable[[Path], None], root: Path, strace: list[str] | None = None) -> Outcome:
    """Run a stage in a forked process as the command line does, with strace attached from the start."""
    said = root.with_name("stderr")
    errors = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(work, root, ready, go, errors)
    os.close(ready)
    os.close(errors)
    tracer = None
    if strace is not None:
        tracer = subprocess.Popen(["strace", "-f", "-p", str(pid), *strace], stderr=subprocess.PIPE, text=True)
        assert tracer.stderr
        attached = tracer.stderr.readline()
        assert "attached" in attached, attached
    os.write(go, b"!")
    os.close(go)
    code = os.waitstatus_to_exitcode(_wait(pid, PATIENCE))
    if tracer:
        tracer.communicate(timeout=PATIENCE)
    return Outcome(code, said.read_text(errors="replace"))


def _child(work: Callable[[Path], None], root: Path, ready: int, go: int, errors: int) -> None:
    code = CRASHED
    try:
        os.close(go)
        os.read(ready, 1)  # strace is attached
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        metrics_log.SummaryWriter = MagicMock(return_value=MagicMock(log_dir="events"))  # its thread writes at any time
        for module in (checkpoint, files, infer, threads):
            module.ThreadPoolExecutor = Inline  # pyright: ignore[reportAttributeAccessIssue]
        code = cli._run(lambda _: work(root), argparse.Namespace())
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail(f"still running after {seconds} seconds")
        time.sleep(0.002)


@cache
def why_no_strace() -> str:
    """Why faults cannot be injected here; empty if they can."""
    if not shutil.which("strace"):
        return "no strace (Debian package strace)"
    tried = subprocess.run(
        ["strace", "-f", "-e", "inject=write:error=ENOSPC", "echo"], capture_output=True, text=True, timeout=PATIENCE
    )
    return "" if "(INJECTED)" in tried.stderr else f"strace cannot trace here: {tried.stderr.strip()[-200:]}"
