"""Published checkpoints of DAFormer, HRDA, MIC, CLUDA and SegFormer under the names of our networks.

The first four share a code base and hold several copies of one network; SegFormer is published by its authors, by
mmsegmentation and by Hugging Face transformers, each with names of its own.

E embedded and D fused channels, C channels of an encoder map.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cluda_cli import presets, settings
from cluda_cli.errors import DataError
from cluda_cli.models.mit import VARIANTS
from cluda_cli.models.published.encoders import to_encoder_names

COPIES = {"student": "model.", "teacher": "ema_model."}
WEIGHTER = "decode_head.feat_weighter."  # of CLUDA's contrast, that is of a term of the loss, not of the network
UNCALLED = "decode_head.conv_seg."  # made by the base class of the heads; SegFormer's has its own classifier beside it
# Prefix there -> prefix here, the longer ones first.
PARTS = {
    "backbone.": "encoder.",
    "segformer.encoder.": "encoder.",
    "decode_head.head.": "decoder.",
    "decode_head.scale_attention.": "scale_attention.",
    "decode_head.": "decoder.",
}
# Modules of the SegFormer heads -> those of our decoder: of its authors, of DAFormer, transformers, mmsegmentation.
SEGFORMER_HEAD = (
    {f"linear_c{i + 1}": f"embed_layers.{i}" for i in range(4)}
    | {"linear_fuse.conv": "fuse_layer.conv", "linear_fuse.bn": "fuse_layer.bn", "linear_pred": "conv_seg"}
    | {f"linear_c.{i}": f"embed_layers.{i}" for i in range(4)}
    | {"linear_fuse": "fuse_layer.conv", "batch_norm": "fuse_layer.bn", "classifier": "conv_seg"}
    | {f"convs.{i}.conv": f"embed_layers.{i}.proj" for i in range(4)}
    | {f"convs.{i}.bn": f"embed_layers.{i}.bn" for i in range(4)}
    | {"fusion_conv.conv": "fuse_layer.conv", "fusion_conv.bn": "fuse_layer.bn"}
)
# What the number of branches or blocks tells, as far as published networks go.
DILATIONS = [1, 6, 12, 18]
DEEPLAB_DILATIONS = {2: [6, 12], 4: [6, 12, 18, 24]}
RESNETS = {6: "resnet50c", 23: "resnet101c", 36: "resnet152c"}


@dataclass(frozen=True)
class Published:
    """One network of a published file under our names; whether it fits is not checked yet."""

    tensors: dict[str, Tensor]
    left_out: dict[str, int]
    """Pattern of names that are no part of the network -> number of tensors."""


def one_network(tensors: Mapping[str, Tensor], network: str, encoder: str, path: Path) -> Published:
    """The student or the teacher of a checkpoint, under our names for a network with this encoder.

    Files of self-training hold `model.*`, the student, and `ema_model.*`, the teacher; others one network without
    prefix. Raises DataError, naming `path`, where the wanted one, its encoder or its decoder is not there.
    """
    named, left_out = _copy(tensors, network, path)
    idle = [WEIGHTER] if "decode_head.linear_pred.weight" not in named else [WEIGHTER, UNCALLED]
    parts: dict[str, dict[str, Tensor]] = {"encoder.": {}, "decoder.": {}, "scale_attention.": {}, "": {}}
    for name, tensor in named.items():
        if without := next((prefix for prefix in idle if name.startswith(prefix)), None):
            left_out[f"{without}*"] += 1
        else:
            prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), "")
            parts[PARTS.get(prefix, "")][name.removeprefix(prefix)] = tensor
    if not (parts["encoder."] and parts["decoder."]):
        raise _no_network(named, path)
    parts["encoder."] = to_encoder_names(parts["encoder."], encoder, path)
    parts["decoder."] = _from_segformer_head(parts["decoder."])
    return Published({part + name: tensor for part, inner in parts.items() for name, tensor in inner.items()}, left_out)


def _no_network(named: Mapping[str, Tensor], path: Path) -> DataError:
    """What the names look like instead."""
    if class_count(Published(dict(named), {})) is not None:
        return DataError("these are weights of cluda already", path, "give them to --ckpt, or to model.start")
    prefixed = (re.match(r"(.+?\.)(?:backbone|decode_head)\.", name) for name in named)
    if before := list(dict.fromkeys(found[1] for found in prefixed if found)):
        what = f"the names of the network have an unknown prefix: {_some(before)}"
        return DataError(what, path, "save the tensors without it")
    what = f"no network with backbone.* and decode_head.*; the names begin with {', '.join(list(named)[:3])}"
    remedy = "give a checkpoint of DAFormer, HRDA, MIC, CLUDA or SegFormer; an encoder alone is for model.weights"
    return DataError(what, path, remedy)


def _unwrap(name: str) -> str:
    """A name without what torch.compile, parallel training and a holder called `net` put before names of a network."""
    return re.sub(r"(?:^|(?<=\.))(?:_orig_mod|module)\.", "", name).removeprefix("net.")


def _copy(tensors: Mapping[str, Tensor], network: str, path: Path) -> tuple[dict[str, Tensor], Counter[str]]:
    """The tensors of one copy of the network, without its prefix, and how many others there are."""
    named = {_unwrap(name): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise DataError("several tensors have one name but for their prefix", path, "give one network's file")
    if not any(name.startswith(tuple(COPIES.values())) for name in named):
        if network == "teacher":
            raise DataError("holds one network, not a student and a teacher", path, "leave out --network")
        return named, Counter()
    prefix = COPIES[network]
    chosen = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    if not chosen:
        other = next(name for name in COPIES if name != network)
        raise DataError(f"holds no {network} ({prefix}*)", path, f"take the other one: --network {other}")
    return chosen, Counter(f"{name.partition('.')[0]}.*" for name in named if not name.startswith(prefix))


def _from_segformer_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of our decoder for a SegFormer head; other heads have them already.

    Its authors, and transformers after them, concatenate the embedded maps from the coarsest to the finest.
    """
    named = {}
    for name, tensor in tensors.items():
        module = next((module for module in SEGFORMER_HEAD if name.startswith(f"{module}.")), "")
        pixelwise = module.startswith("convs.") and tensor.dim() == 4
        ours = f"{SEGFORMER_HEAD[module]}{name.removeprefix(module)}" if module else name
        named[ours] = tensor[:, :, 0, 0] if pixelwise else tensor  # E C, from a 1x1 convolution
    reverse = {"linear_c1.proj.weight", "linear_fuse.weight"} & tensors.keys()
    fuse = named.get("fuse_layer.conv.weight")
    if reverse and fuse is not None and fuse.dim() == 4 and fuse.shape[1] % 4 == 0:
        named["fuse_layer.conv.weight"] = fuse.unflatten(1, (4, -1)).flip(1).flatten(1, 2)  # D 4E 1 1
    return named


