"""Pictures of what a step saw. H W pixels of the crop."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cluda_cli.adaptation.views import View
from cluda_cli.data.batch import Batch
from cluda_cli.distributed import collectives
from cluda_cli.engine.run import Run
from cluda_cli.files import atomic

GAP = 4  # pixels between tiles
FRAME = 2  # pixels, width of the frame around a detail crop


def write_pictures(path: Path, run: Run, batch: Batch, views: Sequence[View]) -> None:
    """One PNG, a row per image: source, its label, labelled target, its label, target, pseudo-label, mixed, its label,
    masked, prediction.

    The prediction is the student's on the target. White frames show where a student of two resolutions looked closely,
    unless it chose the place itself. Columns of views that the step did not make are left out. The state of the run
    does not change. Rank 0 alone writes, and shows its own images.
    """
    colors = torch.tensor(run.classes.palette(), dtype=torch.uint8).view(256, 3)
    rows = []
    by_name = {view.name: view for view in views}
    mixed, masked = by_name.get("mixed"), by_name.get("masked")
    prediction = _predict(run, batch["target"].image)
    if collectives.rank():
        return
    for i in range(len(prediction)):
        tiles = []
        for name, crops in batch.items():
            if crops.label is not None:
                shown = _shown(by_name[name], i, run) if name in by_name else crops.image[i]
                tiles += [shown, _paint(crops.label[i], colors)]
        tiles.append(batch["target"].image[i])
        if mixed is not None:
            if mixed.pseudo_label is not None:
                tiles.append(_paint(mixed.pseudo_label[i], colors))
            tiles += [_shown(mixed, i, run), _paint(mixed.label[i], colors)]
        if masked is not None:
            tiles.append(_shown(masked, i, run))
        tiles.append(_paint(prediction[i], colors))
        rows.append(torch.cat([F.pad(tile.cpu(), (0, GAP), value=255) for tile in tiles], dim=2))  # 3 H (n W)
    sheet = torch.cat([F.pad(row, (0, 0, 0, GAP), value=255) for row in rows], dim=1)
    with atomic(path) as temporary:
        Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()).save(temporary)


@torch.no_grad()
def _predict(run: Run, image: Tensor) -> Tensor:
    """Student's train ids on target images B 3 H W.  # B H W"""
    training = run.student.training
    run.student.eval()
    logits = run.student(run.student.normalisation.apply(image)).logits
    run.student.train(training)
    return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False).argmax(1)


def _shown(view: View, i: int, run: Run) -> Tensor:
    """One image of a view in 0..255, its detail crop framed.  # uint8 3 H W"""
    image = (run.student.normalisation.invert(view.image[i]).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    if view.boxes is not None:
        (top, left), (high, wide) = view.boxes.corner[i].tolist(), view.boxes.size
        frame = torch.zeros(image.shape[1:], dtype=torch.bool)
        frame[top : top + high, left : left + wide] = True
        frame[top + FRAME : top + high - FRAME, left + FRAME : left + wide - FRAME] = False
        image[:, frame] = 255
    return image


def _paint(label: Tensor, colors: Tensor) -> Tensor:
    """Train ids H W -> RGB 3 H W; ignored pixels are black."""
    return colors[label.cpu().long()].permute(2, 0, 1)
