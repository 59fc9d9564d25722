"""The policy pi_theta of RARL (arXiv 2601.20585): a Qwen2.5-VL that is sampled and scored **once per group**.

GRPO asks G answers to the same question. The usual implementation repeats the prompt G times: G vision passes and G
prefills to sample, and G forwards over the prompt to score. Here the prompt is encoded once per group:

  1. `generate` runs vision and prefill once per prompt. While it decodes, the G queries of a group attend to the *one*
     copy of the prompt's keys and values and to their own, under one softmax.
  2. `logprobs` runs one packed sequence per prompt, [prompt | answer 1 | ... | answer G]. Positions restart at the
     prompt's end for every answer, and an answer attends to the prompt and to itself.

Both are exact: the same log-probs and gradients as with G copies, for about 1/G of the work where prompts are long
(images) and answers short (JSON). The two stand side by side below and share `prompt_inputs` (embeddings, positions),
`answer_positions` and `sampling_logits` (temperature, tokens never sampled), so they cannot disagree on them.

Legend of shapes:  B prompts  G answers per prompt  N = B*G  P prompt tokens  T answer tokens  V vocabulary
                   C hidden size  H query heads  K key/value heads (H = K*R)  D head size
A prompt is any object with `.ids (P,)`, `.pixels (S, 1176)`, `.grid (n, 3)`, see data.Prompt.
"""

import copy
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoTokenizer, DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# cuDNN's attention may give NaN gradients under a mask (torch 2.11 to 2.13, pytorch issue 196678, found with Qwen2.5), and
# plans every new shape anew. Flash and memory-efficient attention do neither.
torch.backends.cuda.enable_cudnn_sdp(False)


class ModelError(ValueError):
    """The model folder is not usable; the message names it and what is missing."""


# --------------------------------------------------------------------------------------------------------------------
# The policy


class PatchEmbed(Qwen2_5_VisionPatchEmbed):
    """transformers' patch embedding is a convolution whose stride is its kernel: a matrix product, only slower.

    It also takes a list of pixels, one of each prompt: joined before they are embedded, they would be the largest
    tensor of a rollout.
    """

    def forward(self, pixels: Tensor | list[Tensor]) -> Tensor:
        weight = self.proj.weight.flatten(1)  # (C, 3, temporal, patch, patch) -> (C, 1176)
        parts = [pixels] if isinstance(pixels, Tensor) else pixels
        return torch.cat([F.linear(part.to(weight.device, weight.dtype), weight) for part in parts])  # (S, C)


