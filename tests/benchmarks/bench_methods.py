"""Processor time of a training step of several presets, as a ratio to the first of them.

    python tests/benchmarks/bench_methods.py daformer sepico spcl [--overlay small] [--set a.b=1] [--rounds 3]

Each preset takes steps in turn, on a synthetic batch with random weights, when all that begins later has begun; so
`training.steps` has to be as large as their latest start. `--overlay` and `--set` apply to all of them. Processor time
is hardly changed by other programs; it is meant for CPUs.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from cluda_cli import console, presets
from cluda_cli.data.batch import Batch
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.measure.synthetic import synthetic_source
from cluda_cli.measure.workload import find_busiest_step, imitate_pseudo_labels, make_measurable, stream_batches
from cluda_cli.settings import Settings

CPU = torch.device("cpu")


def build(settings: Settings) -> tuple[Run, Batch]:
    """A run in which all that begins later has begun, and a batch."""
    measured = make_measurable(settings, find_busiest_step(settings) + 100)
    run = Run(measured, [synthetic_source()], CPU)
    run.step = find_busiest_step(settings)
    imitate_pseudo_labels(run)
    return run, next(stream_batches(measured, None, len(run.classes), run.step, CPU))


def measure(chosen: Sequence[Settings], rounds: int) -> list[list[float]]:
    """Seconds of each step of every run, after one step that is not counted."""
    runs = [build(settings) for settings in chosen]
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for seconds, (run, batch) in zip(spent, runs, strict=True):
            began = time.process_time()
            training_step(run, batch)
            seconds.append(time.process_time() - began)
    return [seconds[1:] for seconds in spent]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--overlay", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    chosen = [presets.load([name, *given.overlay], {}, given.overrides) for name in given.presets]
    medians = [statistics.median(seconds) for seconds in measure(chosen, given.rounds)]
    for name, seconds in zip(given.presets, medians, strict=True):
        console.result(f"{name:<20} {seconds:8.3f} s {seconds / medians[0]:8.2f}")


if __name__ == "__main__":
    main()
