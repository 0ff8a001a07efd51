"""The network: encoder, decoder and resolutions."""

from typing import Annotated, Literal

from pydantic import Field

from cluda_cli.settings.section import Optional, Section, Size, Unset


class Decoder(Section):
    """The DAFormer decoder (DAFormer, section 3.2)."""

    embed_dim: int = Field(256, ge=1)
    """Channels to which every encoder map is brought before fusion."""
    embed_norm: bool = False
    """Batch norm and ReLU after each embedding, as mmsegmentation's SegFormer head has them."""
    channels: int = Field(256, ge=1)
    """Channels of the fused feature, which the classifier and the contrast read."""
    dilations: tuple[Annotated[int, Field(ge=1)], ...] = (1, 6, 12, 18)
    """Dilation of each branch of the fusion layer; none: a single 1x1 convolution fuses."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of fused channels dropped before the classifier while training."""


class DeepLabV2(Section):
    """The DeepLabV2 head: dilated convolutions of the last encoder map, summed (DeepLab, arXiv 1606.00915)."""

    dilations: tuple[Annotated[int, Field(ge=1)], ...] = Field((6, 12), min_length=1)
    """Dilation of each branch; the paper has 6, 12, 18 and 24, published adaptation results use the first two."""


class Pyramid(Section):
    """A light top-down decoder for small networks and short runs (feature pyramid, arXiv 1612.03144)."""

    channels: int = Field(64, ge=1)
    """Channels of every level and of the fused feature, which the classifier and the contrast read."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of fused channels dropped before the classifier while training."""


class MultiResolution(Section):
    """Context and detail: the whole crop at low and a part of it at full resolution (HRDA, arXiv 2204.13132)."""

    context_downscale: int = Field(2, ge=2)
    """The context is the whole image, this many times smaller."""
    detail_crop: Unset[Size] = None
    """Crop seen at full resolution, height x width; unset: half the training crop, in whole cells of the context."""
    attention_dim: int = Field(256, ge=1)
    """Channels of the head that predicts, for each class, where detail is to be trusted."""
    blend_late: bool = False
    """Upsample context logits and attention first and blend then, as the released CLUDA code; HRDA blends first."""


class Model(Section):
    """The network."""

    encoder: str = "mit_b5"
    """mit_b0 ... mit_b5, or a timm model: with feature maps at strides 4, 8, 16 and 32, or a plain ViT."""
    weights: str | Literal[False] = "imagenet"
    """Encoder weights: "imagenet" (published ones, fetched once; those of tf_efficientnet_lite0 are installed), a file,
    "hf-hub:owner/name@revision", or false."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Largest stochastic-depth rate of the encoder, where it has any."""
    freeze_batch_norm: bool = False
    """Keep the statistics and the affine parameters of the encoder's batch norms as loaded."""
    output_stride: Literal[8, 16, 32] = 32
    """Stride of the last map; below 32, dilation takes the place of stride, in encoders that can do so (ResNets)."""
    checkpoint_activations: bool = False
    """Compute the encoder's blocks again in the backward pass rather than store them: less memory, more time."""
    decoder: Decoder = Decoder()
    deeplab: Optional[DeepLabV2] = None
    """A DeepLabV2 head in place of the decoder; false keeps the decoder."""
    pyramid: Optional[Pyramid] = None
    """A light top-down decoder in place of the decoder, if there is no `deeplab`; false keeps the decoder."""
    multires: Optional[MultiResolution] = None
    """Context and detail resolution; false sees the crop at one resolution."""
    start: Unset[str] = None
    """Weights of a run from which student and teacher start, matched by class name; unset: the encoder's weights."""
    teacher: Unset[str] = None
    """Weights of a run whose network, frozen, labels the target images in place of the moving average: distillation.
    Classes are matched by name; unset: the moving average labels."""
    freeze: tuple[Literal["encoder", "decoder", "head"], ...] = ()
    """Parts that do not learn: the encoder, what the decoder fuses, the classifiers that read it."""
