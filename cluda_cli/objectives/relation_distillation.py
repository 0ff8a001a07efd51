"""Relations between pixels, learnt from a frozen teacher.

B images, D and E channels of the student's and of the teacher's fused feature, h w cells of the student's, n compared
pixels, M prototypes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.views import Scene, Seen, View
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.objectives.objective import Objective

DRAWN = 2**31
"""Random numbers that order cells are integers below this, so many that two are hardly ever equal."""


class RelationDistillation(Objective):
    """Let the student's pixels resemble each other as the teacher's do (after ReKD, arXiv 2112.04174).

    ReKD compares images and published no code; this dense form is a reconstruction. Both networks compare pixels within
    their own fused feature, so these may have different channels, and no adapter is needed. The pixels are cells of the
    student's feature, drawn alike in all images where the teacher labels, and those of all ranks are compared. With two
    resolutions they are cells of the context.

    `channels` are the teacher's. Prototypes start as its features in the first step, whose term is 0.
    """

    reads = (("target",),)
    settings: settings.RelationDistillation

    def __init__(self, section: settings.RelationDistillation, channels: int) -> None:
        super().__init__(section)
        if section.relations == "prototypes":
            self.register_buffer("bank", torch.zeros(section.prototypes, channels))  # M E of length 1; 0 is none yet

    def edit(self, view: View, scene: Scene) -> View:
        """Target images come with the features of the teacher, which has seen them for its labels."""
        return replace(view, guide=scene.pseudo_labels.features) if view.name == "target" else view

    def forward(self, seen: Seen) -> Tensor:
        with torch.autocast(seen.output.features.device.type, enabled=False):
            student, teacher = self._sample(seen)
            section = self.settings
            if len(student) < 2:
                return 0 * student.sum()
            if section.relations == "soft":
                return soft_relations(student, teacher, section.student_temperature, section.teacher_temperature)
            if section.relations == "neighbours":
                return attract(student, find_neighbours(teacher, section.neighbours), section.student_temperature)
            return attract(student, share_prototype(teacher, self.bank), section.student_temperature)

    def update(self, scene: Scene, seen: Sequence[Seen]) -> None:
        """Move the prototypes towards the teacher's features; those that do not exist yet take the first of them."""
        if self.settings.relations != "prototypes":
            return
        with torch.autocast(self.bank.device.type, enabled=False):
            rows = torch.cat([self._sample(one)[1] for one in seen if one.view.name == "target"])
            exist = int(self.bank.any(dim=1).sum())
            new = F.normalize(rows[rows.any(dim=1)][: len(self.bank) - exist], dim=1)
            self.bank[exist : exist + len(new)] = new
            self.bank.copy_(move_prototypes(self.bank, rows, self.settings.prototype_momentum))

    @property
    def updates(self) -> bool:
        return self.settings.relations == "prototypes"

    def _sample(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Features of equally many labelled places of all images of all ranks: the student's n D, the teacher's n E."""
        output, view = seen
        assert view.guide is not None
        features, size = output.features.float(), output.features.shape[2:]
        labelled = (view.label != IGNORE) & (view.probability > 0)  # B H W
        labelled = F.interpolate(labelled[:, None].float(), size, mode="nearest").flatten(1) > 0  # B h*w
        each = max(self.settings.samples // (len(labelled) * collectives.world_size()), 1)
        generators = view.generators("relations")
        drawn = torch.stack([torch.randint(DRAWN, labelled.shape[1:], generator=one) for one in generators])
        order = drawn.to(labelled.device, non_blocking=True).where(labelled, DRAWN)
        cell = order.argsort(dim=1, stable=True)[:, :each]  # B each
        student = features.flatten(2).transpose(1, 2).gather(1, cell[:, :, None].expand(-1, -1, features.shape[1]))
        teacher = sample_places(view.guide.float(), cell, (size[0], size[1]))  # B each E
        found = (student, teacher, labelled.gather(1, cell))
        student, teacher, valid = (collectives.all_gather_rows(rows.flatten(0, 1)) for rows in found)
        return student[valid], teacher[valid]


def sample_places(maps: Tensor, cell: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of maps B E a b at the centres of cells, B n, of a grid of `size`, interpolated linearly.  # B n E

    The grid covers the same image as the maps do. Its cells are counted row by row.
    """
    height, width = size
    row, column = cell.div(width, rounding_mode="floor"), cell % width  # B n
    place = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=2).to(maps.dtype)  # B n 2
    found = F.grid_sample(maps, place[:, None], padding_mode="border", align_corners=False)  # B E 1 n
    return found[:, :, 0].transpose(1, 2)


