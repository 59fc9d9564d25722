"""The policy pi_theta of RARL (arXiv 2601.20585): a Qwen2.5-VL that is sampled and scored **once per group**.

Version 2026.11 of "RARL, by hand"; runs with Python 3.11, torch 2.13, transformers 5.23.

GRPO asks G answers to the same question. The usual implementation repeats the prompt G times: G vision passes and G
prefills to sample, and G forwards over the prompt to score. Here the prompt is encoded once per group:

  1. `generate` runs vision and prefill once per prompt. While it decodes, the G queries of a group attend to the *one*
     copy of the prompt's keys and values and to their own, under one softmax.
  2. `logprobs` runs a packed row without padding: [prompt | answer 1 | ... | answer G], or of several prompts
     [prompts | answers to prompt 1 | answers to prompt 2 | ...]. Positions restart at the prompt's end for every answer,
     and an answer attends to the prompt and to itself.

Both are exact: the log-probs and gradients are those of G copies, for about 1/G of the work where prompts are long
(images) and answers short (JSON). The two stand side by side below and share `prompt_inputs` (embeddings, positions),
`answer_positions` and `sampling_logits` (temperature, tokens never sampled), so they cannot disagree on them.

Importing this file switches cuDNN's attention off (see below) and registers two attention functions in transformers.

Legend of shapes:  B prompts  G answers per prompt  N = B*G  P prompt tokens  T answer tokens  V vocabulary
                   C hidden size  H query heads  K key/value heads (H = K*R)  D head size  S image patches
"""

import copy
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

try:
    from transformers import AttentionInterface, AutoConfig, AutoTokenizer, DynamicCache, GenerationConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as Backbone
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ImportError as error:
    from transformers import __version__ as found

    raise ImportError(f"transformers {found} is not a version for rarl.py ({error}): see requirements.txt") from None

# cuDNN's attention may give NaN gradients under a mask (torch 2.11 to 2.13, pytorch issue 196678, found with Qwen2.5),
# and it plans every new shape anew. Flash and memory-efficient attention have neither fault.
torch.backends.cuda.enable_cudnn_sdp(False)


class ModelError(ValueError):
    """The model cannot be used. The message names the folder or file, what is wrong with it, and the way out."""


class Prompt(Protocol):
    """What a prompt has to have. data.Prompt is one."""

    ids: Tensor  # (P,) int64, every image as a run of <|image_pad|>
    pixels: Tensor  # patches of all images: (S, 588) uint8, or (S, 1176) float as transformers' processor gives them
    grid: Tensor  # (n, 3) int64, (1, rows, columns) of patches of each image
    features: Tensor | None  # (image tokens, C), the vision tower's output if it is known already: `encode_images`


# --------------------------------------------------------------------------------------------------------------------
# The policy


