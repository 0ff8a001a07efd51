"""Presets: found, merged, overridden, explained."""

import json
import tomllib

import pytest

from cluda_cli import presets
from cluda_cli.data.transforms import fit_box
from cluda_cli.errors import SettingsError
from cluda_cli.settings import Settings

METHODS = [
    "source-only", "dacs", "daformer", "daformer-cluda", "daformer-mic", "hrda", "hrda-cluda", "mic", "mic-cluda",
    "dlv2", "dlv2-cluda", "swin-cluda", "dinov2-cluda", "dinov2-small", "daformer-zero-style", "daformer-mochi",
    "distill", "pretrain-global", "pretrain-local", "daformer-semantic-negatives", "sepico", "spcl", "daformer-lal",
    "ael", "feature-regression", "daformer-cdac",
]  # fmt: skip
OVERLAYS = ["small", "demo", "synthia", "acdc", "dark-zurich", "tail-mixing", "crops-640", "adaptive-masks", "balanced"]


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
    labels = [line.partition(":")[0] for line in lines if line.startswith(("Paper:", "Command:", "Cost:", "Expected:"))]
    assert labels == ["Paper", "Command", "Cost", "Expected"]
    assert any(line.startswith("Command: cluda train --preset") for line in lines)


def test_every_preset_is_a_method_or_an_overlay():
    assert sorted(METHODS + OVERLAYS) == presets.names()


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("method", METHODS)
def test_an_overlay_switches_nothing_on(method, overlay):
    """Or it would make a baseline into something else; it may switch off what its size or data cannot use."""
    if (method, overlay) == ("feature-regression", "demo"):
        pytest.skip("the demo has no paired pictures, which are all that the method learns from")
    plain, laid_over = presets.load([method]), presets.load([method, overlay])
    parts = {
        "rare class": (plain.data.rare_class, laid_over.data.rare_class),
        "feature distance": (plain.objectives.feature_distance, laid_over.objectives.feature_distance),
    }
    for part, (without, with_overlay) in parts.items():
        assert without or not with_overlay, part
    for name in ("mixed", "masked", "pixel_contrast"):
        assert bool(getattr(plain.objectives, name)) == bool(getattr(laid_over.objectives, name)), name
    for name in ("multires", "deeplab"):
        assert bool(getattr(plain.model, name)) == bool(getattr(laid_over.model, name)), name


@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("daformer-mic", "feature_distance masked mixed"),
        ("hrda", "feature_distance mixed multires"),
        ("hrda-cluda", "feature_distance mixed multires pixel_contrast"),
        ("mic", "feature_distance masked mixed multires"),
        ("mic-cluda", "feature_distance masked mixed multires pixel_contrast"),
        ("dlv2", "deeplab feature_distance mixed"),
        ("dlv2-cluda", "feature_distance mixed pixel_contrast"),
        ("swin-cluda", "feature_distance mixed pixel_contrast"),
        ("dinov2-cluda", "masked mixed pixel_contrast"),
        ("dinov2-small", "masked mixed pixel_contrast"),
        ("daformer-zero-style", "feature_distance mixed zero_style"),
        ("daformer-mochi", "feature_distance memory_contrast mixed"),
        ("daformer-cdac", "clustering feature_distance mixed"),
        ("distill", "distilled relation_distillation"),
        ("daformer-semantic-negatives", "feature_distance mixed semantic_negatives"),
        ("pretrain-global", "global_contrast"),
        ("pretrain-local", "local_contrast"),
        ("sepico", "mixed prototype_contrast"),
        ("spcl", "deeplab mixed prototype_contrast"),
        ("daformer-lal", "feature_distance locally_adaptive"),
        ("feature-regression", "feature_distance"),
    ],
)
def test_a_method_is_what_its_name_says(name, on):
    resolved = presets.load([name])
    parts = {key: value for key, value in resolved.objectives if key not in {"source", "labelled"}}
    parts |= {"deeplab": resolved.model.deeplab, "multires": resolved.model.multires}
    assert " ".join(sorted(key for key, value in parts.items() if value)) == on


