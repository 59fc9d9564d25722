"""support/run/run_folder.py: what lies there is never overwritten, and damage to any of it is named, never passed over."""

import contextlib
import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock, SoftFileLock
from runs import CPU, Killed, lines, train_here

import train
from support.run.checkpoints import Checkpoints
from support.run.run_folder import RunFolder, Start
from support.run.settings import SettingError, Settings


def open_run(path, s, start):
    return RunFolder(path, CPU).open(s, start, Checkpoints(path / "checkpoints", CPU))


def test_stage_2_anew_is_not_taken_for_complete(tmp_path):
    out = tmp_path / "rarl"
    (out / "stage2").mkdir(parents=True)
    (out / "results.txt").write_text("stage 1's table")
    (out / "results.json").write_text('{"stage 1": {"1": {"n": 1, "valid": 1, "mae": null}}, "stage 2": {}}')
    (out / "metrics.jsonl").write_text('{"stage": 1, "step": 0}\n{"stage": 2, "step": 0}\n{"stage": 2, "st')
    results = open_run(out, Settings(stage=2), Start(2, None, out / "stage1", "stage 1"))
    assert list(results) == ["stage 1"] and math.isnan(results["stage 1"][1]["mae"])
    assert not (out / "results.txt").exists() and (out / "stage2~1").is_dir()
    assert (out / "metrics.jsonl").read_text() == '{"stage": 1, "step": 0}\n'


def test_remarks_are_kept_when_a_run_goes_on(tmp_path):
    folder = RunFolder(tmp_path, CPU)
    results = {"base": {2: {"n": 60, "valid": 1.0, "remarks": ["the policy says one value"]}}}
    folder.write_results(results)
    assert folder.read_results() == results


