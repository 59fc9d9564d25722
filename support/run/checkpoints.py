"""Checkpoints of a run: trained weights and optimiser of all ranks by torch.distributed.checkpoint (dcp).

Each is written whole or not at all. And the best policy of a stage, which goes into them. The files are safetensors and JSON:
dcp's usual format is a pickle, and resuming from a folder of somebody else's would run what he put into it.
"""

import itertools
import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

import rarl
import rmo
from support.learner.learner import Learner
from support.learner.world import World
from support.run.atomic_files import replace_folder
from support.run.settings import SettingError


def write_checksums(folder: Path) -> None:
    """Write checksums.json: a CRC of every file in the folder. Files are on the disk when it returns."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "checksums.json")
    sums = {str(file.relative_to(folder)): checksum(file) for file in files}
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
    checksum(folder / "checksums.json")


def checksum(file: Path) -> int:
    crc = 0
    with open(file, "rb") as f:
        while piece := f.read(2**24):
            crc = zlib.crc32(piece, crc)
        os.fsync(f.fileno())  # before the folder is renamed: a power cut must not leave empty files in a whole folder
    return crc


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_checksums` has closed, or None."""
    try:
        expected = json.loads((folder / "checksums.json").read_text())
        for file, crc in expected.items():
            if checksum(folder / file) != crc:
                return f"{folder / file} was altered"
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder} is incomplete ({error})"
    return None


def check_policy(folder: str | Path) -> None:
    """Raise ModelError if a policy that training saved is no longer what was saved: it would answer differently, silently."""
    if os.path.lexists(Path(folder) / "checksums.json") and (wrong := damage(Path(folder))):
        raise rarl.ModelError(
            f"model {folder}: {wrong}: restore the folder, train again, or delete its checksums.json if the change is yours"
        )


class Best:
    """The policy that a stage ends with: the latest that is not significantly behind the one that earned most in validation.

    top      what the policy that earned most earned, prompt by prompt, as shares of the best possible reward; empty at first
    step     after which the policy was as it is kept here
    weights  copies of the parameters that are trained, on the CPU; of several processes each has its own shards
    """

    def __init__(self, top: list[float] | None = None, step: int = 0, weights: dict[str, Tensor] | None = None):
        self.top, self.step, self.weights = top or [], step, weights or {}

    def offer(self, shares: list[float], step: int, policy: rarl.Policy) -> None:
        """Keep the policy as it is now, unless the one that earned most did so by more than chance; it has learned longer.

        The prompts are the same each time, so policies are compared prompt by prompt: more than chance is a mean difference above
        1.96 of its standard errors (95 %). It is always compared with the one that earned most: a slow decline, each step of
        it within chance, ends there.
        """
        behind = np.subtract(self.top or shares, shares)
        if behind.mean() <= 1.96 * behind.std() / math.sqrt(len(behind)):
            self.step, self.weights = step, trained_weights(policy)
        if behind.mean() <= 0:
            self.top = shares

    @torch.no_grad()
    def give_back(self, learner: Learner) -> None:
        """The learner's policy becomes the one that was kept, if there is one."""
        local = lambda tensor: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, parameter in learner.policy.named_parameters():
            if name in self.weights:
                local(parameter).copy_(local(self.weights[name]))
        learner.sync_rollout_policy()
        if self.weights and learner.world.main:
            what = "the latest that is not significantly behind the best in validation"
            print(f"the stage ends with its policy after step {self.step}, {what}", file=sys.stderr)


def trained_weights(policy: rarl.Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone().cpu() for name, p in policy.named_parameters() if p.requires_grad}


def trained_state(learner: Learner, optimizer: torch.optim.Optimizer, best: Best) -> dict[str, Tensor]:
    """The trained weights (with LoRA the adapters alone), their moments and the best policy, under one name each.

    They are the tensors themselves: dcp loads into them, wherever they are, and needs no second copy. What is frozen is not
    among them: a run that goes on reads it where the stage began with it.
    """
    state = {f"best.{name}": weight for name, weight in best.weights.items()}
    for name, p in learner.policy.named_parameters():
        if p.requires_grad:
            state[f"weights.{name}"] = p.detach()
            state |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return state


