"""Published weights are found, and what cannot be had is said."""

from collections.abc import Callable
from contextlib import suppress

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

FIND_CACHED = huggingface_hub.try_to_load_from_cache
Request = tuple[str, str, str | None]


class _Hub:
    """Stands in for the hub, with nothing fetched before; remembers what was asked for and what was downloaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.asked: list[Request] = []
        self.downloaded: list[Request] = []
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_url", lambda repository, file, revision: (repository, file, revision)
        )
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self._ask)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self._download)

    def _ask(self, url: Request, timeout: float) -> None:
        self.asked.append(url)
        with suppress(LocalEntryNotFoundError):  # of a connection that breaks later, while downloading
            self.answer(url[1])

    def _download(self, repository: str, file: str, revision: str | None, etag_timeout: float) -> str:
        self.downloaded.append((repository, file, revision))
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
    _Hub(monkeypatch, _raising(problem))
    model = Model(encoder=encoder, weights=weights)
    with pytest.raises(EnvironmentProblem) as caught:
        load_pretrained(build_encoder(model), model)
    error = caught.value
    assert error.exit_code == 4 and error.where == "model.weights" and "\n" not in str(error)
    assert f"fetch model.safetensors of {version} on another machine" in error.remedy
    assert "--set model.weights=PATH" in error.remedy
    assert "--set model.weights=false --set objectives.feature_distance=false" in error.remedy


def test_an_unreachable_hub_is_asked_once(monkeypatch, tmp_path):
    """Its own download waits and asks again, six times; here nobody listens, and waiting is an error."""

    def wait(_: float) -> None:
        raise AssertionError("waits for another try")

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", wait)
    with pytest.raises(EnvironmentProblem) as caught:
        locate("imagenet", "mit_b0")
    assert "is out of reach" in caught.value.what and "another try" not in caught.value.what


def test_what_was_fetched_before_needs_no_hub(monkeypatch, tmp_path):
    """Also of a branch, which the hub's own download would ask about again."""
    hub = _Hub(monkeypatch, _raising(ConnectionError("refused")))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", FIND_CACHED)
    path = tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / "c0ffee" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    (tmp_path / "models--timm--resnet18.a1_in1k" / "refs").mkdir()
    (tmp_path / "models--timm--resnet18.a1_in1k" / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = locate("imagenet", "resnet18")
    assert (found.path, found.origin) == (path, "timm/resnet18.a1_in1k@c0ffee/model.safetensors")
    assert not hub.asked and not hub.downloaded


def test_published_weights_come_from_the_pinned_revision(mit_state, monkeypatch, tmp_path):
    repository, revision = MIT_HUB["mit_b0"]
    path = tmp_path / "snapshots" / revision / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(mit_state, path)
    hub = _Hub(monkeypatch, lambda _: str(path))
    model = Model(encoder="mit_b0")
    report = load_pretrained(build_encoder(model), model)
    assert hub.asked == hub.downloaded == [(repository, "model.safetensors", revision)]
    assert report.origin == f"{repository}@{revision}/model.safetensors"


def test_repository_without_safetensors(mit_state, monkeypatch, tmp_path):
    path = tmp_path / "snapshots" / "c0ffee" / "pytorch_model.bin"
    path.parent.mkdir(parents=True)
    torch.save(mit_state, path)

    def answer(file: str) -> str:
        if file == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(path)

    _Hub(monkeypatch, answer)
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
    hub = _Hub(monkeypatch, _raising(ConnectionError("refused")))
    with pytest.raises(EnvironmentProblem):
        locate("imagenet", encoder)
    assert [asked[0] for asked in hub.asked] == [repository]


class _GatedError(GatedRepoError):
    def __init__(self) -> None:
        Exception.__init__(self, "403 Client Error")  # its own wants a server's response


def test_gated_weights(monkeypatch):
    _Hub(monkeypatch, _raising(_GatedError()))
    with pytest.raises(EnvironmentProblem) as caught:
        locate("imagenet", "vit_base_patch16_dinov3")
    assert "licence" in caught.value.what and "https://huggingface.co/timm/vit_base_patch16_dinov3" in str(caught.value)


@pytest.mark.parametrize("problem", [EntryNotFoundError("404"), HFValidationError("bad name")])
def test_hub_without_such_weights(problem, monkeypatch):
    _Hub(monkeypatch, _raising(problem))
    with pytest.raises(SettingsError):
        load_pretrained(build_encoder(Model(encoder="mit_b0")), Model(encoder="mit_b0", weights="hf-hub:a/b@c"))


def test_model_without_published_weights(monkeypatch):
    _Hub(monkeypatch, _raising(AssertionError("must not be asked")))
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
