"""A few rounds of the scripts that kill the verbs and damage their files; docs/explanation/what-survives.md."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
FILES = ("settings.json", "manifest.json", "metrics.jsonl", "journal.jsonl", "state.pt", "best.safetensors")


def test_damaged_files_end_in_no_traceback_and_are_not_used_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = importlib.import_module("damage_files").run_all(60, 0, tmp_path, FILES)
    assert found["traceback"] == found["silent"] == 0, capsys.readouterr().out
    assert found["refused"] > 20


@pytest.mark.slow
def test_killed_verbs_end_as_if_nothing_had_happened(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert importlib.import_module("kill_verbs").main(["--kills", "4", "--seed", "1"]) == 0, capsys.readouterr().out
