"""Fixtures shared by the tests of the engine."""

import pytest
import torch

from cluda_cli.data.index import Index, find
from cluda_cli.engine.run import Run
from cluda_cli.models.mit import VARIANTS, Variant
from cluda_cli.settings import Settings


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and pseudo-labels are computed in float32 whatever the networks have; here that means float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def narrow_mit(monkeypatch: pytest.MonkeyPatch) -> None:
    """MiT-B0 has few channels and blocks."""
    monkeypatch.setitem(VARIANTS, "mit_b0", Variant((8, 8, 20, 32), (1, 1, 1, 2)))


@pytest.fixture
def domains(tiny_settings: Settings) -> tuple[Index, Index]:
    """Source and target of the tiny settings."""
    return find("clean", tiny_settings.data.root), find("noisy", tiny_settings.data.root)


@pytest.fixture
def run(tiny_settings: Settings, domains: tuple[Index, Index]) -> Run:
    """A run of the tiny settings before its first step."""
    return Run(tiny_settings, [domains[0]], torch.device("cpu"))
