"""support/show/curves.py: what the panels are made of."""

import json
import shutil

import matplotlib.pyplot as plt
import pytest

from support.show import curves


def write(file, *entries):
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def run(tmp_path):
    """Steps with 1, 2, 1 images; the second was validated, the last has no time."""
    common = {
        "reward": 1.0,
        "regression": 0.5,
        "format": 1.0,
        "mae": 2.0,
        "entropy": 0.1,
        "grad_norm": 1.0,
        "zero_spread": 0.0,
    }
    write(
        tmp_path / "metrics.jsonl",
        common | {"stage": 1, "step": 0, "images": 1, "ranking": None},
        common | {"stage": 2, "step": 0, "images": 2, "ranking": 0.75, "reward": 2.0},
        common | {"stage": 2, "step": 1, "images": 1, "ranking": None, "reward": 3.0},
    )
    times = {"seconds": 3.0, "rollout": 1.0, "update": 2.0}
    write(tmp_path / "timing.jsonl", {"stage": 1, "step": 0} | times, {"stage": 2, "step": 0} | times)
    row = {"reward": 0.5, "mae": 4.0, "tau": 0.25, "valid": 1.0}
    images = {"1": row | {"tau": None}, "2": row}
    write(tmp_path / "validation.jsonl", {"stage": 2, "step": 0, "reward": 0.5, "images": images})
    return tmp_path


def test_a_run_is_read_step_by_step(run):
    steps = curves.read_run(run)
    assert [("timing" in s, "validation" in s) for s in steps] == [(True, False), (True, True), (False, False)]
    tau = lambda images: curves.curve(steps, "validation", "tau", images)
    assert tau(2) == ([1], [0.25]) and tau(1) == ([], [])


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_panels_hold_what_was_read(run, monkeypatch, names):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    curves.draw_curves(dict.fromkeys(names, curves.read_run(run)), run / "c.png")
    axes = {axis.get_title(): axis for axis in plt.gcf().axes}
    plt.close("all")
    lines = lambda title: [(list(l.get_xdata()), list(l.get_ydata())) for l in axes[title].lines if len(l.get_xdata())]
    border = ([1, 1], [0, 1])  # stage 2 begins at x = 1
    curve = lambda title: [line for line in lines(title) if line != border][:2]
    assert curve("sampled: reward") == [([0, 2], [1.0, 2.0]), ([1], [2.0])]  # 1 image, the second a mean; 2 images
    assert curve("validation: MAE") == [([1], [4.0]), ([1], [4.0])]
    assert border in lines("gradient norm")
    assert len(axes["seconds per step"].collections) == (len(curves.PHASES) if len(names) == 1 else 0)
    assert (run / "c.png").exists()


def test_a_real_run_is_drawn(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    curves.watch_curves(tmp_path / "run")
    assert (tmp_path / "run/curves.png").exists() and not capsys.readouterr().err


GOOD = '{"stage": 1, "step": 0, "images": 1, "reward": 0.5}\n'


@pytest.mark.parametrize(
    "metrics, timing",
    [("", ""), ("[1]\n", ""), ('{"stage": 1, "step": 0}\n', ""),
     (GOOD, '{"stage": 1}\n')],
)  # fmt: skip
def test_damaged_metrics_are_named(tmp_path, metrics, timing):
    (tmp_path / "metrics.jsonl").write_text(metrics)
    (tmp_path / "timing.jsonl").write_text(timing)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match=f"curves: {folder} holds no metrics that can be read"):
            curves.main([str(folder)])


@pytest.mark.parametrize("out", ["x.xyz", "nowhere/x.png", "folder"])
def test_a_picture_that_cannot_be_written(here, out):
    (here / "folder").mkdir()
    (here / "metrics.jsonl").write_text(GOOD)
    with pytest.raises(SystemExit, match="curves: "):
        curves.main([".", "--out", out])
    assert not list(here.glob("**/*.png"))
