"""Threads beside the network, PNG files, copies."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluda_cli.inference import prefetch as prefetch_module
from cluda_cli.inference.prefetch import HostCopy, pin_memory, prefetch, write_png


def test_prefetch_keeps_order_and_reads_only_a_few_items_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(30):
            taken.append(i)
            yield i

    def slow_first(i: int) -> int:
        time.sleep(0.02 if i % 4 == 0 else 0)
        return i * i

    results = prefetch(slow_first, items())
    assert next(results) == 0
    assert len(taken) <= 2 * prefetch_module.MOST_THREADS
    assert list(results) == [i * i for i in range(1, 30)]


def test_large_items_are_few_ahead_and_the_largest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_module, "PIXELS_AHEAD", 100)
    sizes = [40, 40, 40, 250, 10, 60, 30, 10]
    taken: list[int] = []
    held: list[list[int]] = []

    def items() -> Iterator[int]:
        for i in range(len(sizes)):
            held.append([j for j in range(i) if j not in taken])
            yield i

    for result in prefetch(lambda i: i, items(), lambda i: sizes[i]):
        taken.append(result)
    assert taken == list(range(len(sizes)))
    for waiting in held:
        assert len(waiting) == 1 or sum(sizes[j] for j in waiting) <= 100
    assert [3] in held and [4, 5, 6] in held


def test_prefetch_raises_at_the_item_and_begins_no_other() -> None:
    begun: list[int] = []

    def fail_at_three(i: int) -> int:
        begun.append(i)
        if i == 3:
            raise ValueError("three")
        return i

    results = prefetch(fail_at_three, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert max(begun) <= 3 + prefetch_module.MOST_THREADS


@pytest.mark.parametrize(("cores", "threads"), [(1, 4), (6, 6), (64, 16)])
def test_prefetch_starts_a_thread_for_each_usable_core(monkeypatch, cores: int, threads: int) -> None:
    started: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            started.append(count)
            super().__init__(count)

    monkeypatch.setattr(prefetch_module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(prefetch_module, "usable_cores", lambda: cores)
    assert list(prefetch(abs, [-1, -2])) == [1, 2]
    assert started == [threads]


def test_png_round_trip(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for name, pixels, mode in (("color.png", image, "RGB"), ("grey.png", image[..., 0], "L")):
        write_png(tmp_path / "new" / name, pixels)
        with Image.open(tmp_path / "new" / name) as file:
            assert file.mode == mode and np.array_equal(np.asarray(file), pixels)


def test_png_of_a_photograph_is_not_larger_than_pillow_makes_it(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((128, 128))
    noisy = (np.asarray(coarse).astype(int) + draw.integers(-2, 3, (128, 128, 3))).clip(0, 255).astype(np.uint8)
    write_png(tmp_path / "ours.png", noisy)
    Image.fromarray(noisy).save(tmp_path / "usual.png")
    assert (tmp_path / "ours.png").stat().st_size < 1.02 * (tmp_path / "usual.png").stat().st_size


def test_without_a_gpu_nothing_is_copied() -> None:
    tensor = torch.arange(6)
    assert pin_memory(tensor, torch.device("cpu")) is tensor
    assert np.shares_memory(HostCopy(tensor).numpy(), tensor.numpy())
