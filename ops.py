"""Operators that plain autograd does wastefully: RMSNorm and rotation, the gate's projection and pool, cross entropy without the logits.

Norms and rotations keep only their input and are one pass: of cpu.c where it is built, of decode_triton.py on a GPU without gradients;
elsewhere they are the plain formula, for torch.compile to fuse. The loss computes its gradients on the way forward, a chunk of logits at a
time. Values and gradients are those of the formulas.
Read next: model.py, which calls them; kernels.py, the feed-forwards; native.py and cpu.c.
"""

import functools
import math

import torch
import torch.nn.functional as F

import decode_triton
import head
import native


def full(x: torch.Tensor) -> torch.Tensor:
    """At least fp32: norms, rotations, routing and loss are never computed in bf16 (fp64 stays, for tests)."""
    return x if x.dtype == torch.float64 else x.float()


# ---- norms and rotations ------------------------------------------------------------------------------------------------


def swap(x):
    return x.roll(x.shape[-1] // 2, -1)


def _plain(x, weight, eps, cos, sin):
    """x / rms(x) * weight, then turned; weight None: only turned, cos None: only normed. What torch.compile fuses."""
    wide = full(x)
    if weight is not None:
        wide = F.rms_norm(wide, x.shape[-1:], None, eps) * weight
    if cos is not None:
        wide = wide * cos + swap(wide) * sin
    return wide.to(x.dtype)


class _NormRotate(torch.autograd.Function):
    """The same by cpu.c, in one pass either way; keeps x alone."""

    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        ctx.eps = eps
        ctx.save_for_backward(x, weight, cos, sin)
        return _native(x, weight, eps, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, cos, sin = ctx.saved_tensors
        x3, w, weights, layout = _laid_out(x, weight)
        size, dx = 32, torch.empty_like(x, memory_format=torch.contiguous_format)  # rows of a task
        dw = None if w is None else w.new_zeros(-(-layout[0] // size), weights, x.shape[-1])
        native.call("norm_backward", x, *layout, size, dy.contiguous(), x3, w, weights, ctx.eps, cos, sin, dx, dw)
        return dx, None if dw is None else dw.sum(0).view(weight.shape).to(weight.dtype), None, None, None


def _laid_out(x, weight):
    """As cpu.c wants them: x, its weight in fp32, how many rows that has; N, H, E of x (N, H, E), and its strides."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    x = x if x.dim() < 4 else x.flatten(0, -3)
    (n, heads), (row, head) = (*x.shape[:-1], 1, 1)[:2], (*x.stride()[:-1], 0, 0)[:2]
    w = None if weight is None else weight.detach().float().contiguous()
    return x, w, 1 if w is None else w.numel() // x.shape[-1], (n, heads, x.shape[-1], row, head)


def _native(x, weight, eps, cos, sin):
    x3, w, weights, layout = _laid_out(x, weight)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    native.call("norm_forward", x, *layout, x3, w, weights, eps, cos, sin, y)
    return y


def _norm_rotate(x, weight, eps, cos, sin):
    if decode_triton.fits(x):
        x3, w, weights, layout = _laid_out(x, weight)
        cos, sin = (t if t is None else t.expand(layout[0], -1, -1) for t in (cos, sin))
        return decode_triton.norm_rotate(x3, w, weights, layout, eps, cos, sin).view(x.shape)
    if not native.fits(x, cos):
        return _plain(x, weight, eps, cos, sin)
    if cos is not None:
        cos, sin = (t if len(t) == len(x) else t.expand(len(x), -1, -1) for t in (cos, sin))
        cos, sin = cos.contiguous(), sin.contiguous()
    return (_NormRotate.apply if torch.is_grad_enabled() else _native)(x, weight, eps, cos, sin)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in fp32; weight (D,), or (H, D) of its own for every head."""
    return _norm_rotate(x, weight, eps, None, None)


def rotate(x, rope):
    """Rotary position, half-split, in fp32: x (N, H, E), tables (N, 1, E) of [cos, cos] and [-sin, sin]."""
    return _norm_rotate(x, None, 0.0, *rope)


def norm_rotate(x, weight, eps, rope, dtype):
    """rotate(rms_norm(x)), without rounding in between, in `dtype`. weight None: no norm."""
    return _norm_rotate(x, weight, eps, *rope).to(dtype)


# ---- attention on a CPU -------------------------------------------------------------------------------------------------


class Gather(torch.autograd.Function):
    """Rows of x by index, where the way back is known too: its backward is a gather again, not a slow scatter-add."""

    @staticmethod
    def forward(ctx, x, index, back, blank):
        ctx.save_for_backward(back, blank)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        back, blank = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return grad if blank is None else grad.index_fill_(0, blank, 0), None, None, None


def attention(q, k, v, mask, causal):
    """q (S, H, n, E), k and v (S, G, m, E) -> (S, H, n, E), one softmax per query.

    SDPA, but for bf16 on a CPU: there it takes up to ten times as long as two matmuls and a softmax (LOG.md), as long as the scores of a
    few hundred tokens are no burden.
    """
    if q.is_cuda and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:  # grouped heads in fp32 would take the slowest kernel there
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 1024):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    shape, share = q.shape, q.shape[1] // k.shape[1]  # the queries of one key head lie behind one another: no key is repeated
    q, k, v = (t.flatten(0, 1) for t in (q.unflatten(1, (-1, share)).flatten(2, 3), k, v))  # (S G, share n or m, E)
    later = q.new_full((shape[2], k.shape[1]), -math.inf).triu_(1).repeat(share, 1) if causal else q.new_zeros(1, 1)
    scores = torch.baddbmm(later, q, k.mT, alpha=shape[-1] ** -0.5)  # an added mask needs no backward: p is 0 there
    if mask is not None:
        scores.view(shape[0], -1, share, shape[2], k.shape[1]).masked_fill_(~mask.unsqueeze(-3), -math.inf)  # (S, G, share, n, m)
    return torch.bmm(scores.softmax(-1), v).view(shape[0], -1, share, *shape[2:]).flatten(1, 2)


def attend_segments(q, k, v, segments):
    """The same of flat tokens, not padded, q (Nq, H, E), k and v (Nk, G, E), by cpu.c, without gradients; None where it does not fit,
    nor the keys and values of a segment on a thread's stack."""
    if torch.is_grad_enabled() or q.dtype != torch.bfloat16 or not native.fits(q) or segments.max_k * q.shape[-1] > 1 << 17:
        return None
    (_, heads, width), y = q.shape, torch.empty_like(q, memory_format=torch.contiguous_format)
    q, k, v = (t if t.stride()[1:] == (width, 1) else t.contiguous() for t in (q, k, v))
    sizes, cu = (segments.count, heads, k.shape[1], width, int(segments.causal)), (segments.cu_q.int(), segments.cu_k.int())
    native.call("attend_segments", q, *sizes, *cu, q.stride(0), k.stride(0), v.stride(0), q, k, v, y)
    return y


# ---- the gate of PolyGLU ------------------------------------------------------------------------------------------------


class Thin(torch.autograd.Function):
    """F.linear in fp32 onto a few channels, of a wide bf16 x: keeps x as it is, not the fp32 copy that autograd would keep."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        if x.is_cuda and x.dtype == torch.bfloat16:
            return matmul32(x, weight.to(x.dtype).t())
        return full(x) @ full(weight).t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight.to(x.dtype), matmul32(grad.t(), x).to(weight.dtype)


def wish(pooled, bias, weight, shift, beta):
    """What the gate makes of its pool, in fp32: (relu(pooled + bias) weight^T + shift) beta."""
    if decode_triton.fits(pooled):
        return decode_triton.wish(pooled, bias, weight, shift, beta)
    return F.linear(F.relu(pooled + full(bias)), full(weight), full(shift)) * full(beta)


def _running_sum(x):
    """x.cumsum(0) for a long and narrow x (N, C)."""
    if x.device.type == "cpu":
        return x.t().contiguous().cumsum(1).t()
    size = 256  # a GPU would walk each column with one thread, or one block: so blocks of rows first, then what lies before each
    blocks = F.pad(x, (0, 0, 0, -len(x) % size)).view(-1, size, x.shape[1]).cumsum(1)
    before = F.pad(blocks[:-1, -1].cumsum(0), (0, 0, 1, 0))
    return (blocks + before[:, None]).flatten(0, 1)[: len(x)]


class WindowMean(torch.autograd.Function):
    """Mean of p over the tokens start:end of each token. Sums in fp64; `first`:`last` are the tokens whose window holds this one, so
    that the way back is a difference of cumulative sums too, and nothing is scattered. None, None: the window itself, for torch.compile
    does not trace a Function that is given one tensor twice."""

    @staticmethod
    def forward(ctx, p, start, end, first, last):
        ctx.save_for_backward(start, end, first, last)
        return WindowMean.sums(p, None, start, end, WindowMean.share(start, end))

    @staticmethod
    def backward(ctx, grad):
        start, end, first, last = ctx.saved_tensors
        first, last = (start, end) if first is None else (first, last)
        return WindowMean.sums(grad, WindowMean.share(start, end), first, last, None), None, None, None, None

    @staticmethod
    def share(start, end):
        return (end - start).clamp(min=1).double().reciprocal()

    @staticmethod
    def sums(x, before, start, end, after):
        """The sum of x over start:end of each token; x is multiplied by `before` (N,), the sum by `after`."""
        if native.fits(x, x):
            total, y = x.new_empty(len(x) + 1, x.shape[1], dtype=torch.float64), torch.empty_like(x, memory_format=torch.contiguous_format)
            native.call("window_sum", x, *x.shape, x.contiguous(), before, start, end, after, total, y)
            return y
        wide = x.double() if before is None else x.double() * before[:, None]
        total = F.pad(_running_sum(wide), (0, 0, 1, 0))  # (N + 1, C)
        sums = total[end] - total[start]
        return (sums if after is None else sums * after[:, None]).to(x.dtype)


# ---- the head -----------------------------------------------------------------------------------------------------------


def matmul32(a, b):
    """bf16 operands, fp32 result. CPUs have no such GEMM: there the result is rounded to bf16 on the way."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype == torch.bfloat16 else (a @ b)


def _nll_and_gradient(logits, target, vocab, grads):
    """nll (n,) of targets (n,), none ignored; with `grads` its gradient takes the place of the logits (n, Vpad).
    A third time in cpu.c and twice in head.py: to try another loss take the plain way of Transformer.nll, in model.py."""
    if native.fits(logits):
        low, high = target.aminmax()
        assert 0 <= low and high < vocab, f"targets from {low} to {high} are not all among {vocab} ids"
        nll = logits.new_empty(len(logits), dtype=torch.float32)
        native.call("cross_entropy", logits, len(logits), vocab, logits.shape[1], int(grads), target.long(), logits, nll)
        return nll
    wide = full(logits[:, :vocab])
    nll = wide.logsumexp(1) - wide.gather(1, target[:, None])[:, 0]
    if grads:
        p = wide.softmax(1)
        p[torch.arange(len(p)), target] -= 1
        logits[:, :vocab], logits[:, vocab:] = p, 0
    return nll


def _chunks(h, w, targets, vocab, grads, chunk):
    """(nll, dh, dW in at least fp32), a chunk of logits at a time: a CPU's way, and that of float64. Ignored tokens are left out."""
    acc = torch.promote_types(h.dtype, torch.float32)  # of logits, sums and dW
    index = (targets != -100).nonzero().squeeze(1)
    nll = torch.zeros(len(h), dtype=acc, device=h.device)
    dh = torch.zeros_like(h) if grads else None
    dw = torch.zeros(w.shape, dtype=acc, device=h.device) if grads and len(index) else None
    for rows in index.split(chunk) if len(index) else ():
        x = h[rows]
        logits = x @ w.t()  # (chunk, Vpad)
        nll[rows] = _nll_and_gradient(logits, targets[rows], vocab, grads)
        if grads:
            dh[rows] = logits @ w
            dw = dw.addmm_(logits.t(), x) if dw.dtype == h.dtype else dw.add_(logits.t() @ x)
    return nll, dh, dw


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, vocab, chunk, grads):
        w = weight.to(h.dtype)
        way = functools.partial(_chunks, chunk=chunk)
        if h.is_cuda and h.dtype != torch.float64 and len(h):
            way = head.narrow if h.dtype == torch.bfloat16 and h.shape[1] <= head.NARROW else head.wide
        nll, *ctx.grads = way(h, w, targets, vocab, grads)
        ctx.like = weight.shape, weight.dtype
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (dh, dw), (shape, dtype), ctx.grads = ctx.grads, ctx.like, None  # scaled in place: a second backward must fail
        dw = grad.new_zeros(shape, dtype=dtype) if dw is None else dw.mul_(grad).to(dtype)
        return dh.mul_(grad), dw, None, None, None, None


def linear_cross_entropy(h, weight, targets, vocab, chunk=1024):
    """(sum of nll, nll per token detached) of softmax(h @ weight[:vocab].T) against targets (-100: ignored, nll 0).

    The gradients are computed here, so that logits of [chunk, V] are all that ever exists; a GPU goes the ways of head.py.
    h (N, d) in the activation dtype, weight (Vpad, d). Call it outside of torch.compile, as train.py does: a loop
    over chunks holds nothing for a compiler.
    """
    grads = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(h, weight, targets, vocab, chunk, grads)
