"""Confusion counts, IoU, protocols. K classes, H W pixels."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluda_cli.data.labels import CAMVID, CITYSCAPES, PROTOCOLS, ClassTable, LabelClass
from cluda_cli.inference import metrics
from cluda_cli.inference.metrics import Confusion, Scores, count_values

CITY = ClassTable(CITYSCAPES)
SYNTHIA_SEEN = tuple(name for name in CITY.names if name not in {"terrain", "truck", "train"})


@pytest.mark.reference
@pytest.mark.parametrize("at_once", [True, False])
def test_equal_to_the_reference(golden: Callable[[str], Any], at_once: bool) -> None:
    tensors, description = golden("11_metrics/all_classes")
    confusion = Confusion(19)
    pairs = [(tensors["in.pred"], tensors["in.gt"])]
    for prediction, label in pairs if at_once else zip(*pairs[0], strict=True):
        confusion.update(prediction, label)
    assert confusion.counts.dtype == torch.int64
    assert torch.equal(confusion.counts, tensors["out.confusion"])
    torch.testing.assert_close(confusion.iou, tensors["out.IoU"], rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(confusion.accuracy, tensors["out.Acc"], rtol=0, atol=1e-6, equal_nan=True)
    assert confusion.pixel_accuracy == pytest.approx(tensors["out.aAcc"].item(), abs=1e-6)
    scores = Scores(CITY, CITY.names, CITY.names, confusion, 4)
    assert scores.miou == pytest.approx(100 * description["settings"]["mIoU"], abs=1e-4)
    assert scores.mean_accuracy == pytest.approx(100 * description["settings"]["mAcc"], abs=1e-4)
    reported = description["settings"]["reported_percent"]
    assert round(scores.miou, 2) == reported["IoU"] and round(scores.pixel_accuracy, 2) == reported["aAcc"]


def test_ignored_pixels_do_not_count_and_absent_classes_are_nan() -> None:
    confusion = Confusion(4)
    confusion.update(torch.tensor([0, 0, 1, 2, 0], dtype=torch.uint8), torch.tensor([0, 255, 0, 0, 255]))
    assert confusion.counts.tolist() == [[1, 1, 1, 0], [0] * 4, [0] * 4, [0] * 4]
    iou, accuracy = confusion.iou.tolist(), confusion.accuracy.tolist()
    assert iou[:3] == [pytest.approx(1 / 3), 0, 0] and math.isnan(iou[3])  # predicted only: 0; neither: none
    assert accuracy[0] == pytest.approx(1 / 3) and all(map(math.isnan, accuracy[1:]))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
@pytest.mark.parametrize("classes", [3, 200])
def test_counts_are_those_of_the_plain_loop(kind: torch.dtype, classes: int) -> None:
    draw = torch.Generator().manual_seed(0)
    label, prediction = (torch.randint(0, classes, (2, 9, 11), generator=draw).to(kind) for _ in range(2))
    label[0, :3] = 255
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    for row, column in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if row != 255:
            expected[row, column] += 1
    confusion = Confusion(classes)
    for _ in range(2):
        confusion.update(prediction, label)
    assert torch.equal(confusion.counts, 2 * expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_counts_the_same_without_being_waited_for() -> None:
    values = torch.randint(0, 90, (50, 60), generator=torch.Generator().manual_seed(0))
    on_gpu = values.int().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = count_values(on_gpu, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), count_values(values, 100))


def test_counts_stay_exact_where_float32_would_not() -> None:
    confusion = Confusion(2)
    confusion.counts[0, 0] = 2**24  # float32 cannot add 1 to this
    confusion.update(torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8))
    assert confusion.counts[0, 0] == 2**24 + 1


def test_predictions_of_further_classes_are_errors_of_the_labelled_class() -> None:
    confusion = Confusion(2, 4)
    confusion.update(torch.tensor([0, 3, 2, 1]), torch.tensor([0, 0, 1, 1]))
    assert confusion.iou.tolist() == [0.5, 0.5]
    assert confusion.pixel_accuracy == 0.5


def scores_of(
    iou: dict[str, float], seen: tuple[str, ...] = CITY.names, defined: tuple[str, ...] = CITY.names
) -> Scores:
    """Scores in which class c has the given IoU: that share of 100 labelled pixels is right, the rest is lost.

    What is lost goes to a further column, so that no other class is touched.
    """
    confusion = Confusion(19, 20)
    for name, value in iou.items():
        i = CITY.names.index(name)
        confusion.counts[i, i], confusion.counts[i, 19] = round(100 * value), 100 - round(100 * value)
    return Scores(CITY, seen, defined, confusion, 1)


def test_synthia_protocols_average_exactly_their_classes() -> None:
    # DAFormer's published SYNTHIA -> Cityscapes row: 60.9 over 16 classes, 67.4 over 13.
    values = [84.5, 40.7, 88.4, 41.5, 6.5, 50.0, 55.0, 54.6, 86.0, 89.8, 73.2, 48.2, 87.2, 53.2, 53.9, 61.7]
    iou = {name: value / 100 for name, value in zip(PROTOCOLS["16"], values, strict=True)}
    unseen = {"terrain": 0.0, "truck": 0.0, "train": 0.0}  # in the labels, never predicted
    scores = scores_of(iou | unseen, SYNTHIA_SEEN)
    protocols = scores.protocols()
    rounded = [round(value) for value in values]  # the counts above are whole percents
    assert protocols["16"]["miou"] == pytest.approx(sum(rounded) / 16, abs=0.05)
    assert protocols["16"]["miou"] == pytest.approx(60.9, abs=0.2)
    assert protocols["13"]["miou"] == pytest.approx(67.4, abs=0.2)
    assert protocols["all"]["miou"] == protocols["16"]["miou"] == round(scores.miou, 2)
    assert protocols["all"]["miou_all_classes"] == pytest.approx(protocols["16"]["miou"] * 16 / 19, abs=0.01)
    assert scores.target_private == ("terrain", "truck", "train")
    for protocol in protocols.values():
        assert list(protocol["iou"]) == list(CITY.names)
        assert all(protocol["iou"][name] is None for name in unseen)  # never 0
    left_out = {name for name, value in protocols["13"]["iou"].items() if value is None}
    assert left_out == {*unseen, "wall", "fence", "pole"}


def test_class_of_a_protocol_counts_there_even_if_the_source_lacked_it() -> None:
    seen = tuple(name for name in SYNTHIA_SEEN if name != "bus")
    protocols = scores_of(dict.fromkeys(SYNTHIA_SEEN, 1.0) | {"bus": 0.0}, seen).protocols()
    assert protocols["16"]["miou"] == 93.75 and protocols["16"]["iou"]["bus"] == 0
    assert protocols["all"]["miou"] == 100 and protocols["all"]["iou"]["bus"] is None


def test_absent_class_is_left_out_of_every_mean() -> None:
    scores = scores_of({"road": 1.0, "sky": 0.5})
    assert scores.miou == 75
    protocols = scores.protocols()
    assert [protocols[name]["miou"] for name in ("all", "16", "13")] == [75, 75, 75]
    assert protocols["all"]["iou"]["train"] is None
    assert math.isnan(scores.iou_by_name()["train"])


def test_class_that_the_labels_cannot_have_is_not_scored() -> None:
    scores = scores_of({"road": 1.0, "sky": 0.5}, defined=("road", "sky"))
    scores.confusion.counts[0, 11] = 100  # road taken for person
    assert scores.miou == 50  # road 50, sky 50; person has no IoU, though it was predicted
    assert scores.protocols()["all"]["iou"]["person"] is None


def hand_counted() -> Scores:
    """The source shows road and car and lists rider, the target also has bicyclist, and no car is predicted."""
    table = ClassTable(tuple(LabelClass(name, (0, 0, 0), 0) for name in ("road", "car", "rider")))
    confusion = Confusion(4)  # road, car, rider, bicyclist
    confusion.counts = torch.tensor([[6, 0, 2, 0], [4, 0, 0, 0], [1, 0, 1, 0], [3, 0, 0, 0]])
    return Scores(table, ("road", "car"), ("road", "car", "rider", "bicyclist"), confusion, 1)


def test_pixels_of_classes_that_the_source_never_shows_are_errors_or_left_out() -> None:
    scores = hand_counted()
    assert scores.target_private == ("rider", "bicyclist") and scores.common_pixels == 12
    # road: 6 right, 2 missed, and 4 cars, 1 rider, 3 bicyclists taken for it; car: none right
    assert scores.miou == pytest.approx(100 * (6 / 16 + 0) / 2)
    assert scores.miou_common_pixels == pytest.approx(100 * (6 / 12 + 0) / 2)  # without riders and bicyclists
    everything = scores.protocols()["all"]
    assert (everything["miou"], everything["miou_common_pixels"]) == (18.75, 25.0)
    rider = 1 / (2 + 3 - 1)
    assert everything["miou_all_classes"] == pytest.approx(100 * (6 / 16 + 0 + rider + 0) / 4, abs=0.006)
    assert everything["iou"] == {"road": 37.5, "car": 0.0, "rider": None}
    assert scores.iou_by_name() == {"road": 37.5, "car": 0.0, "rider": 25.0}


def test_both_means_are_equal_where_the_source_shows_every_class() -> None:
    scores = replace(hand_counted(), seen=("road", "car", "rider", "bicyclist"))
    assert scores.target_private == () and scores.miou == scores.miou_common_pixels


def test_a_common_class_that_is_labelled_but_never_predicted_is_named() -> None:
    assert hand_counted().never_predicted == ("car",)  # the source does not show bicyclist
    scores = hand_counted()
    scores.confusion.counts[1, 0] = 0
    assert scores.never_predicted == ()  # no pixel is labelled car


def test_pixels_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    label, prediction = (torch.randint(0, 4, (7, 11), generator=draw).to(torch.uint8) for _ in range(2))
    whole, parts = Confusion(4), Confusion(4)
    whole.update(prediction, label)
    monkeypatch.setattr(metrics, "PIXELS_AT_ONCE", 10)
    sizes = []
    monkeypatch.setattr(metrics, "count_values", lambda v, bins: sizes.append(len(v)) or count_values(v, bins))
    parts.update(prediction, label)
    assert torch.equal(whole.counts, parts.counts) and sizes == [10] * 7 + [7]


def test_other_classes_have_no_protocols_and_nothing_scored_is_none() -> None:
    table = ClassTable(CAMVID)
    scores = Scores(table, table.names, table.names, Confusion(len(table)), 0)
    protocols = scores.protocols()
    assert list(protocols) == ["all"]
    assert protocols["all"]["miou"] is None and math.isnan(scores.miou)
    json.dumps(protocols, allow_nan=False)
