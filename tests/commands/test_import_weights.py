"""The verb `import-weights`: published files become weights that compute the same, or nothing is written."""

import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from cluda_cli import presets
from cluda_cli.cli import app
from cluda_cli.data.labels import CITYSCAPES, ClassTable
from cluda_cli.files import sha256
from cluda_cli.inference.weights_file import load_weights
from cluda_cli.models.multires import build_segmenter
from cluda_cli.models.normalisation import IMAGENET
from cluda_cli.models.segmenter import Segmenter

State = dict[str, Tensor]
CPU = torch.device("cpu")
DECODER = ["model.encoder=mit_b0", "model.decoder.embed_dim=8", "model.decoder.channels=6"]
TINY = {
    "daformer": [*DECODER, "data.target_box=[64,96]"],
    "hrda": [*DECODER, "data.crop=[64,64]", "data.target_box=[64,96]", "evaluation.mode=whole"]
    + ["model.multires.attention_dim=4"],
}


def cluda(*arguments: object) -> object:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def imported(file: Path, preset: str, *options: object, extra: tuple[str, ...] = ()) -> object:
    sets = [part for setting in (*TINY[preset], *extra) for part in ("--set", setting)]
    return cluda("import-weights", file, "--preset", preset, *sets, *options)


def network_of(preset: str, extra: tuple[str, ...] = (), num_classes: int = 19) -> Segmenter:
    """Random, with statistics of batch norms that are not those of a fresh network."""
    settings = presets.load([preset], None, [*TINY[preset], *extra])
    torch.manual_seed(0)
    network = build_segmenter(settings.model, settings.data.crop, num_classes).eval()
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_()
    return network


def published(network: Segmenter, prefix: str = "model.") -> State:
    """The names of DAFormer, or with two resolutions of HRDA, without the counters of batch norms."""
    head = "decode_head.head." if hasattr(network, "scale_attention") else "decode_head."
    names = {"encoder.": "backbone.", "decoder.": head, "scale_attention.": "decode_head.scale_attention."}
    return {
        prefix + names[name.partition(".")[0] + "."] + name.partition(".")[2]: tensor
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def write(file: Path, state: State, names: Sequence[str] | None = ClassTable(CITYSCAPES).names) -> Path:
    """As mmcv 1 saves a run that keeps its best score, which numpy 1 wrote; `names` are those of its classes."""
    meta = {
        "env_info": "sys.platform: linux", "config": "seed = 1", "seed": 1, "exp_name": "hrda", "epoch": 1,
        "iter": 40000, "mmcv_version": "1.3.7", "time": "Tue Feb 15 00:20:56 2022", "CLASSES": names,
        "PALETTE": [[128, 64, 128]], "hook_msgs": {"best_score": np.float64(0.7379), "best_ckpt": "best_mIoU.pth"},
    }  # fmt: skip
    new = file.with_suffix(".new")
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 6e-05}]}}, new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(file, "w") as target:
        for item in source.infolist():
            target.writestr(item, source.read(item).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    new.unlink()
    return file


def logits_of(network: Segmenter) -> Tensor:
    with torch.inference_mode():
        return network(torch.linspace(-2, 2, 3 * 64 * 96).view(1, 3, 64, 96)).logits


@pytest.mark.parametrize("preset", ["daformer", "hrda"])
def test_imported_weights_compute_the_same(preset, tmp_path):
    network = network_of(preset)
    file = write(tmp_path / "iter_40000.pth", published(network) | {"imnet_model.backbone.norm1.bias": torch.zeros(32)})
    result = imported(file, preset)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'iter_40000.safetensors'}\n"
    assert "left out, not part of this network: 1 tensors imnet_model.*" in result.stderr
    deployed = load_weights(tmp_path / "iter_40000.safetensors", CPU)
    assert torch.equal(logits_of(deployed.network), logits_of(network))
    assert (deployed.network_name, len(deployed.classes), deployed.step) == ("student", 19, 0)
    assert deployed.seen == deployed.classes.names


