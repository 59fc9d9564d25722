"""support/learner/offload.py: the same steps as torch's AdamW, and the same run."""

import pytest
import torch
from runs import copies_when_logged, lines, train_here
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


def test_a_stage_is_the_same_with_offload_also_if_it_was_killed(finished, here, signals, monkeypatch):
    out, made = finished[0], []
    init = HostAdamW.__init__
    monkeypatch.setattr(HostAdamW, "__init__", lambda self, *a, **k: made.append(init(self, *a, **k)))
    with copies_when_logged((1, 1)):
        train_here("--offload", "--stage", "1", "--eval-samples", "1")
    (here / "killed-1-1" / "rarl").rename(here / "runs" / "again")
    train_here("--offload", "--stage", "1", "--eval-samples", "1", "--name", "again", "--resume")
    assert len(made) == 2
    for run in ("rarl", "again"):
        assert lines(here / "runs" / run / "metrics.jsonl") == lines(out / "metrics.jsonl")[:2]
        weights = (f / "stage1" / "model.safetensors" for f in (out, here / "runs" / run))
        assert len({file.read_bytes() for file in weights}) == 1


def test_several_processes_and_adapters_need_no_offload(here, signals, monkeypatch, capsys):
    monkeypatch.setattr("train.start_world", lambda device: type("World", (), {"size": 2, "main": True})())
    for more, said in ([], "--offload is for one process"), (["--lora-rank", "2"], "is of no use with --lora-rank"):
        with pytest.raises(SystemExit):
            train_here("--offload", *more)
        assert said in capsys.readouterr().err
