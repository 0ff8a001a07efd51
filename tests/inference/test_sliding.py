"""Inference on whole images: sizes, windows, padding, memory. K classes, H W pixels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cluda_cli import settings
from cluda_cli.data.transforms import fit_box, resize_image
from cluda_cli.inference import sliding as inference
from cluda_cli.inference.prefetch import HostCopy
from cluda_cli.inference.sliding import (
    PixelBudget,
    ResizedImage,
    eval_mode,
    fit_image,
    image_logits,
    predict_labels,
    segment,
)
from cluda_cli.models.multires import MultiResolution
from cluda_cli.models.normalisation import IMAGENET
from cluda_cli.models.segmenter import Output, Segmenter
from cluda_cli.settings import Evaluation

K = 5
WHOLE = Evaluation()


class Tiny(nn.Module):
    """A network of stride 4 that takes multiples of 8 from 32, with a batch norm and a dropout to disturb."""

    pad_multiple = alignment = 8
    smallest = 32
    stride = 4
    normalisation = IMAGENET

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, K, 5, stride=4, padding=2)
        self.norm = nn.BatchNorm2d(K)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: Tensor) -> Output:
        assert all(length % 8 == 0 and length >= 32 for length in image.shape[2:])
        logits = self.dropout(self.norm(self.conv(image)))
        return Output(logits, logits, (), image)


@pytest.fixture
def network() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


def noise(height: int, width: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def fitted(image: Tensor, box: tuple[int, int] | None) -> ResizedImage:
    return fit_image(image, box, torch.device("cpu"))


def slide(window: tuple[int, int], stride: tuple[int, int]) -> Evaluation:
    return Evaluation(mode="slide", window=window, stride=stride)


def resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


@torch.no_grad()
def padded_logits(network: Tiny, image: Tensor) -> Tensor:
    """Logits at the size of normalised images, by way of padding.  # B 3 h w -> B K h w"""
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, max(-width % 8, 32 - width), 0, max(-height % 8, 32 - height)))
    return resize(network(padded).logits, tuple(padded.shape[-2:]))[..., :height, :width]


@pytest.mark.parametrize("size", [(64, 96), (61, 93), (30, 200), (7, 5), (1, 1)])
@pytest.mark.parametrize("box", [None, (32, 48), (45, 77)])
def test_whole_image_is_resized_padded_and_brought_back(
    network: Tiny, size: tuple[int, int], box: tuple[int, int] | None
) -> None:
    image = noise(*size)
    resized = IMAGENET.apply(resize_image(image, fit_box(size, box)))
    expected = resize(padded_logits(network, resized[None]), size)[0]
    found = image_logits(network, image, box, WHOLE)
    assert found.shape == (K, *size) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_padding_does_not_change_an_image_that_needs_none(network: Tiny) -> None:
    image = noise(40, 56)
    with torch.no_grad():
        direct = resize(network(IMAGENET.apply(image)[None]).logits, (40, 56))[0]
    torch.testing.assert_close(image_logits(network, image, None, WHOLE), direct, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [(48, 72), (64, 72), (1024, 1024)])
def test_one_window_over_the_image_equals_the_whole_image(network: Tiny, window: tuple[int, int]) -> None:
    image = noise(96, 144)  # 48 x 72 in its box
    whole = image_logits(network, image, (48, 72), WHOLE)
    torch.testing.assert_close(image_logits(network, image, (48, 72), slide(window, (16, 16))), whole)


@pytest.mark.parametrize(
    ("size", "corners"),
    [
        ((45, 61), [(y, x) for y in (0, 16, 21) for x in (0, 24, 29)]),
        ((24, 56), [(0, 0), (0, 24)]),
        ((20, 50), [(0, 0), (0, 18)]),
    ],
)
def test_overlapping_windows_are_averaged(network: Tiny, size: tuple[int, int], corners: list[tuple[int, int]]) -> None:
    image, (high, wide) = noise(*size), (min(24, size[0]), 32)
    pixels, total, cover = IMAGENET.apply(image), torch.zeros(K, *size), torch.zeros(size)
    for y, x in corners:
        total[:, y : y + high, x : x + wide] += padded_logits(network, pixels[None, :, y : y + high, x : x + wide])[0]
        cover[y : y + high, x : x + wide] += 1
    assert cover.min() == 1 and cover.max() > 1
    found = image_logits(network, image, None, slide((24, 32), (16, 24)))
    torch.testing.assert_close(found, total / cover, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("pixels", "batches"), [(1, [1] * 9), (24 * 32 * 4, [4, 4, 1]), (2**20, [9])])
