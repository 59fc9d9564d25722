"""experiments/ablate.py, runs.py and report.py: tables and pictures by hand, and what is done with runs that are finished,
begun, damaged or shared.

That they train is tested with the commands of experiments/README.md.
"""

import csv
import dataclasses
import json
import math
import sys

import pytest

from experiments import ablate, report, runs
from experiments.commands import CommandError
from support.run.settings import SettingError

# A run of 2 + 4 steps with 1 and 2 images in a prompt
SHORT = ["--steps1", "2", "--steps2", "4", "--images", "1", "2"]
LOGS = [  # entropy, share of mutated answers
    *[{"stage": 1, "step": i, "entropy": x, "mutated": 0.5} for i, x in enumerate((1.0, 2.0))],
    *[{"stage": 2, "step": i, "entropy": x, "mutated": 0} for i, x in enumerate((4.0, 2.0, None, 7.0))],
]
TRAINED = {"valid": 0.5, "mae": 2.0, "tau": None, "tau_values": None}
BASE = {"valid": 0.75, "mae": 4.0, "tau": None, "tau_values": None}
BLIND = {"valid": 1.0, "mae": 5.0, "constant": 10.0}
RESULTS = {
    "base": {"1": BASE, "2": BASE | {"tau": 0.125, "tau_values": 0.25}},
    "stage 1": {"1": BASE, "2": BASE},
    "stage 2": {"1": TRAINED, "2": TRAINED | {"valid": 0.25, "mae": 3.0, "tau": 0.5, "tau_values": 0.75}},
    "best constant by R_reg": {"1": BLIND | {"mae": 7.0}, "2": BLIND | {"mae": 7.0}},
    "best constant by MAE": {"1": BLIND, "2": BLIND | {"mae": 6.0, "tau_values": 0.0}},
    "prompt order": {"2": {"valid": 1.0, "mae": None, "tau": -0.25}},
}


def save_settings(run, **others):
    (run.folder / "settings.json").write_text(json.dumps(dataclasses.asdict(run.settings) | others))


def finish(run, results=RESULTS, logs=LOGS):
    """Write what train.py leaves."""
    run.folder.mkdir(parents=True)
    save_settings(run)
    (run.folder / "results.json").write_text(json.dumps(results))
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    (run.folder / "results.txt").write_text("a table")
    return run


def outcomes(planned):
    return {variant: [(run, runs.read_run(run)) for run in seeds] for variant, seeds in planned.items()}


def mae(value):
    """Results whose last policy has this MAE at 1 image."""
    return RESULTS | {"stage 2": RESULTS["stage 2"] | {"1": TRAINED | {"mae": value}}}


# --- tables and pictures ----------------------------------------------------------------------------------------


def test_a_cell_says_how_many_seeds_have_a_value():
    assert report.cell([1.0, 2.0]) == "1.500 (1.000 to 2.000)"
    assert report.cell([math.nan, 0.125]) == "0.125 (0.125 to 0.125) of 1"
    assert report.cell([math.nan, math.nan]) == "-"


def test_a_row_is_read_from_the_last_stage_and_the_steps(here):
    read = runs.read_run(finish(runs.plan("run", SHORT)))
    known = {name: value for name, value in read.row.items() if not math.isnan(value)}
    assert known == {
        "valid": 0.25,
        "MAE@1": 2.0,
        "MAE@2": 3.0,
        "tau@2": 0.5,
        "tau_values@2": 0.75,
        "entropy": (1 + 2 + 4 + 2 + 7) / 5,
        "mutated": (0.5 + 0.5) / 6,
    }
    assert set(read.row) - set(known) == {
        "grad norm",
        "Var(A)",
        "zero spread",
        "redrawn",
        "inverted",
        "contradict@2",
        "steps to 90 %",
    }  # not measured is not 0
    assert read.base["MAE@2"] == 4.0 and read.base["tau@2"] == 0.125
    assert read.blind == {"MAE@1": 5.0, "MAE@2": 6.0, "tau@2": -0.25}


def test_learned_is_when_the_slowest_number_of_images_first_has_the_format():
    logs = [{"images": n, "format": x} for n, x in ((1, 0.95), (2, 0.0), (1, 0.5), (2, 0.89), (1, 1.0), (2, 0.9))]
    assert runs.steps_until_learned(logs) == 5 and math.isnan(runs.steps_until_learned(logs[:5]))


def test_nearness_by_hand():
    """Values 1, 2, 3, 10 of labels 1, 4, 3, 4: errors 0, 2, 0, 6, means 4 and 3, mean product of deviations 2.5, variances 12.5 and 1.5."""
    predictions = [
        {"labels": [1, 4], "values": [1.0, 2.0]},
        {"labels": [3, 4], "values": [3.0, 10.0]},
        {"labels": [9, 9], "values": None},
        {"labels": [5], "values": None},
    ]
    assert runs.near(predictions, 2) == {"within 2@2": 0.75, "CCC@2": pytest.approx(2 * 2.5 / (12.5 + 1.5 + 1))}


