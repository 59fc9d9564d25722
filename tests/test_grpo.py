"""grpo.py against numbers worked out by hand, a loop over floats, and finite differences of that loop."""

import doctest
import math

import pytest
import torch

import grpo

LN2 = math.log(2.0)


def loop_loss(logp, old_logp, ref_logp, advantages, mask, clip_low=0.2, clip_high=0.2, beta=0.04, normalize="sequence"):
    """The loss from its definition, token by token on floats: no tensor, no mask arithmetic, no autograd."""
    answers = []  # one list of token losses per answer
    for i, row in enumerate(mask):
        answers.append([])
        for t, on in enumerate(row):
            if not on:
                continue
            ratio = math.exp(logp[i][t] - old_logp[i][t])
            bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
            loss = -min(ratio * advantages[i], bounded * advantages[i])
            if ref_logp is not None:
                d = ref_logp[i][t] - logp[i][t]
                loss += beta * (math.exp(d) - d - 1)
            answers[i].append(loss)
    if normalize == "token":
        tokens = [loss for answer in answers for loss in answer]
        return sum(tokens) / len(tokens)
    return sum(sum(answer) / len(answer) for answer in answers if answer) / len(answers)


def random_batch(seed, n=5, t=6):
    """Uneven lengths, holes, ratios on both sides of both bounds; float64, so that 1e-6 means something."""
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(n, t, generator=g, dtype=torch.float64)
    old_logp = logp + 0.4 * torch.randn(n, t, generator=g, dtype=torch.float64)
    ref_logp = logp + 1.0 * torch.randn(n, t, generator=g, dtype=torch.float64)
    advantages = torch.randn(n, generator=g, dtype=torch.float64)
    mask = torch.rand(n, t, generator=g) < 0.6
    mask[:, 0] = True
    mask[0] = True
    return logp.requires_grad_(), old_logp, ref_logp, advantages, mask


def loss_and_grad(logp, *args, **kwargs):
    logp = logp.detach().clone().requires_grad_()
    loss, stats = grpo.grpo_loss(logp, *args, **kwargs)
    loss.backward()
    return loss.detach(), logp.grad, stats


