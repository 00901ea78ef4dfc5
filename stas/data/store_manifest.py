"""Read a store's manifest and the index of its samples, without trusting them.

The index has one line of JSON per sample. It is read line by line, so a store of a million samples needs no more memory
than its entries. The manifest holds its SHA-256.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from stas.config import MAX_INPUT_SIDE
from stas.data.images import MAX_PIXELS, MAX_SIDE
from stas.data.listing import is_plain_stem
from stas.data.store_file import MAKE_AGAIN
from stas.data.store_spec import StoreSpec
from stas.errors import InputDataError
from stas.paths import PLAIN_NAME, manifest_file, store_samples
from stas.system.publish import FORMATS
from stas.system.sealed import read_sealed
from stas.system.untrusted import check_file, shown

MAX_SAMPLES = 2_000_000  # each takes up to 2 KiB of memory in every process that reads the store
MAX_LINE = 8192  # bytes of one entry: names take up to 255 bytes each, or 1,530 if they are all escaped
MAX_INDEX_BYTES = 2 << 30


def _plain_stem(stem: str) -> str:
    """Refuse a stem that could name a file outside its directory."""
    if not is_plain_stem(stem):
        raise ValueError("not the stem of a file in one directory")
    return stem


Stem = Annotated[str, AfterValidator(_plain_stem)]
Name = Annotated[str, Field(pattern=f"^{PLAIN_NAME}$")]  # of a file, or part of its name
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
StoredSide = Annotated[int, Field(ge=1, le=MAX_INPUT_SIDE)]
Byte = Annotated[int, Field(ge=0, le=255)]
PixelCount = Annotated[int, Field(ge=0, le=MAX_PIXELS)]


class Sample(TypedDict):
    """The index's entry for one sample."""

    stem: Stem
    sha256: str  # of the image, then of each label's mask and packed full mask
    height: Side  # of the original, pixels
    width: Side
    stored: tuple[Side, Side]  # height and width of the stored image, pixels
    min: Byte  # smallest and largest value of the original image over all channels, 0 to 255
    max: Byte
    area: PixelCount  # foreground of any label, in pixels of the original
    areas: dict[Name, PixelCount]  # the same for each label
    image: str  # names and SHA-256 of the sources
    image_sha256: str
    annotation: str
    annotation_sha256: str


class Skipped(TypedDict):
    """A manifest's entry for a file that could not be used."""

    file: str
    reason: str
    remedy: str


class Manifest(BaseModel):
    """A store's manifest, which may come from a stranger."""

    format: int
    key: Name  # names the copy on local disk, so it must not lead out of that directory
    labels: Annotated[list[Name], Field(min_length=1, max_length=1)]  # records and areas already allow several
    size: tuple[StoredSide, StoredSide] | None
    scale: Annotated[float, Field(gt=0, le=1)] | None
    files: dict[str, int]  # sizes in bytes
    sha256: dict[str, str]  # of the same files
    samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)]  # lines of the index
    skipped: list[Skipped]


_SAMPLE = TypeAdapter(Sample)


def sample_line(sample: Sample) -> bytes:
    """A sample's line in the index."""
    line = json.dumps(sample, ensure_ascii=False).encode() + b"\n"
    assert len(line) <= MAX_LINE
    return line


def read_store_manifest(directory: Path) -> tuple[Manifest, StoreSpec, list[Sample]]:
    """Read and check a store's manifest and index.

    Returns:
        The manifest, the spec of the store, and its samples.

    Raises:
        InputDataError: the manifest or the index is missing, invalid, damaged or of another version.
    """
    content: Any
    content, intact = read_sealed(manifest_file(directory))
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMATS["store"]:
        raise InputDataError(
            f"{directory}: a store of format {shown(found)}, but this version reads format {FORMATS['store']}: "
            "run `stas preprocess` again to make a new one; then delete this one"
        )
    if content.get("kind") != "store":
        raise _refusal(directory, f"its kind is {shown(content.get('kind'))}, not store")
    if not intact:
        raise _refusal(directory, "damaged, or changed by hand: its content does not match its checksum")
    try:
        read = Manifest.model_validate(content)
    except ValidationError as error:
        raise _refusal(directory, _first(error)) from None
    if (read.size is None) == (read.scale is None):
        raise _refusal(directory, f"size {read.size} and scale {read.scale}, but exactly one of them must be given")
    spec = StoreSpec(tuple(read.labels), read.size, read.scale)
    samples = list(_read_index(directory, read, spec))
    if len({sample["stem"] for sample in samples}) != len(samples):
        raise _refusal(directory, "two samples have the same stem")
    return read, spec, samples


def _read_index(directory: Path, manifest: Manifest, spec: StoreSpec) -> Iterator[Sample]:
    path = store_samples(directory)
    check_file(path, MAX_INDEX_BYTES)
    digest = hashlib.sha256()
    number = 0
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE):
            digest.update(line)
            if number == manifest.samples:
                raise _refusal(directory, f"more samples than the manifest's {number}", path)
            try:
                sample = _SAMPLE.validate_json(line)
            except ValidationError as error:
                raise _refusal(directory, _first(error, f"samples.{number}."), path) from None
            if problem := _problem(sample, spec):
                raise _refusal(directory, f"sample {sample['stem']} {problem}", path)
            yield sample
            number += 1
    if number != manifest.samples:
        raise _refusal(directory, f"{number} samples, but the manifest says {manifest.samples}", path)
    if digest.hexdigest() != manifest.sha256.get(path.name):
        raise _refusal(directory, "damaged, or changed by hand: its content does not match the manifest", path)


def _problem(sample: Sample, spec: StoreSpec) -> str | None:
    """How an entry contradicts itself or the rest of the manifest; None if it does not."""
    height, width = sample["height"], sample["width"]
    if height * width > MAX_PIXELS:
        return f"has {_pixels((height, width))} (width x height), more than {MAX_PIXELS}"
    stored = spec.shape(height, width)
    if sample["stored"] != stored:
        return (
            f"is stored at {_pixels(sample['stored'])} (width x height), but an image of {_pixels((height, width))} "
            f"is stored at {_pixels(stored)}"
        )
    if sample["min"] > sample["max"]:
        return f"has values from {sample['min']} to {sample['max']}"
    if (area := max([sample["area"], *sample["areas"].values()])) > height * width:
        return f"has {area} pixels of foreground in {_pixels((height, width))} (width x height)"
    if sample["areas"].keys() != set(spec.labels):
        return f"has areas for {shown(list(sample['areas']))}, but the labels are {', '.join(spec.labels)}"
    return None


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} pixels"


def _first(error: ValidationError, prefix: str = "") -> str:
    """The first problem that pydantic found."""
    problem = error.errors(include_url=False, include_context=False)[0]
    where = prefix + ".".join(map(str, problem["loc"]))
    return f"{where} is {shown(problem['input'])}, {problem['msg']}"


def _refusal(directory: Path, problem: str, file: Path | None = None) -> InputDataError:
    return InputDataError(f"{file or manifest_file(directory)}: {problem}: {MAKE_AGAIN}")
