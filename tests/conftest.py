"""Fixtures shared by all tests."""

import json
import multiprocessing
import os
import resource
import runpy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluda_cli import presets
from cluda_cli.data.cache import Box, Cache
from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import CITYSCAPES, IGNORE, ClassTable
from cluda_cli.files import write_json
from cluda_cli.models.encoders import build_encoder
from cluda_cli.preparation.caching import write_cache
from cluda_cli.settings import Model, Settings

GOLDEN = Path(__file__).parent / "golden"
Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]


@pytest.fixture
def golden() -> Golden:
    """Load the vectors measured on a reference implementation: `golden("group/case")` -> tensors, description.

    Small files are part of the project; the full set is looked for in the folder that CLUDA_GOLDEN names.
    """

    def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        folders = [GOLDEN, *([Path(os.environ["CLUDA_GOLDEN"])] if os.environ.get("CLUDA_GOLDEN") else [])]
        for folder in folders:
            description = folder / f"{name}.json"
            if description.is_file():
                tensors = folder / f"{name}.safetensors"
                return (load_file(tensors) if tensors.is_file() else {}), json.loads(description.read_text())
        pytest.skip(f"{name} is not among the committed vectors and CLUDA_GOLDEN does not hold it")

    return load


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors are slower on many threads, much slower where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Loader processes, and those of `start_forked`, are forked from one process that has everything imported."""
    multiprocessing.set_forkserver_preload(["cluda_cli.commands.train"])
    forkserver.ensure_running()


class Forked:
    """`cluda` or a script, without the seconds of its imports. It has the interface of a Popen."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._said, output = multiprocessing.Pipe(duplex=False)
        variables = {"arguments": arguments, "environment": environment, "output": output}
        command = (Path(__file__).parent / "forked.py", variables, "__main__")
        self._process = multiprocessing.get_context("forkserver").Process(target=runpy.run_path, args=command)
        self._process.start()
        output.close()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """All that was written to stdout and stderr; ends when no process, of its ranks and loaders too, holds them."""
        said = b""
        while chunk := self._read(timeout):
            said += chunk
        self._process.join(timeout)
        return said.decode(), None

    def _read(self, timeout: float) -> bytes:
        assert connection.wait([self._said], timeout), "nothing was written and nothing ended"
        return os.read(self._said.fileno(), 2**16)


