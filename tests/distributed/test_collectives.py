"""Several processes compute what one computes with the joint batch, stop together and fail with one message."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cluda_cli
from cluda_cli import presets
from cluda_cli.commands.train import train
from cluda_cli.data.index import find
from cluda_cli.data.streams import Steps
from cluda_cli.distributed import collectives, launch
from cluda_cli.engine.state_file import load_state
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.models.encoders import build_encoder

WORKER = Path(__file__).parent / "two_processes.py"
ROOT = str(Path(cluda_cli.__file__).parents[1])


def changed(settings, tree):
    return presets.validate(presets.merge(settings.model_dump(mode="json"), tree))


def together(command, **options):
    """Run a command in two processes, as torchrun does; gives what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


# Without dropout, whose masks depend on the process.
STILL = {
    "model": {"drop_path": 0.0, "decoder": {"dropout": 0.0}},
    "teacher": {"confidence": 0.21},
    "optimizer": {"warmup": 0},
    "mixing": {"jitter_probability": 1.0, "blur_probability": 1.0},
}
CLUDA = {"data": {"batch_size": 4}}
# Batch norms over the few cells of a tiny detail crop would magnify rounding, so the encoder has none.
MIC = {
    "data": {"crop": [64, 64]},
    "model": {"encoder": "mit_b0", "multires": {"attention_dim": 8}},
    "mixing": {"uncertain_detail_from": 1},
    "masking": {"block": 16, "with_source": True},
    "objectives": {"masked": {}, "feature_distance": False, "pixel_contrast": {"size": 7, "weighter_dim": 8}},
}
SHARD = {"training": {"shard": True}}


