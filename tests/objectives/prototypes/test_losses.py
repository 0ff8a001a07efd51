"""Losses of pixels against statistics of the classes: reference values, closed forms, what counts and what does not."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.distributed import collectives
from cluda_cli.objectives.prototypes.losses import (
    bank_losses,
    distribution_losses,
    is_counted,
    mean_losses,
    uniformity,
    weighted_mean,
)

both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
ALL = torch.ones(19, dtype=torch.bool)


class Case:
    """A set of reference vectors: features that are maps of any length, labels, statistics, what should come out."""

    def __init__(self, golden: Any, name: str, dtype: torch.dtype) -> None:
        self.tensors, description = golden(f"20_proto/{name}")
        self.bounds = description["tolerance_demanded"]["bounds"]
        self.settings, self.dtype = description["settings"], dtype
        self.maps = self.number("in.feats").requires_grad_()  # B D h w
        self.label = self.tensors["in.labels"].flatten().long()

    def number(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    @property
    def features(self) -> Tensor:
        return unit_rows(self.maps)

    @property
    def temperature(self) -> float:
        return float(self.settings.get("contrast_temp", 1))

    def check(self, value: Tensor, prefix: str = "", out: str = "out64.") -> None:
        """Value and gradient agree with what is stored."""
        (gradient,) = torch.autograd.grad(value, self.maps, retain_graph=True)
        for key, actual in {f"{prefix}loss": value, f"{prefix}grad_feats": gradient}.items():
            agree(self.bounds, out, key, actual, self.tensors)


def agree(bounds: dict[str, Any], out: str, key: str, actual: Tensor, tensors: dict[str, Tensor]) -> None:
    name = f"consistent.{key}" if "consistent" in out else key
    bound = bounds[name]["float64_max_abs" if actual.dtype == torch.float64 else "float32_max_abs"]
    error = (actual.detach() - tensors[out + key].view(actual.shape)).abs().max()
    assert error <= bound, f"{key}: {error} > {bound}"


def unit_rows(maps: Tensor) -> Tensor:
    return F.normalize(maps, dim=1).movedim(1, -1).flatten(0, 2)


def mean_of(losses: Tensor, label: Tensor, met: Tensor = ALL, weight: Tensor | None = None) -> Tensor:
    counted = is_counted(label, met).to(losses.dtype)
    return weighted_mean(losses, counted if weight is None else counted * weight)


@pytest.mark.reference
@both
@pytest.mark.parametrize("name", ["p02_proto_tau100", "p03_proto_tau01", "p07_proto_one_pixel_empty_image"])
def test_means_as_the_reference(name: str, dtype: torch.dtype, golden: Any) -> None:
    case = Case(golden, name, dtype)
    losses = mean_losses(case.features, case.label, case.number("in.mean"), ALL, case.temperature)
    case.check(mean_of(losses, case.label))


@pytest.mark.reference
@both
@pytest.mark.parametrize("name", ["p04_dist_tau100", "p05_dist_tau01"])
def test_distributions_as_the_reference(name: str, dtype: torch.dtype, golden: Any) -> None:
    case = Case(golden, name, dtype)
    statistics = case.number("in.mean"), case.number("in.var")
    losses = distribution_losses(case.features, case.label, *statistics, ALL, case.temperature)
    case.check(mean_of(losses, case.label))


@pytest.mark.reference
@both
def test_banks_as_the_reference(dtype: torch.dtype, golden: Any) -> None:
    case = Case(golden, "p06_bank_tau1", dtype)
    entries = [case.number(f"in.bank.class{k:02d}") for k in range(19)]
    length = torch.tensor([len(rows) for rows in entries])
    bank = torch.stack([F.pad(rows, (0, 0, 0, 8 - len(rows))) for rows in entries])
    case.check(mean_of(bank_losses(case.features, case.label, bank, length, case.temperature), case.label))


@pytest.mark.reference
@both
def test_the_regulariser_is_taken_away_and_adding_it_is_the_reference(dtype: torch.dtype, golden: Any) -> None:
    case = Case(golden, "p09_regulariser", dtype)
    mean, variance = case.number("in.mean"), case.number("in.var")
    for kind in ("proto", "dist"):
        losses = (
            mean_losses(case.features, case.label, mean, ALL, 1.0)
            if kind == "proto"
            else distribution_losses(case.features, case.label, mean, variance, ALL, 1.0)
        )
        value = mean_of(losses, case.label)
        penalty = uniformity(mean_of(case.features, case.label), mean, ALL, 1.0)
        case.check(value, f"{kind}_reg0.")
        case.check(value + penalty, f"{kind}_reg1.")
        case.check(value - penalty, f"{kind}_reg1.", "out64_consistent.")
        agree(case.bounds, "out64.", "regulariser", penalty, case.tensors)


@pytest.mark.reference
@both
def test_without_labels_all_are_zero_and_connected(dtype: torch.dtype, golden: Any) -> None:
    case = Case(golden, "p10_all_ignored", dtype)
    mean, variance = case.number("in.mean"), case.number("in.var")
    for losses in (
        mean_losses(case.features, case.label, mean, ALL, 1.0),
        distribution_losses(case.features, case.label, mean, variance, ALL, 1.0),
        bank_losses(case.features, case.label, mean[:, None], ALL.long(), 1.0),
    ):
        assert torch.equal(losses, torch.zeros_like(losses))
        case.check(mean_of(losses, case.label))


@pytest.mark.reference
@both
def test_weights_are_those_of_a_mean(dtype: torch.dtype, golden: Any) -> None:
    """The reference divides by the number of pixels; the consistent form by the sum of the weights."""
    case = Case(golden, "p11_pixel_weights", dtype)
    mean, variance = case.number("in.mean"), case.number("in.var")
    weight = case.number("in.pixel_weight").flatten()
    losses = mean_losses(case.features, case.label, mean, ALL, 1.0)
    case.check(mean_of(losses, case.label, weight=weight), "proto.", "out64_consistent.")
    losses = distribution_losses(case.features, case.label, mean, variance, ALL, 1.0)
    case.check(mean_of(losses, case.label, weight=weight), "dist.", "out64_consistent.")


@pytest.mark.reference
@both
def test_classes_never_met_are_no_rivals_and_their_pixels_do_not_count(dtype: torch.dtype, golden: Any) -> None:
    case = Case(golden, "p17_classes_never_seen", dtype)
    mean, variance, met = case.number("in.mean"), case.number("in.var"), case.tensors["in.count"] > 0
    losses = mean_losses(case.features, case.label, mean, met, 1.0)
    assert not losses[case.label == 15].any()
    case.check(mean_of(losses, case.label, met), "proto.", "out64_consistent.")
    losses = distribution_losses(case.features, case.label, mean, variance, met, 1.0)
    assert not losses[case.label == 15].any()
    case.check(mean_of(losses, case.label, met), "dist.", "out64_consistent.")


@pytest.mark.reference
@both
def test_spcl_as_the_reference(dtype: torch.dtype, golden: Any) -> None:
    tensors, description = golden("20_proto/p12_spcl_loss")
    prototypes = tensors["in.prototypes"].to(dtype)
    maps = {name: tensors[f"in.{name}_feats"].to(dtype).requires_grad_() for name in ("src", "tgt")}
    values = []
    for name, features in maps.items():
        label = tensors[f"in.{name}_labels"].flatten().long()
        values.append(mean_of(mean_losses(unit_rows(features), label, prototypes, ALL, 100.0), label))
    value = torch.stack(values).sum()
    value.backward()
    found = {"loss": value} | {f"grad_{name}_feats": features.grad for name, features in maps.items()}
    for key, actual in found.items():
        assert actual is not None
        agree(description["tolerance_demanded"]["bounds"], "out64.", key, actual, tensors)


def one_hot_problem(classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Every pixel at the unit vector of its class, which is the mean: features, labels, means."""
    label = torch.arange(classes).repeat(3)
    means = torch.eye(classes, dtype=torch.float64)
    return means[label].requires_grad_(), label, means


