"""A run for measurements. It costs what a run of the settings costs, and needs no weights, no data and no learning."""

import itertools
from collections.abc import Generator

import torch
from torch import Tensor

from cluda_cli.adaptation.teacher import PseudoLabels
from cluda_cli.data.batch import Batch
from cluda_cli.data.datasets import Datasets
from cluda_cli.data.streams import batches
from cluda_cli.engine.run import Run
from cluda_cli.measure.synthetic import synthetic_batch, synthetic_labels
from cluda_cli.seeds import derive_seed
from cluda_cli.settings import Settings

CONFIDENT_SHARE = 0.5
"""Weight of a pseudo-label: the share of confident pixels about halfway through a training."""


def find_busiest_step(settings: Settings) -> int:
    """The first step of the run at which every objective and option that starts later than step 0 is on."""
    starts = [objective.start for _, objective in settings.objectives if objective]
    starts.append(settings.mixing.uncertain_detail_from or 0)
    return max((start for start in starts if start < settings.training.steps), default=0)


def make_measurable(settings: Settings, steps: int) -> Settings:
    """Settings of the same cost with random encoder weights, at least `steps` steps, and a rate that changes nothing.

    A random network may diverge at a rate that suits a pretrained one. They are not validated again, because a feature
    distance to random weights, which costs the same, is refused there for good reason.
    """
    model = settings.model.model_copy(update={"weights": False, "start": None})
    distance = settings.objectives.feature_distance
    if distance and distance.network != "pretrained":
        distance = distance.model_copy(update={"network_weights": False})
    objectives = settings.objectives.model_copy(update={"feature_distance": distance})
    optimizer = settings.optimizer.model_copy(update={"lr": 1e-12})
    training = settings.training.model_copy(update={"steps": max(steps, settings.training.steps)})
    changed = {"model": model, "objectives": objectives, "optimizer": optimizer, "training": training}
    return settings.model_copy(update=changed)


def stream_batches(
    settings: Settings, datasets: Datasets | None, num_classes: int, first: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Batches of the datasets, or one synthetic batch again and again."""
    pin_memory, distance = device.type == "cuda", settings.objectives.feature_distance
    paired = bool(distance and "paired" in distance.views)
    if datasets:
        data, training = settings.data, settings.training
        return batches(
            datasets.sources, datasets.unlabelled, data, training.seed, first, training.steps,
            labelled=datasets.labelled, pin_memory=pin_memory, paired=paired,
        )  # fmt: skip
    batch = synthetic_batch(settings.data, num_classes, generator(settings, "bench batch"))
    if paired:
        batch = {**batch, "reference": batch["target"]}
    if pin_memory:
        batch = {name: crops.pin_memory() for name, crops in batch.items()}
    return (each for each in itertools.repeat(batch))


def imitate_pseudo_labels(run: Run) -> None:
    """Replace the teacher's pseudo-labels and their weights, after it has computed them, by synthetic ones of a street.

    A random network predicts one class nearly everywhere, with low confidence. The cost of a contrast depends on the
    sizes of the classes, and on how many pixels are certain; here all are.
    """
    data, honest = run.settings.data, run.teacher.pseudo_labels
    drawn = generator(run.settings, "bench pseudo-labels")
    labels = synthetic_labels(data.batch_size, data.crop, len(run.classes), drawn).long().to(run.device)  # B H W

    def pseudo_labels(image: Tensor, valid: Tensor) -> PseudoLabels:
        weight = CONFIDENT_SHARE * valid.float()
        label = labels[torch.arange(len(image), device=run.device) % len(labels)]
        made = honest(image, valid)  # asked for its cost
        return PseudoLabels(label, weight, valid.float(), made.logits, made.features)

    run.teacher.pseudo_labels = pseudo_labels


def generator(settings: Settings, purpose: str) -> torch.Generator:
    """A generator for the random numbers of one purpose of a measurement."""
    return torch.Generator().manual_seed(derive_seed(settings.training.seed, purpose))
