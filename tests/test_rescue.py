"""experiments/rescue.py: a base without any valid answer, what is read of the runs, and when they are trained anew."""

import json

import pytest
import torch
from runs import ROOT

import data
import rarl
from experiments import rescue
from experiments.commands import CommandError
from support.datasets import load_dataset


def write_steps(folder, *formats):
    folder.mkdir(parents=True)
    lines = [
        {"stage": 1, "step": i, "format": x, "zero_spread": 1 - x, "regression": x / 2, "mutated": 0.125}
        for i, x in enumerate(formats)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_base_is_taught_prose_once(tmp_path, monkeypatch):
    """Three steps of many: prose becomes likelier, the eyes stay. Another tiny/ would get a folder of its own."""
    monkeypatch.chdir(tmp_path)
    folder = rescue.make_base(ROOT / "tiny", most_steps=3)
    samples = data.make_samples(load_dataset("dots", split="test"), 1, 2)
    tiny, base = rarl.load_policy(ROOT / "tiny"), rarl.load_policy(folder)
    ids = rarl.encode(tiny, [rescue.PROSE])[0].expand(2, -1)
    before, after = (rarl.logprobs(p, data.make_prompts(p, samples), ids, ids >= 0)[0].mean() for p in (tiny, base))
    assert after > before + 0.5
    eyes = [p.model.model.visual.blocks[0].mlp.down_proj.weight for p in (tiny, base)]
    assert torch.equal(*eyes)
    monkeypatch.setattr(rarl, "logprobs", None)  # whoever trains, fails
    assert rescue.make_base(ROOT / "tiny") == folder


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rescue, "make_base", lambda tiny: tmp_path / "base")
    trained = []

    def train_all(self, runs, jobs):
        for run in runs:
            trained.append(run)
            write_steps(run.folder, *((0.0, 0.0, 0.0) if "without" in run.name else (0.0, 0.5, 1.0)))

    monkeypatch.setattr(rescue.Trainer, "train_all", train_all)
    rescue.rescue(["--seeds", "4", "5", "--steps", "3"])
    assert [run.name for run in trained] == [f"rescue-{v}-RMO-{seed}" for v in ("with", "without") for seed in (4, 5)]
    for run in trained:
        s = run.settings
        assert (s["model"], s["stage"], s["steps1"], s["images"]) == (str(tmp_path / "base"), 1, 3, [1])
        assert (s["rmo_k"], s["rmo_probability"]) == ((0, 0.5) if "without" in run.name else (1, 1.0))
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "with RMO 0%, 0% 2, 2 100%, 100% 12.5%, 12.5%" in lines
    assert "without RMO 0%, 0% never, never 0%, 0% 12.5%, 12.5%" in lines
    assert (tmp_path / "runs/rescue.txt").exists() and (tmp_path / "runs/rescue.png").stat().st_size > 5000


@pytest.mark.parametrize("damage", ["", "{", '{"stage": 1}\n' * 2, '{"format": 0.5}\n'])
def test_a_damaged_run_is_named(tmp_path, damage):
    write_steps(tmp_path / "run", 0.0, 0.5)
    assert [step["format"] for step in rescue.read_steps(tmp_path / "run", 2)] == [0.0, 0.5]
    (tmp_path / "run" / "metrics.jsonl").write_text(damage)
    with pytest.raises(CommandError, match="metrics.jsonl is damaged .* delete"):
        rescue.read_steps(tmp_path / "run", 2)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps", "0"], "--steps"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--out", "x/\0.png"], "--out: x"),
        (["--out", "x.xyz"], "--out x.xyz must end in .png"),
    ],
)
def test_bad_settings_are_found_before_anything_runs(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=message):
        rescue.rescue(argv)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
