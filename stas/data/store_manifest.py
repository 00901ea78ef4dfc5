"""What a store's manifest says, read as a stranger's file."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from typing_extensions import TypedDict  # which pydantic can validate before Python 3.12

from stas.data.images import MAX_PIXELS, MAX_SIDE, is_plain_stem
from stas.data.store_file import MAKE_AGAIN
from stas.data.store_spec import StoreSpec
from stas.errors import InputDataError
from stas.paths import manifest_file
from stas.system.files import read_json
from stas.system.publish import FORMATS
from stas.system.untrusted import shown

MAX_STORED_SIDE = 8192  # pixels, the largest that a recipe may ask for


def _plain_stem(stem: str) -> str:
    """A stem that names a file in a directory, and none outside of it."""
    if not is_plain_stem(stem):
        raise ValueError("not the stem of a file in one directory")
    return stem


Stem = Annotated[str, AfterValidator(_plain_stem)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}$")]  # of a file or a part of its name
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
StoredSide = Annotated[int, Field(ge=1, le=MAX_STORED_SIDE)]
Byte = Annotated[int, Field(ge=0, le=255)]
Pixels = Annotated[int, Field(ge=0, le=MAX_PIXELS)]


class Sample(TypedDict):
    """A manifest's entry for one sample."""

    stem: Stem
    sha256: str  # of the image, then of each label's mask and packed full mask
    height: Side  # of the original, pixels
    width: Side
    stored: tuple[Side, Side]  # height and width of the stored image, pixels
    min: Byte  # smallest and largest value of the original image over all channels, 0 to 255
    max: Byte
    area: Pixels  # of the original that are foreground of any label
    areas: dict[Name, Pixels]  # of the original that are foreground, by label
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
    """A store's manifest, which may be a stranger's."""

    format: int
    key: Name  # names the copy on local disk, so it must not lead out of there
    labels: Annotated[list[Name], Field(min_length=1, max_length=1)]  # records and areas are ready for several
    size: tuple[StoredSide, StoredSide] | None
    scale: Annotated[float, Field(gt=0, le=1)] | None
    files: dict[str, int]  # with their sizes in bytes
    samples: list[Sample]
    skipped: list[Skipped]


def read_store_manifest(directory: Path) -> tuple[Manifest, StoreSpec]:
    """Read and check a store's manifest.

    Returns:
        What it says, and what the store is made for.

    Raises:
        InputDataError: there is none, or it is not one of this version.
    """
    content: Any = read_json(manifest_file(directory))
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMATS["store"]:
        raise InputDataError(
            f"{directory}: a store of format {shown(found)}, but this version reads format {FORMATS['store']}: "
            "run `stas preprocess` again, which makes a new one; this one may then be deleted"
        )
    try:
        read = Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise _refusal(directory, f"{where} is {shown(problem['input'])}, {problem['msg']}") from None
    if (read.size is None) == (read.scale is None):
        raise _refusal(directory, f"size {read.size} and scale {read.scale}, where one of them must be given")
    if len({sample["stem"] for sample in read.samples}) != len(read.samples):
        raise _refusal(directory, "two samples of one stem")
    spec = StoreSpec(tuple(read.labels), read.size, read.scale)
    for sample in read.samples:
        if problem := _problem(sample, spec):
            raise _refusal(directory, f"sample {sample['stem']} {problem}")
    return read, spec


def _problem(sample: Sample, spec: StoreSpec) -> str | None:
    """What in an entry contradicts the rest of it or of the manifest."""
    height, width = sample["height"], sample["width"]
    if height * width > MAX_PIXELS:
        return f"of {height} x {width} pixels, more than {MAX_PIXELS}"
    stored = spec.shape(height, width)
    if sample["stored"] != stored:
        return f"stored as {sample['stored']}, where an image of {height} x {width} pixels is stored as {stored}"
    if sample["areas"].keys() != set(spec.labels):
        return f"with areas of {shown(list(sample['areas']))}, where the labels are {', '.join(spec.labels)}"
    return None


def _refusal(directory: Path, problem: str) -> InputDataError:
    return InputDataError(f"{manifest_file(directory)}: {problem}: {MAKE_AGAIN}")
