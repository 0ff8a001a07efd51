"""Open an image file. Every verb reads images through this module, so that all agree on three rules.

- Format: only the formats of FORMATS are opened, whatever the name of the file says.
- Orientation: an image with an EXIF orientation is turned upright; heights and widths are those of the upright image.
- Depth: a picture has 8 bits per channel. Deeper ones are refused: cameras use 10, 12 or 14 of 16 bits, and no tag says
  which, so that any reduction could come out nearly black.

H W pixels, upright. Imports no torch.
"""

import io
import logging
import os
import stat
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from cluda_cli.errors import CludaError, DataError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""Pillow's names of the formats that are opened."""
MAX_PIXELS = 1 << 29
"""Pixels of the largest image that is opened: 1.6 GB of RGB."""
Image.MAX_IMAGE_PIXELS = None  # the limit above takes its place
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs about broken files, it also raises
_ORIENTATION = 0x0112  # EXIF and TIFF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTED_TEXT = {b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif", b"xmp"}
"""Keywords of PNG texts in which Pillow looks for an orientation."""
_TEXTS = {b"iTXt", b"tEXt", b"zTXt"}
_LONGEST_KEYWORD = 80  # bytes, with the zero that ends it
_NO_PIXELS = b"\0\0\0\0IDAT\x35\xaf\x06\x1e" + b"\0\0\0\0IEND\xae\x42\x60\x82"  # the end of a PNG


class DeepImage(DataError):  # noqa: N818  it names what is wrong, as its parent does
    """An image with more than 8 bits per channel."""


