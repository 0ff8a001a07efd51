"""The verb `predict` on pictures of many kinds."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluda_cli.commands.predict import OUTPUTS, find_images, find_newest_checkpoint, predict
from cluda_cli.data.labels import CITYSCAPES, ClassTable, LabelClass
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import DataError, SettingsError
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
    torch.manual_seed(0)
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


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "1"])
def test_pictures_of_any_mode_and_size(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    picture = tmp_path / "in" / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        picture.parent.mkdir()
        Image.fromarray(np.arange(5 * 90, dtype=np.uint16).reshape(5, 90) * 100).save(picture)
    else:
        save_picture(picture, (5, 90), mode=mode)
    predict([str(picture)], checkpoint=checkpoint, out=tmp_path / "out", outputs=["train-id"], device="cpu")
    assert opened(tmp_path / "out" / "train-id" / "a.png").shape == (5, 90)


def test_masks_keep_the_stored_grid_of_a_rotated_photo(checkpoint: Path, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "a.jpg", (16, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(picture) as image:
        image.load()
        image.save(picture, exif=exif)
    predict([str(picture)], checkpoint=checkpoint, out=tmp_path / "out", outputs=["color"], device="cpu")
    assert opened(tmp_path / "out" / "color" / "a.png").shape == (16, 40, 3)


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


def test_results_are_not_found_as_images_again(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "out" / "color" / "a.png")
    assert find_images([str(tmp_path)], tmp_path / "out") == [(tmp_path / "a.png", Path("a.png"))]


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
    with pytest.raises(DataError, match="1 of 3 images could not be read") as caught:
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