def test_table_begins_with_who_did_not_train_and_who_does_not_look(here):
    planned = {"on": [finish(runs.plan(f"on-{i}", [*SHORT, "--seed", str(i)]), mae(1.0 + i)) for i in (0, 1)]}
    text = report.report("rmo", planned)
    assert (here / "runs/ablate-rmo.txt").read_text() == text + "\n"
    title, _, *lines = [line.split() for line in text.splitlines()]
    assert " ".join(title) == "rmo: mean (lowest to highest) of 2 seeds x 200 test answers"
    head, before, blind, on = lines
    assert head[:5] == ["valid", "MAE@1", "MAE@2", "tau@2", "tau_values@2"]
    assert before[:7] == ["before", "training", "0.750", "4.000", "4.000", "0.125", "0.250"]
    assert blind[:6] == ["blind", "-", "5.000", "6.000", "-0.250", "-"]
    assert on[5:9] == ["1.500", "(1.000", "to", "2.000)"]
    rows = list(csv.DictReader((here / "runs/ablate-rmo.csv").open()))
    assert [(row["variant"], row["seed"], row["MAE@1"]) for row in rows] == [
        ("before training", "", "4.0"),
        ("blind", "", "5.0"),
        ("on", "0", "1.0"),
        ("on", "1", "2.0"),
    ]
    assert rows[1]["valid"] == rows[2]["grad norm"] == ""


def test_the_base_may_have_an_answer_where_no_trained_policy_has(here):
    results = RESULTS | {"base": RESULTS["base"] | {"4": TRAINED}}
    report.report("rmo", {"on": [finish(runs.plan("on", SHORT), results)]})
    before, _, on = csv.DictReader((here / "runs/ablate-rmo.csv").open())
    assert float(before["MAE@4"]) == TRAINED["mae"] and on["MAE@4"] == ""


def test_curves_are_means_over_seeds_and_whole_cycles(here):
    other = [log | {"entropy": (log["entropy"] or 0.0) + 2} for log in LOGS]
    seeds = [finish(runs.plan(f"run-{i}", SHORT), logs=logs) for i, logs in enumerate((LOGS, other))]
    one, two = report.curve(outcomes({"on": seeds})["on"], "entropy")
    # Stage 1: (1 + 2 + 3 + 4) / 4, between its steps 1 and 2. Stage 2: (4 + 2 + 6 + 4) / 4, and (7 + 2 + 9) / 3, as one
    # of four is not known. Its first step is the run's third.
    assert one == ([1.5], [2.5])
    assert two == ([3.5, 5.5], [4.0, 6.0])


# --- runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, "{", "1\n", '{"stage": 1, "step": 1}\n'])
def test_a_damaged_run_is_named(here, name, content):
    run = finish(runs.plan("run", SHORT))
    if content is None:
        (run.folder / name).unlink()
    else:
        (run.folder / name).write_text(content)
    with pytest.raises(CommandError, match=f"{name} is damaged .* delete runs/run, and it is trained again"):
        runs.read_run(run)


def fake_program(folder, monkeypatch, train=""):
    """In the place of train.py. What it prints is in the log."""
    monkeypatch.setattr(runs, "ROOT", folder)
    (folder / "experiments").mkdir()
    (folder / "experiments/rivals.py").write_text(f"import sys; print(sys.argv)\n{train}")


def test_done_is_left_begun_is_resumed_and_other_settings_start_anew(here, monkeypatch):
    fake_program(here, monkeypatch)
    run = ablate.plan_run("rmo_k", "k = 0", 3, ["--steps1", "7"])
    assert run.name == "ablate-steps1-7-delta-1-0-rmo-k-0-seed-3"
    assert run.settings.rmo_k == 0 and run.settings.steps1 == 7
    log = here / "runs" / f"{run.name}.log"

    def train(**others):
        save_settings(run, **others)
        log.unlink()
        runs.Trainer().train_all([run], jobs=1)
        return log.read_text() if log.exists() else "not run"

    runs.Trainer().train_all([run], jobs=1)
    assert "'--seed', '3', '--steps1', '7']" in log.read_text()
    run.folder.mkdir()
    assert "--resume" not in train(steps1=8)  # a run of other settings, which train.py moves aside
    assert "--resume" in train()
    assert "--resume" in train(workers=5, device="cuda", name="renamed")  # train.py resumes on another machine
    (run.folder / "results.txt").write_text("a table")
    assert train() == "not run"


def test_a_shared_run_is_trained_once(here, monkeypatch):
    fake_program(here, monkeypatch, "print(sys.argv[1], file=open('trained', 'a'))")
    same = [ablate.plan_run(*which, 5, []) for which in (("advantage", "GRPO"), ("stages", "two"))]
    runs.Trainer().train_all([*same, ablate.plan_run("advantage", "GDPO", 5, [])], jobs=2)
    assert sorted((here / "trained").read_text().split()) == ["gdpo", "rarl"]


