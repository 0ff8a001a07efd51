"""The training step: what it computes, what it leaves alone, what it does when a loss breaks."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cluda_cli import presets
from cluda_cli.adaptation.views import Scene, Seen
from cluda_cli.data.batch import to_device
from cluda_cli.data.datasets import open_datasets
from cluda_cli.data.index import find
from cluda_cli.data.streams import batches
from cluda_cli.engine.pictures import write_pictures
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step
from cluda_cli.errors import RunError
from cluda_cli.inference.weights_file import NetworkDescription, save_weights
from cluda_cli.models.encoders import build_encoder
from cluda_cli.models.multires import MultiResolution, build_segmenter

CPU = torch.device("cpu")


def changed(settings, tree):
    return presets.validate(presets.merge(settings.model_dump(mode="json"), tree))


def start(settings):
    """Every target image is its own paired picture, for methods that ask for one."""
    found, seed = open_datasets(settings.data, settings.training.seed), settings.training.seed
    run = Run(settings, found.sources, CPU, labelled=found.labelled)
    target = replace(found.unlabelled, references={item.image: item.image for item in found.unlabelled.splits["train"]})
    return run, batches(
        found.sources, target, settings.data, seed, 0, settings.training.steps, labelled=found.labelled,
        paired=run.paired,
    )  # fmt: skip


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
    scene = Scene(batch, run.teacher, run.settings.training.seed, 0)
    for name in ("source", "mixed"):
        view = run.makers[name](scene)
        output = run.student(view.image)
        for objective in run.objectives.values():
            if (name,) in objective.reads:
                total = total + objective.settings.weight * objective(Seen(output, view))
    total.backward()
    for name, parameter in run.student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-4)


# Cross-entropies of a network without batch norms and dropout: what is left is a mean over images.
MEANS = {
    "data": {"crop": [64, 128]},
    "model": {"encoder": "mit_b0", "weights": False, "drop_path": 0.0, "deeplab": {}, "multires": {"attention_dim": 8}},
    "teacher": {"confidence": 0.21},
    "masking": {"block": 16},
    "mixing": {"uncertain_detail_from": 0},
    "objectives": {"masked": {}, "feature_distance": False, "pixel_contrast": False},
}


@pytest.mark.parametrize(("batch_size", "micro_batch", "parts"), [(2, 1, [1, 1]), (3, 2, [2, 1]), (2, 5, [2])])
def test_micro_batches_give_what_the_batch_gives(tiny_settings, float64, narrow_mit, batch_size, micro_batch, parts):
    def step(size):
        tree = {"data": {"batch_size": batch_size}, "training": {"micro_batch": size}}
        run, stream = start(changed(tiny_settings, presets.merge(MEANS, tree)))
        for module in (run.student, run.teacher):
            module.double()
        details = []
        run.student.register_forward_hook(lambda _module, _inputs, output: details.append(output.detail))
        result = training_step(run, next(iter(stream)))
        gradients = {name: parameter.grad for name, parameter in run.student.named_parameters()}
        return result, gradients, [len(d.logits) for d in details], torch.cat([d.boxes.corner for d in details])

    (one, expected, whole, places), (other, gradients, sizes, other_places) = step(None), step(micro_batch)
    assert (whole, sizes) == ([batch_size] * 3, parts * 3)
    assert torch.equal(places, other_places)
    assert len(places.unique(dim=0)) > 1
    for view, other_view in zip(one.views, other.views, strict=True):
        for field in ("image", "label", "weight"):
            assert torch.equal(getattr(view, field), getattr(other_view, field))
    assert ((one.views[1].weight > 0) & (one.views[1].weight < 1)).any()
    assert one.terms.keys() == other.terms.keys() == {"source/source", "mixed/mixed", "masked/masked"}
    for name, value in one.terms.items():
        torch.testing.assert_close(other.terms[name], value, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max().clamp_min(1e-5), name


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


def test_a_broken_loss_names_its_term_and_moves_no_parameter(tiny_settings, monkeypatch):
    run, stream = start(tiny_settings)
    stream = iter(stream)
    training_step(run, next(stream))
    before = {k: v.clone() for k, v in (*run.student.named_parameters(), *run.teacher.named_parameters())}
    contrast = run.objectives["pixel_contrast"]
    honest = type(contrast).forward
    monkeypatch.setattr(type(contrast), "forward", lambda *args: honest(*args) * float("nan"))
    with pytest.raises(RunError, match="source/pixel_contrast, mixed/pixel_contrast is not finite in step 1"):
        training_step(run, next(stream))
    assert run.step == 1
    for name, value in (*run.student.named_parameters(), *run.teacher.named_parameters()):
        assert torch.equal(value, before[name]), name


def test_a_broken_gradient_under_finite_losses_is_named_too(tiny_settings, monkeypatch):
    run, stream = start(tiny_settings)
    for parameter in run.student.decoder.parameters():
        parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunError, match="the gradient is not finite in step 0 -> the last saved state is kept"):
        training_step(run, next(iter(stream)))
    assert run.step == 0


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


# Small encoders of the same family.
STAND_INS = {
    "mit_b5": "mit_b0",
    "resnet101c": "test_resnet",
    "mobilenetv2_100": "test_efficientnet",
    "swin_large_patch4_window12_384": "swin_tiny_patch4_window7_224",
    "vit_base_patch14_dinov2": "test_vit",
}
OVERLAYS = {"small", "demo", "synthia", "acdc", "dark-zurich", "tail-mixing", "adaptive-masks", "balanced"}
METHODS = [name for name in presets.names() if name not in OVERLAYS]


def save_network(settings, folder):
    """Weights of an untrained network of the settings with the classes of their source."""
    classes = find("clean", settings.data.root).classes
    network = build_segmenter(settings.model, settings.data.crop, len(classes))
    described = NetworkDescription(settings=settings, classes=classes, seen=(), network_name="student", step=0)
    save_weights(folder / "network.safetensors", network.state_dict(), described)
    return folder / "network.safetensors"


@pytest.mark.parametrize("overlay", [[], ["small"], ["demo"]], ids=["alone", "small", "demo"])
@pytest.mark.parametrize("name", METHODS)
def test_every_preset_takes_a_step(name, overlay, tiny_settings, tmp_path):
    """On tiny crops; a smaller encoder stands in for the preset's, and its weights come from a file of random ones."""
    if (name, *overlay) == ("feature-regression", "demo"):
        pytest.skip("the demo has no paired pictures, which are all that the method learns from")
    preset = presets.load([name, *overlay])
    data = tiny_settings.model_dump(mode="json")["data"] | {"rare_class": preset.data.rare_class and {}}
    if preset.data.labelled:
        data |= {"source": preset.data.source and ["clean"], "target": "clean", "labelled": 2}
    data["crop"] = [64, 64] if preset.model.multires or preset.objectives.global_contrast else [32, 48]
    encoder, weights = STAND_INS.get(preset.model.encoder, preset.model.encoder), tmp_path / "preset.safetensors"
    model = {"encoder": encoder, "weights": preset.model.weights and str(weights)}
    settings = presets.validate(presets.merge(preset.model_dump(mode="json"), {"data": data, "model": model}))
    if settings.model.weights:
        save_file(build_encoder(settings.model).state_dict(), weights)
    if preset.objectives.distilled:
        settings = changed(settings, {"model": {"teacher": str(save_network(tiny_settings, tmp_path))}})
    if name == "feature-regression":
        network = {"network": str(save_network(settings, tmp_path))}
        settings = changed(settings, {"objectives": {"feature_distance": network}})
    run, stream = start(settings)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()  # pytest keeps the files of three sessions
    before = flat(run.student)
    result = training_step(run, next(iter(stream)))
    assert set(run.objectives) == {n for n, o in settings.objectives_in_use if o}
    begun = [objective for objective in run.objectives.values() if not objective.settings.start]
    assert {view.name for view in result.views} == {name for o in begun for group in o.reads for name in group}
    assert isinstance(run.student, MultiResolution) == bool(preset.model.multires)
    assert all(torch.isfinite(value) for value in result.terms.values())
    assert not torch.equal(before, flat(run.student))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("uncertain_from", [0, 99])
def test_everything_on_in_bfloat16_on_a_gpu(tiny_settings, tmp_path, uncertain_from):
    settings = changed(tiny_settings, {
        "data": {"crop": [64, 96]},
        "model": {"multires": {"attention_dim": 8}},
        "mixing": {"uncertain_detail_from": uncertain_from},
        "objectives": {"masked": {}, "pixel_contrast": {"weighter_dim": 8}},
        "training": {"precision": "bfloat16"},
    })  # fmt: skip
    source, target = find("clean", settings.data.root), find("noisy", settings.data.root)
    run = Run(settings, [source], torch.device("cuda"))
    batch = to_device(next(batches([source], target, settings.data, 0, 0, 1)), run.device)
    result = training_step(run, batch)
    assert all(torch.isfinite(value) for value in result.terms.values())
    write_pictures(tmp_path / "views.png", run, batch, result.views)
    assert (tmp_path / "views.png").is_file()
