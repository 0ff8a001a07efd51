"""What is known of the features of each class, kept from step to step. N pixels, D channels, K classes, L batch means.

Every number is that of the joint batch of all ranks, so all ranks keep the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cluda_cli.distributed import collectives


class BatchStatistics(NamedTuple):
    """Of the pixels of each class in one batch; a class without pixels has zeros."""

    count: Tensor  # K, int64
    mean: Tensor  # K D
    variance: Tensor  # K D, of the population: divided by the count


def batch_statistics(features: Tensor, label: Tensor, num_classes: int) -> BatchStatistics:
    """Statistics of features N D by their labels N, train ids with 255 = ignored, over all ranks."""
    member = (label[:, None] == torch.arange(num_classes, device=label.device)).to(features.dtype)  # N K
    sums = collectives.all_reduce_sum(torch.cat([member.T @ features, member.sum(dim=0)[:, None]], dim=1))  # K D+1
    count = sums[:, -1:]  # K 1, exact
    mean = sums[:, :-1] / count.clamp_min(1)
    # Squares of differences: the mean square less the squared mean would lose digits where the variance is small.
    gap = features - mean[label.clamp(max=num_classes - 1)]
    squares = collectives.all_reduce_sum(member.T @ gap.square())
    return BatchStatistics(count[:, 0].long(), mean, squares / count.clamp_min(1))


def merge(mean: Tensor, variance: Tensor, batch: BatchStatistics, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, K D each, of classes after a batch with its share w, K, of them in 0..1.

    With mean m and variance s of the batch, each class's mean M and variance S are

        M <- (1 - w) M + w m,  S <- (1 - w) S + w s + w (1 - w) (M - m)^2.
    """
    share = share[:, None]
    spread = share * (1 - share) * (mean - batch.mean).square()
    return mean.lerp(batch.mean, share), variance.lerp(batch.variance, share) + spread


def mean_of_first(means: Tensor, length: Tensor) -> Tensor:
    """The mean of the first `length` K of the vectors of each class, K L D; 0 without any.  # K D"""
    exists = torch.arange(means.shape[1], device=means.device) < length[:, None]  # K L
    return means.where(exists[:, :, None], 0).sum(dim=1) / length.clamp_min(1)[:, None]


class Running(nn.Module):
    """Mean and variance of each class over all batches so far.

    Without `momentum` they are those of all pixels, as if they had come at once (SePiCo, arXiv 2204.08808). With it,
    each batch counts as much: a moving average that keeps `momentum` of what it was (SPCL, arXiv 2111.12358). The first
    batch with a class is what its average starts from. A batch without a class leaves the class alone.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, num_classes: int, channels: int, momentum: float | None = None) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))  # K, pixels or batches
        self.register_buffer("mean", torch.zeros(num_classes, channels))  # K D
        self.register_buffer("variance", torch.zeros(num_classes, channels))  # K D

    @property
    def met(self) -> Tensor:
        """Which classes there were pixels of.  # K, bool"""
        return self.count > 0

    def update(self, batch: BatchStatistics) -> None:
        """Take in a batch."""
        met = self.met
        count = batch.count if self.momentum is None else (batch.count > 0).long()
        self.count += count
        share = count / self.count.clamp_min(1).to(self.mean.dtype)  # K
        if self.momentum is not None:
            share = count.to(self.mean.dtype) * torch.ones_like(share).masked_fill(met, 1 - self.momentum)
        mean, variance = merge(self.mean, self.variance, batch, share)
        self.mean.copy_(mean)
        self.variance.copy_(variance)


class Bank(nn.Module):
    """The means of each class in the latest batches that had it, at most `length` (BankCL of SePiCo).

    SePiCo's released bank begins with a vector of zeros; this one begins empty.
    """

    count: Tensor
    means: Tensor

    def __init__(self, num_classes: int, channels: int, length: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))  # K, batches so far
        self.register_buffer("means", torch.zeros(num_classes, length, channels))  # K L D, the oldest is overwritten

    @property
    def length(self) -> Tensor:
        """How many means each class has; they come first.  # K"""
        return self.count.clamp(max=self.means.shape[1])

    @property
    def met(self) -> Tensor:
        """Which classes there were pixels of.  # K, bool"""
        return self.count > 0

    @property
    def mean(self) -> Tensor:
        """The mean of the means of each class, 0 without any.  # K D"""
        return mean_of_first(self.means, self.length)

    def update(self, batch: BatchStatistics) -> None:
        """Take in the means of a batch."""
        present = batch.count > 0
        place = torch.arange(len(present), device=present.device), self.count % self.means.shape[1]
        self.means[place] = torch.where(present[:, None], batch.mean, self.means[place])
        self.count += present
