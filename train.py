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
import random
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import data
import eval as evaluation
import grpo
import rarl
import reward
import rmo
from support.datasets import saved_task
from support.learner.learner import Learner
from support.learner.plan import filled_in
from support.learner.policies import load_start
from support.learner.stage import Batch, Stage, seed_of
from support.learner.world import rank_and_size, start_world
from support.run.checkpoints import Checkpoints, check_policy
from support.run.interrupts import Interrupted, Stop, leave, lost_process
from support.run.preflight import load_items, make_stage, task_overrides
from support.run.run_folder import RunFolder
from support.run.settings import SettingError, Settings, parse_settings
from support.run.stage_run import StageRun
from support.show.model_card import what_was_learned, write_model_card
from support.show.monitor import UpdateLog, check_tracker
from support.show.results import Results, beside, blind_rows, intervals, mean, remarks, results_table, write_predictions
from support.show.sheets import compare_policies, draw_predictions

HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------------------------------
# The method


def train_stage(stage: Stage, learner: Learner, run: StageRun) -> None:
    """Run one stage of the method, from its first step or from where `run` goes on."""
    optimizer = learner.begin_stage()  # AdamW; and pi_ref becomes what the policy is now
    with run.started(stage, learner, optimizer):
        for step, samples, prompts in run.steps():
            learner.set_learning_rate(optimizer, learning_rate(step, stage.steps, learner.settings.warmup))
            batch = collect(learner, stage, step, samples, prompts, run.history)  # rollout, reward, mutate, advantage
            metrics = update(learner, optimizer, batch)  # loss, step
            run.after_step(step, batch, metrics)  # history, log, validation, checkpoint, stop


