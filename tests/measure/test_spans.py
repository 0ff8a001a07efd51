"""Where the time of a step goes: parts add up, are put where they belong, and leave the step as it was."""

import time

import pytest
import torch

from cluda_cli.engine import step
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.measure.spans import OTHER, Parts
from cluda_cli.measure.synthetic import synthetic_batch, synthetic_source
from cluda_cli.measure.workload import measurable

CPU = torch.device("cpu")


@pytest.fixture
def run(tiny_settings):
    return Run(measurable(tiny_settings, 1), synthetic_source(), CPU)


@pytest.fixture
def batch(tiny_settings):
    return synthetic_batch(tiny_settings.data, 19, torch.Generator().manual_seed(0))


def test_every_part_of_a_step_is_found_and_they_add_up(run, batch):
    parts = Parts(CPU)
    with parts.of(run):
        began = time.perf_counter()
        with parts.step():
            training_step(run, batch)
        took = time.perf_counter() - began
    assert parts.names() == [
        "views", "source/forward", "source/source", "source/feature_distance", "source/pixel_contrast",
        "source/backward", "teacher", "mixed/forward", "mixed/mixed", "mixed/pixel_contrast", "mixed/backward",
        "optimizer", "ema", OTHER,
    ]  # fmt: skip
    seconds = parts.steps[0]
    assert 0.8 * took < sum(seconds.values()) <= took
    assert seconds[OTHER] < took / 2


def test_an_inner_part_is_no_time_of_the_outer_one():
    parts = Parts(CPU)
    with parts.step():
        time.sleep(0.02)
        with parts.part("outer"):
            with parts.part("inner"):
                time.sleep(0.4)
            time.sleep(0.02)
    seconds = parts.steps[0]
    assert list(seconds) == ["outer", "inner", OTHER]
    assert seconds["inner"] >= 0.4
    assert 0.02 <= seconds["outer"] < 0.4
    assert 0.02 <= seconds[OTHER] < 0.4


@pytest.mark.parametrize(
    ("owner", "name", "part"),
    [("teacher", "update", "ema"), ("optimizer", "step", "optimizer"), ("teacher", "pseudo_labels", "teacher")],
)
def test_what_takes_longer_shows_in_its_own_part(run, batch, monkeypatch, owner, name, part):
    slow, honest = getattr(run, owner), getattr(getattr(run, owner), name)

    def late(*args):
        time.sleep(0.5)
        return honest(*args)

    monkeypatch.setattr(slow, name, late)
    parts = Parts(CPU)
    with parts.of(run), parts.step():
        training_step(run, batch)
    seconds = parts.steps[0]
    assert max(seconds, key=seconds.get) == part
    assert seconds[part] >= 0.5


def test_timing_changes_no_result_and_leaves_nothing_behind(tiny_settings, batch):
    plain, timed = (Run(measurable(tiny_settings, 1), synthetic_source(), CPU) for _ in range(2))
    before = (torch.autograd.backward, step.make_views, set(vars(timed.teacher)), set(vars(timed.optimizer)))
    parts = Parts(CPU)
    with parts.of(timed), parts.step():
        training_step(timed, batch)
    training_step(plain, batch)
    assert (torch.autograd.backward, step.make_views, set(vars(timed.teacher)), set(vars(timed.optimizer))) == before
    assert timed.forward is timed.student
    assert all("forward" not in vars(objective) for objective in timed.objectives.values())
    for one, other in zip(timed.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_exception_restores_the_step_too(run, batch):
    before = torch.autograd.backward
    with pytest.raises(KeyboardInterrupt), Parts(CPU).of(run):
        raise KeyboardInterrupt
    assert torch.autograd.backward is before
    assert "update" not in vars(run.teacher)
