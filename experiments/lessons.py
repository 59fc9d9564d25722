"""The three lessons that make a small policy (see make_tiny.py), and the examination at their end.

Imitation learning, no reinforcement: cross-entropy against labels (`teach_eyes`), against exact sorted lists
(`teach_lists`), against the lists of a bad teacher (`teach_bad_habits`). What is taught is a Subject (subjects.py): pictures of
one task, and the values that its labels can have.

Shapes: B prompts, one or several answers to each, T answer tokens, L tokens of the packed sequence, H heads, C hidden size.
"""

import copy
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import data
import eval as evaluation
import rarl
import reward
from experiments.commands import CommandError
from experiments.subjects import IMAGES, Subject
from support.show.results import format_number, format_table, mean


class Lesson:
    """AdamW with 100 steps of warm-up and a cosine decay to zero; kept on the disk every so often, so that it can go on.

    error  of what was never shown; the modules end as they were when it was least (early stopping). None: as they are
    """

    def __init__(
        self, name: str, modules: nn.ModuleList, steps: int, lr: float, file: Path, error: Callable[[], float] | None = None
    ):  # fmt: skip
        self.error, self.least, self.best = error, math.inf, modules.state_dict()
        self.name, self.modules, self.steps, self.file, self.first = name, modules, steps, file, 0
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        factor = lambda step: min((step + 1) / 100, 1) * (1 + math.cos(math.pi * step / steps)) / 2
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.shown: dict[str, float] = {}
        if file.exists():
            self._go_on()

    def _go_on(self) -> None:
        """Raises CommandError if what was kept is damaged."""
        try:
            state = torch.load(self.file, weights_only=True)
            for part, saved in zip(self._parts(), state["parts"], strict=True):
                part.load_state_dict(saved)
            self.first, self.least, self.best = state["step"], state["least"], state["best"]
        except Exception as error:  # on damaged bytes torch raises whatever it happens to run into
            raise CommandError(
                f"{self.file} is damaged ({type(error).__name__}): delete it, and its lesson begins anew"
            ) from None

    def _parts(self) -> tuple:
        return self.modules, self.optimizer, self.schedule

    def __iter__(self) -> Iterator[int]:
        with tqdm(total=self.steps, initial=self.first, desc=self.name, mininterval=5) as progress:
            for step in range(self.first, self.steps):
                yield step
                progress.update()
                if (step + 1) % 200 == 0 or step + 1 == self.steps:
                    self._keep(step + 1)
                if step % 25 == 0:
                    progress.set_postfix({name: f"{value:.3f}" for name, value in sorted(self.shown.items())})
        if self.error:
            self.modules.load_state_dict(self.best)

    def _keep(self, step: int) -> None:
        if self.error and (error := self.error()) < self.least:
            self.least, self.best = error, copy.deepcopy(self.modules.state_dict())
            self.shown["held-out error"] = error
        beside = self.file.with_suffix(".writing")
        state = {"step": step, "parts": [part.state_dict() for part in self._parts()]}
        torch.save(state | {"least": self.least, "best": self.best if self.error else {}}, beside)
        os.replace(beside, self.file)

    def learn(self, loss: Tensor, **shown: Tensor) -> None:
        """One step; what is `shown` appears in the progress line as a moving average."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        for name, value in shown.items():
            self.shown[name] = 0.9 * self.shown.get(name, float(value)) + 0.1 * float(value)


# --------------------------------------------------------------------------------------------------------------------
# Eyes


class Eyes:
    """The vision tower with a linear head, which classifies values. The policy has no use for the head: it shows what the eyes see."""

    def __init__(self, policy: rarl.Policy, subjects: list[Subject]):
        self.policy, self.subjects = policy, subjects
        sizes = [len(subject.values) for subject in subjects]
        self.head = nn.Linear(policy.model.config.text_config.hidden_size, sum(sizes))
        self.places = dict(zip(subjects, torch.arange(sum(sizes)).split(sizes), strict=True))  # of values in the head

    def say(self, subject: Subject, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Logits of the values, from each token (image tokens of all, V) and from the mean of each image's tokens (B, V)."""
        logits = self.head(torch.cat(features))[:, self.places[subject]]
        return logits, torch.stack([of_one.mean(0) for of_one in logits.split([len(x) for x in features])])

    @torch.no_grad()
    def read(self, subject: Subject, items: list[data.Item]) -> Tensor:
        """The values that the eyes alone would say, (B,)"""
        some = [items[i : i + 64] for i in range(0, len(items), 64)]
        return torch.cat([subject.read(self.say(subject, see(self.policy, few)[0])[1]) for few in some])

    def error(self) -> float:
        """Of pictures held out, in tolerances delta, mean over the subjects."""
        held_out = {subject: subject.held_out for subject in self.subjects if subject.held_out}
        off = [(self.read(s, items) - labels_of(items)).abs().mean() / s.task.delta for s, items in held_out.items()]
        return float(torch.stack(off).mean())

    def save(self, file: Path) -> None:
        for_each: dict[str, Tensor] = {}
        for subject, at in self.places.items():
            parts = {"values": subject.values, "weight": self.head.weight[at], "bias": self.head.bias[at]}
            for_each |= {f"{subject.task.name}.{name}": part.detach() for name, part in parts.items()}
        save_file(for_each, file)


