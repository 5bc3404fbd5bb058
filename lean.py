"""A model that only reads, on a CPU: its weights laid out for the vector units, and what a few rows need in the fewest calls.

A decoded token of a small model is a thousand operators of 2 to 30 us, half of it the calls (LOG.md). None of this has gradients.
Read next: Transformer.lean in model.py, which puts it in place; replay.py, the same for a GPU.
"""

import torch
import torch.nn.functional as F

from ops import full, swap

FEW_NUMBERS = 1 << 16  # of norms and rotations


def few():
    """Rows of a product up to which FBGEMM is the faster: oneDNN multiplies twice as fast, but a call costs it 20 us more, on any number
    of threads."""
    return 4 if torch.get_num_threads() == 1 else 8


def half_fits(weights, rows):
    """Whether FBGEMM's product of a few fp32 rows with an fp16 matrix can stand for the bf16 one: it streams up to twice as many weights
    a second (LOG.md), and bf16 numbers from 6e-5 to 65,504 are fp16 numbers; smaller ones move by 3e-8 at most."""
    fits = rows <= few() and "fbgemm" in torch.backends.quantized.supported_engines
    return fits and all(w.dtype == torch.bfloat16 and w.device.type == "cpu" and bool(w.abs().max() < 65504) for w in weights)


def laid_out(weight, rows, bias=None, half=False):
    """x -> F.linear(x, weight, bias) for `rows` rows at a time, with the weight in the order that a CPU's vector units want: in fp32 one
    row streams a transposed matrix twice as fast; `half` is the above, for fp32 x; everything else takes the blocked form of oneDNN.
    Later changes of the weight are not seen."""
    bias = None if bias is None else bias.detach().to(weight.dtype)
    if weight.dtype == torch.float32 and rows == 1:
        if weight.shape[0] >= weight.shape[1]:
            weight.data = weight.data.t().contiguous().t()
        return lambda x: F.linear(x, weight, bias)
    weight = weight.detach()
    if half:
        packed, most = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float()), few()
        many = lambda x: F.linear(x.to(weight.dtype), weight, bias).float()  # noqa: E731 (a prompt)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed) if x.shape[0] <= most else many(x)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def seen(q, k, v):
    """The heads of one query q (S, share, E) over all keys k, v (S, m, E), without gradients: SDPA takes up to twice as long there."""
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v)


def _unit(weight, eps):
    """x -> x / rms(x) * weight in fp32, in four calls."""
    width = weight.shape[-1]
    scaled, floor = weight.detach().float() * width**0.5, torch.tensor((eps * width) ** 0.5)
    return lambda x: torch.div(x, torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(floor)).mul_(scaled)


def few_normed(weight, eps, many):
    """rms_norm of a few rows: there a call costs more than its work."""
    unit = _unit(weight, eps)
    return lambda x: unit(x).to(x.dtype) if x.numel() <= FEW_NUMBERS else many(x)


def few_turned(weight, eps, many):
    """norm_rotate of a few rows; weight None: only turned."""
    unit = full if weight is None else _unit(weight, eps)

    def turned(x, rope, dtype):
        if x.numel() > FEW_NUMBERS:
            return many(x, rope, dtype)
        wide, (cos, sin) = unit(x), rope
        return torch.addcmul(swap(wide).mul_(sin), wide, cos).to(dtype)

    return turned
