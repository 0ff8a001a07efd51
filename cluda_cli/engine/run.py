"""All state of a run in one object: what changes during training is here, and what is here is saved."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cluda_cli.adaptation.class_balance import class_weights
from cluda_cli.adaptation.teacher import FrozenTeacher, Teacher
from cluda_cli.adaptation.views import WITHOUT_TEACHER
from cluda_cli.data.index import Index, class_frequencies, joint_classes, seen_classes
from cluda_cli.distributed import collectives
from cluda_cli.engine.optim import build_optimizer
from cluda_cli.engine.sharding import (
    gather_model_state,
    gather_optimizer_state,
    scatter_model_state,
    scatter_optimizer_state,
    shard,
)
from cluda_cli.engine.start import read_network, read_teacher, start_from
from cluda_cli.errors import SettingsError, first_line
from cluda_cli.files import sha256
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.encoders import Encoder, LoadReport, load_pretrained
from cluda_cli.models.multires import build_segmenter
from cluda_cli.models.normalisation import Normalisation
from cluda_cli.models.segmenter import Output, Segmenter
from cluda_cli.objectives import build_makers, build_objectives, source_law
from cluda_cli.seeds import derive_seed
from cluda_cli.settings import Settings


class Run:
    """Student, teacher, objectives, optimizer and counters.

    `step` is the number of finished optimizer steps, `validated` the step of the last validation, `best` the best
    validation score with its step. The class table, the seen classes and the makers of views follow from sources and
    settings, and are not state. `labelled` are the target images with labels to learn from; without any label, all
    classes count as seen. A run that is `resumed` gets its weights from its state, so `model.start` is not read.

    Raises SettingsError for settings that do not fit each other or the sources, DataError for weights that cannot be
    read, EnvironmentProblem for weights that are out of reach.
    """

    def __init__(
        self,
        settings: Settings,
        sources: Sequence[Index],
        device: torch.device,
        *,
        labelled: Index | None = None,
        resumed: bool = False,
    ) -> None:
        self.settings, self.device = settings, device
        truth = [*sources, *([labelled] if labelled else [])]
        self.classes = joint_classes(truth)
        self.seen = seen_classes(truth) or self.classes.names
        balance = settings.data.class_balance
        frequencies = class_frequencies(sources, settings.data.source_shares, labelled)
        weights = balance and class_weights(frequencies, balance.exponent)
        self.start: str | None = None
        """One line for the user that says what `model.start` did; None without it."""
        self.frozen: dict[str, str] = {}
        """Origin -> SHA-256, hexadecimal, of the weights of networks that the run reads and never changes."""
        with torch.random.fork_rng(devices=[]):  # layers initialise themselves from the global generator
            torch.manual_seed(derive_seed(settings.training.seed, "initialise"))
            self.student = build_segmenter(settings.model, settings.data.crop, len(self.classes))
            self.weights: LoadReport | None = load_pretrained(self.student.encoder, settings.model)
            if device.type == "cuda" and settings.training.precision == "bfloat16" and not settings.training.shard:
                # Tensor cores read channels last; the teacher and the frozen copy inherit it. FSDP2 refuses it.
                self.student.encoder.to(memory_format=torch.channels_last)
            frozen = self._read_teacher()
            self.objectives = build_objectives(
                settings.objectives_in_use, self.student, self.classes, weights, frozen,
                "source" if settings.data.source else "labelled", settings.data.crop, settings.mixing,
                settings.training.seed, self._read_network(),
            )  # fmt: skip
        self.makers = build_makers(settings, self.objectives, frequencies)
        if settings.model.start and not resumed:
            self.start = start_from(Path(settings.model.start), self.student, self.classes)
        self.student.to(device)
        self._try_crop()
        self.objectives.to(device)
        collectives.convert_batch_norms(self.student, device)
        collectives.convert_batch_norms(self.objectives, device)
        compiled = settings.training.compile and device.type == "cuda"
        self.forward: Callable[[torch.Tensor, Boxes | None], Output] = (
            torch.compile(self.student) if compiled else self.student
        )
        corrected = balance and balance.correct_pseudo_labels
        tilt = weights.to(device) if corrected else None
        self.teacher = Teacher(self.student, settings.teacher, tilt, frozen and frozen.to(device))
        sharded = settings.training.shard and collectives.world_size() > 1
        if sharded:
            shard((self.student, self.teacher.network), self.objectives, device)
        fused = device.type == "cuda" and not sharded
        self.optimizer = build_optimizer(self.student, self.objectives, settings.optimizer, fused=fused)
        self.step = 0
        self.validated = 0
        self.best: dict[str, float] | None = None

    def _read_teacher(self) -> FrozenTeacher | None:
        """The frozen teacher of distillation, if there is one."""
        path = self.settings.model.teacher
        if not path:
            return None
        teacher = read_teacher(Path(path), self.settings.data.target_box, self.classes)
        self.frozen[path] = sha256(Path(path))
        return teacher

    def _read_network(self) -> Encoder | Segmenter | None:
        """The frozen network of the feature distance; None for the pretrained encoder, or without that objective."""
        section = self.settings.objectives.feature_distance
        if not section or section.network == "pretrained":
            return None
        network, origin, digest = read_network(section)
        self.frozen[origin] = digest
        return network

    def _try_crop(self) -> None:
        """Raises SettingsError now if network or objectives cannot train on the crop, not in the first step."""
        data, micro_batch = self.settings.data, self.settings.training.micro_batch
        local = len(collectives.local_positions(data.batch_size))  # images of this rank
        count = local % micro_batch or micro_batch if micro_batch else local  # the smallest part
        image = torch.zeros(min(count, local), 3, *data.crop, device=self.device)
        before = [(buffer, buffer.clone()) for buffer in self.student.buffers()]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                boxes = self.student.draw_boxes(len(image), data.crop, torch.Generator())
                output = self.student(image, boxes and boxes.to(self.device))
            for buffer, value in before:
                buffer.copy_(value)
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            what = f"{self.settings.model.encoder} cannot train on {len(image)} such crops ({first_line(error)})"
            remedy = f"take a larger multiple of {self.student.pad_multiple}, or more images at once"
            raise SettingsError(what, "data.crop", remedy) from error
        for objective in self.objectives.values():
            objective.check(output)

    @property
    def views_read(self) -> set[str]:
        """The names of the views that objectives learn from at some step of the run."""
        steps = self.settings.training.steps
        active = [o for o in self.objectives.values() if o.settings.weight > 0 and o.settings.start < steps]
        return {view for objective in active for group in objective.reads for view in group}

    @property
    def paired(self) -> bool:
        """Whether an objective asks for the paired pictures of target images."""
        return any("paired" in group for objective in self.objectives.values() for group in objective.reads)

    @property
    def networks(self) -> dict[str, Segmenter]:
        """The networks that a validation scores, by name: the student, and the moving average if it labels.

        Nothing moves the batch-norm statistics of an average that labels nothing.
        """
        labels = self.views_read - WITHOUT_TEACHER and self.teacher.frozen is None
        return {"student": self.student} | ({"teacher": self.teacher.network} if labels else {})

    @property
    def evaluated_name(self) -> str:
        """The name of the network that is saved: that of the settings, or the student where no teacher labels."""
        return self.settings.evaluation.network if "teacher" in self.networks else "student"

    @property
    def evaluated(self) -> Segmenter:
        """The network that is saved as best and last weights."""
        return self.networks[self.evaluated_name]

    def source_law(self, step: int) -> tuple[float, ...] | None:
        """Probabilities with which source classes are drawn for the batch of `step`; None: those of the settings."""
        return source_law(self.objectives, step)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, on rank 0; all ranks must call it."""
        return {
            "student": gather_model_state(self.student),
            "teacher": gather_model_state(self.teacher),
            "objectives": gather_model_state(self.objectives),
            "optimizer": gather_optimizer_state(self.optimizer),
            "normalisation": asdict(self.student.normalisation),
            "step": self.step,
            "validated": self.validated,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises SettingsError if the state is of another network or other objectives."""
        try:
            for name, module in (("student", self.student), ("teacher", self.teacher), ("objectives", self.objectives)):
                module.load_state_dict(scatter_model_state(state[name], module))
            self._load_optimizer(state["optimizer"])
            if "normalisation" in state:  # absent from runs that began before it was saved
                for network in (self.student, self.teacher.network):
                    network.encoder.normalisation = Normalisation(**state["normalisation"])
            self.step, self.validated = _as_count(state["step"]), _as_count(state["validated"])
            best = state["best"]
            self.best = best and {"miou": float(best["miou"]), "step": _as_count(best["step"])}
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            detail = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:160]  # the first: a heading
            remedy = "resume with the network and objectives that the run began with"
            raise SettingsError(f"saved state does not fit the settings ({detail})", "--resume", remedy) from error

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the moments. Rates and weight decay stay those of the settings, and the implementation (`fused`) that of
        the device, because both may differ from those of the saved run."""
        keys = ("base_lr", "weight_decay", "fused")
        own = [{key: group[key] for key in keys} for group in self.optimizer.param_groups]
        if len(own) != len(state["param_groups"]):
            counts = f"{len(state['param_groups'])} groups of parameters, {len(own)} by the settings"
            raise ValueError(f"{counts}; optimizer.layer_decay and model.freeze decide how many")
        groups = [group | values for group, values in zip(state["param_groups"], own, strict=True)]
        self.optimizer.load_state_dict(scatter_optimizer_state(state | {"param_groups": groups}, self.optimizer))


def _as_count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("step or validated is no number of steps")
    return value
