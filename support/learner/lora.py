"""LoRA (arXiv 2106.09685), by hand: the weights W of linear layers are frozen, and a product of two small matrices is trained.

    y = W x + b + alpha/r B A x        W (out, in), A (r, in), B (out, r)

B is 0 at first, so an adapted model begins as its base, to the last bit. W may be bf16; A and B are float32, because a
small step of AdamW is lost in bf16. Adapters are saved in the layout of the `peft` library, which can load them, and
its LoRA adapters can be loaded here. Differences from the paper: adapters stand at all linear layers (it had the attention's
alone), and there is no dropout, so that sampling and scoring see one and the same policy.

This file needs nothing else of the project. A model is a transformers model, or a module around one such as rarl.Policy.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

# Which linear layers: those with one of these in their names. The head is never one: often its weight is the embeddings'.
TARGETS = {"language": ("language_model",), "language+vision": ("language_model", "visual")}
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What an adapter_config.json may say without changing y = W x + b + alpha/r B A x: who made it, how it was trained, where it
# stands (which the names of the weights tell too). Anything else is refused unless it is empty, because peft would use it.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "target_modules", "task_type",
}  # fmt: skip
HARMLESS_VALUES: dict[str, list] = {
    "bias": ["none"],
    "init_lora_weights": [True, "gaussian"],
}  # pissa and others change W itself

Adapters = dict[str, tuple[Tensor, Tensor]]  # name of the linear layer -> its A and B


class LoRALinear(nn.Module):
    """A linear layer with its adapter, in the linear layer's place."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, alpha: float) -> None:
        super().__init__()
        self.base, self.alpha = base.requires_grad_(False), alpha
        self.A, self.B = (nn.Parameter(x.to(base.weight.device, torch.float32)) for x in (A, B))
        self.on = True
        self.instead: tuple[Tensor, Tensor] | None = None  # an earlier A and B; see adapters_off

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = self.base(x)
        if not self.on:
            return y
        # In the dtype of x, as the base's own product. The gradient comes back through the cast in float32.
        A, B = (m.to(x.dtype) for m in self.instead or (self.A, self.B))
        low = F.linear(x, A)  # (..., r)
        y2, low2 = (m.reshape(-1, m.shape[-1]) for m in (y, low))  # as matrices: product, factor and sum are one kernel
        return torch.addmm(y2, low2, B.t(), alpha=self.alpha / self.rank).view_as(y)


def backbone(model: nn.Module) -> nn.Module:
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in backbone(model).named_modules() if isinstance(layer, LoRALinear)}


