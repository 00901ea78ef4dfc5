import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from stas.data.store_manifest import Sample, Skipped
from stas.data.store_spec import StoreSpec
from stas.data.store_writer import Record, Source, make_record
from stas.data.workers import records
from stas.errors import StoppedEarly, UsageError
from tests.support.launch import PATIENCE

SIZE = (4, 6)
SPEC = StoreSpec(("STAS",), SIZE)


def make(number: int) -> Record | Skipped:
    if number % 5 == 4:
        return Skipped(file=f"{number}.json", reason="bad", remedy="none")
    names = Source(stem=str(number), image="", image_sha256="", annotation="", annotation_sha256="")
    image = np.full((8, 12, 3), number, np.uint8)
    return make_record(names, image, image[..., 0] % 2 == 1, SPEC)


def die(number: int) -> Record | Skipped:
    os._exit(number)


def described(made: Record | Skipped) -> tuple[Sample, bytes, bytes, bytes] | Skipped:
    if not isinstance(made, Record):
        return made
    assert made.image.shape == (*SIZE, 3) and made.mask.shape == SIZE
    return made.sample, made.image.tobytes(), made.mask.tobytes(), made.full_mask


def test_a_record_stays_as_it_is_until_the_next_one_is_asked_for():
    for number, made in enumerate(records(make, range(12), SIZE, 2)):
        time.sleep(0.1)  # in which the workers could make all that they may
        assert described(made) == described(make(number))


def test_too_little_shared_memory_is_explained():
    with pytest.raises(UsageError, match=r"2 workers need \d+ MiB in /dev/shm or .* use fewer workers \(--workers\)"):
        next(records(make, range(4), (2**20, 2**20), 2))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_records_come_in_order_and_as_they_were_made(workers):
    numbers = range(40)  # more than there are places in shared memory
    assert [described(made) for made in records(make, numbers, SIZE, workers)] == [described(make(i)) for i in numbers]


def make_of_any_shape(number: int) -> Record | Skipped:
    names = Source(stem=str(number), image="", image_sha256="", annotation="", annotation_sha256="")
    image = np.full((1 + number % 7, 12 - number % 11, 3), number, np.uint8)
    return make_record(names, image, image[..., 0] % 2 == 1, StoreSpec(("STAS",), scale=1.0))


def test_records_of_many_shapes_come_as_they_were_made():
    for number, made in enumerate(records(make_of_any_shape, range(40), (7, 12), 2)):
        expected = make_of_any_shape(number)
        assert isinstance(made, Record) and isinstance(expected, Record)
        assert np.array_equal(made.image, expected.image) and np.array_equal(made.mask, expected.mask)
        assert (made.sample, made.full_mask) == (expected.sample, expected.full_mask)


def test_a_killed_worker_is_explained():
    with pytest.raises(StoppedEarly, match=r"a worker process was killed.*--workers"):
        list(records(die, [1, 1], SIZE, 2))


def test_no_more_is_taken_than_is_needed():
    taken = []

    class Watched(list):
        def __iter__(self):
            for item in super().__iter__():
                taken.append(item)
                yield item

    made = records(make, Watched(range(100)), SIZE, 2)
    next(made)
    assert len(taken) <= 5
    made.close()  # pyright: ignore[reportAttributeAccessIssue]


def stop(number: int) -> Record | Skipped:
    raise StoppedEarly(f"the disk of {number} failed")


def test_a_stop_in_a_worker_stops_the_parent():
    with pytest.raises(StoppedEarly, match="the disk of 1 failed"):
        list(records(stop, [1, 2], SIZE, 2))


def signal_itself(number: int) -> Record | Skipped:
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        os.kill(os.getpid(), getattr(signal, name))
    return make(number)


def test_a_signal_to_every_process_of_a_job_is_left_to_the_parent():
    made = [described(record) for record in records(signal_itself, range(4), SIZE, 2)]
    assert made == [described(make(number)) for number in range(4)]


def signal_the_fork_server(number: int) -> Record | Skipped:
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        os.kill(os.getppid(), getattr(signal, name))
    return make(number)


def test_a_signal_to_every_process_of_a_job_does_not_end_the_fork_server():
    for _ in range(2):  # the second time, the same fork server has to start new workers
        made = [described(record) for record in records(signal_the_fork_server, range(4), SIZE, 2)]
        assert made == [described(make(number)) for number in range(4)]


@pytest.mark.parametrize("error", [EOFError, ConnectionRefusedError])
def test_a_fork_server_that_is_gone_is_explained(monkeypatch, error):
    def start(*_):
        raise error

    monkeypatch.setattr(ProcessPoolExecutor, "submit", start)
    with pytest.raises(StoppedEarly, match=r"a worker process was killed.*--workers"):
        list(records(make, [1, 1], SIZE, 2))


def hang(number: int) -> Record | Skipped:
    sys.stderr.write(f"{os.getpid()}\n")
    sys.stderr.flush()
    time.sleep(10 * PATIENCE)
    return make(number)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGHUP", "SIGTERM"])
def test_workers_end_with_their_parent(name):
    """All that held stderr are gone, the fork server and the resource tracker too: a pipe's reader sees its end."""
    code = (
        "from stas.data.workers import records; from tests.data.test_workers import SIZE, hang\n"
        "list(records(hang, range(4), SIZE, 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert parent.stderr
    workers = [int(parent.stderr.readline()) for _ in range(2)]
    try:
        parent.send_signal(getattr(signal, name))
        parent.communicate(timeout=PATIENCE)  # until nobody can write to its stderr any more
        assert parent.returncode == -getattr(signal, name)
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("error", [EOFError("unexpected EOF"), BrokenPipeError()])
def test_a_fork_server_that_ended_is_explained(monkeypatch, error):
    def failing(*_):
        raise error

    monkeypatch.setattr(ProcessPoolExecutor, "submit", failing)
    with pytest.raises(StoppedEarly, match="probably because memory ran out: use fewer workers"):
        next(records(make, range(4), SIZE, 2))
