"""Kill the verbs at random moments, go on, and compare with what an uninterrupted call leaves, bit for bit.

    python tests/benchmarks/kill_verbs.py --kills 40 --seed 0 [--verb train] [--folder DIR]

Each round starts one verb anew, kills it once or several times by SIGKILL, and lets it finish. A train is resumed, the
others are called again. A round fails if a file differs from that of the uninterrupted call, if a file is left over, if
a call that was not killed ends with an error, or if it prints a traceback. The exit code is the number of such rounds.

The moments are drawn from the seed, as shares of the time of the uninterrupted call. Verbs run in children of a process
that has imported everything, so that a kill costs little; each works in a folder of tiny drawn data.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from cluda_cli.data.index import Index
from cluda_cli.engine.state_file import load_state
from cluda_cli.inference.checksum import checksum

MADE = {
    "prepare": "data/prepared/one", "cache": "data/prepared/two/cache", "train": "runs/tiny", "pseudo-label": "pseudo",
    "predict": "out", "eval": "scores", "import-weights": "imported",
}  # fmt: skip
"""Verb -> the folder that it makes; cache is `prepare --cache`."""
VERBS = tuple(MADE)
LONGEST = 600.0
"""Seconds after which a call counts as hanging."""
DESCRIPTION = """
name = "{name}"
root = "{name}"
[ids]
0 = "road"
1 = "car"
[splits.train]
images = "train/images/*.png"
labels = "train/labels/*.png"
[splits.val]
images = "val/images/*.png"
labels = "val/labels/*.png"
"""
SETTINGS = """
[data]
source = "one"
target = "two"
crop = [32, 48]
source_box = false
target_box = false
workers = 0
batch_size = 2
[model]
encoder = "test_resnet"
weights = false
[model.decoder]
embed_dim = 8
channels = 8
[objectives]
feature_distance = false
[training]
steps = 12
validate_every = 5
save_every = 2
log_every = 1
pictures_every = 3
device = "cpu"
"""


def make_workplace(folder: Path, images: int = 12) -> None:
    """Two drawn domains with their descriptions, one.toml and two.toml, and the preset tiny.toml."""
    for seed, name in enumerate(("one", "two")):
        draw = np.random.default_rng(seed)
        for split, count in (("train", images), ("val", 2)):
            for i in range(count):
                label = draw.integers(0, 2, (6, 10)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
                noise = draw.integers(0, 60, (*label.shape, 3)) + 20 * seed
                for kind, pixels in (("images", (100 * label[:, :, None] + noise).astype(np.uint8)), ("labels", label)):
                    path = folder / name / split / kind / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
        (folder / f"{name}.toml").write_text(DESCRIPTION.format(name=name), encoding="utf-8")
    (folder / "tiny.toml").write_text(SETTINGS, encoding="utf-8")


def publish(weights: Path, path: Path) -> None:
    """Write weights under the names of published checkpoints."""
    renamed = {"encoder": "backbone.", "decoder": "decode_head."}
    tensors = load_file(weights)
    parts = {name: name.partition(".") for name in tensors}
    torch.save({"state_dict": {renamed[a] + c: tensors[n] for n, (a, _, c) in parts.items()}}, path)


def call(folder: Path, arguments: Sequence[str], log: Path) -> None:
    """What a child does: one call of the command line, its output into a file."""
    os.chdir(folder)
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(handle, number)
    from cluda_cli.cli import main

    main(list(arguments))


class Crashes:
    """The uninterrupted calls, and the rounds of kills that are compared with them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.moments = folder, random.Random(seed)
        self.context = get_context("forkserver")
        verbs = ("train", "prepare", "pseudo_label", "predict", "evaluate", "import_weights")
        self.context.set_forkserver_preload([f"cluda_cli.commands.{verb}" for verb in verbs])
        self.seconds: dict[str, float] = {}
        make_workplace(folder / "whole")
        for verb in VERBS:
            if verb == "import-weights":
                publish(folder / "whole" / MADE["train"] / "last.safetensors", folder / "whole" / "published.pth")
            began = time.monotonic()
            self._must_end(folder / "whole", self.arguments(verb, folder / "whole"))
            self.seconds[verb] = time.monotonic() - began

    def arguments(self, verb: str, folder: Path) -> list[str]:
        """The command line that begins the verb in a folder, or goes on with it."""
        run = folder / "runs" / "tiny"
        weights = "runs/tiny/last.safetensors"
        if verb == "train":
            begun = run / "resume" / "state.pt", run / "settings.json"
            go_on = next((option for path, option in zip(begun, RESUME, strict=True) if path.exists()), ())
            return ["train", "--preset", "tiny.toml", "--run", "runs/tiny", *go_on]
        return {
            "prepare": ["prepare", "one.toml", "--workers", "1"],
            "cache": ["prepare", "two.toml", "--workers", "1", "--cache", "24x40"],
            "pseudo-label": ["pseudo-label", "--ckpt", weights, "--threshold", "0.4", "--out", "pseudo",
                             *(["--overwrite"] if (folder / "pseudo" / "index.json").exists() else [])],
            "predict": ["predict", "two/train/images", "--ckpt", weights, "--out", "out", "--output", "color"],
            "eval": ["eval", "--ckpt", weights, "--confusion", "scores/confusion.json"],
            "import-weights": ["import-weights", "published.pth", "--preset", "tiny.toml", "--overwrite", "--out",
                               "imported/weights.safetensors"],
        }[verb]  # fmt: skip

    def round(self, verb: str, kills: int) -> str:
        """Kill a verb so many times and let it finish. Returns what is wrong, empty if nothing is."""
        folder = self.folder / "parts"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "whole", folder)
        shutil.rmtree(folder / MADE[verb])
        for _ in range(kills):
            code = self._run(folder, self.arguments(verb, folder), self.moments.uniform(0, self.seconds[verb]))
            if code not in (0, -9):
                return f"exit code {code} before the kill: {self._said()}"
            if code == 0:
                break
        else:
            code = self._run(folder, self.arguments(verb, folder), LONGEST)
        if code:
            return f"exit code {code} after the kills: {self._said()}"
        if "Traceback" in self._said():
            return self._said()
        return compare(self.folder / "whole" / MADE[verb], folder / MADE[verb])

    def _must_end(self, folder: Path, arguments: Sequence[str]) -> None:
        code = self._run(folder, arguments, LONGEST)
        if code:
            raise SystemExit(f"{' '.join(arguments)} ended with {code}: {self._said()}")

    def _run(self, folder: Path, arguments: Sequence[str], seconds: float) -> int:
        """The exit code of a call that is killed after some seconds."""
        log = self.folder / "log.txt"
        log.unlink(missing_ok=True)
        process = self.context.Process(target=call, args=(folder, arguments, log))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode or 0

    def _said(self) -> str:
        log = self.folder / "log.txt"
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


