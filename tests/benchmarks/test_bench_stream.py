"""The benchmark runs, and its sides deliver the same kind of sample."""

import importlib.util
from pathlib import Path

import pytest

from cluda_cli.settings import Data, RareClass

SCRIPT = Path(__file__).with_name("bench_stream.py")


def test_every_side_is_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_stream", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    index = bench.write_dataset(tmp_path / "raw", 2, (48, 72))
    data = Data(crop=(16, 16), source_box=(32, 48), target_box=(96, 144), rare_class=RareClass(min_crop_share=0.2))
    rates, tries = bench.measure(index, index, tmp_path, data, count=4, repeats=2)
    assert len(rates) == 6 and all(len(side) == 2 and min(side) > 0 for side in rates.values())
    assert 1 < tries <= 11
    assert "read from the cache" in capsys.readouterr().err
    bench.report("tiny", rates)
    source, target = capsys.readouterr().out.splitlines()
    assert "source  plain" in source and "target  plain" in target
