"""Start the processes of a run on several devices, and find out which of them this one is. Imports no torch.

Each process is told its place by the environment variables that torchrun uses, so both ways to start are one. This one
waits for a step and a save to end where torchrun would kill after half a minute, and prints one error, not a report.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from cluda_cli.errors import EnvironmentProblem

GRACE = 60.0
"""Seconds that the others get to end by themselves once a process has failed: the first may be saving."""
HASTE = 5.0
"""The same when the user has asked twice."""
LAUNCHER = "CLUDA_LAUNCHER"  # environment variable with the id of the process that started this one


@dataclass(frozen=True)
class Place:
    """Which one of how many processes this is."""

    rank: int
    """0 .. world_size - 1; process 0 writes files and talks."""
    local_rank: int
    """The same among the processes of this machine: the number of its device."""
    world_size: int
    talks: bool
    """Whether what it says before the run begins is for the user: with `--devices`, the launcher has said it."""


def place() -> Place | None:
    """The place that torchrun or `--devices` gave to this process; None for a run of one process."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    if any(name not in os.environ for name in names) or int(os.environ["WORLD_SIZE"]) < 2:
        return None
    rank, local_rank, world_size = (int(os.environ[name]) for name in names[:3])
    return Place(rank, local_rank, world_size, talks=not rank and LAUNCHER not in os.environ)


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m cluda_cli <arguments>` in `count` processes of this machine; gives their exit code.

    Ctrl-C and SIGTERM are passed on. Raises EnvironmentProblem if one of them is killed.
    """
    shared = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        LAUNCHER: str(os.getpid()),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    command = [sys.executable, "-m", "cluda_cli", *arguments]
    with _Processes() as processes:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.running.append(subprocess.Popen(command, env=shared | own))
        return processes.wait()


class _Processes:
    """Processes that end together."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self._requests = 0  # of the user, to stop

    def __enter__(self) -> "_Processes":
        self._previous = {n: signal.signal(n, self._pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.kill()  # does nothing to one that has ended
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._requests += 1
        for process in self.running:
            process.send_signal(number)

    def wait(self) -> int:
        """Until all have ended; what fails takes the others with it. Gives the largest exit code.

        A process that loses its peers ends with 1, so that a larger code is that of the cause.
        """
        failed_at: float | None = None
        while any(process.poll() is None for process in self.running):
            codes = [process.returncode for process in self.running if process.returncode]
            if codes:
                failed_at = failed_at or time.monotonic()
                grace = 0.0 if min(codes) < 0 else HASTE if self._requests > 1 else GRACE
                if time.monotonic() - failed_at >= grace:
                    break
            time.sleep(0.05)
        codes = [process.poll() for process in self.running]
        killed = next(((rank, code) for rank, code in enumerate(codes) if code is not None and code < 0), None)
        if killed and not self._requests:
            name = signal.Signals(-killed[1]).name
            what = f"process {killed[0]} of {len(codes)} was ended by {name}"
            raise EnvironmentProblem(what, "--devices", "memory may be short; go on with --resume")
        return 130 if self._requests and any(codes) else max(code or 0 for code in codes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
