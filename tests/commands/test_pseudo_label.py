"""The verb `pseudo-label`: its result is a dataset whose index, labels, confidences and manifest agree."""

import hashlib
import json
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluda_cli.commands import pseudo_label as verb
from cluda_cli.commands.pseudo_label import compute_thresholds, pseudo_label
from cluda_cli.data.index import Index, Item, find
from cluda_cli.data.labels import CITYSCAPES, IGNORE, ClassTable
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import DataError, EnvironmentProblem, SettingsError
from cluda_cli.files import locked
from cluda_cli.inference import metrics
from cluda_cli.inference.sliding import image_logits
from cluda_cli.inference.weights_file import NetworkDescription, save_weights
from cluda_cli.models.segmenter import Segmenter
from cluda_cli.settings import Data, Decoder, Evaluation, Model, Objectives, Settings

TABLE = ClassTable(CITYSCAPES[:6])
SIZES = [(40, 72), (33, 51), (24, 24)]


@cache
def make_network() -> Segmenter:
    """Random, but with predictions of many classes and confidences."""
    torch.manual_seed(0)
    model = Model(encoder="mobilenetv2_050", weights=False, decoder=Decoder(embed_dim=8, channels=8))
    network = Segmenter(model, len(TABLE))
    torch.nn.init.normal_(network.decoder.conv_seg.weight, std=5)
    return network.eval()


def make_checkpoint(root: Path, margins: tuple[int, int, int, int] | None = None) -> Path:
    settings = Settings(
        data=Data(target="toy", root=root, target_box=(32, 64), target_margins=margins),
        model=Model(encoder="mobilenetv2_050", weights=False, decoder=Decoder(embed_dim=8, channels=8)),
        objectives=Objectives(feature_distance=None),
    )
    path = root / "run" / "best.safetensors"
    description = NetworkDescription(settings=settings, classes=TABLE, seen=TABLE.names, network_name="student", step=7)
    save_weights(path, make_network().state_dict(), description)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Index:
    """Unlabelled images, two of them with the same stem."""
    root, draw = tmp_path / "toy", np.random.default_rng(0)
    items = []
    for name, (height, width) in zip(["a/1.png", "b/1.jpg", "2.x.png"], SIZES, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        blocks = draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        pixels = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
        Image.fromarray(pixels).save(root / name)
        items.append(Item(name, None, (height, width)))
    index = Index("toy", tmp_path / "prepared" / "toy", root, ClassTable(CITYSCAPES), {"train": tuple(items)})
    index.save()
    return index


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path)


