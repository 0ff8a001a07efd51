"""Published encoder weights: where they are, how they are read, and how their names map to ours.

Files differ in container, prefix, precision and naming; all of that is settled here, so that networks stay plain.
"""

import contextlib
import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from timm.models import (
    ConvNeXt,
    Eva,
    PyramidVisionTransformerV2,
    SwinTransformer,
    convnext,
    eva,
    is_model_in_modules,
    pvt_v2,
    swin_transformer,
    vision_transformer,
)
from torch import Tensor

from cluda_cli.errors import DataError, EnvironmentProblem, SettingsError, first_line

WHERE = "model.weights"
HUB_PREFIX = "hf-hub:"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# ImageNet weights of the Mix Transformers (NVIDIA source code licence, non-commercial): repository, revision.
MIT_HUB = {
    "mit_b0": ("smp-hub/mit_b0.imagenet", "9ce53d104d92d75aabb00aae70677aaab67e7c84"),
    "mit_b1": ("smp-hub/mit_b1.imagenet", "a04bf4f13a549bce677cf79b04852e7510782817"),
    "mit_b2": ("smp-hub/mit_b2.imagenet", "868ab6f13871dcf8c3d9f90ee4519403475b65ef"),
    "mit_b3": ("smp-hub/mit_b3.imagenet", "32558d12a65f1daa0ebcf4f4053c4285e2c1cbda"),
    "mit_b4": ("smp-hub/mit_b4.imagenet", "3a3454e900a4b4f11dd60eeb59101a9a1a36b017"),
    "mit_b5": ("smp-hub/mit_b5.imagenet", "ced04d96c586b6297fd59a7a1e244fc78fdb6531"),
}
# timm's modules of networks whose authors' files it can read.
AUTHORS = ("convnext", "deit", "eva", "pvt_v2", "swin_transformer", "vision_transformer")
OPEN_MMLAB_STEM = re.compile(r"stem\.([013467])\.")  # of its ResNet-C: three convolutions, each with its batch norm
CONTAINERS = ("state_dict", "model", "model_state")
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "network.", "body.")


@dataclass(frozen=True)
class WeightsFile:
    """A file on this machine and where it came from."""

    path: Path
    origin: str


def locate(weights: str, encoder: str) -> WeightsFile:
    """The file that the setting names, downloaded on first use; see the setting for its three forms."""
    if weights == "imagenet":
        return _fetch(*_published(encoder))
    if weights.startswith(HUB_PREFIX):
        repository, _, revision = weights.removeprefix(HUB_PREFIX).partition("@")
        return _fetch(repository, revision or None, HUB_FILES)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise DataError("there is no such file", path, f'{WHERE} is "imagenet", a file, or hf-hub:owner/name@revision')
    return WeightsFile(path, str(path))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, out of their container. Raises DataError; never runs pickled code."""
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        message = "the file is damaged, or holds more than tensors (pickled code is never run)"
        raise DataError(message, path, "fetch it again, or convert it to safetensors") from None
    except Exception as problem:  # a damaged byte may surface as anything
        message = f"neither a torch nor a safetensors file, or damaged ({first_line(problem)})"
        raise DataError(message, path, "fetch it again") from None
    while inner := [content[c] for c in CONTAINERS if isinstance(content, dict) and isinstance(content.get(c), dict)]:
        content = inner[0]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(
            "the file holds no named tensors", path, "give a state dict, as torch.save or safetensors write"
        )
    return tensors


def to_encoder_names(tensors: Mapping[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """Translate the layouts of other libraries to the names of our encoder; other names stay, less their prefixes."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = _strip(name)
        if short in named:
            raise DataError(f"several tensors are named {short} but for their prefix", WHERE, "give one network's file")
        named[short] = tensor
    if any(f"patch_embeddings.{i}.proj.weight" in name for name in named for i in range(4)):
        return _from_transformers(named)
    if {"stem.7.weight", "layer1.0.conv1.weight"} <= named.keys():
        return {OPEN_MMLAB_STEM.sub(_timm_stem, name): tensor for name, tensor in named.items()}
    if encoder.partition(".")[0] == "mobilenetv2_100" and "features.0.0.weight" in named:
        table = torchvision_mobilenet_names()
        return {_renamed(name, table): tensor for name, tensor in named.items()}
    return named


def from_authors(tensors: Mapping[str, Tensor], encoder: str) -> Mapping[str, Tensor]:
    """Translate the layout of a network's authors to timm's, by timm's own function; the same where it has none.

    This also resizes tables of positions. Call it only for tensors that do not fit as they are.
    """
    if not is_model_in_modules(encoder, AUTHORS):
        return tensors
    with torch.device("meta"):  # names and shapes are enough
        network = timm.create_model(encoder)
    translate = {
        ConvNeXt: convnext.checkpoint_filter_fn,
        Eva: eva.checkpoint_filter_fn,
        PyramidVisionTransformerV2: pvt_v2.checkpoint_filter_fn,
        SwinTransformer: swin_transformer.checkpoint_filter_fn,
    }.get(type(network), vision_transformer.checkpoint_filter_fn)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it may print, and ours carries results
            translated: dict[str, Tensor] = translate(dict(tensors), network)
    except Exception:  # it trusts that the file is of this network, and breaks in any way otherwise
        return tensors
    return translated


