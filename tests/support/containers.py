"""Real containers without a daemon: podman with its own storage, and the project's image on a base built here.

The base stands in for NVIDIA's: Debian's Python with a torch that pip must not touch, constraints for pip, and an entry
point. Libraries that only a GPU would load are left out, which saves minutes. STAS_TEST_CACHE keeps base and layers.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("STAS_TEST_CACHE", Path.home() / ".cache" / "stas-tests")).absolute()
RUN_ROOT = Path("/run") / f"stas-tests-{hashlib.sha256(str(CACHE).encode()).hexdigest()[:8]}"
IMAGE = "localhost/stas:test"
USER = 10001
SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}  # the Debian release with this Python, whose torch the base gets
# overlay, because `vfs` copies all layers for each new one.
STORE = ["--root", str(CACHE / "store"), "--runroot", str(RUN_ROOT), "--storage-driver", "overlay"]
# A sandbox may forbid raising limits and creating networks.
CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
NVIDIA_ENTRYPOINT = """\
#!/bin/bash
echo "== stands for NVIDIA's entry point ==" >&2
exec "$@"
"""
# Packages that the base takes from this environment, with their dependencies.
IN_BASE = ("torch", "torchvision")
# Empty packages: one that is broken already, one too old for matplotlib.
STAND_INS = {"broken-before": ("1.0", "surely-not-there"), "kiwisolver": ("0.1", None)}
CONSTRAINTS = {"einops": "0.8.1"}  # not the lock's version
CONSTRAINT_FILE = "etc/pip/constraint.txt"
LAYER = 2**30  # bytes of torch in a layer: while it is committed, there are three copies


def podman(*arguments: object, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run podman and wait for it.

    Raises:
        AssertionError: it failed, with its output; unless `check` is false.
    """
    command = ["podman", *STORE, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def environment() -> dict[str, str]:
    """The environment in which podman finds its configuration."""
    (CACHE / "tmp").mkdir(parents=True, exist_ok=True)
    configuration = CACHE / "containers.conf"
    if not configuration.exists() or configuration.read_text() != CONFIGURATION:
        configuration.write_text(CONFIGURATION)
    return os.environ | {"CONTAINERS_CONF": str(configuration), "TMPDIR": str(CACHE / "tmp")}


def missing() -> str:
    """Why containers cannot run here; empty if they can."""
    if os.geteuid() != 0:
        return "containers are made as root"
    if sys.version_info[:2] not in SUITES:
        return f"no Debian has Python 3.{sys.version_info.minor}, whose torch the base would get"
    tools = [tool for tool in ("podman", "buildah", "debootstrap", "runc") if not shutil.which(tool)]
    return f"not installed: {', '.join(tools)}" if tools else ""


@pytest.fixture(scope="session")
def base_image() -> str:
    """Name of the base with torch, built if missing."""
    if reason := missing():
        pytest.skip(reason)
    return with_torch(bare_base())


@pytest.fixture(scope="session")
def image(base_image: str) -> str:
    """Name of the project's image, built from the Dockerfile; unchanged layers come from the last build."""
    build(ROOT, base_image, IMAGE)
    return IMAGE


def build(context: Path, base: str, name: str, volumes: Sequence[str] = (), **arguments: str) -> str:
    """Build the Dockerfile of a checkout on a base, with build arguments and mounts; return the build's output."""
    with _building(), tempfile.TemporaryDirectory() as directory:
        options = ["--isolation", "chroot", "--network", "host", *_pip_as_here(Path(directory))]
        for key, value in {"BASE_IMAGE": base, **arguments}.items():
            options += ["--build-arg", f"{key}={value}"]
        for volume in volumes:
            options += ["--volume", volume]
        file = context / "docker" / "Dockerfile"
        done = podman("build", *options, "--file", file, "--tag", name, context, timeout=1800)
    return done.stdout + done.stderr


def run_options(data: Path, workspace: Path) -> list[str]:
    """Options with which the tests run the image: only the workspace and /tmp are writable."""
    options = ["--rm", "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--env", "OMP_NUM_THREADS=1"]
    return [*options, "--volume", f"{data}:/data:ro", "--volume", f"{workspace}:/workspace"]


def writable(directory: Path) -> Path:
    """Make a directory that belongs to the image's user and is reachable for it."""
    directory.mkdir(parents=True, exist_ok=True)
    os.chown(directory, USER, USER)
    for parent in directory.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    return directory


def bare_base() -> str:
    """Name of a Debian image with Python and pip."""
    name = f"localhost/stas-debian:{_key(SUITES[sys.version_info[:2]], _debootstrap.__code__.co_consts)}"
    with _building():
        if podman("image", "exists", name, check=False).returncode:
            _remove("localhost/stas-debian")
            _commit(_debootstrap, "scratch", name)
    return name


def with_torch(bare: str) -> str:
    """Name of the bare image with this environment's torch and the other parts of NVIDIA's images."""
    packages = _closure(IN_BASE)
    versions = [f"{package.metadata['Name']}={package.version}" for package in packages]
    code = [function.__code__.co_code for function in (_layers, _copy, _add_others)]
    name = f"localhost/stas-base:{_key(bare, versions, STAND_INS, CONSTRAINTS, NVIDIA_ENTRYPOINT, code)}"
    with _building():
        if podman("image", "exists", name, check=False).returncode:
            _remove("localhost/stas-base")
            below = bare
            for files in _layers(packages):
                below = _commit(lambda root, files=files: _copy(files, root), below)
            constrained = ("--env", f"PIP_CONSTRAINT=/{CONSTRAINT_FILE}")
            _commit(lambda root: _add_others(root, packages), below, name, constrained)
    return name


def _remove(repository: str) -> None:
    """Remove older images of the same kind, which take gigabytes."""
    for older in podman("images", "--format", "{{.Repository}}:{{.Tag}}").stdout.split():
        if older.startswith(f"{repository}:"):
            podman("image", "rm", older, check=False)


def _debootstrap(root: Path) -> None:
    packages = "python3,python3-pip,ca-certificates"
    options = ["--variant=minbase", f"--include={packages}", SUITES[sys.version_info[:2]]]
    with tempfile.TemporaryDirectory(dir=CACHE / "tmp") as directory:
        subprocess.run(["debootstrap", *options, directory, "http://deb.debian.org/debian"], check=True)
        shutil.rmtree(Path(directory) / "var" / "cache" / "apt")
        subprocess.run(["cp", "-a", f"{directory}/.", root], check=True)


def _layers(packages: Sequence[Distribution]) -> Iterator[list[tuple[Path, Path]]]:
    """The packages' files by layer, each with its path in site-packages."""
    loaded = _loaded_libraries()
    files: list[tuple[Path, Path]] = []
    total = 0
    for package in packages:
        for file in package.files or []:
            source = Path(str(package.locate_file(file))).resolve()
            if ".." in file.parts or not source.is_file():
                continue
            size = source.stat().st_size
            of_gpu = package.metadata["Name"].startswith(("nvidia-", "triton", "cuda-"))
            if size > 2**20 and of_gpu and source not in loaded:
                continue
            if total + size > LAYER:
                yield files
                files, total = [], 0
            files.append((source, Path(file)))
            total += size
    yield files


def _copy(files: Sequence[tuple[Path, Path]], root: Path) -> None:
    for source, place in files:
        target = _site(root) / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)  # keeps the modification time, which the bytecode records


