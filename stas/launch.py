"""The entry point of every launcher: Slurm, Kubernetes, docker and the shell all end in `stas launch STAGE ...`.

torchrun is started only here. It hides its workers' exit codes, so every rank leaves its own in a status directory.
"""

import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Literal

import psutil

import stas
from stas.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_RESUMABLE,
    EXIT_USAGE,
    MachineError,
    UsageError,
)
from stas.paths import STATUS_DIRECTORY
from stas.system.heartbeat import STALLED_AFTER, hung_ranks_ended
from stas.system.printing import close_standard_streams, complain
from stas.system.resources import cores
from stas.system.stop import SHUTDOWN_TIMEOUT, SIGNALS, check_stop, listen, stop_asked

log = logging.getLogger(__name__)

RANKED = ("train", "infer")  # the stages that run as several processes
# Seconds the other ranks get to exit after one has died: to log why and to finish a checkpoint.
# torchrun gives them 30, or any amount of time if that rank only failed.
BEREAVED_TIMEOUT = 20
# Seconds torchrun gets to end after a signal when no rank is left: it may be waiting for other nodes inside torch.
LONELY_TIMEOUT = 10
# What a rank runs: not `-m`, with which the current directory could replace any library. The code is the launcher's.
RANK = """\
import sys
root = {root!r}
sys.path[:] = [*([] if root in sys.path else [root]), *filter(None, sys.path)]
from stas.system.stop import end_with
end_with({launcher})
from {entry} import main
sys.exit(main())
"""


def launch(
    stage: Sequence[str],
    run: Callable[[Sequence[str]], int],
    check: Callable[[Sequence[str]], None],
    processes: int | None = None,
    nodes: int = 1,
    rendezvous: str | None = None,
    job: str | None = None,
    node: int | None = None,
    gpus: int | Literal["all"] | None = None,
    stalled_after: float = STALLED_AFTER,
) -> int:
    """Run one stage; `train` and `infer` run as one process per GPU on every node.

    Args:
        stage: the stage and its arguments, as they follow `stas` on the command line.
        run: runs a stage in this process and returns its exit code.
        check: exits if the arguments are wrong, so that the error appears once, not on every rank.
        processes: ranks on this node; None means one per GPU, or one if there is no GPU.
        nodes: number of nodes in the job; each runs this same command.
        rendezvous: host:port of the node where they meet; required for several nodes.
        job: a name that distinguishes this job from others at the same rendezvous; required for several nodes.
        node: this node's number, from 0; node 0 is the one in `rendezvous`. Required for several nodes.
        gpus: GPUs of this node that `train` and `infer` must find, one per rank; "all" means as many as there are, at
            least one; 0 means the CPU; None means GPUs if there are any.
        stalled_after: seconds without progress after which a rank counts as hung, and all ranks are ended.

    Returns:
        The stage's exit code; for several ranks, their `worst_exit_code`.

    Raises:
        MachineError: fewer GPUs than `gpus`.
        StoppedEarly: SIGTERM or SIGUSR1 arrived before the stage or its ranks started.
        TrainingError: other nodes did not come, or the port is in use.
        UsageError: several nodes without `rendezvous`, `job` and `node`.
    """
    if nodes > 1 and not (rendezvous and job and node is not None):
        raise UsageError(
            f"{nodes} nodes need --rendezvous HOST:PORT and --job NAME, the same on all of them, and each its own "
            f"--node INDEX, from 0 to {nodes - 1}"
        )
    listen()
    if not stage or stage[0] not in RANKED:
        return run(stage)
    count = _ranks(processes, gpus)
    check_stop()
    if gpus is not None:
        stage = [stage[0], "--device", "cuda" if gpus else "cpu", *stage[1:]]
    if count * nodes == 1:
        return run(stage)
    check(stage)
    place = ["127.0.0.1:0", "--rdzv-id", "launch"] if nodes == 1 else [str(rendezvous), "--rdzv-id", str(job)]
    meeting = ["--rdzv-backend", "stas", "--rdzv-conf", f"node={node or 0}", "--rdzv-endpoint", *place]
    if nodes == 1:  # nobody outside needs to reach the ranks
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with hung_ranks_ended(stalled_after, nodes, _ended):
        return _torchrun(["--nnodes", str(nodes), "--nproc-per-node", str(count), *meeting], stage, count)


def _ranks(processes: int | None, gpus: int | Literal["all"] | None) -> int:
    """The number of ranks on this node, after checking that it has the GPUs that were asked for."""
    if gpus == 0:
        return processes or 1
    found = _gpus()
    if gpus is None:
        return processes or found or 1
    least = max(processes or 1, 1 if gpus == "all" else gpus)
    if found < least:
        raise MachineError(
            f"--gpus {gpus}: this process sees {found} GPUs, and {least} are needed: run nvidia-smi and `stas doctor` "
            "on this node, give them to the job or the container, or say --gpus 0 to run on the CPU"
        )
    return processes or (found if gpus == "all" else gpus)