@pytest.mark.parametrize("encoder", ["mobilenetv2_050", "test_resnet"])  # timm's own weights of the latter expect 0.5
def test_an_encoder_of_timm(encoder, tmp_path):
    extra = (f"model.encoder={encoder}",)
    network = network_of("daformer", extra)
    state = {name.replace("backbone.network.", "backbone."): t for name, t in published(network).items()}
    result = imported(write(tmp_path / "a.pth", state), "daformer", extra=extra)
    assert result.exit_code == 0, result.stderr
    deployed = load_weights(tmp_path / "a.safetensors", CPU)
    assert torch.equal(logits_of(deployed.network), logits_of(network))
    assert deployed.network.normalisation == IMAGENET


def test_the_best_score_is_written_as_numpy_1_writes_it(tmp_path):
    """Guards the test above: without permission, this file is refused."""
    file = write(tmp_path / "a.pth", {"x": torch.zeros(1)})
    unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    assert unsafe == {"numpy.core.multiarray.scalar", "numpy.dtype"}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


def test_predict_takes_imported_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("daformer.pth"), published(network_of("daformer")))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("street.png")
    assert imported(Path("daformer.pth"), "daformer").exit_code == 0
    result = cluda("predict", "street.png", "--ckpt", "daformer.safetensors", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    with Image.open("predictions/train-id/street.png") as image:
        assert image.size == (60, 40)


def test_student_or_teacher(tmp_path):
    student, teacher = network_of("daformer"), network_of("daformer")
    torch.nn.init.zeros_(teacher.decoder.conv_seg.weight)
    file = write(tmp_path / "a.pth", published(student) | published(teacher, "ema_model."))
    for name, network in {"student": student, "teacher": teacher}.items():
        out = tmp_path / f"{name}.safetensors"
        assert imported(file, "daformer", "--network", name, "--out", out).exit_code == 0
        deployed = load_weights(out, CPU)
        assert deployed.network_name == name
        assert torch.equal(logits_of(deployed.network), logits_of(network))
    wrong = imported(file, "daformer", "--network", "mean")
    assert (wrong.exit_code, wrong.stderr.splitlines()[0]) == (
        2,
        'error: --network: "mean" is neither student nor teacher',
    )


def test_halves_in_safetensors_of_a_plain_network(tmp_path):
    network = network_of("daformer")
    halves = {name: tensor.half() for name, tensor in published(network, "").items()}
    save_file(halves, tmp_path / "plain.safetensors")
    assert imported(tmp_path / "plain.safetensors", "daformer").exit_code == 2  # would replace the file itself
    assert imported(tmp_path / "plain.safetensors", "daformer", "--overwrite").exit_code == 2
    result = imported(tmp_path / "plain.safetensors", "daformer", "--out", tmp_path / "ours.safetensors")
    assert result.exit_code == 0, result.stderr
    weight = load_weights(tmp_path / "ours.safetensors", CPU).network.decoder.conv_seg.weight
    assert torch.equal(weight, network.decoder.conv_seg.weight.half().float())


def test_every_difference_is_listed_and_nothing_written(tmp_path):
    state = published(network_of("daformer"))
    missing = [name for name in state if "block2" in name]
    for name in missing:
        state[name.replace("block2", "blocks2")] = state.pop(name)
    state["model.decode_head.conv_seg.bias"] = torch.zeros(18)
    state["model.decode_head.fuse_layer.bottleneck.bn.running_var"] = torch.zeros(1)
    state["model.neck.weight"] = torch.zeros(2)
    file = write(tmp_path / "a.pth", state)
    result = imported(file, "daformer")
    assert result.exit_code == 3
    lines = result.stderr.splitlines()
    assert lines[0] == (
        f"error: {file}: {len(missing)} missing in the file, {len(missing) + 1} unknown to the network, "
        "2 of another shape: these tensors do not fit the network of the settings"
    )
    encoder = [name.replace("model.backbone.", "encoder.") for name in missing]
    assert {f"  {name}" for name in encoder} < set(lines)
    assert {f"  {name.replace('block2', 'blocks2')}" for name in encoder} < set(lines)
    assert "  neck.weight" in lines
    assert "  decoder.conv_seg.bias: [18] in the file, [19] in the network" in lines
    assert len(lines) == 1 + 3 + 2 * len(missing) + 1 + 2 + 1
    assert list(tmp_path.iterdir()) == [file]


TWO_RESOLUTIONS = "--set model.multires=true --set model.multires.attention_dim=4"


@pytest.mark.parametrize(
    ("file_preset", "file_extra", "preset", "extra", "remedy"),
    [
        ("daformer", ("model.decoder.embed_dim=16",), "daformer", (), "add --set model.decoder.embed_dim=16"),
        ("daformer", (), "hrda", (), "add --set model.multires=false"),
        ("hrda", (), "daformer", (), f"add {TWO_RESOLUTIONS}, or take --preset hrda"),
        ("daformer", (), "daformer", ("model.encoder=mit_b1",), "add --set model.encoder=mit_b0"),
        ("daformer", ("model.decoder.dilations=[]",), "daformer", (), "add --set model.decoder.dilations=[]"),
        ("daformer", (), "daformer", ("model.decoder.dilations=[]",), "add --set model.decoder.dilations=[1,6,12,18]"),
    ],
)  # fmt: skip
def test_the_remedy_imports(file_preset, file_extra, preset, extra, remedy, tmp_path):
    file = write(tmp_path / "a.pth", published(network_of(file_preset, file_extra)))
    result = imported(file, preset, extra=extra)
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1].strip() == remedy
    named = [part for part in remedy.partition(", or")[0].split() if "=" in part]
    again = imported(file, preset, extra=(*extra, *named))
    assert again.exit_code == 0, again.stderr


