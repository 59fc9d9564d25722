"""GRPO: group advantages, KL to the reference and the clipped loss, as plain functions of tensors.

Version 2026.11 of "RARL, by hand"; runs with Python 3.11, torch 2.13.

G answers o_i to one prompt get rewards r_i. Their mean is the baseline, so no critic has to be learned:

    A_i   = (r_i - mean(r)) / std(r)                                           group_advantages
    rho   = pi_theta(o_t) / pi_old(o_t)                                        per token
    k3    = exp(d) - d - 1,   d = log pi_ref(o_t) - log pi_theta(o_t)          kl_k3
    loss  = mean_i mean_t [ beta k3 - min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i) ]   grpo_loss

Sources: DeepSeekMath (arXiv 2402.03300, section 4.1) and RARL (arXiv 2601.20585), which trains with it.

Choices and differences:
1. std is the population's (over G, not G - 1), and eps is added to it. A group whose rewards are all equal gets
   exact zeros.
2. The lower and the upper clip bound are two arguments. train.py sets both by --clip, as in DeepSeekMath.
   clip_high > clip_low is DAPO's "clip-higher" (arXiv 2503.14476), which lets unlikely tokens grow.
3. normalize="sequence" is DeepSeekMath's mean of means: all answers weigh the same, so a token of a short answer
   weighs more. normalize="token" is DAPO's: all tokens weigh the same. The summaries of RARL do not say which.
4. Above a log-ratio of 10 (BOUND), exp is continued by its tangent (`bounded_exp`). Such ratios come from answers that the
   policy did not sample, such as the mutated ones of rmo.py.
5. `denominator` normalises by the whole batch where a call sees only a part of it.
6. pi_old is the policy before the first update on a rollout, scored by the same forward as pi_theta. The log-probs
   that came with the samples never enter the ratio: sampling runs other kernels, on a GPU in bf16, and their
   rounding would look like a change of the policy. With one update per rollout old_logp is None: the ratio is
   exactly 1, and the gradient is A times that of logp.
7. A mutated answer (rmo.py) has no sampling log-probs. Its old_logp comes from the same scoring as that of the
   others, so its ratio also starts at 1, and the update pulls towards it by its advantage.

Shapes: B prompts, G answers per prompt, N = B*G answers, T answer tokens.
"""

import torch
from torch import Tensor

BETA = 0.04  # weight of the KL; our choice, DeepSeekMath's too
BOUND = 10.0  # see `bounded_exp`; our choice


