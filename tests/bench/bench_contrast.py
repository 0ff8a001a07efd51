"""Time and memory of the pixel contrast against the same mathematics written plainly.

    python tests/bench/bench_contrast.py [--side 65] [--rounds 5] [--threads 2]

Features are 2 x 256 x side x side with twelve classes in uneven shares and confidence weights, as in a mixed view. Both
forms are timed in turn in one process, forward and backward; memory is the growth of the peak resident size of a
process that runs one form once. Absolute times vary from machine to machine: the ratio is what counts.
"""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import console
from cluda_cli.objectives.contrast_kernel import contrast

CLASS_SHARES = (0.33, 0.20, 0.13, 0.10, 0.08, 0.05, 0.04, 0.03, 0.02, 0.01, 0.006, 0.004)
CHANNELS = 256
TEMPERATURE = 1.0
Form = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Problem(NamedTuple):
    """Inputs as an objective has them: B D h w, N, N."""

    features: Tensor
    label: Tensor
    weight: Tensor


class Row(NamedTuple):
    """What is known of one form."""

    name: str
    seconds: list[float]
    megabytes: float


def plain(features: Tensor, label: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """The contrast as one would write it first: N x N matrices and autograd. Features N D."""
    unit = F.normalize(features, dim=1)
    similarity = unit @ unit.T / temperature
    same = label[:, None] == label
    positive = same & ~torch.eye(len(label), dtype=torch.bool)
    level = similarity.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    cost = F.softplus(level - similarity) * (weight[:, None] * weight)
    return ((cost * positive).sum(dim=1) / positive.sum(dim=1).clamp_min(1)).mean()


FORMS: dict[str, Form] = {"plain N x N": plain, "tiled": contrast}


def make_problem(side: int, channels: int = CHANNELS) -> Problem:
    """Non-negative features, as after a ReLU, and labels in uneven shares; half of the pixels have full confidence."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, channels, side, side, generator=generator).relu()
    num_pixels = 2 * side * side
    label = torch.multinomial(torch.tensor(CLASS_SHARES), num_pixels, replacement=True, generator=generator)
    weight = 0.7 + 0.3 * torch.randint(2, (num_pixels,), generator=generator)
    return Problem(features.requires_grad_(), label, weight)


def once(form: Form, problem: Problem) -> tuple[float, Tensor]:
    """Seconds of one forward and backward, and the value; the gradient is left in the features."""
    problem.features.grad = None
    began = time.perf_counter()
    value = form(problem.features.permute(0, 2, 3, 1).flatten(0, 2), problem.label, problem.weight, TEMPERATURE)
    value.backward()
    return time.perf_counter() - began, value.detach()


def peak_megabytes() -> float:
    """Peak resident size of this process; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def memory_of(name: str, side: int, threads: int) -> float:
    """MiB above the inputs that one form needs, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--side", str(side), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(side: int, rounds: int, threads: int) -> list[Row]:
    """Both forms, after one warm-up each, in turn."""
    # Memory first: a child starts with its parent's peak, so the parent must still be small.
    megabytes = {name: memory_of(name, side, threads) for name in FORMS}
    problem = make_problem(side)
    for form in FORMS.values():
        once(form, problem)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(rounds):
        for name, form in FORMS.items():
            seconds[name].append(once(form, problem)[0])
    return [Row(name, seconds[name], megabytes[name]) for name in FORMS]


def report(rows: list[Row], title: str) -> None:
    base = statistics.median(rows[0].seconds)
    console.result_table(title, ["form", "median s", "fastest s", "times faster", "peak MiB above inputs"], [
        [row.name, f"{statistics.median(row.seconds):.3f}", f"{min(row.seconds):.3f}",
         f"{base / statistics.median(row.seconds):.1f}", f"{row.megabytes:.0f}"]
        for row in rows
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", choices=list(FORMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        once(FORMS[options.memory_of], make_problem(8))  # loads the libraries
        problem = make_problem(options.side)
        before = peak_megabytes()
        once(FORMS[options.memory_of], problem)
        print(peak_megabytes() - before)
        return
    rows = measure(options.side, options.rounds, options.threads)
    threads, shape = f"{options.threads} threads", f"2x{CHANNELS}x{options.side}x{options.side}"
    report(rows, f"pixel contrast, {shape}, float32, forward + backward, {threads}, torch {torch.__version__}")
    console.result(f"{platform.processor() or platform.machine()}, median of {options.rounds} after one warm-up")


if __name__ == "__main__":
    main()
