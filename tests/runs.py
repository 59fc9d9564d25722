"""Short runs of train.py for the tests: in this process or in a forked one, as torch takes seconds to import."""

import contextlib
import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration as Backbone

import train
from support.learner.world import World
from support.show.monitor import Monitor

CPU = World(0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--steps1", "2", "--steps2", "2", "--batch-size", "4", "--group-size", "4", "--images", "1", "2",
         "--eval-samples", "3", "--checkpoint-every", "1", "--workers", "0",
         "--validate-every", "1", "--val-samples", "2", "--watch-every", "0"]  # fmt: skip
TINY = ["--steps1", "1", "--steps2", "1", "--batch-size", "2", "--images", "2", "--eval-samples", "1"]  # after SMALL


def train_here(*arguments):
    """In this process and the working directory."""
    return train.main([*SMALL, *arguments])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- killed runs -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL in this process: no handler of the program catches it."""


@contextlib.contextmanager
def copies_when_logged(*places):
    """Copies runs/ to killed-STAGE-STEP/ when that step is logged, before it is in a checkpoint: as SIGKILL would leave it."""
    honest = Monitor.log

    def log(self, step, *rest):
        honest(self, step, *rest)
        if (self.stage, step) in places:
            shutil.copytree("runs", f"killed-{self.stage}-{step}")

    Monitor.log = log
    try:
        yield
    finally:
        Monitor.log = honest


# --- processes of their own ------------------------------------------------------------------------------------------

# One process imports everything once, and others are forked from it. Windows has no fork: there each imports for itself.
method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
forks = multiprocessing.get_context(method)
forks.set_forkserver_preload(["runs"])


def start(folder, *arguments, **environment):
    """train.py in a process of its own, which prints to folder/log. -> multiprocessing.Process"""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests")]
    )  # for the server, which inherits no path
    process = forks.Process(target=_train, args=(folder, [*SMALL, *arguments], environment))
    process.start()
    return process


def _train(folder, arguments, environment):
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open(f"log{environment.get('RANK', '')}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    if environment.get("RANK", "0") != "0":
        Backbone.from_pretrained = None  # the main process alone reads the weights
    train.main(arguments)


def train_in_two(folder, *arguments):
    """Two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [start(folder, *arguments, RANK=rank, LOCAL_RANK=rank, **launcher) for rank in "01"]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], (folder / "log0").read_text() + (
        folder / "log1"
    ).read_text()
