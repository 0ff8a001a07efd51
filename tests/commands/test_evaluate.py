"""The verb `eval` on datasets of a few small images."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluda_cli.commands.evaluate import evaluate
from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import CITYSCAPES, IGNORE, ClassTable, LabelClass
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import DataError
from cluda_cli.inference.metrics import Confusion, round_percent
from cluda_cli.inference.sliding import image_logits
from cluda_cli.inference.weights_file import NetworkDescription, save_weights
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.settings import Data, Decoder, Evaluation, Model, Objectives, Settings

CITY = ClassTable(CITYSCAPES)
UNSEEN = ("terrain", "truck", "train")
SEEN = tuple(name for name in CITY.names if name not in UNSEEN)
SIZE = (40, 72)


@cache
def make_network(num_classes: int) -> Segmenter:
    """Random, but with predictions of many classes."""
    torch.manual_seed(0)
    network = Segmenter(
        Model(encoder="mobilenetv2_050", weights=False, decoder=Decoder(embed_dim=8, channels=8)), num_classes
    )
    torch.nn.init.normal_(network.decoder.conv_seg.weight, std=20)
    return network.eval()


def make_dataset(root: Path, classes: ClassTable, *, ids: list[int] | None = None, name: str = "toy") -> Index:
    """Three labelled val images with the given train ids (all, when not given), and an unlabelled train image."""
    draw = np.random.default_rng(0)
    folder = root / "prepared" / name
    (folder / "labels" / "val").mkdir(parents=True)
    (root / name).mkdir(parents=True)
    items = []
    for i in range(4):
        blocks = draw.choice(ids or list(range(len(classes))), (5, 9)).repeat(8, axis=0).repeat(8, axis=1)
        image = draw.integers(0, 256, (5, 9, 3)).repeat(8, axis=0).repeat(8, axis=1)
        blocks[:4] = IGNORE
        Image.fromarray(image.astype(np.uint8)).save(root / name / f"{i}.png")
        Image.fromarray(blocks.astype(np.uint8)).save(folder / "labels" / "val" / f"{i}.png")
        items.append(Item(f"{i}.png", f"labels/val/{i}.png", SIZE))
    splits = {"val": tuple(items[:3]), "train": (Item("3.png", None, SIZE),)}
    index = Index(name, folder, root / name, classes, splits)
    index.save()
    return index


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A network with the Cityscapes classes whose source lacked three of them."""
    settings = Settings(
        data=Data(target="toy", root=tmp_path, target_box=(32, 64)),
        model=Model(encoder="mobilenetv2_050", weights=False, decoder=Decoder(embed_dim=8, channels=8)),
        objectives=Objectives(feature_distance=None),
    )
    path = tmp_path / "run" / "best.safetensors"
    description = NetworkDescription(settings=settings, classes=CITY, seen=SEEN, network_name="student", step=7)
    save_weights(path, make_network(19).state_dict(), description)
    return path


def counted(index: Index, box: tuple[int, int]) -> Confusion:
    """What `eval` must count on a dataset with the network's own classes, the long way."""
    confusion, network = Confusion(19), make_network(19)
    for item in index.labelled("val"):
        prediction = image_logits(network, read_image(index.image_path(item)), box, Evaluation()).argmax(0)
        confusion.update(prediction, torch.from_numpy(np.array(Image.open(index.label_path(item)))))
    assert (confusion.counts.sum(0) > 0).sum() > 2  # the network is not trivial
    return confusion


def test_json_has_exactly_the_documented_keys_and_exact_values(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = counted(make_dataset(tmp_path, CITY), (32, 64))
    evaluate(checkpoint, device="cpu", as_json=True)  # dataset, root, box: from the checkpoint
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "checkpoint", "dataset", "split", "images", "network", "protocols", "target_private", "pixel_accuracy",
        "mean_accuracy",
    ]  # fmt: skip
    assert [found[key] for key in ("checkpoint", "dataset", "split", "images", "network", "target_private")] == [
        str(checkpoint), "toy", "val", 3, "student", list(UNSEEN),
    ]  # fmt: skip
    protocols = found["protocols"]
    assert {name: set(value) for name, value in protocols.items()} == {
        "all": {"miou", "miou_common_pixels", "miou_all_classes", "iou"},
        "16": {"miou", "miou_common_pixels", "iou"},
        "13": {"miou", "miou_common_pixels", "iou"},
    }  # fmt: skip
    iou = expected.iou
    seen = torch.tensor([name in SEEN for name in CITY.names])
    assert protocols["all"]["iou"] == {
        name: round_percent(100 * value) if name in SEEN else None
        for name, value in zip(CITY.names, iou.tolist(), strict=True)
    }
    assert protocols["all"]["miou"] == round_percent(100 * iou[seen].nanmean().item()) == protocols["16"]["miou"]
    assert protocols["all"]["miou_all_classes"] == round_percent(100 * iou.nanmean().item())
    common = Confusion(19)
    common.counts += expected.counts * seen[:, None]
    without = round_percent(100 * common.iou[seen].nanmean().item())
    assert [protocols[name]["miou_common_pixels"] for name in ("all", "16")] == [without] * 2
    assert without != protocols["all"]["miou"] and protocols["13"]["miou_common_pixels"] != protocols["13"]["miou"]
    assert protocols["16"]["iou"]["train"] is None and protocols["13"]["iou"]["wall"] is None
    assert found["pixel_accuracy"] == round_percent(100 * expected.pixel_accuracy)
    assert found["mean_accuracy"] == round_percent(100 * expected.accuracy[seen].nanmean().item())


