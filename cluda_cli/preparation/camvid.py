"""CamVid: its 32 label colours in eleven classes, the labels of SegNet's copy, and the usual split."""

from cluda_cli.data.labels import CAMVID, IGNORE, Color, build_id_table
from cluda_cli.preparation.label_files import ColorLabels, IdLabels

# SegNet's copy of CamVid stores 11 for void.
SEGNET_LABELS = IdLabels(tuple(build_id_table((c.label_id, i) for i, c in enumerate(CAMVID))), (*range(12), IGNORE))

# CamVid's 32 colours in the eleven groups that are usually scored (Sturgess et al., "Combining appearance and structure
# from motion features for road scene understanding", 2009). Publications differ in the group of rare colours (cone,
# cart, animal, moving things); this is the most common choice.
CAMVID_GROUPS: dict[str, tuple[Color, ...]] = {
    "sky": ((128, 128, 128),),
    # building, archway, bridge, tunnel, wall
    "building": ((128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)),
    # column or pole, traffic cone
    "pole": ((192, 192, 128), (0, 0, 64)),
    # road, lane markings to drive on and not to drive on
    "road": ((128, 64, 128), (128, 0, 192), (192, 0, 64)),
    # sidewalk, parking block, road shoulder
    "sidewalk": ((0, 0, 192), (64, 192, 128), (128, 128, 192)),
    # tree, other vegetation
    "vegetation": ((128, 128, 0), (192, 192, 0)),
    # sign, text, traffic light
    "traffic sign": ((192, 128, 128), (128, 128, 64), (0, 64, 64)),
    "fence": ((64, 64, 128),),
    # car, pick-up, truck or bus, train, other moving
    "car": ((64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)),
    # pedestrian, child, cart or pram, animal
    "person": ((64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)),
    # bicyclist, motorcycle or scooter
    "bicyclist": ((0, 128, 192), (192, 0, 192)),
}
CAMVID_COLORS = ColorLabels((
    *((color, i) for i, c in enumerate(CAMVID) for color in CAMVID_GROUPS[c.name]),
    ((0, 0, 0), IGNORE),
))  # fmt: skip


def find_camvid_split(stem: str) -> str:
    """The split of a CamVid frame: train, val or test; "" if the name is not one of CamVid's.

    The usual split (367 train, 101 val, 233 test frames) is that of SegNet's lists. It follows from sequence and frame
    number: val is the densely labelled part of 0016E5, test is the second half of 0001TP and the dusk sequence
    Seq05VD, train is the rest.
    """
    sequence, _, frame = stem.removesuffix("_L").partition("_")
    number = int(frame.lstrip("f")) if frame.lstrip("f").isdecimal() else 0
    if sequence == "0016E5":
        return "val" if 7959 <= number <= 8159 and number % 2 else "train"
    if sequence == "0001TP":
        return "train" if number <= 8520 else "test"
    return {"0006R0": "train", "Seq05VD": "test"}.get(sequence, "")
