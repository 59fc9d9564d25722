"""The lessons that make tiny/: what they show, that they go on where they were, and what their examination notices."""

import random
from collections import Counter

import pytest
import torch

import data
import rarl
import reward
from experiments import lessons
from experiments.commands import CommandError
from experiments.lessons import Guide, Lesson, Seen, answers_of, bad_answer, exact_answer, examine, read_lists, rotated


@pytest.fixture(scope="module")
def seen(policy):
    return Seen(policy, 64)


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
        text = bad_answer(sample, rng)
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
    for argv in (["--seed", "3"], ["--seed", "3"]):  # interrupted, and once more when it went on
        with pytest.raises(KeyboardInterrupt):
            make_tiny.make(["--out", out, *argv])
    for argv in (["--seed", "4"], ["--seed", "3", "--eyes-steps", "9"], ["--seed", "3", "--drawings", "99"]):
        with pytest.raises(CommandError, match=r"new.lessons holds lessons of other settings"):
            make_tiny.make(["--out", out, *argv])
