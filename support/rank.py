"""Ranking images without labels, a handful or hundreds, with a policy that reads only a few images in a prompt.

The order is merged from many answers:

1. Every image is asked alone. These answers are the values, and the values give a first order.
2. A window of a few images slides over that order by half its length. Each window is one prompt, and its answer lists
   these images in order. So neighbours meet, which are the pairs that the values can hardly tell apart. Within the
   prompt the images are shuffled: a policy that favours the first image then favours no image in particular.
3. A listed order is a set of votes, "i before j". A Bradley-Terry model weighs all votes so far, and the values, and
   gives the next order (`merge_rankings`). The next round slides over that order, with its windows shifted.
4. An image without a valid value starts in the middle and goes where its votes put it. An invalid window has no votes.
5. A round shows every image about twice: with r rounds the policy reads 1 + 2r times as many images as there are.
"""

import argparse
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import rarl
import reward
from data import DataError, Item, Sample, Task
from support.datasets import saved_task
from support.datasets.image_files import ENDINGS, open_image, refuse_unreadable, unreadable
from support.datasets.splits import say
from support.run.eval_settings import output_folder
from support.show.results import NEARLY_ALL_VALUES, format_table, write_predictions
from support.show.sheets import draw_ranking

Ask = Callable[[list[Sample]], list[str]]  # prompts -> the texts that a policy answers


class Ranking(NamedTuple):
    """What `rank_images` finds.

    order    indices of the items, lowest first
    values   of item 0, 1, ... (not sorted); None where the one-image answer was not valid
    windows  number of prompts with several images
    invalid  number of those whose answer was not valid
    """

    order: list[int]
    values: list[float | None]
    windows: int
    invalid: int


def rank_images(ask: Ask, items: Sequence[Item], window: int = 4, rounds: int = 2) -> Ranking:
    """One item or more, all of one task, labels not needed, -> Ranking. How: see the top.

    window   images in a prompt, >= 2; fewer items than that make one window
    rounds   0 ranks by the values alone
    """
    answers = [reward.parse_response(text, 1) for text in ask([Sample((item,)) for item in items])]
    values = [answer[0][1] if answer else None for answer in answers]
    order, asked = merge_rankings(values, []), 0
    votes: list[list[int]] = []
    for r in range(rounds if len(items) > 1 else 0):
        groups = []
        for start in window_starts(len(order), window, r):
            groups.append(order[start : start + window])
            random.Random(f"window {r} {start}").shuffle(groups[-1])
        texts = ask([Sample(tuple(items[i] for i in group)) for group in groups])
        for group, text in zip(groups, texts, strict=True):
            if answer := reward.parse_response(text, len(group)):
                votes.append([group[image_id - 1] for image_id, _ in answer])
        asked += len(groups)
        order = merge_rankings(values, votes)
    return Ranking(order, values, asked, asked - len(votes))