def worst_exit_code(codes: Sequence[int | None], stopped: bool) -> int:
    """One exit code for all ranks.

    Args:
        codes: each rank's exit code; None if it was killed or failed with a traceback.
        stopped: whether a signal asked the ranks to stop.
    """
    for code in (EXIT_USAGE, EXIT_BAD_INPUT, EXIT_FAILED):
        if code in codes:
            return code
    if all(code == EXIT_OK for code in codes):
        return EXIT_OK
    # A rank that stopped early has made sure of the checkpoint; torchrun then ends the others, whatever they are doing.
    return EXIT_RESUMABLE if stopped or EXIT_RESUMABLE in codes else EXIT_FAILED


def _torchrun(options: list[str], stage: Sequence[str], count: int) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    from stas.system.rendezvous import register

    check_stop()
    register()
    listen(signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    # torchrun's default of one thread per rank would leave half of the cores idle.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    failures: list[BaseException] = []

    def run_ranks() -> None:
        try:
            torchrun(parse_args([*options, "--no-python", "--", *_rank_command(stage)]))
        except BaseException as error:
            failures.append(error)

    with tempfile.TemporaryDirectory(prefix="stas-status-") as directory:
        os.environ[STATUS_DIRECTORY] = directory
        over = Event()
        watch = Thread(target=_kill_stuck_ranks, args=(Path(directory), over), daemon=True)
        watch.start()
        # Not in the main thread: there torchrun would answer signals by an exception wherever it is, also between
        # starting a rank and remembering it.
        agent = Thread(target=run_ranks, daemon=True)
        agent.start()
        _pass_on_signals(agent)
        del os.environ[STATUS_DIRECTORY]  # only the ranks need it
        over.set()
        watch.join()
        codes: list[int | None] = [int(code) for path in Path(directory).iterdir() if (code := path.read_text())]
    failure = failures[0] if failures else None
    if failure and not isinstance(failure, ChildFailedError):
        raise failure
    stopped = stop_asked() or (failure is not None and -failure.get_first_failure()[1].exitcode in SIGNALS)
    code = worst_exit_code(codes + [None] * (count - len(codes)), stopped)
    if failure and code not in (EXIT_OK, EXIT_RESUMABLE):
        complain(failure)
    if agent.is_alive():  # nothing can interrupt it
        close_standard_streams()
        os._exit(code)
    return code


def _rank_command(stage: Sequence[str]) -> list[str]:
    """A rank's command line. A signal simply ends a rank of `infer`, whose masks are each complete or not there."""
    entry = "stas.__main__" if stage[0] == "train" else "stas.cli"
    root = str(Path(stas.__path__[0]).resolve().parent)
    return [sys.executable, "-u", "-c", RANK.format(root=root, entry=entry, launcher=os.getpid()), *stage]


def _pass_on_signals(agent: Thread) -> None:
    """Wait for torchrun. Once a signal has arrived, pass it on to every rank, also to those that start only now."""
    told: set[int] = set()
    end = lonely = math.inf
    while agent.is_alive() and time.monotonic() < lonely:
        agent.join(0.1)
        if not stop_asked():
            continue
        now = time.monotonic()
        end = min(end, now + SHUTDOWN_TIMEOUT)
        ranks = {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}
        lonely = math.inf if ranks else min(lonely, now + LONELY_TIMEOUT)
        for rank in ranks if now > end else ranks - told:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL if now > end else signal.SIGTERM)
        told |= ranks


def _kill_stuck_ranks(status: Path, over: Event) -> None:
    """Kill this node's remaining ranks soon after one has died or failed. Runs until `over` is set.

    torchrun sends them SIGTERM, and kills those that do not react only after SHUTDOWN_TIMEOUT, which a stop with a
    checkpoint may need. A rank waiting inside NCCL for a dead one never reacts.
    """
    while not over.wait(1):
        ranks = [int(path.name) for path in status.iterdir()]
        lost = next((rank for rank in ranks if _lost(status, rank)), None)
        if lost is None or all(_ended(rank) for rank in ranks) or over.wait(BEREAVED_TIMEOUT):
            continue
        for rank in ranks:
            if not _ended(rank):
                log.error("rank process %d is still running after rank process %d was lost: killing it", rank, lost)
                with suppress(ProcessLookupError):  # torchrun got there first
                    os.kill(rank, signal.SIGKILL)


def _lost(status: Path, rank: int) -> bool:
    """Whether a rank failed, or ended without reporting an exit code; not if it finished or stopped early."""
    ended = _ended(rank)  # checked first, because the rank may be writing its exit code right now
    said = (status / str(rank)).read_text()
    return said not in ("", str(EXIT_OK), str(EXIT_RESUMABLE)) or (ended and not said)


def _ended(child: int) -> bool:
    """Whether a process started by torchrun has ended. Reaping it is left to torchrun."""
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # torchrun has reaped it
        return True


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
