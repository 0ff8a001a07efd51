"""How the time of a training step divides among its spans: a clock that listens to them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cluda_cli.spans import listening

OTHER = "other"
"""The time of a step outside of all spans: clearing gradients, their norm, the check of the terms."""


def wait_for_device(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class SpanClock:
    """Seconds per step and span. The time of an inner span does not count for the outer one, so spans add up.

    The device is waited for wherever a span begins or ends, so on a GPU the steps take longer than without.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []
        """For each step, span -> seconds, in the order in which the spans ended first; `OTHER` comes last."""
        self._open: list[str] = []
        self._last = 0.0

    @contextmanager
    def time_step(self) -> Iterator[None]:
        """Time a step and the spans in it."""
        wait_for_device(self.device)
        self.steps.append({})
        self._open, self._last = [OTHER], time.perf_counter()
        with listening(self._time_span):
            yield
        self._credit()
        self.steps[-1][OTHER] = self.steps[-1].pop(OTHER)

    def names(self) -> list[str]:
        """Every span that any step had, in order."""
        found = dict.fromkeys(name for seconds in self.steps for name in seconds if name != OTHER)
        return [*found, OTHER]

    @contextmanager
    def _time_span(self, name: str) -> Iterator[None]:
        self._credit()
        self._open.append(name)
        try:
            yield
        finally:
            self._credit()
            self._open.pop()

    def _credit(self) -> None:
        """Add the time since the last call to the innermost open span."""
        wait_for_device(self.device)
        now = time.perf_counter()
        seconds, name = self.steps[-1], self._open[-1]
        seconds[name] = seconds.get(name, 0.0) + now - self._last
        self._last = now
