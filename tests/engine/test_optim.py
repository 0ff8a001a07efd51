"""Parameter groups and the learning-rate schedule against the reference's."""

import pytest
import torch
from torch import nn

from cluda_cli import settings
from cluda_cli.engine.optim import build_optimizer, learning_rate_factor, set_learning_rate
from cluda_cli.models.encoders import build_encoder
from cluda_cli.models.multires import build_segmenter
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


@pytest.mark.parametrize(
    ("encoder", "undecayed", "decayed"),
    [
        ("vit_tiny_patch16_224", ("pos_embed", "cls_token", "blocks.0.norm1.weight"), ("blocks.0.attn.qkv.weight",)),
        ("convnext_atto", ("stages_0.blocks.0.gamma", "stages_1.downsample.0.weight"), ("stem_0.weight",)),
        ("swin_tiny_patch4_window7_224", ("layers_0.blocks.0.attn.relative_position_bias_table",), ()),
        ("test_resnet", (), ("bn1.weight",)),
    ],
)
def test_what_is_no_weight_of_a_layer_does_not_decay(encoder, undecayed, decayed):
    model = settings.Model(encoder=encoder, weights=False)
    network = nn.ModuleDict({"encoder": build_encoder(model)})
    names = {id(p): n.removeprefix("encoder.network.") for n, p in network.named_parameters()}
    adamw = build_optimizer(network, nn.ModuleDict(), settings.Optimizer())
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in adamw.param_groups}
    assert set(undecayed) <= groups.get("encoder norm", set())
    assert set(decayed) <= groups["encoder"]


def test_every_head_learns_at_the_rate_of_the_decoder():
    model = settings.Model(encoder="mit_b0", weights=False, multires=settings.MultiResolution(attention_dim=8))
    student = build_segmenter(model, (64, 64), 3)
    adamw = build_optimizer(student, nn.ModuleDict(), settings.Optimizer())
    (fast,) = (g for g in adamw.param_groups if g["name"] == "decoder")
    heads = [*student.decoder.parameters(), *student.scale_attention.parameters()]
    assert {id(p) for p in fast["params"]} == {id(p) for p in heads}
