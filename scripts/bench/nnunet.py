"""The rival nnU-Net v2: print how many samples per second its own loader makes.

    NNUNET_PYTHON nnunet.py IMAGES MASKS SCRATCH SIDE BATCH BATCHES

Run it with a Python that has nnunetv2, which needs other versions than `stas`, so it imports nothing from `stas`.
nnU-Net plans and prepares the images as its documentation says; then the plan's patch and batch are set to the
recipe's. Each sample is a crop with nnU-Net's own augmentation, made in as many processes as there are cores.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

CACHED = 8  # batches; more than its processes keep ready


def main() -> None:
    images, masks, scratch = map(Path, sys.argv[1:4])
    side, batch, batches = map(int, sys.argv[4:])
    places = {name: str(scratch / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    os.environ.update(places, nnUNet_n_proc_DA=str(os.cpu_count()))
    _write_dataset(images, masks, scratch / "nnUNet_raw" / "Dataset001_bench")
    _plan(scratch / "nnUNet_preprocessed" / "Dataset001_bench" / "nnUNetPlans.json", side, batch)
    print(_rate(batch, batches))


def _write_dataset(images: Path, masks: Path, dataset: Path) -> None:
    for part in ("imagesTr", "labelsTr"):
        (dataset / part).mkdir(parents=True)
    files = sorted(images.glob("*.jpg"))
    for file in files:
        Image.open(file).save(dataset / "imagesTr" / f"{file.stem}_0000.png", compress_level=1)
        mask = np.asarray(Image.open(masks / f"{file.stem}.png")) > 0
        Image.fromarray(mask.astype(np.uint8)).save(dataset / "labelsTr" / f"{file.stem}.png")
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "STAS": 1},
        "numTraining": len(files),
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }
    (dataset / "dataset.json").write_text(json.dumps(content))


def _plan(plans: Path, side: int, batch: int) -> None:
    # Imported late, because it reads the environment on import.
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (  # pyright: ignore[reportMissingImports]
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    extract_fingerprints([1], num_processes=2)
    plan_experiments([1])
    content = json.loads(plans.read_text())
    content["configurations"]["2d"] |= {"patch_size": [side, side], "batch_size": batch}
    plans.write_text(json.dumps(content))
    preprocess([1], configurations=["2d"], num_processes=[2])


def _rate(batch: int, batches: int) -> float:
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args  # pyright: ignore[reportMissingImports]

    trainer = get_trainer_from_args("1", "2d", "all", device=torch.device("cpu"))
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    for _ in range(CACHED):
        next(loader)
    began = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return batch * batches / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
