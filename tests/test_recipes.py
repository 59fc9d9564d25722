"""The examples in the README and in docs/lora.md run as printed, on a small budget."""

import json
import math
import re

import pytest
from PIL import Image
from runs import ROOT, SMALL, TINY, lines

import eval as evaluation
import reward
import train
from support.datasets.readers import READERS

BLOCK = re.compile(r"```python\n(.*?)```", re.S)
RECIPES = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8").split("## Recipes")[1].split("\n## ")[0])
MERGE = BLOCK.findall((ROOT / "docs" / "lora.md").read_text(encoding="utf-8"))
SHORT = [*SMALL, *TINY, "--eval-samples", "2", "--validate-every", "0"]


@pytest.fixture
def run(monkeypatch, here, signals):
    """Runs a recipe in an empty folder; whatever it changed is taken back."""
    for module, name in ((reward, "value_reward"), (train, "collect")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr("support.datasets.readers.READERS", READERS)
    train_main, eval_main, readers = train.main, evaluation.main, set(READERS)
    monkeypatch.setattr(train, "main", lambda argv: train_main([*SHORT, *argv]))
    monkeypatch.setattr(evaluation, "main", lambda argv: eval_main([*argv, "--samples", "2", "--out", "evaluated"]))
    yield lambda recipe: exec(compile(recipe.replace('"tiny"', repr(str(ROOT / "tiny"))), "recipe", "exec"), {})
    for name in set(READERS) - readers:
        del READERS[name]


def test_there_are_four():
    assert len(RECIPES) == 4 and len(MERGE) == 1


def test_change_the_reward(run, tmp_path):
    """Everywhere: in training, in eval.py, and in the policies that look at no image."""
    run(RECIPES[0])
    # An error of delta / 2: exp(-2 / 4) = 0.607 in the place of 0.75, and the format.
    scored = reward.compute_reward('[{"image_id": 1, "value": 12}]', [10], 4)
    assert scored.regression == pytest.approx(0.6065, abs=1e-4) and scored.total == pytest.approx(1.6065, abs=1e-4)
    assert reward.compute_reward("no", [10], 4) == (0, 0, 0, 0)
    for p in lines(tmp_path / "evaluated" / "predictions.jsonl"):
        errors = [(value - label) / 2 for value, label in zip(p["values"], p["labels"], strict=True)]
        assert p["regression"] == pytest.approx(sum(math.exp(-2 * e * e) for e in errors) / len(errors))
    labels = [p["labels"][0] for p in lines(tmp_path / "evaluated" / "predictions.jsonl") if len(p["labels"]) == 1]
    blind = json.loads((tmp_path / "evaluated" / "results.json").read_text())["best constant by MAE"]["1"]
    earned = [math.exp(-2 * ((blind["constant"] - label) / 2) ** 2) for label in labels]
    assert blind["regression"] == pytest.approx(sum(earned) / len(earned))


def test_a_new_advantage(run, monkeypatch):
    batches, update = [], train.update
    monkeypatch.setattr(
        train, "update", lambda learner, optimizer, batch: batches.append(batch) or update(learner, optimizer, batch)
    )
    run(RECIPES[1].replace("main([])", 'main(["--stage", "1"])'))
    for b, group in enumerate(batches[0].groups(batches[0].rewards)):
        mean = sum(r.total for r in group) / len(group)
        assert batches[0].advantages[b].tolist() == pytest.approx([r.total - mean for r in group], abs=1e-6)


def test_add_a_data_set(run, tmp_path):
    (tmp_path / "apples").mkdir()
    for i in range(20):
        Image.new("RGB", (56, 56), (4 * i, 0, 0)).save(tmp_path / "apples" / f"{i % 10}_{i}.png")
    run(RECIPES[2].replace('"apples"])', '"apples", "--stage", "1"])'))
    assert "apples" in (tmp_path / "runs/rarl/stage1/task.json").read_text()


def test_take_the_rollout_along(run, capsys):
    run(RECIPES[3])
    assert capsys.readouterr().out.strip().startswith("[")


def test_an_adapter_becomes_whole_weights(run, tmp_path):
    train.main(["--lora-rank", "4", "--lr", "3e-3", "--steps1", "0"])
    run(MERGE[0])
    evaluation.main(["--model", "merged", "--data", "dots", "--images", "2"])
    ours = lines(tmp_path / "runs/rarl/predictions_stage2.jsonl")
    assert [p["text"] for p in lines(tmp_path / "evaluated/predictions.jsonl")] == [
        p["text"] for p in ours if len(p["labels"]) == 2
    ]
