"""A stand-in for the Job controller and the kubelet: runs a Job's pods as real containers in podman.

`podman kube play` takes a pod's YAML. This module adds the rest: one pod per index with its label and variable;
ConfigMaps and the downward API; $(VAR) in arguments; directories for claims and emptyDirs; podFailurePolicy for failed
pods. It does not imitate GPUs, nodes, pod networks or evictions by size.
"""

import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.containers import podman

Manifest = dict[str, Any]
INDEX_KEY = "batch.kubernetes.io/job-completion-index"
# kube play forgets a finished init container unless it must run at each start.
KEEP_INIT = {"io.podman.annotations.init.container.type": "always"}


def kubectl() -> str | None:
    """The kubectl of this environment, or else the one on the PATH."""
    return shutil.which("kubectl", path=Path(sys.executable).parent) or shutil.which("kubectl")


def render(directory: Path) -> list[Manifest]:
    """The objects of a Kustomize directory."""
    done = subprocess.run([kubectl() or "kubectl", "kustomize", directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def find(objects: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """The only object of a kind and name."""
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def containers(pod: Manifest) -> list[Manifest]:
    """A pod specification's containers, in starting order."""
    return [*pod.get("initContainers", []), *pod["containers"]]


@dataclass(frozen=True)
class Attempt:
    """How a pod ended."""

    code: int  # of the container that determined the outcome
    container: str  # its name
    log: str  # of all containers


@dataclass
class Node:
    """This machine as a Kubernetes node."""

    image: str  # replaces the manifests' image
    config: Mapping[str, str]  # the ConfigMap's values
    claims: Mapping[str, Path]  # the directory of each persistent volume claim
    scratch: Path  # for emptyDirs and pods' YAML
    subdomain: str = "stas"  # in the pods' host names, as a headless service sets it

    def run_job(self, job: Manifest, attempts: int = 5) -> dict[int, list[Attempt]]:
        """Run all indexes of a Job in sequence, each until its policy ends it."""
        spec = job["spec"]
        history: dict[int, list[Attempt]] = {}
        for index in range(spec.get("completions", 1)):
            history[index] = []
            failures = 0
            limit = spec.get("backoffLimitPerIndex", spec.get("backoffLimit", 6))
            while len(history[index]) < attempts:
                last = self.run_pod(self.pod(job, index))
                history[index].append(last)
                action = verdict(spec, last.code)
                failures += action == "Count"
                if action in ("Complete", "FailIndex", "FailJob") or failures > limit:
                    break
        return history

    def pod(self, job: Manifest, index: int, labels: Mapping[str, str] | None = None) -> Manifest:
        """The pod that the Job controller and the kubelet make from a Job's template for an index."""
        template = deepcopy(job["spec"]["template"])
        name = f"{job['metadata']['name']}-{index}-{secrets.token_hex(3)}"
        spec = template["spec"]
        own = {INDEX_KEY: str(index)} if job["spec"].get("completionMode") == "Indexed" else {}
        own = template["metadata"]["labels"] | own | dict(labels or {})
        spec["volumes"] = [self._volume(volume, spec, name) for volume in spec["volumes"]]
        spec["hostNetwork"] = True
        spec["hostname"] = f"{job['metadata']['name']}-{index}"
        # The kubelet also mounts this file, but only with the pod itself; it finds other pods by DNS.
        hosts = self.scratch / f"{name}-hosts"
        hosts.write_text("127.0.0.1 localhost\n" + self._addresses(job))
        spec["volumes"].append({"name": "hosts", "hostPath": {"path": str(hosts), "type": "File"}})
        for container in containers(spec):
            container["image"] = self.image
            container["volumeMounts"].append({"name": "hosts", "mountPath": "/etc/hosts", "readOnly": True})
            variables = self._variables(container, own)
            container["args"] = [expand(word, variables) for word in container["args"]]
            container["env"] = [{"name": key, "value": value} for key, value in variables.items()]
            container.pop("envFrom", None)
            # There are no GPUs here.
            for amounts in container["resources"].values():
                amounts.pop("nvidia.com/gpu", None)
        metadata = {"name": name, "labels": own, "annotations": KEEP_INIT}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    def run_pod(self, pod: Manifest) -> Attempt:
        """Run a pod until it ends."""
        with self.started(pod) as name:
            return self.ended(pod, name)

    @contextmanager
    def started(self, pod: Manifest) -> Iterator[str]:
        """Start a pod and wait for its init containers; yield its name. The pod is removed at the end."""
        name = pod["metadata"]["name"]
        file = self.scratch / f"{name}.yaml"
        file.write_text(yaml.safe_dump(pod))
        with ExitStack() as stack:
            for volume in pod["spec"]["volumes"]:
                if size := volume.pop("tmpfs", None):
                    stack.enter_context(_tmpfs(Path(volume["hostPath"]["path"]), size))
            file.write_text(yaml.safe_dump(pod))
            stack.callback(podman, "pod", "rm", "--force", "--time", 1, name, check=False)
            played = podman("kube", "play", "--network", "host", file, check=False, timeout=900)
            inits = [each["name"] for each in pod["spec"].get("initContainers", [])]
            failed = any(self._code(name, each) for each in inits)
            assert played.returncode == 0 or failed, played.stdout + played.stderr
            yield name

    def ended(self, pod: Manifest, name: str) -> Attempt:
        """Wait until a started pod ends; return its outcome."""
        log, code, decided = [], 0, ""
        for container in containers(pod["spec"]):
            decided = container["name"]
            which = f"{name}-{decided}"
            podman("wait", "--condition", "stopped", which, timeout=900)
            code = self._code(name, decided)
            done = podman("logs", which, check=False)
            log.append(f"--- {which}: {code}\n{done.stdout}{done.stderr}")
            if code:
                break
        return Attempt(code, decided, "\n".join(log))

    def at_work(self, name: str) -> bool:
        """Whether a started pod's main container is still running."""
        return podman("inspect", f"{name}-stas", "--format", "{{.State.Status}}").stdout.strip() == "running"

    def _code(self, pod: str, container: str) -> int:
        return int(podman("inspect", f"{pod}-{container}", "--format", "{{.State.ExitCode}}").stdout)

    def _addresses(self, job: Manifest) -> str:
        """Lines of a hosts file: each index of a Job by its names, with its own address on this machine."""
        names = [f"{job['metadata']['name']}-{index}" for index in range(job["spec"].get("completions", 1))]
        return "".join(f"127.0.1.{i + 1} {name}.{self.subdomain} {name}\n" for i, name in enumerate(names))

    def _variables(self, container: Manifest, labels: Mapping[str, str]) -> dict[str, str]:
        variables: dict[str, str] = {}
        for source in container.get("envFrom", []):
            assert source == {"configMapRef": {"name": "stas"}}, f"{source}: this kubelet knows one ConfigMap"
            variables |= self.config
        for entry in container.get("env", []):
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            match = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
            assert match, f"{path}: this kubelet knows labels"
            variables[entry["name"]] = labels[match[1]]
        if INDEX_KEY in labels:
            variables["JOB_COMPLETION_INDEX"] = labels[INDEX_KEY]
        return variables

    def _volume(self, volume: Manifest, spec: Manifest, pod: str) -> Manifest:
        if claim := volume.get("persistentVolumeClaim"):
            path = self.claims[claim["claimName"]]
            if not claim.get("readOnly"):
                _give_to_group(path, spec["securityContext"]["fsGroup"])
            return {"name": volume["name"], "hostPath": {"path": str(path), "type": "Directory"}}
        path = self.scratch / pod / volume["name"]
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o777)  # as the kubelet does
        host: Manifest = {"name": volume["name"], "hostPath": {"path": str(path), "type": "Directory"}}
        if volume["emptyDir"].get("medium") == "Memory":
            host["tmpfs"] = volume["emptyDir"]["sizeLimit"]
        return host


def expand(word: str, variables: Mapping[str, str]) -> str:
    """Expand an argument as the kubelet does: $(VAR) to its value, unknown variables unchanged, $$ to a dollar."""
    return re.sub(
        r"\$(?:\$|\(([A-Za-z_.-][\w.-]*)\))",
        lambda match: "$" if match[0] == "$$" else variables.get(match[1], match[0]),
        word,
    )


def verdict(spec: Manifest, code: int) -> str:
    """How a Job handles a pod that ended with an exit code: Complete, Ignore, FailIndex, FailJob or Count."""
    if code == 0:
        return "Complete"
    for rule in spec["podFailurePolicy"]["rules"]:
        condition = rule.get("onExitCodes")
        if condition and (code in condition["values"]) == (condition["operator"] == "In"):
            return rule["action"]
    return "Count"


def _give_to_group(directory: Path, group: int) -> None:
    """Give a volume to a group with write permission, as fsGroup does (`OnRootMismatch`: once)."""
    if directory.stat().st_gid != group:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, -1, group)
            path.chmod(path.stat().st_mode | (0o2770 if path.is_dir() else 0o660))


@contextmanager
def _tmpfs(directory: Path, size: str) -> Iterator[None]:
    options = f"mode=1777,size={size.removesuffix('i')}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
