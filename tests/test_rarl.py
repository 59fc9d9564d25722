"""The policy: sampling and scoring, once per group, against transformers' own forward over G copies of the prompt."""

import copy
import inspect
import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import rarl
import reward
from experiments import usual_way
from support.datasets import load_dataset
from support.datasets.drawings import DOTS
from support.learner import lora

G, T = 4, 24


def full_forward(policy, prompt, answer, temperature=1.0):
    """Log-probs of one answer the usual way: one row [prompt | answer], transformers' own forward and positions."""
    inputs = usual_way.repeat_inputs(policy, [prompt], 1, (answer[None], torch.ones_like(answer[None])))
    with usual_way.transformers_alone(policy):
        logits = policy.model(**inputs).logits[0, len(prompt.ids) - 1 : -1]
    logits = (logits / temperature).masked_fill(policy.banned, -torch.inf)
    return logits.log_softmax(-1).gather(-1, answer[:, None]).squeeze(-1), logits


@pytest.fixture(scope="module")
def prompts(policy):
    """Different lengths, 1, 4 and 2 images, and an image with several attention windows in one batch."""
    dots, dials = load_dataset("dots", None, "test"), load_dataset("dials", None, "test")
    samples = [
        *data.make_samples(dots, 1, 1),
        *data.make_samples(dials, 4, 1),
        *data.make_samples(dots, 2, 1),
    ]
    wide = data.Item("wide", 3, DOTS, lambda: dots[0].image().resize((224, 140)))
    return data.make_prompts(policy, [*samples, data.Sample((wide, dots[1]))])


@pytest.fixture(scope="module")
def rollout(policy, prompts):
    return rarl.generate(policy, prompts, G, T, 1.0, torch.Generator().manual_seed(0))


def answers_of(rollout):
    return [row[keep] for row, keep in zip(rollout.ids, rollout.mask, strict=True)]


def test_positions_equal_transformers(policy, prompts):
    # The second image is where hand-written positions go wrong: it starts at max(rows, columns), not at the token count.
    for prompt in prompts:
        is_image = (prompt.ids == policy.model.config.image_token_id).int()[None]
        expected, delta = policy.model.model.get_rope_index(prompt.ids[None], is_image, image_grid_thw=prompt.grid)
        got = rarl.rope_positions(prompt.ids, prompt.grid, policy.model.config.image_token_id, 2)
        assert torch.equal(got, expected[:, 0])
        assert int(got.max()) + 1 == len(prompt.ids) + int(delta)


def test_positions_by_hand():
    # text text <4 x 6 patches = 2 x 3 tokens> text: the image spans positions 2..4 (3 columns), so the text after it is 5.
    ids, grid = torch.tensor([1, 1, 9, 9, 9, 9, 9, 9, 1]), torch.tensor([[1, 4, 6]])
    assert rarl.rope_positions(ids, grid, image_token=9, merge=2).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],  # time: a still image does not move
        [0, 1, 2, 2, 2, 3, 3, 3, 5],  # row
        [0, 1, 2, 3, 4, 2, 3, 4, 5],  # column
    ]


