"""Published checkpoints under our names: every layout, and what a file tells of the settings."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluda_cli.errors import DataError
from cluda_cli.models.decoders import DAFormerDecoder
from cluda_cli.models.multires import build_segmenter
from cluda_cli.models.published.checkpoints import (
    Published,
    class_count,
    listed_classes,
    match_classes,
    one_network,
    other_settings,
)
from cluda_cli.settings import Decoder, DeepLabV2, Model, MultiResolution

State = dict[str, Tensor]
B0 = (32, 64, 160, 256)
FILE = Path("file.pth")
SMALL = Decoder(embed_dim=8, channels=6)
DAFORMER = Model(encoder="mit_b0", decoder=SMALL)
HRDA = DAFORMER.model_copy(update={"multires": MultiResolution(attention_dim=4)})
DEEPLAB = Model(encoder="resnet50c", output_stride=8, deeplab=DeepLabV2())


def state_of(model: Model, num_classes: int = 19) -> State:
    """Names and shapes of a network, the values all different."""
    with torch.device("meta"):
        shapes = build_segmenter(model, (64, 64), num_classes).state_dict()
    return {name: torch.full(tensor.shape, float(i)) for i, (name, tensor) in enumerate(shapes.items())}


def published_names(state: State, multires: bool) -> State:
    """The names of DAFormer, or with two resolutions of HRDA, MIC and CLUDA."""
    prefixes = {
        "encoder.network.": "backbone.",
        "encoder.": "backbone.",
        "scale_attention.": "decode_head.scale_attention.",
    }
    prefixes["decoder."] = "decode_head.head." if multires else "decode_head."
    named = {}
    for name, tensor in state.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        named[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    return named


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model", [DAFORMER, HRDA], ids=["one resolution", "two"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_student_and_teacher_of_self_training(model, prefix):
    state = state_of(model)
    names = published_names(state, multires=model is HRDA)
    teacher = {name: tensor + 0.5 for name, tensor in names.items()}
    file = prefixed(names, f"{prefix}model.") | prefixed(teacher, f"{prefix}ema_model.")
    file |= {"imnet_model.backbone.norm1.weight": torch.zeros(2), "imnet_model.backbone.norm1.bias": torch.zeros(2)}
    student = one_network(file, "student", model.encoder, FILE)
    assert_same(student.tensors, state)
    assert student.left_out == {"ema_model.*": len(state), "imnet_model.*": 2}
    assert_same(
        one_network(file, "teacher", model.encoder, FILE).tensors,
        {name: tensor + 0.5 for name, tensor in state.items()},
    )
    assert other_settings(student, model) == {}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "net.", "_orig_mod.net.", "model.module."])
def test_known_prefixes_are_stripped(prefix):
    state = state_of(DAFORMER)
    names = prefixed(published_names(state, multires=False), prefix)
    assert_same(one_network(names, "student", "mit_b0", FILE).tensors, state)


def test_a_compiled_student_and_teacher():
    state = state_of(DAFORMER)
    names = published_names(state, multires=False)
    file = prefixed(names, "model._orig_mod.") | prefixed(names, "ema_model._orig_mod.")
    assert_same(one_network(file, "teacher", "mit_b0", FILE).tensors, state)


def test_an_unknown_prefix_is_named():
    names = prefixed(published_names(state_of(DAFORMER), multires=False), "trainer.segmentor.")
    with pytest.raises(DataError, match=r"unknown prefix: trainer\.segmentor\. -> save the tensors without it"):
        one_network(names, "student", "mit_b0", FILE)


def test_two_networks_that_differ_in_a_known_prefix_are_refused():
    names = published_names(state_of(DAFORMER), multires=False)
    with pytest.raises(DataError, match="several tensors have one name but for their prefix"):
        one_network(names | prefixed(names, "net."), "student", "mit_b0", FILE)
    encoder = {name: tensor for name, tensor in names.items() if name.startswith("backbone.")}
    with pytest.raises(DataError, match="several tensors are named .* but for their prefix") as caught:
        one_network(names | prefixed(encoder, "backbone."), "student", "mit_b0", FILE)
    assert caught.value.where == str(FILE)


def test_weights_of_cluda_need_no_import():
    with pytest.raises(DataError, match="weights of cluda already -> give them to --ckpt"):
        one_network(state_of(DAFORMER), "student", "mit_b0", FILE)


@pytest.mark.parametrize(
    ("content", "listed"),
    [
        ({"meta": {"CLASSES": ("road", "car")}}, ("road", "car")),
        ({"meta": {"dataset_meta": {"classes": ["road", "car"], "palette": []}}}, ("road", "car")),
        ({"meta": {"dataset_meta": {"CLASSES": ["road", "car"]}}}, ("road", "car")),
        ({"dataset_meta": {"classes": ["road"]}}, ("road",)),
        ({"meta": {"CLASSES": None}}, None),
        ({"meta": {"CLASSES": [1, 2]}}, None),
        ({"meta": "text", "dataset_meta": 3}, None),
        ({}, None),
    ],
)
def test_classes_that_a_file_lists(content, listed):
    assert listed_classes(content) == listed


def test_classes_in_another_order_are_found_by_name():
    ours = ("road", "traffic light", "car")
    assert match_classes(("Car", "road", "Traffic_Light"), ours, FILE) == [1, 2, 0]
    assert match_classes(ours, ours, FILE) == [0, 1, 2]


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        (("road", "sky"), "sky of the file alone; car of data.source alone"),
        (("road", "car", "sky"), "sky of the file alone ->"),
        (("road",), "car of data.source alone ->"),
        (("road", "car", "car"), "one is listed twice"),
        (("road", *"abcdefg"), "a, b, c, d, e and 2 more of the file alone; car of data.source alone"),
    ],
)
def test_other_classes_are_named(listed, says):
    with pytest.raises(DataError) as caught:
        match_classes(listed, ("road", "car"), FILE)
    assert says in str(caught.value) and str(caught.value).startswith("file.pth: its classes are others than")


def test_a_plain_file_holds_one_network_and_no_teacher():
    state = state_of(DAFORMER)
    names = published_names(state, multires=False)
    assert_same(one_network(names, "student", "mit_b0", FILE).tensors, state)
    with pytest.raises(DataError, match="file.pth: holds one network"):
        one_network(names, "teacher", "mit_b0", FILE)
    with pytest.raises(DataError, match="holds no teacher .* --network student"):
        one_network(prefixed(names, "model."), "teacher", "mit_b0", FILE)


def test_the_learned_weighter_is_left_out_and_tells_of_late_blending():
    names = published_names(state_of(HRDA), multires=True)
    weighter = {"conv_seg.weight": torch.zeros(1, 4, 1, 1), "fuse_layer.bn.running_var": torch.zeros(4)}
    file = prefixed(names | prefixed(weighter, "decode_head.feat_weighter."), "model.")
    published = one_network(file, "student", "mit_b0", FILE)
    assert_same(published.tensors, state_of(HRDA))
    assert published.left_out == {"decode_head.feat_weighter.*": 2}
    assert other_settings(published, HRDA) == {"model.multires.blend_late": True}


def test_deeplab_on_a_resnet():
    state = state_of(DEEPLAB)
    names = published_names(state, multires=False)
    assert "backbone.conv1.6.weight" in names and "decode_head.aspp_modules.1.conv.bias" in names
    stem = {f"backbone.conv1.{i}.": f"backbone.stem.{i}." for i in (0, 1, 3, 4, 6)} | {
        "backbone.bn1.": "backbone.stem.7."
    }
    for old, new in stem.items():
        names = {new + n.removeprefix(old) if n.startswith(old) else n: tensor for n, tensor in names.items()}
    published = one_network(prefixed(names, "model."), "student", "resnet50c", FILE)
    assert_same({n.replace("encoder.", "encoder.network."): t for n, t in published.tensors.items()}, state)
    assert class_count(published) == 19
    assert other_settings(published, DEEPLAB) == {}
    assert other_settings(published, DAFORMER) == {
        "model.encoder": "resnet50c",
        "model.output_stride": 8,
        "model.deeplab": True,
    }


def test_names_that_belong_nowhere_stay():
    names = published_names(state_of(DAFORMER), multires=False) | {"discriminator.weight": torch.zeros(1)}
    assert "discriminator.weight" in one_network(names, "student", "mit_b0", FILE).tensors


def test_a_file_without_a_segmentation_network():
    with pytest.raises(DataError, match=r"file.pth: no network with backbone\.\* .* model.weights"):
        one_network({"patch_embed1.proj.weight": torch.zeros(1)}, "student", "mit_b0", FILE)


@pytest.mark.reference
def test_every_name_of_the_real_cluda_network_has_its_place(golden):
    _, description = golden("10_lr/param_groups")
    names = [name for group in description["groups"].values() for name in group]
    published = one_network({name: torch.zeros(1) for name in names}, "student", "mit_b0", FILE)
    with torch.device("meta"):
        network = build_segmenter(HRDA, (64, 64), 19)
    assert set(published.tensors) == {name for name, _ in network.named_parameters()}
    assert len(published.tensors) + published.left_out["decode_head.feat_weighter.*"] == len(names) == 236


@pytest.mark.reference
@pytest.mark.parametrize("variant", ["hrda", "cluda"])
def test_every_name_of_real_heads_has_its_place(variant, golden):
    vectors, _ = golden(f"05_hrda/{variant}_head_weights")
    file = {name.replace("param.", "model."): tensor for name, tensor in vectors.items()}
    file["model.backbone.norm1.weight"] = torch.zeros(32)
    model = Model(encoder="mit_b0", decoder=Decoder(embed_dim=32, channels=32), multires=MultiResolution())
    found = one_network(file, "student", "mit_b0", FILE).tensors
    expected = {n: t for n, t in state_of(model).items() if not n.startswith("encoder.")}
    assert {n: t.shape for n, t in found.items() if n != "encoder.norm1.weight"} == {
        n: t.shape for n, t in expected.items()
    }


def release_head(state: State) -> State:
    """NVlabs' SegFormer head: the embeddings are concatenated from the coarsest to the finest."""
    fuse = state["fuse_layer.conv.weight"]
    width = fuse.shape[1] // 4
    named = {
        f"linear_c{i + 1}.proj.{leaf}": state[f"embed_layers.{i}.proj.{leaf}"]
        for i in range(4)
        for leaf in ("weight", "bias")
    }
    named["linear_fuse.conv.weight"] = torch.cat([fuse[:, i * width : (i + 1) * width] for i in (3, 2, 1, 0)], dim=1)
    named |= {
        f"linear_fuse.bn.{n}": state[f"fuse_layer.bn.{n}"] for n in ("weight", "bias", "running_mean", "running_var")
    }
    named |= {f"linear_pred.{leaf}": state[f"conv_seg.{leaf}"] for leaf in ("weight", "bias")}
    return named | {"conv_seg.weight": torch.zeros(19, 128, 1, 1), "conv_seg.bias": torch.zeros(19)}  # never called