RESUME = (("--resume",), ("--overwrite",))


def compare(whole: Path, parts: Path) -> str:
    """Name the first file that differs between two folders. Times and paths are no part of the content."""
    trees = [sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) for root in (whole, parts)]
    if trees[0] != trees[1]:
        return f"other files: {sorted(set(trees[0]) ^ set(trees[1]))}"
    return next((f"{name} differs" for name in trees[0] if content(whole / name) != content(parts / name)), "")


def content(path: Path) -> object:
    """What must be equal in a file. A manifest tells when the call began, and an index when its files were written."""
    if path.name == "manifest.json":
        return None
    if path.name == "index.json":
        return Index.load(path.parent).fingerprint
    if path.name == "state.pt":
        return checksum(load_state(path))
    if path.suffix == ".safetensors":
        return checksum(load_file(path))
    return path.read_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", choices=VERBS, action="append")
    parser.add_argument("--folder", type=Path, help="work here, in a new folder, and keep it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        crashes = Crashes(options.folder or Path(temporary), options.seed)
        left, bad, rounds = options.kills, 0, 0
        while left > 0:
            verb = (options.verb or VERBS)[rounds % len(options.verb or VERBS)]
            kills = min(left, crashes.moments.choice((1, 1, 2, 4)) if verb == "train" else 1)
            wrong = crashes.round(verb, kills)
            left, rounds, bad = left - kills, rounds + 1, bad + bool(wrong)
            print(f"{options.kills - left:4} kills: {verb}: {wrong or 'equal'}", flush=True)
    print(f"{options.kills} kills in {rounds} rounds, {bad} not as they should be")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 125))
