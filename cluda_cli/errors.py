"""What goes wrong for users. Each error says what is wrong, where, and what to do; the class sets the exit code."""

import difflib
from collections.abc import Sequence


class CludaError(Exception):
    """A problem with one clear cause.

    `what` states the problem, `where` the file or setting, `remedy` what to do about it. The command line prints
    the three as one message and exits with `exit_code`; a traceback never reaches the user.
    """

    exit_code = 1

    def __init__(self, what: str, where: object = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, str(where), remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} -> {self.remedy}" if self.remedy else text


def first_line(error: BaseException) -> str:
    """What another library's exception says, for one-line messages."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, choices: Sequence[str]) -> str:
    """The choice that a misspelt name probably means, or ""."""
    return next(iter(difflib.get_close_matches(name, choices, n=1, cutoff=0.6)), "")


class RunError(CludaError):
    """A run failed: a non-finite loss, state that does not fit."""

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


class Interrupted(CludaError):  # noqa: N818  stopping a run on request is no error
    """The user or the scheduler stopped the run after its state was saved."""

    exit_code = 130
