"""The verb `predict`: checkpoint + images of any size -> masks, colours, overlays. H W pixels of one image."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluda_cli import console
from cluda_cli.data.globs import check_glob, describe_beside, find_files, has_wildcard, split_root
from cluda_cli.data.image_files import read_header
from cluda_cli.data.index import IMAGE_SUFFIXES
from cluda_cli.data.labels import ClassTable
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import CludaError, DataError, SettingsError, is_out_of_memory, out_of_memory
from cluda_cli.files import locked, make_unique
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.prefetch import HostCopy, prefetch, write_png
from cluda_cli.inference.sliding import ResizedImage, fit_image, quantise, segment
from cluda_cli.inference.weights_file import TrainedNetwork, find_weights, load_weights

OUTPUTS = ("train-id", "label-id", "color", "overlay", "confidence")
OVERLAY = 0.5  # share of the class colour in an overlay
PIXELS_AT_ONCE = 2**20  # coloured at a time, to bound memory


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
    read, or for which memory runs out, is reported and skipped.

    Raises SettingsError for an unknown output. Raises DataError if there is no image, if a result would replace an
    input, and, after all other images are done, if one was skipped.
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

        def skip(request: _Request, problem: CludaError) -> None:
            console.warn(str(problem))
            failed.append({"input": str(request.image), "error": problem.what})
            progress.advance()

        predictions = _predict_all(trained, requests, outputs, skip)
        for request, problem in prefetch(functools.partial(_write, trained.classes), predictions, _count_pixels):
            if problem:
                skip(request, problem)
                continue
            files = {output: str(path) for output, path in request.files.items()}
            done.append({"input": str(request.image), "outputs": files})
            progress.advance()
    if as_json:
        console.result_json({"checkpoint": str(trained.path), "images": done, "failed": failed})
    elif done:
        console.result(str(out))
    console.info(f"{len(done)} images, {', '.join(dict.fromkeys(outputs))}, in {out}")
    if failed:
        raise DataError(f"{len(failed)} of {len(requests)} images were skipped", "", "see the warnings above")


def find_newest_checkpoint(runs: Path) -> Path:
    """Find the run that wrote weights last: its best.safetensors, else its last.safetensors.

    Raises DataError if no run has weights.
    """
    weights = [path for name in ("best", "last") for path in runs.glob(f"*/{name}.safetensors")]
    if not weights:
        raise DataError("no run with weights", runs, "train one with `cluda train`, or name weights with --ckpt")
    return find_weights(max(weights, key=lambda path: path.stat().st_mtime).parent)


def find_images(inputs: Sequence[str], out: Path) -> list[tuple[Path, Path]]:
    """Find every image once, with the relative path that names its results.

    In a folder, hidden files and earlier results in `out` are left out. Raises DataError if an input has no image.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    resolve = functools.cache(lambda folder: Path(os.path.realpath(folder)))
    results = {resolve(out / output): out / output for output in OUTPUTS}
    for text in inputs:
        path = Path(text)
        if path.is_file():
            images = [(path, Path(path.name))]
        elif path.is_dir():
            images = _search(path, [("**/*", 0)], results, resolve)
        elif path.exists():
            raise DataError("is neither a file nor a folder", text, "name images, folders of images, or globs")
        elif has_wildcard(text):
            images = _search(*_read_glob(text), results, resolve)
        else:
            raise DataError("no such file or folder", text, "name images, folders of images, or globs")
        if not images:
            beside = describe_beside(Path(path.anchor), path.relative_to(path.anchor).as_posix())
            what = "no images in this folder" if path.is_dir() else f"no image matches: {beside}"
            raise DataError(what, text, f"images end in {' '.join(sorted(IMAGE_SUFFIXES))}, in upper or lower case")
        for image, relative in images:
            found.setdefault(resolve(image.parent) / image.name, (image, relative))
    return list(found.values())


def _read_glob(text: str) -> tuple[Path, list[tuple[str, int]]]:
    """The arguments of `_search` for a glob, which names files or folders. Raises DataError if it is no pattern."""
    try:
        check_glob(text)
    except ValueError as error:
        raise DataError(str(error), text, "correct the pattern") from error
    root, pattern = split_root(text)
    if "**" in pattern.split("/"):
        return root, [(f"{pattern}/*" if pattern.endswith("**") else pattern, -1)]
    depth = pattern.count("/")
    return root, [(pattern, depth), (f"{pattern}/**/*", depth + 1)]


