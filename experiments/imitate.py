"""Supervised fine-tuning, the plain rival of reinforcement learning: train.py on the true answers in place of sampled ones.

    python -m experiments.imitate --beta 0 --name imitation

Prompts, steps, optimizer and evaluation are train.py's. Each prompt has one answer, the true one, with advantage 1. The ratio
is 1 (one update per rollout), so the gradient is that of -mean_t log pi(o_t), and with --beta 0 nothing else is added.
"""

import support.quiet_end  # isort: skip  # noqa: F401

import torch

import data
import rarl
import train


def collect(learner, stage, step, samples, prompts, history) -> train.Batch:
    """In the place of train.collect: the true answer to each of B prompts."""
    texts = [data.reference_answer(sample) for sample in samples]
    answers = rarl.encode(learner.policy, texts)
    B, T = len(texts), max(map(len, answers))
    nothing = torch.full((B, T), learner.policy.eos_id), torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T)
    device = learner.policy.device
    rollout = rarl.Rollout(*(x.to(device) for x in nothing))
    truth = train.with_mutated(learner.policy, rollout, [True] * B, texts)
    scored = [stage.reward(text, sample) for text, sample in zip(texts, samples, strict=True)]
    return train.Batch(
        prompts, truth.ids, truth.mask, truth.logp, torch.ones(B, dtype=torch.bool), torch.ones(B, 1),
        samples=samples, texts=texts, rewards=scored, scored=scored, sampled_tokens=truth.mask.sum(1),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    train.collect = collect
    train.main(argv)


if __name__ == "__main__":
    main()
