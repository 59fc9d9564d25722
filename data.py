"""Data for RARL (arXiv 2601.20585): labelled images in, prompts for a Qwen2.5-VL policy out.

Version 2026.11 of "RARL, by hand"; runs with Python 3.11, torch 2.13, numpy 2.4, pillow 13.0.

What is here, in the order in which a training step uses it:

    Item      one image with one number (an age, a count, a score) and the Task that asks for it
    Sample    n items of one task, shown in one prompt as image 1..n
    Sampler   which samples make up step s: a pure function of (seed, s), so its whole state is the step's number
    Prompt    what the policy reads: token ids, image patches and the grid of each image

Items come from `support.datasets.load_dataset`: drawn ones, those of the paper, and your own images.

    python data.py utkface ROOT       # look before you train: counts, labels, splits, what is wrong, a sheet of samples

Choices of ours, as the summaries of the paper do not state them: the wording of the prompts, the tolerances delta, and the splits of data
sets that bring none. All are settings: of a Task, or list files beside the images.

Shapes: P prompt tokens, n images, S patches of all images of a prompt (4 patches of 14 x 14 pixels make one token).
"""

import math
import random
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

if __name__ == "__main__":  # `python data.py NAME ROOT`. By its name: nothing here imports another file of the project.
    runpy.run_module("support.datasets", run_name="__main__", alter_sys=True)
    sys.exit()  # it imports this file anew; here, above the slow imports, Ctrl-C is one line

import numpy as np
import torch
from PIL import Image


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


class Pool(list[Item]):
    """The items of one task. What drawing has to look through all of them for is found once."""

    @cached_property
    def labels_differ(self) -> bool:
        return any(item.label != self[0].label for item in self)

    def with_other_labels(self, label: float) -> list[Item]:
        if label not in self._others:
            self._others[label] = [item for item in self if item.label != label]
        return self._others[label]

    @cached_property
    def _others(self) -> dict[float, list[Item]]:
        return {}


def draw_sample(
    pools: dict[Task, Pool], num_images: int, rng: random.Random, cumulative: dict[Task, list[float]] | None = None
) -> Sample:
    """n items of one task, with different labels where the task has enough of them.

    Two equal labels make no comparable pair, so they teach nothing about order. A task is drawn in proportion to its
    items, among those that have n at all and, for n > 1, two different labels; only where no task has, another.

    cumulative  of each task, the cumulative weights of its items; None draws all items alike
    """
    tasks = [task for task, items in pools.items() if len(items) >= num_images]
    if num_images > 1:
        tasks = [task for task in tasks if pools[task].labels_differ] or tasks
    task = rng.choices(tasks, weights=[len(pools[task]) for task in tasks])[0]
    items = pools[task]
    chosen: dict[str, Item] = {}
    seen: set[float] = set()
    candidates = [rng.choices(items, cum_weights=cumulative[task], k=32 * num_images)] if cumulative else []
    candidates += [rng.sample(items, min(len(items), 32 * num_images)) for _ in range(2)]
    for k, some in enumerate(candidates):
        different = k < len(candidates) - 1  # last pass: the labels ran out, so take any other item
        for item in some:
            if len(chosen) == num_images:
                break
            if item.name not in chosen and not (different and item.label in seen):
                chosen[item.name] = item
                seen.add(item.label)
    picked = list(chosen.values())
    if num_images > 1 and len(seen) == 1 and items.labels_differ:  # the other labels are too rare to be met
        picked[-1] = rng.choice(items.with_other_labels(picked[-1].label))
    rng.shuffle(picked)  # else duplicates, taken last, would always stand last in the prompt
    return Sample(tuple(picked))


def make_pools(items: list[Item], num_images: int, what: str = "--images") -> dict[Task, Pool]:
    """Items by task. Raises DataError when no task has `num_images` of them (`what` names the setting to change)."""
    pools: dict[Task, Pool] = defaultdict(Pool)
    for item in items:
        pools[item.task].append(item)
    most = max((len(pool) for pool in pools.values()), default=0)
    if most < num_images:
        raise DataError(
            f"a prompt with {num_images} images needs {num_images} images of one task, but no task of this split has "
            f"more than {most}: lower {what} or add data"
        )
    return dict(pools)


def make_samples(items: list[Item], num_images: int, count: int, seed: int = 0) -> list[Sample]:
    """A fixed list of `count` samples to evaluate on: the same for the same arguments.

    With one image every item is used once, in a shuffled order (so at most len(items) samples).
    """
    rng = random.Random(f"evaluation {seed} {num_images}")
    pools = make_pools(items, num_images)
    if num_images == 1:
        return [Sample((item,)) for item in rng.sample(items, min(count, len(items)))]
    return [draw_sample(pools, num_images, rng) for _ in range(count)]


