"""Ablations of RARL (arXiv 2601.20585) on the embedded default, each a table and a picture. The paper's own:

    python -m experiments.ablate reward          # joint reward against regression only and ranking only
    python -m experiments.ablate rmo             # RMO on and off where most groups are alike and poor

and questions that the summaries of the paper leave open:

    python -m experiments.ablate rmo_k           # k = 0, 1, 2, 4: entropy, gradient norm, Var(A), MAE
    python -m experiments.ablate rmo_source      # good answers from the ground truth or from the policy's own past
    python -m experiments.ablate delta           # tolerance of R_reg
    python -m experiments.ablate weights         # weights of the rewards
    python -m experiments.ablate stages          # two stages against one of the same length
    python -m experiments.ablate all --seeds 0 1 2

Every variant is a full `train.py` run with a few settings changed, for every seed, in runs/ablate-EXPERIMENT-VARIANT-SEED. A
run that is finished is not run again, so an interrupted ablation goes on with the run that it was at. The table shows the mean over
seeds and the range (lowest to highest); three seeds are few, so read a difference smaller than the ranges as none.
Whatever comes out is reported: the paper's own findings are on UTKFace with Qwen2.5-VL, these are drawings and a model
two-thousandth of its size.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import train

HERE = Path(__file__).resolve().parent.parent

# experiment -> variant -> what it changes in train.py's defaults
TIGHT = ["--delta", "1", "--group-size", "4"]  # exact or nothing, few tries: most groups have no right answer
EXPERIMENTS: dict[str, dict[str, list[str]]] = {
    "reward": {
        "joint": [],
        "regression only": ["--w-rank", "0"],
        "ranking only": ["--w-reg", "0"],
    },
    "rmo": {"RMO on": TIGHT, "RMO off": [*TIGHT, "--rmo-k", "0"]},
    "rmo_k": {f"k = {k}": ["--delta", "1", "--rmo-k", str(k)] for k in (0, 1, 2, 4)},
    "rmo_source": {"truth": TIGHT, "history": [*TIGHT, "--rmo-source", "history"]},
    "delta": {f"delta {d}": ["--delta", str(d)] for d in (1, 2, 4, 8)},
    "weights": {f"rank x {w}": ["--w-rank", str(w)] for w in (0.3, 1, 3)},
    "stages": {"two stages": [], "one stage": ["--steps1", "0", "--steps2", "200"]},  # about equal time
}


def run_one(name: str, arguments: list[str]) -> Path:
    out = Path("runs") / name
    settings = json.loads(json.dumps(dataclasses.asdict(train.parse_settings(["--name", name, *arguments]))))
    done = (out / "results.txt").exists() and json.loads((out / "settings.json").read_text()) == settings
    if not done:
        log = out.with_suffix(".log")
        log.parent.mkdir(exist_ok=True)
        with open(log, "w") as file:
            command = [sys.executable, str(HERE / "train.py"), "--name", name, *arguments]
            process = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
        if process.returncode:
            raise SystemExit(f"ablate.py: {name} failed, see {log}")
    return out


def measure(out: Path) -> dict[str, float]:
    """What a table row shows of one run: held-out metrics of the final policy, and means over the steps of training."""
    results = json.loads((out / "results.json").read_text())
    final = list(results.values())[-1]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def mean(key: str) -> float:
        values = [m[key] for m in metrics if m.get(key) is not None]
        return sum(values) / len(values) if values else math.nan

    nan = lambda x: math.nan if x is None else x
    row = {"valid": min(r["valid"] for r in final.values()), "MAE@1": nan(final["1"]["mae"])}
    row |= {f"tau@{n}": nan(r["tau"]) for n, r in final.items() if n != "1"}
    row |= {"entropy": mean("entropy"), "grad norm": mean("grad_norm"), "Var(A)": mean("advantage_var")}
    return row | {"zero spread": mean("zero_spread"), "mutated": mean("mutated")}


def defined(values: list[float]) -> list[float]:
    return [x for x in values if not math.isnan(x)]


def cell(values: list[float]) -> str:
    """Mean and range over seeds; "of 2" if a metric is undefined in the others, as tau is without a valid answer."""
    known = defined(values)
    if not known:
        return "-"
    text = f"{sum(known) / len(known):.3f} ({min(known):.3f} to {max(known):.3f})"
    return text if len(known) == len(values) else f"{text} of {len(known)}"


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    names = list(next(iter(rows.values()))[0])
    lines = [["", *names]]
    for variant, seeds in rows.items():
        lines.append([variant, *(cell([row[name] for row in seeds]) for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def picture(experiment: str, rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    """MAE and tau of each variant: a bar for the mean over seeds, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in next(iter(rows.values()))[0] if name.startswith(("MAE", "tau"))]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 3.4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        for x, (variant, seeds) in enumerate(rows.items()):
            values = defined([row[name] for row in seeds]) or [math.nan]
            axis.bar(x, sum(values) / len(values), width=0.6, color=f"C{x}", alpha=0.55, label=variant)
            axis.plot([x] * len(values), values, "o", color="black", markersize=4)
        axis.set_title(name + (" (lower is better)" if name.startswith("MAE") else ""), fontsize=10)
        axis.set_xticks(range(len(rows)), list(rows), rotation=20, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{experiment}: test set after both stages; bar = mean, dots = seeds", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, more = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(
        description="Run an ablation on the embedded default.",
        epilog="What stands after -- is given to train.py in every run.",
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each variant runs once for each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (set OMP_NUM_THREADS so that they fit)")
    args = parser.parse_args(argv)
    for experiment in EXPERIMENTS if args.experiment == "all" else [args.experiment]:
        jobs = {}
        for variant, changes in EXPERIMENTS[experiment].items():
            for seed in args.seeds:
                name = f"ablate-{experiment}-{slug(variant)}-{seed}"
                jobs[variant, seed] = (name, [*changes, "--seed", str(seed), *more])
        with ThreadPoolExecutor(args.jobs) as pool:  # threads that wait for processes
            outs = dict(zip(jobs, pool.map(lambda job: run_one(*job), jobs.values()), strict=True))
        rows = {v: [measure(outs[v, seed]) for seed in args.seeds] for v in EXPERIMENTS[experiment]}
        text = table(rows)
        print(f"\n{experiment}, {len(args.seeds)} seeds: mean (lowest to highest)\n\n{text}")
        Path(f"runs/ablate-{experiment}.txt").write_text(text + "\n")
        picture(experiment, rows, Path(f"runs/ablate-{experiment}.png"))
        print(f"\nwrote runs/ablate-{experiment}.txt and runs/ablate-{experiment}.png", file=sys.stderr)


def slug(variant: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in variant.lower())


if __name__ == "__main__":
    main()
