"""Every encoder behind one contract: Mix Transformers, and any timm model with maps at strides 4, 8, 16 and 32.

The contract: `channels` of the four maps, `strides`, `pad_multiple` (height and width of an image must be multiples
of it), and forward(image B 3 H W) -> four maps B C H/stride W/stride.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.files import sha256
from cluda_cli.models import weights
from cluda_cli.models.mit import VARIANTS, MixTransformer

STRIDES = (4, 8, 16, 32)
WHERE = "model.encoder"
REMEDY = "choose a model with a pyramid of maps, such as mit_b5, convnext_tiny or mobilenetv2_100"
MIN_MATCHED = 0.99
"""Share of the encoder's tensors that a file must fill: a half-loaded encoder trains, but badly and without a word."""
HEADS = ("head.", "classifier.", "fc.")  # of classifiers; expected to be left over
COUNTER = "num_batches_tracked"  # of batch norms; nothing reads it while their momentum is set


@dataclass(frozen=True)
class LoadReport:
    """What became of a file of weights; the counters of batch norms are not counted."""

    origin: str
    """Path, or repository@revision/file."""
    sha256: str
    """Of the file, hexadecimal."""
    matched: int
    """Tensors of the encoder that were loaded."""
    total: int
    """Tensors of the encoder."""
    missing: tuple[str, ...]
    """Tensors of the encoder that the file lacks."""
    unexpected: tuple[str, ...]
    """Tensors of the file without a place in the encoder, classification heads aside."""
    mismatched: tuple[str, ...]
    """Tensors of the encoder whose shape in the file is another."""

    def summary(self) -> str:
        """One line."""
        parts = [f"{self.matched} of {self.total} encoder tensors from {self.origin} (sha256 {self.sha256[:12]})"]
        return ", ".join(parts + self._differences(most=2))

    def problem(self) -> str:
        """One line that names the first tensors which did not fit."""
        return "; ".join([f"only {self.matched} of {self.total} encoder tensors fit", *self._differences(most=4)])

    def _differences(self, most: int) -> list[str]:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.mismatched}
        return [
            f"{len(names)} {kind} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
            for kind, names in kinds.items()
            if names
        ]


class TimmEncoder(nn.Module):
    """A timm model as an encoder.

    Raises SettingsError where the model has no maps at the four strides, or only for images of one size.
    """

    strides = STRIDES

    def __init__(self, name: str, drop_path: float) -> None:
        super().__init__()
        self.network = _create(name, drop_path_rate=drop_path)
        info = self.network.feature_info
        # Where maps share a stride, the last one is the deepest.
        index_of = dict(zip(info.reduction(), info.out_indices, strict=True))
        if not set(STRIDES) <= set(index_of):
            raise SettingsError(
                f"{name} has maps at strides {sorted(index_of)}; an encoder needs 4, 8, 16 and 32", WHERE, REMEDY
            )
        if tuple(info.reduction()) != STRIDES:  # maps that nobody reads would hold untrained weights
            self.network = _create(name, drop_path_rate=drop_path, out_indices=tuple(index_of[s] for s in STRIDES))
        self.channels: tuple[int, ...] = tuple(self.network.feature_info.channels())
        self.pad_multiple, self.channels_first = _try_out(self.network, self.channels, name)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = self.network(image)
        return tuple(maps if self.channels_first else (features.permute(0, 3, 1, 2) for features in maps))


