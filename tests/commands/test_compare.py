"""The verb `compare`: its tables and its JSON."""

import json
import runpy
from pathlib import Path

import pytest

from cluda_cli.commands.compare import compare
from cluda_cli.errors import SettingsError

write_run = runpy.run_path(str(Path(__file__).parents[1] / "measure" / "test_comparison.py"))["write_run"]


@pytest.fixture
def folders(tmp_path):
    scores = {"source-only": (40.0, 42.0), "daformer": (45.0, 48.0)}
    return [write_run(tmp_path / f"{n}-seed={s}", n, s, (v,)) for n, two in scores.items() for s, v in enumerate(two)]


def test_tables_show_means_gains_classes_and_settings(folders, capsys):
    compare(folders)
    shown = capsys.readouterr().out
    assert "1  source-only: seed 0, 1; saves the teacher" in shown
    assert "41.00 ± 1.41" in shown
    assert "baseline" in shown
    assert "+5.50 ± 0.50" in shown
    assert "road" in shown
    assert "objectives.mixed.weight: 1 unset; 2 1.0" in shown


def test_the_baseline_can_be_named(folders, capsys):
    compare(folders, baseline=folders[2], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"] == "daformer"
    assert found["groups"][0]["gain"] == {
        "mean": -5.5, "deviation": 0.71, "error": 0.5, "values": [-5.0, -6.0], "p": 0.0577,
    }  # fmt: skip
    assert found["groups"][0]["iou"]["sky"]["mean"] is None


def test_a_baseline_that_is_none_of_the_runs_is_refused(folders, tmp_path):
    with pytest.raises(SettingsError, match="is none of the runs"):
        compare(folders, baseline=tmp_path)


def test_a_run_that_is_not_finished_is_named(folders, capsys):
    compare(folders[:1])
    assert "the last validation is of step 1 of 40000" in capsys.readouterr().err
