"""Short runs of train.py for the tests: in this process where possible, as torch takes seconds to import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from support.learner.world import World
from support.show.monitor import Monitor

CPU = World(0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--steps1", "3", "--steps2", "3", "--batch-size", "4", "--group-size", "4", "--images", "2", "4",
         "--eval-samples", "4", "--checkpoint-every", "1", "--workers", "0",
         "--validate-every", "1", "--val-samples", "2", "--watch-every", "0"]  # fmt: skip


def command(*arguments, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*start, str(ROOT / "train.py"), *SMALL, *arguments]


def run_here(folder, command):
    """In a process of its own. One thread, as in the tests' process: other numbers of threads round differently."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def train_here(*arguments):
    """In this process and the working directory."""
    return train.main([*SMALL, *arguments])


class Killed(BaseException):
    """Stands for SIGKILL in this process: no handler of the program catches it."""


def train_until_killed(stage, step, *arguments):
    """In this process. Killed when that step is logged, before it is in a checkpoint."""
    honest = Monitor.log

    def log(self, at, *rest):
        honest(self, at, *rest)
        if (self.stage, at) == (stage, step):
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Monitor, "log", log)
        train_here(*arguments)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
