"""Settings: documented, checked, and equal to their generated page."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluda_cli import presets, settings
from cluda_cli.data.transforms import fit_box
from cluda_cli.errors import SettingsError

SECTIONS = [m for m in vars(settings).values() if isinstance(m, type) and issubclass(m, settings.Section)]
PAGE = Path(__file__).parent.parent / "docs" / "reference" / "settings.md"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_value_is_documented(section):
    def is_section(field):
        return isinstance(field.default, settings.Section) and not field.description

    undocumented = [n for n, field in section.model_fields.items() if not field.description and not is_section(field)]
    assert undocumented in ([], ["source"] if section is settings.Objectives else [])


def test_the_page_is_the_generated_one():
    assert PAGE.read_text(encoding="utf-8") == settings.reference_markdown(), (
        "write it anew with: python -m cluda_cli.settings > docs/reference/settings.md"
    )


def test_defaults_are_the_papers_values():
    s = settings.Settings()
    assert (s.optimizer.lr, s.optimizer.warmup, s.training.steps, s.data.batch_size) == (6e-5, 1500, 40_000, 2)
    assert (s.teacher.decay, s.teacher.confidence) == (0.999, 0.968)
    assert s.objectives.feature_distance.weight == 0.005
    assert (s.objectives.pixel_contrast.temperature, s.objectives.pixel_contrast.size) == (1.0, 65)
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


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        settings.Settings().training.steps = 3


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


def test_evaluation_windows_follow_the_crop_unless_set():
    small = presets.load(["hrda", "small"])
    assert (small.inference.window, small.inference.stride) == ((240, 320), (120, 160))
    paper = presets.load(["hrda"]).inference
    assert (paper.window, paper.stride) == ((1024, 1024), (512, 512))
    own = presets.load(["hrda"], None, ["evaluation.window=[600, 800]"]).inference
    assert (own.window, own.stride) == ((600, 800), (300, 400))


def test_every_row_of_the_page_of_settings_is_one_line():
    rows = [line for line in settings.reference_markdown().splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)
    assert len(rows) > 70
