"""The verb `train`: exact resume, interruption, kills, folders, metrics."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cluda_cli import presets
from cluda_cli.commands import train as verb
from cluda_cli.commands.train import train
from cluda_cli.data.index import find
from cluda_cli.data.labels import ClassTable
from cluda_cli.engine.folder import RunFolder
from cluda_cli.engine.run import Run
from cluda_cli.engine.state_file import load_state, save_state
from cluda_cli.errors import DataError, Interrupted, RunError, SettingsError
from cluda_cli.inference.weights_file import load_weights

CPU = torch.device("cpu")


def with_training(settings, **values):
    tree = settings.model_dump(mode="json")
    return presets.validate(presets.merge(tree, {"training": values}))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.fixture
def stop_after(monkeypatch):
    """Send this process a signal while it logs a given step."""

    def arrange(step, number=signal.SIGINT):
        honest = verb._log

        def log(run, files, terms):
            note = honest(run, files, terms)
            if run.step == step:
                os.kill(os.getpid(), number)
            return note

        monkeypatch.setattr(verb, "_log", log)

    return arrange


def test_a_run_leaves_what_it_promises(tiny_settings, tmp_path):
    folder = tmp_path / "runs" / "x"
    train(tiny_settings, folder)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "settings.json", "manifest.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "resume/state.pt",
        "pictures/000003.png", "pictures/000006.png",
    }  # fmt: skip
    assert presets.load([str(folder / "settings.json")]) == tiny_settings
    lines = metrics(folder)
    assert [line["step"] for line in lines if "terms" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "miou" in line] == [4, 6]
    best = max((line for line in lines if "miou" in line), key=lambda line: line["miou"])
    assert load_weights(folder / "best.safetensors", CPU).step == best["step"]
    assert load_weights(folder / "last.safetensors", CPU).step == 6
    width = 7 * (48 + 4)  # source, label, target, pseudo-label, mixed, its label, prediction; gaps of 4
    with Image.open(folder / "pictures" / "000003.png") as picture:
        assert picture.size == (width, 2 * (32 + 4))


# Batch norms of the encoder are frozen where a micro-batch is one image whose last map is one cell.
TWO_RESOLUTIONS = {
    "model": {"multires": {"attention_dim": 8}},
    "mixing": {"uncertain_detail_from": 2},
    "masking": {"block": 16},
    "objectives": {"masked": {}, "pixel_contrast": {"size": 7, "weighter_dim": 8}},
}
MICRO_BATCHES = {"model": {"freeze_batch_norm": True}, "data": {"batch_size": 3}, "training": {"micro_batch": 2}}


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        pytest.param(1, {}, id="1"),
        pytest.param(3, {}, id="3"),
        pytest.param(4, {}, id="4"),
        pytest.param(3, TWO_RESOLUTIONS, id="two resolutions"),
        pytest.param(3, presets.merge(TWO_RESOLUTIONS, MICRO_BATCHES), id="two resolutions in micro-batches"),
    ],
)
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(
    tiny_settings, tmp_path, stop_after, monkeypatch, stop, changes
):
    settings = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), changes))
    train(settings, tmp_path / "whole")
    with monkeypatch.context():
        stop_after(stop)
        with pytest.raises(Interrupted, match=f"stopped after step {stop}, state saved"):
            train(settings, tmp_path / "parts")
        monkeypatch.undo()
    assert load_state(tmp_path / "parts" / "resume" / "state.pt")["step"] == stop
    torch.manual_seed(999)
    train(settings, tmp_path / "parts", resume=True)
    states = [load_state(tmp_path / name / "resume" / "state.pt") for name in ("whole", "parts")]
    assert_same(*states)
    head = any(name.startswith("pixel_contrast.weighter") for name in states[0]["objectives"])
    assert head == bool(settings.model.multires)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    for name in ("best.safetensors", "last.safetensors"):
        assert_same(load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda n: n.name)
def test_other_requests_to_stop_save_like_ctrl_c(tiny_settings, tmp_path, stop_after, number):
    stop_after(2, number)
    with pytest.raises(Interrupted) as stopped:
        train(tiny_settings, tmp_path / "x")
    assert stopped.value.exit_code == 130
    assert stopped.value.remedy == f"resume with: cluda train --run {tmp_path / 'x'} --resume"
    assert load_state(tmp_path / "x" / "resume" / "state.pt")["step"] == 2


def test_a_request_during_validation_stops_there_and_resume_validates_again(tiny_settings, tmp_path, monkeypatch):
    train(tiny_settings, tmp_path / "whole")
    honest = verb.score
    with monkeypatch.context() as patch:
        patch.setattr(verb, "score", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or honest(*a, **k))
        with pytest.raises(Interrupted, match="stopped after step 4"):
            train(tiny_settings, tmp_path / "parts")
    train(tiny_settings, tmp_path / "parts", resume=True)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_finished_run_has_nothing_to_resume(tiny_settings, tmp_path, capsys):
    train(tiny_settings, tmp_path / "x")
    before = metrics(tmp_path / "x")
    train(tiny_settings, tmp_path / "x", resume=True)
    assert metrics(tmp_path / "x") == before
    assert "already finished (6 of 6 steps)" in capsys.readouterr().err


def test_a_hangup_that_nohup_ignores_stops_nothing(tiny_settings, tmp_path, stop_after):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_after(1, signal.SIGHUP)
        train(with_training(tiny_settings, steps=2, validate_every=9), tmp_path / "x")
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert load_state(tmp_path / "x" / "resume" / "state.pt")["step"] == 2


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_run_that_another_process_writes_is_not_touched(tiny_settings, tmp_path, monkeypatch, options):
    """A second start, --resume or --overwrite while the first run is in its loop."""
    folder, refused = tmp_path / "x", []

    def start_another(run, *_):
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        with pytest.raises(SettingsError, match="another process of cluda is writing into this folder") as problem:
            train(tiny_settings, folder, **options)
        assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        refused.append(problem.value.where)
        run.step = run.settings.training.steps

    monkeypatch.setattr(verb, "_loop", start_another)
    train(tiny_settings, folder)
    assert refused == [str(folder)]


@pytest.mark.parametrize("broken", ["write_text", "write_json", "save_state"])
def test_a_run_that_broke_off_while_it_began_can_be_started_again(tiny_settings, tmp_path, monkeypatch, broken):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(f"cluda_cli.engine.folder.{broken}", fail)
        with pytest.raises(OSError, match="No space left"):
            train(tiny_settings, folder)
    folder.mkdir(exist_ok=True)
    (folder / ".cluda-abcd1234.tmp.json").touch()  # as a kill leaves it
    (folder / ".cluda-lock").touch()
    train(with_training(tiny_settings, steps=1), folder, overwrite=broken != "write_text")
    assert load_state(folder / "resume" / "state.pt")["step"] == 1
    assert not list(folder.rglob(".cluda-*"))


def test_settings_that_were_edited_between_runs_are_announced(tiny_settings, tmp_path, capsys):
    folder = tmp_path / "x"
    train(with_training(tiny_settings, steps=1), folder)
    presets.resume(folder, {}, [])
    assert "resuming with another" not in capsys.readouterr().err
    tree = json.loads((folder / "settings.json").read_text())
    tree["optimizer"]["lr"] = 0.5
    (folder / "settings.json").write_text(json.dumps(tree))
    edited = presets.resume(folder, {"training": {"steps": 2}}, [])
    announced = capsys.readouterr().err
    assert "resuming with another optimizer.lr: 0.001 -> 0.5" in announced
    assert "resuming with another training.steps: 1 -> 2" in announced
    train(edited, folder, resume=True)
    capsys.readouterr()
    presets.resume(folder, {}, [])
    assert "resuming with another" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"optimizer": {"lr": "x"}}', '{"optimizer": {"lr": Infinity}}', "\x00"])
def test_damaged_settings_of_a_run_name_the_file(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(SettingsError) as problem:
        presets.resume(tmp_path, {}, [])
    assert problem.value.where == str(tmp_path / "settings.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"sources": 3}', "[" * 50_000, '{"sources": [{"name": []}]}', '{"gpu": Infinity}']
)
def test_a_damaged_manifest_is_one_clear_message(tiny_settings, tmp_path, text):
    train(with_training(tiny_settings, steps=1, validate_every=9), tmp_path / "x")
    (tmp_path / "x" / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"cannot be read \(" + ("Infinity" if "Infinity" in text else "")):
        train(tiny_settings, tmp_path / "x", resume=True)


@pytest.mark.parametrize(
    "change",
    [{"step": "3"}, {"step": -1}, {"best": 3}, {"student": 3}, {"optimizer": []}, {"teacher": {"x": 1}}],
    ids=str,
)
def test_a_state_of_another_form_is_one_clear_message(tiny_settings, tmp_path, change):
    train(with_training(tiny_settings, steps=1, validate_every=9), tmp_path / "x")
    state = tmp_path / "x" / "resume" / "state.pt"
    save_state(state, load_state(state) | change)
    with pytest.raises(SettingsError, match="saved state does not fit"):
        train(tiny_settings, tmp_path / "x", resume=True)


def test_the_loss_on_the_screen_is_that_of_the_last_steps(tiny_settings, tmp_path, monkeypatch):
    notes = []
    honest = verb.console.Progress.advance

    def advance(progress, note=""):
        if note:
            notes.append(float(note.removeprefix("loss ")))
        honest(progress, note)

    monkeypatch.setattr(verb.console.Progress, "advance", advance)
    settings = with_training(tiny_settings, log_every=6)
    train(settings, tmp_path / "x")
    assert len(notes) == len(set(notes)) == 6  # a new one each step, though the log has two
    first = metrics(tmp_path / "x")[0]["terms"]
    sections = settings.model_dump()["objectives"]
    expected = sum(sections[name.split("/")[1]]["weight"] * (value or 0) for name, value in first.items())
    assert notes[0] == pytest.approx(expected, abs=1e-3)


def test_an_existing_folder_is_refused_unless_told(tiny_settings, tmp_path):
    short = with_training(tiny_settings, steps=1)
    train(short, tmp_path / "x")
    with pytest.raises(SettingsError, match="this run exists"):
        train(short, tmp_path / "x")
    train(short, tmp_path / "x", overwrite=True)
    assert [line["step"] for line in metrics(tmp_path / "x") if "terms" in line] == [1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("do not touch")
    with pytest.raises(SettingsError, match="exists and is not a run"):
        train(short, tmp_path / "other", overwrite=True)


def test_a_broken_loss_stops_with_its_name_and_leaves_the_last_save(tiny_settings, tmp_path, monkeypatch):
    from cluda_cli.objectives.cross_entropy import CrossEntropy

    honest = CrossEntropy.forward
    calls = []

    def forward(self, seen):
        calls.append(seen.view.name)
        return honest(self, seen) * (float("inf") if len(calls) > 6 else 1.0)

    monkeypatch.setattr(CrossEntropy, "forward", forward)
    with pytest.raises(RunError, match="source/source, mixed/mixed is not finite in step 3"):
        train(tiny_settings, tmp_path / "x")
    state = load_state(tmp_path / "x" / "resume" / "state.pt")
    assert state["step"] == 2  # saved every second step
    assert all(torch.isfinite(v).all() for v in state["student"].values())


def test_other_data_are_refused_on_resume(tiny_settings, tmp_path):
    train(with_training(tiny_settings, steps=1), tmp_path / "x")
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    manifest["sources"][0]["fingerprint"] = "0"
    (tmp_path / "x" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the dataset clean changed since the run began"):
        train(tiny_settings, tmp_path / "x", resume=True)


def test_a_missing_dataset_names_the_command(tiny_settings, tmp_path):
    tree = presets.merge(tiny_settings.model_dump(mode="json"), {"data": {"source": "gta"}})
    with pytest.raises(DataError, match="run `cluda prepare gta --data-root"):
        train(presets.validate(tree), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_settings_changed_on_resume_act_and_are_kept(tiny_settings, tmp_path):
    folder = tmp_path / "x"
    train(with_training(tiny_settings, steps=2), folder)
    tree = with_training(tiny_settings, steps=4).model_dump(mode="json")
    changed = presets.validate(presets.merge(tree, {"optimizer": {"lr": 1e-9, "weight_decay": 0.5}}))
    train(changed, folder, resume=True)
    group = load_state(folder / "resume" / "state.pt")["optimizer"]["param_groups"][0]
    assert (group["base_lr"], group["weight_decay"]) == (1e-9, 0.5)
    assert presets.load([str(folder / "settings.json")]) == changed
    with pytest.raises(SettingsError, match="the run is at step 4, beyond 3"):
        train(with_training(tiny_settings, steps=3), folder, resume=True)


def test_a_request_while_best_weights_are_written_loses_nothing(tiny_settings, tmp_path, monkeypatch):
    train(tiny_settings, tmp_path / "whole")
    honest = RunFolder.save_best

    def save_best(files, run):
        os.kill(os.getpid(), signal.SIGINT)
        honest(files, run)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_best", save_best)
        with pytest.raises(Interrupted):
            train(tiny_settings, tmp_path / "parts")
    train(tiny_settings, tmp_path / "parts", resume=True)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert_same(*(load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts")))


def test_a_request_is_answered_before_a_validation_that_is_due(tiny_settings, tmp_path, stop_after, monkeypatch):
    stop_after(4)
    monkeypatch.setattr(verb, "score", lambda *_, **__: pytest.fail("validated after the request"))
    with pytest.raises(Interrupted, match="stopped after step 4, state saved"):
        train(tiny_settings, tmp_path / "x")


def test_a_file_that_turns_out_bad_costs_no_steps(tiny_settings, tmp_path):
    settings = with_training(tiny_settings, save_every=100, validate_every=100, steps=60)
    broken = sorted((tmp_path / "data" / "noisy" / "train").glob("*.png"))[0]
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    with pytest.raises(DataError, match=broken.name):
        train(settings, tmp_path / "x")
    reached = load_state(tmp_path / "x" / "resume" / "state.pt")["step"]
    lines = tmp_path / "x" / "metrics.jsonl"
    assert reached == (max(line["step"] for line in metrics(tmp_path / "x")) if lines.exists() else 0)


def test_a_run_killed_before_its_first_save_resumes(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "_loop", lambda *_: os.abort)
    train(tiny_settings, tmp_path / "x")
    monkeypatch.undo()
    assert load_state(tmp_path / "x" / "resume" / "state.pt")["step"] == 0
    leftover = tmp_path / "x" / "resume" / ".cluda-abcd1234.tmp.pt"
    leftover.touch()
    train(with_training(tiny_settings, steps=1), tmp_path / "x", resume=True)
    assert load_state(tmp_path / "x" / "resume" / "state.pt")["step"] == 1
    assert not leftover.exists()


def test_overwriting_leaves_nothing_of_the_old_run(tiny_settings, tmp_path):
    train(tiny_settings, tmp_path / "x")
    train(with_training(tiny_settings, steps=1, pictures_every=0, validate_every=1), tmp_path / "x", overwrite=True)
    assert not list((tmp_path / "x" / "pictures").glob("*"))
    assert load_weights(tmp_path / "x" / "best.safetensors", CPU).step == 1


def test_domains_without_a_common_class_are_refused(tiny_settings, tmp_path):
    index = find("noisy", tmp_path / "data")
    renamed = ClassTable(tuple(replace(c, name=f"my {c.name}") for c in index.classes.classes))
    replace(index, classes=renamed).save()
    with pytest.raises(DataError, match="no class name in common"):
        train(tiny_settings, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_teacher_can_be_the_network_that_is_kept(tiny_settings, tmp_path):
    tree = with_training(tiny_settings, steps=2).model_dump(mode="json")
    settings = presets.validate(presets.merge(tree, {"evaluation": {"network": "teacher"}}))
    train(settings, tmp_path / "x")
    deployed = load_weights(tmp_path / "x" / "last.safetensors", CPU)
    teacher = load_state(tmp_path / "x" / "resume" / "state.pt")["teacher"]
    assert deployed.network_name == "teacher"
    assert_same({f"network.{k}": v for k, v in deployed.network.state_dict().items()}, dict(teacher))


def test_weights_of_a_run_carry_the_normalisation_of_its_encoder(tiny_settings, tmp_path):
    change = {
        "model": {"encoder": "tf_efficientnet_lite0", "weights": False},
        "objectives": {"feature_distance": False},
    }
    settings = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), change))
    run = Run(settings, [find("clean", settings.data.root)], CPU)
    files = RunFolder(tmp_path / "x")
    files.save_best(run)
    assert load_weights(files.best, CPU).network.normalisation.mean == (127.5, 127.5, 127.5)


def test_resume_is_exact_with_loader_processes(tiny_settings, tmp_path, stop_after, monkeypatch):
    tree = with_training(tiny_settings, steps=3).model_dump(mode="json")
    settings = presets.validate(presets.merge(tree, {"data": {"workers": 1}}))
    train(settings, tmp_path / "whole")
    with monkeypatch.context():
        stop_after(1)
        with pytest.raises(Interrupted):
            train(settings, tmp_path / "parts")
        monkeypatch.undo()
    train(settings, tmp_path / "parts", resume=True)
    assert_same(*(load_state(tmp_path / name / "resume" / "state.pt") for name in ("whole", "parts")))


def test_a_crop_that_the_network_cannot_take_is_refused(tiny_settings, tmp_path):
    change = {"model": {"encoder": "maxvit_pico_rw_256", "weights": False}, "objectives": {"feature_distance": False}}
    tree = presets.merge(tiny_settings.model_dump(mode="json"), change)
    with pytest.raises(SettingsError, match="maxvit_pico_rw_256 cannot train on 2 such crops"):
        train(presets.validate(tree), tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_loader_processes_end_with_the_run(tiny_settings, tmp_path, number):
    settings = tmp_path / "settings.json"
    tree = with_training(tiny_settings, steps=1000).model_dump(mode="json")
    settings.write_text(json.dumps(presets.merge(tree, {"data": {"workers": 1}})))
    command = [sys.executable, "-m", "cluda_cli", "train", "--preset", str(settings), "--run", str(tmp_path / "x")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "x" / "metrics.jsonl").exists():  # the first step is done, with a loader process
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)  # ends when no process holds the pipe any more
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert f"resume with: cluda train --run {tmp_path / 'x'} --resume" in talk


@pytest.mark.slow
def test_a_killed_run_resumes_and_leaves_no_unreadable_file(tiny_settings, tmp_path):
    """SIGKILL at random moments, several times over one run; nothing past the last save interval is lost."""
    folder = tmp_path / "x"
    settings = tmp_path / "settings.json"
    settings.write_text(with_training(tiny_settings, steps=60, save_every=2, validate_every=7).model_dump_json())
    command = [sys.executable, "-m", "cluda_cli", "train", "--preset", str(settings), "--run", str(folder)]
    state, moments = folder / "resume" / "state.pt", random.Random(0)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # more threads than free cores would slow a tiny network down
    reached = 0
    for kill in range(4):
        began = time.monotonic()
        process = subprocess.Popen(
            [*command, *(["--resume"] if kill else [])], stderr=subprocess.PIPE, text=True, env=environment
        )
        while process.poll() is None and (not state.exists() or load_state(state)["step"] <= reached):
            assert time.monotonic() - began < 600, "no progress"
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.communicate()
        lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
        logged = max(json.loads(line)["step"] for line in lines)
        saved = load_state(state)["step"]
        assert logged - saved <= 2
        assert saved >= reached
        load_weights(folder / "last.safetensors", CPU)
        reached = saved
    subprocess.run([*command, "--resume"], check=True, capture_output=True, env=environment)
    assert load_state(state)["step"] == 60
