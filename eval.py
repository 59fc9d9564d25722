"""How good is a policy, and what does it say of your own images? Metrics, the evaluation loop, the ranking of a folder,
pictures of both, and a thin command line.

    python eval.py --model runs/rarl/stage2 --data dots --images 1 2 4 8
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --data coco --data-root /data/coco --split val
    python eval.py --model runs/rarl/stage2 --data dots --rank a.jpg b.jpg c.jpg
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --rank holiday/ \
        --question "How many people are in the photo?" --order "from the fewest people to the most"

Without --rank the command prints one row per number of images and writes `predictions.jsonl` (one prompt a line) and
`predictions.png` into --out. The paper (arXiv 2601.20585) reports MAE and tau on UTKFace, accuracy and tau
on COCO-REM, SRCC on AVA.

How to read a row:
1. `valid` first. Every metric but `valid` and `strict` is over the valid answers alone: a policy that answers
   only what it finds easy looks good in them. Compare policies only where their `valid` is about the same.
2. `tau` is Kendall's tau of the listed order within one prompt, averaged over prompts. It never looks at the
   values. That the list is the predicted order, and the mean over prompts, are our choices (README).
3. mae, srcc, plcc, tau_b and accuracy pool all (value, label) pairs of all prompts, as if each image had been
   asked alone. They never look at the listed order, so tau and tau_b can disagree: a policy may sort well and
   count badly, or the other way round.
4. Decoding is greedy and the samples are fixed by the seed, so a run can be repeated.

With --rank it orders images without labels, a handful or hundreds, prints rank, value and file, and writes
`ranking.jsonl` and the sheet `ranking.png`. A prompt holds only a few images, so the order is merged from many answers:

1. Every image is asked alone. These answers are the values, and the values give a first order.
2. A window of --window images slides over that order by half its length. Each window is one prompt, and its answer
   lists these images in order. So neighbours meet, the very pairs that the values can hardly tell apart. Within the
   prompt they are shuffled: if the policy favours the first image, no image gains by it in the long run.
3. A listed order is a set of votes, "i before j". A Bradley-Terry model weighs all votes so far, and the values, and
   gives the next order (`merge_rankings`). The next of --rounds rounds slides over that one, its windows shifted.
4. An image without a valid value starts in the middle and goes where its votes put it. An invalid window has no votes.
5. A round shows every image about twice: with r rounds the policy reads 1 + 2r times as many images as there are.
"""

import argparse
import json
import math
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
import rarl
import reward

# --- metrics: plain functions of two equally long lists of numbers, M = number of (value, label) pairs ------


def _pair(values, labels):
    """Both as float64 arrays (M,). A mismatch raises: broadcasting would turn it into a wrong number."""
    values, labels = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if values.shape != labels.shape or values.ndim != 1:
        raise ValueError(f"expected two equally long lists, got shapes {values.shape} and {labels.shape}")
    return values, labels


def _ranks(x):
    """Ranks 1..M of x (M,), equal numbers sharing the average of theirs: [5, 9, 9] -> [1, 2.5, 2.5]."""
    if np.isnan(x).any():
        return np.full_like(x, np.nan)  # else NaN would rank as the largest number and the result look sound
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _mean(numbers):
    return float(np.mean(numbers)) if len(numbers) else math.nan  # numpy would warn first


def mae(values, labels):
    """Mean absolute error, mean |value - label|, in the labels' unit. [0, inf); nan without pairs."""
    values, labels = _pair(values, labels)
    with np.errstate(over="ignore"):  # a policy may write 1e308; an infinite error is then the honest answer
        return _mean(np.abs(values - labels))


def accuracy(values, labels, decimals=0):
    """Share of values that equal their label when both are rounded to `decimals` (a number or one per pair),
    halves to even. For counts (decimals 0) this is the paper's accuracy. [0, 1]; nan without pairs."""
    values, labels = _pair(values, labels)
    scale = 10.0 ** np.asarray(decimals)
    with np.errstate(over="ignore"):
        equal = np.rint(values * scale) == np.rint(labels * scale)
    return _mean(equal)


