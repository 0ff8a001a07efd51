"""Decoding label files of real bit depths, hand-written byte by byte where Pillow cannot write them."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluda_cli.data.labels import IGNORE, build_id_table
from cluda_cli.preparation import label_files
from cluda_cli.preparation.camvid import CAMVID_COLORS
from cluda_cli.preparation.label_files import (
    ColorLabels,
    FirstChannelLabels,
    IdLabels,
    LabelReader,
    check_image,
)
from cluda_cli.preparation.problems import BadFile, Kind
from cluda_cli.preparation.published import CITYSCAPES_LABELS, SYNTHIA_LABELS

COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # PNG colour type by number of channels
TWO_CLASSES = IdLabels(tuple(build_id_table([(0, 0), (1, 1)])), (0, 1))


def write_png(path: Path, samples: np.ndarray, bits: int) -> Path:
    """Samples H W C of 1 to 16 bits -> PNG, whose rows from 8 bits on take turns in how they are filtered."""
    height, width, channels = samples.shape
    if bits >= 8:
        data = samples.astype(">u2" if bits == 16 else "u1").view("u1").reshape(height, -1, channels * bits // 8)
        left, above = np.zeros_like(data), np.zeros_like(data)
        left[:, 1:], above[1:] = data[:, :-1], data[:-1]
        filtered = [data, data - left, data - above]
        rows = [bytes([y % 3]) + filtered[y % 3][y].tobytes() for y in range(height)]
    else:
        planes = np.unpackbits(samples.astype(np.uint8), axis=2)[..., 8 - bits :].reshape(height, -1)
        rows = [b"\0" + np.packbits(plane).tobytes() for plane in planes]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, COLOR_TYPES[channels], 0, 0, 0)
    pixels = zlib.compress(b"".join(rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )  # fmt: skip
    return path


def synthia_label(classes: list[list[int]], channels: int = 3) -> np.ndarray:
    """Class in the first channel, large instance numbers in the second, H W C."""
    samples = np.zeros((*np.shape(classes), channels), dtype=np.int64)
    samples[..., 0] = classes
    samples[..., 1] = 40_000
    return samples


def refusal(reader: LabelReader, path: Path) -> BadFile:
    with pytest.raises(BadFile) as caught:
        reader.read(path)
    return caught.value


def test_a_palette_file_is_read_by_index_not_by_color(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0] * 21 + [128, 64, 128] + [9] * 60)
    image.putdata([7, 26])
    image.save(tmp_path / "a.png")
    assert CITYSCAPES_LABELS.read(tmp_path / "a.png").train_ids.tolist() == [[0, 13]]


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_synthia_is_read_at_sixteen_bits(tmp_path: Path, channels: int) -> None:
    path = write_png(tmp_path / "a.png", synthia_label([[3, 22], [17, 0]], channels), 16)
    assert SYNTHIA_LABELS.read(path).train_ids.tolist() == [[0, IGNORE], [12, IGNORE]]


def test_synthia_ids_above_a_byte_are_not_wrapped(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", synthia_label([[3, 259]]), 16)  # 259 = 256 + 3
    bad = refusal(SYNTHIA_LABELS, path)
    assert (bad.kind, bad.ids) == (Kind.IDS, {"259": 1})


def test_every_sixteen_bit_number_comes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_files, "STORED_IDS", 1000)
    samples = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, 3))
    reader = FirstChannelLabels((IGNORE,) * 256, ())
    for channels in (2, 3):
        bad = refusal(reader, write_png(tmp_path / "a.png", samples[..., :channels], 16))
        values, counts = np.unique(samples[..., 0], return_counts=True)
        assert bad.ids == dict(zip(map(str, values), counts, strict=True))


def test_synthia_of_eight_bits_is_refused(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", np.full((2, 2, 3), 3), 8)
    assert refusal(SYNTHIA_LABELS, path).kind is Kind.FORM


def test_a_synthia_file_cut_short_is_unreadable(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 22, (64, 64, 3)), 16)
    path.write_bytes(path.read_bytes()[:-400])
    assert refusal(SYNTHIA_LABELS, path).kind is Kind.UNREADABLE


def test_unknown_ids_are_counted(tmp_path: Path) -> None:
    Image.fromarray(np.array([[7, 40, 40], [77, 7, 34]], dtype=np.uint8)).save(tmp_path / "a.png")
    bad = refusal(CITYSCAPES_LABELS, tmp_path / "a.png")
    assert bad.ids == {"40": 2, "77": 1}
    assert "40 in 2 pixels, 77 in 1 pixel" in bad.detail


@pytest.mark.parametrize(
    ("samples", "bits", "words"),
    [
        (np.arange(12).reshape(2, 2, 3), 8, "8-bit RGB PNG where one 8-bit channel.*take [colors]"),
        (np.full((2, 2, 1), 26001), 16, "16-bit I PNG where one 8-bit channel.*holds 26001 to 26001, ids are 0..255"),
        (np.zeros((2, 2, 3)), 16, "16-bit RGB PNG.*convert it to an 8-bit PNG of one channel"),
        (np.arange(8).reshape(2, 2, 2) // 2 * [0, 1], 8, "8-bit LA PNG.*transparency varies"),
        (np.ones((2, 4, 1), dtype=np.int64), 4, "fewer than 8 bits"),
    ],
    ids=["rgb", "16 bits", "16-bit rgb", "transparency", "4 bits"],
)
def test_files_of_another_form_are_refused(tmp_path: Path, samples: np.ndarray, bits: int, words: str) -> None:
    bad = refusal(TWO_CLASSES, write_png(tmp_path / "a.png", samples, bits))
    assert bad.kind is Kind.FORM
    assert re.search(words.replace("[", r"\["), bad.detail)


def test_one_bit_masks_hold_zero_and_one(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", np.array([[[0], [1]]]), 1)
    assert TWO_CLASSES.read(path).train_ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("reader", [TWO_CLASSES, CAMVID_COLORS, SYNTHIA_LABELS], ids=["ids", "colors", "16 bits"])
def test_lossy_labels_are_refused_whatever_their_name(tmp_path: Path, reader: LabelReader) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png", format="JPEG")
    bad = refusal(reader, tmp_path / "a.png")
    assert (bad.kind, "JPEG" in bad.detail) == (Kind.LOSSY, True)


def test_unknown_colors_are_counted(tmp_path: Path) -> None:
    Image.fromarray(np.array([[(1, 2, 3), (1, 2, 3), (0, 0, 0)]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert refusal(CAMVID_COLORS, tmp_path / "a.png").ids == {"#010203": 2}


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("factor", [257, 256])
def test_colors_in_sixteen_bits_are_read_where_nothing_is_lost(tmp_path: Path, channels: int, factor: int) -> None:
    path = write_png(tmp_path / "a.png", np.full((2, 2, channels), 128 * factor), 16)  # sky
    label = CAMVID_COLORS.read(path)
    assert label.train_ids.tolist() == [[0, 0], [0, 0]]
    assert label.note == (Kind.REDUCED, f"16-bit {'RGBA' if channels == 4 else 'RGB'} PNG")


def test_colors_of_sixteen_bits_are_refused(tmp_path: Path) -> None:
    bad = refusal(CAMVID_COLORS, write_png(tmp_path / "a.png", np.full((2, 2, 3), 128 * 257 + 5), 16))
    assert bad.kind is Kind.FORM and "convert it to an 8-bit PNG" in bad.detail


@pytest.mark.parametrize(
    ("channels", "bits", "form"),
    [(1, 16, "16-bit I PNG"), (2, 8, "8-bit LA PNG"), (3, 8, "8-bit RGB PNG"), (4, 8, "8-bit RGBA PNG")],
)
def test_ids_in_a_wider_form_are_read_where_nothing_is_lost(
    tmp_path: Path, channels: int, bits: int, form: str
) -> None:
    samples = np.repeat([[[0], [1]]], channels, axis=2)
    if channels in {2, 4}:
        samples[..., -1] = 255
    label = TWO_CLASSES.read(write_png(tmp_path / "a.png", samples, bits))
    assert (label.train_ids.tolist(), label.note) == ([[0, 1]], (Kind.REDUCED, form))


def test_stretched_grey_is_refused(tmp_path: Path) -> None:
    """Pillow would make 255 of the largest value of such a file."""
    (tmp_path / "a.pgm").write_bytes(b"P5\n2 1\n1\n\0\1")
    assert "a largest value other than 255" in refusal(TWO_CLASSES, tmp_path / "a.pgm").detail


def test_polygons_are_no_label(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert "draw its polygons as masks first" in refusal(TWO_CLASSES, tmp_path / "a.json").detail


def test_a_label_is_turned_upright(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).save(tmp_path / "a.png", exif=tags)
    label = TWO_CLASSES.read(tmp_path / "a.png")
    assert (label.train_ids.tolist(), label.orientation) == ([[0], [1]], 6)


RED, BLUE = ((200, 0, 0), 0), ((0, 0, 200), 1)


def test_smooth_edges_are_summarised_and_the_tolerance_that_would_take_them_is_named(tmp_path: Path) -> None:
    shades = np.zeros((20, 20, 3), dtype=np.uint8)
    shades[..., 0] = np.arange(400).reshape(20, 20) % 56 + 200
    Image.fromarray(shades).save(tmp_path / "a.png")
    bad = refusal(ColorLabels((RED, BLUE)), tmp_path / "a.png")
    assert len(bad.detail) < 250
    assert "up to 55 from the nearest listed colour (color_tolerance = 55 takes the nearest)" in bad.detail
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert len(refusal(ColorLabels((RED, BLUE)), tmp_path / "a.png").ids) == label_files.STORED_IDS


def test_the_nearest_color_is_taken_within_the_tolerance_only(tmp_path: Path) -> None:
    colors = np.array([[(200, 0, 0), (190, 9, 0), (3, 0, 210), (100, 0, 100)]], dtype=np.uint8)
    Image.fromarray(colors[:, :3]).save(tmp_path / "a.png")
    label = ColorLabels((RED, BLUE), tolerance=10).read(tmp_path / "a.png")
    assert (label.train_ids.tolist(), label.note) == ([[0, 0, 1]], (Kind.NEAR, "2 pixels, 66.67 %"))
    Image.fromarray(colors).save(tmp_path / "a.png")
    for tolerance in (10, 100):  # too far, and as far from red as from blue
        assert refusal(ColorLabels((RED, BLUE), tolerance), tmp_path / "a.png").ids == {"#640064": 1}


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_cut_short_is_noticed_without_decoding_the_whole_ones(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise).save(path)
    assert check_image(path, decode=False).size == (40, 60)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadFile) as caught:
        check_image(path, decode=False)
    assert caught.value.kind is Kind.UNREADABLE


def test_damage_inside_an_image_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    assert check_image(path, decode=False).size == (40, 60)
    with pytest.raises(BadFile):
        check_image(path, decode=True)


def test_images_of_sixteen_bits_are_refused(tmp_path: Path) -> None:
    for channels in (1, 3):
        path = write_png(tmp_path / f"{channels}.png", np.full((2, 2, channels), 60_000), 16)
        with pytest.raises(BadFile, match="16-bit") as caught:
            check_image(path, decode=False)
        assert caught.value.kind is Kind.DEEP_IMAGE


def test_a_huge_image_is_refused_instead_of_decoded(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", np.zeros((1, 1, 1)), 8)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)
    with pytest.raises(BadFile, match="more than 536 million"):
        check_image(path, decode=False)


def test_a_file_that_is_no_image_is_unreadable_and_named_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<html>quota exceeded</html>")
    with pytest.raises(BadFile, match=r"^not an image, or not one of PNG, JPEG"):
        check_image(tmp_path / "a.png", decode=False)
