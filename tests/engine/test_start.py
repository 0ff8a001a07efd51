"""A run that starts from another run's weights, and parts that do not learn."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluda_cli import presets
from cluda_cli.data.index import find
from cluda_cli.data.labels import CITYSCAPES, ClassTable, LabelClass
from cluda_cli.data.streams import batches
from cluda_cli.engine.run import Run
from cluda_cli.engine.start import read_teacher, start_from
from cluda_cli.engine.state_file import load_state, save_state
from cluda_cli.engine.step import training_step
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.inference.weights_file import NetworkDescription, save_weights
from cluda_cli.models.multires import build_segmenter
from cluda_cli.models.normalisation import Normalisation

CPU = torch.device("cpu")
NAMES = ("car", "sky", "tram")  # of the file, in an order of its own
HALF = Normalisation((127.5, 127.5, 127.5), (63.75, 63.75, 63.75))  # of the file; the encoder's own is another one


def table(*names):
    known = {c.name: c for c in CITYSCAPES}
    return ClassTable(tuple(known.get(name, LabelClass(name, (0, 0, 0), i)) for i, name in enumerate(names)))


def changed(settings, tree):
    return presets.validate(presets.merge(settings.model_dump(mode="json"), tree))


def start(settings):
    source = find("clean", settings.data.root)
    return Run(settings, [source], CPU)


@pytest.fixture
def weights(tiny_settings, tmp_path):
    """A file of a network with the classes `NAMES`, and its tensors."""
    torch.manual_seed(5)
    network = build_segmenter(tiny_settings.model, tiny_settings.data.crop, len(NAMES))
    path = tmp_path / "first.safetensors"
    described = NetworkDescription(
        settings=tiny_settings, classes=table(*NAMES), seen=NAMES, network_name="student", step=9
    )
    save_weights(path, network.state_dict(), described, normalisation=HALF)
    return path, network.state_dict()


def test_the_whole_network_starts_there_with_rows_by_class_name(tiny_settings, weights):
    path, tensors = weights
    fresh, run = start(tiny_settings), start(changed(tiny_settings, {"model": {"start": str(path)}}))
    assert run.start == f"starts from {path}; new classes: road, building, person"
    names = run.classes.names
    for network in (run.student, run.teacher.network):
        for name, tensor in network.state_dict().items():
            if name.startswith("decoder.conv_seg"):
                for i, label in enumerate(names):
                    known = label in NAMES
                    expected = tensors[name][NAMES.index(label)] if known else fresh.student.state_dict()[name][i]
                    assert torch.equal(tensor[i], expected), (name, label)
            else:
                assert torch.equal(tensor, tensors[name]), name


def test_a_resumed_run_does_not_need_the_file(tiny_settings, weights):
    path, _ = weights
    settings = changed(tiny_settings, {"model": {"start": str(path)}})
    state = start(settings).state_dict()
    path.unlink()
    run = Run(settings, [find("clean", settings.data.root)], CPU, resumed=True)
    run.load_state_dict(state)
    assert all(torch.equal(v, state["student"][k]) for k, v in run.student.state_dict().items())


def test_a_resumed_run_keeps_the_normalisation_of_the_start_file(tiny_settings, weights, tmp_path):
    """One step, a save, and one step more equal two steps to the last bit."""
    settings = changed(tiny_settings, {"model": {"start": str(weights[0])}})
    source, target = (find(name, settings.data.root) for name in ("clean", "noisy"))
    first, second = batches([source], target, settings.data, 0, 0, 2)
    whole = start(settings)
    training_step(whole, first)
    save_state(tmp_path / "state.pt", whole.state_dict())
    resumed = Run(settings, [source], CPU, resumed=True)
    assert resumed.student.normalisation != HALF
    resumed.load_state_dict(load_state(tmp_path / "state.pt"))
    assert resumed.student.normalisation == resumed.teacher.network.normalisation == HALF
    terms, expected = training_step(resumed, second).terms, training_step(whole, second).terms
    assert terms == expected
    assert all(torch.equal(v, whole.student.state_dict()[k]) for k, v in resumed.student.state_dict().items())


def test_another_network_or_no_common_class_is_refused(tiny_settings, weights):
    path, _ = weights
    other = {"model": {"start": str(path), "decoder": {"channels": 4}}}
    with pytest.raises(SettingsError, match=r"model\.start: holds another network"):
        start(changed(tiny_settings, other))
    network = build_segmenter(tiny_settings.model, tiny_settings.data.crop, 2)
    with pytest.raises(SettingsError, match="knows none of the classes bus, train"):
        start_from(path, network, table("bus", "train"))


@pytest.mark.parametrize("parts", [["encoder"], ["decoder"], ["head"], ["encoder", "decoder"]])
def test_frozen_parts_do_not_learn_and_the_others_do(tiny_settings, parts):
    settings = changed(tiny_settings, {"model": {"freeze": parts}, "optimizer": {"warmup": 0}})
    run = start(settings)
    before = {name: tensor.clone() for name, tensor in run.student.state_dict().items()}
    stream = batches([find("clean", settings.data.root)], find("noisy", settings.data.root), settings.data, 0, 0, 1)
    training_step(run, next(stream))
    moved = {"encoder": False, "decoder": False, "head": False}
    for name, tensor in run.student.state_dict().items():
        part = "encoder" if name.startswith("encoder") else "head" if "conv_seg" in name else "decoder"
        moved[part] |= not torch.equal(tensor, before[name])
    assert moved == {part: part not in parts for part in moved}


def test_something_has_to_learn(tiny_settings):
    with pytest.raises(SettingsError, match=r"model\.freeze leaves nothing"):
        changed(tiny_settings, {"model": {"freeze": ["encoder", "decoder", "head"]}})


DISTILLATION = {
    "teacher": {"confidence": 0.0},
    "objectives": {
        "source": False, "mixed": False, "feature_distance": False, "pixel_contrast": False, "distilled": {},
        "relation_distillation": {"relations": "prototypes", "samples": 40, "prototypes": 30},
    },
}  # fmt: skip


@pytest.fixture
def distilled(tiny_settings, tmp_path):
    """Settings of distillation from a network with other channels, and the classes of the run in another order."""
    torch.manual_seed(6)
    own = changed(tiny_settings, {"model": {"decoder": {"channels": 12}}, "data": {"target_box": [96, 160]}})
    names = ("sky", "car", "tram", "person", "building", "road")
    path = tmp_path / "big.safetensors"
    described = NetworkDescription(settings=own, classes=table(*names), seen=names, network_name="student", step=9)
    network = build_segmenter(own.model, own.data.crop, len(names))
    save_weights(path, network.state_dict(), described, normalisation=HALF)
    return changed(tiny_settings, presets.merge(DISTILLATION, {"model": {"teacher": str(path)}}))


def test_distillation_asks_its_teacher_once_a_step_and_learns(distilled, monkeypatch):
    run = start(distilled)
    (path,) = run.frozen
    assert run.teacher.frozen.channels == 12 and len(run.frozen[path]) == 64
    assert list(run.networks) == ["student"] and run.evaluated is run.student
    network, asked = run.teacher.frozen.network.network, []
    network.register_forward_hook(lambda *_: asked.append(0))
    before = {name: tensor.clone() for name, tensor in run.student.named_parameters()}
    source, target = (find(name, distilled.data.root) for name in ("clean", "noisy"))
    for count, batch in enumerate(batches([source], target, distilled.data, 0, 0, 2), start=1):
        terms = training_step(run, batch).terms
        assert list(terms) == ["target/distilled", "target/relation_distillation"]
        assert len(asked) == count
    assert all(value > 0 for value in terms.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in run.student.named_parameters())


def test_distillation_resumes_to_the_last_bit(distilled, tmp_path):
    source, target = (find(name, distilled.data.root) for name in ("clean", "noisy"))
    first, second = batches([source], target, distilled.data, 0, 0, 2)
    whole = start(distilled)
    training_step(whole, first)
    save_state(tmp_path / "state.pt", whole.state_dict())
    assert list(whole.state_dict()["objectives"]) == ["relation_distillation.bank"]
    resumed = Run(distilled, [source], CPU, resumed=True)
    resumed.load_state_dict(load_state(tmp_path / "state.pt"))
    assert training_step(resumed, second).terms == training_step(whole, second).terms
    for part in ("student", "objectives"):
        expected = whole.state_dict()[part]
        assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict()[part].items())


def test_a_teacher_sees_images_at_its_own_scale(distilled):
    path, classes = Path(distilled.model.teacher), table("sky", "car")
    assert read_teacher(path, (48, 80), classes).scale == 2
    assert read_teacher(path, None, classes).scale == 1


def test_a_teacher_that_lacks_a_class_or_is_none_is_refused(distilled, weights):
    other = changed(distilled, {"model": {"teacher": str(weights[0])}})
    with pytest.raises(SettingsError, match=r"model\.teacher: the network of .* does not know road, building, person"):
        start(other)
    without = changed(distilled, {"model": {"teacher": False}})
    with pytest.raises(SettingsError, match=r"objectives\.distilled: has no teacher .* -> set model\.teacher="):
        start(without)
    with pytest.raises(SettingsError, match=r"objectives\.relation_distillation: has no teacher"):
        start(changed(without, {"objectives": {"distilled": False}}))
    with pytest.raises(DataError, match="no such weights file"):
        start(changed(distilled, {"model": {"teacher": "absent.safetensors"}}))


def test_feature_regression_of_paired_pictures_learns_and_resumes(tiny_settings, weights, tmp_path):
    """To the features of the network from which the run starts; one step, a save and a step equal two steps."""
    source, target = (find(name, tiny_settings.data.root) for name in ("clean", "noisy"))
    target = replace(target, references={item.image: item.image for item in target.splits["train"]})
    distance = {"views": ["paired"], "network": str(weights[0]), "features": ["last", "fused"], "classes": "all"}
    settings = changed(tiny_settings, {
        "model": {"start": str(weights[0])},
        "objectives": DISTILLATION["objectives"] | {
            "distilled": False, "relation_distillation": False,
            "feature_distance": distance | {"distance": "squared", "search": 1},
        },
    })  # fmt: skip
    first, second = batches([source], target, settings.data, 0, 0, 2, paired=True)
    whole = start(settings)
    assert whole.paired and list(whole.frozen) == [str(weights[0])]
    (term,) = training_step(whole, first).terms.items()
    assert term[0] == "paired/feature_distance" and term[1] > 0
    save_state(tmp_path / "state.pt", whole.state_dict())
    resumed = Run(settings, [source], CPU, resumed=True)
    resumed.load_state_dict(load_state(tmp_path / "state.pt"))
    assert training_step(resumed, second).terms == training_step(whole, second).terms
    assert all(torch.equal(v, whole.student.state_dict()[k]) for k, v in resumed.student.state_dict().items())


def test_a_frozen_encoder_is_found_by_name_or_refused(tiny_settings, tiny_encoder):
    vfm = {"views": ["source", "target"], "network": "test_efficientnet", "network_weights": str(tiny_encoder),
           "distance": "cosine_and_smooth_l1", "head": True, "classes": "all", "weight": 0.1}  # fmt: skip
    settings = changed(tiny_settings, {"objectives": {"feature_distance": vfm}})
    run = start(settings)
    assert list(run.frozen) == [str(tiny_encoder)]
    source, target = (find(name, tiny_settings.data.root) for name in ("clean", "noisy"))
    terms = training_step(run, next(batches([source], target, settings.data, 0, 0, 1))).terms
    assert terms["source/feature_distance"] > 0 and terms["target/feature_distance"] > 0
    assert any("feature_distance.heads" in name for name in run.objectives.state_dict())
    unknown = changed(settings, {"objectives": {"feature_distance": {"network": "mit_b9"}}})
    with pytest.raises(SettingsError, match=r"feature_distance\.network: there is no encoder .* or give the weights"):
        start(unknown)
