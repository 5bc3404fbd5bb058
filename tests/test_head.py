"""head.py against float64 on the same rounded inputs: the kernels on a GPU or in Triton's interpreter, the whole loss on a GPU.

A gradient may be off by the rounding of its bf16 operands and its own, element by element, and by nothing else: a token that is all but
certain has a gradient near zero, and must have it right.
"""

import pytest
import torch

import head
from glu_triton import HAS_TRITON
from ops import linear_cross_entropy

triton_path = pytest.mark.skipif(not HAS_TRITON, reason="needs CUDA or TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP32 = (2**-8, 1e-4) if DEVICE == "cuda" else (2**-7, 1e-5)  # the interpreter truncates to bf16, tensor cores truncate sums


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if DEVICE == "cpu":  # several to a row, and less to interpret
        monkeypatch.setattr(head, "ROW", {"BLOCK": 256, "num_warps": 4})


def case(n, d, vocab, rows, dtype=torch.bfloat16, ignore=0.2, scale=1.0, device=DEVICE):
    g = torch.Generator().manual_seed(n + d)
    h = torch.randn(n, d, generator=g).mul_(scale).to(dtype)
    w = torch.randn(rows, d, generator=g).to(dtype)
    targets = torch.randint(0, vocab, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignore] = -100
    return [t.to(device) for t in (h, w, targets)]


def truth(h, w, targets, vocab):
    """nll, dh, dW, and how large the terms of dh and dW are; a thousand tokens at a time."""
    h, w, dh, nll, sizes = h.double(), w.double(), [], [], []
    dw, large = torch.zeros_like(w), torch.zeros_like(w)
    for x, t in zip(h.split(1024), targets.split(1024), strict=True):
        z = x @ w[:vocab].t()
        chosen = z.gather(1, t.clamp(min=0)[:, None])
        others = z.scatter(1, t.clamp(min=0)[:, None], -torch.inf)
        nll.append(torch.where(t == -100, 0, (torch.logsumexp(z, 1, keepdim=True) - chosen).squeeze(1)))
        grad = torch.softmax(z, 1)
        own = -(others.logsumexp(1, keepdim=True) - z.logsumexp(1, keepdim=True)).exp()
        grad = grad.scatter_(1, t.clamp(min=0)[:, None], own).mul_((t != -100)[:, None])
        dh.append(grad @ w[:vocab])
        sizes.append(grad.abs() @ w[:vocab].abs())
        dw[:vocab] += grad.t() @ x
        large[:vocab] += grad.abs().t() @ x.abs()
    return torch.cat(nll), torch.cat(dh), dw, torch.cat(sizes), large


def compare(got, h, w, targets, vocab, rounding):
    nll, dh, dw, sizes, large = truth(h, w, targets, vocab)
    assert got[0].dtype == got[2].dtype == torch.float32 and got[1].dtype == h.dtype
    assert ((got[0] - nll).abs() <= FP32 * (1 + nll)).all()
    assert ((got[1] - dh).abs() <= rounding * 1.01 * (sizes + dh.abs()) + FP32 * sizes + 1e-30).all()
    assert ((got[2] - dw).abs() <= (rounding * 1.01 + FP32) * large + 1e-30).all()
    assert got[0][targets == -100].abs().sum() == got[1][targets == -100].abs().sum() == got[2][vocab:].abs().sum() == 0


def by_rows(h, w, targets, vocab, grads=True):
    """`wide` with the products in float64: a CPU has none of bf16 into fp32."""
    logits, nll = (h.double() @ w.double().t()).float(), torch.empty(len(h), device=h.device)
    logits[:, vocab:] = torch.nan  # never read
    dx = h.new_empty(logits.shape).fill_(torch.nan) if grads else None
    head.loss_rows(logits, targets.int(), vocab, nll, dx)
    return (nll, (dx.double() @ w.double()).to(h.dtype), (dx.double().t() @ h.double()).float()) if grads else (nll, None, None)


WAYS = [head.narrow, by_rows]
SHAPES = [(140, 128, 500, 512), (130, 64, 257, 260), (37, 48, 101, 300), (12, 20, 128, 128), (1, 12, 5, 128)]


@triton_path
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "d", "vocab", "rows"), SHAPES)
def test_kernels_equal_float64(way, n, d, vocab, rows):
    h, w, targets = case(n, d, vocab, rows, ignore=0.2 if n > 1 else 0)
    args = h, w, targets, vocab
    got = way(*args)
    compare(got, *args, BF16)
    assert all(map(torch.equal, got, way(*args)))  # bitwise
    nll, dh, dw = way(*args, grads=False)
    assert torch.equal(nll, got[0]) and dh is None and dw is None


