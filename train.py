"""RARL (arXiv 2601.20585): the two-stage training loop.

    python train.py                                   # both stages of the embedded default, minutes on a laptop
    torchrun train.py --stage 1                       # regression only, one image in a prompt
    torchrun train.py --stage 2                       # then everything jointly, several images; starts from stage 1
    torchrun --nproc_per_node 8 train.py --preset coco --model Qwen/Qwen2.5-VL-3B-Instruct --data-root /data/coco
    python train.py --help                            # every setting

A step reads as the algorithm (the first four in `collect`, the last two in `update`):

    rollout    G answers to each of B prompts, sampled from the policy                        rarl.py
    reward     R_final of each answer: tolerance regression, Kendall's tau, format            reward.py
    mutate     RMO: a good answer into groups that are all alike and poor                     rmo.py
    advantage  A = (r - mean) / std within each group                                         grpo.py
    loss       clipped policy ratio, KL to the policy that the stage began with               grpo.py
    step       AdamW

Around the method, in support/: settings, processes and FSDP2 (`Learner`), checkpoints, the run's folder, what is logged.
Everything goes to runs/NAME/ (see support/run/run_folder.py).

All that is drawn at random in a step is drawn from generators seeded by (seed, stage, step, prompt). So a step has no
random state to save, does not depend on how many processes share it, and is the same to the last digit when it is run
again on the CPU. The loss is divided by counts over all processes, so N of them take the step that one would.

Shapes: B prompts of this process, G answers per prompt, N = B*G (answer g of prompt b in row b*G + g), T answer tokens.
"""

import support.run.quiet_end  # noqa: F401  first: Ctrl-C during the slow imports below is one line

# isort: split
import dataclasses
import math
import os
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from tqdm import tqdm

import data
import eval as evaluation
import grpo
import rarl
import reward
import rmo
from support import rivals
from support.datasets.balance import task_weights
from support.datasets.loader import load_steps
from support.datasets.saved_task import save_task
from support.learner.distributed import Learner, micro_batches_on_all_ranks, start_world
from support.learner.plan import plan_text
from support.learner.policies import load_start
from support.run.checkpoints import Checkpoints, check_policy
from support.run.interrupts import Interrupted, Stop, leave, lost_process
from support.run.preflight import load_items, preflight, task_overrides, validation_prompts
from support.run.run_folder import RunFolder
from support.run.settings import SettingError, Settings, parse_settings
from support.show.model_card import what_was_learned, write_model_card
from support.show.monitor import Monitor, UpdateMetrics, dead_base
from support.show.pictures import draw_predictions
from support.show.results import Results, remarks, results_table
from support.show.tables import mean
from support.show.track import check_tracker
from support.show.watch import compare_policies

HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------------------------------
# The method


def train_stage(
    stage: "Stage", learner: Learner, folder: RunFolder, checkpoints: Checkpoints, resume_from: str | None, stop: Stop
) -> None:
    """Run one stage of the method, from its first step or from the checkpoint `resume_from`."""
    s, world = learner.settings, learner.world
    optimizer = learner.begin_stage()  # sets the reference too: the policy as it is now, before a checkpoint is loaded
    first, history, best = checkpoints.restore(resume_from, learner, optimizer)
    base = folder.read_results().get("base", {})
    with Monitor(folder.path, stage.number, first, stage.steps, world, s, base) as monitor, stop.deferred():
        for step, samples, prompts in load_steps(stage.sampler, learner.policy, world, first, stage.steps, s.workers):
            for group in optimizer.param_groups:
                group["lr"] = s.lr * learning_rate(step, stage.steps, s.warmup)
            learner.prepare(prompts)
            learner.clock.lap("data")

            batch = collect(learner, stage, step, samples, prompts, history)  # rollout, reward, mutate, advantage
            metrics = update(learner, optimizer, batch)  # loss, step
            learner.clock.lap("update")
            learner.sync_rollout_policy()
            learner.clock.lap("sync")

            if s.rmo_source == "history":
                history = rmo.merge(history, *world.gather(remembered(batch)))
            monitor.log(step, batch, metrics, batch.max_reward, learner.clock.take())
            done = step + 1
            if stage.validation and (done == stage.steps or done % s.validate_every == 0):
                share, rows = validate(learner, stage)
                best.offer(share, done, learner.policy)
                monitor.log_validation(step, share, rows)
            stopped = max(world.gather(stop.signal))
            # While steps are bad, the last checkpoint stays: the weights before them may be the last sound ones.
            if monitor.bad == 0 and (stopped or done == stage.steps or done % s.checkpoint_every == 0):
                checkpoints.save(stage.number, done, learner, optimizer, history, best)
            if stopped:
                raise Interrupted(stopped, f" after step {done} of stage {stage.number}; saved, go on with --resume")
            learner.clock.lap("other")  # what is between two steps
    best.give_back(learner)


