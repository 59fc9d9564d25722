"""support/learner/plan.py: what it computes, held against real parameters, a real cache and what autograd really keeps."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import CPU

import data
import rarl
from experiments.costs import peak_bytes
from support.datasets import load_dataset
from support.learner import lora
from support.learner import plan as plan_room
from support.learner.learner import Learner
from support.learner.plan import GB, Longest, Plan, filled_in, longest_prompt, main, plan_text, read_config
from support.learner.policies import load_start
from support.run.settings import SettingError, Settings, parse_settings

TINY = Path(__file__).resolve().parent.parent / "tiny"


def of_these(policy, samples, prompts):
    P, S = (max(len(getattr(p, name)) for p in prompts) for name in ("ids", "pixels"))
    return Longest(P, S, data.max_answer_tokens(policy, samples))


@pytest.fixture(scope="module")
def asked(policy):
    """Two prompts of four images. -> their samples, the prompts"""
    samples = data.make_samples(load_dataset("dots"), 4, 2)
    return samples, data.make_prompts(policy, samples)


def test_parameters_are_counted_as_they_are(policy):
    model, s, some = read_config(TINY), Settings(), Longest(100, 100, 10)
    all_of_them = sum(p.numel() for p in policy.parameters())
    assert Plan(model, s, some).weights == Plan(model, s, some).trained == all_of_them
    adapted, visual = copy.deepcopy(policy), sum(p.numel() for p in policy.model.model.visual.parameters())
    assert Plan(model, Settings(freeze_vision=True), some).trained == all_of_them - visual
    lora.add_lora(adapted, 3, 6.0, "language+vision")
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert Plan(model, Settings(lora_rank=3, lora_targets="language+vision"), some).trained == trained


def test_roles_of_the_weights():
    """The bytes of a parameter, by hand. All of one process: 4 + 4 + 8 + 2; LoRA: 2 of the base, 16 of an adapter's."""
    model, some = read_config(TINY), Longest(100, 0, 10)
    one, four = (Plan(model, Settings(beta=0.0), some, W) for W in (1, 4))
    N = one.weights
    assert sum(one.state().values()) == 18 * N and sum(four.state().values()) == 16 * N / 4 + 2 * N
    moments_on_host = Plan(model, Settings(beta=0.0, offload=True), some)
    assert sum(moments_on_host.state().values()) == 10 * N and moments_on_host.host() == one.host() + 8 * N
    with_kl = Plan(model, Settings(), some).state()["reference"]
    reference = rarl.cast_copy(rarl.load_policy(TINY), torch.bfloat16, torch.nn.Linear)
    assert with_kl == sum(p.numel() * p.element_size() for p in reference.parameters())
    adapters = Plan(model, Settings(lora_rank=2), some, 4)
    assert sum(adapters.state().values()) == 2 * N + 20 * adapters.trained  # 4 for stage 2's frozen copy
    assert Plan(model, Settings(lora_rank=2, stage=1), some).state()["reference"] == 0
    assert (one.checkpoint(), Plan(model, Settings(validate_every=0), some).checkpoint()) == (16 * N, 12 * N)


@pytest.mark.parametrize("s", [Settings(), Settings(beta=0.0, freeze_vision=True), Settings(lora_rank=2)])
def test_state_is_what_a_process_holds_on_a_cpu(s):
    learner = Learner(load_start(TINY, s, CPU.device), CPU, s)
    with torch.no_grad():
        for layer in lora.lora_layers(learner.policy).values():
            layer.B.normal_()  # as in stage 2, which begins with an adapter
    optimizer = learner.begin_stage()
    roles = (learner.policy, learner.rollout_policy, *([learner.reference] if learner.reference else []))
    held = {id(p): p for role in roles for p in role.parameters()}
    held |= {id(x): x for state in optimizer.state.values() for x in state.values() if x.ndim}
    held |= {id(x): x for pair in (learner.began or {}).values() for x in pair}
    bytes_held = sum(x.numel() * x.element_size() for x in held.values())
    bytes_held += sum(4 * p.numel() for p in learner.policy.parameters() if p.requires_grad)  # gradients
    planned = Plan(learner.policy.model.config, s, Longest(100, 0, 10), gpu=False).state()
    assert sum(planned.values()) == bytes_held


def test_cache_is_that_of_a_prefill(policy, asked):
    samples, prompts = asked
    longest = of_these(policy, samples, prompts)
    with torch.no_grad():
        cache, _ = rarl.prefill(policy, prompts, 3, longest.T)
    real = sum(x.numel() * x.element_size() for kv in cache.layers for x in kv)
    assert Plan(policy.model.config, Settings(), longest, gpu=False).cache(2, 3) == real


def test_a_rollout_takes_what_is_planned(policy, asked):
    samples, prompts = asked
    longest = of_these(policy, samples, prompts)
    endless = copy.deepcopy(policy)
    endless.banned[endless.eos_id] = True
    real = peak_bytes(lambda: rarl.generate(endless, prompts, 8, longest.T), policy.device)
    planned = Plan(policy.model.config, Settings(), longest, gpu=False).rollout(2, 8)
    assert real <= planned < 1.8 * real


