"""The checksum at the end of a checkpoint, read without torch and without reading the rest of the file."""

import hashlib
import os
from pathlib import Path

from stas.errors import InputDataError
from stas.system.untrusted import check_file, refusal

CHECKSUM_BYTES = hashlib.sha256().digest_size
MAX_BYTES = 32 << 30  # a few minutes of hashing; the recipes' largest networks take 2 GiB with their optimiser


def written_checksum(path: Path) -> str:
    """The SHA-256 written at the end of a checkpoint: it tells two checkpoints apart, but not whether one is whole.

    Returns:
        What `load_checkpoint` returns as `checksum`, in hexadecimal.

    Raises:
        InputDataError: the file is missing, not readable, or too small for a checkpoint.
    """
    if check_file(path, MAX_BYTES) < CHECKSUM_BYTES:
        raise InputDataError(f"{path}: too small for a checkpoint: train the run again")
    try:
        with open(path, "rb") as file:
            file.seek(-CHECKSUM_BYTES, os.SEEK_END)
            return file.read().hex()
    except OSError as error:
        raise refusal(path, error) from error
