"""Named spans of a training step, free unless somebody listens.

The step says where a span begins and ends; `measure/spans.py` listens with a clock. Imports no torch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Listener = Callable[[str], AbstractContextManager[None]]

_listener: Listener | None = None


def span(name: str) -> AbstractContextManager[None]:
    """The block is the part `name` of a step; spans nest, and the inner one has the time."""
    return _listener(name) if _listener else nullcontext()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hand every span to `listener` for the length of the block."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
