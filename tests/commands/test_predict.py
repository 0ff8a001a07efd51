"""The verb `predict` on pictures of many kinds."""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cluda_cli.commands import predict as verb
from cluda_cli.commands.predict import OUTPUTS, find_images, find_newest_checkpoint, predict
from cluda_cli.data.labels import CITYSCAPES, ClassTable, LabelClass
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.files import locked
from cluda_cli.inference import sliding
from cluda_cli.inference.sliding import image_logits
from cluda_cli.inference.weights_file import NetworkDescription, save_weights
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.settings import Data, Decoder, Evaluation, Model, Objectives, Settings

TABLE = ClassTable(CITYSCAPES[:6])
SETTINGS = Settings(
    data=Data(target_box=(32, 64)),
    model=Model(encoder="mobilenetv2_050", weights=False, decoder=Decoder(embed_dim=8, channels=8)),
    objectives=Objectives(feature_distance=None),
)


@cache
def make_network() -> Segmenter:
    """Random, but with predictions of many classes."""
    torch.manual_seed(2)
    network = Segmenter(SETTINGS.model, len(TABLE))
    torch.nn.init.normal_(network.decoder.conv_seg.weight, std=20)
    return network.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "a" / "best.safetensors"
    description = NetworkDescription(settings=SETTINGS, classes=TABLE, seen=TABLE.names, network_name="student", step=7)
    save_weights(path, make_network().state_dict(), description)
    return path