class Sampler:
    """Which samples a training step uses.

    `batch(step)` is a pure function of the arguments and the step: nothing has to be saved to resume but the step's
    number, and any rank can compute any batch.

    images   numbers of images in a prompt; each step draws one of them for all its prompts, so that the prompts of a
             step have similar lengths (little padding) while all numbers take turns
    weights  by task, how often to draw each of its items, in the order of `items`; None draws all alike
    """

    def __init__(
        self, items: list[Item], images: tuple[int, ...], batch_size: int, seed: int,
        weights: dict[Task, list[float]] | None = None,
    ):  # fmt: skip
        if not items:
            raise DataError("the training split is empty: check --data-root")
        self.items, self.images, self.batch_size, self.seed = items, images, batch_size, seed
        self.pools = make_pools(items, max(images))
        self.cumulative = weights and {task: list(accumulate(some)) for task, some in weights.items()}

    def batch(self, step: int) -> list[Sample]:
        """The `batch_size` samples of step `step` (0, 1, ...)."""
        # Cycles of len(images) steps, each number once a cycle in a shuffled order: no run of one number by bad luck.
        cycle, place = divmod(step, len(self.images))
        order = list(self.images)
        random.Random(f"images {self.seed} {cycle}").shuffle(order)
        num_images = order[place]
        if num_images == 1 and self.cumulative is None:
            # Epochs: where all steps have one image, every item once before any item twice.
            first = step * self.batch_size
            return [Sample((self._epoch_item(first + i),)) for i in range(self.batch_size)]
        rng = random.Random(f"samples {self.seed} {step}")
        return [draw_sample(self.pools, num_images, rng, self.cumulative) for _ in range(self.batch_size)]

    def _epoch_item(self, position: int) -> Item:
        epoch, index = divmod(position, len(self.items))
        if getattr(self, "_epoch", None) != epoch:  # shuffling is cheap, but not once per item
            self._epoch, self._order = epoch, list(range(len(self.items)))
            random.Random(f"epoch {self.seed} {epoch}").shuffle(self._order)
        return self.items[self._order[index]]


# --------------------------------------------------------------------------------------------------------------------
# Images to patches: what Qwen2-VL's image processor does, in 30 lines and with the same numbers bit for bit


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
    """An RGB image as uint8 patches, in the order in which the vision tower reads them.

    Qwen2VLImageProcessor also rescales and normalises each patch and doubles it (a film of two equal frames). Here rarl.py
    does that, in `float_patches`, so that an eighth of the bytes travels.

    processor  has patch_size, merge_size, size {shortest_edge, longest_edge} (areas in pixels, whatever the names say)
               and resample
    returns    patches (S, 3 * patch * patch) uint8, and the grid (1, rows, columns) of patches
    """
    p, m, size = processor.patch_size, processor.merge_size, processor.size
    height, width = smart_size(image.height, image.width, p * m, size["shortest_edge"], size["longest_edge"])
    pixels = np.asarray(image.resize((width, height), resample=processor.resample))  # (height, width, 3) uint8
    rows, columns = height // p, width // p
    # Patches are listed merge window by merge window (m x m patches become one token), each patch channel first.
    pixels = pixels.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return pixels.reshape(rows * columns, 3 * p * p), (1, rows, columns)


# --------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass
class Prompt:
    """One question about n images, ready for the policy.

    ids     (P,) int64    token ids; every image is a run of <|image_pad|> tokens, one for each 2 x 2 patches
    pixels  (S, 588)      uint8 patches of all images, one image after the other; 8 images of 448 x 448 are 5 MB
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
    question = question_text(sample.task, len(sample.items))
    if mark := next((mark for mark in tokenizer.added_tokens_encoder if mark in question), None):
        raise DataError(
            f"{question!r} must not contain {mark}, a mark of the tokenizer's own: change --question or --order"
        )
    message = {"role": "user", "content": images + question}
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
                "the model's chat template changes what a message says"
            )
        for (_, rows, columns), piece in zip(grids, rest, strict=True):
            text += "<|image_pad|>" * (rows * columns // processor.merge_size**2) + piece
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(torch.tensor(ids), torch.from_numpy(np.concatenate(patches)), torch.tensor(grids)))
    return prompts


def max_answer_tokens(policy, samples: list[Sample], slack: int = 16) -> int:
    """Tokens an answer may take: half as many again as the longest reference answer, its EOS, and some slack.

    The same list indented in a code fence takes up to 1.6 times as many (Qwen's tokenizer, 2 to 8 images); the slack covers the
    rest. What is longer is cut, and a cut answer is none.
    """
    references = sorted({reference_answer(sample) for sample in samples})
    longest = max(len(ids) for ids in policy.tokenizer(references)["input_ids"])
    return longest + longest // 2 + 1 + slack
