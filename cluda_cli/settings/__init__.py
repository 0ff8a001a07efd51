"""Every knob of cluda: typed, documented, frozen. Imports no torch, so `cluda --help` stays instant.

The string under a field is its documentation, its JSON-schema description and its entry in docs/reference/settings.md.
Defaults are the values of the papers (CLUDA on DAFormer, GTA5 -> Cityscapes), so presets only name what differs.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluda_cli.settings.networks import *
from cluda_cli.settings.objectives import *
from cluda_cli.settings.section import Amount, Margins, Names, Optional, Section, Size, Unset


class RareClass(Section):
    """Rare-class sampling of source and labelled target images, each by its own labels (DAFormer, section 3.3)."""

    temperature: float = Field(0.01, gt=0)
    """Softmax temperature over (1 - class frequency); large values draw all classes equally often."""
    min_pixels: Unset[Annotated[int, Field(ge=0)]] = None
    """An image is drawn for a class only if it holds more pixels of it, at original size; unset: 3000, or 1.14 % of
    the crop where that is less."""
    min_crop_share: float = Field(1500 / 512**2, ge=0, lt=1)
    """A crop is redrawn, up to ten times, until the drawn class covers more of it than this share."""

    def image_pixels(self, crop: tuple[int, int]) -> int:
        """Pixels of a class above which an image is drawn for it: the papers' 3000 for crops of 512 x 512 and more."""
        scaled = round(3000 * min(crop[0] * crop[1] / 512**2, 1))
        return self.min_pixels if self.min_pixels is not None else scaled


class ClassBalance(Section):
    """Cross-entropy in which ground-truth pixels of rare classes weigh more."""

    exponent: float = Field(0.5, ge=0, le=1)
    """A pixel weighs its class's frequency in the ground truth to the power of minus this; the mean weight is 1."""
    correct_pseudo_labels: bool = True
    """Take the logarithm of the weights from the teacher's logits, which have learned a prior that is tilted by them.
    Pseudo-labels only; the network that is evaluated and deployed stays as it is."""


class Data(Section):
    """What is trained on."""

    source: Names = ("gta",)
    """Labelled datasets: names of prepared datasets, or folders that hold an index.json; classes match by name. false
    trains on target images alone: labelled ones take the place of the source."""
    source_shares: Unset[tuple[Annotated[float, Field(gt=0)], ...]] = None
    """Share of the source images that each of several sources gives; unset: in proportion to its images."""
    target: str = "cityscapes"
    """Unlabelled dataset: a name or folder as for a source; its labels serve validation only, but for `labelled`."""
    labelled: Unset[Amount] = None
    """Training images of the target whose labels are learned from, drawn by the seed: a number (50), a share of those
    that have labels (0.1), or a file that lists one image a line. The others are used without labels."""
    root: Path = Path("data")
    """Folder of the datasets; prepared ones lie in its subfolder `prepared`."""
    crop: Size = (512, 512)
    """Training crop, height x width, pixels."""
    source_box: Optional[Size] = (760, 1280)
    """Source images are resized, keeping their shape, to fit this box (in either orientation); false keeps the size."""
    target_box: Optional[Size] = (540, 1024)
    """The same for target images, in training, evaluation and prediction."""
    batch_size: int = Field(2, ge=1)
    """Images of each kind in one step: source, target, labelled target."""
    workers: int = Field(2, ge=0)
    """Loader processes; 0 loads in the training process."""
    max_class_share: float = Field(0.75, gt=0, le=1)
    """A labelled crop is redrawn, up to ten times, while one class covers this share of its labelled pixels or more."""
    rare_class: Optional[RareClass] = RareClass()
    """Rare-class sampling; false draws labelled images uniformly."""
    class_balance: Optional[ClassBalance] = None
    """Class weights in the cross-entropy; false weighs all pixels alike."""
    target_margins: Unset[Margins] = None
    """Top, bottom, left, right bands of the original target frame without pseudo-labels; unset: the dataset's own."""


class Teacher(Section):
    """The moving-average teacher and its pseudo-labels (DACS)."""

    decay: float = Field(0.999, ge=0, lt=1)
    """Cap of the moving-average decay; the decay rises to it as 1 - 1/(step + 1)."""
    confidence: float = Field(0.968, ge=0, le=1)
    """The weight of pseudo-labels is the share of pixels whose probability is at least this."""


