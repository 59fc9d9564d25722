"""How good is a policy, and what does it say of your own images? Metrics, the evaluation loop, and a thin command line.

    python eval.py --model runs/rarl/stage2 --data dots --images 1 2 4 8
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --data coco --data-root /data/coco --split val
    python eval.py --model runs/rarl/stage2 --rank a.jpg b.jpg c.jpg
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --rank holiday/ \
        --question "How many people are in the photo?" --order "from the fewest people to the most"

Without --rank the command prints one table for each number of images and writes `results.json`, `predictions.jsonl`
(one prompt a line) and `predictions.png` into --out. With --rank it orders images without labels (support/rank.py).
A policy that train.py saved is asked the question that it was trained on (support/datasets/saved_task.py). The paper
(arXiv 2601.20585) reports MAE and tau on UTKFace, accuracy and tau on COCO-REM, SRCC on AVA.

How to read a table:
1. Look at `valid` first. Every column but `valid`, `n` and `R_reg` is of the valid answers alone, so a policy that answers only what it finds easy looks good in them. Compare policies only where `valid` is about the same.
2. `tau` is Kendall's tau of the listed order within one prompt, averaged over prompts. `tau_values` is the tau of the
   order that the values imply; equal values share a place. Both rest on `n (tau)` prompts: those with a valid answer
   and with two different labels. Lists and values are written apart, so a policy may sort well and count badly.
3. MAE, accuracy, SRCC and PLCC pool all (value, label) pairs of all prompts, as if each image had been asked
   alone. They never look at the listed order.
4. The last rows are policies that look at no image: the best constant by R_reg and by MAE (the median), both found on
   the labels of the training split, task by task (behind the colon stands the constant); and the images listed in the
   order of the prompt.
5. Decoding is greedy and the samples are fixed by the seed, so a run can be repeated.
6. `+-95%` is half the 95 % interval of the number on its left, over other prompts, not over other training runs. `-` is
   undefined, or rests on too few answers. results.json has more metrics (`summarize`).
"""

from support.run.quiet_end import abandon_broken_stdout  # first: Ctrl-C during the slow imports below is one line

# isort: split
import argparse
import errno
import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import data
import rarl
import reward
from support import rank
from support.datasets import saved_task
from support.datasets.image_files import refuse_unreadable
from support.datasets.splits import say
from support.learner.policies import load_any
from support.run.atomic_files import write_text
from support.run.checkpoints import check_policy
from support.run.eval_settings import output_folder, parse_arguments
from support.show.results import beside, blind_rows, finite, mean, remarks, results_table, write_predictions
from support.show.sheets import draw_predictions

# --- metrics: plain functions of two equally long lists of numbers, M = number of (value, label) pairs ------

Numbers = Sequence[float] | np.ndarray
Samples = Sequence[data.Sample]