def test_table_shows_protocols_side_by_side(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    iou = counted(make_dataset(tmp_path, CITY), (32, 64)).iou
    evaluate(checkpoint, device="cpu")
    text = capsys.readouterr().out
    assert "toy val, 3 images, student network" in text
    rows = {
        line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in text.splitlines() if len(line.split()) > 3
    }
    assert rows["class"] == ["all", "16", "13"]
    road = f"{100 * iou[0].item():.2f}"
    wall = f"{100 * iou[3].item():.2f}"
    assert rows["road"] == [road] * 3
    assert rows["wall"] == [wall, wall, "-"]
    assert rows["traffic light"] and rows["train"] == ["-", "-", "-"]
    assert rows["mean IoU"][0] == rows["mean IoU"][1] == f"{100 * iou[[n in SEEN for n in CITY.names]].nanmean():.2f}"
    assert rows["mean IoU, common pixels"][0] == rows["mean IoU, common pixels"][1] != rows["mean IoU"][0]
    assert text.split("mean IoU, all classes")[1].split()[0] == f"{100 * iou.nanmean():.2f}"
    assert "target-private, never in the source: terrain, truck, train" in text
    assert "pixel accuracy" in text and "mean accuracy" in text


def test_classes_are_matched_by_name(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = make_dataset(tmp_path, CITY)
    reverse = ClassTable((LabelClass("unicorn", (1, 2, 3), 0), *reversed(CITYSCAPES)))  # one more, in other order
    table = np.array([*(19 - np.arange(19)), *[IGNORE] * 237], dtype=np.uint8)
    other = make_dataset(tmp_path, reverse, name="other")
    for mine, theirs in zip(own.labelled("val"), other.labelled("val"), strict=True):
        Image.fromarray(table[np.array(Image.open(own.label_path(mine)))]).save(other.label_path(theirs))
        Image.open(own.image_path(mine)).save(other.image_path(theirs))
    evaluate(checkpoint, device="cpu", as_json=True)
    first = json.loads(capsys.readouterr().out)
    evaluate(checkpoint, dataset="other", device="cpu", as_json=True)
    second, talk = capsys.readouterr()
    assert json.loads(second) == first | {"dataset": "other"}
    assert "unicorn" in talk


def test_classes_that_only_one_side_has_are_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("road", "sky", "car")
    few = ClassTable((*(c for c in CITYSCAPES if c.name in names), LabelClass("unicorn", (1, 2, 3), 0)))
    index = make_dataset(tmp_path, few)
    evaluate(checkpoint, device="cpu", as_json=True, confusion=tmp_path / "new" / "confusion.json")
    text, talk = capsys.readouterr()
    found = json.loads(text)
    scored = {name for name, value in found["protocols"]["all"]["iou"].items() if value is not None}
    assert scored == set(names)
    assert "unicorn" in talk and "not scored: sidewalk, building" in talk and found["target_private"] == ["unicorn"]
    matrix = json.loads((tmp_path / "new" / "confusion.json").read_text())
    assert matrix["classes"] == [*CITY.names, "unicorn"]
    labels = [np.array(Image.open(index.label_path(item))) for item in index.labelled("val")]
    labelled = sum(int((label != IGNORE).sum()) for label in labels)
    assert np.array(matrix["counts"]).shape == (20, 20) and np.sum(matrix["counts"]) == labelled
    rows = np.array(matrix["counts"]).sum(1)
    assert {matrix["classes"][i] for i in rows.nonzero()[0]} == {*names, "unicorn"}
    assert 0 < found["protocols"]["all"]["miou"] < found["protocols"]["all"]["miou_common_pixels"]


def test_other_class_tables_have_one_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = ClassTable(CITYSCAPES[:4])
    make_dataset(tmp_path, table)
    settings = Settings(
        data=Data(root=tmp_path),
        model=Model(encoder="mobilenetv2_050", weights=False, decoder=Decoder(embed_dim=8, channels=8)),
        objectives=Objectives(feature_distance=None),
    )
    path = tmp_path / "last.safetensors"
    description = NetworkDescription(settings=settings, classes=table, seen=table.names, network_name="teacher", step=1)
    save_weights(path, make_network(4).state_dict(), description)
    evaluate(path, dataset="toy", device="cpu", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert list(found["protocols"]) == ["all"] and found["target_private"] == [] and found["network"] == "teacher"
    assert found["protocols"]["all"]["miou"] == found["protocols"]["all"]["miou_common_pixels"]
    evaluate(path, dataset=str(tmp_path / "prepared" / "toy"), data_root=tmp_path / "nowhere", device="cpu")
    text = capsys.readouterr().out
    assert next(line for line in text.splitlines() if "class" in line).split() == ["class", "all"]
    assert text.count("mean IoU") == 3 and "target-private" not in text


def test_split_without_labels_is_said(checkpoint: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path, CITY)
    with pytest.raises(DataError, match='1 images of split "train" have no labels'):
        evaluate(checkpoint, split="train", device="cpu")
    with pytest.raises(DataError, match='no images in split "test"'):
        evaluate(checkpoint, split="test", device="cpu")


def test_nothing_in_common_is_said(checkpoint: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path, ClassTable((LabelClass("unicorn", (1, 2, 3), 0),)))
    with pytest.raises(DataError, match="no class name in common"):
        evaluate(checkpoint, device="cpu")


@pytest.mark.parametrize("ids", [[IGNORE], [CITY.names.index(name) for name in UNSEEN]])
def test_labels_without_a_common_class_are_said(checkpoint: Path, tmp_path: Path, ids: list[int]) -> None:
    make_dataset(tmp_path, CITY, ids=ids)
    with pytest.raises(DataError, match='no pixel of split "val" is labelled'):
        evaluate(checkpoint, device="cpu")
