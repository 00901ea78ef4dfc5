"""The Kubernetes manifests: rendered, checked as by an API server, and their pods run as real containers."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from pydantic import BaseModel

from stas.arguments import build_parser, seconds
from stas.config import Recipe
from stas.ensemble import load_ensemble
from stas.errors import EXIT_BAD_INPUT, EXIT_RESUMABLE, EXIT_USAGE
from stas.launch import RANKED, SHUTDOWN_TIMEOUT
from tests.support.containers import podman
from tests.support.kubelet import Attempt, Manifest, Node, containers, expand, find, kubectl, render, verdict
from tests.support.launch import PATIENCE, wait_until
from tests.support.runs import TINY

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
STAGES = ("preprocess", "train", "infer", "vote")
OLDEST = "1.33"  # the first version with stable backoffLimitPerIndex; kubernetes-validate supplies the newest
CHECKOV = "checkov==3.3.30"  # pins so many packages that it needs its own environment
GPU = "nvidia.com/gpu"
GPUS = 4
UNITS = {"": 1, "m": Fraction(1, 1000), "Mi": 2**20, "Gi": 2**30}


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Manifest]]:
    """The objects of every overlay."""
    if not kubectl():
        pytest.skip("no kubectl: install the development requirements, which have it")
    return {name: render(K8S / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    """The objects of one overlay."""
    return rendered[request.param]


def jobs(objects: Sequence[Manifest]) -> list[Manifest]:
    """All Jobs, including those that the JobSet controller would create."""
    made = [each for each in objects if each["kind"] == "Job"]
    for jobset in (each for each in objects if each["kind"] == "JobSet"):
        for replicated in jobset["spec"]["replicatedJobs"]:
            for number in range(replicated.get("replicas", 1)):
                name = f"{jobset['metadata']['name']}-{replicated['name']}-{number}"
                made.append(
                    {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, **replicated["template"]}
                )
    return made


def pods(objects: Sequence[Manifest]) -> list[Manifest]:
    """The pod specifications of all Jobs."""
    return [job["spec"]["template"]["spec"] for job in jobs(objects)]


def config(objects: Sequence[Manifest]) -> dict[str, str]:
    return find(objects, "ConfigMap", "stas")["data"]


def quantity(text: str) -> Fraction:
    """A Kubernetes quantity as a number."""
    match = re.fullmatch(r"(\d+)(\D*)", text)
    assert match, text
    return int(match[1]) * Fraction(UNITS[match[2]])


def where(file: str, pattern: str) -> str:
    """The place of a line in a manifest, for messages that say where to change it."""
    lines = (K8S / file).read_text().splitlines()
    found = [f"k8s/{file}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if pattern in line]
    return " and ".join(found)


# Content of the manifests.


def test_every_overlay_has_all_stages(overlay: list[Manifest]):
    stages = [job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] for job in jobs(overlay)]
    assert set(stages) == set(STAGES)
    assert {each["kind"] for each in overlay} >= {"ConfigMap", "PersistentVolumeClaim", "NetworkPolicy"}
    assert not any("namespace" in each["metadata"] for each in overlay), "the namespace is the site's choice"


def test_number_of_members(overlay: list[Manifest]):
    ensemble = config(overlay)["ENSEMBLE"]
    members = len(load_ensemble(ensemble).members)
    line = where("base/train.yaml", "completions:")
    jobset = [each for each in overlay if each["kind"] == "JobSet"]
    counts = {}
    for job in [] if jobset else jobs(overlay):
        if job["spec"].get("completionMode") == "Indexed":
            counts[job["metadata"]["name"]] = (job["spec"]["completions"], job["spec"]["parallelism"])
    for replicated in jobset[0]["spec"]["replicatedJobs"] if jobset else []:
        spec = replicated["template"]["spec"]
        if replicated["name"] == "train":
            counts["train"] = (replicated["replicas"],) * 2
        elif replicated["name"] == "infer":
            counts["infer"] = (spec["completions"], spec["parallelism"])
    assert len(counts) == 2
    for name, count in counts.items():
        assert count == (members, members), (
            f"{name}: {count} indexes, {members} members in {ensemble}: write `completions: {members}` in {line}"
        )


def test_a_changed_count_reaches_every_overlay(tmp_path: Path, rendered: dict[str, list[Manifest]]):
    subprocess.run(["cp", "-r", K8S, tmp_path], check=True)
    train = tmp_path / "k8s" / "base" / "train.yaml"
    train.write_text(train.read_text().replace("completions: 3", "completions: 5"))
    for name in OVERLAYS:
        objects = render(tmp_path / "k8s" / "overlays" / name)
        indexed = [job for job in jobs(objects) if job["spec"].get("completionMode") == "Indexed"]
        if any(each["kind"] == "JobSet" for each in objects):
            assert len([job for job in indexed if "-train-" in job["metadata"]["name"]]) == 5
            indexed = [job for job in indexed if "-infer-" in job["metadata"]["name"]]
        assert indexed
        for job in indexed:
            assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (5, 5), f"{name}: {job['metadata']}"


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "cpu-demo"])
def test_gpu_counts_agree(name: str, rendered: dict[str, list[Manifest]]):
    assert config(rendered[name])["GPUS"] == str(GPUS), where("base/kustomization.yaml", "GPUS=")
    for pod in pods(rendered[name]):
        for container in containers(pod):
            ranked = stage_of(container, config(rendered[name]))[0] in RANKED
            for kind, amounts in container["resources"].items():
                assert amounts.get(GPU) == (str(GPUS) if ranked else None), (
                    f"{name}: {kind} of {container['args']}: {amounts.get(GPU)} GPUs, not {GPUS} as everywhere: "
                    f"{where('base/train.yaml', GPU)} and {where('base/infer.yaml', GPU)}"
                )


def test_the_demo_needs_no_gpu(rendered: dict[str, list[Manifest]]):
    assert GPU not in yaml.safe_dump(rendered["cpu-demo"])
    assert config(rendered["cpu-demo"])["GPUS"] == "0"


def test_the_nodes_of_a_member_agree(rendered: dict[str, list[Manifest]]):
    (jobset,) = [each for each in rendered["jobset"] if each["kind"] == "JobSet"]
    (train,) = [each for each in jobset["spec"]["replicatedJobs"] if each["name"] == "train"]
    spec = train["template"]["spec"]
    arguments = spec["template"]["spec"]["containers"][0]["args"]
    nodes = arguments[arguments.index("--nodes") + 1]
    assert str(spec["completions"]) == str(spec["parallelism"]) == nodes, (
        f"write the same number in {where('overlays/jobset/train.yaml', 'completions:')}, "
        f"{where('overlays/jobset/train.yaml', 'parallelism:')} and {where('overlays/jobset/train.yaml', '--nodes,')}"
    )
    # <jobset>-<replicated job>-<its number>-<index>.<jobset>
    host = f"{jobset['metadata']['name']}-train-$(MEMBER)-0.{jobset['metadata']['name']}"
    assert arguments[arguments.index("--rendezvous") + 1].split(":")[0] == host


def stage_of(container: Manifest, settings: dict[str, str]) -> list[str]:
    """The stage with its arguments that a container runs, as the command line reads them."""
    known = settings | {"JOB_COMPLETION_INDEX": "0", "MEMBER": "0"}
    words = [expand(word, known) for word in container["args"]]
    assert not [word for word in words if "$(" in word], words
    return build_parser().parse_args(["launch", *words]).stage


def test_every_container_ends_in_the_one_entry_point(overlay: list[Manifest]):
    found = []
    for pod in pods(overlay):
        for container in containers(pod):
            assert "command" not in container, "the image's entry point runs `stas launch`"
            stage = stage_of(container, config(overlay))
            build_parser().parse_args(stage)  # exits if it is wrong
            found.append(stage[0])
    assert set(found) == {"preprocess", "train", "infer", "vote", "evaluate"}


def test_no_hyperparameter(overlay: list[Manifest]):
    allowed = {"ENSEMBLE", "GPUS", "TRAIN_IMAGES", "TRAIN_ANNOTATIONS", "PREDICT_IMAGES", "TIME_LIMIT"}
    assert set(config(overlay)) == allowed, "the ConfigMap says where things are, and for how long"
    keys = set(leaves(Recipe))
    for pod in pods(overlay):
        for container in containers(pod):
            assert not {entry["name"] for entry in container.get("env", [])} - {"MEMBER"}
            words = {word.lstrip("-").replace("-", "_") for word in container["args"] if word.startswith("-")}
            assert not words & (keys | {"set", "recipe"}), f"{container['args']}: that belongs into a recipe"


def leaves(model: type[BaseModel]) -> Iterator[str]:
    """The keys that a recipe may hold."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation)
        else:
            yield name


