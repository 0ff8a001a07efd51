"""Pictures of what a step saw: a row for each image, a column for each thing that it saw. H W pixels of the crop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cluda_cli.data.labels import IGNORE
from cluda_cli.data.streams import batches
from cluda_cli.distributed import collectives
from cluda_cli.engine.pictures import FRAME, GAP, write_pictures
from cluda_cli.engine.step import training_step
from cluda_cli.models.boxes import Boxes

H, W = 32, 48


@pytest.fixture
def batch(tiny_settings, domains):
    return next(batches([domains[0]], domains[1], tiny_settings.data, 0, 0, 1))


@pytest.fixture
def draw(run, batch, tmp_path):
    """Write the pictures of some views and give their tiles: row, column -> RGB H W 3."""

    def draw(views):
        write_pictures(tmp_path / "views.png", run, batch, views)
        with Image.open(tmp_path / "views.png") as image:
            sheet = np.asarray(image).astype(int)
        rows, columns = sheet.shape[0] // (H + GAP), sheet.shape[1] // (W + GAP)
        assert sheet.shape == (rows * (H + GAP), columns * (W + GAP), 3)
        cut = [np.split(row, columns, axis=1) for row in np.split(sheet, rows)]
        return [[tile[:H, :W] for tile in row] for row in cut]

    return draw


def test_a_row_shows_source_and_mixed_images_with_their_labels(run, batch, draw):
    views = training_step(run, batch).views
    palette = np.array(run.classes.palette()).reshape(256, 3)
    palette[IGNORE] = 0
    mixed = views[1]
    rows = draw(views)
    assert [len(row) for row in rows] == [7, 7]
    for i, (image, label, target, pseudo_label, _, mixed_label, prediction) in enumerate(rows):
        assert abs(image - batch["source"].image[i].permute(1, 2, 0).numpy()).max() <= 1  # normalised and back
        assert np.array_equal(label, palette[batch["source"].label[i].numpy()])
        assert np.array_equal(target, batch["target"].image[i].permute(1, 2, 0).numpy())
        assert np.array_equal(pseudo_label, palette[mixed.pseudo_label[i].numpy()])
        assert np.array_equal(mixed_label, palette[mixed.label[i].numpy()])
        assert {tuple(color) for color in prediction.reshape(-1, 3)} <= {tuple(c) for c in palette[: len(run.classes)]}


def test_views_that_were_not_made_have_no_columns_and_a_masked_one_has_one(run, batch, draw):
    source, mixed = training_step(run, batch).views
    assert len(draw([])[0]) == 4  # source, label, target, prediction
    rows = draw([source, replace(mixed, name="masked")])
    assert len(rows[0]) == 5
    assert np.array_equal(rows[0][3], draw([source, mixed])[0][4])


def test_a_frame_marks_the_detail_crop(run, batch, draw):
    source = training_step(run, batch).views[0]
    plain = draw([source])
    boxes = Boxes(torch.tensor([[4, 8], [12, 0]]), (16, 24))
    framed = draw([replace(source, boxes=boxes)])
    for i, (top, left) in enumerate(boxes.corner.tolist()):
        frame = np.zeros((H, W), dtype=bool)
        frame[top : top + 16, left : left + 24] = True
        frame[top + FRAME : top + 16 - FRAME, left + FRAME : left + 24 - FRAME] = False
        assert (framed[i][0][frame] == 255).all()
        assert np.array_equal(framed[i][0][~frame], plain[i][0][~frame])


def test_nothing_of_the_run_changes(run, draw):
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    run.student.train()
    draw([])
    assert run.student.training
    assert all(torch.equal(value, before[name]) for name, value in run.student.state_dict().items())


def test_only_the_first_rank_writes(run, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    write_pictures(tmp_path / "views.png", run, batch, [])
    assert not (tmp_path / "views.png").exists()
