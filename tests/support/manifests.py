"""Change manifests and indexes as somebody would who also knows how they are sealed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stas.paths import manifest_file, store_samples
from stas.system.sealed import seal, write_sealed

Change = Callable[[dict[str, Any]], object]


def resealed(content: bytes) -> bytes:
    """JSON with a checksum that fits it, if it is an object."""
    body = content.rstrip()
    return body.removesuffix(b"}").rstrip() + seal(body.removesuffix(b"}").rstrip()) if body[-1:] == b"}" else content


def change_manifest(directory: Path, change: Change) -> None:
    """Apply `change` to a manifest's content, and seal it again."""
    content = json.loads(manifest_file(directory).read_text())
    del content["checksum"]
    change(content)
    write_sealed(manifest_file(directory), content)


def change_sample(directory: Path, change: Change, index: int = 0) -> None:
    """Apply `change` to an entry of a store's index, and make the manifest fit it."""
    samples = [json.loads(line) for line in store_samples(directory).read_text().splitlines()]
    change(samples[index])
    write_index(directory, "".join(f"{json.dumps(sample)}\n" for sample in samples).encode())


def write_index(directory: Path, index: bytes) -> None:
    """Replace a store's index, and make the manifest fit it."""
    path = store_samples(directory)
    path.write_bytes(index)

    def fit(content: dict[str, Any]) -> None:
        content["sha256"][path.name] = hashlib.sha256(index).hexdigest()
        content["files"][path.name] = len(index)
        content["samples"] = len(index.splitlines()) or 1

    change_manifest(directory, fit)
