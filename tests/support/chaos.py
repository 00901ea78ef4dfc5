"""Stages with a fault in a forked process: killed at the N-th call of a kind, or that call fails, or all later ones do.

Threads, process pools and TensorBoard's writer are the real ones, so the N-th call is not always the same one; what
must hold afterwards is the same for all.
"""

import argparse
import contextlib
import faulthandler
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from stas import cli
from stas.system import printing
from tests.support import faults
from tests.support.faults import MEMORY, Fault, Injected, Injector

PATIENCE = 25  # seconds that a stage may take with a fault; without one it takes less than two
CRASHED = 99
HUNG = 98
SHOWN = 10  # failures in a message
# Python's own: a thread that gets no memory before it says that it runs is waited for without end. With several ranks,
# the launcher ends it. Nor can anything be done about the traceback of a fork server that gets no memory to import.
STARTING = re.compile(r'File ".*/threading\.py", line \d+ in start\b')
TLS = "cannot allocate memory for thread-local data"  # glibc ends a process that has none, with exit code 127
DEATHS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)  # libraries in C and Rust that get no memory


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
        exact: whether every unit must equal the old or the new one byte for byte.
        inputs: a directory that the stage only reads.
        processes: whether the stage starts processes of its own; if one is killed, the stage may say so.
        most: how many calls of a kind are tried at most, because the stage takes long.
    """

    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    units: tuple[str, ...]
    check: Callable[[Path], None] = lambda root: None
    may_miss: tuple[str, ...] = ()
    finished: Callable[[Path], Any] | None = None
    exact: bool = True
    inputs: Path | None = None
    processes: bool = False
    most: int | None = None


@dataclass
class Walk:
    """The faults of one scenario, and their outcomes."""

    scenario: Scenario
    root: Path  # the stage's directory; always the same path
    outcomes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        faults.hook()
        self.template = self.root.with_name("template")
        self.template.mkdir()
        self.root.mkdir()
        self.injector = Injector(
            self.root.with_name("plan"), [self.root, *([self.scenario.inputs] if self.scenario.inputs else [])]
        )
        self.scenario.prepare(self.root)
        shutil.copytree(self.root, self.template, dirs_exist_ok=True)
        self.old = self._units()
        outcome = run(self.scenario.work, self.root)
        assert outcome.code == 0, outcome
        self.new = self._units()
        self.end = self._end()
        assert not hidden(self.root), hidden(self.root)

    def count(self, kinds: int, least: int = 0) -> int:
        """How many calls of these kinds the stage makes without a fault."""
        self._restore()
        outcome, injected = self._run(Fault(kinds, least=least))
        assert outcome.code == 0 and injected.seen, outcome
        return injected.seen

    def some(self, kinds: int, most: int, least: int = 0) -> list[int]:
        """The numbers of at most so many calls, evenly spread from the first to the last; few if the stage is slow."""
        count = self.count(kinds, least)
        tried = min(count, most, self.scenario.most or most)
        numbers = sorted({1 + round(index * (count - 1) / max(1, tried - 1)) for index in range(tried)})
        assert len(numbers) == tried
        return numbers

    def survives_all(self, tried: Iterable[Fault], words: str = "") -> None:
        """Try faults one after the other; fail at the end if any was not survived, with the first of them."""
        failures: list[str] = []
        number = 0
        for number, fault in enumerate(tried, start=1):  # noqa: B007
            try:
                self.survives(fault, words)
            except AssertionError as error:
                failures.append(str(error))
        assert number, "nothing was tried"
        shown = "\n\n".join(failures[:SHOWN])
        assert not failures, f"{len(failures)} of {number} faults were not survived:\n{shown}"

    def survives(self, fault: Fault, words: str = "") -> None:
        """Inject one fault. What is on disk must be whole, the stage must say what happened, and must then resume."""
        self._restore()
        outcome, injected = self._run(fault)
        step = "with the fault"
        try:
            self._judge(fault, outcome, injected, words)
            self._is_whole()
            if outcome.code == 0:
                assert self._end() == self.end, "it claims success, but the result differs"
            step = "when it ran again"
            again = run(self.scenario.work, self.root)
            assert again.code == 0, again
            assert self._end() == self.end, "the result differs"
            assert not hidden(self.root), f"left behind: {hidden(self.root)}"
        except Exception as error:
            said = outcome.said if len(outcome.said) < 3000 else f"{outcome.said[:1500]} ... {outcome.said[-1500:]}"
            raise AssertionError(
                f"{step}, {fault} at {injected.where}: {type(error).__name__}: {error}\nexit {outcome.code}: {said}"
            ) from error

    def _judge(self, fault: Fault, outcome: Outcome, injected: Injected, words: str) -> None:
        code = outcome.code
        if not injected.given and not fault.limit:  # threads made fewer calls this time
            assert code == 0
            self.outcomes["not reached"] += 1
            return
        if code == -signal.SIGKILL and fault.error is None:
            self.outcomes["killed"] += 1
            return
        assert fault.error or fault.limit or self.scenario.processes, "not killed"
        memory = fault.kinds == MEMORY or bool(fault.limit)
        if memory and -code in DEATHS:  # as good as killed
            self.outcomes[f"died of {signal.Signals(-code).name}"] += 1
            return
        if memory and code == 127 and TLS in outcome.said:
            self.outcomes["died in the C library"] += 1
            return
        if memory and code == HUNG and STARTING.search(outcome.said):
            self.outcomes["hung in Thread.start"] += 1
            return
        self.outcomes[f"exit {code}"] += 1
        assert "Traceback" not in outcome.said or (memory and self.scenario.processes), "a traceback"
        assert code in (0, 1, 75), f"exit {code}"
        if code:
            assert re.search(words or "^stas: ", outcome.said, re.M), f"does not say {words!r}"

    def _run(self, fault: Fault) -> tuple[Outcome, Injected]:
        self.injector.prepare(fault)
        outcome = run(self.scenario.work, self.root, self.injector, fault)
        return outcome, self.injector.injected()

    def _is_whole(self) -> None:
        """Every unit is the old or the new one, and a unit that exists before and after the stage is not missing."""
        found = self._units()
        known = {*self.old.values(), *self.new.values()}
        for name, content in found.items():
            assert content in known or not self.scenario.exact, f"{name} is neither the old nor the new one"
        missing = self.old.keys() & self.new.keys() - found.keys()
        assert all(any(Path(name).match(pattern) for pattern in self.scenario.may_miss) for name in missing), missing
        self.scenario.check(self.root)

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


def run(
    work: Callable[[Path], None], root: Path, injector: Injector | None = None, fault: Fault | None = None
) -> Outcome:
    """Run a stage in a forked process as the command line does, with faults if there is an injector."""
    said = root.with_name("stderr")
    errors = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if pid == 0:
        _child(work, root, errors, injector, fault)
    os.close(errors)
    code = os.waitstatus_to_exitcode(_wait(pid, PATIENCE))
    return Outcome(code, said.read_text(errors="replace"))


def _child(
    work: Callable[[Path], None], root: Path, errors: int, injector: Injector | None, fault: Fault | None
) -> None:
    code = CRASHED
    try:
        os.setpgid(0, 0)  # so that its worker processes can be ended with it
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        _forget_fork_server()
        printing.start_logging()  # it also says what becomes of errors in threads, which pytest would swallow
        faulthandler.disable()  # pytest's would write to its own stderr; `Walk.survives` judges a crash
        faulthandler.dump_traceback_later(PATIENCE - 5, file=sys.stderr)
        if injector:
            injector.arm()
            if fault and fault.limit:
                injector.limit(*fault.limit)
        code = cli._run(lambda _: work(root), argparse.Namespace())
    except BaseException:
        if injector:
            injector.disarm()
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            if injector:
                injector.disarm()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _forget_fork_server() -> None:
    """Let this forked process start a fork server of its own: one that pytest started is no child of it."""
    server: Any = vars(forkserver)["_forkserver"]
    server._forkserver_pid = server._forkserver_address = server._forkserver_alive_fd = None


def _wait(pid: int, seconds: float) -> int:
    """The status of a process that has ended; one that still runs after `seconds` is killed."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done or time.monotonic() > end:
            break
        time.sleep(0.002)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status if done else HUNG << 8
