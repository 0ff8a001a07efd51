"""State files: complete or absent, and never executed."""

import os
import pickle

import pytest
import torch

from cluda_cli.engine.state_file import load_state, save_state
from cluda_cli.errors import DataError, EnvironmentProblem


def test_state_round_trips(tmp_path):
    state = {"step": 3, "best": None, "student": {"w": torch.arange(4.0)}}
    save_state(tmp_path / "resume" / "state.pt", state)
    loaded = load_state(tmp_path / "resume" / "state.pt")
    assert (loaded["step"], loaded["best"]) == (3, None)
    assert torch.equal(loaded["student"]["w"], state["student"]["w"])


def test_state_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = tmp_path / "state.pt"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="cannot be read"):
        load_state(path)
    torch.save(Evil(), path)
    with pytest.raises(DataError, match="cannot be read"):
        load_state(path)
    assert not (tmp_path / "executed").exists()


def test_missing_and_damaged_state_are_told_apart(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(DataError, match="no saved state"):
        load_state(path)
    save_state(path, {"step": 3, "student": {"w": torch.zeros(1000)}})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="saved state cannot be read"):
        load_state(path)


def test_a_full_disk_is_one_clear_message_and_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "state.pt"
    save_state(path, {"step": 3})
    old = path.read_bytes()
    with full_disk(), pytest.raises((EnvironmentProblem, OSError)) as failure:
        save_state(path, {"step": 4, "student": {"w": torch.zeros(100_000)}})
    assert "File too large" in str(failure.value) or "cannot be written" in str(failure.value)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
