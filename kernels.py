"""Gated feed-forwards between their two GEMMs: the fused PolyGLU mix, its stateless Gumbel noise, and the plain GLU.

`polyglu_mix` is the whole of PolyGLU between its two GEMMs: y = (sum_k g_k sigma_k(a)) * u with g = softmax_k(al + s).
Written naively it materialises ten tensors of [N, f, 4]; here one pass reads a and u and writes y, the backward reads
dy, a, u once more and writes da|du, and only (a, u, al, s) wait in between: what SwiGLU keeps, plus 16 bytes a token.
On a GPU it is a Triton kernel (glu_triton.py), on a CPU one of C (cpu.c); both sit behind one custom operator, which torch.compile
takes whole, without a graph break. So does SwiGLU's way back.
Read next: model.py (PolyGLU, SwiGLU), which calls it; glu_triton.py; tests/test_kernels.py for the accuracy that is promised.
"""

import math

import torch
import torch.nn.functional as F
from torch import library

import decode_triton
import native
from glu_triton import _backward_triton, _forward_triton, silu_backward
from ops import full

# Plain functions, for feed-forwards with one activation and for the reference below; polyglu's way back takes the derivative from SLOPES.
# silu in swiglu and the four DEFAULT_ACTS in polyglu are computed by cpu.c and glu_triton.py: give a variant a name of its own.
ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,  # the erf form
    "relu2": lambda a: torch.relu(a).square(),
    "identity": lambda a: a,
}
SLOPES = {
    "relu": lambda a: (a > 0).to(a.dtype),
    "tanh": lambda a: 1 - torch.tanh(a).square(),
    "silu": lambda a: torch.sigmoid(a) * (1 + a * torch.sigmoid(-a)),
    "gelu": lambda a: 0.5 * torch.erfc(-a * 0.5**0.5) + a * torch.exp(-0.5 * a * a) * (2 * math.pi) ** -0.5,
    "relu2": lambda a: 2 * torch.relu(a),
    "identity": torch.ones_like,
}
DEFAULT_ACTS = ("relu", "tanh", "silu", "gelu")


def _swiglu(au):
    """Under a compiler the plain formula, which it fuses."""
    if decode_triton.fits(au):
        return decode_triton.swiglu(_rows(au)).view(*au.shape[:-1], -1)
    if not native.fits(au):
        a, u = au.chunk(2, -1)
        return F.silu(a) * u
    rows, f = _rows(au), au.shape[-1] // 2
    y = au.new_empty(*au.shape[:-1], f)
    native.call("swiglu_forward", au, len(rows), f, rows.stride(0), rows, y)
    return y


