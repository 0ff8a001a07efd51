"""The terms of the loss, one table for each objective."""

from typing import Annotated, Literal

from pydantic import Field

from cluda_cli.settings.section import Optional, Section, Unset


class Objective(Section):
    """What every objective has."""

    weight: float = Field(1.0, ge=0)
    """Factor of the term in the total loss."""
    start: int = Field(0, ge=0)
    """First step at which the term is active."""

    @property
    def has_term(self) -> bool:
        """Whether it has a term of its own in the loss."""
        return True


class CrossEntropy(Objective):
    """Cross-entropy, on the whole crop and on its detail."""

    detail_weight: float = Field(0.1, ge=0, le=1)
    """Share of the detail crop's own cross-entropy in the term; networks of one resolution have no detail."""


class HardPixels(Section):
    """Learn from the hard pixels alone: online bootstrapping (Wu et al., arXiv 1605.06885)."""

    threshold: float = Field(0.7, gt=0, le=1)
    """A pixel is hard while the student gives its label a probability below this."""
    min_share: float = Field(1 / 16, gt=0, le=1)
    """At least this share of the labelled pixels of every image is kept, the hardest ones."""


class SupervisedCrossEntropy(CrossEntropy):
    """Cross-entropy on ground truth, on the whole crop and on its detail."""

    hard_pixels: Optional[HardPixels] = None
    """Mean over hard pixels in place of the mean over all pixels; false takes all."""


Distance = Literal["euclidean", "squared", "cosine", "cosine_and_smooth_l1"]


class FeatureDistance(Objective):
    """Distance of features to those of a frozen network; by default of things to the pretrained encoder (DAFormer)."""

    weight: float = Field(0.005, ge=0)
    """Factor of the term in the total loss."""
    views: tuple[Literal["source", "target", "paired"], ...] = Field(("source",), min_length=1)
    """Where it is measured: on source images, on target images, on target images against their paired pictures."""
    network: str = "pretrained"
    """The frozen network: "pretrained", the student's own encoder before it learns; the name of an encoder; or the
    weights file of a run."""
    network_weights: str | Literal[False] = "imagenet"
    """Weights of a frozen encoder that `network` names, as for `model.weights`."""
    features: tuple[Literal["first", "second", "third", "last", "fused"], ...] = Field(("last",), min_length=1)
    """Maps that are compared, whose terms are added: those of the encoder from the finest to the last, and the fused
    feature of the decoder, which only the network of a run has."""
    distance: Distance = "euclidean"
    """What is averaged over cells: the Euclidean distance, its square, 1 - cosine, or a mean of the latter and smooth
    L1."""
    cosine_share: float = Field(0.9, ge=0, le=1)
    """Share of the cosine in `cosine_and_smooth_l1`; the rest is smooth L1."""
    head: bool = False
    """Compare through a head of two layers, which learns; needed where channels differ."""
    classes: Unset[Literal["all"] | tuple[str, ...]] = None
    """Names of the classes it acts on, or "all"; unset: the countable classes of the source. On target images the
    classes are those of the pseudo-labels."""
    min_share: float = Field(0.75, gt=0, le=1)
    """A feature cell counts if one such class covers at least this share of its pixels; with "all", any labels."""
    search: int = Field(0, ge=0, le=8)
    """A cell is compared with the most similar one at most so many cells away, for pictures that do not lie exactly on
    each other."""


class PixelContrast(Objective):
    """Pixel-to-pixel contrast of fused features within and across domains (CLUDA)."""

    temperature: float = Field(1.0, ge=0.02)
    """Divisor of the cosine similarity."""
    size: int = Field(65, ge=2)
    """Side of the grid to which features are resized; a smaller feature map keeps its own size."""
    weighter_dim: int = Field(256, ge=1)
    """Channels of the head that learns, for networks with context and detail, how much detail counts in a pair."""


