"""All output of the commands: results go to stdout, everything else to stderr. Bars are for terminals only.

Control characters, as in a file name, are shown as escapes, and nothing is read as markup. A message that nobody can
receive any more, because the terminal or the pipe of stderr is gone, is dropped: a run goes on without it.
Rich obeys NO_COLOR, FORCE_COLOR and TERM=dumb. It is imported in functions, because importing it is slow.
"""

import io
import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cluda_cli.errors import CludaError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_INTERVAL = 10.0  # seconds between progress lines without a terminal
HIDDEN = {"Cc", "Cs"}  # Unicode categories of what is shown as an escape: control characters, halves of characters

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

    if _live:
        return _live
    console = Console(stderr=True, quiet=_muted, highlight=False, soft_wrap=True)
    console.on_broken_pipe = _leave_stderr  # type: ignore[method-assign]  # rich's own ends the process
    return console


def _leave_stderr() -> None:
    """Nobody reads stderr any more: what is written from now on goes nowhere."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def stdout() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def open_streams() -> None:
    """Stand in for standard streams that the shell closed, and print what their encoding lacks as escapes.

    Otherwise the next file that is opened would get the number of a closed stream, and what a library prints.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def escape(text: str) -> str:
    """Text whose control characters, line breaks included, are written as in Python, such as \\x1b."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN else c for c in text)


def info(text: str) -> None:
    """Print a message to stderr."""
    _say(text)


def warn(text: str) -> None:
    """Print a warning: something works, but perhaps not as the user expects."""
    _say(f"warning: {text}", "yellow")


def error(problem: CludaError) -> None:
    """Print where the problem is, what it is, and what to do. An interrupted run is no error and gets no colour."""
    where = f"{escape(problem.where)}: " if problem.where else ""
    if isinstance(problem, Interrupted):
        info(problem.what)
    else:
        _say(f"error: {where}{problem.what}", "bold red")
    if problem.remedy:
        _say(f"  {problem.remedy}")


def _say(text: str, style: str = "") -> None:
    """Print lines to stderr, if it can still be written."""
    try:
        stderr().print(_escape_lines(text), style=style, markup=False, emoji=False)
    except OSError:  # the terminal is gone
        _leave_stderr()


def _escape_lines(text: str) -> str:
    return "\n".join(map(escape, text.split("\n")))


def result(text: str) -> None:
    """Print a result to stdout, never wrapped or styled."""
    _give(lambda: sys.stdout.write(_escape_lines(text) + "\n"))


def _give(write: Callable[[], object]) -> None:
    """Write to stdout at once. Raises OSError that names it if it cannot be written, as on a full disk."""
    try:
        write()
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def result_json(value: Any) -> None:
    """Print a result as JSON. Raises ValueError for NaN, which other readers refuse."""
    result(json.dumps(value, indent=2, allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """Build a table: the first column is text, the others are right-aligned numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    built = Table(title=Text(escape(title)) if title else None, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        built.add_column(Text(escape(column)), justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        built.add_row(*(Text(escape(cell)) for cell in row))
    return built


def result_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table to stdout."""
    built = table(title, columns, rows)
    _give(lambda: stdout().print(built))


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
                progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
                progress.MofNCompleteColumn(), progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}", markup=False),
                console=stderr(), transient=True,
            )  # fmt: skip
            self._show()
            self._task = self._bar.add_task(escape(self.what), total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, *_: object) -> None:
        self._hide()

    def _show(self) -> None:
        if self._bar:
            _set_live(self._bar.console)
            with suppress(OSError):
                self._bar.start()

    def _hide(self) -> None:
        if self._bar:
            _set_live(None)
            with suppress(OSError):
                self._bar.stop()

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