def kept_by_autograd(policy, prompts, ids):
    """Bytes that the forward pass keeps for the backward pass, without the parameters; each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rarl.logprobs(policy, prompts, ids, torch.ones_like(ids, dtype=torch.bool))
    return sum(storage.nbytes() for place, storage in kept.items() if place not in parameters)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("more", [{}, {"freeze_vision": True}, {"lora_rank": 2}, {"lora_rank": 2, "lora_targets": "language+vision"}])  # fmt: skip
def test_activations_are_what_autograd_keeps(policy, asked, more, checkpointing):
    s = Settings(group_size=4, activation_checkpointing=checkpointing, **more)
    policy, prompts = copy.deepcopy(policy), copy.deepcopy(asked[1])
    longest = of_these(policy, asked[0], prompts)
    plan = Plan(policy.model.config, s, longest, gpu=False)
    if s.lora_rank:
        lora.add_lora(policy.model, s.lora_rank, s.lora_alpha, s.lora_targets)
    if not plan.vision_trained:
        policy.model.model.visual.requires_grad_(False)
        rarl.encode_images(policy, prompts)  # as Learner.prepare does
    if checkpointing:
        policy.model.activation_checkpointing_enable()
    ids = torch.randint(5, 300, (8, longest.T), generator=torch.Generator().manual_seed(0))
    real = kept_by_autograd(policy.train(checkpointing), prompts, ids)
    assert plan.activations(2) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("n", [1, 8])
def test_longest_prompt_is_not_underestimated(n):
    policy = rarl.load_policy(TINY)
    samples = data.make_samples(load_dataset("dots"), n, 20)
    real = of_these(policy, samples, data.make_prompts(policy, samples))
    planned = longest_prompt(Settings(images=(n,)), policy.model.config)
    assert planned.S == real.S and real.P <= planned.P < 1.3 * real.P and real.T <= planned.T < 1.3 * real.T


def test_largest_numbers_fit_and_one_more_does_not():
    """tiny on a card that holds little: the table's largest batch is checked against the formula."""
    s = dataclasses.replace(Settings(), batch_size=64)
    model = read_config(TINY)
    plan = Plan(model, s, longest_prompt(s, model))
    line = next(x for x in plan_text(s, TINY, 2.1).splitlines() if x.startswith("largest --rollout-batch"))
    largest = int(line.split()[2])
    room = 0.1 * GB - sum(plan.state().values())
    assert plan.rollout(largest, s.group_size) <= room < plan.rollout(largest + 1, s.group_size) and 1 < largest < 64
    *head, one, _, _, _ = plan_text(s, TINY, 2.01).splitlines()[-1].split()
    assert " ".join(head) == "too much for a card of 2.01 GB" and float(one) > 0


def test_what_is_0_becomes_the_largest_that_fits(policy, monkeypatch, capsys):
    s = Settings(batch_size=64, rollout_batch=0, max_tokens_per_forward=0, activation_checkpointing=True)
    model, items = policy.model, load_dataset("dots")
    on = lambda kind: SimpleNamespace(device=torch.device(kind), size=1, main=True)
    usual = Settings()
    assert filled_in(s, model, items, on("cpu")) == dataclasses.replace(
        s, rollout_batch=usual.rollout_batch, max_tokens_per_forward=usual.max_tokens_per_forward
    )
    monkeypatch.setattr(plan_room, "card_bytes", lambda world: 2.1 * GB)
    filled = filled_in(s, model, items, on("cuda"))
    longest = longest_prompt(s, model.config)  # which draws the same items
    plan, more = (
        Plan(model.config, x, longest)
        for x in (filled, dataclasses.replace(filled, rollout_batch=filled.rollout_batch + 1))
    )
    assert max(plan.passing().values()) + sum(plan.state().values()) == plan.peak() <= 0.1 * GB < more.peak()
    assert f"--rollout-batch {filled.rollout_batch} " in capsys.readouterr().err
    given = dataclasses.replace(s, rollout_batch=3)
    assert filled_in(given, model, items, on("cuda")).rollout_batch == 3
    monkeypatch.setattr(plan_room, "card_bytes", lambda world: 2.01 * GB)
    with pytest.raises(SettingError, match="not even one prompt fits this card of 2 GB"):
        filled_in(s, model, items, on("cuda"))


def test_plan_prints_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([])
    assert "W = 8" in capsys.readouterr().out and not list(tmp_path.iterdir())
    s = parse_settings(["--preset", "utkface", "--model", str(TINY)], needed=())  # no --data-root: from --max-pixels
    assert longest_prompt(s, read_config(TINY)).S == 8 * 4 * 256
    s = parse_settings(["--preset", "csv", "--model", str(TINY)], needed=())  # whose decimals the labels would tell
    assert longest_prompt(s, read_config(TINY)).T > 0


def test_the_table_of_the_page_is_what_is_printed(tmp_path):
    """config.json of the published 3B, as far as sizes go."""
    config = dict(
        model_type="qwen2_5_vl", hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        intermediate_size=11008, vocab_size=151936, tie_word_embeddings=True,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        vision_config=dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=2048),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    s = parse_settings(["--preset", "utkface", "--model", "Qwen/Qwen2.5-VL-3B-Instruct"], needed=())
    page = (TINY.parent / "docs/memory.md").read_text(encoding="utf-8")
    assert "\n".join(f"    {x}".rstrip() for x in plan_text(s, tmp_path, 80).splitlines()) in page


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        (None, [], "model folder .* does not exist"),
        ("{", [], "cannot read config.json"),
        (json.dumps({"model_type": "bert"}), [], "the model is a bert"),
        ((TINY / "config.json").read_text(), ["--data", "cats"], "unknown data set 'cats'"),
        ((TINY / "config.json").read_text(), ["--gpu-memory", "-1"], "--gpu-memory: -1 is less than 0"),
        ((TINY / "config.json").read_text(), ["--preset", "csv", "--steps1", "-1"], "--steps1 -1 must not be negative"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, config, more, said, capsys):
    folder = tmp_path / "model"
    if config is not None:
        folder.mkdir()
        (folder / "config.json").write_text(config)
    with pytest.raises(SystemExit) as end:
        main(["--model", str(folder), *more])
    message = f"{end.value.code}{capsys.readouterr().err}"
    assert re.search(said, message) and "Traceback" not in message
