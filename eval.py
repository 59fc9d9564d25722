"""How good is a policy, and what does it say of your own images? Metrics, the evaluation loop, the ranking of a folder,
pictures of both, and a thin command line.

    python eval.py --model runs/dots/stage2 --data dots --images 1 2 4 8
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --data coco --data-root /data/coco --split val
    python eval.py --model runs/dots/stage2 --data dots --rank a.jpg b.jpg c.jpg
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --rank holiday/ \
        --question "How many people are in the photo?" --order "from the fewest people to the most"

Without --rank the command prints one row per number of images and writes `predictions.jsonl` (one prompt a line) and
`predictions.png` into --out. The paper (arXiv 2601.20585) reports MAE and tau on UTKFace, accuracy and tau
on COCO-REM, SRCC on AVA.

How to read a row:
1. `valid` first. Every metric but `valid` and `strict` is over the valid answers alone: a policy that answers
   only what it finds easy looks good in them. Compare policies only where their `valid` is about the same.
2. `tau` is the paper's: Kendall's tau of the listed order within one prompt, averaged over prompts. It never
   looks at the values. The form of the paper's average is not public; the mean over prompts is our choice.
3. mae, srcc, plcc, tau_b and accuracy pool all (value, label) pairs of all prompts, as if each image had been
   asked alone. They never look at the listed order, so tau and tau_b can disagree: a policy may sort well and
   count badly, or the other way round.
4. Decoding is greedy and the samples are fixed by the seed, so a run can be repeated.

With --rank it orders images without labels, a handful or hundreds, prints rank, value and file, and writes
`ranking.jsonl` and the sheet `ranking.png`. A prompt holds only a few images, so one ranking is merged from many answers:
1. Every image is asked alone. These answers give the values, and the values the first order.
2. A window of --window images slides over that order by half its length, and each window is one prompt: its answer lists
   the images in order. Neighbours meet this way, and these are the pairs that the values cannot tell apart. Within
   the prompt the images are shuffled: a policy that favours the first image then favours none in particular.
3. A listed order is a set of votes, "i before j". A Bradley-Terry model weighs all votes so far against the order by
   values and gives the next order (`merge_rankings`), over which the next of --rounds rounds slides, its windows shifted.
4. An image without a valid value starts in the middle and is placed by its votes. An invalid window has no votes.
Each round shows every image about twice: with r rounds the policy reads 1 + 2r times as many images as there are.
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


def write_predictions(predictions, path):
    """One JSON object a line. A number that is not finite becomes null: `NaN` is not JSON."""

    def finite(x):
        if isinstance(x, list):
            return [finite(y) for y in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    lines = [json.dumps({k: finite(v) for k, v in p.items()}, allow_nan=False) for p in predictions]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


# --- ranking: many answers about a few images each, merged into one order ------------------------------------


class Ranking(NamedTuple):
    """order: indices of the items, lowest first. values: of item 0, 1, ... (not sorted), None where the one-image answer
    was not valid. windows: many-image prompts asked; invalid: those of them whose answer was not valid."""

    order: list[int]
    values: list[float | None]
    windows: int
    invalid: int


def rank_images(policy, items, window=4, rounds=2, batch_size=16):
    """Items of one task, labels not needed, -> Ranking. How: see the top.

    window   images in a prompt, >= 2; fewer items than that make one window
    rounds   0 ranks by the values alone
    """
    # Nobody knows the answers, so room is left for five digits and the task's decimals.
    longest = [replace(item, label=99999.0) for item in items[:window]]

    def listed_orders(groups):
        """Greedy answers about groups of item indices -> what each lists, [(index, value), ...] or None."""
        tokens = data.answer_budget(policy, [data.Sample(tuple(longest[: len(groups[0])]))])
        samples = [data.Sample(tuple(items[i] for i in group)) for group in groups]
        for group, answer in zip(groups, ask(policy, samples, batch_size, tokens), strict=True):
            yield answer["order"] and [(group[i - 1], answer["values"][i - 1]) for i in answer["order"]]

    values = [answer and answer[0][1] for answer in listed_orders([[i] for i in range(len(items))])]
    votes, windows, order = [], 0, merge_rankings(values, [])
    for r in range(rounds if len(items) > 1 else 0):
        groups = []
        for start in window_starts(len(items), window, r):
            groups.append(order[start : start + window])
            random.Random(f"window {r} {start}").shuffle(groups[-1])
        answers = list(listed_orders(groups))
        windows += len(answers)
        votes += [[i for i, _ in answer] for answer in answers if answer]
        order = merge_rankings(values, votes)
    return Ranking(order, values, windows, windows - len(votes))


def window_starts(n, window, r):
    """Where the windows of round r = 0, 1, ... start in an order of n images. Neighbours share half their length; in odd
    rounds they are shifted by a quarter, so that other images stand at their ends.

    >>> window_starts(10, 4, 0), window_starts(10, 4, 1)
    ([0, 2, 4, 6], [0, 1, 3, 5, 6])
    """
    step, last = (window + 1) // 2, max(0, n - window)  # the last window is whole: it starts earlier instead
    return sorted({min(max(0, start), last) for start in range(-(r % 2) * (step // 2), n, step)})


def merge_rankings(values, listed_orders):
    """One order of all images (indices, lowest first) from their values and from listed orders of a few of them.

    values          a finite number or None for each of n images
    listed_orders   lists of different indices, lowest first; no image or pair has to occur in any

    Bradley-Terry with a prior: image i has a strength s_i, a listed order puts i before j with probability
    sigmoid(s_j - s_i), and s_i is normal around its place in the order by values (variance 1, equal values share a place,
    places PLACE apart). The order is that of the most likely strengths. They are unique: the prior makes the
    problem strictly convex even where all votes agree or no vote is given. So a single vote turns neighbours round but
    not images far apart, and votes carry over pairs that never met. Ties go by value, then by index.
    O(n^2) memory, O(n^3) time: seconds for a thousand images.

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


