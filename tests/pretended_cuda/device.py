"""A CUDA device that is not there: tensors that say they are on cuda:0 and compute on the CPU.

What it pretends
  1. A tensor of type `Pretended` says "cuda:0" to whoever asks: the code under test, autocast, autograd. So all of them take
     the branches that they take on a GPU. Its numbers are in a tensor of the CPU, where each operator runs.
  2. Operators that only a GPU has are written out here in float32, with what the real ones demand of dtypes, strides and
     alignment: variable-length attention and its gradient, scaled-dot-product attention, a product accumulated in float32.
  3. Tensors of two devices in one operator are refused, as there.
  4. `waits` counts where the host would wait for the device: a value is read, an index's length is asked for, or numbers
     cross between the two.

What it cannot: tell whether the real kernels are right or fast, or how they round; memory; streams, and so races; several
GPUs. It knows the demands that are written here, and no others. A GPU of compute capability 8.0 or more is meant.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen  # registers its operators
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent.parent
aten, GPU = torch.ops.aten, torch.device("cuda", 0)
waits: Counter[str] = Counter()  # line of the project's code -> how often the host waited there
sync_debug = {"mode": "default"}  # what torch.cuda.set_sync_debug_mode was told; "error": whoever waits is refused


class Pretended(Tensor):
    """A tensor that says cuda:0. `numbers` is what the CPU computes with."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor):
        how: Any = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype)
        self: Any = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **how, device=GPU)  # type: ignore[attr-defined]
        self.numbers = numbers
        return self

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})

    def __repr__(self):
        return f"Pretended({self.numbers})"

    def tolist(self):  # torch's own reads memory
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        copied = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    # With these, module.to("cuda") swaps a parameter's contents in place, as on a GPU: tied weights stay tied.
    def __tensor_flatten__(self):
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inners, context, size, stride):
        return Pretended(inners["numbers"])


class Operators(TorchDispatchMode):
    """Each operator goes through `run`, that of a tensor of the CPU too: it may be on its way to the device."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Functions of torch that reach for the device's memory in C++, before there is an operator."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            values = args[0]  # a list may hold numbers of the device
            values = [x.item() if isinstance(x, Tensor) else x for x in values] if isinstance(values, list) else values
            return torch.tensor(values, *args[1:], **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Within it this process has a CUDA device. hooks.load() has to come first, before torch is imported."""
    cuda: Any = torch.cuda
    in_this_thread = torch.autograd.set_multithreading_enabled(False)  # the backward pass too: the modes are a thread's
    with pytest.MonkeyPatch.context() as patch, Functions(), Operators(), in_this_thread:
        patch.setattr(cuda, "set_sync_debug_mode", lambda mode: sync_debug.update(mode=mode))
        stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None)
        card = SimpleNamespace(name="a pretended GPU", major=8, minor=0, total_memory=24 * 10**9)
        answers = {
            "is_available": True, "device_count": 1, "current_device": 0, "current_stream": stream, "stream": contextlib.nullcontext(),
            "get_device_properties": card, "mem_get_info": (card.total_memory,) * 2,
            "memory_allocated": 0, "max_memory_allocated": 0,  # nobody counts
            "_lazy_init": None, "synchronize": None, "set_device": None, "empty_cache": None, "reset_peak_memory_stats": None,
        }  # fmt: skip
        for name, answer in answers.items():
            patch.setattr(cuda, name, lambda *args, answer=answer: answer)
        patch.setattr(cuda.amp.common, "amp_definitely_not_available", lambda: False)
        # Not by `Functions`: modes are off while a checkpointed layer is run again in the backward pass.
        honest = F.scaled_dot_product_attention
        choose = lambda q, *rest, **how: (sdpa if isinstance(q, Pretended) else honest)(q, *rest, **how)
        patch.setattr(F, "scaled_dot_product_attention", choose)
        yield


