"""Files of a run: deployable weights, which need nothing else, and the state from which a run goes on.

Neither is ever unpickled: weights are safetensors, state is read with `weights_only=True`. Both appear atomically.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@dataclass(frozen=True)
class Deployed:
    """A weights file, ready to use."""

    network: Segmenter
    """On its device, in eval mode."""
    settings: Settings
    """The resolved settings of the run that made it."""
    classes: ClassTable
    """Position = output channel."""
    seen: tuple[str, ...]
    """Names of the classes that occurred in the source labels."""
    network_name: str
    """Which network of the run it is: student or teacher."""
    step: int
    path: Path


def save_weights(
    path: Path,
    state: Mapping[str, Tensor],
    settings: Settings,
    classes: ClassTable,
    seen: Sequence[str],
    network_name: str,
    step: int,
    *,
    normalisation: Normalisation = IMAGENET,
) -> None:
    """Write the whole state of one network with all that is needed to run it, atomically.

    `normalisation` is the network's.
    """
    description = {
        "format": FORMAT,
        "version": __version__,
        "settings": settings.model_dump(mode="json"),
        "classes": classes.to_json(),
        "seen": list(seen),
        "network": network_name,
        "step": step,
        "preprocessing": asdict(normalisation),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with _writing(path) as temporary:
        save_file(tensors, temporary, metadata={"cluda": json.dumps(description)})


def load_weights(path: Path, device: torch.device) -> Deployed:
    """Read a weights file. Raises DataError if it is missing, damaged or not one of ours."""
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
        settings = presets.validate(_for_inference(description["settings"]))
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
    return Deployed(network.to(device).eval(), settings, classes, seen, network_name, step, path)


def _for_inference(saved: dict[str, Any]) -> dict[str, Any]:
    """The sections that a trained network is run by: one of another version may have trained with other settings."""
    kept = {name: dict(saved[name]) for name in ("data", "model", "evaluation")}
    kept["data"].pop("rare_class", None)
    return kept | {"objectives": {"feature_distance": False}}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write resumable state atomically: the previous good file is replaced only by a complete one."""
    with _writing(path) as temporary:
        torch.save(state, temporary)


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """`files.atomic`, with what the two writers raise on a full disk in place of OSError made an EnvironmentProblem."""
    try:
        with atomic(path) as temporary:
            yield temporary
    except (SafetensorError, RuntimeError) as error:
        what = f"cannot be written ({first_line(error)})"
        raise EnvironmentProblem(what, path, "check disk space and permissions") from error


def load_state(path: Path) -> dict[str, Any]:
    """Read resumable state into main memory without executing anything. Raises DataError if missing or damaged."""
    if not path.is_file():
        raise DataError("no saved state", path, "start the run again with --overwrite")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for damaged files
        raise DataError(f"saved state cannot be read ({first_line(error)})", path) from error
    return state