def test_number_of_windows_at_once_does_not_matter(
    network: Tiny, monkeypatch: pytest.MonkeyPatch, pixels: int, batches: list[int]
) -> None:
    image, evaluation = noise(45, 61), slide((24, 32), (16, 24))
    expected = image_logits(network, image, None, evaluation)
    monkeypatch.setattr(inference, "CPU", PixelBudget(forward=pixels, band=1000))
    found: list[int] = []
    network.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    torch.testing.assert_close(image_logits(network, image, None, evaluation), expected)
    assert found == batches


@pytest.mark.parametrize("evaluation", [WHOLE, slide((24, 32), (16, 24))])
@pytest.mark.parametrize("pixels", [1, 700, 2**20])
def test_labels_made_in_bands_equal_the_argmax(
    network: Tiny, monkeypatch: pytest.MonkeyPatch, evaluation: Evaluation, pixels: int
) -> None:
    monkeypatch.setattr(inference, "CPU", PixelBudget(forward=2**16, band=pixels))
    image = noise(61, 93)
    [(label, confidence)] = predict_labels(network, [fitted(image, (32, 48))], evaluation, confidence=True)
    probability = image_logits(network, image, (32, 48), evaluation).softmax(0)
    assert confidence is not None and label.dtype == torch.uint8 and confidence.dtype == torch.float32
    assert torch.equal(label.long(), probability.argmax(0))
    torch.testing.assert_close(confidence, probability.amax(0), rtol=0, atol=1e-6)
    [(alone, nothing)] = predict_labels(network, [fitted(image, (32, 48))], evaluation)
    assert torch.equal(alone, label) and nothing is None


def test_first_of_equal_classes_wins() -> None:
    logits = torch.tensor([[0.0, 2.0, -torch.inf], [1.0, 2.0, -torch.inf], [1.0, 0.0, -torch.inf]])[:, None]  # 3 1 3
    label, confidence = inference._pick_classes(logits, confidence=True)
    assert label.tolist() == [[1, 0, 0]]
    assert confidence is not None
    torch.testing.assert_close(confidence[0, :2], logits.softmax(0).amax(0)[0, :2])


@pytest.mark.parametrize("evaluation", [WHOLE, slide((24, 32), (16, 24))])
@pytest.mark.parametrize(("pixels", "batches"), [(1, [1] * 7), (3 * 32 * 32, [2, 1, 3, 1]), (2**20, [2, 1, 4])])
def test_images_of_one_size_share_a_forward(
    network: Tiny, monkeypatch: pytest.MonkeyPatch, evaluation: Evaluation, pixels: int, batches: list[int]
) -> None:
    sizes = [(24, 32), (48, 64), (24, 33), *[(24, 32)] * 4]  # the second becomes 24 x 32 as well
    images = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    expected = [image_logits(network, image, (24, 33), evaluation) for image in images]
    monkeypatch.setattr(inference, "CPU", PixelBudget(forward=pixels, band=500))
    found: list[int] = []
    network.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    pairs = [(fitted(image, (24, 33)), i) for i, image in enumerate(images)]
    results = list(segment(network, pairs, evaluation, confidence=True))
    if evaluation is WHOLE:
        assert found == batches
    assert [i for i, _, _ in results] == list(range(7))
    for (_, label, confidence), logits, size in zip(results, expected, sizes, strict=True):
        assert label.shape == size and torch.equal(label.long(), logits.argmax(0))
        assert confidence is not None
        torch.testing.assert_close(confidence, logits.softmax(0).amax(0), rtol=0, atol=1e-5)


def two_resolutions() -> MultiResolution:
    """Its detail crop is 64 x 64."""
    torch.manual_seed(0)
    model = settings.Model(encoder="mit_b0", decoder=settings.Decoder(embed_dim=8, channels=8))
    network = MultiResolution(model, settings.MultiResolution(attention_dim=8), (128, 128), K)
    nn.init.normal_(network.decoder.conv_seg.weight, std=1.0)
    return network.eval()


