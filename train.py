"""RARL (arXiv 2601.20585): the two-stage training loop.

    python train.py                                   # both stages of the embedded default, minutes on a laptop
    torchrun train.py --stage 1                       # regression only, one image in a prompt
    torchrun train.py --stage 2                       # then everything jointly, several images; starts from stage 1
    python train.py --help                            # every setting

A step reads as the algorithm:

    rollout    G answers to each of B prompts, sampled from the policy
    reward     R_final of each answer: tolerance regression, Kendall's tau, format            reward.py
    mutate     RMO: a good answer into groups that are all alike and poor                     rmo.py
    advantage  A = (r - mean) / std within each group                                         grpo.py
    loss       clipped policy ratio, KL to the policy that the stage began with               grpo.py
    step       AdamW

Everything goes to runs/NAME/: settings.json, metrics.jsonl (one line a step), stage1/ and stage2/ (policies in Hugging
Face layout), predictions_*.jsonl, predictions.png and results.txt.
"""

import argparse
import copy
import dataclasses
import json
import math
import random
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import eval as evaluation
import grpo
import rarl
import reward
import rmo

HERE = Path(__file__).resolve().parent


class SettingError(ValueError):
    """A setting that cannot work; the message names it and says what to do."""


# --------------------------------------------------------------------------------------------------------------------
# Settings: one flat block, one help text each


def setting(default, text: str, **kwargs):
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class Settings:
    """The defaults are those of the embedded run. What the paper states is marked [paper]; the rest is our choice."""

    # What
    model: str = setting("tiny", "policy to start from: a Hugging Face folder or hub id; tiny is the embedded one")
    data: str = setting("dots", "data set: dots, dials (drawn) or coco (needs --data-root)")
    data_root: str | None = setting(None, "folder of the data set")
    name: str = setting("rarl", "results go to runs/NAME")
    stage: int | None = setting(
        None, "run only this stage, 1 or 2; 2 starts from runs/NAME/stage1 (default: both)", choices=(1, 2)
    )
    seed: int = setting(0, "of the batches, the sampled answers and RMO")
    device: str = setting("auto", "auto (a GPU if there is one), cpu or cuda")
    # How much
    steps1: int = setting(200, "optimiser steps of stage 1 (regression, one image)")
    steps2: int = setting(120, "optimiser steps of stage 2 (joint, several images)")
    batch_size: int = setting(
        16, "B, prompts in a step over all processes [paper: 64, as prompts or answers is not said]"
    )
    group_size: int = setting(8, "G, answers to each prompt")
    images: tuple[int, ...] = setting((2, 4, 8), "numbers of images in a prompt of stage 2 [paper: 1, 2, 4, 8]")
    # Reward
    delta: float | None = setting(None, "tolerance of R_reg in label units (default: the task's, see data.py)")
    w_reg: float = setting(1.0, "weight of R_reg")
    w_rank: float = setting(1.0, "weight of R_rank (stage 2; stage 1 has no order to judge)")
    w_format: float = setting(1.0, "weight of R_format")
    # RMO
    rmo_k: int = setting(1, "answers of a group that RMO replaces; 0 switches it off")
    rmo_probability: float = setting(0.5, "that a homogeneous and poor group is mutated")
    rmo_source: str = setting(
        "truth", "good answers come from the ground truth or the best earlier one", choices=("truth", "history")
    )
    rmo_spread: float = setting(
        0.05, "a group is homogeneous when the std of its rewards is at most this share of full marks"
    )
    rmo_poor: float = setting(0.7, "and poor when its best reward is at most this share of full marks")
    # GRPO
    lr: float = setting(3e-4, "peak learning rate of AdamW [paper: 1e-6, for Qwen2.5-VL]")
    warmup: int = setting(5, "steps of linear warm-up; afterwards a linear decay to a tenth of the peak")
    weight_decay: float = setting(0.0, "of AdamW")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    temperature: float = setting(1.0, "of sampling; the update scores the same distribution")
    beta: float = setting(
        0.02, "weight of the KL to the policy that the stage began with; 0 drops it and its forward pass"
    )
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low (matters with several updates per rollout)")
    clip_high: float = setting(0.2, "and above 1 + clip_high")
    normalize: str = setting(
        "sequence", "loss per answer, then mean (GRPO), or mean over all tokens", choices=("sequence", "token")
    )
    updates: int = setting(1, "optimiser steps per rollout; from the second on the ratio is off-policy")
    max_new_tokens: int = setting(0, "longest answer in tokens; 0: the longest reference answer and some slack")
    # Machine
    max_tokens_per_forward: int = setting(
        32768, "packed tokens (prompts and answers, padding too) in one forward of the update; bounds memory"
    )
    # Evaluation
    eval_samples: int = setting(200, "test prompts for each number of images")
    eval_batch_size: int = setting(50, "test prompts at a time")


