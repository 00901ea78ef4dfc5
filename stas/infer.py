"""Predict masks for a directory of images with one trained member, each at its image's own size."""

import hashlib
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stas.config import Data, Recipe
from stas.data.images import (
    MAX_IMAGE_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    grey_size,
    read_grey,
    read_image,
    stated_size,
    write_mask,
    write_probability,
)
from stas.data.listing import list_images
from stas.data.png import decode_grey
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.models.checkpoint import Checkpoint, fitting, load_checkpoint
from stas.models.network import build_network, place
from stas.models.predict import Picture, Settings, predict_logits, shrink
from stas.paths import Workspace, mask_file, probability_file
from stas.recipe import parse_recipe
from stas.results.predictions import changed, write_set_manifest
from stas.system import distributed
from stas.system.distributed import Ranks
from stas.system.files import sha256
from stas.system.locks import PATIENCE
from stas.system.printing import named
from stas.system.publish import Output, building, read_manifest
from stas.system.threads import bar, map_ahead
from stas.system.untrusted import read_bounded

log = logging.getLogger(__name__)

READERS, WRITERS = 4, 2  # threads on each rank
WAITING = 4  # full-size masks that may wait to be written


def infer(
    run: str,
    images: Path,
    workspace: Workspace,
    name: str | None = None,
    checkpoint: str = "best",
    tta: bool | None = None,
    threshold: float | None = None,
    probabilities: bool = False,
    held_out: bool = False,
    device: str = "auto",
) -> Path:
    """Predict a mask for every image in a directory, with the images split among the ranks.

    Needs only the checkpoint, which contains the recipe. After an interruption it resumes with the missing images.

    Args:
        run: the training run.
        images: directory of images, of any size and aspect.
        workspace: where the run is and the prediction set goes.
        name: the prediction set to make; None: the run's name.
        checkpoint: best or last.
        tta: average over the square's 8 symmetries; None: as the recipe says.
        threshold: a pixel is foreground when its probability is above this; None: as the recipe says.
        probabilities: also write probabilities as 16-bit PNG.
        held_out: only the images that the run held out for validation.
        device: cuda, cpu or auto; see `join_ranks`.

    Returns:
        The directory of the masks.

    Raises:
        InputDataError: an image or the checkpoint cannot be read.
        MachineError: `device` is cuda, and there is no GPU.
        UsageError: the prediction set exists for another run or other images, one of its masks was changed since, or
            its directory is not ours; or a threshold that would make all masks empty or full.
        StoppedEarly: an image or the checkpoint changed while it was read.
    """
    if threshold is not None:
        _check_threshold(threshold)
    out = workspace.predictions(name or run)
    path = workspace.run(run).checkpoint(checkpoint)
    loaded = load_checkpoint(path)
    files = list_images(images)
    with fitting(path):
        recipe = parse_recipe(loaded.metadata["recipe"], str(path))
        if held_out:
            files = _held_out(files, loaded.metadata["validation"], images)
    options = {
        "tta": recipe.infer.tta if tta is None else tta,
        "threshold": recipe.infer.threshold if threshold is None else threshold,
        "probabilities": probabilities,
    }
    with distributed.join_ranks(device) as ranks:
        key = distributed.broadcast(_key(run, checkpoint, loaded, options, files) if ranks.first else {})
        if key["checkpoint"] != loaded.sha256:
            raise StoppedEarly(f"{path} was replaced while the ranks read it; run the same command again to resume")
        output = Output(out, "prediction set", key)
        _check_same_images(output)
        with distributed.entered_by_first(ranks, building(output, PATIENCE, keep=True)) as mine:
            place = distributed.broadcast(str(mine) if mine else None)
            if place is None:
                log.info("%s: the masks of all %d images are there; nothing to do", out, len(files))
                return out
            partial = Path(place)
            _predict_share(loaded, recipe, files, partial, key, ranks)
            distributed.barrier()
            if mine:
                sizes = {stem: grey_size(mask_file(partial, stem)) for stem in files}
                write_set_manifest(partial, output, recipe.data.label, sizes, probabilities)
        log.info("%s: masks of %d images", out, len(files))
    return out


def _check_threshold(threshold: float) -> None:
    """Refuse a threshold that every probability is above, or none: in 32 bits, as probabilities are."""
    if not 0 < np.float32(threshold) < 1:  # also true for NaN
        raise UsageError(
            f"--threshold {threshold}: give a probability above 0 and below 1; at 0 every pixel would be foreground, "
            "at 1 none"
        )


