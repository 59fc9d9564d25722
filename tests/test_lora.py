"""support/learner/lora.py by hand and against peft; the Learner's three roles with one copy of the weights; runs, files, bad input."""

import copy
import json
import shutil

import peft
import pytest
import torch
from runs import CPU, ROOT, TINY, copies_when_logged, lines, train_here, train_in_two
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

import data
import eval as evaluation
import rarl
from experiments import usual_way
from support.datasets import load_dataset
from support.learner import lora
from support.learner.learner import Learner
from support.learner.policies import load_any, load_start
from support.learner.stage import Batch
from support.run.settings import SettingError, Settings, parse_settings

G, T = 4, 12


def move_adapters(model, seed=1):
    """Both factors to where training might have brought them: B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            layer.A += 0.05 * torch.randn(layer.A.shape, generator=generator)
            layer.B += 0.05 * torch.randn(layer.B.shape, generator=generator)


def adapted(folder, rank=4, alpha=8.0, targets="language+vision", moved=True, dtype=torch.float32):
    policy = rarl.load_policy(folder, dtype=dtype)
    lora.add_lora(policy.model, rank, alpha, targets, torch.Generator().manual_seed(0))
    if moved:
        move_adapters(policy)
    return policy


@pytest.fixture(scope="module")
def prompts(policy):
    items = load_dataset("dots", None, "test")
    return data.make_prompts(policy, [s for n in (1, 3) for s in data.make_samples(items, n, 1)])


@pytest.fixture(scope="module")
def answers(policy, prompts):
    return rarl.generate(policy, prompts, G, T, 1.0, torch.Generator().manual_seed(0))


def score(policy, prompts, answers):
    return rarl.logprobs(policy, prompts, answers.ids, answers.mask)[0]


def logits(model, policy, prompts):
    """transformers' own forward of the first prompt, whatever stands at the linear layers."""
    with torch.no_grad(), usual_way.transformers_alone(policy):
        return model(**usual_way.repeat_inputs(policy, prompts[:1], 1, None)).logits


# --- the layer -------------------------------------------------------------------------------------------------------


def test_output_and_gradients_by_hand():
    # W = [1 2 3; 0 1 0], no bias, r = 1, alpha = 2, so the scale is 2.  A = [1 0 2], B = [1; -1], x = [1 1 1]
    # W x = [6; 1], A x = 3, y = W x + 2 B A x = [6 + 6; 1 - 6] = [12; -5].  With loss = g . y, g = [1; 3]:
    # dB = 2 g (A x)^T = [6; 18],  dA = 2 (B^T g) x^T = 2 (1 - 3) [1 1 1] = [-4 -4 -4]
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2, 3], [0, 1, 0]])
    lora.add_lora(model, rank=1, alpha=2, targets="0")
    layer = model[0]
    layer.A.data, layer.B.data = torch.tensor([[1.0, 0, 2]]), torch.tensor([[1.0], [-1.0]])
    y = model(torch.ones(3))
    assert y.tolist() == [12, -5]
    (torch.tensor([1.0, 3.0]) @ y).backward()
    assert layer.B.grad.tolist() == [[6], [18]] and layer.A.grad.tolist() == [[-4, -4, -4]]
    assert layer.base.weight.grad is None
    with lora.adapters_off(model):
        assert model(torch.ones(3)).tolist() == [6, 1]
    lora.merge(model)  # W + 2 B A = [1 2 3; 0 1 0] + [2 0 4; -2 0 -4]
    assert model[0].weight.tolist() == [[3, 2, 7], [-2, 1, -4]] and model[0].weight.requires_grad


def test_adapters_stand_where_they_are_asked_for(policy_folder):
    names = {}
    for targets in ("language", "language+vision", ("q_proj", "v_proj")):
        model = adapted(policy_folder, targets=targets, moved=False).model
        names[targets] = set(lora.lora_layers(model))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{name}.{factor}" for name in names[targets] for factor in "AB"}
    assert len(names["language"]) == 4 * 7 and len(names["language+vision"]) == 4 * 7 + 4 * 5 + 2
    assert {name.split(".")[-1] for name in names["q_proj", "v_proj"]} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="no linear layer has lm_head in its name"):
        lora.add_lora(rarl.load_policy(policy_folder), 4, 8, ["lm_head"])


