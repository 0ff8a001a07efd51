"""A memory of target crops, and of the classes that each of them shows. N slots, K classes, B batch, H W pixels."""

import torch
from torch import Tensor, nn

from cluda_cli.data.batch import Crops


class CropMemory(nn.Module):
    """Target crops of earlier steps, as they came from the loader. All of its state is buffers, alike on all ranks."""

    image: Tensor
    inside: Tensor
    valid: Tensor
    contains: Tensor
    age: Tensor

    def __init__(self, slots: int, size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(slots, 3, *size, dtype=torch.uint8))  # N 3 H W
        self.register_buffer("inside", torch.zeros(slots, *size, dtype=torch.bool))  # N H W
        self.register_buffer("valid", torch.zeros(slots, *size, dtype=torch.bool))  # N H W
        self.register_buffer("contains", torch.zeros(num_classes, slots, dtype=torch.bool))  # K N
        self.register_buffer("age", torch.full((slots,), -1))  # N, how many crops came before; -1: empty

    def recall(self, slots: Tensor) -> Crops:
        """The crops of some slots, int64 B."""
        return Crops(self.image[slots], self.inside[slots], valid=self.valid[slots])

    def correct(self, slots: Tensor, contains: Tensor) -> None:
        """Say anew which classes remembered crops show: slots int64 B, contains B K, bool. The last one counts."""
        for slot, shown in zip(slots, contains, strict=True):
            self.contains.index_copy_(1, slot[None], shown[:, None])

    def remember(self, image: Tensor, inside: Tensor, valid: Tensor, contains: Tensor) -> None:
        """Put crops into the memory, as `Crops` has them, with the classes that each shows: B K, bool.

        An empty slot is taken first, then the oldest crop that is not the only one with some class, then the oldest.
        """
        for *one, shown in zip(image, inside, valid, contains, strict=True):
            only = (self.contains & (self.contains.sum(1, keepdim=True) == 1)).any(0)  # N
            slot = (self.age + only * 2**62).argmin()[None]
            for buffer, value in zip((self.image, self.inside, self.valid), one, strict=True):
                buffer.index_copy_(0, slot, value[None])
            self.contains.index_copy_(1, slot, shown[:, None])
            self.age.index_copy_(0, slot, self.age.max()[None] + 1)


def shown_classes(label: Tensor, num_classes: int, min_share: float) -> Tensor:
    """Which classes cover at least `min_share` of each label map B H W (train ids, 255 = ignored).  # B K, bool"""
    ids = torch.arange(num_classes, device=label.device)
    counts = torch.stack([(label == i).flatten(1).sum(1) for i in ids], dim=1)  # B K
    return counts >= min_share * label[0].numel()