def torchvision_mobilenet_names() -> dict[str, str]:
    """Module names of torchvision's MobileNetV2 trunk -> those of timm's mobilenetv2_100, the same network."""
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    first = {"conv.0.0": "conv_dw", "conv.0.1": "bn1", "conv.1": "conv_pw", "conv.2": "bn2"}  # has no expansion
    other = {
        "conv.0.0": "conv_pw", "conv.0.1": "bn1", "conv.1.0": "conv_dw", "conv.1.1": "bn2", "conv.2": "conv_pwl",
        "conv.3": "bn3",
    }  # fmt: skip
    repeats = (1, 2, 3, 4, 3, 3, 1)  # blocks of a stage; MobileNetV2 (arXiv 1801.04381), table 2
    blocks = [(stage, block) for stage, count in enumerate(repeats) for block in range(count)]
    for index, (stage, block) in enumerate(blocks, start=1):
        for torchvision_name, timm_name in (first if index == 1 else other).items():
            names[f"features.{index}.{torchvision_name}"] = f"blocks.{stage}.{block}.{timm_name}"
    return names


# Hugging Face transformers' SegFormer -> the layout of the SegFormer release, inside a block.
TRANSFORMERS_BLOCK = {
    "layer_norm_1": "norm1", "layer_norm_2": "norm2", "attention.self.query": "attn.q", "attention.self.sr": "attn.sr",
    "attention.self.layer_norm": "attn.norm", "attention.output.dense": "attn.proj", "mlp.dense1": "mlp.fc1",
    "mlp.dense2": "mlp.fc2",
}  # fmt: skip


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stages count from 0 there and from 1 here; keys and values are one layer here, keys first."""
    renamed = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(
            r"(?:segformer\.encoder\.)?(patch_embeddings|layer_norm|block)\.(\d)\.(?:(\S+)\.)?(weight|bias)", name
        )
        if not match:
            renamed[name] = tensor
            continue
        kind, stage, inner, leaf = match[1], int(match[2]) + 1, match[3] or "", match[4]
        if kind == "layer_norm":
            renamed[f"norm{stage}.{leaf}"] = tensor
        elif kind == "patch_embeddings":
            renamed[f"patch_embed{stage}.{inner.replace('layer_norm', 'norm')}.{leaf}"] = tensor
        elif inner.endswith("attention.self.key"):
            value = tensors.get(name.replace("self.key", "self.value"))
            if value is not None:
                block = inner.partition(".")[0]
                renamed[f"block{stage}.{block}.attn.kv.{leaf}"] = torch.cat([tensor, value])
        elif not inner.endswith("attention.self.value"):
            block, _, part = inner.partition(".")
            renamed[f"block{stage}.{block}.{TRANSFORMERS_BLOCK.get(part, part)}.{leaf}"] = tensor
    return renamed


def _published(encoder: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Repository, revision and possible files of the published ImageNet weights."""
    if encoder in MIT_HUB:
        return *MIT_HUB[encoder], HUB_FILES[:1]
    config = timm.get_pretrained_cfg(encoder)
    if config is None or not config.hf_hub_id:
        raise SettingsError(f"there are no published weights for {encoder}", WHERE, f"set {WHERE} to a file or false")
    repository, _, revision = config.hf_hub_id.partition("@")
    return repository, revision or None, (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES


def _fetch(repository: str, revision: str | None, files: tuple[str, ...]) -> WeightsFile:
    """The first of `files` that the repository has, from the hub or from its cache on this machine."""
    version = f"{repository}@{revision or 'main'}"
    offline = (
        f"without network, fetch {files[0]} of {version} on another machine and pass --set {WHERE}=PATH; or train from "
        f"random weights: --set {WHERE}=false --set objectives.feature_distance=false"
    )
    for file in files:
        try:
            path = Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        except GatedRepoError:
            remedy = f"accept it at https://huggingface.co/{repository} and log in, or set {WHERE} to a file"
            raise EnvironmentProblem(f"{repository} asks for its licence to be accepted", WHERE, remedy) from None
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as problem:
            message = f"the hub has no {version}: {first_line(problem)}"
            raise SettingsError(message, WHERE, f"check the name and the revision, or set {WHERE} to a file") from None
        except LocalEntryNotFoundError as problem:  # what the client makes of a missing connection
            raise EnvironmentProblem(f"{version} is out of reach: {first_line(problem)}", WHERE, offline) from None
        except EntryNotFoundError:
            continue
        except Exception as problem:  # errors of several HTTP libraries come through unchanged
            raise EnvironmentProblem(f"{version} is out of reach: {first_line(problem)}", WHERE, offline) from None
        if path.parent.parent.name == "snapshots":  # the cache files what it fetched under the commit
            version = f"{repository}@{path.parent.name}"
        return WeightsFile(path, f"{version}/{file}")
    raise SettingsError(f"{version} holds no {' or '.join(files)}", WHERE, f"set {WHERE} to a file")


def _timm_stem(match: re.Match[str]) -> str:
    """timm keeps the last batch norm of the stem outside of it."""
    return "bn1." if match[1] == "7" else f"conv1.{match[1]}."


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{modules.get(module, module)}.{leaf}"


def _strip(name: str) -> str:
    """A name without the prefixes that wrappers and other libraries put before it."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def flat(name: str) -> str:
    """timm's feature extractors write `stages_0` for what its classifiers, and so its files, call `stages.0`."""
    return _strip(name).replace(".", "_")
