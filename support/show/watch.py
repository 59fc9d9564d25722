"""Pictures of a run: every so many steps one group of answers and the curves so far; before and after at the end."""

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from data import Sample
from support.learner.stage import Batch
from support.show.curves import CurvesError, draw_curves, read_run
from support.show.group_sheet import draw_group
from support.show.pictures import draw_before_after
from support.show.tables import finite


def watch_group(folder: Path, stage: int, step: int, batch: Batch) -> None:
    """Write groups/STAGE-STEP.png and a line of groups.jsonl."""
    G = batch.group_size
    # The group whose rewards differ most is the one that says most.
    spread = [max(r.total for r in group) - min(r.total for r in group) for group in batch.groups(batch.rewards)]
    b = spread.index(max(spread))
    rows = slice(b * G, (b + 1) * G)
    sample, texts, scored = batch.samples[b], batch.texts[rows], batch.rewards[rows]
    advantages, mutated = batch.advantages[b].tolist(), batch.mutated[rows].tolist()
    (folder / "groups").mkdir(exist_ok=True)
    title = f"Stage {stage}, step {step}: one prompt and its {G} answers"
    draw_group(sample, texts, scored, advantages, mutated, title, folder / "groups" / f"{stage}-{step:07d}.png")
    line = {
        "stage": stage,
        "step": step,
        "images": [item.name for item in sample.items],
        "labels": sample.labels,
        "question": sample.task.question,
        "answers": [
            {"text": text, "advantage": a, "mutated": m, "format": r.format, "regression": r.regression,
             "ranking": r.ranking, "reward": r.total}
            for text, r, a, m in zip(texts, scored, advantages, mutated, strict=True)
        ],
    }  # fmt: skip
    with open(folder / "groups" / "groups.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line)) + "\n")


def watch_curves(folder: Path) -> None:
    """Write curves.png, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib"):
        try:
            draw_curves({folder.name: read_run(folder)}, folder / "curves.png")
        except CurvesError as error:  # lines of an earlier stage that somebody changed: no reason to stop
            print(f"no curves: {error}", file=sys.stderr)


def compare_policies(folder: Path, names: Iterable[str], samples: dict[int, list[Sample]]) -> None:
    """Write before_after.png: the first test prompt of each number of images, as the policies answered it.

    names    of the policies, whose answers are read from predictions_NAME.jsonl; one that cannot be read is left out
    samples  number of images -> test prompts
    """
    shown = [few[0] for few in samples.values()]
    answers: dict[str, Sequence[dict]] = {}
    for name in names:
        try:
            text = (folder / f"predictions_{name.replace(' ', '')}.jsonl").read_text(encoding="utf-8")
            known = {tuple(p["items"]): p for p in map(json.loads, text.splitlines())}
            answers[name] = [known[tuple(item.name for item in sample.items)] for sample in shown]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    draw_before_after(shown, answers, folder / "before_after.png")
