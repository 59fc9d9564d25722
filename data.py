"""Data for RARL (arXiv 2601.20585): labelled images in, prompts for a Qwen2.5-VL policy out.

What is here, in the order in which a training step uses it:

    Item      one image with one number (an age, a count, a score) and the Task that asks for it
    Sample    n items of one task, shown in one prompt as image 1..n
    Sampler   which samples make up step s: a pure function of (seed, s), so its whole state is the step's number
    Prompt    what the policy reads: token ids, image patches and the grid of each image

and the data sets: `dots` and `dials` (drawn from a seed, nothing to download), those of the paper, `utkface` (age),
`coco` (counts; COCO-ReM too) and `ava` (aesthetics), and your own images as `csv`, `jsonl` or `folder`.

    python data.py utkface ROOT       # look before you train: counts, labels, splits, what is wrong, a sheet of samples

Choices of ours, as the summaries of the paper do not state them: the wording of the prompts, the tolerances delta, and the splits of data
sets that bring none. All are settings: of a Task, or list files beside the images (see `choose_split`).

Shapes: P prompt tokens, n images, S patches of all images of a prompt (4 patches of 14 x 14 pixels make one token).
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file or the setting and what to do."""


# --------------------------------------------------------------------------------------------------------------------
# Tasks, items, samples


@dataclass(frozen=True)
class Task:
    """What is asked about an image.

    name      short and unique; items of different tasks never share a prompt
    question  asked once per prompt, whatever the number of images
    order     how to say "lowest value first" for this value, e.g. "from the youngest to the oldest"
    delta     tolerance of R_reg in units of the label: an error of delta or more earns nothing (our choice)
    decimals  of a value in the reference answer
    """

    name: str
    question: str
    order: str
    delta: float
    decimals: int = 0


@dataclass(frozen=True)
class Item:
    """One labelled image. `name` is unique in its data set; `image()` opens (or draws) it as RGB; `path` is its file."""

    name: str
    label: float
    task: Task
    image: Callable[[], Image.Image]
    path: Path | None = None


@dataclass(frozen=True)
class Sample:
    """n items of one task, shown to the policy as image 1..n."""

    items: tuple[Item, ...]

    @property
    def task(self) -> Task:
        return self.items[0].task

    @property
    def labels(self) -> list[float]:
        return [item.label for item in self.items]


def format_value(value: float, decimals: int) -> str:
    """A label as the policy should write it: a JSON number with the task's decimals ('17', '5.40')."""
    return f"{value:.{decimals}f}"


def format_answer(entries: Iterable[tuple[int, str]]) -> str:
    """(image id, value as text) in ranked order -> the answer as the policy should write it: one JSON list."""
    return "[" + ", ".join(f'{{"image_id": {image}, "value": {value}}}' for image, value in entries) + "]"


def reference_answer(sample: Sample) -> str:
    """The ground truth in the policy's own format: one JSON list in ranked order, lowest first; ties by image id.

    It earns full marks by construction, serves RMO as the good answer, and is what the preflight checks.
    """
    entries = sorted((item.label, i) for i, item in enumerate(sample.items, start=1))
    return format_answer((i, format_value(label, sample.task.decimals)) for label, i in entries)


# --------------------------------------------------------------------------------------------------------------------
# Samples


def most_apart(labels: Iterable[float], gap: float) -> int:
    """How many of the labels can be chosen so that any two differ by `gap` > 0: the lowest, then always the next."""
    count, last = 0, -math.inf
    for label in sorted(labels):
        if label - last >= gap:
            count, last = count + 1, label
    return count


def draw_sample(pools: dict[Task, list[Item]], num_images: int, rng: random.Random, min_gap: float = 0.0) -> Sample:
    """n items of one task, whose labels differ by at least `min_gap` where the task has such, else just differ.

    Two equal labels make no comparable pair, so they would teach nothing about order. Where the labels do not suffice,
    as many as possible are far enough apart, then different, and only then equal. A task is drawn in proportion to
    its items, among those that have n at all.
    """
    tasks = [task for task, items in pools.items() if len(items) >= num_images]
    task = rng.choices(tasks, weights=[len(pools[task]) for task in tasks])[0]
    items = pools[task]
    chosen: dict[str, Item] = {}
    gap = min_gap * (1 - 1e-9)  # 0.3 - 0.2 is a little less than 0.1

    def free(label: float, *more: float) -> bool:
        return all(abs(label - other) >= gap for other in (*(i.label for i in chosen.values()), *more))

    if gap > 0:
        candidates = rng.sample(items, min(len(items), 32 * num_images))
        labels = {item.label for item in candidates}
        possible = min(num_images, most_apart(labels, gap))
        for item in candidates:
            if len(chosen) == possible:
                break
            # 5 of 1..9 at a gap of 2 is possible, but not with a 2: look before taking what blocks the rest.
            if free(item.label):
                rest = most_apart((label for label in labels if free(label, item.label)), gap)
                if len(chosen) + 1 + rest >= possible:
                    chosen[item.name] = item
    seen = {item.label for item in chosen.values()}
    for different in (True, False):  # second pass: the labels ran out, so take any other item
        for item in rng.sample(items, min(len(items), 32 * num_images)):
            if len(chosen) == num_images:
                break
            if item.name not in chosen and not (different and item.label in seen):
                chosen[item.name] = item
                seen.add(item.label)
    picked = list(chosen.values())
    rng.shuffle(picked)  # else duplicates, taken last, would always stand last in the prompt
    return Sample(tuple(picked))


