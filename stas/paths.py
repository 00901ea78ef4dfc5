"""Every file name in a workspace, and the only reader of the `STAS_*` environment variables.

workspace/
    stores/<key>/           data.mdb, samples.jsonl, manifest.json: an immutable store of samples
    stores/<dataset>.json   the newest store for this label and size or scale
    runs/<run>/             recipe.yaml, split.json, metrics.jsonl, bad_steps.jsonl, curves.png, tensorboard/,
                            checkpoints/
    predictions/<name>/     <stem>.png, probabilities/<stem>.png, manifest.json
"""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from stas.errors import UsageError

STATUS_DIRECTORY = "STAS_STATUS_DIR"
HEARTBEAT_DIRECTORY = "STAS_HEARTBEAT_DIR"
VOTE = "vote"  # name of an ensemble's vote among the prediction sets
MAX_NEW_NAME = 200  # bytes in the name of an output: file systems take 255, and temporary names are longer
MAX_PATH = 3000  # characters; Linux takes 4096 bytes
PLAIN_NAME = "[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}"  # of a run, a store, a set or a label: it cannot leave a directory


@dataclass(frozen=True)
class Workspace:
    """The directory on a shared volume through which the stages exchange files."""

    root: Path

    @property
    def stores(self) -> Path:
        return self.root / "stores"

    def store(self, key: str) -> Path:
        return self.stores / key

    def dataset(self, label: str, form: str) -> Path:
        """The pointer to the newest store for a label and a size or scale, such as 800x800 or scale0.5."""
        return self.stores / f"{check_name('label', label)}-{form}.json"

    def check_output(self, directory: Path) -> None:
        """Refuse a directory in which the stages would look for something else.

        Raises:
            UsageError: it is the workspace, or its directory of stores, runs or predictions; or inside stores or runs.
        """
        place = Path(os.path.realpath(directory))  # unlike `resolve`, also for links in a circle
        root = Path(os.path.realpath(self.root))
        taken = {root, root / "stores", root / "runs", root / "predictions"}
        if place in taken or {root / "stores", root / "runs"} & {*place.parents}:
            raise UsageError(
                f"{directory}: the workspace keeps its stores, runs or predictions there: name a directory of its own"
            )

    def run(self, name: str) -> "RunPaths":
        return RunPaths(self.root / "runs" / check_name("run", name))

    def predictions(self, name: str) -> Path:
        return self.root / "predictions" / check_name("prediction set", name)


@dataclass(frozen=True)
class RunPaths:
    """The files of one training run."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def split(self) -> Path:
        return self.root / "split.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def bad_steps(self) -> Path:
        """One JSON line, with its samples, per step whose loss or gradient was not finite."""
        return self.root / "bad_steps.jsonl"

    @property
    def curves(self) -> Path:
        return self.root / "curves.png"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def checkpoint(self, which: str) -> Path:
        """`which` is best, last, previous, or next while it is being written."""
        return self.root / "checkpoints" / f"{which}.safetensors"


def manifest_file(directory: Path) -> Path:
    """The manifest of a store, a prediction set or any other published directory."""
    return directory / "manifest.json"


def lock_file(protected: Path) -> Path:
    """The lock of a run, a prediction set, or anything else that only one process at a time may change."""
    return protected.with_name(f".{protected.name}.lock")


def store_data(store: Path) -> Path:
    """The LMDB data file of a store."""
    return store / "data.mdb"


def store_samples(store: Path) -> Path:
    """The entries of a store's samples, one line of JSON each."""
    return store / "samples.jsonl"


def mask_file(directory: Path, stem: str) -> Path:
    """One image's mask: 8-bit L, 0 or 255, the image's own size."""
    return directory / f"{stem}.png"


def probability_file(directory: Path, stem: str) -> Path:
    """One image's foreground probability: 16-bit, 0 to 65535."""
    return directory / "probabilities" / f"{stem}.png"


def default_workspace() -> str | None:
    """STAS_WORKSPACE: the workspace if the command does not name one."""
    return os.environ.get("STAS_WORKSPACE")


def weights_directory() -> Path | None:
    """STAS_WEIGHTS_DIR: pretrained weights for machines without a network."""
    value = os.environ.get("STAS_WEIGHTS_DIR")
    return Path(value) if value else None


def cache_directory() -> Path | None:
    """STAS_CACHE_DIR: node-local disk to which a store on a network file system is copied."""
    value = os.environ.get("STAS_CACHE_DIR")
    return Path(value) if value else None


def status_file() -> Path | None:
    """This process's file in STAS_STATUS_DIR; `stas launch` reads the exit code from it."""
    value = os.environ.get(STATUS_DIRECTORY)
    return Path(value) / str(os.getpid()) if value else None


def heartbeat_file(rank: int) -> Path | None:
    """This rank's file in STAS_HEARTBEAT_DIR, in which `stas launch` sees its progress."""
    value = os.environ.get(HEARTBEAT_DIRECTORY)
    return Path(value) / f"{rank}.{os.getpid()}" if value else None


def check_given(name: str, longest: int = 255) -> Path:
    """Return the path of a file or directory that the user named; each of its parts has at most `longest` bytes.

    Raises:
        UsageError: it is empty, not UTF-8, or too long, or leads through a file or in a circle of links.
    """
    if not name:
        raise UsageError("the name of a file or directory is empty: the variable it comes from may not be set")
    try:
        length = max(len(part.encode()) for part in name.split("/"))
    except UnicodeEncodeError:
        raise UsageError(f"{name!r} is not UTF-8: rename it, or set LC_ALL=C.UTF-8 if it is") from None
    if length > longest or len(name) > MAX_PATH:
        raise UsageError(
            f"{name[:60]!r}... is too long: use at most {MAX_PATH} characters, and {longest} bytes between two slashes"
        )
    try:
        Path(name).stat()
    except OSError as error:  # another one depends on what the path is for
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UsageError(f"{name!r}: {error.strerror}: name another path") from None
    return Path(name)


def check_name(what: str, name: str) -> str:
    """Return `name` if it is a plain path component, so that it cannot leave the workspace.

    Raises:
        UsageError: it is not; `what` says what the name is for.
    """
    if not re.fullmatch(PLAIN_NAME, name):
        raise UsageError(
            f"{what} {name!r} cannot be a directory name: use 1 to 100 letters, digits and _ . + -, "
            "beginning with a letter, a digit or _"
        )
    return name
