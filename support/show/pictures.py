"""Pictures that people look at: answers to evaluation prompts, of one policy or of several, and ranked images."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import reward
from data import Item, Sample
from support.rank import Ranking

INK, FAINT, PAPER, LINE = "#1f2328", "#6e7781", "#ffffff", "#d0d7de"
GOOD, FAIR, POOR = "#1a7f37", "#b35900", "#cf222e"
THUMB, GAP, MARGIN, PER_LINE = 128, 14, 28, 8  # pixels, and thumbnails before a row goes on below
TITLE, HEAD, CAPTION = 84, 30, 34  # pixels: the picture's title, the text above a row, the text below a thumbnail
MIN_WIDTH = 760  # holds the legend


_font = lru_cache(ImageFont.load_default)  # it is unpacked anew at every call


def write(
    draw: ImageDraw.ImageDraw,
    size: int,
    xy: tuple[float, float],
    text: str,
    room: float,
    colour: str,
    anchor: str = "la",
    cut: str = "end",
) -> float:
    """Write what fits into `room` pixels, cut at the end or in the middle. -> x behind it"""
    font = _font(size)
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


def short(value: float, decimals: int) -> str:
    """A number for a caption.

    >>> short(12.0, 1), short(3.14159, 2)
    ('12', '3.14')
    """
    return f"{round(value, decimals):.6g}"


# --- answers ------------------------------------------------------------------------------------------------


def draw_predictions(samples: Sequence[Sample], predictions: Sequence[dict], path: Path, rows: int = 8) -> None:
    """One picture (PNG or whatever the path's ending says) of `rows` samples spread evenly over all of them.

    A row is one prompt: its images in the *predicted* order, below each the true and the said value, coloured
    by the error. The limits follow R_reg = 1 - error^2 / delta^2: from delta on nothing is left of it, within
    delta / 4 at least 93.75 %. The row of an invalid answer shows the images as given, and what was written.
    """
    if len(samples) != len(predictions):
        raise ValueError(f"{len(samples)} samples but {len(predictions)} predictions")
    chosen = np.linspace(0, len(samples) - 1, min(rows, len(samples))).round().astype(int)
    shown = [(samples[i], predictions[i]) for i in chosen]
    columns = min(PER_LINE, max((len(sample.items) for sample, _ in shown), default=1))
    width = max(2 * MARGIN + columns * (THUMB + GAP) - GAP, MIN_WIDTH)
    height = TITLE + sum(_row_height(sample) for sample, _ in shown) + (MARGIN if shown else 0)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_legend(draw, width, "Images in the order of the answer")
    y = TITLE
    for sample, prediction in shown:
        _draw_row_head(draw, y, width, sample, prediction)
        for place, image_id in enumerate(prediction["order"] or range(1, len(sample.items) + 1)):
            corner = MARGIN + place % PER_LINE * (THUMB + GAP), y + HEAD + place // PER_LINE * (THUMB + CAPTION)
            _draw_answered_image(canvas, draw, corner, sample, image_id, prediction["values"])
        y += _row_height(sample)
    canvas.save(path)


def _row_height(sample: Sample) -> int:
    return HEAD + math.ceil(len(sample.items) / PER_LINE) * (THUMB + CAPTION)


def _draw_legend(draw: ImageDraw.ImageDraw, width: int, title: str) -> None:
    write(draw, 22, (MARGIN, 20), title, width, INK)
    x = write(draw, 14, (MARGIN, 54), "Lowest on the left.  Error: ", width, FAINT)
    for colour, text in ((GOOD, "up to delta / 4"), (FAIR, "less than delta"), (POOR, "delta or more (no reward)")):
        x = write(draw, 14, (x, 54), text, width, colour) + 18


def _draw_row_head(draw: ImageDraw.ImageDraw, y: int, width: int, sample: Sample, prediction: dict) -> None:
    """A line, and above the images what was asked and how well it was answered."""
    task, n, values, room = sample.task, len(sample.items), prediction["values"], width - 2 * MARGIN
    draw.line((MARGIN, y, width - MARGIN, y), fill=LINE)
    about = f"{task.name}, {n} image{'s' * (n > 1)}, delta {task.delta:g}"
    if values is None:
        x = write(draw, 14, (MARGIN, y + 8), f"{about}, not a valid answer:  ", room, POOR)
        text = " ".join(prediction["text"].split()) or "(empty)"
        write(draw, 14, (x, y + 8), text, width - MARGIN - x, INK)
        return
    error = sum(abs(value - label) for value, label in zip(values, sample.labels, strict=True)) / n
    tau = reward.kendall_tau(prediction["order"], sample.labels)
    about += f", mean error {error:.4g}" + ("" if math.isnan(tau) else f", tau {tau:.2f}")
    write(draw, 14, (MARGIN, y + 8), about, room, INK)


def _draw_answered_image(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    sample: Sample,
    image_id: int,
    values: list[float] | None,
    side: int = THUMB,
) -> None:
    """One thumbnail with the true value below it, and the said one where there is one."""
    (left, top), item, task = corner, sample.items[image_id - 1], sample.task
    thumbnail = ImageOps.contain(item.image(), (side, side))
    canvas.paste(thumbnail, (left + (side - thumbnail.width) // 2, top + (side - thumbnail.height) // 2))
    caption, colour = f"true {short(item.label, task.decimals)}", FAINT
    if values is not None:
        said = values[image_id - 1]
        error = abs(said - item.label)
        caption += f"  said {short(said, task.decimals + 1)}"  # the digit shows 6.5 as not quite 6
        colour = GOOD if error <= task.delta / 4 else FAIR if error < task.delta else POOR
    write(draw, 14, (left + side // 2, top + side + 6), caption, side + GAP - 4, colour, anchor="ma")


# --- before and after ---------------------------------------------------------------------------------------

SIDE, NAME, BETWEEN = 104, 74, 20  # pixels: a thumbnail, the room for a policy's name, the gap between two prompts


def draw_before_after(samples: Sequence[Sample], answers: dict[str, Sequence[dict]], path: Path) -> None:
    """The same prompts as several policies answered them, a policy below the other. Prompts share a line while they fit.

    answers  name of the policy -> its predictions for these samples
    """
    blocks: list[list[int]] = []  # numbers of the samples in a line
    for k, sample in enumerate(samples):
        if blocks and sum(len(samples[i].items) for i in blocks[-1]) + len(sample.items) <= PER_LINE:
            blocks[-1].append(k)
        else:
            blocks.append([k])
    row = HEAD + SIDE + CAPTION
    most = max([PER_LINE, *(len(sample.items) for sample in samples)])
    width = 2 * MARGIN + NAME + most * (SIDE + GAP) + 3 * BETWEEN
    canvas = Image.new("RGB", (width, TITLE + len(blocks) * (len(answers) * row + MARGIN)), PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_legend(draw, width, "Before and after: the same images in the order of each policy's answer")
    y = TITLE
    for block in blocks:
        draw.line((MARGIN, y, width - MARGIN, y), fill=LINE)
        for name, predictions in answers.items():
            write(draw, 16, (MARGIN, y + HEAD + SIDE // 2 - 8), name, NAME, INK)
            x = MARGIN + NAME
            for k in block:
                sample, prediction = samples[k], predictions[k]
                room = len(sample.items) * (SIDE + GAP)
                _draw_summary(draw, (x, y + 8), sample, prediction, room)
                for place, image_id in enumerate(prediction["order"] or range(1, len(sample.items) + 1)):
                    corner = x + place * (SIDE + GAP), y + HEAD
                    _draw_answered_image(canvas, draw, corner, sample, image_id, prediction["values"], SIDE)
                x += room + BETWEEN
            y += row
        y += MARGIN
    canvas.save(path)


def _draw_summary(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], sample: Sample, prediction: dict, room: int
) -> None:
    """How well a prompt was answered, above its images."""
    if prediction["values"] is None:
        write(draw, 14, corner, "not valid: " + " ".join(prediction["text"].split()), room, POOR)
        return
    errors = [abs(value - label) for value, label in zip(prediction["values"], sample.labels, strict=True)]
    tau = reward.kendall_tau(prediction["order"], sample.labels)
    said = f"mean error {sum(errors) / len(errors):.3g}" + ("" if math.isnan(tau) else f", tau {tau:.2f}")
    write(draw, 14, corner, said, room, INK)


# --- ranked images ------------------------------------------------------------------------------------------


def draw_ranking(items: Sequence[Item], ranking: Ranking, path: Path) -> None:
    """A sheet (PNG or whatever the path's ending says) of all images in ranked order, lowest first, line by line.

    Below each its rank, its value ("-": no valid answer) and its file. The more images, the smaller they are.
    """
    n, task = len(items), items[0].task
    thumb, size = next((t, s) for most, t, s in ((32, 168, 15), (120, 120, 13), (math.inf, 84, 11)) if n <= most)
    gap, line_height = thumb // 8, thumb + 2 * size + thumb // 5
    columns = min(n, max(1312 // (thumb + gap), math.ceil(math.sqrt(1.3 * n))))  # never much taller than wide
    width, top = max(2 * MARGIN + columns * (thumb + gap) - gap, MIN_WIDTH), 96
    canvas = Image.new("RGB", (width, top + math.ceil(n / columns) * line_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    write(draw, 22, (MARGIN, 20), task.question, width - 2 * MARGIN, INK)
    about = f"{n} image{'s' * (n > 1)}, {task.order}, line by line.  Below each: rank, value, file."
    write(draw, 14, (MARGIN, 54), about, width - 2 * MARGIN, FAINT)
    draw.line((MARGIN, top - 14, width - MARGIN, top - 14), fill=LINE)
    for place, i in enumerate(ranking.order):
        x, y = MARGIN + place % columns * (thumb + gap), top + place // columns * line_height
        _paste_thumbnail(canvas, items[i].image(), x, y, thumb)
        known = ranking.values[i]
        value = "-" if known is None else short(known, task.decimals + 2)
        y += thumb + 5
        behind = write(draw, size, (x, y), f"{place + 1}", thumb, FAINT)
        write(draw, size, (x + thumb, y), value, x + thumb - behind - 6, INK, anchor="ra")
        write(draw, size, (x, y + size + 3), Path(items[i].name).name, thumb, FAINT, cut="middle")
    canvas.save(path)


def _paste_thumbnail(canvas: Image.Image, image: Image.Image, x: int, y: int, side: int) -> None:
    """The image in a square of that side, standing on its lower edge. At 200 : 1 it is a line, but never nothing."""
    thumbnail = image.resize(
        (max(1, round(image.width * side / max(image.size))), max(1, round(image.height * side / max(image.size))))
    )
    canvas.paste(thumbnail, (x + (side - thumbnail.width) // 2, y + side - thumbnail.height))