def test_exit_codes_are_the_projects(overlay: list[Manifest]):
    for job in jobs(overlay):
        spec = job["spec"]
        rules = spec["podFailurePolicy"]["rules"]
        assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        hopeless = "FailIndex" if "backoffLimitPerIndex" in spec else "FailJob"
        codes = (0, 1, EXIT_USAGE, EXIT_BAD_INPUT, EXIT_RESUMABLE, 137)
        assert [verdict(spec, code) for code in codes] == ["Complete", "Count", hopeless, hopeless, "Ignore", "Count"]


def test_times_fit_into_one_another(overlay: list[Manifest]):
    for pod in pods(overlay):
        assert pod["terminationGracePeriodSeconds"] >= SHUTDOWN_TIMEOUT + 30
        if "train" in pod["containers"][0]["args"]:
            assert pod["activeDeadlineSeconds"] > seconds(config(overlay)["TIME_LIMIT"]) + SHUTDOWN_TIMEOUT


def test_memory_and_disk_hold_what_is_put_there(overlay: list[Manifest]):
    for pod in pods(overlay):
        empty = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume}
        assert empty["shm"]["medium"] == "Memory"
        for container in containers(pod):
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert mounts["shm"]["mountPath"] == "/dev/shm"
            assert mounts["data"]["readOnly"] and set(mounts) == {volume["name"] for volume in pod["volumes"]}
            limits = container["resources"]["limits"]
            assert quantity(empty["shm"]["sizeLimit"]) <= quantity(limits["memory"]) / 2
            assert quantity(empty["tmp"]["sizeLimit"]) < quantity(limits["ephemeral-storage"])