def plcc(values, labels):
    """Pearson's linear correlation. [-1, 1]; nan with fewer than two pairs or if either side is constant."""
    values, labels = _pair(values, labels)
    if len(values) < 2 or (values == values[0]).all() or (labels == labels[0]).all():
        return math.nan
    # The correlation has no scale, so each side is brought to at most 1: squares of 1e200 would overflow.
    values, labels = values / np.abs(values).max(), labels / np.abs(labels).max()
    values, labels = values - values.mean(), labels - labels.mean()
    return float(np.clip(values @ labels / (np.linalg.norm(values) * np.linalg.norm(labels)), -1, 1))


def srcc(values, labels):
    """Spearman's rank correlation: Pearson's of the ranks, ties sharing their average rank. [-1, 1]; nan with
    fewer than two pairs or where either side is constant."""
    values, labels = _pair(values, labels)
    return plcc(_ranks(values), _ranks(labels))


def tau_b(values, labels):
    """Kendall's tau-b: (concordant - discordant) / sqrt(pairs untied in values * pairs untied in labels).
    [-1, 1]; nan with fewer than two pairs or where either side is constant. O(M^2) time, O(M) memory."""
    values, labels = _pair(values, labels)
    values, labels = _ranks(values), _ranks(labels)  # order is all that counts, and ranks cannot overflow
    agreement = untied_values = untied_labels = 0.0
    rows = 1 + 2**20 // max(1, len(values))  # of the M x M table at a time: some 8 MB each, whatever M is
    for i in range(0, len(values), rows):
        sign_values = np.sign(values[i : i + rows, None] - values)  # (rows, M)
        sign_labels = np.sign(labels[i : i + rows, None] - labels)  # (rows, M)
        agreement += np.sum(sign_values * sign_labels)
        untied_values += np.sum(np.abs(sign_values))
        untied_labels += np.sum(np.abs(sign_labels))
    # Each pair was met twice in all three sums, which cancels. The roots apart: exactly 1 for equal orders.
    scale = math.sqrt(untied_values) * math.sqrt(untied_labels)
    return float(np.clip(agreement / scale, -1, 1)) if scale else math.nan


def summarize(predictions):
    """All metrics of a list of predictions (see `evaluate`) in one flat dict. How to read it: see the top.

    n         prompts
    valid     share of prompts with a parseable answer
    strict    share of prompts whose answer is nothing but the list (R_format = 1)
    tau       mean over valid prompts of Kendall's tau of the listed order; prompts without two different
              labels have none and are left out, so it is nan at one image
    mae, accuracy, srcc, plcc, tau_b   over all (value, label) pairs of valid answers

    Undefined metrics are nan. The labels should share a unit: a mean of years and counts says nothing.
    """
    valid = [p for p in predictions if p["order"] is not None]
    values = [value for p in valid for value in p["values"]]
    labels = [label for p in valid for label in p["labels"]]
    decimals = [p.get("decimals", 0) for p in valid for _ in p["labels"]]  # absent: whole numbers
    taus = [reward.kendall_tau(p["order"], p["labels"]) for p in valid]
    return {
        "n": len(predictions),
        "valid": _mean([p["order"] is not None for p in predictions]),
        "strict": _mean([reward.is_strict_format(p["text"], len(p["items"])) for p in predictions]),
        "mae": mae(values, labels),
        "accuracy": accuracy(values, labels, decimals),
        "srcc": srcc(values, labels),
        "plcc": plcc(values, labels),
        "tau": _mean([tau for tau in taus if not math.isnan(tau)]),
        "tau_b": tau_b(values, labels),
    }


# --- the loop -----------------------------------------------------------------------------------------------


