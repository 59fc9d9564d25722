"""Runs that are stopped: killed anywhere and resumed, the result is byte for byte that of a run that never stopped."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, SMALL, command, lines, train_here

import train
from support.show.monitor import Monitor


class Killed(BaseException):
    """Stands for SIGKILL in this process: no handler of the program catches it."""


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, "the run ended before it could be stopped"
        time.sleep(0.01)


def start(folder):
    log = open(folder / "log", "w")  # noqa: SIM115
    return subprocess.Popen(
        command(), cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
    )


def dies_within_stage_2(self, step, *rest, honest=Monitor.log):
    """In the place of Monitor.log: killed after the second step, before it is in a checkpoint."""
    honest(self, step, *rest)
    if (self.stage, step) == (2, 1):
        raise Killed


def assert_same(out, again):
    for file in ("metrics.jsonl", "validation.jsonl"):
        assert (again / file).read_text() == (out / file).read_text()  # no line twice, none missing
    for file in ("stage1/model.safetensors", "stage2/model.safetensors", "results.json", "results.txt",
                 "before_after.png"):  # fmt: skip
        assert (again / file).read_bytes() == (out / file).read_bytes(), file
    assert len(lines(again / "timing.jsonl")) == len(lines(out / "metrics.jsonl"))
    assert not (again / "checkpoints").exists() and not list(again.glob("*.writing")) and not list(again.glob("*.old"))


def test_killed_and_resumed_is_as_if_never_stopped(finished, tmp_path, monkeypatch):
    """SIGKILL within stage 1, then another death within stage 2, and a new name on the way."""
    out, _ = finished
    metrics = tmp_path / "runs" / "rarl" / "metrics.jsonl"
    process = start(tmp_path)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, process)
    process.kill()
    process.wait()
    assert metrics.read_text() != (out / "metrics.jsonl").read_text()
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Monitor, "log", dies_within_stage_2)
        train_here("--resume")
    assert len(lines(metrics)) == 5
    metrics.parent.rename(tmp_path / "runs" / "renamed")
    train_here("--resume", "--name", "renamed", "--max-tokens-per-forward", "30000")
    assert_same(out, tmp_path / "runs" / "renamed")


def test_sigterm_saves_and_damage_is_noticed(finished, tmp_path, monkeypatch, capsys):
    out, _ = finished
    run = tmp_path / "runs" / "rarl"
    process = start(tmp_path)
    wait_for(lambda: (run / "checkpoints" / "1-0000002").exists(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in (tmp_path / "log").read_text()
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert len(checkpoints) == 2  # --keep
    newest = next(p for p in checkpoints[-1].iterdir() if p.suffix == ".distcp")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    # Another setting would be another run; nothing is touched.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train_here("--resume", "--lr", "1e-5")
    assert "--lr 0.0003, not 1e-05" in capsys.readouterr().err
    train.main(["--resume"])
    assert f"checkpoint {Path(*checkpoints[-1].parts[-4:])} is damaged" in capsys.readouterr().err
    assert_same(out, run)


# Every rename, deletion and save of a run, as (what, which call of it). Died before it, then resumed.
TINY = ["--steps1", "1", "--steps2", "1", "--batch-size", "2", "--images", "2", "--eval-samples", "1"]


@contextlib.contextmanager
def dying_at(monkeypatch, call):
    """Killed before the call-th of all renames and deletions of folders. -> the list of those that were made"""
    made = []

    def watch(honest, name):
        def watched(*args, **kwargs):
            if args and ".metadata" in str(args[0]):  # within torch's own writing, which reports every exception anew
                return honest(*args, **kwargs)
            made.append((name, [str(a) for a in args]))
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
    """-> the folder of a minimal run, and how many renames and deletions it makes"""
    folder, here = tmp_path_factory.mktemp("never_stopped"), os.getcwd()
    os.chdir(folder)
    try:
        with dying_at(pytest.MonkeyPatch(), 0) as made:
            train_here(*TINY)
    finally:
        os.chdir(here)
    return folder / "runs" / "rarl", len(made)


@pytest.mark.parametrize("share", [0.01, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0])
def test_death_between_any_two_renames_loses_nothing(never_stopped, tmp_path, monkeypatch, share):
    out, calls = never_stopped
    monkeypatch.chdir(tmp_path)
    with dying_at(monkeypatch, max(1, round(share * calls))), pytest.raises(Killed):
        train_here(*TINY)
    train_here("--resume", *TINY)
    assert_same(out, tmp_path / "runs" / "rarl")


def test_death_in_the_last_clean_up_is_no_death(never_stopped, tmp_path, monkeypatch, capsys):
    """results.txt is written before anything is cleaned up: a run that died after it is not trained again."""
    out, calls = never_stopped
    monkeypatch.chdir(tmp_path)
    with dying_at(monkeypatch, calls) as made, pytest.raises(Killed):
        train_here(*TINY)
    assert made[-1][0] == "rmtree" and "checkpoints" in made[-1][1][0]
    monkeypatch.setattr(train, "train_stage", None)  # whoever trains, fails
    train_here("--resume", *TINY)
    assert "is complete" in capsys.readouterr().out
    assert_same(out, tmp_path / "runs" / "rarl")


def test_a_finished_run_stays_finished(finished, tmp_path, monkeypatch, capsys):
    out, _ = finished
    shutil.copytree(out, tmp_path / "runs" / "rarl")
    (tmp_path / "runs" / "rarl" / "checkpoints" / "2-0000003").mkdir(parents=True)  # died in the last clean-up
    monkeypatch.chdir(tmp_path)
    train.main(["--resume"])
    assert "is complete" in capsys.readouterr().out
    assert_same(out, tmp_path / "runs" / "rarl")


def test_resume_before_anything_was_saved_starts_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_here("--resume", *TINY)
    assert "nothing is saved in runs/rarl yet" in capsys.readouterr().err
    assert (tmp_path / "runs" / "rarl" / "results.txt").exists()


def test_one_owner(tmp_path, monkeypatch, capsys):
    """A second start, or resume, of a name that is being trained is refused and says who trains it."""
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
         "from pathlib import Path; from support.run.run_folder import RunFolder; from support.learner.world import World\n"
         "with RunFolder(Path('runs/rarl'), World(0, 1, torch.device('cpu'))).owned(): print('mine', flush=True); input()",
         str(ROOT)],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "mine\n"
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit) as error:
            train.main([*SMALL, *TINY, *more])
        assert error.value.code == 1
        assert f"belongs to a run that is still going (process {holder.pid} on" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "rarl").exists()
    holder.communicate("\n")
    train_here(*TINY)  # the lock went with its owner
