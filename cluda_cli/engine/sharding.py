"""Parameters, gradients and moments spread over the processes of a run, for networks that do not fit one device.

FSDP2 gathers the parameters of a block for as long as the block computes. Whatever is saved is whole: a sharded run
goes on unsharded, or with another number of processes, and the other way round.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cluda_cli.distributed import collectives
from cluda_cli.models.segmenter import Detail, Output, Segmenter

_known_to_torch = False


def shard(networks: Sequence[Segmenter], objectives: nn.ModuleDict, device: torch.device) -> None:
    """Spread networks and what objectives learn; optimizers are to be built after it."""
    _tell_torch()
    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    for network in networks:
        for block in _blocks(network.encoder):
            fully_shard(block, mesh=mesh)
        _shard_root(network, mesh)
    for objective in objectives.values():
        if any(True for _ in objective.parameters()):
            _shard_root(objective, mesh)


def _shard_root(module: nn.Module, mesh: DeviceMesh) -> None:
    # Between forward passes the parameters of the teacher and of the student lie spread alike, for the moving average.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _tell_torch() -> None:
    """FSDP2 looks for tensors in what modules give and take, and does not know our dataclasses."""
    global _known_to_torch
    if not _known_to_torch:
        for kind in (Output, Detail):
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__name__}")
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody writes to
        _known_to_torch = True


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """Residual or transformer blocks: elements, all of one type, of the innermost lists that hold any."""
    blocks: list[nn.Module] = []
    for module in reversed(list(encoder.modules())):
        elements = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        alike = len({type(element) for element in elements}) == 1
        inner = {id(m) for element in elements for m in element.modules()}
        if alike and all(_is_block(element) for element in elements) and not inner & {id(block) for block in blocks}:
            blocks += elements
    return blocks


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def gather_state(value: Any) -> Any:
    """State with every spread tensor gathered, through dicts. All processes must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict) and collectives.world_size() > 1:
        return {key: gather_state(item) for key, item in value.items()}
    return value


def unsharded_only(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that each process has whole; FSDP2 averages the gradients of the others itself."""
    return [tensor for tensor in tensors if not isinstance(tensor, DTensor)]


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor spread as `model` is, if it is."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


def scatter_state(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A module's whole state, as that module can load it."""
    if collectives.world_size() == 1:
        return state
    own = module.state_dict()
    return {name: shard_like(value, own[name]) if name in own else value for name, value in state.items()}


def scatter_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state, as that optimizer can load it; moments lie where their parameters do."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def place(value: Tensor, parameter: Tensor) -> Tensor:
        return shard_like(value, parameter) if value.shape == parameter.shape else value  # the step count is one number

    moments = {i: {key: place(value, parameters[i]) for key, value in of.items()} for i, of in state["state"].items()}
    return state | {"state": moments}


@contextmanager
def unsharded(network: nn.Module) -> Iterator[None]:
    """Keep a spread network whole for the block, in which processes may run it as often as each likes."""
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