@pytest.fixture
def start_forked(fork_server: None) -> Iterator[Callable[..., Forked]]:
    """`start_forked("cluda", "train", ...)`, or with the path of a script: a process, which ends with the test."""
    started: list[Forked] = []

    def start(*arguments: object, **environment: str) -> Forked:
        started.append(Forked([str(argument) for argument in arguments], environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """`with full_disk():` no file can be larger than 100 kB. A write beyond that fails as on a full disk."""

    @contextmanager
    def limit() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


TINY_CLASSES = ClassTable(tuple(c for c in CITYSCAPES if c.name in {"road", "building", "sky", "person", "car"}))
TINY_SIZE = (48, 80)
TINY_ENCODER = "test_efficientnet"


def write_dataset(data_root: Path, name: str, seed: int, *, labelled_train: bool = True, images: int = 4) -> Index:
    """A prepared dataset of noisy colour blocks: `images` for training and two for validation."""
    draw = np.random.default_rng(seed)
    root, folder = data_root / name, data_root / "prepared" / name
    colors = np.array([c.color for c in TINY_CLASSES.classes], dtype=np.int64)
    splits = {}
    for split, count in (("train", images), ("val", 2)):
        items = []
        for i in range(count):
            blocks = draw.integers(0, len(TINY_CLASSES), (6, 10))
            label = blocks.repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
            image = (colors[label] + draw.integers(-20, 21, (*TINY_SIZE, 3)) + 20 * seed).clip(0, 255).astype(np.uint8)
            label[:3] = IGNORE
            (root / split).mkdir(parents=True, exist_ok=True)
            (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / split / f"{i}.png")
            Image.fromarray(label).save(folder / "labels" / split / f"{i}.png")
            pixels = {int(c): int(n) for c, n in zip(*np.unique(label, return_counts=True), strict=True) if c != IGNORE}
            has_label = labelled_train or split == "val"
            path = f"labels/{split}/{i}.png" if has_label else None
            items.append(Item(f"{split}/{i}.png", path, TINY_SIZE, pixels if has_label else {}))
        splits[split] = tuple(items)
    index = Index(name, folder, root, TINY_CLASSES, splits)
    index.save()
    return index


def write_tiny_data(folder: Path) -> Path:
    """A data root with the prepared datasets `clean` (labelled) and `noisy` (labels for validation only)."""
    write_dataset(folder / "data", "clean", seed=1)
    write_dataset(folder / "data", "noisy", seed=2, labelled_train=False)
    return folder / "data"


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Index]:
    """`make_dataset("camera", images=8)`: a dataset as of `write_dataset` in the data root `tmp_path/data`."""

    def make(name: str, *, images: int = 4, labelled_train: bool = True) -> Index:
        return write_dataset(tmp_path / "data", name, seed=3, labelled_train=labelled_train, images=images)

    return make


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    return write_tiny_data(tmp_path)


@pytest.fixture
def noise_index(tmp_path: Path) -> Index:
    """Three labelled images of noise, the last a portrait, with a manifest as `prepare` writes it."""
    folder, draw, items = tmp_path / "noise", np.random.default_rng(0), []
    folder.mkdir()
    for i, (height, width) in enumerate(((60, 90), (60, 90), (80, 70))):
        label = draw.integers(0, 5, (height // 10, width // 10)).astype(np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        Image.fromarray(label).save(folder / f"{i}_label.png")
        pixels = {k: int((label == k).sum()) for k in range(5)}
        items.append(Item(f"{i}.png", f"{i}_label.png", (height, width), pixels))
    write_json(folder / "manifest.json", {"inputs": "made"})
    return Index("noise", folder, folder, ClassTable(CITYSCAPES), {"train": tuple(items)})


@pytest.fixture
def store_noise(noise_index: Index) -> Callable[..., Cache]:
    """Write a cache of `noise_index` for a box."""

    def store(box: Box, inputs: str = "made", second: str = "1-k1") -> Cache:
        names = {"0.png": "town/0-k0", "1.png": second, "2.png": "2-k2"}
        return write_cache(noise_index, names, inputs, box, workers=1)

    return store


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the encoder of `tiny_settings`, to be read only."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build_encoder(Model(encoder=TINY_ENCODER, weights=False))
    save_file(encoder.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def make_tiny_settings(tiny_encoder: Path) -> Callable[[Path], Settings]:
    """Every objective on, with encoder weights from a file, at a size that takes many steps a second.

    The data are written into the `data` folder of the given one, unless they are there.
    """

    def make(folder: Path) -> Settings:
        data = folder / "data"
        return presets.load(["daformer-cluda"], {
            "data": {"source": "clean", "target": "noisy",
                     "root": str(data if data.exists() else write_tiny_data(folder)), "crop": [32, 48],
                     "source_box": False, "target_box": False, "workers": 0},
            "model": {"encoder": TINY_ENCODER, "weights": str(tiny_encoder),
                      "decoder": {"embed_dim": 8, "channels": 8}},
            "optimizer": {"lr": 1e-3, "decoder_lr_factor": 1.0, "warmup": 2},
            "training": {"steps": 6, "validate_every": 4, "save_every": 2, "log_every": 1, "pictures_every": 3,
                         "device": "cpu"},
            "objectives": {"feature_distance": {"min_share": 0.3}},
        })  # fmt: skip

    return make


@pytest.fixture
def tiny_settings(make_tiny_settings: Callable[[Path], Settings], tmp_path: Path) -> Settings:
    return make_tiny_settings(tmp_path)
