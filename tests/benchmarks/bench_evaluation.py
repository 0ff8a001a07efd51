"""Share of the wall time of `eval`, `predict` and `pseudo-label` that is spent in the network, and where the rest goes.

    python tests/benchmarks/bench_evaluation.py [--images 6] [--rounds 3] [--device auto]

Images are synthetic PNGs of 2048 x 1024 pixels that compress like photographs, or those of a prepared dataset with
--ckpt WEIGHTS --dataset NAME --data-root ROOT; the network of the synthetic ones has random weights: MobileNetV2 with a
decoder 64 wide, the smallest of the presets, so that all the rest weighs most. Reading weights is not counted; the
first image, which nothing overlaps, is. The verbs take turns; of the rounds the median is shown.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from cluda_cli import console, settings
from cluda_cli.commands import predict, pseudo_label
from cluda_cli.data.index import Index, Item, find
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.data.transforms import read_image
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.metrics import Confusion
from cluda_cli.inference.scoring import score
from cluda_cli.inference.sliding import fit_image, predict_labels
from cluda_cli.inference.weights_file import NetworkDescription, TrainedNetwork, load_weights, save_weights
from cluda_cli.models.segmenter import Segmenter


def synthetic(folder: Path, images: int, size: tuple[int, int], box: tuple[int, int]) -> tuple[Path, Path]:
    """A prepared dataset "frames" under `folder`, and weights; the data root and the weights file."""
    draw, (height, width) = np.random.default_rng(0), size
    classes = ClassTable(CITYSCAPES)
    prepared, items = folder / "prepared" / "frames", []
    (folder / "frames").mkdir(parents=True)
    prepared.mkdir(parents=True)
    for i in range(images):
        coarse = Image.fromarray(draw.integers(0, 256, (14, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + draw.integers(-2, 3, (height, width, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "frames" / f"{i}.png")
        blocks = Image.fromarray(draw.integers(0, len(classes), (16, 32), dtype=np.uint8))
        blocks.resize((width, height), Image.Resampling.NEAREST).save(prepared / f"{i}.png")
        items.append(Item(f"{i}.png", f"{i}.png", size))
    Index("frames", prepared, folder / "frames", classes, {"val": tuple(items)}).save()
    torch.manual_seed(0)
    small = settings.Decoder(embed_dim=64, channels=64)
    model = settings.Model(encoder="mobilenetv2_100", weights=False, decoder=small)
    chosen = settings.Settings(
        data=settings.Data(root=folder, target="frames", target_box=box),
        model=model,
        objectives=settings.Objectives(feature_distance=None),
    )
    weights = folder / "run" / "last.safetensors"
    description = NetworkDescription(
        settings=chosen, classes=classes, seen=classes.names, network_name="student", step=0
    )
    save_weights(weights, Segmenter(model, len(classes)).state_dict(), description)
    return folder, weights


class Clock:
    """Seconds in the network."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._began = device, 0.0, 0.0
        torch.nn.modules.module.register_module_forward_pre_hook(self._begin)
        torch.nn.modules.module.register_module_forward_hook(self._end)

    def now(self) -> float:
        if self.device.type == "cuda":  # which makes the network wait for what overlaps it, so the share is a bound
            torch.cuda.synchronize()
        return time.perf_counter()

    def _begin(self, module: torch.nn.Module, _inputs: object) -> None:
        if isinstance(module, Segmenter):
            self._began = self.now()

    def _end(self, module: torch.nn.Module, _inputs: object, _output: object) -> None:
        if isinstance(module, Segmenter):
            self.seconds += self.now() - self._began


