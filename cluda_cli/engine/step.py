"""One training step: scene -> views -> outputs -> terms -> update.

One forward and one backward per group of views gives the gradient of the sum of all terms and keeps the graphs of one
group alive at a time; micro-batches do the same within a group. With several ranks the gradients of all backward passes
are averaged once, after the last one (docs/decisions/0009-several-devices.md).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluda_cli.adaptation.views import Scene, Seen, View
from cluda_cli.data.batch import Batch
from cluda_cli.distributed import collectives
from cluda_cli.engine.optim import set_learning_rate
from cluda_cli.engine.run import Run
from cluda_cli.engine.sharding import unsharded_only
from cluda_cli.errors import RunError
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.objective import Objective
from cluda_cli.seeds import derive_seed
from cluda_cli.spans import span

Group = tuple[str, ...]


@dataclass(frozen=True)
class StepResult:
    """What one step gives to the log and the pictures."""

    terms: dict[str, Tensor]
    """"view/objective" -> unweighted value over all ranks, a detached scalar on the device; views joined by "+"."""
    views: list[View]
    """What the student saw, for pictures."""
    notes: dict[str, Tensor]
    """What makers of views and objectives note for the log beside the terms: means over all ranks, scalars."""
    loss: float
    """Weighted sum of the terms; it is read together with the norm of the gradient, so that nothing else waits."""


def training_step(run: Run, batch: Batch) -> StepResult:
    """Advance the run by one optimizer step on a batch that lies on the run's device.

    Raises RunError naming the term and the step if a loss or the gradient is not finite. Parameters and counters are
    then as they were before the step. Running statistics are not, so the run is not worth saving.
    """
    step = run.step
    objectives = {n: o for n, o in run.objectives.items() if step >= o.settings.start and o.settings.weight > 0}
    first = collectives.rank() * len(batch["target"].image)
    scene = Scene(batch, run.teacher, run.settings.training.seed, step, first)
    run.student.train()
    run.optimizer.zero_grad(set_to_none=True)
    terms: dict[str, Tensor] = {}
    views: list[View] = []
    seen: list[Seen] = []
    for names in join_groups(objectives.values(), list(run.makers)):
        made = [_make_view(run, name, scene, objectives.values()) for name in names]
        terms |= _learn(run, made, objectives, seen, first)
        views += made
    gradients = [p.grad for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
    collectives.average_gradients(unsharded_only(gradients))
    values = collectives.all_reduce_mean(torch.stack(list(terms.values())))
    terms = dict(zip(terms, values.unbind(), strict=True))
    measured = _require_finite(step, terms, values, gradients)
    loss = sum(objectives[name.split("/")[1]].settings.weight * value for name, value in measured.items())
    with span("optimizer"):
        set_learning_rate(run.optimizer, run.settings.optimizer, step, run.settings.training.steps)
        run.optimizer.step()
    run.step += 1
    with span("ema"):
        run.teacher.update(run.student, run.step)
    for objective in (o for o in objectives.values() if o.updates):
        with span("update"), _precision(run), torch.no_grad():
            objective.update(scene, seen)
    return StepResult(terms, views, _average_notes(scene), loss)


def join_groups(objectives: Iterable[Objective], order: Sequence[str]) -> list[Group]:
    """All views that are read, those together whose graphs must be alive at once, in the order of their names."""
    groups: list[set[str]] = []
    for read in (set(group) for objective in objectives for group in objective.reads):
        touching = [group for group in groups if group & read]
        groups = [group for group in groups if not group & read] + [read.union(*touching)]
    ordered = [tuple(sorted(group, key=order.index)) for group in groups]
    return sorted(ordered, key=lambda group: order.index(group[0]))


def _make_view(run: Run, name: str, scene: Scene, objectives: Iterable[Objective]) -> View:
    """A view, as its maker and the objectives that edit it want it; the teacher has the precision of the student."""
    with span("views"), _precision(run):
        view = replace(run.makers[name](scene), name=name, seed=torch.tensor(scene.seeds(f"objectives {name}")))
        for objective in objectives:
            view = objective.edit(view, scene)
    return view


def _learn(
    run: Run, views: Sequence[View], objectives: Mapping[str, Objective], seen: list[Seen], first: int = 0
) -> dict[str, Tensor]:
    """Add the gradient of the terms of views whose graphs live together, the mean over micro-batches.

    Gives the unweighted terms for the log, and appends to `seen`, detached, what the student made of each micro-batch.
    `first` is the position of the first image in the joint batch.
    """
    size, label = run.settings.training.micro_batch, "+".join(view.name for view in views)
    count = len(views[0].image)
    terms: dict[str, Tensor] = {}
    for start in range(0, count, size or count):
        parts = [view.part(slice(start, start + (size or count))) for view in views]
        share = len(parts[0].image) / count
        found = {part.name: Seen(_forward(run, part, first + start), part) for part in parts}
        values = _measure(run, found, objectives)
        total = torch.stack([objectives[name].settings.weight * value for (name, _), value in values.items()]).sum()
        with span(f"{label}/backward"):
            (share * total).backward()
        for (name, group), value in values.items():
            term = f"{'+'.join(group)}/{name}"
            terms[term] = terms.get(term, 0) + share * value.detach()
        if any(objective.updates for objective in objectives.values()):
            seen += [Seen(output.detach(), part) for output, part in found.values()]
    return terms


def _forward(run: Run, view: View, position: int) -> Output:
    """The student's output.

    Dropout and stochastic depth know only the global generator. It is seeded by the view and the position of its first
    image, so that images at different positions do not lose the same channels.
    """
    torch.manual_seed(derive_seed(run.settings.training.seed, f"student {view.name}", run.step, position))
    with span(f"{view.name}/forward"), _precision(run):
        return run.forward(view.image, view.boxes)


def _measure(
    run: Run, seen: Mapping[str, Seen], objectives: Mapping[str, Objective]
) -> dict[tuple[str, Group], Tensor]:
    """The term of every group of every objective. They compute in float32; their frozen networks need not."""
    values = {}
    for name, objective in objectives.items():
        for group in objective.reads:
            if set(group) <= seen.keys():
                with span(f"{'+'.join(group)}/{name}"), _precision(run):
                    values[name, group] = objective(*(seen[view] for view in group))
    return values


def _average_notes(scene: Scene) -> dict[str, Tensor]:
    """The notes of the joint batch; all ranks make the same ones."""
    if not scene.notes:
        return {}
    values = collectives.all_reduce_mean(torch.stack([value.float() for value in scene.notes.values()]))
    return dict(zip(scene.notes, values.unbind(), strict=True))


def _require_finite(
    step: int, terms: Mapping[str, Tensor], values: Tensor, gradients: Sequence[Tensor]
) -> dict[str, float]:
    """The terms as numbers. Raises RunError that names what is not finite: a broken term breaks the norm."""
    norm = collectives.gather_tensor(torch.nn.utils.get_total_norm(gradients))
    first, *numbers = torch.cat([norm.reshape(1).to(values), values]).tolist()
    if math.isfinite(first):
        return dict(zip(terms, numbers, strict=True))
    broken = [name for name, value in zip(terms, numbers, strict=True) if not math.isfinite(value)] or ["the gradient"]
    remedy = "the last saved state is kept; look at the input, or resume with a lower optimizer.lr"
    raise RunError(f"{', '.join(broken)} is not finite in step {step}", "training", remedy)


def _precision(run: Run) -> torch.autocast:
    bfloat16 = run.settings.training.precision == "bfloat16" and run.device.type != "cpu"
    return torch.autocast(run.device.type, torch.bfloat16, enabled=bfloat16)