# Checks of an API server.


@pytest.mark.parametrize("version", [OLDEST, "newest"])
def test_strict_schema(version: str, overlay: list[Manifest]):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    version = kubernetes_validate.latest_version() if version == "newest" else version
    for each in [*(each for each in overlay if each["kind"] != "JobSet"), *jobs(overlay)]:
        assert kubernetes_validate.validate(each, version, strict=True) == version[:4]


# The parts of the JobSet API (jobset.x-k8s.io/v1alpha2) used here; anything else is refused. The Jobs' templates are
# validated as Jobs. Reference: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2
JOBSET: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["replicatedJobs"],
            "properties": {
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "subdomain": {"type": "string"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                    },
                },
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["name", "action"],
                                "properties": {
                                    "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "uniqueItems": True,
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                    "targetReplicatedJobs": {"type": "array", "items": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object", "required": ["spec"]},
                            "dependsOn": {
                                "type": "array",
                                "maxItems": 1,
                                "items": {
                                    "type": "object",
                                    "additionalProperties": False,
                                    "required": ["name", "status"],
                                    "properties": {
                                        "name": {"type": "string"},
                                        "status": {"enum": ["Ready", "Complete"]},
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


def test_jobset_schema(rendered: dict[str, list[Manifest]]):
    jsonschema = pytest.importorskip("jsonschema")
    (jobset,) = [each for each in rendered["jobset"] if each["kind"] == "JobSet"]
    jsonschema.validate(jobset, JOBSET)
    replicated = jobset["spec"]["replicatedJobs"]
    assert [each["name"] for each in replicated] == list(STAGES)
    # Each stage waits until all Jobs of the previous one are done.
    depends = [each.get("dependsOn", []) for each in replicated]
    assert depends == [[], *([{"name": stage, "status": "Complete"}] for stage in STAGES[:-1])]
    # A deleted Job would be recreated.
    assert not any("ttlSecondsAfterFinished" in each["template"]["spec"] for each in replicated)


def test_rules_beyond_the_schema(overlay: list[Manifest]):
    for job in jobs(overlay):
        spec, pod = job["spec"], job["spec"]["template"]["spec"]
        actions = {rule["action"] for rule in spec["podFailurePolicy"]["rules"]}
        assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"
        assert spec["podReplacementPolicy"] == "Failed", "the only value beside podFailurePolicy"
        assert ("FailIndex" in actions) == ("backoffLimitPerIndex" in spec)
        assert "backoffLimitPerIndex" not in spec or spec["completionMode"] == "Indexed"
        for container in containers(pod):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests.keys() == limits.keys() >= {"cpu", "memory", "ephemeral-storage"}
            assert all(quantity(requests[key]) <= quantity(limits[key]) for key in limits)


def test_restricted_pod_security(overlay: list[Manifest]):
    for pod in pods(overlay):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all({"emptyDir", "persistentVolumeClaim"} & volume.keys() for volume in pod["volumes"])
        security = pod["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == security["fsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["imagePullPolicy"] == "IfNotPresent"
            assert ":" in container["image"], "a tag says which image"


def test_checkov(tmp_path: Path, rendered: dict[str, list[Manifest]]):
    uv = Path(sys.executable).parent / "uv"
    for name, objects in rendered.items():
        known = [each for each in objects if each["kind"] != "JobSet"]
        known += [job for job in jobs(objects) if job not in known]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(known))
    command = [uv, "tool", "run", "--from", CHECKOV, "checkov", "--config-file", K8S / "checkov.yaml"]
    done = subprocess.run([*command, "--skip-download", "-d", tmp_path], capture_output=True, text=True)
    if "Failed to fetch" in done.stderr and not os.environ.get("CI"):
        pytest.skip(f"{CHECKOV} is not here and cannot be fetched")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"Passed checks: (\d+), Failed checks: 0", done.stdout)
    assert passed and int(passed[1]) > 500, done.stdout


# The script that applies them. Its fake kubectl answers from one file per Job, using the real kubectl's JSONPath.

FAKE_KUBECTL = f"""\
#!{sys.executable}
import json, os, pathlib, re, subprocess, sys
import yaml
words, state = sys.argv[1:], pathlib.Path(os.environ["FAKE_STATE"])
with open(state / "calls", "a") as calls:
    calls.write(" ".join(words) + "\\n")
if words[:1] == ["--namespace"]:
    words = words[2:]
option = {{word.split("=", 1)[0]: word.split("=", 1)[1] for word in words if word.startswith("--") and "=" in word}}
if words[0] == "kustomize":
    sys.exit(subprocess.run([os.environ["REAL_KUBECTL"], *words]).returncode)
if words[0] == "apply":
    selector = option["--selector"]
    match = re.fullmatch(r"(\\S+?)(=| notin )\\(?([\\w,]+)\\)?", selector)
    for each in yaml.safe_load_all(sys.stdin):
        value = each["metadata"].get("labels", {{}}).get(match[1])
        if (value in match[3].split(",")) == (match[2] == "="):
            with open(state / "applied", "a") as applied:
                applied.write(each["kind"] + "/" + each["metadata"]["name"] + "\\n")
            if each["kind"] == "Job":
                plan = state / ("plan-" + each["metadata"]["name"])
                steps = json.loads(plan.read_text()) if plan.exists() else [{{"type": "Complete"}}]
                (state / each["metadata"]["name"]).write_text(json.dumps([each, steps]))
elif words[:3] == ["get", "pods", "--selector=" + words[2].partition("=")[2]]:
    print(*(path.name.replace("pod-", "pod/") for path in sorted(state.glob("pod-*"))), sep="\\n")
elif words[0] == "get":
    kind, name = words[1].split("/")
    if kind == "pod":
        found = json.loads((state / ("pod-" + name)).read_text())
    else:
        path = state / name
        if not path.exists():
            sys.exit("Error from server (NotFound)")
        found, steps = json.loads(path.read_text())
        step = steps[0]
        if "conditions" in words[-1] and len(steps) > 1:
            path.write_text(json.dumps([found, steps[1:]]))
        conditions = [dict(type=step["type"], status="True", message=step.get("message", ""))] if "type" in step else []
        found["status"] = step | {{"conditions": conditions}}
    local = [os.environ["REAL_KUBECTL"], "patch", "--local", "-f", "-", "--type=merge", "-p", "{{}}", *words[2:]]
    sys.exit(subprocess.run(local, input=json.dumps(found), text=True).returncode)
elif words[0] == "delete":
    (state / words[1].split("/")[1]).unlink()
elif words[0] == "logs":
    print("what the pod said")
else:
    sys.exit(f"unexpected: {{words}}")
"""


@pytest.fixture
def cluster(tmp_path: Path, rendered: dict[str, list[Manifest]]) -> Path:
    """A directory with a fake kubectl and its state."""
    fake = tmp_path / "bin" / "kubectl"
    fake.parent.mkdir()
    fake.write_text(FAKE_KUBECTL)
    fake.chmod(0o755)
    return tmp_path


def submit(cluster: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}",
        "FAKE_STATE": str(cluster),
        "REAL_KUBECTL": str(kubectl()),
        "KUBECONFIG": os.devnull,
        "SECONDS_BETWEEN": "0",
    }
    command = [ROOT / "scripts" / "submit_k8s", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_submit_goes_stage_by_stage(cluster: Path):
    (cluster / "plan-stas-train").write_text(
        json.dumps([{"active": 3}, {"active": 3, "ready": 3}, {"type": "Complete", "succeeded": 3}])
    )
    done = submit(cluster, "--namespace", "lab", "cpu-demo")
    assert done.returncode == 0, done.stderr
    applied = (cluster / "applied").read_text().split()
    assert set(applied[:-4]) >= {"ConfigMap/stas", "PersistentVolumeClaim/stas-data", "NetworkPolicy/stas"}
    assert applied[-4:] == [f"Job/stas-{stage}" for stage in STAGES]
    assert "job/stas-train: pods: 3 ready of 3,  done,  failed" in done.stderr
    calls = (cluster / "calls").read_text().splitlines()
    assert all(call.startswith("--namespace lab ") for call in calls if not call.startswith("kustomize"))


def test_submit_again_replaces_ended_jobs(cluster: Path):
    assert submit(cluster, "cpu-demo").returncode == 0
    assert submit(cluster, "cpu-demo").returncode == 0
    calls = (cluster / "calls").read_text().splitlines()
    assert [call for call in calls if "delete" in call] == [f"delete job/stas-{stage} --wait" for stage in STAGES]


def test_submit_leaves_a_running_job_alone(cluster: Path):
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "stas-preprocess"}, "spec": {}}
    (cluster / "stas-preprocess").write_text(json.dumps([job, [{"active": 1}]]))
    assert submit(cluster, "cpu-demo").returncode == 0
    assert "delete" not in (cluster / "calls").read_text()


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (EXIT_USAGE, 2), (EXIT_BAD_INPUT, 3), (137, 1)])
def test_submit_says_which_index_failed(code: int, expected: int, cluster: Path):
    failed = {"type": "Failed", "message": "1 index failed", "failedIndexes": "1", "completedIndexes": "0,2"}
    (cluster / "plan-stas-train").write_text(json.dumps([{"active": 3}, failed]))
    for name, index, ended in (("early", "0", EXIT_RESUMABLE), ("bad", "1", code)):
        statuses = [{"name": "stas", "state": {"terminated": {"exitCode": ended}}}]
        labels = {"batch.kubernetes.io/job-completion-index": index}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}}
        (cluster / f"pod-{name}").write_text(json.dumps(pod | {"status": {"containerStatuses": statuses}}))
    done = submit(cluster, "gpu-a100")
    assert done.returncode == expected, done.stderr
    assert "job/stas-train failed in index 1: 1 index failed" in done.stderr
    assert "the other members are untouched, done: 0,2." in done.stderr
    assert f"--- pod/bad, index 1; exit codes:  {code}\nwhat the pod said" in done.stderr
    assert "early" not in done.stderr, "a pod that another one followed is no failure"
    assert (cluster / "applied").read_text().split()[-1] == "Job/stas-train", "nothing after the stage that failed"