def parse_settings(argv: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        description="Train a vision-language policy with RARL.", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # --image for --images would be a guess
    )  # fmt: skip
    for f in dataclasses.fields(Settings):
        kind = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type  # "int | None" is an int if given
        many = kind == tuple[int, ...]
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            type=int if many else kind,
            nargs="+" if many else None,
            default=f.default,
            choices=f.metadata.get("choices"),
            help=f.metadata["help"],
        )
    values = vars(parser.parse_args(argv))
    settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    check_settings(settings)
    return settings


def check_settings(s: Settings) -> None:
    """Raise SettingError for the first value that cannot work."""
    rules = [
        ("steps1", s.steps1 >= 1, "must be at least 1"),
        ("steps2", s.steps2 >= 1, "must be at least 1"),
        ("batch_size", s.batch_size >= 1, "must be at least 1"),
        ("group_size", s.group_size >= 2, "must be at least 2: a group of one has no spread, so no advantage"),
        ("images", all(n >= 1 for n in s.images), "must be numbers of images, each at least 1"),
        ("delta", s.delta is None or 0 < s.delta < math.inf, "must be positive and finite"),
        ("w_reg", 0 <= s.w_reg < math.inf, "must be finite and not negative"),
        ("w_rank", 0 <= s.w_rank < math.inf, "must be finite and not negative"),
        ("w_format", 0 <= s.w_format < math.inf, "must be finite and not negative"),
        ("w_reg", s.w_reg + s.w_rank + s.w_format > 0, "all weights are 0: give one of them a weight"),
        ("rmo_k", 0 <= s.rmo_k < s.group_size, "must be from 0 to group_size - 1, to leave an answer for contrast"),
        ("rmo_probability", 0 <= s.rmo_probability <= 1, "must be from 0 to 1"),
        ("rmo_spread", 0 <= s.rmo_spread < math.inf, "must not be negative"),
        ("rmo_poor", 0 <= s.rmo_poor <= 1, "must be from 0 to 1"),
        ("lr", 0 < s.lr < math.inf, "must be positive"),
        ("warmup", s.warmup >= 0, "must not be negative"),
        ("weight_decay", 0 <= s.weight_decay < math.inf, "must not be negative"),
        ("max_grad_norm", s.max_grad_norm > 0, "must be positive"),
        ("temperature", 0 < s.temperature < math.inf, "must be positive: greedy answers have no spread"),
        ("beta", 0 <= s.beta < math.inf, "must not be negative"),
        ("clip_low", 0 <= s.clip_low <= 1, "must be from 0 to 1"),
        ("clip_high", 0 <= s.clip_high < math.inf, "must not be negative"),
        ("updates", s.updates >= 1, "must be at least 1"),
        ("max_new_tokens", s.max_new_tokens >= 0, "must be positive, or 0 for automatic"),
        ("max_tokens_per_forward", s.max_tokens_per_forward >= 1, "must be positive"),
        ("eval_samples", s.eval_samples >= 1, "must be at least 1"),
        ("eval_batch_size", s.eval_batch_size >= 1, "must be at least 1"),
        ("name", s.name not in ("", ".", "..") and "/" not in s.name, "must be a plain folder name"),
    ]
    for name, ok, what in rules:
        if not ok:
            raise SettingError(f"--{name.replace('_', '-')} {getattr(s, name)} {what}")


# --------------------------------------------------------------------------------------------------------------------
# Rewards of a stage


@dataclass(frozen=True)
class Weights:
    """Of R_reg, R_rank and R_format in R_final. Stage 1 has one image in a prompt, so no order."""

    w_reg: float
    w_rank: float
    w_format: float

    def full_marks(self, num_images: int) -> float:
        return self.w_reg + self.w_format + (self.w_rank if num_images > 1 else 0.0)


