"""Weights files: one network and its description, all that `eval`, `predict` and `pseudo-label` need.

They are safetensors files, so that reading them executes nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluda_cli import __version__, presets
from cluda_cli.data.labels import ClassTable
from cluda_cli.errors import CludaError, DataError, EnvironmentProblem, first_line
from cluda_cli.files import atomic
from cluda_cli.models.multires import build_segmenter
from cluda_cli.models.normalisation import IMAGENET, Normalisation
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.settings import Settings

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class NetworkDescription:
    """All that is needed to run a network, apart from its weights."""

    settings: Settings
    """The resolved settings of its run."""
    classes: ClassTable
    """A class's position is its output channel."""
    seen: tuple[str, ...]
    """Names of the classes that occur in the source labels."""
    network_name: str
    """The network's name in its run: student or teacher."""
    step: int
    """Training steps that it has made."""


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork(NetworkDescription):
    """A network that was read from a weights file."""

    network: Segmenter
    """On its device, in eval mode."""
    path: Path


def save_weights(
    path: Path,
    state: Mapping[str, Tensor],
    description: NetworkDescription,
    *,
    normalisation: Normalisation = IMAGENET,
) -> None:
    """Write the state of a network, its description and its normalisation atomically.

    Raises EnvironmentProblem or OSError if the file cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "version": __version__,
        "settings": description.settings.model_dump(mode="json"),
        "classes": description.classes.to_json(),
        "seen": list(description.seen),
        "network": description.network_name,
        "step": description.step,
        "preprocessing": asdict(normalisation),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"cluda": json.dumps(metadata)})
    except SafetensorError as error:
        what = f"cannot be written ({first_line(error)})"
        raise EnvironmentProblem(what, path, "check disk space and permissions") from error


def load_weights(path: Path, device: torch.device) -> TrainedNetwork:
    """Read a weights file and put its network on a device.

    Raises DataError if the file is missing, damaged, or not one that `save_weights` wrote.
    """
    if not path.is_file():
        raise DataError("no such weights file", path, "give the best.safetensors or last.safetensors of a run")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = (file.metadata() or {}).get("cluda")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"not a readable safetensors file ({error})", path, "copy it again, or train again") from error
    if metadata is None:
        raise DataError("holds no description of the network", path, "give weights that `cluda train` wrote")
    try:
        description = json.loads(metadata)
        if description["format"] != FORMAT:
            raise DataError(f"weights format {description['format']}, expected {FORMAT}", path, "use a newer cluda")
        settings = presets.validate(_keep_for_inference(description["settings"]))
        classes = ClassTable.from_json(description["classes"])
        network = build_segmenter(settings.model, settings.data.crop, len(classes))
        network.load_state_dict(tensors)
        # Files without preprocessing are of networks that were trained with the values of ImageNet.
        preprocessing = description.get("preprocessing", asdict(IMAGENET))
        network.encoder.normalisation = Normalisation(tuple(preprocessing["mean"]), tuple(preprocessing["std"]))
        seen, network_name, step = tuple(description["seen"]), description["network"], description["step"]
    except (ValueError, KeyError, TypeError, RuntimeError, CludaError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"does not fit this version of cluda ({first_line(error)})", path, "train again") from error
    return TrainedNetwork(
        settings=settings,
        classes=classes,
        seen=seen,
        network_name=network_name,
        step=step,
        network=network.to(device).eval(),
        path=path,
    )


def _keep_for_inference(saved: dict[str, Any]) -> dict[str, Any]:
    """Keep the sections that inference reads: another version may have trained with settings unknown to this one."""
    kept = {name: dict(saved[name]) for name in ("data", "model", "evaluation")}
    for name in ("rare_class", "class_balance"):
        kept["data"].pop(name, None)
    return kept | {"objectives": {"feature_distance": False}}
