"""A run to be measured, and a batch for it."""

import pytest
import torch

from cluda_cli.engine.run import Run
from cluda_cli.measure.synthetic import synthetic_batch, synthetic_source
from cluda_cli.measure.workload import make_measurable


@pytest.fixture
def run(tiny_settings):
    return Run(make_measurable(tiny_settings, 1), [synthetic_source()], torch.device("cpu"))


@pytest.fixture
def batch(tiny_settings):
    return synthetic_batch(tiny_settings.data, 19, torch.Generator().manual_seed(0))
