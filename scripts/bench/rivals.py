"""Common practice: two ways to train the same network on the same files, written from public documentation.

`original`: like the contest's notebooks: MONAI's transforms from JPEG every epoch, torch's DataLoader without workers,
DataParallel, fp32. `competent`: what MONAI's documentation recommends: CacheDataset keeps the result up to the random
transform, ThreadDataLoader, DDP, bf16. Both use adabelief-pytorch's AdaBelief and MONAI's DiceLoss.

nnU-Net v2 is the third, for its loader only (nnunet.py), because its loop trains its own network. It needs an older
timm, so it has its own environment, whose Python NNUNET_PYTHON names. If that is not set, its row is left out.
"""

import contextlib
import io
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from adabelief_pytorch import AdaBelief
from monai.data.dataset import CacheDataset, Dataset
from monai.data.meta_obj import set_track_meta
from monai.data.thread_buffer import ThreadDataLoader
from monai.losses.dice import DiceLoss
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import ScaleIntensityd
from monai.transforms.io.dictionary import LoadImaged
from monai.transforms.spatial.dictionary import RandRotate90d, Resized
from monai.transforms.utility.dictionary import EnsureChannelFirstd, EnsureTyped
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from stas.data.annotations import rasterise, read_labelme
from stas.data.images import write_mask
from stas.paths import mask_file

KEYS = ["image", "mask"]
Loader = DataLoader[Any]


def mask_files(annotations: Path, out: Path) -> list[Path]:
    """Rasterise each LabelMe file to a mask PNG of its stem in `out`, as both rivals need them."""
    files = []
    for path in sorted(annotations.glob("*.json")):
        annotation = read_labelme(path)
        assert annotation.size
        files.append(mask_file(out, path.stem))
        write_mask(files[-1], rasterise(annotation.shapes, annotation.size, "STAS", path))
    return files


def original_loader(images: Sequence[Path], masks: Sequence[Path], size: int, batch: int) -> Loader:
    """Decode, scale, resize and rotate every sample each time, in the training process.

    Args:
        images: JPEGs.
        masks: PNGs of 0 and 255, in the same order.
        size: side of the square that the network sees, pixels.
        batch: images at a time.

    Returns:
        Batches of "image" (N, 3, W, H) and "mask" (N, 1, W, H), float32 in [0, 1]: MONAI reads the width first.
    """
    set_track_meta(True)
    steps = [*_until_random(size), RandRotate90d(KEYS, prob=0.3), EnsureTyped(KEYS)]
    return DataLoader(Dataset(_entries(images, masks), Compose(steps)), batch_size=batch, shuffle=True, num_workers=0)


def competent_loader(images: Sequence[Path], masks: Sequence[Path], size: int, batch: int) -> Loader:
    """The same, but everything before the rotation is done once and kept in memory, as float32.

    If ranks are joined, each takes its share of the samples, and `batch` is per rank.
    """
    set_track_meta(True)
    steps = [*_until_random(size), EnsureTyped(KEYS, track_meta=False), RandRotate90d(KEYS, prob=0.3)]
    cached = CacheDataset(_entries(images, masks), Compose(steps), num_workers=None, progress=False, copy_cache=False)
    sampler = DistributedSampler(cached) if distributed.is_initialized() else None
    return ThreadDataLoader(
        cached, batch_size=batch, shuffle=sampler is None, sampler=sampler, num_workers=0, pin_memory=_gpu()
    )


def nnunet_rate(images: Path, masks: Path, scratch: Path, size: int, batch: int, count: int) -> float | None:
    """Samples a second of nnU-Net's loader over `count` batches; None without NNUNET_PYTHON.

    Args:
        images: a directory of JPEGs.
        masks: a directory of PNGs of 0 and 255 with the same stems.
        scratch: a new directory.
        size: side of its patch, pixels.
        batch: images at a time.
        count: batches.
    """
    python = os.environ.get("NNUNET_PYTHON")
    if not python:
        return None
    command = [python, Path(__file__).with_name("nnunet.py"), images, masks, scratch, *map(str, (size, batch, count))]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def batches(loader: Loader) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches.

    MONAI keeps affine matrices unless a process-wide switch is off. The original leaves it on, and cannot load without.
    """
    metadata = not isinstance(loader, ThreadDataLoader)
    while True:
        rest = iter(loader)
        while True:
            set_track_meta(metadata)
            batch = next(rest, None)
            if batch is None:
                break
            yield batch


def original_network(encoder: str, device: torch.device) -> nn.Module:
    """DeepLabV3Plus with random weights, in a DataParallel if there are GPUs."""
    network = _network(encoder).to(device)
    return nn.DataParallel(network) if device.type == "cuda" else network


def competent_network(encoder: str, device: torch.device) -> nn.Module:
    """DeepLabV3Plus with random weights, in DDP if ranks are joined."""
    network = _network(encoder).to(device)
    if not distributed.is_initialized():
        return network
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def adabelief(parameters: Iterable[nn.Parameter]) -> Optimizer:
    with contextlib.redirect_stdout(io.StringIO()):  # it always prints its settings
        return AdaBelief(
            parameters,
            lr=1e-4,
            eps=1e-16,
            betas=(0.9, 0.99),
            weight_decouple=True,
            rectify=False,
            weight_decay=1e-4,  # pyright: ignore[reportArgumentType]
            print_change_log=False,
        )


def original_step(
    network: nn.Module, optimizer: Optimizer, batch: dict[str, torch.Tensor], device: torch.device
) -> float:
    """One step in fp32; returns the loss."""
    images, masks = batch["image"].to(device), batch["mask"].to(device)
    optimizer.zero_grad()
    loss = DiceLoss(sigmoid=True)(network(images), masks)
    loss.backward()
    optimizer.step()
    return loss.item()


def competent_step(
    network: nn.Module, optimizer: Optimizer, batch: dict[str, torch.Tensor], device: torch.device
) -> float:
    """One step in bf16, its loss in fp32; returns the loss."""
    images, masks = (batch[key].to(device, non_blocking=True) for key in KEYS)
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16):
        logits = network(images)
    loss = DiceLoss(sigmoid=True)(logits.float(), masks)
    loss.backward()
    optimizer.step()
    return loss.item()


def _entries(images: Sequence[Path], masks: Sequence[Path]) -> list[dict[str, str]]:
    return [{"image": str(image), "mask": str(mask)} for image, mask in zip(images, masks, strict=True)]


def _until_random(size: int) -> list[Any]:
    """The steps of both before the random rotation; Resized works in its default mode, 'area'."""
    return [LoadImaged(KEYS), EnsureChannelFirstd(KEYS), ScaleIntensityd(KEYS), Resized(KEYS, (size, size))]


def _network(encoder: str) -> nn.Module:
    return smp.DeepLabV3Plus(encoder_name=encoder, encoder_weights=None, in_channels=3, classes=1)


def _gpu() -> bool:
    return torch.cuda.is_available()