def float_patches(pixels: Tensor, levels: Tensor, frames: int) -> Tensor:
    """uint8 patches (S, 3 * patch * patch) -> (S, 3 * frames * patch * patch), what transformers' processor makes of them.

    A still image is a film of equal frames. `levels` is `color_levels`. Patches that are no bytes stay as they are.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    colors = pixels.int().view(len(pixels), 3, -1).unbind(1)  # 3 of (S, patch * patch)
    normalized = torch.stack([level[color] for level, color in zip(levels, colors, strict=True)], 1)
    return normalized[:, :, None].expand(-1, -1, frames, -1).flatten(1)


def color_levels(image_processor: Any) -> Tensor:
    """(3, 256) float32: what transformers' processor makes of each byte of a red, green, blue pixel, bit for bit.

    It rounds where the processor rounds: a float64 product, float32 afterwards.
    """
    mean, std = torch.tensor([image_processor.image_mean, image_processor.image_std])[..., None]  # (3, 1) each
    return ((torch.arange(256, dtype=torch.float64) * image_processor.rescale_factor).float() - mean) / std


class PatchEmbed(Qwen2_5_VisionPatchEmbed):
    """transformers' patch embedding is a convolution whose stride is its kernel. A matrix product gives the same, faster.

    It also takes a list with the pixels of each prompt, because all pixels in one tensor would be the largest tensor of
    a rollout, and bytes, which are normalised here: on their way they take an eighth of the room.
    """

    levels: Tensor  # (3, 256), see color_levels

    def forward(self, pixels: Tensor | list[Tensor]) -> Tensor:
        weight = self.proj.weight.flatten(1)  # (C, 3, temporal, patch, patch) -> (C, 1176)
        levels, frames = self.levels.to(weight.dtype), self.proj.weight.shape[2]
        parts = [part.to(weight.device) for part in ([pixels] if isinstance(pixels, Tensor) else pixels)]
        floats = (float_patches(part, levels, frames).to(weight.dtype) for part in parts)
        return torch.cat([F.linear(part, weight) for part in floats])  # (S, C)


class Policy(nn.Module):
    """A Qwen2.5-VL with its tokenizer and image processor. Calling it is `logprobs`, so that FSDP's root hooks run.

    It changes the model that it is given: its attention functions, its patch embedding, its generation_config.
    """

    model: Any  # transformers' Qwen2_5_VLForConditionalGeneration
    eos_id: int
    banned: Tensor  # (V,) bool, tokens that are never sampled

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        super().__init__()
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        model.set_attn_implementation(ATTENTION)
        patches = model.model.visual.patch_embed
        patches.__class__ = PatchEmbed  # same parameters under the same names
        patches.register_buffer("levels", color_levels(image_processor).to(model.device), persistent=False)
        self.eos_id = tokenizer.eos_token_id
        # Never sampled: every special token but EOS (image, vision, padding, chat marks), and the rows beyond the
        # tokenizer that pad the embedding matrix. None belongs in an answer, and decoders often hide them: a policy
        # could put garbage into an answer that looks perfect.
        banned = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
        banned[len(tokenizer) :] = True
        for index, token in tokenizer.added_tokens_decoder.items():
            banned[index] |= token.special and index != self.eos_id
        self.register_buffer("banned", banned.to(model.device), persistent=False)
        # Saved with the weights, so that whoever runs the policy with other software samples as it was trained:
        # Qwen's own file has a repetition penalty and a second EOS.
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, eos_token_id=self.eos_id,
            pad_token_id=tokenizer.pad_token_id, suppress_tokens=banned.nonzero().flatten().tolist() or None,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, *arguments) -> tuple[Tensor, Tensor]:
        return _packed_logprobs(self, *arguments)


def check_path(path: str) -> None:
    """Raise ModelError if the path is neither a folder nor a possible hub id. Asking the hub for it would be slow.

    "owner/name" may be a hub id, but not if there is a folder `owner` here or if it is runs/, where training writes:
    then `name` was mistyped.
    """
    owner = os.path.dirname(path)
    mistyped = path.count("/") != 1 or path[0] in "./~" or os.path.exists(owner) or owner == "runs"
    if mistyped and not os.path.isdir(path):
        raise ModelError(f"model folder {path} does not exist")


def load_policy(
    path_or_hub_id: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Policy:
    """A policy from a Hugging Face folder or hub id (Qwen2.5-VL: config, safetensors, tokenizer, image processor).

    Training keeps float32 weights (lr 1e-6 vanishes in bf16) and computes in bf16 under autocast. Weights are read
    from safetensors only. Raises ModelError when a file is missing or damaged or does not fit the others, when a weight
    is not finite, and for a device that is not there. On the device "meta" weights and buffers have no values: nothing
    is read but the small files.
    """
    path = str(path_or_hub_id)
    check_path(path)
    empty = str(device) == "meta"
    what, way_out = f"use device {str(device)!r}", "try cpu"
    try:
        torch.zeros(1, device="cpu" if empty else device).item()
        what, way_out = "read config.json", "copy that file again from where the model came from"
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"the model is a {config.model_type}, and this code runs qwen2_5_vl")
        text, vision = config.text_config, config.vision_config
        if 2 * sum(text.rope_parameters["mrope_section"]) * text.num_attention_heads != text.hidden_size:
            raise ValueError("its mrope_section, hidden_size and num_attention_heads do not fit each other")
        what = "read its tokenizer (tokenizer.json, tokenizer_config.json, chat_template.jinja)"
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        _check_tokenizer(tokenizer, config)
        what = "read preprocessor_config.json"
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        if (processor.patch_size, processor.merge_size) != (vision.patch_size, vision.spatial_merge_size):
            raise ValueError("its patches are not those of config.json")
        if torch.tensor([processor.image_mean, processor.image_std]).shape != (2, 3):
            raise ValueError("its image_mean and image_std are not three numbers each")
        what = "read its weights (model.safetensors, generation_config.json)"
        if empty:
            with torch.device("meta"):
                model = Backbone._from_config(config, dtype=dtype)
        else:
            options: dict[str, Any] = dict(use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
            loaded: Any = Backbone.from_pretrained(path, dtype=dtype, **options)
            model, keys = loaded
            _check_weights(model, keys)
        policy = Policy(model.eval(), tokenizer, processor)
    except Exception as error:  # tokenizers raises plain Exceptions; damaged JSON makes transformers raise anything
        said = " ".join(str(error).split()).split(". ")[0]
        reason = textwrap.shorten(said, 300, placeholder=" ...") or type(error).__name__
        if not os.path.isdir(path) and isinstance(error, OSError):
            way_out = "check the name, the connection and HF_HUB_OFFLINE, or give a folder that holds the model"
        raise ModelError(f"model {path}: cannot {what} ({reason}): {way_out}") from None
    return policy.to(device)


def _check_tokenizer(tokenizer: Any, config: Any) -> None:
    """The tokenizer of another model, or a part that fell back to a default, would change the answers silently."""
    ends, image = config.text_config.eos_token_id, [{"role": "user", "content": "<|image_pad|>"}]
    fits = (
        tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends]),
        tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id,
        len(tokenizer) <= config.text_config.vocab_size,
    )
    if not all(fits):
        raise ValueError("its eos_token, its <|image_pad|> or its size is not that of config.json")
    if "<|image_pad|>" not in tokenizer.apply_chat_template(image, tokenize=False):
        raise ValueError("its chat template drops the images")


def _check_weights(model: nn.Module, keys: dict[str, Any]) -> None:
    """transformers gives random numbers to weights that it does not find, and only warns."""
    mismatched = [name for name, *_ in keys["mismatched_keys"]]
    for names, fault in (
        (keys["missing_keys"], "is missing"),
        (keys["unexpected_keys"], "has no place in the model of config.json"),
        (mismatched, "has another shape than config.json says"),
        ([name for name, weight in model.named_parameters() if not weight.isfinite().all()], "is not finite"),
    ):
        if names:
            raise ValueError(f"{min(names)} {fault}")


def save_policy(
    policy: Policy, path: str | Path, state_dict: dict[str, Tensor] | None = None, shard_size: str = "50GB"
) -> None:
    """Write a Hugging Face folder that transformers (and whatever builds on it) loads as it is.

    state_dict  weights to write in the place of the policy's own, such as those gathered from several processes
    shard_size  the largest file of weights
    """
    policy.model.save_pretrained(path, state_dict=state_dict, max_shard_size=shard_size)
    # transformers writes the dtype of the model, which need not be that of the weights in `state_dict`.
    written = next(iter((state_dict or policy.model.state_dict()).values())).dtype
    config = copy.deepcopy(policy.model.config)
    config.dtype = config.text_config.dtype = config.vision_config.dtype = written
    config.save_pretrained(path)
    for file in Path(path).glob("*.safetensors"):  # safetensors makes them readable for their owner alone
        file.chmod((Path(path) / "config.json").stat().st_mode)
    policy.tokenizer.save_pretrained(path)
    policy.image_processor.save_pretrained(path)


def cast_copy(
    policy: Policy, dtype: torch.dtype, kind: type[nn.Module] = nn.Module, device: torch.device | None = None
) -> Policy:
    """A frozen copy whose weights have `dtype`. Buffers keep theirs: rotary frequencies in bf16 would move positions.

    kind    of modules whose weights are cast; those of others, and those that such a module shares with others, keep theirs
    device  where the weights go, one by one, so that the copy never exists where the policy is; buffers stay there.
            Weights without values (on "meta") have none there either
    """
    others = (module for module in policy.modules() if not isinstance(module, kind))
    kept = {id(p) for module in others for p in module.parameters(recurse=False)}

    def cast(p: Tensor) -> Tensor:
        new = torch.empty_like(p, dtype=p.dtype if id(p) in kept else dtype, device=device or p.device)
        return new if p.is_meta else new.detach().copy_(p.detach())

    # deepcopy takes what the memo already holds: the weights are copied once, in `dtype`, and tied ones stay tied.
    memo = {id(p): nn.Parameter(cast(p), requires_grad=False) for p in policy.parameters()}
    return copy.deepcopy(policy, memo)


# What `decode` puts at the end of an answer that was cut. It is a second JSON list, so reward.py finds no answer in the text:
# a policy that lists everything and then goes on with white space to the limit has not learned to stop, and earns nothing.
# The line break and the dots end any string or list that the answer was cut in. Otherwise the mark might become part of it.
CUT = '\n... ["cut off"]'


def decode(policy: Policy, ids: Tensor, mask: Tensor) -> list[str]:
    """(N, T) tokens -> N texts, without the closing EOS and without what the mask leaves out. One without EOS ends in CUT."""
    rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
    ended = [row[-1:] == [policy.eos_id] for row in rows]
    rows = [row[:-1] if end else row for row, end in zip(rows, ended, strict=True)]
    texts = policy.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text if end else text + CUT for text, end in zip(texts, ended, strict=True)]


def encode(policy: Policy, texts: list[str]) -> list[Tensor]:
    """Texts -> token ids, each closed by EOS: an answer as the policy itself would have to write it."""
    rows = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [torch.tensor([*ids, policy.eos_id]) for ids in rows]


# --------------------------------------------------------------------------------------------------------------------
# Shared by sampling and scoring


def rope_positions(ids: Tensor, grid: Tensor, image_token: int, merge: int) -> Tensor:
    """(P,) token ids, (n, 3) grids -> (3, P) positions: Qwen2-VL's multimodal RoPE (arXiv 2409.12191, section 2.1).

    Text counts up in all three rows. An image that starts at position p has (p, p + row, p + column) at its tokens,
    and what follows it goes on at p + max(rows, columns): a big image takes many tokens but few positions.
    """
    pieces, position, start = [], 0, 0
    is_image = ids == image_token
    for _, rows, columns in (grid // torch.tensor([1, merge, merge])).tolist():
        first = start + int(is_image[start:].int().argmax())  # the image's first token
        text = torch.arange(first - start) + position
        position += first - start
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        image = torch.stack([torch.zeros_like(y), y, x]).reshape(3, -1) + position
        pieces += [text.expand(3, -1), image]
        position += max(rows, columns)
        start = first + rows * columns
    pieces.append((torch.arange(len(ids) - start) + position).expand(3, -1))
    return torch.cat(pieces, dim=1)


def image_features(policy: Policy, prompts: Sequence[Prompt]) -> list[Tensor]:
    """One pass of the vision tower over all images of all prompts -> for each prompt (its image tokens, C)."""
    visual = policy.model.model.visual
    grid = torch.cat([p.grid for p in prompts])
    features = visual([p.pixels for p in prompts], grid.to(policy.device)).pooler_output  # (image tokens of all, C)
    return features.split([int(p.grid.prod(1).sum()) // visual.spatial_merge_size**2 for p in prompts])


@torch.no_grad()
def encode_images(policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Set the `features` of each prompt; they are then used in the place of its pixels. For a frozen vision tower only."""
    for prompt, features in zip(prompts, image_features(policy, prompts), strict=True):
        prompt.features = features


