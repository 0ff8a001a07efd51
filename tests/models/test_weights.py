"""Loading published weights from every layout, and refusing what does not fit."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn

from cluda_cli.errors import DataError, EnvironmentProblem, SettingsError
from cluda_cli.files import sha256
from cluda_cli.models.encoders import build_encoder, load_pretrained
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.models.weights import MIT_HUB
from cluda_cli.settings import Decoder, Model

State = dict[str, Tensor]


def _mit_state(seed: int = 1) -> State:
    torch.manual_seed(seed)
    return {
        name: torch.randn_like(value) for name, value in build_encoder(Model(encoder="mit_b0")).state_dict().items()
    }


def _transformers_layout(state: State) -> State:
    """The names of Hugging Face transformers, written independently of the code under test."""
    inner = {
        "norm1": "layer_norm_1", "norm2": "layer_norm_2", "attn.q": "attention.self.query",
        "attn.sr": "attention.self.sr", "attn.norm": "attention.self.layer_norm", "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.dense1", "mlp.dwconv.dwconv": "mlp.dwconv.dwconv", "mlp.fc2": "mlp.dense2",
    }  # fmt: skip
    renamed = {"classifier.weight": torch.zeros(1000, 256), "classifier.bias": torch.zeros(1000)}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        first, _, rest = module.partition(".")
        stage = int(first[-1]) - 1
        if first.startswith("patch_embed"):
            part = "proj" if rest == "proj" else "layer_norm"
            renamed[f"segformer.encoder.patch_embeddings.{stage}.{part}.{leaf}"] = value
        elif first.startswith("norm"):
            renamed[f"segformer.encoder.layer_norm.{stage}.{leaf}"] = value
        else:
            block, _, part = rest.partition(".")
            prefix = f"segformer.encoder.block.{stage}.{block}"
            if part == "attn.kv":
                key, other = value.chunk(2)
                renamed[f"{prefix}.attention.self.key.{leaf}"] = key
                renamed[f"{prefix}.attention.self.value.{leaf}"] = other
            else:
                renamed[f"{prefix}.{inner[part]}.{leaf}"] = value
    return renamed


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
    "transformers": _transformers_layout,
    "transformers encoder": lambda s: {
        name.removeprefix("segformer."): value for name, value in _transformers_layout(s).items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("half", [False, True])
def test_layouts_of_mix_transformers(layout, half, tmp_path):
    state = {name: value.half() if half else value for name, value in _mit_state().items()}
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


def test_report_names_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(_mit_state(), path)
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


@pytest.mark.parametrize("counters", [True, False])
def test_torchvision_mobilenet(counters, tmp_path):
    torch.manual_seed(0)
    other = torchvision.models.mobilenet_v2(weights=None).eval()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    state = {n: v for n, v in other.state_dict().items() if counters or not n.endswith("num_batches_tracked")}
    path = tmp_path / "mobilenet.pth"
    torch.save(state, path)
    model = Model(encoder="mobilenetv2_100", weights=str(path))
    encoder = build_encoder(model).eval()
    report = load_pretrained(encoder, model)
    assert report.matched == report.total == 255
    assert {name.rpartition(".")[0] for name in report.unexpected} == {"features.18.0", "features.18.1"}
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for features, last in zip(encoder(image), (3, 6, 13, 17), strict=True):
            torch.testing.assert_close(features, other.features[: last + 1](image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "mobilenetv2_100", "twins_pcpvt_small"])
def test_classifiers_of_timm(name, tmp_path):
    """Feature extractors flatten the names of the classifier from which published files were saved."""
    classifier = timm.create_model(name, pretrained=False).eval()
    path = tmp_path / "model.safetensors"
    save_file(classifier.state_dict(), path)
    model = Model(encoder=name, weights=str(path))
    encoder = build_encoder(model)
    report = load_pretrained(encoder, model)
    assert report.matched == report.total
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = classifier.forward_intermediates(image, intermediates_only=True)[-1]
        torch.testing.assert_close(encoder.eval()(image)[-1], expected)


def test_own_checkpoint(tmp_path):
    model = Model(encoder="resnet18", decoder=Decoder(embed_dim=8, channels=8))
    trained = Segmenter(model, 5)
    path = tmp_path / "best.safetensors"
    save_file(trained.state_dict(), path)
    model = Model(encoder="resnet18", weights=str(path))
    report = load_pretrained(build_encoder(model), model)
    assert report.matched == report.total and all(name.startswith("decoder.") for name in report.unexpected)


def test_one_tensor_in_a_hundred_may_be_missing(tmp_path):
    state = _mit_state()
    del state["norm4.bias"]
    path = tmp_path / "weights.pth"
    torch.save(state | {"extra.weight": torch.ones(1)}, path)
    model = Model(encoder="mit_b0", weights=str(path))
    report = load_pretrained(build_encoder(model), model)
    assert (report.matched, report.total) == (175, 176)
    assert report.missing == ("norm4.bias",) and report.unexpected == ("extra.weight",)
    assert "1 missing (norm4.bias)" in report.summary() and "\n" not in report.summary()


def test_below_that_the_file_is_refused_and_nothing_is_loaded(tmp_path):
    state = _mit_state()
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


def test_two_networks_in_one_file(tmp_path):
    path = tmp_path / "both.pth"
    torch.save(_prefixed(_mit_state(1), "backbone.") | _prefixed(_mit_state(2), "encoder."), path)
    with pytest.raises(DataError, match="several tensors"):
        load_pretrained(build_encoder(Model(encoder="mit_b0")), Model(encoder="mit_b0", weights=str(path)))


class _Code:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def _damage(folder: Path) -> dict[str, Path]:
    folder.joinpath("page.pth").write_text("<html>404</html>")
    folder.joinpath("empty.pth").write_bytes(b"")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"epoch": 1}, folder / "no-tensors.pth")
    torch.save(_mit_state(), folder / "whole.pth")
    save_file(_mit_state(), folder / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        content = folder.joinpath(f"whole.{suffix}").read_bytes()
        folder.joinpath(f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    torch.save({"a": torch.ones(1), "code": _Code(folder / "marker")}, folder / "code.pth")
    folder.joinpath("code.bin").write_bytes(pickle.dumps(_Code(folder / "marker")))
    return {path.name: path for path in folder.iterdir() if not path.name.startswith("whole")}


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
def test_damaged_files_are_refused_and_code_is_not_run(name, tmp_path):
    path = _damage(tmp_path).get(name, tmp_path / name)
    with pytest.raises(DataError) as caught:
        load_pretrained(build_encoder(Model(encoder="mit_b0")), Model(encoder="mit_b0", weights=str(path)))
    assert caught.value.where == str(path) and caught.value.remedy and "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()


class _Hub:
    """Stands in for the download; remembers what was asked for."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str, str | None]] = []

    def __call__(self, repository: str, file: str, revision: str | None = None) -> str:
        self.asked.append((repository, file, revision))
        return self.answer(file)


