"""support/learner/offload.py: the same steps as torch's AdamW, and the same run."""

import pytest
import torch
from runs import lines, train_here, train_until_killed
from test_resume import assert_same
from torch import nn

from support.learner.offload import HostAdamW


def learn(optimizer_of):
    """20 steps of a small network. -> its parameters and the optimizer"""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 7), nn.Linear(7, 1))
    network[2].bias.requires_grad_(False)  # no gradient, no state
    optimizer = optimizer_of(network.parameters())
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 20)
        network(torch.randn(16, 33)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(network.parameters()), optimizer


def test_steps_are_those_of_adamw():
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    theirs, optimizer = learn(lambda parameters: torch.optim.AdamW(parameters, fused=True, **settings))
    ours, host_optimizer = learn(lambda parameters: HostAdamW(parameters, **settings))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert optimizer.state[b].keys() == host_optimizer.state[a].keys()
        assert all(torch.equal(x, host_optimizer.state[a][name]) for name, x in optimizer.state[b].items())


def test_a_run_is_the_same_with_offload_also_if_it_was_killed(finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(
        HostAdamW, "__init__", lambda self, *a, init=HostAdamW.__init__, **k: made.append(init(self, *a, **k))
    )
    train_until_killed(2, 1, "--offload")
    assert len(lines(tmp_path / "runs/rarl/metrics.jsonl")) == 5 and len(made) == 2  # one for each stage
    train_here("--resume")
    assert len(made) == 3
    assert_same(out, tmp_path / "runs" / "rarl")


def test_several_processes_and_adapters_need_no_offload(monkeypatch, capsys):
    monkeypatch.setattr("train.start_world", lambda device: type("World", (), {"size": 2, "main": True})())
    for more, said in ([], "--offload is for one process"), (["--lora-rank", "2"], "is of no use with --lora-rank"):
        with pytest.raises(SystemExit):
            train_here("--offload", *more)
        assert said in capsys.readouterr().err
