"""The lessons that make tiny/: what they show, that they go on where they were, and what their examination notices."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_data import make_images, noise_image

import data
import rarl
import reward
from experiments import lessons
from experiments.ceiling import EYES, ceiling
from experiments.commands import CommandError
from experiments.lessons import Guide, Lesson, Seen, answers_of, bad_answer, exact_answer, examine, read_lists, rotated
from experiments.make_tiny import build_processor
from experiments.subjects import MOST_VALUES, SHIFT, drawn_subjects, file_subjects, moved
from support.datasets import load_dataset, splits


@pytest.fixture(scope="module")
def seen(policy):
    return Seen(policy, drawn_subjects(), 64)


def test_features_that_were_kept_serve_as_well_as_the_pixels(policy, seen):
    samples, prompts = seen.draw(2, 3, random.Random(0))
    ids, mask = answers_of(policy, [data.reference_answer(sample) for sample in samples])
    kept, _ = rarl.logprobs(policy, prompts, ids, mask)
    fresh, _ = rarl.logprobs(policy, data.make_prompts(policy, samples), ids, mask)
    torch.testing.assert_close(kept, fresh, atol=1e-5, rtol=1e-5)


def test_the_guide_changes_no_number(policy, seen):
    """Prompts of different lengths (two tasks), so there is padding; the weights of a row are a distribution without it."""
    samples, prompts = [], []
    for seed in range(4):
        more = seen.draw(2, 1, random.Random(seed))
        samples, prompts = samples + more[0], prompts + more[1]
    assert len({len(prompt.ids) for prompt in prompts}) > 1
    ids, mask = answers_of(policy, [data.reference_answer(sample) for sample in samples])
    expected, _ = rarl.logprobs(policy, prompts, ids, mask)
    guide = Guide()
    with guide.watching(policy):
        got, _ = rarl.logprobs(policy, prompts, ids, mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guide.weights.sum(-1), torch.ones(guide.weights.shape[:-1]))
    for b, prompt in enumerate(prompts):  # the first token of an answer sees its prompt and itself
        assert (guide.weights[b, :, 0] > 0).sum(-1).tolist() == [len(prompt.ids) + 1] * guide.weights.shape[1]
        assert torch.equal(guide.hidden[guide.keys[b, len(prompt.ids)]], guide.hidden[guide.queries[b, 0]])
    assert rarl.logprobs(policy, prompts, ids, mask)[0].equal(expected)  # and is gone afterwards


def test_digits_of_a_list_know_what_they_are(policy, seen):
    samples, _ = seen.draw(4, 2, random.Random(1))
    orders = [[2, 3, 4, 1], [4, 1, 2, 3]]
    ids, _ = answers_of(policy, [exact_answer(*pair) for pair in zip(samples, orders, strict=True)])
    digits = torch.tensor(policy.tokenizer.convert_tokens_to_ids(list("0123456789")))
    row, place, is_id, image, listed = read_lists(ids, digits, samples, orders)
    for r, order in enumerate(orders):
        text = [policy.tokenizer.decode(ids[r, t]).strip() for t in place[(row == r) & is_id]]
        assert text == [str(i) for i in order]
        for i in order:
            value = "".join(policy.tokenizer.decode(ids[r, t]) for t in place[(row == r) & ~is_id & (image == i)])
            assert value == str(int(samples[r].labels[i - 1]))
        before = listed[(row == r) & is_id]  # (4, 9)
        assert [set(x.nonzero().flatten().tolist()) for x in before] == [set(order[:k]) for k in range(4)]


def test_rotated_lists_begin_anywhere(seen):
    samples, _ = seen.draw(4, 1, random.Random(2))
    orders = {tuple(rotated(samples[0], random.Random(i))) for i in range(50)}
    assert orders == {(1, 2, 3, 4), (2, 3, 4, 1), (3, 4, 1, 2), (4, 1, 2, 3)}


def test_the_bad_teacher_is_bad_in_values_and_order_but_not_in_format(seen):
    rng = random.Random(3)
    (sample,), _ = seen.draw(4, 1, rng)
    while lessons.in_order(sample) in ([1, 2, 3, 4], [4, 3, 2, 1]):
        (sample,), _ = seen.draw(4, 1, rng)  # else its sorted list is one of the others
    kinds = Counter()
    errors = []
    for _ in range(2000):
        text = bad_answer(sample, seen.subjects[sample.task], rng)
        assert reward.is_strict_format(text, 4)
        answer = reward.parse_response(text, 4)
        order = [image for image, _ in answer]
        kinds[{(1, 2, 3, 4): "prompt", (4, 3, 2, 1): "backwards"}.get(tuple(order), "sorted")] += 1
        assert order in (lessons.in_order(sample), [1, 2, 3, 4], [4, 3, 2, 1])
        errors += [abs(value - sample.labels[image - 1]) for image, value in answer]
    shares = {kind: count / 2000 for kind, count in kinds.items()}
    assert shares == pytest.approx({"sorted": 0.20, "prompt": 0.54, "backwards": 0.26}, abs=0.04)
    assert 1.5 < sum(errors) / len(errors) < 3.5 and max(errors) <= 7  # 3 by rounding, 4 by noise


def test_a_lesson_goes_on_where_it_was(tmp_path, monkeypatch):
    def learn(file, stop=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)
        lesson = Lesson("test", torch.nn.ModuleList([layer]), 400, 1e-2, file)
        for step in lesson:
            if step == stop:
                return layer
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            lesson.learn((layer(x) - x.sum(1, keepdim=True)).square().mean())
        return layer

    whole = learn(tmp_path / "whole.pt")
    learn(tmp_path / "cut.pt", stop=250)  # kept after 200
    resumed = learn(tmp_path / "cut.pt")
    assert all(a.equal(b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    content = (tmp_path / "cut.pt").read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        (tmp_path / "cut.pt").write_bytes(damaged)
        with pytest.raises(CommandError, match="cut.pt is damaged .*: delete it"):
            learn(tmp_path / "cut.pt")


def test_the_examination_notices_a_policy_that_knows_nothing(policy, seen):
    table, wrong = examine(policy, seen, prompts=2, answers=2)
    assert len(table.splitlines()) == 9
    assert any("97 %" in what for what in wrong)


def test_lessons_of_other_settings_are_not_gone_on_with(tmp_path, monkeypatch):
    from experiments import make_tiny

    def stop(*lesson):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_tiny, "teach_eyes", stop)
    out = str(tmp_path / "new")
    for argv in (["--eyes-steps", "3"], ["--eyes-steps", "3"]):  # interrupted, and once more when it went on
        with pytest.raises(KeyboardInterrupt):
            make_tiny.make(["--out", out, *argv])
    for argv in (["--eyes-steps", "4"], ["--eyes-steps", "3", "--pictures", "99"]):
        with pytest.raises(CommandError, match=r"new.lessons holds lessons of other settings"):
            make_tiny.make(["--out", out, *argv])


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Noise in UTKFace's naming: 80 images of the ages 1 to 116. -> folder, split -> names"""
    root = tmp_path_factory.mktemp("faces")
    make_images(root, [f"{1 + 115 * i // 79}_{i % 2}_{i % 5}_2017010{i:09}.jpg.chip.jpg" for i in range(80)])
    read, _ = splits.read_dataset("utkface", root)
    assert all(len(items) > 8 for items in read.values())
    return root, {split: {item.path.name for item in items} for split, items in read.items()}


