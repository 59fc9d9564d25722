"""runs/NAME/: what lies in it, who owns it, where a run starts or goes on.

settings.json                what the run was started with
task.json, items.jsonl       what it began with: the questions; the items' splits, labels and names
metrics.jsonl, timing.jsonl  one line a step
validation.jsonl             one line a validation
stage1/, stage2/             the policies in Hugging Face layout (with LoRA: adapters), with task.json and checksums.json
predictions_*.jsonl, .png    answers to the test prompts; before_after.png shows some of every policy
groups/, curves.png          what training does, in pictures
results.json, results.txt    the table; results.txt is written last, so a run that has it is complete
checkpoints/                 while a stage runs
bad_steps/                   batches whose loss or gradient was not finite
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from support.learner.learner import Learner
from support.learner.world import World
from support.run.atomic_files import replace_folder, write_text
from support.run.checkpoints import Checkpoints, write_checksums
from support.run.settings import SettingError, Settings
from support.show.results import Results, finite


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on.

    stage       1 or 2, the first stage that is not finished
    checkpoint  name of the one to go on from; None: the stage begins
    model       the policy that the stage begins with: a folder or hub id
    row         its name in the results
    """

    stage: int
    checkpoint: str | None
    model: str | Path
    row: str


class RunFolder:
    """The files of one run. All ranks may ask it; only the main rank writes."""

    def __init__(self, path: Path, world: World):
        self.path, self.world = path, world

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the run's lock, on the main rank. Raises SettingError on all ranks if another process has it.

        The lock is the operating system's and ends with the process, however it ends. Where the file system has none (some
        network disks), it is a file that names its process: one that died on this machine does not hold it.
        """
        refusal, lock = None, None
        if self.world.main:
            try:
                lock = self._lock()
            except SettingError as error:
                refusal = str(error)
        if refusal := self.world.gather(refusal)[0]:
            raise SettingError(refusal)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _lock(self) -> BaseFileLock:
        beside = lambda kind: self.path.with_name(f".{self.path.name}.{kind}")  # the folder itself may be moved aside
        owner, why = beside("owner"), ""
        for lock in (FileLock(beside("lock"), timeout=0), SoftFileLock(beside("softlock"), timeout=0)):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                write_text(owner, f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
                return lock
            except Timeout:
                who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "which has not said who it is"
                raise SettingError(
                    f"{self.path} belongs to a run that is still going ({who}; its lock is {lock.lock_file}): wait for it, "
                    "stop it, or give this one another --name"
                ) from None
            except OSError as error:
                why = str(error)
        raise SettingError(
            f"{self.path} cannot be locked, so another run could write there ({why}): start where {self.path.parent} can be "
            "written, or link it to a folder on another disk"
        )

    def complete(self, s: Settings, checkpoints: Checkpoints) -> Results | None:
        """The results of a run that is complete, else None. The same on all ranks. Raises SettingError if they are damaged.

        It is complete from the moment that results.txt is there. If somebody deletes that, results.json still tells.
        """
        results = None
        if self.world.main and ((self.path / "results.txt").exists() or not checkpoints.names()):
            known = self.read_results()
            results = known if last_row(s) in known else None
        return self.world.gather(results)[0]

    def read_results(self) -> Results:
        """results.json, whose keys are strings and whose undefined metrics are null. {} if there is none."""
        file = self.path / "results.json"
        if not os.path.lexists(file):
            return {}
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            number = lambda x: math.nan if x is None else x
            row = lambda row: {metric: number(x) for metric, x in row.items()}
            return {name: {int(n): row(x) for n, x in rows.items()} for name, rows in known.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise SettingError(f"{file} is damaged ({error}): restore it, or delete it, and --resume") from None

    def write_results(self, results: Results) -> None:
        write_text(self.path / "results.json", json.dumps(finite(results), indent=2) + "\n")

    def save_policy(self, learner: Learner, stage: int) -> None:
        """stage1/ or stage2/: the weights (with LoRA an adapter), the run's task.json, checksums."""
        path = self.path / f"stage{stage}"
        beside = path.with_name(path.name + ".writing")
        try:
            if self.world.main:
                shutil.rmtree(beside, ignore_errors=True)
            learner.save(beside)
            if self.world.main:
                shutil.copy(self.path / "task.json", beside)
                write_checksums(beside)
                replace_folder(beside, path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise SettingError(f"the policy {path} could not be written ({error}): --resume does it again") from None
        self.world.barrier()

    def finish(self, table: str, checkpoints: Checkpoints) -> None:
        """The run is complete from the moment that results.txt is there; only then the checkpoints go."""
        write_text(self.path / "results.txt", table + "\n")
        checkpoints.remove()

    # ----------------------------------------------------------------------------------------------------------------
    # Beginning

    def find_start(self, s: Settings, checkpoints: Checkpoints, model: str | Path) -> Start:
        """Where to begin. Raises SettingError if --resume or --stage 2 lacks what it needs.  model: the base's folder"""
        checkpoint = checkpoints.newest() if s.resume else None
        if s.resume and checkpoint is None and checkpoints.names():
            raise SettingError(f"--resume: {checkpoints.folder} holds no sound checkpoint; start without --resume")
        stage = int(checkpoint[0]) if checkpoint else s.stage or 1
        if s.resume and not checkpoint and stage == 1 and (self.path / "stage1").exists():
            raise SettingError(
                f"--resume: stage 1 of {self.path} is finished, but there is no checkpoint to go on from: restore "
                f"{checkpoints.folder}, or go on with --stage 2 in the place of --resume"
            )
        if stage == 1 or (s.stage != 2 and s.steps1 == 0):
            return Start(stage, checkpoint, model, "base")
        first = self.path / "stage1"
        if not first.is_dir():
            raise SettingError(
                f"--stage 2 starts from {first}, which does not exist: run --stage 1 --name {s.name} first"
            )
        return Start(stage, checkpoint, first, "stage 1")

    def open(self, s: Settings, start: Start, checkpoints: Checkpoints) -> Results:
        """Make runs/NAME ready, on the main rank. -> results so far.

        A fresh start moves whatever lies there to NAME~1, ~2, ...; nothing is overwritten. Stage 2 alone: only what an
        earlier stage 2 made gives way, its policy to stage2~1. Resumed: what was written since the checkpoint is taken
        back, as it will be written again.
        """
        if s.stage == 2 and not s.resume:
            checkpoints.remove()
        elif not s.resume:
            self.path.mkdir(parents=True, exist_ok=True)
            # else empty, or of a start that died at once
            if any(file.suffix != ".writing" for file in self.path.iterdir()):
                print(f"the earlier {self.path} is now {move_aside(self.path)}", file=sys.stderr)
                self.path.mkdir()
        saved = dataclasses.asdict(s) | {"resume": False}
        write_text(self.path / "settings.json", json.dumps(saved, indent=2) + "\n")
        known = self.read_results()
        before = ("base",) if start.row == "base" else ("base", "stage 1")  # later rows will be measured again
        known = {name: rows for name, rows in known.items() if name in before}
        if not start.checkpoint:
            if s.stage == 2:
                self.write_results(known)  # from here on an earlier stage 2 does not make the run complete
                if (old := self.path / "stage2").exists():
                    move_aside(old)
            (self.path / "results.txt").unlink(missing_ok=True)
        self._take_back(start.stage, int(start.checkpoint[2:]) if start.checkpoint else 0)
        return known

    def _take_back(self, stage: int, step: int) -> None:
        """Drop the lines of that step and of later ones."""
        for name in ("metrics.jsonl", "timing.jsonl", "validation.jsonl", "groups/groups.jsonl"):
            file = self.path / name
            if file.exists():
                *whole, _ = file.read_text(encoding="utf-8").split("\n")  # a killed process may have left half a line
                place = itemgetter("stage", "step")
                try:
                    kept = [line + "\n" for line in whole if place(json.loads(line)) < (stage, step)]
                except (ValueError, KeyError, TypeError) as error:
                    raise SettingError(f"{file} is damaged ({error}): delete the line, then --resume") from None
                write_text(file, "".join(kept))


def last_row(s: Settings) -> str:
    """The row of the results that a run writes last."""
    stage = s.stage or (2 if s.steps2 else 1 if s.steps1 else 0)
    return f"stage {stage}" if stage else "base"


def move_aside(path: Path) -> Path:
    """Rename the folder to path~1, path~2, ...: the first that does not exist. -> its new name"""
    number = 1
    while (new := path.with_name(f"{path.name}~{number}")).exists():
        number += 1
    try:
        path.rename(new)
    except OSError as error:  # a mount point, or a folder of a container's image
        raise SettingError(
            f"{path} holds an earlier run and cannot be renamed to {new.name} ({error.strerror}): empty it, or give this run "
            "another --name"
        ) from None
    return new
