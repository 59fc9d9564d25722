"""The policy in its three roles, on one process or several: all that a step needs of autocast, FSDP2, LoRA and micro-batches.

Several processes (torchrun): FSDP2 shards weights, gradients and optimiser; prompts are dealt to the ranks; each rank
decodes alone from a copy of the weights that is gathered once a step, so uneven answers make nobody wait inside
decoding. The main rank alone reads the model; the others get it layer by layer (`spread`). With LoRA nothing is sharded:
each rank needs the whole base to decode, and adapters are small. This file and support/learner/policies.py are where the compute
dtype is named: bf16 on a GPU, float32 on a CPU.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import rarl
from support.learner import lora
from support.learner.offload import HostAdamW
from support.learner.stage import Batch
from support.learner.world import World
from support.run.settings import Settings
from support.show.monitor import Clock

WEIGHT_DECAY, MAX_GRAD_NORM = 0.0, 1.0  # of AdamW and of clipping; the paper states neither


class Learner:
    """The policy in its three roles: trained (float32 weights), sampled from, and referred to.

    policy          float32 master weights, computed with in bf16 on a GPU (lr 1e-6 vanishes in bf16 weights: from 1 to
                    the next bf16 number is 0.8 %). On several processes it is sharded: one FSDP unit for each decoder
                    layer and vision block, the rest (embeddings, head, norms) in the root's.
    rollout_policy  whole and unsharded, bf16 on a GPU: it samples without any communication and reads half the bytes
                    per token. On one CPU process it is the policy itself.
    reference       the policy as the stage began, frozen; None if beta is 0

    With LoRA (support/learner/lora.py) all three are one module with one copy of the base's weights, frozen and in bf16 on a GPU.
    policy and rollout_policy have the adapters on, the reference has them off. If the stage began with an adapter (stage 2
    goes on with that of stage 1), the reference has a frozen copy of that one in their place: a few MB, and exact, which
    merging it into bf16 weights would not be.

    On a GPU one process computes under autocast: matrix products are bf16, embeddings, norms and the stream between layers float32.
    Several have FSDP2's bf16 weights, and a bf16 stream with them. So their log-probs differ, by as much as either differs from
    float32: 0.003 to 0.008 a token (root of the mean square; tiny's answers and those of a random policy, computed on a CPU). The
    head's logits are float32 in both.

    `clock` measures what the phases of a step take.
    """

    def __init__(self, policy: rarl.Policy, world: World, s: Settings):
        self.world, self.settings, self.policy = world, s, policy
        self.clock = Clock()
        self.rollout_policy = policy
        self.lora = bool(lora.lora_layers(policy))
        self.vision_frozen = not any(p.requires_grad for p in policy.model.model.visual.parameters())
        spread(policy, world, "buffers")
        if not self.lora and (world.device.type == "cuda" or world.size > 1):
            dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
            self.rollout_policy = rarl.cast_copy(policy, dtype, device=world.device).to(world.device)
        if s.activation_checkpointing:
            policy.model.activation_checkpointing_enable()
        self.shard(policy)
        if world.size > 1:
            self.sync_rollout_policy()  # but for the main rank's it has no values yet
        self.reference: rarl.Policy | None = None
        self.began: lora.Adapters | None = None  # LoRA: the adapters that the stage began with; None: B was 0

    def shard(self, policy: rarl.Policy) -> None:
        """Move the main rank's policy to the devices; of several processes each keeps a part of every layer's weights."""
        world = self.world
        if world.size == 1 or self.lora:
            spread(policy, world, "parameters")
            policy.to(world.device)
            return
        mesh = init_device_mesh(world.device.type, (world.size,))
        precision = MixedPrecisionPolicy()
        if world.device.type == "cuda":
            # Inputs are left alone: the vision tower's rotary angles come in float32 and would lose digits in bf16.
            precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        layers = [*policy.model.model.visual.blocks, *policy.model.model.language_model.layers]
        for module in [*layers, policy]:  # no rank but the main one ever has more than one of them whole
            spread(module, world, "parameters")
            fully_shard(module, mesh=mesh, mp_policy=precision)

    def begin_stage(self) -> torch.optim.Optimizer:
        """A new optimiser; the reference becomes what the policy is now."""
        s = self.settings
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        if s.offload:
            optimizer: torch.optim.AdamW = HostAdamW(trained, lr=s.lr, weight_decay=WEIGHT_DECAY)
        else:
            optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=WEIGHT_DECAY, fused=True)
        make_optimizer_state(self.policy, optimizer)
        self.clock = Clock()
        self.reference = None  # frees the last stage's first
        if s.beta > 0 and self.lora:
            self.reference, began = self.policy, lora.adapters_of(self.policy)
            self.began = began if any(B.any() for _, B in began.values()) else None
        elif s.beta > 0 and self.world.size == 1:
            # Computed with exactly as the policy is, so that their KL begins at 0: autocast multiplies with bf16 weights, and
            # leaves embeddings and norms in float32.
            dtype = torch.bfloat16 if self.world.device.type == "cuda" else torch.float32
            self.reference = rarl.cast_copy(self.policy, dtype, nn.Linear)
        elif s.beta > 0:  # from the rollout policy of the main rank, which holds the same weights whole
            whole, device = self.rollout_policy, self.world.device if self.world.main else torch.device("meta")
            self.reference = rarl.cast_copy(whole, whole.model.dtype, device=device)
            self.shard(self.reference)
        return optimizer

    @torch.no_grad()
    def sync_rollout_policy(self) -> None:
        """Gather the weights once; between two syncs every rank samples on its own."""
        if self.rollout_policy is self.policy:
            return
        for ours, theirs in zip(self.rollout_policy.parameters(), self.policy.parameters(), strict=True):
            ours.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)

    def sampling(self) -> contextlib.AbstractContextManager:
        """For rollouts and evaluations: LoRA's adapters are cast once, not for each token."""
        return lora.adapters_cast(self.policy) if self.lora else contextlib.nullcontext()

    def autocast(self):
        """bf16 matrix products on a GPU."""
        # No cache: it would hold a bf16 copy of all weights; each is used once in a forward anyway.
        return torch.autocast("cuda", torch.bfloat16, enabled=self.world.device.type == "cuda", cache_enabled=False)

    def random_keys(self, stage: int, step: int, prompts: int) -> list[tuple]:
        """For each of this process's prompts what seeds all that is drawn for it: see `seed_of`.

        A prompt's number is that in the whole batch, so its draws do not depend on how many processes share the batch.
        """
        rank, size = self.world.rank, self.world.size
        return [(self.settings.seed, stage, step, number) for number in range(rank, prompts * size, size)]

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr * factor

    def prepare(self, prompts: list) -> None:
        """Do once what rollout, update and reference all need: move the pixels, encode them if vision is frozen."""
        if self.world.device.type == "cuda":
            for prompt in prompts:  # as bytes: they become numbers where they are multiplied
                prompt.pixels = prompt.pixels.to(self.world.device)
        if self.vision_frozen:
            size = self.settings.rollout_batch  # bounds the memory of this pass too
            for b in range(0, len(prompts), size):
                rarl.encode_images(self.rollout_policy, prompts[b : b + size])

    def micro_batches(self, batch: Batch) -> tuple[list[Batch], float]:
        """-> the batch in parts of at most --max-tokens-per-forward, and the `denominator` of their losses.

        FSDP gathers weights in each forward, so processes must run equally many: one with fewer repeats some as filler.
        The denominator, answers or answer tokens, is that of all processes, not a mean of their means; divided by their
        number, as FSDP averages the gradients of what has to be a sum.
        """
        self.clock.lap("reward")
        s, world = self.settings, self.world
        # A group without advantage and without KL has no gradient at all: it is not run.
        wanted = [b for b in range(len(batch.prompts)) if self.reference is not None or batch.advantages[b].any()]
        micros = [batch.take(groups) for groups in micro_batches(batch, wanted, s.max_tokens_per_forward)]
        sizes = {"micros": len(micros), "sequence": batch.advantages.numel(), "token": int(batch.mask.sum())}
        everywhere = world.gather(sizes)
        missing = max(sizes["micros"] for sizes in everywhere) - len(micros)
        micros += [batch.take([0], filler=True)] * missing
        return micros, sum(sizes[s.normalize] for sizes in everywhere) / world.size

    def logprobs(self, micro: Batch) -> tuple[Tensor, Tensor]:
        """(N, T) log pi_theta of a micro-batch's answers, with gradient; and the entropy at each token."""
        # transformers checkpoints activations in training mode only; there is no dropout that this could switch on.
        self.policy.train(self.settings.activation_checkpointing)
        try:
            with self.autocast():
                return rarl.logprobs(self.policy, micro.prompts, micro.ids, micro.mask, self.settings.temperature)
        finally:
            self.policy.eval()

    @torch.no_grad()
    def is_sound(self, batch: Batch) -> bool:
        """Whether log-probs after a step are finite, of one group on each process. Asked of the copy that samples."""
        few, policy = batch.take([0]), self.rollout_policy
        with self.autocast():
            logp = rarl.logprobs(policy, few.prompts, few.ids, few.mask, self.settings.temperature)[0]
        return all(self.world.gather(bool(logp[few.mask.to(logp.device)].isfinite().all())))

    def reference_logprobs(self, micro: Batch) -> Tensor | None:
        """(N, T) log pi_ref of a micro-batch's answers; None without a reference."""
        if self.reference is None:
            return None
        as_begun = lora.adapters_off(self.policy, self.began) if self.lora else contextlib.nullcontext()
        with torch.no_grad(), as_begun, self.autocast():
            return rarl.logprobs(self.reference, micro.prompts, micro.ids, micro.mask, self.settings.temperature)[0]

    def backward(self, loss: Tensor, micro: Batch) -> None:
        """Add the gradient of a micro-batch's loss to what is there."""
        (0.0 * loss if micro.filler else loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, loss: float) -> tuple[float, bool]:
        """Clip the gradient, take the step, forget the gradient. -> the gradient's norm before; whether the step was skipped

        It is skipped where the loss or the gradient is not finite. Both are the same on all processes: they skip together.
        """
        grad_norm = self.clip_gradients()
        bad = not (math.isfinite(grad_norm) and math.isfinite(loss))
        if not bad:
            optimizer.step()
        optimizer.zero_grad()
        return grad_norm, bad

    def clip_gradients(self) -> float:
        """Scale the gradient down to MAX_GRAD_NORM. -> its norm before, the same on all ranks; 0 if there is none"""
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        if not gradients:  # no group of this step had an advantage
            return 0.0
        if self.lora and self.world.size > 1:  # what FSDP does for sharded weights: the mean of all ranks' gradients
            together = torch.cat([g.flatten() for g in gradients]) / self.world.size
            dist.all_reduce(together)
            for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def save(self, folder: Path) -> None:
        """Write the adapters in peft's layout, or else the float32 weights as a Hugging Face folder, on the main rank.

        All ranks take part in gathering the weights.
        """
        if self.lora:
            if self.world.main:
                lora.save_adapter(self.policy, folder)
                self.policy.tokenizer.save_pretrained(folder)
                self.policy.image_processor.save_pretrained(folder)
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self.policy, options=options)
        if self.world.main:
            whole = {name.removeprefix("model."): tensor for name, tensor in state.items()}
            if self.rollout_policy.model.config.tie_word_embeddings:
                whole.pop("lm_head.weight", None)  # the embeddings' own, listed twice
            rarl.save_policy(self.rollout_policy, folder, whole)


