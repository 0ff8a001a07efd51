"""The verb `predict`: checkpoint + images of any size -> masks, colours, overlays. H W pixels of one image."""

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluda_cli import console
from cluda_cli.data.index import IMAGE_SUFFIXES
from cluda_cli.data.labels import ClassTable
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.files import locked, make_unique
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.prefetch import HostCopy, prefetch, write_png
from cluda_cli.inference.sliding import ResizedImage, fit_image, segment
from cluda_cli.inference.weights_file import TrainedNetwork, load_weights

OUTPUTS = ("train-id", "label-id", "color", "overlay", "confidence")
OVERLAY = 0.5  # share of the class colour in an overlay


@dataclass(frozen=True)
class _Request:
    """An image and the files to write for it."""

    image: Path
    files: dict[str, Path]
    """Name of an output -> file."""


@dataclass(frozen=True)
class _Prediction:
    """Label, confidence and pixels of an image. What no output needs is None."""

    request: _Request
    pixels: Tensor | None  # uint8 3 H W
    label: HostCopy  # uint8 H W
    confidence: HostCopy | None  # uint8 H W, 0..255 = 0..1


def predict(
    inputs: Sequence[str],
    *,
    checkpoint: Path,
    out: Path,
    outputs: Sequence[str],
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Segment files, folders (searched recursively) and globs into out/<output>/<name>.png.

    A result has the size of its image in pixels. The images of a folder keep their subfolders. An image that cannot be
    read is reported and skipped.

    Raises SettingsError for an unknown output. Raises DataError if there is no image, if a result would replace an
    input, and, after all other images are done, if an image could not be read.
    """
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown or not outputs:
        raise SettingsError(
            f"unknown output {', '.join(unknown) or '(none)'}", "--output", f"take {', '.join(OUTPUTS)}"
        )
    requests = _plan(find_images(inputs, out), out, tuple(dict.fromkeys(outputs)))
    chosen = pick_device(device)
    trained = load_weights(checkpoint, chosen)
    _check_label_ids(trained.classes, outputs)
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with (
        locked(out, "name another folder with --out"),
        console.Progress("predicting", len(requests)) as progress,
    ):

        def skip(request: _Request, problem: DataError) -> None:
            console.warn(str(problem))
            failed.append({"input": str(request.image), "error": problem.what})
            progress.advance()

        predictions = _predict_all(trained, requests, outputs, skip)
        for request in prefetch(partial(_write, trained.classes), predictions):
            files = {output: str(path) for output, path in request.files.items()}
            done.append({"input": str(request.image), "outputs": files})
            progress.advance()
    if as_json:
        console.result_json({"checkpoint": str(checkpoint), "images": done, "failed": failed})
    elif done:
        console.result(str(out))
    console.info(f"{len(done)} images, {', '.join(dict.fromkeys(outputs))}, in {out}")
    if failed:
        raise DataError(f"{len(failed)} of {len(requests)} images could not be read", "", "see the warnings above")


def find_newest_checkpoint(runs: Path) -> Path:
    """Find the run that wrote weights last: its best.safetensors, else its last.safetensors.

    Raises DataError if no run has weights.
    """
    weights = [path for name in ("best", "last") for path in runs.glob(f"*/{name}.safetensors")]
    if not weights:
        raise DataError("no run with weights", runs, "train one with `cluda train`, or name weights with --ckpt")
    folder = max(weights, key=lambda path: path.stat().st_mtime).parent
    return next(path for path in weights if path.parent == folder)  # best comes before last


def find_images(inputs: Sequence[str], out: Path) -> list[tuple[Path, Path]]:
    """Find every image once, with the relative path that names its results.

    In a folder, hidden files and files under `out` are left out. Raises DataError if an input has no image.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    for text in inputs:
        path = Path(text)
        is_glob = not path.exists() and glob.has_magic(text)
        matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))] if is_glob else [path]
        images = [pair for match in matches for pair in _list_images(match, out, checked=is_glob)]
        if not images:
            if not is_glob and not path.exists():
                raise DataError("no such file or folder", text, "name images, folders of images, or globs")
            what = "no image matches" if is_glob else "no images in this folder"
            raise DataError(what, text, f"images end in {' '.join(sorted(IMAGE_SUFFIXES))}, in upper or lower case")
        for image, relative in images:
            found.setdefault(image.absolute(), (image, relative))
    return list(found.values())


