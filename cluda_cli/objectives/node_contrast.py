"""Contrast of the same pixels in two masked views.

D fused and E projected channels, n nodes: cells of the fused feature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Seen
from cluda_cli.data.labels import IGNORE
from cluda_cli.distributed import collectives
from cluda_cli.objectives.cells import draw_cells, take_cells
from cluda_cli.objectives.objective import Objective


class NodeContrast(Objective):
    """A pixel is like itself in another masked view, and unlike pixels of other classes (GCA, arXiv 2010.14945).

    GCA contrasts the nodes of a graph in two corrupted views of it. Here nodes are pixels, and both views hide blocks
    as `masking` says. GCA takes all other nodes as negatives; those that have the same label are none here. Nodes are
    cells with a label and a weight above 0, those of all ranks; with two resolutions they are cells of the context.
    `channels` are those of the fused feature.
    """

    reads = (("masked", "second masked"),)
    settings: settings.NodeContrast

    def __init__(self, section: settings.NodeContrast, channels: int) -> None:
        super().__init__(section)
        width = section.projection_channels
        self.head = nn.Sequential(nn.Linear(channels, width), nn.ELU(), nn.Linear(width, width))

    def forward(self, one: Seen, other: Seen) -> Tensor:
        count = self.settings.nodes
        with torch.autocast(one.output.features.device.type, enabled=False):
            maps = [seen.output.features.float() for seen in (one, other)]
            place, label, cell = draw_cells(one.view, maps[0].shape[2:], "nodes", count, count)
            rows = [take_cells(features, cell).flatten(0, 1) for features in maps]  # n D each
            found = _first(count, place.flatten(), label.flatten(), *rows)
            _, label, *rows = _first(count, *map(collectives.all_gather_rows, found))
            units = (F.normalize(self.head(features), dim=1) for features in rows)
            costs = node_costs(*units, label, self.settings.temperature).mean(dim=0)  # n
            known = label != IGNORE
            return torch.where(known, costs, 0).sum() / known.sum().clamp_min(1)


def _first(count: int, place: Tensor, *rows: Tensor) -> list[Tensor]:
    """Of all rows as many as there may be nodes, in ascending order of their places."""
    order = place.argsort(stable=True)[:count]
    return [tensor[order] for tensor in (place, *rows)]


def node_costs(one: Tensor, other: Tensor, label: Tensor, temperature: float) -> Tensor:
    """The cost of every node in nats, in either direction: unit vectors n E of two views, labels n -> 2 n.

    With u_i and v_i node i in this and in the other view, s the cosine similarity divided by `temperature`, and N_i the
    nodes of another label than i, 255 left out, it is

        -log( exp(s(u_i, v_i)) / (exp(s(u_i, v_i)) + sum_{j in N_i} (exp(s(u_i, v_j)) + exp(s(u_i, u_j)))) ).

    If all labels differ, it is the contrast of GCA (arXiv 2010.14945). The cost of a node with label 255 means nothing.
    """
    rival = (label[:, None] != label) & (label != IGNORE)  # n n
    itself = torch.eye(len(label), dtype=torch.bool, device=label.device)
    between = one @ other.T / temperature  # n n
    costs = []
    for own, across in ((one, between), (other, between.T)):
        within = (own @ own.T / temperature).masked_fill(~rival, -torch.inf).logsumexp(dim=1)
        across = across.masked_fill(~(rival | itself), -torch.inf).logsumexp(dim=1)
        costs.append(torch.logaddexp(across, within) - between.diagonal())
    return torch.stack(costs)
