"""Objectives: what is measured on a view. Each file holds one; `build_objectives` chooses.

The contract. An objective is a module with `settings` (weight, start), `views` (names of the views it reads) and
forward(output, view) -> unweighted scalar, computed in float32 whatever autocast says, connected to the student and
never NaN. Where it does not apply to a view (no labelled pixel, no such class) it is exactly 0; logs show that as "-".
Its state is buffers, its heads are submodules; frozen helper networks are neither. No tensor is quadratic in pixels.
"""

from torch import nn

from cluda_cli import settings
from cluda_cli.data.labels import ClassTable
from cluda_cli.models.multires import MultiResolution
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.objectives.cross_entropy import CrossEntropy
from cluda_cli.objectives.feature_distance import FeatureDistance
from cluda_cli.objectives.pixel_contrast import PixelContrast


def build_objectives(s: settings.Objectives, student: Segmenter, classes: ClassTable) -> nn.ModuleDict:
    """The objectives that the settings switch on, by the name of their section.

    The encoder of `student` must hold its pretrained weights; `classes` are those of the source. Raises SettingsError
    for classes that do not exist.
    """
    chosen: dict[str, nn.Module] = {"source": CrossEntropy(s.source, views=frozenset({"source"}))}
    if s.mixed:
        chosen["mixed"] = CrossEntropy(s.mixed, views=frozenset({"mixed"}))
    if s.masked:
        chosen["masked"] = CrossEntropy(s.masked, views=frozenset({"masked"}))
    if s.feature_distance:
        chosen["feature_distance"] = FeatureDistance(s.feature_distance, student.encoder, classes)
    if s.pixel_contrast:
        views = frozenset({"source", "mixed"}) if s.mixed else frozenset({"source"})
        channels = student.encoder.channels if isinstance(student, MultiResolution) else None
        chosen["pixel_contrast"] = PixelContrast(s.pixel_contrast, views, channels)
    return nn.ModuleDict(chosen)
