"""Noise of the types of real data, with labels about as uneven as those of streets."""

import pytest
import torch

from cluda_cli.data.index import class_frequencies, find
from cluda_cli.data.labels import CITYSCAPES
from cluda_cli.data.streams import batches
from cluda_cli.measure.synthetic import UNEVENNESS, synthetic_batch, synthetic_labels, synthetic_source


def test_synthetic_labels_are_as_uneven_as_said():
    labels = synthetic_labels(40, (32, 32), 19, torch.Generator().manual_seed(0))
    assert labels.shape == (40, 32, 32)
    shares = torch.bincount(labels.flatten().long(), minlength=19).float() / labels.numel()
    expected = torch.arange(1, 20).float() ** -UNEVENNESS
    assert torch.allclose(shares, expected / expected.sum(), atol=0.02)
    assert float((shares**2).sum()) == pytest.approx(0.25, abs=0.02)


def test_a_synthetic_batch_has_the_types_of_a_real_one(tiny_settings):
    data = tiny_settings.data
    made = synthetic_batch(data, 19, torch.Generator().manual_seed(0))
    real = next(batches([find("clean", data.root)], find("noisy", data.root), data, 0, 0, 1))
    assert made.keys() == real.keys()
    for name, crops in real.items():
        for field, other in vars(crops).items():
            one = getattr(made[name], field)
            assert (one is None and other is None) or (one.shape, one.dtype) == (other.shape, other.dtype), field


def test_the_source_has_every_class_and_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = synthetic_source()
    assert source.classes.names == tuple(c.name for c in CITYSCAPES)
    frequencies = class_frequencies([source])
    assert 0 < frequencies[18] < 0.01 < frequencies[0] < 0.5
    assert not list(tmp_path.iterdir())
