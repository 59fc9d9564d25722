"""What the loop and support/ share: a stage, the weights of its rewards, and the batch that a rollout leaves for the update."""

import dataclasses
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

import data
import reward


@dataclass(frozen=True)
class RewardWeights:
    """Of R_reg, R_rank and R_format in R_final. Stage 1 has one image in a prompt, so no order."""

    w_reg: float
    w_rank: float
    w_format: float

    def max_reward(self, num_images: int) -> float:
        return self.w_reg + self.w_format + (self.w_rank if num_images > 1 else 0.0)


@dataclass(frozen=True)
class Stage:
    """All that a stage is, before it starts.

    Stage 1: one image, regression (and format). Stage 2: several images, everything.
    """

    number: int
    steps: int
    sampler: data.Sampler
    weights: RewardWeights
    max_new_tokens: int  # the longest answer
    validation: dict[int, list[data.Sample]] = field(default_factory=dict)  # number of images -> prompts

    def reward(self, text: str, sample: data.Sample) -> reward.Reward:
        return reward.compute_reward(text, sample.labels, sample.task.delta, **dataclasses.asdict(self.weights))


def seed_of(*key) -> int:
    """A 63-bit seed for a key such as (seed, stage, step, prompt): each has a stream of its own, on any process."""
    return random.Random(repr(key)).getrandbits(63)


@dataclass
class Batch:
    """What a rollout leaves for the update, this process's part. N = B*G rows, answer g of prompt b in row b*G + g.

    The second block is for the log alone and empty in a micro-batch.
    """

    prompts: list[data.Prompt]  # B
    ids: Tensor  # (N, T)
    mask: Tensor  # (N, T) bool
    sampled_logp: Tensor  # (N, T), 0 at mutated answers
    mutated: Tensor  # (N,) bool
    advantages: Tensor  # (B, G)
    filler: bool = False  # a micro-batch that other processes need company for; its loss counts nothing

    samples: list[data.Sample] = field(default_factory=list)  # B
    texts: list[str] = field(default_factory=list)  # N, after mutation
    sampled_rewards: list[reward.Reward] = field(default_factory=list)  # N, of the answers as sampled
    rewards: list[reward.Reward] = field(default_factory=list)  # N, after mutation: what the advantages come from
    sampled_tokens: Tensor | None = None  # (N,), lengths as sampled
    max_reward: float = 1.0  # the most that an answer of this step could earn

    @property
    def group_size(self) -> int:
        return self.advantages.shape[1]

    def groups(self, rows: list) -> list[list]:
        """N things -> B lists of G."""
        G = self.group_size
        return [rows[i : i + G] for i in range(0, len(rows), G)]

    def take(self, groups: list[int], filler: bool = False) -> "Batch":
        """Some of the groups, as wide as their longest answer."""
        G = self.group_size
        rows = (torch.tensor(groups)[:, None] * G + torch.arange(G)).flatten()  # (their N,)
        width = int(self.mask[rows].sum(1).max())
        ids, mask, sampled_logp = (x[rows, :width] for x in (self.ids, self.mask, self.sampled_logp))
        prompts = [self.prompts[b] for b in groups]
        return Batch(prompts, ids, mask, sampled_logp, self.mutated[rows], self.advantages[groups], filler)