def make_pools(items: list[Item], num_images: int, what: str = "--images") -> dict[Task, list[Item]]:
    """Items by task. Raises DataError when no task has `num_images` of them (`what` names the setting to change)."""
    pools: dict[Task, list[Item]] = defaultdict(list)
    for item in items:
        pools[item.task].append(item)
    most = max((len(pool) for pool in pools.values()), default=0)
    if most < num_images:
        raise DataError(
            f"a prompt with {num_images} images needs {num_images} images of one task, but no task of this split has "
            f"more than {most}: lower {what} or add data"
        )
    return dict(pools)


def make_samples(items: list[Item], num_images: int, count: int, seed: int = 0, min_gap: float = 0.0) -> list[Sample]:
    """A fixed list of `count` samples to evaluate on: the same for the same arguments.

    With one image every item is used once, in a shuffled order (so at most len(items) samples).
    """
    rng = random.Random(f"evaluation {seed} {num_images}")
    pools = make_pools(items, num_images)
    if num_images == 1:
        return [Sample((item,)) for item in rng.sample(items, min(count, len(items)))]
    return [draw_sample(pools, num_images, rng, min_gap) for _ in range(count)]


class Sampler:
    """Which samples a training step uses.

    `batch(step)` is a pure function of the arguments and the step: nothing has to be saved to resume but the step's
    number, any rank can compute any batch, and the preflight can walk through a whole stage beforehand.

    images    numbers of images in a prompt; each step draws one of them for all its prompts, so that the prompts of a
              step have similar lengths (little padding) while all numbers take turns
    min_gap   labels in a prompt differ by at least this where possible, in units of the label
    """

    def __init__(self, items: list[Item], images: tuple[int, ...], batch_size: int, seed: int, min_gap: float = 0.0):
        if not items:
            raise DataError("the training split is empty: check --data-root")
        self.items, self.images, self.batch_size, self.seed, self.min_gap = items, images, batch_size, seed, min_gap
        self.pools = make_pools(items, max(images))

    def batch(self, step: int) -> list[Sample]:
        """The `batch_size` samples of step `step` (0, 1, ...)."""
        # Cycles of len(images) steps, each number once a cycle in a shuffled order: no run of one number by bad luck.
        cycle, place = divmod(step, len(self.images))
        order = list(self.images)
        random.Random(f"images {self.seed} {cycle}").shuffle(order)
        num_images = order[place]
        if num_images == 1:  # epochs: where all steps have one image, every item once before any item twice
            first = step * self.batch_size
            return [Sample((self._epoch_item(first + i),)) for i in range(self.batch_size)]
        rng = random.Random(f"samples {self.seed} {step}")
        return [draw_sample(self.pools, num_images, rng, self.min_gap) for _ in range(self.batch_size)]

    def _epoch_item(self, position: int) -> Item:
        epoch, index = divmod(position, len(self.items))
        if getattr(self, "_epoch", None) != epoch:  # shuffling is cheap, but not once per item
            self._epoch, self._order = epoch, list(range(len(self.items)))
            random.Random(f"epoch {self.seed} {epoch}").shuffle(self._order)
        return self.items[self._order[index]]


# --------------------------------------------------------------------------------------------------------------------
# Images to patches: what Qwen2-VL's image processor does, in 40 lines and with the same numbers bit for bit


MAX_ASPECT = 200  # the processor's own limit, long side to short side


def smart_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size an image is resized to: multiples of `factor`, area within the limits, aspect ratio nearly kept.

    Qwen2-VL (arXiv 2409.12191, section 2.1, "naive dynamic resolution"); factor = patch size * merge size = 28.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(f"an image of {width} x {height} pixels is more than 200 times as long as it is wide: crop it")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return h, w


