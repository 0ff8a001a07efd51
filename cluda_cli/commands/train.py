"""The verb `train`: build or resume a run, loop, validate, save."""

import math
import shlex
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli import console
from cluda_cli.adaptation.views import WITHOUT_TEACHER
from cluda_cli.commands.no_effect import find_no_effect
from cluda_cli.data.batch import Batch, to_device
from cluda_cli.data.datasets import Datasets, open_datasets
from cluda_cli.data.index import Index
from cluda_cli.data.streams import batches
from cluda_cli.distributed import collectives
from cluda_cli.distributed.children import heeded_signals
from cluda_cli.engine.folder import RunFolder, Saved
from cluda_cli.engine.pictures import write_pictures
from cluda_cli.engine.run import Run
from cluda_cli.engine.sharding import unsharded
from cluda_cli.engine.step import StepResult, training_step
from cluda_cli.errors import Interrupted, SettingsError
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.metrics import Scores
from cluda_cli.inference.scoring import compare_classes, score
from cluda_cli.models.multires import MultiResolution
from cluda_cli.settings import Settings

SMOOTHING = 0.1
"""Share of a step's loss in the loss that is shown, which is the mean of about the last ten steps."""
ECHO = 1.0
"""Seconds in which a request to stop that reaches a process twice is one."""