def verbs(trained: TrainedNetwork, index: Index, device: str, out: Path) -> dict[str, Callable[[], object]]:
    """What is measured; each writes into the temporary folder `out`."""
    data, weights = trained.settings.data, trained.path
    pictures = [str(index.image_path(item)) for item in index.split("val")]

    def evaluate() -> None:
        score(
            trained.network, index, split="val", classes=trained.classes, seen=trained.seen, box=data.target_box,
            evaluation=trained.settings.inference, device=pick_device(device),
        )  # fmt: skip

    def loaded(verb: Callable[[], object]) -> Callable[[], object]:
        """The verb without the time to read its weights."""

        def run() -> None:
            with (
                mock.patch.object(predict, "load_weights", lambda *_: trained),
                mock.patch.object(pseudo_label, "load_weights", lambda *_: trained),
            ):
                verb()

        return run

    def run_predict(*outputs: str) -> Callable[[], object]:
        return loaded(
            lambda: predict.predict(pictures, checkpoint=weights, out=out / "masks", outputs=outputs, device=device)
        )

    shown = out / "dataset"
    replace(index, folder=shown).save()
    arguments = {"dataset": str(shown), "split": "val", "out": out / "labelled", "overwrite": True, "device": device}
    return {
        "eval": evaluate,
        "predict, train-id": run_predict("train-id"),
        "predict, color + overlay": run_predict("color", "overlay"),
        "pseudo-label": loaded(lambda: pseudo_label.pseudo_label(weights, **arguments)),
    }


def shares(trained: TrainedNetwork, index: Index, device: str, rounds: int) -> list[list[str]]:
    """Rows of a table: verb, images per second, share of the wall time in the network, busy processors."""
    clock = Clock(pick_device(device))
    measured: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, verb in verbs(trained, index, device, Path(folder)).items():
                clock.seconds, busy, began = 0.0, time.process_time(), clock.now()
                with redirect_stdout(io.StringIO()):  # where the verbs say which folder they wrote
                    verb()
                wall = clock.now() - began
                measured.setdefault(name, []).append((wall, clock.seconds, time.process_time() - busy))
    images, rows = len(index.split("val")), []
    for name, runs in measured.items():
        wall = statistics.median(run[0] for run in runs)
        inside = statistics.median(run[1] / run[0] for run in runs)
        busy = statistics.median(run[2] for run in runs)
        rows.append([name, f"{images / wall:.2f}", f"{100 * inside:.0f} %", f"{1000 * busy / images:.0f}"])
    return rows


def stages(trained: TrainedNetwork, index: Index, device: torch.device, rounds: int) -> list[list[str]]:
    """Rows of a table: what is done to one image, milliseconds of it alone."""
    item, chosen = index.split("val")[0], trained.settings
    image = read_image(index.image_path(item))
    resized = fit_image(image, chosen.data.target_box, device)
    [(label, _)] = predict_labels(trained.network, [resized], chosen.evaluation)
    confusion = Confusion(len(trained.classes), device=device)
    parts: dict[str, Callable[[], object]] = {
        "decode": lambda: read_image(index.image_path(item)),
        "resize": lambda: fit_image(image, chosen.data.target_box, device),
        "network and labels": lambda: predict_labels(trained.network, [resized], chosen.evaluation),
        "the same, with confidence": lambda: predict_labels(
            trained.network, [resized], chosen.evaluation, confidence=True
        ),
        "confusion": lambda: confusion.update(label, label),
    }
    rows = []
    for name, part in parts.items():
        times = []
        for _ in range(rounds):
            began = time.process_time() if device.type == "cpu" else time.perf_counter()
            part()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.process_time() if device.type == "cpu" else time.perf_counter()) - began)
        rows.append([name, f"{1000 * statistics.median(times):.1f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Share of the wall time in the network.")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--dataset")
    parser.add_argument("--data-root", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, weights = options.data_root, options.ckpt
        if weights is None:
            box = (540 * options.size[0] // 1024, options.size[1] // 2)
            root, weights = synthetic(Path(folder), options.images, tuple(options.size), box)
        device = pick_device(options.device)
        trained = load_weights(weights, device)
        data = trained.settings.data
        index = find(options.dataset or data.target, root or data.root)
        index = replace(index, splits={"val": tuple(index.labelled("val")[: options.images])})
        rows = shares(trained, index, options.device, options.rounds)
        threads = f"{torch.get_num_threads()} threads, {device}, torch {torch.__version__}"
        title = f"{len(index.split('val'))} images, {options.rounds} rounds, {threads}"
        console.result_table(title, ["verb", "images/s", "in the network", "processor ms/image"], rows)
        rows = stages(trained, index, device, options.rounds)
        console.result_table("one image", ["part", "ms of processor" if device.type == "cpu" else "ms"], rows)


if __name__ == "__main__":
    main()
