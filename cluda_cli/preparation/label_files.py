"""Read a publisher's label file as train ids, exactly or not at all.

A file of another form than expected is read if nothing is lost by it, and the report says so: ids in 16 bits, in grey
with alpha or in three equal channels; colours of 8 bits in 16. Any other is refused, with the reason; nothing is
guessed. H W size of the upright label, pixels.
"""

import errno
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluda_cli.data.image_files import DeepImage, Header, has_end, load_image, read_header, refuse_deep
from cluda_cli.data.labels import Color
from cluda_cli.errors import DataError
from cluda_cli.preparation.problems import BadFile, Kind, describe_ids

LOSSY_FORMATS = frozenset({"JPEG", "MPO", "WEBP"})
UNKNOWN = 254  # no train id: marks a colour outside the table while a label is decoded
MAX_CLASSES = 254
MAX_TOLERANCE = 128
"""Largest `ColorLabels.tolerance`."""
STORED_IDS = 100  # unknown ids or colours of one file that its problem keeps
OF_THE_FILE = frozenset({None, errno.ENOENT, errno.ELOOP, errno.EINVAL})
"""Codes of an OSError that a file itself can cause: none is a decoder's error, EINVAL a wrong position in the file."""
_CONVERT = "convert it to an 8-bit PNG"


@dataclass(frozen=True)
class Label:
    """A label as read."""

    train_ids: np.ndarray  # H W uint8
    orientation: int
    """EXIF orientation of the file, 1..8. The train ids are upright."""
    note: tuple[Kind, str] | None = None
    """What to report about how it was read."""


@dataclass(frozen=True)
class IdLabels:
    """Files of one channel. The grey value, or the index into the palette, is the label id."""

    table: tuple[int, ...]
    """256 train ids, by label id."""
    known: tuple[int, ...]
    """Label ids that may occur. Any other is a problem."""

    def read(self, path: Path) -> Label:
        """Raises BadFile."""
        with bad_files():
            header = _read_label_header(path)
            raw = _read_ids(path, header)  # H W
        note = None if header.depth <= 8 and header.mode in {"L", "P", "1"} else (Kind.REDUCED, header.describe())
        return Label(map_ids(raw, self.table, self.known), header.orientation, note)


@dataclass(frozen=True)
class FirstChannelLabels:
    """16-bit PNG with the label id in the first channel and an instance number in the second, as in SYNTHIA."""

    table: tuple[int, ...]
    known: tuple[int, ...]

    def read(self, path: Path) -> Label:
        """Raises BadFile."""
        with bad_files():
            header = _read_label_header(path)
            if header.format != "PNG" or header.depth != 16 or header.mode not in {"RGB", "RGBA", "LA"}:
                raise BadFile(Kind.FORM, f"{header.describe()} where a 16-bit PNG of channels is expected")
            raw = _read_first_channel(path)
        return Label(map_ids(raw, self.table, self.known), header.orientation)


@dataclass(frozen=True)
class ColorLabels:
    """RGB files in which a colour stands for a class."""

    colors: tuple[tuple[Color, int], ...]
    """(colour, train id or IGNORE)."""
    tolerance: int = 0
    """A colour outside the table is read as the nearest listed one if no channel differs by more; 0..MAX_TOLERANCE."""

    def read(self, path: Path) -> Label:
        """Raises BadFile."""
        with bad_files():
            header = _read_label_header(path)
            if header.scaled or header.mode not in {"RGB", "RGBA", "P"} or header.depth > 8 and header.format != "PNG":
                hint = "labels of numbers take [ids]" if header.mode in {"L", "1"} else _CONVERT
                raise BadFile(Kind.FORM, f"{header.describe()} where 8-bit RGB colours are expected; {hint}")
            rgb = _read_deep_colors(path) if header.depth > 8 else np.asarray(load_image(path).convert("RGB"))
        rgb = rgb.astype(np.uint32)  # H W 3
        code = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
        train_ids: np.ndarray = _build_color_table(self.colors, self.tolerance)[code]
        if (train_ids == UNKNOWN).any():
            self._refuse_colors(code[train_ids == UNKNOWN])
        note = (Kind.REDUCED, header.describe()) if header.depth > 8 else None
        if self.tolerance and (near := int((_build_color_table(self.colors, 0)[code] == UNKNOWN).sum())):
            note = (Kind.NEAR, f"{near} pixels, {100 * near / code.size:.2f} %")
        return Label(train_ids, header.orientation, note)

    def _refuse_colors(self, code: np.ndarray) -> None:
        """Raise BadFile that counts unknown colours and says how far they are from listed ones."""
        found, counts = np.unique(code, return_counts=True)
        rgb = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.int16)  # N 3
        distance = np.full(len(found), 255, np.int16)
        for color, _ in self.colors:
            np.minimum(distance, np.abs(rgb - np.array(color, np.int16)).max(axis=1), out=distance)
        farthest = int(distance.max())
        way_out = f" (color_tolerance = {farthest} takes the nearest)" if farthest <= MAX_TOLERANCE else ""
        ids = {f"#{value:06x}": int(n) for value, n in zip(found, counts, strict=True)}
        _refuse_ids(ids, f"; up to {farthest} from the nearest listed colour{way_out}")


LabelReader = IdLabels | FirstChannelLabels | ColorLabels


def map_ids(raw: np.ndarray, table: tuple[int, ...], known: tuple[int, ...]) -> np.ndarray:
    """Label ids, H W -> train ids, H W uint8. Raises BadFile that counts the pixels of each id outside `known`."""
    counts = np.bincount(raw.ravel(), minlength=256)
    unknown = np.setdiff1d(np.flatnonzero(counts), known)
    if unknown.size:
        _refuse_ids({str(label_id): int(counts[label_id]) for label_id in unknown})
    train_ids: np.ndarray = np.asarray(table, dtype=np.uint8)[raw]
    return train_ids