def evaluate(policy, samples, batch_size=16, max_new_tokens=None):
    """Greedy answers to all samples -> (metrics, predictions), the predictions in the order of the samples.

    max_new_tokens: None allows the longest reference answer among the samples and some slack
    (`data.answer_budget`); a longer answer is cut, which makes it invalid.

    A prediction is a dict that JSON can hold:
      items     names of the images, image 1 first
      task      name of the task, and `decimals`, those it is rounded to for accuracy
      labels    of image 1..n
      text      the answer as written
      order     image ids as listed, lowest first; None if the answer is not valid
      values    of image 1..n (not as listed); None if the answer is not valid

    On several processes give each a part of the samples and `summarize` the gathered predictions: a mean of
    metrics is not the metric of the whole.
    """
    if max_new_tokens is None and samples:
        max_new_tokens = data.answer_budget(policy, samples)  # of all: no answer depends on its batch
    predictions = ask(policy, samples, batch_size, max_new_tokens)
    return summarize(predictions), predictions


@torch.no_grad()
def ask(policy, samples, batch_size, max_new_tokens):
    """Greedy answers to all samples, as predictions (see `evaluate`) in the order of the samples."""
    # Prompts of like length share a batch: beside an 8-image prompt a 1-image one is mostly padding.
    queue = sorted(range(len(samples)), key=lambda i: len(samples[i].items))
    predictions = [None] * len(samples)
    for start in range(0, len(queue), batch_size):
        batch = queue[start : start + batch_size]
        prompts = data.make_prompts(policy, [samples[i] for i in batch])
        rollout = rarl.generate(policy, prompts, 1, max_new_tokens, temperature=0.0, generator=None)
        for i, text in zip(batch, rarl.decode(policy, rollout.ids, rollout.mask), strict=True):
            predictions[i] = _prediction(samples[i], text)
    return predictions


def _prediction(sample, text):
    answer = reward.parse_response(text, len(sample.items))  # [(image_id, value)] as listed, or None
    return {
        "items": [item.name for item in sample.items],
        "task": sample.task.name,
        "decimals": sample.task.decimals,
        "labels": [float(label) for label in sample.labels],
        "text": text,
        "order": None if answer is None else [image for image, _ in answer],
        "values": None if answer is None else [float(value) for _, value in sorted(answer)],
    }


def finite(x):
    """For JSON, which has no NaN: any number in a tree of dicts and lists that is not finite becomes None (null)."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, list):
        return [finite(y) for y in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_predictions(predictions, path):
    """One JSON object a line."""
    lines = [json.dumps(finite(p), allow_nan=False) for p in predictions]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


# --- ranking: many answers about a few images each, merged into one order ------------------------------------


class Ranking(NamedTuple):
    """What `rank_images` finds.

    order    indices of the items, lowest first
    values   of item 0, 1, ... (not sorted); None where the one-image answer was not valid
    windows  number of many-image prompts
    invalid  number of those whose answer was not valid
    """

    order: list[int]
    values: list[float | None]
    windows: int
    invalid: int


def rank_images(policy, items, window=4, rounds=2, batch_size=16):
    """One item or more, all of one task, labels not needed, -> Ranking. How: see the top.

    window   images in a prompt, >= 2; fewer items than that make one window
    rounds   0 ranks by the values alone
    """
    # Nobody knows the answers, so room is left for five digits and the task's decimals.
    longest = [replace(item, label=99999.0) for item in items[:window]]

    def answers(groups):
        """Predictions for groups of item indices, all of one length."""
        budget = data.answer_budget(policy, [data.Sample(tuple(longest[: len(groups[0])]))])
        return ask(policy, [data.Sample(tuple(items[i] for i in group)) for group in groups], batch_size, budget)

    values = [answer["values"] and answer["values"][0] for answer in answers([[i] for i in range(len(items))])]
    order, votes, windows = merge_rankings(values, []), [], 0
    for r in range(rounds if len(items) > 1 else 0):
        groups = []
        for start in window_starts(len(items), window, r):
            groups.append(order[start : start + window])
            random.Random(f"window {r} {start}").shuffle(groups[-1])
        for group, answer in zip(groups, answers(groups), strict=True):
            if answer["order"] is not None:
                votes.append([group[image_id - 1] for image_id in answer["order"]])
        windows += len(groups)
        order = merge_rankings(values, votes)
    return Ranking(order, values, windows, windows - len(votes))


def window_starts(n, window, r):
    """Where the windows of round r = 0, 1, ... start in an order of n images.

    Neighbours share half their length. In odd rounds they are shifted by a quarter, so that others stand at the ends.

    >>> window_starts(10, 4, 0), window_starts(10, 4, 1)
    ([0, 2, 4, 6], [0, 1, 3, 5, 6])
    """
    step, last = (window + 1) // 2, max(0, n - window)  # the last window is whole: it starts earlier instead
    return sorted({min(max(0, start), last) for start in range(-(r % 2) * (step // 2), n, step)})


def merge_rankings(values, listed_orders):
    """One order of all n images (indices, lowest first) from their values and from listed orders of a few of them.

    values          a finite number or None for each image
    listed_orders   lists of different indices, lowest first; no image or pair has to occur in any

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
    place = _ranks(np.array([value for value in values if value is not None], dtype=np.float64))
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


