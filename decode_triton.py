"""What lies between the matrix products where nothing is trained, in Triton: a step of decoding is a few kernels a layer.

Plain torch takes 3 to 20 kernels for each of these, and at batch 1 a kernel costs its launch, whatever it does; torch.compile would
fuse them too, after a minute. The formulas are those of ops.py, kernels.py and cpu.c, in fp32 and without rounding in between. Nothing
waits for the host, tunes itself or adds atomically: a CUDA graph may record it, and repeats are bitwise equal.
Imported only where it can run, or be interpreted (TRITON_INTERPRET=1 pytest tests/test_decode_triton.py).
Read next: ops.py, kernels.py and cache.py, which ask `fits` and call this; replay.py, which records it.
"""

import os

import torch

from glu_triton import HAS_TRITON

OFF = os.environ.get("PRISM_NATIVE") == "0"  # the plain formulas, as on a CPU
SILU = {"BLOCK": 1024, "num_warps": 4}
ATTEND = {"STAGES": 3, "num_warps": 4}  # of keys and values, two tiles of 32 KB are on their way while one is computed
LEAST = 256  # keys of a program, or the second kernel costs more than it saves
MOST, PROGRAMS = 32, 264  # parts of a query; programs, two for each multiprocessor of an H200


def fits(x) -> bool:
    """Whether these stand for the plain formula: on this process's GPU, in bf16 or fp32, without gradients, outside of torch.compile."""
    if OFF or torch.compiler.is_compiling() or not x.is_cuda or torch.is_grad_enabled() or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.get_device() == torch.cuda.current_device()


