"""Parameter groups and the learning-rate schedule against the reference's."""

import pytest
import torch
from torch import nn

from cluda_cli import settings
from cluda_cli.engine.optim import build_optimizer, learning_rate_factor, set_learning_rate
from cluda_cli.errors import SettingsError
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


# Encoder -> parameter and its layer; the number of the last layer.
LAYERS = {
    "mit_b0": (
        {
            "patch_embed1.proj.weight": 0, "block1.0.norm1.weight": 1, "block1.1.mlp.fc1.weight": 2, "norm1.bias": 2,
            "patch_embed2.proj.weight": 3, "block2.0.attn.q.weight": 3, "norm3.weight": 6, "patch_embed4.norm.bias": 7,
            "block4.1.attn.kv.bias": 8, "norm4.weight": 8,
        },
        8,
    ),
    "test_vit": (
        {
            "network.pos_embed": 0, "network.cls_token": 0, "network.patch_embed.proj.weight": 0,
            "network.blocks.0.norm1.weight": 1, "network.blocks.5.mlp.fc2.bias": 6, "network.norm.weight": 6,
        },
        6,
    ),
    "tf_efficientnet_lite0": (
        {"network.conv_stem.weight": 0, "network.blocks.0.0.conv_dw.weight": 1, "network.blocks.6.0.bn3.bias": 16}, 16,
    ),
    "test_resnet": ({"network.conv1.0.weight": 0, "network.layer1.0.bn1.weight": 1}, 4),
    "test_convnext": ({"network.stem_0.weight": 0, "network.stages_3.blocks.1.gamma": 9}, 9),
    "swin_tiny_patch4_window7_224": ({"network.layers_3.blocks.1.mlp.fc2.weight": 12}, 12),
}  # fmt: skip


@pytest.mark.parametrize("encoder", LAYERS)
def test_layers_of_the_encoder_learn_the_slower_the_shallower_they_are(encoder):
    """Layer i of n: lr x decay^(n - i), the last block at lr itself; heads and weight decay stay."""
    model = settings.Model(encoder=encoder, weights=False)
    with torch.device("meta"):
        network = nn.ModuleDict({"encoder": build_encoder(model), "decoder": nn.Linear(2, 2)})
    plain, layered = settings.Optimizer(lr=1e-3), settings.Optimizer(lr=1e-3, layer_decay=0.5)
    before = build_optimizer(network, nn.ModuleDict(), plain).param_groups
    after = build_optimizer(network, nn.ModuleDict(), layered).param_groups
    rate = {id(p): group["base_lr"] for group in after for p in group["params"]}
    named = dict(network["encoder"].named_parameters())
    expected, last = LAYERS[encoder]
    for name, layer in expected.items():
        assert rate[id(named[name])] == pytest.approx(1e-3 * 0.5 ** (last - layer)), name
    assert {rate[id(p)] for p in named.values()} == {1e-3 * 0.5**k for k in range(last + 1)}
    assert {rate[id(p)] for p in network["decoder"].parameters()} == {1e-2}
    assert after[0]["base_lr"] == 1e-3  # the rate that is logged
    decays = [{id(p): group["weight_decay"] for group in groups for p in group["params"]} for groups in (before, after)]
    assert decays[0] == decays[1]


@pytest.mark.parametrize("encoder", ["mit_b0", "test_resnet"])
def test_without_layer_decay_layers_have_no_groups_of_their_own(encoder):
    with torch.device("meta"):
        network = nn.ModuleDict({"encoder": build_encoder(settings.Model(encoder=encoder, weights=False))})
    adamw = build_optimizer(network, nn.ModuleDict(), settings.Optimizer(layer_decay=1.0))
    assert [group["name"] for group in adamw.param_groups] == (
        ["encoder", "encoder norm"] if encoder == "mit_b0" else ["encoder"]
    )


def test_a_step_moves_every_layer_by_its_share():
    """AdamW's first step has the size of the learning rate, whatever the gradient."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"encoder": build_encoder(settings.Model(encoder="test_vit", weights=False))})
    optimizer = settings.Optimizer(lr=1e-3, layer_decay=0.5, weight_decay=0, warmup=0)
    adamw = build_optimizer(network, nn.ModuleDict(), optimizer)
    set_learning_rate(adamw, optimizer, 0, 10)
    watched = {layer: f"encoder.network.blocks.{layer - 1}.mlp.fc1.weight" for layer in (1, 6)}
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    adamw.step()
    after = dict(network.named_parameters())
    for layer, name in watched.items():
        expected = before[name] - 1e-3 * 0.5 ** (6 - layer)
        torch.testing.assert_close(after[name].detach(), expected, rtol=0, atol=1e-7)


def test_an_encoder_whose_layers_timm_does_not_know(monkeypatch):
    with torch.device("meta"):
        network = nn.ModuleDict({"encoder": build_encoder(settings.Model(encoder="test_resnet", weights=False))})
    monkeypatch.delattr("timm.models.resnet.ResNet.group_matcher")
    with pytest.raises(SettingsError) as caught:
        build_optimizer(network, nn.ModuleDict(), settings.Optimizer(layer_decay=0.9))
    assert caught.value.where == "optimizer.layer_decay" and caught.value.remedy == "set optimizer.layer_decay=1"


def test_the_state_of_layered_groups_goes_round():
    """As a resumed run loads it, with another decay of the layers."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"encoder": build_encoder(settings.Model(encoder="test_resnet", weights=False))})
    first = build_optimizer(network, nn.ModuleDict(), settings.Optimizer(layer_decay=0.9))
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    first.step()
    second = build_optimizer(network, nn.ModuleDict(), settings.Optimizer(layer_decay=0.9))
    second.load_state_dict(first.state_dict())
    for parameter in network.parameters():
        for name, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][name], value), name
    assert [g["base_lr"] for g in second.param_groups] == [g["base_lr"] for g in first.param_groups]
