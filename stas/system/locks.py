"""Locks: one process at a time on a run, a store or a prediction set, even on a shared file system.

A lock is a small file beside the thing it protects, and names its holder. It needs only hard links and plain renames,
which are atomic on NFS, where fcntl locks often do nothing. A lock whose holder was killed is taken over: on the same
machine as soon as the process is gone, from another machine after STALE seconds without a heartbeat.

Before replacing a stale lock, take a second lock named after its holder, so that only one contender succeeds. A holder
that was frozen and lost its lock notices at its next heartbeat or `check`, which comes before every publication.

We do not use filelock.SoftFileLease because version 4.2.12 fails three tests in test_locks.py:
- test_takeover_needs_only_plain_renames: on NFS and SMB a dead lock blocks everyone until someone deletes it;
- test_another_machine_with_the_same_host_name_is_alive: a live lock is taken over immediately;
- test_a_damaged_lock_ends_by_its_age: an empty lock file, left by a process killed before it wrote, blocks everyone.
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
from stas.system.files import named_errors
from stas.system.stop import check_stop

log = logging.getLogger(__name__)
# When this process first saw a heartbeat: a lock dated in the future (a clock was set back) would never look old.
_first_seen: dict[tuple[str, float], float] = {}

HEARTBEAT = 15.0  # seconds
STALE = 120.0  # seconds without a heartbeat after which a holder on another machine counts as dead
PATIENCE = 300.0  # seconds that a stage with GPUs waits; longer than STALE, to outlast a dead holder
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """The holder of a lock, as recorded in its file."""

    token: str  # never used twice, not even by the same process
    host: str  # for people only: containers and cloned machines may share host names
    machine: str  # boot id and process namespace, within which a pid is unique
    pid: int
    started: str  # when the process started, in clock ticks since boot, because pids are reused
    since: str

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


class Lock:
    """A lock held by this process.

    Attributes:
        path: the lock file.
        lost: whether a heartbeat or `check` found that the lock is no longer ours.
    """

    def __init__(self, path: Path, mine: Holder) -> None:
        self.path = path
        self.lost = False
        self._mine = mine
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"heartbeat of {path}", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Make sure that the lock is still held. Call it before a result gets its final name.

        Raises:
            StoppedEarly: the lock was lost: another process took it over, or its file was removed.
        """
        holder = _read(self.path)
        if holder is None or holder.token != self._mine.token:
            self.lost = True
            raise StoppedEarly(
                f"{self.path}: this process ({self._mine}) missed its heartbeat for {STALE:.0f} seconds and lost "
                f"its lock to {holder or 'nobody: the file was removed'}. It has published nothing since. "
                "Run the same command again to resume"
            )

    def release(self) -> None:
        self._released.set()
        self._heart.join()
        try:
            _end(self.path, self._mine, self._mine)
        except OSError as error:  # a full disk has no space for the second lock, but a file can still be removed
            log.warning("%s: released without its second lock (%s)", self.path, error)
            with contextlib.suppress(OSError, StoppedEarly):
                self.check()
                self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            try:
                self.check()
                os.utime(self.path)  # without an explicit time, NFS uses the server's clock, which all machines share
            except StoppedEarly:
                return
            except OSError as error:  # the file system may recover; `check` decides
                log.warning("%s: heartbeat failed (%s)", self.path, error)


