"""Runs that are stopped: killed anywhere and resumed, the result is byte for byte that of a run that never stopped."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import TINY, lines, start, train_here

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


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_is_resumed_as_if_never_stopped(finished, killed, signals, stage):
    """Also under another name and with what an out-of-memory error asks for."""
    run = killed(stage)
    assert len(lines(run / "metrics.jsonl")) == 2 * stage
    run.rename("runs/renamed")
    train_here("--resume", "--name", "renamed", "--max-tokens-per-forward", "30000")
    assert_same(finished[0], Path("runs/renamed"))


def test_one_owner(here, signals, capsys):
    """While a run goes on, a second start or resume is refused; SIGKILL ends that."""
    metrics = here / "runs" / "rarl" / "metrics.jsonl"
    arguments = [*TINY, "--steps1", "3", "--steps2", "0", "--validate-every", "0"]
    process, end = start(here, *arguments), time.time() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.is_alive() and time.time() < end, "the run ended before it could be stopped"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            train_here(*arguments, *more)
        assert f"belongs to a run that is still going (process {process.pid} on" in capsys.readouterr().err
    process.kill()
    process.join()
    train_here(*arguments, "--resume")
    assert [line["step"] for line in lines(metrics)] == [0, 1, 2]


def test_sigterm_saves_and_damage_is_noticed(finished, here, signals, monkeypatch, capsys):
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
    assert_same(finished[0], here / "runs" / "rarl")


DEATHS = {  # before which rename or deletion, and the how-manieth of that kind
    "replace runs/rarl/settings.json": 0,  # nothing is saved yet
    "rename runs/rarl/checkpoints/": 0,  # the first checkpoint is written, but has not its name yet
    "rename runs/rarl/stage1.writing": 0,
    "replace runs/rarl/results.json": 2,  # the last one
    "replace runs/rarl/results.txt": 0,
    "rmtree runs/rarl/checkpoints ": 0,  # the last clean-up
}


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """A minimal run, and beside it runs/ as each of the DEATHS would leave it. -> where they are"""
    folder, met = tmp_path_factory.mktemp("deaths"), []

    def watched(honest, name):
        def watch(path, *rest, **how):
            for what, which in DEATHS.items():
                if f"{name} {path} ".startswith(what):
                    met.append(what)
                    if met.count(what) == which + 1:
                        shutil.copytree("runs", what.replace("/", " "))
            return honest(path, *rest, **how)

        return watch

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for owner, name in ((os, "replace"), (Path, "rename"), (shutil, "rmtree")):
            patch.setattr(owner, name, watched(getattr(owner, name), name))
        train_here(*TINY)
    assert met.count("replace runs/rarl/results.json") == 3
    return folder


@pytest.mark.parametrize("what", DEATHS)
def test_death_before_any_kind_of_rename_loses_nothing(deaths, here, signals, monkeypatch, capsys, what):
    shutil.copytree(deaths / what.replace("/", " "), "runs")
    if "rmtree" in what:  # results.txt is there already: a run that died after it is not trained again
        monkeypatch.setattr(train, "train_stage", None)  # whoever trains, fails
    train_here("--resume", *TINY)
    said = capsys.readouterr()
    assert ("nothing is saved in runs/rarl yet" in said.err) == ("settings" in what)
    assert ("is complete" in said.out) == ("rmtree" in what)
    assert_same(deaths / "runs" / "rarl", here / "runs" / "rarl")
