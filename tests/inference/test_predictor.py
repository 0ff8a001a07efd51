"""A trained network in Python."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cluda_cli
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import DataError
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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    network = Segmenter(SETTINGS.model, len(TABLE))
    torch.nn.init.normal_(network.decoder.conv_seg.weight, std=20)
    description = NetworkDescription(settings=SETTINGS, classes=TABLE, seen=TABLE.names, network_name="student", step=7)
    save_weights(tmp_path / "run" / "last.safetensors", network.state_dict(), description)
    return tmp_path / "run"


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def test_a_prediction_is_what_the_logits_say(run, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "x.png")
    network = cluda_cli.load(run, device="cpu")
    found = network.predict(tmp_path / "x.png")
    logits = image_logits(network.module, read_image(tmp_path / "x.png"), (32, 64), Evaluation())
    assert np.array_equal(found.labels, logits.argmax(0).numpy())
    assert len(np.unique(found.labels)) > 2
    assert np.allclose(found.confidence, logits.softmax(0).amax(0).numpy(), atol=1e-5)
    assert np.array_equal(found.pixels, pixels)
    assert found.classes == TABLE


def test_files_images_and_arrays_give_the_same(run, pixels, tmp_path):
    image = Image.fromarray(pixels)
    image.save(tmp_path / "x.png")
    pictures = [tmp_path / "x.png", str(tmp_path / "x.png"), image, pixels]
    labels = [found.labels for found in cluda_cli.load(run, device="cpu").predict_all(pictures)]
    assert len(labels) == 4
    assert all(np.array_equal(label, labels[0]) for label in labels)


def test_a_turned_pillow_image_is_predicted_upright(run, pixels):
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6  # stored on its side
    assert cluda_cli.load(run, device="cpu").predict(image).labels.shape == (53, 37)


def test_pictures_of_a_prediction(run, pixels, tmp_path):
    found = cluda_cli.load(run, device="cpu").predict(pixels)
    found.save(tmp_path / "new" / "labels.png")
    with Image.open(tmp_path / "new" / "labels.png") as image:
        assert np.array_equal(np.array(image), found.labels)
        colors = np.array(image.convert("RGB"))
    assert np.array_equal(colors, np.array([c.color for c in TABLE.classes])[found.labels])
    assert np.array_equal(np.array(found.overlay(0)), pixels)
    assert np.array_equal(np.array(found.overlay(1)), colors)


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_an_array_that_is_no_picture_is_refused(run, wrong):
    with pytest.raises(DataError, match="height x width x 3"):
        cluda_cli.load(run, device="cpu").predict(wrong)


def test_a_pillow_image_of_more_than_8_bits_is_refused(run):
    with pytest.raises(DataError, match="more than 8 bits"):
        cluda_cli.load(run, device="cpu").predict(Image.new("I;16", (8, 8)))


def test_the_best_weights_of_a_run_come_before_the_last(run):
    assert cluda_cli.load(run, device="cpu").path == run / "last.safetensors"
    (run / "best.safetensors").write_bytes((run / "last.safetensors").read_bytes())
    assert cluda_cli.load(str(run), device="cpu").path == run / "best.safetensors"


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(DataError, match="no weights in this folder"):
        cluda_cli.load(tmp_path)


def test_all_that_the_package_offers_exists():
    assert all(callable(getattr(cluda_cli, name)) for name in cluda_cli.__all__)
    with pytest.raises(AttributeError, match="no attribute nothing"):
        cluda_cli.nothing  # noqa: B018
