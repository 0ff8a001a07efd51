"""Processor time of the pixel contrast and of the anchor contrast as the batch grows.

    python tests/benchmarks/bench_anchors.py [--side 64] [--batches 1 2 4 8] [--rounds 3] [--threads 1]

Each batch has source and mixed images with fused features of 256 channels x side x side cells, labels of four pixels a
cell in uneven shares, spread in blocks, and logits that are right at 70 % of the cells. Both objectives have their
default settings and are timed in turn in one process, forward and backward, on the same features. Seconds are those of
the processor, so that other programs matter little; the ratios are what counts.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from cluda_cli import console, settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.anchor_contrast import AnchorContrast
from cluda_cli.objectives.objective import Objective
from cluda_cli.objectives.pixel_contrast import PixelContrast

CLASS_SHARES = (0.33, 0.20, 0.13, 0.10, 0.08, 0.05, 0.04, 0.03, 0.02, 0.01, 0.006, 0.004)
CHANNELS = 256
STRIDE = 2  # pixels per cell, along a side
BLOCK = 4  # cells of one label, along a side
RIGHT = 0.7
VIEWS = ("source", "mixed")


def see(name: str, batch: int, side: int) -> Seen:
    """One view of `batch` images and what a student might make of it."""
    generator = torch.Generator().manual_seed(VIEWS.index(name))
    blocks = -(-side // BLOCK)
    label = torch.multinomial(torch.tensor(CLASS_SHARES), batch * blocks**2, replacement=True, generator=generator)
    cells = label.view(batch, blocks, blocks).repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :side, :side]
    right = torch.rand(cells.shape, generator=generator) < RIGHT
    predicted = cells.where(right, (cells + 1) % len(CLASS_SHARES))
    logits = F.one_hot(predicted, len(CLASS_SHARES)).permute(0, 3, 1, 2).float()
    features = torch.randn(batch, CHANNELS, side, side, generator=generator).relu().requires_grad_()
    label = cells.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)
    image, certain = torch.zeros(batch, 3, *label.shape[1:]), torch.ones(label.shape)
    view = View(name, image, label, certain, certain, seed=torch.arange(batch))
    return Seen(Output(logits, features, (), image), view)


def seconds(objective: Objective, seen: dict[str, Seen]) -> float:
    """Of the processor, for one forward and backward of all terms of an objective."""
    for output, _ in seen.values():
        output.features.grad = None
    began = time.process_time()
    for group in objective.reads:
        objective(*(seen[name] for name in group)).backward()
    return time.process_time() - began


def measure(side: int, batches: list[int], rounds: int) -> list[list[str]]:
    """Rows of a table: medians and their growth from the first batch."""
    contrasts = [
        PixelContrast(settings.PixelContrast(), VIEWS),
        AnchorContrast(settings.AnchorContrast(), VIEWS, CHANNELS),
    ]
    table: list[list[str]] = []
    first: list[float] = []
    for batch in batches:
        seen = {name: see(name, batch, side) for name in VIEWS}
        spent: list[list[float]] = [[] for _ in contrasts]
        for _ in range(rounds + 1):
            for times, objective in zip(spent, contrasts, strict=True):
                times.append(seconds(objective, seen))
        pixels, anchors = (statistics.median(times[1:]) for times in spent)
        first = first or [pixels, anchors]
        growth = [f"{pixels / first[0]:.1f}", f"{anchors / first[1]:.1f}"]
        table.append([str(batch), f"{pixels:.3f}", growth[0], f"{anchors:.3f}", growth[1], f"{pixels / anchors:.1f}"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = ["images per view", "pixel s", "growth", "anchor s", "growth", "pixel / anchor"]
    title = (
        f"contrasts, {CHANNELS}x{options.side}x{options.side} features, forward + backward, {options.threads} threads"
    )
    console.result_table(title, columns, measure(options.side, options.batches, options.rounds))
    console.result(f"torch {torch.__version__}, median of {options.rounds} after one warm-up")


if __name__ == "__main__":
    main()
