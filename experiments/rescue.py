"""RMO's rescue (arXiv 2601.20585): with RMO a base that never answers in the asked format learns it, without RMO it learns
nothing.

    python -m experiments.rescue
    python -m experiments.rescue --language-model smollm2

The base of the first is tiny/ after it was taught, by imitation, to answer every question in prose: "I cannot tell.". None of its answers
is valid, all earn 0, so no group has spread and GRPO has no gradient. RMO (k = 1, in every group that is alike and poor) puts
the true answer among the eight of a group: its advantage is sqrt(7) = 2.65, that of the others -0.38. Once the policy writes the
format now and then by itself, groups have spread, RMO acts no more, and GRPO goes on alone.

The base of the second is a real language model of 135 M parameters with eyes that were never taught (smollm2.py): it was not made
for this, nothing was taken from it, and it answers in prose and in JSON of other kinds. It is trained by LoRA, in groups of four,
without KL (the reference is what it is to get away from).

Three seeds each, single images; runs/rescue.txt and runs/rescue.png, or runs/rescue-smollm2.*: a table, curves, and what the
first seed answers to the same test images before and after. A run that is done is not run again, and one that was interrupted is
resumed. The base is made anew when what it is made of has changed.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import math
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import data
import rarl
from experiments import smollm2
from experiments.commands import at_least, run_command
from experiments.runs import LEARNED, ROOT, Run, Trainer, parser_of, plan, predictions_of, read_run, steps_until_learned
from support.datasets import load_dataset
from support.run.atomic_files import replace_folder
from support.run.checkpoints import checksum
from support.show.results import format_table, mean

PROSE = "I cannot tell."
VARIANTS = {"with RMO": ["--rmo-probability", "1"], "without RMO": ["--rmo-k", "0"]}
SETTINGS = ["--stage", "1", "--images", "1", "--watch-every", "0", "--validate-every", "0"]
Steps = list[dict]  # of one run: the lines of its metrics.jsonl


@dataclass(frozen=True)
class Base:
    """A policy that never answers in the asked format, and how it is trained.

    name      of its runs and files        source    the file that it is made of
    """

    name: str
    source: Callable[[], Path]
    make: Callable[[], rarl.Policy]
    settings: list[str]
    steps: int

    def folder(self) -> Path:
        """Where it lies: named after what it is made of, and made if it is not there."""
        folder = Path(f"runs/{self.name}-base-{checksum(self.source()):08x}")
        if not folder.is_dir():
            beside = folder.with_name(folder.name + ".writing")
            shutil.rmtree(beside, ignore_errors=True)
            rarl.save_policy(self.make(), beside)
            replace_folder(beside, folder)
        return folder


def in_prose(most_steps: int = 300) -> rarl.Policy:
    """tiny/ taught to answer in prose."""
    policy = rarl.load_policy(ROOT / "tiny")
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
    return policy


BASES = {
    "tiny": Base("rescue", lambda: ROOT / "tiny/model.safetensors", in_prose, ["--eval-samples", "100"], 25),
    "smollm2": Base(
        "rescue-smollm2", smollm2.gguf_file, smollm2.build_policy,
        ["--lora-rank", "8", "--lora-targets", "language+vision", "--lr", "2e-3", "--warmup", "3", "--beta", "0",
         "--batch-size", "4", "--group-size", "4", "--eval-samples", "16"], 10,
    ),
}  # fmt: skip


def learned_after(steps: Steps) -> str:
    """Updates until at least LEARNED of the sampled answers are valid.

    >>> learned_after([{"format": 0.0}, {"format": 0.5}, {"format": 0.95}])
    '2'
    """
    updates = steps_until_learned(steps)
    return "never" if math.isnan(updates) else f"{updates:g}"


def table(runs: dict[str, list[Steps]]) -> str:
    columns = {
        "valid at first": lambda steps: f"{steps[0]['format']:.0%}",
        f"updates until {LEARNED:.0%} are valid": learned_after,
        "valid at last": lambda steps: f"{steps[-1]['format']:.0%}",
        "mutated answers": lambda steps: f"{mean(step['mutated'] for step in steps):.1%}",
        "largest gradient": lambda steps: f"{max(step['grad_norm'] for step in steps):.2g}",
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


def answers(base: Run, trained: dict[str, Run], few: int = 4) -> str:
    """What the base and the trained policies say to the same test images, as the greedy answers in the runs' folders."""
    said = {"before": predictions_of(base, "base")}
    said |= {variant: predictions_of(run, "stage 1") for variant, run in trained.items()}
    lines = []
    for i, before in enumerate(said["before"][:few]):
        lines.append(f"{before['labels'][0]:g} in the image")
        lines += [f"  {name:12} {textwrap.shorten(some[i]['text'], 110)}" for name, some in said.items()]
    return "\n".join(lines)


def rescue(argv: list[str] | None) -> None:
    """Raises CommandError, SettingError, OSError."""
    parser = parser_of("experiments.rescue", "Show that RMO teaches a format that no answer has.")
    parser.add_argument("--language-model", choices=BASES, default="tiny", help="what is to be rescued (default: tiny)")
    parser.add_argument("--steps", type=at_least(1), help="of each run (default: 25; smollm2: 10)")
    args = parser.parse_args(argv)
    base = BASES[args.language_model]
    common = [*SETTINGS, *base.settings, "--model", str(base.folder()), "--steps1", str(args.steps or base.steps)]
    planned = {
        variant: [
            plan(f"{base.name}-{variant.replace(' ', '-')}-{seed}", [*more, *common, "--seed", str(seed)])
            for seed in sorted(set(args.seeds))
        ]
        for variant, more in VARIANTS.items()
    }
    Trainer().train_all([run for some in planned.values() for run in some], args.jobs)
    runs = {variant: [read_run(run).steps[1] for run in some] for variant, some in planned.items()}
    first = {variant: some[0] for variant, some in planned.items()}
    text = f"{table(runs)}\n\n{answers(first['with RMO'], first)}"
    print(text)
    Path(f"runs/{base.name}.txt").write_text(text + "\n", encoding="utf-8")
    picture(runs, Path(f"runs/{base.name}.png"))
    print(f"wrote runs/{base.name}.txt and .png")


def main(argv: list[str] | None = None) -> None:
    transformers.utils.logging.disable_progress_bar()  # of reading and saving weights
    run_command("experiments.rescue", lambda: rescue(argv))


if __name__ == "__main__":
    main()
