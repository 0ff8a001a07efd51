"""Means over seeds, paired gains, and what makes a group."""

import json
import math

import pytest

from cluda_cli import presets
from cluda_cli.errors import DataError
from cluda_cli.measure.comparison import (
    Spread,
    group_runs,
    read_run,
    settings_that_differ,
    two_sided_p,
    versions_that_differ,
)


def write_run(folder, preset="daformer", seed=0, scores=(40.0,), *, commit="a", network="teacher"):
    """A run folder as `train` leaves it; each score is a validation."""
    folder.mkdir(parents=True)
    overrides = [f"training.seed={seed}", f"evaluation.network={network}", f"data.root={folder}"]
    settings = presets.load([preset], None, overrides)
    (folder / "settings.json").write_text(settings.model_dump_json())
    (folder / "manifest.json").write_text(json.dumps({"versions": {"torch": "2"}, "commit": commit}))
    lines = [{"step": 1, "lr": 0.1, "terms": {}}]
    for step, score in enumerate(scores, 1):
        one = {"miou": score, "iou": {"road": score, "sky": None}}
        other = {f"student/{key}": value for key, value in (one | {"miou": score - 1}).items()}
        lines.append({"step": step} | one | other | {f"teacher/{key}": value for key, value in one.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(("t", "degrees"), [(12.706, 1), (4.303, 2), (3.182, 3), (2.776, 4), (2.571, 5), (2.228, 10)])
def test_p_values_are_those_of_the_tables_of_students_t(t, degrees):
    assert two_sided_p(t, degrees) == pytest.approx(0.05, abs=1e-4)
    assert two_sided_p(-t, degrees) == two_sided_p(t, degrees)


def test_p_is_one_at_zero_and_falls_towards_zero():
    for degrees in (1, 2, 3, 8):
        assert two_sided_p(0.0, degrees) == pytest.approx(1)
        assert two_sided_p(1e9, degrees) == pytest.approx(0, abs=1e-6)


def test_a_spread_is_the_mean_and_the_sample_deviation():
    spread = Spread((1.0, 2.0, 3.0))
    assert (spread.mean, spread.deviation) == (2, 1)
    assert spread.error == pytest.approx(1 / math.sqrt(3))
    assert spread.p_value == pytest.approx(two_sided_p(2 * math.sqrt(3), 2))
    assert math.isnan(Spread((1.0,)).deviation)
    assert math.isnan(Spread(()).mean)


def test_runs_that_differ_in_the_seed_alone_are_a_group(tmp_path):
    folders = [write_run(tmp_path / f"{name}-seed={s}", name, s) for name in ("daformer", "dacs") for s in (1, 0)]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [(group.name, [run.seed for run in group.runs]) for group in groups] == [
        ("daformer", [0, 1]),
        ("dacs", [0, 1]),
    ]
    assert "objectives.feature_distance.weight" in settings_that_differ(groups)
    assert "training.seed" not in settings_that_differ(groups)


def test_gains_are_paired_by_seed(tmp_path):
    better = [write_run(tmp_path / f"a{s}", "daformer", s, (v,)) for s, v in ((0, 41.0), (1, 45.0), (2, 49.0))]
    base = [write_run(tmp_path / f"b{s}", "dacs", s, (v,)) for s, v in ((2, 46.0), (1, 43.0), (7, 1.0))]
    first, second = group_runs([read_run(folder) for folder in [*better, *base]])
    assert first.gain(second).values == (2, 3)
    assert first.gain(first).values == (0, 0, 0)


def test_last_and_best_are_of_the_network_that_the_run_saves(tmp_path):
    (teacher,) = group_runs([read_run(write_run(tmp_path / "t", scores=(50.0, 40.0)))])
    assert (teacher.saved().mean, teacher.best().mean) == (40, 50)
    assert (teacher.last("student").mean, teacher.last("teacher").mean) == (39, 40)
    assert teacher.iou("road").mean == 40
    assert teacher.iou("sky").values == ()
    (student,) = group_runs([read_run(write_run(tmp_path / "s", scores=(50.0, 40.0), network="student"))])
    assert student.saved().mean == 39


def test_the_same_experiment_twice_is_refused(tmp_path):
    runs = [read_run(write_run(tmp_path / name)) for name in ("a", "b")]
    with pytest.raises(DataError, match="same experiment"):
        group_runs(runs)


def test_versions_that_differ_are_named(tmp_path):
    runs = [read_run(write_run(tmp_path / commit, seed=i, commit=commit)) for i, commit in enumerate("ab")]
    assert versions_that_differ(group_runs(runs)) == {"commit": ["a", "b"]}


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "miou": 9')
    assert read_run(folder).last.step == 1


@pytest.mark.parametrize(
    "line", ['{"miou": 3', "[]", '{"step": 1, "miou": "x"}', '{"step": -1, "miou": 3}', '{"step": 1, "miou": 3e9}']
)
def test_a_damaged_line_is_named(tmp_path, line):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + ('"miou"' if line == "[]" else "") + "\n")
    with pytest.raises(DataError, match="line 3 is damaged"):
        read_run(folder)


def test_what_is_no_run_or_has_no_validation_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="no validation yet"):
        read_run(write_run(tmp_path / "run", scores=()))