def truth(data: Index) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels and confidences of all images, by the network itself."""
    images = [read_image(data.image_path(item)) for item in data.split("train")]
    logits = [image_logits(make_network(), image, (32, 64), Evaluation()) for image in images]
    return [(best.argmax(0).numpy(), (best.amax(0) - best.logsumexp(0)).exp().numpy()) for best in logits]


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.array(image)


def labels(folder: Path) -> list[np.ndarray]:
    index = Index.load(folder)
    return [opened(index.label_path(item)) for item in index.split("train")]


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_result_is_a_dataset_that_agrees_with_its_files(
    checkpoint: Path, data: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pseudo_label(checkpoint, threshold=0.7, device="cpu")
    assert folder == checkpoint.parent / "pseudo-labels" / "toy-train"
    text, talk = capsys.readouterr()
    assert text == f"{folder}\n" and f"cluda train --source {shlex.quote(str(folder))}" in talk
    index = find(str(folder), Path("nowhere"))  # what `train --source FOLDER` does
    assert index.classes == TABLE and list(index.splits) == ["train"] and index.margins == (0, 0, 0, 0)
    items = index.split("train")
    assert [item.size for item in items] == SIZES
    assert [index.image_path(item).resolve() for item in items] == [
        data.image_path(item).resolve() for item in data.split("train")
    ]
    assert len({item.label for item in items}) == 3
    for item, (label, confidence) in zip(items, truth(data), strict=True):
        found = opened(index.label_path(item))
        assert np.array_equal(found, np.where(confidence >= np.float32(0.7), label, IGNORE))
        ids, counts = np.unique(found[found != IGNORE], return_counts=True)
        assert item.pixels == dict(zip(ids.tolist(), counts.tolist(), strict=True))
        level = opened(folder / "confidence" / Path(item.label or "").relative_to("labels"))
        assert np.array_equal(level, np.rint(confidence * np.float32(255)).astype(np.uint8))


def test_manifest_says_what_was_done(checkpoint: Path, data: Index, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pseudo_label(checkpoint, threshold=0.7, device="cpu", as_json=True)
    found = manifest(folder)
    assert json.loads(capsys.readouterr().out) == {"folder": str(folder)} | found
    assert found["checkpoint"] == str(checkpoint)
    assert found["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert (found["dataset"], found["split"], found["fingerprint"]) == ("toy", "train", data.fingerprint)
    assert found["thresholds"] == dict.fromkeys(TABLE.names, 0.7)
    written = np.concatenate([label.ravel() for label in labels(folder)])
    kept = written[written != IGNORE]
    assert 0 < found["coverage"] < 1 and found["coverage"] == pytest.approx(kept.size / written.size)
    for i, name in enumerate(TABLE.names):
        count = int((kept == i).sum())
        assert found["classes"][name] == {"pixels": count, "share": pytest.approx(count / kept.size)}
    confidence = np.concatenate([confidence.ravel() for _, confidence in truth(data)])
    assert found["mean_confidence"] == pytest.approx(float(confidence.mean()), abs=1e-3)
    assert found["images"] == 3 and found["per_class"] is False


def test_threshold_zero_keeps_all_and_one_nearly_nothing(checkpoint: Path, data: Index, tmp_path: Path) -> None:
    everything = pseudo_label(checkpoint, threshold=0, device="cpu", out=tmp_path / "all")
    assert manifest(everything)["coverage"] == 1
    for found, (label, _) in zip(labels(everything), truth(data), strict=True):
        assert np.array_equal(found, label)
    for threshold in (-0.1, 1.1):
        with pytest.raises(SettingsError):
            pseudo_label(checkpoint, threshold=threshold, device="cpu", out=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_per_class_thresholds_are_medians(checkpoint: Path, data: Index) -> None:
    folder = pseudo_label(checkpoint, per_class=True, device="cpu")
    thresholds = manifest(folder)["thresholds"]
    pairs = truth(data)
    label = np.concatenate([label.ravel() for label, _ in pairs])
    confidence = np.concatenate([confidence.ravel() for _, confidence in pairs])
    written = np.concatenate([label.ravel() for label in labels(folder)])
    predicted = np.unique(label)
    assert len(predicted) > 2
    for i, name in enumerate(TABLE.names):
        if i not in predicted:
            assert thresholds[name] is None
            continue
        median = np.median(confidence[label == i])
        assert thresholds[name] == pytest.approx(min(median, 0.9), abs=0.002)
        assert (written[label == i] != IGNORE).mean() >= 0.5
        levels = np.rint(confidence * np.float32(255))
        keep = (label == i) & (levels / 255 >= thresholds[name])
        assert np.array_equal(written == i, keep)
    index = Index.load(folder)
    assert index.class_pixels("train") == [int((written == i).sum()) for i in range(len(TABLE))]
    assert any(value is not None and value < 0.9 for value in thresholds.values())


@pytest.mark.parametrize("per_class", [False, True])
def test_changed_files_are_noticed_when_a_run_begins(
    checkpoint: Path, data: Index, capsys: pytest.CaptureFixture[str], per_class: bool
) -> None:
    made = Index.load(pseudo_label(checkpoint, per_class=per_class, device="cpu"))
    capsys.readouterr()
    made.check_files()
    assert capsys.readouterr().err == ""
    first, second, _ = made.split("train")
    for path in (made.image_path(first), made.label_path(second)):
        content = path.read_bytes()
        path.write_bytes(content + b"more")
        with pytest.raises(DataError, match="1 files changed") as caught:
            made.check_files()
        assert str(path) in caught.value.what
        path.write_bytes(content)


def test_memory_is_bounded_in_every_pass(
    checkpoint: Path, data: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pictures are counted in parts, with the same result, and all threads say how many pixels they hold."""
    whole = pseudo_label(checkpoint, per_class=True, device="cpu")
    counted: list[int] = []
    held: list[list[int]] = []

    def count_values(values: torch.Tensor, bins: int) -> torch.Tensor:
        counted.append(values.numel())
        return metrics.count_values(values, bins)

    def prefetch(function: Any, items: Any, count_pixels: Any = lambda _: 0) -> Any:
        held.append(pixels := [])
        for item in items:
            pixels.append(count_pixels(item))
            yield function(item)

    monkeypatch.setattr(verb, "PIXELS_AT_ONCE", 100)
    monkeypatch.setattr(verb, "count_values", count_values)
    monkeypatch.setattr(verb, "prefetch", prefetch)
    parts = pseudo_label(checkpoint, per_class=True, device="cpu", out=tmp_path / "parts")
    assert max(counted) <= 100 and sum(counted) == sum(height * width for height, width in SIZES)
    assert held == [[height * width for height, width in SIZES]] * 3  # read, write, apply the thresholds
    assert Index.load(parts).fingerprint == Index.load(whole).fingerprint
    assert all(map(np.array_equal, labels(parts), labels(whole)))


