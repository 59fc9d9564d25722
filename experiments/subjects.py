"""What a small policy is taught: pictures of a task, and the values that its labels can have. Drawings, or any data set of files."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
from support.datasets import load_splits
from support.datasets.drawings import DRAWN, drawn_item

IMAGES = (1, 2, 4, 8)
MOST_VALUES = 256  # that the eyes tell apart
SHIFT = 4  # pixels that a photograph is moved by at most, either way


@dataclass(frozen=True, eq=False)
class Subject:
    """One task's pictures and values.

    values    (V,) what the eyes tell apart, evenly spaced, lowest first; in units of the label, as all here
    bell      std of the eyes' targets: a value this near is nearly right
    fresh     (step, count) -> pictures of that step of the eyes' lesson
    kept      pictures of the other lessons, which the eyes look at once; at most `count` of them
    held_out  on which the eyes' lesson stops early; none where no picture comes twice
    """

    task: data.Task
    values: Tensor
    bell: float
    fresh: Callable[[int, int], list[data.Item]]
    kept: Callable[[int], list[data.Item]]
    held_out: list[data.Item] = field(default_factory=list)

    def bells(self, labels: Tensor) -> Tensor:
        """(B,) -> the eyes' targets, distributions over the values (B, V)"""
        return (-(((self.values - labels[:, None]) / self.bell) ** 2) / 2).softmax(-1)

    def read(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,), what the eyes would say"""
        return median(self.values, logits)

    def bad(self, label: float, rng: random.Random) -> str:
        """The value that a bad teacher says: of four coarse ones, and up to a fifth of the range off, any error as likely.

        Dots and dials, 0 to 20: 3, 8, 13 or 18, up to 4 off.
        """
        count, unit, low = len(self.values), float(self.values[1] - self.values[0]), float(self.values[0])
        step, noise = round(5 * count / 21), round(4 * count / 21)
        coarse = min(int((label - low) / unit) // step, count // step - 1) * step + step // 2 + 1
        said = min(count - 1, max(0, coarse + rng.randint(-noise, noise)))
        return data.format_value(float(self.values[said]), self.task.decimals)


def median(values: Tensor, logits: Tensor) -> Tensor:
    """values (V,), logits (B, V) -> (B,): of all numbers, the one whose expected error is least"""
    return values[((logits.softmax(-1).cumsum(-1) < 0.5).sum(-1)).clamp(max=len(values) - 1)]


def drawn_subjects() -> list[Subject]:
    """Dots and dials from streams of their own ('dots/tiny/...'): no drawing of train, val or test."""

    def stream(name: str, start: int, count: int) -> list[data.Item]:
        return [drawn_item(name, f"{name}/tiny/{i}") for i in range(start, start + count)]

    def fresh(name: str, step: int, count: int) -> list[data.Item]:
        return stream(name, step * count, count)

    return [
        Subject(task, torch.arange(21), 1.0, partial(fresh, name), partial(stream, name, 10**8))
        for name, (task, *_) in DRAWN.items()
    ]


def file_subjects(name: str, root: str | Path | None, processor) -> list[Subject]:
    """The tasks of a data set of files. Their lessons see its train split alone, the early stop its val split.

    Pictures are kept in memory in the size that the policy reads. Raises DataError.
    """
    train, val = load_splits(name, root, ("train", "val"))
    subjects = []
    for task, pool in data.make_pools(train, max(IMAGES)).items():
        low, high = min(i.label for i in pool), max(i.label for i in pool)
        if low == high:
            raise data.DataError(f"all labels of {task.name} in the train split are {low:g}: nothing to tell apart")
        unit = max(10.0**-task.decimals, (high - low) / (MOST_VALUES - 1))
        values = low + unit * torch.arange(math.ceil((high - low) / unit - 1e-6) + 1)
        items, held_out = ([small(i, processor) for i in some if i.task == task] for some in (pool, val))
        bell = max(unit, 0.3 * task.delta)  # ages: 3 years
        subjects.append(Subject(task, values, bell, shuffled(items), partial(first, items), held_out))
    return subjects


def first(items: list[data.Item], count: int) -> list[data.Item]:
    return items[:count]


def small(item: data.Item, processor) -> data.Item:
    """The item, opened once, when it is first looked at."""

    @cache
    def image() -> Image.Image:
        image, size = item.image(), processor.size
        factor = processor.patch_size * processor.merge_size
        h, w = data.smart_size(image.height, image.width, factor, size["shortest_edge"], size["longest_edge"])
        return image.resize((w, h), processor.resample)

    return replace(item, image=image)


def shuffled(items: list[data.Item]) -> Callable[[int, int], list[data.Item]]:
    """Each photograph once before any twice; half of them mirrored, all moved by a few pixels."""

    @cache
    def sampler(count: int) -> data.Sampler:
        return data.Sampler(items, (1,), count, seed=0)

    def fresh(step: int, count: int) -> list[data.Item]:
        rng = random.Random(f"eyes 0 {step}")
        change = lambda: (rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT), rng.random() < 0.5)
        chosen = [sample.items[0] for sample in sampler(count).batch(step)]
        return [replace(item, image=partial(moved, item, *change())) for item in chosen]

    return fresh


def moved(item: data.Item, x: int, y: int, mirrored: bool) -> Image.Image:
    """Its image moved by x, y pixels; what comes in from outside repeats the edge."""
    pixels = np.pad(np.asarray(item.image()), ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    pixels = pixels[SHIFT + y : pixels.shape[0] - SHIFT + y, SHIFT + x : pixels.shape[1] - SHIFT + x]
    return Image.fromarray(np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels))
