"""What `python data.py NAME [ROOT]` prints and draws: a look at a data set before one trains on it."""

import argparse
import math
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import DataError, Sample, format_value, make_pools, make_samples, question_text, reference_answer
from support.datasets import _openable, format_left_out, read_dataset
from support.images import identical_files
from support.readers import DATASETS


def format_histogram(labels: list[float], bins: int = 12, width: int = 50) -> str:
    """A line per bin of equal width (or per value, where there are few): its range, the number of labels, a bar."""
    values = sorted(set(labels))
    if len(values) <= 2 * bins:
        counts = Counter(labels)
        rows = [(f"{value:g}", counts[value]) for value in values]
    else:
        numbers, edges = np.histogram(labels, bins=bins)
        rows = [(f"{a:.4g} to {b:.4g}", n) for a, b, n in zip(edges, edges[1:], numbers, strict=False)]
    most, room = max(n for _, n in rows), max(len(text) for text, _ in rows)
    return "\n".join(f"  {text:>{room}} {n:7d} {'#' * math.ceil(width * n / most)}" for text, n in rows)


def draw_sheet(samples: list[Sample], path: Path) -> None:
    """A picture of samples (up to 4 images each): the images, the prompt's text, the reference answer."""
    side, gap, line, font = 190, 10, 20, ImageFont.load_default(size=14)
    canvas = Image.new("RGB", (4 * (side + gap) + 3 * gap, len(samples) * (side + 9 * line)), "white")
    pen, y = ImageDraw.Draw(canvas), gap
    for sample in samples:
        for i, item in enumerate(sample.items):
            x = 2 * gap + i * (side + gap)
            pen.text((x, y), f"Image {i + 1}:", fill="black", font=font)
            canvas.paste(ImageOps.contain(item.image(), (side, side)), (x, y + line))
        y += line + side + gap
        prompt = question_text(sample.task, len(sample.items))
        for text, colour in ((prompt, "black"), (reference_answer(sample), "green")):
            # The built-in font knows no more than Latin letters.
            for part in textwrap.wrap(text.encode("latin-1", "backslashreplace").decode("latin-1"), 116):
                pen.text((2 * gap, y), part, fill=colour, font=font)
                y += line
        y += 2 * gap
    canvas.crop((0, 0, canvas.width, y)).save(path)


def inspect(name: str, root: Path | None, out: Path, overrides: dict, seed: int = 0) -> None:
    """Print what a data set holds and what is wrong with it, and draw a sheet of its samples. Opens every image."""
    splits, left_out = read_dataset(name, root, overrides, skip_bad=True)
    splits, refused = _openable(splits)
    left_out += refused
    everything = [item for items in splits.values() for item in items]
    print(f"{name}{f' under {root}' if root else ''}: {len(everything)} labels")
    print("\nsplits      " + ", ".join(f"{split} {len(items)}" for split, items in splits.items()))
    print(f"left out    {format_left_out(left_out)}")
    twice = identical_files(splits)
    advice = ": take them out of train" if twice else ""
    print(f"duplicates  {len(twice)} files stand in more than one split{advice}")
    for group in twice[:5]:
        print("      " + " = ".join(f"{split} {path}" for split, path in group))
    if not everything:
        raise DataError(f"{name} under {root} holds no usable image")
    pools = make_pools(everything, 1)
    print(f"\ntasks       {len(pools)}")
    for task, items in sorted(pools.items(), key=lambda pool: -len(pool[1])):
        low, high = (format_value(f(i.label for i in items), task.decimals) for f in (min, max))
        print(f"  {len(items):7d} {task.name}, {low} to {high}, delta {task.delta:g}")
    print(f"\nlabels\n{format_histogram([item.label for item in everything])}")
    shown = splits["train"] or everything
    most = max(len(pool) for pool in make_pools(shown, 1).values())
    draw_sheet([s for n in (1, 2, 4) if n <= most for s in make_samples(shown, n, 2, seed)], out)
    print(f"\nwrote {out}, samples of the {'train split' if splits['train'] else 'data set'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Look at a data set: counts, labels, splits, what is wrong, and a sheet of samples as the policy "
        "sees them.", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("name", choices=DATASETS, help="which data set")
    add("root", nargs="?", type=Path, help="its folder; the drawn ones need none")
    add("--out", type=Path, default=Path("data_sheet.png"), help="picture of the samples")
    add("--question", help="asked about each image; {group}, {low}, {high} are filled in (None: the data set's own)")
    add("--order", help="how to say lowest first, such as 'from the youngest to the oldest'")
    add("--delta", type=float, help="tolerance of R_reg in units of the label")
    add("--decimals", type=int, help="of a value in the reference answer")
    add("--seed", type=int, default=0, help="draws the samples")
    args = parser.parse_args(argv)
    overrides = {field: getattr(args, field) for field in ("question", "order", "delta", "decimals")}
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names may be anything
    try:
        inspect(args.name, args.root, args.out, overrides, args.seed)
    except (DataError, OSError) as error:
        raise SystemExit(f"data.py: {error}") from None
