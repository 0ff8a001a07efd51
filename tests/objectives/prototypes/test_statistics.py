"""Running statistics are those of all that was seen, on one device and on two."""

import runpy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.objectives.prototype_contrast import leave_out_wrong, to_rows
from cluda_cli.objectives.prototypes.statistics import Bank, BatchStatistics, Running, batch_statistics

WORKER = Path(__file__).with_name("two_processes.py")
TIMEOUT = 600  # seconds, for machines with much else to do
UPDATES = 1000
both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def assert_within(bound: dict[str, float], actual: Tensor, expected: Tensor) -> None:
    limit = bound["float64_max_abs" if actual.dtype == torch.float64 else "float32_max_abs"]
    assert (actual - expected).abs().max() <= limit


def unit_rows(maps: Tensor) -> Tensor:
    return to_rows(F.normalize(maps, dim=1))


@pytest.mark.reference
@both
def test_updates_as_the_reference(dtype: torch.dtype, golden: Any) -> None:
    """Statistics after each update, and the bank at the end; the reference's bank begins with a vector of zeros."""
    tensors, description = golden("20_proto/p01_statistics_4_updates")
    bounds = description["tolerance_demanded"]["bounds"]
    running, bank = Running(19, 16).to(dtype), Bank(19, 16, 3).to(dtype)
    for step in range(4):
        features = F.normalize(tensors[f"in.step{step}.features"].to(dtype), dim=1)
        batch = batch_statistics(features, tensors[f"in.step{step}.labels"].long(), 19)
        running.update(batch)
        bank.update(batch)
        for name, actual in (("mean", running.mean), ("var", running.variance)):
            assert_within(bounds[f"step{step}.{name}"], actual, tensors[f"out64.step{step}.{name}"])
        assert torch.equal(running.count, tensors[f"out64.step{step}.count"].long())
    for k in range(19):
        expected = tensors[f"out64.bank.class{k:02d}"]  # the oldest first
        zeros = int((expected == 0).all(dim=1).sum())
        length, first = int(bank.length[k]), max(int(bank.count[k]) - 3, 0) % 3
        assert length == len(expected) - zeros
        found = bank.means[k, :length].roll(-first, dims=0)
        assert length == 0 or assert_within(bounds[f"bank.class{k:02d}"], found, expected[zeros:]) is None


@pytest.mark.reference
@both
def test_moving_averages_as_the_reference(dtype: torch.dtype, golden: Any) -> None:
    """SPCL keeps a tenth, of pixels that are predicted right; the consistent form leaves absent classes alone."""
    tensors, description = golden("20_proto/p13_spcl_prototype_ema")
    bounds = description["tolerance_demanded"]["bounds"]
    running = Running(19, 16, momentum=0.1).to(dtype)
    running.mean.copy_(tensors["in.prototypes0"])
    running.count += 1
    for step in range(3):
        label = leave_out_wrong(tensors[f"in.step{step}.labels"].long(), tensors[f"in.step{step}.logits"])
        assert torch.equal(label, tensors[f"out.step{step}.mask"].long())
        features = unit_rows(tensors[f"in.step{step}.feats"].to(dtype))
        running.update(batch_statistics(features, label.flatten(), 19))
        expected = tensors[f"out64_consistent.step{step}.prototypes"]
        assert_within(bounds[f"consistent.step{step}.prototypes"], running.mean, expected)


@pytest.mark.reference
@both
def test_a_bank_has_the_mean_over_images_of_the_reference(dtype: torch.dtype, golden: Any) -> None:
    tensors, description = golden("20_proto/p16_spcl_initial_prototypes")
    bank = Bank(19, 16, 4).to(dtype)
    for i in range(4):
        label = tensors[f"in.image{i}.labels"][:, ::4, ::4].long()
        label = leave_out_wrong(label, tensors[f"in.image{i}.logits"])
        features = unit_rows(tensors[f"in.image{i}.feats"].to(dtype))
        bank.update(batch_statistics(features, label.flatten(), 19))
    bounds = description["tolerance_demanded"]["bounds"]
    assert_within(bounds["prototypes"], bank.mean, tensors["out64.prototypes"])
    assert torch.equal(bank.count, tensors["out.images_per_class"])


