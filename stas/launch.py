"""The entry point of every launcher: Slurm, Kubernetes, docker and the shell all end in `stas launch STAGE ...`.

Only here does torchrun start. It hides its workers' exit codes, so every rank leaves its own in a status directory.
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
from stas.system.resources import cores

log = logging.getLogger(__name__)

RANKED = ("train", "infer")  # the stages that run as several processes
# Seconds between SIGTERM and SIGKILL for the ranks. Longer than a checkpoint takes; shorter than Kubernetes'
# terminationGracePeriodSeconds and Slurm's --signal lead (a test compares them).
SHUTDOWN_TIMEOUT = 120
# Seconds that the ranks have to end by themselves when one of them has died: to log why, and to end a checkpoint.
# torchrun gives them 30, and where the dead one had only failed, any time.
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
) -> int:
    """Run one stage, `train` and `infer` as one process per GPU of every node.

    Args:
        stage: the stage with its arguments, as after `stas`.
        run: runs a stage in this process and returns its exit code.
        check: ends this process where the arguments are wrong, so that every rank need not say so.
        processes: ranks on this node; None: one for each GPU, or one where there is none.
        nodes: nodes of the job; each runs this same command.
        rendezvous: host:port of one of the nodes, where they meet; needed for several.
        job: what tells this job from others that meet at the same place; needed for several nodes.
        node: this node's number, from 0, where the launcher knows it: node 0 is the one named by `rendezvous`. Else
            torchrun compares names and addresses, which a cluster's DNS may not know yet.

    Returns:
        The stage's exit code: the worst_exit_code of its ranks'.

    Raises:
        StoppedEarly: SIGTERM or SIGUSR1 came before the stage could handle it.
        UsageError: several nodes without a place to meet.
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
    return _torchrun(["--nnodes", str(nodes), "--nproc-per-node", str(count), *place], stage, count)


def worst_exit_code(codes: Sequence[int | None], stopped: bool) -> int:
    """One exit code for all ranks.

    Args:
        codes: what each rank ended with; None where it was killed or failed with a traceback.
        stopped: whether a signal asked for the end.
    """
    for code in (EXIT_USAGE, EXIT_BAD_INPUT, EXIT_FAILED):
        if code in codes:
            return code
    if all(code == EXIT_OK for code in codes):
        return EXIT_OK
    # One that stopped early has seen to the checkpoint; torchrun then ends the others, whatever they were still at.
    return EXIT_RESUMABLE if stopped or EXIT_RESUMABLE in codes else EXIT_FAILED


def _torchrun(options: list[str], stage: Sequence[str], count: int) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, parse_args
    from torch.distributed.run import run as torchrun

    # Half of the cores would idle with torchrun's default of one thread a rank.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    if "--shutdown-timeout" in get_args_parser().format_help():  # older ones wait 30 seconds
        options = [*options, "--shutdown-timeout", str(SHUTDOWN_TIMEOUT)]
    # torchrun takes over SIGTERM when it has started the ranks; SIGUSR1, Slurm's warning, shall mean the same.
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    stopped = False
    with tempfile.TemporaryDirectory(prefix="stas-status-") as directory:
        os.environ[STATUS_DIRECTORY] = directory
        over = Event()
        watch = Thread(target=_end_with_the_dead, args=(Path(directory), over), daemon=True)
        watch.start()
        try:
            # "--" keeps torchrun from reading the stage's options as its own.
            torchrun(parse_args([*options, "-m", "--", "stas", *stage]))
        except (SignalException, StoppedEarly):
            stopped = True
        except ChildFailedError as error:
            print(f"stas: {error}", file=sys.stderr)
        finally:
            del os.environ[STATUS_DIRECTORY]  # it was for the ranks
            over.set()
            watch.join()
        said: list[int | None] = [int(code) for path in Path(directory).iterdir() if (code := path.read_text())]
    return worst_exit_code(said + [None] * (count - len(said)), stopped)


def _end_with_the_dead(status: Path, over: Event) -> None:
    """End this node's ranks soon after one of them has died or failed; runs until `over`.

    torchrun asks them to by SIGTERM, and kills those that do not hear it only after SHUTDOWN_TIMEOUT, which a stop with
    a checkpoint may need. One that waits inside NCCL for a dead rank never hears it.
    """
    while not over.wait(1):
        ranks = [int(path.name) for path in status.iterdir()]
        lost = next((rank for rank in ranks if _lost(status, rank)), None)
        if lost is None or all(_ended(rank) for rank in ranks) or over.wait(BEREAVED_TIMEOUT):
            continue
        for rank in ranks:
            if not _ended(rank):
                log.error("process %d has not ended since rank process %d was lost: ending it", rank, lost)
                with suppress(ProcessLookupError):  # torchrun was faster
                    os.kill(rank, signal.SIGKILL)


def _lost(status: Path, rank: int) -> bool:
    """Whether a rank has failed, or ended without a word; not one that is done or stopped early."""
    ended = _ended(rank)  # before its word is read, which it may just be writing
    said = (status / str(rank)).read_text()
    return said not in ("", str(EXIT_OK), str(EXIT_RESUMABLE)) or (ended and not said)


def _ended(child: int) -> bool:
    """Whether a process that torchrun started has ended; it stays torchrun's to wait for."""
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # torchrun has waited for it
        return True


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedEarly(f"{signal.Signals(number).name} came; the same command goes on")
