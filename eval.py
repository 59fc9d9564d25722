"""How good is a policy? Metrics, the evaluation loop, a picture of the answers, and a thin command line.

    python eval.py --model runs/dots/stage2 --data dots --images 1 2 4 8
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --data coco --data-root /data/coco --split val

The command prints one row per number of images and writes `predictions.jsonl` (one prompt a line) and
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
"""

import argparse
import json
import math
import sys
from pathlib import Path

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


@torch.no_grad()
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
    # Prompts of like length share a batch: beside an 8-image prompt a 1-image one is mostly padding.
    queue = sorted(range(len(samples)), key=lambda i: len(samples[i].items))
    predictions = [None] * len(samples)
    for start in range(0, len(queue), batch_size):
        batch = queue[start : start + batch_size]
        prompts = data.make_prompts(policy, [samples[i] for i in batch])
        rollout = rarl.generate(policy, prompts, 1, max_new_tokens, temperature=0.0, generator=None)
        for i, text in zip(batch, rarl.decode(policy, rollout.ids, rollout.mask), strict=True):
            predictions[i] = _prediction(samples[i], text)
    return summarize(predictions), predictions


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

    def write(xy, text, room, colour, anchor="la"):
        # The built-in font knows little beyond ASCII, a policy may write anything.
        text = text.encode("ascii", "backslashreplace").decode()
        if draw.textlength(text[:1000], font) > room:
            text = text[:1000]
            while draw.textlength(text + " ...", font) > room:
                text = text[:-1]
            text += " ..."
        draw.text(xy, text, fill=colour, font=font, anchor=anchor)
        return xy[0] + draw.textlength(text, font)

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


# --- command line -------------------------------------------------------------------------------------------


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return number


def _device(text):
    name = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown name; a build of torch without CUDA
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}") from error


def _arguments(argv):
    parser = argparse.ArgumentParser(
        description="Evaluate a policy with several numbers of images: a table, the answers, a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a policy (Hugging Face layout), or an id on the hub")
    add("--data", required=True, help="name of the data set, such as dots, dials or coco")
    add("--data-root", help="folder of the data set; the built-in ones need none")
    add("--split", default="test", choices=("train", "val", "test"), help="part of the data set")
    add("--images", type=_positive, nargs="+", default=[1, 2, 4, 8], help="images per prompt, one row each")
    add("--samples", type=_positive, default=200, help="prompts for each number of images")
    add("--batch-size", type=_positive, default=16, help="prompts at a time, a matter of speed and memory")
    add("--seed", type=int, default=0, help="draws the samples; the same seed gives the same prompts")
    add("--out", type=Path, help="output folder; None: eval-MODEL-DATA-SPLIT beside the model, or in runs/")
    add("--device", type=_device, default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def main(argv=None):
    args = _arguments(argv)
    try:
        _run(args)
    except (data.DataError, rarl.ModelError, OSError) as error:  # the user's; a bug keeps its traceback
        raise SystemExit(f"eval.py: {error}") from None


def _run(args):
    model = Path(args.model)
    beside = model.parent if "runs" in model.parts else Path("runs")
    out = args.out or beside / f"eval-{model.name}-{args.data}-{args.split}"
    # A mistyped folder of two parts, runs/dosts, looks like a hub id: asking there takes long and misleads.
    if not model.exists() and ("runs" in model.parts or model.parent.is_dir()):
        raise rarl.ModelError(f"model folder {model} does not exist")

    # The data set first: a policy may take minutes to load, and only then is a mistyped name annoying.
    items = data.load_dataset(args.data, args.data_root, args.split)
    samples = {n: data.make_samples(items, n, args.samples, args.seed) for n in args.images}
    out.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    policy = rarl.load_policy(args.model, args.device, dtype)

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


if __name__ == "__main__":
    main()