class AnchorContrast(Objective):
    """Contrast of a few pixels of every class and image, the anchors, behind a projection head (arXiv 2101.11939)."""

    weight: float = Field(0.1, ge=0)
    """Factor of the term in the total loss."""
    temperature: float = Field(0.1, ge=0.02)
    """Divisor of the cosine similarity."""
    projection_dim: int = Field(256, ge=1)
    """Channels of the projection head, hidden and final."""
    anchors: int = Field(50, ge=2)
    """Anchors of one class in one image, at most; half of them misclassified, where there are so many."""
    max_anchors: int = Field(2048, ge=2)
    """Anchors of a micro-batch, source and mixed images together, at most; all classes of all images lose alike."""
    min_probability: float = Field(0.968, ge=0, le=1)
    """A pixel with a pseudo-label can be an anchor if the teacher gives the label at least this probability."""


class ZeroStyle(CrossEntropy):
    """Cross-entropy and agreement with the teacher on images without style (inspired by Lee et al., AAAI 2021)."""

    weight: float = Field(0.1, ge=0)
    """Factor of both terms in the total loss."""
    epsilon: float = Field(1e-5, gt=0)
    """Added to the deviation of a channel before the channel is divided by it."""
    band: int = Field(0, ge=0, le=8)
    """Frequencies up to this, in cycles per image, get the mean amplitude of all images seen; 0: moments alone go."""


class MemoryContrast(Objective):
    """Contrast with a memory of every class and mixtures of its hardest negatives (MoCHi, arXiv 2010.01028)."""

    weight: float = Field(0.1, ge=0)
    """Factor of the term in the total loss."""
    start: int = Field(3000, ge=0)
    """First step at which the term is active; it fills the memory, so the loss begins in the next step."""
    temperature: float = Field(0.1, ge=0.02)
    """Divisor of the cosine similarity."""
    projection_channels: int = Field(128, ge=1)
    """Channels of the projection head, hidden and final, and of the memory."""
    anchors: int = Field(1024, ge=1)
    """Pixels of a micro-batch that are compared with the memory, at most; all classes of all images lose alike."""
    memory: int = Field(1024, ge=1)
    """Pixels of a class that are remembered; the oldest is forgotten first."""
    pushed: int = Field(16, ge=1)
    """Pixels of a class in one image that a step remembers, at most."""
    hardest: int = Field(512, ge=1)
    """Negatives of an anchor that may be mixed, those that are most similar to it."""
    mixed_pairs: int = Field(128, ge=0)
    """Mixtures of two negatives for each anchor; with this and `mixed_queries` 0 the contrast is a plain one."""
    mixed_queries: int = Field(32, ge=0)
    """Mixtures of a negative with the anchor itself, for each anchor."""


class RelationDistillation(Objective):
    """Relations between pixels of target images as `model.teacher` sees them (after ReKD, arXiv 2112.04174)."""

    relations: Literal["soft", "neighbours", "prototypes"] = "soft"
    """What is learnt: how similar a pixel is to every other one (soft), which ones are nearest to it (neighbours), or
    which ones are nearest to the same prototype (prototypes)."""
    samples: int = Field(1024, ge=4)
    """Pixels of a micro-batch that are compared, in equal parts of all images."""
    student_temperature: float = Field(0.1, ge=0.02)
    """Divisor of the student's cosine similarities."""
    teacher_temperature: float = Field(0.1, ge=0.02)
    """Divisor of the teacher's cosine similarities, in soft relations."""
    neighbours: int = Field(5, ge=1)
    """Pixels that count as the nearest."""
    prototypes: int = Field(1024, ge=1)
    """Prototypes, which are moving averages of the teacher's features."""
    prototype_momentum: float = Field(0.99, ge=0, lt=1)
    """Share of a prototype that a step keeps."""


