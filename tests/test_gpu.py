"""A training step on a GPU: until the check of its gradient it reads nothing back, and it computes what a CPU computes.

Without a GPU, the part of a step that needs the device runs on tensors that have no values, where reading one raises.
"""

from contextlib import nullcontext

import pytest
import torch

from cluda_cli import presets
from cluda_cli.adaptation.views import Scene
from cluda_cli.data.batch import to_device
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
    run = Run(settings, [source], device)
    return run, iter(batches([source], target, settings.data, settings.training.seed, 0, settings.training.steps))


@METHODS
def test_views_outputs_terms_and_gradients_are_never_read_back(tiny_settings, tree, monkeypatch):
    run, stream = start(tiny_settings, tree)
    batch = to_device(next(stream), torch.device("meta"))
    for module in (run.student, run.teacher, run.objectives):
        module.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    scene = Scene(batch, run.teacher, run.settings.training.seed, 0)
    names = []
    for group in engine.join_groups(run.objectives.values(), list(run.makers)):
        terms = engine._learn(run, [run.makers[name](scene) for name in group], run.objectives, [])
        assert all(value.device.type == "meta" for value in terms.values())
        names += terms
    assert len(names) == 5
    assert all(p.grad is not None for p in run.student.parameters())
    with pytest.raises(RuntimeError):  # what a look would do
        bool(terms[names[-1]] > 0)


@pytest.mark.gpu
@NEEDS_CUDA
@METHODS
def test_a_step_gives_the_losses_of_a_cpu(tiny_settings, tree):
    found = []
    for device in (CPU, torch.device("cuda")):
        run, stream = start(tiny_settings, tree, device)
        found.append({k: float(v) for k, v in training_step(run, to_device(next(stream), device)).terms.items()})
    assert found[1] == pytest.approx(found[0], rel=2e-2)
