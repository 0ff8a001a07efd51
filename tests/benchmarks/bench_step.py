"""Time of a training step with each lever off and on, on whatever device there is.

    python tests/benchmarks/bench_step.py --preset daformer-cluda --preset small [--rounds 5] [--threads 1]

For each lever the same run takes steps in turn without and with it, on a synthetic batch with random weights; the
ratio is that of the medians, and above 1 the lever wins. On a GPU "everything" compares float32 and eager mode without
any lever with bfloat16, torch.compile and all levers, and the first step of a compiled network is reported. Levers that
only a GPU has are left out elsewhere. Absolute times vary from machine to machine.
"""

import argparse
import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from cluda_cli import console, presets
from cluda_cli.adaptation.teacher import Teacher, ema_decay
from cluda_cli.data.batch import Batch, to_device
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.inference.device import pick_device
from cluda_cli.measure.synthetic import synthetic_source
from cluda_cli.measure.workload import find_busiest_step, imitate_pseudo_labels, make_measurable, stream_batches
from cluda_cli.models import decoders
from cluda_cli.models.multires import MultiResolution
from cluda_cli.settings import Settings

GPU_SETTINGS = {"precision": "bfloat16", "compile": True}


class Lever(NamedTuple):
    """How to take steps without it; with it, a run is as it is."""

    name: str
    off: Callable[[Run], contextlib.AbstractContextManager[Any]]


def plain_contrast(_run: Run) -> contextlib.AbstractContextManager[Any]:
    """N x N matrices and autograd."""
    bench = _sibling("bench_contrast")
    kernel = "cluda_cli.objectives.pixel_contrast."
    stack = contextlib.ExitStack()
    for name, form in (("tiled_contrast", bench.plain), ("multires_contrast", bench.plain_multires)):
        stack.enter_context(patch(kernel + name, form))
    return stack


def fuse_after_resizing(_run: Run) -> contextlib.AbstractContextManager[Any]:
    """The light heads concatenate the resized maps and convolve them then."""

    def fuse(unit: decoders.ConvUnit, maps: list[Tensor]) -> Tensor:
        return unit(torch.cat(decoders._to_finest(maps), dim=1).contiguous())

    return patch.object(decoders, "fuse_pointwise", fuse)


def average_one_by_one(_run: Run) -> contextlib.AbstractContextManager[Any]:
    """A loop over the teacher's parameters."""

    @torch.no_grad()
    def update(self: Teacher, student: torch.nn.Module, step: int) -> None:
        for own, other in zip(self.network.parameters(), student.parameters(), strict=True):
            own.lerp_(other, 1 - ema_decay(step, self.decay))

    return patch.object(Teacher, "update", update)


@contextlib.contextmanager
def optimizer_loop(run: Run) -> Iterator[None]:
    """AdamW parameter by parameter."""
    keys = {"fused": False, "foreach": False}
    before = [{key: group[key] for key in keys} for group in run.optimizer.param_groups]
    for group in run.optimizer.param_groups:
        group.update(keys)
    yield
    for group, values in zip(run.optimizer.param_groups, before, strict=True):
        group.update(values)


def levers(run: Run) -> list[Lever]:
    """Those that this run and its device have."""
    found = [Lever("moving average in one call", average_one_by_one)]
    if "pixel_contrast" in run.objectives:
        found.append(Lever("tiled contrast", plain_contrast))
    if isinstance(run.student, MultiResolution):
        found.append(Lever("light heads convolve before resizing", fuse_after_resizing))
    if run.optimizer.param_groups[0]["fused"]:
        found.append(Lever("fused AdamW", optimizer_loop))
    return found


@contextlib.contextmanager
def all_off(run: Run) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for lever in levers(run):
            stack.enter_context(lever.off(run))
        yield


def build(settings: Settings, device: torch.device, training: dict[str, Any]) -> tuple[Run, Batch]:
    """A run in which all that begins later has begun, and a batch on its device."""
    run_settings = make_measurable(settings, 10**6)
    seldom = {"log_every": 10**9, "save_every": 10**9, "validate_every": 10**9, "pictures_every": 0}
    changed = run_settings.training.model_copy(update=seldom | training)
    run_settings = run_settings.model_copy(update={"training": changed})
    run = Run(run_settings, [synthetic_source()], device)
    run.step = max(find_busiest_step(settings), 1)
    imitate_pseudo_labels(run)
    return run, to_device(next(stream_batches(run_settings, None, len(run.classes), run.step, device)), device)


def step_seconds(run: Run, batch: Batch) -> float:
    _wait(run.device)
    began = time.perf_counter()
    training_step(run, batch)
    _wait(run.device)
    return time.perf_counter() - began


def compare(off: Callable[[], float], on: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Median seconds of both, in turn, after one warm-up each."""
    pairs = [(off(), on()) for _ in range(rounds + 1)][1:]
    without, with_it = (statistics.median(side) for side in zip(*pairs, strict=True))
    return without, with_it


def measure(settings: Settings, device: torch.device, rounds: int) -> list[list[str]]:
    """A row per lever; on a GPU also bfloat16, compilation and everything."""
    run, batch = build(settings, device, {})
    rows = []

    def without(lever: Lever) -> float:
        with lever.off(run):
            return step_seconds(run, batch)

    for lever in levers(run):
        rows.append(_row(lever.name, *compare(lambda: without(lever), lambda: step_seconds(run, batch), rounds)))  # noqa: B023
    if device.type != "cuda":
        return rows
    variants = [("bfloat16", {"precision": "bfloat16"}), ("torch.compile", {"compile": True}), ("both", GPU_SETTINGS)]
    for name, training in variants:
        other, same = build(settings, device, training)
        console.info(f"{name}: first step {step_seconds(other, same):.1f} s, second {step_seconds(other, same):.1f} s")
        plain = Lever("", all_off) if name == "both" else Lever("", lambda _: contextlib.nullcontext())
        label = "everything" if name == "both" else name
        times = compare(lambda: without(plain), lambda: step_seconds(other, same), rounds)  # noqa: B023
        with plain.off(run):
            memory = [_peak_mebibytes(run, batch)]
        memory.append(_peak_mebibytes(other, same))
        rows.append([*_row(label, *times), *(f"{m:.0f}" for m in memory)])
    return rows


def _row(name: str, off: float, on: float) -> list[str]:
    return [name, f"{off:.3f}", f"{on:.3f}", f"{off / on:.2f}"]


def _peak_mebibytes(run: Run, batch: Batch) -> float:
    torch.cuda.reset_peak_memory_stats(run.device)
    step_seconds(run, batch)
    return torch.cuda.max_memory_allocated(run.device) / 2**20


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sibling(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", action="append", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.preset or ["daformer-cluda", "small"]
    device = pick_device(options.device)
    rows = measure(presets.load(names), device, options.rounds)
    columns = ["lever", "s without", "s with", "ratio"] + ["MiB without", "MiB with"] * (device.type == "cuda")
    rows = [row + [""] * (len(columns) - len(row)) for row in rows]
    console.result_table(f"a step of {' + '.join(names)} on {device}, torch {torch.__version__}", columns, rows)


if __name__ == "__main__":
    main()
