"""Fixtures shared by the tests of the engine."""

import pytest
import torch

from cluda_cli.models.mit import VARIANTS, Variant


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and pseudo-labels are computed in float32 whatever the networks have; here that means float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def narrow_mit(monkeypatch: pytest.MonkeyPatch) -> None:
    """MiT-B0 has few channels and blocks."""
    monkeypatch.setitem(VARIANTS, "mit_b0", Variant((8, 8, 20, 32), (1, 1, 1, 2)))
