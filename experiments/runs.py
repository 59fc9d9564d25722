"""The runs that an experiment compares: planned from settings, trained in processes of their own, read when they are done."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import eval as evaluation
from experiments.ceiling import ceiling
from experiments.commands import CommandError
from support.run.settings import SettingError, Settings, comparable, parse_settings, read_settings
from support.show.results import mean

ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, float]  # metric -> value; nan: undefined

# What is shown of the training steps: title -> key in metrics.jsonl
STEPS = {"entropy": "entropy", "grad norm": "grad_norm", "Var(A)": "advantage_var", "zero spread": "zero_spread",
         "mutated": "mutated", "redrawn": "redrawn", "inverted": "inverted"}  # fmt: skip
LEARNED = 0.9  # of the sampled answers have the format
WITHIN = {"utkface": 5}  # data set -> an error that is small there


# --------------------------------------------------------------------------------------------------------------------
# Planning


@dataclasses.dataclass
class Run:
    """One training run, of the method ("rarl") or of a rival in rivals.py."""

    name: str
    arguments: list[str]
    settings: Settings
    rival: str = "rarl"

    @property
    def stages(self) -> dict[int, int]:
        """Number of a stage -> its steps."""
        s = self.settings
        steps = {1: s.steps1, 2: s.steps2}
        return {stage: count for stage, count in steps.items() if count and s.stage in (None, stage)}

    @property
    def steps(self) -> int:
        return sum(self.stages.values())

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    def is_begun(self) -> bool:
        """Whether the folder holds a run of these settings. Those of the machine may be others, as when one is resumed."""
        try:
            saved = read_settings(self.folder / "settings.json")
        except SettingError:  # no run, or one that train.py could not resume
            return False
        return comparable(Settings(**saved)) == comparable(self.settings)

    def is_done(self) -> bool:
        return self.is_begun() and (self.folder / "results.txt").exists()


def plan(name: str, arguments: list[str], rival: str = "rarl") -> Run:
    """Raises SettingError if train.py would refuse the settings."""
    arguments = ["--name", name, *arguments]
    run = Run(name, arguments, parse_settings(arguments), rival)
    if not run.steps:
        raise SettingError("--steps1 and --steps2 are both 0: nothing would be trained")
    return run


# --------------------------------------------------------------------------------------------------------------------
# Training


class Trainer:
    """Trains runs, each in a process of its own as on the command line. What it prints goes to runs/NAME.log."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.children: list[subprocess.Popen] = []
        self.stopped = False

    def train_all(self, runs: list[Run], jobs: int) -> None:
        """`jobs` at a time, each once, however often it is named.

        If one fails, or at Ctrl-C, the others save and stop too, and no further one begins.
        """
        once = {run.name: run for run in runs}.values()
        with ThreadPoolExecutor(jobs) as pool:  # threads that wait for processes
            try:
                futures = [pool.submit(self.train_unless_done, run) for run in once]
                for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
                    future.result()
            finally:
                self.stop()

    def train_unless_done(self, run: Run) -> None:
        """Raises CommandError with the last line of its log if it fails."""
        if run.is_done():
            return
        log = run.folder.with_name(run.name + ".log")
        command = [sys.executable, str(ROOT / "experiments/rivals.py"), run.rival, *run.arguments]
        if run.is_begun():
            command.append("--resume")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # for a program in experiments/
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        with self.lock:
            if self.stopped:
                return
            log.parent.mkdir(exist_ok=True)
            with open(log, "w", encoding="utf-8") as file:
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
    base   held-out metrics before training
    blind  MAE of the best constant, tau of the order of the prompt
    most   what the eyes alone know, if the policy was made with a record of it (ceiling.py)
    steps  stage -> lines of metrics.jsonl
    """

    row: Row
    base: Row
    blind: Row
    most: Row
    steps: dict[int, list[dict]]


def number(x: float | None) -> float:
    return math.nan if x is None else float(x)


def held_out(rows: dict[str, dict]) -> Row:
    """Number of images -> metrics of one policy, as one row. Valid is that of the worst number of images."""
    row = {"valid": min(number(r["valid"]) for r in rows.values())}
    row |= {f"MAE@{n}": number(r["mae"]) for n, r in rows.items()}
    for metric in ("tau", "tau_values", "contradict"):
        row |= {f"{metric}@{n}": number(r.get(metric)) for n, r in rows.items() if n != "1"}  # one image has no order
    return row


def steps_until_learned(logs: list[dict]) -> float:
    """Steps before the first one with LEARNED of the format, at the number of images that takes longest; nan: never.

    >>> logs = [{"images": 1, "format": 1.0}, {"images": 2, "format": 0.5}, {"images": 2, "format": 0.95}]
    >>> steps_until_learned(logs), steps_until_learned(logs[:2])
    (2.0, nan)
    """
    learned = lambda log, n: log.get("images") == n and (log.get("format") or 0) >= LEARNED
    numbers = {log.get("images") for log in logs}
    first = [next((i for i, log in enumerate(logs) if learned(log, n)), math.nan) for n in numbers]
    return math.nan if any(map(math.isnan, first)) else float(max(first))


def concordance(values: Sequence[float], labels: Sequence[float]) -> float:
    """Lin's concordance correlation coefficient (1989), in [-1, 1]: 2 cov / (var + var + (difference of means)^2), of the population.

    It is 1 only for equality, and lower than a correlation where values are drawn to the middle, which lowers the mean error of
    skewed labels. nan where both sides are the same constant.

    >>> concordance([1, 3], [1, 5])  # means 2 and 3, variances 1 and 4, covariance 2: 2 * 2 / (1 + 4 + 1)
    0.6666666666666666
    """
    x, y = (torch.tensor(numbers, dtype=torch.float64) for numbers in (values, labels))
    x_mean, y_mean = x.mean(), y.mean()
    apart = x.var(correction=0) + y.var(correction=0) + (x_mean - y_mean) ** 2
    return float(2 * ((x - x_mean) * (y - y_mean)).mean() / apart) if apart else math.nan


def near(predictions: list[dict], within: float) -> Row:
    """By number of images, of all valid values: the share that errs by `within` at most, and the concordance with the labels."""
    row: Row = {}
    for n in sorted({len(p["labels"]) for p in predictions}):
        valid = [p for p in predictions if len(p["labels"]) == n and p["values"] is not None]
        values, labels = ([x for p in valid for x in p[key]] for key in ("values", "labels"))
        if values:
            right = mean(float(abs(x - y) <= within) for x, y in zip(values, labels, strict=True))
            row |= {f"within {within}@{n}": right, f"CCC@{n}": concordance(values, labels)}
    return row


def json_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def predictions_of(run: Run, policy: str) -> list[dict]:
    """The answers of the base, or of the policy after a stage, to the test prompts."""
    return json_lines(run.folder / f"predictions_{policy.replace(' ', '')}.jsonl")


def eyes_alone(run: Run, within: float) -> Row:
    """What a policy would get that writes down all that its eyes see."""
    s = run.settings
    seen = ceiling(s.model, s.data, s.data_root, tuple(sorted({1, *s.images})), s.eval_samples)
    if not seen:
        return {}
    by_number = {n: [p for p in seen if len(p["labels"]) == n] for n in sorted({len(p["labels"]) for p in seen})}
    return held_out({str(n): evaluation.summarize(of) for n, of in by_number.items()}) | near(seen, within)


def read_run(run: Run) -> Outcome:
    """Raises CommandError for files that are damaged."""
    file = run.folder / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        last = [name for name in results if name.startswith("stage")][-1]
        row, base, most = held_out(results[last]), held_out(results["base"]), {}
        blind = {f"MAE@{n}": number(r["mae"]) for n, r in results["best constant by MAE"].items()}
        blind |= {f"tau@{n}": number(r["tau"]) for n, r in results["prompt order"].items()}
        if within := WITHIN.get(run.settings.data):
            row, base = (r | near(predictions_of(run, name), within) for r, name in ((row, last), (base, "base")))
            most = eyes_alone(run, within)
        file = run.folder / "metrics.jsonl"
        logs = json_lines(file)
        if run.rival == "imitation":  # it has no groups of answers
            logs = [log | dict.fromkeys(("advantage_var", "zero_spread", "mutated", "inverted")) for log in logs]
        steps = {stage: [log for log in logs if log["stage"] == stage] for stage in run.stages}
        if {stage: len(of) for stage, of in steps.items()} != run.stages:
            raise ValueError(f"it should have {run.steps} steps")
        row |= {title: mean(log.get(key) for log in logs) for title, key in STEPS.items()}
        row["steps to 90 %"] = steps_until_learned(logs)
        return Outcome(row, base, blind, most, steps)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CommandError(f"{file} is damaged ({reason}): delete {run.folder}, and it is trained again") from None