@contextmanager
def lock(path: Path, patience: float = math.inf) -> Iterator[Lock]:
    """Hold a lock for the block. If another holder is alive, wait at most `patience` seconds.

    Args:
        path: the lock file (see `stas.paths.lock_file`).
        patience: seconds.

    Raises:
        StoppedEarly: the holder is still alive after `patience` (the message says host, process and since when), or the
            lock was lost during the block and the block failed, or a signal asked this process to stop while it waited.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = _me()
    _wait(path, mine, patience)
    _remove_leftovers(path, mine)
    held = Lock(path, mine)
    try:
        yield held
    except Exception:
        held.check()  # the block may have failed only because a new holder removed its temporary files
        raise
    finally:
        held.release()


def _wait(path: Path, mine: Holder, patience: float) -> None:
    began = logged = time.monotonic()
    pause = 0.02
    while not _claim(path, mine):
        check_stop()
        holder = _read(path)
        waited = time.monotonic() - began
        if holder and waited >= patience:
            raise StoppedEarly(
                f"{path}: in use by {holder}, which is still alive after {waited:.0f} seconds of waiting. "
                "Stop one of the two, or run this command again later"
            )
        if holder and (logged == began or time.monotonic() - logged > 60):
            log.info("%s: in use by %s; waiting", path, holder)
            logged = time.monotonic()
        time.sleep(min(pause, max(0.02, patience - waited)))
        pause = min(2 * pause, 1.0)


def _claim(path: Path, mine: Holder) -> bool:
    """Try once to take a lock that is free or whose holder is dead."""
    now = _create(path, mine)
    holder = _read(path)
    if holder is None or holder.token == mine.token:
        return holder is not None  # even if the link failed: an NFS server's reply can get lost after it made the link
    if _alive(holder, path, now) or not _end(path, holder, mine):
        return False
    log.warning("%s: taken over from %s, which is dead", path, holder)
    return True


def _end(path: Path, holder: Holder, mine: Holder) -> bool:
    """Hand `holder`'s lock to `mine`, or free it if they are the same; false if another process did it first."""
    second = path.with_name(f"{path.name}.{holder.token[:12]}")
    if not _claim(second, mine):
        return False
    candidate = _candidate(path, mine)
    try:
        if holder != mine:
            _write(candidate, mine)  # before reading: a later holder removes it, which stops us if we were frozen
        now = _read(path)
        if now is None or now.token != holder.token:
            return False
        if holder == mine:
            path.unlink()
        else:
            os.replace(candidate, path)
        return True
    except FileNotFoundError:
        return False
    finally:
        candidate.unlink(missing_ok=True)
        second.unlink(missing_ok=True)


def _create(path: Path, mine: Holder) -> float:
    """Create the lock file with its content, unless there already is one; return the file server's time."""
    candidate = _candidate(path, mine)
    now = -math.inf
    try:
        _write(candidate, mine)
    except OSError:  # a directory that is gone, or takes no files, would be tried for ever
        candidate.unlink(missing_ok=True)
        raise
    try:
        now = candidate.stat().st_mtime
        os.link(candidate, path)
    except (FileExistsError, FileNotFoundError):  # not found: a new holder removed the candidate
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
    """Whether a holder is alive: by its process on this machine, otherwise by its heartbeat; `now` is the server's."""
    if holder.machine and holder.machine == _machine() and (started := _started(holder.pid)) is not None:
        return started == holder.started
    looked = time.monotonic()  # before `stat`, in case this process is frozen in between
    try:
        beat = path.stat().st_mtime
    except FileNotFoundError:
        return True  # just released: try again
    watched = looked - _first_seen.setdefault((holder.token, beat), looked)
    return max(now - beat, watched) < STALE


def _read(path: Path) -> Holder | None:
    """The holder of a lock; None if it is free."""
    try:
        # Not blocking: a pipe that somebody put there would be waited for without end.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content, status = file.read(4096), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    try:
        holder = Holder(**json.loads(content))
        if [type(value) for value in asdict(holder).values()] == [str, str, str, int, str, str] and (
            re.fullmatch("[0-9a-f]{32}", holder.token)  # becomes part of a file name
        ):
            return holder
    except (ValueError, TypeError, RecursionError):
        pass
    # Damaged, or not yet written because there are no hard links: only its age counts.
    return Holder(f"{status.st_ino:x}-{status.st_mtime_ns:x}", "unknown", "", 0, "", "unknown")


def _write(path: Path, mine: Holder) -> None:
    with named_errors(path), open(path, "w") as file:
        file.write(json.dumps(asdict(mine)))


def _candidate(path: Path, mine: Holder) -> Path:
    return path.with_name(f"{path.name}.{mine.token}.new")


def _remove_leftovers(path: Path, mine: Holder) -> None:
    """Remove files that killed processes left beside a lock. The caller must hold it.

    A waiting process may lose its candidate and makes another one. Files named after the current holder are in use.
    """
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*"):
        if not leftover.name.startswith(f"{path.name}.{mine.token[:12]}"):
            leftover.unlink(missing_ok=True)


def _me() -> Holder:
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Holder(uuid.uuid4().hex, os.uname().nodename, _machine(), os.getpid(), _started(os.getpid()) or "", since)


@cache
def _machine() -> str:
    """Identify this boot of this machine and its process namespace; empty if the kernel does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process on this machine started, in clock ticks since boot; "" if it is gone, None if hidden from us."""
    try:
        # The program's name, in parentheses, may itself contain blanks and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:  # gone, or another user's and /proc is mounted with hidepid
        try:
            os.kill(pid, 0)
        except PermissionError:
            return None
        except (OSError, OverflowError):
            return ""
        return None
    return "" if fields[0] in "ZX" else fields[19]
