"""Ablations of RARL (arXiv 2601.20585) on the embedded default, each a table and a picture. The paper's own:

    python -m experiments.ablate reward      # joint reward, regression only, ranking only, imitation
    python -m experiments.ablate rmo         # RMO on, off, and NGRPO, where most groups are alike and poor

and questions that the summaries of the paper leave open:

    python -m experiments.ablate rmo_k       # k = 0, 1, 2, 4: entropy, gradient norm, Var(A), MAE
    python -m experiments.ablate rmo_source  # good answers from the ground truth or from the policy's own past
    python -m experiments.ablate advantage   # group std, none, each reward by itself; mean over answers or tokens
    python -m experiments.ablate delta       # tolerance of R_reg
    python -m experiments.ablate weights     # weights of the rewards
    python -m experiments.ablate stages      # two stages against one of the same length
    python -m experiments.ablate all --seeds 0 1 2

Every variant is a full `train.py` run with BUDGET and a few settings changed, for every seed, in runs/ablate-CHANGES. A run that is
finished is not run again, whichever experiment asked for it, and one that was interrupted is resumed. The table shows the mean
over seeds and the range (lowest to highest). Three seeds are few, so read a difference smaller than the ranges as none. Whatever
comes out is reported: the paper's own findings are on UTKFace with Qwen2.5-VL, these are on drawings with a model two-thousandth of its size.
"""

import support.quiet_end  # isort: skip  # noqa: F401

import argparse
import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from experiments.commands import CommandError, check_writable, run_command
from support.settings import parse_settings
from support.tables import format_number, format_table, mean

ROOT = Path(__file__).resolve().parent.parent

# Of every run; what stands behind -- overrides it. Without validation a stage ends with its last policy.
BUDGET = ["--steps1", "30", "--steps2", "60", "--images", "1", "2", "4", "8", "--eval-samples", "100",
          "--val-samples", "1", "--validate-every", "0", "--watch-every", "0"]  # fmt: skip
IMITATE = "imitate"  # in place of a setting: experiments/imitate.py is run, not train.py

# experiment -> variant -> what it changes in train.py's defaults
TIGHT = ["--delta", "1", "--group-size", "4"]  # exact or nothing, few tries: most groups have no right answer
EXPERIMENTS: dict[str, dict[str, list[str]]] = {
    "reward": {
        "joint": [],
        "regression only": ["--w-rank", "0"],
        "ranking only": ["--w-reg", "0"],
        "imitation": [IMITATE, "--beta", "0"],
    },
    "rmo": {
        "RMO on": TIGHT,
        "RMO off": [*TIGHT, "--rmo-k", "0"],
        "NGRPO": [*TIGHT, "--rmo-k", "0", "--advantage", "best"],
    },
    "rmo_k": {f"k = {k}": ["--delta", "1", "--rmo-k", str(k)] for k in (0, 1, 2, 4)},
    "rmo_source": {"truth": TIGHT, "history": [*TIGHT, "--rmo-source", "history"]},
    "advantage": {
        "group": [],
        "centred": ["--advantage", "centred"],
        "parts": ["--advantage", "parts"],
        "token mean": ["--normalize", "token"],
    },
    "delta": {f"delta {d}": ["--delta", str(d)] for d in (1, 2, 4, 8)},
    "weights": {f"rank x {w}": ["--w-rank", str(w)] for w in (0.3, 1, 3)},
    "stages": {"two stages": [], "one stage": ["--steps1", "0", "--steps2", "90"]},  # as many steps
}


Rows = dict[str, list[dict[str, float]]]  # variant -> for each seed: metric -> value


# --------------------------------------------------------------------------------------------------------------------
# Runs


@dataclasses.dataclass
class Run:
    """One training run. `settings` are what its settings.json will hold."""

    name: str
    arguments: list[str]
    settings: dict
    program: str = "train.py"

    @property
    def steps(self) -> int:
        return sum(self.settings[f"steps{stage}"] for stage in (1, 2) if self.settings["stage"] in (None, stage))

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    def is_ours(self) -> bool:
        """Whether the folder holds a run of these settings."""
        file = self.folder / "settings.json"
        try:
            return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == self.settings
        except ValueError:
            return False


