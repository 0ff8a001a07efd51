"""The training step: what it computes, what it leaves alone, what it does when a loss breaks."""

import pytest
import torch
from safetensors.torch import save_file

from cluda_cli import presets
from cluda_cli.adaptation.views import make_views
from cluda_cli.data.index import find
from cluda_cli.data.streams import batches
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.errors import RunError
from cluda_cli.models.segmenter import Segmenter

CPU = torch.device("cpu")
# source, feature distance, contrast on source, mixed, contrast on mixed; in steps 0, 1, 2 of `tiny_settings`
KNOWN_LOSSES = [
    [1.5103, 35.4904, 4.9061, 0.7419, 1.4976],
    [1.6075, 38.7971, 5.0505, 0.8206, 1.6390],
    [1.6104, 0.0, 5.0561, 0.9369, 1.8577],
]


def changed(settings, tree):
    return presets.validate(presets.merge(settings.model_dump(mode="json"), tree))


def start(settings):
    source, target = find("clean", settings.data.root), find("noisy", settings.data.root)
    run = Run(settings, source, CPU)
    return run, batches(source, target, settings.data, settings.training.seed, 0, settings.training.steps)


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_every_term_is_reported(tiny_settings):
    run, stream = start(tiny_settings)
    result = training_step(run, next(iter(stream)))
    assert list(result.terms) == [
        "source/source", "source/feature_distance", "source/pixel_contrast", "mixed/mixed", "mixed/pixel_contrast",
    ]  # fmt: skip
    assert [view.name for view in result.views] == ["source", "mixed"]
    assert run.step == 1


def test_one_backward_per_view_is_the_gradient_of_the_sum(tiny_settings):
    model = {"model": {"drop_path": 0.0, "decoder": {"dropout": 0.0}}, "teacher": {"confidence": 0.0}}
    run, stream = start(changed(tiny_settings, model))
    batch = next(iter(stream))
    state = {n: b.clone() for n, b in run.student.named_buffers()}
    training_step(run, batch)
    ours = {n: p.grad.clone() for n, p in run.student.named_parameters() if p.grad is not None}

    run, _ = start(changed(tiny_settings, model))
    run.student.train()
    run.student.load_state_dict(state, strict=False)
    total = 0
    wanted = frozenset({"source", "mixed"})
    for view in make_views(batch, run.teacher, wanted, run.settings.mixing, run.settings.training.seed, 0):
        output = run.student(view.image)
        for objective in run.objectives.values():
            if view.name in objective.views:
                total = total + objective.settings.weight * objective(output, view)
    total.backward()
    for name, parameter in run.student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_teacher_is_the_moving_average(tiny_settings):
    run, stream = start(changed(tiny_settings, {"teacher": {"decay": 0.6}, "optimizer": {"warmup": 0}}))
    expected = flat(run.student)
    for step, batch in enumerate(stream, start=1):
        training_step(run, batch)
        decay = min(1 - 1 / (step + 1), 0.6)
        expected = decay * expected + (1 - decay) * flat(run.student)
        torch.testing.assert_close(flat(run.teacher.network), expected)


@pytest.mark.parametrize("name", ["mixed", "feature_distance", "pixel_contrast"])
def test_each_objective_moves_the_student_and_starts_when_told(tiny_settings, name):
    off = {"mixed": False, "feature_distance": False, "pixel_contrast": False}
    on = off | {name: {}}

    def student_after_two_steps(objectives):
        run, stream = start(changed(tiny_settings, {"objectives": objectives}))
        for batch, _ in zip(stream, range(2), strict=False):
            training_step(run, batch)
        return flat(run.student)

    without = student_after_two_steps(off)
    assert not torch.equal(without, student_after_two_steps(on))
    assert torch.equal(without, student_after_two_steps(off | {name: {"start": 2}}))


def test_a_broken_loss_names_its_term_and_leaves_the_run_as_it_was(tiny_settings, monkeypatch):
    run, stream = start(tiny_settings)
    stream = iter(stream)
    training_step(run, next(stream))
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    teacher = {k: v.clone() for k, v in run.teacher.state_dict().items()}
    contrast = run.objectives["pixel_contrast"]
    honest = type(contrast).forward
    monkeypatch.setattr(type(contrast), "forward", lambda *args: honest(*args) * float("nan"))
    with pytest.raises(RunError, match="source/pixel_contrast, mixed/pixel_contrast is not finite in step 1"):
        training_step(run, next(stream))
    assert run.step == 1
    assert all(torch.equal(v, before[k]) for k, v in run.student.state_dict().items())
    assert all(torch.equal(v, teacher[k]) for k, v in run.teacher.state_dict().items())


def test_a_view_nobody_reads_is_not_made(tiny_settings, monkeypatch):
    off = {"mixed": False, "pixel_contrast": False, "feature_distance": False}
    run, stream = start(changed(tiny_settings, {"objectives": off}))
    monkeypatch.setattr(type(run.teacher), "pseudo_labels", lambda *_: pytest.fail("the teacher was asked"))
    assert [view.name for view in training_step(run, next(iter(stream))).views] == ["source"]


def test_the_global_generator_decides_nothing(tiny_settings):
    def after_two_steps(global_seed):
        torch.manual_seed(global_seed)
        run, stream = start(tiny_settings)
        for batch, _ in zip(stream, range(2), strict=False):
            torch.manual_seed(global_seed)
            training_step(run, batch)
        return flat(run.student)

    assert torch.equal(after_two_steps(1), after_two_steps(2))


def test_the_state_holds_no_frozen_network(tiny_settings):
    run, _ = start(tiny_settings)
    assert not run.state_dict()["objectives"]


@pytest.mark.parametrize("overlay", [[], ["small"], ["demo"]], ids=["alone", "small", "demo"])
@pytest.mark.parametrize("name", ["source-only", "dacs", "daformer", "daformer-cluda"])
def test_every_preset_takes_a_step(name, overlay, tiny_settings, tmp_path):
    """On tiny crops; MiT-B5 gives way to B0, and encoder weights come from a file of random ones."""
    preset = presets.load([name, *overlay])
    encoder = "mit_b0" if preset.model.encoder == "mit_b5" else preset.model.encoder
    tree = presets.merge(preset.model_dump(mode="json"), {
        "data": tiny_settings.model_dump(mode="json")["data"] | {"rare_class": preset.data.rare_class and {}},
        "model": {"encoder": encoder, "weights": preset.model.weights and str(tmp_path / "preset.safetensors")},
    })  # fmt: skip
    settings = presets.validate(tree)
    save_file(Segmenter(settings.model, 5).encoder.state_dict(), tmp_path / "preset.safetensors")
    run, stream = start(settings)
    before = flat(run.student)
    result = training_step(run, next(iter(stream)))
    assert set(run.objectives) == {n for n, o in preset.objectives if o is not None}
    assert all(torch.isfinite(value) for value in result.terms.values())
    assert not torch.equal(before, flat(run.student))


def test_a_smoke_run_gives_the_losses_it_always_gave(tiny_settings):
    """A change that shall not alter numerics passes this; one that shall writes the table anew and says why."""
    run, stream = start(tiny_settings)
    steps = [training_step(run, batch).terms for batch, _ in zip(stream, range(3), strict=False)]
    found = [[round(float(value), 4) for value in terms.values()] for terms in steps]
    assert found == [pytest.approx(row, rel=1e-2) for row in KNOWN_LOSSES], found