def run(operator, args, kwargs) -> Any:
    """One operator: refused or counted where a GPU would refuse it or make the host wait, then computed on the CPU."""
    ours: dict[int, Pretended] = {}  # by the tensors that hold their numbers
    others = 0  # tensors of the CPU, without single numbers (0-dim), which an operator may take from the host

    def inner(x):
        nonlocal others
        if isinstance(x, Pretended):
            ours[id(x.numbers)] = x
            return x.numbers
        if isinstance(x, Tensor):
            others += x.dim() > 0
        return type(x)(map(inner, x)) if isinstance(x, list | tuple) and not isinstance(x, torch.Size) else x

    args, first = tuple(map(inner, args)), args[0] if args else None
    kwargs, device = {key: inner(x) for key, x in kwargs.items()}, kwargs.get("device")
    name = operator._schema.name
    goes_to = torch.device(device).type if device is not None else "cuda" if ours else "cpu"
    if name == "aten::copy_":
        goes_to = "cuda" if isinstance(first, Pretended) else "cpu"
    if not ours and goes_to != "cuda":
        return operator(*args, **kwargs)
    crosses = name in ("aten::_to_copy", "aten::copy_") and (goes_to == "cpu" or others > 0)
    by_index = name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
    shape_alone = name.endswith("_like") or name.startswith("aten::new_")
    if others and not (crosses or by_index or shape_alone):  # an index is copied to the device
        raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU")
    mask = by_index and any(i is not None and i.dtype == torch.bool for i in args[1])
    if crosses or (by_index and others) or mask or operator in READS:
        if sync_debug["mode"] == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {name} at {where()}")
        waits[where()] += 1
    if goes_to == "cuda" and device is not None:
        kwargs["device"] = "cpu"
    out = KERNELS.get(operator, operator)(*args, **kwargs)

    def outer(x):
        if isinstance(x, list | tuple):
            return type(x)(map(outer, x))
        if not isinstance(x, Tensor):
            return x
        return ours[id(x)] if id(x) in ours else Pretended(x)  # in place: it gives back what it was given

    return out if goes_to == "cpu" or operator is aten._local_scalar_dense.default else outer(out)


# The host waits until the device has computed what it is told.
READS = (
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten._unique2.default, aten.repeat_interleave.Tensor,
)  # fmt: skip


def where() -> str:
    """The line of the project that runs: "file:function"."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(str(ROOT)) and "pretended_cuda" not in frame.filename:
            return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return "elsewhere"


# --------------------------------------------------------------------------------------------------------------------
# Operators that only a GPU has


def demand(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"a GPU's kernel would refuse this: {what}")


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | float) -> tuple[Tensor, Tensor]:
    """(heads, T, D), (heads, S, D) x 2 -> output; weights (heads, T, S). In float32, as the kernels accumulate."""
    weights = torch._safe_softmax(scale * q.float() @ k.float().mT + bias, -1)  # 0 where nothing may be seen
    return weights @ v.float(), weights


def causal(T: int, S: int, wanted: bool) -> Tensor:
    """The last query sees up to the last key."""
    hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1) if wanted else torch.zeros(T, S, dtype=torch.bool)
    return torch.zeros(T, S).masked_fill(hidden, -torch.inf)


def sequences(q, k, bounds_q, bounds_k):
    """Slices of the queries and keys of each sequence, and how many query heads share a key's."""
    pairs = lambda bounds: bounds.unfold(0, 2, 1).tolist()
    both = zip(pairs(bounds_q), pairs(bounds_k), strict=True)
    return [(slice(*a), slice(*b)) for a, b in both], q.shape[1] // k.shape[1]


def heads_first(x: Tensor, repeats: int) -> Tensor:
    return x.transpose(0, 1).repeat_interleave(repeats, 0)


