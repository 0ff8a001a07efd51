"""Find, merge and override presets: defaults < presets left to right < named options < `--set`, validated once."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cluda_cli import console
from cluda_cli.errors import SettingsError, first_line, nearest
from cluda_cli.files import read_text
from cluda_cli.settings import Settings

_PACKAGE = Path(__file__).parent
# A wheel carries the presets inside the package; a source checkout has them beside it.
FOLDER = _PACKAGE / "presets" if (_PACKAGE / "presets").is_dir() else _PACKAGE.parent / "presets"


DEEPEST = 20
"""Keys of the dotted path of a setting; the tree of settings is less deep."""
LONGEST_SHOWN = 200
"""Characters of a wrong value, or of the path of a wrong key, that a message shows."""
SHOWN_RUNS = 5
"""Other runs that a message names."""


def names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> Path:
    """A shipped preset by name, or a TOML or JSON file by path. Raises SettingsError with the nearest names."""
    if name in names():
        return FOLDER / f"{name}.toml"
    path = Path(name)
    if path.suffix in {".toml", ".json"}:
        if path.is_file():
            return path
        raise SettingsError("no such preset file", path)
    raise SettingsError(
        f'no preset "{name}"', "--preset", _did_you_mean(name, names()) + f"known: {', '.join(names())}"
    )


def header(name: str) -> list[str]:
    """The comment lines at the top of a preset, without `#`."""
    lines = []
    for line in find(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines


def read(name: str) -> dict[str, Any]:
    """The plain tree of one preset, not validated. Raises SettingsError for a file that does not parse."""
    path = find(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        raise SettingsError(f"cannot be read: {first_line(error)}", path, "correct the file") from error
    if not isinstance(tree, dict):
        raise SettingsError("a preset is a table of settings", path)
    return tree


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Deep-merge two plain trees; `top` wins."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=3` -> {"a": {"b": 3}}; the right side is a TOML value, else a bare string."""
    path, equals, raw = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > DEEPEST:
        raise SettingsError(f'"{text[:LONGEST_SHOWN]}" is not of the form section.key=value', "--set")
    try:
        value: Any = tomllib.loads(f"value = {raw}")["value"]
    except RecursionError:
        raise SettingsError("is nested too deeply", f"--set {path.strip()[:80]}") from None
    except (ValueError, KeyError):  # no TOML, or a number of thousands of digits
        value = raw.strip()
    for key in reversed(keys):
        value = {key: value}
    tree: dict[str, Any] = value
    if problems := _find_unwritable(tree):
        raise SettingsError("\n".join(problems), "--set")
    return tree


