"""Two processes compute what one computes with the joint batch."""

import copy
import errno
import json
import pickle
import runpy
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluda_cli import presets
from cluda_cli.commands.train import train
from cluda_cli.data.index import find
from cluda_cli.distributed import collectives
from cluda_cli.distributed.place import Place
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.inference.weights_file import NetworkDescription, save_weights
from cluda_cli.models.encoders import build_encoder
from cluda_cli.models.mit import VARIANTS
from cluda_cli.models.multires import build_segmenter
from cluda_cli.models.segmenter import Segmenter

WORKER = Path(__file__).parent / "two_processes.py"
TIMEOUT = 600  # seconds, for machines with much else to do
SECOND_OF_TWO = Place(rank=1, local_rank=1, world_size=2, prints=False)


def changed(settings, tree):
    return presets.validate(presets.merge(settings.model_dump(mode="json"), tree))


# No batch norms, because torch does not synchronise them on CPUs, and no dropout, whose masks depend on the rank.
CLUDA = {
    "data": {"batch_size": 4, "crop": [64, 64]},
    "model": {"encoder": "mit_b0", "deeplab": {}, "drop_path": 0.0},
    "teacher": {"confidence": 0.21},
    "optimizer": {"warmup": 0},
    "mixing": {"jitter_probability": 1.0, "blur_probability": 1.0},
    "masking": {"block": 16, "importance": "rarity", "ratio": 0.4},
    "objectives": {
        "source": {"hard_pixels": {}},
        "anchor_contrast": {"projection_dim": 8, "anchors": 3, "max_anchors": 40, "min_probability": 0.2},
        "memory_contrast": {
            "start": 0,
            "projection_channels": 8,
            "memory": 9,
            "anchors": 20,
            "hardest": 4,
            "pushed": 3,
        },
        "clustering": {"threshold": 0.2, "top": 2, "ramp_steps": 2},
        "prototype_contrast": {
            "start": 0,
            "projection_channels": 8,
            "temperature": 1.0,
            "label_share": 0.3,
            "uniformity_weight": 0.5,
        },
        "node_contrast": {"projection_channels": 8, "nodes": 20},
    },
}
FEW = {
    "data": {"source": False, "target": "clean", "labelled": 4},
    "objectives": {
        "adaptive_balance": {
            "cutmix": True, "copy_paste": True, "slots": 6, "image_area": 1e-3, "box_area": 0.0,
            "paste_probability": 1.0,
        },
    },
}  # fmt: skip
MIC = {
    "data": {"batch_size": 2, "crop": [128, 128], "target": "clean", "labelled": 2},
    "model": {"multires": {}},
    "mixing": {"uncertain_detail_from": 1},
    "masking": {"block": 16, "with_source": True},
    "objectives": {
        "masked": {},
        "feature_distance": False,
        "pixel_contrast": {"size": 7, "weighter_dim": 8},
        "anchor_contrast": False,  # 2 x 2 cells hold no two anchors of a class
        "memory_contrast": False,
        "clustering": False,
        "prototype_contrast": {"statistics": "bank", "statistics_from": "student", "target_view": "strong target"},
        "node_contrast": False,
    },
}

VIEWS = {
    # Images so large that the last map, which the head of DeepLab reads, has cells apart from each other.
    "data": {"crop": [96, 96], "source_box": [96, 160], "target_box": [96, 160]},
    "mixing": {"tail": {"share": 1.0}},  # no class of the tiny data is rare
    "objectives": {
        "source": {"hard_pixels": False}, "feature_distance": False, "pixel_contrast": False, "anchor_contrast": False,
        "memory_contrast": False, "clustering": False, "prototype_contrast": False, "node_contrast": False,
        "zero_style": {"band": 1},
        "locally_adaptive": {"window": 5, "stride": 2},
        "global_contrast": {"parts": 2, "projection_channels": 8},
        "local_contrast": {"region": 1, "projection_channels": 8},
        "semantic_negatives": {"max_share": 0.9, "learned_weights": True},
    },
}  # fmt: skip


DISTILLATION = {
    "objectives": {
        "mixed": False,
        "distilled": {},
        "relation_distillation": {"relations": "prototypes", "samples": 24, "prototypes": 6},
    },
}


def with_teacher(settings, path):
    """The settings with a frozen teacher of random weights."""
    classes = find("clean", settings.data.root).classes
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = build_segmenter(settings.model, settings.data.crop, len(classes))
    described = NetworkDescription(settings=settings, classes=classes, seen=(), network_name="student", step=0)
    save_weights(path, network.state_dict(), described)
    return changed(settings, {"model": {"teacher": str(path)}})


