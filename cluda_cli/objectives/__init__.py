"""What is measured on views, one file per method. `build_objectives` chooses, `build_makers` says how views come."""

from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.views import MakeMasked, MakeMixed, Maker, MakeSource, make_target
from cluda_cli.data.labels import ClassTable
from cluda_cli.errors import SettingsError
from cluda_cli.models.multires import MultiResolution
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.objectives.anchor_contrast import AnchorContrast
from cluda_cli.objectives.cross_entropy import CrossEntropy
from cluda_cli.objectives.feature_distance import FeatureDistance
from cluda_cli.objectives.objective import Objective
from cluda_cli.objectives.pixel_contrast import PixelContrast


def build_objectives(
    s: settings.Objectives, student: Segmenter, classes: ClassTable, class_weights: Tensor | None = None
) -> nn.ModuleDict:
    """The objectives that the settings switch on, by the name of their section.

    The encoder of `student` must hold its pretrained weights; `classes` are those of the sources. `class_weights` (K)
    are those of ground truth in cross-entropy. Raises SettingsError for classes that do not exist.
    """
    chosen: dict[str, Objective] = {}
    if s.source:
        chosen["source"] = CrossEntropy(s.source, "source", class_weights, s.source.hard_pixels)
    if s.mixed:
        chosen["mixed"] = CrossEntropy(s.mixed, "mixed", class_weights)
    if s.masked:
        chosen["masked"] = CrossEntropy(s.masked, "masked", class_weights)
    if s.feature_distance:
        chosen["feature_distance"] = FeatureDistance(s.feature_distance, student.encoder, classes)
    if s.pixel_contrast:
        views = ("source", "mixed") if s.mixed else ("source",)
        channels = student.encoder.channels if isinstance(student, MultiResolution) else None
        chosen["pixel_contrast"] = PixelContrast(s.pixel_contrast, views, channels)
    if s.anchor_contrast:
        views = ("source", "mixed") if s.mixed else ("source",)
        fused = student.decoder.classifiers()[0].in_channels
        chosen["anchor_contrast"] = AnchorContrast(s.anchor_contrast, views, fused)
    return nn.ModuleDict(chosen)


def build_makers(s: settings.Settings, objectives: nn.ModuleDict) -> dict[str, Maker]:
    """How each view is made, by its name, in the order in which the student sees them.

    Raises SettingsError if an objective reads a view that nobody makes, or if two make views of one name.
    """
    makers: dict[str, Maker] = {
        "source": MakeSource(s.mixing),
        "mixed": MakeMixed(s.mixing),
        "masked": MakeMasked(s.masking, s.mixing),
        "target": make_target,
    }
    for name, objective in objectives.items():
        own = objective.makers()
        if taken := makers.keys() & own.keys():
            raise SettingsError(f"makes the view {', '.join(sorted(taken))}, which exists", f"objectives.{name}")
        makers |= own
    for name, objective in objectives.items():
        if unknown := {view for group in objective.reads for view in group} - makers.keys():
            what = f"reads the view {', '.join(sorted(unknown))}, which nobody makes"
            raise SettingsError(what, f"objectives.{name}", f"views are {', '.join(makers)}")
    return makers
