"""A real Slurm of two nodes on this machine, with four fake GPUs each, and its own munge."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.launch import PATIENCE, wait_until

DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd")
# These are not GPUs, but Slurm counts and allocates them like GPUs.
PRETEND_GPUS = "/dev/null,/dev/zero,/dev/full,/dev/random"
ACTIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}


def why_not() -> str | None:
    """Why Slurm cannot run here, or None."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=path)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd starts jobs only as root"


@dataclass(frozen=True)
class Slurm:
    """A running cluster; with `environment`, client commands talk to it.

    Slurm forgets a job minutes after its end, here after two seconds, so `watch` looks at the jobs all the time.
    """

    environment: dict[str, str]
    seen: dict[str, dict[str, str]] = field(default_factory=dict)  # the last details of each job and array task

    def run(self, *line: object, **environment: str) -> str:
        """Run a client command; return its output."""
        done = subprocess.run(
            list(map(str, line)),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout.strip()

    def look(self) -> None:
        """Remember the details of every job that Slurm knows."""
        for line in self.run("scontrol", "--oneliner", "show", "job").splitlines():
            job = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if "JobId" in job:
                self.seen[job["JobId"]] = job

    def watch(self, stopped: threading.Event) -> None:
        """Look every second."""
        while not stopped.wait(1):
            self.look()

    def jobs(self) -> list[str]:
        """The numbers of all jobs there ever were."""
        self.look()
        return sorted(self.seen)

    def details(self, job: str) -> list[dict[str, str]]:
        """Last output of `scontrol show job`, one dictionary per task of an array."""
        self.look()
        found = [task for task in list(self.seen.values()) if job in (task["JobId"], task.get("ArrayJobId"))]
        assert found, f"no job {job}"
        return found

    def states(self, job: str) -> list[str]:
        """The states of a job's tasks, in order of number."""
        tasks = sorted(self.details(job), key=lambda task: int(task.get("ArrayTaskId", "0").split("-")[0]))
        return [task["JobState"] for task in tasks]

    def wait(self, job: str, seconds: float = PATIENCE) -> list[str]:
        """Wait for all tasks of a job to end; return their states."""
        end = time.monotonic() + seconds
        while ACTIVE & set(states := self.states(job)):
            assert time.monotonic() < end, f"job {job} is {states} after {seconds} s: {self.details(job)}"
            time.sleep(0.5)
        return states


@contextmanager
def start_slurm(root: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and two slurmd with everything under `root`; stop them at the end."""
    for directory in ("state", "spool-n1", "spool-n2", "munge"):
        (root / directory).mkdir(parents=True, mode=0o755)
    environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
    environment["PATH"] += ":/usr/sbin:/sbin"
    key = root / "munge" / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (root / "slurm.conf").write_text(_configuration(root))
    (root / "gres.conf").write_text(f"Name=gpu File={PRETEND_GPUS}\n")
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [f"--{name}-file={root}/munge/{name}" for name in ("pid", "log", "seed")]
    with ExitStack() as daemons:

        def daemon(*line: str) -> None:
            log = daemons.enter_context(open(root / f"{line[0]}-{line[-1].strip('-')}.out".replace("/", "_"), "w"))
            process = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
            daemons.callback(process.wait)
            daemons.callback(process.terminate)

        daemon(*munge, f"--socket={root}/munge/socket")
        wait_until((root / "munge" / "socket").exists, "munged")
        daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            daemon("slurmd", "-D", "-N", node)
        slurm = Slurm(environment)
        daemons.callback(lambda: slurm.run("scancel", "--full", "--signal=KILL", "--user=root"))
        wait_until(lambda: _idle(slurm) == 2, f"the nodes; see the logs in {root}")
        stopped = threading.Event()
        watching = threading.Thread(target=slurm.watch, args=[stopped])
        watching.start()
        daemons.callback(watching.join)
        daemons.callback(stopped.set)
        yield slurm


def _idle(slurm: Slurm) -> int:
    done = subprocess.run(["sinfo", "-hN", "-o", "%T"], env=slurm.environment, capture_output=True, text=True)
    return done.stdout.split().count("idle")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _configuration(root: Path) -> str:
    controller, first, second = _free_ports(3)
    # config_overrides: Slurm believes that the nodes have the 16 cores that jobs request. Credentials expire soon, so
    # that a requeued job starts again after seconds instead of two minutes.
    return f"""
ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=30
MinJobAge=2
NodeName=n1 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={first} CPUs=32 RealMemory=800000 Gres=gpu:4
NodeName=n2 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={second} CPUs=32 RealMemory=800000 Gres=gpu:4
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