def full_precision(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already. In bf16 the number after 1 is 1.0078, too coarse for ratios."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x) up to x = BOUND, and above it the tangent of exp at BOUND: increasing, with a continuous gradient.

    A clamp would be finite too, but its gradient is 0 above BOUND. So nothing would pull the policy back where
    it is furthest from the reference. Here the gradient stops growing (at e^10 = 22026) and does not vanish.
    Very negative x need no bound, because exp goes to 0 there.

    >>> bounded_exp(torch.tensor([0.0, 10.0, 12.0])) / torch.e**10  # at 12 the tangent: e^10 (1 + 12 - 10)
    tensor([4.5400e-05, 1.0000e+00, 3.0000e+00])
    """
    return x.clamp(max=BOUND).exp() * (1 + torch.relu(x - BOUND))


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) within each group, std of the population (over G).

    rewards (B, G), any unit -> (B, G), float32 or better. Equal rewards, G = 1 included, give exact zeros.
    Raises ValueError unless rewards are finite and (B, G) with G >= 1.

    >>> group_advantages(torch.tensor([[1.0, 3.0], [0.3, 0.3]]))  # mean 2, std 1; no spread
    tensor([[-0.9999,  0.9999],
            [ 0.0000,  0.0000]])
    """
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards must be (B, G) with G >= 1, not {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    rewards = full_precision(rewards)
    # The computed mean of equal numbers may differ from them by rounding. Divided by eps, that would be an advantage.
    low, high = rewards.amin(1, keepdim=True), rewards.amax(1, keepdim=True)  # (B, 1)
    mean = torch.where(low == high, low, rewards.mean(1, keepdim=True))  # (B, 1)
    std = rewards.std(1, correction=0, keepdim=True)  # (B, 1)
    above = rewards - mean  # (B, G)
    return (above / (std + eps)).masked_fill(above == 0, 0.0)  # 0 / 0 with eps = 0


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token estimate of KL(pi_theta || pi_ref): k3 = exp(d) - d - 1 with d = ref_logp - logp.

    Source: arXiv 2402.03300, eq. 4. Shapes (N, T), nats. k3 is never negative, and unbiased on tokens that pi_theta
    sampled, because exp(d) is 1 on average there. Its gradient by logp is 1 - exp(d). That is at most 1 where the
    policy is above the reference, and has no limit where the policy is far below it. So from d = 10 on it stays at
    1 - e^10 (`bounded_exp`), which still pulls the policy up.

    >>> kl_k3(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -2.0]]))  # d = 0; d = -1: 1/e
    tensor([[0.0000, 0.3679]])
    """
    d = full_precision(ref_logp) - full_precision(logp)
    return bounded_exp(d) - d - 1


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = BETA,
    normalize: str = "sequence",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise (see the module) and what to log about it.

    logp        (N, T)  log pi_theta of the answer tokens; the gradient goes through it alone
    old_logp    (N, T)  that of pi_old, the policy before the first update on these answers; None: the ratio is 1
    ref_logp    (N, T)  that of the reference; None: no KL term
    advantages  (N,)    one per answer: group_advantages(rewards).flatten()
    mask        (N, T)  0/1 or bool; 1 on answer tokens up to and including the first EOS. Values where it
                        is 0 do not matter, not even nan and inf. An answer without tokens adds 0.
    normalize           "sequence": mean over answers of their mean over tokens; "token": mean over all tokens
    denominator         how many answers ("sequence") or answer tokens ("token") the whole batch has; default:
                        this call's. With it, the losses of micro-batches add up to that of the batch. Where
                        gradients are then averaged over W ranks (DDP, FSDP), pass the count over all ranks,
                        divided by W.

    Returns (loss, stats), 0-d tensors of float32 or better; stats are detached and still on the device:
      policy_loss          the loss less its KL term; adds up over micro-batches as the loss does
      kl                   mean k3 over this call's tokens; only with ref_logp
      ratio                mean rho over them. Far from 1: the update has left the policy that sampled
      clip_low, clip_high  share of them whose gradient the lower (A < 0) or upper (A > 0) bound has stopped
      tokens               how many there are: the weight with which kl, ratio and shares average over calls
    Raises ValueError if shapes disagree or normalize is unknown.

    >>> logp = torch.tensor([[-1.0, 9.9], [-1.0, -1.0]], requires_grad=True)  # 9.9 is padding
    >>> mask = torch.tensor([[1, 0], [1, 1]])
    >>> loss, stats = grpo_loss(logp, None, None, torch.tensor([1.0, -2.0]), mask)
    >>> loss.item()  # (-1 + 2) / 2
    0.5
    >>> loss.backward()
    >>> logp.grad  # -A / (length N)
    tensor([[-0.5000,  0.0000],
            [ 0.5000,  0.5000]])
    """
    if logp.ndim != 2:
        raise ValueError(f"logp must be (N, T), not {tuple(logp.shape)}")
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("mask", mask)):
        if x is not None and x.shape != logp.shape:
            raise ValueError(f"{name} must be {tuple(logp.shape)} like logp, not {tuple(x.shape)}")
    if advantages.shape != logp.shape[:1]:
        raise ValueError(f"advantages must be (N,) = ({logp.shape[0]},), not {tuple(advantages.shape)}")
    if normalize not in ("sequence", "token"):
        raise ValueError(f'normalize must be "sequence" or "token", not {normalize!r}')

    mask = mask.bool()

    def answers_only(x: Tensor) -> Tensor:
        # Padding is set to 0 before exp. Weighted by 0 afterwards, an inf or nan there would still give nan.
        return full_precision(x).masked_fill(~mask, 0.0)

    logp = answers_only(logp)
    # old_logp is detached: a caller may pass logp itself, and the gradient of the ratio would cancel without a word.
    old_logp = logp.detach() if old_logp is None else answers_only(old_logp.detach())
    advantage = advantages.detach().to(logp.dtype)[:, None]  # (N, 1)

    ratio = bounded_exp(logp - old_logp)  # (N, T)
    unclipped = ratio * advantage  # (N, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage  # (N, T)
    # min() keeps the worse of the two. So clipping can only remove the incentive to move further away from pi_old,
    # never the incentive to come back.
    token_loss = -torch.minimum(unclipped, clipped)  # (N, T)

    is_token = mask.to(logp.dtype)  # (N, T)  1 per answer token
    length = is_token.sum(1, keepdim=True)  # (N, 1)
    num_tokens = length.sum()
    weight = is_token / length.clamp(min=1) if normalize == "sequence" else is_token  # (N, T)
    if denominator is None:
        denominator = len(logp) if normalize == "sequence" else num_tokens.clamp(min=1)
    weight = weight / denominator

    loss = policy_loss = (weight * token_loss).sum()
    measured = {
        "ratio": ratio,
        "clip_low": (ratio < 1 - clip_low) & (advantage < 0),
        "clip_high": (ratio > 1 + clip_high) & (advantage > 0),
    }
    if ref_logp is not None:
        measured["kl"] = kl_k3(logp, answers_only(ref_logp.detach()))  # (N, T)
        loss = loss + beta * (weight * measured["kl"]).sum()

    stats = {name: (is_token * x.detach()).sum() / num_tokens.clamp(min=1) for name, x in measured.items()}
    return loss, stats | {"policy_loss": policy_loss.detach(), "tokens": num_tokens}
