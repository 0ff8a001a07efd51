"""Settings that were changed but are not read, and parts that stay as they were drawn: what a run says before it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli.adaptation.views import WITHOUT_TEACHER
from cluda_cli.engine.run import Run
from cluda_cli.settings import Decoder, Masking, Section, Settings, SupervisedCrossEntropy


class Unread(NamedTuple):
    """Settings of one table that have no effect while `unread` is true of it."""

    table: str
    names: tuple[str, ...]
    unread: Callable[[Any], bool]
    reason: str


UNREAD = (
    Unread("masking", ("cap", "hide_important"), lambda t: t.importance is None, "without masking.importance"),
    Unread(
        "objectives.prototype_contrast", ("running", "momentum"), lambda t: t.statistics == "bank", "with a bank"
    ),
    Unread(
        "objectives.prototype_contrast", ("momentum",),
        lambda t: t.statistics != "bank" and t.running == "count", "with running=count",
    ),
    Unread(
        "objectives.prototype_contrast", ("projection_channels",), lambda t: t.features == "fused",
        "with features=fused",
    ),
    Unread(
        "objectives.prototype_contrast", ("bank_length",), lambda t: t.statistics != "bank",
        "without statistics=bank",
    ),
    Unread(
        "objectives.memory_contrast", ("hardest",), lambda t: not t.mixed_pairs and not t.mixed_queries,
        "without mixed_pairs and mixed_queries",
    ),
    Unread(
        "objectives.relation_distillation", ("teacher_temperature",), lambda t: t.relations != "soft",
        "without relations=soft",
    ),
    Unread(
        "objectives.relation_distillation", ("neighbours",), lambda t: t.relations != "neighbours",
        "without relations=neighbours",
    ),
    Unread(
        "objectives.relation_distillation", ("prototypes", "prototype_momentum"),
        lambda t: t.relations != "prototypes", "without relations=prototypes",
    ),
)  # fmt: skip


def find_no_effect(run: Run) -> list[str]:
    """One line for each changed setting that the run does not read, and for parts that never learn anything."""
    settings = run.settings
    return [*_of_tables(settings), *_of_data(settings), *_of_views(run), *_of_model(run), *_of_steps(settings)]


def _of_tables(settings: Settings) -> Iterator[str]:
    for path, names, unread, reason in UNREAD:
        table: Section | None = settings  # type: ignore[assignment]
        for part in path.split("."):
            table = getattr(table, part)
        if table is None or not unread(table):
            continue
        for name in names:
            if getattr(table, name) != type(table).model_fields[name].default:
                yield f"{path}.{name} has no effect {reason}"


def _of_data(settings: Settings) -> Iterator[str]:
    if not settings.data.source and settings.objectives.source not in (None, SupervisedCrossEntropy()):
        yield "the settings of objectives.source have no effect without data.source"
    if settings.data.labelled is None and settings.objectives.labelled not in (None, SupervisedCrossEntropy()):
        yield "the settings of objectives.labelled have no effect without data.labelled"


def _of_views(run: Run) -> Iterator[str]:
    settings = run.settings
    if settings.masking != Masking() and not run.views_read & {"masked", "second masked"}:
        yield "the settings of masking have no effect: no objective reads masked images"
    if settings.mixing.tail and "mixed" not in run.views_read:
        yield "mixing.tail has no effect: no objective reads mixed images"
    if settings.model.teacher and not run.views_read - WITHOUT_TEACHER:
        yield "model.teacher has no effect: no objective asks for labels of target images"


def _of_model(run: Run) -> Iterator[str]:
    model = run.settings.model
    head = "model.deeplab" if model.deeplab else "model.pyramid" if model.pyramid else ""
    if head and model.decoder != Decoder():
        yield f"the settings of model.decoder have no effect with {head}"
    if model.deeplab and model.pyramid:
        yield "model.pyramid has no effect with model.deeplab"
    if run.settings.objectives.clustering and "head" in model.freeze:
        yield "model.freeze keeps the classifier from learning, which objectives.clustering plays against"
    if model.weights is False and not model.start:
        if "encoder" in model.freeze:
            yield "the encoder keeps its random weights (model.freeze); set model.weights or model.start"
        elif model.freeze_batch_norm and any(isinstance(m, _BatchNorm) for m in run.student.encoder.modules()):
            what = "batch norms of a random encoder keep mean 0 and variance 1 (model.freeze_batch_norm)"
            yield f"{what}; set model.freeze_batch_norm=false, or model.weights or model.start"


def _of_steps(settings: Settings) -> Iterator[str]:
    training, uncertain_from = settings.training, settings.mixing.uncertain_detail_from
    if uncertain_from is not None and not settings.model.multires:
        yield "mixing.uncertain_detail_from has no effect without model.multires"
    elif uncertain_from is not None and uncertain_from >= training.steps:
        yield f"the run ends before step {uncertain_from} (mixing.uncertain_detail_from)"
    for name, objective in settings.objectives:
        if objective and objective.start >= training.steps:
            yield f"the run ends before step {objective.start} (objectives.{name}.start)"
    if training.micro_batch and training.micro_batch >= settings.data.batch_size:
        yield "training.micro_batch has no effect: a batch is no larger"
