"""The moving average of a small module, such as the projection head of an objective."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from cluda_cli.distributed import collectives


class MovingAverage(nn.Module):
    """A module whose weights follow those of `module`: what the teacher is to the student.

    The weights are buffers: they are saved, no optimizer moves them, and every rank has them whole where parameters
    are sharded.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._followed = (module,)  # torch does not register what a tuple holds: it is part of whoever trains it
        for name, parameter in module.named_parameters():
            self.register_buffer(name.replace(".", "_"), parameter.detach().clone())

    def forward(self, *inputs: Any) -> Any:
        """What the followed module makes of its inputs with the averaged weights.

        Its batch norms normalise as in its own mode, and their running statistics do not see these inputs.
        """
        followed = self._followed[0]
        tensors = {name: buffer.clone() for name, buffer in followed.named_buffers()}
        names = [name for name, _ in followed.named_parameters()]
        return functional_call(followed, tensors | dict(zip(names, self.buffers(), strict=True)), inputs)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Keep the share `decay` of the average, and take the rest from the module as it is. All ranks must call it."""
        for own, parameter in zip(self.buffers(), self._followed[0].parameters(), strict=True):
            own.lerp_(collectives.gather_tensor(parameter), 1 - decay)