class Tail(Section):
    """Paste rare classes alone, in the colours of the target (ours; inspired by Lee et al., AAAI 2021)."""

    share: float = Field(0.01, gt=0, le=1)
    """A class is rare if its share of the labelled source pixels is below this."""
    classes: int = Field(2, ge=1)
    """Rare classes that are drawn for an image, among those that it shows; the same one may be drawn twice."""
    temperature: float = Field(0.01, gt=0)
    """Classes are drawn by the softmax of (1 - frequency) / temperature, unless an objective publishes another law."""
    epsilon: float = Field(1e-5, gt=0)
    """Added to the deviation of a pasted region before the region is divided by it."""


class Mixing(Section):
    """Strong augmentation of class-mixed images (DACS)."""

    jitter_probability: float = Field(0.8, ge=0, le=1)
    """Chance that the images of a step are colour-jittered."""
    jitter_strength: float = Field(0.2, ge=0, le=0.5)
    """Range of brightness, contrast and saturation around 1, and of hue around 0 in turns."""
    blur_probability: float = Field(0.5, ge=0, le=1)
    """Chance that the images of a step are blurred."""
    blur_sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.15, 1.15)
    """Range of the standard deviation of the blur, pixels."""
    source_jitter_strength: Unset[Annotated[float, Field(ge=0, le=0.5)]] = None
    """Jitter strength of source and labelled target images, which are then blurred too, as mixed ones are; unset: they
    stay as they are."""
    uncertain_detail_from: Unset[Annotated[int, Field(ge=0)]] = None
    """From this step on, a mixed image shows in detail where its context is least certain; unset: anywhere, always."""
    tail: Optional[Tail] = None
    """Paste rare classes, drawn by a law, with the target's moments; false pastes half of the classes as they are."""


class Masking(Section):
    """Masked images of masked consistency (MIC, arXiv 2212.01322)."""

    block: Unset[Annotated[int, Field(ge=1)]] = None
    """Side of the square blocks, pixels; unset: a sixteenth of the crop's height."""
    ratio: float = Field(0.7, ge=0, lt=1)
    """Chance that a block is masked."""
    augment: bool = True
    """Jitter and blur target images, as set for mixing, before they are masked."""
    with_source: bool = False
    """Mask source images (without a source labelled target images) in place of half of the target images."""
    importance: Unset[Literal["uncertainty", "boundary", "rarity"]] = None
    """Hide blocks the less likely, the more important they are (GCA): where the teacher is uncertain, where classes
    meet, or where classes are rare; unset: all alike."""
    cap: float = Field(0.9, ge=0, le=1)
    """With `importance`, the largest chance that a block is masked; where it binds, fewer are masked than `ratio`."""
    hide_important: bool = False
    """With `importance`, hide blocks the more likely, the more important they are: a harder task."""

    def block_pixels(self, crop: tuple[int, int]) -> int:
        """Side of the blocks: the papers' 32 for a crop of 512 x 512 and 64 for 1024 x 1024."""
        return self.block if self.block is not None else max(1, round(crop[0] / 16))


class Optimizer(Section):
    """AdamW with linear warm-up and polynomial decay."""

    lr: float = Field(6e-5, gt=0)
    """Learning rate of the encoder."""
    decoder_lr_factor: float = Field(10.0, gt=0)
    """The decoder learns this many times faster."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of an encoder layer as a share of the next deeper one's; the last block has `lr`; 1: all alike."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; encoder norms of transformers have none."""
    warmup: int = Field(1500, ge=0)
    """Steps over which the learning rate rises linearly."""
    warmup_ratio: float = Field(1e-6, gt=0, le=1)
    """Share of the learning rate at the first step of the warm-up."""
    power: float = Field(1.0, ge=0)
    """Exponent of the polynomial decay to zero."""


class Training(Section):
    """The run."""

    steps: int = Field(40_000, ge=1)
    """Optimizer steps."""
    micro_batch: Unset[Annotated[int, Field(ge=1)]] = None
    """Images forwarded at once, gradients accumulating over the batch; unset: the whole batch."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; auto takes a GPU when there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the networks under autocast on a GPU; losses stay in float32, and a CPU ignores it."""
    compile: bool = False
    """Compile the student with torch.compile on a GPU; a CPU ignores it."""
    shard: bool = False
    """Spread parameters, gradients and moments over the devices of a run (FSDP2), for encoders too large for one."""
    log_every: int = Field(50, ge=1)
    """Steps between lines of metrics.jsonl."""
    validate_every: int = Field(4000, ge=1)
    """Steps between validations; the last step always validates."""
    save_every: int = Field(1000, ge=1)
    """Steps between saves of the resumable state."""
    pictures_every: int = Field(1000, ge=0)
    """Steps between pictures of the views and predictions; 0 makes none."""