def score(text: str, sample: data.Sample, weights: Weights) -> reward.Reward:
    return reward.compute_reward(text, sample.labels, sample.task.delta, **dataclasses.asdict(weights))


def preflight(policy: rarl.Policy, samples: list[data.Sample], weights: Weights, budget: int) -> None:
    """Refuse to start unless the reference answer of every training prompt earns full marks.

    A wrong delta, a broken parser, swapped image ids or a tokenizer that does not give the text back would corrupt
    every gradient, and nothing would look wrong. Each prompt's reference makes the whole round: text -> tokens ->
    text -> reward. Full marks up to 1 %, as a label may have more decimals than the answer.
    """
    references = [data.reference_answer(sample) for sample in samples]
    unique = sorted(set(references))
    tokens = dict(zip(unique, rarl.encode(policy, unique), strict=True))
    ones = {text: torch.ones(1, len(ids)) for text, ids in tokens.items()}
    read_back = {text: rarl.decode(policy, tokens[text][None], ones[text])[0] for text in unique}
    for sample, text in zip(samples, references, strict=True):
        got, full = score(read_back[text], sample, weights), weights.full_marks(len(sample.items))
        if got.total < 0.99 * full or len(tokens[text]) > budget:
            raise SettingError(
                f"preflight: the reference answer of a training prompt does not earn full marks, {got.total:.3f} of {full:g}.\n"
                f"  images     {[item.name for item in sample.items]}\n  labels     {sample.labels}\n"
                f"  reference  {text}\n  read back  {read_back[text]}\n  rewards    {got}\n"
                f"  tokens     {len(tokens[text])} of {budget} allowed\n"
                "Check --delta, the labels, the tokenizer and --max-new-tokens."
            )


# --------------------------------------------------------------------------------------------------------------------
# One step


@dataclass
class Batch:
    """What a rollout leaves for the update. N = B*G rows, answer g of prompt b in row b*G + g."""

    prompts: list  # B
    ids: Tensor  # (N, T)
    mask: Tensor  # (N, T) bool
    sampled_logp: Tensor  # (N, T), 0 at mutated answers
    mutated: Tensor  # (N,) bool
    advantages: Tensor  # (B, G)


