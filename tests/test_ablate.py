"""experiments/ablate.py's table by hand, and what it does with runs that are done, begun, damaged or mistyped.

That it trains is tested with the commands of experiments/README.md.
"""

import json
import math
import sys

import pytest

from experiments import ablate
from experiments.commands import CommandError
from support.settings import SettingError


def test_table_says_how_many_seeds_have_a_value():
    rows = {
        "on": [{"MAE@1": 1.0, "tau@4": 0.5}, {"MAE@1": 2.0, "tau@4": 0.25}],
        "off": [{"MAE@1": 3.0, "tau@4": math.nan}, {"MAE@1": 3.5, "tau@4": 0.125}],
        "never": [{"MAE@1": 4.0, "tau@4": math.nan}, {"MAE@1": 4.0, "tau@4": math.nan}],
    }
    head, *lines = ablate.table_rows(rows)
    assert head == ["", "MAE@1", "tau@4"]
    assert lines[0] == ["on", "1.500 (1.000 to 2.000)", "0.375 (0.250 to 0.500)"]
    assert lines[1] == ["off", "3.250 (3.000 to 3.500)", "0.125 (0.125 to 0.125) of 1"]
    assert lines[2] == ["never", "4.000 (4.000 to 4.000)", "-"]


def finished_run(folder):
    folder.mkdir(parents=True)
    row = {"valid": 0.5, "mae": 2.0, "tau": None, "tau_values": None}
    blind = {"1": {"valid": 1.0, "mae": 5.0, "constant": 10.0}}
    results = {
        "base": {"1": row},
        "stage 2": {"1": row, "2": row | {"valid": 0.25, "mae": 3.0, "tau": 0.5, "tau_values": 0.75}},
        "best constant": blind,
    }
    (folder / "results.json").write_text(json.dumps(results))
    logs = [
        {"stage": 1, "step": 1, "entropy": 1.0, "mutated": 0.5},
        {"stage": 2, "step": 1, "entropy": None, "mutated": 0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))


def test_a_row_is_read_from_the_last_stage_and_the_steps(tmp_path):
    finished_run(tmp_path / "run")
    row = ablate.read_run(tmp_path / "run", steps=2)
    known = {name: value for name, value in row.items() if not math.isnan(value)}
    assert known == {
        "valid": 0.25,
        "MAE@1": 2.0,
        "MAE@2": 3.0,
        "tau@2": 0.5,
        "tau_values@2": 0.75,
        "entropy": 1.0,
        "mutated": 0.25,
    }
    assert set(row) - set(known) == {"grad norm", "Var(A)", "zero spread"}  # not measured is not 0


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '"x"', "1\n", '{"stage": 1, "step": 1}\n'])
def test_a_damaged_run_is_named(tmp_path, name, content):
    finished_run(tmp_path / "run")
    if content is None:
        (tmp_path / "run" / name).unlink()
    else:
        (tmp_path / "run" / name).write_text(content)
    with pytest.raises(CommandError, match=f"{name} is damaged .* delete"):
        ablate.read_run(tmp_path / "run", steps=2)


def test_done_is_left_begun_is_resumed_and_other_settings_start_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("import sys; print(sys.argv[1:])")  # in the place of the real one
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    run = ablate.plan_run("rmo", "RMO off", 3, ["--steps1", "7"])
    assert (
        run.name == "ablate-steps1-7-group-size-4-delta-1-0-rmo-k-0-seed-3"
        and run.settings["rmo_k"] == 0
        and run.settings["steps1"] == 7
    )
    log = tmp_path / "runs" / f"{run.name}.log"

    ablate.Trainer().train_all([run], jobs=1)
    assert "'--seed', '3', '--steps1', '7']" in log.read_text()
    run.folder.mkdir()
    (run.folder / "settings.json").write_text(json.dumps(run.settings | {"steps1": 8}))
    ablate.Trainer().train_all([run], jobs=1)
    assert "--resume" not in log.read_text()  # a run of other settings, which train.py moves aside
    (run.folder / "settings.json").write_text(json.dumps(run.settings))
    ablate.Trainer().train_all([run], jobs=1)
    assert "--resume" in log.read_text()
    (run.folder / "results.txt").write_text("a table")
    log.unlink()
    ablate.Trainer().train_all([run], jobs=1)
    assert not log.exists()


def test_a_run_that_fails_stops_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wait = "import sys, time\nif sys.argv[sys.argv.index('--seed') + 1] == '0': sys.exit('train.py: no such luck')\ntime.sleep(600)"
    (tmp_path / "train.py").write_text(wait)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    runs = [ablate.plan_run("rmo", "RMO on", seed, []) for seed in (0, 1, 2, 3)]
    with pytest.raises(
        CommandError, match="seed-0 failed .*no such luck.* see runs/ablate-group-size-4-delta-1-0-seed-0.log"
    ):
        ablate.Trainer().train_all(runs, jobs=2)
    assert not (tmp_path / "runs" / f"{runs[3].name}.log").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rmo", "--jobs", "0"], "--jobs"),
        (["rmo", "--seeds", "1", "1"], "--seeds"),
        (["rmo", "--", "--steps1", "-1"], "--steps1"),
        (["rmo", "--", "--name", "mine"], "--name"),
        (["rmo", "--", "--seed", "9"], "--seed"),
        (["rmo", "--", "--resume"], "--resume"),
        (["rmo", "--", "--preset", "utkface"], "--model"),
        (["rmo", "--", "--delta", "nan"], "--delta"),
    ],
)
def test_bad_settings_are_found_before_anything_runs(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CommandError, SettingError), match=message):
        ablate.ablate(argv)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["rmo", "--seeds"], ["rmo", "--", "--nonsense"], ["rmo", "--job", "2"]])  # fmt: skip
def test_unknown_settings_are_refused(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablate.py"])
    with pytest.raises(SystemExit) as error:
        ablate.main(argv)
    assert error.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_equal_runs_of_two_experiments_are_one_and_different_ones_are_not():
    name = lambda experiment, variant, seed=0: ablate.plan_run(experiment, variant, seed, []).name
    assert name("reward", "joint") == name("stages", "two stages") == name("advantage", "group")
    several = [name(e, v, seed) for e, of in ablate.EXPERIMENTS.items() for v in of for seed in (0, 1)]
    assert len(set(several)) < len(several)
    settings = {}
    for e, of in ablate.EXPERIMENTS.items():
        for v in of:
            run = ablate.plan_run(e, v, 0, [])
            assert settings.setdefault(run.name, (run.settings, run.program)) == (run.settings, run.program)
    assert ablate.plan_run("reward", "imitation", 0, []).program == "experiments/imitate.py"
    long = ["--question", "How many dots? " * 20]
    names = {ablate.plan_run("reward", "joint", seed, long).name for seed in (0, 1)}
    assert len(names) == 2 and all(len(name) <= 150 for name in names)


def test_csv_has_a_line_for_each_seed(tmp_path):
    ablate.write_csv({"on": [{"tau": 0.5}, {"tau": math.nan}]}, [3, 4], tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().split() == ["variant,seed,tau", "on,3,0.5", "on,4,"]
