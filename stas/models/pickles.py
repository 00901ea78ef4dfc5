"""Convert pickled weights to safetensors on request. Nothing else in stas reads an untrusted pickle."""

import io
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from stas.errors import UsageError
from stas.models.weights_record import write_weights
from stas.system.files import sha256
from stas.system.untrusted import check_file, shown, stop_if_passing

log = logging.getLogger(__name__)

PICKLES = (".pth", ".pt", ".bin")
MAX_PICKLE_BYTES = 4 << 30  # 10^9 parameters in single precision
# Keys under which training scripts store the weights, in the order in which timm tries them.
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")


def convert_weights(source: Path, target: Path, allow_pickle: bool, **hub: str | None) -> None:
    """Convert the tensors of a pickle written by torch.save to safetensors, and record where they came from.

    It is read by torch's restricted reader, which makes only tensors and calls nothing that the file names.

    Args:
        source: the pickle.
        target: the file of safetensors.
        allow_pickle: whether the user trusts the pickle's author.
        hub: the repository and commit that it came from, if it did.

    Raises:
        UsageError: `allow_pickle` is False; the file is not a pickle of named tensors, or is too large; or other
            weights are there, see `write_weights`.
    """
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: weights are written as safetensors: choose a name ending in .safetensors")
    if not allow_pickle:
        raise UsageError(f"{source}: a pickle may hold code: if you trust who made it, add --allow-pickle")
    tensors = _read_pickle(source)
    try:
        content = save(tensors)
    except Exception as error:  # tensor types that safetensors does not have
        raise unreadable(source, error) from error
    record = write_weights(target, content, pickle=sha256(source, MAX_PICKLE_BYTES), **hub)
    log.info("%s: %d tensors from %s (%s)", target, len(tensors), source, record)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Read named tensors, and nothing else, from an untrusted pickle. Nothing that it names is called.

    Raises:
        UsageError: not readable, holds anything but tensors, or too large, on disk or unpacked.
    """
    try:
        check_file(file, MAX_PICKLE_BYTES)
        with open(file, "rb") as content:
            _check_no_bomb(content)
            found = torch.load(content, map_location="cpu", weights_only=True)
        for key in NESTED:
            if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
                found = found[key]
                break
        if not isinstance(found, Mapping) or not found:
            raise ValueError(f"holds an object of type {type(found).__name__} instead of named tensors")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ValueError(f"holds {shown(name)} of type {type(value).__name__} instead of a named tensor")
        size = sum(value.numel() * value.element_size() for value in found.values())
        if size > MAX_PICKLE_BYTES:  # a tensor may repeat a few stored bytes many times
            raise ValueError(f"tensors of {size} bytes, more than the {MAX_PICKLE_BYTES} allowed")
        return {name: value.detach().contiguous().clone() for name, value in found.items()}
    except Exception as error:  # pickle, zip and torch raise many types of their own
        stop_if_passing(file, error)
        raise unreadable(file, error) from error


def _check_no_bomb(content: BinaryIO) -> None:
    """Refuse an archive that unpacks to more than its own size; torch does not compress."""
    if zipfile.is_zipfile(content):
        with zipfile.ZipFile(content) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > content.seek(0, io.SEEK_END):
            raise ValueError(f"a compressed archive of {unpacked} bytes unpacked; torch does not compress")
    content.seek(0)


def unreadable(file: Path, error: Exception) -> UsageError:
    """The error for a weights file that could not be read because of `error`."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:500]
    return UsageError(f"{file}: not readable as weights ({reason}): fetch it again, as safetensors")
