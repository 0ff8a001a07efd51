"""CamVid's colours, SegNet's ids and the usual split."""

from pathlib import Path

import numpy as np
from PIL import Image

from cluda_cli.data.labels import CAMVID, IGNORE
from cluda_cli.preparation.camvid import CAMVID_COLORS, CAMVID_GROUPS, SEGNET_LABELS, find_camvid_split


def test_all_32_colors_belong_to_one_class_each() -> None:
    colors = [color for color, _ in CAMVID_COLORS.colors]
    assert len(colors) == len(set(colors)) == 32
    assert CAMVID_GROUPS.keys() == {row.name for row in CAMVID}
    assert all(row.color in CAMVID_GROUPS[row.name] for row in CAMVID)


def test_segnet_stores_11_for_void() -> None:
    assert SEGNET_LABELS.table[:12] == (*range(11), IGNORE)
    assert SEGNET_LABELS.known == (*range(12), IGNORE)


def test_camvid_colors_are_grouped(tmp_path: Path) -> None:
    # sky, wall, cone, lane marking, pram, void
    colors = [(128, 128, 128), (64, 192, 0), (0, 0, 64), (128, 0, 192), (64, 0, 192), (0, 0, 0)]
    Image.fromarray(np.array([colors], dtype=np.uint8)).save(tmp_path / "a.png")
    assert CAMVID_COLORS.read(tmp_path / "a.png").train_ids.tolist() == [[0, 1, 2, 3, 9, IGNORE]]


def test_camvid_split_has_the_customary_sizes() -> None:
    """The 701 frames: 0001TP has 124, 0006R0 101, 0016E5 305 of which 101 follow each other closely, Seq05VD 171."""
    frames = [f"0001TP_{6690 + 30 * i:06d}" for i in range(124)]
    frames += [f"0006R0_f{930 + 30 * i:05d}" for i in range(101)]
    frames += [f"0016E5_{390 + 30 * i:05d}" for i in range(204)] + [f"0016E5_{7959 + 2 * i:05d}" for i in range(101)]
    frames += [f"Seq05VD_f{30 * i:05d}" for i in range(171)]
    sizes = {name: sum(find_camvid_split(frame) == name for frame in frames) for name in ("train", "val", "test", "")}
    assert sizes == {"train": 367, "val": 101, "test": 233, "": 0}
    assert find_camvid_split("0016E5_07961_L") == "val"
    assert find_camvid_split("holiday") == ""