# Found by simulation (30 to 400 images, windows of 4, answers half to twice as noisy as the values): the merged order was
# better than the one by values wherever many-image answers were the more precise, and no worse where they were half
# as precise. Flat: half or twice these numbers change tau by about 0.01.
PLACE = 0.5  # in units of strength: one vote between neighbours, sigmoid(0.5) = 62 %, outweighs their values
SPREAD = 20.0  # at most, from lowest to highest: else hundreds of images could never move far
NO_VALUE = 0.01  # precision in the place of 1: almost free, and held in the middle where there are no votes either


def _strengths(wins, prior, precision):
    """argmin_s  sum_ij wins_ij log(1 + exp(s_i - s_j)) + sum_i precision_i (s_i - prior_i)^2 / 2  by Newton's method."""

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


IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_images(paths):
    """Files and folders -> image files, in the order given, a folder's by name. A folder gives its files that end in one of
    IMAGE_SUFFIXES, without hidden ones and subfolders. Raises DataError for what is missing, empty or given twice."""
    files = []
    for text in paths:
        path = Path(text)
        if not str(text) or not path.exists():
            raise data.DataError(f"--rank: there is no file or folder {str(text)!r}")
        if path.is_dir():
            inside = [f for f in sorted(path.iterdir()) if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]
            inside = [f for f in inside if not f.name.startswith(".")]
            if not inside:
                endings = " ".join(IMAGE_SUFFIXES)
                raise data.DataError(f"folder {path} has no images ({endings}); subfolders are not searched")
        files += inside if path.is_dir() else [path]
    seen = {}
    for file in files:
        other = seen.setdefault(file.resolve(), file)
        if other is not file:
            raise data.DataError(f"{file} is given twice" + (f", as {other} too" if other != file else ""))
    return files


