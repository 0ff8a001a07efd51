"""Whether a step may count: its losses and its gradient must be finite.

On a CPU one looks before anything changes. A GPU would have to be waited for, so there the device itself leaves a
broken step without effect, and the host looks one step later, when the answer has long arrived.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cluda_cli.errors import RunError

REMEDY = "the state before this step is saved; look at the input, or resume with a lower optimizer.lr"


class Verdict:
    """On the scalars of one step, by name, the last of which is the norm of the gradient."""

    def __init__(self, step: int, watched: Mapping[str, Tensor]) -> None:
        self.step, self.names = step, list(watched)
        values = torch.stack(list(watched.values()))
        self.finite: Tensor = values.isfinite().all()
        """A boolean on the device."""
        self._values, self._arrived = values, None
        if values.device.type == "cuda":  # on its way to the host while the device works on
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def error(self) -> RunError | None:
        """What is wrong with the step, if anything; waits for its values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        broken = [name for name, value in zip(self.names, self._values.isfinite().tolist(), strict=True) if not value]
        if not broken:
            return None
        terms = ", ".join(broken[:-1] if broken[-1] == self.names[-1] and len(broken) > 1 else broken)
        return RunError(f"{terms} is not finite in step {self.step}", "training", REMEDY)
