"""The plan counts live bytes as one does by hand, and alike on fake and on real tensors."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cluda_cli import presets
from cluda_cli.models.mit import VARIANTS, Variant
from cluda_cli.objectives import pixel_contrast

SCRIPT = Path(__file__).with_name("bench_memory.py")
SMALL = (
    "model.encoder=mit_b0", "model.decoder.embed_dim=16", "model.decoder.channels=16", "model.multires.attention_dim=8",
    "objectives.pixel_contrast.weighter_dim=8", "data.crop=[256,256]", "data.target_box=[256,256]",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake operations take as long as small real ones, so their number counts."""
    monkeypatch.setitem(VARIANTS, "mit_b0", Variant(VARIANTS["mit_b0"].channels, (1, 1, 1, 1)))


def small(*overrides):
    return presets.load(["hrda-cluda"], overrides=[*SMALL, *overrides])


def test_a_storage_counts_once_from_its_making_to_its_end(bench):
    with bench.LiveBytes() as live:
        tensors = {"one": torch.zeros(256)}
        tensors["view"] = tensors["one"].view(16, 16)[2:]
        assert live.live == 1024
        tensors["one"].add_(1)
        assert live.live == 1024
        tensors["two"] = tensors["one"] * 2
        assert live.live == 2048
        tensors.pop("one")
        assert live.live == 2048  # the view holds it
        tensors.pop("view")
        assert live.live == 1024
        assert live.take_peak() == 2048
        assert live.take_peak() == 1024


def test_what_only_a_graph_holds_counts_until_the_backward(bench):
    with bench.LiveBytes() as live:
        x = torch.zeros(256, requires_grad=True)
        total = x.exp().sum()  # the graph holds the exponentials
        assert live.live == 1024 + 1024 + 4
        total.backward()
        # The gradient of the total is one number, expanded without memory; that of x is a tensor of its own.
        assert live.peak == 1024 + 1024 + 4 + 4 + 1024
        assert live.live == 1024 + 4 + 1024


def test_fake_and_real_steps_have_the_same_peaks_and_levers_lower_them(bench):
    plain, pulled = (bench.fake_peaks(small(*overrides), contrast=0) for overrides in ((), bench.LEVERS["both"]))
    live, resident = bench.real_peaks(small(*bench.LEVERS["both"]))
    assert list(live) == ["at rest", "make source", "source", "make mixed", "mixed"]
    # Real constants of the modules, such as the mean colour, are counted at their first use.
    assert {part: pulled[part] for part in live} == pytest.approx(live, abs=100)
    assert resident["at rest"] == 0

    rest = plain["at rest"]
    assert rest == pulled["at rest"]
    for view in ("source", "mixed"):
        assert pulled[view] - rest < 0.6 * (plain[view] - rest)
    for part in ("make mixed", "validation"):  # no gradient, whole batch
        assert pulled[part] == plain[part]


def test_bfloat16_follows_the_rules_of_a_gpu(bench):
    features, weight = torch.zeros(1, 4, 4, 4), torch.zeros(4, 4, 1, 1)
    with bench._without_values(small("training.precision=bfloat16"), contrast=0), bench.step._precision(None):
        features = F.conv2d(features, weight)
        assert features.dtype == torch.bfloat16
        assert F.interpolate(features, scale_factor=2.0).dtype == torch.float32
        assert F.layer_norm(features, (4,), torch.ones(4)).dtype == torch.float32
        assert F.gelu(features).dtype == torch.bfloat16


def test_a_block_takes_the_place_of_the_contrast(bench):
    with bench.FakeTensorMode(), bench.LiveBytes() as live, bench._without_values(small(), contrast=2**40):
        features = torch.zeros(4, 2, requires_grad=True)
        value = pixel_contrast.tiled_contrast(features, torch.zeros(4), torch.zeros(4), temperature=1.0)
        assert 2**40 < live.take_peak() < 2**40 + 1000
        value.backward()
        assert live.live < 1000
    assert features.grad.shape == features.shape


@pytest.mark.parametrize("argument", [None, "--real"])
def test_the_table_is_printed(bench, argument, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    peaks = {"at rest": 2**30, "source": 3 * 2**30}
    child = SimpleNamespace(stdout=json.dumps([peaks, {"at rest": 0, "source": 5 * 2**29}]))
    monkeypatch.setattr(bench, "fake_peaks", lambda settings, contrast: peaks)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: child)
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", *([argument] if argument else [])])
    bench.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in (("fake", "process", "2.50") if argument else bench.LEVERS))
    assert "3.00" in printed
