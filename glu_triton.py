"""What lies between a feed-forward's two GEMMs, in Triton: PolyGLU's mix of relu, tanh, silu and gelu, and SwiGLU's way back.

A pass reads a and u (and dy) and writes y (or da|du) once; nothing of size [N, f, 4] exists. Their bytes alone take an H200 0.40 ms forward
and 0.67 ms back at 65,536 tokens of 4096 neurons, but so do 44 and 74 instructions an element: to be fast here is to count them. Hence
gates are a column's exponential times a token's, each of the routing's two sums pulls out the factor that is constant along it, an
activation is a few instructions around one approximate exponential or reciprocal, and tiles are on their way while one is computed.
Measured there: 0.48 and 0.99 ms; SwiGLU's way back 0.64 (LOG.md).
Imported only where it can run, or be interpreted (TRITON_INTERPRET=1 pytest tests/test_kernels.py -k triton).
Read next: kernels.py, whose operators call this; tests/test_kernels.py for the accuracy that is promised.
"""

import os

import torch

HAS_TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
# CHUNK tokens a program walks in tiles of BN tokens x BF neurons, 8 elements (16 bytes) a thread, STAGES - 1 tiles on their way into shared
# memory: the fastest of 17 each on an H200. 168 registers: 12 warps a SM, and what spills lies outside of the loop.
FORWARD = {"CHUNK": 128, "BN": 4, "BF": 256, "STAGES": 4, "num_warps": 4}
BACKWARD = {"CHUNK": 128, "BN": 1, "BF": 256, "STAGES": 3, "num_warps": 1, "maxnreg": 168}
SILU = {"BLOCK": 4096, "num_warps": 8}

