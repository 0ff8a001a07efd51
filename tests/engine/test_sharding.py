"""State on one process; `tests/distributed` has that of several, replicated and sharded."""

import pytest
import torch

from cluda_cli.data.index import find
from cluda_cli.data.streams import batches
from cluda_cli.engine.sharding import _blocks, gather_model_state, gather_optimizer_state
from cluda_cli.engine.step import training_step
from cluda_cli.models.encoders import build_encoder
from cluda_cli.settings import Model

CPU = torch.device("cpu")


def test_one_process_gathers_its_own_state(tiny_settings, run):
    assert gather_optimizer_state(run.optimizer)["state"] == {}  # before the first step AdamW has counted none
    source, target = (find(name, tiny_settings.data.root) for name in ("clean", "noisy"))
    training_step(run, next(iter(batches([source], target, tiny_settings.data, 0, 0, 1))))
    for module in (run.student, run.teacher, run.objectives):
        state = gather_model_state(module)
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    gathered, own = gather_optimizer_state(run.optimizer), run.optimizer.state_dict()
    assert gathered["param_groups"] == own["param_groups"]
    assert gathered["state"].keys() == own["state"].keys()
    for i, moments in own["state"].items():
        assert all(torch.equal(gathered["state"][i][name], value) for name, value in moments.items())


@pytest.mark.parametrize(
    ("encoder", "count", "kind"), [("test_vit", 6, "Block"), ("resnet18", 8, "BasicBlock"), ("mit_b1", 8, "Block")]
)
def test_every_block_of_an_encoder_is_sharded_by_itself(encoder, count, kind):
    blocks = _blocks(build_encoder(Model(encoder=encoder, weights=False)))
    assert len(blocks) == count
    assert {type(block).__name__ for block in blocks} == {kind}
