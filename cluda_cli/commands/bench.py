"""The verb `bench`: what a training step costs on this device, part by part, and how long the whole run will take.

It fetches nothing and writes nothing: encoders have random weights, which cost the same, and no run folder is made.
"""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass

import torch

from cluda_cli import console
from cluda_cli.data.batch import Batch, to_device
from cluda_cli.data.datasets import Datasets, open_datasets
from cluda_cli.data.index import Index
from cluda_cli.data.transforms import read_image
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.errors import EnvironmentProblem
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.sliding import choose_budget, fit_image, segment
from cluda_cli.measure.costs import Loading, Memory, MemoryWatch, Spread, find_largest_step, measure_loading, time_steps
from cluda_cli.measure.spans import SpanClock, wait_for_device
from cluda_cli.measure.synthetic import synthetic_images, synthetic_source
from cluda_cli.measure.workload import (
    find_busiest_step,
    generator,
    imitate_pseudo_labels,
    make_measurable,
    stream_batches,
)
from cluda_cli.settings import Settings
from cluda_cli.spans import span

WARM_UP = 3  # untimed steps: the first ones allocate, tune kernels, compile
IMAGES = 2  # evaluated images that are timed at least, after as many that are not
BUSY = 0.8  # CPU seconds per second below which a CPU is said to be shared


@dataclass(frozen=True)
class Validation:
    """Seconds of one image, through each network that is validated, and how much of it the run will do."""

    seconds_per_image: float
    size: tuple[int, int]
    validations: int
    images: int | None
    """Labelled ones of the target; None where it was not looked at."""


@dataclass(frozen=True)
class Report:
    """All that is measured."""

    device: str
    torch: str
    threads: int
    encoder: str
    crop: tuple[int, int]
    batch_size: int
    data: str
    classes: int
    first_step: int
    """The step of the run whose work was measured first."""
    warm_up: list[float]
    """Seconds of each untimed step."""
    step: Spread
    """Of a step as training does it."""
    cpu_share: float
    """CPU seconds of this process in a second of such steps; below 1 on a CPU, other processes slowed it down."""
    step_by_parts: Spread
    """Of a step in the measurement by parts, which on a GPU waits for the device at every part."""
    parts: dict[str, Spread]
    """Their means add up to the mean of `step_by_parts`."""
    images_per_second: float
    """Source and target images."""
    memory: Memory
    largest_batch: int | None
    """Images per domain; None where it was not looked for."""
    loading: Loading | None
    validation: Validation
    steps: int
    training_hours: float
    validation_hours: float | None


def bench(settings: Settings, *, steps: int = 10, prepared: bool = False, as_json: bool = False) -> None:
    """Print step time by part, throughput, memory, the largest batch and the hours of the run.

    `steps` of them are timed, twice. Batches are synthetic, or with `prepared` those of the settings' datasets; then
    loading is measured too. Raises DataError for datasets that are not prepared, EnvironmentProblem for a device that
    is not there or a batch that does not fit it.
    """
    device = pick_device(settings.training.device)
    datasets = open_datasets(settings.data, settings.training.seed) if prepared else None
    report = _measure(settings, datasets, device, steps)
    if as_json:
        console.result_json(asdict(report))
    else:
        _print(report)


def _measure(settings: Settings, datasets: Datasets | None, device: torch.device, steps: int) -> Report:
    first = find_busiest_step(settings)
    measured = make_measurable(settings, first + WARM_UP + 2 * steps)
    watch = MemoryWatch(device)
    if datasets:
        run = Run(measured, datasets.sources, device, labelled=datasets.labelled)
    else:
        run = Run(measured, [synthetic_source()], device)
    stream = stream_batches(measured, datasets, len(run.classes), first, device)
    run.step = first
    imitate_pseudo_labels(run)
    clock = SpanClock(device)
    with closing(stream), console.Progress("measuring", WARM_UP + 2 * steps) as progress:
        warm_up = _warm_up(run, stream, progress)
        began = time.process_time()
        times = time_steps(run, stream, steps, progress.advance)
        step, cpu_share = Spread.of(times), (time.process_time() - began) / sum(times)
        memory = watch.read()
        for _ in range(steps):
            with clock.time_step():
                with span("data"):
                    batch = to_device(next(stream), device)
                training_step(run, batch)
            progress.advance()
    largest = find_largest_step(run, batch) if device.type == "cuda" else None
    loading = measure_loading(measured, datasets, first) if datasets else None
    validation, training = _validation(settings, run, datasets and datasets.target), settings.training
    images = None if validation.images is None else validation.images * validation.validations
    return Report(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=str(torch.__version__), threads=torch.get_num_threads(), encoder=settings.model.encoder,
        crop=settings.data.crop, batch_size=settings.data.batch_size,
        data=str(datasets) if datasets else "synthetic",
        classes=len(run.classes),
        first_step=first, warm_up=warm_up, step=step, cpu_share=cpu_share,
        step_by_parts=Spread.of([sum(s.values()) for s in clock.steps]),
        parts={name: Spread.of([s.get(name, 0.0) for s in clock.steps]) for name in clock.names()},
        images_per_second=2 * settings.data.batch_size / step.median, memory=memory, largest_batch=largest,
        loading=loading, validation=validation, steps=training.steps,
        training_hours=training.steps * max(step.median, loading.seconds_per_step() if loading else 0.0) / 3600,
        validation_hours=None if images is None else images * validation.seconds_per_image / 3600,
    )  # fmt: skip


