"""The README's three recipes run as printed, on a small budget."""

import re
from pathlib import Path

import pytest
from PIL import Image
from runs import ROOT, SMALL, lines

import reward
import train
from support.datasets.readers import READERS

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```python\n(.*?)```", README.split("### Three recipes")[1].split("\n### ")[0], re.S)


def run(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    honest = train.main
    monkeypatch.setattr(train, "main", lambda argv: honest([*SMALL, "--steps1", "1", "--steps2", "1", *argv]))
    exec(compile(recipe, "recipe", "exec"), {})


@pytest.fixture(autouse=True)
def undo(monkeypatch):
    """A recipe changes modules; whatever it did is taken back."""
    monkeypatch.setattr(reward, "compute_reward", reward.compute_reward)
    for name in list(READERS):
        monkeypatch.setitem(READERS, name, READERS[name])


def test_there_are_three():
    assert len(RECIPES) == 3


def test_change_the_reward(monkeypatch, tmp_path):
    run(RECIPES[0], monkeypatch, tmp_path)
    text = '[{"image_id": 1, "value": 12}]'
    # An error of delta / 2: exp(-2 / 4) = 0.607 in the place of 0.75, and the format.
    scored = reward.compute_reward(text, [10], 4)
    assert scored.regression == pytest.approx(0.6065, abs=1e-4) and scored.total == pytest.approx(1.6065, abs=1e-4)
    assert reward.compute_reward("no", [10], 4) == (0, 0, 0, 0)
    assert lines(tmp_path / "runs/rarl/metrics.jsonl")[0]["mae"] is not None


def test_add_a_data_set(monkeypatch, tmp_path):
    (tmp_path / "apples").mkdir()
    for i in range(60):
        Image.new("RGB", (56, 56), (4 * i, 0, 0)).save(tmp_path / "apples" / f"{i % 10}_{i}.png")
    try:
        run(RECIPES[1], monkeypatch, tmp_path)
    finally:
        READERS.pop("apples", None)
    assert "apples" in Path(tmp_path / "runs/rarl/stage2/task.json").read_text()


def test_take_the_rollout_along(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    recipe = RECIPES[2].replace('"tiny"', repr(str(ROOT / "tiny")))
    run(recipe, monkeypatch, tmp_path)
    assert capsys.readouterr().out.strip().startswith("[")
