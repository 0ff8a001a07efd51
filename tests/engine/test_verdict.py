"""Steps that are not finite, where the host looks before anything changes and where it looks one step later."""

import pytest
import torch

from cluda_cli import presets
from cluda_cli.data.index import find
from cluda_cli.data.streams import batches
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.engine.verdict import Verdict
from cluda_cli.errors import RunError

CPU = torch.device("cpu")
SELDOM = {"training": {"log_every": 100, "save_every": 100, "validate_every": 100, "pictures_every": 0}}


def start(tiny_settings, tree=None, later=True):
    """A run and its batches; `later` makes a CPU do what a GPU does."""
    tree = presets.merge(tiny_settings.model_dump(mode="json"), presets.merge(SELDOM, tree or {}))
    settings = presets.validate(tree)
    source, target = find("clean", settings.data.root), find("noisy", settings.data.root)
    run = Run(settings, source, CPU)
    run.looks_later = later
    for group in run.optimizer.param_groups:
        group["fused"] = later or None
    return run, iter(batches(source, target, settings.data, settings.training.seed, 0, settings.training.steps))


def tensors(run):
    """All that a step changes, and the counter."""
    found = {f"{module}/{k}": v for module in ("student", "teacher", "objectives") for k, v in state(run, module)}
    for i, moments in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{i}/{k}": v for k, v in moments.items()}
    return {k: v.clone() for k, v in found.items()} | {"step": torch.tensor(run.step)}


def state(run, module):
    return getattr(run, module).state_dict().items()


def break_loss(run, monkeypatch):
    contrast = type(run.objectives["pixel_contrast"])
    honest = contrast.forward
    monkeypatch.setattr(contrast, "forward", lambda *args: honest(*args) * float("nan"))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("name", ["source/source", "gradient"])
def test_names_what_is_broken(name):
    values = {k: torch.tensor(1.0) for k in ("source/source", "mixed/mixed", "gradient")}
    assert Verdict(7, values).error() is None and bool(Verdict(7, values).finite)
    verdict = Verdict(7, values | {name: torch.tensor(torch.inf)} | {"gradient": torch.tensor(torch.nan)})
    assert not verdict.finite
    assert f" {name} is not finite in step 7" in str(verdict.error())


def test_looking_later_changes_no_number(tiny_settings):
    runs = [start(tiny_settings, later=later) for later in (False, True)]
    for run, stream in runs:
        for group in run.optimizer.param_groups:
            group["fused"] = True
        training_step(run, next(stream))
    one, other = (tensors(run) for run, _ in runs)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_broken_step_has_no_effect_and_is_told_with_the_next(tiny_settings, monkeypatch):
    run, stream = start(tiny_settings)
    for _ in range(2):
        training_step(run, next(stream))
    before = tensors(run)
    with monkeypatch.context() as patch:
        break_loss(run, patch)
        training_step(run, next(stream))
    assert run.step == 3
    broken = tensors(run)
    assert_equal(before, broken | {"step": before["step"]})
    with pytest.raises(RunError, match="source/pixel_contrast, mixed/pixel_contrast is not finite in step 2"):
        training_step(run, next(stream))
    assert_equal(before, tensors(run))
    training_step(run, next(stream))  # and the run goes on from there
    assert run.step == 3 and not torch.equal(before["optimizer/0/step"], tensors(run)["optimizer/0/step"])


def test_a_step_after_which_something_is_written_is_looked_at_at_once(tiny_settings, monkeypatch):
    run, stream = start(tiny_settings, {"training": {"save_every": 2}})
    training_step(run, next(stream))
    before = tensors(run)
    break_loss(run, monkeypatch)
    with pytest.raises(RunError, match="in step 1"):
        training_step(run, next(stream))
    assert_equal(before, tensors(run))


def test_what_is_saved_does_not_count_a_broken_step(tiny_settings, monkeypatch):
    run, stream = start(tiny_settings)
    for _ in range(2):
        training_step(run, next(stream))
    break_loss(run, monkeypatch)
    training_step(run, next(stream))
    assert run.step == 3 and run.state_dict()["step"] == run.step == 2


def test_a_state_of_another_device_keeps_the_implementation_of_this_one(tiny_settings):
    (one, stream), (other, _) = start(tiny_settings, later=True), start(tiny_settings, later=False)
    training_step(one, next(stream))
    other.load_state_dict(one.state_dict())
    assert [group["fused"] for group in other.optimizer.param_groups] == [None] * len(one.optimizer.param_groups)
    assert_equal(tensors(one), tensors(other))
