"""What is measured: the busiest step of a run, at its cost, without weights, data or learning."""

from contextlib import closing
from itertools import islice

import torch

from cluda_cli import presets
from cluda_cli.data.datasets import Datasets
from cluda_cli.data.index import find
from cluda_cli.data.streams import batches
from cluda_cli.measure.workload import (
    CONFIDENT_SHARE,
    find_busiest_step,
    imitate_pseudo_labels,
    make_measurable,
    stream_batches,
)

CPU = torch.device("cpu")


def test_what_begins_late_in_a_run_is_measured():
    assert find_busiest_step(presets.load(["daformer-cluda"])) == 0
    assert find_busiest_step(presets.load(["hrda-cluda"])) == 12001
    late = ["objectives.pixel_contrast.start=500", "training.steps=1000"]
    assert find_busiest_step(presets.load(["hrda-cluda"], None, late)) == 500  # 12001 is beyond the run


def test_what_is_measured_costs_the_same_but_learns_nothing():
    honest = presets.load(["daformer-cluda"])
    measured = make_measurable(honest, 50_000)
    changed = {key for key in honest.model_dump() if honest.model_dump()[key] != measured.model_dump()[key]}
    assert changed == {"model", "optimizer", "training"}
    assert (measured.model.weights, measured.training.steps) == (False, 50_000)
    assert measured.objectives.feature_distance is not None


def test_a_start_file_is_not_needed_and_a_longer_run_stays_as_long():
    honest = presets.load(["daformer-cluda"], {"model": {"start": "absent.safetensors"}})
    measured = make_measurable(honest, 5)
    assert (measured.model.start, measured.training.steps) == (None, honest.training.steps)


def test_without_datasets_one_batch_comes_again_and_again(tiny_settings):
    with closing(stream_batches(tiny_settings, None, 19, 0, CPU)) as stream:
        first, second = islice(stream, 2)
    assert first is second
    assert len(first["source"].image) == tiny_settings.data.batch_size
    assert int(first["source"].label.max()) < 19


def test_batches_of_datasets_are_those_of_the_run_from_its_step_on(tiny_settings):
    source, target = (find(name, tiny_settings.data.root) for name in ("clean", "noisy"))
    with closing(stream_batches(tiny_settings, Datasets((source,), target, target, None), 5, 2, CPU)) as stream:
        found = next(stream)
    expected = next(batches([source], target, tiny_settings.data, tiny_settings.training.seed, 2, 3))
    for name, crops in expected.items():
        assert torch.equal(found[name].image, crops.image)


def test_pseudo_labels_are_believable_and_sure_of_half_the_pixels(run, batch):
    target = batch["target"]
    image = run.student.normalisation.apply(target.image)
    honest = run.teacher.pseudo_labels(image, target.valid)
    assert not torch.equal(honest.weight, CONFIDENT_SHARE * target.valid)
    imitate_pseudo_labels(run)
    made = run.teacher.pseudo_labels(image, target.valid)
    assert made.label.shape == honest.label.shape and made.label.dtype == honest.label.dtype
    assert len(made.label.unique()) > 5  # a random network labels nearly everything alike
    assert torch.equal(made.weight, CONFIDENT_SHARE * target.valid)
    assert torch.equal(made.probability, target.valid.float())
    assert torch.equal(made.label, run.teacher.pseudo_labels(image, target.valid).label)
