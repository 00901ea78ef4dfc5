"""Pickles of weights made safetensors, where somebody asks for that: nothing else in stas reads a stranger's pickle."""

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
from stas.system.files import atomic_write
from stas.system.untrusted import check_file, shown

log = logging.getLogger(__name__)

PICKLES = (".pth", ".pt", ".bin")
MAX_PICKLE_BYTES = 4 << 30  # 10^9 parameters in single precision
# Under which of these a training's file holds the weights, as timm looks for them.
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")


def convert_weights(source: Path, target: Path, allow_pickle: bool) -> None:
    """Write the tensors of a pickle, as torch.save makes it, as safetensors.

    It is read by torch's own reader that makes tensors only and calls nothing that the file names.

    Raises:
        UsageError: without `allow_pickle`; or the file is no pickle of named tensors, or too large.
    """
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: weights are written as safetensors: give a name that ends with .safetensors")
    if not allow_pickle:
        raise UsageError(f"{source}: a pickle may hold code: if you trust who made it, add --allow-pickle")
    tensors = _read_pickle(source)
    try:
        content = save(tensors)
    except Exception as error:  # kinds of tensors that safetensors does not have
        raise unreadable(source, error) from error
    with atomic_write(target) as file:
        file.write(content)
    log.info("%s: %d tensors of %s", target, len(tensors), source)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """The named tensors of a stranger's pickle: nothing else is made of it, and nothing that it names is called.

    Raises:
        UsageError: not readable, something else than tensors in it, or too large, in the file or unpacked.
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
            raise ValueError(f"holds a {type(found).__name__} instead of named tensors")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ValueError(f"holds {shown(name)}: a {type(value).__name__} instead of a named tensor")
        size = sum(value.numel() * value.element_size() for value in found.values())
        if size > MAX_PICKLE_BYTES:  # a few bytes may stand for a tensor that repeats them
            raise ValueError(f"tensors of {size} bytes, more than {MAX_PICKLE_BYTES}")
        return {name: value.detach().contiguous().clone() for name, value in found.items()}
    except Exception as error:  # pickle, zip and torch have many kinds of their own
        raise unreadable(file, error) from error


def _check_no_bomb(content: BinaryIO) -> None:
    """Refuse an archive that unpacks to more than it is; torch itself packs nothing."""
    if zipfile.is_zipfile(content):
        with zipfile.ZipFile(content) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > content.seek(0, io.SEEK_END):
            raise ValueError(f"a packed archive of {unpacked} bytes, where torch packs nothing")
    content.seek(0)


def unreadable(file: Path, error: Exception) -> UsageError:
    """The refusal of a file whose reading ended in `error`."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:500]
    return UsageError(f"{file}: not readable as weights ({reason}): fetch it again, as safetensors")
