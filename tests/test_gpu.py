"""What has to hold on a GPU: each branch that is taken there, against its twin on the CPU.

    python -m pytest -m gpu        # half a minute on a card; skipped where there is none

tests/test_pretended_cuda.py runs this file on a device that only claims to be a GPU. bf16 has 8 bits: numbers of size 1 are off by
up to 0.004 a rounding, and the tolerances below are some roundings.
"""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import rarl
import train
from experiments import bench
from support.datasets import load_dataset
from support.learner.learner import Learner
from support.learner.plan import Longest, Plan
from support.learner.policies import load_start
from support.learner.stage import RewardWeights, Stage
from support.learner.world import World
from support.run.settings import Settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
REAL = torch.cuda.is_available() and type(torch.zeros(1, device=GPU)) is torch.Tensor  # not tests/pretended_cuda
real = pytest.mark.skipif(not REAL, reason="needs a real GPU")
ROOT = Path(__file__).resolve().parent.parent
G, T = 4, 6


def relative(a, b):
    """How far tensors are from those of the CPU, as a share of their norm."""
    a, b = (torch.cat([x.detach().cpu().float().flatten() for x in some]) for some in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def samples():
    dots = load_dataset("dots", None, "test")
    wide = data.Item("wide", 3, dots[0].task, lambda: dots[0].image().resize((224, 140)))  # has several windows
    return [data.Sample((dots[0],)), data.Sample((wide, dots[1])), data.Sample(tuple(dots[2:5]))]


@pytest.fixture(scope="module")
def prompts(policy, samples):
    return data.make_prompts(policy, samples)


@pytest.fixture(scope="module")
def half(policy):
    """The copy that samples: bf16, on the GPU."""
    return rarl.cast_copy(policy, torch.bfloat16, device=GPU).to(GPU)


@pytest.fixture(scope="module")
def rollout(half, prompts):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return rarl.generate(half, prompts, G, T, 1.0, generators)


@pytest.mark.parametrize("answers", [[], [3, 1, 5, 2]], ids=["prompts alone", "with answers"])
def test_packed_attention_and_its_gradient(answers):
    rng, lengths = torch.Generator().manual_seed(0), [9, 14]
    L = sum(lengths) + sum(answers)
    here = [torch.randn(1, heads, L, 32, generator=rng).bfloat16() for heads in (4, 2, 2)]
    weight = torch.randn(1, L, 4, 32, generator=rng)
    both = []
    for device in (CPU, GPU):
        qkv = [x.to(device).requires_grad_() for x in here]
        out, _ = rarl.packed_attention(None, *qkv, rarl.Packing(lengths, answers, device), 0.2)
        both.append([out, *torch.autograd.grad((weight.to(device) * out).sum(), qkv)])
    assert rarl.has_varlen(qkv[0])  # else this compares the same code twice
    for ours, theirs in zip(*both, strict=True):
        assert relative([theirs], [ours]) < 0.02


@pytest.mark.parametrize("lengths", [[6, 6, 6], [4, 9, 4, 1, 9]])
def test_window_attention_and_its_gradient(lengths):
    rng, bounds = torch.Generator().manual_seed(0), torch.tensor([0, *lengths]).cumsum(0)
    here = [torch.randn(1, 2, sum(lengths), 16, generator=rng).bfloat16() for _ in range(3)]
    both = []
    for device in (CPU, GPU):
        qkv = [x.to(device).requires_grad_() for x in here]
        how = dict(scaling=0.3, cu_seq_lens_q=bounds.to(device), max_length_q=max(lengths))
        out, _ = rarl.window_attention(None, *qkv, None, **how)
        both.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for ours, theirs in zip(*both, strict=True):
        assert relative([theirs], [ours]) < 0.02


def test_decoding_scores_as_the_packed_row_and_as_the_cpu(policy, half, prompts, rollout):
    ids, mask, logp = rollout.ids.cpu(), rollout.mask.cpu(), rollout.logp.cpu()
    with torch.no_grad():
        exact, _ = rarl.logprobs(policy, prompts, ids, mask)
        packed = rarl.logprobs(half, prompts, rollout.ids, rollout.mask)[0].cpu()
        on_cpu = rarl.logprobs(rarl.cast_copy(policy, torch.bfloat16), prompts, ids, mask)[0]
    gap = lambda x: float((x - exact)[mask].square().mean().sqrt())
    # bf16 weights and products cost something on the CPU too. The GPU's kernels must not cost more.
    assert gap(logp) < 1.5 * gap(on_cpu) and gap(packed) < 1.5 * gap(on_cpu), (gap(logp), gap(packed), gap(on_cpu))
    assert abs(float((logp - exact)[mask].mean())) < gap(on_cpu) / 2  # no bias


def test_nobody_waits_in_the_decode_loop(half, prompts):
    uniform = torch.rand(len(prompts), G, 3).to(GPU)
    with torch.no_grad():
        cache, hidden = rarl.prefill(half, prompts, G, 3)
        hidden = hidden[:, None].expand(-1, G, -1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in range(3):
                logps = rarl.sampling_logits(half, hidden, 1.0).log_softmax(-1)
                hidden = rarl.decode_step(half, cache, rarl.sample_tokens(logps, uniform[:, :, t]), t)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert hidden.isfinite().all()


def test_nobody_waits_between_layers(half, prompts, rollout):
    scoring, set_mode = copy.deepcopy(half), torch.cuda.set_sync_debug_mode
    for layers in (scoring.model.model.language_model.layers, scoring.model.model.visual.blocks):
        layers[1].register_forward_pre_hook(lambda *args: set_mode("error"))  # bounds and places are made in the first
        layers[-1].register_forward_hook(lambda *args: set_mode("default"))
    try:
        logp, _ = rarl.logprobs(scoring, prompts, rollout.ids, rollout.mask)
    finally:
        set_mode("default")
    assert logp.isfinite().all()


def test_logits_are_finer_than_bf16(half):
    hidden = torch.randn(64, half.model.config.text_config.hidden_size, device=GPU).bfloat16()
    logits = rarl.sampling_logits(half, 30 * hidden, 1.0)[:, ~half.banned]
    assert logits.dtype == torch.float32 and (logits.abs() > 16).any()
    assert (logits != logits.bfloat16()).float().mean() > 0.9


VARIANTS = {
    "full": {},
    "two updates, checkpointing, offload": dict(updates=2, activation_checkpointing=True, offload=True),
    "frozen vision": dict(freeze_vision=True),
    "LoRA": dict(lora_rank=4, activation_checkpointing=True),
    "LoRA with vision": dict(lora_rank=4, lora_targets="language+vision"),
}


@pytest.mark.parametrize("more", VARIANTS.values(), ids=list(VARIANTS))
def test_a_step_is_that_of_the_cpu(policy_folder, samples, more):
    s = Settings(group_size=G, batch_size=2, max_tokens_per_forward=300, rmo_probability=0.0, **more)
    stage = Stage(2, 1, None, RewardWeights(1, 1, 1), T)
    asked = samples[:2]
    logs, moved = [], []
    for device in (CPU, GPU):
        learner = Learner(load_start(policy_folder, s, device), World(0, 1, device), s)
        optimizer = learner.begin_stage()
        prompts = data.make_prompts(learner.policy, asked)
        learner.prepare(prompts)
        if device == CPU:
            batch = train.collect(learner, stage, 0, asked, prompts, {})
            # Random answers earn nothing. The advantages are made up, the same on both devices.
            batch.advantages = torch.tensor([[1.0, -1.0, 0.5, -0.5], [-1.0, 0.2, 0.3, 0.5]])
        else:
            theirs = train.collect(learner, stage, 0, asked, prompts, {})
            assert theirs.ids.device == GPU and theirs.advantages.isfinite().all()
            batch = copy.copy(batch)
            batch.prompts = prompts
            batch.ids, batch.mask, batch.sampled_logp = (x.to(GPU) for x in (batch.ids, batch.mask, batch.sampled_logp))
        before = [p.detach().clone() for p in learner.policy.parameters() if p.requires_grad]
        logs.append(train.update(learner, optimizer, batch))
        learner.sync_rollout_policy()
        after = [p for p in learner.policy.parameters() if p.requires_grad]
        moved.append([x.detach().cpu() - y.cpu() for x, y in zip(after, before, strict=True)])
        assert learner.is_sound(batch) and not logs[-1]["bad"]
        assert {p.device for p in learner.policy.parameters()} == {device}
        state = {x.device for group in optimizer.state.values() for name, x in group.items() if name != "step"}
        assert state == {CPU if s.offload else device}
    ours, theirs = logs
    assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=0.05)
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=0.02)
    # AdamW's first step is the gradient's sign: it differs only where a gradient is smaller than its error.
    agree = sum(float((x * y).sum()) for x, y in zip(*moved, strict=True)) / sum(float((x * x).sum()) for x in moved[0])
    assert agree > 0.8


