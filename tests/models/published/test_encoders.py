"""Loading published weights from every container and layout, and refusing what does not fit."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from cluda_cli.errors import DataError
from cluda_cli.files import sha256
from cluda_cli.models.encoders import build_encoder, load_pretrained
from cluda_cli.models.published.encoders import from_authors, read_tensors, to_encoder_names
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.settings import Decoder, Model

State = dict[str, Tensor]


def _prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def _with_head(state: State) -> State:
    return state | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}


LAYOUTS: dict[str, Callable[[State], object]] = {
    "release": _with_head,
    "state_dict of a distributed run": lambda s: {"state_dict": _prefixed(s, "module.backbone."), "epoch": 3},
    "model": lambda s: {"model": _prefixed(s, "encoder."), "optimizer": {"lr": 1.0}},
    "nested": lambda s: {"state_dict": {"model_state": s}},
    "self-training": lambda s: {
        "state_dict": _prefixed(s, "model.backbone.") | {"ema_model.backbone.x": torch.ones(1)}
    },
    "compiled": lambda s: {"state_dict": _prefixed(s, "_orig_mod.module.encoder.")},
    "compiled inside": lambda s: {"state_dict": _prefixed(s, "model._orig_mod.net.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("half", [False, True])
def test_containers_and_prefixes(layout, half, mit_state, tmp_path):
    state = {name: value.half() if half else value for name, value in mit_state.items()}
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](state), path)
    model = Model(encoder="mit_b0", weights=str(path))
    encoder = build_encoder(model)
    report = load_pretrained(encoder, model)
    assert report is not None and report.matched == report.total == 176
    assert not report.missing and not report.mismatched
    assert report.unexpected == (("ema_model.backbone.x",) if layout == "self-training" else ())
    for name, value in encoder.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float()), name


def test_report_names_the_file(mit_state, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(mit_state, path)
    model = Model(encoder="mit_b0", weights=str(path))
    report = load_pretrained(build_encoder(model), model)
    assert report.origin == str(path) and report.sha256 == sha256(path) and len(report.sha256) == 64
    assert report.summary() == f"176 of 176 encoder tensors from {path} (sha256 {report.sha256[:12]})"


def test_false_loads_nothing():
    model = Model(encoder="mit_b0", weights=False)
    encoder = build_encoder(model)
    before = encoder.state_dict()["norm1.weight"].clone()
    assert load_pretrained(encoder, model) is None
    assert torch.equal(encoder.state_dict()["norm1.weight"], before)


@pytest.mark.parametrize(("counters", "suffix"), [(True, "pth"), (False, "pth"), (True, "safetensors")])
def test_torchvision_mobilenet(counters, suffix, tmp_path):
    torch.manual_seed(0)
    other = torchvision.models.mobilenet_v2(weights=None).eval()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    state = {n: v for n, v in other.state_dict().items() if counters or not n.endswith("num_batches_tracked")}
    path = tmp_path / f"mobilenet.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    model = Model(encoder="mobilenetv2_100", weights=str(path))
    encoder = build_encoder(model).eval()
    report = load_pretrained(encoder, model)
    assert report.matched == report.total == 255
    assert {name.rpartition(".")[0] for name in report.unexpected} == {"features.18.0", "features.18.1"}
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for features, last in zip(encoder(image), (3, 6, 13, 17), strict=True):
            torch.testing.assert_close(features, other.features[: last + 1](image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["test_convnext", "test_resnet", "mobilenetv2_050", "twins_pcpvt_small", "pvt_v2_b0", "test_vit", "test_vit3"],
)
def test_classifiers_of_timm(name, tmp_path):
    """Feature extractors flatten the names of the classifier from which published files were saved."""
    classifier = timm.create_model(name, pretrained=False).eval()
    path = tmp_path / "model.safetensors"
    save_file(classifier.state_dict(), path)
    model = Model(encoder=name, weights=str(path))
    encoder = build_encoder(model)
    report = load_pretrained(encoder, model)
    assert report.matched == report.total
    plain = name.startswith("test_vit")
    image = torch.randn(1, 3, 160, 160) if plain else torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = classifier.forward_intermediates(image, norm=plain, intermediates_only=True)[-1]
        torch.testing.assert_close(encoder.eval()(image)[-1], expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "deit_tiny_distilled_patch16_224", "pvt_v2_b0"])
def test_classifiers_are_left_over_without_a_word(name, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(timm.create_model(name).state_dict() | {"elsewhere.weight": torch.ones(1)}, path)
    model = Model(encoder=name, weights=str(path))
    assert load_pretrained(build_encoder(model), model).unexpected == ("elsewhere.weight",)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_own_checkpoint(name, tmp_path):
    model = Model(encoder=name, decoder=Decoder(embed_dim=8, channels=8))
    trained = Segmenter(model, 5)
    path = tmp_path / "best.safetensors"
    save_file(trained.state_dict(), path)
    model = Model(encoder=name, weights=str(path))
    report = load_pretrained(build_encoder(model), model)
    assert report.matched == report.total and all(name.startswith("decoder.") for name in report.unexpected)


def _resnet_c_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of open-mmlab's ResNet-101-v1c, after its published description."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def with_norm(conv: str, bn: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {f"{conv}.weight": shape} | {f"{bn}.{leaf}": (shape[0],) if leaf[0] != "n" else () for leaf in norm}

    named = with_norm("stem.0", "stem.1", (32, 3, 3, 3)) | with_norm("stem.3", "stem.4", (32, 32, 3, 3))
    named |= with_norm("stem.6", "stem.7", (64, 32, 3, 3))
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (23, 256), (3, 512)), start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            named |= with_norm(f"{at}.conv1", f"{at}.bn1", (width, inputs, 1, 1))
            named |= with_norm(f"{at}.conv2", f"{at}.bn2", (width, width, 3, 3))
            named |= with_norm(f"{at}.conv3", f"{at}.bn3", (4 * width, width, 1, 1))
            if block == 0:
                named |= with_norm(f"{at}.downsample.0", f"{at}.downsample.1", (4 * width, inputs, 1, 1))
            inputs = 4 * width
    return named | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


@pytest.mark.reference
def test_open_mmlab_resnet101_fills_the_dilated_encoder():
    with torch.device("meta"):
        encoder = build_encoder(Model(encoder="resnet101c", output_stride=8))
        published = {name: torch.empty(shape) for name, shape in _resnet_c_names().items()}
    renamed = to_encoder_names(
        {"backbone." + name: tensor for name, tensor in published.items()}, "resnet101c", Path("file.pth")
    )
    found = {name: tuple(tensor.shape) for name, tensor in renamed.items() if not name.startswith("fc.")}
    assert found == {n.removeprefix("network."): tuple(t.shape) for n, t in encoder.state_dict().items()}


def _swin_of_its_authors(state: State) -> State:
    """Downsampling closes a stage there and opens the next one here; masks and indices are in the file."""
    renamed = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): value
        for name, value in state.items()
        if not name.startswith("head.")
    }
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    return renamed


def _dinov2_of_its_authors(state: State) -> State:
    position = torch.randn(1, 1, state["cls_token"].shape[2])
    return {
        **{name: value for name, value in state.items() if name not in ("reg_token", "cls_token", "pos_embed")},
        "register_tokens": state["reg_token"],
        "mask_token": torch.zeros(1, 1),
        "cls_token": state["cls_token"] - position,
        "pos_embed": torch.cat([position, state["pos_embed"]], dim=1),
    }


def _dinov3_of_its_authors(state: State) -> State:
    renamed = {
        name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v
        for name, v in state.items()
    }
    channels = state["cls_token"].shape[2]
    return renamed | {
        "mask_token": torch.zeros(1, channels),
        "rope_embed.periods": torch.zeros(16),
        "blocks.0.attn.qkv.bias": torch.zeros(3 * channels),
        "blocks.0.attn.qkv.bias_mask": torch.zeros(3 * channels),
    }


def _pvt_of_its_authors(state: State) -> State:
    def rename(name: str) -> str:
        name = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"block{int(m[1]) + 1}", name)
        name = re.sub(r"^stages\.(\d)\.norm", lambda m: f"norm{int(m[1]) + 1}", name)
        name = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"patch_embed{int(m[1]) + 1}", name)
        return name.replace("patch_embed.", "patch_embed1.").replace("dwconv", "dwconv.dwconv")

    return {rename(name): value for name, value in state.items()}


def _convnext_of_its_authors(state: State) -> State:
    def rename(name: str) -> str:
        name = re.sub(r"^stages\.(\d)\.blocks", r"stages.\1", name)
        name = re.sub(r"^stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        name = name.replace("stem.", "downsample_layers.0.").replace("head.norm", "norm").replace("head.fc", "head")
        return name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")

    return {rename(name): value for name, value in state.items()}


AUTHORS: dict[str, Callable[[State], State]] = {
    "swin_tiny_patch4_window7_224": _swin_of_its_authors,
    "swinv2_tiny_window8_256": _swin_of_its_authors,
    "vit_small_patch14_reg4_dinov2": _dinov2_of_its_authors,
    "vit_small_patch16_dinov3": _dinov3_of_its_authors,
    "pvt_v2_b0": _pvt_of_its_authors,
    "convnext_atto": _convnext_of_its_authors,
}


@pytest.mark.parametrize("name", AUTHORS)
def test_layouts_of_authors(name, capsys):
    classifier = timm.create_model(name).state_dict()
    theirs = AUTHORS[name](classifier)
    assert theirs.keys() != classifier.keys()
    found = from_authors(theirs, name)
    assert {name for name in classifier.keys() - found.keys() if not name.startswith("head.")} == set()
    for key, value in found.items():
        assert torch.allclose(value, classifier[key], atol=1e-6), key
    assert not capsys.readouterr().out


def test_file_of_authors(tmp_path):
    classifier = timm.create_model("pvt_v2_b0")
    path = tmp_path / "pvt.pth"
    torch.save({"state_dict": _pvt_of_its_authors(classifier.state_dict())}, path)
    model = Model(encoder="pvt_v2_b0", weights=str(path))
    encoder = build_encoder(model)
    report = load_pretrained(encoder, model)
    assert report.matched == report.total and not report.unexpected
    own = {name.replace("_", "."): value for name, value in encoder.state_dict().items()}
    for name, value in classifier.state_dict().items():
        assert name.startswith("head.") or torch.equal(own["network." + name.replace("_", ".")], value)


def test_positions_of_another_size_are_resized(tmp_path):
    other = timm.create_model("test_vit", img_size=96)
    path = tmp_path / "vit.safetensors"
    save_file(other.state_dict(), path)
    model = Model(encoder="test_vit", weights=str(path))
    encoder = build_encoder(model).eval()
    report = load_pretrained(encoder, model)
    assert report.matched == report.total and not report.mismatched
    assert not torch.equal(encoder.network.pos_embed, build_encoder(model).network.pos_embed)


def test_one_tensor_in_a_hundred_may_be_missing(mit_state, tmp_path):
    state = dict(mit_state)
    del state["norm4.bias"]
    path = tmp_path / "weights.pth"
    torch.save(state | {"extra.weight": torch.ones(1)}, path)
    model = Model(encoder="mit_b0", weights=str(path))
    report = load_pretrained(build_encoder(model), model)
    assert (report.matched, report.total) == (175, 176)
    assert report.missing == ("norm4.bias",) and report.unexpected == ("extra.weight",)
    assert "1 missing (norm4.bias)" in report.summary() and "\n" not in report.summary()


def test_below_that_the_file_is_refused_and_nothing_is_loaded(mit_state, tmp_path):
    state = dict(mit_state)
    del state["block1.0.attn.q.bias"]
    state["norm4.weight"] = torch.ones(7)
    state["elsewhere.weight"] = torch.ones(7)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    model = Model(encoder="mit_b0", weights=str(path))
    encoder = build_encoder(model)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(DataError) as caught:
        load_pretrained(encoder, model)
    message = str(caught.value)
    assert "174 of 176" in message and str(path) in message and "\n" not in message
    assert all(name in message for name in ("block1.0.attn.q.bias", "norm4.weight", "elsewhere.weight"))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_weights_of_another_network(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    model = Model(encoder="mit_b0", weights=str(path))
    with pytest.raises(DataError, match="only 0 of 176"):
        load_pretrained(build_encoder(model), model)


def test_two_networks_in_one_file(mit_state, tmp_path):
    path = tmp_path / "both.pth"
    torch.save(_prefixed(mit_state, "backbone.") | _prefixed(mit_state, "encoder."), path)
    with pytest.raises(DataError, match="several tensors") as caught:
        load_pretrained(build_encoder(Model(encoder="mit_b0")), Model(encoder="mit_b0", weights=str(path)))
    assert caught.value.where == str(path)


def test_a_flipped_bit_in_a_torch_file_is_noticed(mit_state, tmp_path):
    torch.save(mit_state, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[len(content) // 2] ^= 8  # in the middle of a tensor
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(DataError, match="damaged .the checksum of .* is another"):
        read_tensors(tmp_path / "x.pth")


class _Code:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def _damage(folder: Path, state: State) -> dict[str, Path]:
    folder.joinpath("page.pth").write_text("<html>404</html>")
    folder.joinpath("empty.pth").write_bytes(b"")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"epoch": 1}, folder / "no-tensors.pth")
    torch.save(state, folder / "whole.pth")
    save_file(state, folder / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        content = folder.joinpath(f"whole.{suffix}").read_bytes()
        folder.joinpath(f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    torch.save({"a": torch.ones(1), "code": _Code(folder / "marker")}, folder / "code.pth")
    folder.joinpath("code.bin").write_bytes(pickle.dumps(_Code(folder / "marker")))
    return {path.name: path for path in folder.iterdir() if not path.name.startswith("whole")}


def test_a_refused_object_is_named(tmp_path):
    _damage(tmp_path, {"x": torch.zeros(1)})
    with pytest.raises(DataError, match=r"more than tensors: (posix|nt)\.mkdir; .* -> .* save its state_dict alone"):
        read_tensors(tmp_path / "code.pth")


@pytest.mark.parametrize("depth", [1, 2])
def test_a_file_that_holds_itself_is_refused(depth, tmp_path):
    """A pickle may refer to itself; following it never ends."""
    content: dict[str, object] = {"epoch": 1}
    content["state_dict"] = content if depth == 1 else {"model": content}
    torch.save(content, tmp_path / "loop.pth")
    with pytest.raises(DataError, match=r"loop\.pth: holds itself as its own state dict -> save its state_dict alone"):
        read_tensors(tmp_path / "loop.pth")


@pytest.mark.parametrize(
    "name",
    [
        "page.pth",
        "empty.pth",
        "list.pth",
        "no-tensors.pth",
        "cut.pth",
        "cut.safetensors",
        "code.pth",
        "code.bin",
        "none",
    ],
)
def test_damaged_files_are_refused_and_code_is_not_run(name, mit_state, tmp_path):
    path = _damage(tmp_path, mit_state).get(name, tmp_path / name)
    with pytest.raises(DataError) as caught:
        load_pretrained(build_encoder(Model(encoder="mit_b0")), Model(encoder="mit_b0", weights=str(path)))
    assert caught.value.where == str(path) and caught.value.remedy and "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()
