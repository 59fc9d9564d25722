"""Where policies come from: a folder with whole weights, or one with a LoRA adapter (support/learner/lora.py) and its base."""

from pathlib import Path

import torch

import rarl
from support.learner import lora
from support.run.settings import SettingError, Settings


def load_any(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> rarl.Policy:
    """rarl.load_policy, for folders with an adapter_config.json too. Raises ModelError as it does."""
    if not (Path(path) / lora.CONFIG).is_file():
        return rarl.load_policy(path, device, dtype)
    try:
        base = lora.read_config(path)["base_model_name_or_path"]
        try:
            policy = rarl.load_policy(base, device, dtype)
        except rarl.ModelError as error:
            where = Path(path) / lora.CONFIG
            raise ValueError(f"the base of {path} is missing: {error} (base_model_name_or_path in {where})") from None
        lora.load_adapter(policy.model, path)
    except ValueError as error:
        raise rarl.ModelError(str(error)) from None
    return policy


def load_start(path: str | Path, s: Settings, device: torch.device, read: bool = True) -> rarl.Policy:
    """The policy that a stage begins with, with the settings that concern it. Not yet on the device.

    Of several processes the main one alone reads the weights. The others get theirs from it, when they know which they
    need (support/learner/learner.py), and have a policy on the device "meta" until then (read=False).

    With LoRA: a base with new adapters, or an adapter that goes on. Without: an adapter is merged into its base.
    """
    # A base that is trained has to be float32 (rarl.load_policy); a frozen one is kept as it is multiplied with.
    lowered = s.lora_rank > 0 and device.type == "cuda"
    policy = load_any(path, "cpu" if read else "meta", torch.bfloat16 if lowered else torch.float32)
    if s.max_pixels:  # areas, in spite of the names
        policy.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": s.max_pixels}
    layers = lora.lora_layers(policy.model)
    if s.lora_rank == 0:
        lora.merge(policy.model)
    elif not layers:
        generator = torch.Generator().manual_seed(s.seed)
        lora.add_lora(policy.model, s.lora_rank, s.lora_alpha, s.lora_targets, generator)
    else:
        one, asked = next(iter(layers.values())), lora.target_names(policy.model, s.lora_targets)
        if (one.rank, one.alpha, set(layers)) != (s.lora_rank, s.lora_alpha, set(asked)):
            raise SettingError(
                f"{path} holds an adapter of rank {one.rank} and alpha {one.alpha:g} at {len(layers)} layers, not of rank "
                f"{s.lora_rank} and alpha {s.lora_alpha:g} at {len(asked)}: give the same --lora-rank, --lora-alpha and "
                "--lora-targets, or --lora-rank 0, which merges it and trains all weights"
            )
    if s.freeze_vision:
        policy.model.model.visual.requires_grad_(False)
    return policy
