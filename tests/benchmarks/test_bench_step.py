"""The benchmark runs, takes the same steps without and with its levers, and leaves nothing patched."""

import importlib.util
from pathlib import Path

import torch

from cluda_cli import presets
from cluda_cli.engine.step import training_step

SCRIPT = Path(__file__).with_name("bench_step.py")
CPU = torch.device("cpu")
TWO_RESOLUTIONS = {
    "data": {"crop": [64, 64]},
    "model": {"encoder": "test_resnet", "weights": False, "multires": {"attention_dim": 8}},
    "objectives": {"feature_distance": False, "pixel_contrast": {"size": 7, "weighter_dim": 8}},
}


def test_levers_change_the_time_and_not_the_numbers(tiny_settings):
    spec = importlib.util.spec_from_file_location("bench_step", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    settings = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), TWO_RESOLUTIONS))
    results = []
    for off in (False, True):
        run, batch = bench.build(settings, CPU, {})
        names = [lever.name for lever in bench.levers(run)]
        with bench.all_off(run) if off else torch.enable_grad():
            results.append(training_step(run, batch).terms)
    assert names == ["moving average in one call", "tiled contrast", "light heads convolve before resizing"]
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-6)
    assert "cluda_cli" in bench.training_step.__module__
    rows = bench.measure(settings, CPU, rounds=1)
    assert [row[0] for row in rows] == names and all(float(row[3]) > 0 for row in rows)
