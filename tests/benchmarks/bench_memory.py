"""Memory of one training step and of validation: the peak of live tensor bytes, part by part.

    python tests/benchmarks/bench_memory.py [--preset hrda-cluda] [--set section.key=value ...]
    python tests/benchmarks/bench_memory.py --real --set model.encoder=mit_b0 --set data.crop=[512,512]

Tensors are fake: they have shapes but no memory, so any machine can plan for the largest network. What runs is the step
itself without what reads values: jitter, blur and the update are left out (no graph is alive then), the detail crop is
in a corner, and a block of memory takes the place of the contrast's kernel. Attention is the fused kernel of the CPU,
which stores no matrix of similarities; a GPU has such kernels too. With bfloat16 the operations that run in float32
under autocast are those of a GPU.

Workspaces inside kernels are not seen, and on a GPU the CUDA context and the gaps of its allocator come on top. --real
runs a step without contrast on real tensors as well and shows by how much the process grows.
"""

import argparse
import json
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluda_cli import console, presets
from cluda_cli.adaptation import views
from cluda_cli.adaptation.teacher import Teacher
from cluda_cli.data.batch import Batch, Crops
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.engine import step
from cluda_cli.inference import sliding as inference
from cluda_cli.models import multires
from cluda_cli.models.boxes import Boxes, Size
from cluda_cli.objectives import build_makers, build_objectives, pixel_contrast
from cluda_cli.settings import Settings

CPU = torch.device("cpu")
MEBIBYTE, GIBIBYTE = 2**20, 2**30
CONTRAST = 288
"""MiB that the contrast of two resolutions needs above its inputs: live bytes, counted as here on real tensors, of the
problem of `bench_contrast.py` at 2x256x65x65 in tiles of 4096, wider than any in use (of 512, as on a CPU: 167; one
resolution: 272 and 150)."""
LEVERS: dict[str, tuple[str, ...]] = {
    "as set": (),
    "checkpoint_activations": ("model.checkpoint_activations=true",),
    "micro_batch=1": ("training.micro_batch=1",),
    "both": ("model.checkpoint_activations=true", "training.micro_batch=1"),
}
Peaks = dict[str, int]  # part of the step -> bytes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation returns, from then until the storage is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return result

    def hold(self, tensor: Tensor) -> Tensor:
        """Count a tensor that there is already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            # The Python object of a storage lives as long as the storage, also where only a graph holds that.
            weakref.finalize(storage, self._release, key, storage.nbytes()).atexit = False
        return tensor

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size


def fake_peaks(settings: Settings, contrast: int) -> Peaks:
    """Of the parts of a step and of validation, from tensors without memory; `contrast` in bytes."""
    with torch.device("meta"), mock.patch.object(nn.init, "trunc_normal_"):  # which reads values
        run = _build(settings)
    # Constants of the modules, such as the mean colour, are real.
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        for network in run.networks:
            network.to_empty(device=CPU)
        peaks = {part: live.take_peak() for part in _step_parts(run, contrast)}
        _validate(run.student, settings)
        return peaks | {"validation": live.take_peak()}


def real_peaks(settings: Settings) -> tuple[Peaks, Peaks]:
    """Of the parts of a step without contrast, from real tensors: live bytes, and the highest resident size of the
    process so far above that at rest."""
    run = _build(settings)
    live_peaks, resident_peaks = {}, {}
    with LiveBytes() as live:
        for network in run.networks:
            network._apply(live.hold)  # reaches the frozen encoder, which the objective's parameters hide
        for part in _step_parts(run, contrast=0):
            live_peaks[part], resident_peaks[part] = live.take_peak(), resident_peak()
    return live_peaks, {part: peak - resident_peaks["at rest"] for part, peak in resident_peaks.items()}


def resident_peak() -> int:
    """Of this process, bytes; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def _build(settings: Settings) -> SimpleNamespace:
    """What the step needs of a run, with random weights."""
    classes = ClassTable(CITYSCAPES)
    student = multires.build_segmenter(settings.model, settings.data.crop, len(classes))
    teacher = Teacher(student, settings.teacher)
    objectives = build_objectives(settings.objectives, student, classes)
    return SimpleNamespace(
        settings=settings, device=CPU, step=0, student=student, forward=student, teacher=teacher,
        objectives=objectives, networks=(student, teacher, objectives),
    )  # fmt: skip


