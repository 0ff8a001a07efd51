"""Parameter groups and the learning-rate schedule against the reference's."""

import pytest
import torch
from torch import nn

from cluda_cli import settings
from cluda_cli.engine.optim import build_optimizer, learning_rate_factor, set_learning_rate
from cluda_cli.models.segmenter import Segmenter


@pytest.mark.reference
@pytest.mark.parametrize(("power", "suffix"), [(1.0, ""), (1.1, "_power1.1")])
def test_schedule_equals_the_reference(golden, power, suffix):
    tensors, _ = golden("10_lr/schedule")
    optimizer = settings.Optimizer(power=power)
    ours = torch.tensor(
        [6e-5 * learning_rate_factor(optimizer, int(i), 40_000) for i in tensors["in.iterations"]], dtype=torch.float64
    )
    torch.testing.assert_close(ours, tensors[f"out.lr_backbone{suffix}"], rtol=1e-12, atol=0)


@pytest.mark.reference
def test_groups_equal_the_reference(golden):
    _, description = golden("10_lr/param_groups")
    student = Segmenter(settings.Model(encoder="mit_b0", weights=False), 19)
    names = {id(p): n.replace("encoder.", "model.backbone.", 1) for n, p in student.named_parameters()}
    adamw = build_optimizer(student, nn.ModuleDict(), settings.Optimizer())
    ours = {g["name"]: {names[id(p)] for p in g["params"]} for g in adamw.param_groups}
    expected = {rule: {n for n in group if "backbone" in n} for rule, group in description["groups"].items()}
    assert ours["encoder"] == expected["lr 6e-05 wd 0.01"]
    assert ours["encoder norm"] == expected["lr 6e-05 wd 0"]
    assert not expected["lr 0.0006 wd 0.01"]
    assert all(name.startswith("decoder.") for name in ours["decoder"])
    rates = {g["name"]: (g["base_lr"], g["weight_decay"]) for g in adamw.param_groups}
    assert rates == {"encoder": (6e-5, 0.01), "encoder norm": (6e-5, 0.0), "decoder": (pytest.approx(6e-4), 0.01)}


def test_the_rate_of_every_group_follows_the_schedule():
    student = Segmenter(settings.Model(encoder="mit_b0", weights=False, decoder=settings.Decoder(channels=8)), 3)
    optimizer = settings.Optimizer(warmup=10)
    adamw = build_optimizer(student, nn.ModuleDict(), optimizer)
    set_learning_rate(adamw, optimizer, 20, 40)
    assert [g["lr"] for g in adamw.param_groups] == pytest.approx([3e-5, 3e-5, 3e-4])


def test_parameters_of_objectives_learn_and_frozen_ones_are_left_out():
    model = settings.Model(encoder="mobilenetv2_100", weights=False, freeze_batch_norm=True)
    student = Segmenter(model, 3)
    head = nn.ModuleDict({"contrast": nn.Linear(2, 2)})
    adamw = build_optimizer(student, head, settings.Optimizer())
    held = {id(p) for g in adamw.param_groups for p in g["params"]}
    assert {id(p) for p in head.parameters()} <= held
    assert held == {id(p) for m in (student, head) for p in m.parameters() if p.requires_grad}
    assert any(not p.requires_grad for p in student.encoder.parameters())