def test_no_lesson_sees_a_test_image_and_only_the_early_stop_sees_val(faces, tmp_path, monkeypatch):
    from experiments import make_tiny

    root, names = faces
    opened, looked_at, judging = set(), {False: set(), True: set()}, []

    def open_and_note(path):
        opened.add(path.name)
        return real_open(path)

    def see_and_note(policy, items):
        looked_at[bool(judging)].update(item.path.name for item in items)
        return real_see(policy, items)

    def judge(eyes):
        judging.append(True)
        try:
            return real_error(eyes)
        finally:
            judging.pop()

    real_open, real_see, real_error = splits.open_image, lessons.see, lessons.Eyes.error
    monkeypatch.setattr(splits, "open_image", open_and_note)
    monkeypatch.setattr(lessons, "see", see_and_note)
    monkeypatch.setattr(lessons.Eyes, "error", judge)
    monkeypatch.setattr(make_tiny, "examine", lambda policy, seen: examine(policy, seen, prompts=1, answers=1))
    steps = [f"--{name}-steps=1" for name in ("eyes", "rotated", "sorted", "habits")]
    small = ["--max-pixels", "3136", "--eyes-batch", "40"]
    out = tmp_path / "faces"
    make_tiny.make(["--data", "utkface", "--data-root", str(root), "--out", str(out), *small, *steps])
    assert looked_at == {False: names["train"], True: names["val"]}
    assert opened == names["train"] | names["val"]
    policy = rarl.load_policy(out)
    assert policy.image_processor.size == {"shortest_edge": 3136, "longest_edge": 3136}
    assert {name.split(".")[0] for name in load_file(out / "eyes.safetensors")} == {"age"}
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1, "who may read one file may read them all"


def test_values_of_a_data_set_follow_from_its_train_split(faces):
    root, names = faces
    (subject,) = file_subjects("utkface", root, build_processor(56 * 56))
    ages = [int(name.split("_")[0]) for name in names["train"]]
    assert subject.values.tolist() == list(range(min(ages), max(ages) + 1))  # bins of a year
    # bell: 3 years, so 3 years off is exp(-1/2) as right
    (bell,) = subject.bells(torch.tensor([50.0]))
    at = {int(v): float(p) for v, p in zip(subject.values, bell, strict=True)}
    assert max(at, key=at.get) == 50 and at[53] / at[50] == pytest.approx(math.exp(-0.5))
    # the median: 0.3 + 0.3 of the weight lies at or below 20
    logits = torch.full((1, len(subject.values)), -99.0)
    for value, weight in ((10, 0.3), (20, 0.3), (90, 0.4)):
        logits[0, value - int(subject.values[0])] = math.log(weight)
    assert subject.read(logits).tolist() == [20]
    bad = [float(subject.bad(60.0, random.Random(i))) for i in range(300)]
    assert max(bad) - min(bad) > 30 and all(value == int(value) for value in bad)


