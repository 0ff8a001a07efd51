"""Runs side by side: groups of runs that differ in the seed only, their means, and paired gains over a baseline."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluda_cli import presets, runs
from cluda_cli.errors import DataError, first_line
from cluda_cli.files import read_text
from cluda_cli.settings import Settings

NETWORKS = ("student", "teacher")
SAME_RESULT = ("training.seed", *runs.NO_CHANGE)
"""Settings in which the runs of a group may differ."""

RATE = "learning rate of the encoder"
Curves = dict[str, list[tuple[float, float]]]
"""Title -> (step, value): every loss, where NaN had nothing to measure, then the learning rate."""
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class NetworkScores(BaseModel):
    """What a validation says of one network, in percent; None is a class without pixels."""

    model_config = ConfigDict(frozen=True)

    miou: Percent | None
    miou_common_pixels: Percent | None = None
    pixel_accuracy: Percent | None = None
    iou: dict[str, Percent | None] = {}


@dataclass(frozen=True)
class Validation:
    """The scores of a step, by the name of the network."""

    step: int
    networks: Mapping[str, NetworkScores]


@dataclass(frozen=True)
class ComparedRun:
    """A run that has at least one validation."""

    path: Path
    settings: Settings
    versions: Mapping[str, str]
    """Versions of libraries and the commit, by name."""
    validations: tuple[Validation, ...]
    curves: Curves

    @property
    def seed(self) -> int:
        return self.settings.training.seed

    @property
    def last(self) -> Validation:
        return self.validations[-1]

    @property
    def saved(self) -> str:
        """The name of the network that the run saves: that of the settings, or the student where no teacher labels."""
        name = self.settings.evaluation.network
        return name if name in self.last.networks else "student"

    @property
    def best(self) -> float:
        """The best mIoU of the saved network."""
        scores = [v.networks[self.saved].miou for v in self.validations if self.saved in v.networks]
        return max((score for score in scores if score is not None), default=math.nan)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of values, which are NaN if there are too few."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(len(self.values)) if self.values else math.nan

    @property
    def p_value(self) -> float:
        """Two-sided probability of a mean at least as far from 0, by Student's t; NaN for fewer than two values."""
        if len(self.values) < 2:
            return math.nan
        if not self.deviation:
            return 0.0 if self.mean else 1.0
        return two_sided_p(self.mean / self.error, len(self.values) - 1)


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed only, by seed."""

    name: str
    runs: tuple[ComparedRun, ...]

    def last(self, network: str) -> Spread:
        """mIoU of a network at the last validations; no values if a run does not score the network."""
        found = [run.last.networks.get(network) for run in self.runs]
        return Spread(tuple(_number(scores.miou) for scores in found if scores) if all(found) else ())

    def saved(self) -> Spread:
        """mIoU of the saved networks at the last validations."""
        return Spread(tuple(_number(run.last.networks[run.saved].miou) for run in self.runs))

    def best(self) -> Spread:
        """mIoU of the saved networks at their best validations, which were chosen with labels."""
        return Spread(tuple(run.best for run in self.runs))

    def iou(self, name: str) -> Spread:
        """IoU of a class of the saved networks at the last validations; no values if a run has none of it."""
        found = [run.last.networks[run.saved].iou.get(name) for run in self.runs]
        values = [value for value in found if value is not None]
        return Spread(tuple(values) if len(values) == len(found) else ())

    def gain(self, baseline: "Group") -> Spread:
        """Differences of the saved networks' mIoU to the baseline's, seed by seed, of the seeds that both have."""
        own, other = (
            {run.seed: _number(run.last.networks[run.saved].miou) for run in group.runs} for group in (self, baseline)
        )
        return Spread(tuple(own[seed] - other[seed] for seed in own if seed in other))


def read_run(folder: Path) -> ComparedRun:
    """Read settings, versions and metrics of a run. A last line that a kill cut short is left out.

    Raises DataError that names the file if it is missing or damaged, or if nothing was validated yet.
    """
    file = folder / "settings.json"
    if not file.is_file():
        raise DataError("holds no run (no settings.json)", folder, "name the folder of a run")
    settings = presets.load([str(file)])
    validations, curves = _read_metrics(folder / "metrics.jsonl")
    if not validations:
        raise DataError("has no validation yet", folder, "validation needs a target with a labelled val split")
    return ComparedRun(folder, settings, _read_versions(folder / "manifest.json"), tuple(validations), curves)


def _read_metrics(path: Path) -> tuple[list[Validation], Curves]:
    """The validations, and the curves of losses and learning rate, of metrics.jsonl."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # without a half line behind the last break
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({first_line(error)})", path) from error
    validations: list[Validation] = []
    losses: Curves = {}
    rates: list[tuple[float, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            if "miou" in content:
                validations.append(_parse_validation(content))
            if "terms" in content:
                step = float(content["step"])
                for name, value in content["terms"].items():
                    losses.setdefault(f"loss {name}", []).append((step, math.nan if value is None else float(value)))
                rates.append((step, float(content["lr"])))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
            raise DataError(f"line {number} is damaged ({detail})", path, "leave the run out") from error
    return validations, losses | ({RATE: rates} if rates else {})


def _parse_validation(content: dict[str, Any]) -> Validation:
    """Scores of the networks, whose keys begin with their names. Earlier versions scored the saved one alone."""
    found = {}
    for name in NETWORKS:
        own = {key.removeprefix(f"{name}/"): value for key, value in content.items() if key.startswith(f"{name}/")}
        if own:
            found[name] = NetworkScores.model_validate(own)
    step = content["step"]
    if type(step) is not int or step < 0:
        raise ValueError("step is no number of steps")
    return Validation(step, found or {"student": NetworkScores.model_validate(content)})


def _read_versions(path: Path) -> dict[str, str]:
    try:
        manifest = json.loads(read_text(path))
        commit = {"commit": manifest["commit"]} if manifest["commit"] else {}
        return {str(name): str(version) for name, version in {**manifest["versions"], **commit}.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"cannot be read ({first_line(error)})", path, "leave the run out") from error


def group_runs(runs: Sequence[ComparedRun]) -> list[Group]:
    """Runs that differ in the seed only, in the order in which they are given.

    Raises DataError for two runs of the same settings and seed, which would count as independent.
    """
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        same = groups.setdefault(json.dumps(_flatten(run.settings, leave_out=SAME_RESULT)), [])
        twin = next((other for other in same if other.seed == run.seed), None)
        if twin:
            raise DataError(f"is the same experiment as {twin.path}, with the same seed", run.path, "leave one out")
        same.append(run)
    return [Group(_name(same), tuple(sorted(same, key=lambda run: run.seed))) for same in groups.values()]


def _name(runs: Sequence[ComparedRun]) -> str:
    """The folder of the first run, without its seed where several are joined."""
    name = runs[0].path.name or str(runs[0].path)
    if re.fullmatch(r"seed=\d+", name):
        name = runs[0].path.parent.name
    return re.sub(r"-seed=\d+(?=-|$)", "", name) if len(runs) > 1 else name


def settings_that_differ(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Path of a setting -> its value in each group, for those that are not the same in all."""
    trees = [_flatten(group.runs[0].settings, leave_out=SAME_RESULT) for group in groups]
    keys = sorted({key for tree in trees for key in tree})
    values = {key: [tree.get(key) for tree in trees] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def versions_that_differ(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Name of a library, or "commit" -> the versions among the runs, for those of which there are several."""
    runs = [run for group in groups for run in group.runs]
    names = sorted({name for run in runs for name in run.versions})
    found = {name: sorted({run.versions.get(name, "unknown") for run in runs}) for name in names}
    return {name: versions for name, versions in found.items() if len(versions) > 1}


def _flatten(settings: Settings, leave_out: Iterable[str]) -> dict[str, Any]:
    flat = presets.flatten(settings.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if key not in leave_out}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def two_sided_p(t: float, degrees: int) -> float:
    """Probability that Student's t of so many degrees of freedom (>= 1) is at least as far from 0 as `t`.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(odd + 1, degrees, 2):  # the powers of the cosine, with their factors
        total += term
        term *= math.cos(angle) ** 2 * i / (i + 1)
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)
