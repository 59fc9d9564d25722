"""What is seen of a run while it trains: metrics of a step over all ranks, its time, progress, warnings, trackers, evidence.

Nothing here changes what is learned, with one exception: `Monitor` ends a run whose steps are bad (a loss or gradient
that is not finite) again and again.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from support.learner.stage import Batch
from support.learner.world import World
from support.run.settings import SettingError, Settings
from support.show.curves import watch_curves
from support.show.results import append_line, finite, mean
from support.show.sheets import describe_group, watch_group

BAD_STEPS = 5  # in a row, and the run ends
SAME = 1e-9  # rewards that differ by no more are equal: sums of the same parts in another order differ in the last bit

# --------------------------------------------------------------------------------------------------------------------
# Metrics of one step


def rollout_numbers(batch: Batch) -> dict[str, list]:
    """What to average over the sampled answers (before any mutation) of this process: name -> numbers."""
    rewards, G = batch.sampled_rewards, batch.group_size
    samples = [sample for sample in batch.samples for _ in range(G)]  # N, one for each answer
    totals = torch.tensor([r.total for r in rewards], dtype=torch.float64).view(-1, G)
    return {
        "reward": [r.total for r in rewards],
        "format": [r.format for r in rewards],
        "regression": [r.regression for r in rewards],
        "ranking": [r.ranking for r, sample in zip(rewards, samples, strict=True) if len(sample.items) > 1],
        "mae": [
            abs(value - sample.labels[image - 1])
            for r, sample in zip(rewards, samples, strict=True)
            for image, value in r.answer or ()  # of the values in valid answers
        ],
        "tokens": batch.sampled_tokens.tolist() if batch.sampled_tokens is not None else [],
        "zero_spread": (totals.amax(1) - totals.amin(1) <= SAME).tolist(),
        "mutated": batch.mutated.tolist(),
        "advantage": batch.advantages.flatten().tolist(),
    }


def rollout_metrics(numbers: list[dict[str, list]]) -> dict[str, float | None]:
    """Every rank's numbers -> their means over all; None where there is nothing to average."""
    joined = {name: [x for ranks in numbers for x in ranks[name]] for name in numbers[0]}
    advantages = torch.tensor(joined.pop("advantage"))
    return {name: sum(xs) / len(xs) if xs else None for name, xs in joined.items()} | {
        "advantage_var": advantages.var(correction=0).item()
    }


class UpdateLog:
    """Metrics of the updates on one batch. Sums over tokens add up over micro-batches and processes, means would not.

    metrics  of all updates so far. Most are those of the first one, which the answers are on-policy for; ratio and clipped
             shares are those of the last, which tell how far the policy has moved from the one that sampled
    """

    def __init__(self, world: World, max_tokens_per_forward: int) -> None:
        self.world, self.limit = world, max_tokens_per_forward
        self.metrics: dict[str, Any] = {}
        self.sums: list[dict[str, float]] = []  # of each micro-batch of this update
        self.measured: dict[str, Any] = {}  # means of this update over all processes

    def add(self, micro: Batch, logp: Tensor, entropy: Tensor, loss: Tensor, stats: dict[str, Tensor]) -> None:
        """logp, entropy (N, T). loss, stats: what grpo_loss returned."""
        if micro.filler:
            return
        logp, loss = logp.detach(), loss.detach()
        sampled = micro.mask & ~micro.mutated[:, None].to(micro.mask.device)  # (N, T), False on mutated answers
        gap = (logp - micro.sampled_logp).abs().masked_fill(~sampled, 0.0)
        sums: dict[str, Tensor] = {
            "loss": loss,
            "policy_loss": stats["policy_loss"],
            "tokens": stats["tokens"],
            **{k: stats[k] * stats["tokens"] for k in ("kl", "ratio", "clip_low", "clip_high") if k in stats},
            "sampled": sampled.sum(),
            "entropy": entropy.masked_fill(~sampled, 0.0).sum(),
            "gap": gap.sum(),
            "gap_max": gap.max(),
            "mutated_logp": logp.masked_fill(sampled, 0.0).sum(),
            "packed": sum(len(p.ids) for p in micro.prompts) + (micro.mask.sum(1) - 1).sum(),
        }
        self.sums.append({name: float(value) for name, value in sums.items()})

    def close_epoch(self, grad_norm: float, bad: bool) -> None:
        """bad: the step was skipped, as its loss or gradient was not finite."""
        if not self.metrics:
            self.metrics = self.measured | {"grad_norm": grad_norm}
        for name in ("ratio", "clip_low", "clip_high"):
            self.metrics[name] = self.measured.get(name)
        self.metrics["bad"] = bad
        self.sums = []

    def mean_loss(self) -> float:
        """The loss of this update over all processes. It finds the other means too; None: nothing to average."""
        world = self.world
        parts = [part for parts in world.gather(self.sums) for part in parts]
        total = {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}
        tokens, sampled = total.get("tokens", 0.0), total.get("sampled", 0.0)
        average = lambda name, count: total[name] / count if count else None
        self.measured = {
            # Each rank's loss is `size` times its share: see `denominator` in Learner.micro_batches.
            "loss": total.get("loss", 0.0) / world.size,
            "policy_loss": total.get("policy_loss", 0.0) / world.size,
            "entropy": average("entropy", sampled),  # of the policy's own answers
            **{name: average(name, tokens) for name in ("kl", "ratio", "clip_low", "clip_high") if name in total},
            # How far the update's log-probs are from those under which the answers were sampled: rounding, or a bug.
            "logp_gap_mean": average("gap", sampled),
            "logp_gap_max": max((part["gap_max"] for part in parts), default=None),
            "mutated_logp": average("mutated_logp", tokens - sampled),
            "pack_fill": total["packed"] / (len(parts) * self.limit) if parts else None,
        }
        return self.measured["loss"]