@torch.no_grad()
def fused(network: MultiResolution, image: Tensor, corners: list[tuple[int, int]], multiple: int = 8) -> Tensor:
    """Context and details of 64 x 64 at `corners` of a padded image, in plain code.  # 3 h w -> K h w"""
    height, width = image.shape[1:]
    padded = F.pad(image, (0, max(-width % multiple, 64 - width), 0, max(-height % multiple, 64 - height)))[None]
    size = (padded.shape[2] // 4, padded.shape[3] // 4)
    maps = network.encoder(F.avg_pool2d(padded, 2))
    attention, context = network.scale_attention(maps)[0].sigmoid(), network.decoder(maps)[0]
    total, cover = torch.zeros(1, K, *size), torch.zeros(size)
    for y, x in corners:
        window = (..., slice(y // 4, y // 4 + 16), slice(x // 4, x // 4 + 16))
        total[window] += network.decoder(network.encoder(padded[..., y : y + 64, x : x + 64]))[0]
        cover[window[1:]] += 1
    logits = resize(attention, size) * total / cover + resize((1 - attention) * context, size)
    return resize(logits, tuple(padded.shape[2:]))[0, :, :height, :width]


def grid(rows: list[int], columns: list[int]) -> list[tuple[int, int]]:
    return [(y, x) for y in rows for x in columns]


@pytest.mark.parametrize(
    ("size", "corners"),
    [
        ((128, 96), grid([0, 32, 64], [0, 32])),
        ((99, 141), grid([0, 32, 40], [0, 32, 64, 80])),  # padded to 104 x 144
        ((30, 70), grid([0], [0, 8])),  # padded to 64 x 72, of which the context has half
        ((5, 7), grid([0], [0])),
    ],
)
def test_two_resolutions_of_a_whole_image(size: tuple[int, int], corners: list[tuple[int, int]]) -> None:
    network, image = two_resolutions(), noise(*size)
    expected = fused(network, IMAGENET.apply(image), corners)
    found = image_logits(network, image, None, WHOLE)
    assert found.shape == (K, *size) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("window", "starts", "corners"),
    [
        ((96, 80), ([0, 48, 54], [0, 50]), grid([0, 32], [0, 16])),
        ((90, 70), ([0, 48, 60], [0, 60]), grid([0, 32], [0, 8])),  # each window is padded to 96 x 72
    ],
)
def test_two_resolutions_in_sliding_windows(
    window: tuple[int, int], starts: tuple[list[int], list[int]], corners: list[tuple[int, int]]
) -> None:
    network, image, (high, wide) = two_resolutions(), noise(150, 130), window
    total, cover = torch.zeros(K, 150, 130), torch.zeros(150, 130)
    for y, x in grid(*starts):
        total[:, y : y + high, x : x + wide] += fused(
            network, IMAGENET.apply(image)[:, y : y + high, x : x + wide], corners
        )
        cover[y : y + high, x : x + wide] += 1
    found = image_logits(network, image, None, slide(window, (48, 60)))
    torch.testing.assert_close(found, total / cover, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(150, 170), (61, 400), (333, 30), (1, 900)])
@pytest.mark.parametrize("evaluation", [WHOLE, slide((24, 32), (16, 24)), slide((40, 500), (32, 300))])
def test_an_image_seen_in_parts_equals_the_whole_within_rounding(
    network: Tiny, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], evaluation: Evaluation
) -> None:
    """The margin is wider than the receptive field of the network."""
    image = noise(*size)
    expected = image_logits(network, image, None, evaluation)
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 0].numel()))
    monkeypatch.setattr(inference, "LARGEST_FORWARD", 90**2)
    monkeypatch.setattr(inference, "MARGIN", 8)
    monkeypatch.setattr(inference, "CPU", PixelBudget(forward=2**14, band=1000))
    found = image_logits(network, image, None, evaluation)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    if evaluation is WHOLE:
        assert len(seen) > 1 and max(seen) <= 90**2
    [(label, _)] = predict_labels(network, [fitted(image, None)], evaluation)
    assert torch.equal(label.long(), found.argmax(0))