def with_biases(settings, path):
    """The settings with encoder weights whose biases are not 0: layer norms of what is 0 would magnify rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = build_encoder(settings.model).state_dict()
        for name, tensor in tensors.items():
            if name.endswith("bias"):
                tensor.normal_(std=0.3)
    save_file(tensors, path)
    return changed(settings, {"model": {"weights": str(path)}})


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tiny_settings, tmp_path, monkeypatch, start_forked):
    """Terms, gradients, parameters, buffers, teacher, moments and scores, replicated and sharded.

    The scores are those of the first process's running statistics, which are the ones that a run saves.
    """
    worker = runpy.run_path(str(WORKER))
    monkeypatch.setitem(VARIANTS, "mit_b0", worker["NARROW"])
    cluda = with_biases(changed(tiny_settings, CLUDA), tmp_path / "biased.safetensors")
    few = changed(cluda, FEW)
    distilled = with_teacher(changed(cluda, DISTILLATION), tmp_path / "teacher.safetensors")
    cases = {"cluda": cluda, "mic": changed(cluda, MIC), "views": changed(cluda, VIEWS), "distilled": distilled}
    cases["few"] = few
    for name, settings in cases.items():
        (tmp_path / f"{name}.json").write_text(settings.model_dump_json())
        sharded = changed(settings, {"training": {"shard": True}})
        (tmp_path / f"{name}-sharded.json").write_text(sharded.model_dump_json())
    runs = [f"{name}{kind}" for name in cases for kind in ("", "-sharded")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    processes = [start_forked(WORKER, tmp_path, *runs, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    said = [process.communicate(TIMEOUT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for name, settings in cases.items():
        expected = worker["outcome"](settings)
        assert all(value > 0 for value in expected["terms 1"].values())
        for run in (name, f"{name}-sharded"):
            for rank in range(2):
                found = torch.load(tmp_path / f"{run}-{rank}.pt", weights_only=True)
                assert expected.keys() - found.keys() <= {"confusion"}
                assert ("confusion" in found) == (run == name)
                for part, tensors in found.items():
                    assert expected[part].keys() == tensors.keys()
                    for key, tensor in tensors.items():
                        where = f"{run}, rank {rank}, {part}: {key}"
                        torch.testing.assert_close(tensor, expected[part][key], rtol=1e-8, atol=1e-8, msg=where)


def test_images_are_shared_out_evenly_or_not_at_all(monkeypatch):
    monkeypatch.setattr(collectives, "_place", SECOND_OF_TWO)
    assert collectives.local_positions(4) == range(2, 4)
    with pytest.raises(SettingsError, match=r"data\.batch_size: 3 images per domain .* -> give a multiple of 2"):
        collectives.local_positions(3)
    with pytest.raises(SettingsError, match='"cuda:1" is one device'):
        collectives.local_device("cuda:1")


@pytest.fixture
def fail_on_rank_1(monkeypatch):
    """Enter `fail_together` as rank 1 of 2 and raise `own` there, while rank 0 raises `other`."""

    def fail(own, other):
        def gather(copies, mine):
            sent = [other and collectives._copy_for_other_ranks(other), mine]
            copies[:] = pickle.loads(pickle.dumps(sent))

        monkeypatch.setattr(collectives, "_place", SECOND_OF_TWO)
        monkeypatch.setattr(collectives, "any_rank", lambda failed: failed or other is not None)
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        with collectives.fail_together():
            if own:
                raise own

    return fail


@pytest.mark.parametrize(
    "error",
    [
        DataError("cannot be read", "a.png", "copy it again"),
        OSError(errno.ENOSPC, "No space left on device", "a.png"),
        torch.OutOfMemoryError("CUDA out of memory"),
        KeyError("a"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_all_ranks_raise_the_error_of_one(fail_on_rank_1, error):
    with pytest.raises(type(error)) as caught:
        fail_on_rank_1(None, error)
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert vars(caught.value).items() >= vars(error).items()
    assert any("raised by rank" in note for note in caught.value.__notes__)


def test_the_rank_that_failed_raises_its_own_error_and_of_two_the_lower_rank_decides(fail_on_rank_1):
    own = OSError("mine")
    with pytest.raises(OSError, match="mine") as caught:
        fail_on_rank_1(own, None)
    assert caught.value is own
    with pytest.raises(DataError, match="theirs"):
        fail_on_rank_1(own, DataError("theirs"))
    fail_on_rank_1(None, None)


def test_an_error_that_cannot_be_sent_keeps_its_text(fail_on_rank_1):
    class FussyError(Exception):
        def __init__(self, code, text):
            super().__init__(f"{code}: {text}")

    with pytest.raises(RuntimeError, match="7: odd"):
        fail_on_rank_1(None, FussyError(7, "odd"))


def test_one_process_needs_no_others(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("looked for others"))
    train(changed(tiny_settings, {"training": {"steps": 1, "shard": True}}), tmp_path / "x")
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["devices"] == 1


def batch_norms(network):
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def logits(network, image, training):
    """Of copies, so that all calls find the same running statistics."""
    torch.manual_seed(0)  # for dropout
    return copy.deepcopy(network).train(training)(image).logits


def test_batch_norms_are_synchronised_on_gpus_of_several_processes(tiny_settings, monkeypatch):
    """The encoder has timm's norms with activations. Without a process group a synchronised norm is an ordinary one."""
    network = Segmenter(tiny_settings.model, 5)
    before, parameters = copy.deepcopy(network), dict(network.named_parameters())
    for place, device in ((collectives.ALONE, "cuda"), (SECOND_OF_TWO, "cpu")):
        monkeypatch.setattr(collectives, "_place", place)
        collectives.convert_batch_norms(network, torch.device(device))
        assert not any(isinstance(norm, nn.SyncBatchNorm) for norm in batch_norms(network))
    collectives.convert_batch_norms(network, torch.device("cuda"))
    assert network.state_dict().keys() == before.state_dict().keys()
    assert {type(norm) for norm in batch_norms(network)} == {nn.SyncBatchNorm, SyncBatchNormAct}
    assert len(batch_norms(network)) == len(batch_norms(before))
    assert all(parameters[name] is parameter for name, parameter in network.named_parameters())
    copied, image = copy.deepcopy(network), torch.randn(2, 3, 64, 64)  # the teacher is such a copy
    for mode in (True, False):
        assert torch.equal(logits(network, image, mode), logits(before, image, mode))
        assert torch.equal(logits(copied, image, mode), logits(before, image, mode))