@dataclass
class PromptInputs:
    """B prompts one behind the other, L tokens in all."""

    embeds: Tensor  # (L, C) embeddings of text and images
    positions: Tensor  # (3, L)
    lengths: list[int]  # B, tokens of each prompt
    answer_start: Tensor  # (B,) position of an answer's first token


def prompt_inputs(policy: Policy, prompts: Sequence[Prompt]) -> PromptInputs:
    """Token embeddings with the images' features in their places. One pass of the vision tower for all images."""
    model, config, device = policy.model.model, policy.model.config, policy.device
    merge = config.vision_config.spatial_merge_size
    positions = [rope_positions(p.ids, p.grid, config.image_token_id, merge) for p in prompts]
    answer_start = torch.stack([x.max() + 1 for x in positions])
    ids = torch.cat([p.ids for p in prompts]).to(device)
    known = [p.features for p in prompts if p.features is not None]
    features = torch.cat(known if len(known) == len(prompts) else image_features(policy, prompts))
    # masked_scatter fills the places in their order, which is the order of the images: prompt by prompt, image by image.
    embeds = model.language_model.embed_tokens(ids)  # (L, C)
    embeds = embeds.masked_scatter((ids == config.image_token_id)[:, None], features.to(embeds.dtype))
    lengths = [len(p.ids) for p in prompts]
    return PromptInputs(embeds, torch.cat(positions, dim=1).to(device), lengths, answer_start.to(device))


