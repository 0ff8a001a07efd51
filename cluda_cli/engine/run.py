"""All state of a run in one object: what changes during training is here, and what is here is saved."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from cluda_cli.adaptation.teacher import Teacher
from cluda_cli.data.index import Index, seen_classes
from cluda_cli.distributed import collectives
from cluda_cli.engine.optim import build_optimizer
from cluda_cli.engine.sharding import (
    gather_model_state,
    gather_optimizer_state,
    scatter_model_state,
    scatter_optimizer_state,
    shard,
)
from cluda_cli.engine.verdict import Verdict
from cluda_cli.errors import RunError, SettingsError, first_line
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.encoders import LoadReport, load_pretrained
from cluda_cli.models.multires import build_segmenter
from cluda_cli.models.segmenter import Output, Segmenter
from cluda_cli.objectives import build_objectives
from cluda_cli.seeds import derive_seed
from cluda_cli.settings import Settings


class Run:
    """Student, teacher, objectives, optimizer and counters.

    `step` is the number of finished optimizer steps, `validated` the step of the last validation, `best` the best
    validation score with its step. The class table and the seen classes follow from the source and are not state.
    """

    def __init__(self, settings: Settings, source: Index, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.classes, self.seen = source.classes, seen_classes(source)
        with torch.random.fork_rng(devices=[]):  # layers initialise themselves from the global generator
            torch.manual_seed(derive_seed(settings.training.seed, "initialise"))
            self.student = build_segmenter(settings.model, settings.data.crop, len(source.classes))
            self.weights: LoadReport | None = load_pretrained(self.student.encoder, settings.model)
            if device.type == "cuda" and settings.training.precision == "bfloat16" and not settings.training.shard:
                # Tensor cores read channels last; the teacher and the frozen copy inherit it. FSDP2 refuses it.
                self.student.encoder.to(memory_format=torch.channels_last)
            self.objectives = build_objectives(settings.objectives, self.student, source.classes)
        self.student.to(device)
        self._try_crop()
        self.objectives.to(device)
        collectives.convert_batch_norms(self.student, device)
        collectives.convert_batch_norms(self.objectives, device)
        compiled = settings.training.compile and device.type == "cuda"
        self.forward: Callable[[torch.Tensor, Boxes | None], Output] = (
            torch.compile(self.student) if compiled else self.student
        )
        self.teacher = Teacher(self.student, settings.teacher)
        sharded = settings.training.shard and collectives.world_size() > 1
        if sharded:
            shard((self.student, self.teacher.network), self.objectives, device)
        self.looks_later = device.type == "cuda" and not sharded
        """Whether the host looks at the losses of a step only while the device is busy with the next one."""
        self.optimizer = build_optimizer(self.student, self.objectives, settings.optimizer, fused=self.looks_later)
        self.pending: Verdict | None = None
        self.step = 0
        self.validated = 0
        self.best: dict[str, float] | None = None

    def _try_crop(self) -> None:
        """Raises SettingsError now if the network cannot train on the crop, rather than in the first step."""
        data, micro_batch = self.settings.data, self.settings.training.micro_batch
        count = data.batch_size % micro_batch or micro_batch if micro_batch else data.batch_size  # the smallest part
        image = torch.zeros(min(count, data.batch_size), 3, *data.crop, device=self.device)
        before = [(buffer, buffer.clone()) for buffer in self.student.buffers()]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                boxes = self.student.draw_boxes(len(image), data.crop, torch.Generator())
                self.student(image, boxes and boxes.to(self.device))
            for buffer, value in before:
                buffer.copy_(value)
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            what = f"{self.settings.model.encoder} cannot train on {len(image)} such crops ({first_line(error)})"
            remedy = f"take a larger multiple of {self.student.pad_multiple}, or more images at once"
            raise SettingsError(what, "data.crop", remedy) from error

    @property
    def evaluated(self) -> Segmenter:
        """The network that is validated and deployed."""
        return self.student if self.settings.evaluation.network == "student" else self.teacher.network

    def settle(self) -> None:
        """Look at the last step if nobody has; raises RunError, the step not counted, if it was not finite."""
        verdict, self.pending = self.pending, None
        if verdict and (error := verdict.error()):
            self.step -= 1
            raise error

    def state_dict(self) -> dict[str, Any]:
        """What is worth saving, on rank 0; all ranks must call it. A last step that turns out to be broken, which had
        no effect, is not counted."""
        with suppress(RunError):
            self.settle()
        return {
            "student": gather_model_state(self.student),
            "teacher": gather_model_state(self.teacher),
            "objectives": gather_model_state(self.objectives),
            "optimizer": gather_optimizer_state(self.optimizer),
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
            self.step, self.validated, self.best = state["step"], state["validated"], state["best"]
        except (RuntimeError, KeyError, ValueError) as error:
            detail = str(error).strip().splitlines()[-1].strip()[:160]  # torch's first line is a heading
            remedy = "resume with the network and objectives that the run began with"
            raise SettingsError(f"saved state does not fit the settings ({detail})", "--resume", remedy) from error

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Moments from the state; rates and decay from the settings, which may have changed on resume, and the
        implementation from the device, which may be another one."""
        keys = ("base_lr", "weight_decay", "fused")
        own = [{key: group[key] for key in keys} for group in self.optimizer.param_groups]
        groups = [group | values for group, values in zip(state["param_groups"], own, strict=True)]
        self.optimizer.load_state_dict(scatter_optimizer_state(state | {"param_groups": groups}, self.optimizer))

    def buffers(self) -> list[torch.Tensor]:
        """Every buffer that a forward may change."""
        return [b for module in (self.student, self.teacher, self.objectives) for b in module.buffers()]
