"""The usual way to sample and score a group with transformers: the prompt and its pixels are repeated for every answer.

The tests hold rarl.py to its numbers, and bench.py measures against its speed. It is what TRL 1.16 and its like do: the prompt
is repeated G times and padded on the left; `model.generate` with sdpa attention and a cache of every copy; one forward over
[prompt | answer] x N, the head on answer positions only (logits_to_keep), log-softmax row by row, entropy without gradient.

Legend of shapes: rarl.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

import rarl


def set_way(policy: rarl.Policy, way: str) -> None:
    """Our attention and patch embedding ("ours") or transformers' own ("usual"), on the same weights."""
    policy.model.set_attn_implementation(rarl.ATTENTION if way == "ours" else "sdpa")
    policy.model.model.visual.patch_embed.__class__ = rarl.PatchEmbed if way == "ours" else Qwen2_5_VisionPatchEmbed


@contextmanager
def transformers_alone(policy: rarl.Policy) -> Iterator[None]:
    """Inside, nothing of rarl.py takes part in the model's forward."""
    set_way(policy, "usual")
    try:
        yield
    finally:
        set_way(policy, "ours")


def repeat_inputs(
    policy: rarl.Policy, prompts: Sequence[rarl.Prompt], G: int, answers: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """Inputs of transformers' own forward: N = B*G rows [prompt, padded on the left | answer], pixels G times.

    answers  their ids and mask, both (N, T); None: prompts alone
    """
    P = max(len(p.ids) for p in prompts)
    embed = policy.model.model.visual.patch_embed
    floats = lambda pixels: rarl.float_patches(pixels, embed.levels, embed.temporal_patch_size)
    left = lambda x: F.pad(x, (P - len(x), 0))
    rows = torch.stack([left(p.ids) for p in prompts]).repeat_interleave(G, 0).to(policy.device)  # (N, P)
    real = torch.stack([left(torch.ones_like(p.ids)) for p in prompts]).repeat_interleave(G, 0).to(policy.device)
    if answers is not None:
        ids, mask = answers
        rows, real = torch.cat([rows, ids], 1), torch.cat([real, mask.long()], 1)  # (N, P + T)
    return dict(
        input_ids=rows,
        attention_mask=real,
        pixel_values=torch.cat([floats(p.pixels) for p in prompts for _ in range(G)]).to(policy.device),
        image_grid_thw=torch.cat([p.grid for p in prompts for _ in range(G)]).to(policy.device),
        mm_token_type_ids=(rows == policy.model.config.image_token_id).int(),
    )


@torch.no_grad()
def usual_generate(policy: rarl.Policy, prompts: Sequence[rarl.Prompt], G: int, T: int) -> Tensor:
    """-> (N, T) sampled tokens. There is no EOS, so that every answer takes its full length."""
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=T, pad_token_id=policy.eos_id)
    policy.model.generation_config = config  # the model's own would fill in its EOS and the tokens never sampled
    return policy.model.generate(**repeat_inputs(policy, prompts, G), generation_config=config)[:, -T:]


def usual_logprobs(
    policy: rarl.Policy, prompts: Sequence[rarl.Prompt], ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """-> (N, T) log-probs and entropies."""
    N, T = ids.shape
    inputs = repeat_inputs(policy, prompts, N // len(prompts), (ids, mask))
    logits = policy.model(**inputs, logits_to_keep=T + 1, use_cache=False).logits  # (N, T+1, V)
    logits = logits.masked_fill_(policy.banned, -torch.inf)[:, :-1]  # in place: no second copy of the largest tensor
    logz = torch.stack([row.float().logsumexp(-1) for row in logits])  # (N, T)
    with torch.no_grad():
        p = [(row.float() - z[:, None]).exp() for row, z in zip(logits, logz, strict=True)]
        entropy = torch.stack([torch.special.entr(row).sum(-1) for row in p])
    return logits.gather(-1, ids[..., None]).squeeze(-1).float() - logz, entropy
