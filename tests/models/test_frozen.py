"""A frozen helper network is neither parameter nor state, and goes where its holder goes."""

import torch
from torch import nn

from cluda_cli.models.frozen import Frozen


def holder() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"helper": Frozen(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)))})


def test_it_is_in_no_state_and_no_optimizer() -> None:
    module = holder()
    assert not module.state_dict() and not list(module.parameters()) and not list(module.buffers())


def test_it_stays_in_evaluation_mode_and_gives_no_gradient() -> None:
    module = holder().train()
    inputs = torch.ones(4, 3, requires_grad=True)
    first, second = module["helper"](inputs), module["helper"](inputs)
    assert torch.equal(first, second) and not first.requires_grad


def test_it_moves_with_its_holder() -> None:
    assert holder().double()["helper"](torch.ones(4, 3).double()).dtype == torch.float64