class SemanticNegatives(Objective):
    """Features of a region survive a change of look, and change once its class is swapped (CLINE, arXiv 2107.00440)."""

    weight: float = Field(0.05, ge=0)
    """Factor of the term in the total loss."""
    temperature: float = Field(0.5, ge=0.02)
    """Divisor of the cosine similarity of regions."""
    regions: int = Field(3, ge=1)
    """Regions of an image that are swapped, at most."""
    max_share: float = Field(0.1, gt=0, le=1)
    """Largest share of the crop that a region covers."""
    seam: float = Field(1.0, gt=0)
    """Standard deviation of the blur of a region's outline, pixels."""
    jitter_strength: float = Field(0.2, ge=0, le=0.5)
    """Strength of the jitter of restyled images, as `mixing.jitter_strength`."""
    learned_weights: bool = False
    """Weigh the contrast of regions and the change head by learned log-variances; false adds them."""


class JitteredContrast(Objective):
    """What contrasts of two jittered views of target images have in common."""

    temperature: float = Field(0.1, ge=0.02)
    """Divisor of the cosine similarity."""
    projection_channels: int = Field(128, ge=1)
    """Channels of the vectors that are compared."""
    brightness: float = Field(0.3, ge=0, le=1)
    """Range of what is added to RGB in 0..1, in either direction."""
    contrast: float = Field(0.3, ge=0, lt=1)
    """Range around 1 of the factor of the distance of RGB to its mean over the image."""


class GlobalContrast(JitteredContrast):
    """Contrast of bands of rows in two jittered views, without labels (Chaitanya et al., arXiv 2006.10511)."""

    parts: int = Field(4, ge=2)
    """Bands of an image; a band and those at its place in other images are no negatives of each other."""


class LocalContrast(JitteredContrast):
    """Contrast of small regions in two jittered views, without labels (Chaitanya et al., arXiv 2006.10511)."""

    region: int = Field(3, ge=1)
    """Side of a region, cells of the fused feature, whose longer side needs at least three times as many."""
    regions: int = Field(64, ge=4, le=1024)
    """Regions of an image, on a square grid: as many as the largest square number up to this, fewer in small maps."""
    negatives: int = Field(10, ge=2, multiple_of=2)
    """Negatives of a region, half of them in each view."""


class Clustering(Objective):
    """Adversarial clustering of regions of the target, and agreement of strong views (CDAC, arXiv 2104.09415)."""

    weight: float = Field(0.1, ge=0)
    """Factor of the three losses in the total loss."""
    top: int = Field(5, ge=1)
    """A region is described by this many of its channels, those with the largest values."""
    overlap: float = Field(0.6, gt=0, le=1)
    """Two regions are alike if their sets of channels have this share in common (intersection over union); 1, as in
    the paper: the sets are equal."""
    threshold: float = Field(0.95, ge=0, le=1)
    """The student's label of an image as it is counts in the second strong view if its probability is at least this."""
    consistency: float = Field(3.0, ge=0)
    """Factor of the disagreement of the strong views, after the ramp; 30 in the paper."""
    ramp_steps: int = Field(20_000, ge=0)
    """Steps over which this factor rises, from 0.7 % of it."""
    cosine_classifier: bool = False
    """Cluster by the cosine with the weights of the classifier, divided by 0.05, as the paper's network classifies."""


