"""The verb `predict`: checkpoint + images of any size -> masks, colours, overlays. H W pixels of one image."""

import glob
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluda_cli import console
from cluda_cli.data.image_files import read_header
from cluda_cli.data.index import IMAGE_SUFFIXES
from cluda_cli.data.labels import ClassTable
from cluda_cli.data.transforms import read_image
from cluda_cli.errors import CludaError, DataError, SettingsError, is_out_of_memory, out_of_memory
from cluda_cli.files import locked, make_unique
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.prefetch import HostCopy, prefetch, write_png
from cluda_cli.inference.sliding import ResizedImage, fit_image, quantise, segment
from cluda_cli.inference.weights_file import TrainedNetwork, load_weights

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
        for request, problem in prefetch(partial(_write, trained.classes), predictions, _count_pixels):
            if problem:
                skip(request, problem)
                continue
            files = {output: str(path) for output, path in request.files.items()}
            done.append({"input": str(request.image), "outputs": files})
            progress.advance()
    if as_json:
        console.result_json({"checkpoint": str(checkpoint), "images": done, "failed": failed})
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
    folder = max(weights, key=lambda path: path.stat().st_mtime).parent
    return next(path for path in weights if path.parent == folder)  # best comes before last


def find_images(inputs: Sequence[str], out: Path) -> list[tuple[Path, Path]]:
    """Find every image once, with the relative path that names its results.

    In a folder, hidden files and earlier results in `out` are left out. Raises DataError if an input has no image.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    results = frozenset(os.path.realpath(out / output) for output in OUTPUTS)
    for text in inputs:
        path = Path(text)
        is_glob = not path.exists() and glob.has_magic(text)
        matches = _expand(text, results) if is_glob else [path]
        images = [pair for match in matches for pair in _list_images(match, results, checked=is_glob)]
        if not images:
            if not is_glob and not path.exists():
                raise DataError("no such file or folder", text, "name images, folders of images, or globs")
            if not is_glob and not path.is_dir():
                raise DataError("is neither a file nor a folder", text, "name images, folders of images, or globs")
            what = "no image matches" if is_glob else "no images in this folder"
            raise DataError(what, text, f"images end in {' '.join(sorted(IMAGE_SUFFIXES))}, in upper or lower case")
        for image, relative in images:
            found.setdefault(image.absolute(), (image, relative))
    return list(found.values())


def _expand(text: str, results: Collection[str]) -> list[Path]:
    """Files and folders that match a glob. `**` follows links to folders, as `_walk` does."""
    parts = Path(text).parts
    if "**" not in parts:
        return [Path(match) for match in sorted(glob.glob(text))]
    first = parts.index("**")
    folders = [Path(match) for match in sorted(glob.glob(str(Path(*parts[:first]))))]
    files = [(file, file.relative_to(folder)) for folder in folders for file in _walk(folder, results)]
    return [file for file, relative in files if _matches(relative.parts, parts[first:])]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob, of which `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _list_images(path: Path, results: Collection[str], checked: bool) -> Iterator[tuple[Path, Path]]:
    """Yield the images of a folder, or a file. With `checked`, a file must have the suffix of an image."""
    if path.is_file() and (not checked or path.suffix.lower() in IMAGE_SUFFIXES):
        yield path, Path(path.name)
    elif path.is_dir():
        for image in _walk(path, results):
            if image.suffix.lower() in IMAGE_SUFFIXES and image.is_file():
                yield image, image.relative_to(path)


def _walk(folder: Path, results: Collection[str]) -> list[Path]:
    """List the files below a folder, sorted, without hidden ones and without those in the folders `results` below it.

    Links to folders are followed after all folders that need none. Each folder is searched once, so loops end.
    """
    files: list[Path] = []
    waiting, searched = [folder], set[str]()

    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave the folder out

    while waiting:
        start = waiting.pop(0)
        for root, names, found in os.walk(start, onerror=refuse):
            real, here = os.path.realpath(root), Path(root)
            if real in searched and here == start:
                console.warn(f"{here} links to {real}, whose images are taken once")
            if real in results and here != folder:
                console.info(f"left out {here}, a folder of results")
            if real in searched or (real in results and here != folder):
                names.clear()
                continue
            searched.add(real)
            visible = sorted(name for name in names if not name.startswith("."))
            waiting += [here / name for name in visible if (here / name).is_symlink()]
            names[:] = [name for name in visible if not (here / name).is_symlink()]
            files += [here / name for name in found if not name.startswith(".")]
    return sorted(files)


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
    except DataError:
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
