"""One group as a picture: the images, the question, all G answers with their rewards and advantages.

It shows why the policy was pushed where it was: what has a positive advantage becomes more likely, the rest less.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

import data
import reward
from support.show.pictures import FAINT, FAIR, GAP, GOOD, INK, LINE, MARGIN, PAPER, PER_LINE, POOR, THUMB, write

WIDTH, ROW, TEXT = 1280, 26, 15  # pixels: the picture, a row of the table, its letters
# Where the columns of the table end (numbers) or begin (the bar of the advantage).
COLUMNS = {"answer, in the order listed": MARGIN, "format": 740, "R_reg": 815, "R_rank": 890, "reward": 965, "A": 1040}
BAR, BAR_WIDTH = 1150, 100  # the middle of the bars, and the length of one of the largest advantage


def draw_group(
    sample: data.Sample,
    texts: Sequence[str],
    rewards: Sequence[reward.Reward],
    advantages: Sequence[float],
    mutated: Sequence[bool],
    title: str,
    path: Path,
) -> None:
    """Draw one group. texts, rewards, advantages, mutated: G each, after mutation and scored again."""
    question = textwrap.wrap(data.question_text(sample.task, len(sample.items)), 170)
    top = 64 + 20 * len(question)
    lines = -(-len(sample.items) // PER_LINE)  # of images
    table = top + lines * (THUMB + 36) + 24
    canvas = Image.new("RGB", (WIDTH, table + ROW * (len(texts) + 1) + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    write(draw, 22, (MARGIN, 18), title, WIDTH - 2 * MARGIN, INK)
    for i, line in enumerate(question):
        write(draw, TEXT, (MARGIN, 52 + 20 * i), line, WIDTH - 2 * MARGIN, FAINT)
    for i, item in enumerate(sample.items):
        left, y = MARGIN + i % PER_LINE * (THUMB + GAP), top + i // PER_LINE * (THUMB + 36)
        image = ImageOps.contain(item.image(), (THUMB, THUMB))
        canvas.paste(image, (left + (THUMB - image.width) // 2, y + (THUMB - image.height) // 2))
        label = data.format_value(item.label, sample.task.decimals)
        write(draw, TEXT, (left + THUMB // 2, y + THUMB + 6), f"image {i + 1}: {label}", THUMB, INK, anchor="ma")
    _draw_table(draw, table, texts, rewards, advantages, mutated, one_image=len(sample.items) == 1)
    canvas.save(path)


def _draw_table(draw: ImageDraw.ImageDraw, top: int, texts, rewards, advantages, mutated, one_image: bool) -> None:
    for name, x in COLUMNS.items():
        write(draw, TEXT, (x, top), name, 400, FAINT, anchor="la" if x == MARGIN else "ra")
    largest = max((abs(a) for a in advantages), default=0) or 1.0
    for row, (text, scored, advantage, was_mutated) in enumerate(
        zip(texts, rewards, advantages, mutated, strict=True), start=1
    ):
        y = top + ROW * row
        draw.line((MARGIN, y - 4, WIDTH - MARGIN, y - 4), fill=LINE)
        left = MARGIN
        if was_mutated:
            draw.rectangle([MARGIN, y - 1, MARGIN + 42, y + 18], fill=FAIR)
            write(draw, TEXT, (MARGIN + 5, y), "RMO", 40, PAPER)
            left += 52
        colour = INK if scored.answer else POOR
        write(draw, TEXT, (left, y), short_answer(text, scored.answer), COLUMNS["format"] - left - 70, colour)
        numbers = [scored.format, scored.regression, None if one_image else scored.ranking, scored.total, advantage]
        for number, x in zip(numbers, list(COLUMNS.values())[1:], strict=True):
            write(draw, TEXT, (x, y), "-" if number is None else f"{number:.2f}", 90, INK, anchor="ra")
        end = BAR + BAR_WIDTH * advantage / largest
        if advantage:
            draw.rectangle([min(BAR, end), y + 2, max(BAR, end), y + 15], fill=GOOD if advantage > 0 else POOR)


def short_answer(text: str, answer: list[tuple[int, float]] | None) -> str:
    """An answer in few words: "image 2: 17, image 1: 23"; what was written, if it is not valid.

    >>> short_answer('[{"image_id": 2, "value": 17}]', [(2, 17.0)])
    'image 2: 17'
    """
    if answer is None:
        return "not valid: " + " ".join(text[:300].split())
    if len(answer) <= 4:
        return ", ".join(f"image {image}: {value:g}" for image, value in answer)
    return "  ".join(f"#{image}: {value:g}" for image, value in answer)