def _warm_up(run: Run, stream: Generator[Batch, None, None], progress: console.Progress) -> list[float]:
    """Seconds of the untimed steps. Raises EnvironmentProblem that says what fits if the batch does not."""
    try:
        return time_steps(run, stream, WARM_UP, progress.advance)
    except torch.OutOfMemoryError:
        pass  # looked into only below, where the exception and all that its frames hold are gone
    batch = to_device(next(stream), run.device)
    images = find_largest_step(run, batch)
    remedy = f"{images} of each do: --set data.batch_size={images}" if images else "not even one of each does"
    raise EnvironmentProblem(
        f"{len(batch['source'].image)} source and target images do not fit {run.device}",
        "data.batch_size",
        f"{remedy}; docs/how-to/memory-and-speed.md says what else lowers memory",
    )


def _validation(settings: Settings, run: Run, target: Index | None) -> Validation:
    """Time an image, again and again, from the network to its labels; in validation, others are read meanwhile."""
    data, training = settings.data, settings.training
    items = target.labelled("val") if target else ()
    if target and items:
        image = read_image(target.image_path(items[0]))  # 3 H W
    else:
        image = synthetic_images(1, data.target_box or data.crop, generator(settings, "bench image"))[0]
    resized = fit_image(image, data.target_box, run.device)
    images = max(IMAGES, choose_budget(run.device).forward // resized.pixels[0].numel())  # at least a full forward
    for _ in range(2):  # the first time is warm-up
        wait_for_device(run.device)
        began = time.perf_counter()
        for network in run.networks.values():
            for _ in segment(network, [(resized, None)] * images, settings.inference):
                pass
        wait_for_device(run.device)
    seconds, count = (time.perf_counter() - began) / images, -(-training.steps // training.validate_every)
    return Validation(seconds, (image.shape[1], image.shape[2]), count, len(items) if target else None)


def _print(report: Report) -> None:
    """The table of parts, then a line for each other number."""
    (high, wide), images = report.crop, report.batch_size
    threads = f", {report.threads} threads" if report.device == "cpu" else ""
    title = f"{report.encoder}, {images} + {images} crops of {high} x {wide}, on {report.device}{threads}"
    whole = report.step_by_parts.mean
    rows = [
        [name, *(f"{1000 * value:.1f}" for value in (s.mean, s.least, s.most)), f"{s.mean / whole:.1%}"]
        for name, s in [*report.parts.items(), ("all parts", report.step_by_parts)]
    ]
    console.result_table(title, ["part", "mean ms", "least", "most", "share"], rows)
    for name, text in _lines(report).items():
        console.result(f"{name:<14}{text}")


def _lines(r: Report) -> dict[str, str]:
    """What the table does not say, by name."""
    seconds, validation, hours = r.step.median, r.validation, r.training_hours
    lines = {
        "step": f"{seconds:.3f} s, median ({r.step.least:.3f} to {r.step.most:.3f}), without looking at its parts",
        "warm-up": f"{len(r.warm_up)} steps took {sum(r.warm_up):.1f} s, the first {r.warm_up[0]:.1f} s; not counted",
        "throughput": f"{r.images_per_second:.1f} images/s, source and target",
        "data": f"{r.data}, {r.classes} classes; random encoder weights",
        "memory": _memory_line(r.memory),
        "largest batch": "not looked for: main memory has no hard limit" if r.largest_batch is None
        else f"{r.largest_batch} images per domain; leave some room",
    }  # fmt: skip
    if r.device == "cpu" and r.cpu_share < BUSY:
        lines["step"] += f"; others use this CPU, {r.cpu_share:.0%} of a core was left"
    if r.first_step:
        lines["data"] += f"; as from step {r.first_step}, with all that begins later"
    if r.loading:
        least, rate = r.loading.seconds_per_step(), r.loading.batches_per_second
        remedy = "raise data.workers" if r.loading.processes == r.loading.wanted else "more cores are needed"
        verdict = f"no step is shorter than {least:.3f} s, {remedy}" if least > seconds else "they keep up"
        where = f"{r.loading.processes} processes: {verdict}" if r.loading.processes else "in the step (data.workers=0)"
        lines["loading"] = f"{rate:.2f} batches/s per process, {where}"
    size = " x ".join(map(str, validation.size))
    lines["validation"] = f"{validation.seconds_per_image:.2f} s for an image of {size}"
    lines["the run"] = f"{r.steps} steps in {console.duration(3600 * hours)}"
    if r.validation_hours is None:
        lines["the run"] += f", and {validation.validations} validations (--data counts their images)"
    else:
        took = console.duration(3600 * r.validation_hours)
        lines["the run"] += f" + {validation.validations} validations of {validation.images} images in {took}"
    return lines


def _memory_line(memory: Memory) -> str:
    if memory.peak is None:
        return "not known on this system"
    line = f"{memory.peak / 2**30:.2f} GiB: {memory.what}"
    if memory.reserved and memory.total:
        line += f"; {memory.reserved / 2**30:.2f} reserved of {memory.total / 2**30:.2f}"
    return line
