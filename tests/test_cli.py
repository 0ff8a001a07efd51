"""The command line: exact output, exit codes, and what each command hands to its verb."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluda_cli import __version__, presets
from cluda_cli.cli import app

run = CliRunner().invoke


def test_no_arguments_print_help_with_examples():
    result = run(app, [])
    assert result.exit_code == 0
    assert "Examples:\n    cluda train --preset demo " in result.output
    assert "130 interrupted with state saved" in result.output


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    "command",
    [
        "prepare",
        "train",
        "bench",
        "pseudo-label",
        "eval",
        "compare",
        "report",
        "predict",
        "import-weights",
        "doctor",
        "presets",
    ],
)
def test_every_command_has_both_helps(command, flag):
    result = run(app, [command, flag])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: root {command} [OPTIONS]") or f" {command} [OPTIONS]" in result.output


def test_version():
    assert run(app, ["--version"]).output == f"cluda {__version__}\n"


def test_help_is_answered_without_torch():
    """Its import alone takes seconds; without it help takes a tenth of one."""
    code = "import sys; from cluda_cli.cli import app; app(['--help'], standalone_mode=False); "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "cluda train" in done.stdout


def test_presets_are_listed_with_their_first_line():
    result = run(app, ["presets"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == presets.names()
    assert run(app, ["presets", "list"]).stdout == result.stdout


def test_shown_settings_go_to_stdout_and_are_a_preset(tmp_path):
    result = run(app, ["presets", "show", "dacs", "small", "--set", "training.seed=3"])
    assert result.stderr == ""
    shown = tmp_path / "shown.toml"
    shown.write_text(result.stdout)
    assert presets.load([str(shown)]) == presets.load(["dacs", "small"], None, ["training.seed=3"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--preset", "dafromer"], 2, 'error: --preset: no preset "dafromer"\n  did you mean daformer?'),
        (
            ["train", "--set", "training.step=3"],
            2,
            "error: training.step: no such setting; did you mean training.steps?",
        ),
        (["train", "--resume", "--overwrite"], 2, "error: train: --resume and --overwrite exclude each other"),
        (["train", "--resume"], 2, "error: runs: no run to resume\n  name one with --run"),
        (["train", "--resume", "--run", "nowhere"], 2, "error: nowhere: there is no such run to resume"),
        (["train", "--seed", "1", "--seed=2"], 2, "error: --seed: is given twice"),
        (["train", "--target", "a", "--target", "a"], 2, "error: --target: is given twice"),
        (["eval", "--ckpt", "a", "--ckpt", "b"], 2, "error: --ckpt: is given twice"),
        (["predict", "images", "--out", "a", "--out", "b"], 2, "error: --out: is given twice"),
        (["prepare", "gta", "--check", "--check"], 2, "error: --check: is given twice"),
        (
            ["train"],
            3,
            'error: data/prepared: dataset "gta" is not prepared\n  run `cluda prepare gta --data-root data`',
        ),
        (["train", "--device", "cuda:7"], 4, 'error: training.device: device "cuda:7" cannot be used'),
        (["train", "--device", "toaster"], 4, 'error: training.device: device "toaster" cannot be used'),
        (["eval", "--ckpt", "none.safetensors"], 3, "error: none.safetensors: no such weights file"),
        (["predict", "images"], 3, "error: runs: "),
        (["predict", "images", "--ckpt", "none.safetensors"], 3, "error: images: no such file or folder"),
        (["pseudo-label", "--ckpt", "none.safetensors"], 3, "error: none.safetensors: no such weights file"),
        (["prepare", "gta"], 3, "error: "),
        (["prepare", "nosuch"], 2, "error: "),
        (["presets", "shwo"], 2, 'error: presets: "shwo" is neither list nor show'),
    ],
)
def test_failures_are_one_clear_message_with_their_exit_code(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(app, arguments)
    assert result.stderr.startswith(message), result.stderr
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--stepz", "3"], ["eval"], ["train", "--steps", "many"]])
def test_wrong_usage_exits_2(arguments):
    assert run(app, arguments).exit_code == 2


def test_named_options_lie_between_presets_and_overrides(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        "cluda_cli.commands.train.train", lambda settings, folder, **flags: seen.update(s=settings, f=folder, **flags)
    )
    arguments = [
        "train",
        "--preset",
        "dacs",
        "--preset",
        "small",
        "--source",
        "synthia",
        "--target",
        "acdc",
        "--seed",
        "5",
    ]
    arguments += ["--data-root", str(tmp_path), "--steps", "9", "--device", "cpu", "--set", "training.steps=8"]
    assert run(app, arguments).exit_code == 0
    settings = seen["s"]
    assert (settings.data.source, settings.data.target, settings.data.root) == (("synthia",), "acdc", tmp_path)
    assert (settings.training.seed, settings.training.steps, settings.training.device) == (5, 8, "cpu")
    assert (settings.teacher.decay, settings.data.crop) == (0.99, (240, 320))
    folder = Path("runs/dacs-small-source=synthia-target=acdc-seed=5-steps=8")
    assert (seen["f"], seen["resume"], seen["overwrite"]) == (folder, False, False)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "defaults"),
        (["--preset", "dacs", "--device", "cpu", "--data-root", "d"], "dacs"),
        (["--preset", "dacs", "--seed", "0"], "dacs-seed=0"),
        (["--preset", "dacs", "--set", "training.seed=1"], "dacs-seed=1"),
        (["--preset", "dacs", "--set", "optimizer.lr=1e-3"], "dacs-optimizer.lr=0.001"),
        (["--source", "a", "--source", "b"], "defaults-source=a+b"),
    ],
    ids=str,
)
def test_a_run_folder_is_named_by_presets_and_changes(monkeypatch, arguments, name):
    seen = []
    monkeypatch.setattr("cluda_cli.commands.train.train", lambda settings, folder, **_: seen.append(folder))
    assert run(app, ["train", *arguments]).exit_code == 0
    assert seen == [Path("runs") / name]


def test_run_folders_with_long_or_odd_values_are_short_and_differ(monkeypatch):
    seen = []
    monkeypatch.setattr("cluda_cli.commands.train.train", lambda settings, folder, **_: seen.append(folder))
    for source in ("x/y", "x_y", "x y", "é" * 300, "é" * 301):
        assert run(app, ["train", "--source", source]).exit_code == 0
    assert len(set(seen)) == 5
    assert all(len(folder.name.encode()) < 200 and "/" not in folder.name for folder in seen)


def test_resuming_finds_the_folder_of_the_changes_or_that_of_the_presets(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("cluda_cli.commands.train.train", lambda settings, folder, **_: seen.append(folder))
    monkeypatch.chdir(tmp_path)
    for name in ("dacs", "dacs-seed=1"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "settings.json").write_text("{}")
    for options in (["--seed", "1"], ["--steps", "90000"]):
        assert run(app, ["train", "--preset", "dacs", "--resume", *options]).exit_code == 0
    assert seen == [Path("runs/dacs-seed=1"), Path("runs/dacs")]


def test_an_unforeseen_runtime_error_is_not_swallowed(monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("cluda_cli.commands.train.train", fail)
    assert isinstance(run(app, ["train"]).exception, RuntimeError)


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (MemoryError(), "CPU"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "CPU",
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "GPU"),
    ],
)
def test_memory_that_runs_out_is_one_line(monkeypatch, error, where):
    def exhaust(*_, **__):
        raise error

    monkeypatch.setattr("cluda_cli.commands.evaluate.evaluate", exhaust)
    result = run(app, ["eval", "--ckpt", "x.safetensors"])
    assert result.exit_code == 4
    assert result.stderr.splitlines()[0] == f"error: out of memory on the {where}"


def test_a_full_disk_is_an_environment_problem(monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "runs/x/last.safetensors")

    monkeypatch.setattr("cluda_cli.commands.train.train", fail)
    result = run(app, ["train"])
    assert result.exit_code == 4
    assert result.stderr.startswith("error: runs/x/last.safetensors: No space left on device")


def test_the_whole_path_from_training_to_pictures(tiny_settings, tmp_path, monkeypatch):
    """train, eval, predict, pseudo-label, and training again on the pseudo-labels, as a user would type it."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(tiny_settings.model_dump_json())
    assert run(app, ["train", "--preset", "tiny.json", "--run", "runs/tiny", "--steps", "2"]).exit_code == 0
    evaluated = run(app, ["eval", "--ckpt", "runs/tiny/best.safetensors", "--json"])
    assert evaluated.exit_code == 0
    scores = json.loads(evaluated.stdout)
    assert set(scores["protocols"]) == {"all"}
    assert scores["images"] == 2
    assert run(app, ["predict", "data/noisy/val"]).exit_code == 0
    assert {p.name for p in Path("predictions").iterdir()} == {"train-id", "color", "overlay"}
    labelled = run(app, ["pseudo-label", "--ckpt", "runs/tiny/last.safetensors", "--threshold", "0", "--out", "pseudo"])
    assert labelled.exit_code == 0, labelled.stderr
    again = run(app, ["train", "--preset", "tiny.json", "--source", "pseudo", "--run", "runs/again", "--steps", "1"])
    assert again.exit_code == 0, again.stderr