def test_sampled_logprobs_equal_full_forward(policy, prompts, rollout):
    for row, answer in enumerate(answers_of(rollout)):
        expected, _ = full_forward(policy, prompts[row // G], answer)
        got = rollout.logp[row][rollout.mask[row]]
        torch.testing.assert_close(got, expected.detach(), atol=1e-5, rtol=0)


def test_greedy_decoding_equals_full_forward(policy, prompts):
    rollout = rarl.generate(policy, prompts, 1, T, temperature=0)
    for prompt, answer in zip(prompts, answers_of(rollout), strict=True):
        _, logits = full_forward(policy, prompt, answer)
        assert torch.equal(logits.argmax(-1), answer)


def test_packed_logprobs_equal_sampled_and_repeated(policy, prompts, rollout):
    logp, entropy = rarl.logprobs(policy, prompts, rollout.ids, rollout.mask)
    torch.testing.assert_close(logp, rollout.logp, atol=1e-5, rtol=0)
    assert logp.dtype == torch.float32 and (logp[~rollout.mask] == 0).all() and (entropy[~rollout.mask] == 0).all()
    for row, answer in enumerate(answers_of(rollout)):
        expected, logits = full_forward(policy, prompts[row // G], answer)
        torch.testing.assert_close(logp[row][rollout.mask[row]], expected, atol=1e-5, rtol=0)
        p = logits.softmax(-1)
        H = -(p * p.clamp_min(1e-30).log()).sum(-1)  # the definition
        torch.testing.assert_close(entropy[row][rollout.mask[row]], H.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_is_shared_by_sampling_and_scoring(policy, prompts, temperature):
    rollout = rarl.generate(policy, prompts, 2, 8, temperature, torch.Generator().manual_seed(1))
    logp, _ = rarl.logprobs(policy, prompts, rollout.ids, rollout.mask, temperature)
    torch.testing.assert_close(logp, rollout.logp, atol=1e-5, rtol=0)
    expected, _ = full_forward(policy, prompts[1], answers_of(rollout)[2], temperature)
    torch.testing.assert_close(logp[2][rollout.mask[2]], expected, atol=1e-5, rtol=0)


def test_packed_gradients_equal_repeated(policy, prompts, rollout):
    torch.manual_seed(0)
    weight = torch.randn(rollout.logp.shape)  # any loss that is a weighted sum of log-probs, as GRPO's is on-policy
    packed, repeated = copy.deepcopy(policy), copy.deepcopy(policy)
    (weight * rarl.logprobs(packed, prompts, rollout.ids, rollout.mask)[0]).sum().backward()
    for row, answer in enumerate(answers_of(rollout)):
        logp, _ = full_forward(repeated, prompts[row // G], answer)
        (weight[row][rollout.mask[row]] * logp).sum().backward()
    for (name, a), b in zip(packed.named_parameters(), repeated.parameters(), strict=True):
        # The bias of a key shifts all attention logits of a query alike: its gradient is 0 but for rounding.
        scale = b.grad.norm() if "k_proj.bias" not in name else 1e3 * b.grad.norm() + 1
        assert (a.grad - b.grad).norm() <= 1e-5 * scale, name


def test_padding_of_other_prompts_and_answers_does_not_leak(policy, prompts, rollout):
    together, _ = rarl.logprobs(policy, prompts, rollout.ids, rollout.mask)
    for b, prompt in enumerate(prompts):
        rows = slice(b * G, (b + 1) * G)
        alone, _ = rarl.logprobs(policy, [prompt], rollout.ids[rows], rollout.mask[rows])
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=0)
    # What stands behind an answer's end must not matter.
    poisoned = torch.where(rollout.mask, rollout.ids, 5)
    torch.testing.assert_close(rarl.logprobs(policy, prompts, poisoned, rollout.mask)[0], together, atol=1e-5, rtol=0)


def test_gradients_are_the_same_bits_whatever_threads_do(policy, prompts, rollout):
    # An odd number of prompts with 4 images, two threads, and a process that takes the cores away now and then: where
    # threads race, they come in another order. One repeat in four differed when keys were gathered for each answer.
    trained, three = copy.deepcopy(policy), [copy.copy(prompts[1]) for _ in range(3)]
    rarl.encode_images(trained, three)  # once: it takes most of the time, and what it gathers it gathers once
    mask = rollout.mask[G : 2 * G].repeat(3, 1)
    mask &= torch.arange(mask.shape[1]) <= torch.arange(len(mask))[:, None]  # answers of all lengths
    ids, weight = (
        rollout.ids[G : 2 * G].repeat(3, 1),
        torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)),
    )

    def gradients():
        trained.zero_grad()
        (weight * rarl.logprobs(trained, three, ids, mask)[0]).sum().backward()
        return [p.grad.clone() for p in trained.parameters() if p.grad is not None]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    busy = subprocess.Popen([sys.executable, "-c", "import os\nos.nice(19)\nwhile True: pass"])
    try:
        first = gradients()
        end = time.monotonic() + 2  # seconds: how many repeats that is depends on what else the machine does
        while time.monotonic() < end:
            assert all(map(torch.equal, gradients(), first))
    finally:
        busy.kill()
        busy.wait()
        torch.set_num_threads(threads)


def test_gradients_of_attention_alone_are_the_same_bits():
    # Hundreds of repeats a second: when keys were gathered for each answer, at least one in forty differed.
    rng, packing = torch.Generator().manual_seed(0), rarl.Packing([60, 61, 62], [12] * 24, torch.device("cpu"))
    qkv = [torch.randn(1, heads, 471, 32, generator=rng).requires_grad_() for heads in (4, 2, 2)]
    weight = torch.randn(1, 471, 4, 32, generator=rng)
    attend = lambda: (weight * rarl.packed_attention(None, *qkv, packing, 0.2)[0]).sum()
    threads, end = torch.get_num_threads(), time.monotonic() + 1
    torch.set_num_threads(2)
    try:
        first = torch.autograd.grad(attend(), qkv)
        while time.monotonic() < end:
            assert all(map(torch.equal, torch.autograd.grad(attend(), qkv), first))
    finally:
        torch.set_num_threads(threads)


def test_a_long_answer_costs_what_it_costs_alone(policy, prompts, monkeypatch):
    # One answer of 500 tokens among seven of 10: the pairs (query, key) that attention looks at, of all its calls.
    pairs = []
    attend = F.scaled_dot_product_attention
    spy = lambda q, k, *args, **kwargs: (
        pairs.append(q.shape[0] * q.shape[2] * k.shape[2]) or attend(q, k, *args, **kwargs)
    )
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ids = torch.full((8, 500), 5)
    mask = torch.arange(500) < torch.tensor([500, *[10] * 7])[:, None]
    cost = []
    for rows in (slice(1), slice(8)):
        pairs.clear()
        with torch.no_grad():
            rarl.logprobs(policy, prompts[:1], ids[rows], mask[rows])
        cost.append(sum(pairs))
    assert cost[1] < 1.1 * cost[0]


def varlen_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # fmt: skip
    """torch's varlen_attn, whose kernel only a GPU has: what it asks of its arguments, and its numbers by plain maths."""
    assert query.dtype == key.dtype == value.dtype and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) and len(key) == len(value)
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max()) and (cu_seq_q.diff() > 0).all()
    R = query.shape[1] // key.shape[1]
    assert enable_gqa or R == 1
    out = []
    for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        q, (k, v) = query[a:b].float(), [x[c:d].repeat_interleave(R, 1).float() for x in (key, value)]
        logits = scale * torch.einsum("qhd,khd->hqk", q, k)
        if window_size == (-1, 0):  # flash attention's causal mask: the last query sees up to the last key
            logits = logits.masked_fill(~torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a)), -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
    return torch.cat(out).to(query.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variable_length_attention_gives_the_same(policy, prompts, rollout, monkeypatch, dtype):
    # What a GPU would run: bounds, gathered keys and heads, in sampling, scoring and the vision tower.
    both = []
    mask = rollout.mask & (torch.arange(rollout.mask.shape[1]) < torch.arange(len(rollout.mask))[:, None] + 1)
    for varlen in (False, True):
        trained, calls = copy.deepcopy(policy), []
        monkeypatch.setattr(rarl, "has_varlen", lambda x, varlen=varlen: varlen)
        monkeypatch.setattr(rarl, "varlen_attn", lambda *a, **k: calls.append(len(a[1])) or varlen_by_hand(*a, **k))  # noqa: B023
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logp, _ = rarl.logprobs(trained, prompts, rollout.ids, mask)
            sampled = rarl.generate(trained, prompts, 1, 3, temperature=0)
        if dtype == torch.float32:
            logp.sum().backward()
        both.append((logp, sampled.logp, {n: p.grad for n, p in trained.named_parameters()}))
        assert bool(calls) == varlen
    (logp, sampled, grads), (varlen_logp, varlen_sampled, varlen_grads) = both
    exact = dtype == torch.float32
    torch.testing.assert_close(varlen_logp, logp, atol=1e-5 if exact else 0.2, rtol=0)
    torch.testing.assert_close(varlen_sampled, sampled, atol=1e-5 if exact else 0.2, rtol=0)
    for name, grad in grads.items() if exact else ():
        scale = grad.norm() if "k_proj.bias" not in name else 1e3 * grad.norm() + 1
        assert (varlen_grads[name] - grad).norm() <= 1e-5 * scale, name


def test_variable_length_attention_is_called_as_torch_has_it():
    theirs, ours = (inspect.signature(f).parameters.values() for f in (rarl.varlen_attn, varlen_by_hand))
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs if p.name in {q.name for q in ours}
    ]


@pytest.mark.parametrize("lengths", [[6, 6, 6], [4, 9, 4, 1, 9], [5]])
def test_windows_see_themselves_only(lengths):
    torch.manual_seed(0)
    qkv = [torch.randn(1, 2, sum(lengths), 8) for _ in range(3)]  # (1, H, S, D)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    out, _ = rarl.window_attention(None, *qkv, None, scaling=0.3, cu_seq_lens_q=bounds)
    start = 0
    for length in lengths:
        q, k, v = (x[0, :, start : start + length] for x in qkv)
        alone = (0.3 * q @ k.transpose(1, 2)).softmax(-1) @ v  # (H, length, D)
        torch.testing.assert_close(out[0, start : start + length], alone.transpose(0, 1))
        start += length


def test_features_of_a_frozen_tower_are_computed_once(policy, prompts, rollout, monkeypatch):
    frozen = copy.deepcopy(prompts)
    rarl.encode_images(policy, frozen)
    expected, _ = rarl.logprobs(policy, prompts, rollout.ids, rollout.mask)
    monkeypatch.setattr(policy.model.model.visual, "forward", None)  # whoever asks it again, fails
    again = rarl.generate(policy, frozen, G, T, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(again.ids, rollout.ids)
    logp, _ = rarl.logprobs(policy, frozen, rollout.ids, rollout.mask)
    torch.testing.assert_close(logp, expected, atol=1e-6, rtol=0)


def test_first_eos_counts_and_the_rest_is_masked(policy, prompts):
    # Nine tokens, EOS among them, nearly alike at a high temperature: answers end after some 9 tokens, at different ones,
    # so finished rows are dropped again and again on the way.
    eager, temperature = copy.deepcopy(policy), 20.0
    eager.banned[:] = True
    eager.banned[[*range(8), eager.eos_id]] = False
    rollout = rarl.generate(eager, prompts, 16, 30, temperature, torch.Generator().manual_seed(0))
    ended = 0
    for ids, mask in zip(rollout.ids, rollout.mask, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        inside = (ids[:length] == eager.eos_id).nonzero().flatten().tolist()
        assert inside in ([], [length - 1])  # the first EOS is the answer's last token, and is in the mask
        assert inside == [length - 1] or length == 30
        ended += bool(inside)
    assert 40 < ended <= 64
    assert (rollout.logp[~rollout.mask] == 0).all()
    # The survivors' caches are still their own.
    logp, _ = rarl.logprobs(eager, prompts, rollout.ids, rollout.mask, temperature)
    torch.testing.assert_close(logp, rollout.logp, atol=1e-5, rtol=0)


def test_answers_do_not_depend_on_their_neighbours(policy, prompts):
    generators = lambda: [torch.Generator().manual_seed(10 + b) for b in range(len(prompts))]
    together = rarl.generate(policy, prompts, 3, 12, 1.0, generators())
    for b, prompt in enumerate(prompts):
        alone = rarl.generate(policy, [prompt], 3, 12, 1.0, [generators()[b]])
        width = alone.ids.shape[1]
        assert torch.equal(alone.ids, together.ids[3 * b : 3 * b + 3, :width])


def test_special_tokens_are_never_sampled(policy, prompts):
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>", "<|im_start|>"]
    banned = [policy.tokenizer.convert_tokens_to_ids(name) for name in names]
    assert policy.banned[banned].all() and not policy.banned[policy.eos_id]
    keen = copy.deepcopy(policy)
    with torch.no_grad():  # a policy that would like nothing better
        keen.model.lm_head.weight[banned] *= 30
    rollout = rarl.generate(keen, prompts, 8, 8, 5.0, torch.Generator().manual_seed(0))
    assert not torch.isin(rollout.ids[rollout.mask], torch.tensor(banned)).any()
    logp, _ = rarl.logprobs(keen, prompts, rollout.ids, rollout.mask, 5.0)
    assert torch.isfinite(logp).all()
    torch.testing.assert_close(logp, rollout.logp, atol=1e-5, rtol=0)


def test_sampling_frequencies_are_the_policys(policy, prompts):
    # 4000 first tokens against the distribution they were drawn from (the most likely one, within 4 standard errors).
    rollout = rarl.generate(policy, prompts[:1], 4000, 1, 0.3, torch.Generator().manual_seed(0))
    _, logits = full_forward(policy, prompts[0], rollout.ids[0, :1], 0.3)
    p = logits.softmax(-1)[0]
    share = torch.bincount(rollout.ids[:, 0], minlength=len(p)) / 4000
    top = p.topk(5).indices
    assert ((share[top] - p[top]).abs() < 4 * (p[top] * (1 - p[top]) / 4000).sqrt()).all()


def test_head_in_chunks_changes_nothing(policy, prompts, rollout, monkeypatch):
    whole, _ = rarl.logprobs(policy, prompts, rollout.ids, rollout.mask)
    monkeypatch.setattr(rarl, "HEAD_ELEMENTS", 7 * policy.banned.numel())  # seven positions at a time
    pieces, _ = rarl.logprobs(policy, prompts, rollout.ids, rollout.mask)
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=0)


def test_large_attention_logits_keep_their_differences_in_bf16():
    # Attention logits of hundreds, as real Qwen2.5 has: rounded to bf16 (steps of 1 or 2), weights would be off by half.
    torch.manual_seed(0)
    B, G, K, R, P, t, D = 2, 3, 2, 2, 9, 4, 32
    near = lambda *shape: (10 + 0.1 * torch.randn(*shape, D)).bfloat16()  # alike: logits of 560, 1 apart
    q, all_keys = near(B, G, K * R), near(B, P + t * G, K)
    all_values = torch.randn(B, P + t * G, K, D).bfloat16()
    cache = rarl.Cache([(all_keys, all_values)], torch.ones(B, P, dtype=torch.bool), (torch.zeros(B, t, D),) * 2, G, R)
    out = rarl.group_attention(q, all_keys, all_values, cache.bias[..., : P + t * G])
    for b in range(B):
        for g in range(G):
            for h in range(K * R):
                own = [*range(P), *range(P + g, P + t * G, G)]  # token by token, all answers of one side by side
                keys, values = (x[b, own, h // R].double() for x in (all_keys, all_values))
                exact = (keys @ q[b, g, h].double() / D**0.5).softmax(0) @ values
                torch.testing.assert_close(out[b, g, h * D :][:D].double(), exact, atol=0.03, rtol=0)


class Operators(TorchDispatchMode):
    """Names of the operators that run, without those that only look at a tensor in another shape."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not view and function is not torch.ops.aten._unsafe_view.default:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rank", "most"), [(0, 24), (4, 40)], ids=["whole", "lora"])
def test_a_decode_step_launches_few_kernels(policy, prompts, monkeypatch, rank, most):
    # On a GPU a step costs what its launches cost. A norm counts as one: there F.rms_norm is one kernel, here it is six.
    adapted = rarl.cast_copy(policy, torch.bfloat16)
    if rank:  # adapters are float32: cast at each call, they would be 14 operators more
        lora.add_lora(adapted, rank, 8)
    cache, _ = rarl.prefill(adapted, prompts, G, 3)
    norm = rarl.rms_norm

    def one(module, x):
        before = list(operators.names)
        y = norm(module, x)
        operators.names = [*before, "rms_norm"]
        return y

    monkeypatch.setattr(rarl, "rms_norm", one)
    with torch.no_grad(), lora.adapters_cast(adapted), Operators() as operators:
        rarl.decode_step(adapted, cache, torch.zeros(len(prompts), G, dtype=torch.long), 1)
    assert len(operators.names) <= most * policy.model.config.text_config.num_hidden_layers, operators.names


def test_one_token_answers(policy, prompts):
    # T = 1: nothing of an answer goes in, its only token is predicted by the prompt's last.
    rollout = rarl.generate(policy, prompts, 2, 1, 1.0, torch.Generator().manual_seed(3))
    logp, _ = rarl.logprobs(policy, prompts, rollout.ids, rollout.mask)
    torch.testing.assert_close(logp, rollout.logp, atol=1e-5, rtol=0)


def test_decode_and_encode_are_inverse(policy):
    texts = ['[{"image_id": 1, "value": 17}]', "", "caf\u00e9 \u4f60\u597d [1, 2"]
    rows = rarl.encode(policy, texts)
    assert all(row[-1] == policy.eos_id for row in rows)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    assert rarl.decode(policy, ids, mask) == texts


@pytest.mark.parametrize("end", ["", "\n\n\n", '[{"image_id": 1, "val', '[{"image_id": 1, "value":'])
def test_a_cut_answer_is_marked_and_earns_nothing(policy, end):
    whole = rarl.encode(policy, ['[{"image_id": 1, "value": 17}]' + end])[0]
    for ids, earned in ((whole, 2.0), (whole[:-1], 0.0)):  # with its EOS, without
        text = rarl.decode(policy, ids[None], torch.ones(1, len(ids)))[0]
        assert text.endswith(rarl.CUT) == (earned == 0)
        if earned == 0 or not end.strip():
            assert reward.compute_reward(text, [17], 4).total == earned


def test_special_tokens_show_in_decoded_text(policy):
    # Hidden ones would let an answer of perfect format carry garbage.
    row = rarl.encode(policy, ["[1]"])[0]
    row = torch.cat([torch.tensor([policy.tokenizer.convert_tokens_to_ids("<|im_start|>")]), row])[None]
    assert rarl.decode(policy, row, torch.ones_like(row)) == ["<|im_start|>[1]"]


def test_saved_policy_loads_with_transformers_alone(policy, prompts, tmp_path):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    rarl.save_policy(policy, tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1, "who may read one file may read them all"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    prompt = prompts[1]
    out = model.generate(**usual_way.repeat_inputs(policy, [prompt], 1), do_sample=False, max_new_tokens=T)
    ours = rarl.generate(rarl.load_policy(tmp_path), [prompt], 1, T, temperature=0)
    assert out[0, len(prompt.ids) :].tolist() == answers_of(ours)[0].tolist()


def test_a_saved_policy_samples_elsewhere_as_it_was_trained(policy, prompts, tmp_path):
    # The folder that it came from asks for a penalty, a filter and a second EOS, as Qwen's own does.
    rarl.save_policy(policy, tmp_path / "qwen")
    end, other = policy.eos_id, policy.tokenizer.pad_token_id
    asked = dict(do_sample=True, temperature=0.1, top_k=1, top_p=0.001, repetition_penalty=1.05, eos_token_id=[end, other])  # fmt: skip
    (tmp_path / "qwen" / "generation_config.json").write_text(json.dumps(asked))
    rarl.save_policy(rarl.load_policy(tmp_path / "qwen"), tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "eos_token_id")
    assert [written[name] for name in names] == [True, 1.0, 0, 1.0, 1.0, end]
    # The distributions that transformers samples from, after all its filters, are those that `logprobs` scores.
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    inputs = usual_way.repeat_inputs(policy, prompts[:1], 3)
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=12, output_scores=True, return_dict_in_generate=True)
    ids = out.sequences[:, len(prompts[0].ids) :]
    theirs = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    ours, _ = rarl.logprobs(policy, prompts[:1], ids, mask)
    before_end = (ids == end).cumsum(1) - (ids == end).long() == 0
    torch.testing.assert_close(ours[before_end], theirs[before_end], atol=1e-5, rtol=0)
    assert before_end.sum() > 12


@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16])
def test_config_names_the_dtype_of_the_weights_that_are_written(policy, tmp_path, written):
    # A policy in bf16 that is handed float32 weights, as the sampling copy on a GPU is, and the other way round.
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[written]
    weights = {name: weight.to(written) for name, weight in policy.model.state_dict().items()}
    rarl.save_policy(rarl.cast_copy(policy, other), tmp_path / "given", weights)
    rarl.save_policy(rarl.cast_copy(policy, written), tmp_path / "own")
    for folder in (tmp_path / "given", tmp_path / "own"):
        config = json.loads((folder / "config.json").read_text())
        assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {str(written)[6:]}
        assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {written}


def test_bad_calls_and_folders(policy, prompts, rollout, tmp_path):
    with pytest.raises(ValueError, match="group_size"):
        rarl.generate(policy, prompts, 0, 5)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            rarl.generate(policy, prompts, 1, 5, temperature)
    with pytest.raises(ValueError, match=r"\(B\*G, T\)"):
        rarl.logprobs(policy, prompts, rollout.ids[:-1], rollout.mask[:-1])
    for path in (tmp_path / "nowhere", "", "runs/mistyped", "~/nowhere"):
        with pytest.raises(rarl.ModelError, match="does not exist"):
            rarl.load_policy(path)
    with pytest.raises(rarl.ModelError, match="config.json"):
        rarl.load_policy(tmp_path)
    for device in ("gpu", "cuda:99", "meta:1", ""):
        with pytest.raises(rarl.ModelError, match="cannot use device"):
            rarl.load_policy(tmp_path, device)


def edited(**changes):
    """Rewrites a JSON file. None takes a key away; a dict goes into what the file has under the key."""

    def edit(file):
        content = json.loads(file.read_text())
        for key, value in changes.items():
            if isinstance(value, dict):
                content[key].update(value)
            else:
                content[key] = value
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def reweighted(change):
    """Rewrites the safetensors after `change(weights, name of one of them)`."""

    def edit(file):
        weights = load_file(file)
        change(weights, "model.layers.1.mlp.up_proj.weight")
        save_file(weights, file, {"format": "pt"})

    return edit


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


MISSING = "missing"
DAMAGES = [
    ("config.json", MISSING, "config.json"),
    ("config.json", truncated, "config.json"),
    ("config.json", edited(model_type="bert"), "bert"),
    (
        "config.json",
        edited(text_config={"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}),
        "has no place",
    ),
    ("config.json", edited(text_config={"num_attention_heads": 2, "num_key_value_heads": 1}), "mrope_section"),
    ("config.json", edited(image_token_id=3), "image_pad"),
    ("tokenizer.json", MISSING, "tokenizer.json"),
    ("tokenizer.json", truncated, "tokenizer.json"),
    ("tokenizer_config.json", MISSING, "tokenizer_config.json"),  # transformers would take another EOS, silently
    ("tokenizer_config.json", edited(eos_token="<|endoftext|>"), "eos_token"),
    ("chat_template.jinja", MISSING, "chat_template.jinja"),
    ("chat_template.jinja", truncated, "chat_template.jinja"),
    ("chat_template.jinja", lambda file: file.write_text("{{ messages[0].role }}"), "drops the images"),
    ("preprocessor_config.json", MISSING, "preprocessor_config.json"),
    ("preprocessor_config.json", edited(patch_size=16), "patches"),
    ("preprocessor_config.json", edited(image_mean="x"), "preprocessor_config.json"),
    ("model.safetensors", MISSING, "model.safetensors"),
    ("model.safetensors", truncated, "model.safetensors"),
    ("model.safetensors", reweighted(lambda w, name: w.pop(name)), "up_proj.weight is missing"),
    ("model.safetensors", reweighted(lambda w, name: w.update({name: w[name][1:].clone()})), "another shape"),
    ("model.safetensors", reweighted(lambda w, name: w.update(more=w[name].clone())), "more has no place"),
    ("model.safetensors", reweighted(lambda w, name: w[name][0, 0].fill_(torch.nan)), "up_proj.weight is not finite"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES, ids=[f"{d[0]}-{i}" for i, d in enumerate(DAMAGES)])
def test_a_damaged_folder_is_refused_in_one_sentence(policy_folder, tmp_path, name, damage, message):
    folder = tmp_path / "m"
    shutil.copytree(policy_folder, folder)
    (folder / name).unlink() if damage == MISSING else damage(folder / name)
    with pytest.raises(rarl.ModelError, match=message) as error:
        rarl.load_policy(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("copy that file again from where the model came from")


def test_cast_copy_is_frozen_and_leaves_buffers_and_ties_alone(policy):
    half = rarl.cast_copy(policy, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in half.parameters()) and all(p.requires_grad for p in policy.parameters())
    assert half.model.lm_head.weight is half.model.model.language_model.embed_tokens.weight
    for name, buffer in policy.named_buffers():
        copied = half.get_buffer(name)
        assert copied.dtype == buffer.dtype and torch.equal(copied, buffer) and copied is not buffer
    away = rarl.cast_copy(policy, torch.bfloat16, device=torch.device("meta"))
    assert {p.device.type for p in away.parameters()} == {"meta"} and away.banned.device.type == "cpu"
    same = rarl.cast_copy(policy, torch.float32)
    for ours, copied in zip(policy.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, copied) and ours.data_ptr() != copied.data_ptr()
