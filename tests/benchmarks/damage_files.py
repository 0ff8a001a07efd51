"""Damage the files that cluda writes, read them as the verbs do, and count tracebacks and silent uses.

    python tests/benchmarks/damage_files.py --count 1000 --seed 0

Files: index, journal, manifest and cache of a prepared dataset; settings, manifest, metrics, state and weights of a
run. Damage: bytes flipped, the end cut off, or one value of the content replaced by a hostile one and written again. A
reader may refuse with one of cluda's errors, or may read a content that is still valid. It must not end with another
exception (a traceback for the user). What a checksum covers must not be used with another content: flipped and cut
state, weights and journal, all of an index but its name, and what `prepare` makes again from a damaged manifest. A
change of the settings must be announced. Otherwise the use is silent. The exit code counts both.
"""

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kill_verbs import make_workplace
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cluda_cli import console, presets
from cluda_cli.commands.prepare import prepare
from cluda_cli.commands.train import train
from cluda_cli.data.datasets import Datasets
from cluda_cli.data.frames import Frames
from cluda_cli.data.index import find, read_stamp, seen_classes
from cluda_cli.data.sampling import Crop
from cluda_cli.engine.folder import RunFolder
from cluda_cli.engine.run import Run
from cluda_cli.engine.state_file import load_state
from cluda_cli.errors import CludaError
from cluda_cli.inference.checksum import checksum
from cluda_cli.inference.weights_file import load_weights

CPU = torch.device("cpu")
HOSTILE: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: -1, lambda: 10**30, lambda: 1e308, lambda: float("inf"), lambda: float("nan"),
    str, lambda: "x", lambda: "a\0b", lambda: "../../etc", lambda: "\ud800", lambda: "[/n]\x1b[2J", lambda: "9" * 5000,
    list, lambda: [[]], lambda: [1, 2], dict, lambda: {"x": {}}, lambda: json.loads("[" * 90 + "]" * 90),
)  # fmt: skip
ALWAYS_CHECKED = ("index.json", "cache.json", "manifest.json")
Reader = Callable[[], str]


class Damage:
    """A finished tiny run, and readers of its files. A reader returns what it made of the content."""

    def __init__(self, folder: Path) -> None:
        make_workplace(folder, images=4)
        data = folder / "data"
        for name in ("one", "two"):
            prepare(str(folder / f"{name}.toml"), data, workers=1, cache="24x40")
        options = {"data": {"root": str(data)}, "training": {"steps": 2, "validate_every": 1, "pictures_every": 0}}
        settings = presets.load([str(folder / "tiny.toml")], options)
        self.files = RunFolder(folder / "run")
        train(settings, self.files.path)
        self.source, self.target = find("one", data), find("two", data)
        self.run = Run(settings, [self.source], CPU, resumed=True)
        one = self.source.folder
        self.readers: dict[Path, Reader] = {
            one / "index.json": self._read_index,
            one / "journal.jsonl": lambda: self._prepare(folder / "one.toml", data),
            one / "manifest.json": lambda: self._prepare(folder / "one.toml", data),
            one / "cache" / "24x40" / "cache.json": self._read_cache,
            self.files.settings: lambda: presets.resume(self.files.path, {}, []).model_dump_json(),
            self.files.manifest: self._resume,
            self.files.metrics: self._resume,
            self.files.state: self._read_state,
            self.files.best: self._read_weights,
        }
        self.kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.stamps = {path: read_stamp(path) for path in self.kept}
        self.expected = {path: reader() for path, reader in self.readers.items()}
        self.restore()

    def restore(self) -> None:
        for path, stamp in self.stamps.items():
            if read_stamp(path) != stamp:
                path.write_bytes(self.kept[path])
                os.utime(path, ns=(stamp[1], stamp[1]))

    def _read_index(self) -> str:
        index = find("one", self.source.folder.parent.parent)
        index.check_files()
        return f"{index.fingerprint} {seen_classes([index])} {[index.image_path(i) for i in index.split('train')]}"

    def _prepare(self, description: Path, data: Path) -> str:
        (self.source.folder / "index.json").unlink()  # otherwise there is nothing to do
        return prepare(str(description), data, workers=1)[0].fingerprint

    def _read_cache(self) -> str:
        frames, whole = Frames(self.source, (24, 40)), Crop(0, 0, 24, 40)
        return checksum([[frames.image(i, whole), frames.label(i)] for i in self.source.split("train")])

    def _resume(self) -> str:
        self.files.resume(self.run, self.files.read_saved(Datasets((self.source,), self.target, self.target, None)))
        return ""

    def _read_state(self) -> str:
        state = load_state(self.files.state)
        self.run.load_state_dict(state)
        return checksum(state)

    def _read_weights(self) -> str:
        trained = load_weights(self.files.best, CPU)
        tensors = checksum(dict(trained.network.state_dict()))
        return f"{tensors} {trained.classes} {trained.seen} {trained.step} {trained.network.normalisation}"