def one_token(ratio, advantage, **kwargs):
    """A single token whose ratio is `ratio`: old log-prob 0, log-prob ln(ratio)."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    ones = torch.ones(1, 1)
    return loss_and_grad(logp, torch.zeros_like(logp), None, torch.tensor([advantage]), ones, **kwargs)


# ---- advantages


def test_advantages_by_hand():
    # group 1: mean 1/4, variance (3 * 1/16 + 9/16) / 4 = 3/16, std sqrt(3)/4, A = -1/sqrt(3) and sqrt(3)
    # group 2: mean 2, std 1, A = -1 and 1. (With G - 1 the A were -1/2 and 3/2; -sqrt(3)/2 and sqrt(3)/2.)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 3.0, 1.0, 3.0]], dtype=torch.float64)
    third = 1 / math.sqrt(3)
    expected = torch.tensor([[-third, -third, -third, 3 * third], [-1, 1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(grpo.group_advantages(rewards, eps=0.0), expected)


def test_eps_stands_beside_std_outside_the_root():
    # r - mean = +-1, std = 1, so A = +-1 / (1 + eps)
    expected = torch.tensor([[-1 / 1.5, 1 / 1.5]])
    torch.testing.assert_close(grpo.group_advantages(torch.tensor([[1.0, 3.0]]), eps=0.5), expected)
    default = grpo.group_advantages(torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    assert default[0, 1].item() == pytest.approx(1 / 1.0001, rel=1e-12)


@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_spread_is_exactly_zero(dtype, eps):
    # The mean of seven 0.3 in float32 is not 0.3: 3e-8 / 1e-8 would be an advantage of 3 out of nothing.
    for size in range(1, 18):
        rewards = torch.tensor([0.0, 0.1 * 3, 0.7, 1 / 3, 2.2, -0.1, 1e6 / 7], dtype=dtype)[:, None].expand(-1, size)
        advantages = grpo.group_advantages(rewards, eps)
        assert torch.equal(advantages, torch.zeros_like(rewards))


def test_advantages_leave_their_input_and_upcast():
    for dtype in (torch.int64, torch.bfloat16, torch.float32):
        rewards = torch.tensor([[1, 3], [5, 5]], dtype=dtype)
        before = rewards.clone()
        advantages = grpo.group_advantages(rewards)
        assert torch.equal(rewards, before)
        assert advantages.dtype == torch.float32
        torch.testing.assert_close(advantages, torch.tensor([[-1 / 1.0001, 1 / 1.0001], [0.0, 0.0]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_must_be_finite(bad):
    with pytest.raises(ValueError, match="finite"):
        grpo.group_advantages(torch.tensor([[0.0, bad]]))


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2), (2, 0)])
def test_rewards_must_be_groups(shape):
    with pytest.raises(ValueError, match=r"\(B, G\)"):
        grpo.group_advantages(torch.zeros(shape))


# ---- KL


def test_k3_and_its_gradient_by_hand():
    # d = ref - logp = 0, ln 2, -ln 2
    # k3 = e^d - d - 1 = 0, 1 - ln 2, ln 2 - 1/2;  its gradient 1 - e^d = 0, -1, 1/2
    logp = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    k3 = grpo.kl_k3(logp, logp.detach() + torch.tensor([[0.0, LN2, -LN2]], dtype=torch.float64))
    torch.testing.assert_close(k3, torch.tensor([[0.0, 1 - LN2, LN2 - 0.5]], dtype=torch.float64))
    k3.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[0.0, -1.0, 0.5]], dtype=torch.float64))


def test_k3_averages_to_the_kl_divergence():
    # Its mean over all tokens, each weighed by pi_theta, is the sum of p log(p / q), with no sampling error.
    g = torch.Generator().manual_seed(0)
    logp, ref_logp = torch.randn(2, 1, 50, generator=g, dtype=torch.float64).log_softmax(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum()
    torch.testing.assert_close((logp.exp() * grpo.kl_k3(logp, ref_logp)).sum(), kl)


def test_k3_is_exact_to_the_bound_and_linear_beyond():
    # d = 9.5, 10: the formula. d = 12: e^10 + 2 e^10 - 12 - 1, gradient 1 - e^10.
    # d = -1000: 1000 - 1, gradient 1.
    d = torch.tensor([[9.5, 10.0, 12.0, -1000.0]], dtype=torch.float64)
    logp = torch.zeros_like(d, requires_grad=True)
    e = math.exp
    k3 = grpo.kl_k3(logp, d)
    torch.testing.assert_close(k3, torch.tensor([[e(9.5) - 10.5, e(10) - 11, 3 * e(10) - 13, 999]]).double())
    k3.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[1 - e(9.5), 1 - e(10), 1 - e(10), 1]]).double())
    beyond = torch.tensor([-30.0, 9.0, 11.0, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(grpo.bounded_exp, beyond)


def test_a_mutated_answer_that_the_policy_finds_impossible_stays_finite():
    # exp(5000) is inf. A hard clamp would be finite, but leave the KL no gradient. With beta 0.04 and A = 1
    # the gradient is 0.04 (1 - e^10) - 1 = -882.0, a pull upwards.
    at = lambda x: torch.tensor([[x]])
    loss, grad, _ = loss_and_grad(at(-5000.0), None, at(-0.1), torch.tensor([1.0]), at(1.0))
    assert loss.isfinite() and grad.isfinite()
    assert grad.item() == pytest.approx(0.04 * (1 - math.exp(10)) - 1, rel=1e-5)


# ---- the clipped loss


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "gradient", "bound"),
    [
        # bounds 0.8 and 1.3; loss = -min(rho A, clip(rho) A); gradient -rho A, or 0 where a bound holds
        (2.0, 1.1, -2.2, -2.2, None),  # inside
        (2.0, 1.25, -2.5, -2.5, None),  # inside 1.3, outside 1.2: the upper bound is clip_high's
        (2.0, 1.5, -2.6, 0.0, "clip_high"),  # min(3.0, 2.6): has grown enough
        (2.0, 0.5, -1.0, -1.0, None),  # min(1.0, 1.6): good and too rare, must be free to return
        (-2.0, 0.9, 1.8, 1.8, None),  # inside
        (-2.0, 0.75, 1.6, 0.0, "clip_low"),  # min(-1.5, -1.6): inside 0.7, outside 0.8
        (-2.0, 0.5, 1.6, 0.0, "clip_low"),  # min(-1.0, -1.6): has shrunk enough
        (-2.0, 1.5, 3.0, 3.0, None),  # min(-3.0, -2.6): bad and too frequent, must be free to return
        (0.0, 1.5, 0.0, 0.0, None),  # no advantage: nothing to stop
    ],
)
def test_both_sides_of_both_bounds(advantage, ratio, expected, gradient, bound):
    loss, grad, stats = one_token(ratio, advantage, clip_low=0.2, clip_high=0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert grad.item() == pytest.approx(gradient, rel=1e-12)
    assert stats["clip_low"].item() == (bound == "clip_low")
    assert stats["clip_high"].item() == (bound == "clip_high")
    assert stats["ratio"].item() == pytest.approx(ratio, rel=1e-12)


def test_a_huge_ratio_stays_finite():
    # exp(1000) is inf: times A = 0 nan, times A < 0 an infinite loss. For A < 0 it must be pushed down, that
    # is gradient > 0; for A > 0 the upper bound has stopped it.
    for advantage in (1.0, 0.0, -1.0):
        at = lambda x: torch.tensor([[x]])
        loss, grad, _ = loss_and_grad(at(0.0), at(-1000.0), None, torch.tensor([advantage]), at(1.0))
        assert loss.isfinite() and grad.isfinite()
        assert (grad.item() > 0) == (advantage < 0)


def test_kl_is_added_with_beta():
    # d = ln 2: k3 = 1 - ln 2, gradient -1.  On-policy, A = 3: loss = -3 + 0.5 (1 - ln 2), gradient -3 - 0.5
    logp = torch.tensor([[-1.0]], dtype=torch.float64)
    loss, grad, stats = loss_and_grad(logp, None, logp + LN2, torch.tensor([3.0]), torch.ones(1, 1), beta=0.5)
    assert loss.item() == pytest.approx(-3 + 0.5 * (1 - LN2), rel=1e-12)
    assert grad.item() == pytest.approx(-3.5, rel=1e-12)
    assert stats["policy_loss"].item() == pytest.approx(-3, rel=1e-12)
    assert stats["kl"].item() == pytest.approx(1 - LN2, rel=1e-12)


# ---- normalisation

# Lengths 1 and 3, A = 3 and -1, on-policy: a token's loss is -A and its gradient -A.
#   sequence: (-3 + mean(1, 1, 1)) / 2 = -1;  gradient -A / (length N): -3 / (1 * 2) = -3/2, 1 / (3 * 2) = 1/6
#   token:    (-3 + 1 + 1 + 1) / 4     =  0;  gradient -A / tokens:     -3 / 4,              1 / 4
UNEVEN = [
    ("sequence", -1.0, [[-3 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]),
    ("token", 0.0, [[-3 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]]),
]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize(("normalize", "expected", "gradient"), UNEVEN)
def test_normalisation_and_on_policy_gradient_by_hand(normalize, expected, gradient, mask_dtype):
    logp = torch.tensor([[-0.5, 7.0, 7.0], [-1.0, -2.0, -3.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=mask_dtype)
    loss, grad, _ = loss_and_grad(logp, None, None, torch.tensor([3.0, -1.0]), mask, normalize=normalize)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor(gradient))


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_micro_batches_add_up_to_the_batch(normalize):
    logp, *rest, mask = random_batch(1)
    loss, grad, stats = loss_and_grad(logp, *rest, mask, normalize=normalize)
    count = len(logp) if normalize == "sequence" else mask.sum()  # a number or a tensor
    parts = []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):  # uneven on purpose: a mean of means would be wrong
        part = [x[rows] for x in (logp, *rest, mask)]
        parts.append(loss_and_grad(*part, normalize=normalize, denominator=count))
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad)
    torch.testing.assert_close(sum(p[2]["policy_loss"] for p in parts), stats["policy_loss"])
    for name in ("kl", "ratio", "clip_low", "clip_high"):  # and the means recombine by their tokens
        mean = sum(p[2][name] * p[2]["tokens"] for p in parts) / sum(p[2]["tokens"] for p in parts)
        torch.testing.assert_close(mean, stats[name])


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_ranks_whose_gradients_are_averaged_pass_count_over_ranks(normalize):
    logp, *rest, mask = random_batch(2)
    loss, grad, _ = loss_and_grad(logp, *rest, mask, normalize=normalize)
    count = len(logp) if normalize == "sequence" else mask.sum()
    ranks = [[x[rows] for x in (logp, *rest, mask)] for rows in (slice(0, 2), slice(2, 5))]
    ranks = [loss_and_grad(*rank, normalize=normalize, denominator=count / 2) for rank in ranks]
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]) / 2, grad)


# ---- padding


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("poison", [1e4, -1e4, math.nan, math.inf, -math.inf])
def test_poison_where_the_mask_is_0_changes_nothing(poison, normalize):
    logp, old_logp, ref_logp, advantages, mask = random_batch(3)
    clean = loss_and_grad(logp, old_logp, ref_logp, advantages, mask, normalize=normalize)
    assert (clean[1][~mask] == 0).all()
    assert (clean[1][mask] != 0).any()
    inputs = (logp.detach(), old_logp, ref_logp)
    for which in ([0], [1], [2], [0, 1, 2]):  # inf - inf is another trap than inf
        x = [v.masked_fill(~mask, poison) if i in which else v for i, v in enumerate(inputs)]
        loss, grad, stats = loss_and_grad(*x, advantages, mask, normalize=normalize)
        assert torch.equal(loss, clean[0])
        assert torch.equal(grad, clean[1])
        assert all(torch.equal(stats[name], clean[2][name]) for name in stats)
    on_policy = [
        loss_and_grad(v, None, None, advantages, mask) for v in (inputs[0], inputs[0].masked_fill(~mask, poison))
    ]
    assert torch.equal(on_policy[0][1], on_policy[1][1])


def test_the_last_token_of_an_answer_counts():
    # The EOS is the mask's last 1. One answer of 2 tokens and A = 1: both get -1/2.
    _, grad, stats = loss_and_grad(torch.zeros(1, 3), None, None, torch.tensor([1.0]), torch.tensor([[1, 1, 0]]))
    assert grad.tolist() == [[-0.5, -0.5, 0.0]]
    assert stats["tokens"].item() == 2


def test_an_empty_answer_adds_nothing():
    # A = 1 and 5, the second has no token.  sequence: (-1 + 0) / 2;  token: -1 / 1
    for normalize, expected in (("sequence", -0.5), ("token", -1.0)):
        none, mask = torch.zeros(2, 1), torch.tensor([[1], [0]])
        loss, grad, _ = loss_and_grad(none, None, none, torch.tensor([1.0, 5.0]), mask, normalize=normalize)
        assert loss.item() == expected
        assert grad.tolist() == [[expected], [0.0]]


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_nothing_but_empty_answers_is_zero(normalize):
    ones = torch.ones(2, 2)
    loss, grad, stats = loss_and_grad(ones, ones, ones, torch.ones(2), 0 * ones, normalize=normalize)
    assert loss == 0
    assert (grad == 0).all()
    assert all(value == 0 for value in stats.values())


# ---- a second way to the same number


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_loop_and_its_finite_differences(seed, normalize):
    logp, old_logp, ref_logp, advantages, mask = random_batch(seed)
    settings = {"clip_low": 0.1, "clip_high": 0.3, "beta": 0.7, "normalize": normalize}
    loss, grad, stats = loss_and_grad(logp, old_logp, ref_logp, advantages, mask, **settings)
    constants = [x.tolist() for x in (old_logp, ref_logp, advantages, mask)]
    x = logp.tolist()
    assert loss.item() == pytest.approx(loop_loss(x, *constants, **settings), rel=1e-12)

    difference, h = torch.zeros_like(grad), 1e-6
    for i, row in enumerate(x):
        for t, value in enumerate(row):
            row[t] = value + h
            up = loop_loss(x, *constants, **settings)
            row[t] = value - h
            down = loop_loss(x, *constants, **settings)
            row[t] = value
            difference[i, t] = (up - down) / (2 * h)
    torch.testing.assert_close(grad, difference, rtol=1e-6, atol=1e-8)
    # the batch reaches every branch, or the comparison would prove little
    ratio = (logp.detach() - old_logp).exp()[mask]
    assert ((ratio < 0.9).any() and (ratio > 1.3).any() and ((ratio > 0.9) & (ratio < 1.3)).any()).item()
    assert stats["ratio"].item() == pytest.approx(ratio.mean().item(), rel=1e-12)


# ---- conduct


def test_the_gradient_goes_through_logp_alone():
    # old_logp and ref_logp that hang on logp must act as constants; a live old_logp would cancel the ratio's.
    logp, _, _, advantages, mask = random_batch(5)
    expected = loss_and_grad(logp, None, 1.5 * logp.detach(), advantages, mask)[1]
    loss, _ = grpo.grpo_loss(logp, logp, 1.5 * logp, advantages, mask)
    loss.backward()
    torch.testing.assert_close(logp.grad, expected)


def test_inputs_stay_and_stats_are_detached_scalars():
    batch = random_batch(6)
    before = [x.detach().clone() for x in batch]
    loss, stats = grpo.grpo_loss(*batch)
    loss.backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip(batch, before, strict=True))
    assert set(stats) == {"policy_loss", "kl", "ratio", "clip_low", "clip_high", "tokens"}
    assert all(value.shape == () and not value.requires_grad for value in stats.values())
    no_reference = grpo.grpo_loss(batch[0], batch[1], None, *batch[3:])[1]
    assert set(stats) - set(no_reference) == {"kl"}  # not measured is not 0


def test_bf16_is_computed_in_float32():
    # -1 and -1.0078125 are neighbours in bf16, which would round e^0.0078125 = 1.00784 to 1.00781.
    logp = torch.tensor([[-1.0]], dtype=torch.bfloat16, requires_grad=True)
    old_logp = torch.tensor([[-1.0078125]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, stats = grpo.grpo_loss(logp, old_logp, old_logp, torch.ones(1), torch.ones(1, 1), beta=0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.exp(0.0078125), rel=1e-6)
    # k3 at d = -0.0078125 is 3.044e-5; in bf16, e^d - d - 1 would cancel to nothing
    assert stats["kl"].item() == pytest.approx(math.expm1(-0.0078125) + 0.0078125, rel=1e-2)
    loss.backward()
    assert logp.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp": torch.zeros(4)}, "logp"),
        ({"old_logp": torch.zeros(2, 2)}, "old_logp"),
        ({"ref_logp": torch.zeros(1, 3)}, "ref_logp"),  # would broadcast
        ({"mask": torch.ones(2, 1)}, "mask"),  # would broadcast
        ({"advantages": torch.zeros(2, 1)}, "advantages"),
        ({"advantages": torch.zeros(3)}, "advantages"),
        ({"advantages": torch.zeros(1, 2)}, "advantages"),
        ({"normalize": "mean"}, "normalize"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    inputs = {name: torch.zeros(2, 3) for name in ("logp", "old_logp", "ref_logp", "mask")}
    inputs["advantages"] = torch.zeros(2)
    grpo.grpo_loss(**inputs)
    with pytest.raises(ValueError, match=f"^{message} must be"):
        grpo.grpo_loss(**inputs | change)


def test_docstring_examples():
    assert doctest.testmod(grpo).attempted > 0
    assert doctest.testmod(grpo).failed == 0
