"""Where the time of a step goes: spans add up, lie where they belong, and leave the step as it was.

The clock is a counter that every look advances by one, so nothing depends on the load of the machine.
"""

import itertools

import pytest
import torch

from cluda_cli import spans
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.measure.spans import OTHER, SpanClock
from cluda_cli.measure.synthetic import synthetic_source
from cluda_cli.measure.workload import make_measurable
from cluda_cli.spans import span

CPU = torch.device("cpu")


@pytest.fixture
def ticks(monkeypatch):
    """Seconds that pass between two looks at the clock, to be changed by a test."""
    passed = {"seconds": 1.0}
    steps = itertools.accumulate(itertools.repeat(0), lambda now, _: now + passed["seconds"], initial=0.0)
    monkeypatch.setattr("cluda_cli.measure.spans.time.perf_counter", lambda: next(steps))
    return passed


def test_every_span_of_a_step_is_found(run, batch, ticks):
    clock = SpanClock(CPU)
    with clock.time_step():
        training_step(run, batch)
    assert clock.names() == [
        "views", "source/forward", "source/source", "source/feature_distance", "source/pixel_contrast",
        "source/backward", "teacher", "mixed/forward", "mixed/mixed", "mixed/pixel_contrast", "mixed/backward",
        "optimizer", "ema", OTHER,
    ]  # fmt: skip


def test_an_inner_span_is_no_time_of_the_outer_one_and_all_add_up(ticks):
    clock = SpanClock(CPU)
    with clock.time_step(), span("outer"):
        with span("inner"):
            ticks["seconds"] = 5.0
        ticks["seconds"] = 1.0
    assert clock.steps == [{"inner": 5.0, "outer": 2.0, OTHER: 2.0}]
    assert list(clock.steps[0]) == ["outer", "inner", OTHER]


def test_timing_changes_no_result_and_leaves_nothing_behind(tiny_settings, batch):
    plain, timed = (Run(make_measurable(tiny_settings, 1), [synthetic_source()], CPU) for _ in range(2))
    with SpanClock(CPU).time_step():
        training_step(timed, batch)
    training_step(plain, batch)
    assert spans._listener is None
    for one, other in zip(timed.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_exception_ends_the_listening():
    with pytest.raises(KeyboardInterrupt), SpanClock(CPU).time_step(), span("views"):
        raise KeyboardInterrupt
    assert spans._listener is None
