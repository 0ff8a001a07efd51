"""Read the description of a user's own dataset, a TOML file. DescriptionTable lists its keys."""

import colorsys
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from cluda_cli.data.globs import check_glob
from cluda_cli.data.index import IMAGE_SUFFIXES
from cluda_cli.data.labels import CITYSCAPES, IGNORE, THING_NAMES, ClassTable, Color, LabelClass, build_id_table
from cluda_cli.errors import DataError, SettingsError, first_line, nearest
from cluda_cli.preparation.label_files import MAX_CLASSES, MAX_TOLERANCE, ColorLabels, IdLabels, LabelReader
from cluda_cli.preparation.pairing import Split
from cluda_cli.preparation.published import Dataset
from cluda_cli.settings import Margins, Section

Channel = Annotated[int, Field(ge=0, le=255)]


def _check_pattern(value: str) -> str:
    parts = value.replace("\\", "/").split("/")
    if value.startswith("/") or ":" in parts[0] or ".." in parts:
        raise ValueError("patterns lie below root; set root to the folder that holds all files")
    if any("**" in part and part != "**" for part in parts):
        raise ValueError("** stands for whole folders, as in images/**/*.png")
    if parts[-1] in {"", ".", "**"}:
        raise ValueError("the pattern names a folder; end it with a file name such as *.png")
    check_glob(value)
    return "/".join(part for part in parts if part not in {"", "."})


def _check_text(value: str) -> str:
    if not value.strip() or not value.isprintable() or len(value) > LONGEST_TEXT:
        raise ValueError(f"a text of 1 to {LONGEST_TEXT} printable characters is needed")
    return value


def _check_root(value: str) -> str:
    if not value.isprintable() or len(value) > 1000:
        raise ValueError("a path of at most 1000 characters, none of them a control character, is needed")
    return value


def _check_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", value):
        raise ValueError(
            "a name of up to 100 letters, digits, '-', '_' and '.' is needed, because a folder is named after it"
        )
    return value


LONGEST_TEXT = 200
Text = Annotated[str, AfterValidator(_check_text)]
Pattern = Annotated[Text, AfterValidator(_check_pattern)]
PlainName = Annotated[str, AfterValidator(_check_name)]


class SplitTable(Section):
    """One split."""

    images: Pattern
    """Glob of the images, relative to root."""
    labels: Pattern | None = None
    """Glob of the labels; leave it out for images without labels."""
    references: Pattern | None = None
    """Glob of paired pictures: the scene of an image under other conditions, for `objectives.feature_distance`."""
    pairs: Pattern | None = None
    """Glob of CSV files whose lines name an image and its paired picture, where their names do not agree."""
    list: Text | None = None
    """File with one name per line that restricts the split, relative to root."""


