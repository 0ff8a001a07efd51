"""Fixtures shared by the tests of published weights."""

import pytest
import torch
from torch import Tensor

from cluda_cli.models.mit import MixTransformer


@pytest.fixture
def mit_state() -> dict[str, Tensor]:
    """A random MiT-B0 under the names of the SegFormer release."""
    torch.manual_seed(1)
    return {name: torch.randn_like(value) for name, value in MixTransformer("mit_b0").state_dict().items()}