def test_the_start_and_adapters_off_are_the_base_to_the_last_bit(policy_folder, prompts, answers):
    base = rarl.load_policy(policy_folder)
    expected, sampled = score(base, prompts, answers), rarl.generate(base, prompts, 1, T, 0.0)
    policy = adapted(policy_folder, moved=False)
    assert torch.equal(score(policy, prompts, answers), expected)
    move_adapters(policy)
    assert (score(policy, prompts, answers) - expected).abs().max() > 0.1
    with lora.adapters_off(policy.model):
        assert torch.equal(score(policy, prompts, answers), expected)
        again = rarl.generate(policy, prompts, 1, T, 0.0)
        assert torch.equal(again.ids, sampled.ids) and torch.equal(again.logp, sampled.logp)


def test_sampling_and_scoring_go_through_the_same_adapters(policy_folder, prompts):
    policy = adapted(policy_folder)
    rollout = rarl.generate(policy, prompts, G, T, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(score(policy, prompts, rollout), rollout.logp, atol=1e-5, rtol=0)


def test_a_bf16_base_is_sampled_and_scored_in_bf16_and_its_adapters_trained_in_float32(policy_folder, prompts):
    # On a GPU: sampled without autocast, scored under it. Both must take bf16 hidden states through float32 adapters.
    policy = adapted(policy_folder, dtype=torch.bfloat16)
    rollout = rarl.generate(policy, prompts, G, T, 1.0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logp = score(policy, prompts, rollout)
    gap = (logp - rollout.logp).abs()[rollout.mask]
    assert gap.mean() < 0.03 and gap.max() < 0.3
    logp.sum().backward()
    for name, p in policy.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
        assert (p.grad is not None) == p.requires_grad and (p.grad is None or p.grad.any()), name


# --- peft ------------------------------------------------------------------------------------------------------------


def test_peft_loads_what_is_saved_here(policy, policy_folder, prompts, tmp_path):
    ours = adapted(policy_folder)
    lora.save_adapter(ours.model, tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1, "who may read one file may read them all"
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(policy_folder, dtype=torch.float32)
    plain = logits(base, ours, prompts)
    theirs = logits(peft.PeftModel.from_pretrained(base, tmp_path), ours, prompts)
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(theirs, logits(ours.model, ours, prompts), atol=1e-4, rtol=0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(policy_folder)
    again = load_any(tmp_path)
    for name, (A, B) in lora.adapters_of(ours.model).items():
        assert all(map(torch.equal, lora.adapters_of(again.model)[name], (A, B)))


def test_what_peft_saves_is_loaded_here(policy_folder, prompts, tmp_path):
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(policy_folder, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path)
    ours = load_any(tmp_path)
    assert len(lora.lora_layers(ours.model)) == 4 + 4 + 4
    torch.testing.assert_close(logits(ours.model, ours, prompts), logits(theirs, ours, prompts), atol=1e-4, rtol=0)


# --- the Learner -----------------------------------------------------------------------------------------------------


def make_learner(folder, **settings):
    s = Settings(**{"lora_rank": 4, "lora_alpha": 8.0, "group_size": G, "beta": 0.1} | settings)
    return Learner(load_start(folder, s, CPU.device), CPU, s)


def test_one_module_in_three_roles(policy_folder, prompts, answers):
    """The reference is the base in stage 1; in stage 2 it is what stage 1 left, while the adapter goes on."""
    learner = make_learner(policy_folder)
    batch = Batch(prompts, answers.ids, answers.mask, answers.logp, None, None)
    expected = score(rarl.load_policy(policy_folder), prompts, answers)
    for seed in (1, 2):
        learner.begin_stage()
        assert learner.policy is learner.rollout_policy is learner.reference
        move_adapters(learner.policy, seed)
        assert torch.equal(learner.reference_logprobs(batch), expected)
        now = score(learner.policy, prompts, answers).detach()
        assert (now - expected).abs().max() > 0.1
        expected = now


def test_activation_checkpointing_gives_the_same_gradients(policy_folder, prompts, answers):
    # The embeddings are frozen, so no layer's input has a gradient at first. And the reference is computed between forward and
    # backward: what is run again in the backward must have the adapters on.
    found = []
    for on in (False, True):
        learner = make_learner(policy_folder, activation_checkpointing=on)
        move_adapters(learner.policy)
        learner.begin_stage()
        learner.policy.train(on)
        logp = score(learner.policy, prompts, answers)
        batch = Batch(prompts, answers.ids, answers.mask, answers.logp, None, None)
        (logp - learner.reference_logprobs(batch)).square().sum().add(logp.sum()).backward()
        found.append([p.grad for p in learner.policy.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        assert a.any()


def test_a_frozen_vision_tower_is_run_once(policy_folder, prompts):
    for targets, once in (("language", True), ("language+vision", False)):
        few = copy.deepcopy(prompts)
        make_learner(policy_folder, lora_targets=targets).prepare(few)
        assert all((prompt.features is not None) == once for prompt in few)


# --- runs ------------------------------------------------------------------------------------------------------------

RUN = [*TINY, "--lora-rank", "4", "--lora-alpha", "8", "--lr", "5e-3", "--steps1", "2", "--steps2", "2"]


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch().context() as patch, copies_when_logged((1, 1), (2, 1)):
        patch.chdir(folder)
        train_here(*RUN)
    return folder / "runs" / "rarl"


def test_a_run_leaves_adapters_over_the_base(lora_run):
    log = lines(lora_run / "metrics.jsonl")
    assert [l["kl"] == 0 for l in log] == [True, False, True, False]  # each stage's reference is its own beginning
    assert all(l["logp_gap_max"] < 1e-4 and l["grad_norm"] > 0 for l in log)
    files = {path.name for path in (lora_run / "stage2").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "task.json",
        "checksums.json",
    } <= files
    assert "model.safetensors" not in files
    stages = [load_file(lora_run / f"stage{i}" / "adapter_model.safetensors") for i in (1, 2)]
    assert all((stages[0][name] != stages[1][name]).any() for name in stages[0])  # stage 2 goes on with stage 1's
    config = json.loads((lora_run / "stage2/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(ROOT / "tiny")
    assert "PeftModel" in (lora_run / "stage2/README.md").read_text()


def test_an_adapter_is_evaluated_and_ranks_like_whole_weights(lora_run, tmp_path):
    images = [item.image() for item in load_dataset("dots", None, "test")[:3]]
    shown = [str(tmp_path / f"{number}.png") for number in range(3)]
    for image, path in zip(images, shown, strict=True):
        image.save(path)
    evaluation.main(["--model", str(lora_run / "stage2"), "--out", str(tmp_path), "--rank", *shown])
    assert len(lines(tmp_path / "ranking.jsonl")) == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_and_resumed_is_as_if_never_stopped(lora_run, here, signals, stage):
    shutil.copytree(lora_run.parent.parent / f"killed-{stage}-1", "runs")
    run = here / "runs" / "rarl"
    # The base is not in a checkpoint: nothing but A, B and their two moments.
    saved = load_file(next((run / "checkpoints" / f"{stage}-0000001").glob("*.safetensors")))
    weights = [name for name in saved if name.startswith("weights.")]
    assert len(weights) == 2 * 28 and all(name.endswith((".A", ".B")) for name in weights)
    train_here(*RUN, "--resume")
    names = ("metrics.jsonl", "results.json", "stage1/adapter_model.safetensors", "stage2/adapter_model.safetensors")
    for name in names:
        assert (run / name).read_bytes() == (lora_run / name).read_bytes(), name


def test_two_processes_take_the_same_steps(lora_run, tmp_path):
    train_in_two(tmp_path, *RUN, "--stage", "1")
    two = tmp_path / "runs" / "rarl"
    for a, b in zip(lines(lora_run / "metrics.jsonl")[:2], lines(two / "metrics.jsonl"), strict=True):
        for name in ("reward", "loss", "grad_norm", "entropy", "kl"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    a, b = (load_file(run / "stage1" / "adapter_model.safetensors") for run in (lora_run, two))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-4


def test_an_adapter_goes_on_or_is_merged(lora_run, prompts, answers):
    stage1 = lora_run / "stage1"
    goes_on = load_start(stage1, Settings(lora_rank=4, lora_alpha=8.0), CPU.device)
    merged = load_start(stage1, Settings(), CPU.device)
    assert not lora.lora_layers(merged.model) and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(score(goes_on, prompts, answers), score(merged, prompts, answers), atol=1e-4, rtol=0)
    with pytest.raises(SettingError, match="adapter of rank 4 and alpha 8 at 28 layers, not of rank 16"):
        load_start(stage1, Settings(lora_rank=16), CPU.device)
    with pytest.raises(SettingError, match="at 28 layers, not of rank 4 and alpha 8 at 50"):
        load_start(stage1, Settings(lora_rank=4, lora_alpha=8.0, lora_targets="language+vision"), CPU.device)


# --- bad input -------------------------------------------------------------------------------------------------------


def reconfigured(**changes):
    def damage(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def reweighted(change):
    def damage(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights, sorted(weights)[0])
        save_file(weights, folder / "adapter_model.safetensors")

    return damage


def truncated(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def retrained_base(folder):
    base = folder.parent / "retrained"
    policy = rarl.load_policy(ROOT / "tiny")
    with torch.no_grad():
        policy.model.model.language_model.layers[0].mlp.up_proj.weight += 0.1
    rarl.save_policy(policy, base)
    reconfigured(base_model_name_or_path=str(base))(folder)


BAD = {
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be"),
    "half the weights": (truncated, "adapter_model.safetensors cannot be read"),
    "no rank": (reconfigured(r=None), "adapter_config.json cannot be read"),
    "another method": (reconfigured(peft_type="IA3"), "does not describe a LoRA adapter"),
    "another scale": (reconfigured(use_rslora=True), "use_rslora true is not supported"),
    "weights that are not the base's": (reconfigured(init_lora_weights="pissa"), 'init_lora_weights "pissa" is not supported'),
    "what a later peft may add": (reconfigured(use_magic={"layers": [3]}), 'use_magic {"layers": [3]} is not supported'),
    "another rank": (reconfigured(r=5), "is not of rank 5, or not of the base's size"),
    "no base": (reconfigured(base_model_name_or_path="gone/for/good"), "gone/for/good does not exist (base_model_name"),
    "a retrained base": (retrained_base, "was trained on another base"),
    "not finite": (reweighted(lambda w, name: w[name].view(-1)[0].fill_(torch.nan)), "is not finite"),
    "a missing factor": (reweighted(lambda w, name: w.pop(name.replace("_A", "_B"))), "is not of rank 4"),
    "another model's": (reweighted(lambda w, name: w.update({"base_model.model.x.lora_A.weight": w[name].clone()})), "x is no linear"),
    "more than LoRA": (reweighted(lambda w, name: w.update(magnitude=w[name].clone())), "magnitude is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", BAD.values(), ids=BAD)
def test_a_bad_adapter_is_one_sentence(lora_run, tmp_path, damage, message):
    shutil.copytree(lora_run / "stage1", tmp_path / "stage1")
    damage(tmp_path / "stage1")
    with pytest.raises(rarl.ModelError) as error:
        load_any(tmp_path / "stage1")
    assert message in str(error.value) and str(tmp_path / "stage1") in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="eval.py: "):
        evaluation.main(
            ["--model", str(tmp_path / "stage1"), "--data", "dots", "--samples", "2", "--out", str(tmp_path / "out")]
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--lora-rank -1", "--lora-rank -1 must be"),
        ("--lora-rank 4 --lora-alpha 0", "--lora-alpha 0.0 must be positive"),
        ("--lora-rank 4 --lora-targets language+vision --freeze-vision", "goes with --lora-targets language"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(SettingError) as error:
        parse_settings(arguments.split())
    assert message in str(error.value)