@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_the_value_in_closed_form(temperature: float) -> None:
    """One loss of all pixels, the same for means, for distributions without variance, and for banks of one mean."""
    features, label, means = one_hot_problem()
    met, once = torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.long)
    expected = -math.log(math.exp(1 / temperature) / (math.exp(1 / temperature) + 3))
    for losses in (
        mean_losses(features, label, means, met, temperature),
        distribution_losses(features, label, means, torch.zeros_like(means), met, temperature),
        bank_losses(features, label, means[:, None], once, temperature),
    ):
        torch.testing.assert_close(losses, torch.full_like(losses, expected), rtol=1e-12, atol=1e-12)


def test_at_the_papers_temperature_the_loss_of_features_without_negatives_hardly_varies() -> None:
    """SPCL and SePiCo divide by 100, so a loss over 19 classes lies near ln 19 whatever the features are."""
    means = torch.eye(19, dtype=torch.float64)
    right, wrong = (mean_losses(means[:1], torch.tensor([y]), means, ALL, 100.0) for y in (0, 1))
    assert math.log(math.exp(0.01) + 18) - 0.01 == pytest.approx(float(right), abs=1e-12)
    assert 2.9349 < right < math.log(19) < wrong < 2.9540


def test_banks_are_what_their_formula_says() -> None:
    """Loops over pixels, means and classes; banks of 0, 1, 3 and 2 means."""
    generator = torch.Generator().manual_seed(0)
    features, label = torch.randn(9, 5, generator=generator).double(), torch.tensor([0, 1, 2, 3, 2, 255, 1, 3, 0])
    bank, length = torch.randn(4, 3, 5, generator=generator).double(), torch.tensor([0, 1, 3, 2])
    bank[torch.arange(3) >= length[:, None]] = 0
    losses = bank_losses(features, label, bank, length, 0.7)
    for f, y, found in zip(features, label.tolist(), losses, strict=True):
        expected = 0.0
        if y in (1, 2, 3):
            rivals = [k for k in (1, 2, 3) if k != y]
            rest = sum(math.exp(float(bank[k, : length[k]].mean(0) @ f) / 0.7) for k in rivals)
            own = [math.exp(float(b @ f) / 0.7) for b in bank[y, : length[y]]]
            expected = -sum(math.log(e / (e + rest)) for e in own) / len(own)
        assert float(found) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_lonely_class_has_no_rivals() -> None:
    features, label, means = one_hot_problem()
    met = torch.tensor([False, True, False, False])
    for losses in (
        mean_losses(features, label, means, met, 1.0),
        bank_losses(features, label, means[:, None], met.long(), 1.0),
    ):
        assert torch.equal(losses, torch.zeros_like(losses))
        (gradient,) = torch.autograd.grad(losses.sum(), features)
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert uniformity(features[0], means, met, 1.0) == 0