def listed_classes(content: Mapping[Any, Any]) -> tuple[str, ...] | None:
    """Names of the classes in the order of the network's outputs, where mmcv or mmengine wrote them beside it."""
    meta = _mapping(content.get("meta"))
    described = _mapping(meta.get("dataset_meta")) or _mapping(content.get("dataset_meta"))
    for listed in (meta.get("CLASSES"), described.get("classes"), described.get("CLASSES")):
        if isinstance(listed, list | tuple) and listed and all(isinstance(name, str) for name in listed):
            return tuple(listed)
    return None


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def match_classes(listed: Sequence[str], names: Sequence[str], path: Path) -> list[int]:
    """The output in a file of every class of `names`, where the file lists its classes as `listed`.

    Capitals, `_` and `-` make no difference. Raises DataError, naming `path`, if the two sets differ.
    """
    theirs, ours = [_plain(name) for name in listed], [_plain(name) for name in names]
    if sorted(theirs) != sorted(ours):
        more = [name for name in listed if _plain(name) not in ours]
        less = [name for name in names if _plain(name) not in theirs]
        parts = [f"{_some(more)} of the file alone"] * bool(more) + [f"{_some(less)} of data.source alone"] * bool(less)
        what = f"its classes are others than those of data.source: {'; '.join(parts) or 'one is listed twice'}"
        raise DataError(what, path, "set data.source to a prepared dataset with the classes of the file")
    return [theirs.index(name) for name in ours]