def window_starts(n: int, window: int, r: int) -> list[int]:
    """Where the windows of round r = 0, 1, ... start in an order of n images.

    Neighbours share half their length. In odd rounds they are shifted by a quarter, so that others stand at the ends.

    >>> window_starts(10, 4, 0), window_starts(10, 4, 1)
    ([0, 2, 4, 6], [0, 1, 3, 5, 6])
    """
    step, last = (window + 1) // 2, max(0, n - window)  # the last window is whole: it starts earlier instead
    return sorted({min(max(0, start), last) for start in range(-(r % 2) * (step // 2), n, step)})


# --- many listed orders -> one order ------------------------------------------------------------------------


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks 1..M of x (M,), equal numbers sharing the average of theirs: [5, 9, 9] -> [1, 2.5, 2.5]."""
    if np.isnan(x).any():
        return np.full_like(x, np.nan)  # else NaN would rank as the largest number and the result look sound
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def merge_rankings(values: Sequence[float | None], listed_orders: Sequence[Sequence[int]]) -> list[int]:
    """One order of all n images (indices, lowest first) from their values (None: unknown) and from listed orders of some.

    Bradley-Terry with a prior. Image i has a strength s_i. A listed order puts i before j with probability
    sigmoid(s_j - s_i). Before any vote, s_i is normal around the image's place in the order by values, with variance 1,
    places PLACE apart; equal values share a place. Returned is the order of the most likely strengths. They are unique:
    the prior makes the problem strictly convex, even where all votes agree or there is none. One vote turns neighbours
    round but not images far apart, and votes reach pairs that never met. Ties go by value, then by index.
    O(n^2) memory, O(n^3) time: a second or so for a thousand images.

    >>> merge_rankings([30, 20, 40], []), merge_rankings([30, 20, 40], [[0, 1]])
    ([1, 0, 2], [0, 1, 2])
    """
    known = np.array([value is not None for value in values], dtype=bool)
    prior, precision = np.zeros(len(values)), np.where(known, 1.0, NO_VALUE)
    place = ranks(np.array([value for value in values if value is not None], dtype=np.float64))
    if known.any():
        prior[known] = min(PLACE, SPREAD / len(values)) * (place - place.mean())
    wins = np.zeros((len(values), len(values)))  # [i, j]: how many answers list i before j
    for listed in listed_orders:
        for k, i in enumerate(listed):
            wins[i, listed[k + 1 :]] += 1
    strengths = _strengths(wins, prior, precision)
    return np.lexsort((prior, strengths.round(6))).tolist()  # rounded: a tie is not broken by the last digit


# In simulation (30 to 400 images, tau of the values 0.83, windows of 4, 2 rounds) tau becomes 0.92, 0.89 or 0.86 where
# many-image answers are half as noisy as the values, as noisy, or twice. Without any value it becomes 0.80 or more.
PLACE = 0.5  # in units of strength: one vote between neighbours, sigmoid(0.5) = 62 %, outweighs their values
SPREAD = 20.0  # at most, from lowest to highest: else hundreds of images could never move far
NO_VALUE = 0.01  # precision in the place of 1: almost free, and held in the middle where there are no votes either


def _strengths(wins: np.ndarray, prior: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """(n,) argmin_s  sum_ij wins_ij log(1 + exp(s_i - s_j)) + sum_i precision_i (s_i - prior_i)^2 / 2, by Newton.

    wins (n, n): how many answers list i before j.  prior, precision (n,): what is known of s beforehand
    """

    def loss(s: np.ndarray) -> float:
        return np.sum(wins * np.logaddexp(0, s[:, None] - s)) + np.sum(precision * (s - prior) ** 2) / 2

    s, now = prior, loss(prior)
    for _ in range(100):  # some ten are needed
        doubt = 1 / (1 + np.exp(s - s[:, None]))  # (n, n): probability of j before i
        surprise = wins * doubt
        gradient = surprise.sum(1) - surprise.sum(0) + precision * (s - prior)
        curvature = (wins + wins.T) * doubt * (1 - doubt)
        step = np.linalg.solve(np.diag(curvature.sum(1) + precision) - curvature, gradient)
        while (after := loss(s - step)) > now:  # a full step may overshoot; half a one at some point does not
            step = step / 2
        s, now = s - step, after
        if np.abs(step).max(initial=0) < 1e-9:
            break
    return s


# --- the command: `eval.py --rank` -----------------------------------------------------------------------------


def rank_command(
    args: argparse.Namespace,
    load_policy: Callable[[argparse.Namespace, int | None], rarl.Policy],
    answer_greedily: Callable[..., list[str]],
) -> None:
    """Rank --rank, print the table, write ranking.jsonl and ranking.png.

    load_policy, answer_greedily: those of eval.py
    """
    saved = saved_task.load_task(args.model)
    task = saved_task.task_to_rank_by(saved, args.data, args.data_root, args.given)
    items, bad = load_images(find_images(args.rank), task, bool(args.skip_bad))
    out = output_folder(args, "rank", Path(args.model).name, Path(args.rank[0]).resolve().stem)
    if any(out.resolve() == Path(path).resolve() for path in args.rank):
        raise DataError(f"--out {out} is ranked itself: its sheet would be among the images the next time")
    say(saved_task.describe([task], saved, args.data))
    policy = load_policy(args, args.max_pixels or (saved.max_pixels if saved else None))
    ranked = rank_images(asker(answer_greedily, policy, args.batch_size), items, args.window, args.rounds)
    if ranked.values.count(None) == len(items) and ranked.invalid == ranked.windows:
        raise rarl.ModelError("none of the answers is valid, so there is no order: train this model first")
    rows: list[dict] = []
    table = [["rank", "value", "file"]]
    for rank, i in enumerate(ranked.order, start=1):
        file, value = items[i].name, ranked.values[i]
        rows.append({"rank": rank, "file": file, "value": value})
        table.append([str(rank), "-" if value is None else f"{value:.6g}", file])
    print(format_table(table, left=(2,)))
    write_predictions(rows, out / "ranking.jsonl")
    draw_ranking(items, ranked.order, ranked.values, out / "ranking.png")
    for remark in ranking_remarks(ranked, bad):
        say(remark)
    say(f"wrote {out / 'ranking.jsonl'} and {out / 'ranking.png'}")


def asker(answer_greedily: Callable[..., list[str]], policy: rarl.Policy, batch_size: int) -> Ask:
    """What `rank_images` asks with: samples without labels, all with as many images, -> texts."""

    def answers(samples: list[Sample]) -> list[str]:
        # Nobody knows the labels, so room is left for five digits and the task's decimals.
        longest = Sample(tuple(replace(item, label=99999.0) for item in samples[0].items))
        length = data.max_answer_tokens(policy, [longest])
        return answer_greedily(policy, samples, batch_size, length, f"{len(longest.items)} in a prompt")

    return answers


# --- image files in -----------------------------------------------------------------------------------------


def find_images(paths: Sequence[str]) -> list[Path]:
    """Files and folders -> image files in the order given, a folder's by name.

    Of a folder: the files that end in one of ENDINGS, without hidden ones, without subfolders.
    Raises DataError for what is missing, no file (a pipe would never end) or empty.
    """
    files: list[Path] = []
    for text in paths:
        if os.path.isdir(text):
            inside = [f for f in sorted(Path(text).iterdir()) if f.suffix.lower() in ENDINGS and f.is_file()]
            shown = [f for f in inside if f.name[0] != "."]
            files += shown
            if not shown:
                raise DataError(f"folder {text} has no images ({' '.join(ENDINGS)}); subfolders are not searched")
        elif os.path.isfile(text):
            files.append(Path(text))
        else:
            raise DataError(f"--rank: there is no file or folder {text!r}")
    return files


def load_images(files: Sequence[Path], task: Task, skip_bad: bool = False) -> tuple[list[Item], list[str]]:
    """Image files -> (items without labels, [what is wrong with a file, ...]).

    All are read once, before a model is loaded for them. Raises DataError for those that cannot be used, or leaves
    them out where skip_bad.
    """
    items = [Item(str(file), math.nan, task, partial(open_image, file), file) for file in files]
    if not skip_bad:
        refuse_unreadable(items)
    wrong = unreadable(items) if skip_bad else {}
    if len(wrong) == len(items):
        raise DataError(f"none of the {len(items)} files is an image that can be read, such as {files[0]}")
    return [item for item in items if item.path not in wrong], list(wrong.values())


def ranking_remarks(ranking: Ranking, bad: Sequence[str] = ()) -> list[str]:
    """What a reader of the ranking has to know: what is not in it, was not valid, is alike.  bad: of `load_images`"""
    n, missing = len(ranking.order), ranking.values.count(None)
    said = [f"left out: {problem}" for problem in bad]
    if bad:
        said.append(f"left out {len(bad)} of {n + len(bad)} images")
    if missing:
        said.append(f"{missing} of {n} images have no valid value: the windows place them, or the middle")
    if ranking.invalid:
        said.append(f"{ranking.invalid} of {ranking.windows} windows were left out, as the answer was not valid")
    known = [value for value in ranking.values if value is not None]
    value, times = Counter(known).most_common(1)[0] if known else (math.nan, 0)
    if len(known) > 1 and times >= NEARLY_ALL_VALUES * len(known):
        said.append(
            f"{times} of {len(known)} values are {value:g}: this policy hardly tells these images apart, and their order rests "
            "on the windows at most"
        )
    return said