def _pair(values: Numbers, labels: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 arrays (M,). A mismatch raises: broadcasting would turn it into a wrong number."""
    values, labels = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if values.shape != labels.shape or values.ndim != 1:
        raise ValueError(f"expected two equally long lists, got shapes {values.shape} and {labels.shape}")
    return values, labels


def _mean(numbers: np.ndarray) -> float:
    return float(np.mean(numbers)) if len(numbers) else math.nan  # numpy would warn first


def mae(values: Numbers, labels: Numbers) -> float:
    """Mean absolute error, mean |value - label|, in the labels' unit. [0, inf); nan without pairs."""
    values, labels = _pair(values, labels)
    with np.errstate(over="ignore"):  # a policy may write 1e308; an infinite error is then the honest answer
        return _mean(np.abs(values - labels))


def accuracy(values: Numbers, labels: Numbers, decimals: int | Sequence[int] = 0) -> float:
    """Share of values that equal their label when both are rounded to `decimals` (a number or one per pair),
    halves to even. For counts (decimals 0) this is the paper's accuracy. [0, 1]; nan without pairs."""
    values, labels = _pair(values, labels)
    scale = 10.0 ** np.asarray(decimals)
    with np.errstate(over="ignore"):
        equal = np.rint(values * scale) == np.rint(labels * scale)
    return _mean(equal)


def plcc(values: Numbers, labels: Numbers) -> float:
    """Pearson's linear correlation. [-1, 1]; nan with fewer than two pairs or if either side is constant."""
    x, y = _pair(values, labels)
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    # The correlation has no scale, so each side is brought to at most 1: squares of 1e200 would overflow.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))


def srcc(values: Numbers, labels: Numbers) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties sharing their average rank. [-1, 1]; nan with
    fewer than two pairs or where either side is constant."""
    values, labels = _pair(values, labels)
    return plcc(rank.ranks(values), rank.ranks(labels))


def tau_b(values: Numbers, labels: Numbers) -> float:
    """Kendall's tau-b: (concordant - discordant) / sqrt(pairs untied in values * pairs untied in labels).
    [-1, 1]; nan with fewer than two pairs or where either side is constant. O(M^2) time, O(M) memory."""
    agreement, untied_values, untied_labels = _agreement(values, labels)
    # Each pair was met twice in all three sums, which cancels. One root of the product: exactly 1 for equal orders.
    scale = math.sqrt(untied_values * untied_labels)
    return float(np.clip(agreement / scale, -1, 1)) if scale else math.nan


def tau_of_values(values: Numbers, labels: Numbers) -> float:
    """Kendall's tau of the order that the values of one prompt imply: (concordant - discordant) / comparable, over the
    pairs whose labels differ. Equal values share a place: their pair counts 0. [-1, 1]; nan if no two labels differ."""
    agreement, _, untied_labels = _agreement(values, labels)
    return float(agreement / untied_labels) if untied_labels else math.nan


def contradicts(order: Sequence[int], values: Numbers) -> bool:
    """Whether a list is not in the order of its own values. order: image ids as listed; values: of image 1..n."""
    listed = [values[image_id - 1] for image_id in order]
    return any(first > second for first, second in pairwise(listed))


def _agreement(values: Numbers, labels: Numbers) -> tuple[float, float, float]:
    """Over all ordered pairs of images: (concordant - discordant, pairs untied in values, pairs untied in labels)."""
    values, labels = _pair(values, labels)
    values, labels = rank.ranks(values), rank.ranks(labels)  # order is all that counts; ranks cannot overflow
    agreement = untied_values = untied_labels = 0.0
    rows = 1 + 2**20 // max(1, len(values))  # of the M x M table at a time: some 8 MB each, whatever M is
    for i in range(0, len(values), rows):
        sign_values = np.sign(values[i : i + rows, None] - values)  # (rows, M)
        sign_labels = np.sign(labels[i : i + rows, None] - labels)  # (rows, M)
        agreement += np.sum(sign_values * sign_labels)
        untied_values += np.sum(np.abs(sign_values))
        untied_labels += np.sum(np.abs(sign_labels))
    return agreement, untied_values, untied_labels


def summarize(predictions: Sequence[dict]) -> dict[str, float]:
    """All metrics of a list of predictions (see `evaluate`) in one flat dict. How to read it: see the top.

    n           prompts
    valid       share of prompts with a parseable answer
    strict      share of prompts whose answer is nothing but the list (R_format = 1)
    regression  mean R_reg over all prompts; an invalid answer earns 0
    tau         mean over valid prompts of Kendall's tau of the listed order; prompts without two different
                labels have none and are left out, so it is nan at one image
    tau_values  the same of the order that the values imply
    tau_n       prompts that these two rest on
    contradict  share of valid answers whose list and values contradict each other: a lower value stands behind a higher one
    mae, accuracy, srcc, plcc, tau_b   over all (value, label) pairs of valid answers

    Undefined metrics are nan. The labels should share a unit: a mean of years and counts says nothing.
    """
    valid = [p for p in predictions if p["order"] is not None]
    values = [value for p in valid for value in p["values"]]
    labels = [label for p in valid for label in p["labels"]]
    decimals = [p["decimals"] for p in valid for _ in p["labels"]]
    return {
        "n": len(predictions),
        "valid": mean([p["order"] is not None for p in predictions]),
        "strict": mean([p["strict"] for p in predictions]),
        "regression": mean([p["regression"] for p in predictions]),
        "mae": mae(values, labels),
        "accuracy": accuracy(values, labels, decimals),
        "srcc": srcc(values, labels),
        "plcc": plcc(values, labels),
        "tau": mean([p["tau"] for p in valid]),
        "tau_values": mean([p["tau_values"] for p in valid]),
        "tau_n": sum(p["tau"] is not None for p in valid),
        "contradict": mean([float(contradicts(p["order"], p["values"])) for p in valid if len(p["order"]) > 1]),
        "tau_b": tau_b(values, labels),
    }


# --- the loop -----------------------------------------------------------------------------------------------


def evaluate(
    policy: rarl.Policy,
    samples: Samples,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: str | None = None,
) -> tuple[dict[str, float], list[dict]]:
    """Greedy answers to all samples -> (metrics, predictions), the predictions in the order of the samples.

    max_new_tokens: None allows the longest reference answer among the samples and some slack
    (`data.max_answer_tokens`); a longer answer is cut, which makes it invalid.
    progress: a name for the progress bar; None shows none.

    A prediction is a dict that JSON can hold:
      items       names of the images, image 1 first
      task        name of the task, and `decimals`, those it is rounded to for accuracy
      labels      of image 1..n
      text        the answer as written
      order       image ids as listed, lowest first; None if the answer is not valid
      values      of image 1..n (not as listed); None if the answer is not valid
      strict      the text is nothing but the answer
      regression  R_reg; 0 if the answer is not valid
      tau         of the listed order, and `tau_values` of the values'; None if not valid, or if no two labels differ

    On several processes give each a part of the samples and `summarize` the gathered predictions: a mean of
    metrics is not the metric of the whole.
    """
    if max_new_tokens is None and samples:
        max_new_tokens = data.max_answer_tokens(policy, list(samples))  # of all: no answer depends on its batch
    predictions = ask(policy, samples, batch_size, max_new_tokens or 0, progress)
    return summarize(predictions), predictions


def ask(
    policy: rarl.Policy, samples: Samples, batch_size: int, max_new_tokens: int, progress: str | None = None
) -> list[dict]:
    """Greedy answers to all samples, as predictions (see `evaluate`) in the order of the samples."""
    texts = answer_greedily(policy, samples, batch_size, max_new_tokens, progress)
    return [judge(sample, text) for sample, text in zip(samples, texts, strict=True)]


@torch.no_grad()
def answer_greedily(
    policy: rarl.Policy, samples: Samples, batch_size: int, max_new_tokens: int, progress: str | None = None
) -> list[str]:
    """Greedy answers to all samples, as text, in the order of the samples. They need no labels."""
    # Prompts of like length share a batch: beside an 8-image prompt a 1-image one is mostly padding.
    queue = sorted(range(len(samples)), key=lambda i: len(samples[i].items))
    texts = [""] * len(samples)
    with tqdm(total=len(samples), desc=progress, unit="prompt", disable=progress is None) as bar:
        for start in range(0, len(queue), batch_size):
            batch = queue[start : start + batch_size]
            prompts = data.make_prompts(policy, [samples[i] for i in batch])
            rollout = rarl.generate(policy, prompts, 1, max_new_tokens, temperature=0.0, generator=None)
            for i, text in zip(batch, rarl.decode(policy, rollout.ids, rollout.mask), strict=True):
                texts[i] = text
            bar.update(len(batch))
    return texts


def judge(sample: data.Sample, text: str) -> dict:
    """One answer as a prediction (see `evaluate`). The text is parsed here, once."""
    known = lambda tau: None if math.isnan(tau) else tau
    score = reward.compute_reward(text, sample.labels, sample.task.delta)
    prediction: dict = {
        "items": [item.name for item in sample.items],
        "task": sample.task.name,
        "decimals": sample.task.decimals,
        "labels": [float(label) for label in sample.labels],
        "text": text,
        "order": None,
        "values": None,
        "strict": score.format == 1,
        "regression": score.regression,
        "tau": None,
        "tau_values": None,
    }
    if score.answer is not None:
        prediction["order"] = [image_id for image_id, _ in score.answer]
        prediction["values"] = [float(value) for _, value in sorted(score.answer)]
        prediction["tau"] = known(reward.kendall_tau(prediction["order"], sample.labels))
        prediction["tau_values"] = known(tau_of_values(prediction["values"], sample.labels))
    return prediction


def grade(samples: Samples, texts: Sequence[str]) -> dict[str, float]:
    """Metrics of answers that are known: those of a policy that looks at no image, say."""
    return summarize([judge(sample, text) for sample, text in zip(samples, texts, strict=True)])


# --- command line -------------------------------------------------------------------------------------------


FULL = ": the disk is full, free some space or give another --out"


def main(argv: Sequence[str] | None = None) -> None:
    transformers.utils.logging.disable_progress_bar()  # of loading weights
    args = parse_arguments(argv)
    try:
        rarl.check_path(args.model)  # before the data is read and the output folder made
        check_policy(args.model)
        rank.rank_command(args, load_policy, answer_greedily) if args.rank else _evaluate(args)
        sys.stdout.flush()  # a closed pipe or a full disk shows here, not when the interpreter ends
    except (data.DataError, rarl.ModelError, OSError) as error:  # the user's; a bug keeps its traceback
        abandon_broken_stdout()
        raise SystemExit(f"eval.py: {error}{FULL if getattr(error, 'errno', 0) == errno.ENOSPC else ''}") from None


def load_policy(args: argparse.Namespace, max_pixels: int | None) -> rarl.Policy:
    say(f"loading {args.model} ...")
    policy = load_any(args.model, args.device, torch.bfloat16 if args.device.type == "cuda" else torch.float32)
    if max_pixels:  # areas, in spite of the names
        policy.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": max_pixels}
    return policy


def _evaluate(args: argparse.Namespace) -> None:
    # The data set first: a policy may take minutes to load, and only then is a mistyped name annoying.
    saved = saved_task.load_task(args.model)
    say(f"reading {args.data} ...")
    items, train_items = saved_task.load_to_evaluate(
        saved, args.data, args.data_root, args.split, args.given, args.skip_bad
    )
    samples = {n: data.make_samples(items, n, args.samples, args.seed) for n in sorted(set(args.images))}
    refuse_unreadable([item for few in samples.values() for sample in few for item in sample.items])
    out = output_folder(args, "eval", Path(args.model).name, args.data, args.split)
    say(saved_task.describe([item.task for item in items], saved, args.data))
    policy = load_policy(args, args.max_pixels or (saved.max_pixels if saved else None))

    rows, predictions = {}, []
    for n, few in samples.items():
        metrics, answers = evaluate(policy, few, args.batch_size, progress=f"{n} image{'s' * (n > 1)}")
        rows[n] = metrics | beside(answers)
        predictions += answers
    results = {Path(args.model).name: rows} | blind_rows(samples, train_items, grade)
    print(results_table(results))
    for remark in remarks(predictions):
        print(f"note: {remark}")
    write_text(out / "results.json", json.dumps(finite(results), indent=2) + "\n")
    write_predictions(predictions, out / "predictions.jsonl")
    draw_predictions([sample for few in samples.values() for sample in few], predictions, out / "predictions.png")
    print(f"\nwrote results.json, predictions.jsonl and predictions.png to {out}")


if __name__ == "__main__":
    main()
