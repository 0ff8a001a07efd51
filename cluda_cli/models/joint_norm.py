"""Batch norm over the images of several processes, as if they were one batch. C channels, * any further axes.

torch's SyncBatchNorm refuses the CPU and drops the activation of timm's norms; this one serves both.
"""

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli.distributed import collectives
from cluda_cli.errors import SettingsError


def synchronise(module: nn.Module) -> None:
    """Make every batch norm below `module` take the statistics of all processes in training mode.

    Names and tensors of the state stay; alone, nothing changes. Raises SettingsError for an unknown kind of batch norm.
    """
    if collectives.world_size() == 1:
        return
    kinds = {nn.BatchNorm1d: JointBatchNorm1d, nn.BatchNorm2d: JointBatchNorm2d, BatchNormAct2d: JointBatchNormAct2d}
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            if type(norm) not in kinds:
                what = f"its {type(norm).__name__} cannot be computed over several devices"
                raise SettingsError(what, "model.encoder", "train on one device, or take another encoder")
            norm.__class__ = kinds[type(norm)]  # the module itself stays: others may hold it


class JointBatchNorm1d(nn.BatchNorm1d):
    """Batch norm whose batch is that of all processes."""

    def forward(self, features: Tensor) -> Tensor:
        return joint_batch_norm(self, features) if self.training else super().forward(features)


class JointBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose batch is that of all processes."""

    def forward(self, features: Tensor) -> Tensor:
        return joint_batch_norm(self, features) if self.training else super().forward(features)


class JointBatchNormAct2d(BatchNormAct2d):
    """timm's batch norm with activation; the batch is that of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(joint_batch_norm(self, x))) if self.training else super().forward(x)


@torch.compiler.disable
def joint_batch_norm(norm: _BatchNorm, features: Tensor) -> Tensor:
    """Normalise features B C * by the mean and variance of all processes, which must have as many of them each.

    Running statistics move as those of a batch norm on the joint batch.
    """
    axes = [axis for axis in range(features.dim()) if axis != 1]
    count = collectives.global_count(features.numel() // features.shape[1])
    with torch.no_grad():
        variance, mean = torch.var_mean(_precise(features), axes, correction=0)
        means, variances = collectives.all_gather_rows(torch.stack([mean, variance])[None]).unbind(1)  # world_size C
        mean = means.mean(0)
        variance = (variances + (means - mean) ** 2).mean(0)
        if norm.track_running_stats:
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            unbiased = variance * (count / max(count - 1, 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    normalised: Tensor = _Normalise.apply(features, norm.weight, norm.bias, mean, variance, norm.eps)
    return normalised


class _Normalise(torch.autograd.Function):
    """Mean and variance depend on the features of all processes, and so do the gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        features: Tensor,  # B C *
        weight: Tensor | None,  # C
        bias: Tensor | None,  # C
        mean: Tensor,  # C
        variance: Tensor,  # C
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(features, weight, mean, (variance + eps).rsqrt())
        return F.batch_norm(features, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, mean, inverse = ctx.saved_tensors
        axes = [axis for axis in range(features.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(features.dim())]
        mean, inverse = mean.view(shape), inverse.view(shape)
        precise, unit = _precise(gradient), (_precise(features) - mean) * inverse
        sums = torch.stack([precise.sum(axes), (precise * unit).sum(axes)])  # 2 C
        shift, slope = collectives.all_reduce_sum(sums).view(2, *shape) / collectives.global_count(
            features.numel() // features.shape[1]
        )
        scale = inverse if weight is None else inverse * weight.view(shape)
        to_features = (scale * (precise - shift - unit * slope)).to(features.dtype)
        to_bias, to_weight = sums.to(features.dtype if weight is None else weight.dtype)
        if weight is None:
            return to_features, None, None, None, None, None
        return to_features, to_weight, to_bias, None, None, None


def _precise(tensor: Tensor) -> Tensor:
    """Sums are taken in float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
