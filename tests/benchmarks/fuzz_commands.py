"""Give command lines to `cluda`, realistic and hostile ones, and judge how each call ends.

    python tests/benchmarks/fuzz_commands.py --count 300 --seed 0 [--verb train]

A line is one that a user could type over a small workplace of drawn data, and then, mostly, changed: an option added,
left out, given twice, of another verb, or with a value that fits badly. The workplace has what users have: a folder
without images, a broken picture, a text with the name of a picture, a pipe, a loop of links, a name that is not UTF-8,
masks beside images, a damaged weights file. A call must

- end with a documented exit code, within a time;
- say nothing but one error on stderr if it fails, none if it does not, in lines that can be read, without a traceback;
- leave no temporary file or lock, and no file that is cut short;
- change nothing if it is refused as a wrong call, and never a file that is input.

Calls run in children of a process that has imported everything, each in a copy of the workplace, without network.
The exit code is the number of calls that break a rule.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import torch
from fuzz_settings import draw_tree, spell
from kill_verbs import make_workplace, publish
from PIL import Image
from safetensors.torch import load_file
from typer.main import get_command

from cluda_cli import presets
from cluda_cli.cli import app
from cluda_cli.data.image_files import has_end
from cluda_cli.files import sha256

LONGEST = 600.0
"""Seconds after which a call counts as hanging."""
MEMORY = 8 * 2**30
LONGEST_LINE = 2000
CODES = (0, 1, 2, 3, 4, 130)
WEIGHTS = "runs/tiny/best.safetensors"
LINES = (
    "prepare one.toml", "prepare two.toml --check", "prepare two.toml --cache 24x40", "prepare masks.toml --skip-bad",
    "prepare broken.toml", "prepare gta --data-root data", "prepare demo --check", "prepare mixed.toml --workers 1",
    "train --preset tiny.toml --steps 1", "train --preset tiny.toml --run runs/tiny --resume --steps 3",
    "train --preset tiny.toml --run runs/new --seed 3 --steps 1",
    "train --preset tiny.toml --run runs/tiny --overwrite --steps 1",
    "train --preset tiny.toml --source one --source two --steps 1", "train --preset dacs --target two --resume",
    "train --preset runs/tiny/settings.json --run again --steps 1 --device cpu",
    "train --preset tiny.toml --seeds 0,1 --steps 1 --run group", "compare runs/tiny", "compare runs/tiny data --json",
    "compare runs/tiny runs/tiny --baseline runs/new", "compare runs/tiny copied --baseline copied --json",
    "bench --preset tiny.toml --steps 1 --json", "bench --preset tiny.toml --data --steps 1 --device cpu",
    "eval --ckpt runs/tiny", f"eval --ckpt {WEIGHTS} --json --dataset one --split train",
    f"eval --ckpt {WEIGHTS} --confusion scores/matrix.json", "eval --ckpt damaged.safetensors",
    f"predict two/val/images --ckpt {WEIGHTS} --out out", f"predict pictures --ckpt {WEIGHTS} --output color --json",
    "predict two/**/*.png --output train-id --output confidence",
    f"predict pictures/0.png --ckpt {WEIGHTS} --out two/val",
    "predict two/val/images pictures/0.png --output overlay --out pictures",
    f"pseudo-label --ckpt {WEIGHTS} --threshold 0.4 --out pseudo", f"pseudo-label --ckpt {WEIGHTS} --per-class --json",
    f"pseudo-label --ckpt {WEIGHTS} --split val --dataset one --out pseudo --overwrite",
    "import-weights published.pth --preset tiny.toml",
    "import-weights published.pth --preset tiny.toml --out w.safetensors",
    "import-weights damaged.pth --preset tiny.toml --overwrite --json", f"import-weights {WEIGHTS} --preset tiny.toml",
    "presets", "presets list", "presets show dacs small", "presets show tiny.toml --set training.seed=3", "--version",
)  # fmt: skip
VALUES = (
    "", " ", "-", "--", ".", "..", "missing", "empty", "pictures", "pictures/0.png", "pictures/text.png", "pipe",
    "loop", "one", "one.toml", "tiny.toml", "broken.toml", "notes.txt", "runs", "runs/tiny", WEIGHTS, "two",
    "damaged.pth", "damaged.safetensors", "published.pth", "/dev/null", "/dev/full", "two/train/images/*.PNG",
    "[z-a]*", "two//val/**", "**", "x" * 300, "é" * 120, "caf\udce9", "[/n]", "[bold]", "a\nb", "\x1b[2J", "0", "-1",
    "1", "2.5", "nan", "1e400", "9" * 400, "original", "24x40", "0x0", "cpu", "cuda:9", "dacs", "small", "val",
    "train", "teacher", "label-id", "data/prepared/one", "../two", "a=b", "training.seed=4", "data.crop=[8, 8]",
    "model.encoder=vit",
)  # fmt: skip
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
LEFT_ALONE = ("training.steps", "training.device", "data.workers", "model.encoder", "data.root")
"""Settings that decide how long a call takes."""


def furnish(folder: Path) -> None:
    """What users have beside good data."""
    (folder / "empty").mkdir()
    shutil.copytree(folder / "runs" / "tiny", folder / "copied")
    copied = folder / "copied" / "settings.json"
    copied.write_text(copied.read_text().replace('"seed": 0', '"seed": 1'))
    (folder / "pictures").mkdir()
    shutil.copy(folder / "two" / "val" / "images" / "0.png", folder / "pictures" / "0.png")
    (folder / "pictures" / "cut.png").write_bytes((folder / "pictures" / "0.png").read_bytes()[:300])
    (folder / "pictures" / "text.png").write_text("no picture")
    Image.new("I;16", (9, 5), 700).save(folder / "pictures" / "deep.png")
    Image.new("LA", (3, 900)).save(folder / "pictures" / "long [x] ü.png")
    shutil.copy(folder / "pictures" / "0.png", os.fsencode(folder) + b"/pictures/caf\xe9.png")
    (folder / "pictures" / "loop").symlink_to(folder / "pictures")
    (folder / "loop").symlink_to("loop")
    (folder / "notes.txt").write_text("notes")
    (folder / "broken.toml").write_text('name = "one"\n[splits.train]\nimages = "train/[z-a]*"\nlables = 3\n')
    (folder / "masks.toml").write_text(
        'root = "beside"\n[ids]\n0 = "road"\n1 = "car"\n[splits.train]\nimages = "*.png"\nlabels = "*_mask.png"\n'
    )
    (folder / "mixed.toml").write_text(
        'root = "two"\n[ids]\n0 = "road"\n1 = "car"\n[splits.train]\nimages = "**/*.jpg"\nlabels = "**/labels/*"\n'
    )
    (folder / "beside").mkdir()
    for i in range(3):
        shutil.copy(folder / "one" / "train" / "images" / f"{i}.png", folder / "beside" / f"{i}.png")
    for i in range(2):
        shutil.copy(folder / "one" / "train" / "labels" / f"{i}.png", folder / "beside" / f"{i}_mask.png")


def draw_line(draw: random.Random, verb: str = "") -> list[str]:
    """The arguments of one call."""
    lines = [line.split() for line in LINES if not verb or line.startswith(verb)]
    kinds = sorted({line[0] for line in lines})
    kind = draw.choice(kinds)
    line = list(draw.choice([line for line in lines if line[0] == kind]))
    for _ in range(draw.choice((0, 0, 1, 1, 1, 2, 3))):
        place = draw.randrange(1, len(line) + 1)
        change = draw.random()
        if change < 0.4:
            line[place:place] = draw_option(draw, kind if draw.random() < 0.9 else "train")
        elif change < 0.45:
            line[place : place + 1] = []
        elif change < 0.7:
            line[place : place + 1] = [draw.choice(VALUES)]
        elif kind in {"train", "bench", "import-weights"}:
            given = presets.flatten(draw_tree(draw)).items()
            line += [f"--set={key}={spell(value)}" for key, value in given if not key.startswith(LEFT_ALONE)]
        else:
            line.append(line[place - 1])
    if kind in {"train", "bench"} and "--steps" not in line:
        line += ["--steps", "1"]
    if "demo" in line and "--check" not in line:  # drawing it takes long
        line.append("--check")
    return [argument.replace("\0", "?") for argument in line]  # a shell cannot pass it


def draw_option(draw: random.Random, kind: str) -> list[str]:
    """An option of a command, with a value if it takes one."""
    options = [p for p in COMMANDS[kind].params if p.param_type_name == "option"] if kind in COMMANDS else []
    option = draw.choice(options) if options else None
    if option is None or option.is_flag:
        return [max(option.opts, key=len) if option else "--x"]
    return [max(option.opts, key=len), draw.choice(VALUES)]


def call(folder: Path, arguments: Sequence[str], logs: Path) -> None:
    """What a child does: one call of the command line, its output into two files."""
    os.chdir(folder)
    os.environ.update(HF_HUB_OFFLINE="1", COLUMNS="80")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number, name in ((0, os.devnull), (1, logs / "stdout"), (2, logs / "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    from cluda_cli.cli import main

    sys.argv = ["cluda", *arguments]
    main(list(arguments))


def take_stock(folder: Path) -> dict[str, str]:
    """Path -> hash of every regular file."""
    paths = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    return {str(path.relative_to(folder)): sha256(path) for path in paths if path.is_file() and not path.is_symlink()}


def is_input(name: str, arguments: Sequence[str]) -> bool:
    """Whether a call may not change a file: raw data and whatever it does not make."""
    if name.startswith("runs/tiny/") and arguments[:1] == ["train"]:
        return False
    named = [argument.partition("=")[2] or argument for argument in arguments]
    if "--overwrite" in arguments and arguments[:1] == ["import-weights"]:
        named += [str(Path(argument).with_suffix(".safetensors")) for argument in named if argument.endswith(".pth")]
        if any(name == os.path.normpath(argument) for argument in named):
            return False
    return not name.startswith(("data/", "runs/tiny/pseudo-labels"))


class Calls:
    """A workplace, and calls in copies of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole, self.work = folder, folder / "whole", folder / "work"
        self.context = get_context("forkserver")
        verbs = ("train", "prepare", "pseudo_label", "predict", "evaluate", "import_weights", "bench")
        self.context.set_forkserver_preload([f"cluda_cli.commands.{verb}" for verb in verbs])
        make_workplace(self.whole, images=4)
        for line in ("prepare one.toml", "prepare two.toml", "train --preset tiny.toml --run runs/tiny --steps 2"):
            if self.run(self.whole, line.split()):
                raise SystemExit(f"{line}: {self.said('stderr')}")
        publish(self.whole / WEIGHTS, self.whole / "published.pth")
        for source, damaged in ((WEIGHTS, "damaged.safetensors"), ("published.pth", "damaged.pth")):
            content = bytearray((self.whole / source).read_bytes())
            content[len(content) // 2] ^= 8
            (self.whole / damaged).write_bytes(content)
        furnish(self.whole)
        self.before = take_stock(self.whole)

    def run(self, folder: Path, arguments: Sequence[str]) -> int | None:
        """The exit code of a call; None if it hangs."""
        process = self.context.Process(target=call, args=(folder, arguments, self.folder))
        process.start()
        process.join(LONGEST)
        hangs = process.is_alive()
        process.kill()
        process.join()
        return None if hangs else process.exitcode

    def said(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8", errors="replace")

    def judge(self, arguments: Sequence[str]) -> tuple[int | None, str]:
        """The exit code of a call in a fresh copy, and the rule that it breaks, if it does."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.whole, self.work, symlinks=True)
        os.mkfifo(self.work / "pipe")
        code = self.run(self.work, arguments)
        return code, self.find_words(code, arguments) or self.find_files(code, arguments)

    def find_words(self, code: int | None, arguments: Sequence[str]) -> str:
        """What is wrong with the exit code or the output."""
        said = self.said("stderr")
        errors = [line for line in said.splitlines() if line.lower().startswith("error: ")]
        if code not in CODES:
            return f"ends with {code}: {said[-1500:]}"
        if "Traceback" in said or "\x1b" in said:
            return said[-1500:]
        if len(errors) != (code not in (0, 130)):
            return f"{len(errors)} errors on stderr with exit code {code}: {said[-1500:]}"
        if long := [line for line in said.splitlines() if len(line) > LONGEST_LINE]:
            return f"a line of {len(long[0])} characters: {long[0][:300]}"
        if code == 0 and "--json" in arguments and not {"-h", "--help"} & set(arguments):
            try:
                json.loads(self.said("stdout"))
            except ValueError:
                return f"no JSON: {self.said('stdout')[:300]}"
        return ""

    def find_files(self, code: int | None, arguments: Sequence[str]) -> str:
        """What is wrong with the files that a call leaves."""
        after = take_stock(self.work)
        changed = sorted(name for name in self.before.keys() | after if self.before.get(name) != after.get(name))
        if left := [name for name in after if Path(name).name.startswith(".cluda-")]:
            return f"left behind: {left}"
        if code == 2 and changed:
            return f"refused, and changed {changed[:5]}"
        if touched := [name for name in changed if name in self.before and is_input(name, arguments)]:
            return f"changed input: {touched[:5]}"
        try:
            for name in (name for name in changed if name in after):
                self.check_whole(self.work / name)
        except Exception as error:
            return f"{name} is not whole: {error}"
        return ""

    def check_whole(self, path: Path) -> None:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".png" and not has_end(path):
            raise ValueError("cut short")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", default="")
    options = parser.parse_args(arguments)
    bad, codes = 0, Counter[int | None]()
    with tempfile.TemporaryDirectory() as folder:
        calls = Calls(Path(folder))
        for number in range(options.count):
            line = draw_line(random.Random(f"{options.seed} {number}"), options.verb)
            code, wrong = calls.judge(line)
            codes[code] += 1
            bad += bool(wrong)
            if wrong:
                print(f"number {number}, {str(line)[:600]}: {wrong}\n", flush=True)
    ended = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items(), key=str))
    print(f"{options.count} command lines ended: {ended}; {bad} not as they should")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 125))
