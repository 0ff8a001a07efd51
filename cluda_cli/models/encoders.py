"""Every encoder behind one contract: Mix Transformers, timm models with a pyramid of maps, and plain ViTs of timm.

The contract: `channels` and `strides` of the four maps, `pad_multiple` (height and width of an image must be multiples
of it), `normalisation` of the images, `layers()`, which numbers the parameters by depth, and
forward(image B 3 H W) -> four maps B C ceil(H/stride) ceil(W/stride). The first map is the finest.
"""

import difflib
from dataclasses import dataclass

import timm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli import settings
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.files import sha256
from cluda_cli.models.mit import VARIANTS, MixTransformer
from cluda_cli.models.published.encoders import match_encoder, read_tensors
from cluda_cli.models.published.hub import locate
from cluda_cli.models.timm_encoders import PlainViT, TimmEncoder, dilation_error, is_plain

Encoder = MixTransformer | TimmEncoder | PlainViT
MIN_MATCHED = 0.99
"""Share of the encoder's tensors that a file must fill: a half-loaded encoder trains, but badly and without a word."""


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


def build_encoder(model: settings.Model) -> Encoder:
    """The encoder that `model.encoder` names, with random weights drawn from torch's global generator.

    Never touches the network. Raises SettingsError for an unknown or unsuitable name, an output stride that this
    encoder cannot have, and blocks that cannot be computed again.
    """
    if model.encoder not in VARIANTS and not timm.is_model(model.encoder):
        close = difflib.get_close_matches(model.encoder, [*VARIANTS, *timm.list_models()], n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "name mit_b0 ... mit_b5 or a timm model"
        raise SettingsError(f'there is no encoder "{model.encoder}"', "model.encoder", remedy)
    plain = is_plain(model.encoder)
    if (plain or model.encoder in VARIANTS) and model.output_stride < 32:
        raise dilation_error(model.encoder)
    if model.encoder in VARIANTS:
        encoder: Encoder = MixTransformer(model.encoder, model.drop_path)
    elif plain:
        encoder = PlainViT(model.encoder, model.drop_path)
    else:
        encoder = TimmEncoder(model.encoder, model.drop_path, model.output_stride)
    if model.checkpoint_activations:
        _checkpoint_activations(encoder, model)
    return encoder


def load_pretrained(encoder: nn.Module, model: settings.Model) -> LoadReport | None:
    """Load the weights that `model.weights` names into `encoder`, whatever their precision; None where it is false.

    Raises DataError for a file that is missing, damaged or holds fewer than MIN_MATCHED of the encoder's tensors, which
    leaves the encoder as it was; EnvironmentProblem where the hub cannot be reached; SettingsError where the hub has no
    such weights.
    """
    if model.weights is False:
        return None
    file = locate(model.weights, model.encoder)
    match = match_encoder(encoder.state_dict(), read_tensors(file.path), model.encoder, file.path)
    matched, mismatched = len(match.fitting), tuple(match.mismatched)
    total = matched + len(mismatched) + len(match.missing)
    report = LoadReport(
        file.origin, sha256(file.path), matched, total, match.missing, match.unexpected, mismatched=mismatched
    )
    if report.matched < MIN_MATCHED * report.total:
        raise DataError(report.problem(), file.origin, "check that model.encoder names the network of this file")
    encoder.load_state_dict({name: tensor.float() for name, tensor in match.fitting.items()}, strict=False)
    return report


def _checkpoint_activations(encoder: nn.Module, model: settings.Model) -> None:
    """Let the innermost modules that can do so compute their blocks again in the backward pass.

    timm marks these by an attribute: stages of pyramids, and otherwise the network, whose stages are then its blocks.
    """
    where = "model.checkpoint_activations"
    if not model.freeze_batch_norm and any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        what = f"{model.encoder} has batch norms, whose running statistics would count every batch twice"
        raise SettingsError(what, where, "set model.freeze_batch_norm=true or model.checkpoint_activations=false")
    able = [module for module in encoder.modules() if hasattr(module, "grad_checkpointing")]
    if not able:
        raise SettingsError(f"{model.encoder} cannot compute its blocks again", where, f"set {where}=false")
    for module in able:
        module.grad_checkpointing = not any(inner in able for inner in module.modules() if inner is not module)