def check_image(path: Path, decode: bool) -> Header:
    """The head of a picture. With `decode` every pixel is read, else the header and the end of the file.

    Raises BadFile if the image is broken or cut short, or has more than 8 bits per channel.
    """
    with bad_files():
        header = read_header(path)
        refuse_deep(header, path)
        if decode or not has_end(path):
            load_image(path)
    return header


@contextmanager
def bad_files() -> Iterator[None]:
    """Turn errors about an image into BadFile, for the report. An error of the system stays an OSError."""
    try:
        yield
    except DataError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in OF_THE_FILE:
            raise error.__cause__ from None
        raise BadFile(Kind.DEEP_IMAGE if isinstance(error, DeepImage) else Kind.UNREADABLE, error.what) from error


def _read_label_header(path: Path) -> Header:
    """The head of a label file. Raises BadFile if it is no picture, or a lossy one."""
    if path.suffix.lower() == ".json":
        raise BadFile(Kind.FORM, "JSON, no picture; draw its polygons as masks first, as with labelme's labelme2voc.py")
    header = read_header(path)
    if header.format in LOSSY_FORMATS:
        raise BadFile(Kind.LOSSY, f"{header.format} stores approximate values")
    return header


def _read_ids(path: Path, header: Header) -> np.ndarray:
    """Ids 0..255, H W, from a file in which they can be told without doubt. Raises BadFile."""
    expected = f"{header.describe()} where one 8-bit channel of ids is expected"
    if header.scaled:
        what = "grey with fewer than 8 bits" if header.format == "PNG" else "a largest value other than 255"
        raise BadFile(Kind.FORM, f"{what}, whose ids are ambiguous; {_CONVERT}")
    if header.mode in {"L", "P", "1"}:
        return np.asarray(load_image(path)).astype(np.uint8, copy=False)
    if header.mode.startswith("I"):
        raw = np.asarray(load_image(path)).astype(np.int64)
        if raw.min() < 0 or raw.max() > 255:
            raise BadFile(Kind.FORM, f"{expected}; it holds {raw.min()} to {raw.max()}, ids are 0..255")
        return raw.astype(np.uint8)
    if header.depth > 8 or header.mode not in {"LA", "RGB", "RGBA"}:
        raise BadFile(Kind.FORM, f"{expected}; {_CONVERT} of one channel")
    channels = np.asarray(load_image(path))  # H W C
    colors = channels if header.mode == "RGB" else channels[..., :-1]
    if (colors != colors[..., :1]).any():
        raise BadFile(Kind.FORM, f"{expected}; its channels differ: labels of colours take [colors]")
    if header.mode != "RGB" and (channels[..., -1] != channels[0, 0, -1]).any():
        raise BadFile(Kind.FORM, f"{expected}; its transparency varies: {_CONVERT} without alpha")
    return colors[..., 0]


def _read_first_channel(path: Path) -> np.ndarray:
    """First channel of a 16-bit PNG of two to four channels, H W int32.

    Pillow keeps only the upper byte of each number, which is 0 for a class id. Its decoder gives the lower byte when it
    is told that the file is little-endian, which PNG never is. Two channels of 16 bits are read as four of 8 bits.
    """
    with path.open("rb") as file:
        color_type = file.read(26)[25]
    if color_type == 4:  # grey and alpha
        channels = _decode_as(path, "RGBA")
        upper, lower = channels[..., 0], channels[..., 1]
    else:
        upper, lower = _decode_as(path, "")[..., 0], _decode_as(path, ";16L")[..., 0]
    number: np.ndarray = upper << 8 | lower
    return number


def _read_deep_colors(path: Path) -> np.ndarray:
    """Colours of 8 bits from a 16-bit PNG, H W 3. Raises BadFile unless each low byte repeats the high byte or is 0."""
    upper, lower = _decode_as(path, "")[..., :3], _decode_as(path, ";16L")[..., :3]
    if ((lower != upper) & (lower != 0)).any():
        raise BadFile(Kind.FORM, f"16-bit colours that are more than 8-bit ones; {_CONVERT}")
    return upper


def _decode_as(path: Path, layout: str) -> np.ndarray:
    """Decode the bytes of a PNG in another of Pillow's raw layouts, H W C int32."""
    return np.asarray(load_image(path, layout)).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _build_color_table(colors: tuple[tuple[Color, int], ...], tolerance: int) -> np.ndarray:
    """Train id of every 24-bit colour: 16 MB, so that decoding a label takes milliseconds.

    Within `tolerance` of listed colours, that of the nearest; UNKNOWN between two that are equally near.
    """
    table = np.full((256, 256, 256), UNKNOWN, dtype=np.uint8)
    nearest = np.full((256, 256, 256), 255, dtype=np.uint8)
    for color, train_id in colors:
        box = tuple(slice(max(value - tolerance, 0), value + tolerance + 1) for value in color)
        offsets = np.ix_(*(np.abs(np.arange(256)[part] - value) for part, value in zip(box, color, strict=True)))
        distance = np.maximum(np.maximum(offsets[0], offsets[1]), offsets[2])
        tied = (distance == nearest[box]) & (table[box] != train_id)
        table[box] = np.where(tied, UNKNOWN, np.where(distance < nearest[box], train_id, table[box]))
        nearest[box] = np.minimum(distance, nearest[box])
    return table.ravel()


def _refuse_ids(ids: dict[str, int], remark: str = "") -> None:
    kept = dict(sorted(ids.items(), key=lambda pair: -pair[1])[:STORED_IDS])
    raise BadFile(Kind.IDS, describe_ids(ids) + remark, kept)
