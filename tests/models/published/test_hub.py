"""Published weights are found, and what cannot be had is said."""

from collections.abc import Callable

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file

from cluda_cli.errors import EnvironmentProblem, SettingsError
from cluda_cli.models.encoders import build_encoder, load_pretrained
from cluda_cli.models.published.hub import MIT_HUB, locate
from cluda_cli.settings import Model


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


def test_published_weights_come_from_the_pinned_revision(mit_state, monkeypatch, tmp_path):
    repository, revision = MIT_HUB["mit_b0"]
    path = tmp_path / "snapshots" / revision / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(mit_state, path)
    hub = _Hub(lambda _: str(path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    model = Model(encoder="mit_b0")
    report = load_pretrained(build_encoder(model), model)
    assert hub.asked == [(repository, "model.safetensors", revision)]
    assert report.origin == f"{repository}@{revision}/model.safetensors"


def test_repository_without_safetensors(mit_state, monkeypatch, tmp_path):
    path = tmp_path / "snapshots" / "c0ffee" / "pytorch_model.bin"
    path.parent.mkdir(parents=True)
    torch.save(mit_state, path)

    def answer(file: str) -> str:
        if file == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _Hub(answer))
    model = Model(encoder="mit_b0", weights="hf-hub:nvidia/mit-b0")
    report = load_pretrained(build_encoder(model), model)
    assert report.origin == "nvidia/mit-b0@c0ffee/pytorch_model.bin" and report.matched == 176


@pytest.mark.parametrize(
    ("encoder", "repository"),
    [
        ("resnet101c", "timm/resnet101c.gluon_in1k"),
        ("swin_large_patch4_window12_384", "timm/swin_large_patch4_window12_384.ms_in22k_ft_in1k"),
        ("vit_base_patch14_dinov2", "timm/vit_base_patch14_dinov2.lvd142m"),
        ("vit_base_patch14_reg4_dinov2", "timm/vit_base_patch14_reg4_dinov2.lvd142m"),
        ("vit_base_patch16_dinov3", "timm/vit_base_patch16_dinov3.lvd1689m"),
        ("convnext_tiny.dinov3_lvd1689m", "timm/convnext_tiny.dinov3_lvd1689m"),
    ],
)
def test_published_weights_are_those_that_timm_names(encoder, repository, monkeypatch):
    hub = _Hub(_raising(ConnectionError("refused")))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    with pytest.raises(EnvironmentProblem):
        locate("imagenet", encoder)
    assert [asked[0] for asked in hub.asked] == [repository]


class _GatedError(GatedRepoError):
    def __init__(self) -> None:
        Exception.__init__(self, "403 Client Error")  # its own wants a server's response


def test_gated_weights(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _Hub(_raising(_GatedError())))
    with pytest.raises(EnvironmentProblem) as caught:
        locate("imagenet", "vit_base_patch16_dinov3")
    assert "licence" in caught.value.what and "https://huggingface.co/timm/vit_base_patch16_dinov3" in str(caught.value)


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
