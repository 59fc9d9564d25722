"""Ablations of RARL (arXiv 2601.20585) on the embedded default, each a table, a CSV and a picture. The paper's own:

    python -m experiments.ablate reward          # joint reward, regression only, ranking only, imitation
    python -m experiments.ablate rmo             # RMO and its rivals where most groups are alike and poor
    python -m experiments.ablate stages          # two stages against one

and questions that the summaries of the paper ask or leave open:

    python -m experiments.ablate rmo_unseen      # RMO and its rivals on a question that the base has never seen
    python -m experiments.ablate rmo_default     # RMO on and off where groups differ by themselves
    python -m experiments.ablate rivals          # OraRL and RMO's variants; rivals_unseen, rivals_exact
    python -m experiments.ablate rmo_k           # k = 0, 1, 2, 4: entropy, gradient norm, Var(A), MAE
    python -m experiments.ablate rmo_source      # good answers: the truth, earlier values
    python -m experiments.ablate rank            # R_rank of the listed order, of the values' order, of both
    python -m experiments.ablate advantage       # how rewards become advantages; mean over answers or tokens
    python -m experiments.ablate transfer        # trained on dots, evaluated on dials, and the other way round
    python -m experiments.ablate delta           # tolerance of R_reg; delta_skewed: where few dots are frequent
    python -m experiments.ablate balance         # labels that are skewed, as they are and drawn evenly
    python -m experiments.ablate ccc             # the same by a reward that knows the batch
    python -m experiments.ablate weights         # weight of R_rank
    python -m experiments.ablate noise           # joint against ranking only, from exact to very noisy labels
    python -m experiments.ablate all --jobs 2    # all of them, in about three hours on 2 cores (OMP_NUM_THREADS=1)

and on real photographs, which `all` leaves out (make_tiny.py makes their base, runs/tiny-faces):

    python -m experiments.ablate faces -- --data-root /data/utkface         # the reward, RMO, delta, balance, one stage
    python -m experiments.ablate faces_unseen -- --data-root /data/utkface  # RMO on a question that the base has never seen
    python -m experiments.ablate faces --only joint --seeds 0 -- --data-root /data/utkface     # one row, one seed

What stands behind -- is given to train.py in every run, as in `reward -- --preset utkface --model M --data-root D --steps1 500
--steps2 500`; BUDGET's numbers of steps and images stand before it and hold where nothing else is said.

Every variant is a full `train.py` run with BUDGET and a few settings changed, for every seed, in runs/ablate-CHANGES. A run that is
finished is not run again, whichever experiment asked for it, and one that was interrupted is resumed. The table shows the mean
over seeds and the range (lowest to highest), and in its first rows the policy before training and policies that do not look (the best
constant, the order of the prompt). Three seeds are few, so read a difference smaller than the ranges as none. Whatever comes out is
reported: the paper's own findings are on UTKFace with Qwen2.5-VL, these are on drawings with a model two-thousandth of its size.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import argparse
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from experiments import drawn_labels
from experiments.commands import CommandError, run_command
from experiments.report import report
from experiments.runs import Run, Trainer, parser_of, plan
from support.run.settings import comparable, parse_settings

# Of every run; what stands behind -- overrides it. Without validation a stage ends with its last policy. The tolerance is that
# of the tables in experiments/README.md; it was the default of dots until `delta` showed that 2 is better.
BUDGET = ["--steps1", "30", "--steps2", "45", "--images", "1", "2", "4", "--delta", "4", "--eval-samples", "100",
          "--val-samples", "1", "--validate-every", "0", "--watch-every", "0"]  # fmt: skip
DATA = {"--data", "--data-root", "--question", "--order"}


@dataclass
class Variant:
    """What is not said by a list of changes alone: a rival of the method, another data set for the evaluation."""

    changes: list[str] = field(default_factory=list)
    rival: str | None = None
    evaluate_on: str | None = None

    @property
    def names_data(self) -> bool:
        """Whether it says which images are looked at, or what is asked about them."""
        return self.evaluate_on is not None or not DATA.isdisjoint(self.changes)


# experiment -> variant -> what it changes in train.py's defaults
EIGHT = ["--images", "1", "2", "4", "8", "--steps2", "60"]
NO_RMO = ["--rmo-k", "0"]
TIGHT = ["--delta", "1", "--group-size", "4"]  # exact or nothing, few tries: most groups have no right answer
# tiny/ was taught other words. It answers these as it should for one image, and hardly ever for several.
UNSEEN = ["--question", "Count the spots.", "--order", "by number of spots, fewest first"]
DIALS = ["--data", "dials"]
# Photographs that make_tiny taught a policy to see. Its eyes stay as they are, so that they are looked through once a step.
FACES = ["--model", "runs/tiny-faces", "--data", "utkface", "--images", "1", "2", "4", "8", "--delta", "10",
         "--freeze-vision"]  # fmt: skip
UNSEEN_AGES = ["--question", "Guess the years.", "--order", "by years, fewest first"]
ONE_STAGE = ["--steps1", "0", "--steps2", "75"]  # as many steps as two
ONE_IMAGE = ["--steps1", "40", "--steps2", "0", "--images", "1"]


def labelled(name: str) -> list[str]:
    """Drawings of dots as files, see drawn_labels.py; drawn as they are, where train.py would draw rare labels more often."""
    return ["--data", "csv", "--data-root", f"runs/{name}", "--no-balance", *drawn_labels.AS_DOTS]


def rmo_and_others(start: list[str]) -> dict[str, list[str] | Variant]:
    """What helps where the answers of a group are all alike; see rivals.py.

    All have the same steps. Dynamic sampling asks for up to three times as many answers in one (`redrawn` says how many).
    """
    return {
        "RMO": start,
        "nothing": [*start, *NO_RMO],
        "dynamic sampling": Variant([*start, *NO_RMO], "dynamic-sampling"),
        "NGRPO": Variant([*start, *NO_RMO], "ngrpo"),
    }


# Seconds on one core: is a good answer outside the mean that the others are compared with better than RMO's inside it?
SHORT = ["--steps1", "0", "--steps2", "30", "--images", "1", "2", "--batch-size", "8", "--eval-samples", "50"]
EVERY_GROUP = ["--rmo-probability", "1", "--rmo-spread", "1", "--rmo-poor", "1"]


def good_answers(start: list[str]) -> dict[str, list[str] | Variant]:
    """Ways to put a good answer into a group; see rivals.py."""
    start = [*SHORT, *start]
    return {
        "nothing": [*start, *NO_RMO],
        "RMO": start,
        "RMO outside the mean": Variant(start, "outside"),
        "RMO in every group": [*start, *EVERY_GROUP],
        "every group, outside": Variant([*start, *EVERY_GROUP], "outside"),
        "OraRL": Variant([*start, *NO_RMO], "orarl"),
        "OraRL, half": Variant([*start, *NO_RMO], "orarl-half"),
    }


EXPERIMENTS: dict[str, dict[str, list[str] | Variant]] = {
    "reward": {
        "joint": EIGHT,
        "regression only": [*EIGHT, "--w-rank", "0"],
        "ranking only": [*EIGHT, "--w-reg", "0"],
        "imitation": Variant([*EIGHT, "--beta", "0"], "imitation"),
    },
    "rmo": rmo_and_others(TIGHT),
    "rmo_unseen": rmo_and_others(UNSEEN),
    "rmo_default": {"RMO": [], "nothing": NO_RMO},
    "rivals": good_answers([]),
    "rivals_unseen": good_answers(UNSEEN),
    "rivals_exact": good_answers(TIGHT),
    "rmo_k": {f"k = {k}": ["--delta", "1", "--rmo-k", str(k)] for k in (0, 1, 2, 4)},
    "rmo_source": {
        "truth": TIGHT,
        "history": [*TIGHT, "--rmo-source", "history"],
    },
    "advantage": {
        "GRPO": [],
        "Dr. GRPO": Variant(rival="dr-grpo"),
        "GDPO": Variant(rival="gdpo"),
        "token mean": ["--normalize", "token"],
    },
    "transfer": {
        "dots -> dots": [],
        "dots -> dials": Variant(evaluate_on="dials"),
        "dials -> dials": DIALS,
        "dials -> dots": Variant(DIALS, evaluate_on="dots"),
    },
    "delta": {f"delta {d}": ["--delta", str(d)] for d in (1, 2, 4, 8)},
    "delta_skewed": {f"delta {d}": [*labelled("dots-skewed"), "--delta", str(d)] for d in (1, 2, 4, 8)},
    "weights": {f"rank x {w}": ["--w-rank", str(w)] for w in (0.1, 0.3, 1, 3, 10)},
    "rank": {
        "of the list": [],
        "of the values": Variant(rival="rank-values"),
        "mean of both": Variant(rival="rank-both"),
    },
    "balance": {"labels as they are": labelled("dots-skewed"), "drawn evenly": [*labelled("dots-skewed"), "--balance"]},
    "ccc": {
        "R_reg": [*ONE_IMAGE, *labelled("dots-skewed")],
        "R_reg, drawn evenly": [*ONE_IMAGE, *labelled("dots-skewed"), "--balance"],
        "CCC": Variant([*ONE_IMAGE, *labelled("dots-skewed")], "ccc"),
    },
    "stages": {"two": [], "one": ONE_STAGE},
    "noise": {
        f"{name}, noise {std}": [*(labelled(f"dots-noise-{std}") if std else []), *reward]
        for std in (0, 2, 4, 8)
        for name, reward in (("joint", []), ("ranking", ["--w-reg", "0"]))
    },
    "faces": {
        "joint": FACES,
        "no RMO": [*FACES, *NO_RMO],
        "imitation": Variant([*FACES, "--beta", "0"], "imitation"),
        "regression only": [*FACES, "--w-rank", "0"],
        "ranking only": [*FACES, "--w-reg", "0"],
        "delta 5": [*FACES, "--delta", "5"],
        "delta 20": [*FACES, "--delta", "20"],
        "labels as they are": [*FACES, "--no-balance"],
        "one stage": [*FACES, *ONE_STAGE],
    },
    "faces_unseen": {
        "RMO": [*FACES, *UNSEEN_AGES],
        "nothing": [*FACES, *UNSEEN_AGES, *NO_RMO],
        "OraRL": Variant([*FACES, *UNSEEN_AGES, *NO_RMO], "orarl"),
    },
}
PHOTOGRAPHS = ("faces", "faces_unseen")


def variant_of(experiment: str, name: str) -> Variant:
    said = EXPERIMENTS[experiment][name]
    return said if isinstance(said, Variant) else Variant(said)


def plan_run(experiment: str, variant: str, seed: int, more: list[str]) -> Run:
    """Raises SettingError if train.py would refuse the settings."""
    what = variant_of(experiment, variant)
    arguments = [*BUDGET, *what.changes, "--seed", str(seed), *more]
    # The name says how the settings differ from BUDGET's. So equal runs of two experiments are one run.
    usual, settings = comparable(parse_settings(BUDGET)), comparable(parse_settings(arguments))
    words = ["ablate", what.rival or ""]
    words += [f"{key}-{str(value)[:24]}" for key, value in settings.items() if key != "seed" and value != usual[key]]
    text = "-".join(filter(None, [*words, f"seed-{seed}"])).lower()
    name = "".join(c if c.isalnum() else "-" for c in text)
    if len(name) > 150:  # too long for a folder; what is cut off, the seed among it, must still tell runs apart
        name = f"{name[:140]}-{zlib.crc32(name.encode()):08x}"
    return plan(name, arguments, what.rival, what.evaluate_on)


# --------------------------------------------------------------------------------------------------------------------
# Command line


def chosen_rows(experiment: str, only: list[str] | None) -> dict[str, list[str]]:
    """Experiment -> its variants that are to run. Raises CommandError."""
    chosen = [e for e in EXPERIMENTS if e not in PHOTOGRAPHS] if experiment == "all" else [experiment]
    rows = {e: [name for name in EXPERIMENTS[e] if not only or name in only] for e in chosen}
    if odd := set(only or ()) - {name for names in rows.values() for name in names}:
        known = ", ".join(dict.fromkeys(name for e in chosen for name in EXPERIMENTS[e]))
        raise CommandError(f"--only {min(odd)!r} is no row: {known}")
    return {e: names for e, names in rows.items() if names}


def check_photographs(experiment: str, more: list[str]) -> None:
    """Raises CommandError, SettingError."""
    settings = parse_settings([*FACES, *more])
    if not settings.data_root or not Path(settings.data_root).is_dir():
        raise CommandError(f"{experiment} needs UTKFace's aligned faces: add -- --data-root DIR")
    if not Path(settings.model, "config.json").is_file():
        raise CommandError(f"{experiment} needs {settings.model}: make it with python -m experiments.make_tiny --data")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """-> our settings, and those behind --, which go to train.py"""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = parser_of("experiments.ablate", "Run an ablation on the embedded default.")
    parser.epilog = "What stands after -- is given to train.py in every run."
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows of the table to run and show (default: all)")
    args, more = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    given = {argument.split("=")[0] for argument in more}
    if ours := {"--name", "--seed", "--resume"} & given:
        raise CommandError(f"{min(ours)} is set for every run here: leave it out behind --")
    args.rows = chosen_rows(args.experiment, args.only)
    args.experiments = list(args.rows)
    if args.experiment in PHOTOGRAPHS:
        check_photographs(args.experiment, more)
    names_data = lambda e: e not in PHOTOGRAPHS and any(variant_of(e, name).names_data for name in args.rows[e])
    drawings = list(filter(names_data, args.experiments))
    if drawings and (other := {"--preset", *DATA} & given):
        about = f"{drawings[0]} is about drawings and what is asked of them"
        raise CommandError(f"{about}: leave out {min(other)} behind --")
    return args, more


def ablate(argv: list[str]) -> None:
    """Raises CommandError, SettingError, OSError."""
    args, more = parse(argv)
    planned = {  # all are planned, and so checked, before the first one starts
        e: {variant: [plan_run(e, variant, seed, more) for seed in sorted(set(args.seeds))] for variant in args.rows[e]}
        for e in args.experiments
    }
    runs = {e: [run for seeds in of.values() for run in seeds] for e, of in planned.items()}
    left = {e: {run.name for run in some} for e, some in runs.items()}

    def report_what_is_complete(name: str) -> None:
        for experiment in [e for e in args.experiments if name in left[e]]:
            left[experiment].remove(name)
            if not left[experiment]:
                with tqdm.external_write_mode(sys.stdout):
                    print(f"\n{report(experiment, planned[experiment])}\n", flush=True)
                    print(f"wrote runs/ablate-{experiment}.txt, .csv and .png\n", file=sys.stderr)

    every = [run for some in runs.values() for run in some]
    changes = [change for e in args.experiments for name in args.rows[e] for change in variant_of(e, name).changes]
    for folder in sorted({change for change in changes if change.startswith("runs/dots-")}):  # of labelled()
        drawn_labels.make(Path(folder))
    Trainer().train_all(every, args.jobs, report_what_is_complete)


def main(argv: list[str] | None = None) -> None:
    run_command("experiments.ablate", lambda: ablate(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
