"""Errors for users. Each says what is wrong, where, and what to do. Its class sets the exit code."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class CludaError(Exception):
    """A problem with one clear cause.

    `what` is the problem, `where` the file or setting, `remedy` what to do about it. The command line prints the three
    as one message, without a traceback, and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, what: str, where: object = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, str(where), remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} -> {self.remedy}" if self.remedy else text


def first_line(error: BaseException) -> str:
    """First line of the text of another library's exception, or its class if there is no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's or numpy's, torch's on a GPU, or torch's on a CPU, which has no class."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def nearest(name: str, choices: Sequence[str]) -> str:
    """The choice that is most similar to a misspelt name, or "" if none is similar."""
    return next(iter(difflib.get_close_matches(name, choices, n=1, cutoff=0.6)), "")


class RunError(CludaError):
    """A run failed: its loss is not finite, or its saved state does not fit."""

    exit_code = 1


class SettingsError(CludaError):
    """A setting, preset or command-line option is wrong."""

    exit_code = 2


class DataError(CludaError):
    """A dataset, image, label or weights file is missing or wrong."""

    exit_code = 3


class EnvironmentProblem(CludaError):  # noqa: N818  "EnvironmentError" is a Python built-in
    """The machine lacks something: a device, a package, network access to weights."""

    exit_code = 4


def out_of_memory(size: tuple[int, int], path: Path) -> EnvironmentProblem:
    """The problem that memory ran out on an image of that height and width, in evaluation or prediction."""
    remedy = "close other programs, store the image smaller, or on a GPU take --device cpu"
    return EnvironmentProblem(f"memory ran out on {size[0]} x {size[1]} pixels", path, remedy)


@contextmanager
def name_out_of_memory(size: tuple[int, int], path: Path) -> Iterator[None]:
    """Raise `out_of_memory` if memory runs out in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(size, path) from None


class Interrupted(CludaError):  # noqa: N818  stopping a run on request is no error
    """The user or the scheduler stopped the run."""

    exit_code = 130
