"""The verb `import-weights`: a published checkpoint -> weights that the other verbs use. K classes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluda_cli import console
from cluda_cli.data.index import find, joint_classes, seen_classes
from cluda_cli.data.labels import PROTOCOLS, ClassTable
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.files import remove_temporaries, sha256
from cluda_cli.inference.weights_file import NetworkDescription, save_weights
from cluda_cli.models.multires import build_segmenter
from cluda_cli.models.normalisation import IMAGENET
from cluda_cli.models.published.checkpoints import (
    COPIES,
    Published,
    class_count,
    listed_classes,
    match_classes,
    one_network,
    other_settings,
)
from cluda_cli.models.published.encoders import flat, match_names, named_tensors, read_content
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.preparation.published import PUBLISHED
from cluda_cli.settings import Data, Model, Settings

# mmcv keeps the best score of a run beside the tensors, as a numpy scalar; numpy 1 and 2 call its module differently.
# Reading such a scalar executes nothing.
SCALAR = np.float64(0).__reduce__()[0]
NUMPY_SCALARS = [
    *((SCALAR, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")),
    *(np.dtype, *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64"))),
]
# What a whole preset brings along, where a file differs by more than a number.
HINTS = {"model.multires": "hrda", "model.deeplab": "dlv2"}


def import_weights(
    path: Path,
    settings: Settings,
    *,
    out: Path | None = None,
    network: str = "student",
    overwrite: bool = False,
    as_json: bool = False,
) -> Path:
    """Write the network of a published checkpoint as weights of ours, and return their path.

    `settings` say what network it is and how images are prepared for it; every tensor of the file and of the network
    has to find its counterpart. Nothing is written otherwise.

    Raises SettingsError for a taken path, DataError for a file that does not fit, naming the settings that would.
    """
    if network not in COPIES:
        raise SettingsError(f'"{network}" is neither {" nor ".join(COPIES)}', "--network", "leave it out for student")
    out = _free(path, out, overwrite)
    with torch.serialization.safe_globals(NUMPY_SCALARS):
        content = read_content(path)
    published = one_network(named_tensors(content, path), network, settings.model.encoder, path)
    classes, seen = _classes(settings.data)
    count = class_count(published)
    if count is not None and count != len(classes):
        names = ", ".join(settings.data.source or (settings.data.target,))
        what = f"the network tells {count} classes apart, {names} has {len(classes)}"
        raise DataError(what, path, "set data.source to a prepared dataset with its classes, in its order")
    listed = listed_classes(content)
    order = match_classes(listed, classes.names, path) if listed else list(range(len(classes)))
    model = build_segmenter(settings.model, settings.data.crop, len(classes))
    _load(model, published, settings.model, path)
    for classifier in model.classifiers().values():
        for parameter in classifier.parameters():
            parameter.data = parameter.data[order]  # K ...
    description = NetworkDescription(settings=settings, classes=classes, seen=seen, network_name=network, step=0)
    # These code bases normalise with the values of ImageNet, whatever their encoder.
    remove_temporaries(out.parent, below=False)
    save_weights(out, model.state_dict(), description, normalisation=IMAGENET)
    described = {
        "weights": str(out),
        "origin": str(path),
        "sha256": sha256(path),
        "network": network,
        "tensors": len(published.tensors),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "left_out": published.left_out,
        "classes": list(classes.names),
        "reordered": order != sorted(order),
        "unseen": [name for name in classes.names if name not in seen],
    }
    _report(described, as_json)
    return out


def _free(path: Path, out: Path | None, overwrite: bool) -> Path:
    """Where the weights go. Raises SettingsError if something is there, DataError if there is nothing to import."""
    if not path.is_file():
        raise DataError("no such file", path, "give the checkpoint's .pth or .safetensors")
    chosen = out or path.with_suffix(".safetensors")
    if chosen.is_dir():
        raise SettingsError("is a folder", chosen, "name a file with --out")
    if chosen.exists() and chosen.samefile(path):
        raise SettingsError("would replace the file that is imported", chosen, "name another with --out")
    if chosen.exists() and not overwrite:
        raise SettingsError("exists", chosen, "replace it with --overwrite, or name another with --out")
    return chosen


def _classes(data: Data) -> tuple[ClassTable, tuple[str, ...]]:
    """The classes of the sources, and the names of those that their labels hold; a published one need not be here.

    Without a source they are those of the target.
    """
    known = {dataset.name: ClassTable(dataset.classes) for dataset in PUBLISHED}
    names = data.source or (data.target,)
    if len(names) == 1 and names[0] in known:
        return known[names[0]], PROTOCOLS["16"] if names[0] == "synthia" else known[names[0]].names
    sources = [find(name, data.root) for name in names]
    return joint_classes(sources), seen_classes(sources)


def _load(model: Segmenter, published: Published, section: Model, path: Path) -> None:
    """Raises DataError that lists every tensor without counterpart and the settings that the file tells."""
    own, other = model.state_dict(), other_settings(published, section)
    matched = match_names(own, published.tensors, key=_key)
    shapes = {name: (list(tensor.shape), list(own[name].shape)) for name, tensor in matched.mismatched.items()}
    kinds = {
        "missing in the file": matched.missing,
        "unknown to the network": matched.unexpected,
        "of another shape": [f"{name}: {a} in the file, {b} in the network" for name, (a, b) in shapes.items()],
    }
    kinds = {kind: lines for kind, lines in kinds.items() if lines}
    if kinds or other:
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in kinds.items())
        what = f"{counts}: these tensors do not fit the network of the settings"
        if not kinds:
            what = "all tensors fit, but this network computes otherwise than the settings say"
        listed = [f"{kind}:\n  " + "\n  ".join(lines) for kind, lines in kinds.items()]
        raise DataError("\n".join([what, *listed]), path, _remedy(other))
    model.load_state_dict(matched.fitting, strict=False)  # counters start anew where the file has none


def _key(name: str) -> str:
    """The name, but for the ways in which timm writes that of one and the same tensor of an encoder."""
    return flat(name) if name.startswith("encoder.") else name


def _remedy(other: Mapping[str, Any]) -> str:
    if not other:
        return "choose --preset and --set for this network; heads that no setting describes cannot be imported"
    options = " ".join(
        f"--set {path}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for path, value in other.items()
    )
    hints = [f"--preset {preset}" for path, preset in HINTS.items() if other.get(path)]
    return f"add {options}" + (f", or take {' or '.join(hints)}" if hints else "")


def _report(described: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        console.result_json(described)
        return
    parts = [f"{described['network']} network", f"{described['tensors']} tensors"]
    parts += [f"{described['parameters']:,} parameters", f"{len(described['classes'])} classes"]
    console.info(", ".join(parts))
    for names, count in described["left_out"].items():
        console.info(f"left out, not part of this network: {count} tensors {names}")
    if described["reordered"]:
        console.info("the file lists its classes in another order; the outputs were put into that of data.source")
    console.result(described["weights"])
