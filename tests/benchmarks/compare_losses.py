"""Prove that a refactor changed no number: equal losses and weights of two revisions, to the last bit.

    python tests/benchmarks/compare_losses.py 887018e HEAD --preset demo --data-root data --steps 5
    python tests/benchmarks/compare_losses.py 887018e HEAD --preset mic-cluda --preset small --steps 3 -- \
        --source vdrift --target camvid --set model.weights=mobilenet.safetensors
    python tests/benchmarks/compare_losses.py HEAD~1 . --preset demo -- --devices 2

Each revision is checked out into a folder of its own and trains as a user would: `cluda train`, the same options, this
environment, one thread. `.` stands for the working tree. Every logged term and every tensor of the last weights must be
the same; otherwise the first difference is printed and the exit code is 1. Options after `--` go to `cluda train`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def checkout(revision: str, folder: Path) -> Iterator[Path]:
    """The tree of a revision, for as long as the block lasts."""
    if revision == ".":
        yield REPOSITORY
        return
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def train(tree: Path, run: Path, options: list[str]) -> None:
    """Train in the present folder with the code of `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cluda_cli", "train", "--run", str(run), *options]
    subprocess.run(command, check=True, env=environment)


def first_difference(one: Path, other: Path) -> str | None:
    """Where two run folders differ in their logged numbers or their last weights; None if they do not."""
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    for a, b in zip_longest(*logs, fillvalue={}):
        for key in a.keys() | b.keys():
            if a.get(key) != b.get(key):
                return f"step {a.get('step', b.get('step'))}, {key}: {a.get(key)} != {b.get(key)}"
    weights = [load_file(run / "last.safetensors") for run in (one, other)]
    if names := weights[0].keys() ^ weights[1].keys():
        return f"weights of one side only: {', '.join(sorted(names))}"
    return next((f"weights {n}" for n in weights[0] if not torch.equal(weights[0][n], weights[1][n])), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REVISION")
    parser.add_argument("--preset", action="append", default=[])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    own, further = sys.argv[1:], []
    if "--" in own:
        own, further = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    options = [option for name in arguments.preset for option in ("--preset", name)]
    options += ["--steps", str(arguments.steps), "--device", "cpu", "--data-root", str(arguments.data_root.resolve())]
    options += ["--set", "training.log_every=1", "--set", f"training.validate_every={arguments.steps}", *further]
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / name for name in ("run-one", "run-other")]
        for revision, run in zip(arguments.revisions, runs, strict=True):
            with checkout(revision, Path(folder) / f"tree-of-{run.name}") as tree:
                train(tree, run, options)
        difference = first_difference(*runs)
    print(difference or f"equal to the last bit: {arguments.steps} steps, {' -> '.join(arguments.revisions)}")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
