"""Context and detail against measured networks: HRDA's, and that of CLUDA's released code.

B batch, K = 19 classes, a b cells of the detail crop.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.inference import sliding
from cluda_cli.inference.sliding import image_logits
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.multires import MultiResolution, entropy, find_most_uncertain
from cluda_cli.models.normalisation import Normalisation
from cluda_cli.models.segmenter import Output
from cluda_cli.models.windows import average_windows
from cluda_cli.objectives.cross_entropy import CrossEntropy, weighted_cross_entropy
from cluda_cli.objectives.pixel_contrast import PixelContrast

K, DETAIL = 19, (64, 64)
SMALL = settings.Decoder(embed_dim=32, channels=32, dropout=0)
LOSS = CrossEntropy(settings.CrossEntropy(), "source")
pytestmark = pytest.mark.reference


class Networks(nn.Module):
    """A network of two resolutions and the weighter of its contrast, which CLUDA's code keeps in the network."""

    def __init__(self, decoder: settings.Decoder, *, cluda: bool = False) -> None:
        super().__init__()
        model = settings.Model(encoder="mit_b0", drop_path=0, decoder=decoder)
        multires = settings.MultiResolution(detail_crop=DETAIL, blend_late=cluda)
        self.network = MultiResolution(model, multires, (128, 128), K)
        if cluda:
            channels = self.network.encoder.channels
            self.weighter = PixelContrast(settings.PixelContrast(), ("source",), channels).weighter
        self.eval()


def published_name(name: str) -> str:
    """What the published networks call a tensor of Networks."""
    for own, theirs in {
        "network.encoder.": "backbone.",
        "network.decoder.": "decode_head.head.",
        "network.scale_attention.": "decode_head.scale_attention.",
        "weighter.": "decode_head.feat_weighter.",
    }.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    raise AssertionError(name)


def remember_logits(decoder: nn.Module) -> list[Tensor]:
    """A list that fills with what the decoder's calls return."""
    seen: list[Tensor] = []
    decoder.register_forward_hook(lambda _, __, result: seen.append(result[0]))
    return seen


def losses(output: Output, view: View) -> tuple[Tensor, Tensor]:
    """Both parts of the cross-entropy, with their shares."""
    assert output.detail is not None
    boxes = output.detail.boxes
    whole = weighted_cross_entropy(output.logits, view.label, view.weight)
    part = weighted_cross_entropy(output.detail.logits, boxes.crop(view.label), boxes.crop(view.weight))
    return 0.9 * whole, 0.1 * part


# Networks filled by a formula, in evaluation mode


def formula_forward(networks: Networks, image: Tensor) -> Output:
    """The forward of training, with the statistics of evaluation; crop of rows 16-79, columns 40-103."""
    networks.network.training = True  # of the network alone, not of its parts
    output = networks.network(image, Boxes(torch.tensor([[16, 40]] * 2), DETAIL))
    networks.network.training = False
    return output


