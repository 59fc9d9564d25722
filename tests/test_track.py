"""support/show/track.py: what TensorBoard and Weights & Biases are told, by stand-ins for both."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
from runs import lines, train_here

import train
from support.run.settings import Settings
from support.show import track

SHORT = ["--steps1", "1", "--steps2", "1", "--images", "2", "--eval-samples", "1", "--watch-every", "0"]


@pytest.fixture
def installed(monkeypatch):
    """Both, as modules that write down what they are told: (name, value, step)."""
    told = SimpleNamespace(scalars=[], logs=[], purged=[], started=[])

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.started.append(folder)
            told.purged.append(purge_step)

        def add_scalar(self, name, value, step):
            told.scalars.append((name, value, step))

        def flush(self):
            pass

    def init(**how):
        told.started.append(how)
        fake["wandb"].run = how

    fake = {name: ModuleType(name) for name in ("torch.utils.tensorboard", "wandb")}
    vars(fake["torch.utils.tensorboard"]).update(SummaryWriter=SummaryWriter)
    log = lambda numbers, step: told.logs.append((numbers, step))
    vars(fake["wandb"]).update(run=None, init=init, log=log)
    for name, module in fake.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    return told


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_what_is_written_is_sent_under_the_same_names(tmp_path, monkeypatch, installed, library):
    monkeypatch.chdir(tmp_path)
    train_here(*SHORT, "--track", library)
    metrics = lines(tmp_path / "runs/rarl/metrics.jsonl")
    if library == "wandb":  # once for both stages
        (started,) = installed.started
        assert started["name"] == "rarl" and started["config"]["steps1"] == 1
        scalars = [(name, value, step) for numbers, step in installed.logs for name, value in numbers.items()]
    else:
        assert installed.started == ["runs/rarl/tensorboard"] * 2 and installed.purged == [0, 1]
        scalars = installed.scalars
    for step, line in enumerate(metrics):  # stage 2 goes on where stage 1 ended
        for name in line.keys() - {"stage", "step"}:
            assert line[name] is None or (name, line[name], step) in scalars
    assert {name for name, _, step in scalars if step == 1} >= {"validation/reward", "validation/2/tau", "reward"}


def test_what_is_not_installed_is_named_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.main([*SHORT, "--track", "wandb"])
    assert "--track wandb: the package wandb is not installed: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "rarl").exists()
    assert (
        track.start_tracker(Settings(), tmp_path, 0, True)(0, {"reward": 1.0}) is None
    )  # nothing asked for, nothing sent
