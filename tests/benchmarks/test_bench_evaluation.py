"""The benchmark of evaluation runs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("bench_evaluation.py")


def test_the_share_of_every_verb_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("bench_evaluation", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    hooks = torch.nn.modules.module
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):  # they would outlive the test
        monkeypatch.setattr(hooks, name, type(getattr(hooks, name))())
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--images", "2", "--rounds", "1", "--size", "64", "128", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench_evaluation.py", *arguments])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    for verb in ("eval", "predict, train-id", "predict, color + overlay", "pseudo-label"):
        [row] = [line for line in lines if line.strip(" │|").startswith(verb)]
        share = float(row.split("%")[0].split()[-1])
        assert 0 < share <= 100
