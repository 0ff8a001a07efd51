"""The teacher: average, pseudo-labels, and its batch norms."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluda_cli import settings
from cluda_cli.adaptation.teacher import FrozenTeacher, Teacher, ema_decay, label_logits
from cluda_cli.data.labels import CITYSCAPES, ClassTable, LabelClass
from cluda_cli.models.normalisation import IMAGENET, Normalisation
from cluda_cli.models.segmenter import Output, Segmenter


class TinyNetwork(nn.Module):
    """Batch norm, frozen batch norm and dropout around a convolution; logits at half size."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(3)
        self.convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout2d(0.5)
        self.classify = nn.Conv2d(8, 5, 1)

    def train(self, mode: bool = True) -> "TinyNetwork":
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, image: Tensor) -> Output:
        features = self.dropout(self.norm(self.convolution(self.frozen(image))).relu())
        return Output(self.classify(features), features, (features,) * 4, image)


@pytest.fixture
def student() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyNetwork().train()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))


VALID = torch.ones(2, 8, 12, dtype=torch.bool)


def moved(student: nn.Module) -> nn.Module:
    """A student after some training."""
    other = copy.deepcopy(student)
    with torch.no_grad():
        for i, parameter in enumerate(other.parameters()):
            parameter.add_(0.1 * (i + 1))
        for buffer in other.buffers():
            buffer.add_(3)
    return other


def test_decays() -> None:
    assert [ema_decay(step, 0.999) for step in (1, 2, 9)] == pytest.approx([0.5, 2 / 3, 0.9], abs=1e-12)
    assert ema_decay(998, 0.999) < ema_decay(999, 0.999) == ema_decay(40_000, 0.999) == 0.999
    assert ema_decay(98, 0.99) < ema_decay(99, 0.99) == 0.99


@pytest.mark.parametrize(("step", "decay"), [(1, 0.5), (3, 0.75), (500, 0.9)])
def test_update_moves_parameters_by_the_formula_and_leaves_buffers(student: Any, step: int, decay: float) -> None:
    teacher = Teacher(student, settings.Teacher(decay=0.9))
    before, after = copy.deepcopy(teacher.network), moved(student)
    teacher.update(after, step)
    for new, old, target in zip(teacher.network.parameters(), before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * target)
    for new, old in zip(teacher.network.buffers(), before.buffers(), strict=True):
        assert torch.equal(new, old)


def test_teacher_starts_as_an_independent_copy_without_gradient(student: Any) -> None:
    student.norm.running_mean.fill_(7)
    teacher = Teacher(student, settings.Teacher())
    for name, value in student.state_dict().items():
        assert torch.equal(teacher.network.state_dict()[name], value), name
    with torch.no_grad():
        student.classify.bias.add_(1)
    assert not torch.equal(teacher.network.classify.bias, student.classify.bias)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_pseudo_labels_give_no_gradient(student: Any, image: Tensor) -> None:
    teacher = Teacher(student, settings.Teacher(confidence=0.3))
    weight = teacher.pseudo_labels(image.requires_grad_(), VALID).weight
    assert not weight.requires_grad
    (student(image).logits.square().mean() * weight.mean()).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_pseudo_labels_use_batch_statistics_and_no_dropout(student: Any, image: Tensor) -> None:
    teacher = Teacher(student, settings.Teacher(confidence=0.3))
    reference = copy.deepcopy(teacher.network).eval()
    reference.norm.train()
    expected = label_logits(reference(image).logits, 0.3, VALID)
    for mode in (True, False):
        teacher.train(mode)
        label, weight, *_ = teacher.pseudo_labels(image, VALID)
        assert torch.equal(label, expected[0]) and torch.equal(weight, expected[1])


def test_modes_hold_whatever_the_parent_or_an_evaluation_sets(student: Any, image: Tensor) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Teacher(student, settings.Teacher())

    parent = Parent()
    network: Any = parent.teacher.network
    for change in (parent.train, parent.eval):
        change()
        assert network.norm.training and not network.dropout.training and not network.frozen.training
    network.eval()
    assert not network.norm.training
    parent.teacher.pseudo_labels(image, VALID)
    assert network.norm.training and not network.dropout.training and not network.frozen.training


