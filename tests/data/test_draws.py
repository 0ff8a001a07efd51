"""How crops are drawn: what is in them, from where, and what is refused."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluda_cli.data.draws import LabelledImages, ReferenceImages, TargetImages
from cluda_cli.data.index import Index, Item, joint_classes, seen_classes
from cluda_cli.data.labels import CITYSCAPES, ClassTable, LabelClass
from cluda_cli.data.streams import Steps, batches, draws
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.settings import Data, RareClass
from tests.conftest import write_dataset

BENCH = Path(__file__).parent.parent / "benchmarks" / "bench_stream.py"


def code(row, column):
    return (3 * row + 5 * column) % 19


def settings(**changes) -> Data:
    plain = {"crop": (24, 32), "source_box": None, "target_box": None, "workers": 0, "rare_class": None}
    return Data(**(plain | changes))


@pytest.mark.parametrize("rare", [None, RareClass(min_pixels=20)])
def test_image_and_label_stay_aligned(index, rare):
    flips = set()
    for batch in batches([index], index, settings(rare_class=rare), 0, 0, 20):
        row, column = batch["source"].image[:, 0].long(), batch["source"].image[:, 1].long()
        assert torch.equal(batch["source"].label.long(), code(row, column))
        step = column[:, 0, 1] - column[:, 0, 0]
        flips |= set(step.tolist())
        assert torch.equal(column.diff(dim=2), step[:, None, None].expand(2, 24, 31))
        assert (row.diff(dim=1) == 1).all()
    assert flips == {-1, 1}


def test_image_and_label_stay_aligned_when_resized(tmp_path, make_index):
    index = make_index(tmp_path, [(80, 120)])
    for batch in batches([index], index, settings(source_box=(40, 60)), 0, 0, 10):
        # Halving: a pixel lies between 2n and 2n + 1 and is rounded up, the nearest label is that of 2n.
        row, column = batch["source"].image[:, 0].long() - 1, batch["source"].image[:, 1].long() - 1
        assert torch.equal(batch["source"].label.long(), code(row, column))


def test_every_image_and_both_flips_of_the_target_occur(index):
    seen, flips, tops = set(), [], set()
    for batch in batches([index], index, settings(), 0, 0, 60):
        seen |= set(batch["target"].image[:, 2, 0, 0].tolist())
        tops |= set(batch["target"].image[:, 0, 0, 0].tolist())
        flips += (batch["target"].image[:, 1, 0, 0] > batch["target"].image[:, 1, 0, 1]).tolist()
    assert seen == {0, 1, 2} and tops >= set(range(17))
    assert 40 <= sum(flips) <= 80  # of 120


def test_small_images_are_padded_at_the_bottom_and_the_right(tmp_path, make_index):
    index = make_index(tmp_path, [(20, 28)])
    for batch in batches([index], index, settings(target_margins=(2, 3, 4, 5)), 0, 0, 5):
        inside = torch.zeros(2, 24, 32, dtype=torch.bool)
        inside[:, :20, :28] = True
        assert torch.equal(batch["source"].inside, inside) and torch.equal(batch["target"].inside, inside)
        assert not any(crops.image.mul(~inside[:, None]).any() for crops in batch.values())
        assert (batch["source"].label[~inside] == 255).all() and (batch["source"].label[inside] < 255).all()
        assert not batch["target"].valid[~inside].any()
        assert torch.equal(batch["source"].image[:, 0, :20, 0].long(), torch.arange(20).expand(2, 20))


def test_margins_follow_the_frame(index):
    for batch in batches([index], index, settings(target_margins=(5, 3, 0, 7)), 0, 0, 10):
        row, column, image = batch["target"].image.long().unbind(1)
        height, width = torch.where(image == 2, 30, 40), torch.where(image == 2, 50, 60)
        assert torch.equal(batch["target"].valid, (row >= 5) & (row < height - 3) & (column < width - 7))
        assert batch["target"].inside.all()


def test_margins_of_the_dataset_hold_unless_set(index):
    marked = Index(index.name, index.folder, index.root, index.classes, index.splits, margins=(40 - 24, 0, 0, 0))
    whole = {"crop": (40, 60)}
    batch = next(batches([index], marked, settings(**whole), 0, 0, 1))
    assert torch.equal(batch["target"].valid, batch["target"].inside & (torch.arange(40) >= 16)[None, :, None])
    batch = next(batches([index], marked, settings(**whole, target_margins=(0, 0, 0, 0)), 0, 0, 1))
    assert torch.equal(batch["target"].valid, batch["target"].inside)


@pytest.mark.reference
def test_margins_match_the_reference(tmp_path, golden):
    description = golden("09_pseudo_ema/pseudo_margins")[1]
    size, example = tuple(description["full_image"]), description["example"]
    Image.new("RGB", size[::-1]).save(tmp_path / "0.png")
    target = Index("big", tmp_path, tmp_path, ClassTable(CITYSCAPES), {"train": (Item("0.png", None, size),)})
    data = settings(target_margins=example["margins"], crop=size, batch_size=1)
    crops = TargetImages(target, data)(np.random.default_rng(0))
    inside, valid = crops.inside, crops.valid
    rows, columns = valid.any(1).nonzero().flatten(), valid.any(0).nonzero().flatten()
    assert [rows[0], rows[-1] + 1] == example["valid_rows"]
    assert [columns[0], columns[-1] + 1] == example["valid_columns"]
    assert valid.sum() == len(rows) * len(columns) and inside.all()


def test_margins_that_leave_nothing_are_refused(index):
    with pytest.raises(SettingsError, match=r"data\.target_margins.*30 x 50"):
        batches([index], index, settings(target_margins=(20, 10, 0, 0)), 0, 0, 1)


def test_unlabelled_source_is_refused_at_once(tmp_path, index, make_index):
    unlabelled = make_index(tmp_path / "none", [(40, 60)], labels=False)
    with pytest.raises(DataError, match="has a label"):
        batches([unlabelled], index, settings(), 0, 0, 1)
    empty = Index("empty", tmp_path, tmp_path, index.classes, {"val": index.splits["train"]})
    for source, target in [(empty, index), (index, empty)]:
        with pytest.raises(DataError, match='no images in split "train"'):
            batches([source], target, settings(), 0, 0, 1)


def test_labels_without_classes_are_refused(tmp_path, index):
    blank = Index("blank", tmp_path, tmp_path, index.classes, {"train": (Item("a.png", "b.png", (40, 60)),)})
    with pytest.raises(DataError, match="no pixel of any class"):
        batches([blank], index, settings(), 0, 0, 1)


def test_image_of_another_size_than_its_label_is_refused(tmp_path, index, make_index):
    source = make_index(tmp_path / "source", [(40, 60)])
    Image.new("RGB", (60, 41)).save(source.folder / "0.png")
    with pytest.raises(DataError, match="41 x 60.*40 x 60"):
        next(batches([source], index, settings(), 0, 0, 1))


def test_unlabelled_images_are_source_of_nothing_and_labels_of_the_target_are_never_read(tmp_path, make_index):
    labelled, other = make_index(tmp_path / "a", [(40, 60)]), make_index(tmp_path / "b", [(40, 60)] * 2)
    items = (*labelled.splits["train"], Item("absent.png", None, (40, 60)))
    source = Index("mixed", labelled.folder, labelled.root, labelled.classes, {"train": items})
    for path in other.folder.glob("*_label.png"):
        path.unlink()
    assert len(list(batches([source], other, settings(), 0, 0, 8))) == 8


def load_bench():
    spec = importlib.util.spec_from_file_location("bench_stream", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stream_draws_as_a_loader_that_repeats_its_whole_pipeline(tmp_path, coordinates):
    """Both samplers of the benchmark, compared by image, flip, and place of the crop."""
    bench = load_bench()
    index = bench.write_dataset(tmp_path, 3, (32, 48), seed=1)
    data = Data(crop=(16, 16), source_box=None, rare_class=RareClass(min_crop_share=12 / 256))
    stream = LabelledImages(index, index.classes, data, None)
    # Rows and columns in place of the pictures tell where a crop comes from.
    for i in range(3):
        image = coordinates(32, 48)[0]
        image[:, :, 2] = i
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    counts = np.zeros((2, 3, 2, 3, 3))
    for sampler, draw in enumerate([lambda rng: stream(rng).image, lambda rng: bench.plain_source(stream, rng)[0]]):
        for i in range(600):
            image = draw(np.random.default_rng(10_000 * sampler + i)).long()
            flip, left = int(image[1, 0, 0] > image[1, 0, 1]), int(image[1].min())
            counts[sampler, image[2, 0, 0], flip, image[0, 0, 0] // 6, left // 11] += 1
    first, second = counts.reshape(2, -1)
    used = first + second >= 10
    z = ((first - second)[used] ** 2 / (first + second)[used]).sum()
    assert used.sum() > 8 and (z - used.sum()) / np.sqrt(2 * used.sum()) < 4


def test_several_sources_are_drawn_by_their_shares_in_joint_train_ids(tmp_path, make_index):
    """The second source has two classes of the first in another order, and one of its own."""
    first = make_index(tmp_path / "first", [(40, 60)])
    names = ("car", "tram", "road")
    colors = {c.name: c for c in CITYSCAPES}
    own = ClassTable(tuple(colors.get(name, LabelClass(name, (1, 2, 3), i)) for i, name in enumerate(names)))
    folder = tmp_path / "second"
    folder.mkdir()
    label = np.repeat(np.arange(3, dtype=np.uint8), 20)[None].repeat(40, 0)
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(folder / "0.png")
    Image.fromarray(label).save(folder / "0_label.png")
    items = (Item("0.png", "0_label.png", (40, 60), {0: 800, 1: 800, 2: 800}),)
    second = Index("second", folder, folder, own, {"train": items})
    joint = joint_classes([first, second])
    assert joint.names == (*ClassTable(CITYSCAPES).names, "tram")
    assert seen_classes([first, second]) == joint.names
    data = settings(batch_size=100, source_shares=(1, 3), source=("first", "second"), crop=(40, 60))
    crops = next(batches([first, second], first, data, 0, 0, 1))["source"]
    of_second = crops.image[:, 0, 0, 0] == 200
    assert 60 <= of_second.sum() <= 90
    ids = {joint.names.index(name) for name in names}
    assert set(crops.label[of_second].unique().tolist()) == ids
    assert set(crops.label[~of_second].unique().tolist()) == set(range(19))


def test_a_law_chooses_the_drawn_classes_unless_no_class_has_a_probability(index):
    rare = LabelledImages(index, index.classes, settings(rare_class=RareClass(min_pixels=0)), None).rare
    only_one = tuple(float(i == 1) for i in range(19))
    assert {rare.draw(np.random.default_rng(i), only_one)[0] for i in range(20)} == {1}
    assert rare.draw(np.random.default_rng(0), (0.0,) * 19) == rare.draw(np.random.default_rng(0))


def test_labelled_target_images_are_drawn_like_the_target_and_labelled_like_the_source(tmp_path, make_index):
    """They have the size of the target, both flips, train ids of the joint classes, and rare classes of their own."""
    source = make_index(tmp_path / "source", [(40, 60)])
    named = ClassTable(tuple(reversed(CITYSCAPES)))
    labelled = replace(make_index(tmp_path / "target", [(80, 120), (80, 120)]), classes=named)
    data = settings(target_box=(40, 60), rare_class=RareClass(min_pixels=0), batch_size=3)
    drawn = list(batches([source], labelled, data, 0, 0, 10, labelled=labelled))
    assert set(drawn[0]) == {"source", "labelled", "target"}
    for crops in (batch["labelled"] for batch in drawn):
        row, column = crops.image[:, 0].long() - 1, crops.image[:, 1].long() - 1  # halved, as the target
        assert torch.equal(crops.label.long(), 18 - code(row, column))
        assert crops.valid is None and crops.inside.all()
    assert set(next(batches([], labelled, data, 0, 0, 1, labelled=labelled))) == {"labelled", "target"}


def test_a_law_acts_on_labelled_target_images_too(index):
    """Only image 1 is said to hold class 7, the rarer one; blue tells the number of the image."""
    items = tuple(replace(item, pixels={7 if i == 1 else 3: 900}) for i, item in enumerate(index.split("train")))
    labelled = replace(index, splits={"train": items})
    data = settings(rare_class=RareClass(min_pixels=0, min_crop_share=0))
    steps = Steps(draws([], index, data, labelled), 0, range(8))
    images = [steps[0, law]["labelled"].image[:, 2, 0, 0] for law in (None, tuple(float(k == 3) for k in range(19)))]
    assert (images[0] == 1).all() and (images[1] != 1).all()


def test_a_paired_picture_is_cropped_and_flipped_as_its_image(tmp_path):
    """Each picture is its image, so that equal crops are equal."""
    index = write_dataset(tmp_path, "night", seed=3)
    items = index.splits["train"]
    index = replace(index, references={item.image: item.image for item in items[:2]})
    found = set()
    for batch in batches([index], index, settings(), 0, 0, 12, paired=True):
        target, reference = batch["target"], batch["reference"]
        for image, picture, inside in zip(target.image, reference.image, reference.inside, strict=True):
            assert torch.equal(image, picture) if inside.all() else not (picture.any() or inside.any())
            found.add(bool(inside.all()))
    assert found == {True, False}
    assert "reference" not in next(batches([index], index, settings(), 0, 0, 1))


def test_a_paired_picture_that_changed_is_named(tmp_path):
    index = write_dataset(tmp_path, "night", seed=3)
    Image.new("RGB", (9, 9)).save(index.root / "day.png")
    index = replace(index, references={item.image: "day.png" for item in index.splits["train"]})
    with pytest.raises(DataError, match=r"day\.png: the paired picture is 9 x 9, the image 48 x 80"):
        ReferenceImages(index, settings())(np.random.default_rng(0))


def test_a_dataset_without_paired_pictures_is_refused(index):
    with pytest.raises(DataError, match="has no paired pictures -> prepare it with paired pictures"):
        batches([index], index, settings(), 0, 0, 1, paired=True)
