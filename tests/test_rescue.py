"""experiments/rescue.py: a base without any valid answer, and what is read of the runs. How they are trained: test_ablate.py."""

import torch
from runs import ROOT

import data
import rarl
from experiments import rescue
from experiments.runs import Outcome
from support.datasets import load_dataset


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
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(rescue, "make_base", lambda tiny: tmp_path / "base")
    trained = []
    monkeypatch.setattr(rescue.Trainer, "train_all", lambda self, runs, jobs: trained.extend(runs))

    def read(run):
        valid = (0.0, 0.0, 0.0) if "without" in run.name else (0.0, 0.5, 1.0)
        log = [{"format": x, "zero_spread": 1 - x, "regression": x / 2, "mutated": 0.125} for x in valid]
        return Outcome({}, {}, {}, {1: log})

    monkeypatch.setattr(rescue, "read_run", read)
    rescue.rescue(["--seeds", "4", "5", "4", "--steps", "3"])
    assert [run.name for run in trained] == [f"rescue-{v}-RMO-{seed}" for v in ("with", "without") for seed in (4, 5)]
    for run in trained:
        s = run.settings
        assert (s.model, s.stage, s.steps1, s.images) == (str(tmp_path / "base"), 1, 3, (1,))
        assert (s.rmo_k, s.rmo_probability) == ((0, 0.5) if "without" in run.name else (1, 1.0))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "with RMO 0%, 0% 2, 2 100%, 100% 12.5%, 12.5%" in lines
    assert "without RMO 0%, 0% never, never 0%, 0% 12.5%, 12.5%" in lines
    assert (tmp_path / "runs/rescue.txt").exists() and (tmp_path / "runs/rescue.png").exists()
