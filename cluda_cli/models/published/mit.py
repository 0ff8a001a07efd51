"""Mix Transformers of Hugging Face transformers and of mmsegmentation, under the names of the SegFormer release.

Both count stages from 0, the release from 1. C channels.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Patterns there -> names in the release, applied in this order; the number of the stage follows the first word.
TRANSFORMERS = {
    r"^segformer\.encoder\.": "", "patch_embeddings": "patch_embed", "layer_norm_?": "norm",
    r"attention\.self\.query": "attn.q", r"attention\.self": "attn", r"attention\.output\.dense": "attn.proj",
    r"mlp\.dense": "mlp.fc",
}  # fmt: skip
MMSEGMENTATION = {
    r"^layers\.(\d)\.0\.projection": r"patch_embed.\1.proj", r"^layers\.(\d)\.0": r"patch_embed.\1",
    r"^layers\.(\d)\.1": r"block.\1", r"^layers\.(\d)\.2": r"norm.\1",
    r"attn\.attn\.out_proj": "attn.proj", r"attn\.attn\.": "attn.",
    r"ffn\.layers\.0": "mlp.fc1", r"ffn\.layers\.1": "mlp.dwconv.dwconv", r"ffn\.layers\.4": "mlp.fc2",
}  # fmt: skip


def to_release(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Name the tensors of a Mix Transformer as the SegFormer release does; those of other networks stay."""
    if any("patch_embeddings.0.proj." in name for name in tensors):
        return _from_transformers(tensors)
    if "layers.0.0.projection.weight" in tensors:
        return _from_mmsegmentation(tensors)
    return tensors


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values are two layers there and one here, keys first."""
    named = {_rename(name, TRANSFORMERS): tensor for name, tensor in tensors.items()}
    for key in [name for name in named if ".attn.key." in name]:
        value = key.replace(".key.", ".value.")
        if value in named:
            named[key.replace(".key.", ".kv.")] = torch.cat([named.pop(key), named.pop(value)])
    return named


def _from_mmsegmentation(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value are one layer there, and linear layers are 1x1 convolutions."""
    named = {}
    for name, tensor in tensors.items():
        name = _rename(name, MMSEGMENTATION)
        if ".attn.in_proj_" in name:
            query, *others = tensor.chunk(3)
            named[name.replace("in_proj_", "q.")], named[name.replace("in_proj_", "kv.")] = query, torch.cat(others)
        elif re.search(r"\.mlp\.fc[12]\.weight$", name):
            named[name] = tensor.flatten(1)  # C C, from C C 1 1
        else:
            named[name] = tensor
    return named


def _rename(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, ours in patterns.items():
        name = re.sub(pattern, ours, name)
    return re.sub(r"^(patch_embed|block|norm)\.(\d)", lambda match: f"{match[1]}{int(match[2]) + 1}", name)
