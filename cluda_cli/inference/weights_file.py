"""Weights files: one network and its description, all that `eval`, `predict` and `pseudo-label` need.

They are safetensors files, so that reading them executes nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, PlainValidator, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cluda_cli import __version__, presets
from cluda_cli.data.labels import ClassTable
from cluda_cli.errors import DataError, first_line
from cluda_cli.files import atomic
from cluda_cli.inference.checksum import checksum
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


Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Preprocessing(BaseModel):
    """Mean and standard deviation of red, green and blue, for pixels in 0..255."""

    mean: tuple[Finite, Finite, Finite]
    std: tuple[Positive, Positive, Positive]


class _Description(BaseModel):
    """The metadata of a weights file, as it is read."""

    settings: dict[str, Any]
    classes: Annotated[ClassTable, PlainValidator(ClassTable.from_json)]
    seen: tuple[str, ...]
    network: str
    step: Annotated[int, Field(ge=0)]
    # Files without preprocessing are of networks that were trained with the values of ImageNet.
    preprocessing: _Preprocessing = _Preprocessing(mean=IMAGENET.mean, std=IMAGENET.std)


def save_weights(
    path: Path,
    state: Mapping[str, Tensor],
    description: NetworkDescription,
    *,
    normalisation: Normalisation = IMAGENET,
) -> None:
    """Write the state of a network, its description, its normalisation and a checksum of them atomically.

    Raises OSError if the file cannot be written.
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
    text = json.dumps(metadata)
    with atomic(path) as temporary:  # safetensors' own writer would make a temporary file of another name
        temporary.write_bytes(save(tensors, {"cluda": text, "checksum": checksum([text, tensors])}))


def load_weights(path: Path, device: torch.device) -> TrainedNetwork:
    """Read a weights file, or the best weights of a run folder, and put its network on a device.

    A run without a validation has its last weights only.

    Raises DataError if the file is missing, damaged, or not one that `save_weights` wrote, and if a weight is not
    finite. Files of earlier versions have no checksum.
    """
    path = find_weights(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except Exception as error:  # safetensors and torch raise many kinds for damaged files
        what = f"not a readable safetensors file ({first_line(error)})"
        raise DataError(what, path, "copy it again, or train again") from error
    text = metadata.get("cluda")
    if text is None:
        raise DataError("holds no description of the network", path, "give weights that `cluda train` wrote")
    if metadata.get("checksum", "") not in ("", checksum([text, tensors])):
        what = "was damaged after it was written: its checksum is another"
        raise DataError(what, path, "copy it again, or train again")
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise DataError(f"holds weights that are not finite, such as {broken[0]}", path, "train again")
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise DataError(f"weights format {content['format']}, expected {FORMAT}", path, "use a newer cluda")
        described = _Description.model_validate(content)
        settings = presets.validate(_keep_for_inference(described.settings))
        network = build_segmenter(settings.model, settings.data.crop, len(described.classes))
        network.load_state_dict(tensors)
        network.encoder.normalisation = Normalisation(**described.preprocessing.model_dump())
    except ValidationError as error:
        problem = error.errors()[0]
        what = f"its description does not fit ({'.'.join(map(str, problem['loc']))}: {problem['msg']})"
        raise DataError(what, path, "give weights that `cluda train` wrote") from error
    except DataError:
        raise
    except Exception as error:  # what the text of a foreign file may lead to
        raise DataError(f"does not fit this version of cluda ({first_line(error)})", path, "train again") from error
    return TrainedNetwork(
        settings=settings,
        classes=described.classes,
        seen=described.seen,
        network_name=described.network,
        step=described.step,
        network=network.to(device).eval(),
        path=path,
    )


def find_weights(path: Path) -> Path:
    """The file itself; of the folder of a run, its best weights, or else its last. Raises DataError without any."""
    files = [path / f"{name}.safetensors" for name in ("best", "last")] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            return file
    what = "no weights in this folder" if path.is_dir() else "no such weights file"
    raise DataError(what, path, "give a run, or its best.safetensors or last.safetensors")


def _keep_for_inference(saved: dict[str, Any]) -> dict[str, Any]:
    """Keep the sections that inference reads: another version may have trained with settings unknown to this one."""
    kept = {name: dict(saved[name]) for name in ("data", "model", "evaluation")}
    for name in ("rare_class", "class_balance"):
        kept["data"].pop(name, None)
    return kept | {"objectives": {"feature_distance": False}}