class Policy(nn.Module):
    """A Qwen2.5-VL with its tokenizer and image processor. Calling it is `logprobs`, so that FSDP's root hooks run."""

    eos_id: int
    banned: Tensor  # (V,) bool, what is never sampled

    def __init__(self, model, tokenizer, image_processor):
        super().__init__()
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        model.set_attn_implementation(ATTENTION)
        model.model.visual.patch_embed.__class__ = PatchEmbed  # same parameters under the same names
        self.eos_id = tokenizer.eos_token_id
        # Never sampled: every special token but EOS (image, vision, padding, chat marks), and the rows beyond the
        # tokenizer that pad the embedding matrix. None of them belongs in an answer; invisible in decoded text, they
        # would let a policy hide garbage in an answer of perfect format.
        banned = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
        banned[len(tokenizer) :] = True
        for index, token in tokenizer.added_tokens_decoder.items():
            banned[index] |= token.special and index != self.eos_id
        self.register_buffer("banned", banned.to(model.device), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, prompts, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        return _packed_logprobs(self, prompts, ids, mask, temperature)


def check_path(path: str) -> None:
    """Raise ModelError if the path is neither a folder nor a possible hub id.

    Asking the hub for it would be slow, and its error misleading. "owner/name" may be a hub id; not if there is a folder
    `owner` here, or it is runs/, where training writes: then `name` was mistyped.
    """
    owner = os.path.dirname(path)
    mistyped = path.count("/") != 1 or path[0] in "./~" or os.path.exists(owner) or owner == "runs"
    if mistyped and not os.path.isdir(path):
        raise ModelError(f"model folder {path} does not exist")


def load_policy(path_or_hub_id: str | Path, device: str | torch.device = "cpu", dtype=torch.float32) -> Policy:
    """A policy from a Hugging Face folder or hub id (Qwen2.5-VL: config, safetensors, tokenizer, image processor).

    Training keeps float32 weights (lr 1e-6 vanishes in bf16) and computes in bf16 under autocast. Weights are read
    from safetensors only. Raises ModelError when something is missing or the model is of another kind.
    """
    path = str(path_or_hub_id)
    check_path(path)
    local = os.path.isdir(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path} has no readable config.json ({str(error).splitlines()[0]})") from None
    if config.model_type != "qwen2_5_vl":
        raise ModelError(f"model {path} is a {config.model_type}; this code runs Qwen2.5-VL")
    if local and not (Path(path) / "tokenizer.json").exists() and not (Path(path) / "vocab.json").exists():
        raise ModelError(f"model folder {path} has no tokenizer (tokenizer.json): copy it from the original model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path} cannot be loaded: {str(error).splitlines()[0]}") from None
    return Policy(model.eval(), tokenizer, image_processor).to(device)


def save_policy(policy: Policy, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face folder that transformers (and whatever builds on it) loads as it is.

    state_dict  weights to write in the place of the policy's own, such as those gathered from several processes
    """
    policy.model.save_pretrained(path, state_dict=state_dict)
    policy.tokenizer.save_pretrained(path)
    policy.image_processor.save_pretrained(path)


def cast_copy(policy: Policy, dtype: torch.dtype) -> Policy:
    """A frozen copy whose weights have `dtype`. Buffers keep theirs: rotary frequencies in bf16 would move positions."""
    # deepcopy takes what the memo already holds: the weights are copied once, in `dtype`, and tied ones stay tied.
    memo = {id(p): nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False) for p in policy.parameters()}
    return copy.deepcopy(policy, memo)


def decode(policy: Policy, ids: Tensor, mask: Tensor) -> list[str]:
    """(N, T) tokens -> N texts, without the closing EOS and without what the mask leaves out."""
    rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
    rows = [row[:-1] if row and row[-1] == policy.eos_id else row for row in rows]
    return policy.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode(policy: Policy, texts: list[str]) -> list[Tensor]:
    """Texts -> token ids, each closed by EOS: an answer as the policy itself would have to write it."""
    return [
        torch.tensor(ids + [policy.eos_id]) for ids in policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]


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


def image_features(policy: Policy, prompts) -> list[Tensor]:
    """One pass of the vision tower over all images of all prompts -> for each prompt (its image tokens, C)."""
    visual = policy.model.model.visual
    grid = torch.cat([p.grid for p in prompts])
    features = visual([p.pixels for p in prompts], grid.to(policy.device)).pooler_output  # (image tokens of all, C)
    return features.split([int(p.grid.prod(1).sum()) // visual.spatial_merge_size**2 for p in prompts])


@torch.no_grad()
def encode_images(policy: Policy, prompts) -> None:
    """Give each prompt its `features`, which then stand for its pixels. Only for a vision tower that is not trained."""
    for prompt, features in zip(prompts, image_features(policy, prompts), strict=True):
        prompt.features = features


@dataclass
class PromptInputs:
    """B prompts side by side, padded on the right.  embeds (B, P, C), positions (3, B, P), lengths (B,),
    next (B,): the position of an answer's first token."""

    embeds: Tensor
    positions: Tensor
    lengths: Tensor
    next: Tensor


def prompt_inputs(policy: Policy, prompts, multiple: int = 1) -> PromptInputs:
    """Token embeddings with the images' features in their places. One pass of the vision tower for all images.

    multiple  pad to a multiple of this many tokens, where few different shapes are wanted
    """
    model, config, device = policy.model.model, policy.model.config, policy.device
    lengths = torch.tensor([len(p.ids) for p in prompts])
    ids = torch.nn.utils.rnn.pad_sequence([p.ids for p in prompts], batch_first=True, padding_value=policy.eos_id)
    ids = F.pad(ids, (0, -ids.shape[1] % multiple), value=policy.eos_id)
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    merge = config.vision_config.spatial_merge_size
    for b, p in enumerate(prompts):
        positions[:, b, : len(p.ids)] = rope_positions(p.ids, p.grid, config.image_token_id, merge)
    following = torch.stack([positions[:, b, : len(p.ids)].max() + 1 for b, p in enumerate(prompts)])
    ids = ids.to(device)
    embeds = model.language_model.embed_tokens(ids)  # (B, P, C)
    encoded = all(getattr(p, "features", None) is not None for p in prompts)
    features = torch.cat([p.features for p in prompts] if encoded else image_features(policy, prompts))
    is_image = (ids == config.image_token_id).unsqueeze(-1)
    # Row-major order of the placeholders is the order of the images: prompt by prompt, image by image.
    embeds = embeds.masked_scatter(is_image, features.to(embeds.dtype))
    return PromptInputs(embeds, positions.to(device), lengths.to(device), following.to(device))


def answer_positions(inputs: PromptInputs, length: int) -> Tensor:
    """(3, B, length) positions of answer tokens: plain text, counting on from the prompt, for every answer anew."""
    steps = torch.arange(length, device=inputs.next.device)
    return (inputs.next[:, None] + steps).expand(3, -1, -1)


def sampling_logits(policy: Policy, hidden: Tensor, temperature: float) -> Tensor:
    """(..., C) hidden states -> (..., V) float32 logits of the distribution that answers are sampled from."""
    logits = policy.model.lm_head(hidden).float() / temperature
    return logits.masked_fill(policy.banned, -torch.inf)


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


def concatenate(parts: list[Rollout], filler: int) -> Rollout:
    """Rollouts of different prompts as one, padded to the longest."""
    width = max(part.ids.shape[1] for part in parts)
    parts = [part.padded(width, filler) for part in parts]
    return Rollout(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "mask", "logp")))


