"""Who takes part: the processes that torchrun started, and the device of this one."""

import os
import textwrap
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from support.run.settings import SettingError


@dataclass(frozen=True)
class World:
    """Who else takes part: torchrun starts `size` processes, this is number `rank`."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, thing: Any) -> list:
        """Everybody's `thing`, by rank."""
        if self.size == 1:
            return [thing]
        things: list = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        self.gather(None)


def rank_and_size() -> tuple[int, int]:
    """Of this process among those of its launcher; (0, 1) without one. Raises SettingError for what no launcher sets."""
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    rank, size = found["RANK"] or "", found["WORLD_SIZE"] or ""
    if found["RANK"] is found["WORLD_SIZE"] is None:
        return 0, 1
    numbers = rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
    if numbers and (size == "1" or (found["MASTER_ADDR"] and found["MASTER_PORT"])):
        return int(rank), int(size)
    left_over = " ".join(f"{name}={value}" for name, value in found.items() if value is not None)
    raise SettingError(
        f"the environment has {left_over}, which torchrun does not set like that: unset RANK WORLD_SIZE for one process, or "
        "start several with torchrun"
    )


def start_world(device: str) -> World:
    """Join the processes that torchrun started, if it did. device: auto, cpu or cuda. Raises SettingError."""
    rank, size = rank_and_size()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda":
        if not torch.cuda.is_available():
            raise SettingError(f"--device {device}: this machine has no CUDA GPU; take --device cpu")
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise SettingError(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs on this machine")
        name = f"cuda:{local}"
        torch.cuda.set_device(name)
    elif name != "cpu":
        raise SettingError(f"--device {device}: choose auto, cpu or cuda")
    if size > 1 and not dist.is_initialized():
        # gloo carries Python objects (rewards, predictions) between CPUs, nccl the tensors between GPUs
        # In a thread, because waiting for the others goes on in C++, where the main thread would hear no signal.
        waiting: Future = Future()
        Thread(target=join, args=("cpu:gloo,cuda:nccl" if name != "cpu" else "gloo", waiting), daemon=True).start()
        waiting.result()
    return World(rank, size, torch.device(name))


def join(backend: str, done: Future) -> None:
    try:
        done.set_result(dist.init_process_group(backend))
    except dist.DistError as error:
        done.set_exception(
            SettingError(f"the other processes did not come ({textwrap.shorten(str(error), 200)}): start all of them")
        )
    except BaseException as error:
        done.set_exception(error)
