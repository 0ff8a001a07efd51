"""Load random and hostile trees of settings in every way that a user can give them, and judge what comes of them.

    python tests/benchmarks/fuzz_settings.py --count 5000 --seed 0

A tree has up to five settings, each with a value near its default, a value of another type, a hostile one, or a key
that there is not. It comes as `--set` options, as a TOML preset or as the settings.json of a run that is resumed; the
text may be damaged too. It must be refused with a SettingsError of a few short lines, or give settings that

- hold every plain value that was given, of the type that was given;
- come back equal from the JSON and the TOML in which cluda writes them;
- are announced, each that differs, when a run resumes with them.

The exit code counts other exceptions (a traceback for the user) and accepted settings that break a rule (silent).
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from cluda_cli import console, presets
from cluda_cli.errors import SettingsError
from cluda_cli.settings import Settings
from cluda_cli.settings.section import Section

HOSTILE: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: False, lambda: -1, lambda: 0, lambda: 10**30, lambda: -(2**63), lambda: 1e308,
    lambda: 5e-324, lambda: float("inf"), lambda: float("nan"), str, lambda: " ", lambda: "x", lambda: "a\0b",
    lambda: "../../etc", lambda: "\ud800", lambda: "[/n]\x1b[2J", lambda: "9" * 5000, lambda: "é" * 300, lambda: "a\nb",
    list, lambda: [[]], lambda: [1, 2], lambda: [True, 1], lambda: [0.5], lambda: ["a", "a"], dict, lambda: {"x": {}},
    lambda: json.loads("[" * 90 + "]" * 90),
)  # fmt: skip
KEYS = ("stepz", "", "Training", "ü", "x.y", "a b", "__class__", "\x1b[2J", "k" * 300)
TEXTS = (
    "\ufeff",
    "= inf",
    "[" * 5000,
    "0x" + "f" * 5000,
    "1" * 5000,
    "\0",
    "\ud800",
    "'''",
    "{}",
    "[[data]]",
    "\r",
    "nan",
)
LONGEST_LINE = 600
"""Characters; a wrong key is shown with the keys that there are."""
Path_ = tuple[str, ...]


def list_settings(section: type[Section] = Settings, above: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """The path of every table and setting, with its default."""
    for name, field in section.model_fields.items():
        yield (*above, name), field.default
        tables = [field.annotation, *get_args(field.annotation)]
        for table in (table for table in tables if isinstance(table, type) and issubclass(table, Section)):
            yield from list_settings(table, (*above, name))


SETTINGS = list(list_settings())


def draw_value(draw: random.Random, default: Any) -> Any:
    """A value near the default, or a hostile one."""
    if draw.random() < 0.3:
        return draw.choice(HOSTILE)()
    if default is None or isinstance(default, Section):
        return draw.choice((True, False, {}, 1, 0.5, [64, 64]))
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return draw.choice((default + 1, default * 2, default / 2, float(default), str(default)))
    if isinstance(default, tuple) and draw.random() < 0.7:
        return [*default] if draw.random() < 0.5 else [*reversed(default)]
    if isinstance(default, tuple):
        return [draw_value(draw, value) for value in default] + [1] * draw.choice((0, 0, 1))
    return draw.choice((str(default), f"{default}x", str(default).upper()))


def draw_tree(draw: random.Random) -> dict[str, Any]:
    """Settings by path as nested tables, and now and then a wrong key."""
    tree: dict[str, Any] = {}
    for _ in range(draw.choice((1, 1, 1, 2, 3, 5))):
        path, default = draw.choice(SETTINGS)
        if draw.random() < 0.1:
            path = (*path[:-1], draw.choice(KEYS))
        value = draw_value(draw, default)
        for key in reversed(path):
            value = {key: value}
        tree = presets.merge(tree, value)
    return tree


def spell(value: Any) -> str:
    """A value as TOML, as far as TOML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {spell(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(spell, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


def damage(text: str, draw: random.Random) -> str:
    """Cut the text, or put something into it."""
    place = draw.randrange(len(text) + 1)
    return text[:place] + draw.choice(("", draw.choice(TEXTS) + text[place:]))


def give(tree: dict[str, Any], folder: Path, draw: random.Random) -> tuple[str, Settings, bool]:
    """Load a tree in one of the ways. Returns the way, the settings, and whether the tree came through undamaged."""
    way, whole = draw.choice(("--set", "toml", "settings.json")), draw.random() < 0.8
    if way == "--set":
        options = [f"{path}={spell(value)}" for path, value in presets.flatten(tree).items()]
        options = options if whole else [damage(option, draw) for option in options]
        return way, presets.load(overrides=options), whole
    text = json.dumps(tree) if way == "settings.json" else "\n".join(f"{k} = {spell(v)}" for k, v in tree.items())
    text = text if whole else damage(text, draw)
    file = folder / ("settings.json" if way == "settings.json" else "preset.toml")
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    settings = presets.load([str(file)]) if way == "toml" else presets.resume(folder, {}, [])
    return way, settings, whole


def find_silence(tree: dict[str, Any], way: str, settings: Settings, whole: bool, folder: Path, said: str) -> str:
    """What accepted settings do without a word; empty if nothing."""
    file = folder / "shown.toml"
    file.write_text(presets.to_toml(settings), encoding="utf-8")
    if presets.load([str(file)]) != settings:
        return "comes back otherwise from TOML"
    file = folder / "shown.json"
    file.write_text(settings.model_dump_json(), encoding="utf-8")
    if presets.load([str(file)]) != settings:
        return "comes back otherwise from JSON"
    kept = presets.flatten(settings.model_dump(mode="json"))
    if way == "settings.json":
        default = presets.flatten(Settings().model_dump(mode="json"))
        quiet = [key for key in kept.keys() | default.keys() if kept.get(key) != default.get(key) and key not in said]
        if quiet:
            return f"{quiet[0]} is not announced"
    given = presets.flatten(tree) if whole else {}
    wrong = [key for key, value in given.items() if not is_kept(value, kept.get(key)) and kept.get(key) != spell(value)]
    return f"{wrong[0]} becomes {kept.get(wrong[0])!r}" if wrong else ""


def is_kept(given: Any, kept: Any) -> bool:
    """Whether a setting holds what was given. False and null stand for no value, a switch or an empty table for one."""
    if given in (False, None) and kept is None or isinstance(given, bool | dict) and kept is None:
        return True
    if isinstance(given, list) and isinstance(kept, list):
        return len(given) == len(kept) and all(map(is_kept, given, kept))
    if isinstance(kept, list):
        return kept in ([given], [spell(given)])
    if isinstance(kept, bool):  # 0 and "off" are false, too
        return isinstance(given, str) or given == kept
    if isinstance(given, bool) or isinstance(kept, str):
        return type(given) is type(kept) and given == kept
    return float(given) == kept


def run_all(count: int, seed: int, folder: Path) -> Counter[str]:
    """Load so many trees. Counts outcomes, and prints each traceback and each silent use."""
    found: Counter[str] = Counter()
    (folder / "manifest.json").write_text(json.dumps({"settings": Settings().model_dump(mode="json")}))
    for number in range(count):
        draw, talk = random.Random(f"{seed} {number}"), io.StringIO()
        tree = draw_tree(draw)
        outcome = wrong = ""
        try:
            with contextlib.redirect_stderr(talk):
                way, settings, whole = give(tree, folder, draw)
                wrong = find_silence(tree, way, settings, whole, folder, talk.getvalue())
            outcome = "silent" if wrong else "accepted"
        except SettingsError as problem:
            with contextlib.redirect_stderr(talk):
                console.error(problem)
            long = [line for line in str(problem).splitlines() if len(line) > LONGEST_LINE]
            outcome, wrong = ("wordy", long[0][:LONGEST_LINE]) if long else ("refused", "")
        except Exception:
            outcome, wrong = "traceback", traceback.format_exc(limit=-3)
        if wrong:
            print(f"number {number}, {str(tree)[:200]}: {outcome}: {wrong}")
        found[outcome] += 1
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(options.count, options.seed, Path(folder))
    print(
        f"{options.count} trees of settings: {', '.join(f'{number} {name}' for name, number in sorted(found.items()))}"
    )
    return found["traceback"] + found["silent"] + found["wordy"]


if __name__ == "__main__":
    sys.exit(min(main(), 125))
