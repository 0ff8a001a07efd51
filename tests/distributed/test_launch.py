"""Several processes train one run: they resume, stop and fail together, and one of them speaks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cluda_cli
from cluda_cli import presets
from cluda_cli.commands.train import train
from cluda_cli.data.index import find
from cluda_cli.data.streams import Steps, draws
from cluda_cli.distributed.launch import _exit_code
from cluda_cli.engine.state_file import load_state
from cluda_cli.errors import DataError, EnvironmentProblem

ROOT = str(Path(cluda_cli.__file__).parents[1])
CLUDA = ("-m", "cluda_cli")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "cluda_cli")
TIMEOUT = 600  # seconds, for machines with much else to do


def changed(settings, tree):
    return presets.validate(presets.merge(settings.model_dump(mode="json"), tree))


def start(folder, *options, runner):
    """`cluda train` by a new interpreter."""
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


def assert_same_terms(one, other):
    """Losses of two runs, but for rounding."""
    lines = list(zip(metrics(one), metrics(other), strict=True))
    assert any("terms" in line for line, _ in lines)
    for expected, found in lines:
        assert found["step"] == expected["step"]
        for name, value in expected.get("terms", {}).items():  # None is a term that did not apply
            assert found["terms"][name] == (value and pytest.approx(value, rel=1e-4)), (found["step"], name)


def saved(folder):
    return load_state(folder / "resume" / "state.pt")


# No batch norms, because torch does not synchronise them on CPUs, and no dropout, whose masks depend on the rank. The
# rate does not depend on the number of steps, and is so small that the steps of AdamW do not magnify rounding.
STEADY = {
    "data": {"crop": [64, 64]},
    "model": {"encoder": "test_vit", "weights": False, "deeplab": {}, "drop_path": 0.0},
    "teacher": {"confidence": 0.21},
    "optimizer": {"warmup": 0, "power": 0.0, "lr": 1e-6},
    "objectives": {"feature_distance": False},
    "training": {"pictures_every": 2, "validate_every": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_a_run_goes_on_with_another_number_of_processes(tiny_settings, tmp_path, start_forked, shard):
    """One, two and one again give what one gives, and the first process alone writes and talks.

    The replicated run is started as a user starts it; the others of this file are forked.
    """
    settings = changed(tiny_settings, STEADY)
    at = {steps: changed(settings, {"training": {"steps": steps}}) for steps in (2, 6)}
    train(at[6], tmp_path / "whole")
    train(at[2], tmp_path / "parts")
    options = ["--resume", "--steps", "4", "--devices", "2", "--set", f"training.shard={str(shard).lower()}"]
    if shard:
        process = start_forked("cluda", "train", "--run", tmp_path / "parts", *options)
    else:
        process = start(tmp_path / "parts", *options, runner=CLUDA)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said
    for talk in ("on 2 x cpu", "objectives:", "resuming after step 2", ", student", ", teacher", "done in"):
        assert said.count(talk) == 1, said
    assert "batch norms" not in said
    train(at[6], tmp_path / "parts", resume=True)
    assert_same_terms(tmp_path / "whole", tmp_path / "parts")
    states = [saved(tmp_path / name) for name in ("whole", "parts")]
    for part in ("student", "teacher"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def break_a_file_of_the_second_process(settings):
    """So that process 1 meets it in the first step, and process 0 does not."""
    source, target = (find(name, settings.data.root) for name in ("clean", "noisy"))
    drawn, seed = draws([source], target, settings.data), settings.training.seed
    first, second = (Steps(drawn, seed, range(i, i + 1)) for i in (0, 1))
    for path in sorted((settings.data.root / "noisy" / "train").glob("*.png")):
        content = path.read_bytes()
        path.write_bytes(content[:200])
        if isinstance(second[0, None], DataError) and not isinstance(first[0, None], DataError):
            return path
        path.write_bytes(content)
    raise AssertionError("both draw the same image")


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["devices", "torchrun"])
def test_what_fails_in_one_process_is_told_once(tiny_settings, tmp_path, start_forked, runner):
    broken = break_a_file_of_the_second_process(tiny_settings)
    options = [*preset(tiny_settings, tmp_path / "settings.json"), "--devices", "2"]
    if runner == "devices":
        process = start_forked("cluda", "train", "--run", tmp_path / "x", *options)
    else:
        process = start(tmp_path / "x", *options, runner=TORCHRUN)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert said.count("error:") == said.count(broken.name) == 1, said
    assert said.count("warning: batch norms are synchronised on GPUs only") == 1
    assert saved(tmp_path / "x")["step"] == 0
    if runner == "devices":
        assert process.returncode == 3
        assert "Traceback" not in said


def wait_for_steps(process, folder):
    deadline = time.monotonic() + TIMEOUT
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks(process):
    """Ids of the processes of a run with `--devices 2`: the last two that the launcher started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children[-2:]]