def plan_run(experiment: str, variant: str, seed: int, more: list[str]) -> Run:
    """Raises SettingError if train.py would refuse the settings."""
    changes = EXPERIMENTS[experiment][variant]
    program = "experiments/imitate.py" if IMITATE in changes else "train.py"
    arguments = [*BUDGET, *(x for x in changes if x != IMITATE), "--seed", str(seed), *more]
    # The name says how the settings differ from BUDGET's. So equal runs of two experiments are one run.
    usual, settings = dataclasses.asdict(parse_settings(BUDGET)), dataclasses.asdict(parse_settings(arguments))
    changed = [f"{key}-{value}" for key, value in settings.items() if key != "seed" and value != usual[key]]
    words = [*(["imitate"] if IMITATE in changes else []), *changed, f"seed-{seed}"]
    name = f"ablate-{slug('-'.join(words))}"
    if len(name) > 150:  # too long for a folder; what is cut off, the seed among it, must still tell runs apart
        name = f"{name[:140]}-{zlib.crc32(name.encode()):08x}"
    return plan(name, arguments, program)


def plan(name: str, arguments: list[str], program: str = "train.py") -> Run:
    """Raises SettingError if train.py would refuse the settings."""
    arguments = ["--name", name, *arguments]
    return Run(name, arguments, json.loads(json.dumps(dataclasses.asdict(parse_settings(arguments)))), program)


def slug(variant: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in variant.lower())


