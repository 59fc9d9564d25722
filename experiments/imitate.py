"""Supervised fine-tuning, the plain rival of reinforcement learning: train.py on the true answers in place of sampled ones.

    python -m experiments.imitate --beta 0 --name imitation

Prompts, steps, optimizer and evaluation are train.py's. Each prompt has one answer, the true one, with advantage 1. The ratio
is 1 (one update per rollout), so the gradient is that of -mean_t log pi(o_t), and with --beta 0 nothing else is added.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import torch

import data
import train
from experiments.lessons import answers_of


def collect(learner, stage, step, samples, prompts, history) -> train.Batch:
    """In the place of train.collect: the true answer to each of B prompts."""
    texts = [data.reference_answer(sample) for sample in samples]
    ids, mask = (x.to(learner.policy.device) for x in answers_of(learner.policy, texts))  # (B, T) each
    B, logp = len(texts), torch.zeros(ids.shape, device=ids.device)  # of answers that nobody sampled
    scored = [stage.reward(text, sample) for text, sample in zip(texts, samples, strict=True)]
    return train.Batch(
        prompts, ids, mask, logp, torch.ones(B, dtype=torch.bool), torch.ones(B, 1),
        good=torch.ones(B, dtype=torch.bool), samples=samples, texts=texts, rewards=scored, scored=scored, sampled_tokens=mask.sum(1),
        max_reward=stage.weights.max_reward(len(samples[0].items)),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    train.collect = collect
    train.main(argv)


if __name__ == "__main__":
    main()
