"""The folder of a run: what appears when, what a resumed run takes from it, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch

from cluda_cli import presets
from cluda_cli.data.datasets import Datasets
from cluda_cli.distributed import collectives
from cluda_cli.engine.folder import RunFolder
from cluda_cli.engine.run import Run
from cluda_cli.engine.state_file import load_state
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.inference.weights_file import load_weights

CPU = torch.device("cpu")


def given(source, target):
    return Datasets((source,), target, target, None)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "x")


def files_in(folder):
    return {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file()}


def lines(folder):
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def test_a_run_begins_with_settings_manifest_and_a_state(run, domains, folder):
    folder.begin(run, given(*domains))
    assert files_in(folder) == {"settings.json", "manifest.json", "resume/state.pt"}
    assert presets.load([str(folder.settings)]) == run.settings
    assert load_state(folder.state)["step"] == 0
    manifest = json.loads(folder.manifest.read_text())
    assert [data["name"] for data in (*manifest["sources"], manifest["target"])] == ["clean", "noisy"]
    assert manifest["sources"][0]["fingerprint"] == domains[0].fingerprint
    assert manifest["classes"] == list(run.classes.names)
    assert (manifest["device"], manifest["devices"], manifest["start"]) == ("cpu", 1, None)
    assert manifest["weights"]["sha256"] == run.weights.sha256


def test_a_new_run_leaves_nothing_of_an_old_one(run, domains, folder):
    old = [
        folder.metrics,
        folder.best,
        folder.last,
        folder.pictures / "000003.png",
        folder.path / ".cluda-abcd1234.tmp.x",
    ]
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with folder.hold():
        folder.begin(run, given(*domains))
    assert not any(path.exists() for path in old)


def test_only_a_new_folder_or_a_run_to_overwrite_is_taken(run, domains, folder):
    folder.refuse_taken(overwrite=False)
    folder.begin(run, given(*domains))
    with pytest.raises(SettingsError, match="this run exists -> go on with --resume"):
        folder.refuse_taken(overwrite=False)
    folder.refuse_taken(overwrite=True)
    folder.settings.unlink()
    with pytest.raises(SettingsError, match="exists and is not a run"):
        folder.refuse_taken(overwrite=True)


def test_a_save_leaves_weights_and_state_of_one_step(run, folder):
    run.step = 3
    folder.save(run)
    assert files_in(folder) == {"last.safetensors", "resume/state.pt"}
    assert load_state(folder.state)["step"] == load_weights(folder.last, CPU).step == 3
    folder.save_best(run)
    assert load_weights(folder.best, CPU).classes == run.classes


def test_weights_of_a_run_carry_the_normalisation_of_its_encoder(tiny_settings, domains, folder):
    change = {
        "model": {"encoder": "tf_efficientnet_lite0", "weights": False},
        "objectives": {"feature_distance": False},
    }
    settings = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), change))
    folder.save_best(Run(settings, domains[:1], CPU))
    assert load_weights(folder.best, CPU).network.normalisation.mean == (127.5, 127.5, 127.5)


def test_what_is_not_finite_is_logged_as_null(folder):
    folder.path.mkdir()
    folder.log({"step": 1, "miou": float("nan"), "terms": {"a/b": float("inf"), "c/d": 1.5}})
    folder.log({"step": 2, "iou": {"road": None}})
    assert lines(folder) == [
        {"step": 1, "miou": None, "terms": {"a/b": None, "c/d": 1.5}},
        {"step": 2, "iou": {"road": None}},
    ]


def test_a_resumed_run_forgets_lines_that_it_will_write_again(run, domains, folder):
    run.step, run.validated = 4, 2
    folder.begin(run, given(*domains))
    kept = [{"step": 2, "terms": {}}, {"step": 2, "miou": 1.0}, {"step": 4, "terms": {}}]
    later = [{"step": 4, "miou": 2.0}, {"step": 5, "terms": {}}]
    for line in (*kept, *later):
        folder.log(line)
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "te')  # cut short by a kill
    fresh = Run(run.settings, domains[:1], CPU)
    folder.resume(fresh, folder.read_saved(given(*domains)))
    assert lines(folder) == kept
    assert (fresh.step, fresh.validated) == (4, 2)


def test_a_resumed_run_keeps_the_settings_in_force(tiny_settings, run, domains, folder):
    folder.begin(run, given(*domains))
    tree = presets.merge(tiny_settings.model_dump(mode="json"), {"training": {"steps": 9}})
    longer = Run(presets.validate(tree), domains[:1], CPU)
    folder.resume(longer, folder.read_saved(given(*domains)))
    assert presets.load([str(folder.settings)]) == longer.settings


def test_other_data_are_refused_on_resume(run, domains, folder):
    source, target = domains
    folder.begin(run, given(source, target))
    with pytest.raises(DataError, match="the run began with other datasets: clean, noisy"):
        folder.read_saved(given(replace(source, name="other"), target))
    manifest = json.loads(folder.manifest.read_text())
    manifest["sources"][0]["fingerprint"] = "0"
    folder.manifest.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the dataset clean changed since the run began"):
        folder.read_saved(given(source, target))
    folder.manifest.write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read .* -> start the run again with --overwrite"):
        folder.read_saved(given(source, target))


def test_a_state_beyond_the_last_step_is_refused(run, domains, folder):
    run.step = 7  # of 6
    folder.begin(run, given(*domains))
    with pytest.raises(SettingsError, match=r"the run is at step 7, beyond 6 -> give a larger --steps"):
        folder.resume(run, folder.read_saved(given(*domains)))


def test_only_the_first_rank_writes(run, domains, folder, monkeypatch):
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    folder.begin(run, given(*domains))
    folder.save(run)
    folder.log({"step": 1})
    assert not folder.path.exists()
