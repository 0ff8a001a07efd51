"""What each process of `test_statistics.py` does: python two_processes.py FOLDER UPDATES, with torchrun's variables."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from cluda_cli.distributed import collectives
from cluda_cli.objectives.prototypes.statistics import Running, batch_statistics

CLASSES, CHANNELS, PIXELS = 5, 7, 24


def draw(update: int) -> tuple[Tensor, Tensor]:
    """Features, float64, and labels of a joint batch, in which classes have different means, spreads and frequencies.

    Class 0 is never there. A class is missing from most batches, and one has a pixel or two.
    """
    generator = torch.Generator().manual_seed(update)
    label = torch.tensor([1, 1, 1, 1, 2, 2, 255, 3, 4])[torch.randint(9, (PIXELS,), generator=generator)]
    label[(label == 4) & torch.tensor(update % 10 > 0)] = 255
    noise = torch.randn(PIXELS, CHANNELS, generator=generator, dtype=torch.float64)
    return 1 / (1 + label[:, None]) + noise * (0.01 * label[:, None]), label


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, updates = Path(sys.argv[1]), int(sys.argv[2])
    with collectives.process_group():
        running, own = Running(CLASSES, CHANNELS).double(), collectives.local_positions(PIXELS)
        for update in range(updates):
            features, label = (rows[own.start : own.stop] for rows in draw(update))
            running.update(batch_statistics(features, label, CLASSES))
        torch.save(running.state_dict(), folder / f"{collectives.rank()}.pt")
