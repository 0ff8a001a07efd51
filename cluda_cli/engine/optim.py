"""Parameter groups, warm-up and polynomial decay (DAFormer, section 3.4 and its released settings)."""

from typing import Any

import torch
from torch import nn

from cluda_cli import settings

# Parameters of timm's transformers that are no weights of a layer, by the last part of their names.
UNDECAYED = {
    "pos_embed", "cls_token", "dist_token", "reg_token", "relative_position_bias_table", "logit_scale",
    "gamma", "gamma_1", "gamma_2",
}  # fmt: skip


def build_optimizer(
    student: nn.Module, objectives: nn.Module, optimizer: settings.Optimizer, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW over what is trainable, in groups; each keeps its base learning rate as `base_lr`.

    decoder (with its norms and biases), other heads and those of objectives: lr x decoder_lr_factor, decayed weights;
    encoder parameters with "norm" in their name, other layer norms, positions, tokens and scales of transformers: lr,
    not decayed; the rest of the encoder, batch norms of ResNets included: lr, decayed. `fused` updates all parameters
    of a group in one kernel.

    With `layer_decay` below 1 there are two such groups for each layer of the encoder, the last layer first: layer
    0 <= i <= n learns at lr x layer_decay^(n - i), 0 the stem, n the last block (layer-wise decay of BEiT, arXiv
    2106.08254, appendix; the last block at the full rate, as VFM-UDA++ has it, arXiv 2503.10685).

    Raises SettingsError for layer_decay with an encoder whose layers are not known.
    """
    encoder, norm, decoder = [], [], []
    layers = [module for module in student.modules() if isinstance(module, nn.LayerNorm)]
    layer_norms = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        undecayed = "norm" in name or id(parameter) in layer_norms or name.rpartition(".")[2] in UNDECAYED
        group = decoder if not name.startswith("encoder.") else norm if undecayed else encoder
        group.append(parameter)
    decoder += [parameter for parameter in objectives.parameters() if parameter.requires_grad]
    fast = optimizer.lr * optimizer.decoder_lr_factor
    groups: list[dict[str, Any]] = [
        {"name": "encoder", "params": encoder, "base_lr": optimizer.lr, "weight_decay": optimizer.weight_decay},
        {"name": "encoder norm", "params": norm, "base_lr": optimizer.lr, "weight_decay": 0.0},
        {"name": "decoder", "params": decoder, "base_lr": fast, "weight_decay": optimizer.weight_decay},
    ]
    if optimizer.layer_decay < 1:
        groups[:2] = _split_by_layer(groups[:2], student.encoder, optimizer.layer_decay)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=optimizer.lr, fused=fused or None)


def _split_by_layer(groups: list[dict[str, Any]], encoder: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Split groups of encoder parameters by layer, the last layer first, each with its share of the rate."""
    numbers = encoder.layers()
    layer_of = {id(parameter): numbers[name] for name, parameter in encoder.named_parameters()}
    last = max(numbers.values())
    return [
        group
        | {
            "name": f"{group['name']} {layer}",
            "params": [parameter for parameter in group["params"] if layer_of[id(parameter)] == layer],
            "base_lr": group["base_lr"] * decay ** (last - layer),
        }
        for layer in range(last, -1, -1)
        for group in groups
    ]


def set_learning_rate(adamw: torch.optim.Optimizer, optimizer: settings.Optimizer, step: int, steps: int) -> None:
    """Set every group to its base learning rate times the factor of this step."""
    factor = learning_rate_factor(optimizer, step, steps)
    for group in adamw.param_groups:
        group["lr"] = group["base_lr"] * factor


def learning_rate_factor(optimizer: settings.Optimizer, step: int, steps: int) -> float:
    """Factor of the base learning rate in step 0 <= step < steps.

    (1 - step/steps)^power, during the warm-up times 1 - (1 - step/warmup)(1 - warmup_ratio).
    """
    factor = (1 - step / steps) ** optimizer.power
    if step < optimizer.warmup:
        factor *= 1 - (1 - step / optimizer.warmup) * (1 - optimizer.warmup_ratio)
    return float(factor)
