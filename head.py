"""The loss of a language model's head on a GPU: cross entropy of softmax(h W^T) and both gradients, in Triton.

`narrow` is for a factorised head (bf16, d <= 128). To compute a logit twice takes a GPU less time than to store it once, so they never get
to memory: as in flash attention, one kernel keeps a block of tokens and walks the vocabulary (loss, dh), another keeps a block of the
vocabulary and walks the tokens (dW). `wide` is for everything else: cuBLAS writes a chunk of fp32 logits, one kernel reads each row twice
and writes its gradient in the dtype of the operands. Nothing waits for the host or adds atomically: repeats are bitwise equal.
The target's own term is kept apart: p - 1 = -(sum of the others) / total, to full precision even where p rounds to 1.
Tested on an H200, and in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/test_head.py.
Read next: ops.py (linear_cross_entropy), which calls it; tests/test_head.py for the accuracy that is promised.
"""

import torch
import torch.nn.functional as F

from glu_triton import HAS_TRITON

NARROW = 128  # the widest head whose logits are recomputed rather than stored
CHUNK = 2.5e9, 1024  # bytes of fp32 logits that exist at a time in a wide head, but no fewer rows than this
# tokens and vocabulary rows of a tile, as large as the registers of sm_90 allow; rows of a wide head's logits, so many columns at a time
DH_TILE = {"BM": 128, "BV": 128, "num_warps": 8}
DW_TILE = {"BM": 128, "BV": 128, "num_warps": 8}
ROW = {"BLOCK": 8192, "num_warps": 16}

