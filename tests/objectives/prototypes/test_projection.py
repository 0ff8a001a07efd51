"""The projection head of SePiCo."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli.objectives.prototypes.projection import Projection

NAMES = {"convs.0": "fuse", "convs.1": "project"}


def build(tensors: dict[str, Tensor], dtype: torch.dtype) -> Projection:
    """The head with the parameters and the running statistics of the reference."""
    head = Projection([4, 8, 12, 16], 16).to(dtype)
    state = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    own = head.state_dict() | {f"{NAMES[name[:7]]}{name[7:]}": value for name, value in state.items()}
    head.load_state_dict(own)
    return head


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_as_the_reference(dtype: torch.dtype, golden: Any) -> None:
    tensors, description = golden("20_proto/p15_projection_head")
    head, bounds = build(tensors, dtype), description["tolerance_demanded"]["bounds"]
    maps = [tensors[f"in.enc{i}"].to(dtype).requires_grad_() for i in range(1, 5)]
    found: dict[str, Tensor] = {"eval.output": head.eval()(maps)}
    found["train.output"] = head.train()(maps)
    (found["train.output"] * tensors["in.cotangent"].to(dtype)).sum().backward()
    found |= {f"train.grad_enc{i}": features.grad for i, features in enumerate(maps, 1) if features.grad is not None}
    learned = {"convs.0.conv.weight": head.fuse.conv.weight, "convs.1.bn.weight": head.project.bn.weight}
    found |= {f"train.grad_param.{name}": p.grad for name, p in learned.items() if p.grad is not None}
    found["after.convs.0.bn.running_mean"] = head.fuse.bn.running_mean
    found["after.convs.1.bn.running_var"] = head.project.bn.running_var
    assert found.keys() == bounds.keys()
    for key, actual in found.items():
        expected = tensors[f"out64.{key}" if f"out64.{key}" in tensors else f"out.{key}"]
        bound = bounds[key]["float64_max_abs" if dtype == torch.float64 else "float32_max_abs"]
        assert (actual.detach() - expected).abs().max() <= bound, key


def test_features_have_length_one_and_no_negative_channel() -> None:
    torch.manual_seed(0)
    head = Projection([3, 5], 12)
    features = head([torch.randn(2, 3, 8, 6), torch.randn(2, 5, 4, 3)])
    assert features.shape == (2, 12, 8, 6)
    assert (features >= 0).all()
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2, 8, 6))
