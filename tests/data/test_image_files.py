"""One way to open an image: which formats, which way up, which depth."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from cluda_cli.data.image_files import DeepImage, has_end, load_image, read_header, read_pixels, scan_png
from cluda_cli.errors import DataError

SCENE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)  # H W 3


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_every_orientation_is_turned_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path, stored = tmp_path / f"a.{suffix}", Image.fromarray(SCENE)
    stored.save(path, exif=exif(orientation), lossless=True)
    if suffix == "jpg":
        stored = Image.open(path).copy()
    tags = Image.Exif()
    tags[0x0112] = orientation
    plain = stored.copy()
    plain.info["exif"] = tags.tobytes()
    upright = np.asarray(ImageOps.exif_transpose(plain))
    header = read_header(path)
    assert np.array_equal(read_pixels(path), upright)
    assert (header.size, header.orientation) == (upright.shape[:2], orientation)
    assert header.stored_size == (16, 24)


RAW_EXIF = exif(6).tobytes().removeprefix(b"Exif\0\0")
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def add_behind_pixels(path: Path, *chunks: bytes) -> None:
    Image.fromarray(SCENE).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-12] + b"".join(chunks) + content[-12:])


@pytest.mark.parametrize(
    "late",
    [
        chunk(b"eXIf", RAW_EXIF),
        chunk(b"tEXt", b"date:create\x002026-01-01") + chunk(b"eXIf", RAW_EXIF),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 8\n" + RAW_EXIF.hex().encode())),
    ],
    ids=["exif", "text, exif", "xmp", "raw profile"],
)
def test_an_orientation_behind_the_pixels_of_a_png_is_found_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bytes
) -> None:
    add_behind_pixels(tmp_path / "late.png", late)
    assert read_pixels(tmp_path / "late.png").shape == (24, 16, 3)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    header = read_header(tmp_path / "late.png")
    assert (header.size, header.orientation) == ((24, 16), 6)


def test_a_broken_chunk_behind_the_pixels_leaves_what_decoding_finds(tmp_path: Path) -> None:
    whole, broken = chunk(b"eXIf", RAW_EXIF), chunk(b"iTXt", b"XML:com.adobe.xmp\0" + XMP)[:-4] + b"oops"
    add_behind_pixels(tmp_path / "a.png", whole, broken)
    header = read_header(tmp_path / "a.png")
    assert header.size == read_pixels(tmp_path / "a.png").shape[:2]
    assert scan_png(tmp_path / "a.png").whole


@pytest.mark.parametrize(
    ("kind", "content", "oriented"),
    [
        (b"tEXt", b"date:create\x002026-01-01", False),
        (b"tEXt", b"Raw profile type exif\0", True),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0", True),
    ],
)
def test_only_texts_that_may_hold_an_orientation_are_read(
    tmp_path: Path, kind: bytes, content: bytes, oriented: bool
) -> None:
    add_behind_pixels(tmp_path / "a.png", chunk(kind, content))
    assert len(scan_png(tmp_path / "a.png").late) == 2 * oriented


@pytest.mark.parametrize("function", [read_pixels, load_image])
def test_want_of_memory_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[[Path], object]
) -> None:
    def fail(_: ImageFile.ImageFile) -> None:
        raise MemoryError

    Image.fromarray(SCENE).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", fail)
    with pytest.raises(MemoryError):
        function(tmp_path / "a.png")


def test_want_of_memory_does_not_lose_an_orientation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Image.Image) -> Image.Exif:
        raise MemoryError

    Image.fromarray(SCENE).save(tmp_path / "a.jpg", exif=exif(6))
    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(MemoryError):
        read_header(tmp_path / "a.jpg")


@pytest.mark.parametrize("value", [0, 9, 300])
def test_an_orientation_without_sense_is_none(tmp_path: Path, value: int) -> None:
    Image.fromarray(SCENE).save(tmp_path / "a.png", exif=exif(value))
    assert np.array_equal(read_pixels(tmp_path / "a.png"), SCENE)


def test_broken_exif_does_not_spoil_a_picture(tmp_path: Path) -> None:
    Image.fromarray(SCENE).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff")
    assert np.array_equal(read_pixels(tmp_path / "a.png"), SCENE)


def save_deep(path: Path) -> None:
    """A scene of 12 bits in a file of 16."""
    deep = SCENE.astype(np.uint16) * 16
    if path.name.startswith("grey"):
        Image.fromarray(deep[..., 0]).save(path)
    elif path.suffix == ".ppm":
        path.write_bytes(b"P6\n24 16\n4095\n" + deep.astype(">u2").tobytes())
    elif path.suffix == ".png":
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 16, 16, 2, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    elif path.suffix == ".tif":  # Pillow does not write 16-bit colour: one strip behind ten tags
        pixels = deep.astype("<u2").tobytes()
        where = 8 + 2 + 10 * 12 + 4
        tags = [(256, 3, 1, 24), (257, 3, 1, 16), (258, 3, 3, where), (259, 3, 1, 1), (262, 3, 1, 2)]
        tags += [(273, 4, 1, where + 6), (277, 3, 1, 3), (278, 3, 1, 16), (279, 4, 1, len(pixels)), (284, 3, 1, 1)]
        entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
        head = b"II*\0" + struct.pack("<IH", 8, 10)
        path.write_bytes(head + entries + struct.pack("<I3H", 0, 16, 16, 16) + pixels)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm", "rgb.png", "rgb.tif", "rgb.ppm"])
def test_more_than_eight_bits_are_refused_in_every_format(tmp_path: Path, name: str) -> None:
    save_deep(tmp_path / name)
    with pytest.raises(DeepImage, match=r"bit .*which of its bits hold the picture.*8 bits per channel"):
        read_pixels(tmp_path / name)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DeepImage, match="32-bit F TIFF"):
        read_pixels(tmp_path / "a.tif")


def test_other_formats_are_not_opened_whatever_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript for an EPS file."""
    Image.fromarray(SCENE).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile.load", lambda *_: pytest.fail("EPS was decoded"))
    for read in (read_header, load_image, read_pixels):
        with pytest.raises(DataError, match="not an image, or not one of PNG, JPEG"):
            read(tmp_path / "a.png")


def test_a_pipe_is_an_error_not_a_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path(os.devnull)):
        with pytest.raises(DataError, match="is not a regular file"):
            read_pixels(path)


def test_a_huge_image_is_refused_in_our_words_before_it_is_decoded(tmp_path: Path) -> None:
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"60000 x 60000 pixels, more than 536 million"):
        read_header(tmp_path / "a.png")


@pytest.mark.parametrize("largest", [1, 18, 100])
def test_values_that_decoding_stretches_are_told(tmp_path: Path, largest: int) -> None:
    for number, body in ((5, bytes(6)), (2, b"0 " * 6)):
        (tmp_path / "a.pgm").write_bytes(b"P%d\n3 2\n%d\n" % (number, largest) + body)
        assert read_header(tmp_path / "a.pgm").scaled
    (tmp_path / "a.pgm").write_bytes(b"P5\n3 2\n255\n" + bytes(6))
    assert not read_header(tmp_path / "a.pgm").scaled


def test_the_end_of_a_file_is_looked_for(tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(SCENE).save(path)
        assert has_end(path)
        path.write_bytes(path.read_bytes()[:-20])
        assert not has_end(path)
    (tmp_path / "empty.png").write_bytes(b"")
    assert not has_end(tmp_path / "empty.png")
