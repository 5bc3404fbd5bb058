"""A tensor cast to FP8 in both layouts at once: read once, written row-major and transposed.

Hopper multiplies FP8 only row-major by column-major, so a product over tokens (wgrad) needs its operands transposed. Written naively that
is a cast and a copy of bytes across rows, which no pointwise kernel does well. Here a tile is cast in registers, stored, turned around in
shared memory and stored again, 16 bytes a thread on every side. amax stays with torch: compiled, it rides on the kernel that produces x.
Read next: fp8.py, which calls it; tests/test_fp8_triton.py, which holds it against the plain formula bit by bit.
"""

import itertools

import torch
from torch import library

from configurator import die
from glu_triton import HAS_TRITON

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MAX = {E4M3: 448.0, E5M2: 57344.0}
TILE = {"BM": 128, "BK": 128, "num_warps": 8}  # of tokens, of features


def cast(x, scale, kind):
    """The clamp is explicit: torch's own cast saturates in some versions and gives NaN in others. NaN stays NaN."""
    return (x.float() * scale).clamp(-MAX[kind], MAX[kind]).to(kind)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from glu_triton import PLAIN

    @triton.jit
    def _cast_both(x_ptr, scale_ptr, row_ptr, col_ptr, M, K, TOP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr):
        """SPAN: rows that the block's threads cover at once, 8 elements each; it goes over them BM // SPAN times. Row r of the tile is
        row (r % SPAN) * (BM // SPAN) + r // SPAN of x, so that the rows a thread holds are neighbours: the bytes it has to turn around
        are turned in its own registers and reach shared memory as words."""
        top, left = tl.program_id(1) * BM, tl.program_id(0) * BK
        at = top.to(tl.int64) * K + left  # beyond 2^31 for large tensors; inside a tile 32 bits do
        x_ptr, row_ptr, col_ptr = x_ptr + at, row_ptr + at, col_ptr + left.to(tl.int64) * M + top
        turn = tl.arange(0, BM)
        rows, cols = (turn % SPAN) * (BM // SPAN) + turn // SPAN, tl.arange(0, BK)
        ok = (rows < M - top)[:, None] & (cols < K - left)[None, :]
        inside = rows[:, None] * K + cols[None, :]
        x = tl.load(x_ptr + inside, mask=ok, other=0.0).to(tl.float32) * tl.load(scale_ptr)
        q = tl.clamp(x, -TOP, TOP, tl.PropagateNan.ALL).to(row_ptr.dtype.element_ty)
        if not PLAIN:  # words that ptxas 12 cannot see through: it writes bytes of other registers into the transposed half (LOG.md)
            words = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [q.to(tl.uint8, bitcast=True)], tl.uint8, True, 4)
            q = words.to(row_ptr.dtype.element_ty, bitcast=True)
        tl.store(row_ptr + inside, q, mask=ok)
        q = tl.reshape(tl.permute(tl.reshape(q, (BM // SPAN, SPAN, BK)), (2, 1, 0)), (BK, BM))
        ok = (cols < K - left)[:, None] & (turn < M - top)[None, :]
        tl.store(col_ptr + cols[:, None] * M + turn[None, :], q, mask=ok)


def launch(x, scale, row, col, BM, BK, num_warps):
    (m, k), span = x.shape, min(BM, num_warps * 256 // BK)
    grid = (triton.cdiv(k, BK), triton.cdiv(m, BM))
    _cast_both[grid](x.contiguous(), scale, row, col, m, k, TOP=MAX[row.dtype], BM=BM, BK=BK, SPAN=span, num_warps=num_warps)


def cast_into(x, scale, row, col):
    """x (M, K), both multiples of 16, times scale (one number, on its device) -> row (M, K) and col (K, M), allocated."""
    if x.is_cuda:
        launch(x, scale, row, col, **TILE)
    else:
        row.copy_(cast(x, scale, row.dtype))
        col.copy_(row.t())


def _empty(x, scale, wide):
    kind = E5M2 if wide else E4M3
    return x.new_empty(x.shape, dtype=kind), x.new_empty(x.shape[::-1], dtype=kind)


def _run(x, scale, wide):
    both = _empty(x, scale, wide)
    cast_into(x, scale, *both)
    return both


_op = library.custom_op("prism::cast_both", _run, mutates_args=(), schema="(Tensor x, Tensor scale, bool wide) -> (Tensor, Tensor)")
_op.register_fake(_empty)


def cast_both(x, scale, kind):
    """-> x in FP8, and its transpose in memory of its own. Elsewhere than on a GPU: two plain operators."""
    if x.is_cuda:
        return torch.ops.prism.cast_both(x, scale, kind == E5M2)
    q = cast(x, scale, kind).contiguous()
    return q, q.t().contiguous()


def expect_sound_casts(kinds, device):
    """`cast_both` as this machine's assembler made it, against the plain formula, bit by bit: one of them has got it wrong (LOG.md)."""
    x = 100 * torch.randn(144, 272, generator=torch.Generator().manual_seed(0)).to(device)
    scales = torch.full((2,), 2.3, device=device)  # of which the second lies on no border of 16 bytes, as most weights' do: another program
    for (dtype, kind), scale in itertools.product(kinds, scales):
        row, col = (q.view(torch.uint8) for q in cast_both(x.to(dtype), scale, kind))
        want = cast(x.to(dtype), scale, kind).view(torch.uint8)
        if not (torch.equal(row, want) and torch.equal(col, want.t())):
            fix = "set TRITON_PTXAS_PATH to a ptxas of CUDA 13.3 or later, or use --precision=bf16"
            die(f"precision=fp8: casting {dtype} to {kind} goes wrong on this machine: {fix}")