@pytest.mark.parametrize("method", ["hrda", "mic-cluda"])
def test_other_domains_change_the_data_alone(method):
    plain = presets.load([method])
    for overlay in ("synthia", "acdc", "dark-zurich"):
        other = presets.load([method, overlay])
        assert (other.data.source, other.data.target) != (plain.data.source, plain.data.target)
        same = ("model", "teacher", "mixing", "objectives", "optimizer", "training", "evaluation")
        assert all(getattr(other, section) == getattr(plain, section) for section in same)


def test_daformer_cluda_is_the_defaults():
    assert presets.load(["daformer-cluda"]) == Settings()


def test_later_wins():
    resolved = presets.load(["dacs", "small"], {"training": {"steps": 7}}, ["training.steps=9", "data.source=synthia"])
    assert (resolved.training.steps, resolved.data.source, resolved.data.crop) == (9, ("synthia",), (240, 320))


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


def test_a_byte_order_mark_is_read_over(tmp_path):
    for name, text in (("x.toml", "training.steps = 7"), ("x.json", '{"training": {"steps": 7}}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert presets.load([str(tmp_path / name)]).training.steps == 7


@pytest.mark.parametrize("name", ["str", "x[", "k" * 5000, "\ud800"])
def test_an_odd_key_is_named_in_few_words(name):
    with pytest.raises(SettingsError, match=r"no such setting|no text: '\\ud800'") as caught:
        presets.validate({name: 1, "data": {name: 2}})
    assert ascii(name)[1:100].rstrip("'") in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("names", [[], ["source-only", "small"], ["dacs"], ["mic-cluda", "acdc"], ["hrda"], ["dlv2"]])
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.json", "[" * 100_000),
        ("deep.toml", "a = " + "[" * 100_000),
        ("long.json", '{"training": {"seed": ' + "1" * 5000 + "}}"),
        ("long.toml", "[training]\nseed = " + "1" * 5000),
        ("hex.toml", "[training]\nseed = 0x" + "f" * 5000),
        ("large.toml", "[training]\nsteps = 99999999999999999999"),
        ("infinite.toml", "[optimizer]\nlr = inf"),
        ("nan.json", '{"optimizer": {"lr": NaN}}'),
        ("nul.toml", '[data]\nroot = "a\\u0000b"'),
        ("half.json", '{"data": {"root": "\\ud800"}}'),
        ("many.toml", "[training]\nseed = [" + "1," * 100_000 + "]"),
    ],
    ids=lambda value: value[:12],
)
def test_hostile_settings_are_short_messages(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError) as problem:
        presets.load([str(tmp_path / name)])
    assert 0 < len(str(problem.value)) < 1000


@pytest.mark.parametrize(
    "override",
    ["a=" + "[" * 100_000, ".".join("a" * 100_000) + "=1", "training.seed=" + "1" * 5000, "optimizer.lr=-inf",
     "training.seed=0x" + "f" * 5000],
    ids=lambda value: value[:16],
)  # fmt: skip
def test_hostile_overrides_are_short_messages(override):
    with pytest.raises(SettingsError) as problem:
        presets.load(overrides=[override])
    assert 0 < len(str(problem.value)) < 1000


def test_a_folder_without_a_run_names_the_runs_beside_it(tmp_path):
    (tmp_path / "dacs").mkdir()
    (tmp_path / "dacs" / "settings.json").write_text("{}")
    with pytest.raises(SettingsError, match=f"there is no such run to resume .*runs beside it: {tmp_path / 'dacs'}"):
        presets.resume(tmp_path / "daks", {}, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="holds no run to resume"):
        presets.resume(tmp_path / "empty", {}, [])


def test_crops_of_640_fit_into_target_images() -> None:
    data = presets.load(["sepico", "crops-640"]).data
    box = data.target_box
    assert isinstance(box, tuple)
    height, width = fit_box((1024, 2048), box)  # Cityscapes
    assert (height, width) == (640, 1280)
    assert height >= data.crop[0]
    assert width >= data.crop[1]
