"""What is measured on views, one file per method. `build_objectives` chooses, `build_makers` says how views come."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.mixing import tail_law
from cluda_cli.adaptation.teacher import FrozenTeacher
from cluda_cli.adaptation.views import MakeMasked, MakeMixed, Maker, MakeStrongTarget, MakeTruth, make_target
from cluda_cli.data.labels import ClassTable
from cluda_cli.errors import SettingsError
from cluda_cli.models.encoders import Encoder
from cluda_cli.models.multires import MultiResolution
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.objectives.adaptive_balance import PASTED, AdaptiveBalance
from cluda_cli.objectives.anchor_contrast import AnchorContrast
from cluda_cli.objectives.clustering import Clustering
from cluda_cli.objectives.cross_entropy import CrossEntropy
from cluda_cli.objectives.feature_distance import FeatureDistance
from cluda_cli.objectives.global_contrast import GlobalContrast
from cluda_cli.objectives.local_contrast import LocalContrast
from cluda_cli.objectives.locally_adaptive import LocallyAdaptive
from cluda_cli.objectives.memory_contrast import MemoryContrast
from cluda_cli.objectives.node_contrast import NodeContrast
from cluda_cli.objectives.objective import Objective
from cluda_cli.objectives.pixel_contrast import PixelContrast
from cluda_cli.objectives.prototype_contrast import PrototypeContrast
from cluda_cli.objectives.relation_distillation import RelationDistillation
from cluda_cli.objectives.semantic_negatives import SemanticNegatives
from cluda_cli.objectives.zero_style import ZeroStyle
from cluda_cli.seeds import derive_seed


def build_objectives(
    s: settings.Objectives,
    student: Segmenter,
    classes: ClassTable,
    class_weights: Tensor | None = None,
    teacher: FrozenTeacher | None = None,
    truth: str = "source",
    crop: tuple[int, int] = (512, 512),
    mixing: settings.Mixing = settings.Mixing(),  # noqa: B008  it is frozen
    seed: int = 0,
    network: Encoder | Segmenter | None = None,
) -> nn.ModuleDict:
    """The objectives that the settings switch on, by the name of their section.

    The encoder of `student` must hold its pretrained weights; `classes` are those of the labels. `class_weights` (K)
    are those of ground truth in cross-entropy, `teacher` is that of distillation. `truth` is the view of ground truth
    that all other objectives read: `source`, or `labelled` in a run without a source. `crop` is the size of crops, and
    `network` that of the feature distance, None for the pretrained encoder. Layers are drawn under `seed`, those of an
    objective alike whether others are on or off. Raises SettingsError for what does not fit: unknown classes,
    distillation without a teacher, confidence of a view that nobody reads, a network of other maps.
    """
    chosen = _choose_cross_entropies(s, class_weights)
    views = (truth, "mixed") if s.mixed else (truth,)  # of contrasts
    fused = student.decoder.classifiers()[0].in_channels  # channels
    if s.feature_distance:
        chosen["feature_distance"] = partial(_build_distance, s.feature_distance, student, classes, truth, network)
    if s.pixel_contrast:
        channels = student.encoder.channels if isinstance(student, MultiResolution) else None
        chosen["pixel_contrast"] = partial(PixelContrast, s.pixel_contrast, views, channels)
    if s.anchor_contrast:
        chosen["anchor_contrast"] = partial(AnchorContrast, s.anchor_contrast, views, fused)
    if s.memory_contrast:
        chosen["memory_contrast"] = partial(MemoryContrast, s.memory_contrast, len(classes), fused)
    if s.distilled:
        _require(teacher, "distilled")
        chosen["distilled"] = partial(CrossEntropy, s.distilled, "target")
    if s.relation_distillation:
        channels = _require(teacher, "relation_distillation").channels
        chosen["relation_distillation"] = partial(RelationDistillation, s.relation_distillation, channels)
    if s.global_contrast:
        chosen["global_contrast"] = partial(GlobalContrast, s.global_contrast, student.encoder.channels[-1])
    if s.local_contrast:
        chosen["local_contrast"] = partial(LocalContrast, s.local_contrast, fused)
    if s.clustering:
        chosen["clustering"] = partial(Clustering, s.clustering, student, len(classes))
    if s.prototype_contrast:
        chosen["prototype_contrast"] = partial(
            PrototypeContrast, s.prototype_contrast, len(classes), student.encoder.channels, fused, truth
        )
    if s.semantic_negatives:
        chosen["semantic_negatives"] = partial(SemanticNegatives, s.semantic_negatives, fused, truth)
    if s.node_contrast:
        chosen["node_contrast"] = partial(NodeContrast, s.node_contrast, fused)
    if s.adaptive_balance:
        view = _find_confidence_view(s, s.adaptive_balance, truth)
        chosen["adaptive_balance"] = partial(AdaptiveBalance, s.adaptive_balance, view, classes, crop, mixing)
    built = nn.ModuleDict({name: _build(name, build, seed) for name, build in chosen.items()})
    _check_confidence_view(s, built, truth)
    return built


def _choose_cross_entropies(s: settings.Objectives, class_weights: Tensor | None) -> dict[str, Callable[[], Objective]]:
    """The terms that are cross-entropy with class weights, on views of one kind each."""
    chosen: dict[str, Callable[[], Objective]] = {}
    if s.source:
        chosen["source"] = partial(CrossEntropy, s.source, "source", class_weights, s.source.hard_pixels)
    if s.labelled:
        pasted = s.adaptive_balance and s.adaptive_balance.copy_paste
        view = PASTED if pasted else "labelled"
        chosen["labelled"] = partial(CrossEntropy, s.labelled, view, class_weights, s.labelled.hard_pixels)
    if s.mixed:
        chosen["mixed"] = partial(CrossEntropy, s.mixed, "mixed", class_weights)
    if s.masked:
        chosen["masked"] = partial(CrossEntropy, s.masked, "masked", class_weights)
    if s.zero_style:
        chosen["zero_style"] = partial(ZeroStyle, s.zero_style, class_weights)
    if s.locally_adaptive:
        chosen["locally_adaptive"] = partial(LocallyAdaptive, s.locally_adaptive, class_weights)
    return chosen


def _build(name: str, build: Callable[[], Objective], seed: int) -> Objective:
    """Build an objective whose layers are drawn from a stream of its own, whatever others there are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, f"initialise {name}"))
        return build()


