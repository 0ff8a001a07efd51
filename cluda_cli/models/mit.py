"""Mix Transformer encoders B0-B5 (SegFormer, arXiv 2105.15203, section 3.1).

B batch, C channels, H W pixels of a map, N = H * W tokens, M tokens left after spatial reduction, D channels of a head.
Tokens are kept as contiguous B N C, which is also the channels-last layout of a B C H W map: going from one to the
other, as every block does, moves no memory.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cluda_cli.models.normalisation import IMAGENET

HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)
MLP_RATIO = 4
# The published weights were trained with two different epsilons; the larger one is PyTorch's default.
BLOCK_EPS, EMBED_EPS = 1e-6, 1e-5


@dataclass(frozen=True)
class Variant:
    """What distinguishes B0 to B5: channels and number of blocks of the four stages."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]


VARIANTS = {
    "mit_b0": Variant((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": Variant((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": Variant((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": Variant((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": Variant((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": Variant((64, 128, 320, 512), (3, 6, 40, 3)),
}


class MixTransformer(nn.Module):
    """Image -> four maps at strides 4, 8, 16 and 32.

    `variant` is a key of VARIANTS; stochastic depth rises linearly from 0 at the first block to `drop_path` at the
    last. The state dict has the keys of the published weights. Images of any size from 32 x 32 are accepted; a map
    has ceil(size / stride) cells per axis.
    """

    strides = (4, 8, 16, 32)
    pad_multiple = 1
    normalisation = IMAGENET
    grad_checkpointing = False
    """Compute blocks again in the backward pass; the name is timm's."""

    def __init__(self, variant: str, drop_path: float = 0.1) -> None:
        super().__init__()
        channels, depths = VARIANTS[variant].channels, VARIANTS[variant].depths
        self.channels: tuple[int, ...] = channels
        self.depths = depths
        rates = [drop_path * k / (sum(depths) - 1) for k in range(sum(depths))]
        for i, (inputs, outputs) in enumerate(zip((3, *channels), channels, strict=False)):
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            self.add_module(f"patch_embed{i + 1}", PatchEmbed(inputs, outputs, kernel, stride))
            stage_rates = rates[sum(depths[:i]) : sum(depths[: i + 1])]
            blocks = [Block(outputs, HEADS[i], REDUCTIONS[i], rate) for rate in stage_rates]
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(outputs, eps=BLOCK_EPS))
        self.apply(_initialise)

    def layers(self) -> dict[str, int]:
        """Number of the layer of every parameter, by its name: 0 the first patch embedding, then one for each block.

        Later patch embeddings belong to the block after them, norms of stages to the block before them.
        """
        first = [1 + sum(self.depths[:stage]) for stage in range(4)]  # block of every stage
        numbers = {}
        for name, _ in self.named_parameters():
            module, inner = name.split(".")[:2]
            kind, stage = module[:-1], int(module[-1]) - 1
            if kind == "patch_embed":
                numbers[name] = first[stage] if stage else 0
            else:
                numbers[name] = first[stage] + (int(inner) if kind == "block" else self.depths[stage] - 1)
        return numbers

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        # Spelt out, because each stage is three attributes with the names of the published weights.
        one = self._stage(image, self.patch_embed1, self.block1, self.norm1)  # B C1 H/4 W/4
        two = self._stage(one, self.patch_embed2, self.block2, self.norm2)  # B C2 H/8 W/8
        three = self._stage(two, self.patch_embed3, self.block3, self.norm3)  # B C3 H/16 W/16
        four = self._stage(three, self.patch_embed4, self.block4, self.norm4)  # B C4 H/32 W/32
        return one, two, three, four

    def _stage(self, features: Tensor, embed: nn.Module, blocks: nn.Module, norm: nn.Module) -> Tensor:
        """One stage; its normalised map is also what the next stage reads."""
        tokens, size = embed(features)  # B N C
        again = self.grad_checkpointing and self.training
        for block in blocks.children():
            tokens = checkpoint(block, tokens, size, use_reentrant=False) if again else block(tokens, size)
        return _map(norm(tokens), size)  # B C H W


class PatchEmbed(nn.Module):
    """Overlapping patches: strided convolution, then LayerNorm over channels."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(outputs, eps=EMBED_EPS)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        image = self.proj(image.contiguous(memory_format=torch.channels_last))  # B C H W
        return self.norm(_tokens(image)), (image.shape[2], image.shape[3])  # B N C


class Block(nn.Module):
    """Pre-norm transformer block; the two residual branches share a drop rate and draw independently."""

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=BLOCK_EPS)
        self.attn = Attention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=BLOCK_EPS)
        self.mlp = MixMLP(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size))  # B N C
        return tokens + self.drop_path(self.mlp(self.norm2(tokens), size))  # B N C


class Attention(nn.Module):
    """Self-attention whose keys and values come from a map reduced by a strided convolution (ibid., equation 2)."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)  # remainders at the border are dropped
            self.norm = nn.LayerNorm(channels, eps=EMBED_EPS)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        context = tokens
        if self.reduction > 1:
            context = self.norm(_tokens(self.sr(_map(tokens, size))))  # B M C
        query = self.q(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # B heads N D
        key, value = self.kv(context).unflatten(2, (2, self.heads, -1)).unbind(2)  # B M heads D each
        mixed = F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2))  # B heads N D
        return self.proj(mixed.transpose(1, 2).flatten(2))  # B N C


class MixMLP(nn.Module):
    """Feed-forward layer with a depthwise 3x3 convolution, which stands in for position codes (ibid., equation 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * channels
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), size)))  # B N C


class DepthwiseConv(nn.Module):
    """A module of its own only because the published weights name it `dwconv.dwconv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return _tokens(self.dwconv(_map(tokens, size)))  # B N C


def _map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, size)  # B C H W, channels last


def _tokens(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2)  # B N C


def _initialise(module: nn.Module) -> None:
    """Initial values of the SegFormer release: truncated normal for linear layers, fan-out normal for convolutions."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
