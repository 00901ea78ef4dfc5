"""Faults in forked processes, injected by tests/support/faults.c: see there."""

import ctypes
import errno
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

READ, CHANGE, SYNC, MEMORY = 1, 2, 4, 8  # kinds of calls
SOURCE = Path(__file__).with_suffix(".c")


class Plan(ctypes.Structure):
    """The shared memory that tells the library which call must fail; the same as in faults.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kinds", "number", "lasting", "error", "least", "seen", "given")),
        ("roots", (ctypes.c_char * 512) * 2),
        ("where", ctypes.c_char * 512),
    )


@dataclass(frozen=True)
class Fault:
    """What happens at the `number`-th call of these kinds.

    Attributes:
        kinds: READ, CHANGE, SYNC and MEMORY, added.
        number: from 1; 0 means no fault, to count the calls.
        error: the error's name, or None to kill the process.
        lasting: whether all later calls fail too.
        least: bytes; smaller allocations do not count.
        limit: in place of all others, a resource limit: its name, and how much more than now the process may use.
    """

    kinds: int = 0
    number: int = 0
    error: str | None = None
    lasting: bool = False
    least: int = 0
    limit: tuple[str, int] | None = None


@dataclass(frozen=True)
class Injected:
    seen: int  # calls of the fault's kinds, at least
    given: int  # calls that failed
    where: str  # the first of them


class Injector:
    """A plan in a file, which forked and started processes share."""

    def __init__(self, path: Path, roots: Sequence[Path]) -> None:
        assert len(roots) <= 2
        self.path = path
        path.write_bytes(bytes(ctypes.sizeof(Plan)))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._plan = Plan.from_buffer(self._memory)
        for place, root in zip(self._plan.roots, roots, strict=False):
            place.value = os.fsencode(root)

    def prepare(self, fault: Fault) -> None:
        plan = self._plan
        plan.kinds, plan.number, plan.lasting, plan.least = fault.kinds, fault.number, fault.lasting, fault.least
        plan.error = getattr(errno, fault.error) if fault.error else 0
        plan.seen, plan.given, plan.where = 0, 0, b""

    def arm(self) -> None:
        """Begin to count and to inject: in this process and in those that it starts."""
        os.environ["LD_PRELOAD"], os.environ["STAS_FAULTS"] = str(library()), str(self.path)
        assert _loaded().faults_arm(os.fsencode(self.path)) == 0

    def limit(self, name: str, more: int) -> None:
        """Limit this process's use of a resource to so much more than it uses now."""
        used = 0
        if name == "RLIMIT_AS":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        if name == "RLIMIT_NOFILE":
            used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        which = getattr(resource, name)
        resource.setrlimit(which, (used + more, resource.getrlimit(which)[1]))

    def disarm(self) -> None:
        self._plan.kinds = 0

    def injected(self) -> Injected:
        return Injected(self._plan.seen, self._plan.given, self._plan.where.decode(errors="replace"))


def hook() -> None:
    """Redirect this process's calls; those of the libraries loaded since the last time are added."""
    _loaded().faults_hook()


@cache
def _loaded() -> ctypes.CDLL:
    return ctypes.CDLL(str(library()))


@cache
def library() -> Path:
    """The compiled library."""
    name = f"stas-{os.getuid()}-faults-{sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    target = Path(tempfile.gettempdir()) / name
    if not (target.is_file() and target.stat().st_uid == os.getuid()):
        with tempfile.TemporaryDirectory() as directory:
            built = Path(directory) / name
            compiler = shutil.which("cc") or "gcc"
            subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", built, SOURCE, "-ldl"], check=True)
            shutil.copy(built, target.with_suffix(f".{os.getpid()}"))
        target.with_suffix(f".{os.getpid()}").replace(target)
    return target


@cache
def why_no_faults() -> str:
    """Why faults cannot be injected here; empty if they can."""
    if (
        sys.platform != "linux"
        or not hasattr(os, "confstr")
        or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    ):
        return "faults are injected into glibc's functions"
    if not (shutil.which("cc") or shutil.which("gcc")):
        return "no C compiler (Debian package gcc and libc6-dev)"
    try:
        library()
    except subprocess.CalledProcessError as error:
        return f"the C compiler failed: {error}"
    return ""
