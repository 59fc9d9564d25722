"""Every command in the README that needs no download and no GPU runs as written, on a small budget."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SMALL = {  # what makes a command short, added at its end
    "train.py": "--steps1 1 --steps2 1 --batch-size 2 --group-size 2 --images 2 4 8 --eval-samples 2 --workers 0",
    "eval.py": "--samples 2",
    "rank": "",
    "data.py": "",
    "bench.py": "--prompts 1 --images 1 --pixels 56 --group 2 --tokens 4 --repeats 1",
    "ablate.py": "--seeds 0 -- --steps1 1 --steps2 1 --batch-size 2 --group-size 2 --images 2 --eval-samples 2 --workers 0",
    "tiny.py": "--out made --eyes-steps 1 --mouth-steps 1 1",
}
ELSEWHERE = ("/data/", "Qwen/", "HOST", "ROOT", "PATH", "...", "photos")  # needs data, a hub or other machines


def commands():
    found = re.findall(r"^    ((?:.*&& )?(?:python|torchrun) .*(?:\\\n.*)*)$", README, re.M)
    return [re.sub(r"\s*#.*", "", c.replace("\\\n", " ")).split("&& ")[-1] for c in found]


def here(command):
    return not any(word in command for word in ELSEWHERE) and "-m pytest" not in command


def test_the_two_commands_come_first():
    first = re.findall(r"^    (.*)$", README, re.M)[:2]
    assert first == [
        "pip install -r requirements.txt && python train.py",
        "pip install -r requirements.txt && python -m pytest",
    ]


def test_every_readme_command_runs(tmp_path):
    runnable = [c for c in commands() if here(c)]
    assert {"train.py", "eval.py", "bench.py"} <= {shlex.split(c)[1] for c in runnable}
    for command in runnable:
        program, script, *arguments = shlex.split(command)
        small = shlex.split(SMALL["rank" if "--rank" in arguments else script])
        if "--" in arguments:  # ablate.py: its own settings stand before, those of train.py after
            cut, own = arguments.index("--"), small.index("--")
            arguments, small = arguments[:cut] + small[:own], arguments[cut:] + small[own + 1 :]
        start = [sys.executable] + (["-m", "torch.distributed.run"] if program == "torchrun" else [])
        done = subprocess.run(
            [*start, str(ROOT / script), *arguments, *small],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


@pytest.mark.parametrize("command", [c for c in commands() if not here(c) and "-m pytest" not in c])
def test_commands_for_elsewhere_are_understood(command, capsys):
    """They cannot run here, but their settings must exist: only the missing data or model may stop them."""
    import data
    import eval as evaluation
    import train

    arguments = shlex.split(command)
    position = next(i for i, a in enumerate(arguments) if a.endswith(".py"))
    if arguments[position] == "train.py":
        train.parse_settings(arguments[position + 1 :])
    elif arguments[position] == "eval.py":
        evaluation._arguments(arguments[position + 1 :])
    else:
        assert arguments[position] == "data.py"
        with pytest.raises(SystemExit) as error:
            data.main(arguments[position + 1 :])
        assert error.value.code != 2  # 2 is argparse's: an unknown setting


def test_every_file_is_in_the_readme():
    for file in ROOT.glob("*.py"):
        assert f"`{file.name}`" in README


def test_table_of_metrics_names_what_a_run_writes(tmp_path, monkeypatch):
    import json

    import train

    monkeypatch.chdir(tmp_path)
    train.main([*shlex.split(SMALL["train.py"]), "--updates", "2"])
    written = set(json.loads((tmp_path / "runs/rarl/metrics.jsonl").read_text().splitlines()[0]))
    section = README.split("## The numbers in `metrics.jsonl`")[1].split("\n## ")[0]
    explained = set(re.findall(r"`([a-z_]+)`", section.split("|---|---|")[1]))
    assert explained - {"valid"} <= written | {"updates"}
    assert written - explained == {"stage", "step", "images", "tokens", "bad", "loss", "policy_loss"}
