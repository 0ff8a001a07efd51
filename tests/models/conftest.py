"""Helpers shared by the tests of networks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FillByFormula = Callable[[nn.Module, Callable[[str], str]], None]
FormulaImages = Callable[[int, int, int], Tensor]
CheckMoments = Callable[..., None]
CheckBounds = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Any], torch.dtype], None]


@pytest.fixture
def fill_by_formula() -> FillByFormula:
    """Fill parameters by rank of their name: element i of the k-th is 0.05 sin(0.1 i + 0.37 k), norm weights + 1."""

    def fill(network: nn.Module, full_name: Callable[[str], str]) -> None:
        named = sorted((full_name(name), parameter) for name, parameter in network.named_parameters())
        for k, (name, parameter) in enumerate(named):
            values = 0.05 * torch.sin(0.1 * torch.arange(parameter.numel(), dtype=parameter.dtype) + 0.37 * k)
            offset = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.data.copy_((values + offset).view_as(parameter))

    return fill


@pytest.fixture
def formula_images() -> FormulaImages:
    """Images of a count, height and width, float64."""

    def images(count: int, height: int, width: int) -> Tensor:
        sides = (torch.arange(n, dtype=torch.float64) for n in (count, 3, height, width))
        b, c, h, w = torch.meshgrid(*sides, indexing="ij")
        return torch.sin(0.05 * h + 0.07 * w + 0.9 * c + 0.3 * b + 0.001 * h * w)

    return images


@pytest.fixture
def formula_image(formula_images: FormulaImages) -> Tensor:
    """2 x 3 x 64 x 96, float64."""
    return formula_images(2, 64, 96)


@pytest.fixture
def check_moments() -> CheckMoments:
    """Compare with a measured row "mean std first second third last", given to nine decimals."""

    def check(found: Tensor, shape: tuple[int, ...], row: str, tolerance: float = 1e-8) -> None:
        flat = found.reshape(-1)
        assert tuple(found.shape) == shape
        values = [flat.mean(), flat.std(correction=0), *flat[:3], flat[-1]]
        for value, expected in zip(values, row.split(), strict=True):
            assert math.isclose(value.item(), float(expected), rel_tol=0, abs_tol=tolerance)

    return check


@pytest.fixture
def check_bounds() -> CheckBounds:
    """Compare tensors with the vectors of the same names, within the bounds that their description demands."""

    def check(
        found: Mapping[str, Tensor], vectors: Mapping[str, Tensor], description: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        bounds = description["tolerance_demanded"]["bounds"]
        kind = "float64_max_abs" if dtype == torch.float64 else "float32_max_abs"
        assert found.keys() == bounds.keys()
        for name, value in found.items():
            expected = vectors[f"out64.{name}" if f"out64.{name}" in vectors else f"out.{name}"]
            difference = (value.double() - expected).abs().max().item()
            assert difference <= bounds[name][kind], name

    return check
