"""Read a publisher's label file as train ids, exactly or not at all.

A file of another form than the publisher documents is refused, with the reason; nothing is guessed. H W size of the
label, pixels.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from cluda_cli.data.labels import IGNORE, Color
from cluda_cli.preparation.problems import BadFile, Kind, describe_ids

LOSSY_FORMATS = frozenset({"JPEG", "MPO", "WEBP", "JPEG2000", "AVIF", "HEIF"})
UNKNOWN = 254  # no train id: marks a colour outside the table while a label is decoded
MAX_CLASSES = 254


@dataclass(frozen=True)
class IdLabels:
    """8-bit files of one channel. The grey value, or the index into the palette, is the label id."""

    table: tuple[int, ...]
    """256 train ids, by label id."""
    known: tuple[int, ...]
    """Label ids that may occur. Any other is a problem."""

    def read(self, path: Path) -> np.ndarray:
        """Train ids, H W uint8. Raises BadFile."""
        with open_image(path) as image:
            refuse_lossy(image)
            if image.mode not in {"L", "P", "1"}:
                raise BadFile(Kind.FORM, f"{describe_form(path, image)} where one 8-bit channel of ids is expected")
            if image.mode == "L" and read_png_depth(path) in {2, 4}:
                raise BadFile(Kind.FORM, "grey with fewer than 8 bits, whose ids are ambiguous")
            raw = np.asarray(image).astype(np.uint8, copy=False)  # H W
        return map_ids(raw, self.table, self.known)


@dataclass(frozen=True)
class FirstChannelLabels:
    """16-bit PNG with the label id in the first channel and an instance number in the second, as in SYNTHIA."""

    table: tuple[int, ...]
    known: tuple[int, ...]

    def read(self, path: Path) -> np.ndarray:
        """Train ids, H W uint8. Raises BadFile."""
        with open_image(path) as image:
            refuse_lossy(image)
            if read_png_depth(path) != 16 or image.mode not in {"RGB", "RGBA"}:
                raise BadFile(Kind.FORM, f"{describe_form(path, image)} where a 16-bit PNG of channels is expected")
        return map_ids(_read_first_channel(path), self.table, self.known)


@dataclass(frozen=True)
class ColorLabels:
    """RGB files in which a colour stands for a class."""

    colors: tuple[tuple[Color, int], ...]
    """(colour, train id or IGNORE)."""

    def read(self, path: Path) -> np.ndarray:
        """Train ids, H W uint8. Raises BadFile."""
        with open_image(path) as image:
            refuse_lossy(image)
            if image.mode not in {"RGB", "RGBA", "P"} or read_png_depth(path) == 16:
                raise BadFile(Kind.FORM, f"{describe_form(path, image)} where 8-bit RGB colours are expected")
            rgb = np.asarray(image.convert("RGB")).astype(np.uint32)  # H W 3
        code = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
        train_ids: np.ndarray = _build_color_table(self.colors)[code]
        if (train_ids == UNKNOWN).any():
            found, counts = np.unique(code[train_ids == UNKNOWN], return_counts=True)
            _refuse_ids({f"#{value:06x}": int(n) for value, n in zip(found, counts, strict=True)})
        return train_ids


LabelReader = IdLabels | FirstChannelLabels | ColorLabels


def map_ids(raw: np.ndarray, table: tuple[int, ...], known: tuple[int, ...]) -> np.ndarray:
    """Label ids, H W -> train ids, H W uint8. Raises BadFile that counts the pixels of each id outside `known`."""
    counts = np.bincount(raw.ravel(), minlength=256)
    unknown = np.setdiff1d(np.flatnonzero(counts), known)
    if unknown.size:
        _refuse_ids({str(label_id): int(counts[label_id]) for label_id in unknown})
    train_ids: np.ndarray = np.asarray(table, dtype=np.uint8)[raw]
    return train_ids


def count_pixels(train_ids: np.ndarray) -> dict[int, int]:
    """Train id -> number of pixels, without ignored pixels and absent classes."""
    counts = np.bincount(train_ids.ravel(), minlength=256)
    return {int(i): int(counts[i]) for i in np.flatnonzero(counts) if i != IGNORE}


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image lazily. Raises BadFile for any error of the decoder within the block."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    # Decoders raise almost anything on damaged bytes: SyntaxError, struct.error, ValueError, OSError ...
    except BadFile:
        raise
    except Exception as error:
        reason = str(error).replace(f" '{path}'", "").replace(str(path), path.name)
        raise BadFile(Kind.UNREADABLE, reason or type(error).__name__) from error


def read_size(path: Path, decode: bool) -> tuple[int, int]:
    """Height and width of an 8-bit image. With `decode` every pixel is read, else the header and the end of the file.

    Raises BadFile if the image is broken or cut short, or has more than 8 bits per channel.
    """
    with open_image(path) as image:
        if image.mode.startswith(("I", "F")) or read_png_depth(path) == 16:
            raise BadFile(Kind.DEEP_IMAGE, describe_form(path, image))
        if decode or not _has_end(path):
            image.load()
        return image.height, image.width


def refuse_lossy(image: Image.Image) -> None:
    if image.format in LOSSY_FORMATS:
        raise BadFile(Kind.LOSSY, f"{image.format} stores approximate values")


def describe_form(path: Path, image: Image.Image) -> str:
    """Such as `16-bit RGB PNG`."""
    depth = read_png_depth(path) or (16 if image.mode.startswith("I;16") else 32 if image.mode in {"I", "F"} else 8)
    return f"{depth}-bit {image.mode.partition(';')[0]} {image.format}"


def read_png_depth(path: Path) -> int | None:
    """Bits per channel of a PNG; None for other files."""
    header = _read_png_header(path)
    return header[24] if header.startswith(b"\x89PNG\r\n\x1a\n") and len(header) == 26 else None


def _read_png_header(path: Path) -> bytes:
    """Signature, size, bit depth (byte 24) and colour type (byte 25) of a PNG."""
    with path.open("rb") as file:
        return file.read(26)


def _has_end(path: Path) -> bool:
    """Whether a PNG or JPEG has its end marker. False for other formats, which must be decoded to know."""
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(0, 2)
        file.seek(max(file.tell() - 12, 0))
        end = file.read()
    return (start == b"\x89P" and end[4:8] == b"IEND") or (start == b"\xff\xd8" and end.endswith(b"\xff\xd9"))


def _read_first_channel(path: Path) -> np.ndarray:
    """First channel of a 16-bit PNG of two to four channels, H W int32.

    Pillow keeps only the upper byte of each number, which is 0 for a class id. Its decoder gives the lower byte when it
    is told that the file is little-endian, which PNG never is. Two channels of 16 bits are read as four of 8 bits.
    """
    if _read_png_header(path)[25] == 4:  # grey and alpha
        channels = _decode_as(path, "RGBA")
        upper, lower = channels[..., 0], channels[..., 1]
    else:
        upper, lower = _decode_as(path, None)[..., 0], _decode_as(path, ";16L")[..., 0]
    number: np.ndarray = upper << 8 | lower
    return number


def _decode_as(path: Path, layout: str | None) -> np.ndarray:
    """Decode the bytes of a PNG in another of Pillow's raw layouts, H W C int32."""
    with open_image(path) as image:
        if layout and isinstance(image, ImageFile.ImageFile):
            raw = image.mode + layout if layout.startswith(";") else layout
            image.tile = [tile._replace(args=raw) for tile in image.tile]
        return np.asarray(image).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _build_color_table(colors: tuple[tuple[Color, int], ...]) -> np.ndarray:
    """Train id of every 24-bit colour: 16 MB, so that decoding a label takes milliseconds."""
    table = np.full(1 << 24, UNKNOWN, dtype=np.uint8)
    for (red, green, blue), train_id in colors:
        table[red << 16 | green << 8 | blue] = train_id
    return table


def _refuse_ids(ids: dict[str, int]) -> None:
    raise BadFile(Kind.IDS, describe_ids(ids), ids)
