"""Weights files: complete or absent, self-sufficient, and never executed."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.errors import DataError
from cluda_cli.inference.checksum import checksum
from cluda_cli.inference.weights_file import NetworkDescription, load_weights, save_weights
from cluda_cli.models.normalisation import IMAGENET, Normalisation
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.presets import load

CPU = torch.device("cpu")
CLASSES = ClassTable(CITYSCAPES[:3])
SETTINGS = load([], {"model": {"encoder": "mit_b0", "decoder": {"embed_dim": 8, "channels": 8}}})
DESCRIPTION = NetworkDescription(settings=SETTINGS, classes=CLASSES, seen=("road",), network_name="student", step=12)


@pytest.fixture
def weights(tmp_path):
    network = Segmenter(SETTINGS.model, 3)
    path = tmp_path / "best.safetensors"
    save_weights(path, network.state_dict(), DESCRIPTION)
    return path, network


def test_weights_carry_all_that_is_needed(weights):
    path, network = weights
    deployed = load_weights(path, CPU)
    assert (deployed.classes, deployed.seen) == (CLASSES, ("road",))
    ours, saved = deployed.settings, SETTINGS
    assert (ours.model, ours.inference, ours.data.target_box) == (saved.model, saved.inference, saved.data.target_box)
    assert (deployed.network_name, deployed.step, deployed.network.training) == ("student", 12, False)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(deployed.network(image).logits, network.eval()(image).logits)


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "mit_b0"])
def test_normalisation_travels_with_the_weights(encoder, tmp_path):
    settings = load([], {"model": {"encoder": encoder, "decoder": {"embed_dim": 8, "channels": 8}}})
    state, path = Segmenter(settings.model, 3).state_dict(), tmp_path / "best.safetensors"
    other = Normalisation(mean=(1.0, 2.5, 3.0), std=(40.0, 50.0, 60.0))  # as if timm had changed its own
    save_weights(path, state, replace(DESCRIPTION, settings=settings), normalisation=other)
    assert load_weights(path, CPU).network.normalisation == other


def test_weights_without_normalisation_were_trained_with_that_of_imagenet(tmp_path):
    settings = load([], {"model": {"encoder": "tf_efficientnet_lite0", "decoder": {"embed_dim": 8, "channels": 8}}})
    network, path = Segmenter(settings.model, 3), tmp_path / "best.safetensors"
    save_weights(path, network.state_dict(), replace(DESCRIPTION, settings=settings))
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["cluda"])
    del description["preprocessing"]
    save_file(network.state_dict(), path, metadata={"cluda": json.dumps(description)})
    assert network.normalisation != IMAGENET and load_weights(path, CPU).network.normalisation == IMAGENET


def test_missing_damaged_and_foreign_weights_are_told_apart(weights, tmp_path):
    path, _ = weights
    with pytest.raises(DataError, match="no such weights file"):
        load_weights(tmp_path / "none.safetensors", CPU)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_weights(cut, CPU)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(DataError, match="holds no description"):
        load_weights(foreign, CPU)


def test_every_change_of_a_byte_is_noticed_or_changes_nothing(weights):
    path, network = weights
    whole, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [draw.randrange(header) for _ in range(30)] + [draw.randrange(header, len(whole)) for _ in range(10)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            deployed = load_weights(path, CPU)  # as where the name of the checksum itself is damaged
        except DataError:
            continue
        assert place < header and checksum(dict(deployed.network.state_dict())) == checksum(dict(network.state_dict()))
        assert (deployed.classes, deployed.step) == (CLASSES, 12)


def rewrite(path, change=lambda description: None, tensors=None):
    """Write a file as earlier versions and others may: with another description, and without a checksum."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["cluda"])
    change(description)
    save_file(tensors or load_file(path), path, metadata={"cluda": json.dumps(description)})


def test_weights_of_an_earlier_version_have_no_checksum_and_are_read(weights):
    rewrite(weights[0])
    assert load_weights(weights[0], CPU).step == 12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(weights, value):
    tensors = load_file(weights[0])
    tensors["decoder.conv_seg.weight"].view(-1)[3] = value
    rewrite(weights[0], tensors=tensors)
    with pytest.raises(DataError, match=r"not finite, such as decoder\.conv_seg\.weight"):
        load_weights(weights[0], CPU)


DEEP = "[" * 50_000 + "]" * 50_000


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []},
        {"classes": 3},
        {"classes": [{"name": 1}]},
        {"classes": [{"name": "road", "color": [0, 0, 999], "label_id": 0}] * 3},
        {"seen": 3},
        {"network": None},
        {"step": "many"},
        {"step": -1},
        {"settings": []},
        {"settings": {"data": {}, "model": [], "evaluation": {}}},
        {"settings": {"data": {"crop": "x"}, "model": {}, "evaluation": {}}},
        {"preprocessing": {"mean": [1, 2], "std": [1, 2, 3]}},
        {"preprocessing": {"mean": [1, 2, 3], "std": [0, 1, 1]}},
        {"format": 2},
        {"format": None},
    ],
    ids=str,
)
def test_a_description_of_another_form_is_one_clear_message(weights, change):
    rewrite(weights[0], lambda description: description.update(change))
    with pytest.raises(DataError, match="does not fit|weights format"):
        load_weights(weights[0], CPU)


@pytest.mark.parametrize("text", ["", "7", "[]", "null", DEEP, "1" * 5000, '{"format": 1}'], ids=lambda t: t[:12])
def test_a_description_that_is_none_is_one_clear_message(weights, text):
    save_file(load_file(weights[0]), weights[0], metadata={"cluda": text})
    with pytest.raises(DataError, match="does not fit"):
        load_weights(weights[0], CPU)


def test_a_full_disk_is_one_clear_message_and_leaves_the_old_file(weights, tmp_path, full_disk):
    path, network = weights
    old = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match="File too large") as failure:
        save_weights(path, network.state_dict(), DESCRIPTION)
    assert failure.value.filename == str(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
