"""The verb `report`: runs -> one HTML file with curves, class tables, pictures and settings. It fetches nothing."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from cluda_cli import console, presets
from cluda_cli.commands.compare import (
    class_names,
    find_baseline,
    format_means,
    format_spread,
    saved_networks,
    spell,
    unequal_ends,
)
from cluda_cli.data.image_files import load_image
from cluda_cli.files import write_text
from cluda_cli.measure.chart import Line, draw_lines
from cluda_cli.measure.comparison import (
    NETWORKS,
    ComparedRun,
    Group,
    group_runs,
    read_run,
    settings_that_differ,
)

TEMPLATE = "report.html"
PICTURE_WIDTH = 1400
"""Pixels to which the pictures of runs are scaled down."""


def report(folders: Sequence[Path], *, out: Path, title: str = "", baseline: Path | None = None) -> None:
    """Write one HTML file about runs, which need no further file to be shown.

    Runs that differ in the seed only are one group, as in `compare`. Raises DataError for a folder that is no run, or
    that has no validation; SettingsError if `baseline` is none of the runs; OSError if the file cannot be written.
    """
    groups = group_runs([read_run(folder) for folder in folders])
    base = find_baseline(groups, baseline)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    content = _collect(groups, base) | {"title": title or ", ".join(group.name for group in groups)}
    write_text(out, templates.get_template(TEMPLATE).render(content))
    console.result(str(out))


def _collect(groups: Sequence[Group], base: Group) -> dict[str, Any]:
    """What the template shows."""
    runs = [run for group in groups for run in group.runs]
    differing = settings_that_differ(groups)
    return {
        "groups": [_describe(group) for group in groups],
        "warnings": unequal_ends(groups),
        "baseline": base.name,
        "means": [[f"{i}: {group.name}", *format_means(group, base)] for i, group in enumerate(groups, 1)],
        "classes": [_class_row(name, groups) for name in class_names(groups)],
        "charts": [_chart(title, lines) for title, lines in _all_lines(groups).items()],
        "pictures": [picture for run in runs if (picture := _picture(run))],
        "differences": [[key, *map(spell, values)] for key, values in differing.items()],
        "versions": [[str(run.path), ", ".join(f"{k} {v}" for k, v in run.versions.items())] for run in runs],
    }


def _describe(group: Group) -> dict[str, Any]:
    changed = presets.differences(group.runs[0].settings)
    return {
        "name": group.name,
        "seeds": ", ".join(str(run.seed) for run in group.runs),
        "saves": saved_networks(group),
        "changed": [[key, spell(default), spell(value)] for key, (default, value) in changed.items()],
    }


def _class_row(name: str, groups: Sequence[Group]) -> dict[str, Any]:
    spreads = [group.iou(name) for group in groups]
    cells = [
        {"text": format_spread(spread), "percent": 0 if math.isnan(spread.mean) else round(spread.mean, 1)}
        for spread in spreads
    ]
    return {"name": name, "cells": cells}


def _all_lines(groups: Sequence[Group]) -> dict[str, list[Line]]:
    """Title of a chart -> its lines: mIoU of each network, then each loss, then the learning rate.

    The runs of a group share a colour.
    """
    charts: dict[str, list[Line]] = {}
    for color, group in enumerate(groups):
        for run in group.runs:
            for network in NETWORKS:
                points = tuple(
                    (v.step, math.nan if (s := v.networks[network]).miou is None else s.miou)
                    for v in run.validations
                    if network in v.networks
                )
                if points:
                    line = Line(f"{run.path.name}, {network}", points, color, dashed=network == "student")
                    charts.setdefault("mIoU, percent", []).append(line)
    titles = dict.fromkeys(title for group in groups for run in group.runs for title in run.curves)
    for title in titles:
        charts[title] = [
            Line(run.path.name, tuple(run.curves[title]), color)
            for color, group in enumerate(groups)
            for run in group.runs
            if title in run.curves
        ]
    return charts


def _chart(title: str, lines: Sequence[Line]) -> dict[str, Any]:
    svg = draw_lines(lines, "step", description=f"{title}, over steps")
    return {"title": title, "svg": Markup(svg)}  # draw_lines escapes names


def _picture(run: ComparedRun) -> dict[str, str] | None:
    """The last picture of a run, as a JPEG in base64; None if it has none."""
    files = sorted((run.path / "pictures").glob("*.png"))
    if not files:
        return None
    image = load_image(files[-1]).convert("RGB")
    if image.width > PICTURE_WIDTH:
        image = image.resize(
            (PICTURE_WIDTH, round(image.height * PICTURE_WIDTH / image.width)), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    caption = f"{run.path.name}, step {int(files[-1].stem)}: a row per image, source first, prediction last"
    return {"caption": caption, "data": base64.b64encode(buffer.getvalue()).decode()}