def _list_images(path: Path, out: Path, checked: bool) -> Iterator[tuple[Path, Path]]:
    """Yield the images of a folder, or a file. With `checked`, a file must have the suffix of an image."""
    if path.is_file() and (not checked or path.suffix.lower() in IMAGE_SUFFIXES):
        yield path, Path(path.name)
    elif path.is_dir():
        for image in sorted(path.rglob("*")):
            relative = image.relative_to(path)
            hidden = any(part.startswith(".") for part in relative.parts)
            ours = image.resolve().is_relative_to(out.resolve())
            if image.suffix.lower() in IMAGE_SUFFIXES and image.is_file() and not hidden and not ours:
                yield image, relative


def _plan(images: Sequence[tuple[Path, Path]], out: Path, outputs: Sequence[str]) -> list[_Request]:
    """Name the files to write for each image. Raises DataError if one would replace an input."""
    requests = []
    sources = {image.resolve() for image, _ in images}
    names = make_unique(relative.with_suffix("").as_posix() for _, relative in images)
    for (image, _), name in zip(images, names, strict=True):
        files = {output: out / output / f"{name}.png" for output in outputs}
        for file in files.values():
            if file.resolve() in sources:
                raise DataError("would be overwritten, and is an input", file, "name another folder with --out")
        requests.append(_Request(image, files))
    return requests


def _check_label_ids(classes: ClassTable, outputs: Sequence[str]) -> None:
    """Raise SettingsError if label ids are wanted but a class has none in 0..255."""
    if "label-id" in outputs:
        unfit = [c.name for c in classes.classes if not 0 <= c.label_id < 256]
        if unfit:
            raise SettingsError(f"no 8-bit label id for {', '.join(unfit)}", "--output label-id", "take train-id")


def _predict_all(
    trained: TrainedNetwork,
    requests: Sequence[_Request],
    outputs: Sequence[str],
    skip: Callable[[_Request, DataError], None],
) -> Iterator[_Prediction]:
    """Yield the prediction of each image, while threads read the next ones. `skip` gets those that cannot be read."""
    settings = trained.settings
    device = next(trained.network.parameters()).device

    def read(request: _Request) -> tuple[ResizedImage, Tensor | None] | DataError:
        try:
            pixels = read_image(request.image)
        except DataError as problem:
            return problem
        return fit_image(pixels, settings.data.target_box, device), pixels if "overlay" in outputs else None

    def read_all() -> Iterator[tuple[ResizedImage, tuple[_Request, Tensor | None]]]:
        for request, result in zip(requests, prefetch(read, requests), strict=True):
            if isinstance(result, DataError):
                skip(request, result)
            else:
                yield result[0], (request, result[1])

    wanted = "confidence" in outputs
    results = segment(trained.network, read_all(), settings.inference, confidence=wanted)
    for (request, pixels), label, confidence in results:
        level = None if confidence is None else HostCopy((confidence * 255).round().to(torch.uint8))
        yield _Prediction(request, pixels, HostCopy(label), level)


def _write(classes: ClassTable, prediction: _Prediction) -> _Request:
    """Write the outputs of one image.

    This uses numpy, because torch would start further threads in each writing thread.
    """
    colors = np.array(classes.palette(), dtype=np.uint8).reshape(256, 3)
    label = prediction.label.numpy()
    for output, path in prediction.request.files.items():
        if output == "train-id":
            pixels = label
        elif output == "label-id":
            pixels = np.array([c.label_id for c in classes.classes], dtype=np.uint8)[label]
        elif output == "confidence":
            assert prediction.confidence is not None
            pixels = prediction.confidence.numpy()
        elif output == "color":
            pixels = colors.take(label, axis=0)  # H W 3
        else:
            assert prediction.pixels is not None
            blend = (OVERLAY * colors.astype(np.float32)).take(label, axis=0)  # H W 3
            blend += (1 - OVERLAY) * prediction.pixels.permute(1, 2, 0).numpy()
            pixels = blend.round(out=blend).astype(np.uint8)
        write_png(path, pixels)
    return prediction.request
