"""What a run says at its end: two sentences on what was learned, and a model card beside the weights."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from data import Item
from support.atomic_files import write_text
from support.results import Results, results_table
from support.settings import MACHINE, Settings, flag

BLIND_VALUE, BLIND_ORDER = "best constant by MAE", "prompt order"  # rows of eval.blind_rows


def what_was_learned(results: Results) -> str:
    """Two sentences: how far values and order came from the first policy to the last, and what a blind one would get.

    results: rows of policies, the first and the last of them are compared, and those of eval.blind_rows.
    """
    policies = [name for name in results if name == "base" or name.startswith("stage")]
    first, last = policies[0], policies[-1]
    numbers = sorted(results[last])
    errors, blind = (_change(results, names, "mae", numbers) for names in ((first, last), (BLIND_VALUE,)))
    said = [
        f"From {first} to {last}, the mean error of the values went from {errors[0]} to {errors[1]} at "
        f"{' / '.join(map(str, numbers))} images in a prompt; one constant value for all errs by {blind[0]}."
    ]
    several = [n for n in numbers if n > 1]
    if several:
        taus, blind = (_change(results, names, "tau", several) for names in ((first, last), (BLIND_ORDER,)))
        said.append(
            f"Tau of the order went from {taus[0]} to {taus[1]} at {' / '.join(map(str, several))} images; "
            f"the order of the prompt has {blind[0]}."
        )
    return " ".join(said)


def _change(results: Results, names: tuple[str, ...], metric: str, numbers: list[int]) -> list[str]:
    shown = lambda x: "-" if x is None or math.isnan(x) else f"{x:.2f}"
    return [" / ".join(shown(results.get(name, {}).get(n, {}).get(metric)) for n in numbers) for name in names]


def write_model_card(folder: Path, name: str, s: Settings, items: Sequence[Item], results: Results) -> None:
    """README.md in a saved policy's folder.  name: its row in the results.  items: what it was trained on"""
    questions = sorted({item.task.question for item in items})
    defaults = Settings()
    changed = {
        f.name: getattr(s, f.name)
        for f in dataclasses.fields(s)
        if f.name not in MACHINE and getattr(s, f.name) != getattr(defaults, f.name)
    }
    settings = "\n".join(
        f"    {flag(k)} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in changed.items()
    )
    shown = {row: metrics for row, metrics in results.items() if not row.startswith("stage") or row <= name}
    more = f"\n\nand {len(questions) - 5} more" if len(questions) > 5 else ""
    write_text(
        folder / "README.md",
        f"""---
library_name: transformers
pipeline_tag: image-text-to-text
base_model: {s.model}
tags: [rarl, grpo, ordinal-regression, ranking]
---

# {s.data}, {name} of RARL

A Qwen2.5-VL trained by ranking-aware reinforcement learning (RARL, arXiv 2601.20585) to answer, for one or several images,
with a JSON list `[{{"image_id": 2, "value": 17}}, {{"image_id": 1, "value": 23}}]` in ranked order, lowest first.

## Task

{chr(10).join(f"> {question}" for question in questions[:5])}{more}

Data: {s.data}. The exact question, the order, the tolerance and the decimals are in `task.json`.

## Results

On the test split, greedy answers. The last rows of each block are policies that look at no image.

```
{results_table(shown)}
```

## Settings

All but these are the defaults of train.py:

{settings or "    (none)"}

## Use

```python
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

model = Qwen2_5_VLForConditionalGeneration.from_pretrained("{folder.name}")
tokenizer = AutoTokenizer.from_pretrained("{folder.name}")
```

Images must be preprocessed as `preprocessor_config.json` says (Qwen2VLImageProcessor). With the code that trained it:
`python eval.py --model {folder.name} --rank PHOTOS`.
""",
    )