def answer_positions(inputs: PromptInputs, length: int) -> Tensor:
    """(3, B, length) positions of answer tokens. Every answer is plain text that starts where the prompt ends."""
    steps = torch.arange(length, device=inputs.answer_start.device)
    return (inputs.answer_start[:, None] + steps).expand(3, -1, -1)


class Float32Product(torch.autograd.Function):
    """(M, C) hidden, (V, C) weight, both bf16 -> (M, V) float32. Rounded to bf16, logits from 16 to 32 are multiples of 0.125.

    torch has this product on a GPU alone, and without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        return grad @ weight, grad.t() @ hidden


def sampling_logits(policy: Policy, hidden: Tensor, temperature: float) -> Tensor:
    """(..., C) hidden states -> (..., V) float32 logits of the distribution that answers are sampled from."""
    head = policy.model.lm_head
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else head.weight.dtype
    if hidden.is_cuda and half != torch.float32:
        rows = Float32Product.apply(hidden.flatten(0, -2).to(half), head.weight.to(half))
        logits = rows.view(*hidden.shape[:-1], -1)
    else:
        logits = head(hidden).float()
    return (logits / temperature).masked_fill(policy.banned, -torch.inf)


# --------------------------------------------------------------------------------------------------------------------
# Sampling: prefill once, decode G answers from one copy of the prompt


@dataclass
class Rollout:
    """Sampled answers, N = B*G rows, answer g of prompt b in row b*G + g.

    ids   (N, T) int64    tokens; after an answer's end: EOS as filler
    mask  (N, T) bool     the answer's tokens, its EOS among them: without it the policy is never taught to stop
    logp  (N, T) float32  log-prob of each token under the sampling distribution; 0 where the mask is False
    """

    ids: Tensor
    mask: Tensor
    logp: Tensor

    def padded(self, width: int, filler: int) -> "Rollout":
        """A copy with room for `width` tokens, at least as many as there are."""
        more = (0, width - self.ids.shape[1])
        return Rollout(F.pad(self.ids, more, value=filler), F.pad(self.mask, more), F.pad(self.logp, more))


def concatenate(parts: Sequence[Rollout], filler: int) -> Rollout:
    """Rollouts of different prompts as one, padded to the longest."""
    width = max(part.ids.shape[1] for part in parts)
    parts = [part.padded(width, filler) for part in parts]
    return Rollout(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "mask", "logp")))


class Cache:
    """Keys and values of every layer, those of a group in one row: [prompt | token 0 of its G answers | token 1 of them | ...].

    The prompt stands there once. After token t the first P + (t + 1) G places of the S = P + T G are filled, and one call of
    attention serves all queries of a group: the bias hides from each the tokens of the other answers.
    """

    def __init__(
        self, layers: list[tuple[Tensor, Tensor]], real: Tensor, rotary: tuple[Tensor, Tensor], G: int, R: int
    ):
        """layers  per layer keys and values, two (B, S, K, D)    real  (B, P) bool, false at padding
        rotary  two (B, T, D): cos and sin of the answers' positions (see `rotate`)    R  query heads per key/value head
        """
        self.layers, self.real, self.rotary, self.G, self.R = layers, real, rotary, G, R
        own = torch.eye(G, dtype=torch.bool, device=real.device).repeat(1, rotary[0].shape[1])  # (G, T*G)
        seen = torch.cat([real[:, None].expand(-1, G, -1), own.expand(len(real), -1, -1)], dim=-1)  # (B, G, S)
        # A row per query, R of each answer. They begin at multiples of 16, as a GPU's attention wants them.
        hidden = ~F.pad(seen, (0, -seen.shape[-1] % 16)).repeat_interleave(R, dim=1)[:, None]
        keys = layers[0][0]
        self.bias = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device).masked_fill(hidden, -torch.inf)

    def keep(self, prompts: Tensor, answers: Tensor) -> "Cache":
        """The cache of B' prompts and G' answers of each.  prompts (B',), answers (B', G')"""
        P, T, rows = self.real.shape[1], self.rotary[0].shape[1], prompts[:, None]
        steps = torch.arange(T, device=prompts.device)[:, None] * self.G + answers[:, None] + P  # (B', T, G')
        places = torch.cat([torch.arange(P, device=prompts.device).expand(len(prompts), P), steps.flatten(1)], dim=1)
        layers = [(k[rows, places], v[rows, places]) for k, v in self.layers]
        cos, sin = self.rotary
        return Cache(layers, self.real[prompts], (cos[prompts], sin[prompts]), answers.shape[1], self.R)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Qwen2: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    The first half of `sin` is negative, so that x needs no change of sign: (x1, x2) cos + (x2, x1) (-sin, sin).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """What a norm of the backbone gives, by torch's own operator: one kernel on a GPU, in the place of six."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def group_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of one new token of each answer of a group to the shared prompt and to the answer's own tokens.

    q (B, G, H, D)   keys, values (B, S, K, D)   bias (B, 1, G*R, S)   ->  (B, G, H*D)
    Attention logits are float32 inside the call: real Qwen2.5 has hundreds there, where bf16 counts in steps of 1 or 2.
    """
    q = q.unflatten(2, (keys.shape[2], -1)).transpose(1, 2)  # (B, K, G, R, D): all queries that share a key/value head
    out = F.scaled_dot_product_attention(q.flatten(2, 3), keys.transpose(1, 2), values.transpose(1, 2), bias)
    return out.view(q.shape).transpose(1, 2).flatten(2)


def prefill(policy: Policy, prompts: Sequence[Prompt], group_size: int, length: int) -> tuple[Cache, Tensor]:
    """Encode the prompts once. -> the cache, with room for `length` tokens of each answer; (B, C) last hidden state."""
    inputs = prompt_inputs(policy, prompts)
    language, text = policy.model.model.language_model, policy.model.config.text_config
    packing = Packing(inputs.lengths, [], policy.device)
    out = language(
        inputs_embeds=inputs.embeds[None],
        position_ids=inputs.positions[:, None],
        attention_mask={"full_attention": packing},
        past_key_values=DynamicCache(config=text),
        use_cache=True,
    )
    last = out.last_hidden_state[0, packing.ends]  # (B, C)

    def apart(x: Tensor) -> Tensor:  # (1, K, L, D), keys are rotated already -> (B, P + room for the answers, K, D)
        rows = pad_sequence(x[0].transpose(0, 1).split(inputs.lengths), batch_first=True)
        return F.pad(rows, (0, 0, 0, 0, 0, length * group_size))

    layers = []
    for layer in out.past_key_values.layers:
        layers.append((apart(layer.keys), apart(layer.values)))
        layer.keys = layer.values = None  # the two caches never exist side by side
    lengths = torch.tensor(inputs.lengths, device=last.device)
    real = torch.arange(max(inputs.lengths), device=last.device) < lengths[:, None]
    cos, sin = language.rotary_emb(last, answer_positions(inputs, length))  # (B, length, D) each
    signed = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], dim=-1)
    return Cache(layers, real, (cos, signed), group_size, text.num_attention_heads // text.num_key_value_heads), last


def decode_step(policy: Policy, cache: Cache, tokens: Tensor, t: int) -> Tensor:
    """Push token t of every answer through the backbone's own weights. tokens (B, G) -> hidden (B, G, C)."""
    language, G = policy.model.model.language_model, cache.G
    begin = cache.real.shape[1] + t * G
    new, filled = slice(begin, begin + G), slice(begin + G)  # places in the cache: of these tokens, of all so far
    cos, sin = (x[:, t, None, None] for x in cache.rotary)  # (B, 1, 1, D)
    bias = cache.bias[..., filled]
    x = language.embed_tokens(tokens)  # (B, G, C)
    for layer, (keys, values) in zip(language.layers, cache.layers, strict=True):
        h, attention, (K, D) = rms_norm(layer.input_layernorm, x), layer.self_attn, keys.shape[2:]
        q_and_k = torch.cat([attention.q_proj(h), attention.k_proj(h)], dim=-1).unflatten(-1, (-1, D))
        q, keys[:, new] = rotate(q_and_k, cos, sin).split([cache.R * K, K], dim=2)  # (B, G, H or K, D)
        values[:, new] = attention.v_proj(h).unflatten(-1, (K, D))
        x = x + attention.o_proj(group_attention(q, keys[:, filled], values[:, filled], bias))
        x = x + layer.mlp(rms_norm(layer.post_attention_layernorm, x))
    return rms_norm(language.norm, x)


def draw_uniforms(generator: torch.Generator | list[torch.Generator] | None, B: int, G: int, T: int) -> Tensor:
    """(B, G, T) numbers in [0, 1), each on the device of its generator.

    All randomness of a rollout is drawn here. Every answer turns its own numbers into tokens (`sample_tokens`), so it
    does not change when finished neighbours are dropped.
    """
    generators = generator if isinstance(generator, list) else [generator] * B
    return torch.stack([torch.rand(G, T, generator=g, device=g.device if g else None) for g in generators])


def sample_tokens(logps: Tensor, uniform: Tensor) -> Tensor:
    """Tokens by the inverse of the cumulative distribution.  logps (..., V), uniform (...) in [0, 1) -> (...)"""
    cumulative = logps.double().exp().cumsum(-1)
    # The first index whose cumulative probability exceeds u * total. A token of probability 0 cannot be it.
    u = (uniform * cumulative[..., -1]).unsqueeze(-1)
    token = torch.searchsorted(cumulative, u, right=True).clamp(max=logps.shape[-1] - 1)
    # Rounding may choose one all the same: on a GPU the parallel sum need not be monotone. Its log-prob of -inf would ruin
    # the update, so the most likely token takes its place.
    impossible = logps.gather(-1, token).isneginf()
    return torch.where(impossible, logps.argmax(-1, keepdim=True), token).squeeze(-1)


def choose_unfinished(alive: Tensor) -> tuple[Tensor, Tensor] | None:
    """Which prompts and answers decoding goes on with: (B',) and (B', G'), unfinished answers first. None: with all.

    alive (B, G) bool. The answers stay a rectangle, so that one matmul serves all. Finished ones are dropped once they
    are a quarter of it, and not at once, because copying the cache costs time too.
    """
    open_prompts, width = alive.any(1), int(alive.sum(1).max())
    if int(open_prompts.sum()) * width > 0.75 * alive.numel():
        return None
    prompts = open_prompts.nonzero().squeeze(1)
    return prompts, alive[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :width]


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Rollout:
    """Sample `group_size` answers to each prompt (GRPO's rollout), plain temperature sampling, no top-k or top-p.

    prompts      B of them, lengths and numbers of images may differ
    temperature  >= 0; 0 takes the most likely token (log-probs are then those at temperature 1)
    generator    one for the whole batch, or one per prompt: then an answer depends on its prompt's generator alone,
                 not on its neighbours in the batch, nor on how many processes share the work
    returns      Rollout of N = B * group_size rows, T <= max_new_tokens

    An answer that does not end within max_new_tokens has no EOS. Raises ValueError for settings out of range.
    Source: arXiv 2402.03300, section 4.1 (G outputs sampled from the old policy); sharing the prompt is ours.
    """
    B, G, T, device = len(prompts), group_size, max_new_tokens, policy.device
    if B == 0 or G < 1 or T < 1 or not 0 <= temperature < torch.inf:
        raise ValueError("generate needs prompts, group_size >= 1, max_new_tokens >= 1 and temperature >= 0")
    if isinstance(generator, list) and len(generator) != B:
        raise ValueError(f"generate needs one generator, or one for each of {B} prompts, not {len(generator)}")
    uniform = draw_uniforms(generator, B, G, T).to(device)
    ids = torch.full((B, G, T), policy.eos_id, device=device)
    mask = torch.zeros(B, G, T, dtype=torch.bool, device=device)
    logp = torch.zeros(B, G, T, device=device)

    cache, hidden = prefill(policy, prompts, G, T)
    hidden = hidden[:, None].expand(-1, G, -1)  # the first token has one distribution per group
    # What is decoded, (B', G') each: the answers' places in `ids`, and whether they go on.
    prompt_of = torch.arange(B, device=device)[:, None].expand(B, G)
    answer_of = torch.arange(G, device=device).expand(B, G)
    alive = torch.ones(B, G, dtype=torch.bool, device=device)
    # Reading `alive` makes the CPU wait for a GPU. There it is read every eighth step only: a few steps on finished
    # answers cost less than so many waits.
    interval = 8 if device.type == "cuda" else 1
    for t in range(T):
        logps = sampling_logits(policy, hidden, temperature or 1.0).log_softmax(-1)  # (B', G', V)
        u = uniform[prompt_of, answer_of, t]  # (B', G')
        token = sample_tokens(logps, u) if temperature > 0 else logps.argmax(-1)  # (B', G')
        token = torch.where(alive, token, policy.eos_id)
        ids[prompt_of, answer_of, t], mask[prompt_of, answer_of, t] = token, alive
        logp[prompt_of, answer_of, t] = torch.where(alive, logps.gather(-1, token.unsqueeze(-1)).squeeze(-1), 0.0)
        alive = alive & (token != policy.eos_id)  # the EOS itself was still part of the answer
        if t + 1 == T:
            break
        if t % interval == 0:
            if not alive.any():
                break
            if (kept := choose_unfinished(alive)) is not None:
                cache, at = cache.keep(*kept), (kept[0][:, None], kept[1])
                prompt_of, answer_of, alive, token = prompt_of[at], answer_of[at], alive[at], token[at]
        hidden = decode_step(policy, cache, token, t)
    longest = int(mask.sum(-1).max())
    return Rollout(*(x[:, :, :longest].reshape(B * G, longest) for x in (ids, mask, logp)))


# --------------------------------------------------------------------------------------------------------------------
# Scoring: one packed row, each prompt in it once


class Packing:
    """A row of L tokens without padding: [prompt 1 | ... | prompt B | answers of prompt 1 | ... | answers of prompt B].

    The attention function gets it in the place of a mask. A prompt sees itself, an answer sees its prompt and itself, both
    causally.
    """

    def __init__(self, prompts: list[int], answers: list[int], device: torch.device) -> None:
        """Lengths of B prompts and of B*G answers (or of none)."""
        B, N, self.device = len(prompts), len(answers), device
        self.lengths = prompts + answers  # of the row's pieces
        self.sees = [[b] for b in range(B)] + [[n * B // N, B + n] for n in range(N)]  # the pieces that each piece sees
        self.ends = torch.tensor(prompts).cumsum(0).to(device) - 1  # (B,) places of the prompts' last tokens

    @cached_property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """All keys' places, the bounds of queries and of keys, the longest of each: what variable-length attention takes."""
        pieces = torch.arange(sum(self.lengths)).split(self.lengths)
        pairs = [(x, torch.cat([pieces[i] for i in sees])) for x, sees in zip(pieces, self.sees, strict=True) if len(x)]
        queries, keys = zip(*pairs, strict=True)
        q, k = ([len(x) for x in places] for places in (queries, keys))
        bounds = [torch.tensor([0, *lengths]).cumsum(0).int().to(self.device) for lengths in (q, k)]
        return torch.cat(keys).to(self.device), bounds[0], bounds[1], max(q), max(k)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Exact attention of a packed row: query (1, H, L, D), key and value (1, K, L, D) -> (1, L, H, D), None

    One mask over all L x L pairs would give the same numbers. Most of its pairs would be forbidden.
    """
    packing = attention_mask
    if not isinstance(packing, Packing):  # a call of the backbone in the usual way, with a usual mask
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotary embedding leaves float32
    # A causal mask ends at a piece's last query and last key, so an answer sees all of its prompt.
    if has_varlen(query):
        places, bounds_q, bounds_k, longest_q, longest_k = packing.sequences
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, D)
        attended: Any = varlen_attn(
            q, k[places], v[places], bounds_q, bounds_k, longest_q, longest_k,
            scale=scaling, window_size=(-1, 0), enable_gqa=True,
        )  # fmt: skip
        return attended[None], None
    # Elsewhere one call for each piece. Pieces are views of the row, not gathered from it: the backward pass then adds what
    # the answers of a prompt ask of its keys in their order. That of a gather adds in an order that threads decide.
    q, k, v = (x.split(packing.lengths, dim=2) for x in (query, key, value))  # (1, heads, T or P, D) each
    parts = []
    for x, sees in zip(q, packing.sees, strict=True):
        y, z = (torch.cat([pieces[i] for i in sees], dim=2) for pieces in (k, v))  # (1, K, S, D)
        T, S = x.shape[2], y.shape[2]
        seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if S > T else None  # None: a prompt
        parts.append(F.scaled_dot_product_attention(x, y, z, seen, is_causal=S == T, scale=scaling, enable_gqa=True))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def has_varlen(x: Tensor) -> bool:
    """Whether torch's variable-length attention takes it: half precision, on a GPU that computes in bf16 without emulation
    (compute capability 8.0). Callers have a second way, with the same numbers, for everything else."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and torch.cuda.is_bf16_supported(including_emulation=False)


def window_attention(
    module: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float, cu_seq_lens_q: Tensor, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention within each window (or image) of the vision tower: query, key, value (1, H, S, D) -> (1, S, H, D), None

    cu_seq_lens_q (W+1,) are the windows' bounds. transformers calls attention once per window, thousands of times for a
    batch of photographs. Here windows of one length share a call, and a GPU takes all of them in one.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, H, D)
    if has_varlen(q):
        bounds, longest = cu_seq_lens_q.int(), kwargs["max_length_q"]
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling)[None], None  # type: ignore[call-overload]
    start, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (windows, length, H, D) each -> the same shape
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)

    if (lengths == lengths[0]).all():  # usual: images of one size, whose windows lie side by side already
        return attend(*(x.unflatten(0, (len(lengths), -1)) for x in (q, k, v))).flatten(0, 1)[None], None
    out = torch.empty_like(q)
    for length in lengths.unique():
        tokens = start[lengths == length, None] + torch.arange(int(length), device=q.device)  # (windows, length)
        out[tokens] = attend(*(x[tokens] for x in (q, k, v)))
    return out[None], None


AttentionInterface.register("rarl", packed_attention)
AttentionMaskInterface.register("rarl", sdpa_mask)
# transformers hands the windows' bounds over only to attentions with "flash" in their name.
AttentionInterface.register("rarl_flash_windows", window_attention)
ATTENTION = {"text_config": "rarl", "vision_config": "rarl_flash_windows"}

HEAD_ELEMENTS = 2**27  # logits held at once: 512 MB in float32, a few times in the backward pass


def _token_logprobs(policy: Policy, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(M, C) hidden states, (M,) tokens -> log-prob of each token and entropy of its distribution, both (M,)."""

    def chunk(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = sampling_logits(policy, h, temperature)  # (m, V)
        logz = logits.logsumexp(-1)
        with torch.no_grad():  # entropy is a statistic, not part of the objective.  H = log Z - sum_v p_v logit_v
            p = (logits - logz[:, None]).exp()
            entropy = logz - (p * logits.masked_fill(policy.banned, 0.0)).sum(-1)
        return logits.gather(-1, target[:, None]).squeeze(-1) - logz, entropy

    # The logits of all positions would be the largest tensor of the step (V = 152k). A checkpointed chunk keeps only its
    # hidden states, and computes its logits again in the backward pass.
    size = max(1, HEAD_ELEMENTS // policy.banned.numel())
    parts = [
        checkpoint(chunk, h, target, use_reentrant=False)
        for h, target in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _packed_logprobs(
    policy: Policy, prompts: Sequence[Prompt], ids: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """What `logprobs` returns, by one forward of the packed row."""
    inputs = prompt_inputs(policy, prompts)
    N, T = ids.shape
    G = N // len(prompts)
    ids, mask = ids.to(policy.device), mask.to(policy.device).bool()
    language = policy.model.model.language_model
    # An answer's last token does not go in, because nothing has to be predicted after it.
    goes_in = mask[:, 1:]  # (N, T-1)
    answers = language.embed_tokens(ids[:, :-1][goes_in])  # (answer tokens, C)
    positions = answer_positions(inputs, T - 1).repeat_interleave(G, dim=1)[:, goes_in]  # each from its prompt's end
    packing = Packing(inputs.lengths, goes_in.sum(1).tolist(), policy.device)
    hidden = language(
        inputs_embeds=torch.cat([inputs.embeds, answers])[None],
        position_ids=torch.cat([inputs.positions, positions], dim=1)[:, None],
        attention_mask={"full_attention": packing},
        use_cache=False,
    ).last_hidden_state[0]  # (L, C)
    # Token 0 of an answer is predicted at its prompt's last token, token t at token t-1, which went in. Answers share their
    # prompt's end as a repeated row, not by hidden[places]: its backward pass would add in an order that threads decide.
    ends = hidden[packing.ends].repeat_interleave(G, dim=0)  # (N, C)
    went_in = hidden[len(inputs.embeds) :]  # (answer tokens, C)
    begins = mask[:, 0]  # (N,), false for an empty answer
    targets = torch.cat([ids[begins, 0], ids[:, 1:][goes_in]])
    values = _token_logprobs(policy, torch.cat([ends[begins], went_in]), targets, temperature)

    def in_rows(x: Tensor) -> Tensor:  # (tokens to predict,) -> (N, T), 0 where the mask is 0
        firsts, others = x.split([len(x) - len(went_in), len(went_in)])  # tokens 0 of the answers, and tokens 1, 2, ...
        zeros = torch.zeros(N, T, device=x.device)
        column = zeros[:, :1].masked_scatter(begins[:, None], firsts)
        return torch.cat([column, zeros[:, 1:].masked_scatter(goes_in, others)], dim=1)

    logp, entropy = map(in_rows, values)
    return logp, entropy


def logprobs(
    policy: Policy, prompts: Sequence[Prompt], ids: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log pi_theta(o_t | prompt, o_<t) of given answers, and the entropy of each of those distributions.

    prompts  B of them      ids, mask  (B*G, T), answer g of prompt b in row b*G + g; the mask keeps a prefix of a row
    temperature  > 0, that of sampling
    returns  two (B*G, T) float32 in nats, 0 where the mask is 0; gradients flow through the log-probs, not the entropy
    Raises ValueError if the shapes do not fit each other or the temperature is not positive.
    Source: arXiv 2402.03300, section 4.1 (the pi_theta of its equation 3); the packing is ours.
    """
    if not prompts or len(ids) % len(prompts) or ids.shape != mask.shape or not temperature > 0:
        raise ValueError(f"logprobs needs ids and mask of one shape (B*G, T), B = {len(prompts)}, and temperature > 0")
    return policy(prompts, ids, mask, temperature)
