"""Tensors of published encoders: read from a file, named as in our encoders and matched to them."""

import argparse
import contextlib
import inspect
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from timm.utils import natural_key
from torch import Tensor

from cluda_cli.errors import DataError, first_line
from cluda_cli.models.published import efficientnet
from cluda_cli.models.published.mit import to_release

CONTAINERS = ("state_dict", "model", "model_state")
PREFIXES = ("_orig_mod.", "module.", "model.", "net.", "backbone.", "encoder.", "network.", "body.")
COUNTER = "num_batches_tracked"  # of batch norms; nothing reads it while their momentum is set


class Match(NamedTuple):
    """How the tensors of a file go with those of a network."""

    fitting: dict[str, Tensor]  # of the file, by the network's names
    mismatched: dict[str, Tensor]  # likewise, but of another shape
    missing: tuple[str, ...]  # in the file; counters of batch norms may be
    unexpected: tuple[str, ...]  # names in the file that the network lacks


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, out of their container. Raises DataError; never runs pickled code."""
    return named_tensors(read_content(path), path)


def read_content(path: Path) -> Mapping[Any, Any]:
    """All that a safetensors or torch file holds. Raises DataError; never runs pickled code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if damaged := _find_damage(path):
            raise ValueError(f"the checksum of {damaged} is another")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of timm's own training
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a damaged byte may surface as anything
        if isinstance(problem, pickle.UnpicklingError) and (refused := re.search(r"GLOBAL (\S+)", str(problem))):
            message = f"holds more than tensors: {refused[1]}; pickled code is never run"
            remedy = "load it where it was made and save its state_dict alone"
        elif isinstance(problem, pickle.UnpicklingError):
            message, remedy = "neither a torch nor a safetensors file, or damaged", "fetch it again"
        else:
            message = f"neither a torch nor a safetensors file, or damaged ({first_line(problem)})"
            remedy = "fetch it again"
        raise DataError(message, path, remedy) from None
    return content if isinstance(content, Mapping) else {}


def _find_damage(path: Path) -> str | None:
    """The first part of a torch file, if it is a zip archive, that has another checksum; torch compares none."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def named_tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a file's content, out of their container. Raises DataError, naming `path`, if there are none."""
    around = [content]
    while inner := [content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)]:
        content = inner[0]
        if any(content is outer for outer in around):
            raise DataError("holds itself as its own state dict", path, "save its state_dict alone")
        around.append(content)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        remedy = "give a state dict, as torch.save or safetensors write"
        raise DataError("the file holds no named tensors", path, remedy)
    return tensors


def to_encoder_names(tensors: Mapping[str, Tensor], encoder: str, path: Path) -> Mapping[str, Tensor]:
    """Strip prefixes, and rename the layouts that timm cannot read.

    Raises DataError, naming `path`, if that makes two names one.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = _strip(name)
        if short in named:
            raise DataError(f"several tensors are named {short} but for their prefix", path, "give one network's file")
        named[short] = tensor
    if {"stem.7.weight", "layer1.0.conv1.weight"} <= named.keys():
        # open-mmlab's ResNet-C has the last batch norm of its stem inside of it.
        return {n.replace("stem.7.", "bn1.").replace("stem.", "conv1."): tensor for n, tensor in named.items()}
    if encoder.partition(".")[0] == "mobilenetv2_100" and "features.0.0.weight" in named:
        return _from_torchvision(named, encoder)
    if "_blocks.0._depthwise_conv.weight" in named and timm.is_model(encoder):
        return efficientnet.to_timm_names(named, encoder)
    return to_release(named)


def from_authors(tensors: Mapping[str, Tensor], encoder: str) -> Mapping[str, Tensor]:
    """Translate the layout of a network's authors to timm's, by timm's own function; the same where it has none.

    This also resizes tables of positions. Call it only for tensors that do not fit as they are.
    """
    module = inspect.getmodule(timm.model_entrypoint(encoder)) if timm.is_model(encoder) else None
    translate = getattr(module, "checkpoint_filter_fn", None)
    if translate is None:
        return tensors
    with torch.device("meta"):  # names and shapes are enough
        network = timm.create_model(encoder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it may print, and ours carries results
            translated: dict[str, Tensor] = translate(dict(tensors), network)
    except Exception:  # it trusts that the file is of this network, and breaks in any way otherwise
        return tensors
    return translated


def classifier_prefixes(encoder: str) -> tuple[str, ...]:
    """How the names of the classifier's tensors begin, which files hold and encoders lack."""
    config = timm.get_pretrained_cfg(encoder)
    names = config.classifier if config else ("head", "classifier")  # of Mix Transformers
    names = (names,) if isinstance(names, str) else names or ()
    return tuple(f"{name.partition('.')[0]}." for name in names)


def _names_of_whole(encoder: str) -> set[str]:
    """Keys of the tensors of timm's whole network, of which the encoder is a part; none for other networks."""
    if not timm.is_model(encoder):
        return set()
    with torch.device("meta"):  # names are enough
        return {flat(name) for name in timm.create_model(encoder).state_dict()}


def match_encoder(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], encoder: str, path: Path) -> Match:
    """Match the tensors of a published encoder, read from `path`, to the state of ours, in the layout that fits best.

    Counters of batch norms, the classifier and what timm's network has before it are left out of account.
    """
    own = {name: tensor for name, tensor in own.items() if not name.endswith(COUNTER)}
    named = to_encoder_names(tensors, encoder, path)
    best = match_names(own, named, key=flat)
    if len(best.fitting) < len(own):
        other = match_names(own, from_authors(named, encoder), key=flat)
        best = max(best, other, key=lambda match: len(match.fitting))
    classifier, head = classifier_prefixes(encoder), _names_of_whole(encoder)
    unexpected = [name for name in best.unexpected if not name.startswith(classifier) and flat(name) not in head]
    return best._replace(unexpected=tuple(name for name in unexpected if not name.endswith(COUNTER)))


def match_names(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], key: Callable[[str], str]) -> Match:
    """Match the tensors of a file to a network's `own`; names are the same if their keys are."""
    place = {key(name): name for name in own}
    found = {place[key(name)]: tensor for name, tensor in tensors.items() if key(name) in place}
    return Match(
        fitting={name: tensor for name, tensor in found.items() if tensor.shape == own[name].shape},
        mismatched={name: tensor for name, tensor in found.items() if tensor.shape != own[name].shape},
        missing=tuple(name for name in own if name not in found and not name.endswith(COUNTER)),
        unexpected=tuple(name for name in tensors if key(name) not in place),
    )


def flat(name: str) -> str:
    """A key for `match_names`: timm's feature extractors write `stages_0` for what its files call `stages.0`."""
    return _strip(name).replace(".", "_")


def _strip(name: str) -> str:
    """A name without the prefixes that wrappers and other libraries put before it."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _from_torchvision(tensors: Mapping[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """The trunk of torchvision's MobileNetV2 under the names of timm's, which has the same modules in this order."""
    with torch.device("meta"):
        trunk = timm.create_model(encoder, features_only=True).state_dict()
    theirs = {name.rpartition(".")[0] for name in tensors if name.startswith("features.")}
    ours = dict.fromkeys(name.rpartition(".")[0] for name in trunk)
    modules = dict(zip(sorted(theirs, key=natural_key), ours, strict=False))  # theirs go on beyond the trunk
    split = [(*name.rpartition("."), tensor) for name, tensor in tensors.items()]
    return {f"{modules.get(module, module)}.{leaf}": tensor for module, _, leaf, tensor in split}
