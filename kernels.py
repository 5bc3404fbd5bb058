"""The operators that torch lacks: the fused PolyGLU mix, its stateless Gumbel noise, and a chunked cross entropy.

`polyglu_mix` is the whole of PolyGLU between its two GEMMs: y = (sum_k g_k sigma_k(a)) * u with g = softmax_k(al + s).
Written naively it materialises ten tensors of [N, f, 4]; here one pass reads a and u and writes y, the backward reads
dy, a, u once more and writes da|du, and only (a, u, al, s) wait in between: what SwiGLU keeps, plus 16 bytes a token.
On a GPU it is a Triton kernel, on a CPU blocks of rows small enough to stay in cache; both sit behind one custom
operator, which torch.compile takes whole, without a graph break. The Triton path has run in Triton's interpreter on a
CPU (tests/test_kernels.py under TRITON_INTERPRET=1); its speed on a real GPU has not been measured yet.

Used by model.py (PolyGLU.forward, Transformer.nll). Read tests/test_kernels.py for the accuracy that is promised.
"""

import math
import os

import torch
import torch.nn.functional as F

aten = torch.ops.aten

# Plain functions, for feed-forwards with one activation and for the reference below.
ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,  # the erf form
    "sigmoid": torch.sigmoid,
    "relu2": lambda a: torch.relu(a).square(),
    "identity": lambda a: a,
}
DEFAULT_ACTS = ("relu", "tanh", "silu", "gelu")


def _tanh(a):
    """Three times faster than torch's on a CPU, 1.5e-7 off at most."""
    return torch.tanh(a) if a.dtype == torch.float64 else torch.sigmoid(a * 2).mul_(2).sub_(1)


# name: (v = sigma(a), q * sigma'(a) from (q, a, v)). torch's own fused derivatives: one pass each.
_RULES = {
    "relu": (torch.relu, lambda q, a, v: aten.threshold_backward(q, a, 0)),
    "tanh": (_tanh, lambda q, a, v: aten.tanh_backward(q, v)),
    "silu": (F.silu, lambda q, a, v: aten.silu_backward(q, a)),
    "gelu": (F.gelu, lambda q, a, v: aten.gelu_backward(q, a)),
    "sigmoid": (torch.sigmoid, lambda q, a, v: aten.sigmoid_backward(q, v)),
    "relu2": (ACTIVATIONS["relu2"], lambda q, a, v: torch.relu(a).mul_(q).mul_(2)),
    "identity": (lambda a: a, lambda q, a, v: q),
}


