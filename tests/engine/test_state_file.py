"""State files: complete or absent, and never executed."""

import os
import pickle
import random

import pytest
import torch

from cluda_cli.engine.state_file import load_state, save_state
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.inference.checksum import checksum


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


def test_every_change_of_a_byte_is_noticed_or_changes_nothing(tmp_path):
    path, draw = tmp_path / "state.pt", random.Random(0)
    state = {"step": 3, "best": {"miou": 1.5, "step": 2}, "student": {"w": torch.arange(64.0)}, "optimizer": [1, (2,)]}
    save_state(path, state)
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert checksum(load_state(path)) == checksum(state)  # as in the zip's padding and times
        except DataError:
            refused += 1
    assert refused > 20
    damaged = bytearray(whole)
    damaged[whole.index(torch.arange(64.0).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged after it was written"):
        load_state(path)


def test_a_state_of_an_earlier_version_has_no_checksum_and_is_read(tmp_path):
    state = {"student": {}, "optimizer": {}, "step": 3}
    torch.save(state, tmp_path / "state.pt")
    assert load_state(tmp_path / "state.pt") == state
    torch.save({"stade": state, "checksum": "0"}, tmp_path / "state.pt")
    with pytest.raises(DataError, match="its entries are damaged"):
        load_state(tmp_path / "state.pt")


def test_what_is_no_state_is_one_clear_message(tmp_path):
    itself = {"checksum": "0"}
    itself["state"] = itself
    for content in ([1, 2], 7, None, itself, {"state": 3, "checksum": []}, {"state": {"step": 3}}):
        torch.save(content, tmp_path / "state.pt")
        with pytest.raises(DataError, match=r"cannot be read|damaged"):
            load_state(tmp_path / "state.pt")


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
