"""The runs that an experiment compares: planned from settings, trained in processes of their own, read when they are done."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from experiments.commands import CommandError
from support.run.settings import MACHINE, SettingError, parse_settings
from support.show.results import mean

ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, float]  # metric -> value; nan: undefined

# What is shown of the training steps: title -> key in metrics.jsonl
STEPS = {"entropy": "entropy", "grad norm": "grad_norm", "Var(A)": "advantage_var", "zero spread": "zero_spread",
         "mutated": "mutated", "redrawn": "redrawn"}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Planning


@dataclasses.dataclass
class Run:
    """One training run, and the data set that its last policy is evaluated on.

    settings     what its settings.json will hold
    rival        of the method, see rivals.py; None: the method itself
    evaluate_on  name of the data set; None: the test split of the training's own
    """

    name: str
    arguments: list[str]
    settings: dict
    rival: str | None = None
    evaluate_on: str | None = None

    @property
    def stages(self) -> dict[int, int]:
        """Number of a stage -> its steps."""
        steps = {stage: self.settings[f"steps{stage}"] for stage in (1, 2) if self.settings["stage"] in (None, stage)}
        return {stage: count for stage, count in steps.items() if count}

    @property
    def steps(self) -> int:
        return sum(self.stages.values())

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    @property
    def results(self) -> Path:
        return (self.folder / f"on-{self.evaluate_on}" if self.evaluate_on else self.folder) / "results.json"

    def saved_settings(self) -> dict:
        """{} if the folder holds no run."""
        file = self.folder / "settings.json"
        try:
            saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError:
            return {}
        return saved if isinstance(saved, dict) else {}

    def is_ours(self) -> bool:
        """Whether the folder holds a run of these settings. Those of the machine may be others, as when one is resumed."""
        saved, ours = ({k: v for k, v in s.items() if k not in MACHINE} for s in (self.saved_settings(), self.settings))
        return saved == ours

    def is_done(self) -> bool:
        return self.is_ours() and (self.folder / "results.txt").exists()

    def can_be_resumed(self) -> bool:
        """train.py resumes only a run that knows every setting, those of the machine too."""
        return self.is_ours() and self.saved_settings().keys() == self.settings.keys()


def plan(name: str, arguments: list[str], rival: str | None = None, evaluate_on: str | None = None) -> Run:
    """Raises SettingError if train.py would refuse the settings."""
    arguments = ["--name", name, *arguments]
    settings = json.loads(json.dumps(dataclasses.asdict(parse_settings(arguments))))
    run = Run(name, arguments, settings, rival, evaluate_on)
    if not run.steps:
        raise SettingError("--steps1 and --steps2 are both 0: nothing would be trained")
    return run


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())


# --------------------------------------------------------------------------------------------------------------------
# Training


class Trainer:
    """Trains runs, each in a process of its own as on the command line. What it prints goes to runs/NAME.log."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.children: list[subprocess.Popen] = []
        self.stopped = False

    def train_all(self, runs: list[Run], jobs: int, when_done: Callable[[str], None] = lambda name: None) -> None:
        """`jobs` at a time, each once, however many of `runs` share it; `when_done` is called with its name.

        If one fails, or at Ctrl-C, the others save and stop too, and no further one begins.
        """
        shared: dict[str, list[Run]] = {}
        for run in runs:
            shared.setdefault(run.name, []).append(run)
        steps = {name: of[0].steps for name, of in shared.items()}
        before = {name for name, of in shared.items() if of[0].is_done()}
        done = sum(steps[name] for name in before)
        with ThreadPoolExecutor(jobs) as pool:  # threads that wait for processes
            try:
                futures = {pool.submit(self.finish, of): name for name, of in shared.items()}
                with tqdm(total=sum(steps.values()), initial=done, unit="step", desc=f"{len(shared)} runs") as bar:
                    for future in as_completed(futures):
                        future.result()
                        name = futures[future]
                        bar.update(0 if name in before else steps[name])
                        when_done(name)
            finally:
                self.stop()

    def finish(self, runs: list[Run]) -> None:
        """Train what is one run, and evaluate it wherever one of `runs` asks for that."""
        self.train_unless_done(runs[0])
        for run in runs:
            self.evaluate_unless_done(run)

    def train_unless_done(self, run: Run) -> None:
        if not run.is_done():
            resume = ["--resume"] if run.can_be_resumed() else []
            program = ["experiments/rivals.py", run.rival] if run.rival else ["train.py"]
            self.call(run, [*program, *run.arguments, *resume], log_mode="w")

    def evaluate_unless_done(self, run: Run) -> None:
        if run.evaluate_on is None or run.results.exists():
            return
        s = run.settings
        words = ["--model", run.folder / f"stage{max(run.stages)}", "--data", run.evaluate_on, "--seed", 0,
                 "--images", *sorted({1, *s["images"]}), "--samples", s["eval_samples"], "--device", s["device"],
                 "--batch-size", s["rollout_batch"], "--out", run.results.parent]  # fmt: skip
        self.call(run, ["eval.py", *map(str, words)], log_mode="a")

    def call(self, run: Run, words: list[str], log_mode: str) -> None:
        """Run one of the project's programs. Raises CommandError with its last line if it fails."""
        log = run.folder.with_name(run.name + ".log")
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # for a program in experiments/
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        with self.lock:
            if self.stopped:
                return
            log.parent.mkdir(exist_ok=True)
            with open(log, log_mode, encoding="utf-8") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            self.children.append(process)
        if process.wait():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no message"]
            raise CommandError(f"{run.name} failed ({lines[-1][:200]}): see {log}, and start again to go on")

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.children:
                process.terminate()  # of a process that has ended, nothing


