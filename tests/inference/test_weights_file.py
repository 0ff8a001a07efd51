"""Weights files: complete or absent, self-sufficient, and never executed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.errors import DataError, EnvironmentProblem
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


def test_a_full_disk_is_one_clear_message_and_leaves_the_old_file(weights, tmp_path, full_disk):
    path, network = weights
    old = path.read_bytes()
    with full_disk(), pytest.raises((EnvironmentProblem, OSError)) as failure:
        save_weights(path, network.state_dict(), DESCRIPTION)
    assert "File too large" in str(failure.value) or "cannot be written" in str(failure.value)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