def image_patches(image: Image.Image, processor) -> tuple[np.ndarray, tuple[int, int, int]]:
    """An RGB image as the rows that the vision tower reads, equal to Qwen2VLImageProcessor's output.

    processor  has patch_size, merge_size, temporal_patch_size, size {shortest_edge, longest_edge} (areas in pixels,
               whatever the names say), resample, rescale_factor, image_mean, image_std
    returns    patches (S, 3 * temporal * patch * patch) float32, and the grid (1, rows, columns) of patches
    """
    p, m, t = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    size = processor.size
    height, width = smart_size(image.height, image.width, p * m, size["shortest_edge"], size["longest_edge"])
    pixels = np.asarray(image.resize((width, height), resample=processor.resample))  # (height, width, 3) uint8
    # A pixel has 256 values, so rescaling and normalising is a table look-up. The table rounds where the processor
    # rounds: float64 product, float32 afterwards.
    levels = (np.arange(256, dtype=np.float64) * processor.rescale_factor).astype(np.float32)
    mean, std = np.array(processor.image_mean, np.float32), np.array(processor.image_std, np.float32)
    table = (levels[:, None] - mean) / std  # (256, 3)
    pixels = np.stack([table[pixels[:, :, c], c] for c in range(3)])  # (3, height, width)
    rows, columns = height // p, width // p
    # Patches are listed merge window by merge window (m x m patches become one token), each patch channel first.
    pixels = pixels.reshape(3, rows // m, m, p, columns // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
    # A still image is a film of t equal frames.
    pixels = np.broadcast_to(pixels[:, :, :, :, :, None], (*pixels.shape[:5], t, p, p))
    return pixels.reshape(rows * columns, 3 * t * p * p), (1, rows, columns)


# --------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass
class Prompt:
    """One question about n images, ready for the policy.

    ids     (P,) int64    token ids; every image is a run of <|image_pad|> tokens, one for each 2 x 2 patches
    pixels  (S, 1176)     float32 patches of all images, one image after the other
    grid    (n, 3) int64  (1, rows, columns) of patches of each image
    features              what a frozen vision tower made of the pixels, once it has (rarl.encode_images)
    """

    ids: torch.Tensor
    pixels: torch.Tensor
    grid: torch.Tensor
    features: torch.Tensor | None = None


def question_text(task: Task, num_images: int) -> str:
    """The instruction after the images (the wording is our choice)."""
    if num_images == 1:
        return f'{task.question} Reply with JSON only: [{{"image_id": 1, "value": <number>}}]'
    return (
        f"{task.question} Give the value of each image and list the images {task.order}. "
        'Reply with JSON only: [{"image_id": <id>, "value": <number>}, ...]'
    )


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # what Qwen's templates write for {"type": "image"}


def chat_text(tokenizer, sample: Sample) -> str:
    """The prompt as text, through the tokenizer's own chat template, one <|image_pad|> for each image.

    The images' marks are written into the text here, so that a template for text alone (Qwen2.5's) serves as well.
    """
    images = "".join(f"Image {i}: {IMAGE}\n" for i in range(1, len(sample.items) + 1))
    message = {"role": "user", "content": images + question_text(sample.task, len(sample.items))}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def make_prompts(policy, samples: list[Sample]) -> list[Prompt]:
    """Samples -> prompts, one each.

    policy  anything with `.tokenizer` and `.image_processor` (a policy from rarl.py, or just the two)
    """
    tokenizer, processor = policy.tokenizer, policy.image_processor
    prompts = []
    for sample in samples:
        patches, grids = zip(*(image_patches(item.image(), processor) for item in sample.items), strict=True)
        # Each image's one placeholder becomes as many as the image has tokens.
        text, *rest = chat_text(tokenizer, sample).split("<|image_pad|>")
        if len(rest) != len(sample.items):
            raise DataError(
                f"the prompt of task {sample.task.name!r} has {len(rest)} <|image_pad|> for {len(sample.items)} images: "
                "the question must not contain image tokens, and the model's chat template must place one per image"
            )
        for (_, rows, columns), piece in zip(grids, rest, strict=True):
            text += "<|image_pad|>" * (rows * columns // processor.merge_size**2) + piece
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(torch.tensor(ids), torch.from_numpy(np.concatenate(patches)), torch.tensor(grids)))
    return prompts


def answer_budget(policy, samples: list[Sample], slack: int = 16) -> int:
    """Tokens an answer may take: the longest reference answer and its EOS, and some slack for clumsier ones."""
    references = [reference_answer(sample) for sample in samples]
    return max(len(ids) for ids in policy.tokenizer(references)["input_ids"]) + 1 + slack


# --------------------------------------------------------------------------------------------------------------------
# Drawn data: nothing to download, and labels without noise

CANVAS = 84  # pixels: 6 x 6 patches, 9 tokens
DRAWN_SIZE = {"train": 2048, "val": 256, "test": 512}

DOTS = Task("dots", "How many dots are in the image?", "from the fewest dots to the most", delta=4)
DIALS = Task(
    "dials", "Which number does the needle point at, from 0 to 20?", "from the lowest reading to the highest", delta=4
)


def _random_color(rng: random.Random, low: int, high: int) -> tuple[int, int, int]:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def draw_dots(rng: random.Random) -> tuple[Image.Image, int]:
    """1-20 dots that do not touch, of varying size and colour, light on dark or dark on light. -> image, count"""
    count, zoom = rng.randint(1, 20), 3  # drawn three times as large and reduced, for smooth edges
    dark = rng.random() < 0.5
    image = Image.new("RGB", (CANVAS * zoom,) * 2, _random_color(rng, 0, 70) if dark else _random_color(rng, 185, 255))
    pen = ImageDraw.Draw(image)
    dots: list[tuple[float, float, float]] = []
    while len(dots) < count:
        r = rng.uniform(2.5, 5.0)
        x, y = rng.uniform(r + 1, CANVAS - r - 1), rng.uniform(r + 1, CANVAS - r - 1)
        if all(math.hypot(x - x2, y - y2) > r + r2 + 1.5 for x2, y2, r2 in dots):
            dots.append((x, y, r))
            box = [zoom * (x - r), zoom * (y - r), zoom * (x + r), zoom * (y + r)]
            pen.ellipse(box, fill=_random_color(rng, 140, 255) if dark else _random_color(rng, 0, 115))
    return image.reduce(zoom), count


def draw_dials(rng: random.Random) -> tuple[Image.Image, int]:
    """A round gauge from 0 (lower left) clockwise to 20 (lower right), with 21 ticks and a needle. -> image, reading"""
    value, zoom = rng.randint(0, 20), 3
    dark = rng.random() < 0.5
    back, face = (0, 90), (165, 255)
    if dark:
        back, face = face, back
    image = Image.new("RGB", (CANVAS * zoom,) * 2, _random_color(rng, *back))
    pen = ImageDraw.Draw(image)
    radius = rng.uniform(28, 38)
    x, y = (rng.uniform(radius + 2, CANVAS - radius - 2) for _ in range(2))
    ink = _random_color(rng, 190, 255) if dark else _random_color(rng, 0, 60)

    def point(reading: float, r: float) -> tuple[float, float]:
        angle = math.radians(225 - 270 * reading / 20)  # 225 degrees is lower left, -45 is lower right
        return zoom * (x + r * math.cos(angle)), zoom * (y - r * math.sin(angle))

    pen.ellipse([zoom * (x - radius), zoom * (y - radius), zoom * (x + radius), zoom * (y + radius)],
                fill=_random_color(rng, *face))  # fmt: skip
    for tick in range(21):
        pen.line(
            [point(tick, radius * (0.78 if tick % 5 == 0 else 0.87)), point(tick, radius * 0.95)], fill=ink, width=zoom
        )
    needle = _random_color(rng, 150, 255) if dark else _random_color(rng, 0, 120)
    length, thickness = rng.uniform(0.6, 0.85), rng.uniform(2, 3.5)
    pen.line([(zoom * x, zoom * y), point(value, radius * length)], fill=needle, width=round(thickness * zoom))
    hub = rng.uniform(2.5, 4)
    pen.ellipse([zoom * (x - hub), zoom * (y - hub), zoom * (x + hub), zoom * (y + hub)], fill=needle)
    return image.reduce(zoom), value


DRAWN = {"dots": (DOTS, draw_dots, 1), "dials": (DIALS, draw_dials, 0)}  # task, drawing, lowest label


def _drawn_image(draw: Callable, name: str) -> Image.Image:
    return draw(random.Random(name))[0]


def drawn_item(dataset: str, name: str) -> Item:
    """The drawing whose seed is its name."""
    task, draw, low = DRAWN[dataset]
    # The label needs only the first number of the stream: nothing is drawn before it is shown.
    return Item(name, random.Random(name).randint(low, 20), task, partial(_drawn_image, draw, name))


def load_drawn(dataset: str, split: str) -> list[Item]:
    """`dots` or `dials`. The names, and so the seeds, hold the split: no split shares an image with another."""
    return [drawn_item(dataset, f"{dataset}/{split}/{i}") for i in range(DRAWN_SIZE[split])]


# --------------------------------------------------------------------------------------------------------------------
# Image files

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not all that Pillow knows: EPS would run Ghostscript
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def open_image(path: Path) -> Image.Image:
    """A file as an upright RGB image: turned as its EXIF says, 16 bits scaled to 8, transparency laid on white.

    Raises DataError with the file's name when it is missing, unreadable, truncated, too long for its width (see
    `smart_size`) or larger than Image.MAX_IMAGE_PIXELS: a few kilobytes can unpack to gigabytes, and Pillow only
    warns up to twice that limit.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            size, limit = f"{image.width} x {image.height} pixels", Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise DataError(f"image file {path} has {size}, more than {limit / 1e6:.0f} million: shrink it")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise DataError(f"image file {path} has {size}, more than 200 times as long as it is wide: crop it")
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"image file {path} does not exist: check --data-root") from None
    except Exception as error:  # on broken bytes the decoders raise whatever they happen to run into
        raise DataError(f"image file {path} cannot be read ({error}): replace it or take it out") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """As transformers' convert_to_rgb, but for 16-bit grey, which Pillow would clip: nearly all of it turns white."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its 32-bit pixels have no known range")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def unreadable(items: list[Item]) -> dict[Path, str]:
    """{file: what is wrong with it} of the images that `open_image` refuses. Slow: opens and decodes all, in threads."""

    def check(path: Path) -> str:
        try:
            open_image(path)
        except DataError as error:
            return str(error)
        return ""

    paths = list(dict.fromkeys(item.path for item in items if item.path))
    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        return {path: wrong for path, wrong in zip(paths, pool.map(check, paths), strict=True) if wrong}


def duplicates(splits: dict[str, list[Item]]) -> list[list[tuple[str, Path]]]:
    """Files of equal bytes that stand in more than one split: groups of (split, file).

    Only files of equal size are read. The same picture, saved anew or resized, is not found.
    """
    by_size: dict[int, set[tuple[str, Path]]] = defaultdict(set)
    for split, path in {(split, item.path) for split, items in splits.items() for item in items if item.path}:
        by_size[path.stat().st_size].add((split, path))
    groups: dict[bytes, list[tuple[str, Path]]] = defaultdict(list)
    for files in by_size.values():
        if len({split for split, _ in files}) > 1:
            for split, path in sorted(files):
                groups[hashlib.sha256(path.read_bytes()).digest()].append((split, path))
    return [group for group in groups.values() if len({split for split, _ in group}) > 1]


# --------------------------------------------------------------------------------------------------------------------
# Readers: what a data set's files say. Each yields rows, unchecked; read_dataset checks them all alike. The root is what
# the user named, a folder or (csv, jsonl, coco) a file; the folder is where the images are.


class Row(NamedTuple):
    """One labelled image as the files describe it.

    where  the file (and line) to look at when something is wrong
    name   unique in the data set
    label  a number, or text that should be one
    key    what the image is called in list files and what decides its split; stays when images are added
    group  items of different groups never share a prompt: COCO's categories
    split  train | val | test where the files say so
    skip   why the data set's own rules leave this row out (counted, never an error)
    bad    why this row cannot be used (an error, or counted if the user says so)
    """

    where: str
    name: str = ""
    path: Path = Path()
    label: object = None
    key: str = ""
    group: str = ""
    split: str | None = None
    skip: str = ""
    bad: str = ""

    def known_as(self) -> tuple[str, ...]:
        """What a list file may call it."""
        return self.key, self.path.name, self.path.stem


SPLITS = ("train", "val", "test")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # spreadsheets begin with a byte order mark
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text: save it as UTF-8") from None


def _image_files(root: Path) -> list[Path]:
    """All image files below a folder in the order of their names, less hidden ones (macOS leaves ._name.jpg behind)."""
    walk = os.walk(root, followlinks=True)  # part folders may be links, which rglob passes over
    files = sorted(Path(f, n) for f, _, names in walk for n in names if n.lower().endswith(ENDINGS))
    return [f for f in files if not any(p.startswith((".", "__MACOSX")) for p in f.relative_to(root).parts)]


def _locate(folders: list[Path], name: str) -> Path:
    return next((f / name for f in folders if os.path.isfile(f / name)), folders[0] / name)


def read_utkface(root: Path, folder: Path) -> Iterator[Row]:
    """Age. UTKFace (Zhang, Song, Qi 2017): [age]_[gender]_[race]_[date].jpg or .jpg.chip.jpg, flat or in part folders.

    The real set holds a few names that lack a field; they are left out and counted.
    """
    for path in _image_files(root):
        fields = re.match(r"(\d{1,3})_[01]_[0-4]_\d+(?!\d)", path.name)
        if fields is None:
            yield Row(str(path), skip="the name is not age_gender_race_date.jpg")
        elif int(fields[1]) > 120:
            yield Row(str(path), skip="nobody is older than 120")
        else:  # the aligned face (.chip.jpg) goes where its whole photograph goes
            yield Row(str(path), fields[0], path, int(fields[1]), fields[0])


def read_coco(root: Path, folder: Path) -> Iterator[Row]:
    """Counting. COCO (arXiv 1405.0312) or COCO-ReM (arXiv 2403.18819): annotations/instances_*.json beside the images.

    One task per category: the number of its instances in an image that has at least one, however they are outlined
    (polygons or RLE). A crowd annotation (iscrowd) stands for an unknown number, so images with one are left out for
    that category. Images lie in a folder named like the annotations (val2017), or in any other of the root's folders.
    With annotations of train and val, val becomes our test split (COCO's own test set has no public labels) and
    train is divided into train and val. The root may be one annotation file.
    """
    files = sorted(root.glob("annotations/instances_*.json")) or sorted(root.glob("instances_*.json"))
    if root.is_file():
        files = [root]
    elif not files:
        raise DataError(f"no annotations/instances_*.json under {root}: point --data-root at the COCO folder")
    both = all(any(part in file.stem for file in files) for part in ("train", "val"))
    others = sorted(f for f in [*folder.glob("*"), *folder.glob("images/*")] if f.is_dir() and f.name != "annotations")
    annotated: dict[str, Path] = {}  # image -> the file that has it
    for file in files:
        year = file.stem.removeprefix("instances_")  # val2017
        folders = [f for f in (folder / year, folder / "images" / year, folder, *others) if f.is_dir()]
        try:
            content = json.loads(_text(file))
            names = {c["id"]: c["name"] for c in content["categories"]}
            images = {i["id"]: str(i["file_name"]) for i in content["images"]}
            annotations = [a for a in content["annotations"] if a["image_id"] in images]
            counts = Counter((a["image_id"], a["category_id"]) for a in annotations)
            crowds = {(a["image_id"], a["category_id"]) for a in annotations if a.get("iscrowd")}
            counted = [(images[i], names[c], n, (i, c) in crowds) for (i, c), n in sorted(counts.items())]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{file} is not a COCO instances file ({type(error).__name__}: {error})") from None
        if twice := next((name for name in images.values() if annotated.setdefault(name, file) != file), None):
            raise DataError(f"{annotated[twice]} and {file} both annotate {twice}: point --data-root at one of the two")
        paths = {name: _locate(folders, name) for name in images.values()}
        for name, category, count, crowd in counted:
            split = None
            if both:
                split = "test" if "val" in file.stem else "val" if hash_split(name) == "val" else "train"
            skip = "has a crowd of the category, so no known number" if crowd else ""
            where, item = f"{file}, {name}, {category}", f"{year}/{name}/{category}"
            yield Row(where, item, paths[name], count, name, category, split, skip)


def read_ava(root: Path, folder: Path) -> Iterator[Row]:
    """Aesthetics. AVA (Murray, Marchesotti, Perronnin 2012): AVA.txt and images/ID.jpg (or ID.jpg); label = mean vote.

    15 columns: index, image id, number of votes for each score from 1 to 10, two tags, challenge.
    """
    file = root / "AVA.txt"
    if not file.is_file():
        raise DataError(f"{file} does not exist: point --data-root at the folder with AVA.txt and images/")
    folders = [f for f in (root / "images", root / "image", root) if f.is_dir()]
    for number, line in enumerate(_text(file).splitlines(), start=1):
        where, fields = f"{file} line {number}", line.split()
        if len(fields) != 15 or not all(f.isdecimal() for f in fields):
            yield Row(where, bad="is not 15 whole numbers (index, image id, ten vote counts, two tags, challenge)")
            continue
        image, votes = fields[1], [int(f) for f in fields[2:12]]
        mean = sum(score * count for score, count in enumerate(votes, start=1)) / sum(votes) if any(votes) else None
        yield Row(where, image, _locate(folders, f"{image}.jpg"), mean, image)


def _table(root: Path, ending: str) -> Path:
    """The one file of that ending in a folder, or the file itself."""
    if root.is_file():
        return root
    files = sorted(root.glob(f"*{ending}"))
    if len(files) != 1 and (root / f"labels{ending}") not in files:
        raise DataError(f"{root} holds {len(files)} {ending} files: point --data-root at the one to read")
    return files[0] if len(files) == 1 else root / f"labels{ending}"


def _table_row(where: str, fields: dict, folder: Path) -> Row:
    path, group = fields.get("path"), fields.get("group")
    if not isinstance(path, str) or not path.strip():
        return Row(where, bad="has no path")
    full = folder / path.strip()
    key, group = Path(os.path.relpath(full, folder)).as_posix(), "" if group is None else str(group).strip()
    return Row(where, f"{key}/{group}" if group else key, full, fields.get("label"), key, group, fields.get("split"))


def read_csv(root: Path, folder: Path) -> Iterator[Row]:
    """Your own images: a file with the columns path (relative to the file), label, and if you like split and group.

    Comma-separated, UTF-8, with a header line. The root is the file or a folder with exactly one .csv (or labels.csv).
    """
    file = _table(root, ".csv")
    reader = csv.DictReader(io.StringIO(_text(file)), skipinitialspace=True)
    try:
        if not {"path", "label"} <= set(reader.fieldnames or ()):
            raise DataError(f"{file} must begin with a line path,label[,split][,group], not {reader.fieldnames}")
        for fields in reader:
            where = f"{file} line {reader.line_num}"
            more = "has more columns than the first line (put a path with a comma in quotes)"
            yield Row(where, bad=more) if None in fields else _table_row(where, fields, folder)
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num} is not CSV ({error})") from None


