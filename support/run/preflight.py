"""What is checked before a run starts: that images can be read, and that the reward understands the reference answers."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import data
import rarl
from support.datasets.balance import task_weights
from support.datasets.image_files import refuse_unreadable
from support.datasets.saved_task import GIVEN, as_begun, load_task, overrides_for
from support.datasets.splits import load_splits, say
from support.learner.stage import RewardWeights, Stage, seed_of
from support.run.settings import SettingError, Settings


def task_overrides(s: Settings) -> dict[str, Any]:
    return {name: getattr(s, name) for name in GIVEN}


def load_items(s: Settings, run: Path) -> list[list[data.Item]]:
    """The items of train, test and, if there is validation, val. A data set may do without the last.

    A later stage or a resumed run takes those that the run began with, from its folder `run`.

    DataError if train or test has too few items for a prompt, or an image cannot be read.

    Every image is decoded once beforehand where they are few enough for that to take a minute at most. Of larger data
    sets, an unreadable image stops the run when its turn comes, with a checkpoint behind it; or use --skip-bad.
    """
    say(f"reading {s.data}")
    wanted = ("train", "test", "val") if s.validate_every else ("train", "test")
    goes_on, given = s.resume or s.stage == 2, task_overrides(s)
    overrides = overrides_for(load_task(run), s.data, given) if goes_on else given
    splits = load_splits(s.data, s.data_root, wanted, overrides, s.skip_bad, may_be_empty=("val",))
    splits += [[]] * (3 - len(wanted))
    splits = as_begun(run, s.data, splits, given) if goes_on else splits
    if s.validate_every and not splits[2]:
        say(f"the val split of {s.data} is empty: no validation, a stage ends with its last policy")
    for items in splits[:2]:
        for n in {1, *s.images}:
            data.make_pools(items, n)
    files = [item for items in splits for item in items if item.path is not None]
    if len(files) <= 5000:
        refuse_unreadable(files)
    return splits


def validation_prompts(items: list[data.Item], images: tuple[int, ...], count: int) -> dict[int, list[data.Sample]]:
    """Number of images -> up to `count` prompts of the val split; only where a task has so many images there."""
    most = max(Counter(item.task for item in items).values(), default=0)
    return {n: data.make_samples(items, n, count) for n in sorted(set(images)) if n <= most}


def make_stage(
    number: int, policy: rarl.Policy, items: list[data.Item], val_items: list[data.Item], s: Settings
) -> Stage:  # fmt: skip
    """A stage from the settings and the items. What its prompts ask for is checked first (`preflight`)."""
    steps, num_images = (s.steps1, (1,)) if number == 1 else (s.steps2, s.images)
    weights = RewardWeights(s.w_reg, s.w_rank if number == 2 else 0.0, s.w_format)
    balance = task_weights(items) if s.balance else None
    sampler = data.Sampler(items, num_images, s.batch_size, seed_of(s.seed, number), balance)
    samples = hardest_samples(items, num_images)
    length = s.max_new_tokens or data.max_answer_tokens(policy, samples)
    stage = Stage(number, steps, sampler, weights, length, validation_prompts(val_items, num_images, s.val_samples))
    preflight(policy, samples, stage)
    return stage


def hardest_samples(items: list[data.Item], images: tuple[int, ...]) -> list[data.Sample]:
    """Samples whose reference answers stand for all that a stage may draw from the items, however many they are.

    Of each task: its labels alone (up to 1,000, both ends among them), and for each number of images the longest answer.
    """
    samples = []
    for task, pool in data.make_pools(items, 1).items():
        labels = sorted({item.label: item for item in pool}.values(), key=lambda item: item.label)
        samples += [data.Sample((item,)) for item in [*labels[:: math.ceil(len(labels) / 1000)], labels[-1]]]
        length = lambda item, decimals=task.decimals: len(data.format_value(item.label, decimals))
        different_first = {item.name: item for item in [*labels, *pool]}.values()  # as they are drawn
        longest = sorted(different_first, key=length, reverse=True)
        samples += [data.Sample(tuple(longest[:n])) for n in images if 1 < n <= len(pool)]
    return samples


def preflight(policy: rarl.Policy, samples: list[data.Sample], stage: Stage) -> None:
    """Refuse to start unless the reference answers of these samples earn the highest reward.

    A wrong delta, a broken parser, swapped image ids or a tokenizer that does not give the text back would corrupt
    every gradient, and nothing would look wrong. Each prompt's reference makes the whole round: text -> tokens ->
    text -> reward. Up to 1 % may be missing, as a label may have more decimals than the answer.
    """
    for sample in {(sample.task, len(sample.items)): sample for sample in samples}.values():
        data.chat_text(policy.tokenizer, sample)  # refuses what the tokenizer would take for a mark of its own
    references = [data.reference_answer(sample) for sample in samples]
    unique = sorted(set(references))
    tokens = dict(zip(unique, rarl.encode(policy, unique), strict=True))
    read_back = {text: rarl.decode(policy, ids[None], torch.ones(1, len(ids)))[0] for text, ids in tokens.items()}
    for sample, text in zip(samples, references, strict=True):
        got, best = stage.reward(read_back[text], sample), stage.weights.max_reward(len(sample.items))
        if got.total < 0.99 * best or len(tokens[text]) > stage.max_new_tokens:
            raise SettingError(
                f"preflight: the reference answer of a training prompt does not earn the highest reward, {got.total:.3f} of {best:g}.\n"
                f"  images     {[item.name for item in sample.items]}\n  labels     {sample.labels}\n"
                f"  reference  {text}\n  read back  {read_back[text]}\n  rewards    {got}\n"
                f"  tokens     {len(tokens[text])} of {stage.max_new_tokens} allowed\n"
                "Check --delta, the labels, the tokenizer and --max-new-tokens."
            )
