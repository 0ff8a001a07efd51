"""The file of a run's resumable state. It is never unpickled: reading it executes nothing."""

from pathlib import Path
from typing import Any

import torch

from cluda_cli.errors import DataError, EnvironmentProblem, first_line
from cluda_cli.files import atomic
from cluda_cli.inference.checksum import checksum

REMEDY = "restore a copy, or start the run again with --overwrite"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write resumable state and its checksum atomically: only a complete file replaces the previous one.

    Raises EnvironmentProblem or OSError if the file cannot be written.
    """
    try:
        with atomic(path) as temporary:
            torch.save({"state": state, "checksum": checksum(state)}, temporary)
    except RuntimeError as error:  # torch's, on a full disk
        what = f"cannot be written ({first_line(error)})"
        raise EnvironmentProblem(what, path, "check disk space and permissions") from error


def load_state(path: Path) -> dict[str, Any]:
    """Read resumable state into main memory. Raises DataError if the file is missing or damaged.

    Files of earlier versions have no checksum.
    """
    if not path.is_file():
        raise DataError("no saved state", path, "start the run again with --overwrite")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if "state" not in content:
            if not {"student", "optimizer", "step"} <= content.keys():
                raise ValueError("its entries are damaged")
            return content
        state: dict[str, Any] = content["state"]
        damaged = checksum(state) != content.get("checksum")
    except Exception as error:  # torch.load raises many kinds for damaged files
        raise DataError(f"saved state cannot be read ({first_line(error)})", path, REMEDY) from error
    if damaged:
        raise DataError("saved state was damaged after it was written: its checksum is another", path, REMEDY)
    return state
