"""Processes and devices: who takes part (World), and the policy in its three roles on them (Learner).

Several processes (torchrun): FSDP2 shards weights, gradients and optimiser; prompts are dealt to the ranks; each rank
decodes alone from a copy of the weights that is gathered once a step, so uneven answers make nobody wait inside
decoding. The main rank alone reads the model; the others get it layer by layer (`spread`). With LoRA nothing is sharded:
each rank needs the whole base to decode, and adapters are small. This file and support/learner/policies.py are where the compute
dtype is named: bf16 on a GPU, float32 on a CPU.
"""

import contextlib
import os
from dataclasses import dataclass
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
from support.run.settings import SettingError, Settings
from support.show.clock import Clock


@dataclass(frozen=True)
class World:
    """Who else takes part: torchrun starts `size` processes, this is number `rank`."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, thing: Any) -> list:
        """Everybody's `thing`, by rank."""
        if self.size == 1:
            return [thing]
        things: list = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        self.gather(None)


def start_world(device: str) -> World:
    """Join the processes that torchrun started, if it did. device: auto, cpu or cuda. Raises SettingError."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda":
        if not torch.cuda.is_available():
            raise SettingError(f"--device {device}: this machine has no CUDA GPU; take --device cpu")
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise SettingError(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs on this machine")
        name = f"cuda:{local}"
        torch.cuda.set_device(name)
    elif name != "cpu":
        raise SettingError(f"--device {device}: choose auto, cpu or cuda")
    if size > 1 and not dist.is_initialized():
        # gloo carries Python objects (rewards, predictions) between CPUs, nccl the tensors between GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if name != "cpu" else "gloo")
    return World(rank, size, torch.device(name))


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
            optimizer: torch.optim.AdamW = HostAdamW(trained, lr=s.lr, weight_decay=s.weight_decay)
        else:
            optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay, fused=True)
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

    def autocast(self):
        """bf16 matrix products on a GPU."""
        # No cache: it would hold a bf16 copy of all weights; each is used once in a forward anyway.
        return torch.autocast("cuda", torch.bfloat16, enabled=self.world.device.type == "cuda", cache_enabled=False)

    def prepare(self, prompts: list) -> None:
        """Do once what rollout, update and reference all need: move the pixels, encode them if vision is frozen."""
        if self.world.device.type == "cuda":
            for prompt in prompts:  # in bf16, as they are multiplied
                prompt.pixels = prompt.pixels.to(self.world.device, torch.bfloat16)
        if self.vision_frozen:
            size = self.settings.rollout_batch  # bounds the memory of this pass too
            for b in range(0, len(prompts), size):
                rarl.encode_images(self.rollout_policy, prompts[b : b + size])

    def reference_logprobs(self, batch) -> Tensor | None:
        """(N, T) log pi_ref of a batch's answers; None without a reference."""
        if self.reference is None:
            return None
        as_begun = lora.adapters_off(self.policy, self.began) if self.lora else contextlib.nullcontext()
        with torch.no_grad(), as_begun:
            return rarl.logprobs(self.reference, batch.prompts, batch.ids, batch.mask, self.settings.temperature)[0]

    def clip_gradients(self) -> float:
        """Scale the gradient down to --max-grad-norm. -> its norm before, the same on all ranks"""
        if self.lora and self.world.size > 1:  # what FSDP does for sharded weights: the mean of all ranks' gradients
            gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
            together = torch.cat([g.flatten() for g in gradients]) / self.world.size
            dist.all_reduce(together)
            for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
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


def micro_batches(batch, wanted: list[int], limit: int) -> list[list[int]]:
    """Prompts in micro-batches whose packed rows (prompts and answers, without padding) hold at most `limit` tokens.

    Prompts of like length come together, because attention on a CPU pads them. One that is over the limit goes alone.
    """
    G = batch.advantages.shape[1]
    answers = batch.mask.view(len(batch.prompts), -1).sum(1).tolist()  # tokens of each group's answers
    tokens = [
        len(p.ids) + n - G for p, n in zip(batch.prompts, answers, strict=True)
    ]  # an answer's last does not go in
    micros: list[list[int]] = []
    for b in sorted(wanted, key=lambda b: (tokens[b], b)):
        if micros and sum(tokens[i] for i in [*micros[-1], b]) <= limit:
            micros[-1].append(b)
        else:
            micros.append([b])
    return micros


def micro_batches_on_all_ranks(learner: Learner, batch) -> tuple[list[tuple[Any, float]], int]:
    """-> this rank's micro-batches, each with the weight of its loss, 1 or 0; the count that normalises the loss.

    FSDP gathers weights in each forward, so ranks must run equally many: one with fewer repeats some, with weight 0.
    The count, of answers or answer tokens, is over all ranks: not a mean of the ranks' means.
    """
    s, world = learner.settings, learner.world
    # A group without advantage and without KL has no gradient at all, but for RL-ZVP: it is not run.
    always = learner.reference is not None or s.advantage == "rl-zvp"
    wanted = [b for b in range(len(batch.prompts)) if always or batch.advantages[b].any()]
    micros = [batch.take(groups) for groups in micro_batches(batch, wanted, s.max_tokens_per_forward)]
    sizes = {"micros": len(micros), "sequence": batch.advantages.numel(), "token": int(batch.mask.sum())}
    everywhere = world.gather(sizes)
    missing = max(sizes["micros"] for sizes in everywhere) - len(micros)
    filler = micros[0] if micros else batch.take([0])
    count = sum(sizes[s.normalize] for sizes in everywhere)
    return [(micro, 1.0) for micro in micros] + [(filler, 0.0)] * missing, count


def make_optimizer_state(policy: rarl.Policy, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser's state now, so that a checkpoint has something to save and to load into.

    get_state_dict does it by a step with lr 0, which counts: Adam would take the first real step for its second.
    """
    get_state_dict(policy, optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
