"""The command line of eval.py, with policies that are dictionaries or functions, and with damaged real ones."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import answer, scripted_policy, talking_policy
from PIL import Image

import data
import eval as evaluation
import rarl
from support.datasets import load_dataset
from support.datasets.saved_task import save_task
from support.run.checkpoints import write_checksums

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def policy(monkeypatch):
    return scripted_policy(monkeypatch)


@pytest.fixture
def ranker(monkeypatch):
    return talking_policy(monkeypatch)


# --- command line -------------------------------------------------------------------------------------------


def test_command_writes_table_answers_and_picture(policy, tmp_path, monkeypatch, capsys):
    class Knows(dict):  # answers for image 1 alone: right at one image, invalid at two
        def __missing__(self, name):
            return answer((1, items[name]))

    items = {item.name: item.label for item in load_dataset("dots", None, "test")}
    policy.said = Knows()
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: policy)
    arguments = f"--model some/hub-id --data dots --images 1 2 --samples 3 --device cpu --out {tmp_path}/new/out"
    evaluation.main(arguments.split())
    output = capsys.readouterr()
    table = output.out.splitlines()
    assert table[0].split()[:2] == ["1", "image"] and table[5].split()[:2] == ["2", "images"]
    assert table[1].split()[:4] == ["hub-id", "100.0%", "3", "0.000"]
    assert table[6].split() == ["hub-id", "0.0%", "3", "-", "-", "-", "-", "0.000", "-", "-", "0"]
    # Below each policy what one would get that looks at no image.
    blind = ["best constant by R_reg", "best constant by MAE", "prompt order"]
    assert [line.split(":")[0].split("  ")[0] for line in table[7:10]] == blind
    assert output.err.splitlines()[:2] == ["reading dots ...", "asked: How many dots are in the image? (delta 2)"]
    results = json.loads((tmp_path / "new/out/results.json").read_text())
    assert results["hub-id"]["1"]["mae"] == 0 and results["hub-id"]["2"]["mae"] is None
    assert results["prompt order"]["2"]["tau_n"] > 0
    written = [json.loads(line) for line in (tmp_path / "new/out/predictions.jsonl").read_text().splitlines()]
    assert [len(p["items"]) for p in written] == [1, 1, 1, 2, 2, 2]
    Image.open(tmp_path / "new/out/predictions.png").verify()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {tmp}/missing --data dots", "missing does not exist"),
        ("--model {tmp} --data dotz", "dotz"),
        ("--model {tmp} --data dots --images 2 4096", "4096 images"),
        ("--model {tmp} --data coco", "--data-root"),
        ("--model {tmp} --data dots --out {tmp}/file", "file: File exists"),
        ("--model {tmp} --data dots --out /proc/self", "nothing can be written to --out /proc/self"),
        ("--model {tmp} --data dots --out a\0b", "nothing can be written to --out a"),
        ("--model {tmp} --data dots --delta nan", "--delta nan must be positive"),
        ("--model {tmp} --data dots --decimals 10", "--decimals 10 must be a whole number"),
        ("--model {tmp} --data dots --order=", "--question and --order must be text and not empty"),
        ("--model {tmp} --rank {tmp} --question q", "either --data or both --question and --order"),
    ],
)
def test_a_users_mistake_is_one_sentence(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    arguments = arguments.format(tmp=tmp_path).split()
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*arguments, *([] if "--out" in arguments else ["--out", str(tmp_path / "out")])])
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert str(stop.value).startswith("eval.py: ")


@pytest.mark.parametrize(
    "wrong",
    ["--images 0", "--samples -1", "--batch-size x", "--device abacus", "--device cuda:99", "--device meta",
     "--split dev", "--max-pixels 100", "--delta x"],
)  # fmt: skip
def test_a_mistyped_setting_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--model", "m", "--data", "dots", *wrong.split()])
    assert f"argument {wrong.split()[0]}: " in capsys.readouterr().err


# --- command line: --rank -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Five images: 3.png has 3 red pixels, and so on. Also what should be passed over."""
    path = tmp_path / "my images"
    (path / "subfolder.png").mkdir(parents=True)
    for i in (5, 3, 1, 4, 2):
        image = Image.new("RGB", (30, 30))
        for x in range(i):
            image.putpixel((x, 0), (255, 0, 0))
        image.save(path / f"{i}.png")
    for other in ("notes.txt", ".hidden.png"):
        (path / other).write_text("not an image")
    return path


