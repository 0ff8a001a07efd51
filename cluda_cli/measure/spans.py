"""Where the time of training steps goes: the step as it is, with clocks around what it calls.

Nothing is timed inside the step itself. For as long as a measurement lasts, the functions and methods that the step
calls are replaced by ones that look at the clock, call the original and look again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cluda_cli.adaptation.views import View
from cluda_cli.engine import step
from cluda_cli.engine.run import Run

OTHER = "other"
"""The part of a step that lies in no other: clearing gradients, their norm, the look at the terms."""


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Parts:
    """Seconds per step and part. While an inner part runs the clock of the outer one stands, so parts add up.

    The device is waited for wherever a part begins or ends, so on a GPU the steps take longer than without.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []
        """For each step, part -> seconds, in the order in which the parts ended first; `OTHER` comes last."""
        self._running: list[str] = []
        self._view = ""
        self._mark = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a step; its time outside of all parts is that of `OTHER`."""
        synchronise(self.device)
        self.steps.append({})
        self._running, self._mark = [OTHER], time.perf_counter()
        yield
        self._credit()
        self.steps[-1][OTHER] = self.steps[-1].pop(OTHER)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of a step."""
        self._credit()
        self._running.append(name)
        yield
        self._credit()
        self._running.pop()

    def names(self) -> list[str]:
        """Every part that any step had, in order."""
        found = dict.fromkeys(name for seconds in self.steps for name in seconds if name != OTHER)
        return [*found, OTHER]

    def _credit(self) -> None:
        """Give the running part the time since the last look."""
        synchronise(self.device)
        now = time.perf_counter()
        seconds, name = self.steps[-1], self._running[-1]
        seconds[name] = seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    @contextmanager
    def of(self, run: Run) -> Iterator[None]:
        """Have the training steps of this run, and no other work, timed by part.

        The parts are `views` (mixing, augmentation), `teacher` (pseudo-labels), `optimizer`, `ema` (the teacher's
        update), and per view `view/forward`, `view/objective` (its forward) and `view/backward`.
        """
        with ExitStack() as undo:
            undo.callback(_replace(step, "make_views", self._views(step.make_views)))
            undo.callback(_replace(run, "forward", self._timed(run.forward, "forward", of_view=True)))
            for name, objective in run.objectives.items():
                undo.callback(_replace(objective, "forward", self._timed(objective.forward, name, of_view=True)))
            # Tensor.backward calls this one.
            backward = self._timed(torch.autograd.backward, "backward", of_view=True)
            undo.callback(_replace(torch.autograd, "backward", backward))
            undo.callback(_replace(run.teacher, "pseudo_labels", self._timed(run.teacher.pseudo_labels, "teacher")))
            undo.callback(_replace(run.optimizer, "step", self._timed(run.optimizer.step, "optimizer")))
            undo.callback(_replace(run.teacher, "update", self._timed(run.teacher.update, "ema")))
            yield

    def _timed(self, function: Callable[..., Any], name: str, of_view: bool = False) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(f"{self._view}/{name}" if of_view else name):
                return function(*args, **kwargs)

        return timed

    def _views(self, make_views: Callable[..., Iterator[View]]) -> Callable[..., Iterator[View]]:
        def timed(*args: Any, **kwargs: Any) -> Iterator[View]:
            views = make_views(*args, **kwargs)
            while True:
                with self.part("views"):
                    view = next(views, None)
                if view is None:
                    return
                self._view = view.name
                yield view

        return timed


def _replace(owner: Any, name: str, value: Callable[..., Any]) -> Callable[[], None]:
    """Set an attribute of a module or an object; call the result to have it as it was."""
    own = vars(owner)
    if name in own:
        before = own[name]
        setattr(owner, name, value)
        return lambda: setattr(owner, name, before)
    setattr(owner, name, value)  # hides the method of the class
    return lambda: delattr(owner, name)