def flip(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 4))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def edit(path: Path, draw: random.Random) -> None:
    """Replace one value of the content by a hostile one, without a checksum."""
    hostile = draw.choice(HOSTILE)()
    if path.suffix == ".pt":
        torch.save(replace_one(load_state(path), hostile, draw), path)
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["cluda"])
        text = json.dumps(replace_one(description, hostile, draw))
        save_file(load_file(path), path, metadata={"cluda": text})
    elif path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        number = draw.randrange(len(lines))
        lines[number] = edit_line(lines[number], hostile, draw)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(replace_one(content, hostile, draw)), encoding="utf-8")


def edit_line(line: str, hostile: Any, draw: random.Random) -> str:
    """Replace one value of a line. In a journal, the checksum before it is that of the new content."""
    start = line.index("{" if line.startswith("{") else "[")
    text = json.dumps(replace_one(json.loads(line[start:]), hostile, draw))
    return f"{zlib.crc32(text.encode()):08x} {text}" if start else text


def replace_one(content: Any, value: Any, draw: random.Random) -> Any:
    """The content with one value, at any depth, replaced."""
    if draw.random() < 0.15 or not isinstance(content, dict | list) or not content:
        return value
    key = draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
    content[key] = replace_one(content[key], value, draw)
    return content


def run_all(count: int, seed: int, folder: Path, only: Sequence[str] = ()) -> Counter[str]:
    """Damage so many files. Counts outcomes, and prints each traceback and each silent use."""
    draw, talk = random.Random(seed), io.StringIO()
    with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
        damage = Damage(folder)
    paths = [path for path in damage.readers if not only or path.name in only]
    found: Counter[str] = Counter()
    for number in range(count):
        path, kind = draw.choice(paths), draw.choice(("flip", "flip", "cut", "edit"))
        if kind == "edit":
            edit(path, draw)
        else:
            path.write_bytes((flip if kind == "flip" else cut)(damage.kept[path], draw))
        talk = io.StringIO()
        try:
            with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
                outcome = judge(damage, path, kind, talk)
        except (CludaError, OSError) as problem:
            outcome = "refused"
            with contextlib.redirect_stderr(talk):
                console.error(problem if isinstance(problem, CludaError) else CludaError(str(problem)))
        except Exception:
            outcome = "traceback"
            print(f"number {number}, {path.name}, {kind}:\n{traceback.format_exc(limit=-3)}")
        if outcome == "silent":
            print(f"number {number}, {path.name}, {kind}: used without a word")
        found[outcome] += 1
        damage.restore()
    return found


def judge(damage: Damage, path: Path, kind: str, talk: io.StringIO) -> str:
    """Read a damaged file; whether its content is the old one, and if not, whether that is said or can be known."""
    if damage.readers[path]() == damage.expected[path]:
        return "same content"
    if path == damage.files.settings:
        return "announced" if "resuming with another" in talk.getvalue() else "silent"
    if path.name in ALWAYS_CHECKED:
        return "silent"
    checked = path in (damage.files.state, damage.files.best) or path.name == "journal.jsonl"
    return "silent" if checked and kind != "edit" else "valid content"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", action="append", default=[], help="only files of this name")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(options.count, options.seed, Path(folder), options.file)
    print(f"{options.count} damaged files: {', '.join(f'{number} {name}' for name, number in sorted(found.items()))}")
    return found["traceback"] + found["silent"]


if __name__ == "__main__":
    sys.exit(min(main(), 125))
