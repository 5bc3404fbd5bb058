"""A model that only reads, on a CPU: its weights laid out for the vector units. None of this has gradients.

Read next: Transformer.lean in model.py, which puts it in place; cpu.c, for the products of a few rows; replay.py, the same for a GPU.
"""

import torch
import torch.nn.functional as F

import native

FEW = 8  # rows that cpu.c multiplies as fast as it can read the weights, 1.5 to 3 times as fast as torch's libraries (LOG.md)
PROMPT = 64  # rows up to which it is no slower than they are with a weight that is not laid out for them
STACK = 1 << 20  # numbers in those rows: cpu.c has them on the stack, two bytes each


def streams(weight, rows):
    """Whether cpu.c takes products of so few rows with this weight: bf16 numbers, read once, for activations that stay in fp32."""
    return rows <= FEW and weight.dtype == torch.bfloat16 and native.fits(weight)


def squeezed(weight):
    """A bf16 weight in three quarters of its bytes, nothing lost (cpu.c says how); None where its numbers lie too far apart."""
    outs, ins = weight.shape
    bytes = 192 + -(-ins // 4) * 192 + -(-ins // 64) * 64  # of 32 outputs: powers, numbers, room for one stray number in 256
    packed, lost = torch.empty(-(-outs // 32), bytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    native.call("squeeze", weight, ins, outs, bytes, weight.contiguous(), packed, lost)
    return None if lost.item() else packed


def laid_out(weight, rows, bias=None):
    """x -> F.linear(x, weight, bias) for `rows` rows at a time, with the weight in the order that a CPU's vector units want: blocks of 32
    outputs for cpu.c (x and y in fp32); transposed for one row of fp32, which then streams twice as fast; else the blocked form of oneDNN.
    Later changes of the weight are not seen."""
    (outs, ins), bias = weight.shape, None if bias is None else bias.detach().to(weight.dtype)
    if weight.dtype == torch.float32 and rows == 1:
        if outs >= ins:
            weight.data = weight.data.t().contiguous().t()
        return lambda x: F.linear(x, weight, bias)
    weight = weight.detach()
    if streams(weight, rows):
        many, packed = lambda x: F.linear(x.to(weight.dtype), weight, bias).float(), squeezed(weight)

        def few(x):
            n = x.numel() // ins
            if n > PROMPT or x.numel() > STACK or packed is None:
                return many(x)
            x, y = x.float().contiguous(), x.new_empty(*x.shape[:-1], outs, dtype=torch.float32)
            native.call("linear_few", weight, n, ins, outs, packed.shape[1], x, packed, y)
            return y if bias is None else y.add_(bias)

        return few
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def in_place_of(plain, linear, rows):
    """The `matmul` of this Linear from now on. With another weight than its own, a masked or merged one, it is `plain`."""
    weight, bias = linear.weight, linear.bias
    fast = laid_out(weight, rows, bias)
    return lambda x, w, b: fast(x) if w is weight and b is bias else plain(x, w, b)


def attends(q, keys):
    """Whether attend_one takes these queries (B, H, E) and keys that are kept (B, G, K, E)."""
    return q.shape[-1] % 16 == 0 and keys.dtype == torch.float32 and native.fits(q)


def attend_one(q, k, v, keys, values, pos, mask=None, before=None):
    """What decode_triton.attend_one is on a GPU, in fp32."""
    (rows, heads, width), groups = q.shape, k.shape[1]
    q, k, v = (t if t.stride()[1:] == (width, 1) else t.contiguous() for t in (q.float(), k.float(), v.float()))
    y, share, places, (*other, seen) = torch.empty(rows, heads, width), heads // groups, keys.shape[2], before or (None,) * 3
    size, strides = (0, (0, 0)) if before is None else (other[0].shape[2], other[0].stride()[:2])
    strides = *(t.stride(0) for t in (q, k, v)), *keys.stride()[:2], *strides, 0 if mask is None else mask.stride(0)
    native.call("attend_one", q, rows, groups, share, width, size, places, *strides, q, k, v, pos, keys, values, mask, *other, seen, y)
    return y