def polyglu_reference(au, al, s=None, acts=DEFAULT_ACTS):
    """The formula and nothing else, gradients by autograd. In float64 it is the truth of the tests."""
    a, u = au.chunk(2, dim=-1)  # (N, f)
    z = al.repeat_interleave(au.shape[0] // al.shape[0], 0)  # (N, f, K)
    g = torch.softmax(z if s is None else z + s[:, None, :], dim=-1)
    values = torch.stack([ACTIVATIONS[name](a) for name in acts], dim=-1)
    return (g * values).sum(-1) * u


# ---------------------------------------------------------------------------------------------------------------------
# torch: blocks of rows


def _blocks(n, f, rows, device):
    """(row, first token, last token): 32k elements per thread keep the dozen temporaries of a block in the L2 cache."""
    size = 1 << 24 if device.type == "cuda" else 32768 * torch.get_num_threads()
    per_row, step = n // rows, max(1, size // f)
    for row in range(rows):
        for lo in range(row * per_row, (row + 1) * per_row, step):
            yield row, lo, min(lo + step, (row + 1) * per_row)


def _weights(al, s):
    """Unnormalised gates [(n, f)] * K and their sum (n, f); for a gate constant over the tokens (1, f) and None."""
    if s is None:
        return list(torch.softmax(al, -1).t().contiguous()[:, None, :]), None
    if not s.is_cuda:
        # exp(al + s) = exp(al) exp(s): no exponential per element. Factors are at most 1: only the sum can underflow.
        column = (al - al.amax(-1, keepdim=True)).exp_().t().contiguous()  # (K, f)
        token = (s - s.amax(-1, keepdim=True)).exp_()  # (n, K)
        total = token @ column
        if total.min() >= 1e-20:
            return [token[:, k : k + 1] * column[k] for k in range(len(column))], total
    z = al.t()[:, None, :] + s.t()[:, :, None]  # (K, n, f)
    z = (z - z.amax(0)).exp_()
    return list(z), z.sum(0)


def _forward_torch(au, al, s, acts):
    n, f = au.shape[0], au.shape[1] // 2
    y = au.new_empty(n, f)
    for row, lo, hi in _blocks(n, f, len(al), au.device):
        a, u = au[lo:hi].to(al.dtype).chunk(2, 1)
        weights, total = _weights(al[row], s if s is None else s[lo:hi])
        m = torch.zeros_like(a)
        for name, weight in zip(acts, weights, strict=True):
            m.addcmul_(weight, _RULES[name][0](a))
        if total is not None:
            m.div_(total)
        torch.mul(m, u, out=m)
        y[lo:hi] = m
    return y


def _backward_torch(dy, au, al, s, acts):
    n, f = dy.shape
    dau, dal, ds = torch.empty_like(au), torch.zeros_like(al), au.new_empty(0) if s is None else torch.empty_like(s)
    for row, lo, hi in _blocks(n, f, len(al), au.device):
        a, u = au[lo:hi].to(al.dtype).chunk(2, 1)
        block_dy = dy[lo:hi].to(al.dtype)
        weights, total = _weights(al[row], s if s is None else s[lo:hi])
        values = [_RULES[name][0](a) for name in acts]
        m = torch.zeros_like(a)
        for weight, value in zip(weights, values, strict=True):
            m.addcmul_(weight, value)
        if total is not None:
            m.div_(total)
        dau[lo:hi, f:] = block_dy * m
        dm = block_dy * u
        if total is not None:
            dm.div_(total)  # the gates' normalisation rides on dm from here on
        da = torch.zeros_like(a)
        for k, (name, weight, value) in enumerate(zip(acts, weights, values, strict=True)):
            q = weight * dm  # g_k dm
            da += _RULES[name][1](q, a, value)
            dz = q.mul_(value - m)
            dal[row, :, k] += dz.sum(0)
            if s is not None:
                ds[lo:hi, k] = dz.sum(1)
        dau[lo:hi, :f] = da
    return dau, dal, ds


# ---------------------------------------------------------------------------------------------------------------------
# Triton: K = 4, the default activations. Imported only where it can run (or be interpreted).

HAS_TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _activations(a):
        """relu, tanh, sigmoid, Phi, phi of a: two exponentials for all of them."""
        e = tl.exp(-tl.abs(a))
        sig = tl.where(a >= 0, 1.0, e) / (1.0 + e)
        e2 = e * e
        tanh = tl.where(a >= 0, 1.0, -1.0) * (1.0 - e2) / (1.0 + e2)
        a2 = a * a
        # 1 - e2 loses every digit of a small a; the series is good to 5e-8 below 0.1
        tanh = tl.where(a2 < 0.01, a * (1.0 - a2 * (0.33333333 - 0.13333333 * a2)), tanh)
        gauss = tl.exp(-0.5 * a2)
        t = 1.0 / (1.0 + 0.3275911 * 0.70710678 * tl.abs(a))  # Abramowitz and Stegun 7.1.26: erf to 1.5e-7
        poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * poly * gauss  # Phi(-|a|)
        return tl.maximum(a, 0.0), tanh, sig, tl.where(a >= 0, 1.0 - tail, tail), gauss * 0.3989422804

    @triton.jit
    def _load4(ptr, index, ok):
        index = index * 4
        a, b = tl.load(ptr + index, mask=ok, other=0.0), tl.load(ptr + index + 1, mask=ok, other=0.0)
        return a, b, tl.load(ptr + index + 2, mask=ok, other=0.0), tl.load(ptr + index + 3, mask=ok, other=0.0)

    @triton.jit
    def _store4(ptr, index, a, b, c, d, ok):
        tl.store(ptr + index * 4, a, mask=ok)
        tl.store(ptr + index * 4 + 1, b, mask=ok)
        tl.store(ptr + index * 4 + 2, c, mask=ok)
        tl.store(ptr + index * 4 + 3, d, mask=ok)

    @triton.jit
    def _gates(al_ptr, s_ptr, cols, col_ok, toks, tok_ok, HAS_S: tl.constexpr):
        """softmax over 4 of al (BF) + s (BN), as four (BN, BF) tiles; padded lanes hold a uniform gate."""
        al0, al1, al2, al3 = _load4(al_ptr, cols, col_ok)
        s0, s1, s2, s3 = _load4(s_ptr, toks, tok_ok & HAS_S)
        top = tl.maximum(tl.maximum(al0, al1), tl.maximum(al2, al3))
        most = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
        p0 = tl.exp(s0 - most)[:, None] * tl.exp(al0 - top)[None, :]
        p1 = tl.exp(s1 - most)[:, None] * tl.exp(al1 - top)[None, :]
        p2 = tl.exp(s2 - most)[:, None] * tl.exp(al2 - top)[None, :]
        p3 = tl.exp(s3 - most)[:, None] * tl.exp(al3 - top)[None, :]
        total = p0 + p1 + p2 + p3
        if tl.min(total) < 1e-20:  # somewhere in this tile the two maxima disagree too far: an exponential per gate
            p0 = s0[:, None] + al0[None, :]
            p1 = s1[:, None] + al1[None, :]
            p2 = s2[:, None] + al2[None, :]
            p3 = s3[:, None] + al3[None, :]
            high = tl.maximum(tl.maximum(p0, p1), tl.maximum(p2, p3))
            p0, p1, p2, p3 = tl.exp(p0 - high), tl.exp(p1 - high), tl.exp(p2 - high), tl.exp(p3 - high)
            total = p0 + p1 + p2 + p3
        r = 1.0 / total
        return p0 * r, p1 * r, p2 * r, p3 * r

    @triton.jit
    def _forward_kernel(au_ptr, al_ptr, s_ptr, y_ptr, stride, per_row, f, HAS_S: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr):
        blocks = tl.cdiv(per_row, BN)  # tiles never straddle two rows: each has its own noise
        row = tl.program_id(0) // blocks
        local = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
        cols = tl.program_id(1) * BF + tl.arange(0, BF)
        tok_ok, col_ok = local < per_row, cols < f
        toks = row.to(tl.int64) * per_row + local
        ok = tok_ok[:, None] & col_ok[None, :]
        at = toks[:, None] * stride + cols[None, :]
        a = tl.load(au_ptr + at, mask=ok, other=0.0).to(tl.float32)
        u = tl.load(au_ptr + at + f, mask=ok, other=0.0).to(tl.float32)
        g0, g1, g2, g3 = _gates(al_ptr + row.to(tl.int64) * f * 4, s_ptr, cols, col_ok, toks, tok_ok, HAS_S)
        relu, tanh, sig, cdf, pdf = _activations(a)
        y = (g0 * relu + g1 * tanh + (g2 * sig + g3 * cdf) * a) * u
        tl.store(y_ptr + toks[:, None] * f + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)

    @triton.jit
    def _backward_kernel(
        dy_ptr, au_ptr, al_ptr, s_ptr, dau_ptr, dal_ptr, ds_ptr, stride, n, per_row, f,
        HAS_S: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
    ):  # fmt: skip
        """CHUNK tokens x BF neurons: writes da|du and partial sums of dal (BF, 4), ds (CHUNK, 4). No atomics."""
        chunks = tl.cdiv(per_row, CHUNK)
        row = tl.program_id(0) // chunks
        cols = tl.program_id(1) * BF + tl.arange(0, BF)
        col_ok = cols < f
        acc0 = tl.zeros([BF], tl.float32)
        acc1 = tl.zeros([BF], tl.float32)
        acc2 = tl.zeros([BF], tl.float32)
        acc3 = tl.zeros([BF], tl.float32)
        for start in range(0, CHUNK, BN):
            local = (tl.program_id(0) % chunks) * CHUNK + start + tl.arange(0, BN)
            tok_ok = local < per_row
            toks = row.to(tl.int64) * per_row + local
            ok = tok_ok[:, None] & col_ok[None, :]
            at = toks[:, None] * stride + cols[None, :]
            a = tl.load(au_ptr + at, mask=ok, other=0.0).to(tl.float32)
            u = tl.load(au_ptr + at + f, mask=ok, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + toks[:, None] * f + cols[None, :], mask=ok, other=0.0).to(tl.float32)
            g0, g1, g2, g3 = _gates(al_ptr + row.to(tl.int64) * f * 4, s_ptr, cols, col_ok, toks, tok_ok, HAS_S)
            relu, tanh, sig, cdf, pdf = _activations(a)
            m = g0 * relu + g1 * tanh + (g2 * sig + g3 * cdf) * a
            dm = dy * u
            slope = g0 * tl.where(a > 0, 1.0, 0.0) + g1 * (1.0 - tanh * tanh)
            slope += g2 * sig * (1.0 + a * (1.0 - sig)) + g3 * (cdf + a * pdf)
            to = toks[:, None] * (2 * f) + cols[None, :]
            tl.store(dau_ptr + to, (dm * slope).to(dau_ptr.dtype.element_ty), mask=ok)
            tl.store(dau_ptr + to + f, (dy * m).to(dau_ptr.dtype.element_ty), mask=ok)
            dz0 = g0 * dm * (relu - m)
            dz1 = g1 * dm * (tanh - m)
            dz2 = g2 * dm * (a * sig - m)
            dz3 = g3 * dm * (a * cdf - m)
            acc0 += tl.sum(dz0, 0)
            acc1 += tl.sum(dz1, 0)
            acc2 += tl.sum(dz2, 0)
            acc3 += tl.sum(dz3, 0)
            if HAS_S:
                to_ds = tl.program_id(1).to(tl.int64) * n + toks
                _store4(ds_ptr, to_ds, tl.sum(dz0, 1), tl.sum(dz1, 1), tl.sum(dz2, 1), tl.sum(dz3, 1), tok_ok)
        _store4(dal_ptr, tl.program_id(0).to(tl.int64) * f + cols, acc0, acc1, acc2, acc3, col_ok)


def _forward_triton(au, al, s):
    n, f, rows = au.shape[0], au.shape[1] // 2, len(al)
    y, has = au.new_empty(n, f), s is not None
    grid = (rows * triton.cdiv(n // rows, 16), triton.cdiv(f, 128))
    s = s if has else al  # a pointer that is never read
    _forward_kernel[grid](au, al, s, y, au.stride(0), n // rows, f, HAS_S=has, BN=16, BF=128, num_warps=4)
    return y


def _backward_triton(dy, au, al, s):
    n, f, rows = au.shape[0], au.shape[1] // 2, len(al)
    grid = (rows * triton.cdiv(n // rows, 256), triton.cdiv(f, 128))
    dau, dal = au.new_empty(n, 2 * f), al.new_empty(rows, grid[0] // rows, f, 4)
    has, s = s is not None, al if s is None else s
    ds = al.new_empty(grid[1] if has else 0, n, 4)
    args = (dy, au, al, s, dau, dal, ds, au.stride(0), n, n // rows, f)
    _backward_kernel[grid](*args, HAS_S=has, CHUNK=256, BN=16, BF=128, num_warps=4)
    return dau, dal.sum(1), ds.sum(0) if has else al.new_empty(0)


# ---------------------------------------------------------------------------------------------------------------------
# The operator


def polyglu_backend(device, acts=DEFAULT_ACTS, dtype=torch.bfloat16):
    """(name, reason) of what polyglu_mix will run, for the run's banner."""
    if torch.device(device).type != "cuda":
        return "torch", "row blocks in cache: no GPU"
    if tuple(acts) != DEFAULT_ACTS or dtype == torch.float64:
        return "torch", "row blocks: the fused kernel is for relu, tanh, silu, gelu in bf16 or fp32"
    return "triton", "fused kernel: one pass forward, one backward"


def _use_triton(au, acts):
    return polyglu_backend(au.device, acts, au.dtype)[0] == "triton"


@torch.library.custom_op("prism::polyglu", mutates_args=())
def _polyglu(au: torch.Tensor, al: torch.Tensor, s: torch.Tensor | None, acts: str) -> torch.Tensor:
    names = tuple(acts.split(","))
    return _forward_triton(au, al, s) if _use_triton(au, names) else _forward_torch(au, al, s, names)


@torch.library.custom_op("prism::polyglu_backward", mutates_args=())
def _polyglu_backward(
    dy: torch.Tensor, au: torch.Tensor, al: torch.Tensor, s: torch.Tensor | None, acts: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    names = tuple(acts.split(","))
    return _backward_triton(dy, au, al, s) if _use_triton(au, names) else _backward_torch(dy, au, al, s, names)


@_polyglu.register_fake
def _(au, al, s, acts):
    return au.new_empty(au.shape[0], au.shape[1] // 2)


@_polyglu_backward.register_fake
def _(dy, au, al, s, acts):
    return au.new_empty(au.shape), torch.empty_like(al), au.new_empty(0) if s is None else torch.empty_like(s)


def _setup(ctx, inputs, output):
    au, al, s, ctx.acts = inputs
    ctx.save_for_backward(au, al, s)


def _backward(ctx, dy):
    au, al, s = ctx.saved_tensors
    dau, dal, ds = torch.ops.prism.polyglu_backward(dy.contiguous(), au, al, s, ctx.acts)
    return dau, dal, None if s is None else ds, None


_polyglu.register_autograd(_backward, setup_context=_setup)


def polyglu_mix(au, al, s=None, acts=DEFAULT_ACTS):
    """y (N, f) = (sum_k g_k sigma_k(a)) * u in au's dtype.

    au (N, 2f) = [a | u]; al (R, f, K) fp32 = (alpha + noise) / tau of R rows of N/R tokens; s (N, K) fp32 / tau, or None.
    """
    if au.stride(-1) != 1:
        au = au.contiguous()
    return torch.ops.prism.polyglu(au, al.contiguous(), s if s is None else s.contiguous(), ",".join(acts))


# ---------------------------------------------------------------------------------------------------------------------
# Gumbel noise without a generator


def _mix32(x):
    """A full-avalanche hash of 32 bits held in int64; both multipliers are below 2^31, so no product overflows."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)


def gumbel(seed, rows, layer, f, K=4):
    """(R, f, K): one Gumbel(0, 1) per (seed, global row, layer, neuron, k), however and wherever it is recomputed."""
    rows = rows.long()
    key = _mix32((rows & 0xFFFFFFFF) ^ ((seed * 0x9E3779B1 + layer * 0x85EBCA77) & 0xFFFFFFFF))
    key = _mix32(key ^ ((rows >> 32) + (seed >> 32) + 0x27D4EB2F & 0xFFFFFFFF))[:, None]
    other = _mix32(key ^ (layer + 0x165667B1))  # two keys per row, or rows would be shifted copies of one another
    n = _mix32(_mix32(torch.arange(f * K, device=rows.device) + key & 0xFFFFFFFF) ^ other) >> 9  # 23 bits
    u = (2 * n + 1).float() * 2.0**-24  # exact; never 0, never 1
    return -torch.log(-torch.log(u)).view(-1, f, K)


# ---------------------------------------------------------------------------------------------------------------------
# Cross entropy without the logits


def _matmul32(a, b):
    """bf16 operands, fp32 result. CPUs have no such GEMM: there the result is rounded to bf16 on the way."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype == torch.bfloat16 else (a @ b)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, vocab, token_weight, chunk, grads):
        acc = torch.promote_types(h.dtype, torch.float32)  # of logits, sums and dW
        keep = targets != -100
        index = None
        if not h.is_cuda:  # skip ignored tokens where asking how many there are costs no synchronisation
            index = keep.nonzero().squeeze(1)
        n = h.shape[0] if index is None else len(index)
        nll = torch.zeros(h.shape[0], dtype=acc, device=h.device)
        w = weight.to(h.dtype)
        dh = torch.zeros_like(h) if grads else None
        dw = torch.zeros(weight.shape, dtype=acc, device=h.device) if grads and n else None
        for lo in range(0, n, chunk):
            rows = slice(lo, min(lo + chunk, n)) if index is None else index[lo : lo + chunk]
            x, ok = h[rows], keep[rows]
            target = targets[rows].clamp(min=0)[:, None]
            logits = _matmul32(x, w.t()).to(acc)  # (chunk, Vpad)
            logits[:, vocab:] = -math.inf
            chosen = logits.gather(1, target)
            top = logits.amax(1, keepdim=True)
            p = logits.sub_(top).exp_()
            total = p.sum(1, keepdim=True)
            nll[rows] = torch.where(ok, (total.log() + top - chosen).squeeze(1), 0)
            if grads:
                scale = ok.to(acc) if token_weight is None else ok * token_weight[rows].to(acc)
                p.mul_(scale[:, None] / total)
                dx = p.scatter_add_(1, target, -scale[:, None]).to(h.dtype)
                dh[rows] = dx @ w
                if dw.dtype == h.dtype:
                    dw.addmm_(dx.t(), x)
                else:
                    dw += _matmul32(dx.t(), x)
        ctx.grads = (dh, dw)
        ctx.like = weight.shape, weight.dtype
        total = nll.sum() if token_weight is None else (nll * token_weight).sum()
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (dh, dw), (shape, dtype), ctx.grads = ctx.grads, ctx.like, None  # scaled in place: a second backward must fail
        dw = grad.new_zeros(shape, dtype=dtype) if dw is None else dw.mul_(grad).to(dtype)
        return dh.mul_(grad), dw, None, None, None, None, None


@torch.compiler.disable  # a Python loop over chunks: nothing in it for a compiler
def linear_cross_entropy(h, weight, targets, vocab, token_weight=None, chunk=2048):
    """(sum of nll, nll per token detached) of softmax(h @ weight[:vocab].T) against targets (-100: ignored, nll 0).

    The gradients are computed here, chunk by chunk, so that logits of [chunk, V] are all that ever exists.
    h (N, d) in the activation dtype, weight (Vpad, d); token_weight (N,) scales the sum, not the nll that is returned.
    """
    grads = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(h, weight, targets, vocab, token_weight, chunk, grads)
