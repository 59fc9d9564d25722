"""support/run/checkpoints.py: written whole or not at all, damage is noticed, saving changes nothing."""

import copy

import pytest
import torch
from runs import CPU
from torch.distributed.checkpoint.api import CheckpointException

import support.run.checkpoints as checkpoints_file
from support.learner.learner import Learner, make_optimizer_state
from support.run.checkpoints import Best, Checkpoints, trained_state
from support.run.settings import SettingError, Settings


@pytest.mark.parametrize("kind", [OSError, CheckpointException])  # the second is how dcp wraps the first
def test_a_checkpoint_that_cannot_be_written_names_the_last_good_one(policy, tmp_path, monkeypatch, kind):
    learner = Learner(copy.deepcopy(policy), CPU, Settings())
    optimizer = torch.optim.SGD(learner.policy.parameters(), lr=0.1)
    checkpoints = Checkpoints(tmp_path, CPU)
    for step in (1, 2, 3):
        checkpoints.save(1, step, learner, optimizer, {})
    assert checkpoints.names() == ["1-0000003", "1-0000002"]

    def full(*args, **kwargs):
        if kind is OSError:
            raise OSError(28, "No space left on device")
        raise CheckpointException("save", {0: (OSError(28, "No space left on device"), [])})

    monkeypatch.setattr(checkpoints_file.dcp, "save", full)
    with pytest.raises(SettingError, match="No space left.*last good one is .*1-0000003"):
        checkpoints.save(1, 4, learner, optimizer, {})
    assert checkpoints.names() == ["1-0000003", "1-0000002"] and checkpoints.newest() == "1-0000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-0000002", "1-0000003"]  # no rubbish left


def test_saving_a_checkpoint_does_not_change_adam(policy, tmp_path):
    # torch makes an optimiser's state for saving by a step with lr 0; it must not count. Adam's first step is lr * sign(g).
    learner = Learner(copy.deepcopy(policy), CPU, Settings())
    optimizer = torch.optim.AdamW(learner.policy.parameters(), lr=0.1, weight_decay=0.0)
    make_optimizer_state(learner.policy, optimizer)
    checkpoints = Checkpoints(tmp_path, CPU)
    checkpoints.save(1, 0, learner, optimizer, {})
    weight = learner.policy.model.model.language_model.norm.weight
    before = weight.detach().clone()
    for p in learner.policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(before - weight, torch.full_like(weight, 0.1), atol=1e-5, rtol=0)
    saved = copy.deepcopy(learner.policy.state_dict())
    checkpoints.save(1, 1, learner, optimizer, {})
    optimizer.step()
    places = lambda: [tensor.data_ptr() for tensor in trained_state(learner, optimizer, Best()).values()]
    before = places()
    checkpoints.restore("1-0000001", learner, optimizer)
    assert places() == before  # with --offload the host
    assert all(torch.equal(saved[k], v) for k, v in learner.policy.state_dict().items())
    assert all(state["step"] == 1 for state in optimizer.state.values())