def test_median_of_levels() -> None:
    histogram = torch.zeros(6, 256, dtype=torch.int64)
    histogram[0, [51, 102, 153]] = torch.tensor([5, 1, 5])  # the middle one of 11
    histogram[1, [51, 255]] = torch.tensor([1, 3])  # capped
    histogram[2, 204] = 1
    histogram[4, [51, 153]] = torch.tensor([5, 5])  # between the two in the middle
    histogram[5, [51, 102, 153]] = 1  # of three, not the largest
    assert compute_thresholds(histogram) == [pytest.approx(p) if p else None for p in (0.4, 0.9, 0.8, None, 0.4, 0.4)]


@pytest.mark.reference
def test_thresholds_as_the_reference(golden: Any) -> None:
    """The consistent form, with the true median; each confidence that occurs is a level."""
    tensors, description = golden("20_proto/p14_spcl_class_threshold")
    bound = description["tolerance_demanded"]["bounds"]["consistent.thresholds"]["float64_max_abs"]
    confidence, label = tensors["in.logits"].double().softmax(dim=1).max(dim=1)
    levels, place = confidence.unique(return_inverse=True)
    histogram = torch.zeros(19, len(levels), dtype=torch.int64)
    histogram.index_put_((label.flatten(), place.flatten()), torch.tensor(1), accumulate=True)
    thresholds = torch.tensor([value or 0.0 for value in compute_thresholds(histogram, levels)], dtype=torch.float64)
    assert (thresholds - tensors["out64_consistent.thresholds"]).abs().max() <= bound
    kept = label.masked_fill(confidence < thresholds[label], IGNORE)
    assert torch.equal(kept, tensors["out_consistent.pseudo_labels"].long())


@pytest.mark.parametrize("per_class", [False, True])
def test_margins_get_no_labels(data: Index, tmp_path: Path, per_class: bool) -> None:
    replace(data, margins=(2, 30, 4, 5)).save()  # the last image is 24 high: nothing is left of it
    folder = pseudo_label(make_checkpoint(tmp_path), threshold=0, per_class=per_class, device="cpu")
    assert Index.load(folder).margins == (2, 30, 4, 5)
    for found, (label, _), (height, width) in zip(labels(folder), truth(data), SIZES, strict=True):
        inner = np.zeros_like(label, dtype=bool)
        inner[2 : max(height - 30, 0), 4 : width - 5] = True
        assert (found[~inner] == IGNORE).all()
        if not per_class:
            assert np.array_equal(found[inner], label[inner])


