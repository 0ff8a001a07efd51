"""Which training images of the target come with labels, and what a list of them may say."""

import pytest

from cluda_cli.data.datasets import choose_labelled, open_datasets
from cluda_cli.data.index import Index
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.settings import Data


@pytest.fixture
def target(make_dataset) -> Index:
    return make_dataset("camera", images=8)


def data(tmp_path, **changes) -> Data:
    return Data(**({"root": tmp_path / "data", "source": "camera", "target": "camera"} | changes))


def names(items):
    return [item.image for item in items]


def test_a_count_is_drawn_by_the_seed_and_contains_smaller_ones(target):
    five = names(choose_labelled(target, 5, 0))
    assert len(set(five)) == 5 and five == names(choose_labelled(target, 5, 0))
    assert set(names(choose_labelled(target, 2, 0))) < set(five)
    assert len({tuple(names(choose_labelled(target, 5, seed))) for seed in range(10)}) > 5
    assert names(choose_labelled(target, 8, 3)) == names(target.split("train"))


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.01, 1), (1.0, 8)])
def test_a_share_is_that_of_the_labelled_images(target, share, count):
    assert choose_labelled(target, share, 0) == choose_labelled(target, count, 0)


def test_the_others_are_used_without_labels(tmp_path, target):
    found = open_datasets(data(tmp_path, labelled=3), 0)
    chosen, others = names(found.labelled.split("train")), names(found.unlabelled.split("train"))
    assert sorted(chosen + others) == names(target.split("train")) and len(chosen) == 3
    assert found.labelled_images == chosen
    assert found.unlabelled.labelled("val") and found.target.fingerprint == target.fingerprint
    whole = open_datasets(data(tmp_path, labelled=1.0), 0)
    assert names(whole.unlabelled.split("train")) == whole.labelled_images == names(target.split("train"))


def test_without_labelled_images_the_target_is_as_it_was(tmp_path, target):
    found = open_datasets(data(tmp_path), 0)
    assert found.labelled is None and found.labelled_images == [] and found.unlabelled is found.target
    alone = open_datasets(data(tmp_path, source=False), 0)
    assert alone.sources == () and alone.labelled.classes == target.classes and alone.labelled_images == []


def test_a_list_names_images_by_path_or_file_name(tmp_path, target):
    path = tmp_path / "list.txt"
    path.write_text("train/5.png\r\n\n2.png\n2.png\n")
    assert names(choose_labelled(target, str(path), 0)) == ["train/2.png", "train/5.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train/5.png\ntrain/55.png\n",
            r'list\.txt:2: "train/55.png" is none of the 8 labelled .* did you mean train/5',
        ),
        ("\n", r"list\.txt: the list of labelled images is empty"),
        (None, r"list\.txt: the list of labelled images cannot be read"),
    ],
)
def test_a_list_that_does_not_fit_is_one_clear_line(tmp_path, target, text, message):
    path = tmp_path / "list.txt"
    if text:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        choose_labelled(target, str(path), 0)


def test_more_images_than_have_labels_are_refused(make_dataset, target):
    with pytest.raises(SettingsError, match=r"data\.labelled: 9 labelled images are wanted, camera has 8 .* lower it"):
        choose_labelled(target, 9, 0)
    bare = make_dataset("bare", labelled_train=False)
    with pytest.raises(SettingsError, match=r"1 labelled images are wanted, bare has 0 .* label some"):
        choose_labelled(bare, 0.5, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "a number of images is 1 or more"), (1.5, "a share of the images is"), (0.0, "a share"), (" ", "has a name")],
)
def test_an_amount_that_is_none_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        Data(labelled=value)
    assert Data(labelled=False).labelled is None
