"""One shape of work, run our way or the usual way on the same weights: rollout, update, whole step.  Legend of shapes: rarl.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import grpo
import rarl
from data import Prompt
from experiments.usual_way import set_way, usual_generate, usual_logprobs

WAYS = ("ours", "usual")
# How far ours may be from the usual way in float32, in times of how far the usual way in the job's dtype is. The largest of
# thousands of differences varies more than the rest (on a CPU it was up to 1.6 times as large, or two thirds).
MAY_BE = {"log-probs": 1.5, "of sampled answers": 1.5, "the furthest of them": 2.0, "gradients": 1.5}
ROUNDING = 5e-5  # and by this much besides, of float32: on tiny's random answers with G = 16 each way is about 1e-5 away from float64


@dataclass
class Job:
    """Work of one shape. `ids` (N, T) are random answers, `advantages` (N,) are random too: only the work is measured."""

    policy: rarl.Policy
    sampler: rarl.Policy  # the policy itself, or its copy in bfloat16; it is the reference too, whose work is the same
    prompts: list[Prompt]
    ids: Tensor
    advantages: Tensor
    micro: int  # prompts in one forward of the update
    dtype: torch.dtype

    def __post_init__(self) -> None:
        # lr is tiny: a step must cost what it costs, and leave the weights (nearly) what they were.
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-9, weight_decay=0.0, fused=True)

    @property
    def G(self) -> int:
        return len(self.ids) // len(self.prompts)

    def use(self, way: str) -> None:
        for policy in (self.policy, self.sampler):
            set_way(policy, way)

    def rollout(self, way: str) -> Tensor:
        if way == "ours":
            return rarl.generate(self.sampler, self.prompts, self.G, self.ids.shape[1]).ids
        return usual_generate(self.sampler, self.prompts, self.G, self.ids.shape[1])

    def update(self, way: str, with_kl: bool = False) -> list[Tensor]:
        """Gradients of the GRPO loss, added to .grad. -> log-probs, micro-batch by micro-batch"""
        logprobs = rarl.logprobs if way == "ours" else usual_logprobs
        self.policy.train(self.policy.model.is_activation_checkpointing)  # it needs training mode; Qwen has no dropout
        half = self.dtype == torch.bfloat16  # no cache, as in train.py: it would hold a bf16 copy of all weights
        amp = torch.autocast(self.policy.device.type, torch.bfloat16, enabled=half, cache_enabled=False)
        logps = []
        for b in range(0, len(self.prompts), self.micro):
            prompts, rows = self.prompts[b : b + self.micro], slice(b * self.G, (b + self.micro) * self.G)
            ids, mask, ref_logp = self.ids[rows], torch.ones_like(self.ids[rows], dtype=torch.bool), None
            with amp:
                logp, _ = logprobs(self.policy, prompts, ids, mask)
                if with_kl:
                    with torch.no_grad():
                        ref_logp, _ = logprobs(self.sampler, prompts, ids, mask)
            loss, _ = grpo.grpo_loss(logp, None, ref_logp, self.advantages[rows], mask, denominator=len(self.ids))
            loss.backward()
            logps.append(logp.detach())
        self.policy.eval()
        return logps

    @torch.no_grad()
    def reference(self, way: str) -> None:
        """Log-probs of the reference, without gradient."""
        logprobs = rarl.logprobs if way == "ours" else usual_logprobs
        for b in range(0, len(self.prompts), self.micro):
            ids = self.ids[b * self.G : (b + self.micro) * self.G]
            prompts, mask = self.prompts[b : b + self.micro], torch.ones_like(ids, dtype=torch.bool)
            logprobs(self.sampler, prompts, ids, mask)

    def step(self, way: str) -> None:
        if self.sampler is not self.policy:
            with torch.no_grad():
                torch._foreach_copy_(list(self.sampler.parameters()), list(self.policy.parameters()))
        self.rollout(way)  # the update then scores `ids`, not what was sampled: the same answers in both ways
        self.update(way, with_kl=True)
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.policy.parameters() if p.grad is not None]


def compare_ways(job: Job) -> dict[str, tuple[float, float]]:
    """How far ours is from the usual way in float32, and how far it may be, which is what the usual way in the job's dtype tells.

    In bfloat16 nobody is exact, and how much of a gradient rounding takes depends on how much of it cancels: with random
    advantages either way is 2 to 35 % from float32, and ours is a third of that from the usual way (computed, tiny).
    """
    few = job.prompts[: job.micro]
    job.use("ours")
    rollout = rarl.generate(job.sampler, few, job.G, job.ids.shape[1])

    def found(job: Job, way: str) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Log-probs of given answers, of sampled ones; gradients, which are those in .grad."""
        job.use(way)
        job.optimizer.zero_grad(set_to_none=False)
        given = torch.cat(job.update(way))
        if way == "ours":
            return given, rollout.logp, job.gradients()
        with torch.no_grad():
            return given, usual_logprobs(job.sampler, few, rollout.ids, rollout.mask)[0], job.gradients()

    given, sampled, gradients = found(replace(job, dtype=torch.float32, sampler=job.policy), "usual")
    gradients = [g.to("cpu", copy=True) for g in gradients]  # in host memory: 3 B are large

    def apart(way: str) -> list[float]:  # in the order of MAY_BE
        theirs = found(job, way)
        gaps = _gaps(theirs[0], given).flatten(), _gaps(theirs[1], sampled).flatten()
        rms = [float(x.square().mean().sqrt()) for x in gaps]
        return [*rms, float(torch.cat(gaps).abs().max()), _relative(theirs[2], gradients)]

    usual = [0.0] * len(MAY_BE) if job.dtype == torch.float32 else apart("usual")
    ours = apart("ours")
    job.optimizer.zero_grad(set_to_none=False)
    return {name: (x, ROUNDING + MAY_BE[name] * y) for name, x, y in zip(MAY_BE, ours, usual, strict=True)}


def _relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """|a - b| / |b| of all tensors together."""
    norm = lambda tensors: torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]).norm()
    return float(norm(x.cpu() - y for x, y in zip(a, b, strict=True)) / norm(b))


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """a - b, relative where |b| > 1: a trained policy finds random answers absurd (log-probs of -30), and float32 has 7 digits."""
    return (a - b) / b.abs().clamp(min=1)


def noise_prompts(policy: rarl.Policy, B: int, images: int, pixels: int) -> list[Prompt]:
    """Prompts of slightly different lengths: text, noise images with their marks, text."""
    config, rng = policy.model.config, torch.Generator().manual_seed(0)
    side = pixels // config.vision_config.patch_size
    width = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    text = (~policy.banned.cpu()).nonzero().flatten()
    image = [config.vision_start_token_id, *[config.image_token_id] * (side // 2) ** 2, config.vision_end_token_id]
    prompts = []
    for b in range(B):
        words = text[torch.randint(len(text), (64 + b % 16,), generator=rng)]
        ids = torch.cat([words[:32], torch.tensor(image * images), words[32:]])
        patches = torch.randn(images * side * side, width, generator=rng)
        prompts.append(Prompt(ids, patches, torch.tensor([[1, side, side]] * images)))
    return prompts
