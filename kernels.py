"""Gated feed-forwards between their two GEMMs: the fused PolyGLU mix, its stateless Gumbel noise, and the plain GLU.

`polyglu_mix` is the whole of PolyGLU between its two GEMMs: y = (sum_k g_k sigma_k(a)) * u with g = softmax_k(al + s).
Written naively it materialises ten tensors of [N, f, 4]; here one pass reads a and u and writes y, the backward reads
dy, a, u once more and writes da|du, and only (a, u, al, s) wait in between: what SwiGLU keeps, plus 16 bytes a token.
On a GPU it is a Triton kernel (glu_triton.py), on a CPU blocks of rows small enough to stay in cache; both sit behind one custom
operator, which torch.compile takes whole, without a graph break. So does SwiGLU's way back, which a compiler would read twice.
Read next: model.py (PolyGLU, SwiGLU), which calls it; glu_triton.py; tests/test_kernels.py for the accuracy that is promised.
"""

import torch
import torch.nn.functional as F
from torch import library

from glu_triton import _backward_triton, _forward_triton, silu_backward

aten, _MINUS = torch.ops.aten, torch.tensor(-1.0)

# Plain functions, for feed-forwards with one activation and for the reference below.
ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,  # the erf form
    "relu2": lambda a: torch.relu(a).square(),
    "identity": lambda a: a,
}
DEFAULT_ACTS = ("relu", "tanh", "silu", "gelu")


def _tanh(a, out):
    """Three times faster than torch's on a CPU, 1.5e-7 off at most."""
    return torch.tanh(a, out=out) if a.dtype == torch.float64 else torch.add(_MINUS, torch.mul(a, 2, out=out).sigmoid_(), alpha=2, out=out)


# name: (sigma(a, out=), q * sigma'(a) from q, a, v = sigma(a) into out): torch's own fused derivatives, one pass each
_RULES = {
    "relu": (aten.relu.out, lambda q, a, v, out: aten.threshold_backward.grad_input(q, a, 0, grad_input=out)),
    "tanh": (_tanh, lambda q, a, v, out: aten.tanh_backward.grad_input(q, v, grad_input=out)),
    "silu": (aten.silu.out, lambda q, a, v, out: aten.silu_backward.grad_input(q, a, grad_input=out)),
    "gelu": (aten.gelu.out, lambda q, a, v, out: aten.gelu_backward.grad_input(q, a, grad_input=out)),
    "relu2": (lambda a, out: aten.relu.out(a, out=out).square_(), lambda q, a, v, out: aten.relu.out(a, out=out).mul_(q).mul_(2)),
    "identity": (lambda a, out: out.copy_(a), lambda q, a, v, out: out.copy_(q)),
}


def _glu(au, act):
    a, u = au.chunk(2, dim=-1)
    return _RULES[act][0](a, out=torch.empty_like(a)).mul_(u)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, au, act):
        ctx.act = act
        ctx.save_for_backward(au)
        return _glu(au, act)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (au,), (value, slope) = ctx.saved_tensors, _RULES[ctx.act]
        a, u = au.chunk(2, dim=-1)
        both = torch.empty_like(au)
        da, du = both.chunk(2, dim=-1)
        v = value(a, out=torch.empty_like(a))
        torch.mul(dy, v, out=du)
        slope(dy * u, a, v, out=da)
        return both, None


class _SwiGLU(torch.autograd.Function):
    """The plain formula, which a compiler fuses, and a way back that it takes as one operator: its own would read all of this twice."""

    @staticmethod
    def forward(ctx, au):
        ctx.save_for_backward(au)
        a, u = au.chunk(2, -1)
        return F.silu(a) * u

    @staticmethod
    def backward(ctx, dy):
        (au,) = ctx.saved_tensors
        return torch.ops.prism.swiglu_backward(dy.reshape(-1, dy.shape[-1]), au.reshape(-1, au.shape[-1])).view(au.shape)


_swiglu_backward = library.custom_op("prism::swiglu_backward", silu_backward, mutates_args=(), schema="(Tensor dy, Tensor au) -> Tensor")
_swiglu_backward.register_fake(lambda dy, au: au.new_empty(au.shape))


