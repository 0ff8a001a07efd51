"""The device that a name stands for."""

import pytest
import torch

from cluda_cli.errors import EnvironmentProblem
from cluda_cli.inference.device import pick_device


@pytest.mark.parametrize(("available", "kind"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, available: bool, kind: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("auto") == torch.device(kind)


def test_a_named_device_is_taken() -> None:
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["toaster", "cuda:99", "meta", ""])
def test_a_device_that_cannot_be_used_is_an_environment_problem(name: str) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        pick_device(name)
    assert caught.value.what.startswith(f'device "{name}" cannot be used (')
    assert "\n" not in caught.value.what and "--device auto" in caught.value.remedy