@pytest.fixture
def rank(ranker, monkeypatch, tmp_path):
    """Runs the command with a policy that counts red pixels, but in a single image no further than 2."""

    def say(names):
        counts = [np.asarray(Image.open(name))[0, :, 0].astype(bool).sum() for name in names]
        counts = counts if len(names) > 1 else [min(2, *counts, 9)]
        return answer(*((i, int(count)) for count, i in sorted(zip(counts, range(1, 99), strict=False))))

    ranker.say = say
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: ranker)
    return lambda *more: evaluation.main(
        ["--model", "some/hub-id", "--device", "cpu", "--out", f"{tmp_path}/new/out", *map(str, more)]
    )


COUNT_RED = ["--question", "How many pixels are red?", "--order", "from the fewest to the most"]


def test_rank_prints_order_and_values_and_writes_a_sheet(rank, ranker, folder, tmp_path, capsys):
    rank("--rank", folder, *COUNT_RED)
    output = capsys.readouterr()
    values = {1: 1, 2: 2, 3: 2, 4: 2, 5: 2}  # the order above 2 is the windows'
    assert output.out.splitlines() == [
        "rank value file",
        *(f"   {i}     {values[i]} {folder}/{i}.png" for i in values),
    ]
    assert set(ranker.tokens) == {33, 4 * 33}, "room for five digits"
    written = [json.loads(line) for line in (tmp_path / "new/out/ranking.jsonl").read_text().splitlines()]
    assert written == [{"rank": i, "file": f"{folder}/{i}.png", "value": values[i]} for i in values]
    assert (tmp_path / "new/out/ranking.png").exists()


def test_files_and_an_answer_that_is_not_valid(rank, folder, ranker, tmp_path):
    (folder / "2.png").rename(folder / "2 é.png")
    right = ranker.say
    ranker.say = lambda names: "?" if [name[-5:] for name in names] == ["3.png"] else right(names)
    rank("--rank", *(folder / f"{n}.png" for n in "135"), folder / "2 é.png", "--data", "dots")
    document = [json.loads(line) for line in (tmp_path / "new/out/ranking.jsonl").read_text().splitlines()]
    assert [row["file"] for row in document] == [f"{folder}/{n}.png" for n in ("1", "2 é", "3", "5")]
    assert [(row["rank"], row["value"]) for row in document] == [(1, 1), (2, 2), (3, None), (4, 2)]
    assert (tmp_path / "new/out/ranking.png").exists()


def test_bad_images_are_named_or_left_out_and_counted(rank, folder, ranker, tmp_path, capsys):
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    (folder / "6.jpg").write_text("<html>not found</html>")
    Image.new("RGB", (1000, 1)).save(folder / "7.png")
    with pytest.raises(SystemExit) as stop:
        rank("--rank", folder, *COUNT_RED)
    message = str(stop.value)
    assert f"{folder}/4.png cannot be read" in message and "\n" not in message
    assert message.endswith("3 such in all, --skip-bad leaves them out")
    assert not ranker.prompts and not (tmp_path / "new").exists(), "found before anything else is done"
    rank("--rank", folder, *COUNT_RED, "--skip-bad")
    output = capsys.readouterr()
    assert [line[-5] for line in output.out.splitlines()[1:]] == ["1", "2", "3", "5"]
    assert "left out 3 of 7 images" in output.err and output.err.count("left out: image file") == 3
    with pytest.raises(SystemExit, match=r"none of the 1 files is an image.*6\.jpg$"):  # none is left to rank
        rank("--rank", folder / "6.jpg", *COUNT_RED, "--skip-bad")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["{folder}/6.png"], "no file or folder '{folder}/6.png'"),
        ([""], "no file or folder ''"),  # an unset variable, not the current folder
        (["{folder}/subfolder.png"], "subfolder.png has no images ("),
        (["{folder}/notes.txt"], "notes.txt cannot be read"),
    ],
)
def test_a_wrong_path_to_rank_is_one_sentence(rank, folder, paths, message):
    with pytest.raises(SystemExit) as stop:
        rank("--rank", *(path.format(folder=folder) for path in paths), *COUNT_RED)
    assert message.format(folder=folder) in str(stop.value) and "\n" not in str(stop.value)
    assert str(stop.value).startswith("eval.py: ")