def test_submit_dry_run_asks_no_cluster(cluster: Path):
    done = submit(cluster, "--dry-run", "kueue")
    assert done.returncode == 0, done.stderr
    assert [re.findall(r"component=(\w+)", line) for line in done.stdout.splitlines()] == [
        [],
        *([stage] for stage in STAGES),
    ]
    assert (cluster / "calls").read_text().startswith("kustomize ") and not (cluster / "applied").exists()


@pytest.mark.parametrize("arguments", [(), ("nowhere",), ("--such",), ("cpu-demo", "kueue"), ("jobset",)])
def test_submit_refuses(arguments: tuple[str, ...], cluster: Path):
    done = submit(cluster, *arguments)
    assert done.returncode == 2
    assert not (cluster / "applied").exists()
    if arguments == ("jobset",):
        assert "kubectl apply -k" in done.stderr, "what to do instead"


# Pods run as real containers.


@pytest.fixture(scope="module")
def data(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data volume: the sample, and ensembles of three members that train in seconds."""
    root = tmp_path_factory.mktemp("data")
    subprocess.run(["cp", "-r", sample / "Train_Images", sample / "Train_Annotations", root], check=True)
    new = root / "New"
    new.mkdir()
    for path in sorted((root / "Train_Images").iterdir())[:3]:
        (new / f"new_{path.name}").write_bytes(path.read_bytes())
    for seed, name in enumerate("abc"):
        recipe = TINY | {"name": name, "train": TINY["train"] | {"seed": seed}}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    other = TINY | {"name": "unprepared", "data": TINY["data"] | {"size": 96}}
    (root / "unprepared.yaml").write_text(yaml.safe_dump(other))
    endless = TINY | {"name": "endless", "train": TINY["train"] | {"epochs": 10**6}}
    (root / "endless.yaml").write_text(yaml.safe_dump(endless))
    for name, members in (
        ("ensemble", "abc"),
        ("one-unprepared", ["a", "unprepared", "c"]),
        ("one-endless", ["endless", "b"]),
    ):
        (root / f"{name}.yaml").write_text(
            yaml.safe_dump({"members": [f"{each}.yaml" for each in members], "ties": "background"})
        )
    subprocess.run(["chmod", "-R", "a+rX", root], check=True)
    return root


@pytest.fixture(scope="module")
def node(image: str, data: Path, rendered: dict[str, list[Manifest]], tmp_path_factory: pytest.TempPathFactory) -> Node:
    """A node with an empty workspace volume."""
    claims = {"stas-data": data, "stas-workspace": tmp_path_factory.mktemp("workspace")}
    settings = config(rendered["cpu-demo"]) | {"ENSEMBLE": "/data/ensemble.yaml", "PREDICT_IMAGES": "/data/New"}
    settings["OMP_NUM_THREADS"] = "1"  # as on a small machine
    return Node(image, settings, claims, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def prepared(node: Node, rendered: dict[str, list[Manifest]]) -> list[Attempt]:
    """The attempts of the Job that makes the store."""
    return run_stage(node, rendered, "preprocess")[0]


@pytest.fixture(scope="module")
def chain(
    node: Node, prepared: list[Attempt], rendered: dict[str, list[Manifest]]
) -> dict[str, dict[int, list[Attempt]]]:
    """The attempts of all Jobs' pods, by stage."""
    return {"preprocess": {0: prepared}} | {stage: run_stage(node, rendered, stage) for stage in STAGES[1:]}


def run_stage(node: Node, rendered: dict[str, list[Manifest]], stage: str) -> dict[int, list[Attempt]]:
    """Run a stage's Job; return the attempts of its pods by index."""
    began = time.monotonic()
    ended = node.run_job(find(rendered["cpu-demo"], "Job", f"stas-{stage}"))
    print(f"{stage}: {len(ended)} pods, {time.monotonic() - began:.0f} s")
    return ended


def workspace(node: Node) -> Path:
    return node.claims["stas-workspace"]


def test_all_jobs_run_to_voted_masks_and_scores(node: Node, chain: dict[str, dict[int, list[Attempt]]]):
    for stage, indexes in chain.items():
        assert list(indexes) == list(range(3 if stage in RANKED else 1))
        for attempts in indexes.values():
            assert [attempt.code for attempt in attempts] == [0], attempts[-1].log
    voted = sorted((workspace(node) / "predictions" / "vote").glob("*.png"))
    assert [path.stem for path in voted] == [f"new_sample_{number:04d}" for number in range(3)]
    for path in voted:
        with Image.open(path) as mask:
            assert mask.mode == "L" and set(mask.tobytes()) <= {0, 255}
    held_out = json.loads((workspace(node) / "runs" / "a" / "split.json").read_text())["validation"]
    assert {path.stem for path in (workspace(node) / "predictions" / "vote-held-out").glob("*.png")} == set(held_out)
    assert any((workspace(node) / "evaluation").iterdir())
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in workspace(node).rglob("*")}
    assert owners == {(10001, 10001)}, "everything was written by the image's user"


