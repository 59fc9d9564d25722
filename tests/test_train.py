"""The loop: settings, preflight, what goes into the update, both stages end to end, resuming, several processes."""

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import grpo
import rarl
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--steps1", "3", "--steps2", "3", "--batch-size", "4", "--group-size", "4", "--images", "2", "4",
         "--eval-samples", "4", "--checkpoint-every", "1", "--workers", "0"]  # fmt: skip


def command(*arguments, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*start, str(ROOT / "train.py"), *SMALL, *arguments]


def run_train(folder, *arguments, processes=1):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments, processes=processes), cwd=folder, env=environment, capture_output=True, text=True
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of both stages on the embedded policy, never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_train(folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "rarl", done


# --- end to end ------------------------------------------------------------------------------------------------------


def test_both_stages_end_to_end(finished):
    out, done = finished
    log = lines(out / "metrics.jsonl")
    assert [(l["stage"], l["step"]) for l in log] == [(stage, step) for stage in (1, 2) for step in range(3)]
    assert [l["images"] for l in log[:3]] == [1, 1, 1] and {l["images"] for l in log[3:]} == {2, 4}
    for l in log:
        assert l["ratio"] == pytest.approx(1.0) and l["logp_gap_max"] < 1e-4  # on-policy, and scored as sampled
        assert l["format"] > 0.8 and 0 <= l["regression"] <= 1 and l["kl"] >= 0 and l["grad_norm"] > 0
        assert (l["ranking"] is None) == (l["stage"] == 1)
        assert l["reward"] == pytest.approx(l["regression"] + l["format"] + (l["ranking"] or 0))
    assert log[0]["kl"] == 0  # nothing has moved yet
    table = (out / "results.txt").read_text()
    assert table in done.stdout
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["base", "stage", "stage"]
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["base", "stage 1", "stage 2"] and list(results["base"]) == ["1", "2", "4"]
    for name in ("base", "stage1", "stage2"):
        assert len(lines(out / f"predictions_{name}.jsonl")) == 12
    assert (out / "predictions.png").stat().st_size > 10_000
    assert not (out / "checkpoints").exists()
    stages = [load_file(out / f"stage{i}" / "model.safetensors") for i in (1, 2)]
    base = load_file(ROOT / "tiny" / "model.safetensors")
    for before, after in ((base, stages[0]), (stages[0], stages[1])):
        assert before.keys() == after.keys()
        assert all((after[k].float() - before[k].float()).abs().max() > 0 for k in after)  # every tensor was trained


def test_same_seed_same_numbers_and_stages_apart(finished, tmp_path):
    # Stage 2 alone, from stage 1's folder, is the second half of a run of both: bit for bit.
    out, _ = finished
    assert run_train(tmp_path, "--stage", "1").returncode == 0
    done = run_train(tmp_path, "--stage", "2")
    assert done.returncode == 0, done.stderr
    again = tmp_path / "runs" / "rarl"
    assert (again / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    assert (again / "stage2" / "model.safetensors").read_bytes() == (out / "stage2" / "model.safetensors").read_bytes()


def test_two_processes_take_the_same_steps(finished, tmp_path):
    out, _ = finished
    done = run_train(tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "runs" / "rarl"
    for a, b in zip(lines(out / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True):
        for name in ("reward", "mae", "tokens", "zero_spread", "mutated"):
            assert a[name] == pytest.approx(b[name]), name
        for name in ("loss", "policy_loss", "grad_norm", "entropy", "kl"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    a, b = (load_file(o / "stage2" / "model.safetensors") for o in (out, two))
    assert a.keys() == b.keys()
    # A key's bias has no gradient but rounding (it shifts all scores of a query alike), and Adam scales that up.
    assert max((a[k] - b[k]).abs().max() for k in a if "k_proj.bias" not in k) < 1e-4


# --- resuming --------------------------------------------------------------------------------------------------------


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, "the run ended before it could be stopped"
        time.sleep(0.01)


@pytest.mark.parametrize("after", [1, 4])  # lines of metrics: within stage 1, within stage 2
def test_killed_and_resumed_is_as_if_never_stopped(finished, tmp_path, after):
    out, _ = finished
    metrics = tmp_path / "runs" / "rarl" / "metrics.jsonl"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command(), cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= after, process)
        process.kill()
        process.wait()
    assert metrics.read_text() != (out / "metrics.jsonl").read_text()
    done = run_train(tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    assert metrics.read_text() == (out / "metrics.jsonl").read_text()  # no line twice, none missing
    weights = Path("stage2") / "model.safetensors"
    assert (metrics.parent / weights).read_bytes() == (out / weights).read_bytes()


def test_sigterm_saves_and_damage_is_noticed(finished, tmp_path):
    out, _ = finished
    run = tmp_path / "runs" / "rarl"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command(), cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
        wait_for(lambda: (run / "checkpoints" / "1-0000001").exists(), process)
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert "stopped by SIGTERM after step" in (tmp_path / "log").read_text()
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert len(checkpoints) == 2  # --keep
    newest = next(p for p in checkpoints[-1].iterdir() if p.suffix == ".distcp")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    # Another setting would be another run; nothing is touched.
    done = run_train(tmp_path, "--resume", "--lr", "1e-5")
    assert done.returncode == 1 and "--lr 0.0005, not 1e-05" in done.stderr
    done = subprocess.run([sys.executable, ROOT / "train.py", "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {Path(*checkpoints[-1].parts[-4:])} is damaged" in done.stderr
    assert (run / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()


@pytest.mark.parametrize("kind", [OSError, train.CheckpointException])  # the second is how dcp wraps the first
def test_a_checkpoint_that_cannot_be_written_names_the_last_good_one(policy, tmp_path, monkeypatch, kind):
    learner = train.Learner(copy.deepcopy(policy), CPU, train.Settings())
    optimizer = torch.optim.SGD(learner.policy.parameters(), lr=0.1)
    checkpoints = train.Checkpoints(tmp_path, CPU, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(1, step, learner, optimizer, {"step": step})
    assert checkpoints.names() == ["1-0000003", "1-0000002"]

    def full(*args, **kwargs):
        if kind is OSError:
            raise OSError(28, "No space left on device")
        raise train.CheckpointException("save", {0: (OSError(28, "No space left on device"), [])})

    monkeypatch.setattr(train.dcp, "save", full)
    with pytest.raises(train.SettingError, match="No space left.*last good one is .*1-0000003"):
        checkpoints.save(1, 4, learner, optimizer, {"step": 4})
    assert checkpoints.names() == ["1-0000003", "1-0000002"] and checkpoints.newest() == "1-0000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-0000002", "1-0000003"]  # no rubbish left


def test_saving_a_checkpoint_does_not_change_adam(policy, tmp_path):
    # torch makes an optimiser's state for saving by a step with lr 0; it must not count. Adam's first step is lr * sign(g).
    learner = train.Learner(copy.deepcopy(policy), CPU, train.Settings())
    optimizer = torch.optim.AdamW(learner.policy.parameters(), lr=0.1, weight_decay=0.0)
    train.make_state(learner.policy, optimizer)
    checkpoints = train.Checkpoints(tmp_path, CPU, keep=1)
    checkpoints.save(1, 0, learner, optimizer, {"step": 0})
    weight = learner.policy.model.model.language_model.norm.weight
    before = weight.detach().clone()
    for p in learner.policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(before - weight, torch.full_like(weight, 0.1), atol=1e-5, rtol=0)
    saved = copy.deepcopy(learner.policy.state_dict())
    checkpoints.save(1, 1, learner, optimizer, {"step": 1})
    optimizer.step()
    checkpoints.load("1-0000001", learner, optimizer)
    assert all(torch.equal(saved[k], v) for k, v in learner.policy.state_dict().items())
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_stage_2_anew_is_not_taken_for_complete(tmp_path):
    out = tmp_path / "rarl"
    (out / "stage2").mkdir(parents=True)
    (out / "results.txt").write_text("stage 1's table")
    (out / "results.json").write_text('{"stage 1": {"1": {"mae": null}}, "stage 2": {}}')
    (out / "metrics.jsonl").write_text('{"stage": 1, "step": 0}\n{"stage": 2, "step": 0}\n{"stage": 2, "st')
    checkpoints = train.Checkpoints(out / "checkpoints", CPU, 2)
    results = train.open_run(out, train.Settings(stage=2), None, checkpoints)
    assert list(results) == ["stage 1"] and math.isnan(results["stage 1"][1]["mae"])
    assert not (out / "results.txt").exists() and (out / "stage2~1").is_dir()
    assert (out / "metrics.jsonl").read_text() == '{"stage": 1, "step": 0}\n'


def test_an_earlier_run_is_moved_aside(finished, tmp_path):
    earlier = tmp_path / "runs" / "rarl"
    earlier.mkdir(parents=True)
    (earlier / "precious").write_text("weeks of work")
    (earlier / "results.json").write_text("{ damaged")  # not even read
    checkpoints = train.Checkpoints(earlier / "checkpoints", train.World(0, 1, torch.device("cpu")), 2)
    train.open_run(earlier, train.Settings(), None, checkpoints)
    assert (tmp_path / "runs" / "rarl~1" / "precious").read_text() == "weeks of work"
    assert not (earlier / "precious").exists()


# --- settings and preflight ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--group-size", "1"], "--group-size 1 must be at least 2"),
        (["--rmo-k", "8"], "--rmo-k 8 must be from 0 to group_size - 1"),
        (["--temperature", "0"], "--temperature 0.0 must be positive"),
        (["--lr", "nan"], "--lr nan must be positive"),
        (["--images", "0"], "--images (0,)"),
        (["--w-reg", "0", "--w-format", "0"], "both 0"),
        (["--stage", "1", "--steps1", "0"], "--steps1 0 must not be negative, and not 0 with --stage 1"),
        (["--name", "../x"], "--name ../x must be a plain folder name"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(train.SettingError) as error:
        train.parse_settings(arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments", [["--learning-rate", "1"], ["--image", "2"], ["--stage", "3"], ["--steps1", "many"]]
)
def test_unknown_settings_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        train.parse_settings(arguments)
    assert "error: " in capsys.readouterr().err


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit):
        train.parse_settings(["--help"])
    text = capsys.readouterr().out
    for f in dataclasses.fields(train.Settings):
        assert f"--{f.name.replace('_', '-')}" in text and len(f.metadata["help"]) > 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stage", "2"], "run --stage 1"),
        (["--data", "dotz"], "unknown data set"),
        (["--data", "coco"], "--data-root"),
        (["--model", "nowhere/at/all"], "does not exist"),
        (["--images", "4000"], "lower --images"),
        (["--resume"], "there is no run"),
        (["--device", "abacus"], "--device abacus"),
        (["--max-new-tokens", "5"], "preflight"),
    ],
)
def test_bad_input_ends_in_one_sentence_before_training(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        train.main([*SMALL, "--eval-samples", "1", *arguments])
    assert str(error.value).startswith("train.py: ") and message in str(error.value)
    assert not list(tmp_path.rglob("stage*"))


def test_an_unreadable_image_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(40):
        (tmp_path / "photos" / str(i % 5)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 60), (6 * i, 0, 0)).save(tmp_path / "photos" / str(i % 5) / f"{i}.png")
    broken = data.load_dataset("folder", "photos", "train")[0].path
    broken.write_bytes(broken.read_bytes()[:60])
    arguments = [*SMALL, "--steps1", "1", "--steps2", "1", "--images", "2", "--eval-samples", "2", "--batch-size", "2"]
    arguments += ["--data", "folder", "--data-root", "photos"]
    with pytest.raises(SystemExit) as error:
        train.main(arguments)
    assert f"{broken} cannot be read" in str(error.value) and "--skip-bad" in str(error.value)
    assert not (tmp_path / "runs").exists()
    train.main([*arguments, "--skip-bad"])
    assert (tmp_path / "runs" / "rarl" / "results.txt").exists()


def test_preflight_refuses_what_would_corrupt_gradients(policy, monkeypatch):
    samples = data.make_samples(data.load_dataset("dots"), 4, 20)
    weights = train.Weights(1, 1, 1)
    train.preflight(policy, samples, weights, 100)
    reference = data.reference_answer
    broken = {
        "swapped ids": lambda s: reference(s).replace('"image_id": 1,', "@").replace('"image_id": 2,', '"image_id": 1,').replace("@", '"image_id": 2,'),
        "other key": lambda s: reference(s).replace("value", "count"),
        "highest first": lambda s: "[" + ", ".join(reversed(reference(s)[1:-1].split(", {"))) + "]",
        "values off": lambda s: reference(data.Sample(tuple(dataclasses.replace(i, label=i.label + 1) for i in s.items))),
    }  # fmt: skip
    for what, answer in broken.items():
        monkeypatch.setattr(data, "reference_answer", answer)
        with pytest.raises(train.SettingError, match="does not earn full marks"):
            train.preflight(policy, samples, weights, 100)
            pytest.fail(what)


CPU = train.World(0, 1, torch.device("cpu"))


# --- the update ------------------------------------------------------------------------------------------------------


def make_batch(policy, settings, mutate=0):
    """Prompts of 1, 2 and 4 images, random advantages, answers of uneven length."""
    items = data.load_dataset("dots")
    samples = [s for n in (4, 1, 2) for s in data.make_samples(items, n, 1)]
    prompts = data.make_prompts(policy, samples)
    rollout = rarl.generate(policy, prompts, settings.group_size, 20, 1.0, torch.Generator().manual_seed(0))
    N = len(rollout.ids)
    mask = rollout.mask & (torch.arange(rollout.ids.shape[1]) < torch.arange(N)[:, None] + 5)
    advantages = grpo.group_advantages(torch.rand(3, settings.group_size, generator=torch.Generator().manual_seed(1)))
    mutated = torch.arange(N) < mutate
    return train.Batch(prompts, rollout.ids, mask, rollout.logp, mutated, advantages, [""] * N)


def gradients_of_update(learner, batch):
    """-> what an update's optimiser finds, by name, and the update's log"""
    seen = {}

    class Look(torch.optim.SGD):
        def step(self):
            seen.update({n: p.grad.clone() for n, p in learner.policy.named_parameters()})

    return seen, train.update(learner, Look(learner.policy.parameters(), lr=0.1), batch)


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_micro_batches_change_nothing(policy, normalize):
    grads = []
    for limit in (10**6, 500, 1):
        s = train.Settings(group_size=4, normalize=normalize, max_tokens_per_forward=limit, max_grad_norm=1e9, beta=0.1)
        learner = train.Learner(copy.deepcopy(policy), CPU, s)
        learner.reference = copy.deepcopy(policy)
        with torch.no_grad():  # a reference that differs
            learner.reference.model.lm_head.weight += 0.01
        batch = make_batch(policy, s)
        lots = train.micro_batches(batch, [0, 1, 2], limit)
        assert sorted(b for lot in lots for b in lot) == [0, 1, 2] and len(lots) == {10**6: 1, 500: 2, 1: 3}[limit]
        grads.append(gradients_of_update(learner, batch))
    for seen, log in grads[1:]:
        for name, grad in grads[0][0].items():
            scale = grad.norm() if "k_proj.bias" not in name else 1.0
            assert (seen[name] - grad).norm() <= 1e-5 * scale, name
        for name in ("loss", "policy_loss", "kl", "entropy", "grad_norm", "logp_gap_mean"):
            assert log[name] == pytest.approx(grads[0][1][name], rel=1e-4, abs=1e-7)


def test_groups_without_gradient_are_not_run(policy, monkeypatch):
    s = train.Settings(group_size=4, beta=0.0)
    learner = train.Learner(copy.deepcopy(policy), CPU, s)
    batch = make_batch(policy, s)
    batch.advantages[1] = 0.0
    ran = []
    original = rarl.logprobs
    monkeypatch.setattr(
        rarl, "logprobs", lambda p, prompts, *rest: ran.append(len(prompts)) or original(p, prompts, *rest)
    )
    optimizer = torch.optim.SGD(learner.policy.parameters(), lr=0.1)
    train.update(learner, optimizer, batch)
    assert sum(ran) == 2
    batch.advantages[:] = 0.0
    before = copy.deepcopy(learner.policy.state_dict())
    log = train.update(learner, optimizer, batch)
    assert sum(ran) == 2 and log["grad_norm"] == 0.0 and not log["bad"]
    assert all(torch.equal(before[k], v) for k, v in learner.policy.state_dict().items())


def test_later_updates_are_off_policy(policy):
    # After the first update the ratio of the second is exp(new - old): different from 1, and clipped shares show up.
    s = train.Settings(group_size=4, beta=0.0, updates=2)
    learner = train.Learner(copy.deepcopy(policy), CPU, s)
    log = train.update(learner, torch.optim.SGD(learner.policy.parameters(), lr=3.0), make_batch(policy, s))
    assert abs(log["ratio"] - 1) > 1e-4 and log["clip_low"] + log["clip_high"] > 0


def test_a_step_that_is_not_finite_is_skipped(policy):
    s = train.Settings(group_size=4, beta=0.0)
    learner = train.Learner(copy.deepcopy(policy), CPU, s)
    batch = make_batch(policy, s)
    batch.advantages[0, 0] = math.nan
    before = copy.deepcopy(learner.policy.state_dict())
    log = train.update(learner, torch.optim.SGD(learner.policy.parameters(), lr=0.1), batch)
    assert log["bad"]
    assert all(torch.equal(before[k], v) for k, v in learner.policy.state_dict().items())
    assert all(p.grad is None for p in learner.policy.parameters())  # nothing of it is left for the next step


def test_mutated_answers_replace_tokens_mask_and_logp(policy):
    s = train.Settings(group_size=4)
    batch = make_batch(policy, s)
    rollout = rarl.Rollout(batch.ids, batch.mask, batch.sampled_logp)
    rows = torch.zeros(12, dtype=torch.bool)
    rows[[2, 7]] = True
    texts = ['[{"image_id": 1, "value": 3}]', '[{"image_id": 2, "value": 13}, {"image_id": 1, "value": 20}]']
    ids, mask, logp = train.put_answers(policy, rollout, rows, texts)
    assert rarl.decode(policy, ids[rows], mask[rows]) == texts
    assert (ids[rows].gather(1, mask[rows].sum(1, keepdim=True) - 1) == policy.eos_id).all()  # they teach to stop
    assert (logp[rows] == 0).all()
    T = batch.ids.shape[1]
    assert torch.equal(ids[~rows][:, :T], batch.ids[~rows]) and not mask[~rows][:, T:].any()
    assert torch.equal(batch.ids, rollout.ids)  # the rollout itself is untouched


def test_bf16_scoring_agrees_with_bf16_sampling(policy):
    # The actor samples with bf16 weights, the update scores with float32 weights under bf16 autocast.
    actor = copy.deepcopy(policy)
    for parameter in actor.parameters():  # as Learner does it: rotary frequencies stay in float32
        parameter.data = parameter.data.bfloat16()
    prompts = make_batch(policy, train.Settings(group_size=2)).prompts
    rollout = rarl.generate(actor, prompts, 4, 20, 1.0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = rarl.logprobs(policy, prompts, rollout.ids, rollout.mask)
    gap = (logp - rollout.logp).abs()[rollout.mask]
    assert logp.dtype == torch.float32 and gap.mean() < 0.03 and gap.max() < 0.3


def test_activation_checkpointing_gives_the_same_gradients(policy):
    grads = []
    for on in (False, True):
        learner = train.Learner(copy.deepcopy(policy), CPU, train.Settings(group_size=4, activation_checkpointing=on))
        batch = make_batch(policy, learner.settings)
        # The rollout comes from the same modules, and needs their cache, which checkpointed layers do not fill.
        rarl.generate(learner.actor, batch.prompts, 2, 3)
        seen, _ = gradients_of_update(learner, batch)
        rarl.generate(learner.actor, batch.prompts, 2, 3)
        grads.append(list(seen.values()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_whatever_the_policy_writes_the_log_goes_on():
    samples = data.make_samples(data.load_dataset("dots"), 2, 1)
    huge = '[{"image_id": 1, "value": 1e308}, {"image_id": 2, "value": -1.7e308}]'
    texts = [huge, huge, "[" * 10**5, '[{"image_id": 1, "value": NaN}]']
    weights = train.Weights(1, 1, 1)
    rewards = [train.score(text, samples[0], weights) for text in texts]
    mask = torch.ones(4, 3, dtype=torch.bool)
    facts = train.rollout_facts(texts, rewards, samples, rarl.Rollout(mask.long(), mask, mask.float()))
    log = train.means([facts | {"zero_spread": [False], "mutated": [False] * 4, "advantage": [0.0] * 4}])
    assert log["mae"] > 1e300 and log["format"] == 0.5
    assert json.loads(json.dumps(train.evaluation.finite(log | {"loss": math.nan}), allow_nan=False))["loss"] is None


def test_history_is_made_of_the_best_values_for_each_image():
    items = data.load_dataset("dots")
    a, b = (dataclasses.replace(items[i], label=label) for i, label in ((0, 10), (1, 5)))
    both, best = data.Sample((a, b)), {}
    answer = lambda x, y: f'[{{"image_id": 1, "value": {x}}}, {{"image_id": 2, "value": {y}}}]'
    assert train.recall(best, both) == []
    train.remember(best, both, [answer(13, 5), answer(9, 1), "nonsense"])  # a: 13 is 3 off, 9 is 1 off; b: 5 is right
    assert best == {a.name: (1, 9.0), b.name: (0, 5.0)}
    assert train.recall(best, both) == ['[{"image_id": 2, "value": 5}, {"image_id": 1, "value": 9}]']
    best[a.name] = (4, 14.0)  # delta is 4: it would earn nothing
    assert train.recall(best, both) == []


def test_learning_rate_by_hand():
    # warm-up over 4 steps: 1/5 .. 4/5, then from 1 down to a tenth: halfway (6 of 12 steps later) 0.55
    assert [train.learning_rate(i, 16, 4) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert train.learning_rate(10, 16, 4) == pytest.approx(0.55)


def test_watch_names_the_failure_signatures_once():
    fine = {"zero_spread": 0.1, "reward": 1.0, "format": 1.0, "regression": 0.5, "ranking": 0.5, "grad_norm": 1.0}

    def said(change):
        watch = train.Watch(steps=5)
        first = [watch(fine | {"format": 0.2}, 3.0) for _ in range(5)]
        return [w.split(":")[0] for w in first + [watch(fine | change, 3.0) for _ in range(30)] if w]

    assert said({"regression": 0.9}) == []
    assert said({"zero_spread": 1.0, "format": 0.2}) == ["collapse"]
    assert said({"grad_norm": 1e-6, "format": 0.2}) == ["stuck"]
    assert said({"format": 0.9}) == ["reward hacking"]