def with_biases(settings, path):
    """The settings with encoder weights whose biases are not 0: layer norms of what is 0 would magnify rounding too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = build_encoder(settings.model).state_dict()
        for name, tensor in tensors.items():
            if name.endswith("bias"):
                tensor.normal_(std=0.3)
    save_file(tensors, path)
    return changed(settings, {"model": {"weights": str(path)}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [CLUDA, MIC, presets.merge(CLUDA, SHARD), presets.merge(MIC, SHARD)],
    ids=["daformer-cluda", "mic-cluda", "daformer-cluda sharded", "mic-cluda sharded"],
)
def test_two_processes_compute_what_one_does(tiny_settings, tmp_path, changes):
    """Terms, gradients, parameters, buffers, teacher, moments and scores."""
    settings = with_biases(changed(tiny_settings, presets.merge(STILL, changes)), tmp_path / "biased.safetensors")
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    codes, said = together([sys.executable, str(WORKER), str(tmp_path / "settings.json"), str(tmp_path / "out")])
    assert codes == [0, 0], said
    expected = runpy.run_path(str(WORKER))["outcome"](settings)
    assert all(value > 0 for value in expected["terms 1"].values())
    for rank in range(2):
        found = torch.load(tmp_path / f"out-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for part, tensors in expected.items():
            assert found[part].keys() == tensors.keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(found[part][name], tensor, rtol=1e-8, atol=1e-8, msg=f"{part}: {name}")


def test_images_are_shared_out_evenly_or_not_at_all(monkeypatch):
    monkeypatch.setattr(collectives, "_place", launch.Place(rank=1, local_rank=1, world_size=2, talks=False))
    assert collectives.local_positions(4) == range(2, 4)
    with pytest.raises(SettingsError, match=r"data\.batch_size: 3 images per domain .* -> give a multiple of 2"):
        collectives.local_positions(3)
    with pytest.raises(SettingsError, match='"cuda:1" is one device'):
        collectives.local_device("cuda:1")


def test_the_place_is_what_torchrun_says(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch.place() is None  # one process is alone, whoever started it
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.place() == launch.Place(rank=1, local_rank=1, world_size=2, talks=False)
    monkeypatch.delenv("RANK")
    assert launch.place() is None


def test_one_process_needs_no_others(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("looked for others"))
    train(changed(tiny_settings, {"training": {"steps": 1, "shard": True}}), tmp_path / "x")
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["devices"] == 1


CLUDA_DEVICES = ("-m", "cluda_cli")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "cluda_cli")
# The rate does not depend on the number of steps, and is so small that the steps of AdamW do not magnify rounding.
STEADY = {"optimizer": {"warmup": 0, "power": 0.0, "lr": 1e-6}, "training": {"pictures_every": 2, "validate_every": 2}}


def start(folder, *options, runner=CLUDA_DEVICES):
    """`cluda train` in a process of its own."""
    command = [sys.executable, *runner, "train", "--run", str(folder), *options]
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def preset(settings, path):
    path.write_text(settings.model_dump_json())
    return ["--preset", str(path)]


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_a_run_goes_on_with_another_number_of_processes(tiny_settings, tmp_path, shard):
    """One, two and one again give what one gives, and the first process alone writes and talks."""
    settings = changed(tiny_settings, presets.merge(STILL, STEADY))
    at = {steps: changed(settings, {"training": {"steps": steps}}) for steps in (2, 6)}
    train(at[6], tmp_path / "whole")
    train(at[2], tmp_path / "parts")
    options = ["--resume", "--steps", "4", "--devices", "2", "--set", f"training.shard={str(shard).lower()}"]
    process = start(tmp_path / "parts", *options)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    for talk in ("on 2 x cpu", "objectives:", "resuming after step 2", "step 4: noisy val mIoU", "done in"):
        assert said.count(talk) == 1, said
    train(at[6], tmp_path / "parts", resume=True)
    whole, parts = (metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [line["step"] for line in whole] == [line["step"] for line in parts]
    for one, other in zip(whole, parts, strict=True):
        for name, value in one.get("terms", {}).items():  # None is a term that did not apply
            assert other["terms"][name] == (value and pytest.approx(value, rel=1e-2)), (one["step"], name)
    states = [load_state(tmp_path / name / "resume" / "state.pt") for name in ("whole", "parts")]
    for part in ("student", "teacher"):
        for name, tensor in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], tensor, rtol=5e-2, atol=1e-3, msg=name)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def break_a_file_of_the_second_process(settings):
    """So that process 1 meets it in the first step, and process 0 does not."""
    source, target = (find(name, settings.data.root) for name in ("clean", "noisy"))
    first, second = (Steps(source, target, settings.data, settings.training.seed, range(i, i + 1)) for i in (0, 1))
    for path in sorted((settings.data.root / "noisy" / "train").glob("*.png")):
        content = path.read_bytes()
        path.write_bytes(content[:200])
        if isinstance(second[0], DataError) and not isinstance(first[0], DataError):
            return path
        path.write_bytes(content)
    raise AssertionError("both draw the same image")


@pytest.mark.slow
@pytest.mark.parametrize("runner", [CLUDA_DEVICES, TORCHRUN], ids=["devices", "torchrun"])
def test_what_fails_in_one_process_is_told_once(tiny_settings, tmp_path, runner):
    broken = break_a_file_of_the_second_process(tiny_settings)
    options = [*preset(tiny_settings, tmp_path / "settings.json"), "--devices", "2"]
    process = start(tmp_path / "x", *options, runner=runner)
    said, _ = process.communicate(timeout=120)
    assert said.count("error:") == said.count(broken.name) == 1, said
    assert load_state(tmp_path / "x" / "resume" / "state.pt")["step"] == 0
    if runner == CLUDA_DEVICES:
        assert process.returncode == 3
        assert "Traceback" not in said


def wait_for_steps(process, folder):
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_after_one_step(tiny_settings, tmp_path):
    settings = changed(tiny_settings, {"training": {"steps": 1000}, "data": {"workers": 1}})
    process = start(tmp_path / "x", *preset(settings, tmp_path / "settings.json"), "--devices", "2")
    wait_for_steps(process, tmp_path / "x")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    step = load_state(tmp_path / "x" / "resume" / "state.pt")["step"]
    assert said.count(f"stopped after step {step}, state saved") == said.count("resume with:") == 1
    assert metrics(tmp_path / "x")[-1]["step"] == step


@pytest.mark.slow
def test_a_killed_process_takes_the_others_with_it(tiny_settings, tmp_path):
    settings = changed(tiny_settings, {"training": {"steps": 1000}})
    process = start(tmp_path / "x", *preset(settings, tmp_path / "settings.json"), "--devices", "2")
    wait_for_steps(process, tmp_path / "x")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)  # ends when no process holds the pipe any more
    assert process.returncode == 4
    assert said.count("error:") == said.count("process 1 of 2 was ended by SIGKILL") == 1
    assert "Traceback" not in said