def build_encoder(model: settings.Model) -> MixTransformer | TimmEncoder:
    """The encoder that `model.encoder` names, with random weights drawn from torch's global generator.

    Never touches the network. Raises SettingsError for an unknown or unsuitable name.
    """
    if model.encoder in VARIANTS:
        return MixTransformer(model.encoder, model.drop_path)
    if not timm.is_model(model.encoder):
        close = difflib.get_close_matches(model.encoder, [*VARIANTS, *timm.list_models()], n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "name mit_b0 ... mit_b5 or a timm model"
        raise SettingsError(f'there is no encoder "{model.encoder}"', WHERE, remedy)
    return TimmEncoder(model.encoder, model.drop_path)


def load_pretrained(encoder: nn.Module, model: settings.Model) -> LoadReport | None:
    """Load the weights that `model.weights` names into `encoder`; None where it is false.

    Raises DataError for a file that is missing, damaged or does not fit, EnvironmentProblem where the hub cannot be
    reached, SettingsError where the hub has no such weights.
    """
    if model.weights is False:
        return None
    file = weights.locate(model.weights, model.encoder)
    tensors = weights.to_encoder_names(weights.read(file.path), model.encoder)
    return _load(encoder, tensors, file)


def _load(encoder: nn.Module, tensors: Mapping[str, Tensor], file: weights.WeightsFile) -> LoadReport:
    """Copy matching tensors into `encoder`, whatever their precision, and report on all.

    Raises DataError, leaving the encoder as it was, if fewer than MIN_MATCHED of its tensors are in the file.
    """
    own = {name: tensor for name, tensor in encoder.state_dict().items() if not name.endswith(COUNTER)}
    place = {weights.flat(name): name for name in own}
    found: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in tensors.items():
        if weights.flat(name) in place:
            found[place[weights.flat(name)]] = tensor
        elif not name.endswith(COUNTER) and not name.startswith(HEADS):
            unexpected.append(name)
    fitting = {name: tensor.float() for name, tensor in found.items() if tensor.shape == own[name].shape}
    report = LoadReport(
        file.origin, sha256(file.path), len(fitting), len(own), missing=tuple(n for n in own if n not in found),
        unexpected=tuple(unexpected), mismatched=tuple(n for n in found if n not in fitting),
    )  # fmt: skip
    if report.matched < MIN_MATCHED * report.total:
        raise DataError(report.problem(), file.origin, "check that model.encoder names the network of this file")
    encoder.load_state_dict(fitting, strict=False)
    return report


def _create(name: str, **options: Any) -> nn.Module:
    """A randomly initialised feature extractor; options that this model does not know are left out."""
    options = {"strict_img_size": False, **options}  # lets Swin take images of any size
    while True:
        try:
            return timm.create_model(name, pretrained=False, features_only=True, **options)
        except TypeError as problem:  # raised while arguments are bound, before any random draw
            unknown = next((option for option in options if f"'{option}'" in str(problem)), None)
            if unknown not in ("strict_img_size", "drop_path_rate"):
                raise
            del options[unknown]
        except RuntimeError as problem:  # such as an unknown pretrained tag after the dot
            raise SettingsError(f"{name} cannot be an encoder: {problem}", WHERE, REMEDY) from None


@torch.no_grad()
def _try_out(network: nn.Module, channels: tuple[int, ...], name: str) -> tuple[int, bool]:
    """The pad multiple, and whether maps come as B C H W rather than B H W C; timm declares neither for all models."""
    device = next(network.parameters()).device
    network.eval()  # leave the statistics of batch norms alone
    for multiple in (STRIDES[-1], network.default_cfg["input_size"][-1]):  # the latter suits fixed windows
        height, width = 2 * multiple, 3 * multiple  # oblong, so that no layout can pass for the other
        try:
            shapes = [tuple(features.shape) for features in network(torch.zeros(1, 3, height, width, device=device))]
        except Exception:  # a model refuses a size with whatever its first failing operation raises
            continue
        cells = [(height // stride, width // stride) for stride in STRIDES]
        first = [(1, count, *size) for count, size in zip(channels, cells, strict=True)]
        last = [(1, *size, count) for count, size in zip(channels, cells, strict=True)]
        if shapes in (first, last):
            network.train()
            return multiple, shapes == first
    raise SettingsError(f"{name} does not give maps at strides 4, 8, 16 and 32 for images of any size", WHERE, REMEDY)
