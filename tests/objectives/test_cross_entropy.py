"""Cross-entropy counts every pixel in its mean, whatever its weight."""

import pytest
import torch

from cluda_cli.objectives.cross_entropy import weighted_cross_entropy


def test_ignored_and_weightless_pixels_stay_in_the_mean() -> None:
    logits = torch.zeros(1, 4, 1, 4)
    label = torch.tensor([[[0, 1, 255, 3]]])
    weight = torch.tensor([[[1.0, 0.5, 1.0, 0.0]]])
    expected = (1.0 + 0.5) * torch.tensor(4.0).log() / 4
    torch.testing.assert_close(weighted_cross_entropy(logits, label, weight), expected)


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["weighted", "plain", "all_ignored"])
def test_reference_vectors(case: str, dtype: torch.dtype, golden) -> None:
    tensors, description = golden("13_mic/weighted_cross_entropy")
    bounds = description["tolerance_demanded"]["bounds"]
    logits = tensors["in.logits"].to(dtype).requires_grad_()
    label = tensors["in.labels"][:, 0].long()
    weight = tensors["in.weight"].to(dtype)
    if case == "all_ignored":
        label = torch.full_like(label, 255)
    value = weighted_cross_entropy(logits, label, weight if case == "weighted" else torch.ones_like(weight))
    value.backward()
    bits = "float64_max_abs" if dtype == torch.float64 else "float32_max_abs"
    for key, actual in {f"{case}.loss": value, f"{case}.grad_logits": logits.grad}.items():
        expected = tensors[f"out64.{key}"].view(actual.shape)
        assert (actual.detach() - expected).abs().max() <= bounds[key][bits]
