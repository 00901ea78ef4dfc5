"""One worker at a time on a run, a store or a set of predictions, on a shared file system too.

A lock is a small file beside what it protects, which says who holds it. Only hard links and renames are used, which
are atomic on NFS, where fcntl's locks often do nothing. A lock outlives a killed holder and is then taken over: on the
same machine as soon as its process is gone, from another machine when its heartbeat has stopped for STALE seconds.

Whoever changes a lock file that stands must first hold the lock of that change, named after the holder it ends. So of
two that find the same dead lock, one takes it over, and the other finds the new holder instead of throwing it out.
A holder that was frozen and lost its lock notices at its next heartbeat or `check`, which comes before every result
gets its final name.
"""

import contextlib
import errno
import glob
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from stas.errors import StoppedEarly
from stas.files import named_errors

log = logging.getLogger(__name__)

HEARTBEAT = 15.0  # seconds between two signs of life
STALE = 120.0  # seconds without one after which a holder on another machine is taken for dead
PATIENCE = 300.0  # seconds that a stage with GPUs waits; longer than STALE, so that it always outwaits a dead holder
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as the file says it."""

    token: str  # of this one holding; no other ever has it
    host: str  # for people: containers on one machine may share a host name, and two pods of one Job do
    machine: str  # boot id and process namespace: within one, process numbers mean something
    pid: int
    started: str  # the process's start, in the kernel's count, because process numbers are used again
    since: str

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


class Lock:
    """A lock that this process holds.

    Attributes:
        path: the lock file.
        lost: whether the heartbeat has found that somebody else took it over.
    """

    def __init__(self, path: Path, mine: Holder) -> None:
        self.path = path
        self.lost = False
        self._mine = mine
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"heartbeat of {path}", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Make sure that the lock is still held, before a result gets its final name.

        Raises:
            StoppedEarly: another process has taken it over, because this one gave no sign of life.
        """
        holder = _read(self.path)
        if holder is None or holder.token != self._mine.token:
            self.lost = True
            raise StoppedEarly(
                f"{self.path}: this process ({self._mine}) gave no sign of life for {STALE:.0f} seconds and lost its "
                f"lock to {holder or 'nobody, the file was removed'}; nothing was published since, the same command "
                "goes on"
            )

    def release(self) -> None:
        self._released.set()
        self._heart.join()
        try:
            with _change(self.path, self._mine, self._mine) as allowed:
                if allowed:
                    self.path.unlink(missing_ok=True)
        except OSError as error:  # a full disk has no room for the lock of the change, but room to remove a file
            log.warning("%s: not released in the usual way (%s)", self.path, error)
            with contextlib.suppress(OSError, StoppedEarly):
                self.check()
                self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            try:
                holder = _read(self.path)
                if holder is None or holder.token != self._mine.token:
                    self.lost = True
                    return
                os.utime(self.path)  # without a time: the file server's clock counts, which all machines share
            except OSError as error:  # the file system may come back; `check` has the last word
                log.warning("%s: no sign of life could be given (%s)", self.path, error)