def _find_confidence_view(s: settings.Objectives, section: settings.AdaptiveBalance, truth: str) -> str:
    """The view from whose labels `adaptive_balance` learns confidence."""
    view = section.confidence_from or ("labelled" if s.labelled else "mixed" if s.mixed else truth)
    return PASTED if view == "labelled" and section.copy_paste else view


def _check_confidence_view(s: settings.Objectives, built: nn.ModuleDict, truth: str) -> None:
    """Raises SettingsError if the view that `adaptive_balance` names is read by no other objective."""
    section = s.adaptive_balance
    if section is None or not section.confidence_from:
        return
    view = _find_confidence_view(s, section, truth)
    others = [objective for name, objective in built.items() if name != "adaptive_balance"]
    if view not in {name for objective in others for group in objective.reads for name in group}:
        where = "objectives.adaptive_balance.confidence_from"
        raise SettingsError(f"no objective reads the view {view}", where, "name one that is learned from")


def _build_distance(
    section: settings.FeatureDistance,
    student: Segmenter,
    classes: ClassTable,
    truth: str,
    network: Encoder | Segmenter | None,
) -> FeatureDistance:
    channels = (*student.encoder.channels, student.decoder.classifiers()[0].in_channels)
    return FeatureDistance(section, student.encoder, classes, truth, network, channels)


def _require(teacher: FrozenTeacher | None, name: str) -> FrozenTeacher:
    if teacher is None:
        remedy = "set model.teacher=runs/NAME/best.safetensors, the weights of a trained run"
        raise SettingsError("has no teacher to learn from", f"objectives.{name}", remedy)
    return teacher


def build_makers(
    s: settings.Settings, objectives: nn.ModuleDict, frequencies: Sequence[float] = ()
) -> dict[str, Maker]:
    """How each view is made, by its name, in the order in which the student sees them.

    `frequencies` are those of the classes in the ground truth, which `mixing.tail` asks for. Raises SettingsError if an
    objective reads a view that nobody makes, if two make different views of one name, or if no class is rare for
    `mixing.tail`.
    """
    law = restrict_law(s.mixing.tail, objectives, frequencies) if s.mixing.tail else None
    makers: dict[str, Maker] = {}
    if s.data.source:
        makers["source"] = MakeTruth("source", s.mixing)
    if s.data.labelled is not None:
        makers["labelled"] = MakeTruth("labelled", s.mixing)
    if s.has_ground_truth:
        makers["mixed"] = MakeMixed(s.mixing, law)
    makers |= {
        "masked": MakeMasked(s.masking, s.mixing),
        "second masked": MakeMasked(s.masking, s.mixing, "second "),
        "target": make_target,
        "strong target": MakeStrongTarget(s.mixing),
        "second strong target": MakeStrongTarget(s.mixing, "second strong target"),
    }
    for name, objective in objectives.items():
        own = objective.makers()
        if taken := {view for view in makers.keys() & own.keys() if makers[view] != own[view]}:
            raise SettingsError(f"makes the view {', '.join(sorted(taken))}, which exists", f"objectives.{name}")
        makers |= own
    for name, objective in objectives.items():
        if unknown := {view for group in objective.reads for view in group} - makers.keys():
            what = f"reads the view {', '.join(sorted(unknown))}, which nobody makes"
            more = "" if s.has_ground_truth else "; data.source or data.labelled gives more"
            raise SettingsError(what, f"objectives.{name}", f"views are {', '.join(makers)}{more}")
    return makers


def source_law(objectives: nn.ModuleDict, step: int) -> tuple[float, ...] | None:
    """Probabilities of source classes for `step`, those of the first objective that has any; None: none has."""
    laws = (objective.source_law(step) for objective in objectives.values())
    return next((law for law in laws if law is not None), None)


def restrict_law(
    tail: settings.Tail, objectives: nn.ModuleDict, frequencies: Sequence[float]
) -> Callable[[int], tuple[float, ...]]:
    """The law of `mixing.tail`: that of an objective where there is one, else that of the frequencies, 0 on others.

    Raises SettingsError if no class is rare.
    """
    rare = [0 < frequency < tail.share for frequency in frequencies]
    if not any(rare):
        what = f"no class of the source has less than {100 * tail.share:g} % of its pixels"
        raise SettingsError(what, "mixing.tail.share", "raise it, or set mixing.tail=false")
    statistic = torch.tensor(frequencies, dtype=torch.float64)
    by_frequency: tuple[float, ...] = tuple(tail_law(statistic, torch.tensor(rare), tail.temperature).tolist())

    def law(step: int) -> tuple[float, ...]:
        published = source_law(objectives, step) or by_frequency
        return tuple(share if is_rare else 0.0 for share, is_rare in zip(published, rare, strict=True))

    return law
