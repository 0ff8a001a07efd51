"""Spans reach whoever listens, and nobody else."""

from contextlib import contextmanager

from cluda_cli.spans import listening, span


def test_spans_are_told_in_order_and_only_while_somebody_listens():
    told = []

    @contextmanager
    def listener(name):
        told.append(f"+{name}")
        yield
        told.append(f"-{name}")

    with span("before"):
        pass
    with listening(listener), span("outer"), span("inner"):
        pass
    with span("after"):
        pass
    assert told == ["+outer", "+inner", "-inner", "-outer"]