@contextmanager
def lock(path: Path, patience: float = math.inf) -> Iterator[Lock]:
    """Hold a lock for the block; wait for it as long as its holder lives, at most `patience` seconds.

    Args:
        path: the lock file (see `stas.paths.lock`).
        patience: seconds.

    Raises:
        StoppedEarly: the holder still lives after `patience`; names host, process and since when. Or the lock was lost
            during the block, and something failed because of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = _me()
    _wait(path, mine, patience)
    _sweep(path, mine)
    held = Lock(path, mine)
    try:
        yield held
    except Exception:
        held.check()  # a new holder clears up behind the old one: this may be all that is wrong
        raise
    finally:
        held.release()


def _wait(path: Path, mine: Holder, patience: float) -> None:
    began = said = time.monotonic()
    pause = 0.02
    while not _claim(path, mine):
        holder = _read(path)
        waited = time.monotonic() - began
        if holder and waited >= patience:
            raise StoppedEarly(
                f"{path}: in use by {holder}; it still lives after {waited:.0f} seconds of waiting. "
                "End one of the two, or start this one again later"
            )
        if holder and (said == began or time.monotonic() - said > 60):
            log.info("%s: in use by %s; waiting", path, holder)
            said = time.monotonic()
        time.sleep(min(pause, max(0.02, patience - waited)))
        pause = min(2 * pause, 1.0)


def _claim(path: Path, mine: Holder) -> bool:
    """Try once to become the holder, of a free lock or of one whose holder is dead."""
    now = _create(path, mine)
    holder = _read(path)
    if holder is None or holder.token == mine.token:
        return holder is not None  # an NFS server's answer may get lost after it made the link
    if _alive(holder, path, now):
        return False
    with _change(path, holder, mine) as allowed:
        if not allowed:
            return False
        try:
            os.replace(_candidate(path, mine), path)
        except FileNotFoundError:  # frozen just before, and swept away by a new holder
            return False
        log.warning("%s: taken over from %s, which is dead", path, holder)
        return True


@contextmanager
def _change(path: Path, holder: Holder, mine: Holder) -> Iterator[bool]:
    """Be the only one who may end `holder`'s hold; false where another is, or did so already.

    Every hold has its own token, so the lock of its change means nothing once the hold has ended: those who come late
    look again and find another holder.
    """
    guard = path.with_name(f"{path.name}.{holder.token[:12]}")
    if not _claim(guard, mine):
        yield False
        return
    try:
        now = _read(path)
        allowed = now is not None and now.token == holder.token
        if allowed and holder.token != mine.token:
            _write(_candidate(path, mine), mine)
        yield allowed
    finally:
        _candidate(path, mine).unlink(missing_ok=True)
        guard.unlink(missing_ok=True)


def _create(path: Path, mine: Holder) -> float:
    """Make the lock file if there is none, whole from the beginning; return the file server's time."""
    candidate = _candidate(path, mine)
    now = -math.inf
    try:
        _write(candidate, mine)
        now = candidate.stat().st_mtime
        os.link(candidate, path)
    except (FileExistsError, FileNotFoundError):  # the second where a new holder has swept the candidate away
        pass
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(json.dumps(asdict(mine)))
    finally:
        candidate.unlink(missing_ok=True)
    return now


def _alive(holder: Holder, path: Path, now: float) -> bool:
    """Whether a holder lives: by its process on this machine, by its heartbeat on another.

    Args:
        holder: who.
        path: its lock.
        now: the file server's time.
    """
    if holder.machine and holder.machine == _machine():
        return _started(holder.pid) == holder.started
    try:
        return now - path.stat().st_mtime < STALE
    except FileNotFoundError:
        return True  # released meanwhile: look again


def _read(path: Path) -> Holder | None:
    """Who holds a lock; None where nobody does."""
    try:
        with open(path, "rb") as file:
            content, status = file.read(4096), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    try:
        holder = Holder(**json.loads(content))
        if [type(value) for value in asdict(holder).values()] == [str, str, str, int, str, str] and (
            re.fullmatch("[0-9a-f]{32}", holder.token)  # it becomes part of a file's name
        ):
            return holder
    except (ValueError, TypeError, RecursionError):
        pass
    # Damaged, or not yet written where there are no hard links: it ends by the age of its heartbeat.
    return Holder(f"{status.st_ino:x}-{status.st_mtime_ns:x}", "unknown", "", 0, "", "unknown")


def _write(path: Path, mine: Holder) -> None:
    with named_errors(path), open(path, "w") as file:
        file.write(json.dumps(asdict(mine)))


def _candidate(path: Path, mine: Holder) -> Path:
    return path.with_name(f"{path.name}.{mine.token}.new")


def _sweep(path: Path, mine: Holder) -> None:
    """Remove what killed processes have left beside a lock that is held now.

    A process that still waits may lose its candidate, and makes another. What stands for a change of the present hold
    is in use.
    """
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*"):
        if not leftover.name.startswith(f"{path.name}.{mine.token[:12]}"):
            leftover.unlink(missing_ok=True)


def _me() -> Holder:
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Holder(uuid.uuid4().hex, os.uname().nodename, _machine(), os.getpid(), _started(os.getpid()), since)


@cache
def _machine() -> str:
    """What tells this kernel and its process numbers from others; empty where the kernel does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine started, in the kernel's count; empty where it is gone or a zombie."""
    try:
        # The program's name in brackets may hold anything, also blanks and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