def _strengths(wins, prior, precision):
    """(n,) argmin_s  sum_ij wins_ij log(1 + exp(s_i - s_j)) + sum_i precision_i (s_i - prior_i)^2 / 2, by Newton.

    wins (n, n): how many answers list i before j.  prior, precision (n,): what is known of s beforehand
    """

    def loss(s):
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


def find_images(paths):
    """Files and folders -> image files in the order given, a folder's by name.

    Of a folder: the files that end in one of data.ENDINGS, without hidden ones, without subfolders.
    Raises DataError for what is missing, empty or given twice.
    """
    files = []
    for text in paths:
        path = Path(text)
        if not text or not path.exists():
            raise data.DataError(f"--rank: there is no file or folder {text!r}")
        if path.is_dir():
            inside = sorted(f for f in path.iterdir() if f.suffix.lower() in data.ENDINGS and f.is_file())
            inside = [f for f in inside if not f.name.startswith(".")]
            if not inside:
                endings = " ".join(data.ENDINGS)
                raise data.DataError(f"folder {path} has no images ({endings}); subfolders are not searched")
        files += inside if path.is_dir() else [path]
    seen = {}
    for file in files:
        first = seen.setdefault(file.resolve(), file)
        if first is not file:
            raise data.DataError(f"{file} is given twice" + (f", first as {first}" if first != file else ""))
    return files


def load_images(files, task, skip_bad=False):
    """Image files -> (items without labels, [what is wrong with a file, ...]).

    All are read once, before a model is loaded for them. Raises DataError for those that cannot be used, or leaves
    them out where skip_bad.
    """
    items = [data.Item(str(file), math.nan, task, partial(data.open_image, file), file) for file in files]
    wrong = data.unreadable(items)
    if wrong and (not skip_bad or len(wrong) == len(items)):
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        advice = "; --skip-bad leaves such files out" if len(wrong) < len(items) else ""
        raise data.DataError("; ".join([*wrong.values()][:5]) + more + advice)
    return [item for item in items if item.path not in wrong], list(wrong.values())


# --- what people look at ------------------------------------------------------------------------------------

TABLE = ("n", "valid", "strict", "mae", "accuracy", "srcc", "plcc", "tau", "tau_b")