def _plain(name: str) -> str:
    return re.sub(r"[_-]", " ", name).casefold()


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def class_count(published: Published) -> int | None:
    """Number of classes, where the decoder is a known one."""
    counts = (_size(published.tensors, f"decoder.{name}.weight", 0) for name in ("conv_seg", "aspp_modules.0.conv"))
    return next((count for count in counts if count is not None), None)


def other_settings(published: Published, model: settings.Model) -> dict[str, Any]:
    """What the file tells of settings that are other here: dotted path -> the value to set.

    Names and shapes tell most. That CLUDA's network of two resolutions blends late, and that the ResNets of these
    code bases end at stride 8, is known of the code that alone writes such files. Of dilations only the number shows.
    """
    told = _told_by_encoder(published.tensors) | _told_by_decoder(published.tensors)
    told["model.multires"] = any(name.startswith("scale_attention.") for name in published.tensors)
    if channels := _size(published.tensors, "scale_attention.conv_seg.weight", 1):
        told["model.multires.attention_dim"] = channels
    if f"{WEIGHTER}*" in published.left_out:
        told["model.multires.blend_late"] = True
    tables = {
        "multires": model.multires or settings.MultiResolution(),
        "deeplab": model.deeplab or settings.DeepLabV2(),
    }
    current = presets.flatten({"model": model.model_copy(update=tables).model_dump(mode="json")})
    for table in ("multires", "deeplab", "pyramid"):
        current[f"model.{table}"] = getattr(model, table) is not None
    return {path: value for path, value in told.items() if not _agree(value, current[path])}


def _agree(told: Any, now: Any) -> bool:
    return len(told) == len(now) if isinstance(told, list) else bool(told == now)


def _told_by_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    depths = tuple(_children(tensors, f"encoder.block{stage}.") for stage in range(1, 5))
    channels = tuple(_size(tensors, f"encoder.norm{stage}.weight", 0) for stage in range(1, 5))
    for name, variant in VARIANTS.items():
        if (depths, channels) == (variant.depths, variant.channels):
            return {"model.encoder": name}
    resnet = RESNETS.get(_children(tensors, "encoder.layer3."))
    deep_stem = "encoder.conv1.6.weight" in tensors
    return {"model.encoder": resnet, "model.output_stride": 8} if resnet and deep_stem else {}


def _told_by_decoder(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    channels = _size(tensors, "decoder.conv_seg.weight", 1)
    embed_dim = _size(tensors, "decoder.embed_layers.0.proj.weight", 0)
    if channels is None or embed_dim is None:
        dilations = DEEPLAB_DILATIONS.get(_children(tensors, "decoder.aspp_modules."))
        found = {"model.deeplab": True, "model.deeplab.dilations": dilations, "model.pyramid": False}
        return found if dilations else {}
    told: dict[str, Any] = {
        "model.deeplab": False,
        "model.pyramid": False,
        "model.decoder.embed_dim": embed_dim,
        "model.decoder.channels": channels,
        "model.decoder.embed_norm": "decoder.embed_layers.0.bn.weight" in tensors,
    }
    if "decoder.fuse_layer.conv.weight" in tensors:
        told["model.decoder.dilations"] = []
    elif _children(tensors, "decoder.fuse_layer.aspp_modules.") == len(DILATIONS):
        told["model.decoder.dilations"] = DILATIONS
    return told


def _size(tensors: Mapping[str, Tensor], name: str, axis: int) -> int | None:
    tensor = tensors.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.dim() > axis else None


def _children(tensors: Mapping[str, Tensor], folder: str) -> int:
    """How many different modules lie directly below a prefix."""
    return len({name[len(folder) :].partition(".")[0] for name in tensors if name.startswith(folder)})
