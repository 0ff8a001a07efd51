"""Scores over the labelled images of a split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluda_cli.data.index import Index, find
from cluda_cli.data.labels import IGNORE, ClassTable, LabelClass
from cluda_cli.data.transforms import read_image, read_label
from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.inference import scoring
from cluda_cli.inference.metrics import Confusion, Scores
from cluda_cli.inference.scoring import compare_classes, score
from cluda_cli.inference.sliding import image_logits
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.settings import Decoder, Evaluation, Model

BOX = (32, 64)
UNICORN = LabelClass("unicorn", (1, 2, 3), 0)


@pytest.fixture
def index(tiny_data: Path) -> Index:
    """Five classes; its val split has two labelled images of 48 x 80."""
    return find("noisy", tiny_data)


def make_network(num_classes: int = 5) -> Segmenter:
    """Random, with predictions of several classes."""
    torch.manual_seed(0)
    model = Model(encoder="mobilenetv2_050", weights=False, decoder=Decoder(embed_dim=8, channels=8))
    network = Segmenter(model, num_classes)
    torch.nn.init.normal_(network.decoder.conv_seg.weight, std=20)
    return network


def score_val(network: Segmenter, index: Index, classes: ClassTable, **options: Any) -> Scores:
    arguments = {"split": "val", "seen": classes.names, "box": BOX, "evaluation": Evaluation()} | options
    return score(network, index, classes=classes, device=torch.device("cpu"), **arguments)


def count_plainly(network: Segmenter, index: Index, table: list[int], size: int = 5) -> torch.Tensor:
    """Confusion counts image by image; `table` maps train ids of the dataset to positions among the joint classes."""
    confusion = Confusion(size)
    lookup = torch.tensor([*table, *[IGNORE] * (256 - len(table))])
    for item in index.labelled("val"):
        prediction = image_logits(network, read_image(index.image_path(item)), BOX, Evaluation()).argmax(0)
        confusion.update(prediction, lookup[read_label(index.label_path(item)).long()])
    assert (confusion.counts.sum(0) > 0).sum() > 2  # the network is not trivial
    return confusion.counts


def test_counts_are_those_of_each_image_and_the_modes_are_kept(index: Index) -> None:
    network = make_network().train()
    scores = score_val(network, index, index.classes, seen=("road", "sky"))
    assert network.training and scores.images == 2 and scores.seen == ("road", "sky")
    assert torch.equal(scores.confusion.counts, count_plainly(network, index, [0, 1, 2, 3, 4]))
    assert 0 <= scores.miou <= 100 and list(scores.iou_by_name()) == list(index.classes.names)


def test_labels_are_matched_by_name(index: Index) -> None:
    classes = ClassTable((UNICORN, *reversed(index.classes.classes[1:])))  # without road, in another order
    network = make_network()
    scores = score_val(network, index, classes)
    assert scores.names == (*classes.names, "road") and scores.defined == index.classes.names
    assert torch.equal(scores.confusion.counts, count_plainly(network, index, [5, 4, 3, 2, 1], size=6))
    assert not scores.confusion.counts[0].any()


def test_pixels_of_a_class_that_only_the_dataset_has_are_errors_of_the_classes_that_take_them(index: Index) -> None:
    known = score_val(make_network(), index, index.classes, seen=index.classes.names[1:])  # listed, but never shown
    classes = ClassTable((UNICORN, *index.classes.classes[1:]))  # not even listed
    unknown = score_val(make_network(), index, classes)
    road = int(known.confusion.counts[0].sum())
    assert road > 0 and int(unknown.confusion.counts[5].sum()) == road
    assert known.target_private == unknown.target_private == ("road",)
    wanted = index.classes.names[1:]
    for counts in (known.confusion.counts, unknown.confusion.counts[[5, 1, 2, 3, 4]][:, :5]):
        right, taken = counts.diagonal()[1:].double(), counts[:, 1:5].sum(0)
        expected = 100 * right / (counts[1:].sum(1) + taken - right)
        without = 100 * right / (counts[1:].sum(1) + counts[1:, 1:5].sum(0) - right)
        for scores in (known, unknown):
            found = [scores.iou_by_name()[name] for name in wanted]
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)
            assert scores.miou == pytest.approx(expected.mean().item())
            assert scores.miou_common_pixels == pytest.approx(without.mean().item()) != scores.miou


def test_many_classes_on_both_sides_fit(index: Index) -> None:
    """250 of the network and five others: more than 8 bits hold."""
    names = [f"class {i}" for i in range(249)]
    classes = ClassTable((*(LabelClass(name, (0, 0, 0), 0) for name in names), index.classes.classes[0]))
    scores = score_val(make_network(250), index, classes)
    assert scores.confusion.counts.shape == (254, 254) and scores.target_private == index.classes.names[1:]
    assert int(scores.confusion.counts[:249].sum()) == 0 and int(scores.confusion.counts[249].sum()) > 0


def test_a_split_without_labels_is_a_data_error(index: Index) -> None:
    with pytest.raises(DataError, match='the 4 images of split "train" have no labels'):
        score_val(make_network(), index, index.classes, split="train")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full((48, 79), 3), "label is 48 x 79 pixels, its image 48 x 80"),
        (np.full((48, 80), 5), r"label holds 5; train ids are 0\.\.4 and 255"),
        (np.full((48, 80), 254), "label holds 254"),
    ],
)
def test_a_label_that_does_not_fit_is_named(index: Index, label: np.ndarray, message: str) -> None:
    path = index.label_path(index.labelled("val")[1])
    Image.fromarray(label.astype(np.uint8)).save(path)
    with pytest.raises(DataError, match=message) as caught:
        score_val(make_network(), index, index.classes)
    assert caught.value.where == str(path) and caught.value.exit_code == 3


@pytest.mark.parametrize("function", ["read_image", "fit_image"])
def test_memory_that_runs_out_names_the_image(index: Index, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def exhaust(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(scoring, function, exhaust)
    with pytest.raises(EnvironmentProblem, match="memory ran out on 48 x 80 pixels") as caught:
        score_val(make_network(), index, index.classes)
    assert caught.value.where == str(index.image_path(index.labelled("val")[0])) and caught.value.exit_code == 4


def test_memory_that_runs_out_in_the_network_names_the_image(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network()
    monkeypatch.setattr(Segmenter, "forward", lambda *_: torch.empty(2**55))
    with pytest.raises(EnvironmentProblem, match="memory ran out on 48 x 80 pixels"):
        score_val(network, index, index.classes)


def test_classes_of_one_side_are_named(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    compare_classes(index.classes, index.classes)
    assert capsys.readouterr().err == ""
    compare_classes(ClassTable((*index.classes.classes[:2], UNICORN)), index.classes)
    unknown, unscored = capsys.readouterr().err.splitlines()
    assert unknown == "warning: only the dataset has these classes, so the network can only err on them: unicorn"
    assert unscored == "warning: only the network has these classes, so they are not scored: sky, person, car"


def test_one_common_class_gives_a_perfect_score_for_nothing(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    compare_classes(ClassTable((index.classes.classes[1], UNICORN)), index.classes)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "warning: only building is scored: a network that predicts it everywhere would have an IoU of 100"


def test_no_common_class_is_a_data_error(index: Index) -> None:
    with pytest.raises(DataError, match="no class name in common"):
        compare_classes(ClassTable((UNICORN,)), index.classes)
