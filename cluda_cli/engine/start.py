"""Start a run from the weights of another one (`model.start`), or learn from a frozen one (`model.teacher`)."""

import math
from pathlib import Path

import torch

from cluda_cli.adaptation.teacher import FrozenTeacher
from cluda_cli.data.labels import ClassTable
from cluda_cli.errors import SettingsError
from cluda_cli.files import sha256
from cluda_cli.inference.weights_file import load_weights
from cluda_cli.models.encoders import Encoder, build_encoder, load_pretrained
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.settings import FeatureDistance, Model

WHERE = "model.start"


def start_from(path: Path, network: Segmenter, classes: ClassTable) -> str:
    """Copy the whole network of a weights file into `network`, classifier rows by class name; one line that says so.

    Classes that the file does not know keep their initial rows. Raises DataError for a file that cannot be read,
    SettingsError if it holds another network or no class of this one.
    """
    deployed = load_weights(path, torch.device("cpu"))
    found, own = deployed.network.state_dict(), network.state_dict()
    rows = {i: deployed.classes.names.index(n) for i, n in enumerate(classes.names) if n in deployed.classes.names}
    if not rows:
        raise SettingsError(f"knows none of the classes {', '.join(classes.names)}", path)
    by_class = tuple(f"{name}." for name in network.classifiers())
    if names := sorted(found.keys() ^ own.keys()):
        raise SettingsError(f"holds another network: {names[0]} is in one of the two only", WHERE, _remedy(path))
    for name, tensor in own.items():
        other = found[name]
        if name.startswith(by_class) and other.shape[1:] == tensor.shape[1:]:
            tensor[list(rows)] = other[list(rows.values())].to(tensor.device)
        elif other.shape == tensor.shape:
            tensor.copy_(other)
        else:
            sizes = " and ".join(" x ".join(map(str, shape)) for shape in (other.shape, tensor.shape))
            raise SettingsError(f"holds another network: {name} is {sizes}", WHERE, _remedy(path))
    network.encoder.normalisation = deployed.network.normalisation
    new = [name for name in classes.names if name not in deployed.classes.names]
    return f"starts from {path}" + (f"; new classes: {', '.join(new)}" if new else "")


def read_teacher(path: Path, box: tuple[int, int] | None, classes: ClassTable) -> FrozenTeacher:
    """The network of a weights file as the frozen teacher of a run with these classes, whose target fits `box`.

    Raises DataError for a file that cannot be read, SettingsError if its network lacks a class of the run.
    """
    deployed = load_weights(path, torch.device("cpu"))
    if missing := [name for name in classes.names if name not in deployed.classes.names]:
        what = f"the network of {path} does not know {', '.join(missing)}"
        raise SettingsError(what, "model.teacher", "take a teacher that was trained with the classes of this run")
    own = deployed.settings.data.target_box
    scale = math.sqrt(math.prod(own) / math.prod(box)) if own and box else 1.0
    return FrozenTeacher(deployed.network, deployed.classes, classes, scale)


def read_network(section: FeatureDistance) -> tuple[Encoder | Segmenter, str, str]:
    """The frozen network that a feature distance names, the origin of its weights, and their SHA-256.

    Raises DataError for a file that cannot be read, EnvironmentProblem for weights that are out of reach, SettingsError
    for what is neither a file nor an encoder.
    """
    where, path = "objectives.feature_distance.network", Path(section.network)
    if path.suffix == ".safetensors":
        return load_weights(path, torch.device("cpu")).network, str(path), sha256(path)
    model = Model(encoder=section.network, weights=section.network_weights)
    try:
        encoder = build_encoder(model)
    except SettingsError as error:
        remedy = f"{error.remedy}; or give the weights of a run, runs/NAME/best.safetensors"
        raise SettingsError(error.what, where, remedy) from error
    report = load_pretrained(encoder, model)
    return (encoder, report.origin, report.sha256) if report else (encoder, section.network, "")


def _remedy(path: Path) -> str:
    return f"give the model settings of the run that wrote {path}"
