"""Settings: documented and checked."""

import pytest
from pydantic import ValidationError

from cluda_cli import presets, settings
from cluda_cli.data.transforms import fit_box
from cluda_cli.errors import SettingsError

SECTIONS = [m for m in vars(settings).values() if isinstance(m, type) and issubclass(m, settings.Section)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_value_is_documented(section):
    def is_section(field):
        return isinstance(field.default, settings.Section) and not field.description

    undocumented = [n for n, field in section.model_fields.items() if not field.description and not is_section(field)]
    assert undocumented in ([], ["source"] if section is settings.Objectives else [])


def test_defaults_are_the_papers_values():
    s = settings.Settings()
    assert (s.optimizer.lr, s.optimizer.warmup, s.training.steps, s.data.batch_size) == (6e-5, 1500, 40_000, 2)
    assert (s.teacher.decay, s.teacher.confidence) == (0.999, 0.968)
    assert s.data.rare_class.image_pixels(s.data.crop) == 3000


@pytest.mark.parametrize(
    ("domain", "size", "resized"),
    [
        ("source", (1052, 1914), (704, 1280)),  # GTA5
        ("source", (760, 1280), (760, 1280)),  # SYNTHIA
        ("target", (1024, 2048), (512, 1024)),  # Cityscapes
        ("target", (1080, 1920), (540, 960)),  # ACDC and Dark Zurich
    ],
)
def test_the_default_boxes_give_the_papers_sizes_for_every_dataset(domain, size, resized):
    assert fit_box(size, getattr(settings.Data(), f"{domain}_box")) == resized


def test_the_rare_class_threshold_follows_the_crop_unless_set():
    assert settings.RareClass().image_pixels((240, 320)) == 879
    assert settings.RareClass().image_pixels((1024, 1024)) == 3000
    assert settings.RareClass(min_pixels=12).image_pixels((240, 320)) == 12


@pytest.mark.parametrize(("crop", "pixels"), [(512, 1500), (1024, 6000)])
def test_a_crop_must_hold_the_papers_number_of_pixels(crop, pixels):
    assert settings.RareClass().min_crop_share * crop**2 == pixels


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"weights": False}}, "objectives.feature_distance needs pretrained weights"),
        ({"evaluation": {"stride": [600, 512], "window": [512, 512]}}, "leaves gaps between windows"),
        ({"mixing": {"blur_sigma": [1.0, 0.5]}}, "must be (smallest, largest)"),
        ({"training": 3}, "training is a table of settings"),
    ],
)
def test_contradictions_are_refused(tree, message):
    with pytest.raises(ValidationError) as error:
        settings.Settings.model_validate(tree)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "tree",
    [{"training": {"steps": True}}, {"optimizer": {"power": False}}, {"data": {"crop": [True, 64]}},
     {"objectives": {"masked": {"weight": False}}}, {"model": {"decoder": {"dilations": [1, False]}}}],
    ids=str,
)  # fmt: skip
def test_true_and_false_are_no_numbers(tree):
    with pytest.raises(SettingsError, match="true and false are no numbers, got"):
        presets.validate(tree)


def test_evaluation_windows_follow_the_crop_unless_set():
    small = presets.load(["hrda", "small"])
    assert (small.inference.window, small.inference.stride) == ((240, 320), (120, 160))
    paper = presets.load(["hrda"]).inference
    assert (paper.window, paper.stride) == ((1024, 1024), (512, 512))
    own = presets.load(["hrda"], None, ["evaluation.window=[600, 800]"]).inference
    assert (own.window, own.stride) == ((600, 800), (300, 400))