@triton_path
@pytest.mark.parametrize("way", WAYS)
def test_a_certain_token_and_a_hopeless_one(way):
    """12 nats ahead of all others together, every gradient near 1e-5 of the others'; 400 behind; 400 ahead."""
    h, w, _ = case(200, 64, 300, 384, scale=0.05)
    w[:, 0] = torch.tensor([0.0, 18.0, 400.0], device=DEVICE)[torch.tensor([0] * 290 + [1] * 9 + [2] + [0] * 84)]
    w[:, 1] = w[:, 0].roll(1)  # so that both h of a kind have their own row
    h[:, :2] = 0
    h[::2, 0] = 1.0
    targets = torch.where(torch.arange(200, device=DEVICE) % 4 == 0, 299, 7)  # 400 ahead, hopeless, and plain
    w[299, 0], w[290:299, 0] = 400.0, 0.0
    h[1::4, 1], w[:, 1], w[7, 1] = 1.0, 0.0, 18.0
    args = h, w, targets, 300
    got = way(*args)
    assert all(torch.isfinite(x).all() for x in got)
    nll, dh, _, _, _ = truth(*args)
    sure = slice(1, None, 4)
    assert 1e-6 < nll[sure].min() and nll[sure].max() < 3e-5 and nll[2::4].min() > 390
    assert ((got[1][sure] - dh[sure]).abs().amax(1) <= 0.02 * dh[sure].abs().amax(1)).all()
    compare(got, *args, BF16)


@triton_path
@pytest.mark.parametrize("way", WAYS)
def test_everything_ignored(way):
    h, w, targets = case(40, 32, 100, 128, ignore=2.0)
    assert all(t.abs().sum() == 0 for t in way(h, w, targets, 100))


@triton_path
def test_wide_heads_go_by_chunks(monkeypatch):
    h, w, targets = case(50, 200, 301, 320, torch.float32)
    monkeypatch.setattr(head, "CHUNK", (1.0, 20))
    args = h, w, targets, 301
    compare(head.wide(*args), *args, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "d", "vocab", "rows", "dtype"),
    [
        (2048, 128, 200_005, 200_064, torch.bfloat16),
        (1000, 96, 5000, 5056, torch.bfloat16),
        (4100, 1024, 50_000, 50_048, torch.bfloat16),
        (1500, 192, 3001, 3072, torch.float32),
        (300, 64, 500, 512, torch.float64),
    ],
)
def test_gpu_loss_equals_float64(n, d, vocab, rows, dtype):
    h, w, targets = case(n, d, vocab, rows, dtype, scale=0.3)
    leaves = h.clone().requires_grad_(), w.float().requires_grad_()  # fp32 master weights
    leaves = leaves if dtype != torch.float64 else (leaves[0], w.clone().requires_grad_())
    total, nll = linear_cross_entropy(*leaves, targets, vocab)
    total.backward()
    rounding = {torch.bfloat16: BF16, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    got = nll, leaves[0].grad, leaves[1].grad
    assert abs(total - nll.sum()) <= 1e-5 * total
    compare([t if dtype != torch.float64 or i == 1 else t.float() for i, t in enumerate(got)], h, w, targets, vocab, rounding)
    with torch.no_grad():
        again = linear_cross_entropy(*leaves, targets, vocab)[1]
    torch.testing.assert_close(again, nll, rtol=1e-6, atol=1e-5)  # a kernel without gradients is another program
    assert not nll.requires_grad
