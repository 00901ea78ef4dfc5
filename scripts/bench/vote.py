"""How fast three members vote, compared with reading and writing masks alone, and with the original's cell."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.bench.measure import Row, interleaved
from scripts.bench.pictures import fastest_decoder, fastest_encoder
from scripts.bench.site import Site, multiplied
from stas.vote import vote


def measure(site: Site) -> Iterator[Row]:
    count = 6 if site.quick else 60
    members = [multiplied(member, site.scratch / "vote" / member.name, count) for member in site.members]
    stems = sorted(path.stem for path in members[0].iterdir())
    decoder, decode = fastest_decoder(members[0] / f"{stems[0]}.png")
    encoder, encode = fastest_encoder(decode((members[0] / f"{stems[0]}.png").read_bytes()))
    out = site.scratch / "vote" / "out"

    def limit() -> None:
        for stem in stems:
            first, *_ = [decode((member / f"{stem}.png").read_bytes()) for member in members]
            encode(first)

    def stage(workers: int) -> None:
        shutil.rmtree(out, ignore_errors=True)
        vote(members, out, workers=workers)

    seconds = interleaved(
        {
            "limit": limit,
            "one thread": lambda: stage(1),
            "two threads": lambda: stage(2),
            "original's cell": lambda: original_cell(members, stems, site.scratch / "vote" / "cell"),
        },
        site.repeats,
    )
    detail = {f"{name}, ms an image": 1000 * value / count for name, value in seconds.items()}
    one = seconds["one thread"]
    note = f"limit: three masks decoded by {decoder}, one encoded by {encoder}; the stage also hashes, syncs, renames"
    yield Row("vote: limit / time of an image", seconds["limit"] / one, 1.0, detail=detail, note=note)
    yield Row("vote: time of the original's cell / time", seconds["original's cell"] / one, 5.0)
    yield Row("vote: one thread's time / two threads'", one / seconds["two threads"], 1.8)


def original_cell(members: list[Path], stems: list[str], out: Path) -> None:
    """The way of the contest's notebooks: sum the masks, cut at two of three, save."""
    out.mkdir(exist_ok=True)
    for stem in stems:
        masks = [np.array(Image.open(member / f"{stem}.png")) for member in members]
        votes = sum((mask > 0).astype(int) for mask in masks)
        mask = np.where(votes >= 2, 255, 0)
        Image.fromarray(mask.astype(np.uint8)).save(out / f"{stem}.png")