def test_a_pod_that_starts_twice_works_once(
    node: Node, chain: dict[str, dict[int, list[Attempt]]], rendered: dict[str, list[Manifest]]
):
    before = {path: path.stat().st_mtime_ns for path in workspace(node).glob("*/*/*") if ".cache" not in path.parts}
    again = node.run_job(find(rendered["cpu-demo"], "Job", "stas-train"))
    assert [[attempt.code for attempt in attempts] for attempts in again.values()] == [[0], [0], [0]]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_member_that_fails_leaves_the_others_running(
    node: Node, chain: dict[str, dict[int, list[Attempt]]], rendered: dict[str, list[Manifest]]
):
    broken = Node(node.image, dict(node.config) | {"ENSEMBLE": "/data/one-unprepared.yaml"}, node.claims, node.scratch)
    ended = broken.run_job(find(rendered["cpu-demo"], "Job", "stas-train"))
    codes = {index: [attempt.code for attempt in attempts] for index, attempts in ended.items()}
    assert codes == {0: [0], 1: [EXIT_USAGE], 2: [0]}, "FailIndex: tried once; the others are done"
    assert "stas preprocess" in ended[1][0].log, "the remedy"
    (vote,) = broken.run_job(find(rendered["cpu-demo"], "Job", "stas-vote")).values()
    assert vote[-1].code in (EXIT_USAGE, EXIT_BAD_INPUT) and vote[-1].container == "vote" and len(vote) == 1
    assert "unprepared" in vote[-1].log, "the vote says who is missing"


