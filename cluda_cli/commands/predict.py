"""The verb `predict`: checkpoint + images of any size -> masks, colours, overlays. H W pixels of one image."""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.prefetch import Fetched, prefetch, write_png
from cluda_cli.inference.sliding import Frame, segment
from cluda_cli.inference.weights_file import Deployed, load_weights

OUTPUTS = ("train-id", "label-id", "color", "overlay", "confidence")
OVERLAY = 0.5  # share of the class colour in an overlay


@dataclass(frozen=True)
class _Job:
    """One image and where its results go."""

    source: Path
    targets: dict[str, Path]
    """Output -> file."""


@dataclass(frozen=True)
class _Prediction:
    """All that the outputs of one image are made of; what none of them needs is left out."""

    job: _Job
    image: Tensor | None  # uint8 3 H W
    label: Fetched  # uint8 H W
    confidence: Fetched | None  # uint8 H W, 255 = certain


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

    A result has the pixel grid of its image; folders keep their subfolders. Images that cannot be read are reported
    and skipped, and DataError is raised at the end. Raises DataError too if there is no image or a result would
    replace an input, SettingsError for an unknown output.
    """
    if out.exists() and not out.is_dir():
        raise SettingsError("is a file; the results need a folder", out, "name another with --out")
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown or not outputs:
        raise SettingsError(
            f"unknown output {', '.join(unknown) or '(none)'}", "--output", f"take {', '.join(OUTPUTS)}"
        )
    jobs = _plan(find_images(inputs, out), out, tuple(dict.fromkeys(outputs)))
    chosen = pick_device(device)
    deployed = load_weights(checkpoint, chosen)
    _check_label_ids(deployed.classes, outputs)
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with console.Progress("predicting", len(jobs)) as progress:

        def skip(job: _Job, problem: DataError) -> None:
            console.warn(str(problem))
            failed.append({"input": str(job.source), "error": problem.what})
            progress.advance()

        predictions = _predictions(deployed, jobs, outputs, skip)
        for job in prefetch(partial(_write, deployed.classes), predictions):
            files = {output: str(path) for output, path in job.targets.items()}
            done.append({"input": str(job.source), "outputs": files})
            progress.advance()
    if as_json:
        console.result_json({"checkpoint": str(checkpoint), "images": done, "failed": failed})
    elif done:
        console.result(str(out))
    console.info(f"{len(done)} images, {', '.join(dict.fromkeys(outputs))}, in {out}")
    if failed:
        raise DataError(f"{len(failed)} of {len(jobs)} images could not be read", "", "see the warnings above")


def newest_checkpoint(runs: Path) -> Path:
    """best.safetensors, else last.safetensors, of the run that wrote weights last. Raises DataError without any."""
    weights = [path for name in ("best", "last") for path in runs.glob(f"*/{name}.safetensors")]
    if not weights:
        raise DataError("no run with weights", runs, "train one with `cluda train`, or name weights with --ckpt")
    folder = max(weights, key=lambda path: path.stat().st_mtime).parent
    return next(path for path in weights if path.parent == folder)  # best comes before last


def find_images(inputs: Sequence[str], out: Path) -> list[tuple[Path, Path]]:
    """Every image once, with the relative path that names its results. Raises DataError if an input has none.

    Of folders, hidden files and what lies under `out` are left out.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    for text in inputs:
        path = Path(text)
        is_glob = not path.exists() and glob.has_magic(text)
        matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))] if is_glob else [path]
        images = [pair for match in matches for pair in _images_at(match, out, checked=is_glob)]
        if not images:
            if not is_glob and not path.exists():
                raise DataError("no such file or folder", text, "name images, folders of images, or globs")
            what = "no image matches" if is_glob else "no images in this folder"
            raise DataError(what, text, f"images end in {' '.join(sorted(IMAGE_SUFFIXES))}, in upper or lower case")
        for image, relative in images:
            found.setdefault(image.absolute(), (image, relative))
    return list(found.values())


