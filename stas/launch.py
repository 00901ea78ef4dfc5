"""The entry point of every launcher: Slurm, Kubernetes, docker and the shell all end in `stas launch STAGE ...`.

torchrun is started only here. It hides its workers' exit codes, so every rank leaves its own in a status directory.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import FrameType

from stas.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, EXIT_USAGE, StoppedEarly, UsageError
from stas.paths import STATUS_DIRECTORY
from stas.system.heartbeat import STALLED_AFTER, hung_ranks_ended
from stas.system.resources import cores

log = logging.getLogger(__name__)

RANKED = ("train", "infer")  # the stages that run as several processes
# Seconds between SIGTERM and SIGKILL for the ranks. Longer than a checkpoint takes; shorter than Kubernetes'
# terminationGracePeriodSeconds and Slurm's --signal lead (a test compares them).
SHUTDOWN_TIMEOUT = 120
# Seconds the other ranks get to exit after one has died: to log why and to finish a checkpoint.
# torchrun gives them 30, or any amount of time if that rank only failed.
BEREAVED_TIMEOUT = 20


def launch(
    stage: Sequence[str],
    run: Callable[[Sequence[str]], int],
    check: Callable[[Sequence[str]], None],
    processes: int | None = None,
    nodes: int = 1,
    rendezvous: str | None = None,
    job: str | None = None,
    node: int | None = None,
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
        node: this node's number, from 0, if the launcher knows it; node 0 is the one in `rendezvous`. If None,
            torchrun compares host names and addresses, which a cluster's DNS may not know yet.
        stalled_after: seconds without progress after which a rank counts as hung, and all ranks are ended.

    Returns:
        The stage's exit code; for several ranks, their `worst_exit_code`.

    Raises:
        StoppedEarly: SIGTERM or SIGUSR1 arrived before the stage could handle it.
        UsageError: several nodes without `rendezvous` and `job`.
    """
    if nodes > 1 and not (rendezvous and job):
        raise UsageError(f"{nodes} nodes need --rendezvous HOST:PORT and --job NAME, the same on all of them")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGUSR1, _stop)
    if not stage or stage[0] not in RANKED:
        return run(stage)
    count = processes or _gpus() or 1
    if count * nodes == 1:
        return run(stage)
    check(stage)
    place = ["--standalone"]
    if rendezvous and job:
        place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous, "--rdzv-id", job]
    if node is not None:
        place += ["--rdzv-conf", f"is_host={str(node == 0).lower()}"]
    with hung_ranks_ended(stalled_after, nodes, _ended):
        return _torchrun(["--nnodes", str(nodes), "--nproc-per-node", str(count), *place], stage, count)


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
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, parse_args
    from torch.distributed.run import run as torchrun

    # torchrun's default of one thread per rank would leave half of the cores idle.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    if "--shutdown-timeout" in get_args_parser().format_help():  # older versions wait 30 seconds
        options = [*options, "--shutdown-timeout", str(SHUTDOWN_TIMEOUT)]
    # torchrun handles SIGTERM once it has started the ranks. Treat SIGUSR1, Slurm's warning, the same way.
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    stopped = False
    with tempfile.TemporaryDirectory(prefix="stas-status-") as directory:
        os.environ[STATUS_DIRECTORY] = directory
        over = Event()
        watch = Thread(target=_kill_stuck_ranks, args=(Path(directory), over), daemon=True)
        watch.start()
        try:
            # "--" keeps torchrun from reading the stage's options as its own.
            torchrun(parse_args([*options, "-m", "--", "stas", *stage]))
        except (SignalException, StoppedEarly):
            stopped = True
        except ChildFailedError as error:
            print(f"stas: {error}", file=sys.stderr)
        finally:
            del os.environ[STATUS_DIRECTORY]  # only the ranks need it
            over.set()
            watch.join()
        codes: list[int | None] = [int(code) for path in Path(directory).iterdir() if (code := path.read_text())]
    return worst_exit_code(codes + [None] * (count - len(codes)), stopped)


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

    return torch.cuda.device_count()


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedEarly(f"stopped by {signal.Signals(number).name}; run the same command again to resume")