def _raising(problem: Exception) -> Callable[[str], str]:
    def answer(_: str) -> str:
        raise problem

    return answer


@pytest.mark.parametrize("problem", [LocalEntryNotFoundError("no cache\nno network"), ConnectionError("refused")])
@pytest.mark.parametrize(
    ("encoder", "weights", "version"),
    [
        ("mit_b0", "imagenet", f"{MIT_HUB['mit_b0'][0]}@{MIT_HUB['mit_b0'][1]}"),
        ("mobilenetv2_100", "imagenet", "timm/mobilenetv2_100.ra_in1k@main"),
        ("mit_b0", "hf-hub:nvidia/mit-b0@abc", "nvidia/mit-b0@abc"),
    ],
)
def test_unreachable_hub(problem, encoder, weights, version, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _Hub(_raising(problem)))
    model = Model(encoder=encoder, weights=weights)
    with pytest.raises(EnvironmentProblem) as caught:
        load_pretrained(build_encoder(model), model)
    error = caught.value
    assert error.exit_code == 4 and error.where == "model.weights" and "\n" not in str(error)
    assert f"fetch model.safetensors of {version} on another machine" in error.remedy
    assert "--set model.weights=PATH" in error.remedy
    assert "--set model.weights=false --set objectives.feature_distance=false" in error.remedy


def test_published_weights_come_from_the_pinned_revision(monkeypatch, tmp_path):
    repository, revision = MIT_HUB["mit_b0"]
    path = tmp_path / "snapshots" / revision / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(_mit_state(), path)
    hub = _Hub(lambda _: str(path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    model = Model(encoder="mit_b0")
    report = load_pretrained(build_encoder(model), model)
    assert hub.asked == [(repository, "model.safetensors", revision)]
    assert report.origin == f"{repository}@{revision}/model.safetensors"


def test_repository_without_safetensors(monkeypatch, tmp_path):
    path = tmp_path / "snapshots" / "c0ffee" / "pytorch_model.bin"
    path.parent.mkdir(parents=True)
    torch.save(_transformers_layout(_mit_state()), path)

    def answer(file: str) -> str:
        if file == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _Hub(answer))
    model = Model(encoder="mit_b0", weights="hf-hub:nvidia/mit-b0")
    report = load_pretrained(build_encoder(model), model)
    assert report.origin == "nvidia/mit-b0@c0ffee/pytorch_model.bin" and report.matched == 176


@pytest.mark.parametrize("problem", [EntryNotFoundError("404"), HFValidationError("bad name")])
def test_hub_without_such_weights(problem, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _Hub(_raising(problem)))
    with pytest.raises(SettingsError):
        load_pretrained(build_encoder(Model(encoder="mit_b0")), Model(encoder="mit_b0", weights="hf-hub:a/b@c"))


def test_model_without_published_weights(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _Hub(_raising(AssertionError("must not be asked"))))
    model = Model(encoder="mambaout_femto")
    encoder = build_encoder(model)
    unpublished = next(n for n in timm.list_models() if not timm.is_model_pretrained(n))
    with pytest.raises(SettingsError, match="no published weights"):
        load_pretrained(encoder, Model(encoder=unpublished))


@pytest.mark.reference
def test_pinned_revisions_are_those_of_segmentation_models_pytorch():
    listed = pytest.importorskip("segmentation_models_pytorch.encoders").encoders
    expected = {}
    for name in MIT_HUB:
        published = listed[name]["pretrained_settings"]["imagenet"]
        expected[name] = (published["repo_id"], published["revision"])
    assert expected == MIT_HUB
