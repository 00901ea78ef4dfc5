"""Read a store's manifest, without trusting it."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from stas.config import MAX_INPUT_SIDE
from stas.data.images import MAX_PIXELS, MAX_SIDE, is_plain_stem
from stas.data.store_file import MAKE_AGAIN
from stas.data.store_spec import StoreSpec
from stas.errors import InputDataError
from stas.paths import PLAIN_NAME, manifest_file
from stas.system.files import read_json
from stas.system.publish import FORMATS
from stas.system.untrusted import shown


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
    """A manifest's entry for one sample."""

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
    samples: list[Sample]
    skipped: list[Skipped]


def read_store_manifest(directory: Path) -> tuple[Manifest, StoreSpec]:
    """Read and check a store's manifest.

    Returns:
        The manifest, and the spec of the store.

    Raises:
        InputDataError: the manifest is missing, invalid or of another version.
    """
    content: Any = read_json(manifest_file(directory))
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMATS["store"]:
        raise InputDataError(
            f"{directory}: a store of format {shown(found)}, but this version reads format {FORMATS['store']}: "
            "run `stas preprocess` again to make a new one; then delete this one"
        )
    if content.get("kind") != "store":
        raise _refusal(directory, f"its kind is {shown(content.get('kind'))}, not store")
    try:
        read = Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise _refusal(directory, f"{where} is {shown(problem['input'])}, {problem['msg']}") from None
    if (read.size is None) == (read.scale is None):
        raise _refusal(directory, f"size {read.size} and scale {read.scale}, but exactly one of them must be given")
    if len({sample["stem"] for sample in read.samples}) != len(read.samples):
        raise _refusal(directory, "two samples have the same stem")
    spec = StoreSpec(tuple(read.labels), read.size, read.scale)
    for sample in read.samples:
        if problem := _problem(sample, spec):
            raise _refusal(directory, f"sample {sample['stem']} {problem}")
    return read, spec


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
    if sample["areas"].keys() != set(spec.labels):
        return f"has areas for {shown(list(sample['areas']))}, but the labels are {', '.join(spec.labels)}"
    return None


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} pixels"


def _refusal(directory: Path, problem: str) -> InputDataError:
    return InputDataError(f"{manifest_file(directory)}: {problem}: {MAKE_AGAIN}")