class Clock:
    """Seconds of each phase of a step, on this process. A phase ends in numbers on the CPU, so no GPU is waited for here."""

    def __init__(self) -> None:
        self.last, self.phases = time.perf_counter(), dict[str, float]()

    def lap(self, phase: str) -> None:
        """`phase` is what was done since the lap before."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        """The phases since `take` was called before."""
        phases, self.phases = self.phases, {}
        return phases


# --------------------------------------------------------------------------------------------------------------------
# Warnings


class Warnings:
    """Says once, plainly, when a run shows a known failure of RL with verifiable rewards. Thresholds are ours.

    steps        that a sign is judged by; improvement is what the last ones have over the first ones
    first_steps  that a dead start is judged by
    """

    def __init__(self, steps: int = 20, first_steps: int = 5):
        self.steps, self.first_steps = steps, first_steps
        self.logs: list[dict] = []
        self.said: set[str] = set()

    def __call__(self, log: dict, max_reward: float) -> str | None:
        """log: metrics of a step. -> what is wrong and what to try, at most once for each sign"""
        self.logs.append(log | {"reward": log["reward"] / max_reward})
        first, last = self.logs[: self.steps], self.logs[-self.steps :]
        known = lambda name, logs=last: mean(log.get(name) for log in logs)
        gain = lambda name: known(name) - known(name, first)
        enough, alike, reward = len(self.logs) >= 2 * self.steps, known("zero_spread"), known("reward")
        signs = [
            (len(self.logs) == self.first_steps and alike > 0.98 and reward < 0.9,
             "dead start: so far the answers of every group earned the same, so nothing but RMO teaches: raise --temperature, "
             "--group-size, --rmo-k and --rmo-probability, or --delta if the values are far off; look at predictions_base.jsonl"),
            (enough and alike > 0.8 and reward < 0.9,
             "collapse: the answers of most groups are alike and not good: raise --temperature, --rmo-probability or --beta"),
            (enough and gain("format") > 0.1 and gain("regression") < 0.01 and not gain("ranking") >= 0.01,
             "reward hacking: the format improves, values and order do not: lower --w-format, or look at the predictions"),
            (enough and known("grad_norm") < 1e-4 and reward < 0.5,
             "stuck: hardly any gradient while the reward is low: raise --rmo-k, --rmo-probability or --group-size"),
        ]  # fmt: skip
        new = [sign for present, sign in signs if present and sign not in self.said]
        self.said |= set(new[:1])
        return new[0] if new else None


# --------------------------------------------------------------------------------------------------------------------
# A stage


class Monitor:
    """Writes metrics.jsonl, timing.jsonl and validation.jsonl, shows the progress line, keeps the evidence of bad steps."""

    def __init__(self, folder: Path, stage: int, first: int, steps: int, world: World, s: Settings):
        self.folder, self.stage, self.world = folder, stage, world
        self.watch_every = s.watch_every
        self.in_turn = len(s.images) if stage == 2 else 1
        self.bad = 0  # steps in a row
        self.warnings = Warnings()
        self.before = s.steps1 if stage == 2 else 0  # steps of the run before this stage
        self.track = start_tracker(s, folder, self.before + first, world.main)
        self.progress = tqdm(total=steps, initial=first, desc=f"stage {stage}", unit="step", disable=not world.main)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception) -> None:
        self.progress.close()
        if self.world.main and self.watch_every and exception == (None, None, None):
            watch_curves(self.folder)

    def log(self, step: int, batch: Batch, update_metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        """Write down one step. All ranks call it. Raises SettingError after BAD_STEPS bad ones in a row.

        seconds  what each phase took since the last step
        """
        images = len(batch.samples[0].items)
        log = {"images": images} | rollout_metrics(self.world.gather(rollout_numbers(batch))) | update_metrics
        self.bad = self.bad + 1 if log["bad"] else 0
        if log["bad"]:
            self.keep_evidence(step, batch, log)
        if self.world.main:
            place = {"stage": self.stage, "step": step}
            self.track(self.before + step, finite(log))
            speed = {"pack_fill": log.pop("pack_fill")}  # depends on --max-tokens-per-forward, the other metrics do not
            append_line(self.folder / "metrics.jsonl", place | log)
            append_line(self.folder / "timing.jsonl", place | {"seconds": sum(seconds.values())} | seconds | speed)
            self.progress.set_postfix_str(progress_text(log), refresh=False)
            if warning := self.warnings(log, batch.max_reward):
                self.progress.write(f"step {step}: {warning}", file=sys.stderr)
            since = step % self.watch_every if self.watch_every else self.in_turn
            if since < self.in_turn:  # a sheet for each number of images: they take turns from step to step
                watch_group(self.folder, self.stage, step, batch)
            if since == 0:
                watch_curves(self.folder)
        self.progress.update()
        if self.bad >= BAD_STEPS:
            self.give_up(f"{self.bad} steps in a row had a loss or gradient that is not finite")

    def give_up(self, why: str) -> None:
        raise SettingError(
            f"{why}; the batches are in {self.folder / 'bad_steps'}: look at the images, or go on from the last sound weights "
            "with --resume and a smaller --lr"
        )

    def keep_evidence(self, step: int, batch: Batch, log: dict) -> None:
        """What was in a step whose numbers went wrong. While there is some, --resume takes a smaller --lr."""
        path = self.folder / "bad_steps" / f"{self.stage}-{step:07d}-rank{self.world.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        groups = [describe_group(batch, b) for b in range(len(batch.samples))]
        path.write_text(json.dumps({"log": log, "groups": groups}, indent=1))

    def log_validation(self, step: int, share: float, rows: dict[int, dict]) -> None:
        """Write down what `train.validate` returned after that step."""
        if self.world.main:
            line = {"stage": self.stage, "step": step, "reward": share, "images": rows}
            append_line(self.folder / "validation.jsonl", line)
            known = [(n, name, x) for n, row in rows.items() for name, x in row.items() if name != "interval"]
            numbers = {f"validation/{n}/{name}": x for n, name, x in known}
            self.track(self.before + step, finite({"validation/reward": share} | numbers))


def progress_text(log: dict) -> str:
    """A step in few words: "2 images reward=2.45 format=1.00 mae=1.20 ranking=0.87 kl=0.03 zero_spread=0.12"."""
    names = ("reward", "format", "mae", "ranking", "kl", "zero_spread")
    words = [f"{name}={log[name]:.2f}" for name in names if log.get(name) is not None]
    return " ".join([f"{log['images']} image{'s' * (log['images'] > 1)}", *words])


# --------------------------------------------------------------------------------------------------------------------
# Trackers: --track


def check_tracker(track: str | None) -> None:
    """Raise SettingError if the package that --track needs is not installed. It has the same name."""
    if track and not importlib.util.find_spec(track):
        raise SettingError(f"--track {track}: the package {track} is not installed: pip install {track}")


def start_tracker(s: Settings, folder: Path, first: int, main: bool) -> Callable[[int, dict], None]:
    """-> a function (step of the run, numbers) that sends them.  first: step of the run that comes next, after a resume too"""
    if not main or not s.track:
        return lambda step, numbers: None
    if s.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

        def send(step: int, numbers: dict) -> None:
            for name, value in numbers.items():
                if value is not None:
                    writer.add_scalar(name, value, step)
            writer.flush()

        return send
    import wandb

    if wandb.run is None:  # one for both stages
        wandb.init(project="rarl", name=s.name, dir=str(folder), config=dataclasses.asdict(s))
    return lambda step, numbers: wandb.log(numbers, step=step)