# --------------------------------------------------------------------------------------------------------------------
# Reading


@dataclasses.dataclass
class Outcome:
    """What one run shows.

    row    held-out metrics of the final policy, then means over the steps of training
    base   held-out metrics before training; None if the run is evaluated elsewhere, where its base was not
    blind  MAE of the best constant, tau of the order of the prompt
    steps  stage -> lines of metrics.jsonl
    """

    row: Row
    base: Row | None
    blind: Row
    steps: dict[int, list[dict]]


def number(x: float | None) -> float:
    return math.nan if x is None else float(x)


def held_out(rows: dict[str, dict]) -> Row:
    """Number of images -> metrics of one policy, as one row. Valid is that of the worst number of images."""
    row = {"valid": min(number(r["valid"]) for r in rows.values())}
    row |= {f"MAE@{n}": number(r["mae"]) for n, r in rows.items()}
    for metric in ("tau", "tau_values"):
        row |= {f"{metric}@{n}": number(r[metric]) for n, r in rows.items() if n != "1"}  # one image has no order
    return row


def read_run(run: Run) -> Outcome:
    """Raises CommandError for files that are damaged."""
    file, redo = run.results, "evaluated" if run.evaluate_on else "trained"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        row = held_out(results[[name for name in results if name.startswith("stage")][-1]])
        base = None if run.evaluate_on else held_out(results["base"])
        blind = {f"MAE@{n}": number(r["mae"]) for n, r in results["best constant by MAE"].items()}
        blind |= {f"tau@{n}": number(r["tau"]) for n, r in results["prompt order"].items()}
        file, redo = run.folder / "metrics.jsonl", "trained"
        logs = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            log = json.loads(line)
            if run.rival == "imitation":  # it has no groups of answers
                log |= dict.fromkeys(("advantage_var", "zero_spread", "mutated"))
            logs[log["stage"], log["step"]] = log
        if len(logs) != run.steps:
            raise ValueError(f"it should have {run.steps} steps")
        row |= {title: mean(log.get(key) for log in logs.values()) for title, key in STEPS.items()}
        steps = {stage: [log for (of, _), log in logs.items() if of == stage] for stage in run.stages}
        return Outcome(row, base, blind, steps)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CommandError(f"{file} is damaged ({reason}): delete {file.parent}, and it is {redo} again") from None
