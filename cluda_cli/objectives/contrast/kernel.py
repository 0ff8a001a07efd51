"""Pixel contrast with its gradient, of one resolution and of two.

Features become unit vectors and labelled pixels are chosen (`pairs`); what is summed over pairs of pixels is
computed in tiles (`tiles`). The gradient is computed in the forward pass and scaled in the backward pass.

Legend: N pixels, n of them chosen, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cluda_cli.data.labels import IGNORE
from cluda_cli.objectives.contrast.pairs import Choice, Masked, Sorted
from cluda_cli.objectives.contrast.tiles import attract_and_repel

CPU_TILE = 512
"""Side of a tile on a CPU: one megabyte of float32, which stays in the cache between the steps of a tile."""
GPU_TILE = 2048
"""Side of a tile elsewhere: 16 megabytes, so that a tile costs more time than its kernel launches (estimated, not
measured)."""
TINY = 1e-12
"""Norm below which a feature has no direction: it is similar to none and gets no gradient."""


def tiled_contrast(
    features: Tensor,
    label: Tensor,
    weight: Tensor,
    temperature: float,
    tile: int = 0,
    masked: bool | None = None,
) -> Tensor:
    """What `pixel_contrast.contrast` defines, in tiles: no tensor has N x N numbers.

    `features` N D, `label` N train ids, 255 = ignored, `weight` N. A scalar, exactly 0 without a pair of positives or
    without negatives.

    float32 or float64; `temperature` at least 0.02, below which exponentials leave the range of float32. The result
    repeats exactly on a CPU. It depends by rounding only on `tile`, the side of a tile, and on `masked`: whether pairs
    are masked rather than sorted by class, which takes longer but never waits for the device (unset: everywhere but on
    a CPU). Features alone receive a gradient, once: it cannot be differentiated again.
    """
    differentiate = torch.is_grad_enabled() and features.requires_grad
    choose = _choose(features, masked)
    value: Tensor = _Contrast.apply(
        features, label, weight, temperature, tile or _tile(features), choose, differentiate
    )
    return value


def multires_contrast(
    features: Tensor,
    detail: Tensor,
    inside: Tensor,
    mix: Tensor,
    label: Tensor,
    weight: Tensor,
    temperature: float,
    tile: int = 0,
    masked: bool | None = None,
) -> Tensor:
    """Contrast pixels as seen in their context and, within a detail crop, context with detail, in learned shares.

    `features` of the context N D, `detail` N D those of the crop, `inside` N boolean the pixels that lie in it, `mix` N
    in 0..1 how much detail counts there; the others as in `tiled_contrast`. With s_ij the cosine similarity of context
    i and context j divided by `temperature`, t_ij that of context i and detail j, L_i as there, M_i the log-sum-exp of
    t_ik over the pixels k of other classes inside the crop, and W_ij = mix_i mix_j where both pixels lie inside, else
    0, the value is

        1/2n sum_i 1/max(1, |P_i|) sum_{j in P_i} w_i w_j ((1 - W_ij) softplus(L_i - s_ij) + W_ij softplus(M_i - t_ij)).

    It is CLUDA's learned-weighted contrast across resolutions with the crop taken from its box and the shares the right
    way round: a mix of 1 trusts detail, as in HRDA's attention, and outside the crop the contrast of contexts remains.
    The released code gates by class instead (class 0 counts as outside), weighs contexts by W and detail by 1 - W, and
    compares with zero vectors outside the crop. Rows of `detail` outside may hold anything. Features, detail and mix
    receive gradients; range, exactness and the rest are as in `tiled_contrast`.
    """
    differentiate = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (features, detail, mix))
    inputs = (features, detail, inside, mix, label, weight)
    choose = _choose(features, masked)
    value: Tensor = _MultiresContrast.apply(temperature, tile or _tile(features), choose, differentiate, *inputs)
    return value


def _tile(features: Tensor) -> int:
    return CPU_TILE if features.device.type == "cpu" else GPU_TILE


def _choose(features: Tensor, masked: bool | None) -> Callable[[Tensor], Choice]:
    masked = features.device.type != "cpu" if masked is None else masked
    return Masked if masked else Sorted.of


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        features: Tensor,  # N D
        label: Tensor,  # N
        weight: Tensor,  # N
        temperature: float,
        tile: int,
        choose: Callable[[Tensor], Choice],
        differentiate: bool,
    ) -> Tensor:
        chosen = choose(label)
        pixels = _Directions.of(features, chosen, temperature)
        weight = chosen.take(weight.to(features.dtype) * chosen.root_shares(features.dtype))[:, None]  # n 1
        pairs = chosen.pairs(pixels.unit, pixels.unit, weight, weight, tile)
        value, _, gradients = attract_and_repel(pairs, differentiate)
        if gradients is not None:
            gradient = torch.zeros_like(features)
            pixels.add_gradient(gradients.anchors, gradient)
            ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None, None, None, None


class _MultiresContrast(torch.autograd.Function):
    """The weight w_i w_j (1 - W_ij) of two contexts is w_i w_j - q_i q_j with q = w mix inside, and that of context and
    detail is q_i q_j: the first term is a plain contrast with one more product in its weights, and the second concerns
    the pixels inside alone."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        temperature: float,
        tile: int,
        choose: Callable[[Tensor], Choice],
        differentiate: bool,
        *inputs: Tensor,
    ) -> Tensor:
        features, detail, inside, mix, label, weight = inputs  # N D twice, then N each
        chosen = choose(label)
        weight = weight.to(features.dtype) * chosen.root_shares(features.dtype) * 0.5**0.5  # N
        detailed = torch.where(inside, weight * mix, 0)  # N, q
        context = _Directions.of(features, chosen, temperature)
        left, right = (chosen.take(torch.stack([weight, q], dim=1)) for q in (detailed, -detailed))  # n 2
        pairs = chosen.pairs(context.unit, context.unit, left, right, tile)
        value, by_left, gradients = attract_and_repel(pairs, differentiate)

        near = choose(label.where(inside, IGNORE))
        anchors, others = (_Directions.of(maps, near, temperature) for maps in (features, detail))
        q = near.take(detailed)[:, None]  # n 1
        near_pairs = near.pairs(anchors.unit, others.unit, q, q, tile)
        near_value, by_q, near_gradients = attract_and_repel(near_pairs, differentiate)

        if gradients is not None and near_gradients is not None:
            to_features, to_detail, to_mix = (torch.zeros_like(tensor) for tensor in (features, detail, mix))
            context.add_gradient(gradients.anchors, to_features)
            anchors.add_gradient(near_gradients.anchors, to_features)
            others.add_gradient(near_gradients.others, to_detail)
            chosen.add(by_left[:, 1], to_mix)
            near.add(by_q[:, 0], to_mix)
            ctx.save_for_backward(to_features, to_detail, torch.where(inside, to_mix * weight, 0))
        return value + near_value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        features, detail, mix = ctx.saved_tensors
        return None, None, None, None, features * scale, detail * scale, None, mix * scale, None, None


@dataclass(frozen=True)
class _Directions:
    """Chosen rows of features as unit vectors, divided by the root of the temperature: so are both factors of a
    similarity, and one copy of the pixels serves for both."""

    chosen: Choice
    unit: Tensor  # n D
    norm: Tensor  # n 1
    temperature: float

    @classmethod
    def of(cls, features: Tensor, chosen: Choice, temperature: float) -> "_Directions":
        unit = chosen.take(features)
        norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        unit *= temperature**-0.5 / norm.clamp_min(TINY)
        return cls(chosen, unit, norm, temperature)

    def add_gradient(self, gradient: Tensor, total: Tensor) -> None:
        """Add a gradient by the scaled unit vectors, n D, as one by the features, N D; overwrites the former.

        It loses the part along the direction of a feature and is divided by the feature's norm.
        """
        gradient -= self.unit * ((self.unit * gradient).sum(dim=1, keepdim=True) * self.temperature)
        gradient *= (self.norm >= TINY) / self.norm.clamp_min(TINY) * self.temperature**-0.5
        self.chosen.add(gradient, total)