def glu(au, act="silu"):
    """act(a) * u of au = [a | u]: keeps au alone and writes its gradient into one buffer, as polyglu_mix does."""
    if act == "silu" and au.device.type in ("cuda", "meta") and au.dtype != torch.float64 and torch.is_grad_enabled():
        return _SwiGLU.apply(au)
    if torch.compiler.is_compiling():  # it fuses the plain form, and cannot trace writes into the halves of a buffer
        return ACTIVATIONS[act](au.chunk(2, -1)[0]) * au.chunk(2, -1)[1]
    return _GLU.apply(au, act) if torch.is_grad_enabled() else _glu(au, act)  # a Function costs a decoded token 20 us a layer


def polyglu_reference(au, al, s=None, acts=DEFAULT_ACTS):
    """The formula and nothing else, gradients by autograd. In float64 it is the truth of the tests."""
    a, u = au.chunk(2, dim=-1)  # (N, f)
    z = al.repeat_interleave(au.shape[0] // al.shape[0], 0)  # (N, f, K)
    g = torch.softmax(z if s is None else z + s[:, None, :], dim=-1)
    values = torch.stack([ACTIVATIONS[name](a) for name in acts], dim=-1)
    return (g * values).sum(-1) * u


# ---- torch: blocks of rows ----------------------------------------------------------------------------------------


def _blocks(al, s, n, f, buffers):
    """Per block of rows: row, tokens, gate(k, out) -> unnormalised g_k, their sum (None: 1), scratch [buffers, tokens, f].

    An eager operator costs 2 to 5 us before it touches an element, then 0.15 ns each: blocks of 128k per thread are few, and in cache."""
    size, per_row = (1 << 24 if al.is_cuda else (1 << 17) * torch.get_num_threads()), n // len(al)
    step = max(1, -(-per_row // max(1, -(-per_row * f // size))))  # rows in pieces of the same size
    scratch = al.new_empty(buffers, step, f)
    top = al.transpose(1, 2).contiguous()  # (R, K, f)
    columns = torch.softmax(top, 1) if s is None else (top - top.amax(1, keepdim=True)).exp_()
    tokenwise = None if s is None else (s - s.amax(1, keepdim=True)).exp_().t().contiguous()[..., None]  # (K, N, 1)
    for row in range(len(al)):
        column = columns[row].unbind(0)
        for lo in range(row * per_row, (row + 1) * per_row, step):
            tokens = slice(lo, min(lo + step, (row + 1) * per_row))
            work = scratch[:, : tokens.stop - lo]
            if s is None:  # a gate constant over the tokens
                yield row, tokens, lambda k, out: column[k], None, work
                continue
            # exp(al + s) = exp(al) exp(s): no exponential per element. Factors are at most 1: only the sum can underflow.
            token, total = tokenwise[:, tokens].unbind(0), work[0]
            torch.mul(token[0], column[0], out=total)
            for t, c in zip(token[1:], column[1:], strict=True):
                total.addcmul_(t, c)
            if not al.is_cuda and total.min() >= 1e-20:
                yield row, tokens, lambda k, out: torch.mul(token[k], column[k], out=out), total, work[1:]
            else:
                gates = top[row][:, None] + s[tokens].t().contiguous()[..., None]  # (K, n, f)
                total.copy_(gates[0])
                for z in gates[1:]:
                    torch.maximum(total, z, out=total)
                gates.sub_(total).clamp_(min=-80).exp_()  # MKL's exp takes eight times as long where it underflows
                yield row, tokens, lambda k, out: gates[k], torch.sum(gates, 0, out=total), work[1:]


def _forward_torch(au, al, s, acts):
    n, f = au.shape[0], au.shape[1] // 2
    y = au.new_empty(n, f)
    for _, tokens, gate, total, work in _blocks(al, s, n, f, 6):
        a, u, m, v, g = work[:5].unbind(0)
        a.copy_(au[tokens, :f])
        u.copy_(au[tokens, f:])
        torch.mul(_RULES[acts[0]][0](a, out=v), gate(0, g), out=m)
        for k in range(1, len(acts)):
            m.addcmul_(_RULES[acts[k]][0](a, out=v), gate(k, g))
        y[tokens] = m.mul_(u) if total is None else m.mul_(u).div_(total)
    return y


def _backward_torch(dy, au, al, s, acts):
    n, f, more = dy.shape[0], dy.shape[1], range(1, len(acts))
    dau, dal, ds = torch.empty_like(au), al.new_zeros(len(al), len(acts), f), al.new_empty(len(acts), 0 if s is None else n)
    for row, tokens, gate, total, work in _blocks(al, s, n, f, 5 + 2 * len(acts)):
        a, dm, g, m = work[:4].unbind(0)
        q, values = work[4 : 4 + len(acts)], work[4 + len(acts) : 4 + 2 * len(acts)]  # g_k dm, sigma_k(a): (K, n, f)
        a.copy_(au[tokens, :f])
        dm.copy_(au[tokens, f:])
        g.copy_(dy[tokens])
        torch.mul(_RULES[acts[0]][0](a, out=values[0]), gate(0, q[0]), out=m)
        for k in more:
            m.addcmul_(_RULES[acts[k]][0](a, out=values[k]), gate(k, q[0]))
        dm.mul_(g)
        if total is not None:  # the gates' normalisation rides on dm from here on
            m.div_(total)
            dm.div_(total)
        dau[tokens, f:] = g.mul_(m)
        for k in range(len(acts)):
            torch.mul(gate(k, q[k]), dm, out=q[k])
        da = _RULES[acts[0]][1](q[0], a, values[0], g)
        for k in more:
            da += _RULES[acts[k]][1](q[k], a, values[k], q[0])
        dau[tokens, :f] = da
        dz = values[1:].sub_(m).mul_(q[1:])  # they sum to zero over k, which gives dz_0
        dal[row, 1:] += dz.sum(1)
        if s is not None:
            torch.sum(dz, 2, out=ds[1:, tokens])
    dal[:, 0], ds[0] = -dal[:, 1:].sum(1), -ds[1:].sum(0)
    return dau, dal.transpose(1, 2).contiguous(), ds.t().contiguous() if s is not None else al.new_empty(0)


# ---- The operator -------------------------------------------------------------------------------------------------


def polyglu_backend(device, acts=DEFAULT_ACTS, dtype=torch.bfloat16):
    """(name, reason) of what polyglu_mix will run, for the run's banner."""
    cuda, known = torch.device(device).type == "cuda", tuple(acts) == DEFAULT_ACTS and dtype != torch.float64
    why = "it fuses relu, tanh, silu and gelu in bf16 or fp32, nothing else" if cuda else "no GPU"
    return ("triton", "one pass forward, one backward") if cuda and known else ("torch", f"row blocks in cache: {why}")


def _run(au, al, s, acts):
    names = tuple(acts.split(","))
    fused = polyglu_backend(au.device, names, au.dtype)[0] == "triton"
    return _forward_triton(au, al, s) if fused else _forward_torch(au, al, s, names)


def _run_backward(dy, au, al, s, acts):
    names = tuple(acts.split(","))
    fused = polyglu_backend(au.device, names, au.dtype)[0] == "triton"
    return _backward_triton(dy, au, al, s) if fused else _backward_torch(dy, au, al, s, names)


def _save(ctx, inputs, output):
    au, al, s, ctx.acts = inputs
    ctx.save_for_backward(au, al, s)


def _backward(ctx, dy, run=None):
    au, al, s = ctx.saved_tensors
    dau, dal, ds = (run or torch.ops.prism.polyglu_backward)(dy.contiguous(), au, al, s, ctx.acts)
    return dau, dal, None if s is None else ds, None


_ARGS = "Tensor au, Tensor al, Tensor? s, str acts"
_op = library.custom_op("prism::polyglu", _run, mutates_args=(), schema=f"({_ARGS}) -> Tensor")
_op.register_fake(lambda au, al, s, acts: au.new_empty(au.shape[0], au.shape[1] // 2))
_op.register_autograd(_backward, setup_context=_save)
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
    n = _mix32(_mix32(torch.arange(f * K, device=rows.device) + key & 0xFFFFFFFF) ^ other) >> 9  # 23 bits
    u = (2 * n + 1).float() * 2.0**-24  # exact; never 0, never 1
    return -torch.log(-torch.log(u)).view(-1, f, K)
