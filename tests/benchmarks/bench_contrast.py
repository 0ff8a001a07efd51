"""Time and memory of the pixel contrast against the same mathematics written plainly.

    python tests/benchmarks/bench_contrast.py [--side 65] [--rounds 5] [--threads 2]
    python tests/benchmarks/bench_contrast.py --scaling [--full]

Features are 2 x 256 x side x side with twelve classes in uneven shares and confidence weights, as in a mixed view; the
contrast of two resolutions also has detail features in a crop of a quarter of the area. The two forms of a contrast are
timed in turn in one process, forward and backward; memory is the growth of the peak resident size of a process that
runs one form once. Absolute times vary from machine to machine: the ratio is what counts.

With --scaling, the growth from N = 2048 to 32 768 pixels, the plain form where it fits; the grid of 2 x 256 x 256 takes
minutes and is extrapolated without --full.
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
from cluda_cli.objectives.contrast.kernel import multires_contrast, tiled_contrast

CLASS_SHARES = (0.33, 0.20, 0.13, 0.10, 0.08, 0.05, 0.04, 0.03, 0.02, 0.01, 0.006, 0.004)
CHANNELS = 256
TEMPERATURE = 1.0


class Problem(NamedTuple):
    """Inputs as an objective has them, N = B h w."""

    features: Tensor  # B D h w
    detail: Tensor  # B D h w, zero outside the crop
    inside: Tensor  # N
    mix: Tensor  # N
    label: Tensor  # N
    weight: Tensor  # N


class Row(NamedTuple):
    """What is known of one form."""

    name: str
    seconds: list[float]
    megabytes: float


def plain(features: Tensor, label: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """The contrast as one would write it first: N x N matrices and autograd. Features N D."""
    unit = F.normalize(features, dim=1)
    return mean_over_positives(costs(unit, unit, label, temperature), label, weight)


def plain_multires(
    features: Tensor, detail: Tensor, inside: Tensor, mix: Tensor, label: Tensor, weight: Tensor, temperature: float
) -> Tensor:
    """The contrast of two resolutions as one would write it first. Features and detail N D."""
    unit = F.normalize(features, dim=1)
    context = costs(unit, unit, label, temperature)
    close = costs(unit, F.normalize(detail, dim=1), label, temperature, inside)
    mix = mix * inside
    return mean_over_positives(torch.lerp(context, close, mix[:, None] * mix), label, weight) / 2


def costs(unit: Tensor, others: Tensor, label: Tensor, temperature: float, inside: Tensor | None = None) -> Tensor:
    """Of every pair, were it one of positives, N N; the negatives are `inside`, if that is given."""
    similarity = unit @ others.T / temperature
    excluded = label[:, None] == label
    if inside is not None:
        excluded = excluded | ~inside
    level = similarity.masked_fill(excluded, -torch.inf).logsumexp(dim=1, keepdim=True)
    return F.softplus(level - similarity)


def mean_over_positives(cost: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    positive = (label[:, None] == label) & ~torch.eye(len(label), dtype=torch.bool, device=label.device)
    cost = cost * (weight[:, None] * weight)
    return ((cost * positive).sum(dim=1) / positive.sum(dim=1).clamp_min(1)).mean()


def rows(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def of_one(form: Callable[..., Tensor]) -> Callable[[Problem], Tensor]:
    return lambda p: form(rows(p.features), p.label, p.weight, TEMPERATURE)


def of_two(form: Callable[..., Tensor]) -> Callable[[Problem], Tensor]:
    return lambda p: form(rows(p.features), rows(p.detail), p.inside, p.mix, p.label, p.weight, TEMPERATURE)


FORMS = {
    "plain N x N": of_one(plain),
    "tiled": of_one(tiled_contrast),
    "plain + detail": of_two(plain_multires),
    "tiled + detail": of_two(multires_contrast),
}
CONTRASTS = [list(FORMS)[:2], list(FORMS)[2:]]

SIDES = (32, 64, 128)
FULL_SIDE = 256
PLAIN_SIDE = 64  # the largest at which the plain form fits a small machine


def make_problem(side: int, channels: int = CHANNELS) -> Problem:
    """Non-negative features, as after a ReLU, and labels in uneven shares; half of the pixels have full confidence. The
    crop is the middle of each image."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, channels, side, side, generator=generator).relu()
    num_pixels = 2 * side * side
    label = torch.multinomial(torch.tensor(CLASS_SHARES), num_pixels, replacement=True, generator=generator)
    weight = 0.7 + 0.3 * torch.randint(2, (num_pixels,), generator=generator)
    middle = slice(side // 4, side // 4 + (side + 1) // 2)
    inside = torch.zeros(2, side, side, dtype=torch.bool)
    inside[:, middle, middle] = True
    detail = torch.randn(2, channels, side, side, generator=generator).relu() * inside[:, None]
    mix = torch.rand(num_pixels, generator=generator)
    leaves = (features.requires_grad_(), detail.requires_grad_(), mix.requires_grad_())
    return Problem(leaves[0], leaves[1], inside.flatten(), leaves[2], label, weight)


def once(form: Callable[[Problem], Tensor], problem: Problem) -> tuple[float, Tensor]:
    """Seconds of one forward and backward, and the value; the gradients are left in the inputs."""
    for tensor in problem:
        tensor.grad = None
    began = time.perf_counter()
    value = form(problem)
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


def measure(side: int, rounds: int, threads: int) -> list[list[Row]]:
    """For each contrast its two forms, after one warm-up each, in turn."""
    # Memory first: a child starts with its parent's peak, so the parent must still be small.
    megabytes = {name: memory_of(name, side, threads) for name in FORMS}
    problem = make_problem(side)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for names in CONTRASTS:
        for name in names * (rounds + 1):
            seconds[name].append(once(FORMS[name], problem)[0])
    return [[Row(name, seconds[name][1:], megabytes[name]) for name in names] for names in CONTRASTS]


def scale(rounds: int, threads: int, full: bool) -> list[list[str]]:
    """How time and memory grow with the number of pixels: rows of a table."""
    table: list[list[str]] = []
    seconds, last = 0.0, 0
    for side in (*SIDES, FULL_SIDE) if full else SIDES:
        names = CONTRASTS[0] if side <= PLAIN_SIDE else CONTRASTS[0][1:]
        megabytes = {name: memory_of(name, side, threads) for name in names}
        problem = make_problem(side)
        repeats = rounds if side <= PLAIN_SIDE else 1
        spent = {name: statistics.median(once(FORMS[name], problem)[0] for _ in range(repeats)) for name in names}
        cells = {name: [f"{spent[name]:.2f}", f"{megabytes[name]:.0f}"] for name in names}
        inputs = problem.features.numel() * problem.features.element_size() / 2**20
        (plain_name, ours), num_pixels = CONTRASTS[0], len(problem.label)
        table.append([str(num_pixels), f"{inputs:.0f}", *cells[ours], *cells.get(plain_name, ["-", "-"])])
        seconds, last = spent[ours], num_pixels
    if not full:
        num_pixels = 2 * FULL_SIDE**2
        extrapolated = f"~{seconds * (num_pixels / last) ** 2:.0f}"
        table.append([str(num_pixels), f"{num_pixels * CHANNELS * 4 / 2**20:.0f}", extrapolated, "-", "-", "-"])
    return table


def report(measured: list[list[Row]], title: str) -> None:
    table = []
    for contrast_rows in measured:
        base = statistics.median(contrast_rows[0].seconds)
        table += [
            [row.name, f"{statistics.median(row.seconds):.3f}", f"{min(row.seconds):.3f}",
             f"{base / statistics.median(row.seconds):.1f}", f"{row.megabytes:.0f}"]
            for row in contrast_rows
        ]  # fmt: skip
    console.result_table(title, ["form", "median s", "fastest s", "times faster", "peak MiB above inputs"], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scaling", action="store_true", help="growth with the number of pixels instead")
    parser.add_argument("--full", action="store_true", help="with --scaling: up to 2 x 256 x 256 pixels")
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
    if options.scaling:
        columns = ["N", "features MiB", "tiled s", "tiled MiB", "plain s", "plain MiB"]
        title = f"growth, {CHANNELS} channels, MiB above inputs, {options.threads} threads, ~ extrapolated"
        console.result_table(title, columns, scale(options.rounds, options.threads, options.full))
        return
    measured = measure(options.side, options.rounds, options.threads)
    threads, shape = f"{options.threads} threads", f"2x{CHANNELS}x{options.side}x{options.side}"
    report(measured, f"pixel contrast, {shape}, float32, forward + backward, {threads}, torch {torch.__version__}")
    console.result(f"{platform.processor() or platform.machine()}, median of {options.rounds} after one warm-up")


if __name__ == "__main__":
    main()