@dataclass(frozen=True)
class Header:
    """What the head of an image file says."""

    format: str
    """Pillow's name, one of FORMATS, or MPO for a JPEG file with several pictures, of which the first is read."""
    mode: str
    """Pillow's name of the kind of pixels, such as RGB, L (grey) or P (palette)."""
    depth: int
    """Bits per channel."""
    size: tuple[int, int]
    """Height and width of the upright image."""
    orientation: int
    """EXIF orientation, 1..8; 1: the image is stored upright."""
    scaled: bool
    """Whether decoding stretches the values: a PGM or PPM whose largest value is not 255, grey with 2 or 4 bits."""

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width as stored, before the image is turned upright."""
        return self.size[::-1] if self.orientation >= 5 else self.size

    def describe(self) -> str:
        """Such as `16-bit RGB PNG`."""
        return f"{self.depth}-bit {self.mode.partition(';')[0]} {self.format}"


def read_header(path: Path) -> Header:
    """Read the head of an image file, without its pixels. Raises DataError if it is no image of FORMATS."""
    with _opened(path) as image:
        orientation, depth = _read_orientation(image), _read_depth(image, path)
        if image.format == "PNG" and (late := scan_png(path).late):
            orientation = _read_late_orientation(path, late)
        scaled = _read_largest(image) not in {255, 65535} or (image.format, image.mode) == ("PNG", "L") and depth < 8
        width, height = image.size
        if orientation >= 5 and image.format != "TIFF":  # Pillow turns TIFF files itself
            width, height = height, width
        return Header(str(image.format), image.mode, depth, (height, width), orientation, scaled)


def load_image(path: Path, layout: str = "") -> Image.Image:
    """Decode an image and turn it upright. The mode is that of the file.

    `layout` is another of Pillow's raw layouts for the bytes of the file: a whole name, or a suffix that starts with
    `;` and is added to the mode. Raises DataError if the file is missing, broken, or no image of FORMATS.
    """
    with _opened(path) as image:
        if layout:
            raw = image.mode + layout if layout.startswith(";") else layout
            image.tile = [tile._replace(args=raw) for tile in image.tile]
        image.load()
        turn = None if image.format == "TIFF" else _TURNS.get(_read_orientation(image))
        return image if turn is None else image.transpose(turn)


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """Decode a picture of any mode to RGB, uint8 H W 3; alpha is dropped.

    Raises DeepImage if it has more than 8 bits per channel, DataError as `load_image`.
    """
    refuse_deep(read_header(path), path)
    image = load_image(path)
    image.info.pop("transparency", None)  # keep the colour of transparent pixels
    try:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except ValueError as error:
        raise DataError(f"cannot be read as RGB: {error}", path, "store it as RGB") from error


def refuse_deep(header: Header, path: Path) -> None:
    """Raise DeepImage if the image has more than 8 bits per channel."""
    if header.depth > 8:
        what = f"{header.describe()}: which of its bits hold the picture is not known"
        raise DeepImage(what, path, "store it with 8 bits per channel")


@dataclass(frozen=True)
class PngChunks:
    """How a PNG file ends."""

    whole: bool
    """Whether its last chunk is there."""
    late: tuple[slice, ...]
    """Where in the file everything before the pixels lies, then each chunk behind them that may hold an orientation;
    empty without such chunks."""


def scan_png(path: Path) -> PngChunks:
    """Step through the chunks of a PNG without reading more of them than the keywords of texts."""
    late = list[slice]()
    pixels, position, kind = 0, len(_PNG), b""
    with path.open("rb", buffering=0) as file:
        while kind != b"IEND" and file.seek(position) and len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IDAT":
                pixels = pixels or position
            elif pixels and (kind == b"eXIf" or kind in _TEXTS and _read_keyword(file) in _ORIENTED_TEXT):
                late.append(slice(position, position + length + 12))
            position += length + 12
    return PngChunks(kind == b"IEND", (slice(0, pixels), *late) if late else ())


def _read_keyword(file: io.RawIOBase) -> bytes:
    """That of a text whose chunk begins here."""
    return (file.read(_LONGEST_KEYWORD) or b"").partition(b"\0")[0]


def has_end(path: Path) -> bool:
    """Whether a PNG or JPEG has its end marker. False for other formats, which must be decoded to know."""
    with path.open("rb") as file:
        start = file.read(8)
        if start == _PNG:
            return scan_png(path).whole
        file.seek(0, io.SEEK_END)
        file.seek(max(file.tell() - 2, 0))
        return start.startswith(b"\xff\xd8") and file.read() == b"\xff\xd9"


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image lazily. Raises DataError for any error within the block but MemoryError.

    An OSError of the system is the cause of the DataError.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or device would be waited for
            raise DataError("is not a regular file", path, "give an image file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about untidy files
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    what = f"{image.height} x {image.width} pixels, more than {MAX_PIXELS // 10**6} million"
                    raise DataError(what, path, "cut it into parts")
                yield image
    except (CludaError, MemoryError):  # the latter says nothing about the file
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"not an image, or not one of {', '.join(FORMATS)}", path) from error
    except Exception as error:  # decoders of broken files raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"cannot be read: {reason}", path) from error


def _read_orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation, 1..8; 1 if there is none or it cannot be read."""
    try:
        if image.format == "TIFF":
            value = image.tag_v2.get(_ORIENTATION)  # type: ignore[attr-defined]
        else:
            value = Image.Image.getexif(image).get(_ORIENTATION)  # that of a PNG would decode the pixels
    except MemoryError:
        raise
    except Exception:  # broken EXIF does not spoil the picture
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _read_late_orientation(path: Path, late: Sequence[slice]) -> int:
    """The orientation of a PNG that has it behind the pixels, where Pillow looks only after it has decoded them.

    The same file without pixels tells it at once.
    """
    with path.open("rb") as file:
        parts = [file.read(part.stop - part.start) for part in late if file.seek(part.start) == part.start]
    try:
        with Image.open(io.BytesIO(b"".join(parts) + _NO_PIXELS), formats=("PNG",)) as image:
            return _read_orientation(image)
    except (OSError, SyntaxError, ValueError):  # of a broken chunk; decoding survives some
        with _opened(path) as image:
            image.load()
            return _read_orientation(image)


def _read_depth(image: ImageFile.ImageFile, path: Path) -> int:
    """Bits per channel as stored. Pillow's mode does not tell: it reduces colours of 16 bits to 8."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(26)[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]
    if image.format == "PPM" and image.mode != "F":
        return 16 if _read_largest(image) > 255 else 8
    return {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)


def _read_largest(image: ImageFile.ImageFile) -> int:
    """The value that stands for white in a PGM or PPM, by which decoding scales; 255 for other files."""
    args = image.tile[0].args if image.format == "PPM" and image.mode in {"L", "RGB", "I"} else ""
    if isinstance(args, tuple):
        return int(args[1])
    return 65535 if image.mode == "I" and args else 255