def read_jsonl(root: Path, folder: Path) -> Iterator[Row]:
    """Your own images: one JSON object a line, {"path": "a.jpg", "label": 3.5}, and if you like "split" and "group"."""
    file = _table(root, ".jsonl")
    for number, line in enumerate(_text(file).split("\n"), start=1):
        where = f"{file} line {number}"
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                fields = None
            is_object = isinstance(fields, dict)
            yield _table_row(where, fields, folder) if is_object else Row(where, bad="is not a JSON object")


def read_folder(root: Path, folder: Path) -> Iterator[Row]:
    """Your own images: one folder per label, ROOT/3.5/a.jpg, or ROOT/train/3.5/a.jpg with all of train, val, test."""
    for path in _image_files(root):
        key = path.relative_to(root)
        split, *rest = key.parts if key.parts[0] in SPLITS else (None, *key.parts)
        if len(rest) < 2:
            yield Row(str(path), bad="lies in no folder whose name is the label")
        else:
            yield Row(str(path), key.as_posix(), path, rest[0], key.as_posix(), split=split)


# --------------------------------------------------------------------------------------------------------------------
# Data sets: rows checked, divided into splits, and given their task
#
# delta is about twice the error of a good model, so that a typical answer stands on the slope of R_reg, not on its top
# or at its foot: UTKFace MAE 4-5 years; AVA's labels have a standard deviation of 0.7, a good model errs by 0.4.

