"""Processes that this one starts: signals that are heeded, and how they end."""

import multiprocessing
import signal
import time

from cluda_cli.distributed.children import STOP_SIGNALS, heeded_signals, kill_children


def test_a_hangup_that_is_ignored_is_not_heeded():
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert heeded_signals() == list(STOP_SIGNALS)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert heeded_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_children_are_ended_at_once():
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,))
    child.start()
    kill_children()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