def check_formula_losses(output: Output, whole: float, part: float) -> None:
    h, w = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    label = ((h // 8 + w // 16) % 20).expand(2, 128, 128)
    weight = (0.5 + 0.5 * (0.1 * h.double()).cos()).expand(2, 128, 128)
    view = View("source", output.image, label.masked_fill(label == 19, 255), weight, weight)
    assert [part.item() for part in losses(output, view)] == pytest.approx([whole, part], rel=0, abs=1e-8)
    assert LOSS(Seen(output, view)).item() == pytest.approx(whole + part, rel=0, abs=1e-6)  # computed in float32


@torch.no_grad()
def test_formula_filled_hrda(fill_by_formula: Any, formula_images: Any, check_moments: Any) -> None:
    networks, image = Networks(settings.Decoder()).double(), formula_images(2, 128, 128)
    fill_by_formula(networks, published_name)
    assert len(list(networks.parameters())) == 223
    decoded = remember_logits(networks.network.decoder)
    attention = remember_logits(networks.network.scale_attention)
    output = formula_forward(networks, image)
    row = "-0.069134581 0.282684266 0.073133682 0.079617433 0.092584935 -0.302623883"
    check_moments(output.logits, (2, K, 32, 32), row)
    mask = torch.zeros(16, 16)
    mask[2:10, 5:13] = 1
    context = (1 - attention[0].sigmoid() * mask) * decoded[0]
    row = "-0.065494317 0.258450148 0.073133682 0.099068686 0.101296571 -0.302623883"
    check_moments(context, (2, K, 16, 16), row)
    assert output.detail is not None
    row = "-0.067464644 0.275171959 0.084317171 0.108218967 0.098803348 -0.296920048"
    check_moments(output.detail.logits, (2, K, 16, 16), row)
    check_formula_losses(output, 1.297086566, 0.134577009)


@torch.no_grad()
def test_formula_filled_hrda_in_evaluation(fill_by_formula: Any, formula_images: Any, check_moments: Any) -> None:
    networks = Networks(settings.Decoder()).double()
    fill_by_formula(networks, published_name)
    logits = networks.network(formula_images(2, 128, 128)).logits
    row = "-0.069575375 0.286464226 0.070151447 0.070151447 0.071685656 -0.292767770"
    # The measured network added windows up in float32.
    check_moments(F.interpolate(logits, (128, 128), mode="bilinear"), (2, K, 128, 128), row, tolerance=1e-7)


def take_as_normalised(monkeypatch: pytest.MonkeyPatch, image: Tensor) -> None:
    """Let windows slide over this normalised image, 3 H W, whatever picture is given."""

    def average(_: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return average_windows(image[None], *arguments, **options)

    monkeypatch.setattr(sliding, "average_windows", average)
    monkeypatch.setattr(Normalisation, "apply", lambda _, windows: windows)


def test_formula_filled_hrda_slides(
    fill_by_formula: Any, formula_images: Any, check_moments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, image = Networks(settings.Decoder()).double(), formula_images(1, 128, 256)[0]
    fill_by_formula(networks, published_name)
    networks.network.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    take_as_normalised(monkeypatch, image.float())
    slide = settings.Evaluation(mode="slide", window=(128, 128), stride=(64, 64))
    logits = image_logits(networks.network, torch.zeros(3, 128, 256, dtype=torch.uint8), None, slide)
    logits = F.interpolate(logits[None], (256, 512), mode="bilinear")
    row = "-0.072394224 0.295259062 0.070151447 0.070151447 0.070151447 -0.306884702"
    check_moments(logits.double(), (1, K, 256, 512), row, tolerance=1e-7)
    counts = logits.argmax(dim=1).flatten().bincount(minlength=K)
    assert {c: n for c, n in enumerate(counts.tolist()) if n} == {10: 26064, 11: 105008}


@torch.no_grad()
def test_formula_filled_cluda(fill_by_formula: Any, formula_images: Any, check_moments: Any) -> None:
    networks, image = Networks(settings.Decoder(), cluda=True).double(), formula_images(2, 128, 128)
    fill_by_formula(networks, published_name)
    assert len(list(networks.parameters())) == 236
    decoded = remember_logits(networks.network.decoder)
    output = formula_forward(networks, image)
    row = "0.022586721 0.204666271 0.146747821 0.159634331 0.185407351 -0.214308438"
    check_moments(output.logits, (2, K, 32, 32), row)
    row = "0.022623175 0.208409628 0.146747821 0.198293861 0.203013483 -0.214308438"
    check_moments(decoded[0], (2, K, 16, 16), row)
    context, detail, weight = contrast_maps(networks, output)
    row = "0.403743967 0.494492017 0.419611551 0.548595838 0.677580124 0.015899664"
    check_moments(context, (2, 256, 32, 32), row)
    check_moments(detail, (2, 256, 32, 32), "0.092223155 0.278387138 0 0 0 0")
    row = "0.413573532 0.005550892 0.412395262 0.411853480 0.410769915 0.405741592"
    check_moments(weight, (2, 1, 32, 32), row)
    assert output.detail is not None
    assert output.detail.boxes.over(8).inside((16, 16)).sum() == 128
    check_formula_losses(output, 1.299379138, 0.138910982)


def contrast_maps(networks: Networks, output: Output) -> tuple[Tensor, Tensor, Tensor]:
    """Features of context and detail, and the weight of the latter, at stride 4 as the contrast sees them."""
    assert output.detail is not None
    fine = (output.logits.shape[2], output.logits.shape[3])
    context = F.interpolate(output.features, fine, mode="bilinear", align_corners=True)
    weight = F.interpolate(networks.weighter(output.encoder)[0].sigmoid(), fine, mode="bilinear")
    return context, output.detail.boxes.over(4).paste(output.detail.features, fine), weight


# Networks with recorded random weights


def recorded(golden: Any, head: str, dtype: torch.dtype, *, cluda: bool) -> Networks:
    networks = Networks(SMALL, cluda=cluda).to(dtype)
    encoder, _ = golden("03_mit/mit_b0_weights")
    heads, _ = golden(f"05_hrda/{head}")
    published = {name.replace("param.", "backbone."): value for name, value in encoder.items()}
    published |= {name.removeprefix("param."): value for name, value in heads.items()}
    networks.load_state_dict({name: published.pop(published_name(name)) for name in networks.state_dict()})
    assert not published
    return networks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cluda", [False, True])
def test_training_forward_and_backward(cluda: bool, dtype: torch.dtype, golden: Any, check_bounds: Any) -> None:
    vectors, description = golden("05_hrda/cluda_train" if cluda else "05_hrda/hrda_train")
    networks = recorded(golden, "cluda_head_weights" if cluda else "hrda_head_weights", dtype, cluda=cluda).train()
    decoded = remember_logits(networks.network.decoder)
    attention = remember_logits(networks.network.scale_attention)
    label = vectors["in.labels"][:, 0].long()
    view = View("source", vectors["in.image"].to(dtype), label, *torch.ones(2, *label.shape, dtype=dtype))
    top, bottom, left, right = description["settings"]["hr_crop_box_y1_y2_x1_x2"]
    assert (bottom - top, right - left) == DETAIL
    output = networks.network(view.image, Boxes(torch.tensor([[top, left]] * 2), DETAIL))
    assert output.detail is not None
    whole, part = losses(output, view)
    total = LOSS(Seen(output, view)) if dtype == torch.float32 else whole + part  # the objective computes in float32
    total.backward()
    raw = attention[0].sigmoid()
    mask = output.detail.boxes.over(8).inside((16, 16))[:, None].to(dtype)
    found = {"logits_fused": output.logits, "logits_lr": decoded[0] if cluda else (1 - raw * mask) * decoded[0],
             "logits_hr": output.detail.logits, "attention_raw": raw, "decode.loss_seg": whole,
             "decode.hr.loss_seg": part, "total_loss": total}  # fmt: skip
    if cluda:
        networks.weighter.dropout.eval()
        context, detail, weight = contrast_maps(networks, output)
        found |= {"fused_feats_lr": context, "fused_feats_hr": detail, "att": weight}
        assert torch.equal(mask, vectors["out.mask"].to(dtype))
    for i, features in enumerate(output.encoder, 1):
        torch.testing.assert_close(features.float(), vectors[f"out.features{i}"], rtol=0, atol=1e-4)
    gradients = {published_name(name): parameter.grad for name, parameter in networks.named_parameters()}
    check_gradient_norms(gradients, description["gradient_l2_norms"], dtype)
    buffers = {published_name(name): value for name, value in networks.named_buffers()}
    bounds = description["tolerance_demanded"]["bounds"]
    wanted = {name: value for name, value in bounds.items() if not name.endswith("acc_seg") and name != "mask"}
    found |= {name: gradients[name.removeprefix("grad.")] for name in wanted if name.startswith("grad.")}
    found |= {name: buffers[name.removeprefix("after.")] for name in wanted if name.startswith("after.")}
    check_bounds(found, vectors, {"tolerance_demanded": {"bounds": wanted}}, dtype)
    for name, value in buffers.items():
        if name.endswith("num_batches_tracked"):
            assert value == vectors[f"out.after.{name}"], name


def check_gradient_norms(gradients: dict[str, Tensor | None], norms: dict[str, Any], dtype: torch.dtype) -> None:
    assert gradients.keys() == norms.keys()
    relative, absolute = (1e-9, 1e-15) if dtype == torch.float64 else (1e-4, 1e-8)
    for name, gradient in gradients.items():
        expected = norms[name]["float64"]
        if expected is None:
            assert gradient is None, name
        else:
            assert gradient is not None and gradient.norm().item() == pytest.approx(expected, relative, absolute), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_evaluation_of_a_batch(dtype: torch.dtype, golden: Any, check_bounds: Any) -> None:
    vectors, description = golden("05_hrda/hrda_inference")
    networks = recorded(golden, "hrda_head_weights", dtype, cluda=False)
    decoded = remember_logits(networks.network.decoder)
    attention = remember_logits(networks.network.scale_attention)
    image = vectors["in.image_a"].to(dtype)  # 104 x 136, which windows of 64 do not divide
    logits = networks.network(image).logits
    nn.init.constant_(networks.network.scale_attention.conv_seg.bias, 1e4)  # all attention to the detail
    fine = networks.network(image).logits
    found = {
        "a.fused_logits_quarter": logits,
        "a.lr_logits_returned": (1 - attention[0].sigmoid()) * decoded[0],
        "a.hr_logits_quarter": fine,
        "a.logits": F.interpolate(logits, (104, 136), mode="bilinear")[..., ::2, ::2],
    }
    bounds = description["tolerance_demanded"]["bounds"]
    check_bounds(found, vectors, {"tolerance_demanded": {"bounds": {name: bounds[name] for name in found}}}, dtype)


def test_sliding_evaluation_of_an_image(golden: Any, check_bounds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, description = golden("05_hrda/hrda_inference")
    network = recorded(golden, "hrda_head_weights", torch.float32, cluda=False).network
    image = vectors["in.image_b"].float()
    take_as_normalised(monkeypatch, image[0])
    slide = settings.Evaluation(mode="slide", window=(96, 96), stride=(48, 48))
    logits = image_logits(network, torch.zeros(3, 128, 160, dtype=torch.uint8), None, slide)[None]
    rescaled = F.interpolate(logits, (150, 190), mode="bilinear").softmax(dim=1).flip(3)
    found = {
        "b.logits_slide": logits[..., ::2, ::2],
        "b.softmax": logits.softmax(dim=1)[..., ::4, ::4],
        "b.softmax_rescaled_flipped": rescaled[..., ::5, ::5],
    }
    bounds = description["tolerance_demanded"]["bounds"]
    bounds = {name: bounds[name] for name in found}
    check_bounds(found, vectors, {"tolerance_demanded": {"bounds": bounds}}, torch.float32)
    assert torch.equal(logits.argmax(dim=1)[0], vectors["out.b.pred"].long())


def test_entropy_and_its_largest_window(golden: Any) -> None:
    vectors, description = golden("05_hrda/cluda_entropy_crop")
    bound = description["tolerance_demanded"]["bounds"]["entropy_logits"]["float32_max_abs"]
    found = entropy(vectors["in.logits"]) / K  # the measured one is divided by 19 log 19, not by log 19
    assert (found - vectors["out64.entropy_logits"]).abs().max() <= bound
    maps, boxes = vectors["in.entropy_maps"].float(), vectors["out.boxes_without_aliasing"]
    for uncertainty, expected in zip(maps, boxes, strict=True):  # B 1 h w, B 4
        corner = find_most_uncertain(uncertainty[:, 0], DETAIL, (32, 32))
        assert torch.equal(corner, expected[:, [0, 2]])
