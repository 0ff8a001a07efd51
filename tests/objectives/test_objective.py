"""What an objective may do beside its term, seen in whole steps: groups of views, edits, state, laws."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from cluda_cli import presets, settings
from cluda_cli.adaptation.views import Scene, make_target
from cluda_cli.data.index import find
from cluda_cli.data.streams import batches
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import _make_view, join_groups, training_step
from cluda_cli.objectives import build_makers, restrict_law
from cluda_cli.objectives.objective import Objective

CPU = torch.device("cpu")


class Agreement(Objective):
    """Two views together; counts what it saw, edits the mixed view, asks for one class."""

    reads = (("weak", "strong"),)

    def __init__(self, section):
        super().__init__(section)
        self.register_buffer("seen", torch.tensor(0))

    def makers(self):
        return {"weak": make_target, "strong": make_target}

    def edit(self, view, scene):
        return replace(view, weight=torch.zeros_like(view.weight)) if view.name == "mixed" else view

    def forward(self, weak, strong):
        return (weak.output.logits - strong.output.logits - 1).square().mean()

    def update(self, scene, seen):
        assert all(not output.logits.requires_grad for output, _ in seen)
        self.seen += len(seen)
        scene.notes["agreement/seen"] = self.seen / 2

    def source_law(self, step):
        return (1.0, 0.0, 0.0, 0.0, 0.0) if step > 0 else None


def start(tiny_settings, micro_batch=None):
    tree = {"training": {"micro_batch": micro_batch or False}, "data": {"rare_class": {}}}
    chosen = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), tree))
    run = Run(chosen, [find("clean", chosen.data.root)], CPU)
    run.objectives["agreement"] = Agreement(settings.Objective())
    run.makers = build_makers(chosen, run.objectives)
    stream = batches(
        [find("clean", chosen.data.root)], find("noisy", chosen.data.root), chosen.data, 0, 0, 3,
        source_law=run.source_law,
    )  # fmt: skip
    return run, stream


@pytest.mark.parametrize(("micro_batch", "count"), [(None, 4), (1, 8)])
def test_a_group_has_one_term_and_update_sees_every_view_and_micro_batch(tiny_settings, micro_batch, count):
    run, stream = start(tiny_settings, micro_batch)
    result = training_step(run, next(stream))
    assert result.terms["weak+strong/agreement"] > 0
    assert [view.name for view in result.views] == ["source", "mixed", "weak", "strong"]
    assert result.terms["mixed/mixed"] == 0  # edited
    assert run.objectives["agreement"].seen == count
    assert result.notes == {"agreement/seen": count / 2}
    assert run.state_dict()["objectives"]["agreement.seen"] == count


def test_forward_draws_by_view_step_and_position_whatever_the_micro_batch(tiny_settings):
    run, stream = start(tiny_settings)
    batch = next(stream)

    def draw(name, step=0, first=0, parts=(slice(0, 2),)):
        view = _make_view(run, name, Scene(batch, run.teacher, 0, step, first), [])
        return [torch.rand(3, generator=g).tolist() for part in parts for g in view.part(part).generators("some")]

    weak = draw("weak")
    assert weak == draw("weak") == draw("weak", parts=[slice(0, 1), slice(1, 2)])
    assert draw("weak", first=1)[0] == weak[1]
    assert len({tuple(one) for one in weak + draw("strong") + draw("weak", step=1)}) == 6


def test_the_first_law_is_the_runs(tiny_settings):
    run, _ = start(tiny_settings)
    assert run.source_law(0) is None
    assert run.source_law(1) == (1.0, 0.0, 0.0, 0.0, 0.0)


def test_views_that_share_a_group_share_a_graph():
    class Reads(nn.Module):
        def __init__(self, *groups):
            super().__init__()
            self.reads = groups

    order = ["source", "mixed", "masked", "weak", "strong"]
    one, other = Reads(("source",), ("strong", "weak")), Reads(("mixed",), ("masked", "weak"))
    assert join_groups([one, other], order) == [("source",), ("mixed",), ("masked", "weak", "strong")]
    assert join_groups([Reads()], order) == []


class Lawgiver(Objective):
    """Asks for classes by a law from the second step on."""

    reads = ()

    def source_law(self, step):
        return (0.1, 0.2, 0.3, 0.4) if step else None


def test_the_law_of_tail_mixing_is_the_published_one_as_far_as_classes_are_rare():
    objectives = nn.ModuleDict({"lawgiver": Lawgiver(settings.Objective())})
    law = restrict_law(settings.Tail(temperature=0.02), objectives, [0.004, 0.5, 0.0, 0.008])
    first = 1 / (1 + math.exp(-0.004 / 0.02))
    assert law(0) == pytest.approx((first, 0, 0, 1 - first))
    assert law(1) == (0.1, 0, 0, 0.4)