def transformers_head(state: State) -> State:
    named = {}
    for name, tensor in release_head(state).items():
        if name.startswith("conv_seg"):
            continue
        for i in range(4):
            name = name.replace(f"linear_c{i + 1}.", f"linear_c.{i}.")
        name = name.replace("linear_fuse.conv.", "linear_fuse.").replace("linear_fuse.bn.", "batch_norm.")
        named[name.replace("linear_pred.", "classifier.")] = tensor
    return named


def daformer_copy_of_the_head(state: State) -> State:
    """DAFormer's SegFormer head: from the finest to the coarsest."""
    named = {}
    for name, tensor in state.items():
        for i in range(4):
            name = name.replace(f"embed_layers.{i}.", f"linear_c.{i}.")
        named[name.replace("fuse_layer.", "linear_fuse.").replace("conv_seg.", "linear_pred.")] = tensor
    return named | {"conv_seg.weight": torch.zeros(19, 128, 1, 1), "conv_seg.bias": torch.zeros(19)}


def mmseg_head(state: State) -> State:
    named = {}
    for name, tensor in state.items():
        for i in range(4):
            name = name.replace(f"embed_layers.{i}.proj.", f"convs.{i}.conv.").replace(
                f"embed_layers.{i}.bn.", f"convs.{i}.bn."
            )
        pixelwise = name.startswith("convs.") and name.endswith("conv.weight")
        named[name.replace("fuse_layer.", "fusion_conv.")] = tensor[:, :, None, None] if pixelwise else tensor
    return named