def epochs_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def wait_for_epochs(run: Path, count: int, node: Node, pod: Manifest, name: str) -> None:
    """Wait until a pod's training has finished `count` epochs."""

    def done() -> bool:
        assert node.at_work(name), node.ended(pod, name).log
        return epochs_done(run) >= count

    wait_until(done, f"{count} epochs")


def with_seconds_left(node: Node, run: Path, seconds: float) -> Node:
    """The same node, with a time limit that leaves a stopped run `seconds` more."""
    spent = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["elapsed"]
    settings = dict(node.config) | {"TIME_LIMIT": f"{spent + seconds:.0f}s"}
    return Node(node.image, settings, node.claims, node.scratch)


def test_a_stopped_pod_exits_resumable_and_the_next_one_resumes(
    node: Node, prepared: list[Attempt], rendered: dict[str, list[Manifest]]
):
    job = find(rendered["cpu-demo"], "Job", "stas-train")
    settings = dict(node.config) | {"ENSEMBLE": "/data/one-endless.yaml"}
    endless = Node(node.image, settings, node.claims, node.scratch)
    run = workspace(node) / "runs" / "endless"
    pod = endless.pod(job, 0)
    with endless.started(pod) as name:
        wait_for_epochs(run, 3, endless, pod, name)
        podman("pod", "stop", "--time", job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], name)
        stopped = endless.ended(pod, name)
    assert stopped.code == EXIT_RESUMABLE, stopped.log
    assert "stopped in epoch" in stopped.log, "torchrun killed the ranks"
    assert verdict(job["spec"], stopped.code) == "Ignore"
    before = epochs_done(run)
    limited = with_seconds_left(endless, run, 20)
    replaced = limited.run_pod(limited.pod(job, 0))
    assert replaced.code == 0, replaced.log
    assert f"resuming after epoch {before}" in replaced.log
    assert epochs_done(run) > before