def _images_at(path: Path, out: Path, checked: bool) -> Iterator[tuple[Path, Path]]:
    """The images of a folder, or one file; `checked` asks a file for the suffix of an image."""
    if path.is_file() and (not checked or path.suffix.lower() in IMAGE_SUFFIXES):
        yield path, Path(path.name)
    elif path.is_dir():
        for image in sorted(path.rglob("*")):
            relative = image.relative_to(path)
            hidden = any(part.startswith(".") for part in relative.parts)
            ours = image.resolve().is_relative_to(out.resolve())
            if image.suffix.lower() in IMAGE_SUFFIXES and image.is_file() and not hidden and not ours:
                yield image, relative


def unique_names(names: Iterable[str]) -> Iterator[str]:
    """The names; where one repeats another, even in other case, it gets a number."""
    taken: set[str] = set()
    for name in names:
        unique, number = name, 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.casefold())
        yield unique


def _plan(images: Sequence[tuple[Path, Path]], out: Path, outputs: Sequence[str]) -> list[_Job]:
    """Where the results of each image go. Raises DataError if one would replace an input."""
    jobs = []
    sources = {image.resolve() for image, _ in images}
    names = unique_names(relative.with_suffix("").as_posix() for _, relative in images)
    for (image, _), name in zip(images, names, strict=True):
        targets = {output: out / output / f"{name}.png" for output in outputs}
        for target in targets.values():
            if target.resolve() in sources:
                raise DataError("would be overwritten, and is an input", target, "name another folder with --out")
        jobs.append(_Job(image, targets))
    return jobs


def _check_label_ids(classes: ClassTable, outputs: Sequence[str]) -> None:
    """Raises SettingsError if label ids are wanted and do not fit 8 bits beside 255."""
    if "label-id" in outputs:
        unfit = [c.name for c in classes.classes if not 0 <= c.label_id < 256]
        if unfit:
            raise SettingsError(f"no 8-bit label id for {', '.join(unfit)}", "--output label-id", "take train-id")


def _predictions(
    deployed: Deployed, jobs: Sequence[_Job], outputs: Sequence[str], skip: Callable[[_Job, DataError], None]
) -> Iterator[_Prediction]:
    """Images are decoded ahead of the network; those that cannot be read are handed to `skip`."""
    settings = deployed.settings
    device = next(deployed.network.parameters()).device

    def read(job: _Job) -> tuple[Frame, Tensor | None] | DataError:
        try:
            image = read_image(job.source)
        except DataError as problem:
            return problem
        return Frame.of(image, settings.data.target_box, device), image if "overlay" in outputs else None

    def frames() -> Iterator[tuple[Frame, tuple[_Job, Tensor | None]]]:
        for job, found in zip(jobs, prefetch(read, jobs), strict=True):
            if isinstance(found, DataError):
                skip(job, found)
            else:
                yield found[0], (job, found[1])

    wanted = "confidence" in outputs
    for (job, image), label, confidence in segment(deployed.network, frames(), settings.inference, confidence=wanted):
        level = None if confidence is None else Fetched((confidence * 255).round().to(torch.uint8))
        yield _Prediction(job, image, Fetched(label), level)


def _write(classes: ClassTable, prediction: _Prediction) -> _Job:
    """Write the outputs of one image.

    In numpy, because torch would start threads of its own in each writing thread.
    """
    colors = np.array(classes.palette(), dtype=np.uint8).reshape(256, 3)
    label = prediction.label.numpy()
    for output, path in prediction.job.targets.items():
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
            assert prediction.image is not None
            blend = (OVERLAY * colors.astype(np.float32)).take(label, axis=0)  # H W 3
            blend += (1 - OVERLAY) * prediction.image.permute(1, 2, 0).numpy()
            pixels = blend.round(out=blend).astype(np.uint8)
        write_png(path, pixels)
    return prediction.job