def train(settings: Settings, folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Train to the last step and leave settings, manifest, metrics, pictures, state and weights in `folder`.

    Started by torchrun, this is one of the processes that train the run together.

    Raises SettingsError for a folder that exists or that another process writes into, RunError for a non-finite loss,
    Interrupted after a request to stop, DataError for a file that turns out bad. If loading or validation fails, with
    whatever error, the state after the last step is saved first. A step that fails leaves the last save.
    """
    files = RunFolder(folder)
    with collectives.process_group(), ExitStack() as held:
        with collectives.fail_together():
            held.enter_context(files.hold())
        _train(settings, files, resume, overwrite)


def _train(settings: Settings, files: RunFolder, resume: bool, overwrite: bool) -> None:
    """`train`, among the processes of the run and while no other run can write into its folder."""
    folder = files.path
    with collectives.fail_together():
        if not collectives.rank():
            _make_demo(settings)
    with collectives.fail_together():
        run, datasets, saved = _build(settings, files, resume, overwrite)
    target = datasets.target
    if saved:  # to spread a state over ranks takes all of them, so only now, when all have read it
        files.resume(run, saved)
    with collectives.fail_together():
        stream = _open_stream(run, datasets)
    steps = settings.training.steps
    with _StopRequest() as stop:
        if not resume:  # only now, when all that can be wrong with settings and data has been found
            files.begin(run, datasets)
        if run.step == steps and (run.validated == steps or not target.labelled("val")):
            console.info(f"already finished ({steps} of {steps} steps); --steps makes the run longer")
            return
        _announce(run, folder, datasets)
        began = time.monotonic()
        try:
            _loop(run, files, target, stream, stop)
        except KeyboardInterrupt:  # in the middle of a step, where the state is not worth saving
            raise Interrupted("stopped at once; the last saved state is kept", "", _resume_hint(folder)) from None
        except _StopAsked:
            files.save(run)
            raise Interrupted(f"stopped after step {run.step}, state saved", "", _resume_hint(folder)) from None
    console.info(f"done in {console.duration(time.monotonic() - began)}")
    _conclude(run, files, target)


def _build(settings: Settings, files: RunFolder, resume: bool, overwrite: bool) -> tuple[Run, Datasets, Saved | None]:
    """A new run, its datasets, and what it resumes from; writes nothing."""
    data, training = settings.data, settings.training
    collectives.local_positions(data.batch_size)  # refuses a batch that the ranks cannot share
    device = pick_device(collectives.local_device(training.device))
    datasets = open_datasets(data, training.seed)
    if not resume:
        files.refuse_taken(overwrite)
        _refuse_own_weights(settings, files.path)
    run = Run(settings, datasets.sources, device, labelled=datasets.labelled, resumed=resume)
    if datasets.target.labelled("val"):
        compare_classes(datasets.target.classes, run.classes)
    return run, datasets, files.read_saved(datasets) if resume else None


def _open_stream(run: Run, datasets: Datasets) -> Generator[Batch, None, None]:
    """The batches of this rank from the step of the run on."""
    data, training = run.settings.data, run.settings.training
    return batches(
        datasets.sources, datasets.unlabelled, data, training.seed, run.step, training.steps,
        labelled=datasets.labelled, pin_memory=run.device.type == "cuda",
        positions=collectives.local_positions(data.batch_size), source_law=run.source_law,
        paired=run.paired,
    )  # fmt: skip


def _refuse_own_weights(settings: Settings, folder: Path) -> None:
    """Raises SettingsError for weights that lie in the folder of the new run, which would remove them."""
    model = settings.model
    used = {"model.start": model.start, "model.weights": model.weights, "model.teacher": model.teacher}
    if distance := settings.objectives.feature_distance:
        used["objectives.feature_distance.network"] = distance.network
    for name, value in used.items():
        if value and Path(value).is_file() and Path(value).resolve().is_relative_to(folder.resolve()):
            raise SettingsError("lies in the folder that this run replaces", name, "copy it, or name another --run")


def _loop(
    run: Run, files: RunFolder, target: Index, stream: Generator[Batch, None, None], stop: "_StopRequest"
) -> None:
    """The run from its step to the last: every-so-often work, one step, log."""
    training, steps = run.settings.training, run.settings.training.steps
    labelled = bool(target.labelled("val"))
    loss: float | None = None
    with closing(stream), console.Progress("training", steps, run.step) as progress:
        while True:
            if _due(run.step, training.save_every, steps):
                files.save(run)
            if collectives.any_rank(stop.requested):
                raise _StopAsked
            if labelled and _due(run.step, training.validate_every, steps) and run.validated < run.step:
                with progress.paused(), _save_if_it_fails(run, files):
                    _validate(run, files, target, stop)
                files.save(run)
            if run.step == steps:
                return
            with _save_if_it_fails(run, files):
                batch = to_device(next(stream), run.device)
            result = training_step(run, batch)
            loss = result.loss if loss is None else loss + SMOOTHING * (result.loss - loss)
            if _due(run.step, training.log_every, steps) or run.step == 1:
                _log(run, files, result)
            if training.pictures_every and _due(run.step, training.pictures_every, steps):
                write_pictures(files.pictures / f"{run.step:06d}.png", run, batch, result.views)
            progress.advance(f"loss {loss:.3f}")


@contextmanager
def _save_if_it_fails(run: Run, files: RunFolder) -> Iterator[None]:
    """For work between steps: if it fails on any rank, all ranks save the state of the run and raise the error."""
    try:
        with collectives.fail_together():
            yield
    except (_StopAsked, collectives.RankLost):
        raise
    except Exception:
        files.save(run)
        raise


def _due(step: int, every: int, steps: int) -> bool:
    """Whether work that is done every so many steps, and at the end, is due after `step` finished steps."""
    return step > 0 and (step % every == 0 or step == steps)


def _validate(run: Run, files: RunFolder, target: Index, stop: "_StopRequest") -> None:
    """Score student and teacher on the target's val split. Keep the evaluated one's weights if they are the best."""
    settings, data, found = run.settings, run.settings.data, {}
    with stop.immediate():
        for name, network in run.networks.items():
            with unsharded(network):
                found[name] = score(
                    network, target, split="val", classes=run.classes, seen=run.seen, box=data.target_box,
                    evaluation=settings.inference, device=run.device,
                )  # fmt: skip
    lines = {name: _summarise(scores) for name, scores in found.items()}
    line = {"step": run.step} | lines[run.evaluated_name]
    miou = line["miou"]
    best = math.isfinite(miou) and (run.best is None or miou > run.best["miou"])
    if best:
        files.save_best(run)
        run.best = {"miou": miou, "step": run.step}
    files.log(line | {f"{name}/{key}": value for name, keys in lines.items() for key, value in keys.items()})
    run.validated = run.step
    for name, scores in found.items():
        common = f" (common pixels {scores.miou_common_pixels:.2f})" if scores.target_private else ""
        rest = f"pixel accuracy {scores.pixel_accuracy:.2f}, {name}"
        console.info(f"step {run.step}: {target.name} val mIoU {scores.miou:.2f}{common}, {rest}")
    if "teacher" in found and found["teacher"].never_predicted:
        lost = ", ".join(found["teacher"].never_predicted)
        console.warn(f"step {run.step}: the teacher predicts no pixel of {target.name} val as {lost}")


def _summarise(scores: Scores) -> dict[str, Any]:
    """What a validation logs of one network."""
    return {
        "miou": scores.miou,
        "miou_common_pixels": scores.miou_common_pixels,
        "iou": scores.iou_by_name(),
        "pixel_accuracy": scores.pixel_accuracy,
        "never_predicted": scores.never_predicted,
    }


def _log(run: Run, files: RunFolder, result: StepResult) -> None:
    """One line of metrics.jsonl, where null is a term that had nothing to measure. Notes are there if there are any."""
    terms = {name: float(value) or None for name, value in result.terms.items()}
    notes = {name: float(value) for name, value in result.notes.items()}
    rate = run.optimizer.param_groups[0]["lr"]
    files.log({"step": run.step, "lr": rate, "terms": terms} | ({"notes": notes} if notes else {}))


def _make_demo(settings: Settings) -> None:
    """Prepare the demo on the spot where it is wanted and missing, because nothing has to be fetched for it."""
    data = settings.data
    wanted = {*data.source, data.target} & {"demo-render", "demo-camera"}
    if any(not (data.root / "prepared" / name / "index.json").is_file() for name in wanted):
        from cluda_cli.commands.prepare import prepare

        with redirect_stdout(sys.stderr):  # here the report is talk
            prepare("demo", data.root)


def _announce(run: Run, folder: Path, datasets: Datasets) -> None:
    """Say once what was derived, and warn of settings that have no effect."""
    settings, training, target = run.settings, run.settings.training, datasets.target
    parameters = sum(p.numel() for p in run.student.parameters()) / 1e6
    devices = f"{collectives.world_size()} x {run.device.type}" if collectives.world_size() > 1 else str(run.device)
    console.info(f"{datasets}, {settings.model.encoder}, {parameters:.1f} M parameters, on {devices}")
    if images := datasets.labelled_images:
        rest = len(target.split("train")) - len(images)
        console.info(f"{len(images)} images of {target.name} with labels, {rest or 'the same'} without")
    console.info(run.weights.summary() if run.weights else "encoder starts from random weights")
    if run.start:
        console.info(run.start)
    if (teacher := run.teacher.frozen) and run.views_read - WITHOUT_TEACHER:
        console.info(f"labels come from {settings.model.teacher}, which sees crops {teacher.scale:.2f} times as large")
    if settings.model.freeze:
        console.info(f"does not learn: {', '.join(settings.model.freeze)}")
    if isinstance(run.student, MultiResolution):
        high, wide = run.student.detail_crop
        console.info(f"context at 1/{run.student.downscale} of the resolution, detail crops of {high} x {wide}")
    for line in find_no_effect(run):
        console.warn(line)
    console.info(f"objectives: {', '.join(run.objectives)}; run folder {folder}")
    if run.step:
        console.info(f"resuming after step {run.step} of {training.steps}")
    unseen = [name for name in run.classes.names if name not in run.seen]
    if unseen:
        where = "given labels" if datasets.labelled else "source"
        console.warn(f"classes that never occur in the {where}: {', '.join(unseen)}; the mean IoU leaves them out")
    if settings.optimizer.warmup >= training.steps:
        console.warn(
            f"optimizer.warmup ({settings.optimizer.warmup}) is not shorter than the run ({training.steps} steps)"
        )
    if not target.labelled("val"):
        console.warn(f"{target.name} has no labelled val split: nothing is validated, only last.safetensors is written")
    if training.shard and collectives.world_size() == 1:
        console.warn("training.shard has no effect on one device")
    if run.device.type == "cpu" and collectives.world_size() > 1 and _normalises_batches(run):
        console.warn("batch norms are synchronised on GPUs only: each process normalises with its own images")
    if run.device.type == "cpu" and (training.compile or training.precision == "bfloat16"):
        console.warn("training.compile and training.precision=bfloat16 are ignored on the CPU")


def _normalises_batches(run: Run) -> bool:
    """Whether the student or an objective has batch norms that are not frozen."""
    modules = [*run.student.modules(), *run.objectives.modules()]
    return any(isinstance(module, _BatchNorm) and module.training for module in modules)


def _conclude(run: Run, files: RunFolder, target: Index) -> None:
    """Where the result is, and the next command."""
    if run.best:
        console.info(f"best mIoU {run.best['miou']:.2f} at step {run.best['step']:.0f}: {files.best}")
    weights = shlex.quote(str(files.best if files.best.is_file() else files.last))
    verb = "eval" if target.labelled("val") else "pseudo-label"
    console.info(f"next: cluda {verb} --ckpt {weights}")


def _resume_hint(folder: Path) -> str:
    return f"resume with: cluda train --run {shlex.quote(str(folder))} --resume"


class _StopAsked(Exception):  # noqa: N818  a request is no error
    """Raised where the state of the run is whole."""


class _StopRequest:
    """Ctrl-C, SIGTERM, SIGHUP and SIGUSR1: the first asks the loop to stop after its step, the second stops at once.

    Of several processes, all stop after the step in which one was asked. What reaches them all at once from a terminal
    or a scheduler, and what their launcher passes on, count as one request.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        for number in heeded_signals():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._immediate:
            raise _StopAsked
        if self.requested:
            if collectives.world_size() > 1 and time.monotonic() - self._since < ECHO:
                return
            raise KeyboardInterrupt
        self.requested, self._since = True, time.monotonic()
        console.info("stopping after this step; once more stops at once")

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """While the run's state does not change (validation), one request is enough to stop; alone, not together."""
        self._immediate = collectives.world_size() == 1
        try:
            yield
        finally:
            self._immediate = False
