"""Ablations of RARL (arXiv 2601.20585) on the embedded default, each a table, a CSV and a picture. The paper's own:

    python -m experiments.ablate reward          # joint reward, regression only, ranking only, imitation
    python -m experiments.ablate rmo             # RMO and its rivals where most groups are alike and poor
    python -m experiments.ablate stages          # two stages against one

and questions that the summaries of the paper ask or leave open:

    python -m experiments.ablate rmo_unseen      # the same on a question that the base has never seen
    python -m experiments.ablate rmo_default     # RMO on and off where groups differ by themselves
    python -m experiments.ablate rescue          # RMO on and off where no answer is valid, see rescue.py; rescue_smollm2
    python -m experiments.ablate rivals          # OraRL and RMO's variants; rivals_unseen, rivals_exact
    python -m experiments.ablate rmo_k           # k = 0, 1, 2, 4: entropy, gradient norm, Var(A), MAE
    python -m experiments.ablate rmo_source      # good answers: the truth, earlier values
    python -m experiments.ablate rank            # R_rank of the listed order, of the values' order, of both
    python -m experiments.ablate advantage       # how rewards become advantages; mean over answers or tokens
    python -m experiments.ablate delta           # tolerance of R_reg; delta_skewed: where few dots are frequent
    python -m experiments.ablate balance         # labels that are skewed, as they are and drawn evenly
    python -m experiments.ablate ccc             # the same by a reward that knows the batch
    python -m experiments.ablate weights         # weight of R_rank
    python -m experiments.ablate all --jobs 2    # all of them, in less than three hours on 2 cores (OMP_NUM_THREADS=1)

and on real photographs, which `all` leaves out as it does rescue_smollm2 (make_tiny.py makes their base, runs/tiny-faces):

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
import shutil
import sys
import zlib
from pathlib import Path

from experiments import prose, skewed_dots, smollm2
from experiments.commands import CommandError, at_least, run_command
from experiments.report import report
from experiments.runs import Run, Trainer, plan
from support.run.atomic_files import replace_folder
from support.run.settings import comparable, parse_settings

# Of every run; what stands behind -- overrides it. Without validation a stage ends with its last policy. The tolerance is that
# of the tables in experiments/README.md; it was the default of dots until `delta` showed that 2 is better.
BUDGET = ["--steps1", "30", "--steps2", "45", "--images", "1", "2", "4", "--delta", "4", "--eval-samples", "100",
          "--val-samples", "1", "--validate-every", "0", "--watch-every", "0"]  # fmt: skip
DATA = {"--data", "--data-root", "--question", "--order"}
# What variants are given and nobody has, made when it is needed: folder -> what writes it
MADE = {"runs/dots-skewed": skewed_dots.write, "runs/in-prose": prose.write, "runs/smollm2": smollm2.write}

EIGHT = ["--images", "1", "2", "4", "8", "--steps2", "60"]
NO_RMO = ["--rmo-k", "0"]
TIGHT = ["--delta", "1", "--group-size", "4"]  # exact or nothing, few tries: most groups have no right answer
# tiny/ was taught other words. It answers these as it should for one image, and hardly ever for several.
UNSEEN = ["--question", "Count the spots.", "--order", "by number of spots, fewest first"]
# Photographs that make_tiny taught a policy to see. Its eyes stay as they are, so that they are looked through once a step.
FACES = ["--model", "runs/tiny-faces", "--data", "utkface", "--images", "1", "2", "4", "8", "--delta", "10",
         "--freeze-vision"]  # fmt: skip
UNSEEN_AGES = ["--question", "Guess the years.", "--order", "by years, fewest first"]
ONE_STAGE = ["--steps1", "0", "--steps2", "75"]  # as many steps as two
ONE_IMAGE = ["--steps1", "40", "--steps2", "0", "--images", "1"]
# Rare labels are drawn as they are, where train.py would draw them more often.
SKEWED = ["--data", "csv", "--data-root", "runs/dots-skewed", "--no-balance", *skewed_dots.AS_DOTS]
SINGLE = ["--stage", "1", "--images", "1", "--rmo-probability", "1"]
IN_PROSE = ["--model", "runs/in-prose", *SINGLE, "--steps1", "25"]
SMOLLM2 = ["--model", "runs/smollm2", *SINGLE, "--steps1", "10", "--lora-rank", "8", "--lora-targets", "language+vision", "--lr", "2e-3",
           "--warmup", "3", "--beta", "0", "--batch-size", "4", "--group-size", "4", "--delta", "2", "--eval-samples", "16"]  # fmt: skip


def rmo_and_others(start: list[str]) -> dict[str, list[str]]:
    """What helps where the answers of a group are all alike; see rivals.py.

    All have the same steps. Dynamic sampling asks for up to three times as many answers in one (`redrawn` says how many).
    """
    without = [*start, *NO_RMO]
    return {
        "RMO": start,
        "nothing": without,
        "dynamic sampling": ["dynamic-sampling", *without],
        "NGRPO": ["ngrpo", *without],
    }


# Seconds on one core: is a good answer outside the mean that the others are compared with better than RMO's inside it?
SHORT = ["--steps1", "0", "--steps2", "30", "--images", "1", "2", "--batch-size", "8", "--eval-samples", "50"]
EVERY_GROUP = ["--rmo-probability", "1", "--rmo-spread", "1", "--rmo-poor", "1"]


def good_answers(start: list[str]) -> dict[str, list[str]]:
    """Ways to put a good answer into a group; see rivals.py."""
    start = [*SHORT, *start]
    return {
        "nothing": [*start, *NO_RMO],
        "RMO": start,
        "RMO outside the mean": ["outside", *start],
        "RMO in every group": [*start, *EVERY_GROUP],
        "every group, outside": ["outside", *start, *EVERY_GROUP],
        "OraRL": ["orarl", *start, *NO_RMO],
        "OraRL, half": ["orarl-half", *start, *NO_RMO],
    }


# experiment -> variant -> what it changes in train.py's defaults, behind the name of a rival if it is one
EXPERIMENTS: dict[str, dict[str, list[str]]] = {
    "reward": {
        "joint": EIGHT,
        "regression only": [*EIGHT, "--w-rank", "0"],
        "ranking only": [*EIGHT, "--w-reg", "0"],
        "imitation": ["imitation", *EIGHT, "--beta", "0"],
    },
    "rmo": rmo_and_others(TIGHT),
    "rmo_unseen": rmo_and_others(UNSEEN),
    "rmo_default": {"RMO": [], "nothing": NO_RMO},
    "rescue": {"with RMO": IN_PROSE, "without RMO": [*IN_PROSE, *NO_RMO]},
    "rescue_smollm2": {"with RMO": SMOLLM2, "without RMO": [*SMOLLM2, *NO_RMO]},
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
        "Dr. GRPO": ["dr-grpo"],
        "GDPO": ["gdpo"],
        "token mean": ["--normalize", "token"],
    },
    "delta": {f"delta {d}": ["--delta", str(d)] for d in (1, 2, 4, 8)},
    "delta_skewed": {f"delta {d}": [*SKEWED, "--delta", str(d)] for d in (1, 2, 4, 8)},
    "weights": {f"rank x {w}": ["--w-rank", str(w)] for w in (0.1, 0.3, 1, 3, 10)},
    "rank": {"of the list": [], "of the values": ["rank-values"], "mean of both": ["rank-both"]},
    "ccc": {
        "R_reg": [*ONE_IMAGE, *SKEWED],
        "R_reg, drawn evenly": [*ONE_IMAGE, *SKEWED, "--balance"],
        "CCC": ["ccc", *ONE_IMAGE, *SKEWED],
    },
    "balance": {"labels as they are": SKEWED, "drawn evenly": [*SKEWED, "--balance"]},
    "stages": {"two": [], "one": ONE_STAGE},
    "faces": {
        "joint": FACES,
        "no RMO": [*FACES, *NO_RMO],
        "imitation": ["imitation", *FACES, "--beta", "0"],
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
        "OraRL": ["orarl", *FACES, *UNSEEN_AGES, *NO_RMO],
    },
}
PHOTOGRAPHS = ("faces", "faces_unseen")
NOT_IN_ALL = (*PHOTOGRAPHS, "rescue_smollm2")  # they need what others bring


def plan_run(experiment: str, variant: str, seed: int, more: list[str]) -> Run:
    """Raises SettingError if train.py would refuse the settings."""
    changes, rival = EXPERIMENTS[experiment][variant], "rarl"
    if changes and not changes[0].startswith("--"):
        rival, *changes = changes
    arguments = [*BUDGET, *changes, "--seed", str(seed), *more]
    # The name says how the settings differ from BUDGET's. So equal runs of two experiments are one run.
    usual, settings = comparable(parse_settings(BUDGET)), comparable(parse_settings(arguments))
    words = ["ablate", *([rival] if rival != "rarl" else [])]
    words += [f"{key}-{str(value)[:24]}" for key, value in settings.items() if key != "seed" and value != usual[key]]
    text = "-".join([*words, f"seed-{seed}"]).lower()
    name = "".join(c if c.isalnum() else "-" for c in text)
    if len(name) > 150:  # too long for a folder; what is cut off, the seed among it, must still tell runs apart
        name = f"{name[:140]}-{zlib.crc32(name.encode()):08x}"
    return plan(name, arguments, rival)


# --------------------------------------------------------------------------------------------------------------------
# Command line


def chosen_rows(experiment: str, only: list[str] | None) -> dict[str, list[str]]:
    """Experiment -> its variants that are to run. Raises CommandError."""
    chosen = [e for e in EXPERIMENTS if e not in NOT_IN_ALL] if experiment == "all" else [experiment]
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
    parser = argparse.ArgumentParser(
        prog="experiments.ablate", description="Run an ablation on the embedded default.", allow_abbrev=False,
        epilog="What stands after -- is given to train.py in every run.",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each variant runs once for each")
    threads = "runs at a time (set OMP_NUM_THREADS so that they fit)"
    parser.add_argument("--jobs", type=at_least(1), default=1, help=threads)
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows of the table to run and show (default: all)")
    args, more = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    given = {argument.split("=")[0] for argument in more}
    if ours := {"--name", "--seed", "--resume"} & given:
        raise CommandError(f"{min(ours)} is set for every run here: leave it out behind --")
    args.rows = chosen_rows(args.experiment, args.only)
    if args.experiment in PHOTOGRAPHS:
        check_photographs(args.experiment, more)
    for experiment, names in args.rows.items():
        about_drawings = experiment not in PHOTOGRAPHS and any(
            DATA & set(EXPERIMENTS[experiment][name]) for name in names
        )
        if about_drawings and (other := {"--preset", *DATA} & given):
            about = f"{experiment} is about drawings and what is asked of them"
            raise CommandError(f"{about}: leave out {min(other)} behind --")
    return args, more


def make_what_is_needed(runs: list[Run]) -> None:
    """The folders of MADE that the runs are given. Raises CommandError, OSError."""
    for name in sorted(set(MADE) & {word for run in runs for word in run.arguments}):
        folder = Path(name)
        if not folder.exists():
            beside = folder.with_name(folder.name + ".writing")
            shutil.rmtree(beside, ignore_errors=True)
            MADE[name](beside)
            replace_folder(beside, folder)


def ablate(argv: list[str]) -> None:
    """Raises CommandError, SettingError, OSError."""
    args, more = parse(argv)
    seeds = sorted(set(args.seeds))
    planned = {  # all are planned, and so checked, before the first one starts
        experiment: {variant: [plan_run(experiment, variant, seed, more) for seed in seeds] for variant in names}
        for experiment, names in args.rows.items()
    }
    for experiment, variants in planned.items():
        runs = [run for some in variants.values() for run in some]
        make_what_is_needed(runs)
        Trainer().train_all(runs, args.jobs)
        print(f"\n{report(experiment, variants)}\n\nwrote runs/ablate-{experiment}.txt, .csv and .png\n", flush=True)


def main(argv: list[str] | None = None) -> None:
    run_command("experiments.ablate", lambda: ablate(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
