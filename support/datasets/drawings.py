"""Drawn data sets, `dots` and `dials`: nothing to download, and labels without noise. A drawing's name is its seed."""

import math
import random
from collections.abc import Callable
from functools import partial

from PIL import Image, ImageDraw

from data import Item, Task

CANVAS = 84  # pixels: 6 x 6 patches, 9 tokens
DRAWN_SIZE = {"train": 2048, "val": 256, "test": 512}

DOTS = Task("dots", "How many dots are in the image?", "from the fewest dots to the most", delta=2)
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
