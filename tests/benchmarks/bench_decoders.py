"""Time the decoders of small networks against each other: forward, and forward with backward.

    python tests/benchmarks/bench_decoders.py [--size 240x320] [--images 2] [--rounds 7]

The maps are those of MobileNetV2. Processor time of one thread, median over rounds in which the decoders take turns.
"""

import argparse
import statistics
import time

import torch

from cluda_cli.models.decoders import Decoder, build_decoder
from cluda_cli.settings import Model

CHANNELS = (24, 32, 96, 320)
STRIDES = (4, 8, 16, 32)
MODELS = {
    "DAFormer": Model(decoder={"embed_dim": 64, "channels": 64}),
    "pyramid": Model(pyramid={"channels": 64}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="240x320")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    height, width = map(int, arguments.size.split("x"))
    maps = [
        torch.randn(arguments.images, channels, height // stride, width // stride, requires_grad=True)
        for channels, stride in zip(CHANNELS, STRIDES, strict=True)
    ]
    decoders = {name: build_decoder(model, CHANNELS, 19) for name, model in MODELS.items()}
    for backward in (False, True):
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        for i in range(arguments.rounds + 1):  # the first round is warm-up
            for name, decoder in decoders.items():
                found = run(decoder, maps, backward)
                seconds[name] += [found] if i else []
        for name, values in seconds.items():
            kind = "forward and backward" if backward else "forward"
            print(f"{name:10s} {kind:22s} {1000 * statistics.median(values):8.1f} ms")


def run(decoder: Decoder, maps: list[torch.Tensor], backward: bool) -> float:
    """Processor seconds of one pass."""
    began = time.process_time()
    logits, _ = decoder(maps)
    if backward:
        logits.sum().backward()
    return time.process_time() - began


if __name__ == "__main__":
    main()