if HAS_TRITON:
    import triton
    import triton.language as tl

    from glu_triton import LOG2E, PLAIN, _inverse, exp2

    LOW = tl.constexpr(-1e30)  # the maximum of nothing yet; no difference to it is nan

    @triton.jit(do_not_specialize=["rows"])
    def _norm_kernel(
        x_ptr, w_ptr, cos_ptr, sin_ptr, y_ptr, rows, heads, token_stride, head_stride, weight_stride, table_stride, eps,
        E: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
    ):  # fmt: skip
        """BR of the rows of E numbers, one for each head of each token."""
        row, e = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None], tl.arange(0, BE)[None, :]
        token, head, other = row // heads, row % heads, (e + E // 2) % E
        ok, x_ptr, w_ptr = (row < rows) & (e < E), x_ptr + token * token_stride + head * head_stride, w_ptr + head * weight_stride
        x = tl.load(x_ptr + e, mask=ok, other=0.0).to(tl.float32)
        scale = tl.zeros([BR, 1], tl.float32) + 1.0
        if NORM:
            scale = tl.rsqrt(tl.sum(x * x, 1) / E + eps)[:, None]
            x *= scale * tl.load(w_ptr + e, mask=ok, other=0.0).to(tl.float32)
        if TURN:
            z = tl.load(x_ptr + other, mask=ok, other=0.0).to(tl.float32) * scale
            if NORM:
                z *= tl.load(w_ptr + other, mask=ok, other=0.0).to(tl.float32)
            at = token * table_stride + e
            x = x * tl.load(cos_ptr + at, mask=ok, other=0.0) + z * tl.load(sin_ptr + at, mask=ok, other=0.0)
        tl.store(y_ptr + row * E + e, x.to(y_ptr.dtype.element_ty), mask=ok)

    @triton.jit
    def _silu_kernel(au_ptr, y_ptr, stride, f, BLOCK: tl.constexpr):
        """BLOCK neurons of a token."""
        token, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok, au_ptr = cols < f, au_ptr + token * stride
        a = tl.load(au_ptr + cols, mask=ok, other=0.0).to(tl.float32)
        u = tl.load(au_ptr + f + cols, mask=ok, other=0.0).to(tl.float32)
        y = a * _inverse(1.0 + exp2(a * -LOG2E)) * u
        tl.store(y_ptr + token * f + cols, y.to(y_ptr.dtype.element_ty), mask=ok)

    @triton.jit
    def _mean_kernel(p_ptr, seen_ptr, before_ptr, pos_ptr, y_ptr, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
        """One row: its token joins the sums, in fp64."""
        row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
        ok, at, pos = d < D, row * D + d, tl.load(pos_ptr + row)
        total = tl.load(seen_ptr + at, mask=ok, other=0.0) + tl.load(p_ptr + at, mask=ok, other=0.0).to(tl.float64)
        tl.store(seen_ptr + at, total, mask=ok)
        if BLOCK == 0:
            y = total / (pos + 1).to(tl.float64)
        else:
            before = tl.load(before_ptr + at, mask=ok, other=0.0)
            y = before / tl.maximum(pos // BLOCK * BLOCK, 1).to(tl.float64)
            tl.store(before_ptr + at, tl.where((pos + 1) % BLOCK == 0, total, before), mask=ok)
        tl.store(y_ptr + at, y.to(tl.float32), mask=ok)

    @triton.jit
    def _wish_kernel(p_ptr, b_ptr, w_ptr, c_ptr, beta_ptr, y_ptr, D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr):
        """One token."""
        token, d, k = tl.program_id(0).to(tl.int64), tl.arange(0, BD), tl.arange(0, BK)
        hidden = tl.load(p_ptr + token * D + d, mask=d < D, other=0.0) + tl.load(b_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + k[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        y = tl.sum(tl.maximum(hidden, 0.0)[None, :] * w, 1) + tl.load(c_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(y_ptr + token * K + k, y * tl.load(beta_ptr + k, mask=k < K, other=0.0).to(tl.float32), mask=k < K)

    @triton.jit
    def _dot(a, b, acc):
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc) if PLAIN else tl.dot(a, b, acc, input_precision="ieee")

    @triton.jit(do_not_specialize=["bound", "span", "first", "parts"])
    def _attend_kernel(
        q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, pos_ptr, mask_ptr, y_ptr, stats_ptr, scale, groups, share, bound, span, first, parts,
        q_stride, k_stride, v_stride, batch_stride, head_stride, key_stride, mask_stride,
        OWN: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
        E: tl.constexpr, H: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """The queries that share a key head, padded to the H of a matrix product, by `span` keys of one row; by the first program also the
        token's own key and value, which it leaves in the cache: no other one reads that place. WHOLE: those are all keys there are."""
        part, row, group = tl.program_id(0), (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
        h, e, end = tl.arange(0, H), tl.arange(0, BE), tl.minimum(bound, (part + 1) * span)
        here, head = e < E, group * share + h
        mine = (h < share)[:, None] & here[None, :]
        q = tl.load(q_ptr + row * q_stride + head[:, None] * E + e[None, :], mask=mine, other=0.0)
        scale *= LOG2E
        keys_ptr += row * batch_stride + group * head_stride
        values_ptr += row * batch_stride + group * head_stride
        top, total, acc = tl.full([H], LOW, tl.float32), tl.zeros([H], tl.float32), tl.zeros([H, BE], tl.float32)
        if OWN:
            pos = tl.load(pos_ptr + row).to(tl.int32)
            end = tl.minimum(end, pos)
            if part == 0:
                k = tl.load(k_ptr + row * k_stride + group * E + e, mask=here, other=0.0)
                v = tl.load(v_ptr + row * v_stride + group * E + e, mask=here, other=0.0)
                tl.store(keys_ptr + pos * key_stride + e, k, mask=here)
                tl.store(values_ptr + pos * key_stride + e, v, mask=here)
                top = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
                total, acc = total + 1.0, acc + v.to(tl.float32)[None, :]
        for start in tl.range(part * span, end, BK, num_stages=STAGES):
            j = start + tl.arange(0, BK)
            seen = j < end
            at, ok = j[:, None] * key_stride + e[None, :], seen[:, None] & here[None, :]
            k, v = tl.load(keys_ptr + at, mask=ok, other=0.0), tl.load(values_ptr + at, mask=ok, other=0.0)
            if MASKED:
                seen = seen & (tl.load(mask_ptr + row * mask_stride + j, mask=seen, other=0) != 0)
            s = tl.where(seen[None, :], _dot(q, k.T, tl.zeros([H, BK], tl.float32)) * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            p, factor = exp2(s - higher[:, None]), exp2(top - higher)
            total = total * factor + tl.sum(p, 1)
            high = p.to(v.dtype)
            acc, top = _dot(high, v, acc * factor[:, None]), higher
            if v.dtype != tl.float32:  # what rounding took from p
                acc = _dot((p - high.to(tl.float32)).to(v.dtype), v, acc)
        out = row * groups * share + head
        if WHOLE:
            tl.store(y_ptr + out[:, None] * E + e[None, :], (acc / total[:, None]).to(y_ptr.dtype.element_ty), mask=mine)
        else:
            out = out * parts + first + part
            tl.store(y_ptr + out[:, None] * E + e[None, :], acc, mask=mine)
            tl.store(stats_ptr + out * 2, top, mask=h < share)
            tl.store(stats_ptr + out * 2 + 1, total, mask=h < share)

    @triton.jit(do_not_specialize=["parts"])
    def _combine_kernel(sums_ptr, stats_ptr, y_ptr, parts, E: tl.constexpr, BE: tl.constexpr, MOST: tl.constexpr):
        """One query: its parts, each weighted by how far its maximum lies below the highest."""
        out, part, e = tl.program_id(0).to(tl.int64), tl.arange(0, MOST), tl.arange(0, BE)
        at, ok = out * parts + part, part < parts
        top, total = tl.load(stats_ptr + at * 2, mask=ok, other=LOW), tl.load(stats_ptr + at * 2 + 1, mask=ok, other=0.0)
        weight = exp2(top - tl.max(top, 0))
        acc = tl.load(sums_ptr + at[:, None] * E + e[None, :], mask=ok[:, None] & (e < E)[None, :], other=0.0)
        y = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
        tl.store(y_ptr + out * E + e, y.to(y_ptr.dtype.element_ty), mask=e < E)


def _power(n):
    return 1 << (n - 1).bit_length()


def norm_rotate(x, weight, weights, layout, eps, cos, sin):
    """x laid out as cpu.c wants it (ops._laid_out); tables (N, 1, E)."""
    n, heads, width, token_stride, head_stride = layout
    y, block = torch.empty(n * heads, width, dtype=x.dtype, device=x.device), _power(width)
    size = max(1, 2048 // block)
    w, cos, sin = x if weight is None else weight, x if cos is None else cos, x if sin is None else sin  # x: a pointer that is never read
    _norm_kernel[(triton.cdiv(n * heads, size),)](
        x, w, cos, sin, y, n * heads, heads, token_stride, head_stride, width if weights > 1 else 0, cos.stride(0), eps,
        E=width, NORM=weight is not None, TURN=cos is not x, BR=size, BE=block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return y


def swiglu(au):
    """silu(a) u of au = [a | u] (N, 2f)."""
    n, f = len(au), au.shape[1] // 2
    y = au.new_empty(n, f)
    _silu_kernel[(n, triton.cdiv(f, SILU["BLOCK"]))](au, y, au.stride(0), f, **SILU)
    return y


def mean_so_far(p, seen, before, pos, block):
    """What Cache.pool makes of one token p (B, D) of each row: sums (B, 1, D), of all and of the whole blocks, move on in place; block 0:
    the mean up to this token, else of the blocks before its own."""
    y = torch.empty_like(p)
    _mean_kernel[(len(p),)](p, seen, before, pos, y, D=p.shape[1], BLOCK=block, BD=_power(p.shape[1]), num_warps=1)
    return y


def wish(pooled, bias, weight, shift, beta):
    """(relu(pooled + bias) weight^T + shift) beta of pooled (N, D) in fp32, weight (K, D)."""
    (n, d), k = pooled.shape, len(weight)
    y = pooled.new_empty(n, k)
    _wish_kernel[(n,)](pooled, bias, weight, shift, beta, y, D=d, K=k, BD=_power(d), BK=_power(k), num_warps=1)
    return y


def attends(q, keys) -> bool:
    """Whether attend_one takes these queries (B, H, E) and keys that are kept (B, G, K, E)."""
    return fits(q) and q.shape[2] <= 256 and q.shape[1] <= 16 * keys.shape[1]


def attend_one(q, k, v, keys, values, pos, mask=None, before=None):
    """One token of each row: q (B, H, E), its own k and v (B, G, E), which go to place `pos` (B,) of keys and values (B, G, K, E), and what
    the mask (B, K) lets it see of the places before. before: keys and values (B, G, S, E) of an encoder, and their mask. -> (B, H, E)"""
    (rows, heads, width), groups = q.shape, k.shape[1]
    q, k, v = (t if t.stride()[1:] == (width, 1) else t.contiguous() for t in (q, k, v))
    share, y = heads // groups, torch.empty(rows, heads, width, dtype=q.dtype, device=q.device)
    calls = [(keys, values, mask)] if before is None else [before, (keys, values, mask)]
    spans = [max(LEAST, 64 * triton.cdiv(t.shape[2], 64 * min(MOST // len(calls), -(-PROGRAMS // (rows * groups))))) for t, *_ in calls]
    counts = [triton.cdiv(t.shape[2], span) for (t, *_), span in zip(calls, spans, strict=True)]
    parts, whole = sum(counts), sum(counts) == 1
    sums = y if whole else torch.empty(rows * heads * parts, width, dtype=torch.float32, device=q.device)
    stats = y if whole else torch.empty(rows * heads * parts, 2, dtype=torch.float32, device=q.device)
    block = max(16, _power(width))
    tile = 16384 // (block * keys.element_size())
    for i, ((keys, values, mask), span, count) in enumerate(zip(calls, spans, counts, strict=True)):
        assert keys.stride() == values.stride() and keys.stride(3) == 1
        _attend_kernel[(count, rows * groups)](
            q, k, v, keys, values, pos, q if mask is None else mask, sums, stats, width**-0.5, groups, share, keys.shape[2], span,
            sum(counts[:i]), parts, q.stride(0), k.stride(0), v.stride(0), *keys.stride()[:3], 0 if mask is None else mask.stride(0),
            OWN=i == len(calls) - 1, MASKED=mask is not None, WHOLE=whole, E=width, H=16, BE=block, BK=tile, **ATTEND,
        )  # fmt: skip
    if not whole:
        _combine_kernel[(rows * heads,)](sums, stats, y, parts, E=width, BE=block, MOST=MOST, num_warps=4)
    return y