def test_running_statistics_follow_the_target_and_never_the_student(student: Any, image: Tensor) -> None:
    teacher = Teacher(student, settings.Teacher())
    network: Any = teacher.network
    before = copy.deepcopy(network.state_dict())
    of_student = copy.deepcopy(student.state_dict())
    teacher.pseudo_labels(image, VALID)
    with torch.no_grad():
        batch_mean = student.convolution(student.frozen(image)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(network.norm.running_mean, 0.1 * batch_mean)
    assert torch.equal(network.frozen.running_mean, before["frozen.running_mean"])
    assert all(torch.equal(value, of_student[name]) for name, value in student.state_dict().items())

    network.eval()
    here = copy.deepcopy(network.state_dict())
    network(image)
    assert all(torch.equal(value, here[name]) for name, value in network.state_dict().items())


def test_other_images_can_pass_without_moving_the_statistics(student: Any, image: Tensor) -> None:
    """The output is that of batch statistics all the same."""
    teacher, other = (Teacher(student, settings.Teacher()) for _ in range(2))
    before = copy.deepcopy(teacher.state_dict())
    output = teacher.output(image, keep_statistics=False)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(output.logits, other.output(image).logits)
    teacher.output(image)
    assert not torch.equal(teacher.network.norm.running_mean, before["network.norm.running_mean"])


def test_frozen_encoder_norms_of_the_network_stay_frozen() -> None:
    decoder = settings.Decoder(embed_dim=4, channels=4, dilations=(1,))
    model = settings.Model(encoder="test_resnet", weights=False, freeze_batch_norm=True, decoder=decoder)
    with torch.random.fork_rng():
        student = Segmenter(model, 3)
    teacher = Teacher(student, settings.Teacher())
    before = copy.deepcopy(dict(teacher.network.named_buffers()))
    teacher.pseudo_labels(torch.zeros(2, 3, 64, 64), torch.ones(2, 64, 64))
    changed = {name for name, value in teacher.network.named_buffers() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("decoder")} != set()


def test_state_round_trip(student: Any, image: Tensor) -> None:
    first, second = (Teacher(copy.deepcopy(student), settings.Teacher(decay=0.9)) for _ in range(2))
    first.pseudo_labels(image, VALID)
    first.update(moved(student), 3)
    assert not torch.equal(first.network.norm.running_mean, second.network.norm.running_mean)
    second.load_state_dict(first.state_dict())
    for network in (first.network, second.network):
        network.eval()
    assert torch.equal(first.network(image).logits, second.network(image).logits)
    assert torch.equal(first.pseudo_labels(image, VALID)[0], second.pseudo_labels(image, VALID)[0])


def test_weight_is_one_share_of_the_whole_batch_and_zero_where_invalid() -> None:
    logits = torch.zeros(2, 2, 2, 2)
    logits[0, 1, 0] = 20  # both pixels of one row of one image are sure of class 1
    valid = torch.ones(2, 2, 2, dtype=torch.bool)
    valid[0, 0, 0] = valid[1, 1, 1] = False
    label, weight, probability, *_ = label_logits(logits, 0.968, valid)
    assert label.dtype == torch.int64 and weight.dtype == torch.float32
    assert label.tolist() == [[[1, 1], [0, 0]], [[0, 0], [0, 0]]]
    assert torch.equal(weight, 0.25 * valid)
    assert probability.dtype == torch.float32
    torch.testing.assert_close(probability, logits.softmax(1).amax(1) * valid)


def test_pseudo_labels_are_corrected_for_class_weights_and_the_network_is_not() -> None:
    """With weights w the student learns w p / sum(w p); the pseudo-labels are those of p."""
    weights = torch.tensor([0.5, 4.0])
    probability = torch.tensor([[0.7, 0.3], [0.2, 0.8]])  # two pixels, two classes
    tilted = (weights * probability).log().T.view(1, 2, 1, 2)

    class Fixed(TinyNetwork):
        def forward(self, image: Tensor) -> Output:
            return Output(tilted, tilted, (), image)

    valid = torch.ones(1, 1, 2)
    plain = Teacher(Fixed(), settings.Teacher(confidence=0.75))
    corrected = Teacher(Fixed(), settings.Teacher(confidence=0.75), weights)
    assert plain.pseudo_labels(torch.zeros(1, 3, 1, 2), valid).label.tolist() == [[[1, 1]]]
    label, weight, found, *_ = corrected.pseudo_labels(torch.zeros(1, 3, 1, 2), valid)
    assert label.tolist() == [[[0, 1]]] and weight.tolist() == [[[0.5, 0.5]]]
    torch.testing.assert_close(found, torch.tensor([[[0.7, 0.8]]]))
    assert torch.equal(corrected.output(torch.zeros(1, 3, 1, 2)).logits, tilted)
    assert corrected.state_dict().keys() == plain.state_dict().keys()


def test_threshold_is_inclusive() -> None:
    weight = label_logits(torch.zeros(1, 2, 2, 2), 0.5, torch.ones(1, 2, 2))[1]
    assert weight.tolist() == [[[1, 1], [1, 1]]]


def test_logits_are_upsampled_before_the_class_is_chosen() -> None:
    # The cells show 1 and 2, with 0 a close second; between their centres, at 1/4 and 3/4 of the width, 0 is largest.
    logits = torch.tensor([[9.0, 9.0], [10.0, 0.0], [0.0, 10.0]]).view(1, 3, 1, 2)
    label, *_ = label_logits(logits, 0.9, torch.ones(1, 1, 8))
    assert label.flatten().tolist() == [1, 1, 0, 0, 0, 0, 2, 2]


def test_low_precision_logits_are_judged_in_float32() -> None:
    logits = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    valid = torch.ones(2, 32, 32)
    low, full = label_logits(logits, 0.4, valid), label_logits(logits.float(), 0.4, valid)
    assert low[1].dtype == torch.float32
    assert torch.equal(low[0], full[0]) and torch.equal(low[1], full[1])


@pytest.mark.reference
def test_pseudo_labels_as_the_reference(golden: Any) -> None:
    tensors, description = golden("09_pseudo_ema/pseudo_labels")
    logits = tensors["in.logits"].float()
    bounds = description["tolerance_demanded"]["bounds"]
    everywhere = torch.ones(logits.shape[0], *logits.shape[2:])
    for threshold in (0.968, 0.9, 0.5, 0.0, 1.1):
        label, weight, *_ = label_logits(logits, threshold, everywhere)
        assert torch.equal(label, tensors["out.pseudo_label"].long())
        key = f"weight_value.t{threshold}"
        torch.testing.assert_close(
            weight, tensors[f"out.{key}"].expand_as(weight), rtol=0, atol=bounds[key]["float32_max_abs"]
        )
    bands = {"weight_top3": (3, 0), "weight_top3_bottom8": (3, 8)}
    valids = {"weight_valid_mask": tensors["in.valid_pseudo_mask"][:, 0]}
    for key, (top, bottom) in bands.items():
        valids[key] = everywhere.clone()
        valids[key][:, :top] = 0
        valids[key][:, everywhere.shape[1] - bottom :] = 0
    for key, valid in valids.items():
        _, weight, *_ = label_logits(logits, 0.968, valid)
        torch.testing.assert_close(weight, tensors[f"out.{key}"], rtol=0, atol=bounds[key]["float32_max_abs"])


@pytest.mark.reference
@pytest.mark.parametrize("cap", [0.999, 0.9])
def test_average_as_the_reference(golden: Any, cap: float) -> None:
    tensors, description = golden("09_pseudo_ema/ema")
    bounds = description["tolerance_demanded"]["bounds"]
    names = description["settings"]["named_parameters_order"]
    kept = description["settings"]["kept_iterations"]
    student: Any = nn.ParameterDict({n.replace(".", "_"): tensors[f"in.student.iter0.{n}"].clone() for n in names})
    parameters = [student[n.replace(".", "_")] for n in names]
    teacher = Teacher(student, settings.Teacher(decay=cap))
    for iteration in range(max(kept) + 1):
        if iteration:
            teacher.update(student, iteration)
        if iteration in kept:
            for name in names:
                key = f"a{cap}.ema.iter{iteration}.{name}"
                expected = tensors.get(f"out64.{key}", tensors[f"out.{key}"]).double()
                difference = (teacher.network[name.replace(".", "_")].double() - expected).abs().max()
                assert difference <= bounds[key]["float32_max_abs"], key
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                parameter.mul_(0.99).add_(0.01 * (i + 1) * (iteration % 5 - 2))


class Colors(nn.Module):
    """Logits and features are what it sees, at half size."""

    pad_multiple = 4

    def __init__(self, normalisation: Normalisation = IMAGENET) -> None:
        super().__init__()
        self.decoder = nn.Conv2d(3, 3, 1)
        self.normalisation, self.seen = normalisation, Tensor()

    def forward(self, image: Tensor) -> Output:
        self.seen = image
        half = image[:, :, ::2, ::2]
        return Output(half, half, (), image)


def freeze(network: nn.Module, scale: float = 1.0) -> FrozenTeacher:
    """It knows car, sky and a tram; the student's train ids of them are 1, 0 and none."""
    tram = LabelClass("tram", (0, 0, 0), 0)
    sky, car = CITYSCAPES[10], CITYSCAPES[13]
    return FrozenTeacher(network, ClassTable((car, sky, tram)), ClassTable((sky, car)), scale)  # type: ignore[arg-type]


def test_a_frozen_teacher_labels_by_name_and_leaves_out_what_only_it_knows(student: Any) -> None:
    student.normalisation = IMAGENET
    image = torch.zeros(1, 3, 4, 4)
    image[:, 0, :2, :2] = image[:, 1, :2, 2:] = image[:, 2, 2:] = 9
    teacher = Teacher(student, settings.Teacher(confidence=0.9), frozen=freeze(Colors()))
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[:, 0] = False
    found = teacher.pseudo_labels(image, valid)
    assert found.label[0, 0].tolist() == [1, 1, 0, 0] and (found.label[0, 3] == 255).all()
    for weight in (found.weight, found.probability):
        assert (weight[0, 1] > 0).all() and not weight[0, 0].any() and not weight[0, 3].any()
    assert torch.equal(found.features, image[:, :, ::2, ::2])
    assert torch.equal(found.logits, image[:, [1, 0], ::2, ::2])


def test_a_frozen_teacher_sees_images_as_it_learnt_them(student: Any, image: Tensor) -> None:
    """Twice as large, rounded to its cells, and normalised its own way."""
    student.normalisation = IMAGENET
    own = Normalisation((127.5,) * 3, (51.0,) * 3)
    network = Colors(own)
    teacher = Teacher(student, settings.Teacher(), frozen=freeze(network, scale=1.6))
    teacher.pseudo_labels(image, VALID)
    assert network.seen.shape == (2, 3, 12, 20)
    pixels = 255 * IMAGENET.invert(image)
    expected = nn.functional.interpolate((pixels - 127.5) / 51, (12, 20), mode="bilinear")
    torch.testing.assert_close(network.seen, expected)


def test_a_frozen_teacher_is_no_state_and_lets_the_average_alone(student: Any, image: Tensor) -> None:
    student.normalisation = IMAGENET
    teacher, plain = Teacher(student, settings.Teacher(), frozen=freeze(Colors())), Teacher(student, settings.Teacher())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.pseudo_labels(image, VALID)
    assert before.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert len(list(teacher.parameters())) == len(list(plain.parameters()))
