"""Processes that this one starts: which signals ask for a stop, and how none outlives its parent. Imports no torch."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, and what a scheduler or a terminal that closes sends before it kills."""


def heeded_signals() -> list[signal.Signals]:
    """The requests to stop that this process answers: not SIGHUP where it is ignored, as under nohup."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def end_with_parent() -> None:
    """Let this process end when the one that started it does, even by SIGKILL."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def kill_children() -> None:
    """End the processes that this one started with multiprocessing, at once."""
    for process in multiprocessing.active_children():
        process.kill()
