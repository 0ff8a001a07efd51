"""The state of a run: what is in it, what it is restored from, and crops that a network cannot take."""

import pytest
import torch

from cluda_cli import presets
from cluda_cli.data.streams import batches
from cluda_cli.engine.run import Run
from cluda_cli.engine.state_file import load_state, save_state
from cluda_cli.engine.step import training_step
from cluda_cli.errors import SettingsError
from cluda_cli.models.normalisation import Normalisation

CPU = torch.device("cpu")


def changed(settings, tree):
    return presets.validate(presets.merge(settings.model_dump(mode="json"), tree))


def assert_same(one, other):
    """Equal to the last bit, through dicts."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_run_is_restored_from_its_saved_state(tiny_settings, run, domains, tmp_path):
    source, target = domains
    training_step(run, next(batches([source], target, tiny_settings.data, 0, 0, 1)))
    run.validated, run.best = 1, {"miou": 12.5, "step": 1}
    normalisation = Normalisation((1.0,) * 3, (2.0,) * 3)
    run.student.encoder.normalisation = run.teacher.network.encoder.normalisation = normalisation
    save_state(tmp_path / "state.pt", run.state_dict())
    other = Run(changed(tiny_settings, {"training": {"seed": 5}}), [source], CPU)
    other.load_state_dict(load_state(tmp_path / "state.pt"))
    assert (other.step, other.validated, other.best) == (1, 1, {"miou": 12.5, "step": 1})
    assert other.teacher.network.normalisation == normalisation
    assert_same(other.state_dict(), run.state_dict())


def test_a_state_without_normalisation_leaves_that_of_the_encoder(run):
    own, state = run.student.normalisation, run.state_dict()
    del state["normalisation"]
    run.load_state_dict(state)
    assert run.student.normalisation == run.teacher.network.normalisation == own


def test_moments_are_restored_and_rates_follow_the_settings(tiny_settings, run, domains):
    state = run.state_dict()
    settings = changed(tiny_settings, {"optimizer": {"lr": 1e-9, "weight_decay": 0.5}})
    other = Run(settings, [domains[0]], CPU)
    other.load_state_dict(state)
    assert {group["base_lr"] for group in other.optimizer.param_groups} == {1e-9}
    assert {group["weight_decay"] for group in other.optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_state_of_another_network_is_refused(run, change):
    state = run.state_dict()
    tensor = state["student"].pop("decoder.conv_seg.bias")
    if change == "unknown":
        state["student"] |= {"decoder.conv_seg.bias": tensor, "decoder.other.bias": tensor}
    with pytest.raises(SettingsError, match=r"saved state does not fit the settings .*\.bias"):
        run.load_state_dict(state)


def test_the_state_holds_no_frozen_network(run):
    assert not run.state_dict()["objectives"]


def test_the_first_objective_with_a_law_chooses_the_source_classes(run, monkeypatch):
    assert run.source_law(3) is None
    objectives = list(run.objectives.values())
    monkeypatch.setattr(objectives[1], "source_law", lambda step: (float(step), 0.0))
    monkeypatch.setattr(objectives[2], "source_law", lambda _: (9.0, 9.0))
    assert run.source_law(3) == (3.0, 0.0)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_the_evaluated_network_is_that_of_the_settings(tiny_settings, domains, name):
    run = Run(changed(tiny_settings, {"evaluation": {"network": name}}), [domains[0]], CPU)
    assert run.evaluated is {"student": run.student, "teacher": run.teacher.network}[name]


def test_a_crop_that_the_network_cannot_take_is_refused(tiny_settings, domains):
    change = {"model": {"encoder": "maxvit_pico_rw_256", "weights": False}, "objectives": {"feature_distance": False}}
    with pytest.raises(SettingsError, match="maxvit_pico_rw_256 cannot train on 2 such crops"):
        Run(changed(tiny_settings, change), [domains[0]], CPU)


def test_a_crop_that_leaves_one_cell_of_one_image_is_refused(tiny_settings, domains):
    tiny = {"data": {"crop": [32, 32]}, "training": {"micro_batch": 1}}
    with pytest.raises(SettingsError, match="cannot train on 1 such crops"):
        Run(changed(tiny_settings, tiny), [domains[0]], CPU)
    Run(changed(tiny_settings, tiny | {"training": {"micro_batch": False}}), [domains[0]], CPU)


def test_trying_the_crop_leaves_no_trace(run):
    counters = [b for name, b in run.student.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and not any(counters)
