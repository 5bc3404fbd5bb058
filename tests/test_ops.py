"""ops.py where test_kernels.py does not look: rotary position, and losses so large that the probability underflows."""

import pytest
import torch

import native
from model import Segments
from ops import linear_cross_entropy, norm_rotate, rotate


def plain(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_and_its_gradient(dtype, way):
    torch.manual_seed(0)
    x = torch.randn(7, 9, 8, dtype=dtype)[:, 2:5].requires_grad_()  # a slice, as queries are one of qkv
    angle = 6 * torch.rand(7, 1, 4, dtype=torch.promote_types(dtype, torch.float32))
    tables = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    y = rotate(x, tables)
    with torch.no_grad():
        assert torch.equal(rotate(x, tables), y)
    grad = torch.randn(y.shape, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, grad)
    truth = x.detach().double().requires_grad_()
    out = plain(truth, angle.double().cos(), angle.double().sin())
    (want,) = torch.autograd.grad(out, truth, grad.double())
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert y.dtype == dx.dtype == dtype and y.shape == x.shape
    torch.testing.assert_close(y.double(), out, rtol=bound, atol=bound)
    torch.testing.assert_close(dx.double(), want, rtol=bound, atol=bound)
    torch.testing.assert_close(plain(y.double(), angle.double().cos(), -angle.double().sin()), x.double(), rtol=0, atol=2 * bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hopeless_target_has_a_finite_loss(dtype, way):
    """Logit distances of 400 nats: exp underflows, the loss is 400 all the same, its gradient one-hot against one-hot."""
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype, requires_grad=True)
    weight = torch.zeros(128, 2)
    weight[3, 0], weight[5, 1] = 400.0, 400.0
    weight.requires_grad_()
    total, each = linear_cross_entropy(h, weight, torch.tensor([7, 5]), 100)
    assert each.tolist() == pytest.approx([400.0, 0.0])
    total.backward()
    want = torch.zeros(128, 2)
    want[3, 0], want[7, 0] = 1.0, -1.0
    torch.testing.assert_close(weight.grad, want, rtol=0, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_normed_and_turned_against_float64(dtype, way):
    """Each head with a weight of its own, more rows than one task of cpu.c holds."""
    torch.manual_seed(0)
    qkv = torch.randn(70, 9, 16, dtype=dtype)
    x, weight = qkv[:, :5].requires_grad_(), torch.rand(5, 16).add_(0.5).requires_grad_()
    angle = 6 * torch.rand(70, 1, 8)
    tables = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    grad = torch.randn(70, 5, 16, dtype=dtype)
    y = norm_rotate(x, weight, 1e-6, tables, dtype)
    got = y, *torch.autograd.grad(y, (x, weight), grad)
    wide, w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    out = plain(normed, angle.double().cos(), angle.double().sin())
    for a, b in zip(got, (out, *torch.autograd.grad(out, (wide, w), grad.double())), strict=True):
        bound = 1e-5 if a.dtype == torch.float32 else 2**-8
        assert ((a.double() - b).abs() <= bound * (b.abs() + 1)).all()
    with torch.no_grad():
        assert torch.equal(norm_rotate(x, weight, 1e-6, tables, dtype), y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"),
    [
        ((3, 1, 40, 257), (3, 1, 40, 257), (6, 2), 64),
        ((3, 0, 9), (5, 4, 33), (4, 4), 24),
        ((65, 2), (131, 77), (3, 1), 70),
        ((1, 7), (1, 8), (2, 2), 128),
    ],
)
def test_attention_of_documents_side_by_side_against_float64(queries, keys, heads, width, causal, way):
    """Lengths around the 8 queries and 32 keys that cpu.c takes at a time, scores around -128, queries and values that are slices."""
    torch.manual_seed(0)
    (h, g), n, m = heads, sum(queries), sum(keys)
    q, k = torch.randn(n, h + 1, width).bfloat16()[:, :h], (3 * torch.randn(m, g, width)).bfloat16()
    v = torch.randn(m, h + g, width).bfloat16()[:, h:]
    q[..., 0], k[..., 0] = 2, -64 * width**0.5 if way == "cpu.c" else 0  # scores that the formula would round to halves
    cu_q, cu_k = (torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (queries, keys))
    attend = lambda: Segments(cu_q, max(queries), cu_k, max(keys), causal).attend(q, k, v)  # noqa: E731
    with torch.no_grad():
        y = attend()
    assert y.dtype == torch.bfloat16 and y.shape == (n, h, width)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        scores = q[a:b].double().transpose(0, 1) @ k[c:d].double().repeat_interleave(h // g, 1).permute(1, 2, 0) / width**0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1 + int(d - c - b + a)) if causal else torch.tensor(False)
        want = scores.masked_fill(later, -torch.inf).softmax(-1) @ v[c:d].double().repeat_interleave(h // g, 1).transpose(0, 1)
        error = (y[a:b].double() - want.transpose(0, 1)).abs()
        assert (error < (0.02 if way == "cpu.c" else 0.12)).all() and (error.mean() < 0.002 or way == "formula" or a == b)
    if way == "formula":
        assert torch.equal(y, attend())  # with gradients


def test_attention_neither_of_other_documents_nor_of_threads():
    """A document alone, among others, on one thread and on two: the same bits."""
    torch.manual_seed(0)
    sizes = torch.randint(1, 90, (12,)).tolist()
    cu, threads = torch.tensor([0, *sizes]).cumsum(0).int(), torch.get_num_threads()
    q, k, v = (torch.randn(sum(sizes), heads, 32).bfloat16() for heads in (4, 2, 2))
    with torch.no_grad():
        y = Segments(cu, 90, causal=False).attend(q, k, v)
        torch.set_num_threads(3 - min(threads, 2))
        again = Segments(cu, 90, causal=False).attend(q, k, v)
        torch.set_num_threads(threads)
        alone = [
            Segments(torch.tensor([0, b - a]).int(), 90, causal=False).attend(q[a:b], k[a:b], v[a:b])
            for a, b in zip(cu, cu[1:], strict=False)
        ]
    assert torch.equal(y, again) and (torch.equal(y, torch.cat(alone)) or native.compiled()[0] is None)
