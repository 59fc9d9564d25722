"""support/run/interrupts.py: a signal is heard at once, or noted until the loop looks, and never lost."""

import os
import signal
import time

import pytest
import torch

import train
from support.run.interrupts import Interrupted, Stop, leave
from support.run.settings import SettingError


@pytest.fixture
def stop(signals):
    return Stop()


def test_outside_the_loop_a_signal_ends_at_once(stop):
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_inside_the_first_is_noted_and_the_second_ends_at_once(stop):
    with pytest.raises(Interrupted, match="SIGINT"), stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it goes on")


def test_a_signal_after_the_loops_last_look_is_not_ignored(stop):
    """While the stage's last checkpoint is written, for instance."""
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "error, said",
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234", "another process of this run was lost"),
        ("CUDA out of memory. Tried to allocate 2 GiB", "--resume with a smaller --max-tokens-per-forward"),
        ("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory", "out of memory"),
    ],
)  # fmt: skip
def test_a_process_that_is_lost_is_one_sentence(monkeypatch, capsys, stop, error, said):
    def dies(*_):
        raise RuntimeError(error)

    monkeypatch.setattr(train, "run", dies)
    with pytest.raises(SystemExit) as end:
        train.main([])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and line.startswith("train.py: ") and said in line


def test_a_bug_keeps_its_traceback(monkeypatch, stop):
    monkeypatch.setattr(train, "run", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        train.main([])


@pytest.mark.parametrize("error", [Interrupted(signal.SIGTERM), SettingError("no such folder")])
def test_of_several_processes_the_main_one_speaks(monkeypatch, capsys, error):
    """The others wait longer than torchrun needs to end them, and are silent after a signal, which all have heard."""
    left, slept = [], []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank in range(3):
        with pytest.raises(SystemExit):  # os._exit would have ended it already
            leave("train.py", error, rank, 3)
        said = capsys.readouterr().err
        assert said == f"train.py: {error}\n" or (rank > 0 and said == "" and isinstance(error, Interrupted))
    assert left == [143 if isinstance(error, Interrupted) else 1] * 3
    assert len(slept) == 2 and min(slept) == (0.2 if isinstance(error, Interrupted) else 10)


def test_one_that_torchrun_ends_meanwhile_is_silent(monkeypatch, capsys, stop):
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        leave("train.py", SettingError("no such folder"), 1, 2)
    assert capsys.readouterr().err == ""
