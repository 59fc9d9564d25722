"""RMO's rescue (arXiv 2601.20585): with RMO a base that never answers in the asked format learns it, without RMO it learns
nothing.

    python -m experiments.rescue

The base is tiny/ after it was taught, by imitation, to answer every question in prose: "I cannot tell.". None of its answers
is valid, all earn 0, so no group has spread and GRPO has no gradient. RMO (k = 1, in every group that is alike and poor) puts
the true answer among the eight of a group: its advantage is sqrt(7) = 2.65, that of the others -0.38. Once the policy writes the
format now and then by itself, groups have spread, RMO acts no more, and GRPO goes on alone.

Three seeds each, single images, 25 steps; runs/rescue.txt and runs/rescue.png. A run that is done is not run again, and one that
was interrupted is resumed. The base is made anew when tiny/ has changed.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import argparse
import json
import math
import shutil
from pathlib import Path

import torch

import data
import rarl
from experiments.commands import CommandError, check_writable, run_command
from experiments.runs import ROOT, Trainer, plan
from support.datasets import load_dataset
from support.run.atomic_files import replace_folder
from support.run.checkpoints import checksum
from support.show.results import format_table

PROSE = "I cannot tell."
VARIANTS = {"with RMO": ["--rmo-probability", "1"], "without RMO": ["--rmo-k", "0"]}
SETTINGS = ["--stage", "1", "--images", "1", "--eval-samples", "100", "--watch-every", "0", "--validate-every", "0"]
LEARNED = 0.9  # share of valid answers

Steps = list[dict]  # of one run: the lines of its metrics.jsonl


def make_base(tiny: Path, most_steps: int = 300) -> Path:
    """tiny/ taught to answer in prose, in a folder that is named after its weights. -> that folder"""
    folder = Path(f"runs/rescue-base-{checksum(tiny / 'model.safetensors'):08x}")
    if folder.is_dir():
        return folder
    policy = rarl.load_policy(tiny)
    policy.model.model.visual.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-4)
    sampler = data.Sampler(load_dataset("dots"), (1,), batch_size=16, seed=0)
    (prose,) = rarl.encode(policy, [PROSE])  # (T,)
    for step in range(most_steps):
        prompts = data.make_prompts(policy, sampler.batch(step))
        ids = prose.expand(len(prompts), -1)  # (B, T)
        logp, _ = rarl.logprobs(policy, prompts, ids, torch.ones_like(ids, dtype=torch.bool))
        loss = -logp.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 1e-4:  # then hardly one answer in a thousand is another one
            break
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    rarl.save_policy(policy, beside)
    replace_folder(beside, folder)
    return folder


def read_steps(folder: Path, count: int) -> Steps:
    """The lines of metrics.jsonl. Raises CommandError unless there are `count` of them."""
    file = folder / "metrics.jsonl"
    try:
        steps = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if len(steps) != count or not all(0 <= step["format"] <= 1 for step in steps):
            raise ValueError(f"it should have {count} steps")
        return steps
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{file} is damaged ({error}): delete {folder}, and it is trained again") from None


def learned_after(steps: Steps) -> int | None:
    """Updates until at least LEARNED of the sampled answers are valid; None: never.

    >>> learned_after([{"format": 0.0}, {"format": 0.5}, {"format": 0.95}])
    2
    """
    return next((i for i, step in enumerate(steps) if step["format"] >= LEARNED), None)


def table(runs: dict[str, list[Steps]]) -> str:
    rows = [["", "valid at first", f"updates until {LEARNED:.0%} are valid", "valid at last", "mutated answers"]]
    for variant, seeds in runs.items():
        learned = ["never" if (n := learned_after(steps)) is None else str(n) for steps in seeds]
        first, last = (", ".join(f"{steps[i]['format']:.0%}" for steps in seeds) for i in (0, -1))
        mutated = ", ".join(f"{math.fsum(s['mutated'] for s in steps) / len(steps):.1%}" for steps in seeds)
        rows.append([variant, f"  {first}", f"  {', '.join(learned)}", f"  {last}", f"  {mutated}"])
    return format_table(rows)


def picture(runs: dict[str, list[Steps]], path: Path) -> None:
    """Over the steps, a line for each seed: valid answers, groups without spread, R_reg."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"format": "valid answers", "zero_spread": "groups whose answers all earn the same", "regression": "R_reg"}
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for colour, (variant, seeds) in zip(("#1a7f37", "#cf222e"), runs.items(), strict=True):
            for i, steps in enumerate(seeds):
                axis.plot([step[name] for step in steps], color=colour, label=None if i else variant, linewidth=1.6)
        axis.set_title(title, fontsize=11)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def rescue(argv: list[str] | None) -> None:
    """Raises CommandError, SettingError, OSError."""
    parser = argparse.ArgumentParser(
        prog="experiments.rescue", description="Show that RMO teaches a format that no answer has.", allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each variant runs once for each")
    parser.add_argument("--steps", type=int, default=25, help="steps of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (set OMP_NUM_THREADS so that they fit)")
    parser.add_argument("--out", type=Path, default=Path("runs/rescue.png"), help="the picture")
    args = parser.parse_args(argv)
    if min(args.steps, args.jobs) < 1:
        raise CommandError("--steps and --jobs must be at least 1")
    if len(set(args.seeds)) < len(args.seeds):
        raise CommandError("--seeds must all differ")
    if args.out.suffix != ".png":
        raise CommandError(f"--out {args.out} must end in .png")
    check_writable(args.out, "--out")
    check_writable(Path("runs/rescue.txt"), "runs/")
    base = make_base(ROOT / "tiny")
    common = [*SETTINGS, "--model", str(base), "--steps1", str(args.steps)]
    planned = {
        variant: [
            plan(f"rescue-{variant.replace(' ', '-')}-{seed}", [*more, *common, "--seed", str(seed)])
            for seed in args.seeds
        ]
        for variant, more in VARIANTS.items()
    }
    Trainer().train_all([run for some in planned.values() for run in some], args.jobs)
    runs = {variant: [read_steps(run.folder, args.steps) for run in some] for variant, some in planned.items()}
    text = table(runs)
    print(text)
    Path("runs/rescue.txt").write_text(text + "\n", encoding="utf-8")
    picture(runs, args.out)
    print(f"wrote runs/rescue.txt and {args.out}")


def main(argv: list[str] | None = None) -> None:
    run_command("experiments.rescue", lambda: rescue(argv))


if __name__ == "__main__":
    main()