def test_uniformity_is_largest_where_the_prediction_is_uniform() -> None:
    means = torch.eye(3, dtype=torch.float64)
    met = torch.ones(3, dtype=torch.bool)
    assert uniformity(torch.zeros(3, dtype=torch.float64), means, met, 1.0) == pytest.approx(-1, abs=1e-12)
    assert uniformity(means[0], means, met, 1.0) < -1
    two = torch.tensor([True, True, False])  # the third class is neither a rival nor counted
    assert uniformity(means[2], means, two, 1.0) == pytest.approx(-1, abs=1e-12)


def test_means_over_two_ranks_are_those_of_the_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weight = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 0, 0.5, 2])
    expected = weighted_mean(values, weight)
    assert expected == pytest.approx((1 + 1.5 + 8) / 3.5)
    assert weighted_mean(values, torch.zeros(4)) == 0
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda _: weight.sum())
    halves = [weighted_mean(values[part], weight[part]) for part in (slice(0, 2), slice(2, 4))]
    assert sum(halves) / 2 == pytest.approx(float(expected))


def test_bank_losses_do_not_read_rows_beyond_the_length() -> None:
    features, label = F.normalize(torch.tensor([[1.0, 0.5], [0.2, 1.0]]), dim=1), torch.tensor([0, 1])
    means, length = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.5, 0.5]]]), torch.tensor([1, 2])
    expected = bank_losses(features, label, means, length, 1.0)
    means[0, 1] = 7
    assert torch.equal(bank_losses(features, label, means, length, 1.0), expected)


def test_train_ids_beyond_the_classes_do_not_count() -> None:
    met = torch.ones(3, dtype=torch.bool)
    label = torch.tensor([0, 2, 3, 254, 255])
    assert is_counted(label, met).tolist() == [True, True, False, False, False]
    losses = mean_losses(torch.eye(5, 4), label, torch.eye(3, 4), met, 1.0)
    assert (losses > 0).tolist() == [True, True, False, False, False]
