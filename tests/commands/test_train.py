"""The verb `train`: exact resume, interruption, kills, folders, metrics."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cluda_cli import presets
from cluda_cli.commands import train as verb
from cluda_cli.commands.train import train
from cluda_cli.data.datasets import open_datasets
from cluda_cli.data.index import find
from cluda_cli.data.labels import ClassTable
from cluda_cli.engine.folder import RunFolder
from cluda_cli.engine.state_file import load_state, save_state
from cluda_cli.engine.step import StepResult
from cluda_cli.errors import DataError, Interrupted, RunError, SettingsError
from cluda_cli.inference.scoring import score
from cluda_cli.inference.weights_file import load_weights
from cluda_cli.models.multires import build_segmenter

CPU = torch.device("cpu")
TIMEOUT = 600  # seconds, for machines with much else to do


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


@pytest.fixture(scope="session")
def whole(tmp_path_factory, make_tiny_settings):
    """The folder of a run of `tiny_settings` that was never stopped, to be read only."""
    place = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    train(make_tiny_settings(place), place / "run")
    return place / "run"


def test_a_run_leaves_what_it_promises(whole, make_tiny_settings):
    folder = whole
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "settings.json", "manifest.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "resume/state.pt",
        "pictures/000003.png", "pictures/000006.png",
    }  # fmt: skip
    assert presets.load([str(folder / "settings.json")]) == make_tiny_settings(whole.parent)
    lines = metrics(folder)
    assert [line["step"] for line in lines if "terms" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "miou" in line] == [4, 6]
    best = max((line for line in lines if "miou" in line), key=lambda line: line["miou"])
    assert load_weights(folder / "best.safetensors", CPU).step == best["step"]
    assert load_weights(folder / "last.safetensors", CPU).step == 6
    width = 7 * (48 + 4)  # source, label, target, pseudo-label, mixed, its label, prediction; gaps of 4
    with Image.open(folder / "pictures" / "000003.png") as picture:
        assert picture.size == (width, 2 * (32 + 4))


SCORES = ("miou", "miou_common_pixels", "iou", "pixel_accuracy", "never_predicted")


@pytest.mark.parametrize("evaluated", ["student", "teacher"])
def test_every_validation_scores_student_and_teacher_each_in_its_own_evaluation_mode(
    tiny_settings, tmp_path, capsys, evaluated
):
    settings = presets.validate(
        presets.merge(tiny_settings.model_dump(mode="json"), {"evaluation": {"network": evaluated}})
    )
    train(settings, tmp_path / "x")
    found = [line for line in metrics(tmp_path / "x") if "miou" in line]
    names = [f"{name}/{key}" for name in ("student", "teacher") for key in SCORES]
    assert [list(line) for line in found] == [["step", *SCORES, *names]] * 2
    assert all(line[key] == line[f"{evaluated}/{key}"] for line in found for key in SCORES)
    assert any(line["student/iou"] != line["teacher/iou"] for line in found)
    talk = capsys.readouterr().err
    for line in found:
        for name in ("student", "teacher"):
            assert f"step {line['step']}: noisy val mIoU {line[f'{name}/miou']:.2f}, pixel accuracy" in talk
    state = load_state(tmp_path / "x" / "resume" / "state.pt")
    assert state["best"]["miou"] == max(line["miou"] for line in found)
    target = find("noisy", settings.data.root)
    for name in ("student", "teacher"):
        network = build_segmenter(settings.model, settings.data.crop, 5)
        prefix = "network." if name == "teacher" else ""
        network.load_state_dict({key.removeprefix(prefix): value for key, value in state[name].items()})
        scores = score(
            network.eval(), target, split="val", classes=target.classes, seen=target.classes.names, box=None,
            evaluation=settings.inference, device=CPU,
        )  # fmt: skip
        assert found[-1][f"{name}/miou"] == pytest.approx(scores.miou)


def test_a_teacher_that_labels_nothing_is_neither_scored_nor_saved(tiny_settings, tmp_path):
    changes = {
        "objectives": {"mixed": False, "pixel_contrast": False},
        "training": {"steps": 1},
        "evaluation": {"network": "teacher"},
    }
    train(presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), changes)), tmp_path / "x")
    line = metrics(tmp_path / "x")[-1]
    assert {key.split("/")[0] for key in line if "/" in key} == {"student"}
    assert line["miou"] == line["student/miou"]
    assert load_weights(tmp_path / "x" / "last.safetensors", CPU).network_name == "student"


def test_classes_that_the_teacher_predicts_nowhere_are_named(tiny_settings, tmp_path, capsys, monkeypatch):
    honest = verb.score

    def collapse(network, *args, **options):
        scores = honest(network, *args, **options)
        counts = scores.confusion.counts  # all cars become sky
        car, sky = (scores.names.index(name) for name in ("car", "sky"))
        counts[:, sky] += counts[:, car]
        counts[:, car] = 0
        return scores

    monkeypatch.setattr(verb, "score", collapse)
    train(with_training(tiny_settings, steps=1), tmp_path / "x")
    line = metrics(tmp_path / "x")[-1]
    assert "car" in line["teacher/never_predicted"] and "sky" not in line["teacher/never_predicted"]
    lost = ", ".join(line["teacher/never_predicted"])
    assert f"warning: step 1: the teacher predicts no pixel of noisy val as {lost}\n" in capsys.readouterr().err


def test_both_means_are_shown_where_the_target_has_a_class_that_the_source_never_shows(tiny_settings, tmp_path, capsys):
    root = tiny_settings.data.root
    source = find("clean", root)
    without_car = [
        replace(item, pixels={k: n for k, n in item.pixels.items() if source.classes.names[k] != "car"})
        for item in source.splits["train"]
    ]
    replace(source, splits={"train": tuple(without_car)}).save()
    for item in source.splits["train"]:
        path = source.label_path(item)
        label = np.array(Image.open(path))
        label[label == source.classes.names.index("car")] = 255
        Image.fromarray(label).save(path)
    train(with_training(tiny_settings, steps=1), tmp_path / "x")
    line = metrics(tmp_path / "x")[-1]
    assert line["miou"] < line["miou_common_pixels"]
    shown = f"noisy val mIoU {line['student/miou']:.2f} (common pixels {line['student/miou_common_pixels']:.2f}), "
    assert shown in capsys.readouterr().err


# Batch norms of the encoder are frozen where a micro-batch is one image whose last map is one cell.
TWO_RESOLUTIONS = {
    "model": {"multires": {"attention_dim": 8}},
    "mixing": {"uncertain_detail_from": 2},
    "masking": {"block": 16},
    "objectives": {"masked": {}, "pixel_contrast": {"size": 7, "weighter_dim": 8}},
}
DECAYED_ANCHORS = {
    "objectives": {
        "anchor_contrast": {"anchors": 4, "projection_dim": 8, "min_probability": 0},
        "prototype_contrast": {"start": 1, "projection_channels": 8, "target_view": "strong target"},
    },
    "optimizer": {"layer_decay": 0.9},
}
MEMORY = {"start": 1, "projection_channels": 8, "memory": 6, "anchors": 8, "hardest": 4, "mixed_pairs": 3, "pushed": 2}
BANK = {"start": 0, "statistics": "bank", "bank_length": 2, "statistics_from": "student", "features": "fused"}
MICRO_BATCHES = {
    "model": {"freeze_batch_norm": True},
    "data": {"batch_size": 3},
    "training": {"micro_batch": 2},
    "objectives": {
        "memory_contrast": MEMORY,
        "clustering": {"start": 1, "threshold": 0.2, "ramp_steps": 3},
        "prototype_contrast": BANK,
        "node_contrast": {"nodes": 9},
    },
    "masking": {"block": 16, "importance": "rarity", "ratio": 0.4},
}


@pytest.fixture
def assert_resume_is_exact(stop_after, monkeypatch):
    """Stop a run after a step, resume it, and compare its folder with that of one that never stopped."""

    def compare(settings, whole, parts, stop):
        with monkeypatch.context():
            stop_after(stop)
            with pytest.raises(Interrupted, match=f"stopped after step {stop}, state saved"):
                train(settings, parts)
            monkeypatch.undo()
        assert load_state(parts / "resume" / "state.pt")["step"] == stop
        torch.manual_seed(999)
        train(settings, parts, resume=True)
        states = [load_state(folder / "resume" / "state.pt") for folder in (whole, parts)]
        assert_same(*states)
        head = any(name.startswith("pixel_contrast.weighter") for name in states[0]["objectives"])
        assert head == bool(settings.model.multires)
        assert metrics(whole) == metrics(parts)
        for name in ("best.safetensors", "last.safetensors"):
            assert_same(load_file(whole / name), load_file(parts / name))

    return compare


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(
    tiny_settings, tmp_path, whole, assert_resume_is_exact, stop
):
    assert_resume_is_exact(tiny_settings, whole, tmp_path / "parts", stop)


@pytest.mark.parametrize(
    "changes", [DECAYED_ANCHORS, MICRO_BATCHES], ids=["anchors, layer decay", "micro-batches, memory, clustering"]
)
def test_resume_is_exact_with_two_resolutions(tiny_settings, tmp_path, assert_resume_is_exact, changes):
    """Stopped in the step in which mixed images begin to show the most uncertain detail."""
    tree = presets.merge(presets.merge(TWO_RESOLUTIONS, changes), {"training": {"steps": 4, "validate_every": 2}})
    settings = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), tree))
    train(settings, tmp_path / "whole")
    assert_resume_is_exact(settings, tmp_path / "whole", tmp_path / "parts", 3)


@pytest.mark.parametrize("source", ["clean", False], ids=["with source", "target alone"])
def test_a_run_with_labelled_target_images(source, tiny_settings, tmp_path, make_dataset, assert_resume_is_exact):
    """The split is in the folder of the run, and a resumed run keeps to it."""
    make_dataset("camera", images=6)
    changes = {
        "data": {"source": source, "target": "camera", "labelled": 2, "rare_class": {"min_pixels": 0}},
        "mixing": {"source_jitter_strength": 0.3},
        "training": {"steps": 3, "validate_every": 3, "pictures_every": 2},
    }
    settings = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), changes))
    train(settings, tmp_path / "whole")
    images = (tmp_path / "whole" / "labelled.txt").read_text().splitlines()
    assert images == open_datasets(settings.data, 0).labelled_images and len(images) == 2
    truth = ["source"] * bool(source) + ["labelled"]
    others = {f"{truth[0]}/feature_distance", f"{truth[0]}/pixel_contrast", "mixed/mixed", "mixed/pixel_contrast"}
    assert set(metrics(tmp_path / "whole")[0]["terms"]) == others | {f"{name}/{name}" for name in truth}
    assert json.loads((tmp_path / "whole" / "manifest.json").read_text())["labelled"] == 2
    assert_resume_is_exact(settings, tmp_path / "whole", tmp_path / "parts", 1)
    for change in ({"labelled": 3}, {"labelled": False, "source": "clean"}):
        other = presets.validate(presets.merge(settings.model_dump(mode="json"), {"data": change}))
        with pytest.raises(DataError, match="other (labelled images|datasets)"):
            train(other, tmp_path / "parts", resume=True)
    repeated = settings.data.model_copy(update={"labelled": str(tmp_path / "whole" / "labelled.txt")})
    assert open_datasets(repeated, 1).labelled_images == images


def test_resume_is_exact_with_adaptive_balance(tiny_settings, tmp_path, make_dataset, assert_resume_is_exact):
    """Confidence and remembered crops are state; the crop that is recalled in step 3 came before the stop."""
    make_dataset("camera", images=6)
    pastes = {"cutmix": True, "copy_paste": True, "slots": 3, "image_area": 1e-3, "box_area": 0.0}
    changes = {
        "data": {"source": False, "target": "camera", "labelled": 2, "rare_class": {"min_pixels": 0}},
        "objectives": {"adaptive_balance": pastes, "feature_distance": False, "pixel_contrast": False},
        "training": {"steps": 3, "validate_every": 3},
    }
    settings = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), changes))
    train(settings, tmp_path / "whole")
    assert set(metrics(tmp_path / "whole")[0]["terms"]) == {"pasted/labelled", "mixed/mixed", "cutmix/adaptive_balance"}
    assert_resume_is_exact(settings, tmp_path / "whole", tmp_path / "parts", 2)
    state = load_state(tmp_path / "parts" / "resume" / "state.pt")["objectives"]
    assert state["adaptive_balance.memory.contains"].any() and state["adaptive_balance.seen"].any()


def test_labels_of_a_few_target_images_alone(tiny_settings, tmp_path, make_dataset):
    """Supervised: no view needs a teacher, and classes are those of the target."""
    make_dataset("camera")
    changes = {
        "data": {"source": False, "target": "camera", "labelled": 1.0},
        "objectives": {"mixed": False, "feature_distance": False, "pixel_contrast": False},
        "training": {"steps": 1},
    }
    train(presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), changes)), tmp_path / "x")
    lines = metrics(tmp_path / "x")
    assert list(lines[0]["terms"]) == ["labelled/labelled"]
    assert {key.split("/")[0] for key in lines[-1] if "/" in key} == {"student"}


@pytest.mark.parametrize("preset", ["dinov2-cluda", "dinov2-small"])
def test_presets_of_dinov2_take_a_step(preset, tiny_settings, tmp_path):
    """With a small vision transformer: six blocks, the deepest at the full rate, the patch embedding at 0.9^6 of it."""
    small = {
        "data": tiny_settings.data.model_dump(
            mode="json", include={"source", "target", "root", "crop", "source_box", "target_box", "workers"}
        ),
        "model": {"encoder": "test_vit", "weights": False, "decoder": {"embed_dim": 8, "channels": 8}},
        "training": {"steps": 1, "pictures_every": 0, "device": "cpu"},
    }
    train(presets.load([preset], small), tmp_path / "x")
    groups = load_state(tmp_path / "x" / "resume" / "state.pt")["optimizer"]["param_groups"]
    rates = {group["name"]: group["base_lr"] for group in groups}
    assert rates["encoder 0"] == pytest.approx(0.9**6 * rates["encoder 6"])
    assert rates["decoder"] == pytest.approx(10 * rates["encoder 6"])
    (terms,) = (row["terms"] for row in metrics(tmp_path / "x") if "terms" in row)
    assert set(terms) == {
        "source/source",
        "mixed/mixed",
        "masked/masked",
        "source/pixel_contrast",
        "mixed/pixel_contrast",
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda n: n.name)
def test_other_requests_to_stop_save_like_ctrl_c(tiny_settings, tmp_path, stop_after, number):
    stop_after(2, number)
    with pytest.raises(Interrupted) as stopped:
        train(tiny_settings, tmp_path / "x")
    assert stopped.value.exit_code == 130
    assert stopped.value.remedy == f"resume with: cluda train --run {tmp_path / 'x'} --resume"
    assert load_state(tmp_path / "x" / "resume" / "state.pt")["step"] == 2


def test_a_request_during_validation_stops_there_and_resume_validates_again(
    tiny_settings, tmp_path, whole, monkeypatch
):
    honest = verb.score
    with monkeypatch.context() as patch:
        patch.setattr(verb, "score", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or honest(*a, **k))
        with pytest.raises(Interrupted, match="stopped after step 4"):
            train(tiny_settings, tmp_path / "parts")
    train(tiny_settings, tmp_path / "parts", resume=True)
    assert metrics(whole) == metrics(tmp_path / "parts")


def test_a_finished_run_has_nothing_to_resume(tiny_settings, tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "x")
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


def test_notes_are_logged_beside_the_terms_if_there_are_any():
    run, lines = SimpleNamespace(step=3, optimizer=SimpleNamespace(param_groups=[{"lr": 0.5}])), []
    for notes in ({"clustering/pairs alike": torch.tensor(0.25)}, {}):
        verb._log(run, SimpleNamespace(log=lines.append), StepResult({"a/b": torch.tensor(0.0)}, [], notes, 1.0))
    line = {"step": 3, "lr": 0.5, "terms": {"a/b": None}}
    assert lines == [line | {"notes": {"clustering/pairs alike": 0.25}}, line]


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
    layered = presets.validate(presets.merge(tree, {"optimizer": {"layer_decay": 0.9}}))
    with pytest.raises(SettingsError, match="optimizer.layer_decay and model.freeze decide how many"):
        train(layered, folder, resume=True)
    with pytest.raises(SettingsError, match="the run is at step 4, beyond 3"):
        train(with_training(tiny_settings, steps=3), folder, resume=True)


def test_a_request_while_best_weights_are_written_loses_nothing(tiny_settings, tmp_path, whole, monkeypatch):
    honest = RunFolder.save_best

    def save_best(files, run):
        os.kill(os.getpid(), signal.SIGINT)
        honest(files, run)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_best", save_best)
        with pytest.raises(Interrupted):
            train(tiny_settings, tmp_path / "parts")
    train(tiny_settings, tmp_path / "parts", resume=True)
    assert metrics(whole) == metrics(tmp_path / "parts")
    assert_same(*(load_file(folder / "best.safetensors") for folder in (whole, tmp_path / "parts")))


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


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("odd"), torch.OutOfMemoryError("full")], ids=repr)
def test_an_error_of_a_library_while_loading_costs_no_steps(tiny_settings, tmp_path, monkeypatch, error):
    honest = verb.batches

    def batches(*arguments, **options):
        for i, batch in enumerate(honest(*arguments, **options)):
            if i == 3:
                raise error
            yield batch

    monkeypatch.setattr(verb, "batches", batches)
    with pytest.raises(type(error), match=str(error)):
        train(with_training(tiny_settings, save_every=100), tmp_path / "x")
    assert load_state(tmp_path / "x" / "resume" / "state.pt")["step"] == 3


def test_a_validation_that_fails_costs_no_steps(tiny_settings, tmp_path, monkeypatch):
    def score(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(verb, "score", score)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        train(with_training(tiny_settings, save_every=100), tmp_path / "x")
    assert load_state(tmp_path / "x" / "resume" / "state.pt")["step"] == 4


def test_a_step_that_fails_leaves_the_last_save(tiny_settings, tmp_path, monkeypatch):
    honest = verb.training_step

    def training_step(run, batch):
        result = honest(run, batch)
        if run.step == 4:
            raise DataError("in the midst of a step")
        return result

    monkeypatch.setattr(verb, "training_step", training_step)
    with pytest.raises(DataError, match="in the midst of a step"):
        train(with_training(tiny_settings, save_every=3), tmp_path / "x")
    assert load_state(tmp_path / "x" / "resume" / "state.pt")["step"] == 3


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


def test_resume_is_exact_with_loader_processes(fork_server, tiny_settings, tmp_path, stop_after, monkeypatch):
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_loader_processes_end_with_the_run(tiny_settings, tmp_path, start_forked, number):
    settings = tmp_path / "settings.json"
    tree = with_training(tiny_settings, steps=1000).model_dump(mode="json")
    settings.write_text(json.dumps(presets.merge(tree, {"data": {"workers": 1}})))
    process = start_forked("cluda", "train", "--preset", settings, "--run", tmp_path / "x")
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "x" / "metrics.jsonl").exists():  # the first step is done, with a loader process
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    talk, _ = process.communicate(TIMEOUT)  # ends when no process holds the pipe any more
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert f"resume with: cluda train --run {tmp_path / 'x'} --resume" in talk


@pytest.mark.slow
def test_a_killed_run_resumes_and_leaves_no_unreadable_file(tiny_settings, tmp_path, start_forked):
    """SIGKILL at random moments, several times over one run; nothing past the last save interval is lost."""
    folder = tmp_path / "x"
    settings = tmp_path / "settings.json"
    settings.write_text(with_training(tiny_settings, steps=60, save_every=2, validate_every=7).model_dump_json())
    command = ["cluda", "train", "--preset", settings, "--run", folder]
    state, moments = folder / "resume" / "state.pt", random.Random(0)
    reached = 0
    for kill in range(4):
        began = time.monotonic()
        process = start_forked(*command, *(["--resume"] if kill else []))
        while process.poll() is None and (not state.exists() or load_state(state)["step"] <= reached):
            assert time.monotonic() - began < TIMEOUT, "no progress"
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.communicate(TIMEOUT)
        lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
        logged = max(json.loads(line)["step"] for line in lines)
        saved = load_state(state)["step"]
        assert logged - saved <= 2
        assert saved >= reached
        load_weights(folder / "last.safetensors", CPU)
        reached = saved
    process = start_forked(*command, "--resume")
    talk, _ = process.communicate(TIMEOUT)
    assert process.returncode == 0, talk
    assert load_state(state)["step"] == 60