class Trainer:
    """Trains runs, each in a process of its own as on the command line. What it prints goes to runs/NAME.log."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.children: list[subprocess.Popen] = []
        self.stopped = False

    def train_all(self, runs: list[Run], jobs: int) -> None:
        """`jobs` at a time. If one fails, or at Ctrl-C, the others save and stop too, and no further one begins."""
        with ThreadPoolExecutor(jobs) as pool:  # threads that wait for processes
            try:
                with tqdm(total=sum(run.steps for run in runs), unit="step", desc=f"{len(runs)} runs") as bar:
                    for run, _ in zip(runs, pool.map(self.train_unless_done, runs), strict=True):
                        bar.update(run.steps)
            finally:
                self.stop()

    def train_unless_done(self, run: Run) -> None:
        if run.is_ours() and (run.folder / "results.txt").exists():
            return
        log = run.folder.with_name(run.name + ".log")
        log.parent.mkdir(exist_ok=True)
        resume = ["--resume"] if run.is_ours() else []
        command = [sys.executable, str(ROOT / run.program), *run.arguments, *resume]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # for a program in experiments/
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        with open(log, "w", encoding="utf-8") as file:
            with self.lock:
                if self.stopped:
                    return
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                self.children.append(process)
            process.wait()
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no message"]
            raise CommandError(f"{run.name} failed ({lines[-1][:200]}): see {log}, and start again to go on")

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.children:
                process.terminate()  # of a process that has ended, nothing


def read_run(folder: Path, steps: int) -> dict[str, float]:
    """What a table row shows of one run: held-out metrics of the final policy, and means over its `steps` of training.

    Raises CommandError for files that are damaged.
    """
    file = folder / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        final = results[[name for name in results if name.startswith("stage")][-1]]
        nan = lambda x: math.nan if x is None else float(x)
        row = {
            "valid": min(nan(r["valid"]) for r in final.values()),
            **{f"MAE@{n}": nan(r["mae"]) for n, r in final.items()},
        }
        for metric in ("tau", "tau_values"):
            row |= {f"{metric}@{n}": nan(r[metric]) for n, r in final.items() if n != "1"}
        file = folder / "metrics.jsonl"
        logs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if len({(log["stage"], log["step"]) for log in logs}) != steps:
            raise ValueError(f"it should have {steps} steps")
        means = {"entropy": "entropy", "grad norm": "grad_norm", "Var(A)": "advantage_var", "zero spread": "zero_spread", "mutated": "mutated"}  # fmt: skip
        return row | {title: mean(log.get(key) for log in logs) for title, key in means.items()}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CommandError(f"{file} is damaged ({reason}): delete {folder}, and it is trained again") from None


# --------------------------------------------------------------------------------------------------------------------
# Tables and pictures


def cell(values: list[float]) -> str:
    """Mean and range over seeds; "of 2" if a metric is undefined in the others, as tau is without a valid answer."""
    known = [x for x in values if not math.isnan(x)]
    if not known:
        return "-"
    low, middle, high = (format_number(x) for x in (min(known), mean(known), max(known)))
    text = f"{middle} ({low} to {high})"
    return text if len(known) == len(values) else f"{text} of {len(known)}"


def table_rows(rows: Rows) -> list[list[str]]:
    names = list(next(iter(rows.values()))[0])
    cells = [[variant, *(cell([row[name] for row in seeds]) for name in names)] for variant, seeds in rows.items()]
    return [["", *names], *cells]


def write_csv(rows: Rows, seeds: list[int], path: Path) -> None:
    """A line for each variant and seed. What is undefined stays empty."""
    names = list(next(iter(rows.values()))[0])
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", *names])
        for variant, of in rows.items():
            for seed, row in zip(seeds, of, strict=True):
                writer.writerow([variant, seed, *("" if math.isnan(row[name]) else row[name] for name in names)])


def picture(experiment: str, rows: Rows, path: Path) -> None:
    """MAE and tau of each variant: a bar for the mean over seeds, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in next(iter(rows.values()))[0] if name.startswith(("MAE", "tau"))]
    wide = min(5, len(shown))
    high = -(-len(shown) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(3.2 * wide, 3.4 * high), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown, strict=False):
        for x, (variant, seeds) in enumerate(rows.items()):
            values = [row[name] for row in seeds]
            axis.bar(x, mean(values), width=0.6, color=f"C{x}", alpha=0.55, label=variant)
            axis.plot([x] * len(values), values, "o", color="black", markersize=4)
        axis.set_title(name + (" (lower is better)" if name.startswith("MAE") else ""), fontsize=10)
        axis.set_xticks(range(len(rows)), list(rows), rotation=20, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{experiment}: test set after both stages; bar = mean, dots = seeds", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """-> our settings, and those behind --, which go to train.py"""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="experiments.ablate",
        description="Run an ablation on the embedded default.",
        epilog="What stands after -- is given to train.py in every run.",
        allow_abbrev=False,
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each variant runs once for each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (set OMP_NUM_THREADS so that they fit)")
    args = parser.parse_args(argv[:cut])
    if args.jobs < 1:
        raise CommandError(f"--jobs {args.jobs} must be at least 1")
    if len(set(args.seeds)) < len(args.seeds):
        raise CommandError("--seeds must all differ")
    more = argv[cut + 1 :]
    ours = {"--name", "--seed", "--resume"} & {argument.split("=")[0] for argument in more}
    if ours:
        raise CommandError(f"{min(ours)} is set for every run here: leave it out behind --")
    return args, more


def ablate(argv: list[str]) -> None:
    """Raises CommandError, SettingError, OSError."""
    args, more = parse(argv)
    experiments = list(EXPERIMENTS) if args.experiment == "all" else [args.experiment]
    runs = {  # all are planned, and so checked, before the first one starts
        (experiment, variant): [plan_run(experiment, variant, seed, more) for seed in args.seeds]
        for experiment in experiments
        for variant in EXPERIMENTS[experiment]
    }
    check_writable(Path(f"runs/ablate-{experiments[0]}.txt"), "runs/")
    different = {run.name: run for of in runs.values() for run in of}
    print(f"{len(different)} runs, {sum(run.steps for run in different.values())} steps", file=sys.stderr)
    for experiment in experiments:
        ours = {run.name: run for (e, _), of in runs.items() if e == experiment for run in of}
        Trainer().train_all(list(ours.values()), args.jobs)
        rows = {v: [read_run(run.folder, run.steps) for run in of] for (e, v), of in runs.items() if e == experiment}
        text = format_table([[row[0], *(f" {c}" for c in row[1:])] for row in table_rows(rows)])
        seeds = f"{len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}"
        print(f"\n{experiment}, {seeds}: mean (lowest to highest)\n\n{text}", flush=True)
        Path(f"runs/ablate-{experiment}.txt").write_text(text + "\n", encoding="utf-8")
        write_csv(rows, args.seeds, Path(f"runs/ablate-{experiment}.csv"))
        picture(experiment, rows, Path(f"runs/ablate-{experiment}.png"))
        print(f"\nwrote runs/ablate-{experiment}.txt, .csv and .png", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    run_command("experiments.ablate", lambda: ablate(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