def test_two_nodes_train_one_member_and_stop_together(
    node: Node, prepared: list[Attempt], rendered: dict[str, list[Manifest]]
):
    (jobset,) = [each for each in rendered["jobset"] if each["kind"] == "JobSet"]
    job = next(job for job in jobs([jobset]) if job["metadata"]["name"] == "stas-train-0")
    assert job["spec"]["completions"] == 2
    settings = dict(node.config) | {"ENSEMBLE": "/data/one-endless.yaml"}
    volume = workspace(node).parent / "two-nodes"
    volume.mkdir()
    subprocess.run(["cp", "-r", workspace(node) / "stores", volume], check=True)
    claims = dict(node.claims) | {"stas-workspace": volume}
    pair = Node(node.image, settings, claims, node.scratch)
    run = volume / "runs" / "endless"

    def both(pair: Node, stop: bool) -> list[Attempt]:
        made = [pair.pod(job, index, {"jobset.sigs.k8s.io/job-index": "0"}) for index in range(2)]
        with pair.started(made[0]) as first, pair.started(made[1]) as second:
            if stop:
                wait_for_epochs(run, 3, pair, made[0], first)
                podman("pod", "stop", "--time", 180, second)
            with ThreadPoolExecutor() as threads:
                return list(threads.map(pair.ended, made, (first, second)))

    stopped = both(pair, stop=True)
    assert [attempt.code for attempt in stopped] == [EXIT_RESUMABLE] * 2, "\n".join(each.log for each in stopped)
    before = epochs_done(run)
    ended = both(with_seconds_left(pair, run, 20), stop=False)
    assert [attempt.code for attempt in ended] == [0, 0], "\n".join(each.log for each in ended)
    assert f"resuming after epoch {before}" in ended[0].log + ended[1].log


def test_the_script_is_executable():
    assert (ROOT / "scripts" / "submit_k8s").stat().st_mode & stat.S_IXUSR