def test_streaming_equals_pooling_after_a_thousand_updates_on_two_devices(
    tmp_path: Path, start_forked: Callable[..., Any]
) -> None:
    worker = runpy.run_path(str(WORKER))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    processes = [start_forked(WORKER, tmp_path, UPDATES, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    said = [process.communicate(TIMEOUT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    batches = [worker["draw"](update) for update in range(UPDATES)]
    features, label = (torch.cat(rows) for rows in zip(*batches, strict=True))
    for train_id in range(worker["CLASSES"]):
        own = features[label == train_id]
        assert one["count"][train_id] == len(own)
        assert (len(own) > 0) == (train_id > 0)
        mean = own.sum(dim=0) / max(len(own), 1)
        variance = (own - mean).square().sum(dim=0) / max(len(own), 1)
        for name, pooled in (("mean", mean), ("variance", variance)):
            assert torch.equal(one[name][train_id], other[name][train_id])
            assert (one[name][train_id] - pooled).abs().max() <= 1e-12


def statistics(count: int, mean: float, variance: float) -> BatchStatistics:
    """Of two classes, of which the second is absent."""
    return BatchStatistics(torch.tensor([count, 0]), torch.tensor([[mean], [0.0]]), torch.tensor([[variance], [0.0]]))


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_a_batch_without_a_class_leaves_it_alone(momentum: float | None) -> None:
    running = Running(2, 1, momentum)
    running.update(BatchStatistics(torch.tensor([3, 4]), torch.tensor([[0.1], [0.3]]), torch.tensor([[0.7], [0.2]])))
    before = {name: buffer.clone() for name, buffer in running.named_buffers()}
    running.update(statistics(5, 0.9, 0.4))
    for name, buffer in running.named_buffers():
        assert torch.equal(buffer[1], before[name][1])
        assert not torch.equal(buffer[0], before[name][0])


def test_a_moving_average_begins_with_its_first_batch_and_keeps_the_momentum_later() -> None:
    running, expected = Running(2, 1, momentum=0.75), 0.0
    for batches, mean in enumerate((4.0, 8.0, 0.0, 2.0, 6.0)):
        running.update(statistics(100 * (batches + 1), mean, 0.0))  # pixels do not count
        keep = 0.75 if batches else 0
        expected = keep * expected + (1 - keep) * mean
        assert running.mean[0, 0] == pytest.approx(expected)
    assert running.met.tolist() == [True, False]


def test_the_variance_of_an_average_includes_that_of_the_means() -> None:
    running = Running(2, 1, momentum=0.5)
    running.update(statistics(10, 0.0, 1.0))
    running.update(statistics(1000, 2.0, 3.0))
    assert running.variance[0, 0] == pytest.approx(0.5 * 1 + 0.5 * 3 + 0.25 * 4)


def test_a_bank_holds_the_latest_means_and_averages_what_it_holds() -> None:
    bank = Bank(2, 1, length=3)
    for i, mean in enumerate((1.0, 2.0, 3.0, 4.0)):
        bank.update(statistics(i + 1, mean, 0.0))
        held = [1.0, 2.0, 3.0, 4.0][max(i - 2, 0) : i + 1]
        assert sorted(bank.means[0, : bank.length[0], 0].tolist()) == held
        assert bank.mean[0, 0] == pytest.approx(sum(held) / len(held))
    assert bank.length.tolist() == [3, 0]
    assert bank.met.tolist() == [True, False]
    assert not bank.means[1].any()


@pytest.mark.parametrize("momentum", [0.1, 0.999])
def test_a_mean_that_was_given_moves_by_one_less_the_momentum(momentum: float) -> None:
    running = Running(2, 1, momentum)
    running.mean.fill_(2)
    running.count += 1
    running.update(statistics(5, mean=4, variance=0))
    assert running.mean[0].item() == pytest.approx(2 * momentum + 4 * (1 - momentum), rel=1e-6)
    assert running.mean[1].item() == 2


def test_the_first_batch_sets_the_mean_and_the_second_moves_it() -> None:
    running = Running(2, 1, 0.999)
    running.update(statistics(5, mean=2, variance=0))
    assert running.mean[0].item() == 2
    running.update(statistics(5, mean=4, variance=0))
    assert running.mean[0].item() == pytest.approx(2.002, rel=1e-6)


def test_rows_beyond_the_length_of_a_bank_are_not_read() -> None:
    bank = Bank(2, 1, 3)
    bank.update(statistics(5, mean=2, variance=0))
    bank.means[:, 1:] = torch.nan
    bank.means[1] = torch.nan
    assert bank.mean.tolist() == [[2], [0]]