def target_names(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the linear layers that `targets` means: a key of TARGETS, or parts of names such as ("q_proj", "v_proj")."""
    parts = TARGETS.get(targets, (targets,)) if isinstance(targets, str) else targets
    linear = [n for n, m in backbone(model).named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    linear = [name.removesuffix(".base") for name in linear]
    for part in parts:
        if not any(part in name.split(".") for name in linear):
            raise ValueError(f"LoRA: no linear layer has {part} in its name")
    return [name for name in linear if set(parts) & set(name.split("."))]


def put_in(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(backbone(model).get_submodule(parent), last, layer)


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: str | Sequence[str] = "language",
    generator: torch.Generator | None = None,
) -> None:  # fmt: skip
    """Freeze the model and give an adapter to each of its linear layers that `targets` means (see target_names).

    A is drawn as nn.Linear draws its weights, on the CPU, from `generator`; B is 0.
    """
    names = target_names(model, targets)
    if rank < 1 or lora_layers(model):
        raise ValueError(f"LoRA: rank {rank} is below 1" if rank < 1 else "LoRA: the model has adapters already")
    model.requires_grad_(False)
    for name in names:
        linear: Any = backbone(model).get_submodule(name)
        A, B = torch.empty(rank, linear.in_features), torch.zeros(linear.out_features, rank)
        nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
        put_in(model, name, LoRALinear(linear, A, B, alpha))


@contextlib.contextmanager
def adapters_off(model: nn.Module, instead: Adapters | None = None) -> Iterator[None]:
    """Within it the model is its base, to the last bit; or it has the adapters `instead` (made by `adapters_of`)."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        layer.on, layer.instead = instead is not None, instead[name] if instead else None
    try:
        yield
    finally:
        for layer in layers.values():
            layer.on, layer.instead = True, None


def adapters_cast(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it A and B are as their layer's W, cast once and not at each call. For sampling: no gradient gets through."""
    cast = {}
    for name, layer in lora_layers(model).items():
        dtype = layer.base.weight.dtype
        cast[name] = layer.A.detach().to(dtype), layer.B.detach().to(dtype)
    return adapters_off(model, cast)


def adapters_of(model: nn.Module) -> Adapters:
    """A copy of what the adapters are now."""
    return {name: (x.A.detach().clone(), x.B.detach().clone()) for name, x in lora_layers(model).items()}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """W + alpha/r B A in the place of W. The model is a plain one again, and trained as a whole.

    The sum is made in float32, and exact to rounding if W is float32. bf16 would swallow the smaller part of the change.
    """
    for name, layer in lora_layers(model).items():
        weight = layer.base.weight
        weight.copy_(weight.float() + layer.alpha / layer.rank * layer.B @ layer.A)
        put_in(model, name, layer.base)
    model.requires_grad_(True)


# --------------------------------------------------------------------------------------------------------------------
# Files, in peft's layout


def fingerprint(model: nn.Module) -> str:
    """A checksum of a row of each adapted layer's W, in bf16: the same, whether the base was loaded in bf16 or float32."""
    crc = 0
    for _, layer in sorted(lora_layers(model).items()):
        row = layer.base.weight[0].detach().bfloat16().view(torch.int16).cpu()
        crc = zlib.crc32(row.numpy().tobytes(), crc)
    return f"{crc:08x}"


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the folder that peft.PeftModel.from_pretrained(base, path) loads. The base is named as it was loaded."""
    layers = lora_layers(model)
    base = getattr(backbone(model), "name_or_path", "")
    config = {
        "peft_type": "LORA", "task_type": None, "inference_mode": True,
        "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base,
        "r": next(iter(layers.values())).rank, "lora_alpha": next(iter(layers.values())).alpha,
        "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(layers),
    }  # fmt: skip
    weights = {}
    for name, layer in layers.items():
        weights[f"{PREFIX}{name}.lora_A.weight"] = layer.A.detach().cpu().contiguous()
        weights[f"{PREFIX}{name}.lora_B.weight"] = layer.B.detach().cpu().contiguous()
    Path(path).mkdir(parents=True, exist_ok=True)
    # One entry alone: safetensors writes several in any order, and the same adapter should be the same file.
    save_file(weights, Path(path) / WEIGHTS, {"base": fingerprint(model)})
    (Path(path) / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # safetensors makes its file readable for its owner alone.
    (Path(path) / WEIGHTS).chmod((Path(path) / CONFIG).stat().st_mode)


def read_config(path: str | Path) -> dict[str, Any]:
    """adapter_config.json of a folder. Raises ValueError if it is damaged or asks for what is not done here."""
    file = Path(path) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base, rank, alpha = config["base_model_name_or_path"], config["r"], config["lora_alpha"]
        sound = isinstance(base, str) and rank >= 1 and 0 < alpha < math.inf and config["peft_type"] == "LORA"
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error})") from None
    if not sound:
        raise ValueError(f"{file} does not describe a LoRA adapter")
    for name, value in sorted(config.items()):
        if value and name not in HARMLESS and value not in HARMLESS_VALUES.get(name, []):
            raise ValueError(f"{file}: {name} {json.dumps(value)[:80]} is not supported")
    return config


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Give the model, a plain one, the adapter of a folder, and freeze the rest. Raises ValueError: it does not fit."""
    config, file = read_config(path), Path(path) / WEIGHTS
    try:
        with safe_open(file, "pt") as saved:
            base, weights = (saved.metadata() or {}).get("base"), {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from None
    modules = dict(backbone(model).named_modules())
    names = sorted({key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in weights if ".lora_A." in key})
    model.requires_grad_(False)
    for name in names:
        A, B = (weights.pop(f"{PREFIX}{name}.lora_{x}.weight", torch.empty(0)) for x in "AB")
        linear, r = modules.get(name), config["r"]
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{file}: {name} is no linear layer of the base")
        if (A.shape, B.shape) != ((r, linear.in_features), (linear.out_features, r)):
            raise ValueError(f"{file}: A or B of {name} is not of rank {r}, or not of the base's size")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(f"{file}: A or B of {name} is not finite")
        put_in(model, name, LoRALinear(linear, A, B, config["lora_alpha"]))
    if weights or not names:
        raise ValueError(f"{file}: {min(weights, default='no adapter')} is not supported")
    read = not any(layer.base.weight.is_meta for layer in lora_layers(model).values())
    if base and read and base != fingerprint(model):
        raise ValueError(f"{file} was trained on another base: its weights have changed since")