class PrototypeContrast(Objective):
    """Contrast of pixels with statistics of every class (SePiCo, arXiv 2204.08808; SPCL, arXiv 2111.12358)."""

    start: int = Field(3000, ge=0)
    """First step at which the term is active; source features are collected from this step on."""
    statistics: Literal["distribution", "mean", "bank"] = "distribution"
    """What a pixel is compared with: mean and variance of each class, the mean alone, or a bank of the means that the
    latest batches had."""
    statistics_from: Literal["teacher", "student"] = "teacher"
    """Whose features of source images are collected; the teacher's cost a forward pass more."""
    running: Literal["count", "average"] = "count"
    """Mean and variance of all pixels since `start`, or moving averages over batches; a bank needs neither."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """Share that a moving average keeps in each batch with the class; the first such batch is taken whole."""
    features: Literal["projection", "fused"] = "projection"
    """The feature of a pixel: that of a head on all maps of the encoder, or the one that the classifier reads."""
    projection_channels: int = Field(512, ge=1)
    """Channels of the head."""
    temperature: float = Field(100.0, ge=0.02)
    """Divisor of the similarity of a pixel and a class."""
    bank_length: int = Field(200, ge=1)
    """Batch means of a class that a bank holds."""
    label_share: float = Field(0.75, gt=0, le=1)
    """A feature cell has a label if one class covers at least this share of its pixels."""
    target_view: Literal["mixed", "strong target"] = "mixed"
    """Where target pixels come from: class-mixed images, or strongly augmented target images, which are a view more."""
    only_correct_source: bool = False
    """Source pixels count, and are collected, only where the network predicts their label."""
    uniformity_weight: float = 0.0
    """Factor of a penalty on mean predictions that are far from uniform; -1 is what SePiCo's released code does."""


class NodeContrast(Objective):
    """Contrast of the same pixels in two masked views (GCA, arXiv 2010.14945), classes apart."""

    weight: float = Field(0.1, ge=0)
    """Factor of the term in the total loss."""
    temperature: float = Field(0.4, ge=0.02)
    """Divisor of the cosine similarity."""
    nodes: int = Field(1024, ge=2)
    """Pixels of a micro-batch that are compared, at most; all classes of all images lose alike."""
    projection_channels: int = Field(128, ge=1)
    """Channels of the projection head, hidden and final."""


class LocallyAdaptive(CrossEntropy):
    """Cross-entropy of scores that are merged with those of neighbours of the same label (LAL)."""

    views: tuple[str, ...] = ("source", "mixed")
    """Views on which it takes the place of cross-entropy; switch that off there."""
    window: int = Field(3, ge=1)
    """Side of the window whose pixels are merged with its centre; an odd number of pixels."""
    stride: int = Field(1, ge=1)
    """Pixels from one centre to the next."""
    spread: float = Field(1.0, gt=0)
    """Standard deviation of a pixel's weight by its distance from the centre, pixels."""
    order: float = Field(5.0, ge=1)
    """Order of the power mean over windows, where labels are ground truth; large ones learn from large losses."""
    pseudo_label_order: float = Field(1.0, ge=1)
    """The same on views with pseudo-labels, of which wrong ones have the largest losses."""