def collect(policy, samples, s: Settings, weights: Weights, budget: int, step: int, best: dict) -> tuple[Batch, dict]:
    """rollout -> reward -> mutate -> advantage. Returns the batch and what to log about it."""
    B, G = len(samples), s.group_size
    prompts = data.make_prompts(policy, samples)

    # rollout
    generators = [torch.Generator().manual_seed(hash_seed(s.seed, step, b)) for b in range(B)]
    rollout = rarl.generate(policy, prompts, G, budget, s.temperature, generators)
    texts = rarl.decode(policy, rollout.ids, rollout.mask)

    # reward
    rewards = [score(text, samples[i // G], weights) for i, text in enumerate(texts)]
    log = rollout_log(texts, rewards, samples, rollout)

    # mutate
    ids, mask, logp = rollout.ids, rollout.mask, rollout.logp
    mutated = torch.zeros(B * G, dtype=torch.bool)
    totals = torch.tensor([r.total for r in rewards], dtype=torch.float64).view(B, G)
    log["zero_spread"] = (totals.amax(1) == totals.amin(1)).double().mean().item()
    rng = random.Random(f"rmo {s.seed} {step}")
    for b, sample in enumerate(samples):
        full, key = weights.full_marks(len(sample.items)), tuple(item.name for item in sample.items)
        references = [data.reference_answer(sample)] if s.rmo_source == "truth" else best.get(key, [])[:1]
        group = slice(b * G, (b + 1) * G)
        texts[group], changed = rmo.mutate(
            texts[group], totals[b], references, s.rmo_k, s.rmo_probability,
            spread=s.rmo_spread * full, poor=s.rmo_poor * full, rng=rng,
        )  # fmt: skip
        if s.rmo_source == "history":  # remember this prompt's best answer, unless it was put there
            i = int(totals[b].argmax())
            if totals[b, i] > best.get(key, ("", 0.0))[1] and not changed[i]:
                best[key] = (texts[b * G + i], totals[b, i].item())
        for g, was in enumerate(changed):
            if was:
                mutated[b * G + g] = True
                totals[b, g] = score(texts[b * G + g], sample, weights).total
    if mutated.any():
        ids, mask, logp = put_answers(
            policy, rollout, mutated, [texts[i] for i in mutated.nonzero().flatten().tolist()]
        )
    log["mutated"] = mutated.double().mean().item()

    # advantage
    advantages = grpo.group_advantages(totals).float()
    log["advantage_var"] = advantages.var(correction=0).item()
    return Batch(prompts, ids, mask, logp, mutated, advantages), log


def hash_seed(*numbers: int) -> int:
    """One 63-bit seed for (seed, step, prompt): prompts have streams of their own, whoever computes them."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(63)


def put_answers(policy, rollout: rarl.Rollout, rows: Tensor, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The rollout's ids, mask and logp with other answers in some rows (their logp is 0: they were not sampled)."""
    answers = rarl.encode(policy, texts)
    N, T = rollout.ids.shape
    width = max(T, *(len(a) for a in answers))
    ids = torch.full((N, width), policy.eos_id, device=rollout.ids.device)
    mask = torch.zeros(N, width, dtype=torch.bool, device=ids.device)
    logp = torch.zeros(N, width, device=ids.device)
    ids[:, :T], mask[:, :T], logp[:, :T] = rollout.ids, rollout.mask, rollout.logp
    for row, answer in zip(rows.nonzero().flatten().tolist(), answers, strict=True):
        ids[row], mask[row], logp[row] = policy.eos_id, False, 0.0
        ids[row, : len(answer)] = answer.to(ids.device)
        mask[row, : len(answer)] = True
    return ids, mask, logp


def rollout_log(texts, rewards, samples, rollout) -> dict:
    """Statistics of the sampled answers, before any mutation."""
    G, N = len(texts) // len(samples), len(texts)
    errors = []
    for i, text in enumerate(texts):
        labels = samples[i // G].labels
        answer = reward.parse_response(text, len(labels))
        errors += [] if answer is None else [abs(value - labels[image - 1]) for image, value in answer]
    several = [r.ranking for i, r in enumerate(rewards) if len(samples[i // G].items) > 1]
    return {
        "images": len(samples[0].items),
        "reward": sum(r.total for r in rewards) / N,
        "format": sum(r.format for r in rewards) / N,
        "regression": sum(r.regression for r in rewards) / N,
        "ranking": sum(several) / len(several) if several else None,
        "mae": sum(errors) / len(errors) if errors else None,
        "tokens": rollout.mask.sum().item() / N,
    }


def micro_batches(batch: Batch, wanted: list[int], limit: int) -> list[list[int]]:
    """Prompts in lots whose packed rectangle (prompts, answers and padding) holds at most `limit` tokens.

    Sorted by length, so that little of a rectangle is padding. One prompt that is over the limit goes alone.
    """
    G = batch.advantages.shape[1]
    width = [len(p.ids) for p in batch.prompts]
    answer = batch.mask.view(len(width), G, -1).sum(-1).amax(1).tolist()  # longest answer of each group
    lots: list[list[int]] = []
    for b in sorted(wanted, key=lambda b: (width[b] + G * answer[b], b)):
        lot = [*lots[-1], b] if lots else [b]
        if lots and len(lot) * (max(width[i] for i in lot) + G * max(answer[i] for i in lot)) <= limit:
            lots[-1] = lot
        else:
            lots.append([b])
    return lots


def update(policy, reference, optimizer, batch: Batch, s: Settings) -> dict:
    """The GRPO update on one batch, `s.updates` times. Returns what to log."""
    B, G = batch.advantages.shape
    rows = torch.arange(B * G).view(B, G)
    # A group without advantage and without KL has no gradient at all: it is not run.
    wanted = [b for b in range(B) if reference is not None or batch.advantages[b].any()]
    lots = micro_batches(batch, wanted, s.max_tokens_per_forward)
    denominator = B * G if s.normalize == "sequence" else batch.mask.sum().item()
    amp = torch.autocast("cuda", torch.bfloat16, enabled=policy.device.type == "cuda")
    old_logps: list[Tensor] = []  # per lot, from the first pass: the policy before the first update
    log: dict = {}
    for epoch in range(s.updates):
        totals: dict[str, float] = {}

        def add(totals=totals, **sums: Tensor) -> None:
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)

        for i, lot in enumerate(lots):
            prompts, row = [batch.prompts[b] for b in lot], rows[lot].flatten()
            width = int(batch.mask[row].sum(1).max())
            ids, mask = batch.ids[row, :width], batch.mask[row, :width]
            with amp:
                logp, entropy = rarl.logprobs(policy, prompts, ids, mask, s.temperature)  # (lot*G, width)
                ref_logp = None
                if reference is not None:
                    with torch.no_grad():
                        ref_logp, _ = rarl.logprobs(reference, prompts, ids, mask, s.temperature)
            if epoch == 0:
                old_logps.append(logp.detach())
            loss, stats = grpo.grpo_loss(
                logp, old_logps[i] if epoch else None, ref_logp, batch.advantages.flatten()[row].to(logp.device), mask,
                s.clip_low, s.clip_high, s.beta, s.normalize, denominator,
            )  # fmt: skip
            loss.backward()
            tokens = stats.pop("tokens")
            add(tokens=tokens, entropy=entropy.sum(), policy_loss=stats.pop("policy_loss"), loss=loss.detach())
            add(**{name: value * tokens for name, value in stats.items()})
            if epoch == 0:
                sampled = mask & ~batch.mutated[row, None].to(mask.device)
                gap = (logp.detach() - batch.sampled_logp[row, :width]).abs().masked_fill(~sampled, 0.0)
                add(gap=gap.sum(), sampled=sampled.sum(), mutated_logp=logp.detach().masked_fill(sampled, 0.0).sum())
                log["logp_gap_max"] = max(log.get("logp_gap_max", 0.0), gap.max().item())
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), s.max_grad_norm).item() if lots else 0.0
        optimizer.step()
        optimizer.zero_grad()
        if epoch == 0:
            # Per token over the whole batch, not a mean of micro-batch means.
            tokens, others = totals.get("tokens", 0.0), totals.get("tokens", 0.0) - totals.get("sampled", 0.0)
            log |= {k: totals[k] / tokens for k in ("entropy", "kl", "ratio") if k in totals}
            log |= {"loss": totals.get("loss", 0.0), "policy_loss": totals.get("policy_loss", 0.0), "grad_norm": norm}
            log["logp_gap_mean"] = totals["gap"] / max(totals["sampled"], 1) if lots else None
            log["mutated_logp"] = totals["mutated_logp"] / others if others else None
        else:  # of the last update: how far the policy has moved from the one that sampled
            log |= {k: totals[k] / totals["tokens"] for k in ("ratio", "clip_low", "clip_high") if k in totals}
    return log


# --------------------------------------------------------------------------------------------------------------------
# A stage


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak: linear warm-up, then linear decay to a tenth (our choice; the paper states the peak)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


def train_stage(stage: int, policy: rarl.Policy, items: list[data.Item], s: Settings, out: Path) -> None:
    """Run one stage on `policy` in place. Stage 1: one image, regression. Stage 2: several images, everything."""
    steps, images = (s.steps1, (1,)) if stage == 1 else (s.steps2, s.images)
    weights = Weights(s.w_reg, s.w_rank if stage == 2 else 0.0, s.w_format)
    sampler = data.Sampler(items, images, s.batch_size, seed=hash_seed(s.seed, stage))
    samples = [sample for step in range(steps) for sample in sampler.batch(step)]
    budget = s.max_new_tokens or data.answer_budget(policy, samples)
    preflight(policy, samples, weights, budget)

    reference = copy.deepcopy(policy).requires_grad_(False) if s.beta > 0 else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=s.lr, weight_decay=s.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, s.warmup))
    best: dict = {}  # RMO's history: the best answer to each prompt so far
    with (
        open(out / "metrics.jsonl", "a") as metrics,
        tqdm(range(steps), desc=f"stage {stage}", unit="step") as progress,
    ):
        for step in progress:
            start = time.time()
            batch, log = collect(policy, sampler.batch(step), s, weights, budget, step + 10**6 * stage, best)
            log |= update(policy, reference, optimizer, batch, s)
            schedule.step()
            log |= {"seconds": time.time() - start}
            metrics.write(json.dumps({"stage": stage, "step": step, **log}) + "\n")
            metrics.flush()
            shown = ("reward", "format", "regression", "ranking", "mae", "entropy", "kl", "zero_spread")
            short = {"regression": "reg", "ranking": "rank", "zero_spread": "zero"}
            progress.set_postfix_str(
                " ".join(f"{short.get(k, k)}={log[k]:.2f}" for k in shown if log.get(k) is not None), refresh=False
            )


def evaluate(name: str, policy, items, s: Settings, out: Path) -> tuple[dict, list, list]:
    """The policy on held-out prompts with 1 and with `s.images` images: {"1 image": metrics, ...}, samples, answers."""
    rows, samples, predictions = {}, [], []
    for n in sorted({1, *s.images}):
        few = data.make_samples(items, n, s.eval_samples)
        rows[n], answers = evaluation.evaluate(policy, few, s.eval_batch_size)
        samples, predictions = samples + few, predictions + answers
    evaluation.write_predictions(predictions, out / f"predictions_{name}.jsonl")
    return rows, samples, predictions


def results_table(results: dict[str, dict[int, dict]]) -> str:
    """base / stage 1 / stage 2 in lines; valid answers over everything, MAE at one image, tau at several."""
    counts = sorted({n for rows in results.values() for n in rows})
    several = [n for n in counts if n > 1]
    lines = [f"{'':10} {'valid':>7} {'MAE':>7} " + " ".join(f"{f'tau@{n}':>7}" for n in several)]
    for name, rows in results.items():
        valid = sum(r["valid"] * r["n"] for r in rows.values()) / sum(r["n"] for r in rows.values())
        taus = " ".join(f"{rows[n]['tau']:7.3f}" for n in several)
        lines.append(f"{name:10} {valid:7.1%} {rows[1]['mae']:7.2f} {taus}")
    return "\n".join(lines)


def with_delta(items: list[data.Item], delta: float | None) -> list[data.Item]:
    if delta is None:
        return items
    return [dataclasses.replace(i, task=dataclasses.replace(i.task, delta=delta)) for i in items]


def run(s: Settings) -> dict[str, dict[int, dict]]:
    """Everything: base evaluation, the stages with an evaluation after each, the files in runs/NAME. -> results"""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if s.device == "auto" else s.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingError(f"--device {s.device}: this machine has no CUDA GPU; take --device cpu")
    out = Path("runs") / s.name
    stages = (s.stage,) if s.stage else (1, 2)
    if s.stage == 2 and not (out / "stage1").is_dir():
        raise SettingError(
            f"--stage 2 starts from {out / 'stage1'}, which does not exist: run --stage 1 --name {s.name} first"
        )
    train_items = with_delta(data.load_dataset(s.data, s.data_root, "train"), s.delta)
    test_items = with_delta(data.load_dataset(s.data, s.data_root, "test"), s.delta)
    for n in {1, *s.images}:  # before anything starts: are there enough images?
        data.make_pools(train_items, n)
        data.make_pools(test_items, n)
    model = HERE / "tiny" if s.model == "tiny" else s.model
    policy = rarl.load_policy(out / "stage1" if s.stage == 2 else model, device)

    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(dataclasses.asdict(s), indent=2) + "\n")
    (out / "metrics.jsonl").write_text("")
    results: dict[str, dict[int, dict]] = {}
    start_name = "stage 1" if s.stage == 2 else "base"
    results[start_name], samples, predictions = evaluate(start_name.replace(" ", ""), policy, test_items, s, out)
    for stage in stages:
        train_stage(stage, policy, train_items, s, out)
        rarl.save_policy(policy, out / f"stage{stage}")
        results[f"stage {stage}"], samples, predictions = evaluate(f"stage{stage}", policy, test_items, s, out)
    evaluation.draw_predictions(samples, predictions, out / "predictions.png")
    table = results_table(results)
    (out / "results.txt").write_text(table + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{s.data}, {s.eval_samples} test prompts for each number of images\n\n{table}\n\nwrote {out}/")
    return results


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_settings(argv))
    except (SettingError, data.DataError, rarl.ModelError, OSError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
