"""Endless, resumable batches of source and target crops. B batch, H W pixels of the crop, h w of its inside.

Batch number t is a function of (seed, t) alone: any process can make it, in any order, without what came before.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy import random
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cluda_cli import settings
from cluda_cli.data.cache import SPLIT
from cluda_cli.data.frames import Frames
from cluda_cli.data.index import Index
from cluda_cli.data.labels import IGNORE
from cluda_cli.data.sampling import RareClasses, diverse_crop, random_crop, rare_crop
from cluda_cli.data.transforms import resize_label_region
from cluda_cli.errors import CludaError, DataError, EnvironmentProblem, SettingsError
from cluda_cli.seeds import derive_seed


@dataclass(frozen=True)
class Batch:
    """What one step learns from. Crops of images smaller than the crop are padded at the bottom and the right."""

    source_image: Tensor  # B 3 H W, uint8 RGB, 0 on padding
    source_label: Tensor  # B H W, uint8 train ids, 255 = ignore, also on padding
    source_inside: Tensor  # B H W, bool, False on padding
    target_image: Tensor  # B 3 H W, uint8 RGB, 0 on padding
    target_inside: Tensor  # B H W, bool, False on padding
    target_valid: Tensor  # B H W, bool, where pseudo-labels count: inside and not in the margins of the frame

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device; a copy of pinned memory to a GPU does not wait."""
        wait = device.type != "cuda"
        return Batch(*(getattr(self, field.name).to(device, non_blocking=not wait) for field in fields(self)))

    def pin_memory(self) -> "Batch":
        """Called by the loader."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


def batches(
    source: Index,
    target: Index,
    data: settings.Data,
    seed: int,
    start: int,
    stop: int,
    pin_memory: bool = False,
    positions: range | None = None,
) -> Generator[Batch, None, None]:
    """The batches of steps start, ..., stop - 1, made by `data.workers` processes; with 0 workers, the same batches.

    Close it (contextlib.closing) to end the processes when not all batches are wanted.

    `pin_memory` speeds up copies to a CUDA device and needs one. `positions` are the images wanted of each batch;
    unset: all of them.
    Raises DataError at once if the source has no labels or a domain no training images, SettingsError if the margins
    leave nothing of a target image; while iterating, DataError that names an unreadable file.
    """
    steps = Steps(source, target, data, seed, positions)
    workers = min(data.workers, max(stop - start, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "This DataLoader will create"
        )  # more workers than cores are the user's choice
        loader = DataLoader(
            steps,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            multiprocessing_context=_context() if workers else None,
            generator=torch.Generator(),  # the loader would draw from the global one
        )
    return _iterate(loader)


class Steps(Dataset["Batch | CludaError"]):
    """The batches by step number."""

    def __init__(
        self, source: Index, target: Index, data: settings.Data, seed: int, positions: range | None = None
    ) -> None:
        self.source, self.target, self.data, self.seed = source, target, data, seed
        self.positions = range(data.batch_size) if positions is None else positions
        self.source_items = source.labelled(SPLIT)
        if not self.source_items:
            source.split(SPLIT)
            raise DataError(f'no image of split "{SPLIT}" has a label', source.folder, "the source must be labelled")
        if not any(item.pixels for item in self.source_items):
            raise DataError("the labels hold no pixel of any class", source.folder, "check its description")
        self.target_items = target.split(SPLIT)
        rare, items = data.rare_class, self.source_items
        self.rare = RareClasses(items, source.classes, rare, data.crop) if rare else None
        self.margins = target.margins if data.target_margins is None else data.target_margins
        top, bottom, left, right = self.margins
        for height, width in {item.size for item in self.target_items}:
            if top + bottom >= height or left + right >= width:
                raise SettingsError(
                    f"{list(self.margins)} leave nothing of a {height} x {width} image of {target.name}",
                    "data.target_margins",
                    "top, bottom, left and right in pixels of the original frame",
                )
        self.source_frames = Frames(source, data.source_box)
        self.target_frames = Frames(target, data.target_box)

    def __getitem__(self, step: int) -> "Batch | CludaError":
        """One batch. An error is returned, not raised: a loader process would wrap it in its traceback."""
        try:
            samples = [
                self.source_sample(np.random.default_rng(derive_seed(self.seed, "source", step, i)))
                + self.target_sample(np.random.default_rng(derive_seed(self.seed, "target", step, i)))
                for i in self.positions
            ]
        except CludaError as error:
            return error
        return Batch(*map(torch.stack, zip(*samples, strict=True)))

    def source_sample(self, rng: random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Image, label and inside of one crop.

        The crop is chosen on the label, so that of the image, which takes longest to decode, only the crop is read or
        resized, and once. The law is that of repeating the whole pipeline until the crop is accepted.
        """
        if self.rare:
            train_id, position = self.rare.draw(rng)
        else:
            position = int(rng.integers(len(self.source_items)))
        item, data = self.source_items[position], self.data
        label = self.source_frames.label(item)  # h w
        if self.rare:
            crop = rare_crop(rng, label, data.crop, data.max_class_share, train_id, self.rare.crop_pixels)
        else:
            crop = diverse_crop(rng, label, data.crop, data.max_class_share)
        image, label = _flip(rng, self.source_frames.image(item, crop), crop.of(label))
        inside = torch.ones_like(label, dtype=torch.bool)
        return _pad(image, data.crop, 0), _pad(label, data.crop, IGNORE), _pad(inside, data.crop, 0)

    def target_sample(self, rng: random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Image, inside and valid of one crop."""
        item, data = self.target_items[rng.integers(len(self.target_items))], self.data
        size = self.target_frames.size(item)
        crop = random_crop(rng, size, data.crop)
        (height, width), (top, bottom, left, right) = item.size, self.margins
        valid = torch.zeros(height, width, dtype=torch.bool)
        valid[top : height - bottom, left : width - right] = True
        valid = resize_label_region(valid, size, crop.top, crop.left, crop.height, crop.width)
        image, valid = _flip(rng, self.target_frames.image(item, crop), valid)
        inside = torch.ones_like(valid)
        return _pad(image, data.crop, 0), _pad(inside, data.crop, 0), _pad(valid, data.crop, 0)


def _flip(rng: random.Generator, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Both mirrored left to right, or neither, equally likely."""
    return (image.flip(-1), label.flip(-1)) if rng.random() < 0.5 else (image, label)


def _pad(region: Tensor, size: tuple[int, int], value: int) -> Tensor:
    """... h w at the top left of ... H W; as it is where it has that size."""
    if region.shape[-2:] == size:
        return region
    padded = region.new_full((*region.shape[:-2], *size), value)
    padded[..., : region.shape[-2], : region.shape[-1]] = region
    return padded


def _iterate(loader: "DataLoader[Batch | CludaError]") -> Generator[Batch, None, None]:
    """Pass batches on and raise what the loader processes report."""
    try:
        for batch in loader:
            if isinstance(batch, CludaError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # A process that dies shows as the loader's own error, or as a connection that breaks off; an error that a
        # process reports ("Caught ... in DataLoader worker") is a fault of this program and stays as it is.
        died = str(error).startswith("DataLoader worker") or not isinstance(error, RuntimeError)
        if not loader.num_workers or not died or "in DataLoader worker" in str(error):
            raise
        raise EnvironmentProblem(
            "a loader process ended unexpectedly", "data.workers", "memory may be short: lower data.workers, or set 0"
        ) from error


def _context() -> multiprocessing.context.BaseContext:
    """Processes that start clean: a plain fork of a process with GPU and progress threads can hang."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not in each process
    return context


def _start_worker(_: int) -> None:
    """Stopping is the training process's decision: it saves first, then ends its loaders.

    Ctrl-C and a scheduler's SIGTERM reach all processes at once; a second SIGTERM is the training process's own. When
    that is killed outright, its loaders end by themselves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of the training process; the loader's own watch sees only the server that forks."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