READERS: dict[str, tuple[Callable[[Path, Path], Iterator[Row]], Task]] = {
    "utkface": (
        read_utkface,
        Task("age", "How old is the person in the image, in years?", "from the youngest to the oldest", delta=10),
    ),
    "coco": (
        read_coco,
        Task("count {group}", "How many {group} instances are in the image?",
             "from the fewest {group} instances to the most", delta=4),
    ),
    "ava": (
        read_ava,
        Task("aesthetics", "How beautiful is the photograph, from 1 (worst) to 10 (best), with two decimals?",
             "from the least to the most beautiful", delta=1, decimals=2),
    ),
}  # fmt: skip
# One's own labels: delta 0 and decimals -1 are found from them, see make_task.
RATING = Task("rating", "Rate the image from {low} to {high}.", "from the lowest to the highest", delta=0, decimals=-1)
READERS |= {"csv": (read_csv, RATING), "jsonl": (read_jsonl, RATING), "folder": (read_folder, RATING)}
DATASETS = (*DRAWN, *READERS)


def make_task(base: Task, overrides: dict, group: str = "", labels: list[float] | None = None) -> Task:
    """The task of one group: `base`, with the user's question, order, delta, decimals where given (not None).

    {group}, {low} and {high} in a question or order stand for the group's name and its lowest and highest label.
    Where the base leaves them open, delta is a quarter of the range of all splits' labels (so that an answer in the middle
    earns something for the middle half of them) and decimals are what it takes to write them, at most 3.
    """
    given = {field: value for field, value in overrides.items() if value is not None}
    if unknown := set(given) - {"question", "order", "delta", "decimals"}:
        raise DataError(f"a task has no setting {sorted(unknown)}: question, order, delta, decimals")
    if not 0 < given.get("delta", 1) < math.inf:
        raise DataError(f"--delta {given['delta']} must be positive and finite")
    if given.get("decimals", 0) not in range(10):
        raise DataError(f"--decimals {given['decimals']} must be a whole number from 0 to 9")
    if not all(str(given.get(field, "?")).strip() for field in ("question", "order")):
        raise DataError("--question and --order must not be empty")
    task = dataclasses.replace(base, **given)
    words = {"{group}": group}
    if labels:
        low, high, decimals, delta = min(labels), max(labels), task.decimals, task.delta
        if decimals < 0:
            decimals = next((d for d in range(3) if all(round(label, d) == label for label in labels)), 3)
        if delta == 0 and low == high:
            raise DataError(
                f"all labels {f'of {group} ' if group else ''}are {low:g}, so delta is unknown: set --delta"
            )
        task = dataclasses.replace(task, decimals=decimals, delta=delta or float(f"{(high - low) / 4:.3g}"))
        words |= {"{low}": format_value(low, decimals), "{high}": format_value(high, decimals)}
    name = task.name if "{group}" in task.name or not group else f"{task.name} {{group}}"  # groups stay apart

    def fill(text: str) -> str:
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    return dataclasses.replace(task, name=fill(name), question=fill(task.question), order=fill(task.order))