if HAS_TRITON:
    import triton
    import triton.language as tl

    from glu_triton import LOG2E, PLAIN, exp2

    LOW = tl.constexpr(-1e30)  # the maximum of nothing yet; no difference to it is nan

    @triton.jit
    def _dot(a, b, acc=None):
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc) if PLAIN else tl.dot(a, b, acc)  # interpreted, bf16 would be bits

    @triton.jit
    def _finish(top, others, chosen):
        """From max and sum over all but the target: (nll, log2 of the total, p - 1 of the target, 2^top / total)."""
        high = tl.maximum(top, chosen) * LOG2E
        factor = exp2(top * LOG2E - high)
        total = others * factor + exp2(chosen * LOG2E - high)
        lse = high + tl.log2(total)
        return (lse - chosen * LOG2E) / LOG2E, lse, -others * factor / total, factor / total

    @triton.jit
    def _walk(top, others, acc, h, w_ptr, target, hit, start, vocab, GRADS: tl.constexpr, BV: tl.constexpr):
        """One tile of the vocabulary: the running maximum, sum and weighted rows of W of all columns but the target's."""
        cols = start + tl.arange(0, BV)
        w = tl.load(w_ptr + cols[:, None] * h.shape[1] + tl.arange(0, h.shape[1])[None, :])
        s = _dot(h, w.T)
        if hit:  # rare, and two instructions out of nine for each logit
            s = tl.where((cols[None, :] != target[:, None]) & (cols < vocab)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = exp2(s * LOG2E - (higher * LOG2E)[:, None])
        factor = exp2((top - higher) * LOG2E)
        others = others * factor + tl.sum(p, 1)
        if GRADS:
            acc = _dot(p.to(w.dtype), w, acc * factor[:, None])
        return higher, others, acc

    @triton.jit
    def _dh_kernel(
        h_ptr, w_ptr, target_ptr, hit_ptr, nll_ptr, lse_ptr, own_ptr, dh_ptr, vocab,
        D: tl.constexpr, GRADS: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
    ):  # fmt: skip
        """BM tokens: nll and dh; for _dw_kernel log2 of the total (inf: ignored) and p - 1 of the target."""
        toks, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
        at = toks[:, None] * D + k[None, :]
        h, target = tl.load(h_ptr + at), tl.load(target_ptr + toks)
        top, others, acc = tl.full([BM], LOW, tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
        last = (vocab - 1) // BV
        hit_ptr += tl.program_id(0) * (last + 1)
        # the last tile, padded, comes first: after the loop it would make ptxas serialise every wgmma
        top, others, acc = _walk(top, others, acc, h, w_ptr, target, True, last * BV, vocab, GRADS, BV)
        for i in range(last):
            top, others, acc = _walk(top, others, acc, h, w_ptr, target, tl.load(hit_ptr + i) != 0, i * BV, vocab, GRADS, BV)
        w = tl.load(w_ptr + tl.maximum(target, 0)[:, None] * D + k[None, :]).to(tl.float32)
        nll, lse, own, scale = _finish(top, others, tl.sum(h.to(tl.float32) * w, 1))
        tl.store(nll_ptr + toks, tl.where(target >= 0, nll, 0.0))
        if GRADS:
            tl.store(lse_ptr + toks, tl.where(target >= 0, lse, float("inf")))
            tl.store(own_ptr + toks, own)
            dh = acc * scale[:, None] + own[:, None] * w
            tl.store(dh_ptr + at, tl.where(target[:, None] >= 0, dh, 0.0).to(dh_ptr.dtype.element_ty))

    @triton.jit(do_not_specialize=["blocks"])
    def _dw_kernel(
        h_ptr, w_ptr, target_ptr, hit_ptr, lse_ptr, own_ptr, dw_ptr, blocks, vocab,
        D: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
    ):  # fmt: skip
        """BV rows of dW = (p - onehot)^T h, zeros from `vocab` on; the tile of logits lies transposed, as its product with h wants it."""
        cols, k = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, D)
        at = cols[:, None] * D + k[None, :]
        w, acc = tl.load(w_ptr + at), tl.zeros([BV, D], tl.float32)
        for i in range(blocks):
            toks, hit = i * BM + tl.arange(0, BM), tl.load(hit_ptr + tl.program_id(0) * blocks + i) != 0
            h = tl.load(h_ptr + toks[:, None] * D + k[None, :])
            p = exp2(_dot(w, h.T) * LOG2E - tl.load(lse_ptr + toks)[None, :])
            if hit:
                p = tl.where(cols[:, None] == tl.load(target_ptr + toks)[None, :], tl.load(own_ptr + toks)[None, :], p)
            acc = _dot(p.to(h.dtype), h, acc)
        tl.store(dw_ptr + at, tl.where((cols < vocab)[:, None], acc, 0.0))

    @triton.jit
    def _row_kernel(x_ptr, target_ptr, nll_ptr, dx_ptr, vocab, width, GRADS: tl.constexpr, BLOCK: tl.constexpr):
        """One row of logits: nll, and p - onehot. Loads are masked at the even `width`, not at `vocab`, or they were scalar."""
        row, cols, blocks = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.cdiv(width, BLOCK)
        x_ptr, dx_ptr, target = x_ptr + row * width, dx_ptr + row * width, tl.load(target_ptr + row)
        if target < 0:
            tl.store(nll_ptr + row, 0.0)
            if GRADS:
                for i in range(blocks):
                    tl.store(dx_ptr + i * BLOCK + cols, tl.zeros([BLOCK], dx_ptr.dtype.element_ty), i * BLOCK + cols < width)
        else:
            top, others = tl.full([], LOW, tl.float32), tl.full([], 0.0, tl.float32)
            for i in range(blocks):
                at = i * BLOCK + cols
                x = tl.load(x_ptr + at, mask=at < width, other=0.0)
                x = tl.where((at < vocab) & (at != target), x, float("-inf"))
                higher = tl.maximum(top, tl.max(x, 0))
                others = others * exp2((top - higher) * LOG2E) + tl.sum(exp2((x - higher) * LOG2E), 0)
                top = higher
            nll, lse, own, _ = _finish(top, others, tl.load(x_ptr + target))
            tl.store(nll_ptr + row, nll)
            if GRADS:
                for i in range(blocks):  # backwards: what was read last may still lie in the L2
                    at = (blocks - 1 - i) * BLOCK + cols
                    x = tl.load(x_ptr + at, mask=at < width, other=0.0)
                    p = tl.where(at < vocab, tl.where(at == target, own, exp2(x * LOG2E - lse)), 0.0)
                    tl.store(dx_ptr + at, p.to(dx_ptr.dtype.element_ty), mask=at < width, eviction_policy="evict_first")


def _hits(target, bm, bv, tiles):
    """(blocks of tokens, tiles of the vocabulary): whether a tile holds a target of a block."""
    hits = torch.zeros(len(target) // bm, tiles, dtype=torch.int8, device=target.device)
    block = torch.arange(len(target), device=target.device) // bm
    return hits.view(-1).index_fill_(0, block * tiles + target.clamp(min=0) // bv, 1).view_as(hits)


def narrow(h, w, targets, vocab, grads=True):
    """(nll per token, dh, dW in fp32) of bf16 h (n, d <= NARROW) and w."""
    (n, d), rows, D = h.shape, len(w), max(16, 1 << (h.shape[1] - 1).bit_length())
    more = -n % max(DH_TILE["BM"], DW_TILE["BM"])  # padded by copies of a few megabytes, so that no load in a loop needs a mask
    h, w = F.pad(h, (0, D - d, 0, more)), F.pad(w, (0, D - d, 0, -rows % max(DH_TILE["BV"], DW_TILE["BV"])))
    target = F.pad(targets.int(), (0, more), value=-1)
    nll, lse, own = torch.empty(3, len(h), dtype=torch.float32, device=h.device)
    dh, dw = (torch.empty_like(h), torch.empty_like(w, dtype=torch.float32)) if grads else (h, None)
    room = torch.cuda.get_device_properties(h.device).shared_memory_per_block_optin if h.is_cuda else 0
    stages = 2 if room < 160 << 10 else 3  # tiles on their way into shared memory, of 32 KB each: an RTX 4090 or 5090 has 99 KB in all
    hits = _hits(target, DH_TILE["BM"], DH_TILE["BV"], -(-vocab // DH_TILE["BV"]))
    _dh_kernel[(len(hits),)](h, w, target, hits, nll, lse, own, dh, vocab, D=D, GRADS=grads, **DH_TILE, num_stages=stages)
    if not grads:
        return nll[:n], None, None
    hits = _hits(target, DW_TILE["BM"], DW_TILE["BV"], len(w) // DW_TILE["BV"]).t().contiguous()
    _dw_kernel[(len(hits),)](h, w, target, hits, lse, own, dw, hits.shape[1], vocab, D=D, **DW_TILE, num_stages=stages)
    return nll[:n], dh[:n, :d], dw[:rows, :d]


def loss_rows(logits, targets, vocab, nll, dx):
    """Writes nll of rows of logits, and their gradients into dx, unless that is None."""
    _row_kernel[(len(logits),)](logits, targets, nll, nll if dx is None else dx, vocab, logits.shape[1], GRADS=dx is not None, **ROW)


def wide(h, w, targets, vocab, grads=True):
    """The same for any width and dtype up to fp32, a chunk of logits at a time."""
    n, rows, like = len(h), len(w), {"dtype": torch.float32, "device": h.device}
    precise = {} if h.dtype == torch.float32 else {"out_dtype": torch.float32}
    size = min(n, max(CHUNK[1], int(CHUNK[0] / 4 / rows) // 128 * 128))
    logits, nll, targets = torch.empty(size, rows, **like), torch.empty(n, **like), targets.int()
    dh, dw, dx = (torch.empty_like(h), torch.empty(w.shape, **like), h.new_empty(size, rows)) if grads else (None, None, None)
    for lo in range(0, n, size):
        part = slice(lo, min(lo + size, n))
        z, g = logits[: part.stop - lo], dx[: part.stop - lo] if grads else None
        torch.mm(h[part], w.t(), out=z, **precise)
        loss_rows(z, targets[part], vocab, nll[part], g)
        if grads:
            torch.mm(g, w, out=dh[part])
            torch.addmm(dw, g.t(), h[part], beta=float(lo > 0), out=dw, **precise)
    return nll, dh, dw
