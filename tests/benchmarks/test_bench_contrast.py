"""The benchmark runs, and times two forms of one thing, twice."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).with_name("bench_contrast.py")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_contrast", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    return bench


def test_growth_is_printed_with_the_plain_form_where_it_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load()
    monkeypatch.setattr(bench, "memory_of", lambda name, side, threads: 12.3)
    for name, value in {"SIDES": (3, 5), "FULL_SIDE": 7, "PLAIN_SIDE": 3, "CHANNELS": 8}.items():
        monkeypatch.setattr(bench, name, value)
    rows = bench.scale(rounds=1, threads=1, full=True)
    assert [int(row[0]) for row in rows] == [18, 50, 98] and [row[4] == "-" for row in rows] == [False, True, True]
    monkeypatch.setattr(sys, "argv", ["bench_contrast.py", "--scaling", "--rounds", "1", "--threads", "1"])
    bench.main()
    assert "~" in capsys.readouterr().out.splitlines()[-2]


def test_both_forms_agree_and_the_table_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load()
    problem = bench.make_problem(side=9, channels=16)
    results = {}
    for name, form in bench.FORMS.items():
        seconds, value = bench.once(form, problem)
        assert seconds > 0
        results[name] = value, *(leaf.grad for leaf in (problem.features, problem.detail, problem.mix))
    for plain, tiled in bench.CONTRASTS:
        torch.testing.assert_close(results[tiled], results[plain], rtol=1e-4, atol=1e-8)

    monkeypatch.setattr(bench, "memory_of", lambda name, side, threads: 12.3)  # starts a process otherwise
    monkeypatch.setattr(sys, "argv", ["bench_contrast.py", "--side", "5", "--rounds", "2"])
    bench.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in bench.FORMS)
