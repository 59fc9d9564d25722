"""Runs that are stopped: killed anywhere and resumed, the result is byte for byte that of a run that never stopped."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import Killed, command, lines, train_here, train_until_killed

import train
from support.show.monitor import Monitor


def assert_same(out, again):
    for file in ("metrics.jsonl", "validation.jsonl"):
        assert (again / file).read_text() == (out / file).read_text()  # no line twice, none missing
    for file in ("stage1/model.safetensors", "stage2/model.safetensors", "results.json", "results.txt",
                 "before_after.png"):  # fmt: skip
        assert (again / file).read_bytes() == (out / file).read_bytes(), file
    assert len(lines(again / "timing.jsonl")) == len(lines(out / "metrics.jsonl"))
    assert not (again / "checkpoints").exists() and not list(again.glob("*.writing")) and not list(again.glob("*.old"))


def test_one_owner_that_is_killed_and_resumed_as_if_never_stopped(finished, tmp_path, monkeypatch, capsys):
    """While a run goes on, a second start or resume is refused. SIGKILL in stage 1, a death in stage 2, a new name."""
    out, _ = finished
    metrics = tmp_path / "runs" / "rarl" / "metrics.jsonl"
    with open(tmp_path / "log", "w") as log:
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command(), cwd=tmp_path, env=threads, stdout=log, stderr=subprocess.STDOUT)
    end = time.time() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.time() < end, "the run ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            train_here(*more)
        assert f"belongs to a run that is still going (process {process.pid} on" in capsys.readouterr().err
    process.kill()
    process.wait()
    assert metrics.read_text() != (out / "metrics.jsonl").read_text()
    train_until_killed(2, 1, "--resume")
    assert len(lines(metrics)) == 5
    metrics.parent.rename(tmp_path / "runs" / "renamed")
    train_here("--resume", "--name", "renamed", "--max-tokens-per-forward", "30000")
    assert_same(out, tmp_path / "runs" / "renamed")


def test_sigterm_saves_and_damage_is_noticed(finished, tmp_path, monkeypatch, capsys):
    out, _ = finished
    monkeypatch.chdir(tmp_path)
    honest = Monitor.log

    def log(self, step, *rest):
        honest(self, step, *rest)
        if (self.stage, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Monitor, "log", log)
        train_here()
    assert end.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 2 of stage 1; saved" in capsys.readouterr().err
    checkpoints = sorted(Path("runs/rarl/checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["1-0000001", "1-0000002"]
    weights = next(checkpoints[-1].glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    # Another setting would be another run; nothing is touched.
    with pytest.raises(SystemExit):
        train_here("--resume", "--lr", "1e-5")
    assert "--lr 0.0003, not 1e-05" in capsys.readouterr().err
    train.main(["--resume"])
    assert f"checkpoint {checkpoints[-1]} is damaged" in capsys.readouterr().err
    assert_same(out, tmp_path / "runs" / "rarl")


def test_two_threads_give_the_same_bits_also_when_stopped(tmp_path, monkeypatch):
    """Nothing in an update adds in an order that threads decide."""
    files = []
    torch.set_num_threads(2)
    try:
        for name in ("one", "two", "killed"):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)
            if name == "killed":
                train_until_killed(2, 1, "--eval-samples", "1")
            train_here("--eval-samples", "1", *(["--resume"] if name == "killed" else []))
            run = tmp_path / name / "runs" / "rarl"
            files.append([(run / file).read_bytes() for file in ("metrics.jsonl", "stage2/model.safetensors")])
    finally:
        torch.set_num_threads(1)
    assert files[0] == files[1] == files[2]


TINY = ["--steps1", "1", "--steps2", "1", "--batch-size", "2", "--images", "2", "--eval-samples", "1"]


@contextlib.contextmanager
def dying_at(monkeypatch, call):
    """Killed before the call-th of all renames and deletions of folders. -> those that were made, as words"""
    made = []

    def watch(honest, name):
        def watched(*args, **kwargs):
            made.append(f"{name} {args[0]}")
            if len(made) == call:
                raise Killed
            return honest(*args, **kwargs)

        return watched

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watch(os.replace, "replace"))
        patch.setattr(Path, "rename", watch(Path.rename, "rename"))
        patch.setattr(shutil, "rmtree", watch(shutil.rmtree, "rmtree"))
        yield made


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """-> the folder of a minimal run, and the renames and deletions that it makes"""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("never_stopped"))
        with dying_at(patch, 0) as made:
            train_here(*TINY)
        return Path.cwd() / "runs" / "rarl", made


@pytest.mark.parametrize(
    "what, which",
    [
        ("replace runs/rarl/settings.json", 0),  # nothing is saved yet
        ("rename runs/rarl/checkpoints/", 0),  # the first checkpoint is written, but has not its name yet
        ("rename runs/rarl/stage1.writing", 0),
        ("replace runs/rarl/results.json", -1),
        ("replace runs/rarl/results.txt", 0),
    ],
)
def test_death_before_any_kind_of_rename_loses_nothing(never_stopped, tmp_path, monkeypatch, capsys, what, which):
    out, calls = never_stopped
    place = [number for number, call in enumerate(calls, start=1) if call.startswith(what)][which]
    monkeypatch.chdir(tmp_path)
    with dying_at(monkeypatch, place), pytest.raises(Killed):
        train_here(*TINY)
    capsys.readouterr()
    train_here("--resume", *TINY)
    assert ("nothing is saved in runs/rarl yet" in capsys.readouterr().err) == ("settings" in what)
    assert_same(out, tmp_path / "runs" / "rarl")


def test_death_in_the_last_clean_up_is_no_death(never_stopped, tmp_path, monkeypatch, capsys):
    """results.txt is written before anything is cleaned up: a run that died after it is not trained again."""
    out, calls = never_stopped
    monkeypatch.chdir(tmp_path)
    with dying_at(monkeypatch, len(calls)) as made, pytest.raises(Killed):
        train_here(*TINY)
    assert made[-1] == "rmtree runs/rarl/checkpoints"
    monkeypatch.setattr(train, "train_stage", None)  # whoever trains, fails
    train_here("--resume", *TINY)
    assert "is complete" in capsys.readouterr().out
    assert_same(out, tmp_path / "runs" / "rarl")