def format_table(rows):
    """Text table, a line per label. rows: [{label: metrics}, ...], metrics of `summarize`; "-": undefined."""

    def cell(x):
        if isinstance(x, int):
            return str(x)
        return f"{x:.3f}" if math.isfinite(x) and abs(x) < 1e6 else "-" if math.isnan(x) else f"{x:.1e}"

    lines = [["", *TABLE]]
    for row in rows:
        lines += [[label, *(cell(metrics[name]) for name in TABLE)] for label, metrics in row.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([label.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for label, *cells in lines)


INK, FAINT, PAPER = "#1f2328", "#6e7781", "#ffffff"
GOOD, FAIR, POOR = "#1a7f37", "#b35900", "#cf222e"
THUMB, GAP, MARGIN, PER_LINE = 128, 14, 28, 8  # pixels, and thumbnails before a row goes on below


def _write(draw, font, xy, text, room, colour, anchor="la", cut="end"):
    """Write what fits into `room` pixels, cut at the end or in the middle. -> x behind it"""
    # The built-in font knows little beyond ASCII. A policy may write anything, and a file have any name.
    text = text.replace("\n", " ").encode("ascii", "backslashreplace").decode()
    if draw.textlength(text[:1000], font) > room:
        text, middle = text[:1000], "..." if cut == "middle" else " ..."
        head, tail = (text, "") if cut == "end" else (text[: len(text) // 2], text[len(text) // 2 :])
        while head and draw.textlength(head + middle + tail, font) > room:
            head, tail = head[:-1], tail[1:]
        text = head + middle + tail
    draw.text(xy, text, fill=colour, font=font, anchor=anchor)
    return xy[0] + draw.textlength(text, font)


def draw_predictions(samples, predictions, path, rows=8):
    """One picture (PNG or whatever the path's ending says) of `rows` samples spread evenly over all of them.

    A row is one prompt: its images in the *predicted* order, below each the true and the said value, coloured
    by the error. The limits follow R_reg = 1 - error^2 / delta^2: from delta on nothing is left of it, within
    delta / 4 at least 93.75 %. The row of an invalid answer shows the images as given, and what was written.
    """
    if len(samples) != len(predictions):
        raise ValueError(f"{len(samples)} samples but {len(predictions)} predictions")
    chosen = np.linspace(0, len(samples) - 1, min(rows, len(samples))).round().astype(int)
    shown = [(samples[i], predictions[i]) for i in chosen]

    title, font = ImageFont.load_default(size=22), ImageFont.load_default(size=14)
    columns = min(PER_LINE, max((len(sample.items) for sample, _ in shown), default=1))
    width = max(2 * MARGIN + columns * (THUMB + GAP) - GAP, 760)  # 760 holds the legend
    head, title_height = 30, 84
    line_height = THUMB + 34  # thumbnail, caption, space
    lines = [-(-len(sample.items) // PER_LINE) for sample, _ in shown]
    height = title_height + sum(head + n * line_height for n in lines) + (MARGIN if shown else 0)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)

    write = partial(_write, draw, font)
    draw.text((MARGIN, 20), "Images in the order of the answer", fill=INK, font=title)
    x = write((MARGIN, 54), "One prompt per row, lowest on the left.  Error: ", width, FAINT)
    legend = {GOOD: "up to delta / 4", FAIR: "less than delta", POOR: "delta or more (no reward)"}
    for colour, text in legend.items():
        x = write((x, 54), text, width, colour) + 18

    y = title_height
    for (sample, prediction), n_lines in zip(shown, lines, strict=True):
        task, labels, values, n = sample.task, sample.labels, prediction["values"], len(sample.items)
        draw.line((MARGIN, y, width - MARGIN, y), fill="#d0d7de")
        room = width - 2 * MARGIN
        about = f"{task.name}, {n} image{'s' * (n > 1)}, delta {task.delta:g}"
        if values is None:
            x = write((MARGIN, y + 8), f"{about}, not a valid answer:  ", room, POOR)
            write((x, y + 8), " ".join(prediction["text"].split()) or "(empty)", width - MARGIN - x, INK)
        else:
            tau = reward.kendall_tau(prediction["order"], labels)
            about += f", mean error {mae(values, labels):.4g}"
            write((MARGIN, y + 8), about if math.isnan(tau) else f"{about}, tau {tau:.2f}", room, INK)
        for place, image_id in enumerate(prediction["order"] or range(1, n + 1)):
            label = labels[image_id - 1]
            left = MARGIN + place % PER_LINE * (THUMB + GAP)
            top = y + head + place // PER_LINE * line_height
            thumbnail = ImageOps.contain(sample.items[image_id - 1].image(), (THUMB, THUMB))
            corner = left + (THUMB - thumbnail.width) // 2, top + (THUMB - thumbnail.height) // 2
            canvas.paste(thumbnail, corner)
            caption, colour = f"true {_short(label, task.decimals)}", FAINT
            if values is not None:
                said = values[image_id - 1]
                error = abs(said - label)
                caption += f"  said {_short(said, task.decimals + 1)}"  # the digit shows 6.5 as not quite 6
                colour = GOOD if error <= task.delta / 4 else FAIR if error < task.delta else POOR
            write((left + THUMB // 2, top + THUMB + 6), caption, THUMB + GAP - 4, colour, anchor="ma")
        y += head + n_lines * line_height
    canvas.save(path)


def _short(value, decimals):
    return f"{round(value, decimals):.6g}"


def draw_ranking(items, ranking, path):
    """A sheet (PNG or whatever the path's ending says) of all images in ranked order, lowest first, line by line.

    Below each its rank, its value ("-": no valid answer) and its file. The more images, the smaller they are.
    """
    n = len(items)
    thumb, size = next((t, s) for most, t, s in ((32, 168, 15), (120, 120, 13), (math.inf, 84, 11)) if n <= most)
    gap, line_height = thumb // 8, thumb + 2 * size + thumb // 5
    columns = min(n, max(1312 // (thumb + gap), math.ceil(math.sqrt(1.3 * n))))  # never much taller than wide
    width, top = max(2 * MARGIN + columns * (thumb + gap) - gap, 760), 96
    canvas = Image.new("RGB", (width, top + -(-n // columns) * line_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    task, font = items[0].task, ImageFont.load_default(size=size)
    _write(draw, ImageFont.load_default(size=22), (MARGIN, 20), task.question, width - 2 * MARGIN, INK)
    about = f"{n} image{'s' * (n > 1)}, {task.order}, line by line.  Below each: rank, value, file."
    _write(draw, ImageFont.load_default(size=14), (MARGIN, 54), about, width - 2 * MARGIN, FAINT)
    draw.line((MARGIN, top - 14, width - MARGIN, top - 14), fill="#d0d7de")
    for place, i in enumerate(ranking.order):
        x, y = MARGIN + place % columns * (thumb + gap), top + place // columns * line_height
        image = items[i].image()
        shape = [max(1, round(side * thumb / max(image.size))) for side in image.size]  # 200 : 1 is a line
        thumbnail = image.resize(shape)
        canvas.paste(thumbnail, (x + (thumb - thumbnail.width) // 2, y + thumb - thumbnail.height))
        value = "-" if ranking.values[i] is None else _short(ranking.values[i], task.decimals + 2)
        y += thumb + 5
        behind = _write(draw, font, (x, y), f"{place + 1}", thumb, FAINT)
        _write(draw, font, (x + thumb, y), value, x + thumb - behind - 6, INK, anchor="ra")
        _write(draw, font, (x, y + size + 3), Path(items[i].name).name, thumb, FAINT, cut="middle")
    canvas.save(path)


def format_ranking(rows):
    """Text table of the rows of `ranking_rows`."""
    lines = [["rank", "value", "file"]]
    lines += [[str(r["rank"]), "-" if r["value"] is None else f"{r['value']:.6g}", r["file"]] for r in rows]
    widths = [max(len(line[k]) for line in lines) for k in (0, 1)]
    return "\n".join(f"{a.rjust(widths[0])}  {b.rjust(widths[1])}  {c}" for a, b, c in lines)


def ranking_rows(items, ranking):
    """The ranking as dicts that JSON can hold: rank (from 1), file, value (None: no valid answer), lowest first."""
    return [{"rank": r, "file": items[i].name, "value": ranking.values[i]} for r, i in enumerate(ranking.order, 1)]


# --- command line -------------------------------------------------------------------------------------------


def _at_least(low):
    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return int(text)

    number.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"
    return number


def _device(text):
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown name; a build of torch without CUDA
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}") from error


# Defaults of what goes with one of the two alone. The parser leaves out what was not given, so that a setting of the
# one is refused with the other, not silently ignored.
EVALUATION = dict(split="test", images=[1, 2, 4, 8], samples=200, seed=0)
RANKING = dict(question=None, order=None, window=4, rounds=2, skip_bad=False, json=False)


def _arguments(argv):
    def shown(name):
        default = (EVALUATION | RANKING)[name]
        return f"(default: {' '.join(map(str, default)) if isinstance(default, list) else default})"

    parser = argparse.ArgumentParser(
        description="Evaluate a policy (a table, its answers, a picture), or let it rank images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a policy (Hugging Face layout), or an id on the hub")
    add("--data", help="name of the data set, such as dots, dials or coco; with --rank: whose question is asked")
    add("--data-root", help="folder of the data set; the built-in ones need none")
    add("--batch-size", type=_at_least(1), default=16, help="prompts at a time, a matter of speed and memory")
    add("--out", type=Path, help="output folder; None: eval-... or rank-MODEL-... beside the model, or in runs/")
    add("--device", type=_device, default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--rank", nargs="+", metavar="PATH", help="images, or folders of images, to put in order")

    add = parser.add_argument_group("evaluation, without --rank", argument_default=argparse.SUPPRESS).add_argument
    add("--split", choices=("train", "val", "test"), help=f"part of the data set {shown('split')}")
    add("--images", type=_at_least(1), nargs="+", help=f"images per prompt, one row each {shown('images')}")
    add("--samples", type=_at_least(1), help=f"prompts for each number of images {shown('samples')}")
    add("--seed", type=int, help=f"draws the samples; the same seed gives the same prompts {shown('seed')}")

    add = parser.add_argument_group("ranking, with --rank", argument_default=argparse.SUPPRESS).add_argument
    add("--question", help='what to ask, instead of --data: "How old is the person in the photo?"')
    add("--order", help='lowest first, in words, with --question: "from the youngest to the oldest"')
    add("--window", type=_at_least(2), help=f"images in a prompt {shown('window')}")
    add("--rounds", type=_at_least(0), help=f"times to slide; 0: by the values alone {shown('rounds')}")
    add("--skip-bad", action="store_true", help="leave unreadable images out, and count them")
    add("--json", action="store_true", help="print a JSON list of {rank, file, value} and nothing else")
    args = parser.parse_args(argv)
    own, others = (RANKING, EVALUATION) if args.rank else (EVALUATION, RANKING)
    for name in vars(args):
        if name in others:
            parser.error(f"--{name.replace('_', '-')} {'does not go with' if args.rank else 'needs'} --rank")
    args = argparse.Namespace(**own | vars(args))
    if not args.rank and not args.data:
        parser.error("--data is required, or --rank")
    if args.rank and (bool(args.question), bool(args.order)) != (not args.data,) * 2:
        parser.error("--rank needs either --data or both --question and --order")
    if args.data_root and not args.data:
        parser.error("--data-root goes with --data")
    return args


def main(argv=None):
    transformers.utils.logging.disable_progress_bar()  # of loading weights
    args = _arguments(argv)
    try:
        rarl.check_path(args.model)  # before the data is read and the output folder made
        _rank(args) if args.rank else _evaluate(args)
    except (data.DataError, rarl.ModelError, OSError) as error:  # the user's; a bug keeps its traceback
        raise SystemExit(f"eval.py: {error}") from None


def _output(args, *name):
    """The output folder, made if need be."""
    model = Path(args.model)
    beside = model.parent if "runs" in model.parts else Path("runs")
    out = args.out or beside / "-".join(name)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _load_policy(args):
    return rarl.load_policy(args.model, args.device, torch.bfloat16 if args.device.type == "cuda" else torch.float32)


def _evaluate(args):
    # The data set first: a policy may take minutes to load, and only then is a mistyped name annoying.
    items = data.load_dataset(args.data, args.data_root, args.split)
    samples = {n: data.make_samples(items, n, args.samples, args.seed) for n in args.images}
    out = _output(args, "eval", Path(args.model).name, args.data, args.split)
    policy = _load_policy(args)

    rows, asked, predictions = [], [], []
    for n, few in samples.items():
        print(f"{len(few)} prompts with {n} image{'s' * (n > 1)} ...", file=sys.stderr)
        metrics, answers = evaluate(policy, few, args.batch_size)
        rows.append({f"{n} image{'s' * (n > 1)}": metrics})
        asked, predictions = asked + few, predictions + answers
    print(format_table(rows))
    write_predictions(predictions, out / "predictions.jsonl")
    draw_predictions(asked, predictions, out / "predictions.png")
    print(f"\nwrote {out / 'predictions.jsonl'} and {out / 'predictions.png'}")


def _task(args):
    """The question to rank by: the user's own or that of a data set."""
    if args.question:
        return data.Task("question", args.question, args.order, delta=1.0)  # delta matters to rewards alone
    if args.data in data.READERS and args.data_root is None:
        _, task = data.READERS[args.data]
        if "{" not in task.question + task.order:
            return task
        raise data.DataError(
            f"the question of --data {args.data} depends on the images in it: give --data-root too, or instead of both "
            "--question and --order"
        )
    tasks = {item.task for item in data.load_dataset(args.data, args.data_root, "train")}
    if len(tasks) > 1:
        raise data.DataError(
            f"--data {args.data} asks {len(tasks)} questions, such as {min(task.question for task in tasks)!r}: "
            "say which with --question and --order instead"
        )
    return tasks.pop()


def _rank(args):
    items, bad = load_images(find_images(args.rank), _task(args), args.skip_bad)
    out = _output(args, "rank", Path(args.model).name, Path(args.rank[0]).resolve().stem)
    if any(out.resolve() == Path(path).resolve() for path in args.rank):
        raise data.DataError(f"--out {out} is ranked itself: its sheet would be among the images the next time")
    policy = _load_policy(args)

    n, say = len(items), partial(print, file=sys.stderr)
    windows = sum(len(window_starts(n, args.window, r)) for r in range(args.rounds)) if n > 1 else 0
    say(f"{n} prompts with 1 image, {windows} with {min(args.window, n)} ...")
    ranking = rank_images(policy, items, args.window, args.rounds, args.batch_size)
    missing = ranking.values.count(None)
    if missing == n and ranking.invalid == windows:
        raise rarl.ModelError(
            f"none of the {n + windows} answers is valid, so there is no order: train this model first"
        )
    rows = ranking_rows(items, ranking)
    write_predictions(rows, out / "ranking.jsonl")
    draw_ranking(items, ranking, out / "ranking.png")
    print(json.dumps(rows) if args.json else format_ranking(rows))
    for problem in bad:
        say(f"left out: {problem}")
    if bad:
        say(f"left out {len(bad)} of {n + len(bad)} images")
    if missing:
        say(
            f"{missing} of {n} images have no value, as the answer was not valid: the windows place them, or the middle"
        )
    if ranking.invalid:
        say(f"{ranking.invalid} of {windows} windows were left out, as the answer was not valid")
    say(f"wrote {out / 'ranking.jsonl'} and {out / 'ranking.png'}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a file name may hold bytes that are no text
    main()
