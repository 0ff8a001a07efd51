"""Where runs lie: the names of default folders, and the folder of the run that is to be resumed."""

import hashlib
import re
from pathlib import Path
from typing import Any

from cluda_cli import presets
from cluda_cli.errors import SettingsError

NO_CHANGE = ("data.root", "training.device")
"""Settings that change where a run works and not what comes of it."""
LONGEST_NAME = 150
"""Bytes of the name of a default run folder, before the hash that marks a shortened one."""


def name_folder(preset: list[str], options: dict[str, Any], overrides: list[str]) -> Path:
    """runs/<presets>-<changes>, such as runs/dacs-small-seed=1. Data root and device are no changes of the result."""
    changes = _flatten_changes(options, overrides)
    for key in NO_CHANGE:
        changes.pop(key, None)
    files = map(Path, preset)  # the settings of a run are named by their folder
    parts = [file.parent.name if file.name == "settings.json" else file.stem for file in files] or ["defaults"]
    parts += [
        f"{key.removeprefix('training.').removeprefix('data.')}={_spell(changes[key])}" for key in sorted(changes)
    ]
    full = "-".join(parts)
    plain = re.sub(r"[^\w.,=+-]+", "_", full)
    if plain != full or len(plain.encode()) > LONGEST_NAME:  # others may look alike after this
        mark = hashlib.sha256(full.encode("utf-8", "replace")).hexdigest()[:8]
        plain = f"{plain.encode()[:LONGEST_NAME].decode('utf-8', 'ignore')}-{mark}"
    return Path("runs") / plain


def _flatten_changes(options: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Settings that options and --set change, by their path."""
    tree = options
    for text in overrides:
        tree = presets.merge(tree, presets.parse_override(text))
    return presets.flatten(tree)


def _spell(value: Any) -> str:
    """A value of a setting as part of a name; the elements of a list are joined by +."""
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def find_resumable(preset: list[str], options: dict[str, Any], overrides: list[str]) -> Path:
    """The folder of the run of these presets and changes; else that of the presets, where the changes take effect.

    A run of another seed, source, target or labelled images is never taken. Without a preset, the folder of the newest
    run.
    """
    runs = Path("runs")
    if preset:
        exact, plain = name_folder(preset, options, overrides), name_folder(preset, {}, [])
        changed = _flatten_changes(options, overrides).keys()
        another_run = {"training.seed", "data.source", "data.target", "data.labelled"} & changed
        return exact if another_run or (exact / "settings.json").is_file() else plain
    saved = sorted(runs.glob("*/resume/state.pt"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise SettingsError("no run to resume", runs, "name one with --run")
    return saved[-1].parent.parent
