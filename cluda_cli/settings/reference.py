"""The page of settings: `python -m cluda_cli.settings.reference > docs/reference/settings.md`."""

from pathlib import Path
from typing import get_args

from cluda_cli.settings import Settings
from cluda_cli.settings.section import Section


def reference_markdown() -> str:
    """The contents of docs/reference/settings.md: every setting with its type, default and documentation."""
    lines = ["# Settings", "", "Generated from `cluda_cli/settings/`; a test keeps the two equal.", ""]
    lines += ["Set one with `--set section.key=value`, or in a TOML preset given with `--preset FILE`.", ""]
    for name, field in Settings.model_fields.items():
        lines += _section_markdown(name, field.default)
    return "\n".join(lines).rstrip() + "\n"


def _section_markdown(path: str, section: Section) -> list[str]:
    """Heading, table of plain values, then the subsections of one section."""
    lines = [f"## {path}", "", (type(section).__doc__ or "").strip(), "", "| setting | default | meaning |"]
    lines += ["|---|---|---|"]
    nested = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        tables = [t for t in get_args(field.annotation) if isinstance(t, type) and issubclass(t, Section)]
        if isinstance(value, Section):
            nested += _section_markdown(f"{path}.{name}", value)
            if not field.description:
                continue
            shown = "on"
        elif value is None and tables:
            nested += _section_markdown(f"{path}.{name}", tables[0]())
            shown = "off"
        else:
            shown = _toml(value)
        description = " ".join((field.description or "").split())
        lines.append(f"| `{path}.{name}` | `{shown}` | {description} |")
    return lines + [""] + nested


def _toml(value: object) -> str:
    """A default as a user would write it; None is an unset value."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


if __name__ == "__main__":
    print(reference_markdown(), end="")
