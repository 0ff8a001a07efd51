"""One training step: views -> outputs -> terms -> update.

One forward and one backward per view gives the gradient of the sum of all terms and keeps one graph alive at a time;
micro-batches do the same within a view. With several processes the gradients of all backward passes are averaged once,
after the last one (docs/decisions/0009-several-devices.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cluda_cli.adaptation.views import View, make_views
from cluda_cli.data.streams import Batch
from cluda_cli.distributed import collectives
from cluda_cli.engine.optim import set_learning_rate
from cluda_cli.engine.run import Run
from cluda_cli.engine.sharding import gather_tensor, unsharded_only
from cluda_cli.engine.verdict import Verdict
from cluda_cli.seeds import derive_seed


@dataclass(frozen=True)
class StepResult:
    """What one step has to tell."""

    terms: dict[str, Tensor]
    """"view/objective" -> unweighted value over all processes, a detached scalar on the device."""
    views: list[View]
    """What the student saw, for pictures."""


def training_step(run: Run, batch: Batch) -> StepResult:
    """Advance the run by one optimizer step on a batch that lies on the run's device.

    Raises RunError naming the term and the step if a loss or the gradient is not finite; parameters, buffers and
    counters are then as they were before the step, so the state is still good to save. On a CUDA device the host does
    not wait for the answer: the error comes with the next step, or with this one if something is written after it.
    """
    seed, step = run.settings.training.seed, run.step
    objectives = {n: o for n, o in run.objectives.items() if step >= o.settings.start and o.settings.weight > 0}
    wanted = frozenset().union(*(o.views for o in objectives.values()))
    before = [(buffer, buffer.clone()) for buffer in run.buffers()]
    run.student.train()
    run.optimizer.zero_grad(set_to_none=True)
    terms: dict[str, Tensor] = {}
    views: list[View] = []
    making = make_views(batch, run.teacher, wanted, run.settings.mixing, run.settings.masking, seed, step)
    while view := _next_view(run, making):
        views.append(view)
        terms |= _learn(run, view, {n: o for n, o in objectives.items() if view.name in o.views})
    collectives.average_gradients(unsharded_only(gradients := _gradients(run)))
    terms = dict(zip(terms, collectives.all_reduce_mean(torch.stack(list(terms.values()))).unbind(), strict=True))
    verdict = Verdict(step, terms | {"gradient": gather_tensor(torch.nn.utils.get_total_norm(gradients))})
    _admit(run, verdict, before)
    set_learning_rate(run.optimizer, run.settings.optimizer, step, run.settings.training.steps)
    run.optimizer.step()
    run.step += 1
    run.teacher.update(run.student, run.step, verdict.finite if run.looks_later else None)
    if _is_read(run):
        run.settle()
    return StepResult(terms, views)


def _admit(run: Run, verdict: Verdict, before: list[tuple[Tensor, Tensor]]) -> None:
    """Raise for a step that is not finite; `before` holds all buffers with what they were.

    Where the host looks later, it looks at the step before this one, and this one is seen to be without effect if it is
    broken: buffers and optimizer here, the teacher in its update.
    """
    found = run.pending if run.looks_later else verdict
    run.pending = verdict if run.looks_later else None
    error = found.error() if found else None
    if error:
        for buffer, value in before:
            buffer.copy_(value)
        if run.looks_later:
            run.step, run.pending = run.step - 1, None
        raise error
    if run.looks_later:
        for buffer, value in before:
            buffer.copy_(torch.where(verdict.finite, buffer, value))
        run.optimizer.found_inf = (~verdict.finite).float()  # what torch's GradScaler tells fused optimizers


def _is_read(run: Run) -> bool:
    """Whether something is written after this step, which has to wait for it anyway."""
    training = run.settings.training
    every = (training.log_every, training.save_every, training.validate_every, training.pictures_every)
    return run.step in {1, training.steps} or any(number and run.step % number == 0 for number in every)


def _learn(run: Run, view: View, objectives: dict[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Add the gradient of one view's terms, the mean over its micro-batches; the unweighted terms for the log."""
    training, count = run.settings.training, len(view.image)
    # Dropout and stochastic depth know only the global generator, so it is seeded for this view of this step, and so
    # that images at different positions of the joint batch do not lose the same channels.
    process = [collectives.rank()] if collectives.rank() else []
    torch.manual_seed(derive_seed(training.seed, f"student {view.name}", run.step, *process))
    terms: dict[str, Tensor] = {}
    for start in range(0, count, training.micro_batch or count):
        part = view.part(slice(start, start + (training.micro_batch or count)))
        share = len(part.image) / count
        with _precision(run):  # objectives compute in float32 all the same; their frozen networks need not
            output = run.forward(part.image, part.boxes)
            values = {name: objective(output, part) for name, objective in objectives.items()}
        total = torch.stack([objectives[name].settings.weight * value for name, value in values.items()]).sum()
        (share * total).backward()
        for name, value in values.items():
            label = f"{view.name}/{name}"
            terms[label] = terms.get(label, 0) + share * value.detach()
    return terms


def _next_view(run: Run, making: Iterator[View]) -> View | None:
    """The next view, or None; the teacher works in the precision of the student."""
    with _precision(run):
        return next(making, None)


def _precision(run: Run) -> torch.autocast:
    bfloat16 = run.settings.training.precision == "bfloat16" and run.device.type != "cpu"
    return torch.autocast(run.device.type, torch.bfloat16, enabled=bfloat16)


def _gradients(run: Run) -> list[Tensor]:
    return [p.grad for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
