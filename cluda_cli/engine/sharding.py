"""Sharding with FSDP2: each rank keeps a part of every parameter, gradient and moment, where one GPU is too small.

FSDP2 gathers the parameters of a block while the block computes. Saved files hold whole tensors, so a run can resume
with or without sharding and with any number of ranks.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cluda_cli.distributed import collectives
from cluda_cli.models.segmenter import Detail, Output, Segmenter

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

_outputs_registered = False


def shard(networks: Sequence[Segmenter], objectives: nn.ModuleDict, device: torch.device) -> None:
    """Shard networks and objectives with parameters. Optimizers must be built afterwards."""
    _register_outputs()
    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    for network in networks:
        for block in _blocks(network.encoder):
            fully_shard(block, mesh=mesh)
        _shard_root(network, mesh)
    for objective in objectives.values():
        if any(True for _ in objective.parameters()):
            _shard_root(objective, mesh)


def _shard_root(module: nn.Module, mesh: DeviceMesh) -> None:
    # The moving average needs the parameters of student and teacher sharded alike between forward passes.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _register_outputs() -> None:
    """Let FSDP2 find the tensors in the outputs of networks, which are dataclasses."""
    global _outputs_registered
    if not _outputs_registered:
        for kind in (Output, Detail):
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__name__}")
        # Nothing writes to these views.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        _outputs_registered = True


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """Residual or transformer blocks: the elements of the innermost lists whose elements are blocks of one type."""
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


def gather_model_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole state of a module, in main memory, on rank 0; {} on the other ranks, which must call it too."""
    state: dict[str, Tensor] = get_model_state_dict(module, options=WHOLE)
    return state


def gather_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer, in main memory, on rank 0; the other ranks must call it too.

    docs/decisions/0010-optimizer-state.md says why it is not torch's get_optimizer_state_dict.
    """
    state = optimizer.state_dict()
    moments = {
        i: {name: _gather_to_first(value) for name, value in values.items()} for i, values in state["state"].items()
    }
    return state | {"state": moments}


def _gather_to_first(tensor: Tensor) -> Tensor | None:
    whole = collectives.gather_tensor(tensor)
    return None if collectives.rank() else whole.cpu()


def unsharded_only(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that every rank has whole, whose gradients FSDP2 does not average."""
    return [tensor for tensor in tensors if not isinstance(tensor, DTensor)]


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This rank's part of a whole tensor if `model` is sharded, the tensor itself if not."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


def scatter_model_state(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """The whole state of a module as the module can load it, sharded as its parameters are."""
    own = module.state_dict()
    return {name: shard_like(value, own[name]) if name in own else value for name, value in state.items()}


def scatter_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer as the optimizer can load it, moments sharded as their parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def scatter(value: Tensor, parameter: Tensor) -> Tensor:
        return shard_like(value, parameter) if value.shape == parameter.shape else value  # the step count is one number

    moments = {
        i: {name: scatter(value, parameters[i]) for name, value in values.items()}
        for i, values in state["state"].items()
    }
    return state | {"state": moments}


@contextmanager
def unsharded(network: nn.Module) -> Iterator[None]:
    """Keep all parameters of a sharded network on every rank for the block, so that ranks may run it independently."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