def test_a_sheet_is_not_written_among_the_images(rank, folder):
    with pytest.raises(SystemExit, match="is ranked itself"):
        rank("--rank", folder, *COUNT_RED, "--out", folder)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--rank x --data dots --images 2", "--images does not go with --rank"),
        ("--rank x --data dots --seed 0", "--seed does not go with --rank"),  # even if it is the default
        ("--data dots --window 4", "--window needs --rank"),
        ("--rank x --question q --order o --data-root r", "--data-root goes with --data"),
        ("--rank x --data dots --window 1", "argument --window: 1 is less than 2"),
        ("", "--data is required, or --rank"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong, message, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--model", "m", *wrong.split()])
    assert message in capsys.readouterr().err


# --- the question of training -----------------------------------------------------------------------------------


def asked(monkeypatch):
    """The samples that the policy was shown."""
    shown = []
    prompts = lambda policy, samples: shown.extend(samples) or [[item.name for item in s.items] for s in samples]
    monkeypatch.setattr(data, "make_prompts", prompts)
    return shown


def test_a_policy_is_asked_what_it_was_trained_on(ranker, folder, tmp_path, monkeypatch, capsys):
    ranker.say = lambda names: answer(*((i, 3) for i in range(1, len(names) + 1)))
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: ranker)
    shown = asked(monkeypatch)
    items = load_dataset("dots", None, "train", {"question": "Count the dots!", "delta": 2.5})
    save_task(tmp_path, "dots", items, {"question": "Count the dots!", "delta": 2.5}, None, False)

    def run(*more):
        shown.clear()
        out = ["--out", f"{tmp_path}/out", "--device", "cpu"]
        evaluation.main(["--model", f"{tmp_path}", *out, *map(str, more)])
        return {(sample.task.question, sample.task.delta) for sample in shown}, capsys.readouterr().err

    small = ("--images", 1, 2, "--samples", 3)
    tasks, said = run("--data", "dots", *small)
    assert tasks == {("Count the dots!", 2.5)} and "asked: Count the dots! (delta 2.5)" in said
    tasks, said = run("--data", "dots", *small, "--delta", 4)
    assert tasks == {("Count the dots!", 4)} and "(delta 4)" in said
    tasks, said = run("--data", "dials", *small)
    assert tasks == {("Which number does the needle point at, from 0 to 20?", 4)}
    assert "this policy was trained on dots; the question of dials is new to it" in said
    # Ranking needs neither --data nor --question.
    tasks, said = run("--rank", folder, "--rounds", 1)
    assert tasks == {("Count the dots!", 2.5)} and "asked: Count the dots!" in said
    assert "5 of 5 values are 3: this policy hardly tells these images apart" in said
    tasks, _ = run("--rank", folder, "--rounds", 1, "--question", "How red?")
    assert tasks == {("How red?", 2.5)}
    (tmp_path / "task.json").write_text("{")
    with pytest.raises(SystemExit, match=r"task\.json is damaged"):
        run("--data", "dots", *small)


@pytest.mark.parametrize("what", [["--data", "dots"], ["--rank", "photos"]])
def test_a_policy_that_is_not_what_was_saved_is_refused(tmp_path, what):
    for name in ("model.safetensors", "task.json"):
        (tmp_path / name).write_text("as saved")
    write_checksums(tmp_path)
    (tmp_path / "model.safetensors").write_text("as saveD")
    with pytest.raises(SystemExit, match="model.safetensors was altered: restore the folder"):
        evaluation.main(["--model", str(tmp_path), "--device", "cpu", *what])
    (tmp_path / "model.safetensors").write_text("as saved")
    (tmp_path / "task.json").unlink()  # else it would be asked another question, silently
    with pytest.raises(SystemExit, match="is incomplete.*task.json"):
        evaluation.main(["--model", str(tmp_path), "--device", "cpu", *what])
    (tmp_path / "checksums.json").unlink()
    (tmp_path / "checksums.json").mkdir()
    with pytest.raises(SystemExit, match="is incomplete.*checksums.json"):
        evaluation.main(["--model", str(tmp_path), "--device", "cpu", *what])


