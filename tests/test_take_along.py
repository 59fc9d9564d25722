"""The blocks of docs/take-along.md, as they stand there: in a fresh folder with copies of the leaves, in the trainers that they are
for. A trainer that is not installed is skipped, since none is a requirement; EasyR1 is called by its signature alone."""

import functools
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
import torch
from runs import ROOT

import data
import eval as evaluation
import rarl
import reward
from support.datasets import load_dataset
from support.datasets.saved_task import save_task
from support.datasets.splits import read_dataset

PAGE = (ROOT / "docs" / "take-along.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.S))
ADAPTERS = ("rarl_trl.py", "rarl_verl.py", "rarl_easyr1.py", "rarl_swift.py")
QUICK = dict(use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True)


def one(value):
    return f'[{{"image_id": 1, "value": {value}}}]'


def several(*entries):
    return data.format_answer(entries)


# Text, labels, delta, whether it ended by itself, R_final by hand: R_reg + R_rank + R_format.
ANSWERS = [
    (one(12), [12], 4, True, 1 + 0 + 1),  # one image has no R_rank
    (one(14), [12], 4, True, 0.75 + 0 + 1),  # 1 - (2 / 4)^2
    (one(16), [12], 4, True, 0 + 0 + 1),  # an error of delta
    ("<think>[1] and 2, or so</think>\n" + one(12), [12], 4, True, 1 + 0 + 1),
    ("<think>so " + one(12), [12], 4, True, 0),  # never closed
    ("Image 1: " + one(12), [12], 4, True, 1 + 0 + 0),
    (f"```json\n{one(12)}\n```", [12], 4, True, 1 + 0 + 0),
    (several((2, 10), (1, 20)), [20, 10], 10, True, 1 + 1 + 1),
    (several((1, 20), (2, 10)), [20, 10], 10, True, 1 + 0 + 1),  # right values, wrong order
    (several((2, 10), (1, 25)), [20, 10], 10, True, 0.875 + 1 + 1),  # (1 + 0.75) / 2
    (several((2, 7), (1, 7)), [7, 7], 4, True, 1 + 1 + 1),  # labels alike: any order is right
    (several((1, 5), (3, 15), (2, 10)), [5, 10, 15], 4, True, 1 + 2 / 3 + 1),  # tau = (2 - 1) / 3
    (several((1, 20)), [20, 10], 10, True, 0),  # image 2 is missing
    (several((1, 20), (1, 10)), [20, 10], 10, True, 0),  # image 1 twice
    (one('"12"'), [12], 4, True, 0),
    (one("NaN"), [12], 4, True, 0),
    (one(12) + one(12), [12], 4, True, 0),  # which of the two?
    (several((2, 10), (1, 20))[:-4], [20, 10], 10, False, 0),  # cut in the list
    (several((2, 10), (1, 20)), [20, 10], 10, False, 0),  # cut behind it
    (one(12) + "\n" * 8, [12], 4, False, 0),  # goes on with white space to the limit
]
TEXTS, LABELS, DELTAS, ENDED, TOTALS = map(list, zip(*ANSWERS, strict=True))


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty folder with the leaves, the blocks and eight labelled images; the working directory, and first on the path."""
    for leaf in ("reward", "rmo", "rarl", "data"):
        shutil.copy(ROOT / f"{leaf}.py", tmp_path)
    for name, block in BLOCKS.items():
        (tmp_path / name).write_text(block.replace('"tiny"', repr(str(ROOT / "tiny"))), encoding="utf-8")
    (tmp_path / "photos").mkdir()
    for i, item in enumerate(load_dataset("dots")[:8]):
        item.image().save(tmp_path / "photos" / f"{item.label}_{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in BLOCKS:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.fixture
def trl_blocks(fresh):
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("torchvision", reason="transformers' processor of Qwen2.5-VL needs torchvision")
    return lambda name: importlib.import_module(name)


@pytest.fixture
def tokens(policy):
    """The 20 answers as a policy would have written them: without EOS where they were cut."""
    ids = [x.tolist() for x in rarl.encode(policy, TEXTS)]
    return [x if ended else x[:-1] for x, ended in zip(ids, ENDED, strict=True)]


def test_all_blocks_are_tried_here_and_short():
    length = {name: sum(1 for line in block.splitlines() if line.strip()) for name, block in BLOCKS.items()}
    assert len(BLOCKS) == 10 and all(length[name] <= 15 for name in ADAPTERS) and length["rmo_trl.py"] <= 40
    for name, said in re.findall(r"\[`(\w+\.py)`\]\([^)]*\), (\d+) lines", PAGE):
        assert length[name] == int(said), name


# --------------------------------------------------------------------------------------------------------------------
# The reward: 20 answers, the same numbers everywhere


def test_the_20_answers_in_our_own_loop(policy, tokens):
    assert len(ANSWERS) == 20
    width = max(map(len, tokens))
    ids = torch.tensor([x + [policy.eos_id] * (width - len(x)) for x in tokens])
    mask = torch.tensor([[i < len(x) for i in range(width)] for x in tokens])
    texts = rarl.decode(policy, ids, mask)
    assert [text for text, ended in zip(texts, ENDED, strict=True) if ended] == TEXTS[: sum(ENDED)]
    totals = [reward.compute_reward(*answer).total for answer in zip(texts, LABELS, DELTAS, strict=True)]
    assert totals == pytest.approx(TOTALS)


def test_the_20_answers_through_trl(trl_blocks, tokens, monkeypatch):
    trainer = trl_blocks("train_trl").make_trainer(**QUICK)
    shown = trainer.processing_class.batch_decode(tokens, skip_special_tokens=True)
    messages = [[{"role": "assistant", "content": text}] for text in shown]
    inputs = [{"prompt": "", "labels": y, "delta": d} for y, d in zip(LABELS, DELTAS, strict=True)]
    for completions in (messages, shown):
        totals = trainer._calculate_rewards(inputs, [""] * 20, completions, tokens)
        assert totals[:, 0].tolist() == pytest.approx(TOTALS)


def test_trls_reward_sees_hidden_tokens(fresh, policy):
    """They are nowhere in `completions`. Here they cost R_format."""
    (ids,) = rarl.encode(policy, [one(12) + "<|vision_end|>"])
    rarl_reward = importlib.import_module("rarl_trl").make_reward(policy.tokenizer)
    assert rarl_reward(completion_ids=[ids.tolist()], labels=[[12]], delta=[4], completions=[one(12)]) == [1]


def test_the_20_answers_through_verl(fresh, policy, tokens, monkeypatch):
    pytest.importorskip("verl", reason="verl is not installed")
    import numpy as np
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    def config(delta):
        return OmegaConf.create({"reward": {
            "custom_reward_function": {"path": "rarl_verl.py", "name": "compute_score", "reward_kwargs": {"delta": delta}},
            "reward_manager": {"source": "importlib", "name": "UncutRewardManager", "module": {"path": "rarl_verl.py"}},
        }})  # fmt: skip

    width = max(map(len, tokens))
    pad = lambda x, filler: torch.tensor([x + [filler] * (width - len(x))])
    totals = []
    for ids, labels, delta in zip(tokens, LABELS, DELTAS, strict=True):
        manager = load_reward_manager(config(delta), policy.tokenizer)
        prompt = torch.tensor([[7, 8, 9]])
        answer = DataProto.from_dict(
            {"prompts": prompt, "responses": pad(ids, policy.tokenizer.pad_token_id),
             "attention_mask": torch.cat([torch.ones_like(prompt), pad([1] * len(ids), 0)], dim=1)},
            {"data_source": np.array(["dots"], dtype=object),
             "reward_model": np.array([{"style": "rule", "ground_truth": str(labels)}], dtype=object)},
        )  # fmt: skip
        totals.append(manager.loop.run_until_complete(manager.run_single(answer))["reward_score"])
    assert totals == pytest.approx(TOTALS)


def test_the_20_answers_through_easyr1(fresh, policy, tokens):
    """As its reward manager (verl/workers/reward/function.py) loads and calls a function of REWARD_TYPE "batch"."""
    spec = importlib.util.spec_from_file_location("custom_reward_fn", fresh / "rarl_easyr1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.REWARD_TYPE == "batch"
    texts = policy.tokenizer.batch_decode(tokens, skip_special_tokens=False)
    totals = []
    for text, ids, labels, delta in zip(texts, tokens, LABELS, DELTAS, strict=True):
        compute_score = functools.partial(module.compute_score, delta=delta)
        (score,) = compute_score([{"response": text, "response_length": len(ids), "ground_truth": str(labels)}])
        totals.append(score["overall"])
    assert totals == pytest.approx(TOTALS)


def test_the_20_answers_through_ms_swift(fresh, tokens):
    pytest.importorskip("swift.rewards", reason="ms-swift is not installed")
    from swift.rewards import orms
    from swift.rl_core.data import GRPOSample
    from swift.rl_core.grpo_algorithm import score_completions
    from swift.utils import import_external_file

    import_external_file("rarl_swift.py")
    samples = [
        GRPOSample(
            messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}],
            finish_reason="stop" if ended else "length", extra={"labels": labels, "delta": delta},
        )
        for text, labels, delta, ended, _ in ANSWERS
    ]  # fmt: skip
    totals = score_completions(samples, [orms["rarl"](args=None)], [None], False, torch.device("cpu"))
    assert totals[:, 0].tolist() == pytest.approx(TOTALS)


# --------------------------------------------------------------------------------------------------------------------
# TRL


def test_a_step_of_trl_with_nothing_but_the_leaves(trl_blocks, fresh):
    """In a process that cannot see this project. The prompt is ours, token for token."""
    settings = QUICK | dict(max_steps=1, num_generations=2, per_device_train_batch_size=2, max_completion_length=40)
    program = (
        f"import train_trl; trainer = train_trl.make_trainer(**{settings}); trainer.train(); "
        "row = trainer.train_dataset[0]; logged = trainer._logs; "
        "from trl.data_utils import prepare_multimodal_messages as fill; "
        "ids = trainer._tokenize_prompts([fill(row['prompt'], images=row['images'])])[0][0]; "
        "print('RESULT', list(logged['rewards']['rarl_reward']), row['labels'], ids)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=fresh, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rewards, labels, ids = map(eval, re.search(r"RESULT (\[.*?\]) (\[.*?\]) (\[.*?\])", done.stdout).groups())
    assert len(rewards) == 2 and max(rewards) > 0
    items = {item.label: item for item in load_dataset("dots")[:8]}
    (ours,) = data.make_prompts(rarl.load_policy(ROOT / "tiny"), [data.Sample(tuple(items[y] for y in labels))])
    assert ours.ids.tolist() == ids


@pytest.fixture
def dead_start(tmp_path):
    """tiny/ taught to say "No." to whatever it is shown. -> its folder"""
    policy = rarl.load_policy(ROOT / "tiny")
    optimizer = torch.optim.AdamW(policy.model.model.language_model.parameters(), lr=2e-3)
    sampler = data.Sampler(load_dataset("dots"), (1,), batch_size=4, seed=0)
    (prose,) = rarl.encode(policy, ["No."])
    for step in range(20):
        prompts = data.make_prompts(policy, sampler.batch(step))
        ids = prose.expand(len(prompts), -1)
        loss = -rarl.logprobs(policy, prompts, ids, torch.ones_like(ids, dtype=torch.bool))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rarl.save_policy(policy, tmp_path / "dead")
    return str(tmp_path / "dead")


def test_rmo_rescues_a_dead_start_in_trl(trl_blocks, dead_start):
    """Without RMO all answers earn 0, so that no weight moves. With it the policy learns the format."""
    make_trainer = trl_blocks("train_trl").make_trainer
    rescuer = trl_blocks("rmo_trl").RMOTrainer
    rescuer.probability = 1.0

    def rewards(kind, steps):
        trainer = make_trainer(
            kind, images=1, model=dead_start, max_steps=steps, max_completion_length=24, beta=0.0,
            learning_rate=2e-3, lr_scheduler_type="constant", **QUICK,
        )  # fmt: skip
        before = [p.clone() for p in trainer.model.parameters()]
        trainer.train()
        moved = not all(map(torch.equal, before, trainer.model.parameters()))
        return [log["reward"] for log in trainer.state.log_history if "reward" in log], moved

    assert rewards(trl_blocks("trl").GRPOTrainer, 2) == ([0, 0], False)
    earned, moved = rewards(rescuer, 10)
    # At first the two solutions alone earn, 2 points each among 16 answers. R_format alone is 1 point an answer.
    assert moved and earned[0] == 0.25 and min(earned[-3:]) > 0.8


def test_rmo_replaces_one_row_in_all_that_the_loss_sees(trl_blocks, policy, monkeypatch):
    """Of two groups the first earns nothing; the second has a good answer and stays."""
    make_trainer, rmo_trl = trl_blocks("train_trl").make_trainer, trl_blocks("rmo_trl")
    rmo_trl.RMOTrainer.probability = 1.0
    trainer = make_trainer(rmo_trl.RMOTrainer, num_generations=3, per_device_train_batch_size=6, **QUICK)
    rows = [trainer.train_dataset[i] for i in (0, 0, 0, 1, 1, 1)]
    written = ["No.", "No.", "No.", "No.", rows[4]["solution"], "No."]
    ids = [x.tolist() for x in rarl.encode(policy, written)]
    monkeypatch.setattr(trl_blocks("trl").GRPOTrainer, "_generate_single_turn", lambda *args, **kwargs: ([*ids], None))
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    real = batch["completion_mask"].bool()
    kept = [row[keep].tolist() for row, keep in zip(batch["completion_ids"], real, strict=True)]
    (row,) = (i for i in range(6) if kept[i] != ids[i])
    assert row < 3 and trainer._tokenizer.decode(kept[row][:-1]) == rows[0]["solution"]
    # Rewards 0, 0, 3 in both groups: the sample's std is sqrt(3), so 2 / sqrt(3) for the good one, -1 / sqrt(3) for the others.
    expected = [2 / 3**0.5 if i in (row, 4) else -1 / 3**0.5 for i in range(6)]
    assert batch["advantages"].tolist() == pytest.approx(expected, abs=1e-3)
    assert list(trainer._logs["completion"])[row][0]["content"] == rows[0]["solution"]
    trainer.model.eval()  # an evaluation shows what the policy says
    assert (trainer._generate_and_score_completions(rows)["advantages"][:3] == 0).all()


@pytest.mark.parametrize("parts, lora", [(1, False), (2, False), (1, True)])
def test_the_shared_prompt_has_trls_loss_and_gradient(trl_blocks, parts, lora):
    """parts: of a generated batch, which TRL makes after it has shuffled the rows. Two parts have incomplete groups.

    lora: and with it gradient checkpointing, and two updates per rollout, for which TRL keeps the old log-probs.
    """
    from peft import LoraConfig
    from trl import GRPOTrainer
    from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

    settings = QUICK | dict(num_generations=4, per_device_train_batch_size=8 // parts, max_completion_length=40,
                            steps_per_generation=parts, gradient_accumulation_steps=parts,
                            num_iterations=1 + lora)  # fmt: skip
    trainers = []
    for kind in (trl_blocks("shared_trl").SharedPromptTrainer, GRPOTrainer):
        if lora:
            kind = functools.partial(kind, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
        trainer = trl_blocks("train_trl").make_trainer(kind, **settings)
        generator = torch.Generator().manual_seed(0)
        for p in trainer.model.parameters():  # away from the reference
            p.data += p.requires_grad * 0.01 * torch.randn(p.shape, generator=generator)
        trainer.model.train()
        if lora:
            trainer.model.gradient_checkpointing_enable()
        trainer.current_gradient_accumulation_steps = parts
        trainers.append(trainer)
    ours, theirs = trainers
    rows = [ours.train_dataset[i] for i in (0, 0, 0, 0, 1, 1, 1, 1)]
    torch.manual_seed(0)
    batch = ours._generate_and_score_completions(rows)
    answer = batch["completion_mask"].bool()
    written = [row[keep].tolist() for row, keep in zip(batch["completion_ids"], answer, strict=True)]
    theirs._generate_single_turn = lambda *args, **kwargs: (written, None)
    expected = theirs._generate_and_score_completions(rows)
    assert ("old_per_token_logps" in expected) == lora
    for name in {"ref_per_token_logps", "old_per_token_logps", "advantages"} & set(expected):
        torch.testing.assert_close(batch[name], expected[name], atol=1e-4, rtol=0)

    batch["advantages"] = torch.arange(8) - 2.0  # far from 0, so that the loss is too
    order = [0, 4, 1, 2, 5, 6, 3, 7]  # of two parts the first has 3 rows of one prompt and 1 of the other
    take = lambda x: x[order] if isinstance(x, torch.Tensor) and x.ndim else x
    shuffled = {
        name: [x[i] for i in order] if isinstance(x, list) else take(x)
        for name, x in split_pixel_values_by_grid(batch).items()
    }
    part = unsplit_pixel_values_by_grid(split_tensor_dict(shuffled, parts)[0])
    results = []
    for trainer in (ours, theirs):
        loss = trainer._compute_loss(trainer.model, part)
        loss.backward()
        weights = [p for p in trainer.model.parameters() if p.requires_grad]
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in weights])))
    (loss, gradient), (their_loss, their_gradient) = results
    assert abs(their_loss) > 0.01
    torch.testing.assert_close(loss, their_loss, atol=1e-4, rtol=1e-4)
    assert (gradient - their_gradient).abs().max() < 1e-4 * their_gradient.abs().max()


def test_the_shared_prompt_refuses_what_it_cannot_do(trl_blocks):
    with pytest.raises(ValueError, match="plain sampling"):
        trl_blocks("train_trl").make_trainer(trl_blocks("shared_trl").SharedPromptTrainer, top_p=0.9, **QUICK)


def test_compare(trl_blocks, monkeypatch, capsys):
    train_trl = trl_blocks("train_trl")
    make_trainer, small = (
        train_trl.make_trainer,
        QUICK | dict(max_steps=1, num_generations=2, per_device_train_batch_size=2),
    )
    monkeypatch.setattr(train_trl, "make_trainer", lambda *args, **settings: make_trainer(*args, **settings | small))
    trl_blocks("compare")
    seconds = eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(seconds) == ["GRPOTrainer", "SharedPromptTrainer"] and all(s > 0 for s in seconds.values())


# --------------------------------------------------------------------------------------------------------------------
# From there to here, and back


def test_a_dataset_of_trls_form_becomes_one_of_ours(trl_blocks):
    rows = trl_blocks("train_trl").make_trainer(**QUICK).train_dataset
    rows.save_to_disk("theirs")
    trl_blocks("from_trl")
    items = [item for some in read_dataset("csv", "ours")[0].values() for item in some]
    key = lambda image, label: (label, image.tobytes())
    expected = {key(image, y) for row in rows for image, y in zip(row["images"], row["labels"], strict=True)}
    assert {key(item.image(), item.label) for item in items} == expected and len(items) == len(expected) == 8


def test_single_images_go_through_parquet(fresh):
    """The page's one line: columns `image` and `solution`."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    items = load_dataset("dots")[:8]
    columns = {"image": [item.image() for item in items], "solution": [item.label for item in items]}
    (fresh / "ours").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet("ours/train.parquet")
    assert (
        '`table.to_parquet("ours/train.parquet")`, then `--data parquet --columns image=image,label=solution`' in PAGE
    )
    read, _ = read_dataset("parquet", "ours", {"columns": "image=image,label=solution"})
    found = [(item.label, item.image().tobytes()) for some in read.values() for item in some]
    assert sorted(found) == sorted((item.label, item.image().tobytes()) for item in items)


def test_ask(fresh, capsys):
    """What transformers answers to our prompt is what eval.py reads."""
    pytest.importorskip("torchvision", reason="transformers' processor of Qwen2.5-VL needs torchvision")
    policy, items = rarl.load_policy(ROOT / "tiny"), load_dataset("dots", split="test")[:2]
    rarl.save_policy(policy, "runs/rarl/stage2")
    save_task(fresh / "runs/rarl/stage2", "dots", items, {}, None, False)
    for item, name in zip(items, ("a.png", "b.png"), strict=True):
        item.image().save(name)
    importlib.import_module("ask")
    assert capsys.readouterr().out.strip() == evaluation.answer_greedily(policy, [data.Sample(tuple(items))], 1, 128)[0]