def collect(learner: Learner, stage: "Stage", step: int, samples: list, prompts: list, history: rmo.History) -> "Batch":
    """rollout -> reward -> mutate -> advantage, on this rank's B prompts."""
    s, world = learner.settings, learner.world
    B = len(samples)
    # What is drawn at random for a prompt is seeded by its number in the whole batch, whichever rank has it.
    keys = [(s.seed, stage.number, step, number) for number in range(world.rank, B * world.size, world.size)]

    # rollout: G answers to each prompt. reward: of each of them
    rolled, redrawn = roll_out(learner, stage, samples, prompts, keys), 0
    if s.resample:
        rolled, redrawn = rivals.resample(roll_out, learner, stage, step, rolled, keys)
    learner.clock.lap("rollout")
    samples, prompts, rollout, texts, rewards = rolled  # the last two: N
    if s.w_rank_schedule == "adaptive":
        stage = rivals.with_adaptive_rank_weight(stage, world, rewards)
        rewards = score(stage, texts, samples)

    # mutate: a good answer into groups that are all alike and poor. It is then scored like the others
    texts, mutated = mutate_groups(s, stage, samples, texts, rewards, history, keys)
    scored = [stage.reward(texts[i], samples[i // s.group_size]) if mutated[i] else r for i, r in enumerate(rewards)]

    # advantage, from the rewards after mutation
    totals = torch.tensor([r.total for r in scored], dtype=torch.float64).view(B, s.group_size)
    most = stage.weights.max_reward(len(samples[0].items))
    if s.advantage == "group":
        advantages = grpo.group_advantages(totals).float()  # (B, G)
    else:
        advantages = rivals.advantages(s, stage.weights, scored, totals, most, world)

    answers = with_mutated(learner.rollout_policy, rollout, mutated, texts)
    learner.clock.lap("reward")
    return Batch(
        prompts, answers.ids, answers.mask, answers.logp, torch.tensor(mutated), advantages,
        good=totals.amax(1) > s.rmo_poor * most, samples=samples, texts=texts, rewards=rewards, scored=scored, redrawn=redrawn,
        max_reward=most,
        sampled_tokens=rollout.mask.sum(1),
    )  # fmt: skip


def update(learner: Learner, optimizer: torch.optim.Optimizer, batch: "Batch") -> dict[str, Any]:
    """The GRPO update on one batch, `updates` times. -> what to log; "bad" is True if a step was skipped.

    The ratio's old log-probs are those of this function's own first pass, not those that the rollout recorded: sampling
    computes in another order (and on a GPU from bf16 weights), and the difference would enter the ratio as if the policy
    had moved. With one update per rollout the ratio is 1 exactly. A mutated answer was never sampled; its old log-prob
    is that of the first pass too, so it is treated as if the policy had written it.
    """
    s, policy, world = learner.settings, learner.policy, learner.world
    micros, count = micro_batches_on_all_ranks(learner, batch)
    # transformers checkpoints activations in training mode only; there is no dropout that this could switch on.
    policy.train(s.activation_checkpointing)
    old_logps: list[Tensor] = []  # (N, T) of each micro-batch: the policy before the first update
    advantages: list[Tensor] = []  # (N,) of each; or (N, T)
    log: dict[str, Any] = {}
    for epoch in range(s.updates):
        metrics = UpdateMetrics(s.max_tokens_per_forward)
        for i, (micro, weight) in enumerate(micros):
            with learner.autocast():
                logp, entropy = rarl.logprobs(policy, micro.prompts, micro.ids, micro.mask, s.temperature)  # (N, T)
                ref_logp = learner.reference_logprobs(micro)  # (N, T), or None if beta is 0
            if epoch == 0:
                old_logps.append(logp.detach())
                by_token = s.advantage == "rl-zvp"
                advantages.append(rivals.token_advantages(micro, entropy) if by_token else micro.advantages.flatten())
            loss, stats = grpo.grpo_loss(
                logp,
                old_logps[i] if epoch else None,  # None: on-policy, ratio 1
                ref_logp,
                advantages[i].to(logp.device),
                micro.mask,
                s.clip_low,
                s.clip_high,
                s.beta,
                s.normalize,
                denominator=count / world.size,  # FSDP averages gradients over ranks; the loss is a sum over them
            )
            (weight * loss).backward()
            if weight:
                metrics.add(micro, logp, entropy, loss, stats)
        grad_norm = learner.clip_gradients() if micros else 0.0
        measured = metrics.over_all_ranks(world)
        # The norm is the same on all ranks, and so is the loss: they skip together or not at all.
        bad = not (math.isfinite(grad_norm) and math.isfinite(measured["loss"]))
        if micros and not bad:
            optimizer.step()
        optimizer.zero_grad()
        if epoch == 0:
            log = measured | {"grad_norm": grad_norm}
        else:  # how far the policy has moved from the one that sampled
            log |= {name: measured.get(name) for name in ("ratio", "clip_low", "clip_high")}
        log["bad"] = bad
        if bad:
            break
    policy.eval()
    return log


# --------------------------------------------------------------------------------------------------------------------
# What the method needs: a stage, its rewards, a batch


@dataclass(frozen=True)
class RewardWeights:
    """Of R_reg, R_rank and R_format in R_final. Stage 1 has one image in a prompt, so no order."""

    w_reg: float
    w_rank: float
    w_format: float

    def max_reward(self, num_images: int) -> float:
        return self.w_reg + self.w_format + (self.w_rank if num_images > 1 else 0.0)


@dataclass(frozen=True)
class Stage:
    """All that a stage is, before it starts.

    Stage 1: one image, regression (and format). Stage 2: several images, everything.
    """

    number: int
    steps: int
    sampler: data.Sampler
    weights: RewardWeights
    max_new_tokens: int  # the longest answer
    validation: dict[int, list[data.Sample]] = dataclasses.field(default_factory=dict)  # number of images -> prompts

    def reward(self, text: str, sample: data.Sample) -> reward.Reward:
        return reward.compute_reward(text, sample.labels, sample.task.delta, **dataclasses.asdict(self.weights))


def make_stage(
    number: int,
    policy: rarl.Policy,
    items: list[data.Item],
    val_items: list[data.Item],
    s: Settings,
    show: bool = False,
) -> Stage:
    """A stage from the settings and the items. Every training prompt of it is checked first (`preflight`)."""
    steps, num_images = (s.steps1, (1,)) if number == 1 else (s.steps2, s.images)
    weights = RewardWeights(s.w_reg, s.w_rank if number == 2 else 0.0, s.w_format)
    weights_of_items = task_weights(items) if s.balance else None
    sampler = data.Sampler(items, num_images, s.batch_size, seed_of(s.seed, number), weights_of_items)
    every_step = tqdm(range(steps), desc=f"preflight of stage {number}", disable=not show, delay=1, leave=False)
    tries = range(s.resample + 1)
    samples = [sample for step in every_step for attempt in tries for sample in sampler.batch(step, attempt)]
    length = s.max_new_tokens or data.max_answer_tokens(policy, samples)
    validation = validation_prompts(val_items, num_images, s.val_samples)
    stage = Stage(number, steps, sampler, weights, length, validation)
    preflight(policy, samples, stage)
    return stage


@dataclass
class Batch:
    """What a rollout leaves for the update, this rank's part. N = B*G rows, answer g of prompt b in row b*G + g.

    The second block is for the log alone and empty in a micro-batch.
    """

    prompts: list  # B
    ids: Tensor  # (N, T)
    mask: Tensor  # (N, T) bool
    sampled_logp: Tensor  # (N, T), 0 at mutated answers
    mutated: Tensor  # (N,) bool
    advantages: Tensor  # (B, G)
    good: Tensor | None = None  # (B,) bool, groups with an answer that is not poor; --advantage rl-zvp needs it

    samples: list[data.Sample] = dataclasses.field(default_factory=list)  # B
    texts: list[str] = dataclasses.field(default_factory=list)  # N, after mutation
    rewards: list[reward.Reward] = dataclasses.field(default_factory=list)  # N, of the answers as sampled
    scored: list[reward.Reward] = dataclasses.field(default_factory=list)  # N, after mutation
    sampled_tokens: Tensor | None = None  # (N,), lengths as sampled
    redrawn: int = 0  # prompts that --resample drew anew
    max_reward: float = 1.0  # the most that an answer of this step could earn

    def take(self, groups: list[int]) -> "Batch":
        """Some of the groups, as wide as their longest answer."""
        G = self.advantages.shape[1]
        rows = (torch.tensor(groups)[:, None] * G + torch.arange(G)).flatten()  # (their N,)
        width = int(self.mask[rows].sum(1).max())
        ids, mask, sampled_logp = (x[rows, :width] for x in (self.ids, self.mask, self.sampled_logp))
        prompts = [self.prompts[b] for b in groups]
        good = self.good if self.good is None else self.good[groups]
        return Batch(prompts, ids, mask, sampled_logp, self.mutated[rows], self.advantages[groups], good)


class Rolled(NamedTuple):
    """B prompts and N = B*G answers to them."""

    samples: list[data.Sample]
    prompts: list[data.Prompt]
    rollout: rarl.Rollout
    texts: list[str]
    rewards: list[reward.Reward]


def roll_out(
    learner: Learner, stage: Stage, samples: list[data.Sample], prompts: list[data.Prompt], keys: list[tuple]
) -> Rolled:
    """G answers to each of B prompts, `rollout_batch` prompts at a time, and what they earn."""
    s, policy = learner.settings, learner.rollout_policy
    generators = [torch.Generator().manual_seed(seed_of(*key)) for key in keys]
    rollouts = []
    for b in range(0, len(prompts), s.rollout_batch):
        part = slice(b, b + s.rollout_batch)
        rollouts.append(
            rarl.generate(policy, prompts[part], s.group_size, stage.max_new_tokens, s.temperature, generators[part])
        )
    rollout = rarl.concatenate(rollouts, policy.eos_id)
    texts = rarl.decode(policy, rollout.ids, rollout.mask)
    return Rolled(samples, prompts, rollout, texts, score(stage, texts, samples))


def score(stage: Stage, texts: list[str], samples: list[data.Sample]) -> list[reward.Reward]:
    """The rewards of N answers to B prompts, G each."""
    G = len(texts) // len(samples)
    return [stage.reward(text, samples[i // G]) for i, text in enumerate(texts)]


def mutate_groups(
    s: Settings, stage: Stage, samples: list[data.Sample], texts: list[str], rewards: list[reward.Reward],
    history: rmo.History, keys: list[tuple],
) -> tuple[list[str], list[bool]]:  # fmt: skip
    """RMO on each of B groups. -> N texts, some of them replaced, and which ones"""
    mutated_texts, mutated = [], []
    for b, (sample, key) in enumerate(zip(samples, keys, strict=True)):
        group = slice(b * s.group_size, (b + 1) * s.group_size)
        totals = [r.total for r in rewards[group]]  # G
        to_be_replaced = sorted(totals)[: s.rmo_k]
        answers, changed = rmo.mutate(
            texts[group],
            totals,
            references_for(stage, sample, s.rmo_source, history, rewards[group], max(to_be_replaced, default=0.0)),
            s.rmo_k,
            s.rmo_probability,
            spread=s.rmo_spread,
            poor=s.rmo_poor,
            max_reward=stage.weights.max_reward(len(sample.items)),
            rng=random.Random(seed_of("rmo", *key)),
        )
        mutated_texts += answers
        mutated += changed
    return mutated_texts, mutated


def references_for(
    stage: Stage, sample: data.Sample, source: str, history: rmo.History, group: list[reward.Reward], replaced: float
) -> list[str]:
    """The good answers that RMO may put into a group: the ground truth; one made of earlier answers' best values; or a
    crossing of two answers of the group, the values of the one and the order of the other.

    group     rewards of the group's G answers
    replaced  the best reward among the answers that would be replaced; an answer that is not the truth must earn more
    """
    if source == "truth":
        return [data.reference_answer(sample)]
    if source == "history":
        entries = rmo.recall(history, [item.name for item in sample.items], sample.task.delta)
    else:
        valid = [(r, r.answer) for r in group if r.answer]
        best = lambda part: max(valid, key=lambda pair: getattr(pair[0], part))[1]
        entries = rmo.cross(best("regression"), best("ranking")) if valid else []
    text = data.format_answer((i, f"{value:.12g}") for i, value in entries)
    return [text] if entries and stage.reward(text, sample).total > replaced else []


def remembered(batch: Batch) -> rmo.History:
    """The best value that the policy's own answers of this step gave for each image."""
    G = batch.advantages.shape[1]
    groups = [batch.rewards[b * G : (b + 1) * G] for b in range(len(batch.samples))]
    return rmo.merge(
        *(
            rmo.remember([item.name for item in sample.items], sample.labels, [r.answer for r in group])
            for sample, group in zip(batch.samples, groups, strict=True)
        )
    )


def with_mutated(policy: rarl.Policy, rollout: rarl.Rollout, mutated: list[bool], texts: list[str]) -> rarl.Rollout:
    """The rollout with the texts of mutated rows in place of what was sampled (their logp is 0).  mutated, texts: N"""
    rows = [row for row, was_mutated in enumerate(mutated) if was_mutated]
    if not rows:
        return rollout
    answers = rarl.encode(policy, [texts[row] for row in rows])
    wide = rollout.padded(max(rollout.ids.shape[1], *map(len, answers)), policy.eos_id)
    for row, answer in zip(rows, answers, strict=True):
        wide.ids[row], wide.mask[row], wide.logp[row] = policy.eos_id, False, 0.0
        wide.ids[row, : len(answer)] = answer.to(wide.ids.device)
        wide.mask[row, : len(answer)] = True
    return wide


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak: linear warm-up, then linear decay to a tenth (our choice; the paper states the peak)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


def seed_of(*key) -> int:
    """A 63-bit seed for a key such as (seed, stage, step, prompt): each has a stream of its own, on any rank."""
    return random.Random(repr(key)).getrandbits(63)


# --------------------------------------------------------------------------------------------------------------------
# A run


def ask_everywhere(learner: Learner, samples: dict[int, list[data.Sample]], name: str = "") -> dict[int, list[dict]]:
    """Number of images -> the policy's greedy answers to these prompts, which are shared among the ranks."""
    s, world, policy = learner.settings, learner.world, learner.rollout_policy
    predictions: dict[int, list[dict]] = {}
    for n, few in samples.items():
        progress = f"{name}, {n} image{'s' * (n > 1)}" if name and world.main else None
        mine = few[world.rank :: world.size]
        length = data.max_answer_tokens(policy, few)
        parts = world.gather(evaluation.ask(policy, mine, s.eval_batch_size, length, progress))
        predictions[n] = [parts[i % world.size][i // world.size] for i in range(len(few))]
    return predictions


def validate(learner: Learner, stage: Stage) -> tuple[float, dict[int, dict]]:
    """The policy on the stage's validation prompts.

    -> share of the best possible R_final, averaged over the numbers of images; for each number its own share ("reward")
    and the metrics of eval.py
    """
    rows = {}
    for n, answers in ask_everywhere(learner, stage.validation).items():
        earned = [stage.reward(p["text"], sample).total for p, sample in zip(answers, stage.validation[n], strict=True)]
        rows[n] = {"reward": mean(earned) / stage.weights.max_reward(n)} | evaluation.summarize(answers)
    return mean(row["reward"] for row in rows.values()), rows


def evaluate_everywhere(
    learner: Learner, samples: dict[int, list[data.Sample]], name: str, folder: RunFolder
) -> dict[int, dict]:
    """The policy on test prompts, with everything that is written about it.  -> number of images -> metrics"""
    answers = ask_everywhere(learner, samples, name)
    rows = {n: evaluation.summarize(some) | {"remarks": remarks(some)} for n, some in answers.items()}
    predictions = [p for some in answers.values() for p in some]
    if learner.world.main:
        evaluation.write_predictions(predictions, folder.path / f"predictions_{name.replace(' ', '')}.jsonl")
        draw_predictions([x for few in samples.values() for x in few], predictions, folder.path / "predictions.png")
        warnings = [f"{name}: {remark}" for remark in remarks(predictions)]
        if name == "base" and (dead := dead_base(rows)):
            warnings.append(dead)
        print(*warnings, sep="\n", file=sys.stderr)
    return rows


def run(s: Settings, stop: Stop) -> Results:
    """Everything: base evaluation, the stages with an evaluation after each, the files in runs/NAME. -> results"""
    world = start_world(s.device)
    check_tracker(s.track)
    if s.batch_size % world.size:
        raise SettingError(f"--batch-size {s.batch_size} must be a multiple of the number of processes, {world.size}")
    if s.offload and world.size > 1:
        raise SettingError("--offload is for one process: several share Adam's moments among their GPUs")
    folder = RunFolder(Path("runs") / s.name, world)
    checkpoints = Checkpoints(folder.path / "checkpoints", world, s.keep)
    with folder.owned():
        if s.resume and (done := folder.complete(s, checkpoints)):
            if world.main:
                print(f"the run in {folder.path} is complete:\n\n{results_table(done)}")
                folder.finish(results_table(done), checkpoints)
            return done
        start = folder.find_start(s, checkpoints, HERE / "tiny" if s.model == "tiny" else s.model)
        if world.main:
            check_policy(start.model)
        train_items, test_items, val_items = load_items(s, world)
        if world.main:
            print(f"loading {start.model}", file=sys.stderr)
        policy = load_start(start.model, s, world.device, read=world.main)
        steps = {1: s.steps1, 2: s.steps2}
        numbers = [number for number in range(start.stage, (s.stage or 2) + 1) if steps[number]]
        stages = [make_stage(number, policy, train_items, val_items, s, show=world.main) for number in numbers]
        results = world.gather(folder.open(s, start, checkpoints) if world.main else None)[0]
        tests = {n: data.make_samples(test_items, n, s.eval_samples) for n in sorted({1, *s.images})}
        blind = evaluation.blind_rows(tests, train_items)
        learner = Learner(policy, world, s)

        def report(name: str) -> None:
            results[name] = evaluate_everywhere(learner, tests, name, folder)
            if world.main:
                compare_policies(folder.path, results, tests)
                folder.write_results(results | blind)
                print(f"\n{results_table(results | blind)}\n", flush=True)

        if start.row not in results:
            report(start.row)
        for stage in stages:
            resume_from = start.checkpoint if stage.number == start.stage else None
            train_stage(stage, learner, folder, checkpoints, resume_from, stop)
            folder.save_policy(
                learner,
                stage.number,
                lambda beside: save_task(beside, s.data, train_items, task_overrides(s), s.max_pixels, s.skip_bad),
            )
            report(f"stage {stage.number}")
            if world.main:
                saved = folder.path / f"stage{stage.number}"
                write_model_card(saved, f"stage {stage.number}", s, train_items, results | blind)
        if world.main:
            folder.finish(results_table(results | blind), checkpoints)
            print(f"{what_was_learned(results | blind)}\nwrote {folder.path}/")
    return results | blind


def main(argv: list[str] | None = None) -> None:
    transformers.utils.logging.disable_progress_bar()  # of loading and saving weights
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, on purpose
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and the image workers' fork do not mix
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        s = parse_settings(argv)
        if not s.plan:
            run(s, Stop())
        elif rank == 0:
            print(plan_text(s, HERE / "tiny" if s.model == "tiny" else s.model))
    except (SettingError, data.DataError, rarl.ModelError, OSError, Interrupted) as error:
        leave("train.py", error, rank, size)
    except RuntimeError as error:  # a bug keeps its traceback; the death of a helper process or of a rank is none
        if not (sentence := lost_process(error)):
            raise
        leave("train.py", SettingError(sentence), rank, size)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