@torch.no_grad()
def spread(module: nn.Module, world: World, kind: str) -> None:
    """Give each rank, on its device, the main rank's "parameters" or "buffers" of a module. What is sharded stays.

    On the other ranks they may be on the device "meta", without values. Tied weights stay tied.
    """
    if world.size == 1:
        return
    received: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for name, ours in list(getattr(part, f"named_{kind}")(recurse=False)):
            if isinstance(ours, DTensor):
                continue
            if ours not in received:
                whole = ours.detach().to(world.device) if world.main else torch.empty_like(ours, device=world.device)
                dist.broadcast(whole, 0)
                received[ours] = nn.Parameter(whole, ours.requires_grad) if kind == "parameters" else whole
            setattr(part, name, received[ours])


def micro_batches(batch: Batch, wanted: list[int], limit: int) -> list[list[int]]:
    """Prompts in micro-batches whose packed rows (prompts and answers, without padding) hold at most `limit` tokens.

    They are taken from the shortest to the longest. One that is over the limit goes alone.
    """
    G = batch.group_size
    answers = batch.mask.view(len(batch.prompts), -1).sum(1).tolist()  # tokens of each group's answers
    # The last token of an answer does not go in.
    tokens = [len(p.ids) + n - G for p, n in zip(batch.prompts, answers, strict=True)]
    micros: list[list[int]] = []
    for b in sorted(wanted, key=lambda b: (tokens[b], b)):
        if micros and sum(tokens[i] for i in [*micros[-1], b]) <= limit:
            micros[-1].append(b)
        else:
            micros.append([b])
    return micros


def make_optimizer_state(policy: rarl.Policy, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser's state now, so that a checkpoint has something to save and to load into.

    get_state_dict does it by a step with lr 0, which counts: Adam would take the first real step for its second.
    """
    get_state_dict(policy, optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
