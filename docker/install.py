"""Install the packages of a lock file around the torch that the base image already has; run by the Dockerfile.

NVIDIA's images contain a torch built for their own CUDA, which no index has. If a `pip install` replaces it, the image
is slow or sees no GPU. So the base keeps its packages, above all torch. The lock adds the missing ones with --no-deps,
and `pip check` and torch itself verify the result. What is installed at the lock's version must have one of its hashes;
a version that the base's own constraints choose has none there. If the base has no torch, the lock's version is
installed from a separate index, which determines the device that torch supports.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

# Part of pip, which is always there in an image that can install packages.
from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
from pip._vendor.packaging.utils import canonicalize_name

TORCH = ("torch", "torchvision")
LOADED = ("torch", "torchvision", "monai", "timm", "segmentation_models_pytorch", "matplotlib", "lmdb", "safetensors")


def main() -> None:
    import tomllib  # not in Python 3.10; no base has that, but tests of the functions below may

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--project", type=Path, required=True, help="the pyproject.toml with the dependencies")
    parser.add_argument("--torch-index", required=True, help="index for torch if the base has none")
    options = parser.parse_args()

    base = installed()
    complaints = check()
    torch = torch_identity() if "torch" in base else None
    pins = read_requirements(options.lock.read_text())
    hashes = read_hashes(options.lock.read_text())
    needs = read_requirements("\n".join(tomllib.loads(options.project.read_text())["project"]["dependencies"]))
    constraints = read_requirements("\n".join(Path(path).read_text() for path in constraint_files(os.environ)))
    print(f"base: {len(base)} packages, torch {torch or 'missing'}, {len(constraints)} constraints", flush=True)

    if torch is None:
        # Builds for a CPU have other hashes than those on PyPI, which the lock lists.
        pip_install([pin for pin in pins if name_of(pin) in TORCH], {}, "--index-url", options.torch_index)
    pip_install(to_install(pins, base, constraints), hashes)
    # Replace a package of the base only if it is too old for the project or the lock.
    if outdated := to_replace(check() - complaints | unmet(needs, installed()), pins):
        pip_install(outdated, hashes)

    if new := check() - complaints | unmet(needs, installed()):
        fail("these packages do not fit together:\n" + "\n".join(sorted(new)) + "\nuse another lock (LOCK) or base")
    if torch and torch_identity() != torch:
        fail(f"torch was {torch} in the base and is {torch_identity()} now: the lock must not replace it")
    run(sys.executable, "-c", f"import {', '.join(LOADED)}")
    Path(sysconfig.get_path("purelib"), "stas.pth").write_text(f"{Path(__file__).parent}\n")  # the code is copied later
    print(f"torch is {torch_identity()}; pip check found no new problems")


def to_install(
    pins: Iterable[Requirement], base: Mapping[str, str], constraints: Iterable[Requirement] = ()
) -> list[Requirement]:
    """Requirements of the lock that the base lacks.

    Args:
        pins: the lock's requirements for this Python and platform.
        base: the version of every installed package, by canonical name.
        constraints: the base's own; if one forbids the lock's version, the constraint wins.
    """
    limits = {name_of(constraint): constraint for constraint in constraints}
    missing = [pin for pin in pins if name_of(pin) not in base and not comes_with_torch(name_of(pin))]
    return [pin if allows(limits.get(name_of(pin)), pin) else Requirement(pin.name) for pin in missing]


def allows(constraint: Requirement | None, pin: Requirement) -> bool:
    """Whether a constraint, if any, allows the version of a pin."""
    if constraint is None:
        return True
    versions = [specifier.version for specifier in pin.specifier]
    return not constraint.url and all(constraint.specifier.contains(version, prereleases=True) for version in versions)


def to_replace(complaints: Iterable[str], pins: Iterable[Requirement]) -> list[Requirement]:
    """The lock's pins for packages whose version does not suit another package, according to `pip check`."""
    found = [re.search(r"but you have (\S+) ", line) for line in complaints]
    names = {canonicalize_name(match[1]) for match in found if match}
    return [pin for pin in pins if name_of(pin) in names and not comes_with_torch(name_of(pin))]


def unmet(needs: Iterable[Requirement], versions: Mapping[str, str]) -> set[str]:
    """Unsatisfied dependencies of the project, worded as `pip check` does."""
    found = {str(need): versions.get(name_of(need)) for need in needs}
    return {f"stas requires {need}, which is not installed." for need, version in found.items() if version is None} | {
        f"stas has requirement {need}, but you have {Requirement(need).name} {version}."
        for need, version in found.items()
        if version is not None and not Requirement(need).specifier.contains(version, prereleases=True)
    }


def comes_with_torch(name: str) -> bool:
    """Whether a package is torch or part of one build of it: the CUDA libraries and the compiler."""
    if name == "nvidia-ml-py":  # the driver's own interface, useful with any torch
        return False
    return name in (*TORCH, "triton") or name.startswith(("nvidia-", "cuda-"))


def read_requirements(text: str) -> list[Requirement]:
    """The requirements in a lock or constraints file that apply to this Python and platform.

    Other lines (comments, options, bare URLs) are skipped: pip reads constraints itself.
    """
    requirements = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            requirement = Requirement(re.split(" #| --hash", line)[0].strip())
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            requirements.append(requirement)
    return requirements


def read_hashes(text: str) -> dict[str, list[str]]:
    """The hash options of every pin in a lock file, by pin, such as numpy==2.4.6."""
    lines = text.replace("\\\n", " ").splitlines()
    return {
        pin_of(Requirement(line.split(" --hash")[0])): re.findall(r"--hash=\S+", line)
        for line in lines
        if " --hash=" in line
    }


def pin_of(requirement: Requirement) -> str:
    return f"{name_of(requirement)}{requirement.specifier}"


def constraint_files(environment: Mapping[str, str]) -> list[str]:
    """The files that PIP_CONSTRAINT names; NVIDIA's images set it, and pip obeys it here too."""
    return environment.get("PIP_CONSTRAINT", "").split()


def name_of(requirement: Requirement) -> str:
    return canonicalize_name(requirement.name)


def installed() -> dict[str, str]:
    """The version of every installed package, by canonical name."""
    return {canonicalize_name(found.metadata["Name"]): found.version for found in distributions()}


def torch_identity() -> str:
    """Version and location of torch, as Python imports it."""
    return run(sys.executable, "-c", "import torch; print(torch.__version__, torch.version.cuda, torch.__file__)")


def check() -> set[str]:
    """The complaints of `pip check`, one per line."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    return set() if done.returncode == 0 else set(done.stdout.splitlines())


def pip_install(requirements: Iterable[Requirement], hashes: Mapping[str, list[str]], *options: str) -> None:
    """Install packages; those that have hashes only if the file has one of them."""
    os.environ["PIP_BREAK_SYSTEM_PACKAGES"] = "1"  # the image is the environment
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"]
    wanted = {str(each).partition(";")[0].strip(): hashes.get(pin_of(each), []) for each in requirements}
    for checked in (True, False):
        lines = [" ".join([pin, *found]) for pin, found in wanted.items() if bool(found) is checked]
        if not lines:
            continue
        print(
            "installing",
            "with hashes:" if checked else "without hashes:",
            *(line.split()[0] for line in lines),
            flush=True,
        )
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(lines))
            file.flush()
            more = ["--require-hashes"] if checked else []
            subprocess.run(
                [*command, "--root-user-action=ignore", *more, *options, "--requirement", file.name], check=True
            )


def run(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def fail(message: str) -> None:
    sys.exit(f"install.py: {message}")


if __name__ == "__main__":
    main()
