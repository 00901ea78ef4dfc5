"""Requests to stop: a signal only sets a flag, and stages look at it where they can stop safely.

A handler that raised would be swallowed by whatever `except` surrounds the line it interrupts, in an import of torch
or in a reader that calls the file bad.
"""

import os
import signal
import threading
import time
from types import FrameType

from stas.errors import EXIT_FAILED, StoppedEarly

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a scheduler's, and Slurm's warning before the walltime
# Seconds between SIGTERM and SIGKILL for the ranks. Longer than a checkpoint takes; shorter than Kubernetes'
# terminationGracePeriodSeconds and Slurm's --signal lead (a test compares them).
SHUTDOWN_TIMEOUT = 120
_asked: list[int] = []  # the signals that arrived


def listen(*more: signal.Signals) -> None:
    """From now on SIGTERM, SIGUSR1 and `more` only set the flag. Call this in the main thread."""
    for number in (*SIGNALS, *more):
        signal.signal(number, _note)


def stop_listening() -> None:
    """From now on ignore these signals: the stage's exit code is settled, and Python is only shutting down."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_asked() -> bool:
    """Whether a signal asked this process to stop."""
    return bool(_asked)


def check_stop() -> None:
    """End the stage if a signal asked for it.

    Raises:
        StoppedEarly: it did.
    """
    if _asked:
        raise StoppedEarly(f"stopped by {signal.Signals(_asked[0]).name}; run the same command again to resume")


def end_with(launcher: int) -> None:
    """End this process, as by SIGTERM, once the launcher that started it is gone, even if that was killed.

    Otherwise it would go on unseen, with the run's lock and the GPUs, after its job has ended.

    Args:
        launcher: the launcher's process number.
    """
    threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SHUTDOWN_TIMEOUT)  # it may be waiting for another rank, where it hears no signal
    os._exit(EXIT_FAILED)


def _note(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
