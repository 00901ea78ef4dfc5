"""Write a store's masks as PNG, to a directory that holds nothing else."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from stas.data.images import write_mask
from stas.data.store import Store
from stas.errors import InputDataError, UsageError
from stas.paths import mask_file
from stas.system.printing import named
from stas.system.publish import Output, building, read_manifest, write_manifest
from stas.system.threads import bar
from stas.system.untrusted import shown, stop_if_passing

log = logging.getLogger(__name__)


def check_apart(masks: Path, others: Sequence[Path]) -> None:
    """Refuse to write masks to a directory that is, contains, or is inside one that is read or holds stores."""
    for other in others:
        if is_within(masks, other) or is_within(other, masks):
            raise UsageError(
                f"--masks {masks}: is, contains or lies inside {other}, which holds other files: "
                "name a directory of its own"
            )


def is_within(directory: Path, other: Path) -> bool:
    """Whether a directory is another one, or lies inside it, under whatever names; either may be missing."""
    return _places(other)[0] in _places(directory)


def _places(directory: Path) -> list[tuple[int, int] | str]:
    """A directory and all above it: as device and inode, so that links and case do not matter, or as the name of one
    that is missing.
    """
    path = Path(os.path.realpath(directory))  # unlike `resolve`, also for links in a circle
    found: list[tuple[int, int] | str] = []
    for place in (path, *path.parents):
        try:
            status = place.stat()
            found.append((status.st_dev, status.st_ino))
        except OSError as error:
            stop_if_passing(place, error)
            found.append(str(place))
    return found


def write_masks(store: Store, directory: Path) -> None:
    """Write each sample's mask as PNG to a directory of its own, unless they are all there."""
    # Stores of other sizes have the same masks, so not the store's key.
    made_from = [(sample["stem"], sample["image_sha256"], sample["annotation_sha256"]) for sample in store.samples]
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    output = Output(directory, "mask set", {"label": store.label, "samples": digest})
    _check_same_masks(output, [sample["stem"] for sample in store.samples])
    with building(output) as partial:
        if partial is None:
            log.info("%s: all %d masks are there", directory, len(store))
            return
        for index, sample in enumerate(bar(store.samples, len(store), "masks")):
            write_mask(mask_file(partial, sample["stem"]), store.full_mask(index), synced=False)
        write_manifest(partial, output, label=store.label)
    log.info("%s: %d masks written", directory, len(store))


def _check_same_masks(output: Output, stems: Sequence[str]) -> None:
    """Let newer masks replace older ones, but never those of another label or of other images."""
    try:
        before = read_manifest(output.directory, "mask set")
        label, old = before["key"]["label"], [Path(name).stem for name in before["files"]]
    except (InputDataError, KeyError, TypeError):
        return  # `building` refuses anything else
    remedy = "name another directory with --masks, or remove this one"
    if label != output.key["label"]:
        raise UsageError(
            f"{output.directory} holds masks of label {shown(label)}, not {output.key['label']!r}: {remedy}"
        )
    lost = sorted({*old} - {*stems})
    if lost:
        raise UsageError(
            f"{output.directory} holds masks of {len(lost)} images that are not among these ({named(lost)}): {remedy}"
        )
