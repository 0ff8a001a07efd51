"""What follows from the student's confidence: weights, laws, pastes; in steps of tiny runs."""

from dataclasses import replace

import pytest
import torch

from cluda_cli import presets
from cluda_cli.adaptation.views import Scene
from cluda_cli.data.datasets import open_datasets
from cluda_cli.data.streams import LOOKAHEAD, batches
from cluda_cli.distributed import collectives
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import _make_view, training_step
from cluda_cli.errors import SettingsError

CPU = torch.device("cpu")
FEW = {"data": {"source": False, "target": "clean", "labelled": 2}}
OFF = {"mixed": False, "feature_distance": False, "pixel_contrast": False}
PASTES = {"cutmix": True, "copy_paste": True, "slots": 3}


def start(tiny_settings, balance=True, **changes):
    """A run and its batches; without labels of the target unless told."""
    tree = presets.merge({"objectives": {"adaptive_balance": balance, "feature_distance": False}}, changes)
    chosen = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), tree))
    found = open_datasets(chosen.data, chosen.training.seed)
    run = Run(chosen, found.sources, CPU, labelled=found.labelled)
    stream = batches(
        found.sources, found.unlabelled, chosen.data, 0, 0, 99, labelled=found.labelled, source_law=run.source_law
    )
    return run, stream


def make(run, name, batch, step=0):
    return _make_view(run, name, Scene(batch, run.teacher, 0, step), [run.objectives["adaptive_balance"]])


def test_the_weights_replace_that_of_the_image_and_ground_truth_keeps_its_own(tiny_settings):
    run, stream = start(tiny_settings, {"keep_exponent": 0}, teacher={"confidence": 0.0})
    batch = next(stream)
    view = make(run, "mixed", batch)
    pseudo = ~view.truth & (view.probability > 0)
    assert pseudo.any() and view.truth.any() and (view.weight[view.truth] == 1).all()
    assert view.weight[pseudo].mean() == pytest.approx(1, abs=1e-4)
    ratio = view.weight[pseudo] / view.probability[pseudo].square()
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    source = make(run, "source", batch)
    assert (source.weight == 1).all()