def test_images_are_shrunk_as_asked(policy, tmp_path, monkeypatch):
    policy.image_processor = SimpleNamespace(size={"shortest_edge": 5, "longest_edge": 6})
    policy.said = defaultdict(lambda: answer((1, 5)))
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: policy)
    arguments = f"--model {tmp_path} --data dots --images 1 --samples 1 --device cpu --out {tmp_path}/out".split()
    evaluation.main(arguments)
    assert policy.image_processor.size == {"shortest_edge": 5, "longest_edge": 6}
    save_task(tmp_path, "dots", load_dataset("dots"), {}, 7840, False)
    evaluation.main(arguments)
    assert policy.image_processor.size == {"shortest_edge": 3136, "longest_edge": 7840}
    evaluation.main([*arguments, "--max-pixels", "3920"])
    assert policy.image_processor.size["longest_edge"] == 3920


# --- no traceback -----------------------------------------------------------------------------------------------


def test_a_blind_policy_is_named(policy, tmp_path, monkeypatch, capsys):
    policy.said = defaultdict(lambda: answer((1, 1), (2, 1)))
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: policy)
    arguments = f"--model m/x --data dots --images 2 --samples 12 --device cpu --out {tmp_path}/out"
    evaluation.main(arguments.split())
    output = capsys.readouterr().out
    assert "note: at 2 images the policy says 1 of 100% of the images" in output
    assert "note: at 2 images 100% of the lists are in the order of the prompt: their tau is chance" in output
    known = json.loads((tmp_path / "out/results.json").read_text())["x"]["2"]["remarks"]
    assert len(known) == 2 and all(f"note: {remark}" in output for remark in known)


def test_an_unreadable_test_image_is_named_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: pytest.fail("loaded"))
    for i in range(6):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_text("no image")
    lines = [f"{i}.png,{i},{'train' if i < 3 else 'test'}" for i in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    arguments = f"--model m/x --data csv --data-root {tmp_path} --images 1 2 --device cpu --out {tmp_path}/out"
    with pytest.raises(SystemExit, match=r"4\.png cannot be read.*--skip-bad leaves"):
        evaluation.main(arguments.split())


@pytest.mark.parametrize("full", ["results.json.writing", "standard output"])
def test_a_full_disk_is_one_sentence(policy, tmp_path, monkeypatch, capsys, full):
    policy.said = defaultdict(lambda: answer((1, 5)))
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: policy)
    arguments = f"--model m/x --data dots --images 1 --samples 2 --device cpu --out {tmp_path}"
    if "json" in full:
        (tmp_path / full).symlink_to("/dev/full")
    else:
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    with pytest.raises(SystemExit, match="eval.py: .*No space left.*: the disk is full, free some space"):
        evaluation.main(arguments.split())
    if "json" in full:
        assert "best constant" in capsys.readouterr().out, "the table is printed first"
    else:
        sys.stdout.close()  # as the interpreter does at its end: nothing is left to be written, so nothing fails


@pytest.mark.parametrize(
    ("redirected", "encoding", "printed"),
    [(">&-", "utf-8", None), ("> out", "ascii", "gr\\xf6\\xdfe 7\n"), ("> out", "utf-8", "größe 7\n")],
)
def test_whatever_standard_output_is_the_program_goes_on(tmp_path, redirected, encoding, printed):
    """What all three programs import first. With a closed output the next file must not take its place either."""
    program = "import support.run.quiet_end; f = open('file', 'w'); print('größe', 7, flush=True); f.write(str(f.fileno() > 2))"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {redirected}', sys.executable, program], cwd=tmp_path, env=environment,
                          stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert (done.returncode, done.stderr, (tmp_path / "file").read_text()) == (0, "", "True")
    assert printed is None or (tmp_path / "out").read_text(encoding="utf-8") == printed
