"""The verb `doctor`: what this machine has, and what is wrong with it for a run."""

import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from cluda_cli import __version__, console
from cluda_cli.distributed.place import usable_cores
from cluda_cli.errors import CludaError, EnvironmentProblem
from cluda_cli.models.published.efficientnet import find_packaged_weights

LIBRARIES = ("torch", "torchvision", "timm", "safetensors", "pillow", "numpy", "pydantic", "typer", "rich")
LEAST_DISK = 10 * 2**30
"""Free bytes below which a warning says so: a run of a large network with its saves takes a few GiB."""
LEAST_SHARED = 2**30
"""Bytes of shared memory below which loader processes may be killed; containers often have 64 MiB."""
HUB, HUB_SECONDS = "huggingface.co", 3.0

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. A problem stops runs, a note may slow or limit them."""

    subject: str
    state: State
    text: str


def doctor(*, as_json: bool = False) -> None:
    """Print what a run would find here. Writes nothing, and asks the network for the address of the hub alone.

    Raises EnvironmentProblem after the report if something stops every run.
    """
    findings = [
        Finding("cluda", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        *(_check_library(name) for name in LIBRARIES),
        *_check_devices(),
        Finding("processor", "ok", f"usable cores: {usable_cores()}, threads of torch: {torch.get_num_threads()}"),
        _check_disk(Path.cwd()),
        _check_shared_memory(Path("/dev/shm")),
        _check_weights(),
        _check_hub(),
    ]
    if as_json:
        console.result_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            mark = "" if finding.state == "ok" else f"{finding.state}: "
            console.result(f"{finding.subject:<14}{mark}{finding.text}")
    problems = [finding.subject for finding in findings if finding.state == "problem"]
    if problems:
        raise EnvironmentProblem(f"no run will work here: {', '.join(problems)}", "", "see the report")


def _check_library(name: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "problem", "not installed; install cluda again")


def _check_devices() -> list[Finding]:
    """A line for each GPU, or one that says why there is none."""
    if torch.cuda.is_available():
        return [_describe_gpu(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [Finding("device", "ok", "mps")]
    built = torch.version.cuda or torch.version.hip
    if not built:
        return [Finding("device", "note", "cpu only: this build of torch has no GPU support")]
    return [Finding("device", "note", f"cpu only: torch is built for CUDA {built}, and finds no driver with a GPU")]


def _describe_gpu(number: int) -> Finding:
    """Name, memory, whether this build of torch has code for it, and bfloat16."""
    gpu = torch.cuda.get_device_properties(number)
    text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    text += ", bfloat16" if gpu.major >= 8 else ", no bfloat16"
    built = {name.removeprefix("sm_")[: len(str(gpu.major))] for name in torch.cuda.get_arch_list()}
    if built and str(gpu.major) not in built:
        text += f"; this build of torch has no code for sm_{gpu.major}{gpu.minor}"
        return Finding(f"cuda:{number}", "problem", text)
    return Finding(f"cuda:{number}", "ok", text)


def _check_disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    text = f"{free / 2**30:.0f} GiB free in {folder}"
    if not writable:
        return Finding("disk", "note", f"{folder} cannot be written; name folders with --run and --data-root")
    return Finding("disk", "ok" if free >= LEAST_DISK else "note", text)


def _check_shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding("shared memory", "ok", f"no {folder} on {sys.platform}")
    size = shutil.disk_usage(folder).total
    text = f"{size / 2**20:.0f} MiB"
    if size < LEAST_SHARED:
        text += "; loader processes may be killed: docker run --shm-size=8g, or --set data.workers=0"
        return Finding("shared memory", "note", text)
    return Finding("shared memory", "ok", text)


def _check_weights() -> Finding:
    """The ImageNet weights that are installed as a dependency."""
    try:
        find_packaged_weights()
    except CludaError as problem:
        return Finding("weights", "note", str(problem))
    return Finding("weights", "ok", "tf_efficientnet_lite0 is installed, its hash is right (Apache-2.0)")


def _check_hub() -> Finding:
    """Whether published weights can be fetched."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Finding("hub", "note", "HF_HUB_OFFLINE is set: weights come from its cache alone")
    try:
        with socket.create_connection((HUB, 443), timeout=HUB_SECONDS):
            return Finding("hub", "ok", f"{HUB} can be reached")
    except OSError as error:
        text = f"{HUB} cannot be reached ({error.strerror or error}); give model.weights a file"
        return Finding("hub", "note", text)
