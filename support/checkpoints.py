"""Checkpoints of a run: weights and optimiser of all ranks by torch.distributed.checkpoint, written whole or not at all."""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import rmo
from support.atomic_files import replace_folder
from support.distributed import Learner, World
from support.settings import SettingError, comparable


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


class Checkpoints:
    """The newest checkpoints of a run: runs/NAME/checkpoints/STAGE-STEP, the state *before* that step.

    Written beside under another name and renamed when complete, with a checksum of every file: a crash while writing
    costs nothing, and damage is noticed on reading. There is no random state in one: see `seed_of` in train.py.
    """

    def __init__(self, folder: Path, world: World, keep: int):
        self.folder, self.world, self.keep = folder, world, keep

    def names(self) -> list[str]:
        found = self.folder.glob("[12]-[0-9]*") if self.folder.is_dir() else []
        return sorted((p.name for p in found if p.name[2:].isdigit()), reverse=True)  # newest first

    def save(
        self, stage: int, step: int, learner: Learner, optimizer: torch.optim.Optimizer, history: rmo.History
    ) -> None:
        """Save weights, optimiser, settings and RMO's history; drop all but the newest `keep`. Raises SettingError on a full disk."""
        name = f"{stage}-{step:07d}"
        beside = self.folder / f"{name}.writing"
        try:
            if self.world.main:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            self.world.barrier()
            model, optim = get_state_dict(learner.policy, optimizer)
            dcp.save({"model": model, "optimizer": optim}, checkpoint_id=beside, no_dist=self.world.size == 1)
            if self.world.main:
                extra = {"step": step, "history": history, "settings": comparable(learner.settings)}
                (beside / "extra.json").write_text(json.dumps(extra))
                write_checksums(beside)
                replace_folder(beside, self.folder / name)
                for old in self.names()[self.keep :]:
                    shutil.rmtree(self.folder / old)
        except (OSError, CheckpointException) as error:  # a full disk, a read-only folder
            free = shutil.disk_usage(self.folder.parent).free  # torch does not say that the disk is full
            shutil.rmtree(beside, ignore_errors=True)
            good = next((f"the last good one is {self.folder / n}" for n in self.names()), "there is none before it")
            failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
            reason = "; ".join(str(cause) for cause, _ in failures)
            raise SettingError(
                f"the checkpoint {self.folder / name} could not be written ({reason}; {free / 1e6:,.0f} MB were "
                f"left on that disk); {good}"
            ) from None
        self.world.barrier()

    def newest(self) -> str | None:
        """Name of the newest sound checkpoint; says which ones it passes over. The same on all ranks."""
        sound = None
        for name in self.names() if self.world.main else ():
            if wrong := damage(self.folder / name):
                print(f"checkpoint {self.folder / name} is damaged: {wrong}", file=sys.stderr)
            else:
                sound = name
                break
        return self.world.gather(sound)[0]

    def extra(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "extra.json").read_text())

    def restore(self, name: str | None, learner: Learner, optimizer: torch.optim.Optimizer) -> tuple[int, rmo.History]:
        """Load a checkpoint, if there is one to load. -> the step to go on with, and RMO's history"""
        if name is None:
            return 0, {}
        self.load(name, learner, optimizer)
        extra = self.extra(name)
        return extra["step"], rmo.merge(extra["history"])

    def load(self, name: str, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
        model, optim = get_state_dict(learner.policy, optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optim}
        dcp.load(state, checkpoint_id=self.folder / name, no_dist=self.world.size == 1)
        set_state_dict(learner.policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        learner.sync_rollout_policy()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