def load_images(files, task, skip_bad=False):
    """Image files -> (items without labels, [what is wrong with a file, ...]). Every image is read once before a model is
    loaded for it; one that cannot be used raises DataError, or is left out where skip_bad."""
    items, bad = [], []
    for file in files:
        try:
            image = data.open_image(file)
        except data.DataError as error:
            bad.append(str(error))
            continue
        try:
            data.smart_size(image.height, image.width, 28, 28 * 28, 2**40)  # refuses what is far too long
        except data.DataError as error:
            bad.append(f"image file {file}: {error}")
            continue
        items.append(data.Item(str(file), math.nan, task, partial(data.open_image, file)))
    if bad and not (skip_bad and items):
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        advice = "" if skip_bad else "; --skip-bad leaves bad images out"
        raise data.DataError("; ".join(bad[:5]) + more + advice)
    return items, bad


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
    # The built-in font knows little beyond ASCII, a policy may write anything.
    text = text.encode("ascii", "backslashreplace").decode()
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
    """A sheet (PNG or whatever the path's ending says) of all images in ranked order, lowest first, line by line. Below each
    its rank, its value ("-": no valid answer) and its file. The more images, the smaller they are."""
    n = len(items)
    thumb, size = next((t, s) for most, t, s in ((32, 168, 15), (120, 120, 13), (math.inf, 84, 11)) if n <= most)
    gap, line_height = thumb // 8, thumb + 2 * size + thumb // 5
    columns = min(n, max(1312 // (thumb + gap), math.ceil(math.sqrt(1.3 * n))))  # never much taller than wide
    width, top = max(2 * MARGIN + columns * (thumb + gap) - gap, 760), 96
    canvas = Image.new("RGB", (width, top + -(-n // columns) * line_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    task, font = items[0].task, ImageFont.load_default(size=size)
    _write(draw, ImageFont.load_default(size=22), (MARGIN, 20), task.question, width - 2 * MARGIN, INK)
    about = f"{n} image{'s' * (n > 1)} {task.order}, line by line.  Below each: rank, value, file."
    _write(draw, ImageFont.load_default(size=14), (MARGIN, 54), about, width - 2 * MARGIN, FAINT)
    draw.line((MARGIN, top - 14, width - MARGIN, top - 14), fill="#d0d7de")
    for place, i in enumerate(ranking.order):
        x, y = MARGIN + place % columns * (thumb + gap), top + place // columns * line_height
        thumbnail = ImageOps.contain(items[i].image(), (thumb, thumb))
        canvas.paste(thumbnail, (x + (thumb - thumbnail.width) // 2, y + (thumb - thumbnail.height) // 2))
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


def _arguments(argv):
    parser = argparse.ArgumentParser(
        description="Evaluate a policy with several numbers of images (a table, the answers, a picture), or rank images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a policy (Hugging Face layout), or an id on the hub")
    add("--data", help="name of the data set, such as dots, dials or coco; with --rank: whose question is asked")
    add("--batch-size", type=_at_least(1), default=16, help="prompts at a time, a matter of speed and memory")
    add(
        "--out",
        type=Path,
        help="output folder; None: eval-MODEL-DATA-SPLIT or rank-MODEL-NAME beside the model or in runs/",
    )
    add("--device", type=_device, default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--rank", nargs="+", metavar="PATH", help="images, or folders of images, to put in order")

    # Settings of one of the two alone are refused with the other. Absent: not given, the default is filled in below.
    def add_group(title, *settings):
        group, defaults = parser.add_argument_group(title), {}
        for name, default, text, options in settings:
            default_text = " ".join(map(str, default)) if isinstance(default, list) else default
            text += f" (default: {default_text})" if default_text not in (None, False) else ""
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **options)
            defaults[name.replace("-", "_")] = default
        return defaults

    evaluation = add_group(
        "evaluation, without --rank",
        ("data-root", None, "folder of the data set; the built-in ones need none", {}),
        ("split", "test", "part of the data set", dict(choices=("train", "val", "test"))),
        ("images", [1, 2, 4, 8], "images per prompt, one row each", dict(type=_at_least(1), nargs="+")),
        ("samples", 200, "prompts for each number of images", dict(type=_at_least(1))),
        ("seed", 0, "draws the samples; the same seed gives the same prompts", dict(type=int)),
    )
    ranking = add_group(
        "ranking, with --rank",
        ("question", None, 'what to ask, instead of --data: "How old is the person in the photo?"', {}),
        ("order", None, 'lowest first, in words, with --question: "from the youngest to the oldest"', {}),
        ("window", 4, "images in a prompt", dict(type=_at_least(2))),
        ("rounds", 2, "times that windows slide over the order; 0: by the values alone", dict(type=_at_least(0))),
        ("skip-bad", False, "leave unreadable images out, and count them", dict(action="store_true")),
        ("json", False, "print a JSON list of {rank, file, value} and nothing else", dict(action="store_true")),
    )
    args = parser.parse_args(argv)
    own, others = (ranking, evaluation) if args.rank else (evaluation, ranking)
    for name in vars(args):
        if name in others:
            parser.error(f"--{name.replace('_', '-')} goes {'without' if args.rank else 'with'} --rank")
    args = argparse.Namespace(**own | vars(args))
    if not args.rank and not args.data:
        parser.error("--data is required, or --rank")
    if args.rank and bool(args.data) == bool(args.question) or args.rank and bool(args.question) != bool(args.order):
        parser.error("--rank needs either --data or both --question and --order")
    return args


def main(argv=None):
    args = _arguments(argv)
    try:
        _check_model(args.model)
        _rank(args) if args.rank else _evaluate(args)
    except (data.DataError, rarl.ModelError, OSError) as error:  # the user's; a bug keeps its traceback
        raise SystemExit(f"eval.py: {error}") from None


def _check_model(model):
    # A mistyped folder of two parts, runs/dosts, looks like a hub id: asking there takes long and misleads.
    path = Path(model)
    if not path.exists() and ("runs" in path.parts or path.parent.is_dir()):
        raise rarl.ModelError(f"model folder {path} does not exist")


def _output(args, name):
    """The output folder, made if need be."""
    model = Path(args.model)
    beside = model.parent if "runs" in model.parts else Path("runs")
    out = args.out or beside / name.format(model=model.resolve().name)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _load_policy(args):
    return rarl.load_policy(args.model, args.device, torch.bfloat16 if args.device.type == "cuda" else torch.float32)


def _evaluate(args):
    # The data set first: a policy may take minutes to load, and only then is a mistyped name annoying.
    items = data.load_dataset(args.data, args.data_root, args.split)
    samples = {n: data.make_samples(items, n, args.samples, args.seed) for n in args.images}
    out = _output(args, f"eval-{{model}}-{args.data}-{args.split}")
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


# Data sets whose images are all asked the same question. (Counting has one question per category.)
RANK_TASKS = {"dots": "DOTS", "dials": "DIALS", "utkface": "AGE", "ava": "AESTHETICS"}


def _rank(args):
    task = getattr(data, RANK_TASKS.get(args.data, ""), None)
    if args.question:
        task = data.Task("question", args.question, args.order, delta=1.0)  # delta matters to rewards alone
    elif task is None:
        raise data.DataError(f"--rank knows no question of --data {args.data}: give --question and --order instead")
    items, bad = load_images(find_images(args.rank), task, args.skip_bad)
    first = Path(args.rank[0]).resolve()
    out = _output(args, f"rank-{{model}}-{first.stem}".replace(".", "-"))
    if any(out.resolve() == Path(path).resolve() for path in args.rank):
        raise data.DataError(f"--out {out} is a folder to rank: its sheet would be ranked the next time")
    policy = _load_policy(args)

    n, say = len(items), partial(print, file=sys.stderr)
    prompts = sum(len(window_starts(n, args.window, r)) for r in range(args.rounds if n > 1 else 0))
    say(f"{n} prompts with 1 image, then {prompts} with {min(args.window, n)} ..." if prompts else f"{n} prompts ...")
    ranking = rank_images(policy, items, args.window, args.rounds, args.batch_size)
    missing = ranking.values.count(None)
    if missing == n and ranking.invalid == ranking.windows:
        raise rarl.ModelError(
            f"none of the {n + ranking.windows} answers was valid, so there is no order: train the model"
        )
    rows = ranking_rows(items, ranking)
    write_predictions(rows, out / "ranking.jsonl")
    draw_ranking(items, ranking, out / "ranking.png")
    if args.json:
        print(json.dumps(rows))
    else:
        text = format_ranking(rows)
        print(text.encode("utf-8", "backslashreplace").decode())  # a file name may hold bytes that are not UTF-8
    for problem in bad:
        say(f"left out: {problem}")
    if bad:
        say(f"left out {len(bad)} of {n + len(bad)} images")
    if missing:
        say(f"{missing} of {n} images have no valid value: they stand where the windows put them")
    if ranking.invalid:
        say(f"{ranking.invalid} of {ranking.windows} windows have no valid answer: they do not count")
    say(f"wrote {out / 'ranking.jsonl'} and {out / 'ranking.png'}")


if __name__ == "__main__":
    main()
