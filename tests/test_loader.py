"""support/datasets/loader.py: batches arrive in their order whoever reads them, and no reader outlives the stage."""

import contextlib
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from runs import TINY, lines, train_here
from small_data import item, noise_image

import data
import train
from support.datasets import drawings
from support.datasets.loader import AHEAD, load_steps

ALONE = SimpleNamespace(rank=0, size=1)


class Sampler:
    """Step s: `size` prompts with image s. It remembers which steps were asked for."""

    def __init__(self, items, size=3):
        self.items, self.size, self.asked = items, size, []

    def batch(self, step):
        self.asked.append(step)
        return [data.Sample((self.items[step],))] * self.size


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


@pytest.fixture(autouse=True)
def none_left_over():
    yield
    assert not readers()


@pytest.mark.parametrize("workers", [1, 4])
def test_threads_read_what_the_main_thread_would(policy, workers):
    items = [data.Item(str(s), s, drawings.DOTS, lambda s=s: noise_image(28 * (2 + s), 56, s)) for s in range(7)]
    alone, ahead = (list(load_steps(Sampler(items), policy, ALONE, 1, 7, n)) for n in (0, workers))
    assert [step for step, *_ in ahead] == [1, 2, 3, 4, 5, 6]
    for (_, samples, prompts), (_, ours, read) in zip(alone, ahead, strict=True):
        assert samples == ours and len(read) == 3
        for a, b in zip(prompts, read, strict=True):
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "pixels", "grid"))


def test_each_rank_reads_its_own_prompts(policy):
    items = [item(str(s), s) for s in range(3)]
    sampler = SimpleNamespace(batch=lambda step: [data.Sample((x,)) for x in items])
    for rank, names in ((0, ["0", "2"]), (1, ["1"])):
        ((_, samples, prompts),) = load_steps(sampler, policy, SimpleNamespace(rank=rank, size=2), 0, 1, 2)
        assert [sample.items[0].name for sample in samples] == names and len(prompts) == len(names)


def test_two_steps_are_read_ahead_and_no_more(policy):
    sampler = Sampler([item(str(s), s) for s in range(9)])
    with contextlib.closing(load_steps(sampler, policy, ALONE, 0, 9, 4)) as steps:
        assert sampler.asked == []  # nothing begins before the first step is asked for
        for step, *_ in steps:
            assert sampler.asked == list(range(min(step + AHEAD + 1, 9)))


@pytest.mark.parametrize("workers", [0, 4])
def test_an_unreadable_image_is_named_when_its_step_has_come(policy, workers):
    def broken():
        raise data.DataError("image file 2.jpg cannot be read")

    items = [data.Item(str(s), s, drawings.DOTS, broken if s >= 2 else lambda: noise_image(56, 56)) for s in range(5)]
    seen = []
    with pytest.raises(data.DataError, match="2.jpg"):
        seen += (step for step, *_ in load_steps(Sampler(items), policy, ALONE, 0, 5, workers))
    assert seen == [0, 1]


def test_an_image_that_never_comes_keeps_nobody_waiting(policy, monkeypatch):
    """A file server that is gone. The thread that waits for it is left behind, and does not keep the program from ending."""
    gone, join = threading.Event(), threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout: join(self, min(timeout, 0.01)))
    items = [item("0", 0), data.Item("1", 1, drawings.DOTS, lambda: gone.wait() and noise_image(56, 56))]
    steps = load_steps(Sampler(items, 1), policy, ALONE, 0, 2, 1)
    next(steps)
    steps.close()
    (left,) = readers()
    assert left.daemon
    gone.set()
    join(left)


def test_a_signal_saves_the_step_while_threads_read(here, signals, monkeypatch, capsys):
    settings = [
        "--stage",
        "1",
        *TINY,
        "--steps1",
        "3",
        "--validate-every",
        "0",
        "--checkpoint-every",
        "99",
        "--workers",
        "4",
    ]

    def collect(*arguments, honest=train.collect):
        if arguments[2] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "collect", collect)
        train_here(*settings)
    assert "after step 2 of stage 1; saved" in capsys.readouterr().err and not readers()
    train_here("--resume", *settings)
    assert [line["step"] for line in lines(here / "runs" / "rarl" / "metrics.jsonl")] == [0, 1, 2]
