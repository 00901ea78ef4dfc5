"""How fast predictions are scored, compared with decoding their masks alone."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.bench.measure import Row, interleaved, named_seconds
from scripts.bench.pictures import fastest_decoder
from scripts.bench.site import Site, multiplied
from stas.evaluate import evaluate
from stas.system.resources import cores
from stas.vote import vote


def measure(site: Site) -> Iterator[Row]:
    count = 6 if site.quick else 1000
    place = site.scratch / "evaluate"
    voted = vote(site.members, place / "predictions" / "vote")
    sets = [multiplied(directory, place / directory.name, count) for directory in (*site.members, voted)]
    truth = multiplied(site.annotations, place / "truth", count)
    files = [path for directory in sets for path in sorted(directory.iterdir())]
    library, decode = fastest_decoder(files[0])

    def decode_file(path: Path) -> None:
        decode(path.read_bytes())

    def limit() -> None:
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(decode_file, files):
                pass

    def stage() -> None:
        shutil.rmtree(place / "scores", ignore_errors=True)
        evaluate(sets, truth, place / "scores", sheets=0)

    seconds = interleaved({"limit": limit, "evaluate": stage}, min(3, site.repeats))
    note = f"limit: {len(files)} masks decoded by {library} in {cores()} threads; evaluate without sheets"
    what = f"evaluate {count} images, 3 members and their vote: limit / time"
    yield Row(what, seconds["limit"] / seconds["evaluate"], 0.8, detail=named_seconds(seconds), note=note)