@dataclass
class Cache:
    """Keys and values of every layer: the prompt's once per group, the answers' own.

    prompt  per layer two (B, K, P, D)      own  per layer two (B, G, K, T, D), filled step by step
    bias    (B, 1, 1, P) float32            0 at prompt tokens, -inf at padding
    rotary  two (B, T, D)                   cos and sin of the answer positions
    """

    prompt: list[tuple[Tensor, Tensor]]
    own: list[tuple[Tensor, Tensor]]
    bias: Tensor
    rotary: tuple[Tensor, Tensor]

    def keep(self, prompts: Tensor, answers: Tensor) -> "Cache":
        """The cache of B' prompts and G' answers of each.  prompts (B',), answers (B', G')"""
        rows = prompts[:, None]
        return Cache(
            [(k[prompts], v[prompts]) for k, v in self.prompt],
            [(k[rows, answers], v[rows, answers]) for k, v in self.own],
            self.bias[prompts],
            (self.rotary[0][prompts], self.rotary[1][prompts]),
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Qwen2: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q (..., m, D), k (..., t, D) -> q k^T / sqrt(D), (..., m, t) float32.

    In float32 also on the way: real Qwen2.5 has scores of hundreds, where bf16 counts in steps of 1 or 2.
    """
    if q.is_cuda and q.dtype != torch.float32:  # bf16 in, float32 out, without a copy of the keys
        product = torch.bmm(q.flatten(0, -3), k.flatten(0, -3).transpose(1, 2), out_dtype=torch.float32)
        product = product.view(*q.shape[:-1], -1)
    else:
        product = q.float() @ k.float().transpose(-1, -2)
    return product.mul_(q.shape[-1] ** -0.5)


def group_attention(
    q: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], bias: Tensor, own_bias: Tensor | float
) -> Tensor:
    """Attention of one new token of each answer to the shared prompt and to its own past, under one softmax.

    q (B, G, H, D)   prompt: two (B, K, P, D)   own: two (B, G, K, t, D)   own_bias (t,) or 0   ->  (B, G, H*D)
    """
    B, G, H, D = q.shape
    K, t = own[0].shape[2:4]
    R = H // K  # query heads per key/value head
    q = q.view(B, G, K, R, D)
    q_prompt = q.transpose(1, 2).reshape(B, K, G * R, D)  # all queries of a group against one copy of the prompt
    s_prompt = scores(q_prompt, prompt[0]) + bias  # (B, K, G*R, P)
    s_own = scores(q, own[0]) + own_bias  # (B, G, K, R, t)
    s_own = s_own.transpose(1, 2).reshape(B, K, G * R, t)
    w_prompt, w_own = torch.cat([s_prompt, s_own], -1).softmax(-1).to(q.dtype).split([s_prompt.shape[-1], t], -1)
    out_prompt = (w_prompt @ prompt[1]).view(B, K, G, R, D).transpose(1, 2)  # (B, G, K, R, D)
    out_own = w_own.view(B, K, G, R, t).transpose(1, 2) @ own[1]
    return (out_prompt + out_own).reshape(B, G, H * D)


def prefill(policy: Policy, prompts, group_size: int, length: int) -> tuple[Cache, Tensor]:
    """Encode the prompts once. -> the cache, with room for `length` tokens of each answer; (B, C) last hidden state."""
    static = policy.device.type in STATIC  # few different shapes, and no odd ones
    inputs = prompt_inputs(policy, prompts, 64 if static else 1)
    length += -length % 8 if static else 0
    B, P, _ = inputs.embeds.shape
    language = policy.model.model.language_model
    out = language(
        inputs_embeds=inputs.embeds,
        position_ids=inputs.positions,
        attention_mask={"full_attention": Packing(inputs.lengths, P, 0)},
        past_key_values=DynamicCache(config=policy.model.config.text_config),
        use_cache=True,
    )
    hidden = out.last_hidden_state  # (B, P, C)
    last = hidden[torch.arange(B, device=hidden.device), inputs.lengths - 1]
    prompt = [(layer.keys, layer.values) for layer in out.past_key_values.layers]  # keys are already rotated
    room = lambda x: x.new_zeros(B, group_size, x.shape[1], length, x.shape[3])  # (B, K, P, D) -> (B, G, K, T, D)
    own = [(room(keys), room(values)) for keys, values in prompt]
    padding = torch.arange(P, device=hidden.device) >= inputs.lengths[:, None]  # (B, P)
    bias = torch.zeros(B, 1, 1, P, device=hidden.device).masked_fill(padding[:, None, None], -torch.inf)
    rotary = language.rotary_emb(hidden, answer_positions(inputs, length))
    return Cache(prompt, own, bias, rotary), last


def decode_step(policy: Policy, cache: Cache, tokens: Tensor, t: int | Tensor) -> Tensor:
    """Push token t of every answer through the backbone's own modules. tokens (B, G) -> hidden (B, G, C).

    t  an int: attend to the t + 1 tokens that an answer has. A (1,) tensor: attend to all T places, the empty ones
       masked, so that shapes and addresses are the same for all t, and a CUDA graph can be replayed.
    """
    language = policy.model.model.language_model
    T = cache.own[0][0].shape[3]
    own_bias: Tensor | float  # (T,) or 0
    if isinstance(t, Tensor):
        place, reach = t, T - 1
        own_bias = torch.where(torch.arange(T, device=t.device) > t, -torch.inf, 0.0)
    else:
        place, reach, own_bias = torch.tensor([t], device=tokens.device), t, 0.0
    cos, sin = (x.index_select(1, place)[:, :, None] for x in cache.rotary)  # (B, 1, 1, D)
    x = language.embed_tokens(tokens)  # (B, G, C)
    for layer, prompt, (keys, values) in zip(language.layers, cache.prompt, cache.own, strict=True):
        h = layer.input_layernorm(x)
        attention, D = layer.self_attn, keys.shape[-1]
        heads = lambda x, D=D: x.unflatten(-1, (-1, D))  # (B, G, C) -> (B, G, heads, D)
        q = rotate(heads(attention.q_proj(h)), cos, sin)
        keys.index_copy_(3, place, rotate(heads(attention.k_proj(h)), cos, sin).unsqueeze(3))
        values.index_copy_(3, place, heads(attention.v_proj(h)).unsqueeze(3))
        past = keys[:, :, :, : reach + 1], values[:, :, :, : reach + 1]
        x = x + attention.o_proj(group_attention(q, prompt, past, cache.bias, own_bias))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return language.norm(x)


STATIC = {"cuda"}  # kinds of device on which decoding has static shapes, so that its steps can be recorded


class RecordedDecoder:
    """`decode_step` for one shape of cache, recorded once as a CUDA graph: a thousand kernel launches become one.

    It owns the buffers that the graph reads and writes; each rollout, with prompts of that length or shorter, copies
    its prompts into them. The weights may change between rollouts (in place), the addresses may not. Without CUDA it
    just calls the function.
    """

    def __init__(self, policy: Policy, cache: Cache, tokens: Tensor):
        clone = lambda pairs: [tuple(x.clone() for x in pair) for pair in pairs]
        self.cache = Cache(clone(cache.prompt), clone(cache.own), cache.bias.clone(), clone([cache.rotary])[0])
        self.tokens, self.t = tokens.clone(), torch.zeros(1, dtype=torch.long, device=tokens.device)
        self.run = lambda: decode_step(policy, self.cache, self.tokens, self.t)
        if tokens.is_cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(tokens.device):
                stream = torch.cuda.Stream()  # warm-up, as recording must not meet a library's first-time allocations
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        self.run()
                torch.cuda.current_stream().wait_stream(stream)
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    hidden = self.run()

            def replay() -> Tensor:
                graph.replay()
                return hidden  # the same memory at every step

            self.run = replay

    def begin(self, cache: Cache) -> None:
        P = cache.bias.shape[-1]
        self.cache.bias[..., :P] = cache.bias
        self.cache.bias[..., P:] = -torch.inf
        for ours, theirs in zip(self.cache.prompt, cache.prompt, strict=True):
            for x, new in zip(ours, theirs, strict=True):
                x[:, :, :P] = new
                x[:, :, P:] = 0.0  # what is masked has weight 0, but 0 times a NaN of an earlier rollout is NaN
        for x in (x for pair in self.cache.own for x in pair):
            x.zero_()
        for x, new in zip(self.cache.rotary, cache.rotary, strict=True):
            x.copy_(new)

    def step(self, tokens: Tensor, t: int) -> Tensor:
        self.tokens.copy_(tokens)
        self.t.fill_(t)
        return self.run()


_RECORDED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # policy -> its decoders, the latest used last


def recorded_decoder(policy: Policy, cache: Cache, tokens: Tensor) -> RecordedDecoder:
    """A decoder for this shape: an earlier one, of prompts as long or up to twice as long, or one recorded now.

    Four are kept, as stage 2 takes 1, 2, 4 and 8 images in turn; each holds as much memory as its prompts' cache.
    """
    decoders = _RECORDED.setdefault(policy, [])
    length = lambda cache: cache.bias.shape[-1]
    fits = [
        d
        for d in decoders
        if d.cache.own[0][0].shape == cache.own[0][0].shape and length(cache) <= length(d.cache) <= 2 * length(cache)
    ]
    if fits:
        decoder = min(fits, key=lambda d: length(d.cache))
        decoders.remove(decoder)
    else:
        del decoders[:-3]  # before the new one takes its memory
        decoder = RecordedDecoder(policy, cache, tokens)
    decoders.append(decoder)
    decoder.begin(cache)
    return decoder


def sample_tokens(logps: Tensor, uniform: Tensor) -> Tensor:
    """Tokens by the inverse of the cumulative distribution.  logps (..., V), uniform (...) in [0, 1) -> (...)"""
    cumulative = logps.double().exp().cumsum(-1)
    # First index whose cumulative probability exceeds u * total: a token of probability 0 is not hit.
    u = (uniform * cumulative[..., -1]).unsqueeze(-1)
    token = torch.searchsorted(cumulative, u, right=True).clamp(max=logps.shape[-1] - 1)
    # Except by rounding: a GPU's parallel sum need not be monotone. Rare, but the log-prob would be -inf.
    impossible = logps.gather(-1, token).isneginf()
    return torch.where(impossible, logps.argmax(-1, keepdim=True), token).squeeze(-1)


@torch.no_grad()
def generate(
    policy: Policy,
    prompts,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Rollout:
    """Sample `group_size` answers to each prompt (GRPO's rollout), plain temperature sampling, no top-k or top-p.

    prompts      B of them, lengths and numbers of images may differ
    temperature  0 takes the most likely token (log-probs are then those at temperature 1)
    generator    one for the whole batch, or one per prompt: then an answer depends on its prompt's generator alone,
                 not on its neighbours in the batch, nor on how many processes share the work
    returns      Rollout of N = B * group_size rows, T <= max_new_tokens

    An answer that does not end within max_new_tokens has no EOS.
    """
    B, G, device = len(prompts), group_size, policy.device
    if B == 0 or G < 1 or max_new_tokens < 1 or not temperature >= 0:
        raise ValueError("generate needs prompts, group_size >= 1, max_new_tokens >= 1 and temperature >= 0")
    # All randomness is drawn here, and each answer turns its own uniforms into tokens (`sample_tokens`): what it says
    # does not change when finished neighbours are dropped.
    generators = generator if isinstance(generator, list) else [generator] * B
    uniform = torch.stack(
        [torch.rand(G, max_new_tokens, generator=g, device=g.device if g else None) for g in generators]
    )
    uniform = uniform.to(device)  # (B, G, T)

    ids = torch.full((B, G, max_new_tokens), policy.eos_id, device=device)
    mask = torch.zeros(B, G, max_new_tokens, dtype=torch.bool, device=device)
    logp = torch.zeros(B, G, max_new_tokens, device=device)

    cache, hidden = prefill(policy, prompts, G, max_new_tokens)
    hidden = hidden[:, None].expand(-1, G, -1)  # the first token's distribution is the group's
    # The rows at work: prompt `rows[i]`, its answers `columns[i]`. Rectangular, so that one matmul serves them all.
    rows = torch.arange(B, device=device)
    columns = torch.arange(G, device=device).expand(B, G)
    alive = torch.ones(B, G, dtype=torch.bool, device=device)
    static, decoder = device.type in STATIC, None
    for t in range(max_new_tokens):
        place = (rows[:, None], columns, t)
        logps = sampling_logits(policy, hidden, temperature or 1.0).log_softmax(-1)  # (B', G', V)
        token = sample_tokens(logps, uniform[place]) if temperature > 0 else logps.argmax(-1)  # (B', G')
        token = torch.where(alive, token, policy.eos_id)
        ids[place], mask[place] = token, alive
        logp[place] = torch.where(alive, logps.gather(-1, token.unsqueeze(-1)).squeeze(-1), 0.0)
        alive = alive & (token != policy.eos_id)  # the EOS itself was still the answer's
        if t + 1 == max_new_tokens:
            break
        if static:
            # Asking whether all are done makes the CPU wait for the GPU, so ask now and then. Rows that are done are
            # computed on, and not looked at: dropping them would change the shapes.
            if t % 16 == 15 and not alive.any():
                break
            decoder = decoder or recorded_decoder(policy, cache, token)
            hidden = decoder.step(token, t)
            continue
        if not alive.any():
            break
        # Answers that are done are dropped once a quarter of the rectangle would go: copying the cache costs too.
        open_prompts, width = alive.any(1), int(alive.sum(1).max())
        if int(open_prompts.sum()) * width <= 0.75 * alive.numel():
            keep = open_prompts.nonzero().squeeze(1)
            first = alive[keep].int().argsort(dim=1, descending=True, stable=True)[:, :width]  # the live ones first
            cache = cache.keep(keep, first)
            rows, columns = rows[keep], columns[keep[:, None], first]
            alive, token = alive[keep[:, None], first], token[keep[:, None], first]
        hidden = decode_step(policy, cache, token, t)
    T = int(mask.sum(-1).max())
    return Rollout(*(x[:, :, :T].reshape(B * G, T) for x in (ids, mask, logp)))


# --------------------------------------------------------------------------------------------------------------------
# Scoring: one packed sequence per prompt


@dataclass
class Packing:
    """How a packed sequence is laid out: P columns of prompt (the first lengths[b] real), then G answers of equal width.

    It travels to the attention function in the place of a mask.
    """

    lengths: Tensor  # (B,)
    P: int
    G: int


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The block mask as two calls of exact attention: prompt to prompt (causal), answers to [prompt | themselves].

    query (B, H, L, D), key and value (B, K, L, D), L = P + G*T. -> (B, L, H, D), None
    A mask over all L x L pairs would give the same numbers, but most of its pairs are forbidden: answers do not see
    each other. The prompt's padding stands right of its tokens, so causality alone hides it from them.
    """
    packing = attention_mask
    if not isinstance(packing, Packing):  # somebody calls the backbone in the usual way, with a usual mask
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotary embedding leaves float32
    P, G = packing.P, packing.G
    sdpa = lambda *qkv, **kw: F.scaled_dot_product_attention(*qkv, scale=scaling, enable_gqa=True, **kw)  # noqa: E731
    out = sdpa(query[:, :, :P], key[:, :, :P], value[:, :, :P], is_causal=True)  # (B, H, P, D)
    if G:
        B, _, L, D = query.shape
        T = (L - P) // G
        # (B, heads, G*T, D) -> (B*G, heads, T, D): every answer is a row of its own, behind the prompt's keys.
        rows = lambda x: x[:, :, P:].unflatten(2, (G, T)).transpose(1, 2).flatten(0, 1)  # noqa: E731
        shared = lambda x: x[:, None, :, :P].expand(-1, G, -1, -1, -1).flatten(0, 1)  # noqa: E731
        keys, values = (torch.cat([shared(x), rows(x)], dim=2) for x in (key, value))  # (B*G, K, P+T, D)
        seen = torch.arange(P, device=query.device) < packing.lengths[:, None]  # (B, P)
        causal = torch.ones(T, T, dtype=torch.bool, device=query.device).tril()
        mask = torch.cat([seen[:, None].expand(-1, T, -1), causal.expand(B, -1, -1)], dim=2)  # (B, T, P+T)
        if query.is_cuda:  # with a mask, the fused kernels want as many key heads as query heads
            keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (keys, values))
        answers = sdpa(rows(query), keys, values, attn_mask=mask.repeat_interleave(G, 0)[:, None])
        answers = answers.unflatten(0, (B, G)).transpose(1, 2).flatten(2, 3)  # (B, H, G*T, D)
        out = torch.cat([out, answers], dim=2)
    return out.transpose(1, 2), None


def window_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """Attention within each window (or image) of the vision tower: query, key, value (1, H, S, D) -> (1, S, H, D), None

    cu_seq_lens_q (W+1,) are the windows' bounds. transformers' default calls attention once per window, thousands of
    times for a batch of photographs; here windows of one length share a call, and a GPU takes them all in one.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, H, D)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        bounds, longest = cu_seq_lens_q.int(), kwargs["max_length_q"]
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling)[None], None
    start, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (windows, length, H, D) each -> the same shape
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)

    if (lengths == lengths[0]).all():  # images of one size, most often: the windows lie side by side already
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
        with torch.no_grad():  # a statistic, not part of the objective.  H = log Z - sum_v p_v logit_v
            p = (logits - logz[:, None]).exp()
            entropy = logz - (p * logits.masked_fill(policy.banned, 0.0)).sum(-1)
        return logits.gather(-1, target[:, None]).squeeze(-1) - logz, entropy

    # Logits for every position at once would be the largest tensor of the step (V = 152k). A checkpointed chunk keeps
    # its hidden states only, and makes its logits again in the backward pass.
    size = max(1, HEAD_ELEMENTS // policy.banned.numel())
    parts = [
        checkpoint(chunk, h, target, use_reentrant=False)
        for h, target in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _packed_logprobs(policy: Policy, prompts, ids: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    inputs = prompt_inputs(policy, prompts)
    B, P, _ = inputs.embeds.shape
    N, T = ids.shape
    G = N // B
    ids, mask = ids.to(policy.device), mask.to(policy.device).bool()
    language = policy.model.model.language_model
    # The last token of an answer predicts nothing: T-1 tokens of each go in.
    answers = language.embed_tokens(ids[:, :-1].reshape(B, G * (T - 1)))
    positions = answer_positions(inputs, T - 1).repeat(1, 1, G)  # (3, B, G*(T-1)): every answer starts anew
    hidden = language(
        inputs_embeds=torch.cat([inputs.embeds, answers], dim=1),
        position_ids=torch.cat([inputs.positions, positions], dim=2),
        attention_mask={"full_attention": Packing(inputs.lengths, P, G if T > 1 else 0)},
        use_cache=False,
    ).last_hidden_state  # (B, P + G*(T-1), C)
    # Token t of an answer is predicted at token t-1, and its first at the prompt's last token.
    first = hidden[torch.arange(B, device=hidden.device), inputs.lengths - 1]  # (B, C)
    first = first[:, None, None].expand(-1, G, 1, -1)
    predicting = torch.cat([first, hidden[:, P:].unflatten(1, (G, T - 1))], dim=2).flatten(0, 1)  # (N, T, C)
    logps, entropies = _token_logprobs(policy, predicting[mask], ids[mask], temperature)
    logp = torch.zeros(N, T, device=ids.device).masked_scatter(mask, logps)
    entropy = torch.zeros(N, T, device=ids.device).masked_scatter(mask, entropies)
    return logp, entropy


def logprobs(policy: Policy, prompts, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi_theta(o_t | prompt, o_<t) of given answers, and the entropy of each of those distributions.

    prompts  B of them      ids, mask  (B*G, T), answer g of prompt b in row b*G + g; the mask keeps a prefix of a row
    returns  two (B*G, T) float32, 0 where the mask is 0; gradients flow through the log-probs, not the entropy
    """
    if len(ids) % len(prompts) or ids.shape != mask.shape or not temperature > 0:
        raise ValueError(f"logprobs needs ids and mask of one shape (B*G, T), B = {len(prompts)}, and temperature > 0")
    return policy(prompts, ids, mask, temperature)
