"""The device of a run or a verb."""

import torch

from cluda_cli.errors import EnvironmentProblem


def pick_device(name: str) -> torch.device:
    """The device of that name. "auto" is the first GPU, or the CPU without a GPU.

    Raises EnvironmentProblem if torch cannot use the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in {"cpu", "cuda", "mps"}:
            raise RuntimeError("it is none of cpu, cuda, mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        have = "cuda" if torch.cuda.is_available() else "no GPU that this build of torch can use"
        raise EnvironmentProblem(
            f'device "{name}" cannot be used ({str(error).splitlines()[0]})',
            "training.device",
            f"this machine has: cpu, {have}; --device auto takes what is there",
        ) from error
    return device
