"""Losses of pixels against statistics of the classes. N pixels, D channels, K classes, L batch means.

Features are N D, of length 1; labels N, train ids with 255 = ignored; `met` K says of which classes there are
statistics. Other classes are no rivals, and their pixels count as little as ignored ones: their loss is 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.distributed import collectives
from cluda_cli.objectives.prototypes.statistics import mean_of_first


def is_counted(label: Tensor, met: Tensor) -> Tensor:
    """Which pixels have a label that there are statistics of.  # N, bool"""
    return (label < len(met)) & met[_index(label, met)]


def mean_losses(features: Tensor, label: Tensor, mean: Tensor, met: Tensor, temperature: float) -> Tensor:
    """-log softmax(f . mean / temperature) at the label (SPCL, arXiv 2111.12358; ProtoCL of SePiCo).  # N

    The means, K D, are used as they are, not at unit length.
    """
    return _cross_entropies(features @ mean.T / temperature, label, met)


def distribution_losses(
    features: Tensor, label: Tensor, mean: Tensor, variance: Tensor, met: Tensor, temperature: float
) -> Tensor:
    """Bound of the expected contrast with infinitely many Gaussian samples of every class (DistCL of SePiCo).  # N

    With mean M and variance S, both K D, and temperature t it is, for a pixel f of class y,

        -log softmax_y(f . M / t + f^2 . S / 2t^2) + f^2 . S_y / 2t^2.
    """
    spread = features.square() @ variance.T / (2 * temperature**2)  # N K
    own = spread.gather(1, _index(label, met)[:, None])[:, 0].where(is_counted(label, met), 0)
    return _cross_entropies(features @ mean.T / temperature + spread, label, met) + own


def bank_losses(features: Tensor, label: Tensor, means: Tensor, length: Tensor, temperature: float) -> Tensor:
    """Contrast with each of the batch means of the own class, K L D, of which the first `length` K exist.  # N

    It is the mean over the means b of class y of -log( e^(f.b/t) / (e^(f.b/t) + sum_{k != y} e^(f.B_k/t)) ), where B_k
    is the mean of the means of class k and t the temperature (BankCL of SePiCo).
    """
    met = length > 0
    similarity = features @ mean_of_first(means, length).T / temperature  # N K
    own = label[:, None] == torch.arange(len(met), device=label.device)
    rivals = _mask(similarity, own | ~met).logsumexp(dim=1)  # N
    losses = 0 * similarity.sum(dim=1)  # connected, whatever there is
    for train_id, count in enumerate(length.tolist()):
        if count:  # one class at a time: N x L numbers in all, not N x K x L
            rows = (label == train_id).nonzero()[:, 0]
            positive = features[rows] @ means[train_id, :count].T / temperature  # n count
            costs = torch.logaddexp(rivals[rows, None], positive) - positive
            losses = losses.index_add(0, rows, costs.mean(dim=1))
    return losses


def uniformity(feature: Tensor, mean: Tensor, met: Tensor, temperature: float) -> Tensor:
    """How uniform the prediction softmax(f . mean / temperature) of a feature D is: a scalar, -1 if it is uniform.

    It is sum_k log p_k / (C ln C) over the C classes that were met; 0 with fewer than two (regulariser of SePiCo, which
    adds it to the loss; -1 is its largest value).
    """
    logits = _mask(mean @ feature / temperature, ~met)  # K
    classes = met.sum().to(logits.dtype)
    mean_log = (logits.log_softmax(dim=0) * met).sum() / classes.clamp_min(1)
    return torch.where(classes > 1, mean_log / classes.clamp_min(2).log(), 0)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """sum_i w_i v_i / sum_i w_i over the pixels of all ranks, N or N D; 0 without weight. The mean of the ranks'."""
    total = collectives.all_reduce_sum(weight.sum())
    return collectives.world_size() * (weight @ values) / total.where(total > 0, 1)


def _cross_entropies(logits: Tensor, label: Tensor, met: Tensor) -> Tensor:
    """Cross-entropy with logits N K of every pixel that counts.  # N"""
    losses = F.cross_entropy(_mask(logits, ~met), _index(label, met), reduction="none")
    return losses.where(is_counted(label, met), 0)


def _mask(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits as low as numbers can be where the mask is set; minus infinity would be NaN where it is set everywhere."""
    return logits.masked_fill(mask, torch.finfo(logits.dtype).min)


def _index(label: Tensor, met: Tensor) -> Tensor:
    """Train ids, some valid one for pixels that have none."""
    return label.clamp(max=len(met) - 1)
