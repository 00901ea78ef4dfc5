"""Outline a directory of images with one trained member: one mask per image, at the image's own size."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stas import distributed
from stas.checkpoint import Checkpoint, fitting, load_checkpoint
from stas.config import Recipe, parse_recipe
from stas.distributed import Ranks
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.files import read_json, remove_leftovers, sha256
from stas.images import MAX_IMAGE_BYTES, grey_size, list_images, read_image, write_mask, write_probability
from stas.loader import prefetch
from stas.model import build_network
from stas.paths import Workspace, lock, manifest, prediction, probability
from stas.predictions import check_replaceable, is_finished, is_settled, named, publish, tidy, write_manifest
from stas.progress import bar
from stas.resize import area_resize
from stas.transforms import as_input

log = logging.getLogger(__name__)


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
) -> Path:
    """Predict a mask for every image of a directory, the images shared among the ranks.

    Needs the checkpoint only: the recipe is in it. A run cut off goes on with the images that are missing.

    Args:
        run: the training run.
        images: directory of images, of any size and aspect.
        workspace: where the run is and the prediction set goes.
        name: the prediction set to make; the run's name where None.
        checkpoint: best or last.
        tta: average over the square's 8 symmetries; as the recipe says where None.
        threshold: a pixel is foreground when its probability is above this; as the recipe says where None.
        probabilities: also write probabilities as 16-bit PNG.
        held_out: only the images that the run held out for validation.

    Returns:
        The directory of the masks.

    Raises:
        InputDataError: an image or the checkpoint cannot be read.
        UsageError: the prediction set exists for other images.
    """
    out = workspace.predictions(name or run)
    path = workspace.run(run).checkpoint(checkpoint)
    loaded = load_checkpoint(path)
    with fitting(path):
        recipe = parse_recipe(loaded.facts["recipe"], str(path))
    files = list_images(images)
    if held_out:
        with fitting(path):
            files = _held_out(files, loaded.facts["validation"], images)
    key = {
        "run": run,
        "checkpoint": loaded.sha256,
        "tta": recipe.infer.tta if tta is None else tta,
        "threshold": recipe.infer.threshold if threshold is None else threshold,
        "probabilities": probabilities,
        "images": {stem: sha256(file, MAX_IMAGE_BYTES) for stem, file in files.items()},
    }
    with distributed.join_ranks() as ranks:
        if distributed.any_of(ranks.first and is_settled(out, key))[0]:
            log.info("%s: the masks of %d images are there; nothing to do", out, len(files))
            return out
        with distributed.locked(lock(out), ranks) as held:
            digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
            if len(set(distributed.gather_objects(digest))) > 1:
                raise StoppedEarly(f"{path} or an image was replaced while the ranks read it; the same command goes on")
            partial = out.with_name(f".{out.name}.{digest}.partial")
            if ranks.first:
                tidy(out, keep=None if is_finished(out, key) else partial)
            if distributed.any_of(ranks.first and is_finished(out, key))[0]:
                log.info("%s: another process has made the masks of %d images", out, len(files))
                return out
            _check_same_images(out, key)
            if ranks.first:
                _take_up(partial, key)
            distributed.barrier()
            _predict_share(loaded, recipe, files, partial, key, ranks)
            distributed.barrier()
            if held:
                held.check()
                _finish(partial, out, key, files)
            distributed.barrier()
    return out


def predict_logits(network: nn.Module, images: Tensor, tta: bool) -> Tensor:
    """Foreground logits of a batch, averaged over the square's 8 symmetries where `tta`.

    Args:
        network: what `build_network` returns.
        images: (N, 3, H, W), float32, as the network was trained to see them.
        tta: eight passes instead of one.

    Returns:
        (N, 1, H, W), float32.
    """
    if not tta:
        return network(images).float()
    total = torch.zeros_like(images[:, :1])
    for turns in range(4):
        for flip in (False, True):
            turned = torch.rot90(images.flip(-1) if flip else images, turns, (-2, -1))
            logits = torch.rot90(network(turned).float(), -turns, (-2, -1))
            total += logits.flip(-1) if flip else logits
    return total / 8


def _predict_share(
    loaded: Checkpoint, recipe: Recipe, files: dict[str, Path], partial: Path, key: dict[str, Any], ranks: Ranks
) -> None:
    """Write the masks of every `ranks.size`-th image that `partial` does not have yet.

    A batch of which one is missing is made again as a whole: the last bit of a logit depends on the batch's size, and
    a run cut off shall end with the masks of one that was not.
    """
    share, size = list(files)[ranks.rank :: ranks.size], recipe.infer.batch
    together = [share[first : first + size] for first in range(0, len(share), size)]
    todo = [stems for stems in together if not all(_is_done(partial, stem, key["probabilities"]) for stem in stems)]
    network = build_network(recipe.model, recipe.data.size, pretrained=False)
    with fitting(key["run"]):
        network.load_state_dict(loaded.network)
    network.to(ranks.device).eval()
    if recipe.train.channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    writing: list[Future[None]] = []
    batches = prefetch(_batches(todo, files, recipe))
    with ThreadPoolExecutor(2) as pool:
        for stems, images, sizes in bar(batches, len(todo), "infer", show=ranks.first):
            logits = _logits(network, images, recipe, key["tta"], ranks.device)
            for stem, logit, own in zip(stems, logits, sizes, strict=True):
                writing.append(pool.submit(_write, partial, stem, logit, own, key["threshold"], key["probabilities"]))
            while len(writing) > 4 * recipe.infer.batch:  # bounds the memory of masks that wait
                writing.pop(0).result()
        for future in writing:
            future.result()


@torch.inference_mode()
def _logits(
    network: nn.Module, images: tuple[Tensor, Tensor, Tensor], recipe: Recipe, tta: bool, device: torch.device
) -> Tensor:
    """Logits (N, 1, H, W), float32, of images with their smallest and largest values (see `_batches`)."""
    pixels, low, high = (tensor.to(device) for tensor in images)
    inputs = as_input(pixels, low, high, recipe)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        return predict_logits(network, inputs, tta)  # fp16 trains with a scaler; its predictions are made in fp32


def _batches(
    todo: Sequence[list[str]], files: dict[str, Path], recipe: Recipe
) -> Iterator[tuple[list[str], tuple[Tensor, Tensor, Tensor], list[tuple[int, int]]]]:
    """Yield stems, images (N, H, W, 3) uint8 with their smallest and largest values, and their own (height, width)."""
    with ThreadPoolExecutor(recipe.infer.batch) as pool:
        for stems in todo:
            small, low, high, sizes = zip(*pool.map(lambda stem: _read(files[stem], recipe), stems), strict=True)
            yield stems, (torch.from_numpy(np.stack(small)), torch.tensor(low), torch.tensor(high)), list(sizes)


def _read(file: Path, recipe: Recipe) -> tuple[NDArray[np.uint8], float, float, tuple[int, int]]:
    """One image exactly as the store would hand it to training: area-resized, rounded to 8 bit."""
    image = read_image(file)
    small = area_resize(image, recipe.data.size, scale=1)
    return small, float(image.min()), float(image.max()), (image.shape[0], image.shape[1])


@torch.inference_mode()
def _write(
    partial: Path, stem: str, logit: Tensor, size: tuple[int, int], threshold: float, probabilities: bool
) -> None:
    """Resize the logits of one image, (1, H, W), to its own (height, width), and write its mask.

    Runs in a thread, so that the next batch need not wait.
    """
    full = torch.sigmoid(interpolate(logit[None], size, mode="bilinear"))[0, 0]
    if probabilities:  # first, because the mask is the sign that an image is done
        write_probability(probability(partial, stem), full.cpu().numpy())
    write_mask(prediction(partial, stem), (full > threshold).cpu().numpy())


def _is_done(partial: Path, stem: str, probabilities: bool) -> bool:
    return prediction(partial, stem).exists() and (not probabilities or probability(partial, stem).exists())


def _held_out(files: dict[str, Path], stems: Sequence[str], images: Path) -> dict[str, Path]:
    missing = [stem for stem in stems if stem not in files]
    if missing:
        raise InputDataError(
            f"{images}: {len(missing)} of the run's {len(stems)} held-out images are not there: {named(missing)}"
        )
    return {stem: files[stem] for stem in sorted(stems)}


def _check_same_images(out: Path, key: dict[str, Any]) -> None:
    """A newer checkpoint's masks replace older ones; masks of other images are not thrown away."""
    check_replaceable(out)
    if not manifest(out).exists():
        return
    before = read_json(manifest(out))
    for part in ("key", "images"):
        before = before.get(part) if isinstance(before, dict) else None
    if not isinstance(before, dict):
        raise InputDataError(
            f"{manifest(out)}: not the manifest of a prediction set: give another --name, or remove it"
        )
    lost = sorted(before.keys() - key["images"].keys())
    if lost:
        raise UsageError(
            f"{out} holds masks of {len(lost)} images that are not among these ({named(lost)}): "
            "give this set another name with --name, or remove the old one"
        )


def _take_up(partial: Path, key: dict[str, Any]) -> None:
    """Make the partial directory, or clear one up that a killed process left."""
    if manifest(partial).exists() and not is_finished(partial, key):
        shutil.rmtree(partial)  # an older set that had just been swapped out
    partial.mkdir(parents=True, exist_ok=True)
    remove_leftovers(partial)
    remove_leftovers(probability(partial, "any").parent)


def _finish(partial: Path, out: Path, key: dict[str, Any], files: dict[str, Path]) -> None:
    sizes = {stem: grey_size(prediction(partial, stem)) for stem in files}
    images = {stem: {"height": height, "width": width} for stem, (height, width) in sizes.items()}
    write_manifest(partial, {"key": key, "images": images, "probabilities": key["probabilities"]})
    publish(partial, out)
    log.info("%s: masks of %d images", out, len(files))
