"""The verb `train`: build or resume a run, loop, validate, save."""

import json
import math
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
import torchvision

from cluda_cli import __version__, console
from cluda_cli.data import index as prepared
from cluda_cli.data.index import Index
from cluda_cli.data.streams import Batch, batches
from cluda_cli.engine.checkpoint import load_state, save_state, save_weights
from cluda_cli.engine.device import pick_device
from cluda_cli.engine.pictures import write_pictures
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.errors import CludaError, DataError, Interrupted, SettingsError
from cluda_cli.evaluate import announce_classes, score
from cluda_cli.files import remove_temporaries, write_json, write_text
from cluda_cli.settings import Settings

STATE = Path("resume") / "state.pt"


def train(settings: Settings, folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Train to the last step and leave settings, manifest, metrics, pictures, state and weights in `folder`.

    Raises SettingsError for a folder that exists, RunError for a non-finite loss, Interrupted after Ctrl-C or SIGTERM,
    DataError for a file that turns out bad. Once the run has begun, its state is saved before any of them.
    """
    device = pick_device(settings.training.device)
    source = _dataset(settings.data.source, settings.data.root)
    target = _dataset(settings.data.target, settings.data.root)
    if not resume:
        _refuse_taken(folder, overwrite)
    if target.labelled("val"):
        announce_classes(target.classes, source.classes)
    run = Run(settings, source, device)
    if resume:
        _load(run, folder, source, target)
    steps, pin_memory = settings.training.steps, device.type == "cuda"
    stream = batches(source, target, settings.data, settings.training.seed, run.step, steps, pin_memory)
    _begin(run, folder, source, target, resume)
    if run.step == steps and (run.validated == steps or not target.labelled("val")):
        console.info(f"already finished ({steps} of {steps} steps); --steps makes the run longer")
        return
    _announce(run, folder, source, target)
    began = time.monotonic()
    with _StopRequest() as stop:
        try:
            _loop(run, folder, target, stream, stop)
        except KeyboardInterrupt:  # in the middle of a step, where the state is not worth saving
            raise Interrupted("stopped at once; the last saved state is kept", "", _resume_hint(folder)) from None
        except _StopAsked:
            _save(run, folder)
            raise Interrupted(f"stopped after step {run.step}, state saved", "", _resume_hint(folder)) from None
        except CludaError:
            _save(run, folder)
            raise
    console.info(f"done in {console.duration(time.monotonic() - began)}")
    _conclude(run, folder)


def _begin(run: Run, folder: Path, source: Index, target: Index, resume: bool) -> None:
    """Write what makes the folder a run; only now, when all that can be wrong with settings and data has been found."""
    if not resume:
        _clear(folder)
        write_json(folder / "manifest.json", _manifest(run, source, target))
    remove_temporaries(folder)
    remove_temporaries(folder / STATE.parent)
    write_text(folder / "settings.json", run.settings.model_dump_json(indent=2) + "\n")
    if not resume:
        save_state(folder / STATE, run.state_dict())  # so that a run killed early resumes too


def _loop(run: Run, folder: Path, target: Index, stream: Generator[Batch, None, None], stop: "_StopRequest") -> None:
    """The run from its step to the last: every-so-often work, one step, log."""
    training, steps = run.settings.training, run.settings.training.steps
    labelled = bool(target.labelled("val"))
    with closing(stream), console.Progress("training", steps, run.step) as progress:
        while True:
            if _due(run.step, training.save_every, steps):
                _save(run, folder)
            if stop.requested:
                raise _StopAsked
            if labelled and _due(run.step, training.validate_every, steps) and run.validated < run.step:
                with progress.paused():
                    _validate(run, folder, target, stop)
                _save(run, folder)
            if run.step == steps:
                return
            batch = next(stream).to(run.device)
            result = training_step(run, batch)
            if _due(run.step, training.log_every, steps) or run.step == 1:
                _log(run, folder, result.terms)
            if training.pictures_every and _due(run.step, training.pictures_every, steps):
                write_pictures(folder / "pictures" / f"{run.step:06d}.png", run, batch, result.views)
            progress.advance()


def _due(step: int, every: int, steps: int) -> bool:
    """Whether work that is done every so many steps, and at the end, is due after `step` finished steps."""
    return step > 0 and (step % every == 0 or step == steps)


def _validate(run: Run, folder: Path, target: Index, stop: "_StopRequest") -> None:
    """Score the evaluated network on the target's val split; keep its weights if it is the best so far."""
    settings, data = run.settings, run.settings.data
    with stop.immediate():
        scores = score(
            run.evaluated, target, "val", run.classes, run.seen, data.target_box, settings.evaluation, run.device
        )
    miou, accuracy = scores.miou, scores.pixel_accuracy
    best = math.isfinite(miou) and (run.best is None or miou > run.best["miou"])
    if best:
        _save_weights(run, folder / "best.safetensors")
        run.best = {"miou": miou, "step": run.step}
    line = {"step": run.step, "miou": miou, "iou": scores.iou_by_name(), "pixel_accuracy": accuracy}
    _append(folder / "metrics.jsonl", line)
    run.validated = run.step
    console.info(f"step {run.step}: {target.name} val mIoU {miou:.2f}, pixel accuracy {accuracy:.2f}")


def _save(run: Run, folder: Path) -> None:
    """Last weights and resumable state; the state comes last, because the weights follow from it."""
    _save_weights(run, folder / "last.safetensors")
    save_state(folder / STATE, run.state_dict())


def _save_weights(run: Run, path: Path) -> None:
    name = run.settings.evaluation.network
    save_weights(path, run.evaluated, run.settings, run.classes, run.seen, name, run.step)


def _log(run: Run, folder: Path, terms: dict[str, torch.Tensor]) -> None:
    """One line of metrics.jsonl; null is a term that had nothing to measure in this step."""
    values = {name: value or None for name, value in ((name, float(value)) for name, value in terms.items())}
    rate = run.optimizer.param_groups[0]["lr"]
    _append(folder / "metrics.jsonl", {"step": run.step, "lr": rate, "terms": values})


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(line)) + "\n")