def test_an_earlier_run_is_moved_aside(tmp_path):
    earlier = tmp_path / "runs" / "rarl"
    earlier.mkdir(parents=True)
    (earlier / "precious").write_text("weeks of work")
    (earlier / "results.json").write_text("{ damaged")  # not even read
    open_run(earlier, Settings(), Start(1, None, "tiny", "base"))
    assert (tmp_path / "runs" / "rarl~1" / "precious").read_text() == "weeks of work"
    assert not (earlier / "precious").exists()


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(name, value):
    def change(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return change


DAMAGE = [
    ("settings.json", cut, "settings.json is damaged or of another version"),
    ("settings.json", os.unlink, "has no settings.json"),
    ("settings.json", edit("lr", "fast"), "settings.json is damaged or of another version"),
    ("settings.json", edit("speed", 1), "is damaged or of another version of this program (it differs in speed)"),
    ("checkpoints", shutil.rmtree, "stage 1 of runs/rarl is finished, but there is no checkpoint to go on from"),
    ("stage1/model.safetensors", cut, "model.safetensors was altered"),
    ("stage1/model.safetensors", flip, "model.safetensors was altered"),
    ("stage1/model.safetensors", os.unlink, "stage1 is incomplete"),
    ("stage1/config.json", edit("x", 1), "config.json was altered"),
    ("stage1/checksums.json", cut, "stage1 is incomplete"),
    ("stage1", shutil.rmtree, "stage1, which does not exist"),
]


@pytest.mark.parametrize("file, damage, message", DAMAGE, ids=[f"{f}-{i}" for i, (f, *_) in enumerate(DAMAGE)])
def test_damage_is_named_when_a_run_goes_on(killed, signals, capsys, file, damage, message):
    run = killed(2)
    damage(run / file)
    weights = {p: p.read_bytes() for p in run.rglob("*.safetensors")}
    with pytest.raises(SystemExit) as error:
        train_here("--resume")
    said = capsys.readouterr().err
    assert error.value.code == 1 and message in said and "Traceback" not in said
    assert all(p.read_bytes() == content for p, content in weights.items())  # nothing is lost


def test_half_a_line_is_dropped_when_a_run_goes_on(killed, finished, signals, monkeypatch):
    """And stage 1 may be somebody else's, without checksums."""
    run, (out, _) = killed(2), finished
    (run / "stage1" / "checksums.json").unlink()
    for name in ("metrics.jsonl", "groups/groups.jsonl"):
        (run / name).write_text((run / name).read_text() + '{"stage": 2, "st')
    monkeypatch.setattr("support.show.monitor.watch_curves", lambda folder: None)
    train.main(["--resume"])
    for file in ("metrics.jsonl", "results.json", "results.txt", "groups/groups.jsonl", "stage2/model.safetensors"):
        assert (run / file).read_bytes() == (out / file).read_bytes(), file
    assert (run / "timing.jsonl").read_text().count("\n") == 4


def test_a_finished_run_whose_table_is_lost(finished, here, signals, monkeypatch, capsys):
    run, (out, _) = here / "runs" / "rarl", finished
    shutil.copytree(out, run)
    monkeypatch.setattr(train, "train_stage", None)  # whoever trains, fails
    (run / "results.txt").unlink()
    train_here("--resume")
    assert "is complete" in capsys.readouterr().out
    assert (run / "results.txt").read_text() == (out / "results.txt").read_text()
    for damage in (cut, lambda file: file.write_text("[]")):
        damage(run / "results.json")
        with pytest.raises(SystemExit):
            train_here("--resume")
        assert "results.json is damaged" in capsys.readouterr().err
        shutil.copy(out / "results.json", run)
    (run / "results.json").unlink()
    with pytest.raises(SystemExit):
        train_here("--resume")
    assert "no checkpoint to go on from" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()


def test_a_start_of_stage_2_that_dies_at_once_costs_no_stage_1(finished, tmp_path, monkeypatch):
    """Between any two of its changes to the folder: --resume goes on with stage 2, or the earlier run is still complete."""
    out, states = finished[0], []
    for call in range(1, 20):
        run = tmp_path / str(call) / "rarl"
        shutil.copytree(out, run)
        made = []

        def dying(honest, made=made, call=call):
            def watched(*args, **kwargs):
                made.append(args)
                if len(made) == call:
                    raise Killed
                return honest(*args, **kwargs)

            return watched

        start = Start(2, None, run / "stage1", "stage 1")
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (Path, "rename"), (Path, "unlink")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            with contextlib.suppress(Killed):
                open_run(run, Settings(stage=2), start)
        if len(made) < call:
            break
        s = Settings(**json.loads((run / "settings.json").read_text()) | {"resume": True})
        checkpoints = Checkpoints(run / "checkpoints", CPU)
        results = RunFolder(run, CPU).complete(s, checkpoints)
        if results:
            states.append("complete")
            assert "stage 2" in results and (run / "stage2").is_dir()
        else:
            states.append("to do")
            assert RunFolder(run, CPU).find_start(s, checkpoints, "tiny") == start
            assert list(open_run(run, s, start)) == ["base", "stage 1"]
            assert (run / "stage2~1").is_dir() and not (run / "stage2").exists()
            assert [entry["stage"] for entry in lines(run / "metrics.jsonl")] == [1, 1]
    assert states[:2] == ["complete", "complete"] and states[2:] == ["to do"] * (len(states) - 2) and len(states) > 4


def test_no_sound_checkpoint_is_no_silent_start(killed, signals, capsys):
    for checkpoint in (killed(2) / "checkpoints").iterdir():
        (checkpoint / "checksums.json").unlink()
    with pytest.raises(SystemExit):
        train_here("--resume")
    said = capsys.readouterr().err
    assert said.count("is damaged") == 2 and "holds no sound checkpoint; start without --resume" in said


def test_a_folder_that_cannot_be_moved_aside(tmp_path, monkeypatch):
    """A mount point. While it is empty it is used as it is; what lies in it is not lost."""
    run = tmp_path / "rarl"
    run.mkdir()

    def busy(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    start = Start(1, None, "tiny", "base")
    open_run(run, Settings(), start)
    with pytest.raises(
        SettingError, match="rarl holds an earlier run and cannot be renamed to rarl~1 .*another --name"
    ):
        open_run(run, Settings(), start)
    assert (run / "settings.json").exists()


# --- the lock --------------------------------------------------------------------------------------------------------


def no_locks(*_, **__):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("kind", [FileLock, SoftFileLock])
def test_one_owner(tmp_path, monkeypatch, kind):
    """Also on a file system without locks (NFS without its lock service): then a file that names its process holds it."""
    if kind is SoftFileLock:
        monkeypatch.setattr(FileLock, "_acquire", no_locks)
    folder = RunFolder(tmp_path / "rarl", CPU)
    for _ in range(2):  # the lock goes with its owner
        with folder.owned():
            refused = pytest.raises(SettingError, match=f"still going .process {os.getpid()} on .*another --name")
            with refused, RunFolder(tmp_path / "rarl", CPU).owned():
                raise AssertionError("two owners")


def test_no_lock_at_all_names_the_folder_and_the_way_out(tmp_path, monkeypatch):
    for kind in (FileLock, SoftFileLock):
        monkeypatch.setattr(kind, "_acquire", no_locks)
    with pytest.raises(SettingError, match="rarl cannot be locked.*No locks available.*another disk"):
        RunFolder(tmp_path / "rarl", CPU)._lock()
