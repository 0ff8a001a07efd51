"""What a run says of settings that it does not read, and of parts that stay random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluda_cli import presets
from cluda_cli.commands.no_effect import UNREAD, find_no_effect
from cluda_cli.commands.train import train
from cluda_cli.data.index import find
from cluda_cli.engine.run import Run
from cluda_cli.settings import Settings

Say = Callable[[dict[str, Any]], str]
TARGET_ONLY = {"source": False, "mixed": False, "feature_distance": False, "pixel_contrast": False}
PRETRAINED = {"objectives": TARGET_ONLY | {"local_contrast": {"region": 2}}, "model": {"weights": False}}


@pytest.fixture
def change(tiny_settings: Settings) -> Callable[[dict[str, Any]], Settings]:
    return lambda tree: presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), tree))


@pytest.fixture
def say(change: Callable[[dict[str, Any]], Settings]) -> Say:
    """All lines of a run with the settings."""

    def begin(tree: dict[str, Any]) -> str:
        settings = change(tree)
        return "\n".join(find_no_effect(Run(settings, [find("clean", settings.data.root)], torch.device("cpu"))))

    return begin


def test_nothing_is_said_of_defaults(say: Say) -> None:
    assert say({}) == ""


def test_an_objective_that_the_run_never_reaches_is_announced(say: Say) -> None:
    said = say({"objectives": {"memory_contrast": {}, "mixed": {"start": 5}}})
    assert said == "the run ends before step 3000 (objectives.memory_contrast.start)"


@pytest.mark.parametrize(
    ("table", "changed", "read", "unread"),
    [
        ("prototype_contrast", {"running": "average", "momentum": 0.9}, {}, {"statistics": "bank"}),
        ("prototype_contrast", {"momentum": 0.9}, {"running": "average"}, {}),
        ("prototype_contrast", {"projection_channels": 16}, {}, {"features": "fused"}),
        ("prototype_contrast", {"bank_length": 9}, {"statistics": "bank"}, {}),
        ("memory_contrast", {"hardest": 9}, {"mixed_pairs": 0}, {"mixed_pairs": 0, "mixed_queries": 0}),
    ],
)
def test_settings_of_another_variant_are_named(
    say: Say, table: str, changed: dict[str, Any], read: dict[str, Any], unread: dict[str, Any]
) -> None:
    for variant, names in ((read, set()), (unread, set(changed))):
        lines = say({"objectives": {table: {"start": 0} | changed | variant}}).splitlines()
        assert {line.partition(" has no effect")[0] for line in lines} == {f"objectives.{table}.{n}" for n in names}


@pytest.mark.parametrize(("relations", "read"), [("soft", 0), ("neighbours", 1), ("prototypes", 2)])
def test_each_kind_of_relations_reads_its_own_settings(change: Any, relations: str, read: int) -> None:
    own = [{"teacher_temperature"}, {"neighbours"}, {"prototypes", "prototype_momentum"}]
    section = change({"objectives": {"relation_distillation": {"relations": relations}}}).objectives
    rows = [row for row in UNREAD if row.table == "objectives.relation_distillation"]
    unread = {name for row in rows if row.unread(section.relation_distillation) for name in row.names}
    assert unread == set().union(*(names for i, names in enumerate(own) if i != read))


def test_importance_is_what_reads_the_cap(say: Say) -> None:
    masked, changed = {"objectives": {"masked": {}}}, {"cap": 0.5, "hide_important": True}
    said = say(masked | {"masking": changed})
    assert "masking.cap has no effect" in said and "masking.hide_important has no effect" in said
    assert say(masked | {"masking": changed | {"importance": "boundary"}}) == ""


def test_what_views_are_made_of_counts_if_any_objective_reads_them(say: Say) -> None:
    tail, ratio = {"mixing": {"tail": {"share": 1.0}}}, {"masking": {"ratio": 0.5}}
    plain = TARGET_ONLY | {"source": {}}
    none = say({"objectives": plain} | tail | ratio).splitlines()
    assert [line.partition(":")[0] for line in none] == [
        "the settings of masking have no effect", "mixing.tail has no effect",
    ]  # fmt: skip
    readers = {"locally_adaptive": {"views": ["mixed"]}, "node_contrast": {}}
    assert say({"objectives": plain | readers} | tail | ratio) == ""
    weightless = {"locally_adaptive": {"views": ["mixed"], "weight": 0}, "node_contrast": {"weight": 0}}
    assert say({"objectives": plain | weightless} | tail | ratio).splitlines() == none


def test_a_frozen_random_encoder_is_announced(say: Say) -> None:
    assert "encoder keeps its random weights" in say(presets.merge(PRETRAINED, {"model": {"freeze": ["encoder"]}}))
    assert "keep mean 0 and variance 1" in say(presets.merge(PRETRAINED, {"model": {"freeze_batch_norm": True}}))
    assert say(PRETRAINED) == ""
    assert say({"model": {"freeze_batch_norm": True, "freeze": ["encoder"]}}) == ""


def test_a_frozen_classifier_does_not_play(say: Say) -> None:
    clustered = {"objectives": {"clustering": {}}}
    assert "classifier" in say(clustered | {"model": {"freeze": ["head"]}})
    assert say(clustered) == ""


def test_a_teacher_that_is_not_asked_is_not_announced(change: Any, tmp_path: Path, capsys: Any) -> None:
    short = {"training": {"steps": 1}, "objectives": TARGET_ONLY | {"source": {}}}
    train(change(short), tmp_path / "first")
    taught = presets.merge(short, {"model": {"teacher": str(tmp_path / "first" / "last.safetensors")}})
    for objectives, asked in (({}, False), ({"mixed": {}}, True)):
        capsys.readouterr()
        train(change(presets.merge(taught, {"objectives": objectives})), tmp_path / f"second {asked}")
        said = capsys.readouterr().err
        assert ("labels come from" in said) == asked != ("model.teacher has no effect" in said)
