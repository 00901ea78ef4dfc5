"""The image: its packages, and every stage in real containers that can write only to their mounts."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image

from stas.errors import EXIT_OK, EXIT_RESUMABLE
from stas.paths import Workspace
from stas.training.metrics_log import read_metrics
from tests.support import containers
from tests.support.containers import podman, run_options
from tests.support.launch import PATIENCE, wait_until
from tests.support.runs import TINY

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
TINY_RECIPES = ("one", "two")
ENDLESS = 1_000_000  # epochs: the run must not finish before it is stopped


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docker_install", DOCKER / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = _module()


def requirements(*lines: str) -> list:
    return install.read_requirements("\n".join(lines))


def names(found: list) -> list[str]:
    return [str(requirement) for requirement in found]


# What install.py installs, on hand-made input.


def test_packages_of_the_base_keep_their_version():
    pins = requirements("numpy==2.5.5", "timm==1.0.31", "typing_extensions==4.16.0")
    base = {"torch": "2.6.0a0+df5bbc0", "numpy": "1.26.4", "typing-extensions": "4.12"}
    assert names(install.to_install(pins, base)) == ["timm==1.0.31"]


def test_torch_and_what_belongs_to_its_build_are_never_installed_with_the_rest():
    lines = ["torch==2.14.1", "torchvision==0.29.1", "triton==3.8.0", "nvidia-cublas==13.1", "cuda-bindings==13.5"]
    pins = requirements(*lines, "nvidia-ml-py==13.6", "torchmetrics==1.8")
    for base in ({"torch": "2.6.0a0"}, {}):  # with its own torch, and without torch, as the CPU variant
        assert names(install.to_install(pins, base)) == ["nvidia-ml-py==13.6", "torchmetrics==1.8"]


@pytest.mark.parametrize(
    ("constraint", "installed"),
    [
        ("Einops==0.8.1", "einops"),  # pip uses the constraint's version
        ("einops @ file:///einops.whl", "einops"),
        ("einops>=0.7", "einops==0.8.2"),
        ("torch==2.6.0", "einops==0.8.2"),
    ],
)
def test_the_lock_yields_to_the_constraints_of_the_base(constraint: str, installed: str):
    assert names(install.to_install(requirements("einops==0.8.2"), {}, requirements(constraint))) == [installed]


def test_lines_for_another_python_or_platform_and_comments_are_left_out():
    text = (
        "# made by uv\n--index-url https://example.org\n"
        "tomli==2.5.0 ; python_full_version < '3.9'\n"
        "six==1.17.0 ; sys_platform == 'win32'\n"
        "pillow==13.0.0 ; python_full_version >= '3.9'\n"
        "tqdm==4.70.1  # why\n"
    )
    assert [requirement.name for requirement in install.read_requirements(text)] == ["pillow", "tqdm"]


def test_a_package_of_the_base_that_is_too_old_is_replaced_but_never_torch():
    pins = requirements("kiwisolver==1.5.1", "torch==2.14.1", "tqdm==4.70.1")
    complaints = {
        "matplotlib 3.11.2 has requirement kiwisolver>=1.3.1, but you have kiwisolver 0.1.",
        "monai 1.6.1 has requirement torch>=2.8.0, but you have torch 2.6.0a0.",
        "tqdm 4.70.1 requires colorama, which is not installed.",
    }
    assert names(install.to_replace(complaints, pins)) == ["kiwisolver==1.5.1"]


def test_missing_dependencies_are_reported_as_pip_does():
    needs = requirements("torch>=2.6.0a0", "numpy>=1.26", "lmdb>=1.4")
    assert install.unmet(needs, {"torch": "2.6.0a0+df5bbc0", "numpy": "1.25.2"}) == {
        "stas has requirement numpy>=1.26, but you have numpy 1.25.2.",
        "stas requires lmdb>=1.4, which is not installed.",
    }
    assert "numpy" in str(install.to_replace(install.unmet(needs, {"numpy": "1"}), requirements("numpy==2.0")))


@pytest.mark.parametrize("lock", ["requirements.lock", "docker/v100.lock"])
def test_a_lock_has_every_dependency_of_the_project(lock: str):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    pins = {pin.name: next(iter(pin.specifier)).version for pin in requirements(*(ROOT / lock).read_text().split("\n"))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {install.canonicalize_name(name): version for name, version in pins.items()}
    assert install.unmet(requirements(*project["dependencies"]), found) == set()
    assert not {"pytest", "ruff", "pyright"} & set(found), "tools of developers have no place in the image"


def test_the_v100_lock_fits_its_base():
    lock = {pin.name: str(pin.specifier) for pin in requirements(*(DOCKER / "v100.lock").read_text().split("\n"))}
    assert lock["torch"] == "==2.6.0" and lock["numpy"].startswith("==1.26")
    assert lock["monai"].startswith("==1.5"), "1.6 needs a torch of 2.8"


# Entry point and linters.


def test_the_entry_point_sets_every_cache_and_becomes_python(tmp_path: Path):
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho "$$" "$@"; env\n')
    python.chmod(0o755)
    workspace = tmp_path / "ws"
    clean = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STAS_WORKSPACE": str(workspace), "HOME": "/nowhere"}
    with subprocess.Popen(["sh", DOCKER / "entrypoint.sh", "vote", "a b"], env=clean, stdout=subprocess.PIPE) as entry:
        assert entry.stdout
        first, *rest = entry.stdout.read().decode().splitlines()
    assert first == f"{entry.pid} -P -m stas launch vote a b", "not the process that gets the signals"
    found = dict(line.split("=", 1) for line in rest if "=" in line)
    caches = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in (*caches, "MPLCONFIGDIR"):
        assert Path(found[name]).is_relative_to(workspace / ".cache"), name
    assert found["USER"] == "stas"


def test_dockerfile_and_scripts_are_clean():
    tools = Path(sys.executable).parent
    scripts = [DOCKER / "entrypoint.sh", DOCKER / "stas", DOCKER / "run"]
    for command in ([tools / "hadolint", DOCKER / "Dockerfile"], [tools / "shellcheck", *scripts]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_names_the_same_bases():
    dockerfile, makefile = (DOCKER / "Dockerfile").read_text(), (ROOT / "Makefile").read_text()
    current, v100 = (re.search(rf"#   {name}.*?(nvcr\S+:\S+-py3)", dockerfile) for name in ("A100", "V100"))
    assert current and v100 and f"ARG BASE_IMAGE={current[1]}\n" in dockerfile
    assert v100[1] in makefile and v100[1] in (ROOT / "stas" / "doctor.py").read_text()


def _fake(directory: Path, name: str) -> Path:
    """A command that prints its arguments."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text('#!/bin/sh\necho "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("engine", "gpus"), [("docker", "--gpus all --ulimit memlock=-1"), ("podman", "--device nvidia.com/gpu=all")]
)
@pytest.mark.parametrize("has_gpu", [True, False])
def test_each_engine_is_asked_for_all_gpus_where_there_are_some(tmp_path: Path, engine: str, gpus: str, has_gpu: bool):
    path = _fake(tmp_path / "bin", engine)
    smi = _fake(tmp_path / "bin", "nvidia-smi")
    if not has_gpu:
        smi.write_text("#!/bin/sh\nexit 9\n")
    variables = {"DATA": tmp_path, "WORKSPACE": tmp_path / "ws", "ENGINE": f"{path} --debug", "ENGINE_FLAGS": "--a b"}
    clean = {"PATH": f"{path.parent}:{os.environ['PATH']}"} | {key: str(value) for key, value in variables.items()}
    command = [DOCKER / "run", "train", "--member", "1"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    said = done.stdout.strip()
    assert said.startswith("--debug run --rm --read-only ") and said.endswith(
        f" --a b stas {'--gpus 1 ' if has_gpu else ''}train --member 1"
    )
    assert f"--volume {tmp_path}:/data:ro --volume {tmp_path}/ws:/workspace" in said
    assert (gpus in said) == has_gpu
    assert ("no GPU here" in done.stderr) != has_gpu
    assert ("--user" in said) == (os.geteuid() != 0), "as root the image's own user, else who started it"


def test_a_run_without_data_says_what_is_missing():
    done = subprocess.run(["make", "run-train"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "DATA=" in done.stderr and "Train_Annotations" in done.stderr


# Real images and containers.


@pytest.fixture(scope="module")
def inspected(image: str) -> dict:
    return json.loads(podman("image", "inspect", image).stdout)[0]


@pytest.fixture(scope="module")
def chain(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, str]]:
    """Data, workspace and output of `make run-local`: all stages, without network, on a read-only root."""
    from scripts.make_sample import make_sample

    root = tmp_path_factory.mktemp("containers")
    make_sample(root / "data", images=10, seed=1, scale=0.3)
    workspace = containers.writable(root / "workspace")
    for seed, name in enumerate(TINY_RECIPES):
        recipe = TINY | {"name": name, "train": TINY["train"] | {"seed": seed}}
        (workspace / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    long = TINY | {"name": "long", "train": TINY["train"] | {"epochs": ENDLESS}}
    (workspace / "long.yaml").write_text(yaml.safe_dump(long))
    members = {"members": [f"{name}.yaml" for name in TINY_RECIPES], "ties": "background"}
    (workspace / "tiny.yaml").write_text(yaml.safe_dump(members))
    variables = {
        "DATA": root / "data",
        "WORKSPACE": workspace,
        "ENSEMBLE": "/workspace/tiny.yaml",
        "PREDICT": "Train_Images",
        "IMAGE": image,
        "ENGINE": " ".join(["podman", *containers.STORE]),
        "ENGINE_FLAGS": "--network none --read-only-tmpfs=false --env OMP_NUM_THREADS=1",
    }
    command = ["make", "run-local", *(f"{name}={value}" for name, value in variables.items())]
    done = subprocess.run(
        command, cwd=ROOT, env=containers.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    yield root / "data", workspace, done.stdout


@pytest.mark.cluster
def test_all_stages_end_in_a_voted_mask_for_each_image(chain: tuple[Path, Path, str]):
    data, workspace, output = chain
    sizes = {path.stem: Image.open(path).size for path in (data / "Train_Images").iterdir()}
    for name in (*TINY_RECIPES, "vote"):
        masks = {path.stem: path for path in (workspace / "predictions" / name).glob("*.png")}
        assert {stem: Image.open(path).size for stem, path in masks.items()} == sizes
        assert all(set(np.unique(np.asarray(Image.open(path)))) <= {0, 255} for path in masks.values())
    assert (workspace / "evaluation" / "scores.csv").is_file()
    assert "vote-held-out" in output
    assert output.count("stands for NVIDIA's entry point") == 10  # 1 preprocess, 2 x 3 of members, 2 votes, evaluate
    owners = {path.stat().st_uid for path in (workspace / "predictions").rglob("*")}
    assert owners == {containers.USER}


@pytest.mark.cluster
def test_the_torch_of_the_base_is_untouched(image: str, base_image: str):
    code = (
        "import hashlib, pathlib, torch; root = pathlib.Path(torch.__file__).parent;"
        "files = [root / 'version.py', *sorted(root.glob('*.so'))];"
        "print(torch.__version__, root, *(hashlib.sha256(f.read_bytes()).hexdigest() for f in files))"
    )
    before, after = (
        podman("run", "--rm", "--entrypoint", "python3", name, "-c", code).stdout for name in (base_image, image)
    )
    assert before == after
    changed = podman("image", "diff", image, base_image).stdout
    assert "/monai/" in changed  # the list is not empty
    assert not re.search(r"dist-packages/(torch|torchvision|triton|nvidia|numpy)(/|-\d)", changed)


@pytest.mark.cluster
def test_packages_fit_and_the_constraints_of_the_base_hold(image: str):
    code = "from importlib.metadata import version as v; print(v('einops'), v('kiwisolver'), v('nvidia-ml-py'))"
    script = f'python3 -m pip check; python3 -c "{code}"; python3 -m pip config list; echo $PIP_CONSTRAINT'
    lines = podman("run", "--rm", "--entrypoint", "sh", image, "-c", script).stdout.splitlines()
    assert lines[0] == "broken-before 1.0 requires surely-not-there, which is not installed."
    einops, kiwisolver, _ = lines[1].split()
    assert einops == containers.CONSTRAINTS["einops"]
    assert kiwisolver != containers.STAND_INS["kiwisolver"][0], "too old for matplotlib"
    assert lines[-1] == "/etc/pip/constraint.txt"


@pytest.mark.cluster
def test_packages_that_do_not_fit_fail_the_build(image: str, tmp_path: Path):
    containers.writable(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=99"]\n')
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    options = ["--rm", "--user", "0", "--entrypoint", "python3", "--volume", f"{tmp_path}:/new:ro", image]
    arguments = ["--project", "/new/pyproject.toml", "--lock", "/new/requirements.lock", "--torch-index", "none"]
    done = podman("run", *options, "/opt/stas/install.py", *arguments, check=False)
    assert done.returncode == 1
    assert "stas has requirement torch>=99, but you have torch" in done.stderr
    assert "broken-before" not in done.stderr


@pytest.mark.cluster
def test_user_labels_and_entry_point(inspected: dict, base_image: str):
    settings = inspected["Config"]
    assert settings["User"] == f"{containers.USER}:{containers.USER}"
    assert settings["Entrypoint"] == ["/usr/local/bin/entrypoint.sh"]
    assert settings["WorkingDir"] == "/workspace"
    assert "STAS_WORKSPACE=/workspace" in settings["Env"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in settings["Labels"].items()}
    assert labels["title"] == "stas" and labels["licenses"] == "MIT" and labels["base.name"] == base_image
    assert {"source", "version", "revision"} <= set(labels)


@pytest.mark.cluster
def test_any_user_with_an_unwritable_home(image: str, chain: tuple[Path, Path, str], tmp_path: Path):
    workspace = containers.writable(tmp_path / "workspace")
    os.chown(workspace, 4321, 4321)  # not in /etc/passwd
    options = [*run_options(chain[0], workspace), "--user", "4321:4321", "--env", "HOME=/nowhere"]
    training = ["--images", "/data/Train_Images", "--annotations", "/data/Train_Annotations"]
    podman("run", *options, image, "preprocess", "--recipe", "lite0", "--set", "data.size=64", *training)
    assert {path.stat().st_uid for path in workspace.rglob("*")} == {4321}
    assert (workspace / ".cache").is_dir()


@pytest.mark.cluster
def test_a_workspace_that_cannot_be_written_is_reported(image: str, chain: tuple[Path, Path, str], tmp_path: Path):
    workspace = containers.writable(tmp_path / "workspace")
    os.chown(workspace, 0, 0)
    done = podman("run", *run_options(chain[0], workspace), image, "recipes")
    assert "user 10001:10001" in done.stderr and "mount it writable" in done.stderr
    assert "ensemble small" in done.stdout  # commands that need no workspace work


@pytest.mark.cluster
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_training_with_75_and_the_same_command_resumes(
    image: str, chain: tuple[Path, Path, str], processes: int
):
    data, workspace, _ = chain
    run = f"long{processes}"
    name = f"stas-test-{run}-{os.getpid()}"
    options = [option for option in run_options(data, workspace) if option != "--rm"]
    train = ["--processes", processes, "train", "--recipe", "/workspace/long.yaml", "--run", run]
    metrics = Workspace(workspace).run(run).metrics
    podman("run", "--detach", "--name", name, *options, image, *train)
    try:
        wait_until(lambda: metrics.is_file() and len(read_metrics(metrics)) >= 2, f"two epochs of {name}")
        first = podman("exec", name, "cat", "/proc/1/cmdline").stdout.split("\0")
        assert first[1:5] == ["-P", "-m", "stas", "launch"], "Python is not the process that gets the signal"
        podman("stop", "--time", int(PATIENCE), name, timeout=2 * PATIENCE)  # then it would be killed
        assert podman("wait", name).stdout.strip() == str(EXIT_RESUMABLE), podman("logs", name).stderr
        assert "stopped in epoch" in podman("logs", name).stderr, "torchrun killed the ranks"
    finally:
        podman("rm", "--force", name, check=False)
    stopped = len(read_metrics(metrics))
    assert stopped >= 2
    done = podman("run", *run_options(data, workspace), image, *train, "--set", f"train.epochs={stopped + 3}")
    assert done.returncode == EXIT_OK
    assert f"{processes} ranks" in done.stderr
    assert f"resuming after epoch {stopped}" in done.stderr
    assert [row["epoch"] for row in read_metrics(metrics)] == list(range(1, stopped + 4))


@pytest.mark.cluster
def test_make_image_labels_what_it_builds(image: str, base_image: str):
    name = "localhost/stas:made"
    engine = " ".join(["podman", *containers.STORE])
    variables = {"IMAGE": name, "BASE_IMAGE": base_image, "ENGINE": engine}
    variables["BUILD_FLAGS"] = "--isolation chroot --network host"  # all layers exist, so pip needs no network
    command = ["make", "image", *(f"{key}={value}" for key, value in variables.items())]
    done = subprocess.run(command, cwd=ROOT, env=containers.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    labels = json.loads(podman("image", "inspect", name).stdout)[0]["Labels"]
    podman("image", "rm", name)
    assert labels["org.opencontainers.image.version"] == metadata.version("stas")
    assert re.fullmatch(r"[0-9a-f]{40}", labels["org.opencontainers.image.revision"])


def _torch_without_weight(index: Path) -> list[str]:
    """An index with empty CPU wheels, and mounts that put this environment's torch in their place."""
    versions = {"torch": metadata.version("torch"), "torchvision": metadata.version("torchvision")}
    needs = {
        "torch": ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec"],
        "torchvision": ["numpy", "pillow", f"torch=={versions['torch'].partition('+')[0]}"],
    }
    for name, found in versions.items():
        version = f"{found.partition('+')[0]}+cpu"
        wheel = index / name / f"{name}-{version}-py3-none-any.whl"
        wheel.parent.mkdir(parents=True)
        (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
        info = f"{name}-{version}.dist-info"
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(f"{name}-elsewhere.pth", "/opt/torch\n")
            file.writestr(f"{info}/METADATA", head + "".join(f"Requires-Dist: {need}\n" for need in needs[name]))
            file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{info}/RECORD", "")
    site = Path(str(metadata.distribution("torch").locate_file("")))
    parts = [site / part for part in ("torch", "torchgen", "torchvision", "torchvision.libs", "triton", "nvidia")]
    return [f"{index}:/index:ro", *(f"{part}:/opt/torch/{part.name}:ro" for part in parts if part.is_dir())]


@pytest.mark.cluster
def test_the_cpu_variant_takes_torch_from_its_index_and_runs(
    base_image: str, chain: tuple[Path, Path, str], tmp_path: Path
):
    volumes = _torch_without_weight(tmp_path / "index")
    name = "localhost/stas:test-cpu"
    containers.build(ROOT, containers.bare_base(), name, volumes, TORCH_INDEX="file:///index")
    code = (
        "import importlib.metadata as m; names = {d.metadata['Name'].lower() for d in m.distributions()};"
        "print(m.version('torch'), *sorted(n for n in names if n.startswith(('nvidia', 'cuda', 'triton'))))"
    )
    script = f'python3 -m pip check; python3 -c "{code}"'
    lines = podman("run", "--rm", "--entrypoint", "sh", name, "-c", script).stdout.splitlines()
    assert lines == ["No broken requirements found.", f"{metadata.version('torch').partition('+')[0]}+cpu nvidia-ml-py"]
    data, workspace, _ = chain
    options = [*run_options(data, workspace), *(option for volume in volumes for option in ("--volume", volume))]
    done = podman("run", *options, name, "train", "--recipe", "/workspace/one.yaml", "--run", "cpu")
    assert "epoch 2/2" in done.stderr


@pytest.mark.cluster
def test_a_code_change_leaves_the_packages_layer(image: str, inspected: dict, base_image: str, tmp_path: Path):
    for part in ("docker", "stas"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "requirements.lock", ".dockerignore"):
        shutil.copy2(ROOT / part, tmp_path)
    with (tmp_path / "stas" / "cli.py").open("a") as file:
        file.write(f"# changed {time.time()}\n")
    name = "localhost/stas:changed"
    containers.build(tmp_path, base_image, name)
    layers = {
        key: json.loads(podman("image", "inspect", key).stdout)[0]["RootFS"]["Layers"]
        for key in (image, base_image, name)
    }
    podman("image", "rm", name)
    same = sum(1 for old, new in zip(layers[image], layers[name], strict=True) if old == new)
    # lock, needs, packages, scripts; then the code and its bytecode
    assert same == len(layers[base_image]) + 4
    assert len(layers[name]) >= same + 2


HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}$", re.MULTILINE)


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock", "docker/v100.lock"])
def test_every_pin_has_a_hash(lock: str):
    entries = [entry for entry in re.split(r"\n(?=\S)", (ROOT / lock).read_text()) if not entry.startswith("#")]
    assert len(entries) > 50
    assert not [entry.split()[0] for entry in entries if "==" not in entry or not HASH.search(entry.replace(" \\", ""))]


def test_make_install_wants_the_hashes():
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "bin/pip install" in line]
    assert len(lines) == 2
    assert "--require-hashes --only-binary :all:" in lines[0]
    assert "--no-deps --no-build-isolation" in lines[1], "or pip would fetch whatever setuptools is newest"


def test_a_package_with_another_hash_is_not_installed(tmp_path: Path, capfd):
    wheel = tmp_path / "index" / "surprise-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "surprise-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: surprise\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    options = ["--no-index", "--find-links", str(wheel.parent), "--target", str(tmp_path / "site")]
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for digest, fits in [("0" * 64, False), (right, True)]:
        text = f"surprise==1.0 \\\n    --hash=sha256:{digest}\n"
        wanted, hashes = install.read_requirements(text), install.read_hashes(text)
        if fits:
            install.pip_install(wanted, hashes, *options)
        else:
            with pytest.raises(subprocess.CalledProcessError):
                install.pip_install(wanted, hashes, *options)
            assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
        assert (tmp_path / "site" / info).exists() is fits


def test_actions_are_pinned_by_commit():
    used = re.findall(r"uses: (\S+)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used), used