def collect(
    learner: Learner, stage: Stage, step: int, samples: list[data.Sample], prompts: list[data.Prompt], history: rmo.History
) -> Batch:  # fmt: skip
    """rollout -> reward -> mutate -> advantage, on this process's B prompts."""
    G, policy = learner.settings.group_size, learner.rollout_policy
    keys = learner.random_keys(stage.number, step, len(samples))  # B, of the random generators of each prompt

    # rollout: G answers to each of B prompts
    rollout = roll_out(learner, stage, prompts, keys)
    texts = rarl.decode(policy, rollout.ids, rollout.mask)  # N

    # reward: R_final of each of them
    sampled_rewards = [stage.reward(text, samples[i // G]) for i, text in enumerate(texts)]  # N

    # mutate: a good answer into groups that are all alike and poor. It is then scored like the others
    texts, mutated = mutate_groups(learner.settings, stage, samples, texts, sampled_rewards, history, keys)
    rewards = [stage.reward(texts[i], samples[i // G]) if mutated[i] else r for i, r in enumerate(sampled_rewards)]

    # advantage, from the rewards after mutation
    totals = torch.tensor([r.total for r in rewards], dtype=torch.float64).view(-1, G)  # (B, G)
    advantages = grpo.group_advantages(totals).float()  # (B, G)

    answers = with_mutated(policy, rollout, mutated, texts)
    return Batch(
        prompts, answers.ids, answers.mask, answers.logp, torch.tensor(mutated), advantages,
        samples=samples, texts=texts, sampled_rewards=sampled_rewards, rewards=rewards,
        sampled_tokens=rollout.mask.sum(1), max_reward=stage.weights.max_reward(len(samples[0].items)),
    )  # fmt: skip


def update(learner: Learner, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, Any]:
    """The GRPO update on one batch, `updates` times. -> what to log; "bad" is True if a step was skipped.

    Old log-probs come from this function's own first pass, also those of mutated answers: grpo.py, choices 6 and 7.
    """
    s = learner.settings
    micros, denominator = learner.micro_batches(batch)  # what fits into one forward; answers (or tokens) of all of them
    old_logps: list[Tensor] = []  # (N, T) of each micro-batch: the policy before the first update
    log = UpdateLog(learner.world, s.max_tokens_per_forward)
    for epoch in range(s.updates):
        for i, micro in enumerate(micros):
            logp, entropy = learner.logprobs(micro)  # (N, T)
            ref_logp = learner.reference_logprobs(micro)  # (N, T), or None if beta is 0
            if epoch == 0:
                old_logps.append(logp.detach())
            loss, stats = grpo.grpo_loss(
                logp,
                old_logps[i] if epoch else None,  # None: on-policy, ratio 1
                ref_logp,
                micro.advantages.flatten().to(logp.device),  # (N,)
                micro.mask,
                clip_low=s.clip,
                clip_high=s.clip,
                beta=s.beta,
                normalize=s.normalize,
                denominator=denominator,
            )
            learner.backward(loss, micro)
            log.add(micro, logp, entropy, loss, stats)
        grad_norm, bad = learner.step(optimizer, log.mean_loss())  # clips the gradient; skips what is not finite
        log.close_epoch(grad_norm, bad)
        if bad:
            break
    return log.metrics


# --------------------------------------------------------------------------------------------------------------------
# The parts of `collect`


def roll_out(learner: Learner, stage: Stage, prompts: list[data.Prompt], keys: list[tuple]) -> rarl.Rollout:
    """G answers to each of B prompts, `rollout_batch` prompts at a time."""
    s, policy = learner.settings, learner.rollout_policy
    generators = [torch.Generator().manual_seed(seed_of(*key)) for key in keys]
    rollouts = []
    with learner.sampling():
        for b in range(0, len(prompts), s.rollout_batch):
            part, length = slice(b, b + s.rollout_batch), stage.max_new_tokens
            some = rarl.generate(policy, prompts[part], s.group_size, length, s.temperature, generators[part])
            rollouts.append(some)
    learner.clock.lap("rollout")
    return rarl.concatenate(rollouts, policy.eos_id)


def mutate_groups(
    s: Settings, stage: Stage, samples: list[data.Sample], texts: list[str], rewards: list[reward.Reward],
    history: rmo.History, keys: list[tuple],
) -> tuple[list[str], list[bool]]:  # fmt: skip
    """RMO on each of B groups. -> N texts, some of them replaced, and which ones"""
    mutated_texts, mutated = [], []
    for b, (sample, key) in enumerate(zip(samples, keys, strict=True)):
        group = slice(b * s.group_size, (b + 1) * s.group_size)
        answers, changed = rmo.mutate(
            texts[group],
            [r.total for r in rewards[group]],
            references_for(s, stage, sample, history, rewards[group]),
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
    s: Settings, stage: Stage, sample: data.Sample, history: rmo.History, group: list[reward.Reward]
) -> list[str]:
    """The good answers that RMO may put into a group: the ground truth, or one made of earlier answers' best values.

    group  rewards of the group's G answers. An answer that is not the truth must earn more than those it would replace.
    """
    if s.rmo_source == "truth":
        return [data.reference_answer(sample)]
    entries = rmo.recall(history, [item.name for item in sample.items], sample.task.delta)
    if not entries:
        return []
    text = data.format_answer((i, f"{value:.12g}") for i, value in entries)  # 17.0 is written 17
    replaced = sorted(r.total for r in group)[: s.rmo_k]
    return [text] if stage.reward(text, sample).total > max(replaced, default=0.0) else []


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
        with learner.sampling():
            answers = evaluation.ask(policy, mine, s.rollout_batch, length, progress)
        parts = world.gather(answers)
        predictions[n] = [parts[i % world.size][i // world.size] for i in range(len(few))]
    return predictions


def validate(learner: Learner, stage: Stage) -> tuple[list[float], dict[int, dict]]:
    """The policy on the stage's validation prompts.

    -> what it earns at each, as a share of the best possible R_final; for each number of images the mean share ("reward") and
    the metrics of eval.py
    """
    shares: list[float] = []
    rows: dict[int, dict] = {}
    for n, answers in ask_everywhere(learner, stage.validation).items():
        asked = zip(answers, stage.validation[n], strict=True)
        earned = [stage.reward(p["text"], sample).total / stage.weights.max_reward(n) for p, sample in asked]
        rows[n] = {"reward": mean(earned)} | evaluation.summarize(answers) | {"interval": intervals(answers)}
        shares += earned
    return shares, rows


def evaluate_everywhere(
    learner: Learner, samples: dict[int, list[data.Sample]], name: str, folder: RunFolder
) -> dict[int, dict]:
    """The policy on test prompts, with everything that is written about it.  -> number of images -> metrics"""
    answers = ask_everywhere(learner, samples, name)
    rows = {n: evaluation.summarize(some) | beside(some) for n, some in answers.items()}
    predictions = [p for some in answers.values() for p in some]
    if learner.world.main:
        write_predictions(predictions, folder.path / f"predictions_{name.replace(' ', '')}.jsonl")
        draw_predictions([x for few in samples.values() for x in few], predictions, folder.path / "predictions.png")
        for remark in remarks(predictions):
            print(f"{name}: {remark}", file=sys.stderr)
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
    checkpoints = Checkpoints(folder.path / "checkpoints", world)
    with folder.owned():
        if s.resume and (done := folder.complete(s, checkpoints)):
            if world.main:
                print(f"the run in {folder.path} is complete:\n\n{results_table(done)}")
                folder.finish(results_table(done), checkpoints)
            return done
        start = folder.find_start(s, checkpoints, HERE / "tiny" if s.model == "tiny" else s.model)
        if world.main:
            check_policy(start.model)
        train_items, test_items, val_items = load_items(s, folder.path)
        if world.main:
            print(f"loading {start.model}", file=sys.stderr)
        policy = load_start(start.model, s, world.device, read=world.main)
        steps = {1: s.steps1, 2: s.steps2}
        numbers = [number for number in range(start.stage, (s.stage or 2) + 1) if steps[number]]
        stages = [make_stage(number, policy, train_items, val_items, s) for number in numbers]
        results = world.gather(folder.open(s, start, checkpoints) if world.main else None)[0]
        if world.main:
            splits = [train_items, test_items, val_items]
            saved_task.begin(folder.path, s.data, splits, task_overrides(s), s.max_pixels, s.skip_bad)
        tests = {n: data.make_samples(test_items, n, s.eval_samples) for n in sorted({1, *s.images})}
        blind = blind_rows(tests, train_items, evaluation.grade)
        learner = Learner(policy, world, filled_in(s, policy.model, train_items, world))

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
            ask = partial(validate, learner, stage)
            train_stage(stage, learner, StageRun(folder, checkpoints, resume_from, stop, ask))
            folder.save_policy(learner, stage.number)
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
    rank, size = 0, 1
    try:
        rank, size = rank_and_size()
        run(parse_settings(argv), Stop())
    except (SettingError, data.DataError, rarl.ModelError, OSError, Interrupted) as error:
        leave("train.py", error, rank, size)
    except RuntimeError as error:  # a bug keeps its traceback; the death of a rank is none
        if not (sentence := lost_process(error)):
            raise
        leave("train.py", SettingError(sentence), rank, size)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
