"""All output of the commands: results go to stdout, everything else to stderr. Bars are for terminals only.

Rich obeys NO_COLOR, FORCE_COLOR and TERM=dumb. It is imported in functions, because importing it is slow.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluda_cli.errors import CludaError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_INTERVAL = 10.0  # seconds between progress lines without a terminal

_live: "Console | None" = None  # the console of the bar on the screen, which prints other lines above the bar
_muted = False


def mute() -> None:
    """Write nothing to stderr from now on, errors included: another process of the run writes the same."""
    global _muted
    _muted = True


def unmute() -> None:
    """Write to stderr again."""
    global _muted
    _muted = False


def stderr() -> "Console":
    """The console of the bar on the screen, else a new one, which uses the present sys.stderr."""
    from rich.console import Console

    return _live or Console(stderr=True, quiet=_muted, highlight=False, soft_wrap=True)


def stdout() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def info(text: str) -> None:
    """Print one line to stderr."""
    stderr().print(text, markup=False)


def warn(text: str) -> None:
    """Print a warning: something works, but perhaps not as the user expects."""
    stderr().print(f"warning: {text}", style="yellow", markup=False)


def error(problem: CludaError) -> None:
    """Print where the problem is, what it is, and what to do. An interrupted run is no error and gets no colour."""
    where = f"{problem.where}: " if problem.where else ""
    if isinstance(problem, Interrupted):
        info(problem.what)
    else:
        stderr().print(f"error: {where}{problem.what}", style="bold red", markup=False)
    if problem.remedy:
        stderr().print(f"  {problem.remedy}", markup=False)


def result(text: str) -> None:
    """Print one line of a result to stdout, never wrapped or styled."""
    sys.stdout.write(text + "\n")


def result_json(value: Any) -> None:
    """Print a result as JSON. Raises ValueError for NaN, which other readers refuse."""
    result(json.dumps(value, indent=2, allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """Build a table: the first column is text, the others are right-aligned numbers."""
    from rich import box
    from rich.table import Table

    built = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        built.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        built.add_row(*row)
    return built


def result_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table to stdout."""
    stdout().print(table(title, columns, rows))


def _set_live(console: "Console | None") -> None:
    global _live
    _live = console


class Progress:
    """Progress and remaining time: a bar on a terminal, elsewhere a line every few seconds."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done, self.note = what, total, done, ""
        self._first, self._began, self._printed = done, time.monotonic(), time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and not _muted:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[note]}"),
                console=stderr(), transient=True,
            )  # fmt: skip
            self._show()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, *_: object) -> None:
        self._hide()

    def _show(self) -> None:
        if self._bar:
            _set_live(self._bar.console)
            self._bar.start()

    def _hide(self) -> None:
        if self._bar:
            self._bar.stop()
            _set_live(None)

    def advance(self, note: str = "") -> None:
        """Count one more unit as done. `note` is shown beside the progress, such as the loss."""
        self.done += 1
        self.note = note or self.note
        if self._bar:
            self._bar.update(self._task, advance=1, note=self.note)
        elif time.monotonic() - self._printed > PLAIN_INTERVAL:
            self._printed = time.monotonic()
            info(f"{self.what} {self.done}/{self.total}, {duration(self.seconds_left())} left {self.note}".rstrip())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the bar while another one is shown."""
        self._hide()
        try:
            yield
        finally:
            self._show()

    def seconds_left(self) -> float:
        """Remaining time, from the mean speed so far."""
        elapsed = time.monotonic() - self._began
        return elapsed / max(self.done - self._first, 1) * (self.total - self.done)


def duration(seconds: float) -> str:
    """Format a duration: 1 h 02 min, 3 min 20 s, 12 s."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
