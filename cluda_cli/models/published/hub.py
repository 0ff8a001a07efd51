"""Where published encoder weights are: a file, an installed package, or a repository of the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import timm
from huggingface_hub import errors

from cluda_cli.errors import DataError, EnvironmentProblem, SettingsError, first_line
from cluda_cli.models.published import efficientnet

WHERE = "model.weights"
HUB_PREFIX = "hf-hub:"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
TIMEOUT = 10
"""Seconds to wait for the hub's first answer."""
# ImageNet weights of the Mix Transformers (NVIDIA source code licence, non-commercial): repository, revision.
MIT_HUB = {
    "mit_b0": ("smp-hub/mit_b0.imagenet", "9ce53d104d92d75aabb00aae70677aaab67e7c84"),
    "mit_b1": ("smp-hub/mit_b1.imagenet", "a04bf4f13a549bce677cf79b04852e7510782817"),
    "mit_b2": ("smp-hub/mit_b2.imagenet", "868ab6f13871dcf8c3d9f90ee4519403475b65ef"),
    "mit_b3": ("smp-hub/mit_b3.imagenet", "32558d12a65f1daa0ebcf4f4053c4285e2c1cbda"),
    "mit_b4": ("smp-hub/mit_b4.imagenet", "3a3454e900a4b4f11dd60eeb59101a9a1a36b017"),
    "mit_b5": ("smp-hub/mit_b5.imagenet", "ced04d96c586b6297fd59a7a1e244fc78fdb6531"),
}


@dataclass(frozen=True)
class WeightsFile:
    """A file on this machine and where it came from."""

    path: Path
    origin: str


def locate(weights: str, encoder: str) -> WeightsFile:
    """The file that the setting names, downloaded on first use; see the setting for its three forms."""
    if weights == "imagenet" and encoder == efficientnet.ENCODER:
        return WeightsFile(efficientnet.find_packaged_weights(), f"{efficientnet.PACKAGE} {efficientnet.VERSION}")
    if weights == "imagenet":
        return _fetch(*_published(encoder))
    if weights.startswith(HUB_PREFIX):
        repository, _, revision = weights.removeprefix(HUB_PREFIX).partition("@")
        return _fetch(repository, revision or None, HUB_FILES)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise DataError("there is no such file", path, f'{WHERE} is "imagenet", a file, or hf-hub:owner/name@revision')
    return WeightsFile(path, str(path))


def _published(encoder: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Repository, revision and possible files of the published ImageNet weights."""
    if encoder in MIT_HUB:
        return *MIT_HUB[encoder], HUB_FILES[:1]
    config = timm.get_pretrained_cfg(encoder)
    if config is None or not config.hf_hub_id:
        raise SettingsError(f"there are no published weights for {encoder}", WHERE, f"set {WHERE} to a file or false")
    repository, _, revision = config.hf_hub_id.partition("@")
    return repository, revision or None, (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES


def _fetch(repository: str, revision: str | None, files: tuple[str, ...]) -> WeightsFile:
    """The first of `files` that the repository has, from the hub's cache on this machine or else from the hub."""
    version = f"{repository}@{revision or 'main'}"
    offline = (
        f"without network, fetch {files[0]} of {version} on another machine and pass --set {WHERE}=PATH; or train from "
        f"random weights: --set {WHERE}=false --set objectives.feature_distance=false"
    )
    try:
        found = _find_cached(repository, revision, files) or _download(repository, revision, files)
    except errors.GatedRepoError:
        remedy = f"accept it at https://huggingface.co/{repository} and log in, or set {WHERE} to a file"
        raise EnvironmentProblem(f"{repository} asks for its licence to be accepted", WHERE, remedy) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as problem:
        message = f"the hub has no {version}: {first_line(problem)}"
        raise SettingsError(message, WHERE, f"check the name and the revision, or set {WHERE} to a file") from None
    except Exception as problem:  # errors of several HTTP libraries come through unchanged
        raise EnvironmentProblem(f"{version} is out of reach: {first_line(problem)}", WHERE, offline) from None
    if found is None:
        raise SettingsError(f"{version} holds no {' or '.join(files)}", WHERE, f"set {WHERE} to a file")
    if found.parent.parent.name == "snapshots":  # the cache files what it fetched under the commit
        version = f"{repository}@{found.parent.name}"
    return WeightsFile(found, f"{version}/{found.name}")


def _find_cached(repository: str, revision: str | None, files: tuple[str, ...]) -> Path | None:
    """The first of `files` that was fetched before; nobody is asked whether `main` has moved since."""
    cached = (huggingface_hub.try_to_load_from_cache(repository, file, revision=revision) for file in files)
    return next((Path(path) for path in cached if isinstance(path, str)), None)  # or a mark that it is known to lack


def _download(repository: str, revision: str | None, files: tuple[str, ...]) -> Path | None:
    """The first of `files` that the hub has, downloaded.

    The hub is asked once before: its own download tries an unreachable hub six times, for up to minutes.
    """
    for file in files:
        try:
            url = huggingface_hub.hf_hub_url(repository, file, revision=revision)
            huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)
        except errors.EntryNotFoundError:
            continue
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, etag_timeout=TIMEOUT))
    return None