def _finite(value: Any) -> Any:
    """NaN becomes null, which every JSON reader accepts."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dataset(name: str, root: Path) -> Index:
    """A prepared dataset; the demo is made on the spot, because nothing has to be fetched for it."""
    if name in {"demo-render", "demo-camera"} and not (root / "prepared" / name / "index.json").is_file():
        from cluda_cli.prepare import prepare

        with redirect_stdout(sys.stderr):  # here the report is talk
            prepare("demo", root)
    return prepared.find(name, root)


def _refuse_taken(folder: Path, overwrite: bool) -> None:
    """A new run disturbs no old one, and nothing that is not a run."""
    if (folder / "settings.json").exists():
        if not overwrite:
            remedy = "go on with --resume, replace it with --overwrite, or name another folder with --run"
            raise SettingsError("this run exists", folder, remedy)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError("exists and is not a run", folder, "name another folder with --run")


def _clear(folder: Path) -> None:
    """Remove what an overwritten run left; its manifest and settings are about to be replaced."""
    leftovers = [folder / name for name in ("metrics.jsonl", "best.safetensors", "last.safetensors", STATE)]
    for path in [*leftovers, *(folder / "pictures").glob("*.png")]:
        path.unlink(missing_ok=True)


def _load(run: Run, folder: Path, source: Index, target: Index) -> None:
    """Bring a run to its last saved state. Raises DataError if the data are not those it began with."""
    path = folder / "manifest.json"
    try:
        began = json.loads(path.read_text(encoding="utf-8"))
        fingerprints = {"source": began["source"]["fingerprint"], "target": began["target"]["fingerprint"]}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot be read ({error})", path, "a run is resumed from its own folder") from error
    for domain, index in (("source", source), ("target", target)):
        if index.fingerprint != fingerprints[domain]:
            raise DataError(
                f"the {domain} dataset changed since the run began", index.folder, "start a new run with --run"
            )
    run.load_state_dict(load_state(folder / STATE))
    steps = run.settings.training.steps
    if run.step > steps:
        raise SettingsError(f"the run is at step {run.step}, beyond {steps}", "training.steps", "give a larger --steps")
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():  # lines after the saved state will be written again
        lines = [line for line in metrics.read_text(encoding="utf-8").splitlines() if _belongs(line, run)]
        write_text(metrics, "".join(line + "\n" for line in lines))


def _belongs(line: str, run: Run) -> bool:
    """Whether a line of metrics.jsonl was written before the saved state; one cut short by a kill was not."""
    try:
        content = json.loads(line)
        return bool(content["step"] <= (run.validated if "miou" in content else run.step))
    except (ValueError, KeyError, TypeError):
        return False


def _manifest(run: Run, source: Index, target: Index) -> dict[str, Any]:
    """What one needs to know to repeat the run."""
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    versions = {"cluda": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {"torchvision": str(torchvision.__version__), "timm": timm.__version__}
    weights = {"origin": run.weights.origin, "sha256": run.weights.sha256} if run.weights else None
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions,
        "commit": _commit(),
        "device": str(run.device),
        "gpu": gpu,
        "platform": platform.platform(),
        "weights": weights,
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "target": {"name": target.name, "fingerprint": target.fingerprint},
        "classes": list(run.classes.names),
        "unseen": [name for name in run.classes.names if name not in run.seen],
    }


def _commit() -> str | None:
    """Git commit of a source checkout; None for an installed package."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _announce(run: Run, folder: Path, source: Index, target: Index) -> None:
    """Say once what was derived, and warn of settings that have no effect."""
    settings, training = run.settings, run.settings.training
    parameters = sum(p.numel() for p in run.student.parameters()) / 1e6
    console.info(
        f"{source.name} -> {target.name}, {settings.model.encoder}, {parameters:.1f} M parameters, on {run.device}"
    )
    console.info(run.weights.summary() if run.weights else "encoder starts from random weights")
    console.info(f"objectives: {', '.join(run.objectives)}; run folder {folder}")
    if run.step:
        console.info(f"resuming after step {run.step} of {training.steps}")
    unseen = [name for name in run.classes.names if name not in run.seen]
    if unseen:
        console.warn(f"classes that never occur in the source: {', '.join(unseen)}; the mean IoU leaves them out")
    if settings.optimizer.warmup >= training.steps:
        console.warn(
            f"optimizer.warmup ({settings.optimizer.warmup}) is not shorter than the run ({training.steps} steps)"
        )
    if not target.labelled("val"):
        console.warn(f"{target.name} has no labelled val split: nothing is validated, only last.safetensors is written")
    if run.device.type == "cpu" and (training.compile or training.precision == "bfloat16"):
        console.warn("training.compile and training.precision=bfloat16 are ignored on the CPU")


def _conclude(run: Run, folder: Path) -> None:
    """Where the result is, and the next command."""
    best = folder / "best.safetensors"
    if run.best:
        console.info(f"best mIoU {run.best['miou']:.2f} at step {run.best['step']:.0f}: {best}")
    weights = shlex.quote(str(best if best.is_file() else folder / "last.safetensors"))
    console.info(f"next: cluda eval --ckpt {weights}   or   cluda predict images/ --ckpt {weights}")


def _resume_hint(folder: Path) -> str:
    return f"resume with: cluda train --run {shlex.quote(str(folder))} --resume"


class _StopAsked(Exception):  # noqa: N818  a request is no error
    """Raised where the state of the run is whole."""


class _StopRequest:
    """Ctrl-C and SIGTERM: the first asks the loop to stop after its step, the second stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._immediate:
            raise _StopAsked
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        console.info("stopping after this step; once more stops at once")

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """While the run's state does not change (validation), one request is enough to stop."""
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False
