"""A training step on a GPU: it never waits for the device, and computes what a CPU computes.

Without a GPU, the part of a step that needs the device runs on tensors that have no values, where reading one raises.
"""

from contextlib import nullcontext

import pytest
import torch

from cluda_cli import presets
from cluda_cli.adaptation.views import make_views
from cluda_cli.data.index import find
from cluda_cli.data.streams import batches
from cluda_cli.engine import step as engine
from cluda_cli.engine.run import Run
from cluda_cli.engine.step import training_step

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SELDOM = {"log_every": 100, "save_every": 100, "validate_every": 100, "pictures_every": 0}
MIC_CLUDA = {
    "data": {"crop": [64, 128]},
    "model": {"encoder": "test_resnet", "weights": False, "multires": {"attention_dim": 8}},
    "mixing": {"uncertain_detail_from": 0, "jitter_probability": 1.0, "blur_probability": 1.0},
    "masking": {"block": 16, "with_source": True},
    "objectives": {"masked": {}, "feature_distance": False, "pixel_contrast": {"weighter_dim": 8}},
    "training": SELDOM,
}
METHODS = pytest.mark.parametrize("tree", [{"training": SELDOM}, MIC_CLUDA], ids=["daformer-cluda", "mic-cluda"])


def start(tiny_settings, tree, device=CPU):
    settings = presets.validate(presets.merge(tiny_settings.model_dump(mode="json"), tree))
    source, target = find("clean", settings.data.root), find("noisy", settings.data.root)
    run = Run(settings, source, device)
    return run, iter(batches(source, target, settings.data, settings.training.seed, 0, settings.training.steps))


@METHODS
def test_views_outputs_terms_and_gradients_are_never_read_back(tiny_settings, tree, monkeypatch):
    run, stream = start(tiny_settings, tree)
    batch = next(stream).to(torch.device("meta"))
    for module in (run.student, run.teacher, run.objectives):
        module.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    wanted = frozenset({"source", "mixed", "masked"} if "objectives" in tree else {"source", "mixed"})
    s = run.settings
    names = []
    for view in make_views(batch, run.teacher, wanted, s.mixing, s.masking, s.training.seed, 0):
        terms = engine._learn(run, view, {n: o for n, o in run.objectives.items() if view.name in o.views})
        assert all(value.device.type == "meta" for value in terms.values())
        names += terms
    assert len(names) == 5
    assert all(p.grad is not None for p in run.student.parameters())
    with pytest.raises(RuntimeError):  # what a look would do
        bool(terms[names[-1]] > 0)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@METHODS
def test_a_step_never_waits_for_the_device(tiny_settings, tree, precision):
    run, stream = start(
        tiny_settings, presets.merge(tree, {"training": {"precision": precision}}), torch.device("cuda")
    )
    ready = [next(stream).pin_memory().to(run.device) for _ in range(4)]
    for batch in ready[:2]:  # libraries wait while they choose their kernels and allocate
        training_step(run, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in ready[2:]:
            training_step(run, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.settle()
    assert run.step == 4


@pytest.mark.gpu
@NEEDS_CUDA
@METHODS
def test_a_step_gives_the_losses_of_a_cpu(tiny_settings, tree):
    found = []
    for device in (CPU, torch.device("cuda")):
        run, stream = start(tiny_settings, tree, device)
        found.append({k: float(v) for k, v in training_step(run, next(stream).to(device)).terms.items()})
    assert found[1] == pytest.approx(found[0], rel=2e-2)


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_broken_step_has_no_effect(tiny_settings, monkeypatch):
    run, stream = start(tiny_settings, {"training": SELDOM}, torch.device("cuda"))
    training_step(run, next(stream).to(run.device))
    before = {k: v.clone() for k, v in (run.student.state_dict() | dict(run.teacher.state_dict())).items()}
    contrast = type(run.objectives["pixel_contrast"])
    honest = contrast.forward
    monkeypatch.setattr(contrast, "forward", lambda *args: honest(*args) * float("nan"))
    training_step(run, next(stream).to(run.device))
    assert run.state_dict()["step"] == run.step == 1
    after = run.student.state_dict() | dict(run.teacher.state_dict())
    assert all(torch.equal(after[name], value) for name, value in before.items())
