"""FlashAttention over packed documents as one operator, whose numbers of documents and lengths torch.compile never sees.

torch has the kernels (FlashAttention 2; 3 through the package flash_attn_interface) but hands their lengths over as Python integers,
and each would be compiled anew: every stage of a curriculum, every longest document. Here they are a small tensor on the host.
Read next: Segments in model.py, which calls `varlen`.
"""

import functools
import importlib.util

import torch
from torch import library


@functools.cache
def flash() -> str:
    """Which FlashAttention torch's operators run: 3, if its package is installed and the card is a Hopper, else 2, torch's own."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if not (hopper and importlib.util.find_spec("flash_attn_interface")):
        return "FlashAttention 2, torch's own"
    torch.nn.attention.activate_flash_attention_impl("FA3")
    return "FlashAttention 3"


def _read(cu_q, cu_k, sizes):
    longest_q, longest_k, count = sizes.tolist()  # it lives on the host
    return cu_q[: count + 1], cu_k[: count + 1], max(2, longest_q), longest_k  # at 1 the kernel would take every document for one token


def _varlen(q, k, v, cu_q, cu_k, sizes, causal):
    flash()
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *_read(cu_q, cu_k, sizes), 0.0, causal, False)
    return out.contiguous(), lse


def _varlen_backward(dy, q, k, v, out, lse, cu_q, cu_k, sizes, causal):
    seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)  # there is no dropout
    lengths = _read(cu_q, cu_k, sizes)
    grads = torch.ops.aten._flash_attention_backward(dy.contiguous(), q, k, v, out, lse, *lengths, 0.0, causal, seed, unused)
    return tuple(grad.contiguous() for grad in grads)


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
    """FlashAttention over segments, see model.Segments: q (Nq, H, E), k and v (Nk, G, E) -> (Nq, H, E). How many segments there are and
    how long the longest is stands in `sizes`, on the host: to a compiled graph all batches of N tokens are the same."""
    args = q, k, v, cu_q, cu_k, sizes, causal
    whole = torch.compiler.is_compiling() or torch.is_grad_enabled() or q.is_meta
    return (torch.ops.prism.varlen if whole else _varlen)(*args)[0]
