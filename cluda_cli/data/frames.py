"""Images and labels at the size of training, from a cache if there is one. H W original size, h w resized."""

from torch import Tensor

from cluda_cli.data.cache import Box, choose_cache
from cluda_cli.data.index import Index, Item
from cluda_cli.data.labels import IGNORE
from cluda_cli.data.sampling import Crop
from cluda_cli.data.transforms import fit_box, read_image, read_label, resize_label_region, resize_region
from cluda_cli.errors import DataError


class Frames:
    """The training images of a dataset, resized to fit a box. They are read and resized on demand."""

    def __init__(self, index: Index, box: Box) -> None:
        self.index, self.box, self.cache = index, box, choose_cache(index, box)

    def size(self, item: Item) -> tuple[int, int]:
        """Height and width after resizing."""
        return fit_box(item.size, self.box)

    def label(self, item: Item) -> Tensor:
        """uint8 h w train ids of the whole frame; the item must have a label.

        Raises DataError as `image`, and if the label holds an id that is no class of the dataset.
        """
        if self.cache and self.cache.serves(item, self.box):
            label = self.cache.label(item)
        else:
            label = read_label(self.index.label_path(item))
            self._check_size(item, label, "label")
        self._check_ids(item, label)
        size = self.size(item)
        return resize_label_region(label, size, 0, 0, *size)

    def image(self, item: Item, crop: Crop) -> Tensor:
        """uint8 3 h' w' of a crop. Raises DataError if the file cannot be read or has not the size in the index."""
        if self.cache and self.cache.serves(item, self.box):
            image = self.cache.image(item)
        else:
            image = read_image(self.index.image_path(item))
            self._check_size(item, image, "image")
        return resize_region(image, self.size(item), crop.top, crop.left, crop.height, crop.width)

    def reference(self, item: Item, crop: Crop) -> Tensor:
        """The same crop of the paired picture of an image, which must have one. Raises DataError as `image`."""
        path = self.index.root / self.index.references[item.image]
        pixels = read_image(path)
        if (pixels.shape[1], pixels.shape[2]) != item.size:
            what = f"the paired picture is {pixels.shape[1]} x {pixels.shape[2]}"
            raise DataError(f"{what}, the image {item.size[0]} x {item.size[1]}", path, "run `cluda prepare` again")
        return resize_region(pixels, self.size(item), crop.top, crop.left, crop.height, crop.width)

    def _check_ids(self, item: Item, label: Tensor) -> None:
        ids, num_classes = label.numpy(), len(self.index.classes)
        unknown = ids[(ids >= num_classes) & (ids != IGNORE)]
        if unknown.size:
            raise DataError(
                f"the label holds {unknown[0]}; train ids are 0..{num_classes - 1} and {IGNORE}",
                self.index.label_path(item),
                "run `cluda prepare` again",
            )

    def _check_size(self, item: Item, pixels: Tensor, what: str) -> None:
        height, width = pixels.shape[-2:]
        if (height, width) != item.size:
            path = self.index.image_path(item) if what == "image" else self.index.label_path(item)
            raise DataError(
                f"the {what} is {height} x {width}, the index says {item.size[0]} x {item.size[1]}",
                path,
                "run `cluda prepare` again",
            )
