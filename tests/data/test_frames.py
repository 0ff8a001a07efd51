"""Images and labels at the size of training; the cache changes nothing but the time."""

import dataclasses
import json
import pickle
from collections.abc import Callable

import pytest
import torch

from cluda_cli.data.cache import Box, Cache
from cluda_cli.data.frames import Frames
from cluda_cli.data.index import Index
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.data.sampling import Crop
from cluda_cli.data.transforms import read_image, resize_image
from cluda_cli.errors import DataError

Store = Callable[..., Cache]
CROPS = (Crop(0, 0, 9, 9), Crop(5, 11, 20, 21), Crop(3, 0, 27, 33))


def read_all(frames: Frames) -> list[torch.Tensor]:
    """Crops and label of every image."""
    items = frames.index.split("train")
    return [frames.image(item, crop) for item in items for crop in CROPS] + [frames.label(item) for item in items]


@pytest.mark.parametrize("box", [(40, 50), (45, 67), (120, 180), None], ids=["smaller", "odd", "larger", "original"])
@pytest.mark.parametrize("cached", ["as the run", "original"])
def test_the_cache_gives_equal_pixels(noise_index: Index, store_noise: Store, box: Box, cached: str) -> None:
    expected = read_all(Frames(noise_index, box))
    store_noise(box if cached == "as the run" else None)
    for path in noise_index.folder.glob("*.png"):
        path.unlink()  # nothing else can be read any more
    frames = pickle.loads(pickle.dumps(Frames(noise_index, box)))  # as in a loader process
    assert all(torch.equal(a, b) for a, b in zip(read_all(frames), expected, strict=True))


def test_sizes_fit_the_box(noise_index: Index) -> None:
    frames = Frames(noise_index, (40, 50))
    sizes = [frames.size(item) for item in noise_index.split("train")]
    assert sizes == [(33, 50), (33, 50), (46, 40)]
    assert [tuple(frames.label(item).shape) for item in noise_index.split("train")] == sizes


def test_a_crop_is_cut_from_the_resized_image(noise_index: Index) -> None:
    item, crop = noise_index.split("train")[0], CROPS[1]
    whole = resize_image(read_image(noise_index.image_path(item)), (33, 50))
    expected = whole[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    assert torch.equal(Frames(noise_index, (40, 50)).image(item, crop), expected)


def test_what_the_cache_lacks_is_decoded(noise_index: Index, store_noise: Store) -> None:
    whole = read_all(Frames(noise_index, (40, 50)))
    path = store_noise((40, 50)).folder / "cache.json"
    content = json.loads(path.read_text())
    del content["files"]["1.png"]
    path.write_text(json.dumps(content))
    frames = Frames(noise_index, (40, 50))
    assert list(frames.cache.files) == ["0.png", "2.png"]
    assert all(torch.equal(a, b) for a, b in zip(read_all(frames), whole, strict=True))


def test_size_that_differs_from_the_index_is_refused(noise_index: Index) -> None:
    item = dataclasses.replace(noise_index.split("train")[0], size=(61, 90))
    with pytest.raises(DataError, match=r"the image is 60 x 90, the index says 61 x 90 -> run `cluda prepare`"):
        Frames(noise_index, None).image(item, CROPS[0])
    with pytest.raises(DataError, match=r"the label is 60 x 90, the index says 61 x 90"):
        Frames(noise_index, None).label(item)


@pytest.mark.parametrize("cached", [False, True])
def test_a_label_with_an_id_beyond_the_classes_is_an_error(
    noise_index: Index, store_noise: Store, cached: bool
) -> None:
    index = dataclasses.replace(noise_index, classes=ClassTable(CITYSCAPES[:4]))  # the labels hold 0..4
    if cached:
        store_noise(None)
    with pytest.raises(DataError, match=r"0_label\.png: the label holds 4; train ids are 0\.\.3 and 255"):
        Frames(index, None).label(index.split("train")[0])