def hash_split(name: str) -> str:
    """train (70 %), val (10 %) or test (20 %) from a file's name alone, so new files never move old ones."""
    # A checksum such as CRC is not enough: on names that count up, it shares out unevenly.
    place = int(hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest(), 16) % 10
    return "train" if place < 7 else "val" if place == 7 else "test"


LISTS = {  # the second ones are AVA's own
    "train": ("train.txt", "aesthetics_image_lists/generic_ls_train.jpgl"),
    "val": ("val.txt",),
    "test": ("test.txt", "aesthetics_image_lists/generic_test.jpgl"),
}


def read_lists(folder: Path) -> dict[str, str]:
    """{name or id: split} of the list files in a data set's folder, one name a line; {} if there are none."""
    listed: dict[str, str] = {}
    for split, files in LISTS.items():
        for file in [folder / f for f in files if (folder / f).is_file()][:1]:
            for name in filter(None, map(str.strip, _text(file).splitlines())):
                if listed.setdefault(name, split) != split:
                    raise DataError(f"{name} is in the lists of {listed[name]} and {split}: take it out of {file}")
    return listed


def choose_split(row: Row, listed: dict[str, str]) -> str | None:
    """The split of a row: what a list file says, else what the data set says, else the hash of its key.

    With lists, an image in none of them belongs to train if there is no list of train, else to no split (None).
    """
    if not listed:
        return row.split or hash_split(row.key)
    unlisted = None if "train" in listed.values() else "train"
    return next((listed[name] for name in row.known_as() if name in listed), unlisted)


