"""Mix Transformers in the layouts of other libraries, written independently of the code under test."""

import pytest
import torch
from torch import Tensor, nn

from cluda_cli.models.encoders import build_encoder, load_pretrained
from cluda_cli.models.mit import Attention
from cluda_cli.models.published.mit import to_release
from cluda_cli.settings import Model

State = dict[str, Tensor]


def _transformers_layout(state: State) -> State:
    """The names of Hugging Face transformers."""
    inner = {
        "norm1": "layer_norm_1", "norm2": "layer_norm_2", "attn.q": "attention.self.query",
        "attn.sr": "attention.self.sr", "attn.norm": "attention.self.layer_norm", "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.dense1", "mlp.dwconv.dwconv": "mlp.dwconv.dwconv", "mlp.fc2": "mlp.dense2",
    }  # fmt: skip
    renamed = {"classifier.weight": torch.zeros(1000, 256), "classifier.bias": torch.zeros(1000)}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        first, _, rest = module.partition(".")
        stage = int(first[-1]) - 1
        if first.startswith("patch_embed"):
            part = "proj" if rest == "proj" else "layer_norm"
            renamed[f"segformer.encoder.patch_embeddings.{stage}.{part}.{leaf}"] = value
        elif first.startswith("norm"):
            renamed[f"segformer.encoder.layer_norm.{stage}.{leaf}"] = value
        else:
            block, _, part = rest.partition(".")
            prefix = f"segformer.encoder.block.{stage}.{block}"
            if part == "attn.kv":
                key, other = value.chunk(2)
                renamed[f"{prefix}.attention.self.key.{leaf}"] = key
                renamed[f"{prefix}.attention.self.value.{leaf}"] = other
            else:
                renamed[f"{prefix}.{inner[part]}.{leaf}"] = value
    return renamed


MMSEG_BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "attn.sr": "attn.sr", "attn.norm": "attn.norm",
    "attn.proj": "attn.attn.out_proj", "mlp.fc1": "ffn.layers.0", "mlp.dwconv.dwconv": "ffn.layers.1",
    "mlp.fc2": "ffn.layers.4",
}  # fmt: skip


def _mmsegmentation_layout(state: State) -> State:
    """As mmsegmentation's converter of the SegFormer release names it."""
    named = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        stage, kind = int(first[-1]) - 1, first[:-1]
        module, _, leaf = rest.rpartition(".")
        block, _, inner = module.partition(".")
        if kind == "patch_embed":
            named[f"layers.{stage}.0.{rest.replace('proj.', 'projection.')}"] = tensor
        elif kind == "norm":
            named[f"layers.{stage}.2.{rest}"] = tensor
        elif inner == "attn.q":
            other = state[name.replace(".q.", ".kv.")]
            named[f"layers.{stage}.1.{block}.attn.attn.in_proj_{leaf}"] = torch.cat([tensor, other])
        elif inner != "attn.kv":
            pixelwise = inner in ("mlp.fc1", "mlp.fc2") and leaf == "weight"
            named[f"layers.{stage}.1.{block}.{MMSEG_BLOCK[inner]}.{leaf}"] = (
                tensor[..., None, None] if pixelwise else tensor
            )
    return named


LAYOUTS = {
    "transformers": _transformers_layout,
    "transformers encoder": lambda state: {
        name.removeprefix("segformer."): value for name, value in _transformers_layout(state).items()
    },
    "mmsegmentation": _mmsegmentation_layout,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, mit_state, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": LAYOUTS[layout](mit_state)}, path)
    model = Model(encoder="mit_b0", weights=str(path))
    encoder = build_encoder(model)
    report = load_pretrained(encoder, model)
    assert report.matched == report.total == 176 and not report.unexpected
    assert all(torch.equal(value, mit_state[name]) for name, value in encoder.state_dict().items())


def test_the_names_of_the_release_stay(mit_state):
    assert to_release(mit_state) is mit_state


def test_query_key_and_value_in_one_layer_attend_alike():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 2, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    block = {f"attn.attn.{name}": tensor for name, tensor in theirs.state_dict().items()}
    file = {f"layers.1.1.0.{n}": tensor for n, tensor in block.items()}
    found = to_release(file | {"layers.0.0.projection.weight": torch.zeros(1)})
    prefix = "block2.0.attn."
    ours = Attention(64, heads=2, reduction=1)
    ours.load_state_dict({n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)})
    tokens = torch.randn(1, 12, 64)
    torch.testing.assert_close(ours(tokens, (3, 4)), theirs(tokens, tokens, tokens)[0])
