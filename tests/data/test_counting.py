"""Counts of the ids in labels."""

import numpy as np
import pytest

from cluda_cli.data import counting
from cluda_cli.data.counting import count_ids, count_pixels


def test_counting_leaves_ignored_pixels_out() -> None:
    assert count_pixels(np.array([[0, 0, 5], [255, 255, 18]], dtype=np.uint8)) == {0: 2, 5: 1, 18: 1}


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.random.default_rng(0).integers(0, 256, (7, 13), dtype=np.uint8)
    whole = count_ids(label)
    monkeypatch.setattr(counting, "PIXELS_AT_ONCE", 10)
    assert np.array_equal(count_ids(label), whole) and np.array_equal(whole, np.bincount(label.ravel(), minlength=256))


def test_nothing_counts_as_nothing() -> None:
    assert count_pixels(np.zeros((0, 4), np.uint8)) == {}