def _search(
    root: Path,
    patterns: Sequence[tuple[str, int]],
    results: Mapping[Path, Path],
    resolve: Callable[[Path], Path],
) -> list[tuple[Path, Path]]:
    """Images below a folder that match (glob, index of the first part of the path that names the results).

    Those in the folders `results` (real path -> path) are left out, unless `root` is in the same one.
    """
    again, left_out, images = dict[str, str](), dict[Path, None](), []
    holders = [result for result in results if not resolve(root).is_relative_to(result)]
    for pattern, start in patterns:
        for file in find_files(root, pattern, again):
            image = root / file.path
            if image.suffix.lower() not in IMAGE_SUFFIXES or not image.is_file():
                continue
            folder = f"{resolve(image.parent)}/"
            if holder := next((result for result in holders if folder.startswith(f"{result}/")), None):
                left_out[holder] = None
            else:
                images.append((image, Path(*Path(file.path).parts[start:])))
    for link in again:
        console.warn(f"{root / link} links to {resolve(root / link)}, whose images are taken once")
    for holder in left_out:
        console.info(f"left out {results[holder]}, a folder of results")
    return images


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
    skip: Callable[[_Request, CludaError], None],
) -> Iterator[_Prediction]:
    """Yield the prediction of each image, while threads read the next ones. `skip` gets those that cannot be read."""
    settings = trained.settings
    device = next(trained.network.parameters()).device

    def read(request: _Request) -> tuple[ResizedImage, Tensor | None] | CludaError:
        try:
            pixels = read_image(request.image)
            return fit_image(pixels, settings.data.target_box, device), pixels if "overlay" in outputs else None
        except DataError as problem:
            return problem
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return out_of_memory(_read_size(request.image), request.image)

    def read_all() -> Iterator[tuple[ResizedImage, tuple[_Request, Tensor | None]]]:
        images = prefetch(read, requests, lambda request: math.prod(_read_size(request.image)))
        for request, result in zip(requests, images, strict=True):
            if isinstance(result, CludaError):
                skip(request, result)
            else:
                yield result[0], (request, result[1])

    def give_up(key: tuple[_Request, Tensor | None]) -> None:
        skip(key[0], out_of_memory(_read_size(key[0].image), key[0].image))

    wanted = "confidence" in outputs
    results = segment(trained.network, read_all(), settings.inference, confidence=wanted, skip=give_up)
    for (request, pixels), label, confidence in results:
        level = None if confidence is None else HostCopy(quantise(confidence))
        yield _Prediction(request, pixels, HostCopy(label), level)


def _read_size(path: Path) -> tuple[int, int]:
    """Height and width from the header of an image; 0 x 0 where reading all of it will say what is wrong."""
    try:
        return read_header(path).size
    except (DataError, MemoryError):
        return 0, 0


def _count_pixels(prediction: _Prediction) -> int:
    height, width = prediction.label.shape
    return height * width


def _write(classes: ClassTable, prediction: _Prediction) -> tuple[_Request, CludaError | None]:
    """Write the outputs of one image. The problem is that memory ran out."""
    request = prediction.request
    try:
        for output, path in request.files.items():
            write_png(path, _render(output, classes, prediction))
    except MemoryError:
        return request, out_of_memory((prediction.label.shape[0], prediction.label.shape[1]), request.image)
    return request, None


def _render(output: str, classes: ClassTable, prediction: _Prediction) -> NDArray[np.uint8]:
    """The pixels of one output.  # uint8 H W or H W 3

    This uses numpy, because torch would start further threads in each writing thread.
    """
    label = prediction.label.numpy()
    if output == "train-id":
        return label
    if output == "confidence":
        assert prediction.confidence is not None
        return prediction.confidence.numpy()
    colors = np.array(classes.palette(), dtype=np.uint8).reshape(256, 3)
    table = np.array([c.label_id for c in classes.classes], dtype=np.uint8) if output == "label-id" else colors
    result = np.empty((*label.shape, *table.shape[1:]), dtype=np.uint8)
    step = max(PIXELS_AT_ONCE // label.shape[1], 1)
    for start in range(0, len(label), step):
        rows = slice(start, start + step)
        if output == "overlay":
            assert prediction.pixels is not None
            blend = (OVERLAY * colors.astype(np.float32)).take(label[rows], axis=0)  # n W 3
            blend += (1 - OVERLAY) * prediction.pixels[:, rows].permute(1, 2, 0).numpy()
            result[rows] = blend.round(out=blend)
        else:
            result[rows] = table.take(label[rows], axis=0)
    return result