def test_the_released_cluda_network(tmp_path):
    """Wider embeddings, a weighter that belongs to the loss, and late blending, which no tensor shows."""
    network = network_of("hrda", ("model.decoder.embed_dim=16", "model.multires.blend_late=true"))
    state = published(network) | {"model.decode_head.feat_weighter.conv_seg.bias": torch.zeros(1)}
    file = write(tmp_path / "a.pth", state)
    result = imported(file, "hrda")
    remedy = "  add --set model.decoder.embed_dim=16 --set model.multires.blend_late=true"
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (3, remedy)
    narrow = imported(file, "hrda", extra=("model.decoder.embed_dim=16",))
    assert narrow.exit_code == 3
    assert narrow.stderr.splitlines() == [
        f"error: {file}: all tensors fit, but this network computes otherwise than the settings say",
        "  add --set model.multires.blend_late=true",
    ]
    assert imported(file, "hrda", extra=tuple(remedy.split()[2::2])).exit_code == 0
    assert torch.equal(logits_of(load_weights(tmp_path / "a.safetensors", CPU).network), logits_of(network))


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = published(network_of("daformer"))
    torch.save({"state_dict": state, "meta": {"x": Malicious()}}, "bad.pth")
    result = imported(Path("bad.pth"), "daformer")
    assert result.exit_code == 3
    assert result.stderr.startswith("error: bad.pth: holds more than tensors: getattr; pickled code is never run\n")
    assert len(result.stderr.splitlines()) == 2
    assert not Path("executed").exists() and not Path("bad.safetensors").exists()


def test_weights_are_not_replaced_unasked(tmp_path):
    file = write(tmp_path / "a.pth", published(network_of("daformer")))
    taken = tmp_path / "a.safetensors"
    taken.write_text("precious")
    result = imported(file, "daformer")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (2, f"error: {taken}: exists")
    assert taken.read_text() == "precious"
    (tmp_path / ".cluda-abcd1234.tmp.safetensors").touch()  # of a killed call
    assert imported(file, "daformer", "--overwrite").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "a.safetensors"}
    assert load_weights(taken, CPU).network_name == "student"


def test_json(tmp_path):
    file = write(tmp_path / "a.pth", published(network_of("daformer")) | {"ema_model.backbone.x": torch.zeros(1)})
    result = imported(file, "daformer", "--preset", "synthia", "--json")
    assert result.stderr == ""
    described = json.loads(result.stdout)
    assert described["weights"] == str(tmp_path / "a.safetensors")
    assert (described["origin"], described["sha256"]) == (str(file), sha256(file))
    assert described["left_out"] == {"ema_model.*": 1}
    assert described["unseen"] == ["terrain", "truck", "train"]
    network = network_of("daformer")
    assert described["parameters"] == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("preset", ["daformer", "hrda"])
