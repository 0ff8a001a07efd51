"""What the JSON files of a prepared folder may hold. Every value is checked when a file is read.

Imports pydantic, and is imported only where such a file is read, so that `cluda --help` stays fast. H W pixels.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cluda_cli.data.image_files import MAX_PIXELS
from cluda_cli.data.labels import IGNORE, LabelClass


def _check_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("a NUL character is not possible here")
    return value


def _check_row(row: "Row") -> "Row":
    (height, width), pixels = row[2], row[3]
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} is more than an image can have")
    if sum(pixels.values()) > height * width:
        raise ValueError("more labelled pixels than the image has")
    return row


Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_check_text)]
TrainId = Annotated[int, Field(ge=0, lt=IGNORE)]
Channel = Annotated[int, Field(ge=0, le=255)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Side = Annotated[int, Field(ge=1, le=MAX_PIXELS)]
Stamp = tuple[Count, Count, Count, Count]
Row = tuple[Text, Text | None, tuple[Side, Side], dict[TrainId, Count], Stamp | None]
"""Image, label, (height, width), train id -> pixels, sizes and times of both files."""


class StoredFile(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class IndexHead(StoredFile):
    """What every version of an index has."""

    format: int


class IndexFile(IndexHead):
    """index.json."""

    name: Text
    roots: Annotated[tuple[Text, ...], Field(min_length=1)]
    fingerprint: str
    classes: list[dict[str, Any]]
    margins: tuple[Count, Count, Count, Count]
    references: dict[Text, Text] = {}
    splits: dict[Text, list[Annotated[Row, AfterValidator(_check_row)]]]

    @model_validator(mode="after")
    def _check_train_ids(self) -> "IndexFile":
        largest = max((max(row[3], default=0) for rows in self.splits.values() for row in rows), default=0)
        if largest >= len(self.classes):
            raise ValueError(f"pixels of train id {largest}, but there are {len(self.classes)} classes")
        return self


class ManifestFile(StoredFile):
    """manifest.json of a dataset that `prepare` made."""

    inputs: str
    """Hash of all that the index was made from."""
    bad: Count = 0
    """Files that were left out."""
    accepted: Count = 0
    """Files with errors, left out or not, that --skip-bad accepted."""


class CacheFile(StoredFile):
    """cache.json."""

    format: int
    box: tuple[Side, Side] | None
    inputs: str
    files: dict[Text, Text]


class _ClassRow(BaseModel):
    name: Text
    color: tuple[Channel, Channel, Channel]
    label_id: Annotated[int, Field(ge=-(2**31), lt=2**31)]
    thing: bool = False


_CLASSES = TypeAdapter(Annotated[list[_ClassRow], Field(min_length=1, max_length=IGNORE - 1)])
File = TypeVar("File", bound=StoredFile)


def read_stored(path: Path, model: type[File]) -> File:
    """Read one of these files. Raises OSError if it cannot be read, ValueError that names the first wrong value."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path.name}")
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(_explain(error)) from error


def read_classes(rows: Any) -> tuple[LabelClass, ...]:
    """Classes from plain rows, such as those of an index or of weights. Raises ValueError."""
    try:
        checked = _CLASSES.validate_python(rows)
    except ValidationError as error:
        raise ValueError(f"classes: {_explain(error)}") from error
    names = [row.name for row in checked]
    if len(set(names)) < len(names):
        raise ValueError("classes: two have the same name")
    return tuple(LabelClass(row.name, row.color, row.label_id, row.thing) for row in checked)


def _explain(error: ValidationError) -> str:
    """The first problem in one line."""
    problem = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}"[:200] if place else problem["msg"][:200]
