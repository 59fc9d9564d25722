"""support/run/settings.py: what cannot work is refused by name, and a resumed run has its own settings."""

import dataclasses
import json
from pathlib import Path

import pytest

from support.run.settings import SettingError, Settings, parse_settings


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
        (["--name", "../x"], "--name '../x' must be a plain folder name"),
        (["--name", "a\x00b"], "must be a plain folder name"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(SettingError) as error:
        parse_settings(arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--learning-rate", "1"],
        ["--image", "2"],
        ["--stage", "3"],
        ["--steps1", "many"],
        ["--delta", "1_0"],
        ["--steps1", "1_0"],
    ],
)
def test_unknown_settings_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_settings(arguments)
    assert "error: " in capsys.readouterr().err


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    text = capsys.readouterr().out
    for f in dataclasses.fields(Settings):
        assert f"--{f.name.replace('_', '-')}" in text and len(f.metadata["help"]) > 8


def test_what_was_typed_wins_over_the_preset_and_the_preset_over_the_defaults():
    s = parse_settings(["--preset", "utkface", "--model", "m", "--data-root", "/faces", "--lr", "1e-5"])
    assert (s.data, s.name, s.lr, s.batch_size, s.group_size) == ("utkface", "utkface", 1e-5, 64, Settings().group_size)
    with pytest.raises(SettingError, match="--preset utkface needs --model"):
        parse_settings(["--preset", "utkface"])


@pytest.fixture
def saved(here):
    """A run with settings of its own, in the working directory."""
    out = here / "runs" / "mine"
    out.mkdir(parents=True)
    given = parse_settings(["--name", "mine", "--seed", "5", "--freeze-vision", "--activation-checkpointing"])
    (out / "settings.json").write_text(json.dumps(dataclasses.asdict(given)))
    return given


def test_a_resumed_run_has_its_own_settings(saved):
    assert parse_settings(["--name", "mine", "--resume"]) == dataclasses.replace(saved, resume=True)
    again = parse_settings(["--name", "mine", "--resume", "--seed", "5", "--freeze-vision"])  # the same: fine
    assert again == dataclasses.replace(saved, resume=True)


def test_a_renamed_folder_goes_on_under_its_new_name(saved):
    Path("runs/mine").rename("runs/ours")
    assert parse_settings(["--name", "ours", "--resume"]) == dataclasses.replace(saved, name="ours", resume=True)


def test_what_an_out_of_memory_error_asks_for_may_change(saved):
    more = "--max-tokens-per-forward 100 --no-activation-checkpointing --rollout-batch 2 --workers 0"
    s = parse_settings(["--name", "mine", "--resume", *more.split()])
    assert (s.max_tokens_per_forward, s.activation_checkpointing, s.rollout_batch, s.workers) == (100, False, 2, 0)
    assert s.seed == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seed", "6"], "has --seed 5, not 6"),
        (["--no-freeze-vision"], "has --freeze-vision True, not False"),
        (["--images", "2"], "has --images 1 2 4 8, not 2"),
        (["--lr", "1e-9"], "has --lr 0.0003, not 1e-09"),  # smaller only after a stop by bad steps
        (["--preset", "coco"], "has --data dots, not coco"),
    ],
)
def test_another_setting_would_be_another_run(saved, arguments, message):
    with pytest.raises(SettingError, match=message):
        parse_settings(["--name", "mine", "--resume", *arguments])