def load(presets: Sequence[str] = (), options: dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Resolve all layers to validated settings. Raises SettingsError that lists every problem at once."""
    tree: dict[str, Any] = {}
    for name in presets:
        tree = merge(tree, read(name))
    tree = merge(tree, options or {})
    for text in overrides:
        tree = merge(tree, parse_override(text))
    return validate(tree)


def resume(folder: Path, options: dict[str, Any], overrides: Sequence[str]) -> Settings:
    """Settings of an existing run, with what the command line changes laid over them and announced."""
    saved = folder / "settings.json"
    if not saved.is_file():
        what = "holds no run to resume (no settings.json)" if folder.exists() else "there is no such run to resume"
        beside = sorted(path.parent for path in folder.parent.glob("*/settings.json"))[:SHOWN_RUNS]
        runs = f"; runs beside it: {', '.join(map(str, beside))}" if beside else ""
        raise SettingsError(what, folder, f"name the folder of a run with --run, or start it without --resume{runs}")
    try:
        before = load([str(saved)])
    except SettingsError as error:
        what, remedy = f"is damaged or of another version:\n{error.what}", "correct it, or start again with --overwrite"
        raise SettingsError(what, saved, remedy) from error
    after = load([str(saved)], options, overrides)
    last = _read_last_used(folder) or before
    old, new = flatten(last.model_dump(mode="json")), flatten(after.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            console.warn(f"resuming with another {key}: {old.get(key)} -> {new.get(key)}")
    return after


def _read_last_used(folder: Path) -> Settings | None:
    """The settings with which a run began or was last resumed, from its manifest.

    settings.json may have been edited since. None if the manifest has none, as those of earlier versions.
    """
    try:
        return validate(json.loads(read_text(folder / "manifest.json"))["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SettingsError):
        return None  # the run itself reports a damaged manifest


def validate(tree: dict[str, Any]) -> Settings:
    """Settings from a plain tree. Raises SettingsError with one line per problem, dotted path first."""
    try:
        problems = _find_unwritable(tree)
    except RecursionError:
        raise SettingsError("the settings are nested too deeply") from None
    if problems:
        raise SettingsError("\n".join(problems))
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem) for problem in error.errors())) from error


def _find_unwritable(value: Any, path: str = "") -> list[str]:
    """A line for each value that no setting can have: a huge number, or text that names no file."""
    if isinstance(value, dict):
        if odd := [key for key in value if not _is_unicode(str(key))]:
            return [f"{path or 'settings'}: a key holds characters that are no text: {ascii(odd[0])[:LONGEST_SHOWN]}"]
        return [line for key, item in value.items() for line in _find_unwritable(item, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [line for i, item in enumerate(value) for line in _find_unwritable(item, f"{path}.{i}")]
    if isinstance(value, int) and abs(value) >= 2**63:
        return [f"{path[:LONGEST_SHOWN]}: is too large a number"]
    if isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
        return [f"{path[:LONGEST_SHOWN]}: holds characters that are no text"]
    return []


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def differences(settings: Settings) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (default, value) of every setting that differs from its default."""
    default, value = flatten(Settings().model_dump(mode="json")), flatten(settings.model_dump(mode="json"))
    keys = [*value, *(key for key in default if key not in value)]
    return {key: (default.get(key), value.get(key)) for key in keys if default.get(key) != value.get(key)}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> plain value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def to_toml(settings: Settings) -> str:
    """The resolved settings as a TOML preset; a value that differs from the default is marked with its default."""
    changed = differences(settings)
    lines: list[str] = []
    _dump(settings.model_dump(mode="json"), "", changed, lines)
    return "\n".join(lines).strip() + "\n"


def _dump(tree: dict[str, Any], path: str, changed: dict[str, tuple[Any, Any]], lines: list[str]) -> None:
    """Append one table: its plain values first, then its subtables."""
    if path:
        lines += ["", f"[{path}]"]
    for key, value in tree.items():
        if isinstance(value, dict):
            continue
        dotted = f"{path}.{key}" if path else key
        mark = ""
        if dotted in changed:
            default = changed[dotted][0]
            mark = "  # default: unset" if default is None else f"  # default: {json.dumps(default)}"
        if value is None:
            # TOML has no null: false switches an optional part off and leaves a value unset.
            lines.append(f"{key} = false{'  # default: on' if _on_by_default(dotted) else mark}")
            continue
        lines.append(f"{key} = {json.dumps(value)}{mark}")
    for key, value in tree.items():
        if isinstance(value, dict):
            _dump(value, f"{path}.{key}" if path else key, changed, lines)


def _default_at(dotted: str) -> Any:
    """None also inside a table that is off by default."""
    value: Any = Settings()
    for key in dotted.split("."):
        value = getattr(value, key, None)
    return value


def _on_by_default(dotted: str) -> bool:
    return isinstance(_default_at(dotted), BaseModel)


def _explain(problem: Any) -> str:
    """One line for one pydantic error, with a suggestion for a misspelt key."""
    # Union members and validators are no part of what a user wrote.
    inner, parts = {"str", "int", "float", "bool"}, [str(part) for part in problem["loc"]]
    unknown = problem["type"] == "extra_forbidden"  # then the last part is the user's, whatever it looks like
    location = tuple(
        p for i, p in enumerate(parts) if (unknown and i == len(parts) - 1) or p not in inner and "[" not in p
    )
    path = ".".join(location)[:LONGEST_SHOWN]
    if unknown:
        return f"{path}: no such setting{_suggestion(location)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}, got {repr(problem['input'])[:LONGEST_SHOWN]}" if path else message


def _suggestion(location: tuple[str, ...]) -> str:
    """ ", did you mean ..." from the fields of the section in which an unknown key stands."""
    section: Any = Settings()
    for key in location[:-1]:
        section = getattr(section, key, None)
    fields = list(type(section).model_fields) if isinstance(section, BaseModel) else []
    close = _did_you_mean(location[-1], fields, prefix=".".join(location[:-1]))
    return f"; {close.rstrip('; ')}" if close else f"; known: {', '.join(fields)}" if fields else ""


def _did_you_mean(name: str, choices: Sequence[str], prefix: str = "") -> str:
    close = nearest(name, choices)
    return f"did you mean {prefix + '.' if prefix else ''}{close}?; " if close else ""
