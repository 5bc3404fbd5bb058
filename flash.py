"""Attention of packed documents on a GPU, as one operator whose numbers of documents and lengths torch.compile never sees.

torch takes them as Python integers, and each would be compiled anew: every stage of a curriculum, every longest document. Here they are
a small tensor on the host, and what it says chooses among torch's kernels at every call:
    packed    FlashAttention over segments (2, torch's own; 3 through the package flash_attn_interface)
    windows   rows without a border inside, from 256 tokens on: cuDNN, 1.6 times as fast as FlashAttention 2 on an H200 (LOG.md)
    tiles     windows of less than 128 tokens share tiles of 128 behind a mask: a kernel per window would idle
Read next: Segments in model.py, which calls `varlen`.
"""

import functools
import importlib.util
import math

import torch
from torch import library

aten, TILE = torch.ops.aten, 128


@functools.cache
def flash() -> str:
    """The kernels in use, for the run's banner; the first call switches FlashAttention 3 on where it is installed."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if hopper and importlib.util.find_spec("flash_attn_interface"):
        torch.nn.attention.activate_flash_attention_impl("FA3")
        return "FlashAttention 3"
    cudnn = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0) and torch.backends.cudnn.is_available()
    return "FlashAttention 2" + ", cuDNN for whole windows" * cudnn


def _kind(n_q, n_k, width, longest_q, longest_k, count, window):
    if 0 < window < TILE and TILE % window == 0 and n_q == n_k and n_q % TILE == 0:
        return "tiles"
    whole = longest_q == longest_k >= 256 and longest_q * count == n_q == n_k and width <= 128
    return "windows" if whole and "cuDNN" in flash() else "packed"


def _rows(t, length, share=1):
    """(N, heads, E) -> (rows, share x heads, length, E)"""
    t = t.unflatten(0, (-1, length)).transpose(1, 2)
    return t.repeat_interleave(share, 1) if share > 1 else t


def _flat(t, heads):
    """The way back; what several queries' heads say of one key head is added."""
    t = t if t.shape[1] == heads else t.unflatten(1, (heads, -1)).sum(2)
    return t.transpose(1, 2).flatten(0, 1).contiguous()


def _bias(cu, n, like, causal):
    """(tiles, 1, 128, 128): 0 where a query sees a key, else -inf."""
    document = torch.searchsorted(cu, torch.arange(n, device=cu.device, dtype=cu.dtype), right=True).view(-1, 1, TILE)
    sees = document[..., None] == document[:, :, None]
    return torch.zeros(sees.shape, dtype=like.dtype, device=cu.device).masked_fill_(~(sees.tril() if causal else sees), -math.inf)


def _varlen(q, k, v, cu_q, cu_k, sizes, causal):
    longest_q, longest_k, count, window = sizes.tolist()  # it lives on the host
    n, heads = len(q), q.shape[1]
    kind = _kind(n, len(k), q.shape[2], longest_q, longest_k, count, window)
    if kind == "packed":
        cu = cu_q[: count + 1], cu_k[: count + 1]
        longest_q = max(2, longest_q)  # at 1 the kernel would take every document for one token
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *cu, longest_q, longest_k, 0.0, causal, False)
        return out.contiguous(), lse
    if kind == "windows":  # cuDNN knows grouped heads
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*(_rows(t, longest_q) for t in (q, k, v)), None, True, 0.0, causal, False)
    else:
        args = [_rows(t, TILE, heads // t.shape[1]) for t in (q, k, v)]
        bias = _bias(cu_q[: count + 1], n, q, causal).expand(-1, heads, -1, -1)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(*args, bias, True, 0.0, False)
    return _flat(out, heads), lse.reshape(heads, n)  # (rows, heads, length) in truth: only the way back reads it


def _varlen_backward(dy, q, k, v, out, lse, cu_q, cu_k, sizes, causal):
    longest_q, longest_k, count, window = sizes.tolist()
    n, heads, groups = len(q), q.shape[1], k.shape[1]
    kind = _kind(n, len(k), q.shape[2], longest_q, longest_k, count, window)
    if kind == "packed":
        seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)  # there is no dropout
        cu = cu_q[: count + 1], cu_k[: count + 1]
        lengths = max(2, longest_q), longest_k
        grads = aten._flash_attention_backward(dy.contiguous(), q, k, v, out, lse, *cu, *lengths, 0.0, causal, seed, unused)
        return tuple(grad.contiguous() for grad in grads)
    length, seed = TILE if kind == "tiles" else longest_q, torch.zeros((), dtype=torch.long, device=q.device)
    dy, q, k, v, out = (_rows(t, length, heads // t.shape[1] if kind == "tiles" else 1) for t in (dy.contiguous(), q, k, v, out))
    if kind == "windows":
        lse, nothing = lse.view(-1, heads, length, 1), (None, None, None, length, length)
        grads = aten._scaled_dot_product_cudnn_attention_backward(dy, q, k, v, out, lse, seed, seed, *nothing, 0.0, causal)
    else:
        bias, wanted = _bias(cu_q[: count + 1], n, q, causal).expand(-1, heads, -1, -1), [True, True, True, False]
        lse = lse.view(-1, heads, length)
        grads = aten._scaled_dot_product_efficient_attention_backward(dy, q, k, v, bias, out, lse, seed, seed, 0.0, wanted, False)
    return tuple(_flat(grad, some) for grad, some in zip(grads[:3], (heads, groups, groups), strict=True))


_IN = "Tensor q, Tensor k, Tensor v, "
_SEGMENTS = "Tensor cu_q, Tensor cu_k, Tensor sizes, bool causal"
_varlen_op = library.custom_op("prism::varlen", _varlen, mutates_args=(), schema=f"({_IN}{_SEGMENTS}) -> (Tensor, Tensor)")
_varlen_op.register_fake(lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)))
_varlen_back = library.custom_op(
    "prism::varlen_backward", _varlen_backward, mutates_args=(),
    schema=f"(Tensor dy, {_IN}Tensor out, Tensor lse, {_SEGMENTS}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
_varlen_back.register_fake(lambda dy, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)))


def _varlen_save(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


_varlen_op.register_autograd(
    lambda ctx, dy, _: (*torch.ops.prism.varlen_backward(dy, *ctx.saved_tensors, ctx.causal), *[None] * 4), setup_context=_varlen_save
)


def varlen(q, k, v, cu_q, cu_k, sizes, causal):
    """q (Nq, H, E), k and v (Nk, G, E) -> (Nq, H, E). sizes, on the host: the longest segment of queries and of keys, how many segments
    there are, and the window that no segment leaves, or 0. To a compiled graph all batches of N tokens are the same."""
    args = q, k, v, cu_q, cu_k, sizes, causal
    whole = torch.compiler.is_compiling() or torch.is_grad_enabled() or q.is_meta
    return (torch.ops.prism.varlen if whole else _varlen)(*args)[0]
