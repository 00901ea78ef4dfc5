"""Turn the results into a page, docs/benchmarks.md, which is never edited by hand."""

from typing import Any

HEAD = """# Benchmarks

Made by `make bench OUT=docs`, on {date}; `docs/benchmarks.json` has the same figures. Do not edit.

- Machine: {processor}, {cores} cores, {memory_gib} GiB, GPUs: {gpus}; {system}, Python {python}.
- Versions: {versions}.
- Ratios of times compare things timed in turn in the same run: medians of interleaved repeats, after a warm-up. So the
  ratios of another machine can be compared with these. Memory, seconds to start and exponents of growth are measured as
  their notes say.
- Images are made by `scripts/make_sample.py`, at the size of the contest's, 1716 x 942. Rivals are written as their
  users would write them, in `scripts/bench/rivals.py`: the contest's notebooks, what MONAI's documentation recommends,
  and nnU-Net v2's loader, if NNUNET_PYTHON names a Python with nnunetv2.

| what | result | target | reached | measured |
|---|---|---|---|---|
"""
MISSED = """
## Targets that are missed, and why

- preprocess: of 28 ms per image on one core, reading the JPEG takes 9, the exact area averages 7 (Pillow's box filter,
  which is in the limit, 6), the mask's 1.5, hashing the stored data 2, reading, hashing and drawing the annotation 2,
  LMDB and the disk 2; the limit neither hashes nor writes a file.
- vote in two threads: an image takes 14 % more processor time than in one, and both threads wait a tenth of the time
  for the interpreter's lock, which some 60 short calls per image release and take again.
"""
GROWTH = """
## How cost grows

![Cost against images, size, members and ranks, on logarithmic axes](growth.png)
"""


def markdown(content: dict[str, Any]) -> str:
    """The page for the JSON that the benchmarks wrote."""
    metadata = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    gpus = ", ".join(metadata["gpus"]) or "none"
    head = HEAD.format(**metadata | {"versions": versions, "gpus": gpus, "date": content["date"]})
    lines = [_line(row) for row in content["rows"]]
    notes = [f"- {row['what']}: {row['note']}" for row in content["rows"] if row["note"]]
    parts = [head + "\n".join(lines), "\n".join(["## Notes", "", *notes])]
    return "\n\n".join(parts) + "\n" + MISSED + GROWTH


def figure(row: dict[str, Any]) -> str:
    """A row's result with its unit."""
    return f"{row['value']:.3g}{' s' if row['unit'] == 's' else ' x' if row['unit'] == 'x' else ''}"


def _line(row: dict[str, Any]) -> str:
    target = f"{'at least' if row['at_least'] else 'at most'} {row['target']:g}"
    detail = "; ".join(f"{name}: {value:.4g}" for name, value in row["detail"].items())
    return f"| {row['what']} | {figure(row)} | {target} | {'yes' if row['reached'] else '**no**'} | {detail} |"
