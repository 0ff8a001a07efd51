"""Whole runs of one method."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from cluda_cli import presets
from cluda_cli.data.index import find
from cluda_cli.data.streams import batches
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.settings import Settings

STEPS = 4
Start = Callable[..., tuple[Run, Any]]


@pytest.fixture
def start(tiny_settings: Settings) -> Start:
    """Begin a run of cross-entropy on source images and what a tree of settings adds; gives it and its batches."""

    def begin(tree: dict[str, Any], first: int = 0) -> tuple[Run, Any]:
        plain = {
            "objectives": {"mixed": False, "feature_distance": False, "pixel_contrast": False},
            "training": {"steps": STEPS},
        }
        given = presets.merge(tiny_settings.model_dump(mode="json"), presets.merge(plain, tree))
        chosen = presets.validate(given)
        source, target = find("clean", chosen.data.root), find("noisy", chosen.data.root)
        return Run(chosen, [source], torch.device("cpu")), iter(batches([source], target, chosen.data, 0, first, STEPS))

    return begin


@pytest.fixture
def assert_resume_is_exact(start: Start) -> Callable[[dict[str, Any]], None]:
    """Three steps equal one step, a resumed run and two more steps, to the last bit."""

    def compare(tree: dict[str, Any]) -> None:
        whole, stream = start(tree)
        training_step(whole, next(stream))
        resumed, rest = start(tree, first=1)
        resumed.load_state_dict(deepcopy(whole.state_dict()))
        for _ in range(2):
            training_step(whole, next(stream))
            training_step(resumed, next(rest))
        for name in ("student", "teacher", "objectives"):
            expected, found = (getattr(run, name).state_dict() for run in (whole, resumed))
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())

    return compare