def test_margins_of_the_run_hold_for_its_target_only(data: Index, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, margins=(0, 8, 0, 0))
    own = pseudo_label(checkpoint, threshold=0, device="cpu", out=tmp_path / "own")
    named = pseudo_label(checkpoint, dataset="toy", threshold=0, device="cpu", out=tmp_path / "named")
    assert (labels(own)[0][-8:] == IGNORE).all() and (labels(own)[0][:-8] != IGNORE).all()
    assert (labels(named)[0] != IGNORE).all()


def test_taken_folder_is_refused_and_kept(checkpoint: Path, data: Index, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    with pytest.raises(SettingsError, match="something other than pseudo-labels"):
        pseudo_label(checkpoint, device="cpu", out=taken)
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    with pytest.raises(SettingsError, match="something other than pseudo-labels"):
        pseudo_label(checkpoint, device="cpu", out=data.folder, overwrite=True)
    assert Index.load(data.folder).name == "toy"
    folder = pseudo_label(checkpoint, threshold=0, device="cpu")
    with pytest.raises(SettingsError):
        pseudo_label(checkpoint, threshold=0.5, device="cpu")
    pseudo_label(checkpoint, threshold=0.5, device="cpu", overwrite=True)
    assert manifest(folder)["thresholds"]["road"] == 0.5


def test_failed_run_leaves_no_dataset(checkpoint: Path, data: Index) -> None:
    broken = data.image_path(data.split("train")[2])
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match="cannot be read|not an image"):
        pseudo_label(checkpoint, device="cpu")
    folder = checkpoint.parent / "pseudo-labels" / "toy-train"
    assert not (folder / "index.json").exists()
    assert json.loads((folder / "manifest.json").read_text()) == {"kind": "pseudo-labels"}


@pytest.mark.parametrize("function", ["read_image", "fit_image", "Segmenter.forward"])
def test_memory_that_runs_out_names_the_image(
    checkpoint: Path, data: Index, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def exhaust(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    where = "cluda_cli.models.segmenter" if "." in function else "cluda_cli.commands.pseudo_label"
    monkeypatch.setattr(f"{where}.{function}", exhaust)
    with pytest.raises(EnvironmentProblem, match="memory ran out on 40 x 72 pixels") as caught:
        pseudo_label(checkpoint, device="cpu")
    assert caught.value.where == str(data.image_path(data.split("train")[0])) and "--device cpu" in caught.value.remedy


@pytest.mark.parametrize("left", [[".cluda-abcd1234.tmp.json"], [".cluda-lock"], ["manifest.json"]], ids=str)
def test_what_an_interrupted_call_began_is_taken_over(
    checkpoint: Path, data: Index, tmp_path: Path, left: list[str]
) -> None:
    out = tmp_path / "out"
    (out / "labels").mkdir(parents=True) if left == ["manifest.json"] else out.mkdir()
    for name in left:
        (out / name).write_text('{"kind": "pseudo-labels"}')
    pseudo_label(checkpoint, threshold=0, device="cpu", out=out)
    assert Index.load(out).split("train") and not list(out.rglob(".cluda-*"))


def test_two_calls_do_not_write_into_one_folder(checkpoint: Path, data: Index, tmp_path: Path) -> None:
    with locked(tmp_path / "out", ""), pytest.raises(SettingsError, match="another process"):
        pseudo_label(checkpoint, device="cpu", out=tmp_path / "out", overwrite=True)


def test_the_next_command_can_be_parsed_as_it_is_printed(
    checkpoint: Path, data: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint.parent / "settings.json").touch()
    out = tmp_path / "with space"
    pseudo_label(checkpoint, threshold=0, device="cpu", out=out)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("next: ")]
    assert shlex.split(line.removeprefix("next: ")) == [
        "cluda", "train", "--preset", str(checkpoint.parent / "settings.json"), "--source", str(out), "--target", "toy",
        "--data-root", str(tmp_path),
    ]  # fmt: skip
