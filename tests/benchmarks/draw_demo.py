"""Draw the README's picture: images of the demo's camera domain, their labels, and what two networks predict.

    python tests/benchmarks/draw_demo.py runs/source-only-demo/last.safetensors runs/demo/last.safetensors \
        --data-root data --out docs/pictures/demo.png

Each column has its title in the picture. The networks run on the CPU.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from cluda_cli.data.index import find
from cluda_cli.data.transforms import read_image, read_label
from cluda_cli.files import atomic
from cluda_cli.inference.sliding import eval_mode, fit_image, segment
from cluda_cli.inference.weights_file import TrainedNetwork, load_weights

WIDTH, GAP, TITLE = 288, 4, 24  # pixels: of a column, between tiles, of the line of titles
IMAGES = (3, 21, 40)  # positions in the val split
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source_only", type=Path)
    parser.add_argument("adapted", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    index = find("demo-camera", arguments.data_root)
    items = [index.labelled("val")[i] for i in IMAGES]
    palette = torch.tensor(index.classes.palette(), dtype=torch.uint8).view(256, 3)
    images = [read_image(index.image_path(item)) for item in items]  # 3 H W each
    columns = {
        "camera picture": [image.permute(1, 2, 0) for image in images],
        "true labels": [palette[read_label(index.label_path(item)).long()] for item in items],
    }
    for title, path in (("source only", arguments.source_only), ("adapted", arguments.adapted)):
        columns[title] = [palette[found.long()] for found in predict_all(load_weights(path, CPU), images)]
    with atomic(arguments.out) as temporary:
        draw_sheet(columns).save(temporary, optimize=True)


def predict_all(trained: TrainedNetwork, images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Train ids of each image.  # H W each"""
    fitted = ((fit_image(image, trained.settings.data.target_box, CPU), None) for image in images)
    with eval_mode(trained.network):
        return [found for _, found, _ in segment(trained.network, fitted, trained.settings.inference)]


def draw_sheet(columns: dict[str, list[torch.Tensor]]) -> Image.Image:
    """A column of tiles (RGB, H W 3) under each title."""
    height, width = next(iter(columns.values()))[0].shape[:2]
    tile = (WIDTH, round(WIDTH * height / width))
    rows = max(map(len, columns.values()))
    sheet = Image.new("RGB", (len(columns) * (tile[0] + GAP) - GAP, TITLE + rows * (tile[1] + GAP) - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, (title, tiles) in enumerate(columns.items()):
        left = i * (tile[0] + GAP)
        pen.text((left + tile[0] / 2, TITLE / 2), title, fill="black", font=font, anchor="mm")
        for j, pixels in enumerate(tiles):
            picture = Image.fromarray(pixels.contiguous().numpy()).resize(tile, Image.Resampling.BOX)
            sheet.paste(picture, (left, TITLE + j * (tile[1] + GAP)))
    return sheet


if __name__ == "__main__":
    main()