def test_classes_in_another_order_are_put_into_that_of_the_source(preset, tmp_path):
    network, names = network_of(preset), list(ClassTable(CITYSCAPES).names)
    for classifier in network.classifiers().values():  # their biases begin as zeros
        torch.nn.init.normal_(classifier.bias)
    turned = [*names[7:], *names[:7]]
    result = imported(write(tmp_path / "a.pth", published(network), turned), preset)
    assert result.exit_code == 0, result.stderr
    assert "another order" in result.stderr
    deployed = load_weights(tmp_path / "a.safetensors", CPU)
    rows = [turned.index(name) for name in deployed.classes.names]
    torch.testing.assert_close(logits_of(deployed.network), logits_of(network)[:, rows], rtol=1e-5, atol=1e-5)


def test_classes_of_another_set_are_named_and_nothing_written(tmp_path):
    names = ["lane" if name == "road" else name for name in ClassTable(CITYSCAPES).names]
    file = write(tmp_path / "a.pth", published(network_of("daformer")), names)
    result = imported(file, "daformer")
    assert result.exit_code == 3
    assert result.stderr.splitlines() == [
        f"error: {file}: its classes are others than those of data.source: lane of the file alone; "
        "road of data.source alone",
        "  set data.source to a prepared dataset with the classes of the file",
    ]
    assert list(tmp_path.iterdir()) == [file]


def test_weights_of_a_run_are_not_imported_again(tmp_path):
    assert imported(write(tmp_path / "a.pth", published(network_of("daformer"))), "daformer").exit_code == 0
    again = imported(tmp_path / "a.safetensors", "daformer", "--out", tmp_path / "b.safetensors")
    assert (again.exit_code, "weights of cluda already" in again.stderr) == (3, True)


def test_classes_are_those_of_the_source(tiny_data, tmp_path):
    file = write(tmp_path / "a.pth", published(network_of("daformer", num_classes=5)), None)
    result = imported(file, "daformer")
    assert result.exit_code == 3
    assert result.stderr.startswith(f"error: {file}: the network tells 5 classes apart, gta has 19\n")
    unprepared = imported(file, "daformer", extra=(f"data.root={tiny_data}", "data.source=mycity"))
    assert (unprepared.exit_code, "is not prepared" in unprepared.stderr) == (3, True)
    own = imported(file, "daformer", extra=(f"data.root={tiny_data}", "data.source=clean"))
    assert own.exit_code == 0, own.stderr
    assert load_weights(tmp_path / "a.safetensors", CPU).classes.names == ("road", "building", "sky", "person", "car")


def test_a_file_that_is_no_segmentation_network(tmp_path):
    save_file({"patch_embed1.proj.weight": torch.zeros(2)}, tmp_path / "mit.safetensors")
    result = imported(tmp_path / "mit.safetensors", "daformer", "--out", tmp_path / "out.safetensors")
    assert (result.exit_code, "no network with backbone.*" in result.stderr) == (3, True)
    nothing = imported(tmp_path / "none.pth", "daformer")
    assert (nothing.exit_code, nothing.stderr.splitlines()[0]) == (3, f"error: {tmp_path / 'none.pth'}: no such file")


@pytest.mark.reference
def test_hrda_computes_what_the_reference_does(golden, tmp_path):
    """From the tensors of a reference network to the logits of its own implementation."""
    encoder, head = golden("03_mit/mit_b0_weights")[0], golden("05_hrda/hrda_head_weights")[0]
    vectors, description = golden("05_hrda/hrda_inference")
    state = {name.replace("param.", "model.backbone."): tensor for name, tensor in encoder.items()}
    state |= {name.replace("param.", "model."): tensor for name, tensor in head.items()}
    file = write(tmp_path / "hrda.pth", state)
    sets = ["model.encoder=mit_b0", "model.decoder.embed_dim=32", "model.decoder.channels=32", "data.crop=[128,128]"]
    result = cluda("import-weights", file, "--preset", "hrda", *(part for s in sets for part in ("--set", s)))
    assert result.exit_code == 0, result.stderr
    network = load_weights(tmp_path / "hrda.safetensors", CPU).network
    bounds = description["tolerance_demanded"]["bounds"]["a.fused_logits_quarter"]
    for dtype, kind in ((torch.float32, "float32_max_abs"), (torch.float64, "float64_max_abs")):
        with torch.inference_mode():
            logits = network.to(dtype)(vectors["in.image_a"].to(dtype)).logits
        assert (logits - vectors["out64.a.fused_logits_quarter"]).abs().max() <= bounds[kind]