def test_bench_measures_both_ways(policy_folder, monkeypatch, capsys):
    shape = "--prompts 2 --images 1 --pixels 56 --group 2 --tokens 2 --repeats 1 --micro 2"
    if not REAL:  # the pretended one counts no memory, and a product of 8192 x 8192 would take it minutes
        monkeypatch.setattr(bench, "peak_bytes", lambda *args: 1e6)
        monkeypatch.setattr(bench, "matmul_peak", lambda *args: 1e10)
    assert bench.bench([*shape.split(), "--device", "cuda", "--model", str(policy_folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    parts = ["rollout", "reference", "update"]
    assert [line.split()[0] for line in printed if " s (" in line] == parts
    assert [line.split()[1] for line in printed if line.startswith("memory, ")] == parts


@real
def test_the_plan_is_about_what_is_used(policy_folder):
    """Its margin is one-sided: what it forgets would end a run after hours, what it adds costs a little speed."""
    s = Settings(group_size=8, batch_size=8, images=(4,))
    dots = load_dataset("dots", None, "train")
    wide = [data.Item(x.name, x.label, x.task, lambda x=x: x.image().resize((448, 448))) for x in dots[:32]]
    asked = [data.Sample(tuple(wide[i : i + 4])) for i in range(0, 32, 4)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learner = Learner(load_start(policy_folder, s, GPU), World(0, 1, GPU), s)
    optimizer = learner.begin_stage()
    prompts = data.make_prompts(learner.policy, asked)
    learner.prepare(prompts)
    batch = train.collect(learner, Stage(2, 1, None, RewardWeights(1, 1, 1), 64), 0, asked, prompts, {})
    batch.advantages = torch.randn(8, 8)
    train.update(learner, optimizer, batch)
    used = torch.cuda.max_memory_allocated() - before
    longest = Longest(max(len(p.ids) for p in prompts), max(len(p.pixels) for p in prompts), batch.ids.shape[1])
    planned = Plan(learner.policy.model.config, s, longest).peak()
    assert used < 1.05 * planned + 64e6 and used > planned / 2  # 64 MB: the matrix products' workspaces


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_two_gpus_take_the_step_of_one(tmp_path):
    logs = []
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        small = "--stage 1 --steps1 1 --batch-size 8 --group-size 4 --eval-samples 2 --val-samples 2 --workers 0 --device cuda"
        done = subprocess.run(
            [*start, str(ROOT / "train.py"), *small.split()], cwd=tmp_path / str(n), capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        logs.append(json.loads((tmp_path / str(n) / "runs/rarl/metrics.jsonl").read_text().splitlines()[0]))
    one, two = logs  # a few tokens differ, as batches of other sizes round differently
    assert two["reward"] == pytest.approx(one["reward"], abs=0.2)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.3)


def test_a_run_goes_through_and_on(tmp_path, monkeypatch, capfd):
    """The program itself: evaluation, a step, a checkpoint; then --resume reads it and takes the next step."""
    monkeypatch.chdir(tmp_path)
    small = (
        "--device cuda --stage 1 --batch-size 2 --group-size 2 --images 1 --eval-samples 1 --val-samples 1 --workers 0"
    )
    more = "--watch-every 0 --validate-every 0 --checkpoint-every 1 --steps1 2 --lora-rank 2 --rollout-batch 0"

    class Stopped(BaseException):
        """As if the process had been killed after the first step."""

    honest = train.update

    def once(*args):
        monkeypatch.setattr(train, "update", lambda *args: (_ for _ in ()).throw(Stopped))
        return honest(*args)

    monkeypatch.setattr(train, "update", once)
    with pytest.raises(Stopped):
        train.main([*small.split(), *more.split()])
    monkeypatch.setattr(train, "update", honest)
    train.main(["--resume"])
    said = capfd.readouterr().err
    assert "by the memory plan: --rollout-batch 2 " in said and "GPU memory after the first step" in said
    log = [json.loads(line) for line in (tmp_path / "runs/rarl/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log if "loss" in x] == [0, 1] and all(
        math.isfinite(x["loss"]) for x in log if "loss" in x
    )
