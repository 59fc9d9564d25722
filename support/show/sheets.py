"""Sheets that people look at: answers of one policy or of several, one group while it trains, ranked images.

All have one width and one size of thumbnail, and are drawn downwards by a `Sheet`.
"""

import contextlib
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import data
import reward
from data import Item, Sample
from support.learner.stage import Batch
from support.show.results import append_line

INK, FAINT, PAPER, LINE = "#1f2328", "#6e7781", "#ffffff", "#d0d7de"
GREEN, ORANGE, RED = "#1a7f37", "#b35900", "#cf222e"
WIDTH, MARGIN, NAME = 1280, 28, 74  # pixels; NAME: room for a policy's name beside its answers
THUMB, GAP, PER_LINE = 128, 14, 8
CELL = THUMB + GAP
TITLE, TEXT, ROW, CAPTION = 22, 14, 26, 24  # letters of the title and of the rest; a row of text; below a thumbnail

_font = lru_cache(ImageFont.load_default)  # it is unpacked anew at every call


class Sheet:
    """A canvas that grows downwards; `y` is how far it is drawn."""

    def __init__(self, title: str, columns: int = PER_LINE):
        self.width = max(WIDTH, 2 * MARGIN + columns * CELL - GAP)
        self.canvas, self.y = Image.new("RGB", (self.width, 1000), PAPER), MARGIN
        self.room(0)
        self.line_of(title, TITLE, INK)
        self.y += 8

    def room(self, height: int) -> None:
        """Make sure that so many pixels are there below."""
        if self.y + height + MARGIN > self.canvas.height:
            grown = Image.new("RGB", (self.width, 2 * self.canvas.height + height), PAPER)
            grown.paste(self.canvas)
            self.canvas = grown
        self.draw = ImageDraw.Draw(self.canvas)

    def write(
        self, x: float, y: float, text: str, room: float, colour: str = INK, size: int = TEXT, anchor: str = "la"
    ) -> float:
        """Write what fits into `room` pixels; of a longer text the middle is left out. -> x behind it"""
        font = _font(size)
        # The built-in font knows little beyond ASCII. A policy may write anything, and a file have any name.
        text = text.replace("\n", " ").encode("ascii", "backslashreplace").decode()
        shown, half = text, min(len(text), 1000) // 2
        while half > 0 and self.draw.textlength(shown, font) > room:
            half -= 1
            shown = f"{text[:half]}...{text[len(text) - half :]}"
        self.draw.text((x, y), shown, fill=colour, font=font, anchor=anchor)
        return x + self.draw.textlength(shown, font)

    def line_of(self, text: str, size: int = TEXT, colour: str = FAINT) -> None:
        """A row of text over the whole width."""
        self.room(ROW)
        self.write(MARGIN, self.y, text, self.width - 2 * MARGIN, colour, size)
        self.y += ROW

    def rule(self) -> None:
        self.draw.line((MARGIN, self.y - 4, self.width - MARGIN, self.y - 4), fill=LINE)

    def thumbnails(
        self, shown: Sequence[tuple[Item, str, str]], left: int = MARGIN, down: int = 0, columns: int = PER_LINE,
        names: bool = False,
    ) -> int:  # fmt: skip
        """Images (item, caption, its colour) in lines, from `down` below y on, with their files' names below if wanted.

        -> where they end. Each is in the middle of a square of THUMB pixels. At 200 : 1 it is a line, never nothing.
        """
        height = THUMB + CAPTION + ROW * names
        for place, (item, caption, colour) in enumerate(shown):
            line, column = divmod(place, columns)
            x, y = left + column * CELL, self.y + down + line * height
            self.room(y - self.y + height)
            image = item.image()
            scale = THUMB / max(image.size)
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            self.canvas.paste(image, (x + (THUMB - image.width) // 2, y + (THUMB - image.height) // 2))
            middle = x + THUMB // 2
            self.write(middle, y + THUMB + 5, caption, CELL - 4, colour, anchor="ma")
            if names:
                self.write(middle, y + THUMB + CAPTION, Path(item.name).name, THUMB, FAINT, TEXT - 2, "ma")
        return self.y + down + math.ceil(len(shown) / columns) * height

    def save(self, path: Path) -> None:
        """PNG, or whatever the path's ending says."""
        self.canvas.crop((0, 0, self.width, self.y + MARGIN)).save(path)


# --- answers ------------------------------------------------------------------------------------------------


def draw_predictions(samples: Sequence[Sample], predictions: Sequence[dict], path: Path, prompts: int = 16) -> None:
    """One sheet of so many samples, spread evenly over all of them, as one policy answered them."""
    chosen = np.linspace(0, len(samples) - 1, min(prompts, len(samples))).round().astype(int)
    draw_answers([samples[i] for i in chosen], {"": [predictions[i] for i in chosen]}, path)


def draw_answers(samples: Sequence[Sample], answers: dict[str, Sequence[dict]], path: Path) -> None:
    """Prompts as policies answered them, one policy below the other. Prompts share a line while they fit.

    Images stand in the *predicted* order; below each the true and the said value, coloured by what the value earns
    (reward.value_reward). An invalid answer shows the images as given, and what was written.

    answers  name of the policy -> its predictions for these samples
    """
    sheet = Sheet("Images in the order of the answer, lowest on the left")
    x: float = MARGIN
    for colour, text in ((FAINT, "The value earns"), (GREEN, "90 % or more"), (ORANGE, "less"), (RED, "nothing")):
        x = sheet.write(x, sheet.y, text, WIDTH, colour) + 18
    sheet.y += ROW
    blocks: list[list[int]] = [[]]  # numbers of the samples in a line
    for k in range(len(samples)):
        if blocks[-1] and sum(len(samples[i].items) for i in [*blocks[-1], k]) > PER_LINE:
            blocks.append([])
        blocks[-1].append(k)
    for block in blocks:
        sheet.rule()
        for name, predictions in answers.items():
            sheet.write(MARGIN, sheet.y + ROW, name, NAME)
            left, bottom = MARGIN + NAME, sheet.y
            for k in block:
                if left > MARGIN + NAME:  # between two prompts
                    sheet.draw.line((left - GAP // 2, sheet.y, left - GAP // 2, sheet.y + ROW + THUMB), fill=LINE)
                # The last of a line has the rest of it: what a base says in prose is longer than an image is wide.
                room = sheet.width - MARGIN - left if k == block[-1] else len(samples[k].items) * CELL - GAP
                bottom = max(bottom, _draw_answer(sheet, left, room, samples[k], predictions[k]))
                left += len(samples[k].items) * CELL
            sheet.y = bottom
            sheet.room(ROW)
        sheet.y += 8
    sheet.save(path)


def _draw_answer(sheet: Sheet, left: int, room: int, sample: Sample, prediction: dict) -> int:
    """How well a prompt was answered, in `room` pixels, below it its images. -> y of its lower edge"""
    task, values = sample.task, prediction["values"]
    about, colour = "not valid: " + (" ".join(prediction["text"].split()) or "(empty)"), RED
    if values is not None:
        errors = [abs(value - label) for value, label in zip(values, sample.labels, strict=True)]
        tau = "" if prediction["tau"] is None else f", tau {prediction['tau']:.2f}"
        about, colour = f"error {sum(errors) / len(errors):.3g}{tau}, {task.name}, delta {task.delta:g}", INK
    sheet.write(left, sheet.y, about, room, colour)
    shown = []
    for image_id in prediction["order"] or range(1, len(sample.items) + 1):
        item = sample.items[image_id - 1]
        caption, colour = f"true {short(item.label, task.decimals)}", FAINT
        if values is not None:
            said = values[image_id - 1]
            caption += f"  said {short(said, task.decimals + 1)}"  # the digit shows 6.5 as not quite 6
            earned = reward.value_reward(said, item.label, task.delta)
            colour = GREEN if earned >= 0.9 else ORANGE if earned > 0 else RED
        shown.append((item, caption, colour))
    return sheet.thumbnails(shown, left, down=ROW)


def compare_policies(folder: Path, names: Iterable[str], samples: dict[int, list[Sample]]) -> None:
    """Write before_after.png: the first test prompt of each number of images, as the policies answered it.

    names    of the policies, whose answers are read from predictions_NAME.jsonl; one that cannot be read is left out
    samples  number of images -> test prompts
    """
    shown = [few[0] for few in samples.values()]
    answers: dict[str, Sequence[dict]] = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            text = (folder / f"predictions_{name.replace(' ', '')}.jsonl").read_text(encoding="utf-8")
            known = {tuple(p["items"]): p for p in map(json.loads, text.splitlines())}
            answers[name] = [known[tuple(item.name for item in sample.items)] for sample in shown]
    draw_answers(shown, answers, folder / "before_after.png")


def short(value: float, decimals: int) -> str:
    """A number for a caption.

    >>> short(12.0, 1), short(3.14159, 2)
    ('12', '3.14')
    """
    return f"{round(value, decimals):.6g}"


# --- one group while it trains --------------------------------------------------------------------------------

# Where the columns of the table end (numbers) or begin (the answers), and the middle of the bars of the advantage.
TABLE = {"text": MARGIN, "format": 710, "regression": 800, "ranking": 875, "reward": 945, "advantage": 1035}
BAR, BAR_LENGTH = 1150, 100


def describe_group(batch: Batch, b: int) -> dict:
    """A prompt of a step with its G answers, after mutation, as JSON can hold it."""
    sample, advantages = batch.samples[b], batch.advantages[b].tolist()
    texts, rewards, mutated = (batch.groups(rows)[b] for rows in (batch.texts, batch.rewards, batch.mutated.tolist()))
    answers = [
        {"text": text, "advantage": a, "mutated": m, "format": r.format, "regression": r.regression,
         "ranking": r.ranking, "reward": r.total}
        for text, r, a, m in zip(texts, rewards, advantages, mutated, strict=True)
    ]  # fmt: skip
    images = [item.name for item in sample.items]
    return {"images": images, "labels": sample.labels, "question": sample.task.question, "answers": answers}


def watch_group(folder: Path, stage: int, step: int, batch: Batch) -> None:
    """Write groups/STAGE-STEP.png and a line of groups.jsonl: the group whose rewards differ most says most."""
    groups = batch.groups(batch.rewards)
    differ = [max(r.total for r in group) - min(r.total for r in group) for group in groups]
    b = differ.index(max(differ))
    path = folder / "groups" / f"{stage}-{step:07d}.png"
    path.parent.mkdir(exist_ok=True)
    group = describe_group(batch, b)
    title = f"Stage {stage}, step {step}: one prompt and its {batch.group_size} answers"
    draw_group(batch.samples[b], group["answers"], title, path)
    append_line(folder / "groups" / "groups.jsonl", {"stage": stage, "step": step} | group)


def draw_group(sample: Sample, answers: Sequence[dict], title: str, path: Path) -> None:
    """The images, the question, all G answers with their rewards and advantages: why the policy was pushed where it was.

    What has a positive advantage becomes more likely, the rest less.  answers: of `describe_group`
    """
    sheet, n = Sheet(title), len(sample.items)
    for line in textwrap.wrap(data.question_text(sample.task, n), 170):
        sheet.line_of(line)
    label = lambda item: data.format_value(item.label, sample.task.decimals)
    sheet.y = sheet.thumbnails([(x, f"image {i}: {label(x)}", INK) for i, x in enumerate(sample.items, 1)]) + 8
    sheet.room((len(answers) + 2) * ROW)
    for name, x in TABLE.items():
        sheet.write(x, sheet.y, name, 400, FAINT, anchor="la" if x == MARGIN else "ra")
    sheet.y += ROW
    largest = max(abs(answer["advantage"]) for answer in answers) or 1.0
    for answer in answers:
        sheet.rule()
        y, left = sheet.y, float(MARGIN)
        if answer["mutated"]:
            left = sheet.write(MARGIN, y, "RMO", 40, ORANGE) + 8
        said = reward.parse_response(answer["text"], n)
        sheet.write(left, y, short_answer(answer["text"], said), TABLE["format"] - left - 70, INK if said else RED)
        for name, x in list(TABLE.items())[1:]:
            number = "-" if n == 1 and name == "ranking" else f"{answer[name]:.2f}"
            sheet.write(x, y, number, 90, anchor="ra")
        advantage = answer["advantage"]
        end = BAR + BAR_LENGTH * advantage / largest
        if advantage:
            colour = GREEN if advantage > 0 else RED
            sheet.draw.rectangle([min(BAR, end), y + 2, max(BAR, end), y + 15], fill=colour)
        sheet.y += ROW
    sheet.save(path)


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


# --- ranked images ------------------------------------------------------------------------------------------


def draw_ranking(items: Sequence[Item], order: Sequence[int], values: Sequence[float | None], path: Path) -> None:
    """A sheet of all images in ranked order, lowest first, line by line.

    order: indices of the items, lowest first. values: of item 0, 1, ...; None: no valid answer, shown as "-"
    """
    n, task = len(items), items[0].task
    columns = max(PER_LINE, math.ceil(math.sqrt(1.3 * n)))  # never much taller than wide
    sheet = Sheet(task.question, columns)
    sheet.line_of(f"{n} image{'s' * (n > 1)}, {task.order}, line by line.  Below each: rank, value; file.")
    value = lambda x: "-" if x is None else short(x, task.decimals + 2)
    shown = [(items[i], f"{rank}:  {value(values[i])}", INK) for rank, i in enumerate(order, start=1)]
    sheet.y = sheet.thumbnails(shown, columns=columns, names=True)
    sheet.save(path)
