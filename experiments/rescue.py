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

import shutil
from pathlib import Path

import torch

import data
import rarl
from experiments.commands import at_least, run_command
from experiments.runs import ROOT, Trainer, parser_of, plan, read_run
from support.datasets import load_dataset
from support.run.atomic_files import replace_folder
from support.run.checkpoints import checksum
from support.show.results import format_table, mean

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


def learned_after(steps: Steps) -> str:
    """Updates until at least LEARNED of the sampled answers are valid.

    >>> learned_after([{"format": 0.0}, {"format": 0.5}, {"format": 0.95}])
    '2'
    """
    return next((str(i) for i, step in enumerate(steps) if step["format"] >= LEARNED), "never")


def table(runs: dict[str, list[Steps]]) -> str:
    columns = {
        "valid at first": lambda steps: f"{steps[0]['format']:.0%}",
        f"updates until {LEARNED:.0%} are valid": learned_after,
        "valid at last": lambda steps: f"{steps[-1]['format']:.0%}",
        "mutated answers": lambda steps: f"{mean(step['mutated'] for step in steps):.1%}",
    }
    rows = [
        [variant, *("  " + ", ".join(map(column, seeds)) for column in columns.values())]
        for variant, seeds in runs.items()
    ]
    return format_table([["", *columns], *rows])


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
    parser = parser_of("experiments.rescue", "Show that RMO teaches a format that no answer has.")
    parser.add_argument("--steps", type=at_least(1), default=25, help="steps of each run")
    args = parser.parse_args(argv)
    common = [*SETTINGS, "--model", str(make_base(ROOT / "tiny")), "--steps1", str(args.steps)]
    planned = {
        variant: [
            plan(f"rescue-{variant.replace(' ', '-')}-{seed}", [*more, *common, "--seed", str(seed)])
            for seed in sorted(set(args.seeds))
        ]
        for variant, more in VARIANTS.items()
    }
    Trainer().train_all([run for some in planned.values() for run in some], args.jobs)
    runs = {variant: [read_run(run).steps[1] for run in some] for variant, some in planned.items()}
    text = table(runs)
    print(text)
    Path("runs/rescue.txt").write_text(text + "\n", encoding="utf-8")
    picture(runs, Path("runs/rescue.png"))
    print("wrote runs/rescue.txt and .png")


def main(argv: list[str] | None = None) -> None:
    run_command("experiments.rescue", lambda: rescue(argv))


if __name__ == "__main__":
    main()