class AdaptiveBalance(CrossEntropy):
    """Pixels and draws by how confident the student is of each class (AEL, arXiv 2110.05474).

    It takes the place of the image-level weight of pseudo-labels. Unlike `data.class_balance`, whose weights follow
    from the frequencies of classes, it acts on pseudo-labels, and changes as the student learns.
    """

    weight: float = Field(1.0, gt=0)
    """Factor of the term of `cutmix` in the total loss."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """Share of its earlier value that the confidence of a class keeps in a step."""
    confidence_from: Unset[Literal["labelled", "mixed", "source"]] = None
    """View in which confidence is measured: the probability of ground truth, or in mixed images of pseudo-labels;
    unset: labelled if there is any, else mixed if it is learned from, else source."""
    keep_exponent: float = Field(1.0, ge=0)
    """Of the pixels of a class, (1 - confidence) / (largest such) to the power of this count; 0 counts all."""
    confidence_exponent: float = Field(2.0, ge=0)
    """A pseudo-label weighs the teacher's probability to the power of this; the mean weight is 1."""
    law_temperature: Unset[Annotated[float, Field(gt=0)]] = 1.0
    """Softmax temperature over (1 - confidence), by which classes are drawn for source and labelled target images, if
    `data.rare_class` is on; false leaves these draws as they are."""
    cutmix: bool = False
    """Learn also from target images with a rectangle of an earlier one that shows a class drawn by the same law."""
    slots: int = Field(32, ge=1)
    """Earlier target crops that are remembered for `cutmix`."""
    image_area: float = Field(0.01, gt=0, lt=1)
    """A remembered crop shows a class if at least this share of its pixels is predicted as it."""
    box_area: float = Field(0.005, ge=0, lt=1)
    """The rectangle bounds a connected part of the class that is larger than this share of the crop."""
    copy_paste: bool = False
    """Paste classes of other labelled target images into those that the objective `labelled` learns from."""
    paste_classes: int = Field(3, ge=1)
    """Classes that are drawn for an image, some perhaps twice."""
    paste_probability: float = Field(0.5, ge=0, le=1)
    """Chance that classes are pasted into an image."""
    paste_scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Range of the factor by which what is pasted is enlarged."""
    exclude_classes: tuple[str, ...] = ()
    """Names of classes that are never pasted."""

    @property
    def has_term(self) -> bool:
        return self.cutmix


class Objectives(Section):
    """The terms of the loss."""

    source: Optional[SupervisedCrossEntropy] = SupervisedCrossEntropy()
    """Cross-entropy on labelled source images; false switches it off."""
    labelled: Optional[SupervisedCrossEntropy] = SupervisedCrossEntropy()
    """Cross-entropy on labelled target images, where `data.labelled` gives some; false switches it off."""
    mixed: Optional[CrossEntropy] = CrossEntropy()
    """Cross-entropy on class-mixed images with pseudo-labels; false switches it off."""
    masked: Optional[CrossEntropy] = None
    """Cross-entropy on masked images with pseudo-labels: masked consistency; false switches it off."""
    feature_distance: Optional[FeatureDistance] = FeatureDistance()
    """Distance to a frozen network, by default to the pretrained encoder on source images, without a source on labelled
    target images; false switches it off."""
    pixel_contrast: Optional[PixelContrast] = PixelContrast()
    """Contrast on source images (without a source on labelled target images) and, if `mixed` is on, on mixed images;
    false switches it off."""
    anchor_contrast: Optional[AnchorContrast] = None
    """Contrast of anchors in the images that `pixel_contrast` reads; false switches it off."""
    zero_style: Optional[ZeroStyle] = None
    """Both domains without the moments of their channels; false switches it off."""
    memory_contrast: Optional[MemoryContrast] = None
    """Contrast of mixed images with a memory of every class (MoCHi); false switches it off."""
    distilled: Optional[CrossEntropy] = None
    """Cross-entropy on target images with the labels of `model.teacher`; false switches it off."""
    relation_distillation: Optional[RelationDistillation] = None
    """Relations between pixels of target images as `model.teacher` sees them; false switches it off."""
    global_contrast: Optional[GlobalContrast] = None
    """Pre-training of the encoder on target images without labels; false switches it off."""
    local_contrast: Optional[LocalContrast] = None
    """Pre-training of the decoder on target images without labels; false switches it off."""
    clustering: Optional[Clustering] = None
    """Adversarial clustering of target regions and agreement of strong views (CDAC); false switches it off."""
    prototype_contrast: Optional[PrototypeContrast] = None
    """Contrast of pixels in source and target images with statistics of the classes; false switches it off."""
    semantic_negatives: Optional[SemanticNegatives] = None
    """Contrast of restyled and swapped regions of source images, and a change head; false switches it off."""
    node_contrast: Optional[NodeContrast] = None
    """Contrast of two masked views of the target, pixel by pixel (GCA); false switches it off."""
    locally_adaptive: Optional[LocallyAdaptive] = None
    """Cross-entropy of scores merged with those of neighbours of the same label; false switches it off."""
    adaptive_balance: Optional[AdaptiveBalance] = None
    """Weights of pseudo-labels, draws and pastes by the student's confidence of each class; false switches it off."""