def _rows(x):
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _swiglu_back(dy, au):
    if au.device.type != "cpu":
        return silu_backward(dy, au)
    both = torch.empty_like(au, memory_format=torch.contiguous_format)
    native.call("swiglu_backward", au, len(au), au.shape[1] // 2, au.stride(0), dy.contiguous(), au, both)
    return both


class _SwiGLU(torch.autograd.Function):
    """Keeps au alone, and its way back is one operator, one pass, for a compiler too: its own would read all of this twice."""

    @staticmethod
    def forward(ctx, au):
        ctx.save_for_backward(au)
        return _swiglu(au)

    @staticmethod
    def backward(ctx, dy):
        (au,) = ctx.saved_tensors
        if au.device.type != "cpu":
            return torch.ops.prism.swiglu_backward(_rows(dy), _rows(au)).view(au.shape)
        if dy.requires_grad:
            raise RuntimeError("glu on a CPU is differentiated once")
        return _swiglu_back(_rows(dy), _rows(au)).view(au.shape)


_silu = library.custom_op("prism::swiglu_backward", _swiglu_back, mutates_args=(), schema="(Tensor dy, Tensor au) -> Tensor")
_silu.register_fake(lambda dy, au: au.new_empty(au.shape))


def glu(au, act="silu"):
    """act(a) * u of au = [a | u]."""
    if act == "silu" and (native.fits(au) or (au.device.type in ("cuda", "meta") and au.dtype != torch.float64)):
        return _SwiGLU.apply(au) if torch.is_grad_enabled() else _swiglu(au)
    a, u = au.chunk(2, -1)
    return ACTIVATIONS[act](a) * u


def polyglu_reference(au, al, s=None, acts=DEFAULT_ACTS):
    """The formula and nothing else, gradients by autograd. In float64 it is the truth of the tests."""
    a, u = au.chunk(2, dim=-1)  # (N, f)
    z = al.repeat_interleave(au.shape[0] // al.shape[0], 0)  # (N, f, K)
    g = torch.softmax(z if s is None else z + s[:, None, :], dim=-1)
    values = torch.stack([ACTIVATIONS[name](a) for name in acts], dim=-1)
    return (g * values).sum(-1) * u


# ---- the formula where nothing is fused: other activations, fp64, a CPU without cpu.c ----------------------------------


def _pieces(au, al, s, acts):
    """Per few tokens of a row of al: row, tokens, a and u (n, f) in at least fp32, gates (K, n or 1, f), values (K, n, f) and their mix."""
    row, size = len(au) // len(al), max(1, (1 << 18) // al.shape[1])  # so few that what is made of them stays in the cache
    for r in range(len(al)):
        for lo in range(r * row, (r + 1) * row, size):
            tokens = slice(lo, min(lo + size, (r + 1) * row))
            a, u = full(au[tokens]).chunk(2, -1)
            z = al[r].t()[:, None] if s is None else al[r].t()[:, None] + s[tokens].t()[..., None]
            g = (z - z.amax(0)).exp_()
            g /= g.sum(0)
            values = torch.stack([ACTIVATIONS[name](a) for name in acts])
            yield r, tokens, a, u, g, values, (g * values).sum(0)


def _forward_plain(au, al, s, acts):
    y = au.new_empty(au.shape[0], au.shape[1] // 2)
    for _, tokens, _, u, _, _, mean in _pieces(au, al, s, acts):
        y[tokens] = mean * u
    return y


def _backward_plain(dy, au, al, s, acts):
    """Written out, for inside of an operator there is no autograd."""
    dau, dal, ds = au.new_empty(au.shape), torch.zeros_like(al), al.new_empty(0 if s is None else s.shape)
    for r, tokens, a, u, g, values, mean in _pieces(au, al, s, acts):
        d = dy[tokens].to(a.dtype)
        dau[tokens] = torch.cat((d * u * sum(g[k] * SLOPES[name](a) for k, name in enumerate(acts)), d * mean), -1)
        dz = (values - mean) * g * (d * u)
        dal[r] += dz.sum(1).t()
        if s is not None:
            ds[tokens] = dz.sum(2).t()
    return dau, dal, ds


# ---- cpu.c --------------------------------------------------------------------------------------------------------------


def _gates(al, s, n):
    """-> far, al (R, 4, f) and s (N, 4) as cpu.c wants them: their exponentials, unless these might all underflow in a product."""
    al, s = al.transpose(1, 2).contiguous(), al.new_zeros(n, 4) if s is None else s
    (low, high), (least, most) = al.aminmax(dim=1, keepdim=True), s.aminmax(dim=1, keepdim=True)
    if not n or not (high - low).max() + (most - least).max() < 60:
        return 1, al, s
    return 0, (al - high).exp_(), (s - most).exp_()


def _forward_native(au, al, s):
    n, f = au.shape[0], au.shape[1] // 2
    y = au.new_empty(n, f)
    far, al, s = _gates(al, s, n)
    native.call("polyglu_forward", au, n, f, len(al), au.stride(0), far, au, al, s, y)
    return y


def _backward_native(dy, au, al, s):
    n, f, rows = au.shape[0], au.shape[1] // 2, len(al)
    pieces = max(1, -(-n // (64 * rows)))
    dau, dal, ds = au.new_empty(au.shape), al.new_zeros(rows, pieces, 4, f), al.new_empty(n, 4)
    far, al, token = _gates(al, s, n)
    native.call("polyglu_backward", au, n, f, rows, pieces, au.stride(0), far, dy, au, al, token, dau, dal, ds)
    return dau, dal.sum(1).transpose(1, 2).contiguous(), al.new_empty(0) if s is None else ds


# ---- the operator -------------------------------------------------------------------------------------------------------


def polyglu_backend(device, acts=DEFAULT_ACTS, dtype=torch.bfloat16):
    """(name, reason) of what polyglu_mix will run, for the run's banner."""
    device = torch.device(device).type
    if tuple(acts) != DEFAULT_ACTS or dtype == torch.float64:
        return "torch", "only relu, tanh, silu and gelu in bf16 or fp32 are fused"
    if device == "cuda":
        return "triton", "one pass forward, one backward"
    built, why = native.compiled()
    return ("torch", f"row by row: {why}") if built is None else ("cpu.c", why)


def _run(au, al, s, acts):
    names = tuple(acts.split(","))
    backend = polyglu_backend(au.device, names, au.dtype)[0]
    if backend == "torch":
        return _forward_plain(au, al, s, names)
    return (_forward_triton if backend == "triton" else _forward_native)(au, al, s)


def _run_backward(dy, au, al, s, acts):
    names = tuple(acts.split(","))
    backend = polyglu_backend(au.device, names, au.dtype)[0]
    if backend == "torch":
        return _backward_plain(dy, au, al, s, names)
    return (_backward_triton if backend == "triton" else _backward_native)(dy, au, al, s)


def _save(ctx, inputs, output):
    au, al, s, ctx.acts = inputs
    ctx.save_for_backward(au, al, s)


def _backward(ctx, dy, run=None):
    au, al, s = ctx.saved_tensors
    dau, dal, ds = (run or torch.ops.prism.polyglu_backward)(dy.contiguous(), au, al, s, ctx.acts)
    return dau, dal, None if s is None else ds, None


_ARGS = "Tensor au, Tensor al, Tensor? s, str acts"
_mix = library.custom_op("prism::polyglu", _run, mutates_args=(), schema=f"({_ARGS}) -> Tensor")
_mix.register_fake(lambda au, al, s, acts: au.new_empty(au.shape[0], au.shape[1] // 2))
_mix.register_autograd(_backward, setup_context=_save)
_back = library.custom_op(
    "prism::polyglu_backward", _run_backward, mutates_args=(), schema=f"(Tensor dy, {_ARGS}) -> (Tensor, Tensor, Tensor)"
)
_back.register_fake(lambda dy, au, al, s, acts: (au.new_empty(au.shape), torch.empty_like(al), al.new_empty(0 if s is None else s.shape)))


class _Eager(torch.autograd.Function):
    """On an uncompiled CPU, where the operator costs 0.1 ms a call and, at the first, a second of imports."""

    forward, setup_context = staticmethod(_run), staticmethod(_save)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _backward(ctx, dy, _run_backward)


def polyglu_mix(au, al, s=None, acts=DEFAULT_ACTS):
    """y (N, f) = (sum_k g_k sigma_k(a)) * u in au's dtype.

    au (N, 2f) = [a | u]; al (R, f, K) fp32 = (alpha + noise) / tau of R rows of N/R tokens; s (N, K) fp32 / tau, or None.
    """
    assert au.shape[0] % al.shape[0] == 0, f"{au.shape[0]} tokens are no whole rows of {al.shape[0]}"
    if au.is_cuda and polyglu_backend(au.device, acts, au.dtype)[0] == "torch":  # for a compiler to fuse
        return polyglu_reference(full(au), al, s, acts).to(au.dtype)
    au = au if au.stride(-1) == 1 else au.contiguous()
    args = au, al.contiguous(), s if s is None else s.contiguous(), ",".join(acts)
    if au.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.ops.prism.polyglu(*args)
    return _Eager.apply(*args) if torch.is_grad_enabled() else _run(*args)


# ---- Gumbel noise without a generator -----------------------------------------------------------------------------


def _mix32(x):
    """A full-avalanche hash of 32 bits held in int64; both multipliers are below 2^31, so no product overflows."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)


def gumbel(seed, rows, layer, f, K=4):
    """(R, f, K): one Gumbel(0, 1) per (seed, global row, layer, neuron, k), however and wherever it is recomputed."""
    rows = rows.long()
    key = _mix32((rows & 0xFFFFFFFF) ^ (((seed * 0x9E3779B1 & 0xFFFFFFFF) + layer * 0x85EBCA77) & 0xFFFFFFFF))
    key = _mix32(key ^ ((rows >> 32) + (seed >> 32) + 0x27D4EB2F & 0xFFFFFFFF))[:, None]
    other = _mix32(key ^ (layer + 0x165667B1))  # two keys per row, or rows would be shifted copies of one another
    u = torch.empty(len(rows), f * K, device=rows.device)  # exact; never 0, never 1
    if native.fits(u):
        native.call("uniform", u, *u.shape, key, other, u)
    else:
        n = _mix32(_mix32(torch.arange(f * K, device=rows.device) + key & 0xFFFFFFFF) ^ other) >> 9  # 23 bits
        u = (2 * n + 1).float() * 2.0**-24
    return u.log_().neg_().log_().neg_().view(-1, f, K)
