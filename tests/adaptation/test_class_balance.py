"""Weights of classes against their closed form."""

import pytest
import torch

from cluda_cli.adaptation.class_balance import class_weights


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_a_pixel_weighs_a_power_of_the_frequency_and_the_mean_is_one(exponent: float) -> None:
    frequencies = [0.7, 0.2, 0.1]
    weights = class_weights(frequencies, exponent)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[1] / weights[0], torch.tensor((0.7 / 0.2) ** exponent))
    torch.testing.assert_close(weights[2] / weights[0], torch.tensor((0.7 / 0.1) ** exponent))
    torch.testing.assert_close((weights * torch.tensor(frequencies)).sum(), torch.tensor(1.0))


def test_exponent_zero_weighs_all_classes_alike() -> None:
    assert class_weights([0.9, 0.1, 0.0], 0.0).tolist() == [1.0, 1.0, 1.0]


def test_a_class_without_pixels_weighs_as_much_as_the_rarest() -> None:
    weights = class_weights([0.9, 0.1, 0.0], 0.5)
    assert weights[2] == weights[1] and bool(weights.isfinite().all())
