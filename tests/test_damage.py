"""A few rounds of the scripts that kill the verbs, damage their files and give them hostile input.

docs/explanation/what-survives.md says what the long ones found.
"""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def test_random_and_hostile_settings_are_refused_in_few_words_or_kept_as_given(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = importlib.import_module("fuzz_settings").run_all(400, 0, tmp_path)
    assert found["traceback"] == found["silent"] == found["wordy"] == 0, capsys.readouterr().out
    assert found["accepted"] > 50 and found["refused"] > 200


def test_damaged_files_end_in_no_traceback_and_are_not_used_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = importlib.import_module("damage_files").run_all(60, 0, tmp_path)
    assert found["traceback"] == found["silent"] == 0, capsys.readouterr().out
    assert found["refused"] > 20


@pytest.mark.slow
def test_killed_verbs_end_as_if_nothing_had_happened(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert importlib.import_module("kill_verbs").main(["--kills", "4", "--seed", "1"]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_command_lines_of_every_kind_end_as_documented(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert importlib.import_module("fuzz_commands").main(["--count", "20", "--seed", "1"]) == 0, capsys.readouterr().out