def random_state(decoder: Decoder) -> State:
    torch.manual_seed(0)
    shapes = DAFormerDecoder(decoder, B0, 19).state_dict()
    return {n: torch.rand(t.shape) + 0.1 for n, t in shapes.items() if not n.endswith("num_batches_tracked")}


@pytest.mark.parametrize("layout", [release_head, transformers_head, daformer_copy_of_the_head, mmseg_head])
def test_segformer_heads(layout):
    norm = layout is mmseg_head
    decoder = Decoder(embed_dim=8, channels=6, dilations=(), embed_norm=norm)
    state = random_state(decoder)
    file = prefixed(layout(state), "decode_head.") | {"backbone.norm1.weight": torch.zeros(32)}
    published = one_network(file, "student", "mit_b0", FILE)
    found = {n.removeprefix("decoder."): t for n, t in published.tensors.items() if n.startswith("decoder.")}
    assert_same(found, state)
    uncalled = "linear_pred.weight" in layout(state)
    assert published.left_out == ({"decode_head.conv_seg.*": 2} if uncalled else {})
    assert other_settings(published, Model(encoder="mit_b0", decoder=decoder)) == {}
    told = other_settings(published, Model(encoder="mit_b0"))
    expected = {"embed_dim": 8, "channels": 6, "dilations": []} | ({"embed_norm": True} if norm else {})
    assert told == {f"model.decoder.{name}": value for name, value in expected.items()}


