"""Times, memory and the search for the largest batch."""

import pytest
import torch

from cluda_cli.measure import costs
from cluda_cli.measure.costs import MemoryWatch, Spread, find_largest_batch, step_fits, time_steps

CPU = torch.device("cpu")


def test_spread():
    assert Spread.of([4.0, 1.0, 2.0, 9.0]) == Spread(median=3.0, mean=4.0, least=1.0, most=9.0)


@pytest.mark.parametrize("start", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 11, 15])
def test_the_largest_batch_is_found_exactly_while_batches_are_small(start, limit):
    tried = []
    assert find_largest_batch(lambda images: tried.append(images) or images <= limit, start) == limit
    assert len(tried) == len(set(tried))
    assert min(tried) > 0


@pytest.mark.parametrize("limit", [33, 100, 255])
def test_large_batches_are_found_to_within_an_eighth(limit):
    found = find_largest_batch(lambda images: images <= limit, 2)
    assert limit * 7 / 8 - 1 <= found <= limit


def test_no_batch_beyond_the_bound_is_tried():
    tried = []
    assert find_largest_batch(lambda images: tried.append(images) or True, 3, most=20) == 20
    assert tried == [3, 6, 12, 20]


def test_a_step_of_another_batch_size_is_tried(run, batch, monkeypatch):
    seen = []

    def step(run, batch):
        seen.append([len(batch["source"].image), len(batch["target"].valid)])
        if len(batch["source"].image) > 3:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(costs, "training_step", step)
    assert step_fits(run, batch, 3)
    assert not step_fits(run, batch, 5)
    assert seen == [[3, 3], [5, 5]]


def test_steps_are_timed_one_by_one(run, batch):
    done = []
    times = time_steps(run, iter([batch] * 2), 2, lambda: done.append(run.step))
    assert done == [1, 2]
    assert len(times) == 2
    assert min(times) > 0


def test_main_memory_is_the_growth_of_the_peak(monkeypatch):
    assert 2**25 < costs._peak_resident() < 2**40  # bytes: torch alone takes more than 32 MiB
    peaks = iter([100, 350])
    monkeypatch.setattr(costs, "_peak_resident", lambda: next(peaks))
    assert MemoryWatch(CPU).read().peak == 250


def test_a_system_without_the_count_of_memory_is_no_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "resource", None)
    assert MemoryWatch(CPU).read().peak is None
