"""The benchmark takes a step of every preset that it is given."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("bench_methods.py"))


def test_every_preset_has_a_row_and_the_first_is_the_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["data.crop=[32,64]", "model.encoder=test_efficientnet", "model.decoder.embed_dim=8", "data.batch_size=2"]
    options = [part for setting in tiny for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["bench_methods.py", "daformer", "sepico", *options, "--rounds", "1"])
    runpy.run_path(SCRIPT, run_name="__main__")
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "daformer" and first.split()[-1] == "1.00"
    assert second.split()[0] == "sepico" and float(second.split()[1]) > 0