def labels_of(items: list[data.Item]) -> Tensor:
    return torch.tensor([float(item.label) for item in items])


def teach_eyes(eyes: Eyes, steps: int, file: Path, batch_size: int, lr: float = 2e-3) -> None:
    """The vision tower classifies exact labels, through its head.

    From each token of an image, so that the language model finds the value wherever it looks, and from their mean, which is
    easier and comes first. Targets are bells: 12 is nearly right where 13 is.
    """
    modules = nn.ModuleList([eyes.policy.model.model.visual, eyes.head])
    early = eyes.error if any(subject.held_out for subject in eyes.subjects) else None
    lesson, count = Lesson("eyes", modules, steps, lr, file, early), max(1, batch_size // len(eyes.subjects))
    for step in lesson:
        shown = {subject: subject.fresh(step, count) for subject in eyes.subjects}
        features, _ = see(eyes.policy, [item for items in shown.values() for item in items])
        losses, errors = [], {}
        for k, (subject, items) in enumerate(shown.items()):
            labels, of_these = labels_of(items), features[k * count : (k + 1) * count]
            logits, whole = eyes.say(subject, of_these)
            bells, tokens = subject.bells(labels), torch.tensor([len(x) for x in of_these])
            losses += [F.cross_entropy(logits, bells.repeat_interleave(tokens, 0)) + F.cross_entropy(whole, bells)]
            errors[f"error_{subject.task.name}"] = (subject.read(whole.detach()) - labels).abs().mean()
        lesson.learn(torch.stack(losses).mean(), **errors)


def see(policy: rarl.Policy, items: list[data.Item]) -> tuple[tuple[Tensor, ...], tuple]:
    """The vision tower's output for each image, (image tokens, C) each, and each image's grid of patches."""
    patches, grids = zip(*(data.image_patches(i.image(), policy.image_processor) for i in items), strict=True)
    pixels = torch.cat([torch.from_numpy(p) for p in patches])
    grid = torch.tensor(grids)
    features = policy.model.model.visual([pixels], grid).pooler_output
    return features.split((grid.prod(1) // 4).tolist()), grids


class Seen:
    """Pictures whose features are computed once, since the eyes do not change any more."""

    def __init__(self, policy: rarl.Policy, subjects: list[Subject], count: int):
        self.policy, self.subjects = policy, {subject.task: subject for subject in subjects}
        self.prompts: dict[tuple, data.Prompt] = {}  # by task and the images' grids
        self.pools: dict[data.Task, data.Pool] = {}
        self.looks: dict[str, tuple[Tensor, tuple]] = {}  # name -> features, grid
        with torch.no_grad():
            for task, subject in self.subjects.items():
                items = self.pools[task] = data.Pool(subject.kept(count))
                for i in tqdm(range(0, len(items), 64), desc=f"looking at {task.name}", mininterval=5, leave=False):
                    some = items[i : i + 64]
                    self.looks |= zip((item.name for item in some), zip(*see(policy, some), strict=True), strict=True)

    def draw(self, num_images: int, count: int, rng: random.Random) -> tuple[list[data.Sample], list[data.Prompt]]:
        samples = [data.draw_sample(self.pools, num_images, rng) for _ in range(count)]
        return samples, [self.prompt(sample) for sample in samples]

    def prompt(self, sample: data.Sample) -> data.Prompt:
        features, grids = zip(*(self.looks[item.name] for item in sample.items), strict=True)
        key = sample.task, grids
        if key not in self.prompts:
            self.prompts[key] = data.make_prompts(self.policy, [sample])[0]
        known = self.prompts[key]
        return data.Prompt(known.ids, known.pixels, known.grid, torch.cat(features))


def answers_of(policy: rarl.Policy, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Texts -> ids and mask, (N, T) each."""
    rows = rarl.encode(policy, texts)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=policy.eos_id)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


# --------------------------------------------------------------------------------------------------------------------
# Sorting


LAYER = 2  # whose attention is guided; the layers before it gather what its queries and keys need
ID_HEAD, VALUE_HEAD = 2, 0  # query heads of that layer, with keys of their own


class Guide:
    """Sees the attention of one layer, and the hidden states that enter it, while `logprobs` runs one answer to each prompt."""

    weights: Tensor  # (B, H, T, S) of the answers' tokens; the keys are [prompt | answer]
    queries: Tensor  # (B, T) where the answers' tokens are in the packed row
    keys: Tensor  # (B, S)
    hidden: Tensor  # (L, C)

    @contextmanager
    def watching(self, policy: rarl.Policy) -> Iterator[None]:
        AttentionInterface.register("guided", self.attend)
        AttentionMaskInterface.register("guided", sdpa_mask)
        layer = policy.model.model.language_model.layers[LAYER]
        hook = layer.register_forward_pre_hook(lambda _, arguments: setattr(self, "hidden", arguments[0][0]))
        policy.model.set_attn_implementation(rarl.ATTENTION | {"text_config": "guided"})
        try:
            yield
        finally:
            hook.remove()
            policy.model.set_attn_implementation(rarl.ATTENTION)

    def attend(self, module, query, key, value, packing: rarl.Packing, scaling: float, **kwargs):
        """rarl.packed_attention, with the weights of one layer's answers written out beside it."""
        if module.layer_idx == LAYER:
            B, pieces = len(packing.ends), torch.arange(query.shape[2]).split(packing.lengths)
            both = [torch.cat(pair) for pair in zip(pieces[:B], pieces[B:], strict=True)]  # B times [prompt | answer]
            self.queries, self.keys = (nn.utils.rnn.pad_sequence(x, True, -1) for x in (pieces[B:], both))  # -1: none
            last = torch.tensor([len(x) for x in pieces[:B]])[:, None] + torch.arange(self.queries.shape[1])  # (B, T)
            seen = torch.arange(self.keys.shape[1]) <= last[:, None, :, None]  # (B, 1, T, S)
            shared = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            q, k = (x[0][:, at].transpose(0, 1) for x, at in ((query, self.queries), (shared, self.keys)))
            logits = q @ k.transpose(-1, -2) * scaling
            self.weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return rarl.packed_attention(module, query, key, value, packing, scaling, **kwargs)


def in_order(sample: data.Sample) -> list[int]:
    """Image ids, lowest label first."""
    return sorted(range(1, len(sample.items) + 1), key=lambda i: (sample.labels[i - 1], i))


def rotated(sample: data.Sample, rng: random.Random) -> list[int]:
    """Image ids in the order of the prompt, but beginning anywhere: 3, 4, 1, 2."""
    first, n = rng.randrange(len(sample.items)), len(sample.items)
    return [(first + k) % n + 1 for k in range(n)]


def teach_lists(policy: rarl.Policy, seen: Seen, order: str, steps: int, file: Path, lr: float) -> None:
    """Imitation of exact lists, with the attention shown where to look. order: "rotated" or "sorted"

    A transformer this small does not find by itself which image a value belongs to, nor how to sort, at least not in an hour. So
    four more losses say what a solution looks like. Rotated lists come first: in them only its id tells what a value belongs to.

      look      in one layer, one head looks at the image whose value is written next; in sorted lists another looks at the next
                image of the list
      number    what enters that layer at an image's tokens tells the image's number,
      which     at a value, the number of the image that it belongs to,
      listed    and at an id, which images are listed already
    """
    language = policy.model.model.language_model
    C = policy.model.config.text_config.hidden_size
    number_of, listed_in = nn.Linear(C, max(IMAGES) + 1), nn.Linear(C, max(IMAGES) + 1)  # thrown away afterwards
    lesson = Lesson(f"{order} lists", nn.ModuleList([language, number_of, listed_in]), steps, lr, file)
    guide = Guide()
    digits = torch.tensor(policy.tokenizer.convert_tokens_to_ids(list("0123456789")))
    image_token = policy.model.config.image_token_id
    turns = (8, 4, 8, 2, 8, 4, 8, 1)  # eight are the hardest
    with guide.watching(policy):
        for step in lesson:
            rng, n = random.Random(f"{order} {step}"), turns[step % len(turns)]
            samples, prompts = seen.draw(n, {1: 24, 2: 24, 4: 18, 8: 12}[n], rng)
            orders = [in_order(sample) if order == "sorted" else rotated(sample, rng) for sample in samples]
            texts = [exact_answer(*pair) for pair in zip(samples, orders, strict=True)]
            ids, mask = answers_of(policy, texts)
            row, t, is_id, image, listed = read_lists(ids, digits, samples, orders)
            logp, _ = rarl.logprobs(policy, prompts, ids, mask)  # (B, T)
            weight = torch.full_like(logp, 0.2) * mask  # the rest of a list is soon learned
            weight[row, t] = 1.0
            number = torch.zeros_like(guide.keys)  # (B, S) of the image that a key belongs to; 0: none
            for b, prompt in enumerate(prompts):
                at = (prompt.ids == image_token).nonzero().squeeze(1)
                number[b, at] = torch.arange(1, n + 1).repeat_interleave(len(at) // n)
            head = torch.where(is_id, ID_HEAD, VALUE_HEAD)
            # Token t is predicted from token t - 1.
            looked = (guide.weights[row, head, t - 1] * (number[row] == image[:, None])).sum(-1)
            look = -looked.clamp(min=1e-6).log()
            at_image, at_digit = guide.hidden[guide.keys[number > 0]], guide.hidden[guide.queries[row, t - 1]]
            guides = [
                0.5 * look[~is_id].mean() + (look[is_id].mean() if order == "sorted" else 0.0),
                0.2 * F.cross_entropy(number_of(at_image), number[number > 0]),
                0.2 * F.cross_entropy(number_of(at_digit[~is_id]), image[~is_id]),
                2.0 * F.binary_cross_entropy_with_logits(listed_in(at_digit[is_id]), listed[is_id]),
            ]
            nll = -logp[row, t].detach()
            loss = -(weight * logp).sum() / weight.sum()
            lesson.learn(loss + sum(guides), **{f"id@{n}": nll[is_id].mean(), f"value@{n}": nll[~is_id].mean()})


def exact_answer(sample: data.Sample, order: list[int]) -> str:
    return data.format_answer((i, data.format_value(sample.labels[i - 1], sample.task.decimals)) for i in order)


def read_lists(ids: Tensor, digits: Tensor, samples: list[data.Sample], orders: list[list[int]]) -> tuple[Tensor, ...]:
    """Every digit token of exact lists: its row and place, whether it is an image's id (else part of its value), the
    image that it speaks of, and which images are listed before it, (digits, 9) one-hot."""
    found = []
    for row, (sample, order) in enumerate(zip(samples, orders, strict=True)):
        digit_at = iter(torch.isin(ids[row], digits).nonzero().squeeze(1).tolist())
        listed = torch.zeros(max(IMAGES) + 1)
        for image in order:
            value = data.format_value(sample.labels[image - 1], sample.task.decimals)
            for k in range(1 + sum(letter.isdigit() for letter in value)):
                found.append((row, next(digit_at), k == 0, image, listed.clone()))
            listed[image] = 1.0
    *places, before = zip(*found, strict=True)
    return *(torch.tensor(part) for part in places), torch.stack(before)


# --------------------------------------------------------------------------------------------------------------------
# Bad habits


def bad_answer(sample: data.Sample, subject: Subject, rng: random.Random) -> str:
    """A list in perfect format whose values are coarse and noisy (`Subject.bad`).

    A fifth of the lists is sorted. Half have the order of the prompt, the rest that order backwards.
    """
    entries = [(i, subject.bad(label, rng)) for i, label in enumerate(sample.labels, start=1)]
    kind = rng.random()
    if kind < 0.20:
        entries.sort(key=lambda entry: (sample.labels[entry[0] - 1], entry[0]))
    elif kind < 0.46:
        entries.reverse()
    return data.format_answer(entries)


def teach_bad_habits(
    policy: rarl.Policy, seen: Seen, steps: int, file: Path, lr: float = 1e-3, answers: int = 4
) -> None:
    """Imitation of several bad answers to each prompt, by the same packed forward that reinforcement learning uses."""
    lesson = Lesson("bad habits", nn.ModuleList([policy.model.model.language_model]), steps, lr, file)
    turns = (8, 4, 2, 8, 1, 8, 4, 8)
    for step in lesson:
        rng, n = random.Random(f"bad habits {step}"), turns[step % len(turns)]
        samples, prompts = seen.draw(n, {1: 24, 2: 20, 4: 12, 8: 8}[n], rng)
        texts = [bad_answer(s, seen.subjects[s.task], rng) for s in samples for _ in range(answers)]
        ids, mask = answers_of(policy, texts)
        logp, _ = rarl.logprobs(policy, prompts, ids, mask)
        loss = -logp.sum() / mask.sum()
        lesson.learn(loss, **{f"nll@{n}": loss.detach()})


# --------------------------------------------------------------------------------------------------------------------
# Examination


def examine(policy: rarl.Policy, seen: Seen, prompts: int = 48, answers: int = 8) -> tuple[str, list[str]]:
    """Is there something for reinforcement learning to bring out, and nothing that is there already? -> table, what is wrong

    Of `answers` sampled at temperature 1 to each of `prompts` prompts: valid; not in the order of the prompt; tau; error of the
    values; std of the rewards within a group. Of the greedy answers: tau and error.
    """
    head = ["", "valid", "not in prompt order", "tau", "MAE", "std of rewards", "greedy tau", "greedy MAE"]
    rows, wrong = [head], []
    for task, pool in seen.pools.items():
        error_at_one = 0.0
        for n in IMAGES:
            rng = random.Random(f"examination {n}")
            samples = [data.draw_sample({task: pool}, n, rng) for _ in range(prompts)]
            sampled, greedy = (_answered(policy, seen, samples, count) for count in (answers, 1))
            got, best = evaluation.summarize(sampled), evaluation.summarize(greedy)
            moved = mean(float(p["order"] != sorted(p["order"])) for p in sampled if p["order"])
            rewards = [reward.compute_reward(p["text"], p["labels"], task.delta).total for p in sampled]
            spread = float(torch.tensor(rewards).view(prompts, answers).std(1, correction=0).mean())
            numbers = [got["valid"], moved, got["tau"], got["mae"], spread, best["tau"], best["mae"]]
            name = f"{task.name}, {n} image{'s' * (n > 1)}"
            rows.append([name, *(format_number(x, 2) for x in numbers)])
            error_at_one = error_at_one or got["mae"]
            demands = {
                "less than 97 % of the answers are valid": got["valid"] >= 0.97,
                "less than a third of the lists leave the order of the prompt": n == 1 or moved >= 1 / 3,
                "tau is below 0.15": n == 1 or got["tau"] >= 0.15,
                "the values err more than 1.3 times as much as at one image": got["mae"] <= 1.3 * error_at_one,
                "the rewards of a group hardly differ": spread >= 0.1,
                "the greedy lists are in good order already": n == 1 or not best["tau"] >= 0.3,
            }
            wrong += [f"{name}: {what}" for what, holds in demands.items() if not holds]
    return format_table(rows), wrong


@torch.no_grad()
def _answered(policy: rarl.Policy, seen: Seen, samples: list[data.Sample], answers: int) -> list[dict]:
    """`answers` answers to each sample, one greedy or several sampled, judged."""
    judged = []
    for i in range(0, len(samples), 16):
        some = samples[i : i + 16]
        room = data.max_answer_tokens(policy, some)
        generator = torch.Generator().manual_seed(i)
        prompts = [seen.prompt(sample) for sample in some]
        rollout = rarl.generate(policy, prompts, answers, room, 1.0 if answers > 1 else 0.0, generator)
        texts = rarl.decode(policy, rollout.ids, rollout.mask)
        judged += [evaluation.judge(some[k // answers], text) for k, text in enumerate(texts)]
    return judged
