"""Presets: found, merged, overridden, explained."""

import json
import tomllib

import pytest

from cluda_cli import presets
from cluda_cli.errors import SettingsError
from cluda_cli.settings import Settings

METHODS = ["source-only", "dacs", "daformer", "daformer-cluda"]


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_validates_and_round_trips(name, tmp_path):
    resolved = presets.load([name])
    saved = tmp_path / "settings.json"
    saved.write_text(resolved.model_dump_json())
    assert presets.load([str(saved)]) == resolved


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_says_what_it_is(name):
    lines = presets.header(name)
    assert lines[0].endswith(".")
    text = " ".join(lines)
    assert "Command: cluda train" in text
    assert "Expected:" in text


@pytest.mark.parametrize("overlay", ["small", "demo"])
@pytest.mark.parametrize("method", METHODS)
def test_an_overlay_switches_nothing_on(method, overlay):
    """Or it would make a baseline into something else; it may switch off what its size or data cannot use."""
    plain, laid_over = presets.load([method]), presets.load([method, overlay])
    for name in ("mixed", "feature_distance", "pixel_contrast"):
        assert getattr(plain.objectives, name) or not getattr(laid_over.objectives, name)
    assert plain.data.rare_class or not laid_over.data.rare_class
    assert bool(plain.objectives.mixed) == bool(laid_over.objectives.mixed)
    assert bool(plain.objectives.pixel_contrast) == bool(laid_over.objectives.pixel_contrast)


def test_daformer_cluda_is_the_defaults():
    assert presets.load(["daformer-cluda"]) == Settings()


def test_later_wins():
    resolved = presets.load(["dacs", "small"], {"training": {"steps": 7}}, ["training.steps=9", "data.source=synthia"])
    assert (resolved.training.steps, resolved.data.source, resolved.data.crop) == (9, "synthia", (240, 320))


def test_an_override_switches_an_objective_on_and_off():
    on = presets.load(["source-only"], None, ["objectives.pixel_contrast.temperature=0.1"])
    assert on.objectives.pixel_contrast.temperature == 0.1
    assert presets.load([], None, ["objectives.pixel_contrast=false"]).objectives.pixel_contrast is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.step=3", "training.step: no such setting; did you mean training.steps?"),
        ("objectives.mixd.weight=1", "objectives.mixd: no such setting; did you mean objectives.mixed?"),
        ("data.crop=[0, 4]", "data.crop.0: Input should be greater than or equal to 1, got 0"),
        ("model.weights=true", "model.weights: Input should be"),
        ("training", '"training" is not of the form section.key=value'),
    ],
)
def test_a_wrong_override_is_explained(override, line):
    with pytest.raises(SettingsError) as error:
        presets.load([], None, [override])
    assert line in str(error.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(SettingsError) as error:
        presets.load([], None, ["training.step=3", "data.batch_size=0"])
    assert len(error.value.what.splitlines()) == 2


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(SettingsError, match="did you mean daformer"):
        presets.find("dafromer")


def test_a_broken_preset_file_is_named(tmp_path):
    broken = tmp_path / "x.toml"
    broken.write_text("[data\n")
    with pytest.raises(SettingsError, match=r"x\.toml: cannot be read"):
        presets.load([str(broken)])


@pytest.mark.parametrize("names", [[], ["source-only", "small"], ["dacs"]])
def test_the_shown_settings_are_a_preset(names, tmp_path):
    shown = tmp_path / "shown.toml"
    shown.write_text(presets.to_toml(presets.load(names)))
    assert presets.load([str(shown)]) == presets.load(names)
    tomllib.loads(shown.read_text())


def test_differences_from_the_defaults_are_marked():
    text = presets.to_toml(presets.load(["dacs"]))
    assert "decay = 0.99  # default: 0.999" in text
    assert "pixel_contrast = false  # default: on" in text
    assert "confidence = 0.968\n" in text


def test_resuming_takes_the_runs_settings_and_announces_changes(tmp_path, capsys):
    (tmp_path / "settings.json").write_text(json.dumps({"training": {"steps": 10, "seed": 4}}))
    resolved = presets.resume(tmp_path, {"training": {"steps": 20}}, [])
    assert (resolved.training.steps, resolved.training.seed) == (20, 4)
    assert "resuming with another training.steps: 10 -> 20" in capsys.readouterr().err
