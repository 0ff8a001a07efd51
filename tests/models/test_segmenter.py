"""Encoder and decoder joined."""

import pytest
import torch
from torch import Tensor, nn

from cluda_cli.inference.sliding import image_logits
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.settings import Decoder, Evaluation, Model

SMALL = Decoder(embed_dim=8, channels=8)


def _reference_name(name: str) -> str:
    return name.replace("encoder.", "backbone.", 1).replace("decoder.", "decode_head.", 1)


def _upsampled(logits: Tensor) -> Tensor:
    return nn.functional.interpolate(logits, (64, 96), mode="bilinear")


@pytest.mark.reference
def test_formula_filled_daformer_in_evaluation(fill_by_formula, formula_image, check_moments):
    network = Segmenter(Model(encoder="mit_b0"), 19).double().eval()
    fill_by_formula(network, _reference_name)
    row = "-0.067243511 0.275187353 0.065571308 0.065571308 0.068122627 -0.276102158"
    check_moments(_upsampled(network(formula_image).logits), (2, 19, 64, 96), row)


@pytest.mark.reference
def test_formula_filled_daformer_with_batch_statistics(fill_by_formula, formula_image, check_moments):
    model = Model(encoder="mit_b0", drop_path=0, decoder=Decoder(dropout=0))
    network = Segmenter(model, 19).double().train()
    fill_by_formula(network, _reference_name)
    row = "-0.061362709 0.276791493 0.114748422 0.114748422 0.106715474 -0.259001609"
    check_moments(_upsampled(network(formula_image).logits), (2, 19, 64, 96), row)
    norm = network.decoder.fuse_layer.bottleneck.bn
    mean_row = "0.000048000 0.023230992 -0.019386954 0.032313412 -0.009155883 0.032001195"
    check_moments(norm.running_mean, (256,), mean_row)
    var_row = "0.924561888 0.006999088 0.915058548 0.932479524 0.924421886 0.933011342"
    check_moments(norm.running_var, (256,), var_row)


@pytest.mark.reference
@pytest.mark.parametrize(("embed_dim", "head", "total"), [(256, 3_712_275, 85_155_283), (512, 5_057_811, 86_500_819)])
def test_number_of_parameters(embed_dim, head, total):
    with torch.device("meta"):
        network = Segmenter(Model(encoder="mit_b5", decoder=Decoder(embed_dim=embed_dim)), 19)
    assert sum(p.numel() for p in network.decoder.parameters()) == head
    assert sum(p.numel() for p in network.parameters()) == total


def test_output():
    network = Segmenter(Model(encoder="mit_b0", decoder=SMALL), 5).eval()
    output = network(torch.randn(2, 3, 64, 96))
    assert output.logits.shape == (2, 5, 16, 24)
    assert output.features.shape == (2, 8, 16, 24)
    assert [tuple(m.shape[1:]) for m in output.encoder] == [(32, 16, 24), (64, 8, 12), (160, 4, 6), (256, 2, 3)]
    torch.testing.assert_close(network.decoder(output.encoder)[0], output.logits)
    assert network.pad_multiple == 1
    assert Segmenter(Model(encoder="resnet18", decoder=SMALL), 5).pad_multiple == 32


@pytest.mark.parametrize(
    ("encoder", "mean", "std"),
    [
        ("tf_efficientnet_lite0", [127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),
        ("test_vit", [127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),
        ("mit_b0", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    ],
)
def test_an_encoder_sees_images_as_it_was_pretrained(encoder, mean, std):
    network = Segmenter(Model(encoder=encoder, decoder=SMALL), 5)
    seen = []
    network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    image_logits(network, image, None, Evaluation())
    expected = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(seen[0][0], expected)


def test_same_seed_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(Segmenter(Model(encoder="mobilenetv2_100", decoder=SMALL), 5).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("encoder", "count"), [("resnet18", 20), ("tf_efficientnet_lite0", 48)])
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm(frozen, encoder, count):
    """timm's efficient networks have a batch norm of their own, with an activation in it."""
    torch.manual_seed(0)
    network = Segmenter(Model(encoder=encoder, decoder=SMALL, freeze_batch_norm=frozen), 5)
    container = nn.ModuleList([network]).eval().train()  # as inside the state of a run
    norms = [m for m in network.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == count and all(norm.training is not frozen for norm in norms)
    before = [norm.running_mean.clone() for norm in norms]
    container[0](torch.randn(2, 3, 64, 64)).logits.sum().backward()
    assert all(torch.equal(norm.running_mean, mean) is frozen for norm, mean in zip(norms, before, strict=True))
    assert all((norm.weight.grad is None) is frozen for norm in norms)
    assert next(network.encoder.parameters()).grad is not None  # of the first convolution
    assert network.decoder.fuse_layer.bottleneck.bn.training
    assert network.decoder.fuse_layer.bottleneck.bn.weight.grad is not None
