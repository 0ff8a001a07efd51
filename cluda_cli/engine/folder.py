"""The folder of a run: its files, when each appears, and what a resumed run reads. All ranks read; rank 0 writes.

settings.json      resolved settings, a valid preset        manifest.json      versions, data, hashes, settings
metrics.jsonl      a line per log and per validation        pictures/          what steps saw
labelled.txt       target images that come with labels, if any; a list for data.labelled
best.safetensors   weights with the best validation         last.safetensors   weights of the last save
resume/state.pt    everything from which the run goes on
"""

import json
import math
import platform
import subprocess
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision

from cluda_cli import __version__, console
from cluda_cli.data.datasets import Datasets
from cluda_cli.data.index import Index
from cluda_cli.distributed import collectives
from cluda_cli.engine.run import Run
from cluda_cli.engine.sharding import gather_model_state
from cluda_cli.engine.state_file import load_state, save_state
from cluda_cli.errors import DataError, SettingsError, first_line
from cluda_cli.files import is_vacant, locked, naming, read_text, write_json, write_text
from cluda_cli.inference.weights_file import NetworkDescription, save_weights


class Saved(NamedTuple):
    """What a run resumes from."""

    manifest: dict[str, Any]
    state: dict[str, Any]


class RunFolder:
    """Reads and writes one run folder; every file but the log appears atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings, self.manifest, self.metrics, self.labelled = (
            path / name for name in ("settings.json", "manifest.json", "metrics.jsonl", "labelled.txt")
        )
        self.best, self.last = path / "best.safetensors", path / "last.safetensors"
        self.state, self.pictures = path / "resume" / "state.pt", path / "pictures"

    def hold(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder; of the processes of a run, the first one does."""
        return nullcontext() if collectives.rank() else locked(self.path, "name another folder with --run")

    def refuse_taken(self, overwrite: bool) -> None:
        """Raises SettingsError if a new run would disturb an old one, or something that is not a run."""
        if self.settings.exists():
            if not overwrite:
                remedy = "go on with --resume, replace it with --overwrite, or name another folder with --run"
                raise SettingsError("this run exists", self.path, remedy)
        elif not is_vacant(self.path):
            raise SettingsError("exists and is not a run", self.path, "name another folder with --run")

    def begin(self, run: Run, datasets: Datasets) -> None:
        """Make the folder that of a new run, with a state from which a run killed early resumes too.

        The settings come first: a folder that has them is a run, and --overwrite replaces it.
        """
        state = run.state_dict()
        if collectives.rank():
            return
        for leftover in [self.state, self.metrics, self.labelled, self.best, self.last, *self.pictures.glob("*.png")]:
            leftover.unlink(missing_ok=True)
        self._keep_settings(run, _manifest(run, datasets))
        if images := datasets.labelled_images:
            write_text(self.labelled, "".join(f"{image}\n" for image in images))
        save_state(self.state, state)

    def read_saved(self, datasets: Datasets) -> Saved:
        """Read the manifest and the last saved state. Raises DataError if the data are not those the run began with."""
        indices = (*datasets.sources, datasets.target)
        try:
            began = json.loads(read_text(self.manifest), parse_constant=_refuse_constant)
            used = [(str(data["name"]), data["fingerprint"]) for data in (*began["sources"], began["target"])]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"cannot be read ({first_line(error)})"
            raise DataError(what, self.manifest, "start the run again with --overwrite") from error
        if [index.name for index in indices] != [name for name, _ in used]:
            what = f"the run began with other datasets: {', '.join(name for name, _ in used)}"
            raise DataError(what, self.manifest, "start a new run with --run")
        for index, (name, fingerprint) in zip(indices, used, strict=True):
            if index.fingerprint != fingerprint:
                what = f"the dataset {name} changed since the run began"
                raise DataError(what, index.folder, "start a new run with --run")
        if self._labelled_images() != datasets.labelled_images:
            what = "the run began with other labelled images than data.labelled and training.seed give now"
            raise DataError(what, self.labelled, f"set data.labelled={self.labelled}, or start a new run with --run")
        return Saved(began, load_state(self.state))

    def _labelled_images(self) -> list[str]:
        """The labelled target images with which the run began."""
        try:
            return self.labelled.read_text(encoding="utf-8").split("\n")[:-1] if self.labelled.exists() else []
        except (OSError, ValueError) as error:
            what = f"cannot be read ({first_line(error)})"
            raise DataError(what, self.labelled, "start the run again with --overwrite") from error

    def resume(self, run: Run, saved: Saved) -> None:
        """Bring a run to its saved state and the folder's files to its step; all ranks must call it.

        Raises SettingsError if the state does not fit the run, or is beyond its last step.
        """
        run.load_state_dict(saved.state)
        steps = run.settings.training.steps
        if run.step > steps:
            raise SettingsError(
                f"the run is at step {run.step}, beyond {steps}", "training.steps", "give a larger --steps"
            )
        if collectives.rank():
            return
        for path, found in run.frozen.items():
            if saved.manifest.get("frozen", {}).get(path, found) != found:
                console.warn(f"{path} is another file than when the run began")
        if self.metrics.is_file():  # what was written after the saved state will be written again
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(self.metrics, "".join(line + "\n" for line in lines if _belongs(line, run)))
        self._keep_settings(run, saved.manifest)

    def _keep_settings(self, run: Run, manifest: dict[str, Any]) -> None:
        """Write the settings in force; the manifest has them too, so that a later edit of the file is noticed."""
        write_text(self.settings, run.settings.model_dump_json(indent=2) + "\n")
        write_json(self.manifest, manifest | {"settings": run.settings.model_dump(mode="json")})

    def save(self, run: Run) -> None:
        """Last weights and resumable state; the state comes last, because the weights follow from it."""
        self._save_weights(run, self.last)
        state = run.state_dict()
        if not collectives.rank():
            save_state(self.state, state)

    def save_best(self, run: Run) -> None:
        self._save_weights(run, self.best)

    def _save_weights(self, run: Run, path: Path) -> None:
        name = run.evaluated_name
        state = gather_model_state(run.evaluated)
        if not collectives.rank():
            described = NetworkDescription(
                settings=run.settings, classes=run.classes, seen=run.seen, network_name=name, step=run.step
            )
            save_weights(path, state, described, normalisation=run.evaluated.normalisation)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to the metrics."""
        if collectives.rank():
            return
        with naming(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line)) + "\n")


def _finite(value: Any) -> Any:
    """NaN becomes null, which every JSON reader accepts."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _belongs(line: str, run: Run) -> bool:
    """Whether a line of metrics.jsonl was written before the saved state; one cut short by a kill was not."""
    try:
        content = json.loads(line)
        return bool(content["step"] <= (run.validated if "miou" in content else run.step))
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _manifest(run: Run, datasets: Datasets) -> dict[str, Any]:
    """What is needed to repeat the run: versions, commit, device, weights, datasets, classes."""
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    versions = {"cluda": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {"torchvision": str(torchvision.__version__), "timm": timm.__version__}
    weights = {"origin": run.weights.origin, "sha256": run.weights.sha256} if run.weights else None
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions,
        "commit": _commit(),
        "device": str(run.device),
        "devices": collectives.world_size(),
        "gpu": gpu,
        "platform": platform.platform(),
        "weights": weights,
        "start": run.start,
        "frozen": run.frozen,
        "sources": [_identify(source) for source in datasets.sources],
        "target": _identify(datasets.target),
        "labelled": len(datasets.labelled_images),
        "classes": list(run.classes.names),
        "unseen": [name for name in run.classes.names if name not in run.seen],
    }


def _identify(index: Index) -> dict[str, str]:
    return {"name": index.name, "fingerprint": index.fingerprint}


def _commit() -> str | None:
    """Git commit of a source checkout; None for an installed package."""
    package = Path(__file__).parents[1]
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
