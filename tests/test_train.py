"""train.py end to end: both stages, stages apart, several processes, bad input before and during training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import ROOT, SMALL, TINY, lines, train_here, train_in_two
from safetensors.torch import load_file

import grpo
import train
from support.datasets import load_dataset
from support.show import monitor


def test_both_stages_end_to_end(finished):
    out, printed = finished
    log = lines(out / "metrics.jsonl")
    assert [(l["stage"], l["step"]) for l in log] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [l["images"] for l in log[:2]] == [1, 1] and {l["images"] for l in log[2:]} == {1, 2}
    for l in log:
        assert l["ratio"] == pytest.approx(1.0) and l["logp_gap_max"] < 1e-4  # on-policy, and scored as sampled
        assert l["format"] > 0.8 and 0 <= l["regression"] <= 1 and l["kl"] >= 0 and l["grad_norm"] > 0
        assert (l["ranking"] is None) == (l["images"] == 1)
        assert l["reward"] == pytest.approx(l["regression"] + l["format"] + (l["ranking"] or 0))
    assert [l["kl"] == 0 for l in log] == [True, False, True, False]  # each stage's reference is its own beginning
    for l in lines(out / "timing.jsonl"):
        phases = {name: x for name, x in l.items() if name not in ("stage", "step", "seconds", "pack_fill")}
        assert 0 < l["pack_fill"] <= 1 and phases.keys() - {"other"} == {"data", "rollout", "reward", "update", "sync"}
        assert l["seconds"] == pytest.approx(sum(phases.values())) and l["rollout"] > 0 and l["update"] > 0
    assert (out / "results.txt").read_text() in printed
    results = json.loads((out / "results.json").read_text())
    assert list(results)[:3] == ["base", "stage 1", "stage 2"] and list(results["base"]) == ["1", "2"]
    for name in ("base", "stage1", "stage2"):
        assert len(lines(out / f"predictions_{name}.jsonl")) == 6
    # A sheet at the start of each stage, for each number of images.
    sheets = [(g["stage"], len(g["images"])) for g in lines(out / "groups/groups.jsonl")]
    assert sorted(sheets) == [(1, 1), (2, 1), (2, 2)] and len(list((out / "groups").glob("*.png"))) == 3
    assert (out / "predictions.png").exists() and not (out / "checkpoints").exists()
    stages = [load_file(out / f"stage{i}" / "model.safetensors") for i in (1, 2)]
    base = load_file(ROOT / "tiny" / "model.safetensors")
    for before, after in ((base, stages[0]), (stages[0], stages[1])):
        assert before.keys() == after.keys()
        assert all((after[k].float() - before[k].float()).abs().max() > 0 for k in after)  # every tensor was trained
    assert printed.index("base") < printed.index("stage 1") < printed.index("stage 2")  # shown while it trains


def test_same_seed_same_numbers_and_stages_apart(finished, here):
    # Stage 2 alone, from stage 1's folder, is the second half of a run of both: bit for bit.
    out, _ = finished
    train_here("--stage", "1")
    train_here("--stage", "2")
    again = here / "runs" / "rarl"
    assert (again / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    assert (again / "stage2" / "model.safetensors").read_bytes() == (out / "stage2" / "model.safetensors").read_bytes()


def test_two_processes_take_the_same_steps(finished, tmp_path):
    """And only the main one reads the weights."""
    out, _ = finished
    train_in_two(tmp_path, "--eval-samples", "1")
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


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stage", "2"], "run --stage 1"),
        (["--data", "dotz"], "unknown data set"),
        (["--data", "coco"], "--data-root"),
        (["--model", "nowhere/at/all"], "does not exist"),
        (["--images", "4000"], "lower --images"),
        (["--max-new-tokens", "5"], "preflight"),
        (["--question", "How many <|im_end|>?"], "must not contain <|im_end|>, a mark of the tokenizer's own"),
    ],
)
def test_bad_input_ends_in_one_sentence_before_training(here, signals, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        train.main([*SMALL, "--eval-samples", "1", *arguments])
    said = capsys.readouterr().err.splitlines()
    assert error.value.code == 1 and any(line.startswith("train.py: ") for line in said) and message in "\n".join(said)
    assert not list(here.rglob("stage*"))


def test_an_unreadable_image_is_named_before_training(here, signals, capsys):
    for i in range(20):
        (here / "photos" / str(i % 5)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 60), (12 * i, 0, 0)).save(here / "photos" / str(i % 5) / f"{i}.png")
    broken = load_dataset("folder", "photos", "train")[0].path
    broken.write_bytes(broken.read_bytes()[:60])
    arguments = [*TINY, "--steps2", "0", "--validate-every", "0", "--data", "folder", "--data-root", "photos"]
    with pytest.raises(SystemExit):
        train_here(*arguments)
    said = capsys.readouterr().err
    assert f"{broken} cannot be read" in said and "--skip-bad" in said
    assert not (here / "runs" / "rarl").exists()
    train_here(*arguments, "--skip-bad")
    assert (here / "runs" / "rarl" / "results.txt").exists()


# --- bad steps -------------------------------------------------------------------------------------------------------

SHORT = [*TINY, "--stage", "1", "--validate-every", "0"]


def test_bad_steps_stop_the_run_and_leave_the_last_sound_checkpoint(here, signals, monkeypatch, capsys):
    """From step 1 on the loss is nan: skipped, kept as evidence, never saved; then it goes on with a smaller lr."""
    honest, calls = grpo.grpo_loss, []

    def spoiled(*args, **kwargs):
        calls.append(0)
        loss, stats = honest(*args, **kwargs)
        return (loss * torch.nan if len(calls) > 1 else loss), stats

    monkeypatch.setattr(grpo, "grpo_loss", spoiled)
    monkeypatch.setattr(monitor, "BAD_STEPS", 2)
    arguments = [*SHORT, "--steps1", "4"]
    with pytest.raises(SystemExit):
        train_here(*arguments)
    said = capsys.readouterr().err
    assert "2 steps in a row had a loss or gradient that is not finite" in said and "smaller --lr" in said
    out = here / "runs" / "rarl"
    assert [l["bad"] for l in lines(out / "metrics.jsonl")] == [False, True, True]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["1-0000001"]
    evidence = sorted((out / "bad_steps").iterdir())
    assert [p.name for p in evidence] == [f"1-000000{i}-rank0.json" for i in (1, 2)]
    assert len(json.loads(evidence[0].read_text())["groups"]) == 2
    monkeypatch.setattr(grpo, "grpo_loss", honest)
    with pytest.raises(SystemExit):
        train_here("--resume", *arguments, "--lr", "1")  # larger
    assert "--lr 0.0003, not 1.0" in capsys.readouterr().err
    train_here("--resume", *arguments, "--lr", "1e-5")
    assert [l["step"] for l in lines(out / "metrics.jsonl")] == [0, 1, 2, 3]
    assert json.loads((out / "settings.json").read_text())["lr"] == 1e-5


def test_weights_that_a_step_ruins_are_not_saved(here, signals, monkeypatch, capsys):
    """Steps before that one had a finite loss, and so had it; whether its weights are sound shows in a forward of them."""
    monkeypatch.setattr(monitor, "BAD_STEPS", 2)
    ruinous = [*SHORT, "--warmup", "0", "--lr", "1e20"]
    with pytest.raises(SystemExit):
        train_here(*ruinous, "--steps1", "4")
    assert "2 steps in a row" in capsys.readouterr().err
    assert not (here / "runs/rarl/checkpoints").exists()
    with pytest.raises(SystemExit):
        train_here(*ruinous, "--name", "one")
    assert "weights after the last step of stage 1 give no finite log-probs" in capsys.readouterr().err
    train.main(["--resume", "--lr", "1e-4", "--name", "one"])
    assert [l["bad"] for l in lines(here / "runs/one/metrics.jsonl")] == [False]


# --- signals ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_within_an_import_ends_at_once(tmp_path):
    """An exception there may end in C++ code, which aborts the process or takes it for a module that is missing."""
    (tmp_path / "slow.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    print('swallowed')\n"
    )
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import support.run.quiet_end, slow"
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "-c: interrupted\n")


def test_ctrl_c_while_the_program_starts_is_one_line(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "train.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    maps, end = Path(f"/proc/{process.pid}/maps"), time.time() + 120
    time.sleep(0.5)  # the fork has become the program
    while "libtorch" not in maps.read_text() and time.time() < end:  # torch is being imported
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in said and len(said.splitlines()) <= 2
    assert not Path(tmp_path / "runs" / "rarl").exists()
