"""The benchmark runs and times both contrasts, on every batch."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("bench_anchors.py"))


def test_both_contrasts_are_timed_and_the_table_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = runpy.run_path(SCRIPT)["measure"](side=6, batches=[1, 3], rounds=1)
    assert [row[0] for row in rows] == ["1", "3"]
    assert rows[0][2] == rows[0][4] == "1.0"
    monkeypatch.setattr(sys, "argv", ["bench_anchors.py", "--side", "5", "--batches", "2", "--rounds", "1"])
    runpy.run_path(SCRIPT, run_name="__main__")
    assert "pixel / anchor" in capsys.readouterr().out