class LeftOut(NamedTuple):
    why: str
    where: str
    bad: bool  # an error unless bad rows are to be skipped; else left out by the data set's own rules


def _check(row: Row, folder: Path, names: dict[str, str], some_have_split: bool) -> str:
    """What is wrong with a row, or "". The particulars come after a colon, so that reasons can be counted."""
    if row.bad:
        return row.bad
    if row.label is None or not str(row.label).strip():
        return "has no label"
    try:
        number = math.nan if isinstance(row.label, bool) else float(row.label)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return f"the label is not a finite number: {str(row.label)[:50]!r}"
    if row.name in names:
        return f"is listed twice, and first at: {names[row.name]}"
    if some_have_split and row.split not in SPLITS:
        return f"the split is none of train, val, test: {row.split!r}"
    # Without following links: what a data set says must not lead out of its folder; what the user linked there may.
    if not Path(os.path.normpath(row.path)).is_relative_to(folder):
        return f"the path leads out of {folder}, move or link the images into it: {row.path}"
    return "" if os.path.isfile(row.path) else f"the image file does not exist: {row.path}"


def read_dataset(
    name: str, root: str | Path | None = None, task_overrides: dict | None = None, skip_bad: bool = False
) -> tuple[dict[str, list[Item]], list[LeftOut]]:
    """All splits of a data set, {"train": items, "val": items, "test": items}, and what was left out, and why.

    Image files must exist, but are not opened. For the arguments see `load_dataset`.
    """
    overrides = task_overrides or {}
    if name in DRAWN:
        task = make_task(DRAWN[name][0], overrides)
        drawn = {split: load_drawn(name, split) for split in SPLITS}
        return {s: [dataclasses.replace(i, task=task) for i in items] for s, items in drawn.items()}, []
    if name not in READERS:
        raise DataError(f"unknown data set {name!r}: choose {', '.join(DATASETS[:-1])} or {DATASETS[-1]}")
    if root is None:
        raise DataError(f"--data {name} needs --data-root, the folder it lies in")
    root = Path(os.path.abspath(root))
    if not root.is_dir() and not (root.is_file() and name in ("coco", "csv", "jsonl")):
        raise DataError(f"--data-root {root} is not a folder")
    reader, base = READERS[name]
    folder = root if root.is_dir() else root.parent
    if name == "coco" and folder.name == "annotations":
        folder = folder.parent
    found = list(reader(root, folder))
    listed = read_lists(folder)
    some_have_split = any(row.split for row in found)
    rows: list[tuple[Row, str]] = []
    left_out: list[LeftOut] = []
    names: dict[str, str] = {}
    labels: dict[str, list[float]] = defaultdict(list)  # of each group, all splits
    for row in found:
        if row.skip:
            left_out.append(LeftOut(row.skip, row.where, False))
        elif wrong := _check(row, folder, names, some_have_split):
            if not skip_bad:
                raise DataError(f"{row.where}: {wrong} (correct it or take it out; --skip-bad leaves out all such)")
            left_out.append(LeftOut(wrong, row.where, True))
        elif split := choose_split(row, listed):
            rows.append((row, split))
            names[row.name] = row.where
            labels[row.group].append(float(row.label))  # type: ignore[arg-type]
        else:
            left_out.append(LeftOut("stands in no list file", row.where, False))
    if listed and not any(name in listed for row in found for name in row.known_as()):
        raise DataError(f"no image of {root} is in its train.txt, val.txt or test.txt: they hold one name or id a line")
    tasks = {group: make_task(base, overrides, group, values) for group, values in labels.items()}
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for row, split in rows:
        path = Path(os.path.normpath(row.path))
        image = partial(open_image, path)
        items[split].append(Item(row.name, float(row.label), tasks[row.group], image, path))  # type: ignore[arg-type]
    return items, left_out


