"""Parts of images against all parts that lie elsewhere."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.jittered import FIRST, SECOND
from cluda_cli.adaptation.views import Seen, View
from cluda_cli.engine.step import training_step
from cluda_cli.errors import SettingsError
from cluda_cli.models.segmenter import Output
from cluda_cli.objectives.global_contrast import GlobalContrast, mean_parts, part_contrast

ON = {
    "data": {"crop": [64, 48]},  # the last encoder map has two rows
    "objectives": {"source": False, "global_contrast": {"parts": 2, "projection_channels": 8}},
}


def pairs_of(case: str, count: int) -> tuple[Tensor, Tensor]:
    """Anchors and positives of a case, all pairs in both directions.

    G^D-: eight items in three views, every two views of an item. G^D: volumes of four parts, each followed by its
    second view; a part goes twice with its second view, and once with the same part of the next volume, in a ring.
    """
    if case == "g01_gd_minus":
        item = torch.arange(count).view(3, 8)
        pairs = [(item[i], item[j]) for i in range(3) for j in range(3) if i != j]
    else:
        item = torch.arange(count).view(-1, 2, 4)
        pairs = [(item, item.flip(1)), (item, item.flip(1)), (item, item.roll(1, 0)), (item, item.roll(-1, 0))]
    anchor, positive = (torch.cat([pair[i].flatten() for pair in pairs]) for i in range(2))
    return anchor, positive


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["g01_gd_minus", "g02_gd", "g03_gd_identical"])
def test_reference_vectors(case: str, dtype: torch.dtype, golden: Any) -> None:
    """The consistent form, the plain mean of the terms."""
    tensors, description = golden(f"27_local_global/{case}")
    vectors = tensors["in.z"].to(dtype).requires_grad_()
    anchor, positive = pairs_of(case, len(vectors))
    assert len(anchor) == description["properties"]["number_of_terms"]
    value = part_contrast(vectors, torch.arange(len(vectors)) % 4, anchor, positive, 0.1)
    value.backward()
    for key, actual in {"loss": value, "grad": vectors.grad}.items():
        name, bits = f"out64_consistent.{key}", "float64_max_abs" if dtype == torch.float64 else "float32_max_abs"
        if name in tensors and actual is not None:
            bound = description["tolerance_demanded"]["bounds"][f"consistent.{key}"][bits]
            assert (actual.detach() - tensors[name].view(actual.shape)).abs().max() <= bound
    if case == "g03_gd_identical":
        assert value.item() == pytest.approx(math.log(37), rel=1e-6)


def test_only_other_parts_are_negatives_and_what_does_not_count_is_left_out() -> None:
    """Two images of two parts in two views, all vectors alike but for that of one image, which changes nothing."""
    part = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    anchor = torch.arange(8)
    vectors = torch.ones(8, 3)
    assert part_contrast(vectors, part, anchor, anchor ^ 2, 1.0).item() == pytest.approx(math.log(1 + 4))
    part[5], part[7] = -1, -1  # one part of the second image
    vectors[5] = torch.tensor([5.0, -1, 0])
    expected = (4 * math.log(1 + 2) + 2 * math.log(1 + 4)) / 6
    assert part_contrast(vectors, part, anchor, anchor ^ 2, 1.0).item() == pytest.approx(expected)


def test_without_a_negative_it_is_exactly_zero_and_connected() -> None:
    vectors = torch.randn(4, 3, requires_grad=True)
    anchor = torch.arange(4)
    value = part_contrast(vectors, torch.zeros(4, dtype=torch.int64), anchor, anchor ^ 1, 0.1)
    assert value == 0
    (gradient,) = torch.autograd.grad(value, vectors)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_parts_are_bands_of_rows_in_which_cells_count_by_their_labelled_share() -> None:
    maps = torch.arange(1.0, 9).view(1, 1, 1, 4, 2)
    labelled = torch.ones(1, 8, 4, dtype=torch.bool)
    labelled[:, 0:2, 0:2] = False  # the first cell
    labelled[:, 6:8, 2:3] = False  # half of the last one
    means, counted = mean_parts(maps, labelled, 2)
    assert means.flatten().tolist() == pytest.approx([(2 + 3 + 4) / 3, (5 + 6 + 7 + 4) / 3.5])
    assert counted.all()
    labelled[:, :4] = False
    means, counted = mean_parts(maps, labelled, 9)  # four rows are four parts
    assert counted.tolist() == [[False, False, True, True]]
    assert means.flatten().tolist() == pytest.approx([0, 0, 5.5, (7 + 4) / 1.5])


def see(name: str, maps: Tensor) -> Seen:
    label = torch.zeros(len(maps), 32, 32, dtype=torch.int64)
    view = View(name, torch.zeros(len(maps), 3, 32, 32), label, *torch.ones(2, len(maps), 32, 32))
    return Seen(Output(maps, maps, (maps,), view.image), view)


def test_the_term_is_that_of_plain_loops() -> None:
    torch.manual_seed(0)
    method = GlobalContrast(settings.GlobalContrast(parts=2, projection_channels=4, temperature=0.5), 5)
    maps = torch.randn(2, 3, 5, 2, 4)  # views, images, channels, rows, columns
    value = method(see(FIRST, maps[0]), see(SECOND, maps[1]))
    unit = torch.nn.functional.normalize(method.head(maps.mean(dim=4).transpose(2, 3)), dim=3)  # views images parts E
    costs = []
    for view in range(2):
        for image in range(3):
            for part in range(2):
                anchor = unit[view, image, part]
                good = (anchor @ unit[1 - view, image, part] / 0.5).exp()
                bad = sum((anchor @ unit[v, i, 1 - part] / 0.5).exp() for v in range(2) for i in range(3))
                costs.append(-(good / (good + bad)).log())
    torch.testing.assert_close(value, torch.stack(costs).mean())


def test_a_run_learns_the_encoder_without_labels_and_without_a_teacher(start: Any, monkeypatch: Any) -> None:
    run, stream = start(ON)
    monkeypatch.setattr(type(run.teacher), "pseudo_labels", lambda *_: pytest.fail("the teacher was asked"))
    before = {name: parameter.clone() for name, parameter in run.student.named_parameters()}
    result = training_step(run, next(stream))
    assert list(result.terms) == [f"{FIRST}+{SECOND}/global_contrast"] and result.loss > 0
    moved = {name.split(".")[0] for name, p in run.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"encoder"}
    assert list(run.networks) == ["student"]


def test_a_resumed_run_equals_one_that_never_stopped(assert_resume_is_exact: Any) -> None:
    assert_resume_is_exact(ON)


def test_both_contrasts_share_their_views_unless_their_settings_differ(start: Any) -> None:
    local = {"objectives": {"local_contrast": {"region": 1}}}
    run, stream = start({"objectives": ON["objectives"] | local["objectives"]})
    result = training_step(run, next(stream))
    assert [view.name for view in result.views] == [FIRST, SECOND] and len(result.terms) == 2
    with pytest.raises(SettingsError, match=f"local_contrast: makes the view {FIRST}, {SECOND}, which exists"):
        start({"objectives": ON["objectives"] | {"local_contrast": {"region": 1, "contrast": 0.1}}})
