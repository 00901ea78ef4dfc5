"""How well inference overlaps reading, the network and writing: the slowest alone compared with the whole."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from scripts.bench.measure import Row, interleaved, named_seconds, one_thread
from scripts.bench.site import Site, multiplied
from stas import infer as stage
from stas.data.listing import list_images
from stas.models.checkpoint import save_checkpoint, take_snapshot
from stas.models.network import build_network, place
from stas.models.predict import Picture, Settings, predict_logits
from stas.paths import Workspace
from stas.recipe import load_recipe
from stas.system.files import sha256
from stas.system.threads import map_ahead

RUN = "lite0"


def measure(site: Site) -> Iterator[Row]:
    count = 4 if site.quick else 48
    directory = site.scratch / "infer"
    images = multiplied(site.images, directory / "images", count)
    workspace = Workspace(directory / "workspace")
    recipe = load_recipe("lite0", ["data.size=64"] if site.quick else [])
    torch.manual_seed(0)
    network = build_network(recipe.model, recipe.data.size, pretrained=False).eval()
    place(network, torch.device("cpu"), recipe.train.channels_last)
    metadata = {"recipe": recipe.model_dump(mode="json"), "validation": []}
    save_checkpoint(workspace.run(RUN).checkpoint("best"), take_snapshot(network, metadata))
    files = list_images(images)
    stems = list(files)
    hashes = {stem: sha256(path) for stem, path in files.items()}
    settings = Settings.of(recipe, tta=False)

    def read() -> list[Picture]:
        return list(map_ahead(lambda stem: stage._read(files[stem], hashes[stem], recipe.data), stems, stage.READERS))

    pictures = read()

    def forward() -> list[Tensor]:
        return [predict_logits(network, picture, settings) for picture in pictures]

    logits = forward()

    def write() -> None:
        shutil.rmtree(directory / "masks", ignore_errors=True)
        with ThreadPoolExecutor(2) as pool:
            written = [
                pool.submit(stage._write, directory / "masks", stem, logit, 0.5, False)
                for stem, logit in zip(stems, logits, strict=True)
            ]
        for future in written:
            future.result()

    def whole() -> None:
        shutil.rmtree(workspace.predictions(RUN), ignore_errors=True)
        stage.infer(RUN, images, workspace)

    stages = {"read, decode, resize": read, "network, resize back": forward, "encode, write": write}
    with one_thread():  # else the network takes the cores of the other stages, unlike on a GPU
        seconds = interleaved({**stages, "infer": whole}, min(3, site.repeats))
    slowest = max(stages, key=lambda name: seconds[name])
    size = " x ".join(map(str, recipe.data.size))
    note = f"slowest: {slowest}; lite0 at {size} on one thread of the processor, beside it reading and writing"
    what = f"infer {count} images: slowest single stage / time"
    yield Row(what, seconds[slowest] / seconds["infer"], 0.9, detail=named_seconds(seconds), note=note)