def save_picture(path: Path, size: tuple[int, int] = (37, 53), seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
    pixels = blocks.repeat(8, axis=0).repeat(8, axis=1)[: size[0], : size[1]]
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_outputs_equal_the_logits_pixel_by_pixel(checkpoint: Path, tmp_path: Path) -> None:
    picture, out = save_picture(tmp_path / "x.y.png"), tmp_path / "out"
    predict([str(picture)], checkpoint=checkpoint, out=out, outputs=OUTPUTS, device="cpu")
    assert names(out) == {f"{output}/x.y.png" for output in OUTPUTS}
    found = {output: opened(out / output / "x.y.png") for output in OUTPUTS}
    image = read_image(picture)
    logits = image_logits(make_network(), image, (32, 64), Evaluation())
    label = logits.argmax(0).numpy()
    assert len(np.unique(label)) > 2  # the network is not trivial
    assert np.array_equal(found["train-id"], label) and found["train-id"].dtype == np.uint8
    assert np.array_equal(found["label-id"], np.array([7, 8, 11, 12, 13, 17])[label])
    colors = np.array([c.color for c in TABLE.classes])[label]
    assert np.array_equal(found["color"], colors)
    confidence = 255 * logits.softmax(0).amax(0).numpy()
    assert found["confidence"].ndim == 2 and np.abs(found["confidence"] - confidence).max() <= 0.5 + 1e-3
    blend = (image.permute(1, 2, 0).numpy().astype(float) + colors) / 2
    assert found["overlay"].shape == (37, 53, 3) and np.abs(found["overlay"] - blend).max() <= 0.5


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_pictures_of_any_mode_and_size(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    picture = tmp_path / "in" / ("a.tif" if mode == "CMYK" else "a.png")
    save_picture(picture, (5, 90), mode=mode)
    predict([str(picture)], checkpoint=checkpoint, out=tmp_path / "out", outputs=["train-id"], device="cpu")
    assert opened(tmp_path / "out" / "train-id" / "a.png").shape == (5, 90)


def test_a_picture_of_more_than_8_bits_is_skipped_with_the_reason(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.arange(5 * 90, dtype=np.uint16).reshape(5, 90) * 100).save(picture)
    with pytest.raises(DataError, match="1 of 1 images were skipped"):
        predict([str(picture)], checkpoint=checkpoint, out=tmp_path / "out", outputs=["train-id"], device="cpu")
    assert f"warning: {picture}: 16-bit" in capsys.readouterr().err


def test_a_photo_that_is_stored_turned_is_segmented_upright(checkpoint: Path, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "a.jpg", (16, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(picture) as image:
        image.load()
        image.save(picture, exif=exif)
    predict([str(picture)], checkpoint=checkpoint, out=tmp_path / "out", outputs=["color"], device="cpu")
    assert opened(tmp_path / "out" / "color" / "a.png").shape == (40, 16, 3)
    upright = tmp_path / "upright.png"
    with Image.open(picture) as image:
        ImageOps.exif_transpose(image).save(upright)
    predict([str(upright)], checkpoint=checkpoint, out=tmp_path / "out", outputs=["color"], device="cpu")
    assert np.array_equal(
        opened(tmp_path / "out" / "color" / "a.png"), opened(tmp_path / "out" / "color" / "upright.png")
    )


def test_folders_files_and_globs(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    for name in ("b.png", "sub/b.PNG", "sub/deep/c.JPEG", ".hidden/d.png", "._b.png"):
        target = folder / name
        save_picture(target.with_suffix(".jpg" if "JPEG" in name else ".png")).rename(target)
    (folder / "notes.txt").write_text("no image")
    single, star = save_picture(tmp_path / "one.bmp"), save_picture(tmp_path / "star" / "s1.webp")
    inputs = [str(folder), str(single), str(star.parent / "s*"), str(folder / "b.png")]  # the last one twice
    predict(inputs, checkpoint=checkpoint, out=tmp_path / "out", outputs=["train-id"], device="cpu", as_json=True)
    expected = {"b.png", "sub/b.png", "sub/deep/c.png", "one.png", "s1.png"}
    assert names(tmp_path / "out" / "train-id") == expected
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["checkpoint", "images", "failed"] and found["failed"] == []
    assert {image["input"] for image in found["images"]} == {
        str(path) for path in (folder / "b.png", folder / "sub/b.PNG", folder / "sub/deep/c.JPEG", single, star)
    }
    assert all(list(image["outputs"]) == ["train-id"] for image in found["images"])
    assert all(Path(image["outputs"]["train-id"]).is_file() for image in found["images"])


@pytest.mark.parametrize("out", ["out", "."])
def test_results_are_not_found_as_images_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    """`out` may be the folder of the images itself, or a folder in it."""
    save_picture(tmp_path / "a.png")
    for inputs in ([str(tmp_path)], [str(tmp_path / "**" / "*.png")]):
        assert find_images(inputs, tmp_path / out) == [(tmp_path / "a.png", Path("a.png"))]
    save_picture(tmp_path / out / "color" / "a.png")
    for inputs in ([str(tmp_path)], [str(tmp_path / "**" / "*.png")]):
        assert find_images(inputs, tmp_path / out) == [(tmp_path / "a.png", Path("a.png"))]
    assert f"left out {tmp_path / out / 'color'}, a folder of results\n" in capsys.readouterr().err


def test_the_folder_of_the_images_can_take_the_results(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save_picture(folder / "a.png")
    for _ in range(2):
        predict([str(folder)], checkpoint=checkpoint, out=folder, outputs=["color"], device="cpu")
        assert names(folder) == {"a.png", "color/a.png"}


def test_links_to_folders_are_followed_once_and_loops_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    save_picture(folder / "real" / "a.png")
    save_picture(elsewhere / "deep" / "b.png")
    save_picture(elsewhere / "c.png")
    (folder / "0link").symlink_to(folder / "real")  # sorts before what it leads to
    (folder / "link").symlink_to(elsewhere)
    (folder / "link2").symlink_to(elsewhere / "deep")
    (folder / "real" / "loop").symlink_to(folder)
    (folder / "nothing").symlink_to(tmp_path / "missing")
    expected = {"real/a.png", "link/c.png", "link/deep/b.png"}
    found = find_images([str(folder)], tmp_path / "out")
    assert {relative.as_posix() for _, relative in found} == expected
    talk = capsys.readouterr().err
    for link, target in (("real/loop", folder), ("0link", folder / "real"), ("link2", elsewhere / "deep")):
        assert f"warning: {folder / link} links to {target}, whose images are taken once\n" in talk
    assert talk.count("warning") == 3
    found = find_images([str(folder / "**" / "*.png")], tmp_path / "out")
    assert {image.relative_to(folder).as_posix() for image, _ in found} == expected
    found = find_images([str(folder / "**" / "deep" / "?.png")], tmp_path / "out")
    assert [image.name for image, _ in found] == ["b.png"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", {"B.JPG": "B.JPG", "a.jpg": "a.jpg"}),
        ("**/*.jpg", {"B.JPG": "B.JPG", "a.jpg": "a.jpg", "s/deep/d.jpg": "d.jpg"}),
        ("[^a]*", {"B.JPG": "B.JPG", "c[1].png": "c[1].png", "s/deep/d.jpg": "deep/d.jpg", "s/e.png": "e.png"}),
        ("s*", {"s/deep/d.jpg": "deep/d.jpg", "s/e.png": "e.png"}),
        ("s/**", {"s/deep/d.jpg": "d.jpg", "s/e.png": "e.png"}),
        ("c[1].png", {"c[1].png": "c[1].png"}),
    ],
)
def test_globs_name_files_and_folders(tmp_path: Path, pattern: str, expected: dict[str, str]) -> None:
    for name in ("a.jpg", "B.JPG", "c[1].png", "s/e.png", "s/deep/d.jpg", "s/f.txt", ".hidden/h.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).touch()
    found = find_images([str(tmp_path / "p" / pattern)], tmp_path / "out")
    assert {str(image.relative_to(tmp_path / "p")): str(relative) for image, relative in found} == expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("p/*.bmp", "p holds 1 .png"),
        ("q/*.png", "there is no folder q in .*, only p"),
        ("p/[z-a].png", r'"\[z-a\].png" is no pattern: .* -> correct the pattern'),
    ],
)
def test_a_glob_without_an_image_says_what_is_there(tmp_path: Path, pattern: str, words: str) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.png").touch()
    with pytest.raises(DataError, match=words):
        find_images([str(tmp_path / pattern)], tmp_path / "out")


def test_an_image_that_two_inputs_reach_is_taken_once(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.png").touch()
    (tmp_path / "q").symlink_to("p")
    found = find_images([str(tmp_path / name) for name in ("p", "q", "q/*.png", "?/a.png")], tmp_path / "out")
    assert found == [(tmp_path / "p/a.png", Path("a.png"))]


@pytest.mark.parametrize("text", ["out/color", "out/color/*.png", "out/color/a.png"])
def test_results_are_images_where_the_user_names_them(tmp_path: Path, text: str) -> None:
    save_picture(tmp_path / "out/color/a.png")
    assert find_images([str(tmp_path / text)], tmp_path / "out") == [(tmp_path / "out/color/a.png", Path("a.png"))]


def test_what_is_neither_a_file_nor_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        find_images([str(tmp_path / "a.png")], tmp_path / "out")
    with pytest.raises(DataError, match="no images in this folder"):
        find_images([str(tmp_path)], tmp_path / "out")


@pytest.mark.parametrize("where", ["read_image", "fit_image", "_render", "_run_network"])
def test_pictures_after_one_that_exhausts_memory_are_done(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    for name, height in (("a", 16), ("b", 24), ("c", 16)):
        save_picture(tmp_path / "in" / f"{name}.png", (height, 32))

    def exhaust(owner: Any, function: str, is_second: Callable[..., bool], error: Exception) -> None:
        honest = getattr(owner, function)

        def run(*args: Any) -> Any:
            if is_second(*args):
                raise error
            return honest(*args)

        monkeypatch.setattr(owner, function, run)

    if where == "read_image":
        exhaust(verb, where, lambda path: path.stem == "b", MemoryError())
    elif where == "fit_image":
        exhaust(verb, where, lambda pixels, *_: pixels.shape[1] == 24, RuntimeError("DefaultCPUAllocator: no memory"))
    elif where == "_run_network":
        exhaust(sliding, where, lambda _, images, __: images[0].original[0] == 24, MemoryError())
    else:
        exhaust(verb, where, lambda _, __, prediction: prediction.label.shape[0] == 24, MemoryError())
    with pytest.raises(DataError, match="1 of 3 images were skipped"):
        predict(
            [str(tmp_path / "in")], checkpoint=checkpoint, out=tmp_path / "out", outputs=["color"], device="cpu",
            as_json=True,
        )  # fmt: skip
    text, talk = capsys.readouterr()
    assert [Path(image["input"]).stem for image in json.loads(text)["images"]] == ["a", "c"]
    assert names(tmp_path / "out") == {"color/a.png", "color/c.png"}
    assert f"warning: {tmp_path / 'in' / 'b.png'}: memory ran out on 24 x 32 pixels" in talk


def test_outputs_made_in_parts_are_the_same(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = save_picture(tmp_path / "a.png")
    predict([str(picture)], checkpoint=checkpoint, out=tmp_path / "whole", outputs=OUTPUTS, device="cpu")
    monkeypatch.setattr(verb, "PIXELS_AT_ONCE", 100)
    predict([str(picture)], checkpoint=checkpoint, out=tmp_path / "parts", outputs=OUTPUTS, device="cpu")
    for output in OUTPUTS:
        whole, parts = (opened(tmp_path / name / output / "a.png") for name in ("whole", "parts"))
        assert np.array_equal(whole, parts)


def test_equal_names_do_not_replace_each_other(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [
        save_picture(tmp_path / name, (16, 16 + 8 * i), seed=i)
        for i, name in enumerate(["1/a.png", "2/a.png", "2/a.jpg", "2/a-2.png", "3/A.png"])
    ]
    inputs = [str(picture) for picture in pictures]
    predict(inputs, checkpoint=checkpoint, out=tmp_path / "out", outputs=["train-id"], device="cpu", as_json=True)
    images = json.loads(capsys.readouterr().out)["images"]
    written = [image["outputs"]["train-id"] for image in images]
    assert len({path.casefold() for path in written}) == 5
    assert [image["input"] for image in images] == inputs
    assert [opened(Path(path)).shape for path in written] == [(16, 16 + 8 * i) for i in range(5)]


def test_broken_image_is_skipped_and_told_at_the_end(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        save_picture(tmp_path / "in" / f"{name}.png")
    broken = tmp_path / "in" / "b.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match="1 of 3 images were skipped") as caught:
        predict(
            [str(tmp_path / "in")], checkpoint=checkpoint, out=tmp_path / "out", outputs=["color"], device="cpu",
            as_json=True,
        )  # fmt: skip
    assert caught.value.exit_code == 3
    assert names(tmp_path / "out") == {"color/a.png", "color/c.png"}
    text, talk = capsys.readouterr()
    found = json.loads(text)
    assert [image["input"] for image in found["images"]] == [str(tmp_path / "in" / f"{n}.png") for n in ("a", "c")]
    assert [failure["input"] for failure in found["failed"]] == [str(broken)] and found["failed"][0]["error"]
    assert str(broken) in talk


def test_two_calls_do_not_write_into_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    with locked(tmp_path / "out", ""), pytest.raises(SettingsError, match="another process"):
        predict([str(tmp_path / "a.png")], checkpoint=checkpoint, out=tmp_path / "out", outputs=["color"], device="cpu")


def test_folder_to_stdout_summary_to_stderr(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_picture(tmp_path / "a.png")
    predict([str(tmp_path / "a.png")], checkpoint=checkpoint, out=tmp_path / "out", outputs=["color"], device="cpu")
    text, talk = capsys.readouterr()
    assert text == f"{tmp_path / 'out'}\n" and "1 image" in talk


@pytest.mark.parametrize("inputs", [["missing.png"], ["*.png"], ["empty"], ["empty/*"]])
def test_nothing_found_is_said(checkpoint: Path, tmp_path: Path, inputs: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        predict(
            [str(tmp_path / name) for name in inputs], checkpoint=checkpoint, out=tmp_path / "out", outputs=["color"],
            device="cpu",
        )  # fmt: skip
    assert caught.value.where == str(tmp_path / inputs[0]) and caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "color" / "a.png")
    before = picture.read_bytes()
    with pytest.raises(DataError, match="overwritten"):
        predict([str(picture)], checkpoint=checkpoint, out=tmp_path, outputs=["color"], device="cpu")
    assert picture.read_bytes() == before


def test_unknown_output_and_unfit_label_ids_are_settings_errors(checkpoint: Path, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "a.png")
    for outputs in (["colour"], []):
        with pytest.raises(SettingsError, match="--output"):
            predict([str(picture)], checkpoint=checkpoint, out=tmp_path / "out", outputs=outputs, device="cpu")
    table = ClassTable((*CITYSCAPES[:5], LabelClass("plate", (0, 0, 142), -1)))
    description = NetworkDescription(settings=SETTINGS, classes=table, seen=table.names, network_name="student", step=7)
    save_weights(checkpoint, make_network().state_dict(), description)
    with pytest.raises(SettingsError, match="plate"):
        predict([str(picture)], checkpoint=checkpoint, out=tmp_path / "out", outputs=["label-id"], device="cpu")


def test_newest_checkpoint_is_the_best_of_the_newest_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(DataError, match="no run with weights"):
        find_newest_checkpoint(runs)
    for age, name in [(50, "old/best"), (40, "old/last"), (60, "new/best"), (10, "new/last"), (30, "other/last")]:
        path = runs / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert find_newest_checkpoint(runs) == runs / "new" / "best.safetensors"
    (runs / "new" / "best.safetensors").unlink()
    assert find_newest_checkpoint(runs) == runs / "new" / "last.safetensors"