def _step_parts(run: SimpleNamespace, contrast: int) -> Iterator[str]:
    """Run a step and yield the name of each part as it ends: the networks with Adam's moments, then every view, first
    as it is made ("make mixed" is the teacher's part) and then as the student learns from it."""
    settings = run.settings
    learned = [p for network in (run.student, run.objectives) for p in network.parameters() if p.requires_grad]
    moments = [torch.zeros_like(p) for p in learned for _ in range(2)]  # noqa: F841  held until the step ends
    yield "at rest"
    scene = views.Scene(_batch(settings), run.teacher, settings.training.seed, 0)
    makers = build_makers(settings, run.objectives)
    held = []  # for pictures, as the step does
    with _without_values(settings, contrast):
        for names in step.join_groups(run.objectives.values(), list(makers)):
            made = [makers[name](scene) for name in names]
            yield f"make {'+'.join(names)}"
            held += made
            step._learn(run, made, run.objectives, [])
            yield "+".join(names)


def _batch(settings: Settings) -> Batch:
    size = (settings.data.batch_size, *settings.data.crop)
    image = torch.zeros(size[0], 3, *size[1:], dtype=torch.uint8)
    label, inside = torch.zeros(size, dtype=torch.uint8), torch.ones(size, dtype=torch.bool)
    return {
        "source": Crops(image, inside, label=label),
        "target": Crops(image.clone(), inside.clone(), valid=inside.clone()),
    }


def _validate(student: nn.Module, settings: Settings) -> None:
    """Logits of one target image, beside the gradients of the last step."""
    image = torch.zeros(1, 3, *(settings.data.target_box or settings.data.crop), dtype=torch.uint8)
    with torch.no_grad(), inference.eval_mode(student):  # inference mode would hide the parts of some operations
        if settings.inference.mode == "whole":
            inference._forward(student, image)
        else:
            inference._slide(student, image, settings.inference)


@contextmanager
def _without_values(settings: Settings, contrast: int) -> Iterator[None]:
    """Put something of the same size in the place of what reads values, and the rules of a GPU in that of a CPU's."""

    def block(*inputs: Any, **options: Any) -> Tensor:
        torch.empty(contrast, dtype=torch.uint8)  # freed at once
        return torch.stack([i.sum() for i in inputs if isinstance(i, Tensor) and i.requires_grad]).sum()

    def corner(count: int, image: Size, size: Size, multiple: int, generator: torch.Generator) -> Boxes:
        return Boxes(torch.zeros(count, 2, dtype=torch.int64), size)

    with ExitStack() as stack:
        for name in ("tiled_contrast", "multires_contrast"):
            stack.enter_context(mock.patch.object(pixel_contrast, name, block))
        stack.enter_context(mock.patch.object(views, "strong_augment", lambda image, *_: image.clone()))
        stack.enter_context(mock.patch.object(multires, "random_boxes", corner))
        if settings.training.precision == "bfloat16":
            autocast = lambda run: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
            stack.enter_context(mock.patch.object(step, "_precision", autocast))
            for name in ("layer_norm", "interpolate"):
                stack.enter_context(mock.patch.object(F, name, _in_float32(getattr(F, name))))
        yield


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def promoted(image: Tensor, *others: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return function(image.float(), *others, **options)

    return promoted


def report(title: str, measured: dict[str, Peaks]) -> None:
    parts = list(next(iter(measured.values())))
    table = [[name, *(f"{peaks[part] / GIBIBYTE:.2f}" for part in parts)] for name, peaks in measured.items()]
    console.result_table(title, ["GiB", *parts], table)


def compare_with_real(settings: Settings) -> None:
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    live, resident = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    fake = fake_peaks(settings, contrast=0)
    measured = {
        "fake": {part: fake[part] for part in live},
        "real": live,
        "added": {part: peak - live["at rest"] for part, peak in live.items()},
        "process, highest so far": resident,
    }
    report("step without contrast, and what it adds to the memory at rest", measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", action="append", help="as for cluda train; default hrda-cluda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--contrast", type=float, default=CONTRAST, help="MiB that the contrast needs for itself")
    parser.add_argument("--real", action="store_true", help="compare with a step on real tensors")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.preset or ["hrda-cluda"]
    settings = presets.load(names, overrides=options.set)
    if options.child:
        print(json.dumps(real_peaks(settings)))
    elif options.real:
        compare_with_real(settings)
    else:
        measured = {}
        for lever, overrides in LEVERS.items():
            pulled = presets.load(names, overrides=[*options.set, *overrides])
            measured[lever] = fake_peaks(pulled, round(options.contrast * MEBIBYTE))
        report(f"{' '.join([*names, *options.set])}: peak of live bytes, torch {torch.__version__}", measured)


if __name__ == "__main__":
    main()
