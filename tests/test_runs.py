"""Names of default folders, and the run that is resumed."""

from pathlib import Path

from cluda_cli.runs import find_resumable, name_folder


def test_resume_never_takes_the_run_of_another_seed_or_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "settings.json").touch()
    assert find_resumable(["demo"], {"training": {"steps": 9}}, []) == Path("runs/demo")
    assert find_resumable(["demo"], {"training": {"seed": 7}}, []) == Path("runs/demo-seed=7")
    assert find_resumable(["demo"], {}, ["data.source=gta"]) == Path("runs/demo-source=gta")


def test_the_name_holds_presets_and_changes_and_neither_data_root_nor_device():
    options = {"training": {"seed": 1, "device": "cpu"}, "data": {"root": "/data"}}
    assert name_folder(["dacs", "small"], options, ["optimizer.lr=1e-4"]) == Path(
        "runs/dacs-small-optimizer.lr=0.0001-seed=1"
    )


def test_names_that_are_cut_short_stay_different():
    long = [name_folder(["dacs"], {}, [f'model.weights="{"x" * 300}{end}"']) for end in "ab"]
    assert long[0] != long[1]
    assert all(len(folder.name) < 200 for folder in long)
