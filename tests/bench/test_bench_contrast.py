"""The benchmark runs, and times two forms of one thing, twice."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("bench_contrast.py")


def test_both_forms_agree_and_the_table_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("bench_contrast", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
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
