"""Terms on images without style, what they show, and the mean amplitude that is kept."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli import settings
from cluda_cli.adaptation.style import low_amplitude, remove_style
from cluda_cli.adaptation.views import Scene, Seen, View
from cluda_cli.engine.step import training_step
from cluda_cli.models.boxes import Boxes
from cluda_cli.models.segmenter import Detail, Output
from cluda_cli.objectives.zero_style import SOURCE, TARGET, ZeroStyle, weighted_divergence


def see(tensors: dict[str, Tensor], name: str, agrees: bool) -> tuple[Seen, list[Tensor]]:
    """A student of two layers, per pixel, on the styleless images of a case; and its parameters.

    A teacher that `agrees` has the student's own logits, as the description of the case says; those in its file differ.
    """
    parameters = [tensors[f"param.{p}"].float().requires_grad_() for p in ("w1", "b1", "w2")]
    raw = tensors["in.source" if name == SOURCE else "in.target"].float()
    label = tensors["in.labels"].long()
    image = remove_style(raw, torch.ones_like(label, dtype=torch.bool), 1e-5)
    hidden = torch.tanh(torch.einsum("dc,bchw->bdhw", parameters[0], image) + parameters[1][:, None, None])
    logits = torch.einsum("kd,bdhw->bkhw", parameters[2], hidden)
    if name == SOURCE:
        view = View(name, image, label, torch.ones_like(raw[:, 0]), torch.ones_like(raw[:, 0]))
    else:
        teacher = logits.detach() if agrees else tensors["in.teacher_logits"].float()
        weight = tensors["in.target_weight"].float()
        view = View(name, image, teacher.argmax(dim=1), weight, weight, teacher_logits=teacher)
    return Seen(Output(logits, logits, (), image), view), parameters


@pytest.mark.reference
@pytest.mark.parametrize("name", [SOURCE, TARGET])
@pytest.mark.parametrize("case", ["z02_losses", "z03_losses_equal"])
def test_reference_vectors(case: str, name: str, golden: Any) -> None:
    tensors, description = golden(f"26_style_tail/{case}")
    key = f"{'source' if name == SOURCE else 'target'}.mean_over_all"
    seen, parameters = see(tensors, name, agrees=case == "z03_losses_equal")
    value = ZeroStyle(settings.ZeroStyle())(seen)
    found = dict(zip(("grad_w1", "grad_b1", "grad_w2"), torch.autograd.grad(value, parameters), strict=True))
    for suffix, actual in {"": value, **{f".{n}": g for n, g in found.items()}}.items():
        expected = tensors[f"out64.{key}{suffix}"]
        bound = description["tolerance_demanded"]["bounds"][f"{key}{suffix}"]["float32_max_abs"]
        assert (actual.detach().double() - expected.view(actual.shape)).abs().max() <= bound


def test_divergence_of_equal_logits_is_zero_and_weights_count_in_the_mean() -> None:
    student, teacher = torch.zeros(1, 2, 1, 2, requires_grad=True), torch.tensor([[[[0.0, 50.0]], [[0.0, 0.0]]]])
    assert weighted_divergence(teacher, teacher, torch.ones(1, 1, 2)) == 0
    # A certain teacher is ln 2 away from an undecided student; the other pixel agrees.
    value = weighted_divergence(student, teacher, torch.tensor([[[1.0, 0.5]]]))
    torch.testing.assert_close(value, torch.tensor(2.0).log() * 0.5 / 2)


def test_the_detail_has_its_share_of_the_target_term() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, part, teacher = (torch.randn(1, 3, s, s, generator=generator) for s in (8, 4, 8))
    image, label, boxes = torch.zeros(1, 3, 8, 8), teacher.argmax(dim=1), Boxes(torch.tensor([[2, 4]]), (4, 4))
    weight = torch.rand(1, 8, 8, generator=generator)
    view = View(TARGET, image, label, weight, weight, teacher_logits=teacher)
    output = Output(whole, whole, (), image, Detail(boxes, part, part))

    def mean(logits: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        p = teacher.softmax(dim=1)
        return ((p * (p.log() - F.log_softmax(logits, dim=1))).sum(dim=1) * weight).mean()

    expected = 0.7 * mean(whole, teacher, weight)
    expected += 0.3 * mean(part, teacher[:, :, 2:6, 4:8], weight[:, 2:6, 4:8])
    torch.testing.assert_close(ZeroStyle(settings.ZeroStyle(detail_weight=0.3))(Seen(output, view)), expected)


def test_views_have_no_style_and_the_teacher_is_asked_once(start: Any, monkeypatch: Any) -> None:
    run, stream = start({"objectives": {"zero_style": {}}})
    asked = []
    honest = run.teacher.pseudo_labels
    monkeypatch.setattr(run.teacher, "pseudo_labels", lambda *given: asked.append(given) or honest(*given))
    result = training_step(run, next(stream))
    assert list(result.terms) == ["source/source", f"{SOURCE}/zero_style", f"{TARGET}/zero_style"]
    assert len(asked) == 1
    for view in result.views[1:]:
        torch.testing.assert_close(view.image.mean(dim=(2, 3)), torch.zeros(2, 3), atol=1e-4, rtol=0)
        torch.testing.assert_close(view.image.std(dim=(2, 3), correction=0), torch.ones(2, 3), atol=1e-3, rtol=0)
    target = result.views[2]
    probability = F.interpolate(target.teacher_logits.float(), target.label.shape[1:], mode="bilinear").softmax(1)
    assert torch.equal(probability.argmax(dim=1), target.label)


def test_amplitudes_are_the_mean_of_all_images_and_act_from_the_second_step_on(start: Any) -> None:
    run, stream = start({"objectives": {"zero_style": {"band": 1}}})
    method, found = run.objectives["zero_style"], []
    for step in range(3):
        batch = next(stream)
        shown = {view.name: view.image for view in training_step(run, batch).views}
        scene = Scene(batch, run.teacher, 0, step)
        plain = {
            name: remove_style(domain.image, batch[key].inside, 1e-5)
            for name, key, domain in ((SOURCE, "source", scene.source), (TARGET, "target", scene.target))
        }
        for name, image in plain.items():
            if step == 0:
                assert torch.equal(shown[name], image)
            else:
                expected = torch.cat(found).mean(dim=0)
                torch.testing.assert_close(low_amplitude(shown[name], 1), expected.expand(2, -1, -1, -1))
        found += [low_amplitude(image, 1) for image in plain.values()]
        torch.testing.assert_close(method.amplitude, torch.cat(found).mean(dim=0))
    assert method.images == 12


@pytest.mark.parametrize("band", [0, 2])
def test_a_resumed_run_equals_one_that_never_stopped(start: Any, assert_resume_is_exact: Any, band: int) -> None:
    tree = {"objectives": {"zero_style": {"band": band}}}
    assert_resume_is_exact(tree)
    assert bool(start(tree)[0].objectives.state_dict()) == (band > 0)