def load_splits(
    name: str, root: str | Path | None, splits: tuple[str, ...], task_overrides: dict | None = None,
    skip_bad: bool = False,
) -> list[list[Item]]:  # fmt: skip
    """The items of several splits, with the data set's files read once; see `load_dataset`."""
    for split in splits:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}: choose train, val or test")
    items, left_out = read_dataset(name, root, task_overrides, skip_bad)
    if skip_bad:
        items, refused = _openable({split: items[split] for split in splits})
        left_out += refused
    if left_out:
        print(f"{name}: left out {format_left_out(left_out, 0)}\n  (python data.py {name} names them)", file=sys.stderr)
    for split in splits:
        if not items[split]:
            raise DataError(f"the {split} split of {name} under {root} is empty ({len(left_out)} left out): add images")
    return [items[split] for split in splits]


def _openable(items: dict[str, list[Item]]) -> tuple[dict[str, list[Item]], list[LeftOut]]:
    wrong = unreadable([item for split in items.values() for item in split])
    good = {split: [item for item in some if item.path not in wrong] for split, some in items.items()}
    return good, [LeftOut("image cannot be used", text, True) for text in wrong.values()]


def load_dataset(
    name: str, root: str | Path | None = None, split: str = "train", task_overrides: dict | None = None,
    skip_bad: bool = False,
) -> list[Item]:  # fmt: skip
    """The items of one split.

    name            dots | dials | utkface | coco | ava | csv | jsonl | folder
    root            the data set's folder, or the file for csv, jsonl and coco (not needed for the drawn ones)
    split           train | val | test, see `choose_split`
    task_overrides  {"question": ..., "order": ..., "delta": ..., "decimals": ...}; None or absent: the data set's own
    skip_bad        leave out and count what cannot be used, rather than raise. It opens every image of the split
                    beforehand, which takes minutes for a large data set
    Raises DataError when the name is unknown, the folder is not that data set, a row is unusable (the message names its
    file and line), an image file is missing, or the split is empty. Images are opened later, when they are needed.
    """
    return load_splits(name, root, (split,), task_overrides, skip_bad)[0]


# --------------------------------------------------------------------------------------------------------------------
# Look before you train: python data.py NAME [ROOT]


def format_left_out(left_out: list[LeftOut], examples: int = 3) -> str:
    """'4' and a line for every reason with its number and the first few places."""
    lines = [str(len(left_out))]
    places: dict[str, list[str]] = defaultdict(list)
    for why, where, bad in left_out:
        reason, _, particulars = why.partition(": ")
        reason += " [needs --skip-bad]" if bad else ""
        places[reason].append(f"{where}: {particulars}" if particulars else where)
    for reason, found in places.items():
        more = [f"      and {len(found) - examples} more"] if len(found) > examples > 0 else []
        lines += [f"  {len(found)} x {reason}", *(f"      {place}" for place in found[:examples]), *more]
    return "\n".join(lines)


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


def inspect(name: str, root: Path | None, out: Path, overrides: dict, min_gap: float = 0.0, seed: int = 0) -> None:
    """Print what a data set holds and what is wrong with it, and draw a sheet of its samples. Opens every image."""
    splits, left_out = read_dataset(name, root, overrides, skip_bad=True)
    splits, refused = _openable(splits)
    left_out += refused
    everything = [item for items in splits.values() for item in items]
    print(f"{name}{f' under {root}' if root else ''}: {len(everything)} labels")
    print("\nsplits      " + ", ".join(f"{split} {len(items)}" for split, items in splits.items()))
    print(f"left out    {format_left_out(left_out)}")
    twice = duplicates(splits)
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
    draw_sheet([s for n in (1, 2, 4) if n <= most for s in make_samples(shown, n, 2, seed, min_gap)], out)
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
    add("--min-gap", type=float, default=0.0, help="labels in a prompt differ by this where possible")
    add("--seed", type=int, default=0, help="draws the samples")
    args = parser.parse_args(argv)
    overrides = {field: getattr(args, field) for field in ("question", "order", "delta", "decimals")}
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names may be anything
    try:
        inspect(args.name, args.root, args.out, overrides, args.min_gap, args.seed)
    except (DataError, OSError) as error:
        raise SystemExit(f"data.py: {error}") from None


if __name__ == "__main__":
    main()
