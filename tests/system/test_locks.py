"""Locks, tested with real processes; a lock file that names another machine stands in for one."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from stas import paths
from stas.errors import StoppedEarly
from stas.system import locks
from stas.system.locks import Holder, lock
from tests.support.launch import PATIENCE, wait_until
from tests.support.lock_files import leave

HOLD = """
import sys
from pathlib import Path
from stas.system.locks import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return paths.lock_file(tmp_path / "thing")


def holder_process(path: Path) -> subprocess.Popen[str]:
    """A process of its own that has the lock when this returns, until its input is closed."""
    line = [sys.executable, "-c", HOLD, path]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_nothing_is_left_behind(path):
    with lock(path) as held:
        held.check()
        assert [entry.name for entry in path.parent.iterdir()] == [".thing.lock"]
    assert not list(path.parent.iterdir())
    with pytest.raises(RuntimeError), lock(path):
        raise RuntimeError
    assert not list(path.parent.iterdir())


def test_the_second_waits_then_says_who_holds_it(path):
    with holder_process(path) as process:
        try:
            with pytest.raises(StoppedEarly) as caught, lock(path, patience=0.3):
                pass
            assert re.search(
                rf"thing\.lock: in use by host {re.escape(os.uname().nodename)}, process {process.pid}, "
                r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC",
                str(caught.value),
            )
        finally:
            process.kill()


def test_the_second_continues_when_the_first_has_ended(path, caplog):
    caplog.set_level("INFO")

    def end_the_first() -> None:
        wait_until(lambda: "waiting" in caplog.text, "the second")
        process.communicate()

    with holder_process(path) as process, ThreadPoolExecutor() as threads:
        ended = threads.submit(end_the_first)
        with lock(path):
            assert "waiting" in caplog.text and "taken over" not in caplog.text
        ended.result()


def test_a_killed_process_is_succeeded_at_once(path, caplog):
    with holder_process(path) as process:
        process.send_signal(signal.SIGKILL)
        zombie = psutil.Process(process.pid)  # nobody waits for it
        wait_until(lambda: zombie.status() == psutil.STATUS_ZOMBIE, "its end")
        with lock(path, patience=PATIENCE):
            assert f"taken over from host {os.uname().nodename}, process {process.pid}" in caplog.text
    assert not list(path.parent.iterdir())


def test_a_stopped_process_on_this_machine_is_alive_however_long_it_is_silent(path):
    with holder_process(path) as process:
        process.send_signal(signal.SIGSTOP)
        os.utime(path, (0, 0))
        with pytest.raises(StoppedEarly), lock(path, patience=0.2):
            pass
        process.kill()


def test_a_process_number_used_again_is_another_process(path):
    leave(path, 0, machine=locks._machine())  # process 1 runs, but did not start at tick 1
    with lock(path, patience=PATIENCE):
        pass


def test_another_machine_lives_by_its_heartbeat(path, caplog):
    leave(path, silent=locks.STALE - 20)
    with pytest.raises(StoppedEarly, match="host node7, process 1, since 2026-01-01"), lock(path, patience=0.2):
        pass
    leave(path, silent=locks.STALE + 5)
    with lock(path, patience=PATIENCE):
        assert "taken over from host node7" in caplog.text


def test_another_machine_with_the_same_host_name_is_alive(path):
    """Cloned machines and the pods of a Job share host names, and in containers the pids too."""
    other = replace(leave(path, 0), host=os.uname().nodename, pid=os.getpid())
    path.write_text(json.dumps(asdict(other)))
    with pytest.raises(StoppedEarly, match=f"process {os.getpid()}"), lock(path, patience=0.2):
        pass


def test_a_process_that_proc_hides_lives_by_its_heartbeat(path, monkeypatch):
    """With hidepid=2, /proc shows other users' processes as missing, but signalling them is "not permitted"."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "not permitted")

    def leave_hidden(silent: float) -> None:
        hidden = replace(leave(path, silent, locks._machine()), pid=2**22 + 1)  # above any pid: not in /proc
        path.write_text(json.dumps(asdict(hidden)))
        last = time.time() - silent
        os.utime(path, (last, last))

    monkeypatch.setattr(os, "kill", refuse)
    leave_hidden(0)
    with pytest.raises(StoppedEarly), lock(path, patience=0.2):
        pass
    leave_hidden(locks.STALE + 5)
    with lock(path, patience=1):
        pass


OTHER_USER = """
import os, sys
from pathlib import Path
from stas.errors import StoppedEarly
from stas.system.locks import lock

