"""What all tables of settings have in common."""

import pytest
from pydantic import ValidationError

from cluda_cli import presets, settings
from cluda_cli.errors import SettingsError


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        settings.Settings().training.steps = 3


UNSET = [
    "data.rare_class.min_pixels", "data.target_margins", "model.multires.detail_crop", "mixing.uncertain_detail_from",
    "masking.block", "objectives.feature_distance.classes", "training.micro_batch", "evaluation.window",
    "evaluation.stride",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSET)
def test_false_leaves_a_value_unset_and_true_is_refused(name):
    value = presets.load(["hrda-cluda"], None, [f"{name}=false"])
    for key in name.split("."):
        value = getattr(value, key)
    assert value is None
    with pytest.raises(SettingsError, match=r"takes a value, or false to leave it unset"):
        presets.load(["hrda-cluda"], None, [f"{name}=true"])


@pytest.mark.parametrize(("given", "names"), [("gta", ("gta",)), (["gta", "synthia"], ("gta", "synthia"))])
def test_one_name_is_a_list_of_one(given, names):
    assert settings.Data(source=given).source == names


def test_a_name_given_twice_is_refused():
    with pytest.raises(ValidationError, match="names a dataset twice"):
        settings.Data(source=["gta", "gta"])