def test_a_group_of_seeds_has_a_folder_for_each_and_goes_on_with_those_that_began(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        "cluda_cli.commands.train.train",
        lambda settings, folder, *, resume, overwrite: seen.append((settings.training.seed, folder, resume)),
    )
    assert run(app, ["train", "--preset", "dacs", "--seeds", "0,2"]).exit_code == 0
    assert seen == [(0, Path("runs/dacs-seed=0"), False), (2, Path("runs/dacs-seed=2"), False)]
    seen.clear()
    begun = tmp_path / "group" / "seed=2"
    begun.mkdir(parents=True)
    (begun / "settings.json").write_text('{"training": {"seed": 2}}')
    result = run(app, ["train", "--preset", "dacs", "--seeds", "0,2", "--run", "group", "--resume"])
    assert result.exit_code == 0
    assert seen == [(0, Path("group/seed=0"), False), (2, Path("group/seed=2"), True)]
    assert "next: cluda compare group/seed=0 group/seed=2" in result.stderr


@pytest.mark.parametrize("seeds", ["", "a", "0,,1", "0,0", "-1", "1.5", "0,00"])
def test_what_is_no_list_of_seeds_is_refused(seeds):
    result = run(app, ["train", "--seeds", seeds])
    assert result.exit_code == 2
    assert "--seeds" in result.stderr


@pytest.mark.parametrize("other", [["--seed", "1"], ["--devices", "2"]])
def test_a_group_of_seeds_excludes_what_does_not_go_with_it(other):
    assert run(app, ["train", "--seeds", "0,1", *other]).exit_code == 2