def file_of(state: dict[str, Tensor], limit: int = 2**30) -> dict[str, int]:
    """The number of the file that each tensor goes to, from 1. A file is made in memory: about 1 GB each."""
    before = itertools.accumulate((t.numel() * t.element_size() for t in state.values()), initial=0)
    return {name: 1 + start // limit for name, start in zip(state, before, strict=False)}


KEEP = 2  # newest checkpoints: if one is damaged there is another


class Checkpoints:
    """The newest checkpoints of a run: runs/NAME/checkpoints/STAGE-STEP, the state *before* that step.

    Written beside under another name and renamed when complete, with a checksum of every file: a crash while writing
    costs nothing, and damage is noticed on reading. There is no random state in one: see `seed_of` in
    support/learner/stage.py.
    """

    def __init__(self, folder: Path, world: World):
        self.folder, self.world = folder, world

    def names(self) -> list[str]:
        found = self.folder.glob("[12]-[0-9]*") if self.folder.is_dir() else []
        return sorted((p.name for p in found if p.name[2:].isdigit()), reverse=True)  # newest first

    def save(
        self, stage: int, step: int, learner: Learner, optimizer: torch.optim.Optimizer, history: rmo.History,
        best: Best | None = None,
    ) -> None:  # fmt: skip
        """Save weights, optimiser, RMO's history and the best policy; drop all but the newest KEEP.

        Raises SettingError on a full disk.
        """
        best = best or Best()
        name = f"{stage}-{step:07d}"
        beside = self.folder / f"{name}.writing"
        try:
            if self.world.main:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            self.world.barrier()
            state = trained_state(learner, optimizer, best)
            writer = HuggingFaceStorageWriter(str(beside), file_of(state), save_distributed=True)
            dcp.save(state, storage_writer=writer, no_dist=self.world.size == 1)
            if self.world.main:
                kept = {"top": best.top, "step": best.step} if best.weights else None
                (beside / "extra.json").write_text(json.dumps({"step": step, "history": history, "best": kept}))
                write_checksums(beside)
                replace_folder(beside, self.folder / name)
                for old in self.names()[KEEP:]:
                    shutil.rmtree(self.folder / old)
        except (OSError, CheckpointException) as error:  # a full disk, a read-only folder
            free = shutil.disk_usage(self.folder.parent).free  # torch does not say that the disk is full
            shutil.rmtree(beside, ignore_errors=True)
            failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
            reason = "; ".join(str(cause) for cause, _ in failures)
            raise SettingError(
                f"the checkpoint {self.folder / name} could not be written ({reason}; {free / 1e6:,.0f} MB were left on that "
                f"disk); the last good one is {next(iter(self.names()), 'none')}"
            ) from None
        self.world.barrier()

    def newest(self) -> str | None:
        """Name of the newest sound checkpoint; says which ones it passes over. The same on all ranks."""
        names = self.names() if self.world.main else []
        while names and (wrong := damage(self.folder / names[0])):
            print(f"checkpoint {self.folder / names.pop(0)} is damaged: {wrong}", file=sys.stderr)
        return self.world.gather(names[0] if names else None)[0]

    def restore(
        self, name: str | None, learner: Learner, optimizer: torch.optim.Optimizer
    ) -> tuple[int, rmo.History, Best]:
        """Load a checkpoint, if there is one to load. -> the step to go on with, RMO's history, the best policy"""
        if name is None:
            return 0, {}, Best()
        extra = json.loads((self.folder / name / "extra.json").read_text())
        best = Best(**extra["best"], weights=trained_weights(learner.policy)) if extra["best"] else Best()
        reader, state = HuggingFaceStorageReader(str(self.folder / name)), trained_state(learner, optimizer, best)
        dcp.load(state, storage_reader=reader, no_dist=self.world.size == 1)  # into the tensors that are there
        learner.sync_rollout_policy()
        return extra["step"], rmo.merge(extra["history"]), best

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
