"""kernels.py against float64: values, every gradient, extremes, what is saved; the Triton path too where it can run."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import library

import glu_triton
import kernels
import native
from kernels import ACTIVATIONS, DEFAULT_ACTS, glu, gumbel, polyglu_mix, polyglu_reference
from ops import linear_cross_entropy, rms_norm

ACTS = {1: ("silu",), 2: ("tanh", "gelu"), 4: DEFAULT_ACTS, 6: (*DEFAULT_ACTS, "identity", "relu2")}


def inputs(n=51, f=40, rows=3, k=4, dtype=torch.float32, spread=1.0, static=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    au = torch.randn(n, 2 * f, generator=g, dtype=torch.float64).to(dtype)
    small = torch.promote_types(dtype, torch.float32)
    al = (torch.randn(rows, f, k, generator=g, dtype=torch.float64) * spread).to(small)
    s = None if static else (torch.randn(n, k, generator=g, dtype=torch.float64) * spread).to(small)
    dy = torch.randn(n, f, generator=g, dtype=torch.float64).to(dtype)
    return au, al, s, dy


def run(function, au, al, s, dy, acts, dtype=None):
    args = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (au, al, s)]
    y = function(*args, acts)
    y.backward(dy.to(y.dtype))
    return [y.detach()] + [t.grad for t in args if t is not None]


def close(got, want, relative, value=0.0):
    """Within `relative` of the largest magnitude, plus `value` of the element itself (bf16's own rounding)."""
    for name, a, b in zip(("y", "dau", "dal", "ds")[: len(want)], got, want, strict=True):
        assert torch.isfinite(a).all(), name
        loose = value if name in ("y", "dau") else 0.0
        limit = relative * b.abs().max() + loose * b.abs()
        worst = ((a.double() - b).abs() - limit).max()
        assert worst <= 0, f"{name}: {worst:.2e} over the limit, largest value {b.abs().max():.2e}"


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("static", [False, True])
def test_mix_equals_float64(k, static, way):
    args = inputs(k=k, static=static)
    close(run(polyglu_mix, *args, ACTS[k]), run(polyglu_reference, *args, ACTS[k], torch.float64), 1e-5)


@pytest.mark.parametrize(("n", "f", "rows"), [(1, 200, 1), (17, 200, 1), (34, 7, 2), (2055, 40, 5), (5, 40000, 5)])
def test_odd_shapes(n, f, rows, way):
    args = inputs(n, f, rows)
    close(run(polyglu_mix, *args, DEFAULT_ACTS), run(polyglu_reference, *args, DEFAULT_ACTS, torch.float64), 2e-5)


def test_bf16_is_mixed_in_fp32(way):
    args = inputs(200, 64, 2, dtype=torch.bfloat16)
    got, want = run(polyglu_mix, *args, DEFAULT_ACTS), run(polyglu_reference, *args, DEFAULT_ACTS, torch.float64)
    assert got[0].dtype == got[1].dtype == torch.bfloat16 and got[2].dtype == got[3].dtype == torch.float32
    close(got[:2] + got[2:], want, 1e-5, 2**-8)


def test_gates_far_apart(way):
    """|z| to 1e3: exp(al) exp(s) would underflow."""
    far = inputs(spread=200.0)
    close(run(polyglu_mix, *far, DEFAULT_ACTS), run(polyglu_reference, *far, DEFAULT_ACTS, torch.float64), 1e-5)


def test_extreme_values(way):
    au, al, s, dy = inputs(64, 32, 1)
    au[:, :8] = torch.tensor([0.0, -0.0, 1e4, -1e4, 30.0, -30.0, 1e-6, -1e-6])
    args = au, al * 300, s * 300, dy
    got, want = run(polyglu_mix, *args, DEFAULT_ACTS), run(polyglu_reference, *args, DEFAULT_ACTS, torch.float64)
    close(got[:2], want[:2], 1e-5)
    for a, b in zip(got[2:], want[2:], strict=True):  # sigma_k - m of a saturated gate cancels to the rounding of a = 1e4
        assert torch.isfinite(a).all() and (a - b).abs().max() < 1e4 * 1e-6 * 10
    au = torch.tensor([[0.0, 1.0]] * 4)  # a = 0, u = 1, and a gate that is all ReLU
    zero = run(polyglu_mix, au, torch.tensor([[[50.0, 0, 0, 0]]]), None, torch.ones(4, 1), DEFAULT_ACTS)
    assert zero[1][:, 0].abs().max() < 1e-12  # relu'(0) = 0


def test_strided_view_and_repeat_bitwise(way):
    au, al, s, dy = inputs(96, 24, 2)
    wide = torch.randn(96, 48 + 32)
    wide[:, :48] = au  # the gate net's rows may share the GEMM: au is then a view of a wider buffer
    first = run(polyglu_mix, au, al, s, dy, DEFAULT_ACTS)
    leaf = wide.requires_grad_()
    y = polyglu_mix(leaf[:, :48], al, s)
    y.backward(dy)
    assert torch.equal(y.detach(), first[0]) and torch.equal(leaf.grad[:, :48], first[1])
    assert all(map(torch.equal, first, run(polyglu_mix, au, al, s, dy, DEFAULT_ACTS)))


@pytest.mark.parametrize("k", [2, 4])
def test_gradcheck(k):
    au, al, s, _ = inputs(6, 5, 2, k, torch.float64)
    leaves = [t.requires_grad_() for t in (au, al, s)]
    assert torch.autograd.gradcheck(lambda *t: polyglu_mix(*t, ACTS[k]), leaves)
    assert torch.autograd.gradcheck(lambda a, b: polyglu_mix(a, b, None, ACTS[k]), leaves[:2])


def test_saves_what_swiglu_saves(way):
    """No tensor of [N, f, K], no gate, no activation: au, al and s are all that waits for the backward pass."""
    au, al, s, _ = (t.requires_grad_() for t in inputs(64, 32, 2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        polyglu_mix(au, al, s)
    assert sorted(saved) == sorted(t.data_ptr() for t in (au, al, s))


def test_compiles_without_a_graph_break(way):
    args = [t.requires_grad_() for t in inputs(32, 16, 2)[:3]]
    explained = torch._dynamo.explain(lambda au, al, s: polyglu_mix(au * 2, al / 0.5, s) + 1)(*args)
    assert explained.graph_break_count == 0 and explained.graph_count == 1
    assert library.opcheck(torch.ops.prism.polyglu.default, (*args, "relu,tanh,silu,gelu")) is not None


@pytest.mark.skipif(native.compiled()[0] is None, reason="no cpu.c here")
def test_backend_choice_is_said():
    assert kernels.polyglu_backend("cpu")[0] == "cpu.c"
    assert kernels.polyglu_backend("cpu", ("relu", "gelu"))[0] == "torch"
    assert kernels.polyglu_backend("cuda")[0] == "triton"
    assert kernels.polyglu_backend("cuda", ("relu", "gelu"))[0] == "torch"


def test_gumbel_moments_and_statelessness():
    rows = torch.tensor([0, 1, 7, 2**33 + 5])
    noise = gumbel(1337, rows, 3, 8192)
    assert noise.shape == (4, 8192, 4) and noise.dtype == torch.float32 and torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - 1.645) < 0.05
    state = torch.get_rng_state()
    assert torch.equal(noise[2:3], gumbel(1337, rows[2:3], 3, 8192)) and torch.equal(state, torch.get_rng_state())
    others = [gumbel(1338, rows, 3, 8192), gumbel(1337, rows + 1, 3, 8192), gumbel(1337, rows, 4, 8192)]
    for other in others + [noise.flip(0), noise.roll(1, 1), noise.roll(1, 2)]:
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.02
    assert gumbel(1, torch.arange(300), 0, 4096).unique().numel() > 1_000_000  # 23 bits are really used
    assert torch.equal(gumbel(5, rows, 0, 10, 4)[:, :, 0], gumbel(5, rows, 0, 10, 4)[..., 0])


def test_gumbel_is_one_noise_both_ways(way):
    """The numbers of a hash written down once: a run continues on another machine, or without a compiler, with the noise it had."""
    got = gumbel(2**40 + 1337, torch.tensor([3, 2**33 + 5]), torch.tensor(7), 2, 3).flatten()
    want = [0.217640, 0.416385, 0.521450, -1.404658, 2.786299, 3.379109, 0.502003, 1.197599, 1.387785, 2.000160, -0.758640, -0.691486]
    torch.testing.assert_close(got, torch.tensor(want), rtol=2e-6, atol=1e-6)


def cross_entropy(n, d, vocab, padded, dtype, seed=0, ignore=0.3):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=g, dtype=torch.float64)
    w = torch.randn(padded, d, generator=g, dtype=torch.float64)
    targets = torch.randint(0, vocab, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignore] = -100
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize(("n", "d", "vocab", "padded", "chunk"), [(37, 12, 101, 128, 8), (64, 8, 128, 128, 2048), (1, 3, 5, 128, 1)])
def test_cross_entropy_equals_torch(n, d, vocab, padded, chunk, way):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        h, w, targets = cross_entropy(n, d, vocab, padded, dtype)
        total, nll = linear_cross_entropy(h, w, targets, vocab, chunk)
        (total * 0.7).backward()
        h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        want = F.cross_entropy(h64 @ w64[:vocab].t(), targets, reduction="none", ignore_index=-100)
        want_total = want.sum()
        (want_total * 0.7).backward()
        for got, right in ((total, want_total), (nll, want), (h.grad, h64.grad), (w.grad, w64.grad)):
            assert (got.double() - right).abs().max() <= tolerance * max(1.0, right.abs().max())
        assert not nll.requires_grad
        assert padded == vocab or w.grad[vocab:].abs().max() == 0


def test_cross_entropy_all_ignored():
    h, w, targets = cross_entropy(9, 4, 50, 128, torch.float32, ignore=2.0)
    total, nll = linear_cross_entropy(h, w, targets, 50)
    total.backward()
    assert total == 0 and nll.abs().max() == 0 and h.grad.abs().max() == 0 and w.grad.abs().max() == 0


def test_cross_entropy_without_gradients_and_chunks():
    h, w, targets = cross_entropy(40, 16, 100, 128, torch.float64)
    with torch.no_grad():
        total, nll = linear_cross_entropy(h, w, targets, 100, chunk=7)
    assert not total.requires_grad
    again, nll2 = linear_cross_entropy(h, w, targets, 100, chunk=40)
    assert torch.allclose(total, again, rtol=1e-13) and torch.allclose(nll, nll2, rtol=1e-12)
    again.backward()
    with pytest.raises((TypeError, RuntimeError)):
        again.backward()


def test_cross_entropy_outliers_and_bf16(way):
    h, w, targets = cross_entropy(40, 16, 100, 128, torch.float32, ignore=0)
    total, nll = linear_cross_entropy(h * 1e3, w, targets, 100)
    total.backward()
    assert torch.isfinite(nll).all() and torch.isfinite(h.grad).all()
    hb = h.detach().bfloat16().requires_grad_()
    total, nll = linear_cross_entropy(hb, w, targets, 100)  # fp32 master weights, bf16 activations
    total.backward()
    want = F.cross_entropy(h @ w[:100].t(), targets)
    assert nll.dtype == torch.float32 and abs(nll.mean() - want) < 0.02 and hb.grad.dtype == torch.bfloat16


# The Triton kernels: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1 pytest tests/test_kernels.py -k triton).
triton_path = pytest.mark.skipif(not glu_triton.HAS_TRITON, reason="needs CUDA or TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def triton_run(au, al, s, dy):
    au, al, s, dy = (t if t is None else t.to(DEVICE) for t in (au, al, s, dy))
    grads = glu_triton._backward_triton(dy, au, al, s)
    return [t.cpu() for t in (glu_triton._forward_triton(au, al, s), *grads[: 2 if s is None else 3])]


@triton_path
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("n", "f", "rows", "spread", "dtype"),
    [
        (34, 200, 2, 1, torch.float32),
        (1, 130, 1, 5, torch.float32),  # gates e^20 apart
        (300, 70, 1, 1, torch.bfloat16),
        (40, 40, 1, 200, torch.float32),  # an exponential per gate
    ],
)
def test_triton_equals_float64(n, f, rows, spread, dtype, static):
    args = inputs(n, f, rows, 4, dtype, min(spread, 10) if static else spread, static)
    args[0][0, :6] = torch.tensor([0.0, 100 / spread, -100 / spread, 1e-4, -0.05, 5.0]).to(dtype)
    got, want = triton_run(*args), run(polyglu_reference, *args, DEFAULT_ACTS, torch.float64)
    bf16 = dtype == torch.bfloat16
    rounding = 2**-8 if DEVICE == "cuda" else 2**-7  # the interpreter truncates to bf16
    close(got[:2], want[:2], 1e-5, rounding if bf16 else 0)
    for a, b in zip(got[2:], want[2:], strict=True):
        assert (a - b).abs().max() <= (1e-3 if bf16 else 1e-5) * b.abs().max()
    assert all(map(torch.equal, got, triton_run(*args)))


@triton_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_swiglu_backward_equals_float64(dtype):
    au, _, _, dy = inputs(5, 2100, 1, dtype=dtype)
    au[0, :6] = torch.tensor([0.0, 100, -100, 1e-4, -1e4, 1e4]).to(dtype)
    wide = F.pad(au, (0, 12)).to(DEVICE)  # a strided view, no multiple of 16 elements
    got = kernels.silu_backward(dy.to(DEVICE), wide[:, :4200]).cpu()
    leaf = au.double().requires_grad_()
    (F.silu(leaf[:, :2100]) * leaf[:, 2100:]).backward(dy.double())
    rounding = 0 if dtype == torch.float32 else 2**-8 if DEVICE == "cuda" else 2**-7  # the interpreter truncates to bf16
    assert got.dtype == dtype and got.is_contiguous()
    assert ((got.double() - leaf.grad).abs() <= 1e-6 + (1e-6 + rounding) * leaf.grad.abs()).all()


def test_swiglu_traces_as_one_operator_backward():
    """On the meta device, as on a GPU: the values are the plain formula's, the gradient is prism::swiglu_backward of (dy, au) alone."""
    seen, au = [], torch.randn(3, 4, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    from torch._dynamo.backends.common import aot_autograd  # both would cost every test the import
    from torch._functorch.aot_autograd import make_boxed_func

    keep = aot_autograd(fw_compiler=lambda graph, _: seen.append(graph) or make_boxed_func(graph.forward))
    y = torch.compile(glu, backend=keep, fullgraph=True)(au)
    y.backward(torch.ones_like(y))
    assert y.shape == (3, 4, 16) and au.grad.shape == au.shape
    calls = [[str(node.target) for node in graph.graph.nodes if node.op == "call_function"] for graph in seen]
    assert "aten.silu.default" in calls[0] and [c for c in calls[1] if "prism" in c or "cat" in c] == ["prism.swiglu_backward.default"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_swiglu(compiled):
    au, _, _, dy = (t.cuda() for t in inputs(2000, 512, 2, dtype=torch.bfloat16))
    ours, truth = au.clone().requires_grad_(), au.double().requires_grad_()
    y = (torch.compile(glu, fullgraph=True) if compiled else glu)(ours)
    y.backward(dy)
    want = F.silu(truth[:, :512]) * truth[:, 512:]
    want.backward(dy.double())
    close((y.detach().cpu(), ours.grad.cpu()), (want.detach().cpu(), truth.grad.cpu()), 1e-5, 2**-7 if not compiled else 2**-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_operator_and_cross_entropy():
    args = [t.cuda() for t in inputs(2000, 512, 2, dtype=torch.bfloat16)]
    want = [t.cpu() for t in run(polyglu_reference, *args, DEFAULT_ACTS, torch.float64)]
    got = run(torch.compile(polyglu_mix, fullgraph=True), *args, DEFAULT_ACTS)
    close([t.cpu() for t in got[:2]], want[:2], 1e-5, 2**-8)
    h, w, targets = (t.detach().cuda() for t in cross_entropy(4100, 64, 1000, 1024, torch.float32))
    total, _ = linear_cross_entropy(h.bfloat16().requires_grad_(), w.requires_grad_(), targets, 1000)
    total.backward()
    right = F.cross_entropy(h.bfloat16().double() @ w.detach().bfloat16()[:1000].double().t(), targets, reduction="sum", ignore_index=-100)
    assert abs(total - right) < 1e-4 * right


def test_triton_is_not_imported_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    code = "import sys, kernels; sys.exit('triton' in sys.modules and not sys.modules['glu_triton'].HAS_TRITON)"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_on_a_cpu_against_float64(dtype, way):
    au, _, _, dy = inputs(33, 300, 1, dtype=dtype)
    au[0, :6] = torch.tensor([0.0, 100, -100, 1e-4, -1e4, 1e4]).to(dtype)
    ours, truth = F.pad(au, (0, 12))[:, :600].requires_grad_(), au.double().requires_grad_()  # a strided view
    y, want = glu(ours), F.silu(truth[:, :300]) * truth[:, 300:]
    with torch.no_grad():
        assert torch.equal(glu(ours), y)
    y.backward(dy), want.backward(dy.double())
    rounding = 0 if dtype == torch.float32 else 2**-8 if way == "cpu.c" else 2**-6  # the formula rounds at each step
    close((y.detach(), ours.grad), (want.detach(), truth.grad), 2e-7 if way == "cpu.c" else 2e-7 + rounding / 4, rounding)


def test_what_c_is_given_lives_until_it_returns(way):
    """A sum's gradient is one number seen through strides of 0, and what is made contiguous of it a temporary."""
    au = torch.randn(4000, 2048, generator=torch.Generator().manual_seed(0)).requires_grad_()
    glu(au).sum().backward()
    a, u = au.detach().double().chunk(2, -1)
    sig = a.sigmoid()
    want = torch.cat((u * sig * (1 + a * (1 - sig)), a * sig), -1)
    assert (au.grad - want).abs().max() < 1e-5


def test_without_cpu_c_a_run_says_so(monkeypatch, tmp_path):
    for key, value, said in (
        ("PRISM_NATIVE", "0", "PRISM_NATIVE=0"),
        ("CC", "no-such-cc", "no C compiler (no-such-cc)"),
        ("CC", "false", "cannot"),
    ):
        native.compiled.cache_clear()
        with monkeypatch.context() as here:
            here.delenv("PRISM_NATIVE", raising=False)
            here.setenv(key, value)
            here.setattr(native, "FLAGS", native.FLAGS + " -DTEST")  # a name of its own: nothing is there yet
            library, why = native.compiled()
            assert library is None and said in why and not native.fits(torch.zeros(2))
    native.compiled.cache_clear()


@pytest.mark.skipif(native.compiled()[0] is None, reason="no cpu.c here")
def test_c_is_not_handed_what_it_would_misread():
    with pytest.raises(RuntimeError, match="without memory"):
        native.call("swiglu_forward", torch.zeros(2, 4), 2, 2, 4, torch.empty(2, 4, device="meta"), torch.zeros(2, 2))
    h, w = torch.zeros(2, 4, requires_grad=True), torch.zeros(128, 4)
    for wrong in (100, -1):
        with pytest.raises(AssertionError, match="not all among 100 ids"):
            linear_cross_entropy(h, w, torch.tensor([0, wrong]), 100)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_glu_value_and_gradient(act):
    au = torch.randn(9, 2, 14, dtype=torch.float64, requires_grad=True)[:, 1]  # a strided view
    a, u = au.chunk(2, -1)
    plain, ours, dy = ACTIVATIONS[act](a) * u, glu(au, act), torch.randn(9, 7, dtype=torch.float64)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, au, dy)[0], torch.autograd.grad(plain, au, dy)[0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(5, 16), (3, 4, 7), (1, 300)])
def test_rms_norm_value_and_gradients_against_float64(dtype, tolerance, shape, way):
    x = torch.randn(shape, dtype=torch.float64).mul_(torch.logspace(-3, 3, shape[-1], dtype=torch.float64)[None]).to(dtype)
    w, dy = torch.randn(shape[-1], dtype=torch.float64), torch.randn(shape, dtype=torch.float64).to(dtype)
    exact = [x.double().requires_grad_(), w.clone().requires_grad_()]
    y = exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-6).sqrt() * exact[1]
    wanted = [y.detach(), *torch.autograd.grad(y, exact, dy.double())]
    ours = [x.clone().requires_grad_(), w.to(torch.promote_types(dtype, torch.float32)).requires_grad_()]
    z = rms_norm(*ours, 1e-6)
    for got, want in zip([z, *torch.autograd.grad(z, ours, dy)], wanted, strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def test_tokens_that_are_no_whole_rows_are_refused():
    with pytest.raises(AssertionError, match="no whole rows"):
        kernels.polyglu_mix(torch.zeros(5, 8), torch.zeros(2, 4, 4))