@pytest.fixture
def begin(tiny_settings, tmp_path, start_forked):
    """Start a run of two processes and wait for its first step; gives its process and folder."""

    def arrange(**changes):
        settings = changed(tiny_settings, {"training": {"steps": 10_000}} | changes)
        options = [*preset(settings, tmp_path / "settings.json"), "--devices", "2"]
        process = start_forked("cluda", "train", "--run", tmp_path / "x", *options)
        wait_for_steps(process, tmp_path / "x")
        return process, tmp_path / "x"

    return arrange


def assert_stopped_and_saved(folder, said):
    step = saved(folder)["step"]
    assert said.count(f"stopped after step {step}, state saved") == said.count("resume with:") == 1, said
    assert metrics(folder)[-1]["step"] == step


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_after_one_step(begin):
    process, folder = begin(data={"workers": 1})
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, said
    assert_stopped_and_saved(folder, said)


@pytest.mark.slow
def test_a_second_request_ends_processes_that_do_not_answer(begin):
    process, _ = begin()
    frozen = ranks(process)[1]
    os.kill(frozen, signal.SIGSTOP)  # the other rank waits for it in a collective
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "error:" not in said
    assert not Path(f"/proc/{frozen}").exists()


@pytest.mark.slow
def test_the_processes_stop_and_save_when_their_launcher_is_killed(begin):
    process, folder = begin()
    process.kill()
    said, _ = process.communicate(timeout=TIMEOUT)  # ends when no process holds the pipe any more
    assert_stopped_and_saved(folder, said)


@pytest.mark.slow
def test_a_killed_process_takes_the_others_with_it(begin):
    process, _ = begin()
    os.kill(ranks(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 4
    assert said.count("error:") == said.count("process 1 of 2 was ended by SIGKILL") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_keeps_its_traceback():
    code = "from functools import partial; from cluda_cli.distributed.launch import launch; "
    command = [sys.executable, "-c", code + "raise SystemExit(launch(1, partial(int, 'x')))"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: invalid literal for int()" in done.stderr


@pytest.mark.parametrize(
    ("codes", "stopped", "expected"),
    [
        ([0, 0], False, 0),
        ([1, 3], False, 3),  # rank 0 lost its peer
        ([130, 130], True, 130),
        ([130, -signal.SIGKILL], True, 130),  # killed because it did not answer
        ([4, 1], True, 4),  # the save failed
        ([0, 0], True, 0),  # asked after the last step
        ([4, -signal.SIGTERM], False, 4),  # the launcher ended a rank that waited for the other
    ],
)
def test_the_exit_code_is_that_of_the_cause(codes, stopped, expected):
    assert _exit_code(codes, stopped) == expected


@pytest.mark.parametrize("codes", [[1, -signal.SIGKILL], [0, -signal.SIGKILL]])
def test_a_killed_rank_is_named_whichever_rank_ended_first(codes):
    with pytest.raises(EnvironmentProblem, match="process 1 of 2 was ended by SIGKILL"):
        _exit_code(codes, stopped=False)


@pytest.mark.slow
def test_two_nodes_train_one_run(tiny_settings, tmp_path):
    """Two torchrun agents with a process each, as on two machines, equal one process; rank 0 alone talks."""
    settings = changed(tiny_settings, presets.merge(STEADY, {"training": {"steps": 2}}))
    train(settings, tmp_path / "one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    node = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    node += ["--rdzv-id", "test", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1", "-m", "--", "cluda_cli"]
    options = preset(settings, tmp_path / "settings.json")
    nodes = [start(tmp_path / "two", *options, runner=node) for _ in range(2)]
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in nodes]
    finally:
        for process in nodes:
            process.kill()
    assert [process.returncode for process in nodes] == [0, 0], said
    assert "".join(said).count("on 2 x cpu") == "".join(said).count("done in") == 1
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert_same_terms(tmp_path / "one", tmp_path / "two")