def varlen(
    q, k, v, bounds_q, bounds_k, most_q, most_k, is_causal=False, scale=None, window=(-1, -1), gqa=False, *unused
):
    """torch_attn::_varlen_attn, see torch.nn.attention.varlen.  q (queries, H, D); k, v (keys, K, D)"""
    demand(q.dtype == k.dtype == v.dtype in (torch.bfloat16, torch.float16), f"variable-length attention of {q.dtype}, {k.dtype}, {v.dtype}")  # fmt: skip
    demand(bounds_q.dtype == bounds_k.dtype == torch.int32, "bounds that are no int32")
    demand(type(most_q) is type(most_k) is int, "the longest sequence as a tensor")
    demand(all(x.stride(-1) == 1 for x in (q, k, v)) and q.shape[-1] % 8 == 0, "heads that are no rows of 8n numbers")
    demand((int(bounds_q[-1]), int(bounds_k[-1])) == (len(q), len(k)), "bounds that do not end where the tensors do")
    demand((most_q, most_k) == (int(bounds_q.diff().max()), int(bounds_k.diff().max())), "wrong longest sequences")
    out, (slices, R) = torch.empty_like(q), sequences(q, k, bounds_q, bounds_k)
    for a, b in slices:
        bias = causal(a.stop - a.start, b.stop - b.start, is_causal)
        one = attend(heads_first(q[a], 1), heads_first(k[b], R), heads_first(v[b], R), scale, bias)[0]
        out[a] = one.transpose(0, 1).to(q.dtype)
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def varlen_backward(grad, q, k, v, out, lse, bounds_q, bounds_k, most_q, most_k, is_causal, rng, scale=None, *unused):
    demand(grad.stride(-1) == 1 and grad.dtype == q.dtype, "a gradient of another dtype, or not row by row")
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    slices, R = sequences(q, k, bounds_q, bounds_k)
    for a, b in slices:
        Q, G, K, V = (heads_first(x, n).float() for x, n in ((q[a], 1), (grad[a], 1), (k[b], R), (v[b], R)))
        _, weights = attend(Q, K, V, scale, causal(a.stop - a.start, b.stop - b.start, is_causal))
        d = G @ V.mT
        d = scale * weights * (d - (d * weights).sum(-1, keepdim=True))  # of the logits: the derivative of a softmax
        dq[a] = (d @ K).transpose(0, 1)
        for to, x in ((dk, d.mT @ Q), (dv, weights.mT @ G)):
            to[b] = x.unflatten(0, (-1, R)).sum(1).transpose(0, 1)
    return tuple(x.to(q.dtype) for x in (dq, dk, dv))


def mm_out_dtype(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    demand(a.dtype == b.dtype and dtype == torch.float32, f"a product of {a.dtype} and {b.dtype} as {dtype}")
    return a.float() @ b.float()


KERNELS = {
    torch.ops.torch_attn._varlen_attn.default: varlen,
    torch.ops.torch_attn._varlen_attn_backward.default: varlen_backward,
    aten.mm.dtype: mm_out_dtype,
}


def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention, which chooses its kernel in C++, where a pretended tensor would be found out.

    Flash attention without a mask, the memory-efficient one with a mask. What falls back to plain maths is refused.
    """
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    R = query.shape[1] // key.shape[1]
    demand(query.dtype == key.dtype == value.dtype, f"attention of {query.dtype}, {key.dtype}, {value.dtype}")
    demand(
        all(x.stride(-1) == 1 for x in (query, key, value)) and query.shape[-1] % 8 == 0, "heads that are no rows of 8n"
    )
    bias: Any = 0.0
    if attn_mask is not None:
        demand(R == 1, "a mask where heads share keys: that is plain maths, a kernel for each step")
        if attn_mask.dtype == torch.bool:  # it becomes a bias, with padded rows
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        else:
            demand(attn_mask.dtype == query.dtype, f"a mask of {attn_mask.dtype} for {query.dtype}")
            demand(all(n % 8 == 0 for n in attn_mask.stride()[:-1]), "a mask whose rows do not begin at multiples of 8")
        bias = attn_mask.float()
    elif is_causal:
        bias = causal(query.shape[2], key.shape[2], True).to("cuda")
    with torch.autocast("cuda", enabled=False):
        out, _ = attend(
            query, key.repeat_interleave(R, 1), value.repeat_interleave(R, 1), scale or query.shape[-1] ** -0.5, bias
        )
    return out.to(query.dtype)