def test_a_run_that_fails_stops_the_others(here, monkeypatch):
    wait = "import time\nif sys.argv[sys.argv.index('--seed') + 1] == '1': sys.exit('train.py: no such luck')\ntime.sleep(20)"
    fake_program(here, monkeypatch, wait)
    planned = [ablate.plan_run("rmo_k", "k = 1", seed, []) for seed in (0, 1, 2, 3)]
    with pytest.raises(CommandError, match="seed-1 failed .*no such luck.* see runs/ablate-delta-1-0-seed-1.log"):
        runs.Trainer().train_all(planned, jobs=2)
    assert not (here / "runs" / f"{planned[3].name}.log").exists()


def test_all_reports_every_experiment(here, monkeypatch, capsys):
    few = {
        "first": {"plain": [], "centred": ["dr-grpo"]},
        "second": {"plain": [], "parts": ["gdpo"]},
        "faces": {"no": []},
    }
    monkeypatch.setattr(ablate, "EXPERIMENTS", few)
    monkeypatch.setattr(runs.Trainer, "train_unless_done", lambda self, run: run.is_done() or finish(run))
    ablate.ablate(["all", "--seeds", "0", "--", *SHORT])
    assert len(list((here / "runs").glob("*/results.txt"))) == 3  # GRPO is shared
    said = capsys.readouterr().out
    assert [said.count(f"{e}: mean (lowest to highest) of 1 seed x 100 test answers") for e in few] == [1, 1, 0]
    assert all((here / f"runs/ablate-{e}.{end}").exists() for e in list(few)[:2] for end in ("txt", "csv", "png"))


def test_what_nobody_has_is_made_once_and_before_it_is_needed(here, monkeypatch):
    def write(folder):
        folder.mkdir()
        (folder / "file").write_text("made")

    def train_all(self, planned, jobs):
        assert (here / "runs/dots-skewed/file").read_text() == ("made" if not trained else "mine")
        trained.append(planned)

    trained = []
    (here / "runs/dots-skewed.writing").mkdir(parents=True)  # of a process that was killed
    monkeypatch.setitem(ablate.MADE, "runs/dots-skewed", write)
    monkeypatch.setattr(ablate.Trainer, "train_all", train_all)
    monkeypatch.setattr(ablate, "report", lambda *which: "")
    ablate.ablate(["balance", "--seeds", "0"])
    (here / "runs/dots-skewed/file").write_text("mine")
    ablate.ablate(["balance", "--seeds", "0"])
    assert len(trained) == 2 and [path.name for path in (here / "runs").iterdir()] == ["dots-skewed"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rmo", "--", "--steps1", "-1"], "--steps1"),
        (["rmo", "--", "--name", "mine"], "--name"),
        (["rmo", "--", "--seed", "9"], "--seed"),
        (["rmo", "--", "--resume"], "--resume"),
        (["rmo", "--", "--steps1", "0", "--steps2", "0"], "nothing would be trained"),
        (["balance", "--", "--preset", "utkface"], "balance is about drawings .* leave out --preset"),
        (["rmo_unseen", "--", "--data=coco"], "rmo_unseen is about drawings .* leave out --data"),
        (["rmo_unseen", "--", "--question", "How many?"], "rmo_unseen is about .* --question"),
        (["all", "--", "--data-root", "x"], "about drawings"),
        (["rmo", "--", "--preset", "utkface"], "--model"),
        (["rmo", "--", "--delta", "nan"], "--delta"),
        (["rmo", "--only", "RMO", "nothing at all"], "'nothing at all' is no row: RMO, nothing"),
        (["faces"], "faces needs UTKFace's aligned faces: add -- --data-root DIR"),
    ],
)
def test_bad_settings_are_found_before_anything_runs(argv, message, here):
    with pytest.raises((CommandError, SettingError), match=message):
        ablate.ablate(argv)
    assert not (here / "runs").exists()


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["rmo", "--seeds"], ["rmo", "--jobs", "0"], ["rmo", "--", "--nonsense"], ["rmo", "--job", "2"]])  # fmt: skip
def test_unknown_settings_are_refused(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablate.py"])
    with pytest.raises(SystemExit) as error:
        ablate.main(argv)
    assert error.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_equal_runs_of_two_experiments_are_one_and_different_ones_are_not():
    name = lambda experiment, variant, seed=0: ablate.plan_run(experiment, variant, seed, []).name
    assert name("rmo_default", "RMO") == name("stages", "two") == name("advantage", "GRPO")
    several = [name(e, v, seed) for e, of in ablate.EXPERIMENTS.items() for v in of for seed in (0, 1)]
    assert len(set(several)) < len(several)
    settings = {}
    for e, of in ablate.EXPERIMENTS.items():
        for v in of:
            run = ablate.plan_run(e, v, 0, [])
            assert settings.setdefault(run.name, (run.settings, run.rival)) == (run.settings, run.rival)
    imitation = ablate.plan_run("reward", "imitation", 0, [])
    assert imitation.rival == "imitation" and imitation.name.startswith("ablate-imitation-")
    long = ["--question", "How many dots? " * 20]
    names = {ablate.plan_run("reward", "joint", seed, long).name for seed in (0, 1)}
    assert len(names) == 2 and all(len(name) <= 150 for name in names)
