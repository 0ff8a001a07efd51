"""The contract of an objective: what is measured on views, and what else a method may do. Only two things are a must.

Each term is a scalar in float32 whatever autocast says, connected to the student and never NaN. Where it does not
apply (no labelled pixel, no such class) it is exactly 0; logs show that as "-". State is buffers, heads are submodules,
frozen helper networks are `models.frozen.Frozen`. Random numbers come from the scene's generators, in `forward` from
those of a view. No tensor is quadratic in pixels.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import Maker, Scene, Seen, View
from cluda_cli.models.segmenter import Output


class Objective(nn.Module):
    """Something to learn from views."""

    reads: tuple[tuple[str, ...], ...]
    """Groups of views, by name. There is one term for each group, computed from all of its views together."""

    def __init__(self, section: settings.Objective) -> None:
        super().__init__()
        self.settings = section

    def makers(self) -> Mapping[str, Maker]:
        """Makers of views that only this method has, by the name of the view."""
        return {}

    def check(self, output: Output) -> None:
        """Raises SettingsError if this output of the student, for a training crop, is too small to measure anything."""

    def edit(self, view: View, scene: Scene) -> View:
        """Change a view of any maker before the student sees it, its pixel weights for instance."""
        return view

    def forward(self, *seen: Seen) -> Tensor:
        """The unweighted term of one group, whose views come in the order of the group."""
        raise NotImplementedError

    def update(self, scene: Scene, seen: Sequence[Seen]) -> None:
        """Change buffers; this is the only place for it. Called after the optimizer and the teacher have moved.

        `seen` is detached and has one entry for each view and micro-batch.
        """

    @property
    def updates(self) -> bool:
        """Whether it has an `update` of its own; if none has, outputs are not kept until the end of the step."""
        return type(self).update is not Objective.update

    def source_law(self, step: int) -> tuple[float, ...] | None:
        """Probabilities with which source classes are drawn for the batch of `step`; None: no opinion.

        It is asked up to `data.streams.LOOKAHEAD` steps before that step, and again when a run resumes. So it has to
        answer from buffers that are as old as that, or a resumed run differs from one that never stopped.
        """
        return None