def test_confident_classes_lose_pixels_and_the_draws_follow_the_position(tiny_settings):
    run, stream = start(tiny_settings, {"confidence_exponent": 0})
    balance, batch = run.objectives["adaptive_balance"], next(stream)
    balance.seen.fill_(True)
    balance.confidence.copy_(torch.tensor([0.0, 0.5, 0.75, 1.0, 1.0]))
    scene = Scene(batch, run.teacher, 0, 0)
    view = run.makers["target"](scene)
    label = torch.arange(5).repeat(view.label.shape[1] * view.label.shape[2] // 5 + 1)[: view.label[0].numel()]
    view = replace(view, name="target", label=label.view(1, *view.label.shape[1:]).repeat(2, 1, 1))
    view = replace(view, probability=torch.ones_like(view.probability))
    kept = balance.edit(view, scene).weight > 0
    shares = [kept[view.label == k].float().mean().item() for k in range(5)]
    assert shares[0] == 1 and shares[3:] == [0, 0]
    assert shares[1] == pytest.approx(0.5, abs=0.1) and shares[2] == pytest.approx(0.25, abs=0.1)
    second = replace(
        view, **{name: getattr(view, name)[1:] for name in ("image", "label", "weight", "probability", "truth")}
    )
    other = Scene({name: crops.select(torch.tensor([1])) for name, crops in batch.items()}, run.teacher, 0, 0, first=1)
    assert torch.equal(balance.edit(second, other).weight[0] > 0, kept[1])


def test_confidence_is_the_students_probability_of_what_the_view_labels(tiny_settings):
    run, stream = start(tiny_settings, {"confidence_from": "mixed"})
    balance = run.objectives["adaptive_balance"]
    result = training_step(run, next(stream))
    (view,) = [view for view in result.views if view.name == "mixed"]
    present = set(view.label[~view.truth & (view.probability > 0) & (view.label != 255)].tolist())
    assert set(balance.seen.nonzero().flatten().tolist()) == present
    assert ((balance.confidence > 0) == balance.seen).all() and (balance.confidence < 1).all()


@pytest.mark.parametrize(
    ("changes", "view"),
    [
        ({}, "mixed"),
        ({"objectives": {"mixed": False}}, "source"),
        ({"data": {"target": "clean", "labelled": 2}}, "labelled"),
        (presets.merge(FEW, {"objectives": {"adaptive_balance": {"copy_paste": True}}}), "pasted"),
    ],
)
def test_confidence_comes_from_the_best_labels_that_are_learned_from(tiny_settings, changes, view):
    run, _ = start(tiny_settings, {}, **changes)
    assert run.objectives["adaptive_balance"].confidence_from == view


def test_a_view_that_nobody_reads_gives_no_confidence(tiny_settings):
    with pytest.raises(SettingsError, match=r"adaptive_balance\.confidence_from: no objective reads the view mixed"):
        start(tiny_settings, {"confidence_from": "mixed"}, objectives={"mixed": False})


def test_a_law_is_as_old_as_the_loader_works_ahead_and_the_same_after_a_resume(tiny_settings):
    run, _ = start(tiny_settings, {"law_temperature": 0.1})
    balance = run.objectives["adaptive_balance"]
    scene = Scene({}, run.teacher, 0, 0)
    asked = {}
    for step in range(3 * LOOKAHEAD):
        asked[step + LOOKAHEAD] = balance.source_law(step + LOOKAHEAD)  # as far ahead as possible
        assert balance.source_law(step) == asked.get(step)  # after a resume
        balance.confidence.copy_(torch.tensor([step / 100, 0.9, 0.9, 0.9, 0.9]))
        scene.step = step
        balance.update(scene, [])
    assert asked[2 * LOOKAHEAD - 1] is None
    first, second = asked[2 * LOOKAHEAD], asked[3 * LOOKAHEAD]
    assert asked[3 * LOOKAHEAD - 1] == first != second
    expected = ((1 - torch.tensor([0.19, 0.9, 0.9, 0.9, 0.9])) / 0.1).softmax(0)
    torch.testing.assert_close(torch.tensor(first), expected)
    off, _ = start(tiny_settings, {"law_temperature": False})
    off.objectives["adaptive_balance"].load_state_dict(balance.state_dict())
    assert off.objectives["adaptive_balance"].source_law(3 * LOOKAHEAD) is None


def test_an_earlier_target_image_is_pasted_where_it_shows_a_drawn_class(tiny_settings):
    run, stream = start(tiny_settings, PASTES | {"image_area": 1e-3, "box_area": 0.0}, **FEW | {"objectives": OFF})
    balance, first, second = run.objectives["adaptive_balance"], next(stream), next(stream)
    plain = make(run, "cutmix", first)
    assert torch.equal(plain.image, Scene(first, run.teacher, 0, 0).target.image)  # nothing is remembered yet
    result = training_step(run, first)
    assert set(result.terms) == {"pasted/labelled", "cutmix/adaptive_balance"}
    assert (balance.memory.age >= 0).sum() == 2 and balance.memory.contains.any()
    assert torch.equal(balance.memory.image[:2], first["target"].image)
    scene = Scene(second, run.teacher, 0, 1)
    view, target = run.makers["cutmix"](scene), scene.target
    changed = (view.image != target.image).any(1)
    for i in range(2):
        earlier = scene.normalise(balance.memory.recall(balance.recalled[0]))[i]
        rows, columns = changed[i].nonzero().unbind(1)
        box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
        assert torch.equal(view.image[i][:, *box], earlier[:, *box])
    before = balance.memory.contains.clone()
    balance.memory.contains[:, balance.recalled[0]] = True
    balance.update(scene, [])
    assert balance.recalled == [] and not torch.equal(balance.memory.contains, before)


def test_pasted_classes_are_those_of_the_next_labelled_image(tiny_settings):
    everything = PASTES | {"paste_probability": 1.0, "paste_classes": 40, "paste_scale": [1.0, 1.0]}
    run, stream = start(tiny_settings, everything, **FEW)
    batch = next(stream)
    view, shown = make(run, "pasted", batch), Scene(batch, run.teacher, 0, 0).labelled
    label = shown.label.flip(0).where(shown.label.flip(0) != 255, shown.label)  # of two images, the other is the next
    assert torch.equal(view.label, label) and view.truth.all() and (view.weight == 1).all()
    pasted = (shown.label.flip(0) != 255)[:, None].expand_as(shown.image)
    torch.testing.assert_close(view.image[pasted], shown.image.flip(0)[pasted], atol=1e-5, rtol=0)
    assert torch.equal(view.image[~pasted], shown.image[~pasted])
    never, _ = start(tiny_settings, PASTES | {"paste_probability": 0.0}, **FEW)
    assert torch.equal(make(never, "pasted", batch).image, shown.image)


def test_excluded_classes_are_not_pasted(tiny_settings):
    names = ["road", "building", "sky", "person"]
    run, stream = start(tiny_settings, PASTES | {"paste_probability": 1.0, "exclude_classes": names}, **FEW)
    batch = next(stream)
    view, shown = make(run, "pasted", batch), Scene(batch, run.teacher, 0, 0).labelled
    assert (view.label[view.label != shown.label] == run.classes.names.index("car")).all()
    for wrong, message in ((["rod"], 'no class "rod" -> did you mean road'), ([*names, "car"], "leaves no class")):
        with pytest.raises(SettingsError, match=message):
            start(tiny_settings, PASTES | {"exclude_classes": wrong}, **FEW)


def test_micro_batches_measure_what_the_batch_does(tiny_settings):
    found = []
    for size in (False, 1):
        run, stream = start(
            tiny_settings,
            {},
            training={"micro_batch": size},
            model={"freeze_batch_norm": True, "decoder": {"dropout": 0.0}, "drop_path": 0.0},
        )
        run.student.decoder.eval()
        training_step(run, next(stream))
        found.append(run.objectives["adaptive_balance"].seen)
    assert torch.equal(*found)


def test_copy_paste_needs_labelled_images(tiny_settings):
    with pytest.raises(SettingsError, match="copy_paste needs data.labelled"):
        start(tiny_settings, {"copy_paste": True})


def test_statistics_and_memory_are_those_of_all_ranks(tiny_settings, monkeypatch):
    """Each rank sees what the other one does: sums double, and the memory holds the images of both."""
    run, stream = start(tiny_settings, PASTES | {"slots": 4}, **FEW)
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda tensor: 2 * tensor)
    monkeypatch.setattr(collectives, "all_gather_rows", lambda rows: torch.cat([rows, rows]))
    balance, batch = run.objectives["adaptive_balance"], next(stream)
    balance.update(Scene(batch, run.teacher, 0, 0), [])
    assert torch.equal(balance.memory.image, torch.cat([batch["target"].image] * 2))
