"""Start the ranks of a run on this machine with torch.multiprocessing.

Each process gets the environment variables that torchrun sets, so a run does not know which of the two started it.
docs/decisions/0009-several-devices.md says why `--devices` does not call torchrun.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import active_children, parent_process, resource_tracker
from types import FrameType

from torch.multiprocessing import ProcessContext, ProcessExitedException, start_processes

from cluda_cli.distributed.children import STOP_SIGNALS, heeded_signals
from cluda_cli.distributed.place import usable_cores
from cluda_cli.errors import EnvironmentProblem

GRACE = 60.0
"""Seconds that the other ranks have to end by themselves once one has failed, because rank 0 may be saving."""
SHORT_GRACE = 5.0
"""Seconds that the ranks have to end by themselves after the second Ctrl-C."""


def launch(count: int, command: Callable[[], None]) -> int:
    """Run `command`, which can be pickled, in `count` processes of this machine; return their common exit code.

    Ctrl-C and other requests to stop are passed on to all ranks. Raises EnvironmentProblem if a rank is killed.
    """
    os.environ.update(
        WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(usable_cores() // count, 1)))
    requests: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        requests.append(number)
        for process in active_children():
            if process.pid:
                os.kill(process.pid, number)
        if len(requests) == 2:
            raise KeyboardInterrupt

    resource_tracker.ensure_running()  # it unblocks signals when it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the ranks inherit this until they can handle a signal
    context = start_processes(_run_rank, (command,), count, join=False)
    for number in heeded_signals():
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    _join(context)
    return _exit_code([process.exitcode or 0 for process in context.processes], stopped=bool(requests))


def _run_rank(rank: int, command: Callable[[], None]) -> None:
    """Run the command as one rank. It prints its own traceback: torch keeps only that of the rank that ends first."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    launcher = parent_process()
    if launcher and not launcher.is_alive():  # it died before torch asked the kernel for a SIGINT at its death
        sys.exit(1)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _join(context: ProcessContext) -> None:
    """Wait until all ranks have ended; a rank that fails, and a second Ctrl-C, end the others."""
    try:
        while not context.join(grace_period=GRACE):
            pass
    except ProcessExitedException:
        pass  # torch reports the first exit code only; `launch` compares all of them
    except KeyboardInterrupt:
        deadline = time.monotonic() + SHORT_GRACE
        for process in context.processes:
            process.join(max(deadline - time.monotonic(), 0))
            process.kill()
            process.join()


def _exit_code(codes: Sequence[int], stopped: bool) -> int:
    """The largest exit code: a rank that loses its peers ends with 1, so that a larger one is that of the cause.

    Raises EnvironmentProblem if a signal ended a rank and no other rank has reported an error.
    """
    if stopped and any(codes):
        return next((code for code in codes if 1 < code < 130), 130)  # a save that failed is no interruption
    killed = next((rank for rank, code in enumerate(codes) if code < 0), None)
    if killed is not None and max(codes) <= 1:
        what = f"process {killed} of {len(codes)} was ended by {signal.Signals(-codes[killed]).name}"
        raise EnvironmentProblem(what, "--devices", "memory may be short; go on with --resume")
    return max(codes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
