"""Several processes, one model: the main rank alone reads the weights, and `spread` gives them to the others."""

import copy
import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen2_5_VLForConditionalGeneration as Backbone

from support.learner import lora
from support.learner.learner import spread
from support.learner.policies import load_start
from support.learner.world import World, rank_and_size, start_world
from support.run.interrupts import Interrupted, Stop
from support.run.settings import SettingError, Settings

CPU = torch.device("cpu")


def test_others_load_without_reading_and_receive_all_that_the_main_rank_has(policy_folder, tmp_path, monkeypatch):
    """What the main rank broadcasts is recorded, and played to another rank. Buffers are in no file: rotary angles, banned."""
    base = load_start(policy_folder, Settings(lora_rank=3), CPU)
    with torch.no_grad():
        for layer in lora.lora_layers(base).values():
            layer.B.normal_()
    lora.save_adapter(base.model, tmp_path / "adapter")
    for path, s in (
        (policy_folder, Settings()),
        (policy_folder, Settings(lora_rank=3, freeze_vision=True)),
        (tmp_path / "adapter", Settings(lora_rank=3, lora_alpha=32.0)),
    ):
        main, sent = load_start(path, s, CPU), []
        with monkeypatch.context() as patched:
            patched.setattr(Backbone, "from_pretrained", None)
            other = load_start(path, s, CPU, read=False)
        assert all(x.is_meta for x in [*other.parameters(), *other.buffers()])
        monkeypatch.setattr(dist, "broadcast", lambda x, src, sent=sent: sent.append(x.clone()))
        expected = copy.deepcopy(main)
        for kind in ("buffers", "parameters"):
            spread(main, World(0, 2, CPU), kind)
        playing = iter(sent)
        monkeypatch.setattr(dist, "broadcast", lambda x, src, playing=playing: x.copy_(next(playing)))
        for kind in ("buffers", "parameters"):
            spread(other, World(1, 2, CPU), kind)
        assert next(playing, None) is None
        for one in (main, other):
            for kind in ("named_buffers", "named_parameters"):
                ours, theirs = (dict(getattr(x, kind)(remove_duplicate=False)) for x in (one, expected))
                assert ours.keys() == theirs.keys() and len(ours) > 3
                for name, x in ours.items():
                    assert torch.equal(x, theirs[name]) and x.dtype == theirs[name].dtype, name
                    assert x.requires_grad == theirs[name].requires_grad, name
            assert one.state_dict().keys() == expected.state_dict().keys()  # no buffer has become a part of it
            assert len(list(one.parameters())) == len(list(expected.parameters()))  # tied weights are still one


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, (1, 2)),
        ({"RANK": "1"}, "the environment has RANK=1 WORLD_SIZE=1, which torchrun does not set like that: unset both"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE="),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 WORLD_SIZE=2"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK=2"),
    ],
)
def test_what_an_earlier_launcher_left_in_the_environment_is_named(monkeypatch, given, expected):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert rank_and_size() == expected
    else:
        with pytest.raises(SettingError, match=expected):
            rank_and_size()


def test_a_signal_is_heard_while_the_others_are_waited_for(monkeypatch, signals):
    """In C++, inside init_process_group, the main thread would hear none."""
    monkeypatch.setattr("support.learner.world.rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(dist, "init_process_group", lambda backend: threading.Event().wait(5))
    stop = Stop()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted, match="SIGTERM"):
        start_world("cpu")
    assert stop.signal == signal.SIGTERM
