"""The moving average of a head: what it computes, and what it is to whoever holds it."""

import torch
from torch import nn

from cluda_cli.models.average import MovingAverage


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.average = MovingAverage(self.head)


def test_it_begins_as_the_module_and_follows_it() -> None:
    holder, inputs = Holder(), torch.randn(5, 3)
    first = [parameter.detach().clone() for parameter in holder.head.parameters()]
    assert torch.equal(holder.average(inputs), holder.head(inputs))
    with torch.no_grad():
        for parameter in holder.head.parameters():
            parameter += 1
    holder.average.update(0.75)
    for own, before in zip(holder.average.buffers(), first, strict=True):
        torch.testing.assert_close(own, before + 0.25)
    expected = Holder().head
    expected.load_state_dict(dict(zip(expected.state_dict(), holder.average.buffers(), strict=True)))
    torch.testing.assert_close(holder.average(inputs), expected(inputs))


def test_its_weights_are_state_that_no_optimizer_moves() -> None:
    holder, other, inputs = Holder(), Holder(), torch.randn(5, 3)
    assert len(list(holder.parameters())) == 4
    other.load_state_dict(holder.state_dict())
    assert torch.equal(other.average(inputs), holder.average(inputs))
    assert next(holder.double().average.buffers()).dtype == torch.float64


def test_batch_norms_normalise_with_its_inputs_and_forget_them() -> None:
    module, inputs = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(5, 3)
    average = MovingAverage(module)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    outputs = average(inputs)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    assert torch.equal(outputs, module(inputs))