def _key(run: str, which: str, loaded: Checkpoint, options: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """The inputs that determine a prediction set."""
    hashes = {stem: sha256(file, MAX_IMAGE_BYTES) for stem, file in files.items()}
    checkpoint = {"which": which, "checkpoint": loaded.sha256, "checksum": loaded.checksum}
    return {"run": run, **checkpoint, **options, "images": hashes}


def _predict_share(
    loaded: Checkpoint, recipe: Recipe, files: dict[str, Path], partial: Path, key: dict[str, Any], ranks: Ranks
) -> None:
    """Write the masks of every `ranks.size`-th image that is still missing in `partial`."""
    with_probability = key["probabilities"]
    share = list(files)[ranks.rank :: ranks.size]
    todo = [stem for stem in share if not _is_done(partial, stem, files[stem], with_probability)]
    network = _network(loaded, recipe, ranks.device, key["tta"])
    settings = Settings.of(recipe, key["tta"])

    def read(stem: str) -> tuple[str, Picture]:
        return stem, _read(files[stem], key["images"][stem], recipe.data)

    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        pictures = map_ahead(read, todo, READERS)
        for stem, picture in bar(pictures, len(todo), "infer", show=ranks.first):
            logits = predict_logits(network, picture, settings)
            writing.append(pool.submit(_write, partial, stem, logits, key["threshold"], with_probability))
            if len(writing) > WAITING:
                writing.popleft().result()
        for future in writing:
            future.result()


def _network(loaded: Checkpoint, recipe: Recipe, device: torch.device, tta: bool) -> nn.Module:
    """The network of a checkpoint, ready to predict."""
    network = build_network(recipe.model, recipe.data.size, pretrained=False, turned=tta)
    with fitting(recipe.name):
        network.load_state_dict(loaded.network)
    return place(network, device, recipe.train.channels_last).eval()


def _read(file: Path, expected: str, data: Data) -> Picture:
    """Read an image whose SHA-256 must be the one in the set's key: the masks claim to be of exactly this image."""
    content = read_bounded(file, MAX_IMAGE_BYTES)
    if hashlib.sha256(content).hexdigest() != expected:
        raise changed(file)
    try:
        image = read_image(content)
    except InputDataError:
        read_image(file)  # says the same with the file's name
        raise
    return shrink(image, data)


@torch.inference_mode()
def _write(partial: Path, stem: str, logits: Tensor, threshold: float, with_probability: bool) -> None:
    """Write one image's mask from its logits, (height, width). Runs in a thread during the next forward pass."""
    probabilities = torch.sigmoid(logits)
    if with_probability:  # first, because the mask marks an image as done
        write_probability(probability_file(partial, stem), probabilities.cpu().numpy(), synced=False)
    write_mask(mask_file(partial, stem), (probabilities > threshold).cpu().numpy(), synced=False)


def _is_done(partial: Path, stem: str, image: Path, with_probability: bool) -> bool:
    """Whether an image's files are complete: a power cut may leave them empty or cut off.

    Pillow reads a mask that lacks its end; `decode_grey` reads only what `write_mask` writes, to the last byte.
    """
    try:
        mask = decode_grey(read_bounded(mask_file(partial, stem), MAX_IMAGE_BYTES), MAX_PIXELS, MAX_SIDE)
        if mask is None or sorted(mask.shape) != sorted(stated_size(image)):  # the image may be turned by EXIF
            return False
        return not with_probability or read_grey(probability_file(partial, stem)).shape == mask.shape
    except InputDataError:
        return False


def _held_out(files: dict[str, Path], stems: Sequence[str], images: Path) -> dict[str, Path]:
    missing = [stem for stem in stems if stem not in files]
    if missing:
        raise InputDataError(
            f"{images}: {len(missing)} of the run's {len(stems)} held-out images are missing: {named(missing)}"
        )
    return {stem: files[stem] for stem in sorted(stems)}


def _check_same_images(output: Output) -> None:
    """Let a newer checkpoint's masks replace older ones, but never those of another run or of other images.

    Raises:
        UsageError: the directory holds masks of another run or of images that are not among these.
    """
    try:
        before = read_manifest(output.directory, "prediction set")["key"]
        run, images = before["run"], dict(before["images"])
    except (InputDataError, KeyError, TypeError, ValueError, AttributeError):
        return  # no prediction set: `building` refuses anything else
    if run != output.key["run"]:
        raise UsageError(
            f"{output.directory} holds masks of run {run}: "
            "give this set another name with --name, or remove the old one"
        )
    now = output.key["images"]
    lost = sorted(images.keys() - now.keys())
    other = sorted(stem for stem, value in images.items() if now.get(stem, value) != value)
    for stems, what in ((lost, "images that are not among these"), (other, "other images of the same names")):
        if stems:
            raise UsageError(
                f"{output.directory} holds masks of {len(stems)} {what} ({named(stems)}): "
                "give this set another name with --name, or remove the old one"
            )