if HAS_TRITON:
    import triton
    import triton.language as tl

    PLAIN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
    LOG2E, DENSITY = tl.constexpr(1.4426950408889634), tl.constexpr(0.3989422804)

    @triton.jit
    def exp2(x):  # one instruction here and below; the full-range forms spend four to six
        return tl.exp2(x) if PLAIN else tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)

    @triton.jit
    def _inverse(x):
        return 1.0 / x if PLAIN else tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)

    @triton.jit
    def _activations(a):
        """relu, tanh, sigmoid, gelu, Phi(-|a|) of a. Where exp(-a) overflows, its reciprocals are the 0 that they should be."""
        e, b, relu = exp2(a * -LOG2E), tl.abs(a), tl.maximum(a, 0.0)
        tanh = 2.0 * _inverse(e * e + 1.0) - 1.0
        # log2 Phi(-b), fitted so that Phi and b Phi are at most 6.5e-7 off: one exponential, no reciprocal; gelu(a) = relu(a) - b Phi(-b)
        p = 0.007282377734 + b * -0.0005002594845
        p = -1.0000018557 + b * (-1.151052049 + b * (-0.4594140765 + b * (-0.05234323993 + b * p)))
        tail = exp2(p)
        return relu, tanh, _inverse(1.0 + e), relu - b * tail, tail

    @triton.jit
    def _load4(ptr, index, ok):
        """The four of each index; where not ok, 0."""
        index = index * 4
        a, b = tl.load(ptr + index, mask=ok, other=0.0), tl.load(ptr + index + 1, mask=ok, other=0.0)
        return a, b, tl.load(ptr + index + 2, mask=ok, other=0.0), tl.load(ptr + index + 3, mask=ok, other=0.0)

    @triton.jit
    def _store4(ptr, index, b, c, d, ok):
        """What sums to zero, of each index: the first is minus the other three. Joined: one exchange and one store, not four."""
        four = tl.reshape(tl.join(tl.join(-(b + c + d), c), tl.join(b, d)), [b.shape[0], 4])
        tl.store(ptr + index[:, None] * 4 + tl.arange(0, 4)[None, :], four, mask=ok[:, None])

    @triton.jit
    def _columns(al_ptr, cols, col_ok, HAS_S: tl.constexpr):
        """exp(al - max) per neuron; with no s, the gates themselves."""
        a0, a1, a2, a3 = _load4(al_ptr, cols, col_ok)
        top = tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3))
        a0, a1, a2, a3 = exp2((a0 - top) * LOG2E), exp2((a1 - top) * LOG2E), exp2((a2 - top) * LOG2E), exp2((a3 - top) * LOG2E)
        r = 1.0 if HAS_S else 1.0 / (a0 + a1 + a2 + a3)
        return a0 * r, a1 * r, a2 * r, a3 * r

    @triton.jit
    def _narrow(s_ptr, limit, CHUNK: tl.constexpr, HAS_S: tl.constexpr):
        """Whether exp(al) exp(s - s_0) may stand for exp(al + s) with these tokens: then nothing exceeds e^50 or vanishes in the sum."""
        far = 0.0
        if HAS_S:
            toks = tl.arange(0, CHUNK)
            s0, s1, s2, s3 = _load4(s_ptr, toks, toks < limit)
            far = tl.max(tl.maximum(tl.maximum(tl.abs(s1 - s0), tl.abs(s2 - s0)), tl.abs(s3 - s0)), 0)
        return far < 25.0

    @triton.jit
    def _gates(A0, A1, A2, A3, s0, s1, s2, s3, al_ptr, cols, col_ok, HAS_S: tl.constexpr, NARROW: tl.constexpr):
        """Unnormalised gates of a tile, 1 / their sum, and of each but the first the factor that is the token's own."""
        if HAS_S:
            if NARROW:
                S1, S2, S3 = exp2((s1 - s0) * LOG2E)[:, None], exp2((s2 - s0) * LOG2E)[:, None], exp2((s3 - s0) * LOG2E)[:, None]
                p0, p1, p2, p3 = A0[None, :], A1[None, :] * S1, A2[None, :] * S2, A3[None, :] * S3
            else:  # an exponential per gate
                a0, a1, a2, a3 = _load4(al_ptr, cols, col_ok)
                p0, p1 = s0[:, None] + a0[None, :], s1[:, None] + a1[None, :]
                p2, p3 = s2[:, None] + a2[None, :], s3[:, None] + a3[None, :]
                top = tl.maximum(tl.maximum(p0, p1), tl.maximum(p2, p3))
                p0, p1 = exp2((p0 - top) * LOG2E), exp2((p1 - top) * LOG2E)
                p2, p3 = exp2((p2 - top) * LOG2E), exp2((p3 - top) * LOG2E)
                S1, S2, S3 = p1, p2, p3
            r = _inverse((p0 + p3) + (p1 + p2))
        else:
            p0, p1, p2, p3 = A0[None, :], A1[None, :], A2[None, :], A3[None, :]
            r, S1, S2, S3 = 1.0, 1.0, 1.0, 1.0
        return p0, p1, p2, p3, r, S1, S2, S3

    @triton.jit
    def _tile(ptr, start, stride, limit, cols, col_ok, BN: tl.constexpr):
        local = start + tl.arange(0, BN)
        return tl.load(ptr + local[:, None] * stride + cols[None, :], mask=(local < limit)[:, None] & col_ok[None, :], other=0.0)

    @triton.jit
    def _tokens(s_ptr, start, limit, BN: tl.constexpr, HAS_S: tl.constexpr):
        local = start + tl.arange(0, BN)
        return _load4(s_ptr, local, (local < limit) & HAS_S)

    @triton.jit
    def _walk_forward(
        A0, A1, A2, A3, au_ptr, al_ptr, s_ptr, y_ptr, stride, limit, f, cols, col_ok,
        HAS_S: tl.constexpr, NARROW: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        for start in tl.range(0, limit, BN, num_stages=STAGES):
            toks = start + tl.arange(0, BN)
            s0, s1, s2, s3 = _tokens(s_ptr, start, limit, BN, HAS_S)
            a, u = _tile(au_ptr, start, stride, limit, cols, col_ok, BN), _tile(au_ptr + f, start, stride, limit, cols, col_ok, BN)
            p0, p1, p2, p3, r, _, _, _ = _gates(A0, A1, A2, A3, s0, s1, s2, s3, al_ptr, cols, col_ok, HAS_S, NARROW)
            x = a.to(tl.float32)
            relu, tanh, sig, gelu, _ = _activations(x)
            y = (p0 * relu + p1 * tanh + p2 * (x * sig) + p3 * gelu) * (r * u.to(tl.float32))
            ok = (toks < limit)[:, None] & col_ok[None, :]
            tl.store(y_ptr + toks[:, None] * f + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)

    @triton.jit
    def _forward_kernel(
        au_ptr, al_ptr, s_ptr, y_ptr, stride, per_row, f,
        HAS_S: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """CHUNK tokens x BF neurons; blocks never straddle two rows, because each has its own noise."""
        chunks = tl.cdiv(per_row, CHUNK)
        row, first = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks) * CHUNK
        cols, limit, token = tl.program_id(1) * BF + tl.arange(0, BF), tl.minimum(per_row - first, CHUNK), row * per_row + first
        col_ok, al_ptr, s_ptr, au_ptr, y_ptr = cols < f, al_ptr + row * f * 4, s_ptr + token * 4, au_ptr + token * stride, y_ptr + token * f
        A0, A1, A2, A3 = _columns(al_ptr, cols, col_ok, HAS_S)
        if _narrow(s_ptr, limit, CHUNK, HAS_S):
            _walk_forward(A0, A1, A2, A3, au_ptr, al_ptr, s_ptr, y_ptr, stride, limit, f, cols, col_ok, HAS_S, True, BN, STAGES)
        else:
            _walk_forward(A0, A1, A2, A3, au_ptr, al_ptr, s_ptr, y_ptr, stride, limit, f, cols, col_ok, HAS_S, False, BN, 1)

    @triton.jit
    def _walk_backward(
        A0, A1, A2, A3, dy_ptr, au_ptr, al_ptr, s_ptr, dau_ptr, ds_ptr, stride, limit, f, cols, col_ok, HAS_S: tl.constexpr,
        NARROW: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        # dz sums to zero over k, so dz_0 follows from the others; summed over tokens in registers, across warps only at the end
        sum1, sum2, sum3 = tl.zeros([BN, BF], tl.float32), tl.zeros([BN, BF], tl.float32), tl.zeros([BN, BF], tl.float32)
        for start in tl.range(0, limit, BN, num_stages=STAGES):
            toks = start + tl.arange(0, BN)
            s0, s1, s2, s3 = _tokens(s_ptr, start, limit, BN, HAS_S)
            a, u = _tile(au_ptr, start, stride, limit, cols, col_ok, BN), _tile(au_ptr + f, start, stride, limit, cols, col_ok, BN)
            dy = _tile(dy_ptr, start, f, limit, cols, col_ok, BN)
            tok_ok = toks < limit
            p0, p1, p2, p3, r, S1, S2, S3 = _gates(A0, A1, A2, A3, s0, s1, s2, s3, al_ptr, cols, col_ok, HAS_S, NARROW)
            x, g = a.to(tl.float32), dy.to(tl.float32)
            relu, tanh, sig, gelu, tail = _activations(x)
            silu, density = x * sig, exp2(x * x * (-0.5 * LOG2E)) * tl.abs(x)
            m, dm = (p0 * relu + p1 * tanh + p2 * silu + p3 * gelu) * r, g * u.to(tl.float32) * r  # the normalisation rides on dm
            low = p3 * (tail - DENSITY * density)  # gelu' of -|a|: 1 minus that of |a|
            slope = p1 * (1.0 - tanh * tanh) + p2 * (sig + silu - silu * sig) + tl.where(x > 0, (p0 + p3) - low, low)
            to, ok = dau_ptr + toks[:, None] * (2 * f) + cols[None, :], tok_ok[:, None] & col_ok[None, :]
            tl.store(to, (dm * slope).to(dau_ptr.dtype.element_ty), mask=ok)
            tl.store(to + f, (g * m).to(dau_ptr.dtype.element_ty), mask=ok)
            mean = dm * m
            v1, v2, v3 = dm * tanh - mean, dm * silu - mean, dm * gelu - mean  # dz_k = v_k A_k S_k
            sum1, sum2, sum3 = sum1 + S1 * v1, sum2 + S2 * v2, sum3 + S3 * v3
            if HAS_S:
                d1, d2, d3 = tl.sum(p1 * v1, 1), tl.sum(p2 * v2, 1), tl.sum(p3 * v3, 1)
                _store4(ds_ptr, toks, d1, d2, d3, tok_ok)
        d1, d2, d3 = tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0)
        if NARROW:
            d1, d2, d3 = d1 * A1, d2 * A2, d3 * A3
        return d1, d2, d3

    @triton.jit
    def _backward_kernel(
        dy_ptr, au_ptr, al_ptr, s_ptr, dau_ptr, dal_ptr, ds_ptr, stride, n, per_row, f,
        HAS_S: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """As forward; also leaves partial sums of dal (BF, 4) and ds (CHUNK, 4). No atomics: repeats are bitwise equal."""
        chunks = tl.cdiv(per_row, CHUNK)
        row, first = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks) * CHUNK
        cols, limit, token = tl.program_id(1) * BF + tl.arange(0, BF), tl.minimum(per_row - first, CHUNK), row * per_row + first
        col_ok, al_ptr, s_ptr, au_ptr = cols < f, al_ptr + row * f * 4, s_ptr + token * 4, au_ptr + token * stride
        dy_ptr, dau_ptr, ds_ptr = dy_ptr + token * f, dau_ptr + token * (2 * f), ds_ptr + (tl.program_id(1).to(tl.int64) * n + token) * 4
        A0, A1, A2, A3 = _columns(al_ptr, cols, col_ok, HAS_S)
        if _narrow(s_ptr, limit, CHUNK, HAS_S):
            d1, d2, d3 = _walk_backward(
                A0, A1, A2, A3, dy_ptr, au_ptr, al_ptr, s_ptr, dau_ptr, ds_ptr, stride, limit, f, cols, col_ok,
                HAS_S, True, BN, BF, STAGES,
            )  # fmt: skip
        else:
            d1, d2, d3 = _walk_backward(
                A0, A1, A2, A3, dy_ptr, au_ptr, al_ptr, s_ptr, dau_ptr, ds_ptr, stride, limit, f, cols, col_ok,
                HAS_S, False, BN, BF, 1,
            )  # fmt: skip
        _store4(dal_ptr, tl.program_id(0).to(tl.int64) * f + cols, d1, d2, d3, col_ok)

    @triton.jit
    def _silu_kernel(dy_ptr, au_ptr, dau_ptr, stride, f, BLOCK: tl.constexpr):
        """da|du of BLOCK neurons of a token."""
        token, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok, au_ptr, dau_ptr = cols < f, au_ptr + token * stride, dau_ptr + token * (2 * f)
        a = tl.load(au_ptr + cols, mask=ok, other=0.0).to(tl.float32)
        u = tl.load(au_ptr + f + cols, mask=ok, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + token * f + cols, mask=ok, other=0.0).to(tl.float32)
        sig = _inverse(1.0 + exp2(a * -LOG2E))
        silu = a * sig
        tl.store(dau_ptr + cols, (dy * u * (sig + silu - silu * sig)).to(dau_ptr.dtype.element_ty), mask=ok)
        tl.store(dau_ptr + f + cols, (dy * silu).to(dau_ptr.dtype.element_ty), mask=ok)


def _forward_triton(au, al, s):
    n, f, rows = au.shape[0], au.shape[1] // 2, len(al)
    y, has, s = au.new_empty(n, f), s is not None, al if s is None else s  # without s, a pointer that is never read
    grid = (rows * triton.cdiv(n // rows, FORWARD["CHUNK"]), triton.cdiv(f, FORWARD["BF"]))
    _forward_kernel[grid](au, al, s, y, au.stride(0), n // rows, f, HAS_S=has, **FORWARD)
    return y


def _backward_triton(dy, au, al, s):
    n, f, rows = au.shape[0], au.shape[1] // 2, len(al)
    grid = (rows * triton.cdiv(n // rows, BACKWARD["CHUNK"]), triton.cdiv(f, BACKWARD["BF"]))
    dau, dal = au.new_empty(n, 2 * f), al.new_empty(rows, grid[0] // rows, f, 4)
    has, s = s is not None, al if s is None else s
    ds = al.new_empty(grid[1] if has else 0, n, 4)
    _backward_kernel[grid](dy, au, al, s, dau, dal, ds, au.stride(0), n, n // rows, f, HAS_S=has, **BACKWARD)
    return dau, dal.sum(1), ds.sum(0) if has else al.new_empty(0)


def silu_backward(dy, au):
    """da|du (N, 2f) of y = silu(a) u from dy (N, f) and au = [a | u]."""
    n, f = dy.shape
    dy, au = dy.contiguous(), au if au.stride(-1) == 1 else au.contiguous()
    dau = au.new_empty(n, 2 * f)
    _silu_kernel[(n, triton.cdiv(f, SILU["BLOCK"]))](dy, au, dau, au.stride(0), f, **SILU)
    return dau
