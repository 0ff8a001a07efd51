"""The class table against the tables of the published converters."""

from typing import Any

import pytest

from cluda_cli.data.labels import CAMVID, CITYSCAPES, IGNORE, PROTOCOLS, ClassTable, LabelClass, build_id_table
from cluda_cli.preparation.published import CITYSCAPES_LABELS, SYNTHIA_LABELS

MAPS = "12_label_maps/label_maps"


@pytest.mark.reference
def test_classes_match_the_published_converters(golden: Any) -> None:
    _, maps = golden(MAPS)
    table = ClassTable(CITYSCAPES)
    assert list(table.names) == maps["classes"]
    assert [list(c.color) for c in CITYSCAPES] == maps["palette"]
    assert list(table.things()) == maps["things_used_for_feature_distance"]


@pytest.mark.reference
def test_gta_and_cityscapes_ids_match_the_published_converters(golden: Any) -> None:
    _, maps = golden(MAPS)
    assert list(CITYSCAPES_LABELS.table) == maps["gta_lookup_256"]
    for label_id, train_id in maps["cityscapes_id_to_trainid"].items():
        assert CITYSCAPES_LABELS.table[int(label_id) % 256] == train_id
        assert int(label_id) % 256 in CITYSCAPES_LABELS.known


@pytest.mark.reference
def test_synthia_ids_match_the_published_converter(golden: Any) -> None:
    _, maps = golden(MAPS)
    assert list(SYNTHIA_LABELS.table) == maps["synthia_lookup_256"]
    assert SYNTHIA_LABELS.known == tuple(range(23))


@pytest.mark.reference
def test_protocols_leave_out_the_customary_classes(golden: Any) -> None:
    _, maps = golden(MAPS)
    names, left_out = ClassTable(CITYSCAPES).names, maps["synthia_evaluation"]
    hard = left_out["thirteen_class_mIoU_excludes_additionally"]
    sixteen = [names[i] for i in range(19) if i not in left_out["sixteen_class_mIoU_excludes"]]
    assert list(PROTOCOLS["16"]) == sixteen
    assert list(PROTOCOLS["13"]) == [name for name in sixteen if names.index(name) not in hard]


def test_id_table_ignores_what_it_is_not_reported() -> None:
    table = build_id_table([(7, 0), (-1, 5)])
    assert table[7] == 0
    assert [value for value in table if value != IGNORE] == [0]  # an id of -1 must not land in slot 255


def test_remap_matches_classes_by_name() -> None:
    table = ClassTable(CAMVID).remap_to(ClassTable(CITYSCAPES))
    assert table[3] == 0  # road
    assert table[10] == IGNORE  # a bicyclist is neither a rider nor a bicycle
    assert set(table[11:]) == {IGNORE}


def test_json_round_trip_keeps_the_table() -> None:
    table = ClassTable((LabelClass("tram", (1, 2, 3), 40, thing=True), *CITYSCAPES[:2]))
    assert ClassTable.from_json(table.to_json()) == table
    assert not table.is_cityscapes
    assert ClassTable(CITYSCAPES).is_cityscapes


def test_palette_has_a_color_for_every_byte() -> None:
    palette = ClassTable(CITYSCAPES).palette()
    assert len(palette) == 768
    assert palette[:3] == [128, 64, 128]
    assert palette[-3:] == [0, 0, 0]
