"""Metrics against scipy and by hand; loop, files and picture with a policy that is a dictionary."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import data
import eval as evaluation
import rarl

TASK = data.Task("dots", "How many?", "from the fewest to the most", delta=4)
COLOURS = [(25 * i, 0, 250 - 25 * i) for i in range(10)]  # one for each image of a sample


def sample(*labels, prefix="s"):
    """Image i of a sample is one solid colour and 40 x 20 pixels."""
    items = [
        data.Item(f"{prefix}{i}", label, TASK, lambda c=c: Image.new("RGB", (40, 20), c))
        for i, (label, c) in enumerate(zip(labels, COLOURS, strict=False), 1)
    ]
    return data.Sample(tuple(items))


def answer(*pairs):
    return json.dumps([{"image_id": i, "value": value} for i, value in pairs])


@pytest.fixture
def policy(monkeypatch):
    """A policy that says `said[name of image 1]`; `calls` records (names, max_new_tokens) of every batch."""
    fake = SimpleNamespace(said={}, calls=[])

    def generate(policy, prompts, group_size, max_new_tokens, temperature, generator):
        assert (group_size, temperature, generator) == (1, 0.0, None) and not torch.is_grad_enabled()
        fake.calls.append((prompts, max_new_tokens))
        return SimpleNamespace(ids=prompts, mask=None)

    monkeypatch.setattr(data, "make_prompts", lambda policy, samples: [s.items[0].name for s in samples])
    monkeypatch.setattr(data, "answer_budget", lambda policy, samples: 100 + len(samples))
    monkeypatch.setattr(rarl, "generate", generate)
    monkeypatch.setattr(rarl, "decode", lambda policy, ids, mask: [fake.said[name] for name in ids])
    return fake


# --- metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])  # nearly all tied, nearly none
@pytest.mark.parametrize("size", [2, 3, 50, 3000])  # 3000: several chunks of tau_b
def test_correlations_equal_scipys(levels, size):
    rng = np.random.default_rng(levels + size)
    labels = rng.integers(0, levels, size) / 4
    values = labels + rng.integers(0, levels, size)
    labels[:2], values[:2] = (0, 1), (1, 3)  # never constant
    for ours, theirs in (
        (evaluation.srcc, stats.spearmanr),
        (evaluation.plcc, stats.pearsonr),
        (evaluation.tau_b, stats.kendalltau),
    ):
        assert ours(values, labels) == pytest.approx(theirs(values, labels).statistic, abs=1e-12)
        assert ours(-values, labels) == pytest.approx(-ours(values, labels), abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_correlations_are_nan_where_they_are_undefined():
    for metric in (evaluation.srcc, evaluation.plcc, evaluation.tau_b):
        for values, labels in (([], []), ([1], [1]), ([0.1] * 3, [1, 2, 3]), ([1, 2, 3], [0.1] * 3)):
            assert math.isnan(metric(values, labels))
        assert math.isnan(metric([1, math.nan, 3], [1, 2, 3]))
        with pytest.raises(ValueError, match="equally long"):
            metric([1, 2, 3], [1])


@pytest.mark.filterwarnings("error")
def test_the_largest_numbers_that_a_policy_can_write_do_no_harm():
    values, labels = [1.7e308, -1.7e308, 1.7e308], [3, 1, 2]
    # Ranks of the values: 2.5, 1, 2.5; of the labels: 3, 1, 2.
    assert evaluation.srcc(values, labels) == pytest.approx(stats.spearmanr([2.5, 1, 2.5], labels).statistic)
    assert evaluation.tau_b(values, labels) == pytest.approx(2 / math.sqrt(2 * 3))  # 2 agree, 1 is tied
    assert evaluation.plcc(values, labels) == pytest.approx(stats.pearsonr([1, -1, 1], labels).statistic)
    assert evaluation.mae(values, labels) == math.inf
    assert evaluation.accuracy(values, labels, 2) == 0


def test_mae_and_accuracy_by_hand():
    assert evaluation.mae([1, 5, 2.5], [2, 3, 2.5]) == 1  # (1 + 2 + 0) / 3
    # Whole numbers: 2.4 -> 2 and 6.6 -> 7 hit, 3.6 -> 4 misses 3.
    assert evaluation.accuracy([2.4, 6.6, 3.6], [2, 7, 3]) == pytest.approx(2 / 3)
    # One decimal for the first pair, none for the second: 2.4 is not 2.0, and 6.6 is 7.
    assert evaluation.accuracy([2.4, 6.6], [2, 7], [1, 0]) == 0.5
    assert evaluation.accuracy([5.43], [5.4321], 2) == 1  # labels are rounded as well
    assert math.isnan(evaluation.mae([], [])) and math.isnan(evaluation.accuracy([], []))


# --- summary and loop ---------------------------------------------------------------------------------------


def test_summary_by_hand(policy):
    samples = [
        sample(7, 3, 5, prefix="a"),
        sample(4, 9, prefix="b"),
        sample(6, 6, prefix="c"),
        sample(2, 8, prefix="d"),
    ]
    policy.said = {
        # Listed 2, 1, 3 = labels 3, 7, 5. Of 3 pairs 2 rise: tau = (2 - 1) / 3. Values: 8, 3, 5.
        "a1": answer((2, 3), (1, 8), (3, 5)),
        # Listed 2, 1 = labels 9, 4: tau = -1, although the values, 4.4 and 9, rise rightly. Not strict.
        "b1": "The list is " + answer((2, 9), (1, 4.4)),
        # Equal labels: no pair to compare, so no tau. Values 6, 2.
        "c1": answer((2, 2), (1, 6)),
        # No value for image 2: invalid, and 100 must show up nowhere.
        "d1": answer((1, 100)),
    }
    metrics, predictions = evaluation.evaluate(policy, samples)
    values, labels = [8, 3, 5, 4.4, 9, 6, 2], [7, 3, 5, 4, 9, 6, 6]
    assert metrics == {
        "n": 4,
        "valid": 3 / 4,
        "strict": 2 / 4,
        "mae": pytest.approx((1 + 0 + 0 + 0.4 + 0 + 0 + 4) / 7),
        "accuracy": pytest.approx(5 / 7),  # all but 8 and 2: 4.4 rounds to 4
        "srcc": pytest.approx(stats.spearmanr(values, labels).statistic),
        "plcc": pytest.approx(stats.pearsonr(values, labels).statistic),
        "tau": pytest.approx((1 / 3 - 1) / 2),
        "tau_b": pytest.approx(stats.kendalltau(values, labels).statistic),
    }
    assert predictions[0] == {
        "items": ["a1", "a2", "a3"],
        "task": "dots",
        "decimals": 0,
        "labels": [7, 3, 5],
        "text": policy.said["a1"],
        "order": [2, 1, 3],
        "values": [8, 3, 5],
    }
    assert predictions[3]["order"] is predictions[3]["values"] is None
    assert evaluation.summarize(predictions) == metrics


def test_summary_without_any_valid_answer_is_nan_but_for_the_shares(policy):
    policy.said = {"s1": "no idea"}
    metrics, _ = evaluation.evaluate(policy, [sample(1, 2)])
    assert (metrics.pop("n"), metrics.pop("valid"), metrics.pop("strict")) == (1, 0, 0)
    assert all(math.isnan(x) for x in metrics.values())
    metrics, predictions = evaluation.evaluate(policy, [])
    assert predictions == [] and metrics["n"] == 0 and math.isnan(metrics["valid"])


def test_batches_are_sorted_by_number_of_images_and_the_order_is_restored(policy):
    sizes = [4, 1, 2, 1, 2]
    samples = [sample(*range(n), prefix=f"{place}-") for place, n in enumerate(sizes)]
    policy.said = {s.items[0].name: answer(*((i, 10 * place + i) for i in range(1, n + 1)))
                   for place, (s, n) in enumerate(zip(samples, sizes, strict=True))}  # fmt: skip
    metrics, predictions = evaluation.evaluate(policy, samples, batch_size=2)
    assert [p["items"][0] for p in predictions] == ["0-1", "1-1", "2-1", "3-1", "4-1"]
    assert [p["values"][0] for p in predictions] == [1, 11, 21, 31, 41]
    # One budget, of all five samples, for all batches.
    assert policy.calls == [(["1-1", "3-1"], 105), (["2-1", "4-1"], 105), (["0-1"], 105)]
    assert evaluation.evaluate(policy, samples, batch_size=5, max_new_tokens=7) == (metrics, predictions)
    assert policy.calls[3:] == [(["1-1", "3-1", "2-1", "4-1", "0-1"], 7)]


# --- files --------------------------------------------------------------------------------------------------


def test_json_lines_round_trip(policy, tmp_path):
    policy.said = {"a1": 'twee\n"regels" \u2028 数 ' + answer((1, 5)), "b1": "nothing"}
    _, predictions = evaluation.evaluate(policy, [sample(5, prefix="a"), sample(6, 7, prefix="b")])
    predictions[1]["labels"] = [math.nan, 7.0]
    evaluation.write_predictions(predictions, tmp_path / "p.jsonl")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    back = [json.loads(line, parse_constant=refuse) for line in lines]
    assert back == [predictions[0], predictions[1] | {"labels": [None, 7.0]}]
    assert math.isnan(predictions[1]["labels"][0])  # what is written is a copy


def test_table_is_aligned_and_shows_what_is_undefined():
    metrics = evaluation.summarize([]) | {"n": 12, "mae": 3.81, "tau": -0.5, "valid": 1e300}
    head, one, eight = evaluation.format_table([{"1 image": metrics}, {"8 images": metrics}]).splitlines()
    assert head.split() == list(evaluation.TABLE)
    assert one.split() == ["1", "image", "12", "1.0e+300", "-", "3.810", "-", "-", "-", "-0.500", "-"]
    assert len(head) == len(one) == len(eight)
    for name, cell in (("n", "12"), ("mae", "3.810"), ("tau", "-0.500")):
        end = head.index(f" {name}  ") + 1 + len(name)
        assert one[:end].endswith(cell) and eight[:end].endswith(cell)


def reading_order(picture, colours):
    """The colours in the order in which their thumbnails stand: line by line, left to right."""
    pixels = np.asarray(picture)
    corners = []
    for c in colours:
        y, x = (pixels == c).all(-1).nonzero()
        assert len(y) == 128 * 64, "40 x 20 pixels, scaled to 128 wide with the aspect kept"
        corners.append((y.min(), x.min(), c))
    return [c for *_, c in sorted(corners)]


@pytest.mark.parametrize("order", [[3, 1, 2], [1], [2, 9, 4, 8, 1, 3, 6, 5, 7, 10]])
def test_picture_shows_the_predicted_order(policy, tmp_path, order):
    shown = sample(*range(len(order)))
    policy.said = {"s1": answer(*((i, i) for i in order))}
    _, predictions = evaluation.evaluate(policy, [shown])
    evaluation.draw_predictions([shown], predictions, tmp_path / "p.png")
    picture = Image.open(tmp_path / "p.png")
    expected = [COLOURS[i - 1] for i in order]
    assert reading_order(picture, COLOURS[: len(order)]) == expected


def test_picture_shows_an_invalid_answers_images_as_given(policy, tmp_path):
    shown = sample(7, 3, 5)
    policy.said = {"s1": "数\n\x00" + "[" * 100_000}
    _, predictions = evaluation.evaluate(policy, [shown])
    evaluation.draw_predictions([shown], predictions, tmp_path / "p.png")
    picture = Image.open(tmp_path / "p.png")
    assert reading_order(picture, COLOURS[:3]) == COLOURS[:3]


def test_picture_colours_a_caption_by_its_error(policy, tmp_path):
    # delta = 4. Errors 0 and 1 = delta / 4 are good, 1.5 and 3.9 fair, from 4 on poor.
    expected = {9: "GOOD", 10: "GOOD", 10.5: "FAIR", 12.9: "FAIR", 13: "POOR", 1e308: "POOR"}
    for said, colour in expected.items():
        policy.said = {"s1": answer((1, said))}
        _, predictions = evaluation.evaluate(policy, [sample(9)])
        evaluation.draw_predictions([sample(9)], predictions, tmp_path / "p.png")
        pixels = np.asarray(Image.open(tmp_path / "p.png"))[100:]  # below title and legend
        for name in ("GOOD", "FAIR", "POOR"):
            rgb = tuple(bytes.fromhex(getattr(evaluation, name)[1:]))
            assert (pixels == rgb).all(-1).any() == (name == colour), (said, name)


def test_picture_takes_rows_from_the_whole_list(policy, tmp_path):
    samples = [sample(n, prefix=f"{n}-") for n in range(9)]
    policy.said = {f"{n}-1": answer((1, n)) for n in range(9)}
    _, predictions = evaluation.evaluate(policy, samples)
    drawn = []
    for n, s in enumerate(samples):
        image = s.items[0].image
        item = data.Item(f"{n}-1", n, TASK, lambda n=n, image=image: drawn.append(n) or image())
        samples[n] = data.Sample((item,))
    evaluation.draw_predictions(samples, predictions, tmp_path / "p.png", rows=3)
    assert drawn == [0, 4, 8]
    evaluation.draw_predictions(samples[:2], predictions[:2], tmp_path / "p.png", rows=8)
    assert drawn == [0, 4, 8, 0, 1]
    evaluation.draw_predictions([], [], tmp_path / "p.png")
    with pytest.raises(ValueError, match="2 samples but 1 predictions"):
        evaluation.draw_predictions(samples[:2], predictions[:1], tmp_path / "p.png")


# --- command line -------------------------------------------------------------------------------------------


def test_command_writes_table_answers_and_picture(policy, tmp_path, monkeypatch, capsys):
    class Knows(dict):  # answers for image 1 alone: right at one image, invalid at two
        def __missing__(self, name):
            return answer((1, items[name]))

    items = {item.name: item.label for item in data.load_dataset("dots", None, "test")}
    policy.said = Knows()
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: policy)
    arguments = f"--model some/hub-id --data dots --images 1 2 --samples 3 --device cpu --out {tmp_path}/new/out"
    evaluation.main(arguments.split())
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:6] == ["1", "image", "3", "1.000", "1.000", "0.000"]
    assert table[2].split()[:5] == ["2", "images", "3", "0.000", "0.000"]
    written = [json.loads(line) for line in (tmp_path / "new/out/predictions.jsonl").read_text().splitlines()]
    assert [len(p["items"]) for p in written] == [1, 1, 1, 2, 2, 2]
    Image.open(tmp_path / "new/out/predictions.png").verify()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {tmp}/missing --data dots", "missing does not exist"),
        ("--model runs/mistyped --data dots", "mistyped does not exist"),
        ("--model {tmp} --data dotz", "dotz"),
        ("--model {tmp} --data dots --images 2 4096", "4096 images"),
        ("--model {tmp} --data coco", "--data-root"),
        ("--model {tmp} --data dots --out {tmp}/file", "file"),
    ],
)
def test_a_users_mistake_is_one_sentence(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    arguments = arguments.format(tmp=tmp_path).split()
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*arguments, *([] if "--out" in arguments else ["--out", str(tmp_path / "out")])])
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert str(stop.value).startswith("eval.py: ")


@pytest.mark.parametrize("wrong", ["--images 0", "--samples -1", "--batch-size x", "--device tpu9", "--split dev"])
def test_a_mistyped_setting_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--model", "m", "--data", "dots", *wrong.split()])
    assert f"argument {wrong.split()[0]}: " in capsys.readouterr().err