class DescriptionTable(Section):
    """The keys of a description."""

    name: PlainName | None = None
    """Name of the prepared dataset; unset: the name of the description file."""
    root: Annotated[str, AfterValidator(_check_root)] = "."
    """Folder of the files, relative to the description."""
    ignore: tuple[int | str, ...] = ()
    """Label ids, or colours, that are neither trained on nor scored."""
    margins: Margins = (0, 0, 0, 0)
    """Top, bottom, left, right bands of the frame, pixels, that deserve no pseudo-labels."""
    things: tuple[str, ...] | None = None
    """Countable classes; unset: those named like a countable class of Cityscapes."""
    ids: dict[str, Text] = {}
    """Label id -> class name; the order of first appearance gives the train ids."""
    colors: dict[str, Text] = {}
    """"#rrggbb" or "r,g,b" -> class name, for RGB labels."""
    color_tolerance: int = Field(0, ge=0, le=MAX_TOLERANCE)
    """A colour that is not listed is read as the nearest listed one if no channel differs by more; 0: an error."""
    labels_upright: bool = False
    """Labels lie on the images as their EXIF orientation turns them; needed where the sizes do not tell."""
    palette: dict[str, tuple[Channel, Channel, Channel]] = {}
    """Class name -> colour in pictures."""
    splits: dict[PlainName, SplitTable] = Field(min_length=1)
    """Split -> where its files are."""

    @model_validator(mode="after")
    def _check_pairs(self) -> "DescriptionTable":
        for name, split in self.splits.items():
            if split.pairs and not split.references:
                raise ValueError(f"splits.{name}.pairs: needs splits.{name}.references, which finds the pictures")
        return self

    @model_validator(mode="after")
    def _check_classes(self) -> "DescriptionTable":
        problems = _find_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def read_description(path: Path) -> Dataset:
    """The dataset that a TOML file describes.

    Raises SettingsError that lists all wrong keys and values, or else all inconsistencies; DataError if a folder or a
    list is missing.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"cannot be read: {first_line(error)}", path) from error
    try:
        table = DescriptionTable.model_validate(tree)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(problem)]
        raise SettingsError("\n".join(lines), path) from error
    root = Path(path.parent, table.root).resolve()
    if not os.path.isdir(root):  # not Path.is_dir, which raises for names that are too long
        raise DataError("no such folder", root, f"correct root in {path}")
    return Dataset(
        name=table.name or _take_name(path),
        root=root,
        classes=_build_classes(table),
        reader=_build_reader(table),
        splits=tuple(_build_split(name, split, root) for name, split in table.splits.items()),
        margins=table.margins,
        labels_upright=table.labels_upright,
    )


def parse_color(text: str) -> Color:
    """ "#804080" or "128,64,128" -> (128, 64, 128). Raises ValueError."""
    if match := re.fullmatch(r"#([0-9a-fA-F]{6})", text.strip()):
        value = int(match[1], 16)
        return value >> 16, value >> 8 & 255, value & 255
    parts = text.split(",")
    if len(parts) == 3 and all(re.fullmatch(r"\s*\d{1,3}\s*", part) and int(part) < 256 for part in parts):
        return int(parts[0]), int(parts[1]), int(parts[2])
    raise ValueError(f'"{text}" is no colour; write "#rrggbb" or "r,g,b"')


def parse_id(text: str) -> int:
    """Label id, 0..255. Raises ValueError."""
    if not re.fullmatch(r"\d{1,3}", text.strip()) or int(text) > 255:
        raise ValueError(f'"{text}" is no label id; ids are whole numbers from 0 to 255')
    return int(text)


def generate_color(position: int) -> Color:
    """A colour for the class at this position: hues in steps of the golden ratio, so that no two are equal."""
    red, green, blue = colorsys.hsv_to_rgb(position * 0.618034 % 1, 0.75, (0.95, 0.65)[position % 2])
    return round(red * 255), round(green * 255), round(blue * 255)


def _find_problems(table: DescriptionTable) -> list[str]:
    """Inconsistencies between the keys about classes, one per line."""
    problems = []
    if table.ids and table.colors:
        problems.append("ids, colors: give one of them, for labels of numbers or of colours")
    labelled = [name for name, split in table.splits.items() if split.labels]
    if labelled and not (table.ids or table.colors):
        problems.append(f"splits.{labelled[0]}.labels: labels need a table [ids] or [colors] that names the classes")
    raw = table.colors or table.ids
    parse: Callable[[str], object] = parse_color if table.colors else parse_id
    seen: dict[object, str] = {}
    keys = [("colors" if table.colors else "ids", key) for key in raw] + [("ignore", str(key)) for key in table.ignore]
    for place, key in keys:
        try:
            value = parse(key)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        if value in seen:
            problems.append(f'{place}: "{key}" is already given in {seen[value]}')
        seen[value] = place
    names = list(dict.fromkeys(raw.values()))
    if len(names) == 1 and labelled:
        problems.append(
            f'the only class is "{names[0]}", so that every prediction would be right; name what else the labels hold, '
            "such as background, as a class too"
        )
    if table.color_tolerance and not table.colors:
        problems.append("color_tolerance: is for labels of colours")
    if len(names) > MAX_CLASSES:
        problems.append(f"{len(names)} classes, at most {MAX_CLASSES} are possible")
    for place, given in (("things", table.things or ()), ("palette", tuple(table.palette))):
        strange = [name for name in given if raw and name not in names]
        problems += [f'{place}: no class "{name}"{_suggest(name, names)}' for name in strange]
    return problems


def _build_classes(table: DescriptionTable) -> ClassTable:
    """Classes in order of first appearance. Unlabelled data get the Cityscapes classes, for pictures."""
    if not (table.ids or table.colors):
        return ClassTable(CITYSCAPES)
    known = {c.name: c.color for c in CITYSCAPES}
    things = THING_NAMES if table.things is None else frozenset(table.things)
    rows: dict[str, LabelClass] = {}
    for key, name in (table.colors or table.ids).items():
        if name not in rows:
            own = parse_color(key) if table.colors else None
            color = table.palette.get(name) or own or known.get(name) or generate_color(len(rows))
            rows[name] = LabelClass(name, color, len(rows) if table.colors else parse_id(key), name in things)
    return ClassTable(tuple(rows.values()))


def _build_reader(table: DescriptionTable) -> LabelReader | None:
    raw = table.colors or table.ids
    position = {name: i for i, name in enumerate(dict.fromkeys(raw.values()))}
    if table.colors:
        listed = [(parse_color(key), position[name]) for key, name in raw.items()]
        ignored = [(parse_color(str(key)), IGNORE) for key in table.ignore]
        return ColorLabels((*listed, *ignored), table.color_tolerance)
    if table.ids:
        pairs = [(parse_id(key), position[name]) for key, name in raw.items()]
        known = sorted({label_id for label_id, _ in pairs} | {parse_id(str(key)) for key in table.ignore})
        return IdLabels(tuple(build_id_table(pairs)), tuple(known))
    return None


def _build_split(name: str, table: SplitTable, root: Path) -> Split:
    if table.list is None:
        return Split(name, table.images, table.labels, references=table.references, pairs=table.pairs, required=True)
    path = root / table.list
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"the list of split {name} cannot be read: {first_line(error)}", path) from error
    for number, line in enumerate(lines, start=1):
        if len(_split_columns(line)) > 1:
            what = f'line {number} of the list of split {name} has several columns: "{line[:80]}"'
            raise DataError(what, path, "keep the column of the images; labels are found by the pattern of the split")
    listed = frozenset(_read_listed_name(line) for line in lines if line)
    return Split(
        name, table.images, table.labels, keep=listed.__contains__, listed=listed, references=table.references,
        pairs=table.pairs, required=True,
    )  # fmt: skip


def _split_columns(line: str) -> list[str]:
    """The columns of a line: a tab, or a space, comma or semicolon behind the suffix of an image, ends one."""
    columns = [""]
    for piece in re.split(r"([\s,;]+)", line):
        if "\t" in piece or (piece and piece[0] in " ,;" and Path(columns[-1]).suffix.lower() in IMAGE_SUFFIXES):
            columns.append("")
        else:
            columns[-1] += piece
    return columns


def _read_listed_name(line: str) -> str:
    """A line of a list without the suffix of an image; it may be a stem, a file name or a path below root."""
    path = PurePosixPath(line.replace("\\", "/"))
    return path.with_suffix("").as_posix() if path.suffix.lower() in IMAGE_SUFFIXES else path.as_posix()


def _take_name(path: Path) -> str:
    try:
        return _check_name(path.stem)
    except ValueError as error:
        raise SettingsError(f'"{path.stem}": {error}', path, 'set name = "..."') from error


def _explain(problem: Mapping[str, Any]) -> list[str]:
    """The lines for one pydantic error: dotted path first, with a suggestion for a misspelt key."""
    where = [str(part) for part in problem["loc"] if part != "[key]"]
    path = ".".join(where)
    if problem["type"] == "extra_forbidden":
        fields = (SplitTable if len(where) == 3 and where[0] == "splits" else DescriptionTable).model_fields
        return [f"{path}: no such key{_suggest(where[-1], list(fields)) or '; known: ' + ', '.join(fields)}"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return [f"{path}: is needed"]
    return [f"{path}: {message}, got {_show(problem['input'])}"] if path else message.splitlines()


def _show(value: object) -> str:
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):  # an endless number, or tables in tables in tables
        return "a value that is too long to show"


def _suggest(name: str, choices: list[str]) -> str:
    close = nearest(name, choices)
    return f', did you mean "{close}"?' if close else ""