def become(user):
    os.setgroups([]); os.setgid(user); os.setuid(user)

held, done = os.pipe(), os.pipe()
if not os.fork():
    become(65001)
    with lock(Path(sys.argv[1])):
        os.write(held[1], b"x")
        os.read(done[0], 1)
    os._exit(0)
os.close(held[1])
assert os.read(held[0], 1), "the other user got no lock"
become(65002)
assert not os.path.exists("/proc/1"), "hidepid hides nothing"
try:
    with lock(Path(sys.argv[1]), patience=1):
        print("taken over")
except StoppedEarly:
    print("alive")
os.write(done[1], b"x")
os.wait()
"""


def test_another_user_whom_proc_hides_is_alive(path):
    """The same with the kernel's own hidepid=2, in a mount namespace."""
    path.parent.chmod(0o777)
    for parent in path.parent.parents:
        if parent.stat().st_uid == os.getuid() and "pytest-of-" in str(parent):
            parent.chmod(0o755)  # pytest closes them to other users
    inside = 'mount -t proc -o hidepid=2 proc /proc && exec "$0" -c "$1" "$2"'
    line = ["unshare", "-m", "--propagation", "private", "sh", "-c", inside, sys.executable, OTHER_USER, path]
    try:
        run = subprocess.run(line, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if "unshare failed" in run.stderr or "mount:" in run.stderr or "only root" in run.stderr:
        pytest.skip(f"needs root: {run.stderr}")
    assert run.stdout == "alive\n", run.stderr


def test_a_pipe_in_place_of_a_lock_is_not_waited_for(path):
    os.mkfifo(path)
    os.utime(path, (0, 0))
    with lock(path, patience=PATIENCE):
        assert path.is_file()


def test_a_dead_lock_dated_a_day_ahead_is_not_waited_for_that_long(path, monkeypatch):
    monkeypatch.setattr(locks, "STALE", 0.3)
    leave(path, silent=-86400)
    with lock(path, patience=10):
        pass


def test_a_live_lock_dated_a_day_ahead_is_not_taken_over(path, monkeypatch):
    monkeypatch.setattr(locks, "STALE", 5.0)
    leave(path, silent=-86400)
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    done = threading.Event()

    def beat() -> None:  # the contender sees a beat every 3 seconds of its clock
        nonlocal clock
        while not done.wait(0.1):
            ahead = path.stat().st_mtime + 3
            os.utime(path, (ahead, ahead))
            clock += 3

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(StoppedEarly, match="host node7"), lock(path, patience=20):
            pass
    finally:
        done.set()
        heart.join()


def test_the_heartbeat_beats(path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    with lock(path):
        os.utime(path, (0, 0))
        wait_until(lambda: time.time() - path.stat().st_mtime < 5, "a sign of life")


def test_a_holder_that_lost_its_lock_stops_before_it_publishes(path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    with pytest.raises(StoppedEarly, match="lost its lock to host node7, process 1"), lock(path) as held:
        leave(path, 0)
        wait_until(lambda: held.lost, "the heartbeat to notice")
        held.check()
    assert "node7" in path.read_text()  # the new holder keeps it
    path.unlink()
    with pytest.raises(StoppedEarly, match="lost its lock"), lock(path):
        leave(path, 0)
        raise FileNotFoundError  # what a temporary file is for one whose successor has cleared up


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}', "[" * 3000])
def test_a_damaged_lock_ends_by_its_age(path, content):
    path.write_text(content)
    with pytest.raises(StoppedEarly, match="host unknown"), lock(path, patience=0.1):
        pass
    os.utime(path, (0, 0))
    with lock(path, patience=PATIENCE):
        pass


def test_a_lock_file_cannot_lead_out_of_its_directory(path):
    left = asdict(leave(path, 0)) | {"token": "/../../x"}
    path.write_text(json.dumps(left))
    os.utime(path, (0, 0))
    with lock(path, patience=PATIENCE):
        pass
    assert not list(path.parent.iterdir())


def test_a_dead_taker_is_itself_taken_over(path):
    """Killed while it took over a dead lock, and the one after it too."""
    dead = leave(path, silent=1000)
    taker = leave(path.with_name(f"{path.name}.{dead.token[:12]}"), silent=1000)
    leave(path.with_name(f"{path.name}.{dead.token[:12]}.{taker.token[:12]}"), silent=1000)
    path.with_name(f"{path.name}.{taker.token}.new").write_text("")
    with lock(path, patience=PATIENCE):
        pass
    assert not list(path.parent.iterdir())


def _why_no_strace() -> str:
    """Why strace cannot make calls fail here; empty if it can."""
    if not shutil.which("strace"):
        return "no strace (Debian package strace)"
    tried = subprocess.run(
        ["strace", "-f", "-e", "inject=write:error=ENOSPC", "echo"], capture_output=True, text=True, timeout=PATIENCE
    )
    return "" if "(INJECTED)" in tried.stderr else f"strace cannot trace here: {tried.stderr.strip()[-200:]}"


@pytest.mark.skipif(bool(_why_no_strace()), reason=_why_no_strace())
def test_takeover_needs_only_plain_renames(path):
    """NFS, SMB and CephFS refuse every flag of renameat2, the exchange of two names among them."""
    with holder_process(path) as process:
        process.kill()
    strace = ["strace", "-qq", "-f", "-e", "trace=renameat2", "-e", "inject=renameat2:error=EINVAL", "-o", os.devnull]
    taker = subprocess.run([*strace, sys.executable, "-c", HOLD, path, "0"], capture_output=True, text=True, timeout=60)
    assert taker.stdout == "held\n", taker.stderr
    assert not list(path.parent.iterdir())


def test_a_taker_frozen_in_the_middle_does_not_take_over_from_a_new_holder(path, monkeypatch):
    dead = leave(path, silent=1000)
    second = path.with_name(f"{path.name}.{dead.token[:12]}")
    write, new = locks._write, []

    def freeze(target: Path, mine: Holder) -> None:
        if second.exists() and not new:  # it has the second lock; while it is frozen, others take over twice
            new.append(leave(path, silent=0))
            locks._remove_leftovers(path, new[0])
        write(target, mine)

    monkeypatch.setattr(locks, "_write", freeze)
    with pytest.raises(StoppedEarly, match="host node7"), lock(path, patience=0.2):
        pass
    assert json.loads(path.read_text())["token"] == new[0].token


def test_without_hard_links(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    with lock(path), pytest.raises(StoppedEarly, match=f"process {os.getpid()}"), lock(path, patience=0.1):
        pass
    leave(path, 1000)
    with lock(path, patience=PATIENCE):
        pass
    assert not list(path.parent.iterdir())


def test_a_directory_that_is_gone_is_not_waited_for(path):
    ended: list[Exception] = []

    def wait() -> None:
        try:
            with lock(path):
                pass
        except Exception as error:
            ended.append(error)

    with lock(path):
        waiting = threading.Thread(target=wait, daemon=True)  # without the check it never ends
        waiting.start()
        time.sleep(0.2)
        shutil.rmtree(path.parent)
        waiting.join(PATIENCE)
    assert [type(error) for error in ended] == [FileNotFoundError]


def test_a_full_disk_does_not_keep_a_lock(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with lock(path):
        monkeypatch.setattr(locks, "_write", full)
    assert not list(path.parent.iterdir())


def take_in_turn(path: Path, rounds: int, start, inside, most, takes) -> None:
    """Each round: all find the same dead lock at once and hold it in turn."""
    for _ in range(rounds):
        start.wait()
        with lock(path) as held:
            with inside.get_lock(), most.get_lock(), takes.get_lock():
                inside.value += 1
                most.value = max(most.value, inside.value)
                takes.value += 1
            time.sleep(0.001)
            with inside.get_lock():
                inside.value -= 1
            held.check()
        start.wait()


@pytest.mark.parametrize(("takers", "rounds"), [(3, 100), pytest.param(4, 2000, marks=pytest.mark.chaos)])
def test_two_takers_of_one_dead_lock(path, takers, rounds):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(takers + 1)
    inside, most, takes = context.Value("i"), context.Value("i"), context.Value("i")
    processes = [
        context.Process(target=take_in_turn, args=(path, rounds, start, inside, most, takes)) for _ in range(takers)
    ]
    for process in processes:
        process.start()
    for round_ in range(rounds):
        dead = leave(path, silent=1000)
        if round_ % 2:  # and one died while it took over
            leave(path.with_name(f"{path.name}.{dead.token[:12]}"), silent=1000)
        start.wait()
        start.wait()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * takers
    assert takes.value == takers * rounds
    assert most.value == 1, "two held the lock at once"
    assert not list(path.parent.iterdir())