def test_the_release_head_computes_the_same():
    decoder = Decoder(embed_dim=8, channels=6, dilations=())
    file = {name: tensor.double() for name, tensor in release_head(random_state(decoder)).items()}
    maps = [torch.randn(1, channels, 16 >> i, 24 >> i, dtype=torch.float64) for i, channels in enumerate(B0)]
    embedded = [
        F.conv2d(features, file[f"linear_c{i}.proj.weight"][:, :, None, None], file[f"linear_c{i}.proj.bias"])
        for i, features in enumerate(maps, 1)
    ]
    resized = [F.interpolate(features, (16, 24), mode="bilinear") for features in reversed(embedded)]
    fused = F.conv2d(torch.cat(resized, dim=1), file["linear_fuse.conv.weight"])
    norm = [file[f"linear_fuse.bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    expected = F.conv2d(F.batch_norm(fused, *norm).relu(), file["linear_pred.weight"], file["linear_pred.bias"])
    ours = DAFormerDecoder(decoder, B0, 19).double().eval()
    whole = prefixed(file, "decode_head.") | {"backbone.norm1.weight": torch.zeros(32)}
    tensors = one_network(whole, "student", "mit_b0", FILE).tensors
    missing, unexpected = ours.load_state_dict(
        {n.removeprefix("decoder."): t for n, t in tensors.items()}, strict=False
    )
    assert all(name.endswith("num_batches_tracked") for name in missing) and unexpected == ["encoder.norm1.weight"]
    torch.testing.assert_close(ours(maps)[0], expected)


def test_embeddings_with_norm_compute_what_mmsegmentation_does():
    decoder = DAFormerDecoder(Decoder(embed_dim=8, channels=6, dilations=(), embed_norm=True), B0, 19).train()
    first = decoder.embed_layers[0]
    features = torch.randn(2, 32, 6, 8)
    convolved = F.conv2d(features, first.proj.weight[:, :, None, None])
    expected = F.batch_norm(convolved, None, None, training=True).relu()
    torch.testing.assert_close(first(features), expected)
    assert first.proj.bias is None


def test_an_encoder_in_the_layout_of_mmsegmentation():
    file = {
        "backbone.layers.0.0.projection.weight": torch.zeros(1),
        "backbone.layers.3.2.bias": torch.ones(1),
        "decode_head.conv_seg.bias": torch.zeros(19),
    }
    found = one_network(file, "student", "mit_b0", FILE).tensors
    assert set(found) == {"encoder.patch_embed1.proj.weight", "encoder.norm4.bias", "decoder.conv_seg.bias"}


def test_the_encoder_of_transformers():
    names = {
        "patch_embeddings.0.proj.weight": "patch_embed1.proj.weight",
        "layer_norm.3.bias": "norm4.bias",
        "block.1.0.mlp.dense1.weight": "block2.0.mlp.fc1.weight",
    }
    file = {f"segformer.encoder.{name}": torch.zeros(1) for name in names} | {
        "decode_head.classifier.bias": torch.zeros(19)
    }
    found = one_network(file, "student", "mit_b0", FILE).tensors
    assert set(found) == {f"encoder.{name}" for name in names.values()} | {"decoder.conv_seg.bias"}


@pytest.mark.reference
def test_the_encoder_is_told_apart_by_its_shapes(golden):
    _, description = golden("03_mit/mit_shapes")
    for name, variant in description["variants"].items():
        tensors = {f"encoder.{key}": torch.empty(shape, device="meta") for key, shape in variant["shapes"].items()}
        told = other_settings(Published(tensors, {}), Model(encoder="resnet50"))
        assert told["model.encoder"] == name


FOUR_RATES = DEEPLAB.model_copy(update={"deeplab": DeepLabV2(dilations=(6, 12, 18, 24))})


def dilated(*dilations: int) -> Model:
    return DAFORMER.model_copy(update={"decoder": Decoder(embed_dim=8, channels=6, dilations=dilations)})


@pytest.mark.parametrize(
    ("file", "settings", "told"),
    [
        (Model(encoder="mit_b1", decoder=SMALL), DAFORMER, {"model.encoder": "mit_b1"}),
        (HRDA, DAFORMER, {"model.multires": True, "model.multires.attention_dim": 4}),
        (DAFORMER, HRDA, {"model.multires": False}),
        (DAFORMER, Model(encoder="mit_b0", decoder=SMALL, deeplab=DeepLabV2()), {"model.deeplab": False}),
        (FOUR_RATES, DEEPLAB, {"model.deeplab.dilations": [6, 12, 18, 24]}),
        (DAFORMER, dilated(1), {"model.decoder.dilations": [1, 6, 12, 18]}),
        (DAFORMER, dilated(1, 2, 3, 4), {}),  # only their number shows
    ],
)
def test_settings_that_a_file_tells(file, settings, told):
    names = published_names(state_of(file), multires=file.multires is not None)
    assert other_settings(one_network(names, "student", file.encoder, FILE), settings) == told


def test_number_of_classes():
    names = published_names(state_of(DAFORMER, num_classes=7), multires=False)
    assert class_count(one_network(names, "student", "mit_b0", FILE)) == 7
    assert class_count(Published({}, {})) is None
