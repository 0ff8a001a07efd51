"""The verb `bench`: numbers that fit together, no network, no files, clear failures."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner

from cluda_cli.adaptation.teacher import Teacher
from cluda_cli.cli import app
from cluda_cli.commands import bench as verb

TINY = {
    "data": {"crop": [32, 48], "target_box": [48, 80], "workers": 0},
    "model": {"encoder": "test_efficientnet", "weights": "imagenet", "decoder": {"embed_dim": 8, "channels": 8}},
    "training": {"steps": 4000, "validate_every": 1500, "device": "cpu"},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder that holds nothing but a preset, on a machine without network."""

    def unreachable(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(json.dumps(TINY))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "--preset", "tiny.json", "--steps", "2", *arguments])


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_the_numbers_fit_together_and_no_file_appears(tiny):
    before = files(tiny)
    result = run("--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == {
        "device", "torch", "threads", "encoder", "crop", "batch_size", "data", "classes", "first_step", "warm_up",
        "step", "cpu_share", "step_by_parts", "parts", "images_per_second", "memory", "largest_batch", "loading",
        "validation", "steps", "training_hours", "validation_hours",
    }  # fmt: skip
    assert (report["device"], report["data"], report["classes"], report["crop"]) == ("cpu", "synthetic", 19, [32, 48])
    parts, step = report["parts"], report["step"]
    assert {"data", "views", "teacher", "source/backward", "mixed/pixel_contrast", "optimizer", "ema"} < set(parts)
    assert sum(p["mean"] for p in parts.values()) == pytest.approx(report["step_by_parts"]["mean"])
    assert all(set(p) == {"median", "mean", "least", "most"} for p in [step, *parts.values()])
    assert 0 < step["least"] <= step["median"] <= step["most"]
    assert report["images_per_second"] == pytest.approx(4 / step["median"])
    assert len(report["warm_up"]) == verb.WARM_UP
    assert (report["steps"], report["training_hours"]) == (4000, pytest.approx(4000 * step["median"] / 3600))
    assert report["validation"] | {"seconds_per_image": 0} == {
        "seconds_per_image": 0, "size": [48, 80], "validations": 3, "images": None,
    }  # fmt: skip
    assert (report["largest_batch"], report["loading"], report["validation_hours"]) == (None, None, None)
    assert files(tiny) == before


def test_prepared_datasets_are_loaded_and_their_validation_counts(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(tiny_settings.model_dump_json())
    before = files(tmp_path)
    result = run("--data", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["data"], report["classes"]) == ("clean -> noisy", 5)
    assert report["loading"]["batches_per_second"] > 0
    validation = report["validation"]
    assert (validation["images"], validation["validations"], validation["size"]) == (2, 2, [48, 80])
    assert report["validation_hours"] == pytest.approx(4 * validation["seconds_per_image"] / 3600)
    assert files(tmp_path) == before


def test_the_table_names_every_part_and_says_how_it_was_measured(tiny):
    result = run()
    assert result.exit_code == 0, result.stderr
    for word in ("source/pixel_contrast", "mixed/backward", "teacher", "all parts", "100.0%", "median", "warm-up"):
        assert word in result.stdout
    assert "synthetic, 19 classes; random encoder weights" in result.stdout
    assert "4000 steps in" in result.stdout
    assert "3 validations (--data counts their images)" in result.stdout
    assert "growth of its peak" in result.stdout


def test_a_shared_cpu_is_told(tiny, monkeypatch):
    monkeypatch.setattr(verb, "BUSY", 1000.0)
    assert "others use this CPU" in run().stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "training.step=3"], 2, "error: training.step: no such setting; did you mean training.steps?"),
        (["--set", "model.encoder=mobilenet"], 2, 'error: model.encoder: there is no encoder "mobilenet"'),
        (["--preset", "nosuch"], 2, 'error: --preset: no preset "nosuch"'),
        (["--data"], 3, 'error: data/prepared: dataset "gta" is not prepared\n  run `cluda prepare gta'),
        (["--device", "toaster"], 4, 'error: training.device: device "toaster" cannot be used'),
    ],
)
def test_failures_are_one_clear_message(tiny, arguments, code, message):
    result = run(*arguments)
    assert result.stderr.startswith(message), result.stderr
    assert (result.exit_code, result.stdout) == (code, "")


def test_ctrl_c_ends_cleanly(tiny, monkeypatch):
    steps = []

    def update(self, student, step, *_):
        steps.append(step)
        if step == verb.WARM_UP + 3:  # in the measurement by parts
            raise KeyboardInterrupt

    monkeypatch.setattr(Teacher, "update", update)
    backward = torch.autograd.backward
    result = run()
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")
    assert len(steps) == verb.WARM_UP + 3
    assert torch.autograd.backward is backward


def test_a_batch_that_does_not_fit_is_told_with_one_that_does(tiny, monkeypatch):
    def step(run, batch):
        if len(batch["source"].image) > 3:
            raise torch.OutOfMemoryError

    monkeypatch.setattr("cluda_cli.measure.costs.training_step", step)
    result = run("--set", "data.batch_size=8")
    assert result.exit_code == 4
    assert result.stderr.startswith("error: data.batch_size: 8 source and target images do not fit cpu\n")
    assert "--set data.batch_size=3" in result.stderr


@pytest.mark.parametrize("wanted, remedy", [(2, "raise data.workers"), (4, "more cores are needed")])
def test_slow_loading_bounds_the_projection(tiny_settings, tmp_path, monkeypatch, wanted, remedy):
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(tiny_settings.model_dump_json())
    loading = verb.Loading(processes=2, batches_per_second=0.001, wanted=wanted)
    monkeypatch.setattr(verb, "measure_loading", lambda *_: loading)
    result = run("--data")
    assert f"no step is shorter than 500.000 s, {remedy}" in result.stdout
    assert "6 steps in 50 min 00 s" in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_its_memory_and_the_largest_batch(tiny):
    report = json.loads(run("--device", "cuda", "--json").stdout)
    memory = report["memory"]
    assert 0 < memory["peak"] <= memory["reserved"] <= memory["total"]
    assert report["largest_batch"] >= report["batch_size"]
    assert report["step"]["median"] > 0