def _site(root: Path) -> Path:
    return root / "usr" / "local" / "lib" / f"python3.{sys.version_info.minor}" / "dist-packages"


def _add_others(root: Path, packages: Sequence[Distribution]) -> None:
    for name, (version, needs) in STAND_INS.items():
        _stand_in(_site(root), name, version, needs)
    constraint = root / CONSTRAINT_FILE
    constraint.parent.mkdir(parents=True)
    pins = {package.metadata["Name"]: package.version for package in packages} | CONSTRAINTS
    constraint.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    entrypoint = root / "opt" / "nvidia" / "nvidia_entrypoint.sh"
    entrypoint.parent.mkdir(parents=True)
    entrypoint.write_text(NVIDIA_ENTRYPOINT)
    entrypoint.chmod(0o755)


def _stand_in(site: Path, name: str, version: str, needs: str | None) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *([f"Requires-Dist: {needs}"] if needs else [])]) + "\n")
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n{info.name}/INSTALLER,,\n")
    (info / "INSTALLER").write_text("pip\n")


def _closure(names: Sequence[str]) -> list[Distribution]:
    """Installed packages with all their dependencies, sorted by name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, Distribution] = {}
    wanted = [Requirement(name) for name in names]
    while wanted:
        requirement = wanted.pop()
        package = distribution(requirement.name)
        key = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        if key in found and extras == {""}:
            continue
        found[key] = package
        for line in package.requires or []:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(need)
    return [found[key] for key in sorted(found)]


def _loaded_libraries() -> set[Path]:
    """The shared libraries that a process with torch has open."""
    code = "import torch, torchvision; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {Path(line.split(maxsplit=5)[-1]) for line in maps.splitlines() if "/" in line}


def _commit(fill: Callable[[Path], None], below: str, name: str | None = None, settings: Sequence[str] = ()) -> str:
    """Make an image: `fill(root)` adds files to another image or to "scratch". Returns its identifier."""
    container = _buildah("from", "--pull-never", below)
    try:
        fill(Path(_buildah("mount", container)))
        _buildah("umount", container)
        _buildah("config", *settings, container)
        # Uncompressed: compression would take minutes.
        return _buildah("commit", "--quiet", "--disable-compression", container, *([name] if name else []))
    finally:
        _buildah("rm", container)


def _buildah(*arguments: str) -> str:
    command = ["buildah", *STORE, *arguments]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def _pip_as_here(directory: Path) -> list[str]:
    """Build options that give pip the settings it has here, and the files that they name."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = value.strip("'\"").replace("\\n", " ")
    configuration = directory / "pip.conf"
    configuration.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    words = " ".join(settings.values()).replace("file://", "").split()
    paths = {Path(word) for word in words if word.startswith("/") and Path(word).exists()}
    # An index of plain files may link to its neighbouring directories.
    paths = {path.parent if path.is_dir() and len(path.parts) > 2 and path.name == "simple" else path for path in paths}
    volumes = {f"{configuration}:/etc/pip.conf:ro"} | {f"{path}:{path}:ro" for path in paths}
    return [option for volume in sorted(volumes) for option in ("--volume", volume)]


def _key(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


@contextmanager
def _building() -> Iterator[None]:
    """Let one process at a time make images, after removing leftovers of killed ones."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shutil.rmtree(CACHE / "tmp", ignore_errors=True)
        _buildah("rm", "--all")
        podman("image", "prune", "--force")
        yield
