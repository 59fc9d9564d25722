"""Who takes part: the processes that torchrun started, and the device of this one."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    rank, size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank.isdecimal() and size.isdecimal() and int(rank) < int(size) and (size == "1" or "MASTER_ADDR" in os.environ):
        return int(rank), int(size)
    raise SettingError(
        f"the environment has RANK={rank} WORLD_SIZE={size}, which torchrun does not set like that: unset both for one process, "
        "or start several with torchrun"
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
    if size > 1 and not dist.is_initialized():
        # gloo carries Python objects (rewards, predictions) between CPUs, nccl the tensors between GPUs
        backend = "cpu:gloo,cuda:nccl" if name != "cpu" else "gloo"
        try:  # in a thread: waiting for the others goes on in C++, where the main thread would hear no signal
            ThreadPoolExecutor(1).submit(dist.init_process_group, backend).result()
        except dist.DistError as error:
            reason = str(error).split("\n")[0]
            raise SettingError(f"the other processes did not come ({reason}): start all of them") from None
    return World(rank, size, torch.device(name))
