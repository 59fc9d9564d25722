"""A base that never answers in the asked format: tiny/ after it was taught, by imitation, to answer every question in prose."""

from pathlib import Path

import torch

import data
import rarl
from experiments.runs import ROOT
from support.datasets import load_dataset

PROSE = "I cannot tell."


def in_prose(most_steps: int = 300) -> rarl.Policy:
    policy = rarl.load_policy(ROOT / "tiny")
    policy.model.model.visual.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-4)
    sampler = data.Sampler(load_dataset("dots"), (1,), batch_size=16, seed=0)
    (prose,) = rarl.encode(policy, [PROSE])  # (T,)
    for step in range(most_steps):
        prompts = data.make_prompts(policy, sampler.batch(step))
        ids = prose.expand(len(prompts), -1)  # (B, T)
        logp, _ = rarl.logprobs(policy, prompts, ids, torch.ones_like(ids, dtype=torch.bool))
        loss = -logp.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 1e-4:  # then hardly one answer in a thousand is another one
            break
    return policy


def write(folder: Path) -> None:
    rarl.save_policy(in_prose(), folder)