class Evaluation(Section):
    """Inference in validation, `eval`, `predict` and `pseudo-label`."""

    network: Literal["student", "teacher"] = "student"
    """Which network is saved as best and last weights. Validation scores both. A teacher that labels nothing, as in
    `source-only`, is not scored, and the student is saved."""
    mode: Literal["whole", "slide"] = "whole"
    """Run the network on the whole image, or on overlapping windows whose logits are averaged."""
    window: Unset[Size] = None
    """Sliding window, height x width, pixels of the resized image; unset: the training crop."""
    stride: Unset[Size] = None
    """Steps between windows, vertical x horizontal, pixels; unset: half the window."""


class Settings(Section):
    """The whole tree."""

    data: Data = Data()
    model: Model = Model()
    teacher: Teacher = Teacher()
    mixing: Mixing = Mixing()
    masking: Masking = Masking()
    objectives: Objectives = Objectives()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @property
    def inference(self) -> Evaluation:
        """`evaluation` with its windows filled in."""
        window = self.evaluation.window or self.data.crop
        stride = self.evaluation.stride or (-(-window[0] // 2), -(-window[1] // 2))
        return self.evaluation.model_copy(update={"window": window, "stride": stride})

    @property
    def has_ground_truth(self) -> bool:
        """Whether any image comes with labels."""
        return bool(self.data.source) or self.data.labelled is not None

    @property
    def objectives_in_use(self) -> Objectives:
        """`objectives` without the cross-entropy of images that the run does not have."""
        there = {"source": bool(self.data.source), "labelled": self.data.labelled is not None}
        return self.objectives.model_copy(update={name: None for name, has_any in there.items() if not has_any})

    @model_validator(mode="before")
    @classmethod
    def _tables(cls, value: Any) -> Any:
        for name in cls.model_fields if isinstance(value, dict) else ():
            if name in value and not isinstance(value[name], dict | Section):
                raise ValueError(f"{name} is a table of settings; set one of its keys, as in {name}.key=value")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        problems = []
        distance = self.objectives.feature_distance
        if distance and distance.network == "pretrained" and self.model.weights is False:
            problems.append(
                "objectives.feature_distance needs pretrained weights, but model.weights is false; "
                "set objectives.feature_distance=false or give weights"
            )
        if distance and distance.network_weights is False:
            problems.append("objectives.feature_distance.network_weights: an untrained network is no aim")
        window, stride = self.inference.window, self.inference.stride
        if window and stride and any(step > side for step, side in zip(stride, window, strict=True)):
            problems.append("evaluation.stride is larger than evaluation.window, which leaves gaps between windows")
        masks = self.objectives.masked or self.objectives.node_contrast
        if self.masking.with_source and masks and self.data.batch_size < 2:
            problems.append("masking.with_source needs a data.batch_size of 2 or more")
        if self.objectives.semantic_negatives and self.data.batch_size < 2:
            problems.append("objectives.semantic_negatives needs a data.batch_size of 2 or more")
        if self.masking.with_source and self.objectives.masked and not self.has_ground_truth:
            problems.append("masking.with_source needs data.source or data.labelled")
        balance = self.objectives.adaptive_balance
        if balance and balance.copy_paste and not self.objectives_in_use.labelled:
            problems.append("objectives.adaptive_balance.copy_paste needs data.labelled and objectives.labelled")
        if balance and balance.paste_scale[0] > balance.paste_scale[1]:
            problems.append("objectives.adaptive_balance.paste_scale must be (smallest, largest)")
        if set(self.model.freeze) == {"encoder", "decoder", "head"}:
            problems.append("model.freeze leaves nothing of the network to learn; name at most two parts")
        shares = self.data.source_shares
        if shares and len(shares) != len(self.data.source):
            problems.append(f"data.source_shares must have one share for each source, {len(self.data.source)}")
        terms = [objective for _, objective in self.objectives_in_use if objective and objective.has_term]
        if not any(objective.weight and not objective.start for objective in terms):
            problems.append("objectives has no term that is on from the first step")
        if self.objectives.locally_adaptive and self.objectives.locally_adaptive.window % 2 == 0:
            problems.append("objectives.locally_adaptive.window must be odd, so that a window has a centre")
        if self.mixing.blur_sigma[0] > self.mixing.blur_sigma[1]:
            problems.append("mixing.blur_sigma must be (smallest, largest)")
        if self.training.shard and self.training.compile:
            problems.append("training.shard and training.compile exclude each other; set one of them to false")
        if problems:
            raise ValueError("; ".join(problems))
        return self
