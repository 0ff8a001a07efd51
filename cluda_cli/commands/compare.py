"""The verb `compare`: runs -> means over seeds, gains over a baseline, and what differs between them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluda_cli import console
from cluda_cli.errors import SettingsError
from cluda_cli.measure.comparison import (
    NETWORKS,
    Group,
    Spread,
    group_runs,
    read_run,
    settings_that_differ,
    versions_that_differ,
)


def compare(folders: Sequence[Path], *, baseline: Path | None = None, as_json: bool = False) -> None:
    """Group runs that differ in the seed only, and print their scores, per class too, and what differs.

    The gain is over the group of the run `baseline`, which is that of the first run unless given.

    Raises DataError for a folder that is no run, or that has no validation; SettingsError if `baseline` is none of
    the runs.
    """
    groups = group_runs([read_run(folder) for folder in folders])
    base = find_baseline(groups, baseline)
    for warning in unequal_ends(groups):
        console.warn(warning)
    if as_json:
        console.result_json(_describe(groups, base))
        return
    _print_means(groups, base)
    _printclass_names(groups)
    _print_differences(groups)


def find_baseline(groups: Sequence[Group], folder: Path | None) -> Group:
    """The group of the run in `folder`; the first one without it."""
    if folder is None:
        return groups[0]
    for group in groups:
        if folder.resolve() in {run.path.resolve() for run in group.runs}:
            return group
    raise SettingsError(f"{folder} is none of the runs", "--baseline", "name it among them, too")


def unequal_ends(groups: Sequence[Group]) -> list[str]:
    """A line for each run that is not finished, or that was validated last before its end."""
    runs = [run for group in groups for run in group.runs]
    return [
        f"{run.path}: the last validation is of step {run.last.step} of {run.settings.training.steps}"
        for run in runs
        if run.last.step != run.settings.training.steps
    ]


def _print_means(groups: Sequence[Group], base: Group) -> None:
    rows = []
    for i, group in enumerate(groups, 1):
        seeds = ", ".join(str(run.seed) for run in group.runs)
        console.result(f"{i}  {group.name}: seed {seeds}; saves the {saved_networks(group)}")
        rows.append([str(i), *format_means(group, base)])
    columns = ["", "student", "teacher", "best", "gain", "p"]
    console.result_table("mIoU of the last validation, mean ± standard deviation over seeds", columns, rows)
    console.result("best: the best validation of the saved network, chosen with labels")
    console.result("gain: of the saved network, paired by seed, ± its standard error; p: two-sided paired t-test")


def format_means(group: Group, base: Group) -> list[str]:
    """mIoU of student, teacher and the best validation, the gain over `base`, and its p value."""
    cells = [format_spread(group.last(name)) for name in NETWORKS] + [format_spread(group.best())]
    gain = group.gain(base)
    return cells + (["baseline", ""] if group is base else [_format_gain(gain), _format_p(gain.p_value)])


def saved_networks(group: Group) -> str:
    """The network whose weights the runs save, by name."""
    return " or ".join(sorted({run.saved for run in group.runs}))


def _printclass_names(groups: Sequence[Group]) -> None:
    columns = ["class", *(str(i) for i, _ in enumerate(groups, 1))]
    rows = [[name, *(format_spread(group.iou(name)) for group in groups)] for name in class_names(groups)]
    console.result_table("IoU of the saved network at the last validation", columns, rows)


def _print_differences(groups: Sequence[Group]) -> None:
    """Lines, because values such as paths are too long for a table."""
    for key, values in settings_that_differ(groups).items():
        console.result(f"{key}: {'; '.join(f'{i} {spell(value)}' for i, value in enumerate(values, 1))}")
    for name, versions in versions_that_differ(groups).items():
        console.warn(f"the runs were made with several versions of {name}: {', '.join(versions)}")


def class_names(groups: Sequence[Group]) -> list[str]:
    """Names of all scored classes, in the order of the first run that has them."""
    return list(dict.fromkeys(name for g in groups for run in g.runs for name in run.last.networks[run.saved].iou))


def format_spread(spread: Spread) -> str:
    """Mean and standard deviation; - without values."""
    if not spread.values or math.isnan(spread.mean):
        return "-"
    return f"{spread.mean:.2f}" + (f" ± {spread.deviation:.2f}" if len(spread.values) > 1 else "")


def _format_gain(gain: Spread) -> str:
    """Mean with its sign, and standard error; - without values."""
    if not gain.values or math.isnan(gain.mean):
        return "-"
    return f"{gain.mean:+.2f}" + (f" ± {gain.error:.2f}" if len(gain.values) > 1 else "")


def _format_p(value: float) -> str:
    """A probability; - if it does not exist."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def spell(value: Any) -> str:
    """A setting as JSON, or "unset"."""
    return "unset" if value is None else json.dumps(value)


def _describe(groups: Sequence[Group], base: Group) -> dict[str, Any]:
    """The figures of all tables as plain values; null is a figure that does not exist."""
    return {
        "baseline": base.name,
        "groups": [
            {
                "name": group.name,
                "runs": {str(run.seed): str(run.path) for run in group.runs},
                **{name: _numbers(group.last(name)) for name in NETWORKS},
                "saved": _numbers(group.saved()),
                "best": _numbers(group.best()),
                "gain": _numbers(group.gain(base)) | {"p": _round(group.gain(base).p_value, 4)},
                "iou": {name: _numbers(group.iou(name)) for name in class_names(groups)},
            }
            for group in groups
        ],
        "settings": settings_that_differ(groups),
        "versions": versions_that_differ(groups),
    }


def _numbers(spread: Spread) -> dict[str, Any]:
    return {
        "mean": _round(spread.mean),
        "deviation": _round(spread.deviation),
        "error": _round(spread.error),
        "values": [_round(value) for value in spread.values],
    }


def _round(value: float, digits: int = 2) -> float | None:
    return None if math.isnan(value) else round(value, digits)
