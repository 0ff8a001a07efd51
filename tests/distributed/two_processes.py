"""What each process of `test_parallel.py` does: python two_processes.py SETTINGS OUT, with torchrun's variables."""

import sys
from typing import Any
from unittest.mock import patch

import torch

from cluda_cli import presets
from cluda_cli.data.index import find
from cluda_cli.data.streams import batches
from cluda_cli.distributed import collectives
from cluda_cli.engine.run import Run
from cluda_cli.engine.sharding import gather_state
from cluda_cli.engine.step import training_step
from cluda_cli.inference.scoring import score
from cluda_cli.settings import Settings


def outcome(settings: Settings) -> dict[str, Any]:
    """Two training steps in float64 and a validation: all that must not depend on the number of processes."""
    source, target = (find(name, settings.data.root) for name in (settings.data.source, settings.data.target))
    run = Run(settings, [source], torch.device("cpu"))
    for module in run.objectives.modules():  # the masks of dropout depend on the process
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    found: dict[str, Any] = {}
    with patch.object(torch.Tensor, "float", torch.Tensor.double):  # losses are in float32 whatever the networks have
        for module in (run.student, run.teacher, run.objectives):
            module.double()
        mine = collectives.local_positions(settings.data.batch_size)
        for i, batch in enumerate(batches([source], target, settings.data, 0, 0, 2, positions=mine)):
            found[f"terms {i}"] = dict(training_step(run, batch).terms)
            found |= {f"{part} {i}": tensors for part, tensors in state(run).items()}
    if not settings.training.shard:  # FSDP2 does not let the type change
        network, box = run.student.to(torch.float32), settings.data.target_box
        scores = score(
            network, target, split="val", classes=run.classes, seen=run.seen, box=box, evaluation=settings.evaluation,
            device=run.device,
        )  # fmt: skip
        found["confusion"] = {"counts": scores.confusion.counts}
    return found


def state(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of gradients, parameters, buffers and moments."""
    parts, gradients = run.state_dict(), {}
    for name, module in (("student", run.student), ("objectives", run.objectives)):
        gradients |= {f"{name}.{n}": gather_state(p.grad) for n, p in module.named_parameters() if p.grad is not None}
    found = {part: parts[part] for part in ("student", "teacher", "objectives")} | {"gradients": gradients}
    found["optimizer"] = {f"{n} {k}": v for n, kinds in parts["optimizer"]["state"].items() for k, v in kinds.items()}
    return {part: {name: tensor.clone() for name, tensor in tensors.items()} for part, tensors in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with collectives.process_group():
        results = outcome(presets.load([sys.argv[1]]))
        torch.save(results, f"{sys.argv[2]}-{collectives.rank()}.pt")
