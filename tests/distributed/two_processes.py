"""What each process of `test_collectives.py` does: python two_processes.py FOLDER NAME..., with torchrun's variables.

FOLDER/NAME.json holds settings; the result of rank r is FOLDER/NAME-r.pt.
"""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cluda_cli import presets
from cluda_cli.data.datasets import open_datasets
from cluda_cli.data.index import Index
from cluda_cli.data.streams import batches
from cluda_cli.distributed import collectives
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.inference.scoring import score
from cluda_cli.models.mit import VARIANTS, Variant
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.settings import Decoder, Model, Settings

Tensors = dict[str, torch.Tensor]
NARROW = Variant((8, 8, 20, 32), (1, 1, 1, 2))
"""A MiT with few channels and blocks, in place of MiT-B0."""


def outcome(settings: Settings) -> dict[str, Any]:
    """Two training steps in float64 and a validation: all that must not depend on the number of processes."""
    datasets = open_datasets(settings.data, settings.training.seed)
    run = Run(settings, datasets.sources, torch.device("cpu"), labelled=datasets.labelled)
    for module in run.objectives.modules():
        if isinstance(module, torch.nn.Dropout2d | torch.nn.BatchNorm2d):
            module.eval()  # masks and batch statistics depend on the rank
    found: dict[str, Any] = {}
    with patch.object(torch.Tensor, "float", torch.Tensor.double):  # losses are in float32 whatever the networks have
        for module in (run.student, run.teacher, run.objectives):
            module.double()
        mine = collectives.local_positions(settings.data.batch_size)
        sources, target, labelled = datasets.sources, datasets.unlabelled, datasets.labelled
        for i, batch in enumerate(batches(sources, target, settings.data, 0, 0, 2, labelled=labelled, positions=mine)):
            found[f"terms {i}"] = dict(training_step(run, batch).terms)
            found |= {f"{part} {i}": tensors for part, tensors in state(run).items()}
    if not settings.training.shard:  # FSDP2 does not let the type change
        networks = {"student": run.student.to(torch.float32), "norms": with_statistics(len(run.classes))}
        found["confusion"] = {name: count(run, network, datasets.target) for name, network in networks.items()}
    return found


def with_statistics(num_classes: int) -> Segmenter:
    """A network with batch norms whose running statistics are others in each process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = Decoder(embed_dim=8, channels=8)
        network = Segmenter(Model(encoder="mobilenetv2_050", weights=False, decoder=decoder), num_classes)
        torch.nn.init.normal_(network.decoder.conv_seg.weight, std=20)
        torch.manual_seed(collectives.rank())
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return network


def count(run: Run, network: Segmenter, target: Index) -> torch.Tensor:
    """Pixels of the val split by label and prediction."""
    settings = run.settings
    scores = score(
        network, target, split="val", classes=run.classes, seen=run.seen, box=settings.data.target_box,
        evaluation=settings.evaluation, device=run.device,
    )  # fmt: skip
    assert (scores.confusion.counts.sum(0) > 0).sum() > 1 or network is run.student
    return scores.confusion.counts


def state(run: Run) -> dict[str, Tensors]:
    """Copies of this rank's gradients, parameters, buffers and moments, gathered where they are sharded."""
    modules = {"student": run.student, "teacher": run.teacher, "objectives": run.objectives}
    found: dict[str, Tensors] = {name: dict(module.state_dict()) for name, module in modules.items()}
    found["gradients"] = {
        f"{name}.{n}": p.grad
        for name, module in modules.items()
        for n, p in module.named_parameters()
        if p.grad is not None
    }
    moments = run.optimizer.state_dict()["state"]
    found["optimizer"] = {f"{i} {name}": value for i, values in moments.items() for name, value in values.items()}
    return {
        part: {name: collectives.gather_tensor(t).clone() for name, t in tensors.items()}
        for part, tensors in found.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    VARIANTS["mit_b0"] = NARROW
    folder = Path(sys.argv[1])
    with collectives.process_group():
        for case in sys.argv[2:]:
            torch.save(
                outcome(presets.load([str(folder / f"{case}.json")])), folder / f"{case}-{collectives.rank()}.pt"
            )