def test_photographs_of_the_eyes_lesson_are_moved_and_mirrored_and_all_come_once_in_an_epoch(faces):
    root, names = faces
    (subject,) = file_subjects("utkface", root, build_processor(84 * 84))
    first = subject.fresh(0, len(names["train"]))
    assert {item.path.name for item in first} == names["train"]
    assert [item.name for item in subject.fresh(0, 8)] == [item.name for item in subject.fresh(0, 8)]
    still = subject.kept(1)[0]
    whole = np.asarray(still.image())
    assert np.array_equal(whole, moved(still, 0, 0, False))
    assert np.array_equal(whole[:, ::-1], moved(still, 0, 0, True))
    assert np.array_equal(whole[SHIFT:, :-SHIFT], np.asarray(moved(still, -SHIFT, SHIFT, False))[:-SHIFT, SHIFT:])


def test_the_eyes_end_as_they_were_when_they_erred_least(tmp_path):
    layer, errors = torch.nn.Linear(1, 1), iter([3.0, 1.0, 2.0])
    kept = []

    def error():
        kept.append(layer.weight.item())
        return next(errors)

    lesson = Lesson("test", torch.nn.ModuleList([layer]), 600, 1e-2, tmp_path / "eyes.pt", error)
    for _ in lesson:
        lesson.learn(layer(torch.ones(1, 1)).square().mean() - layer.weight.sum())
    assert len(set(kept)) == 3 and layer.weight.item() == kept[1]
    fresh = torch.nn.Linear(1, 1)
    assert not list(Lesson("test", torch.nn.ModuleList([fresh]), 600, 1e-2, tmp_path / "eyes.pt", error))
    assert fresh.weight.item() == kept[1]  # resumed after its last step, too


def test_the_ceiling_is_what_the_eyes_say_of_the_test_prompts(faces, policy, tmp_path):
    root, names = faces
    subjects = file_subjects("utkface", root, policy.image_processor)
    eyes, folder = lessons.Eyes(policy, subjects), tmp_path / "model"
    torch.nn.init.normal_(eyes.head.weight, std=3.0)
    assert ceiling(str(tmp_path), "utkface", str(root), (1, 4), 5) == []  # no such head
    rarl.save_policy(policy, folder)
    eyes.save(folder / EYES)
    predictions = ceiling(str(folder), "utkface", str(root), (1, 4), 5)
    test = {item.name: item for item in load_dataset("utkface", root, "test")}
    samples = [sample for n in (1, 4) for sample in data.make_samples(list(test.values()), n, 5)]
    assert [p["items"] for p in predictions] == [[item.name for item in sample.items] for sample in samples]
    said = {name: float(eyes.read(subjects[0], [item])) for name, item in test.items()}
    assert len(set(said.values())) > 3
    for p in predictions:
        assert p["strict"] and p["values"] == [said[name] for name in p["items"]]
        assert [p["values"][i - 1] for i in p["order"]] == sorted(p["values"])


def test_images_of_other_shapes_keep_a_prompt_of_their_own(policy, tmp_path):
    """As many tokens, in another grid: 2 x 8 and 8 x 2 patches."""
    lines = ["path,label,split"]
    for k in range(24):
        name = f"{k}.png"
        noise_image(*((112, 28) if k % 2 else (28, 112)), seed=k).save(tmp_path / name)
        lines.append(f"{name},{1.25 * k},{'val' if k >= 16 else 'train'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (subject,) = file_subjects("csv", tmp_path, build_processor(56 * 56))
    assert subject.task.decimals == 2 and len(subject.values) <= MOST_VALUES < 1875
    mixed = Seen(policy, [subject], 16)
    samples, prompts = mixed.draw(2, 6, random.Random(0))
    assert len(mixed.prompts) > 1
    ids, mask = answers_of(policy, [exact_answer(sample, [1, 2]) for sample in samples])
    kept, _ = rarl.logprobs(policy, prompts, ids, mask)
    fresh, _ = rarl.logprobs(policy, data.make_prompts(policy, samples), ids, mask)
    torch.testing.assert_close(kept, fresh, atol=1e-5, rtol=1e-5)
    digits = torch.tensor(policy.tokenizer.convert_tokens_to_ids(list("0123456789")))
    row, _, is_id, *_ = read_lists(ids, digits, samples, [[1, 2]] * 6)  # 3.75 has three digits, 18.75 four
    for r, sample in enumerate(samples):
        assert int((~is_id[row == r]).sum()) == sum(len(f"{label:.2f}") - 1 for label in sample.labels)