def test_two_resolutions_in_parts_have_the_cells_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    network, image = two_resolutions(), noise(150, 300)
    assert network.alignment == 64
    expected = image_logits(network, image, None, WHOLE)
    monkeypatch.setattr(inference, "LARGEST_FORWARD", 256**2 // 2)
    monkeypatch.setattr(inference, "MARGIN", 64)
    found = image_logits(network, image, None, WHOLE)
    assert found.shape == expected.shape  # attention sees all, so values may differ
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("encoder", ["mobilenetv2_050", "mit_b0", "vit_tiny_patch16_224"])
def test_encoders_in_parts_have_the_cells_of_the_whole(monkeypatch: pytest.MonkeyPatch, encoder: str) -> None:
    torch.manual_seed(0)
    network = Segmenter(
        settings.Model(encoder=encoder, weights=False, decoder=settings.Decoder(embed_dim=8, channels=8)), K
    ).eval()
    nn.init.normal_(network.decoder.conv_seg.weight, std=1.0)
    image = resize_image(noise(7, 9), (203, 301))  # smooth
    expected = image_logits(network, image, None, WHOLE)
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[3]))
    monkeypatch.setattr(inference, "LARGEST_FORWARD", 192**2)
    monkeypatch.setattr(inference, "MARGIN", 64)
    found = image_logits(network, image, None, WHOLE)
    assert max(seen) <= 192 and len(seen) > 4
    assert found.shape == expected.shape  # the field of view is wider than the margin, so values may differ
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9


class Exhausting(Tiny):
    """Memory runs out on padded images of 64 rows."""

    error: Exception

    def forward(self, image: Tensor) -> Output:
        if image.shape[2] == 64:
            raise self.error
        return super().forward(image)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_images_after_one_that_exhausts_memory_are_still_predicted(error: Exception) -> None:
    network = Exhausting().eval()
    network.error = error
    pairs = [(fitted(noise(*size), None), size) for size in ((40, 40), (64, 40), (40, 48), (64, 64), (40, 40))]
    skipped: list[tuple[int, int]] = []
    found = [key for key, _, _ in segment(network, pairs, WHOLE, skip=skipped.append)]
    assert found == [(40, 40), (40, 48), (40, 40)] and skipped == [(64, 40), (64, 64)]
    with pytest.raises(type(error)):
        list(segment(network, pairs, WHOLE))
    network.error = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        list(segment(network, pairs, WHOLE, skip=skipped.append))


def test_matrices_that_resize_a_long_axis_stay_small() -> None:
    blocks = inference._build_resizing((15_000, 60_000, 60_000, 60_000), 128, torch.device("cpu"))
    assert sum(weights.numel() for _, _, weights in blocks) < 40 * 60_000  # not 15 000 x 60 000
    assert [out.start for out, _, _ in blocks] == list(range(0, 60_000, 128)) and blocks[-1][0].stop == 60_000
    for _, _, weights in (blocks[0], blocks[200], blocks[-1]):
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("box", [None, (64, 96)])
def test_labels_of_a_large_image_need_no_logits_of_its_size(
    network: Tiny, monkeypatch: pytest.MonkeyPatch, box: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(inference, "CPU", PixelBudget(forward=2**16, band=8 * 600))
    image = noise(400, 600)
    with Largest() as largest:
        predict_labels(network, [fitted(image, box)], WHOLE, confidence=True)
    assert 0 < largest.elements <= image.numel()  # 3 H W, not K H W
    with Largest() as largest:
        image_logits(network, image, box, WHOLE)
    assert largest.elements == K * 400 * 600


def test_modes_statistics_and_gradients_are_left_alone(network: Tiny) -> None:
    network.train()
    network.norm.eval()  # frozen
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = image_logits(network, noise(32, 32), None, WHOLE)
    assert torch.equal(first, image_logits(network, noise(32, 32), None, WHOLE))  # no dropout
    predict_labels(network, [fitted(noise(32, 32), None)], slide((24, 32), (16, 24)))
    with eval_mode(network):
        image_logits(network, noise(32, 32), None, WHOLE)
        assert not network.training and not network.dropout.training
    assert network.training and network.dropout.training and not network.norm.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not first.requires_grad


def test_modes_come_back_after_an_error(network: Tiny) -> None:
    network.train()
    network.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        image_logits(network, noise(32, 32), None, WHOLE)
    assert network.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_is_never_waited_for_and_gives_the_same() -> None:
    torch.manual_seed(0)
    network, images = Tiny().eval(), [noise(61, 93, seed=i) for i in range(3)]
    expected = [image_logits(network, image, (32, 48), WHOLE).argmax(0) for image in images]
    network.cuda()
    pairs = [(fit_image(image, (32, 48), torch.device("cuda")), None) for image in images]
    list(segment(network, pairs, WHOLE))  # fills what is made once per size
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [HostCopy(label) for _, label, _ in segment(network, pairs, WHOLE)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for label, truth in zip(found, expected, strict=True):
        assert (torch.from_numpy(label.numpy()) == truth).float().mean() > 0.999