def log_relations(features: Tensor, temperature: float) -> Tensor:
    """How similar each pixel is to each other one: the logarithm of a softmax over the others, n n.

    `features` n D of any length (their direction counts), n >= 2. The softmax is that of cosine similarities divided by
    `temperature`, without the pixel itself, which has -inf.
    """
    unit = F.normalize(features, dim=1)
    return (unit @ unit.T / temperature).masked_fill(_own(features), -torch.inf).log_softmax(dim=1)


def soft_relations(student: Tensor, teacher: Tensor, student_temperature: float, teacher_temperature: float) -> Tensor:
    """Mean over all pixels of KL(teacher's relations || student's relations); a scalar, 0 where they agree.

    Features n D of the student and n E of the teacher, n >= 2; the teacher gets no gradient.
    """
    expected = log_relations(teacher.detach(), teacher_temperature)  # n n
    actual = log_relations(student, student_temperature)
    costs = (expected.exp() * (expected - actual)).masked_fill(_own(student), 0)
    return costs.sum(dim=1).mean()


def attract(student: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Mean over pixels i with a positive, and over the positives p of each, of -log relation(i, p); a scalar.

    `student` n D, n >= 2, `positive` n n boolean, False on the diagonal. The mean is outside the logarithm, so that one
    easy positive does not satisfy a pixel. 0 without any positive.
    """
    costs = torch.where(positive, -log_relations(student, temperature), 0).sum(dim=1)  # n
    count = positive.sum(dim=1)
    return (costs / count.clamp_min(1)).sum() / count.count_nonzero().clamp_min(1)


def find_neighbours(teacher: Tensor, count: int) -> Tensor:
    """Which `count` other pixels, at most all, are the most similar to each pixel, by the teacher.  # n n, boolean"""
    similarity = log_relations(teacher, 1.0)  # in the order of cosine similarities
    nearest = similarity.topk(min(count, len(teacher) - 1), dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter(1, nearest, value=True)


def assign(teacher: Tensor, bank: Tensor) -> Tensor:
    """For each pixel n E the most similar row of a bank M E; rows of zeros are none.  # n"""
    similarity = F.normalize(teacher, dim=1) @ F.normalize(bank, dim=1).T  # n M
    return similarity.masked_fill(~bank.any(dim=1), -torch.inf).argmax(dim=1)


def share_prototype(teacher: Tensor, bank: Tensor) -> Tensor:
    """Which other pixels have the same nearest prototype; none while no prototype exists.  # n n, boolean"""
    nearest = assign(teacher, bank)
    return (nearest[:, None] == nearest) & ~_own(teacher) & bank.any()


def move_prototypes(bank: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """The bank M E after a step: rows move towards the mean of the unit vectors of the pixels n E assigned to them.

    c <- norm(momentum c + (1 - momentum) mean); rows without a pixel stay, but for their length, which becomes 1.
    """
    bank = F.normalize(bank, dim=1)
    members = F.one_hot(assign(teacher, bank), len(bank)).to(bank.dtype).T  # M n
    count = members.sum(dim=1, keepdim=True)  # M 1
    mean = members @ F.normalize(teacher, dim=1) / count.clamp_min(1)
    return torch.where(count > 0, F.normalize(momentum * bank + (1 - momentum) * mean, dim=1), bank)


def _own(features: Tensor) -> Tensor:
    """The diagonal of a comparison of pixels with pixels.  # n n, boolean"""
    return torch.eye(len(features), dtype=torch.bool, device=features.device)
