"""decode_triton.py against float64 on the same inputs, then whole steps against plain torch: on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

import decode_triton
import model as M
import ops
from glu_triton import HAS_TRITON
from model import ModelConfig, build
from replay import Replay

triton_path = pytest.mark.skipif(not HAS_TRITON, reason="needs CUDA or TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}  # the interpreter truncates to bf16


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).to(DEVICE)


def close(got, want, extra=2e-6):
    """Within the one rounding of what is written."""
    error = (got.double() - want).abs()
    assert got.shape == want.shape and (error <= ROUNDING[got.dtype] * want.abs() + extra).all(), float(error.max())


def turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    c, s = cos[..., : a.shape[-1]], sin[..., a.shape[-1] :]
    return torch.cat((a * c - b * s, a * s + b * c), -1)


@pytest.fixture
def everywhere(monkeypatch):
    """The kernels wherever they can run, and how often each was asked."""
    asked = dict.fromkeys(("norm_rotate", "swiglu", "mean_so_far", "wish", "attend_one"), 0)

    def counted(name, function):
        def call(*args):
            asked[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(decode_triton, "fits", lambda x: not torch.is_grad_enabled() and x.dtype != torch.float64)
    for name in asked:
        monkeypatch.setattr(decode_triton, name, counted(name, getattr(decode_triton, name)))
    return asked


@triton_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["none", "one", "one a head"])
@pytest.mark.parametrize(("n", "heads", "width"), [(1, 3, 64), (5, 4, 70), (70, 2, 6), (2, 3, 300)])
def test_norms_and_rotations_equal_float64(n, heads, width, weights, dtype, everywhere):
    """Queries and keys are a slice of one product; a width that is no power of two is padded."""
    x = normal(n, heads + 2, width, dtype=dtype)[:, :heads] * torch.logspace(-2, 2, heads, device=DEVICE)[:, None].to(dtype)
    x = F.pad(x, (0, 0, 1, 1))[:, 1:-1]
    weight = None if weights == "none" else normal(*((heads, width) if weights == "one a head" else (width,)), seed=1)
    angle = normal(n, 1, width // 2, seed=2)
    tables = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    normed = x.double()
    if weight is not None:
        normed = normed / (normed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    with torch.no_grad():
        y = ops.norm_rotate(x, weight, 1e-5, tables, dtype)
        close(y, turned(normed, *(t.double() for t in tables)), 2e-6 * float(normed.abs().max()))
        assert torch.equal(y, ops.norm_rotate(x, weight, 1e-5, tables, dtype)) and y.is_contiguous()
        shared = ops.norm_rotate(x, weight, 1e-5, tuple(t[:1] for t in tables), dtype)  # one position for all
        close(shared, turned(normed, *(t[:1].double() for t in tables)), 2e-6 * float(normed.abs().max()))
        if weight is not None:
            close(ops.rms_norm(x, weight, 1e-5), normed)
    assert everywhere["norm_rotate"] >= 3


@triton_path
@pytest.mark.parametrize("shape", [(3, 300), (2, 5, 33), (1, 2, 3, 8), (9,)])
def test_a_norm_of_any_shape(shape, everywhere):
    x, weight = normal(*shape), normal(shape[-1], seed=1)
    with torch.no_grad():
        close(ops.rms_norm(x, weight, 1e-6), x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight)


@triton_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_equals_float64(dtype, everywhere):
    au = normal(3, 2100, dtype=dtype)
    au[0, :6] = torch.tensor([0.0, 100, -100, 1e-4, -1e4, 1e4])
    wide = F.pad(au, (0, 12))[:, :2100]  # a strided view
    with torch.no_grad():
        close(ops_glu(wide), F.silu(au.double()[:, :1050]) * au.double()[:, 1050:], 1e-5)
        assert ops_glu(wide[None]).shape == (1, 3, 1050)
    assert everywhere["swiglu"] == 2


def ops_glu(au):
    return M.glu(au, "silu")


@triton_path
@pytest.mark.parametrize("k", [1, 4, 6])
def test_the_gates_network_equals_float64(k, everywhere):
    pooled, bias, weight, shift, beta = normal(7, 32), normal(32, seed=1), normal(k, 32), normal(k, seed=2), normal(k, seed=3)
    want = ((pooled.double() + bias).relu() @ weight.double().t() + shift) * beta
    with torch.no_grad():
        close(ops.wish(pooled, bias, weight, shift, beta), want, 1e-5)
    assert everywhere["wish"] == 1


def attention(q, k, v, seen):
    """In float64: q (B, H, E), k and v (B, G, K, E), seen (B, K)."""
    share = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(share, 1) for t in (k, v))
    scores = (q.double()[:, :, None] @ k.mT)[:, :, 0] / q.shape[-1] ** 0.5
    return (scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)[:, :, None] @ v)[:, :, 0]


@triton_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("least", [256, 64])  # one part, and several, some of them without a key to see
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "keys", "pos"),
    [(4, 4, 64, 200, [130]), (6, 2, 20, 200, [199, 0, 64]), (5, 1, 128, 131, [63, 130]), (8, 4, 33, 70, [69, 1])],
)
def test_attention_of_one_token_equals_float64(heads, groups, width, keys, pos, masked, least, dtype, monkeypatch):
    monkeypatch.setattr(decode_triton, "LEAST", least)
    rows, pos = len(pos), torch.tensor(pos, device=DEVICE)[:, None]
    qkv = normal(rows, heads + 2 * groups, width, dtype=dtype)
    q, k, v = qkv.split((heads, groups, groups), 1)
    q[:, 0] *= 30  # one key takes nearly all of it
    store = normal(2, rows, groups, keys + 3, width, dtype=dtype, seed=1)
    store[0, :, :, -1], place = torch.nan, torch.arange(keys, device=DEVICE)  # memory that is not this step's
    store[:, :, :, :keys][:, (place > pos)[:, None].expand(-1, groups, -1)] = torch.nan  # not written yet
    full, row = store[:, :, :, :keys].clone(), torch.arange(rows, device=DEVICE)
    full[0, row, :, pos[:, 0]], full[1, row, :, pos[:, 0]] = k, v
    seen = place <= pos
    if masked:
        seen = seen & ((place > pos - 50) | (place < 3))  # a window, as a reader of README might put into Cache.begin
    want = attention(q, *full.nan_to_num(), seen)
    y = decode_triton.attend_one(q, k, v, *(t[:, :, :keys] for t in store), pos, seen if masked else None)
    close(y, want, 1e-5)
    assert torch.equal(store[:, :, :, :keys].nan_to_num(), full.nan_to_num())
    assert torch.equal(y, decode_triton.attend_one(q, k, v, *(t[:, :, :keys] for t in store), pos, seen if masked else None))


@triton_path
@pytest.mark.parametrize("least", [256, 64])
def test_attention_over_an_encoder_and_own_keys_is_one_softmax(least, monkeypatch):
    monkeypatch.setattr(decode_triton, "LEAST", least)
    rows, heads, groups, width, pos = 2, 6, 3, 32, torch.tensor([[5], [70]], device=DEVICE)
    q, k, v = normal(rows, heads + 2 * groups, width).split((heads, groups, groups), 1)
    store, enc = normal(2, rows, groups, 90, width), normal(2, rows, 150, groups, width, seed=1).transpose(2, 3)
    known = torch.arange(150, device=DEVICE) < torch.tensor([[150], [9]], device=DEVICE)
    full, row = store.clone(), torch.arange(rows, device=DEVICE)
    full[0, row, :, pos[:, 0]], full[1, row, :, pos[:, 0]] = k, v
    seen = torch.cat((known, torch.arange(90, device=DEVICE) <= pos), 1)
    want = attention(q, *torch.cat((enc, full), 3), seen)
    close(decode_triton.attend_one(q, k, v, *store, pos, seen[:, 150:], (*enc, seen[:, :150])), want, 1e-5)


def test_parts_are_few_and_cover_all_keys(monkeypatch):
    """As many programs as fill the machine, never more parts than the second kernel takes."""
    calls = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **kw: calls.append((grid, args, kw))

    monkeypatch.setattr(decode_triton, "_attend_kernel", Spy(), raising=False)
    monkeypatch.setattr(decode_triton, "_combine_kernel", Spy(), raising=False)
    monkeypatch.setattr(decode_triton, "triton", type("T", (), {"cdiv": staticmethod(lambda a, b: -(-a // b))}), raising=False)
    for rows, groups, keys in ((1, 12, 256), (1, 12, 320), (1, 12, 8192), (8, 12, 8192), (1, 1, 10_241), (1, 2, 131_072), (300, 1, 1000)):
        calls.clear()
        q = torch.empty(rows, groups, 64, device="meta")
        store = torch.empty(rows, groups, keys, 64, device="meta")
        decode_triton.attend_one(q, q, q, store, store, None)
        (count, programs), args, _ = calls[0]
        span = args[13]
        assert programs == rows * groups and span % 64 == 0 and count * span >= keys > (count - 1) * span
        assert count <= decode_triton.MOST and (count == 1) == (len(calls) == 1) and (keys > 256 or count == 1)
        assert count == 1 or (count - 1) * programs < 300


KNOBS = {
    "norms of queries and keys": {},
    "grouped, no such norms": {"n_kv_head": 2, "qk_norm": False, "head_dim": 20},
    "running": {"ffn": "polyglu"},
    "lagged": {"ffn": "polyglu", "gate": "lagged", "gate_block": 4},
    "static": {"ffn": "polyglu", "gate": "static"},
    "encoder-decoder": {"arch": "encdec", "cross_rope": "continue", "n_kv_head": 1},
}


def small(**knobs):
    keys = {"vocab_size": 100, "n_layer": 2, "n_head": 4, "d_model": 48, "d_ff": 64, "max_len": 64, "init_std": 0.2, "n_sentinels": 4}
    return build(ModelConfig(**keys | knobs)).eval().to(DEVICE)


@triton_path
@pytest.mark.parametrize("name", KNOBS)
def test_a_step_of_decoding_equals_the_plain_one(name, everywhere, monkeypatch):
    """Uneven rows, as recorded; the plain step is one without the kernels, in fp32 on both sides. On a GPU it is recorded and replayed."""
    model, ids = small(**KNOBS[name]), torch.randint(100, (3, 24), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    plain, fixed, even = (model.new_cache(3, 40) for _ in "abc")
    monkeypatch.setattr(decode_triton, "LEAST", 64)
    with torch.no_grad():
        for cache in (plain, fixed, even):
            if model.encoder is not None:
                model.read_encoder(M.flat([[1, 2, 3], [4] * 9, [5, 6]], DEVICE), cache)
            model.step(ids[:, :9], cache, None if cache is even else [9, 4, 7])
        recorded = Replay(model, fixed, 32)
        for t in range(9, 13):
            if DEVICE == "cuda":
                hidden = recorded(ids[:, t : t + 1], fixed)
            else:
                recorded.pos.copy_(torch.tensor(fixed.lengths)[:, None])
                recorded.ids.copy_(ids[:, t : t + 1])
                hidden = recorded.run(model, fixed)
                fixed.end()
            even.replay = None
            last = model.step(ids[:, t : t + 1], even)  # no mask
            before = dict(everywhere)
            with monkeypatch.context() as here:
                here.setattr(decode_triton, "fits", lambda x: False)
                want = model.step(ids[:, t : t + 1], plain)
            assert everywhere == before
            torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-4)
    assert everywhere["attend_one"] >= 12 and (everywhere["wish"] > 0) == (everywhere["mean_so_far"] > 0) == (name in ("running", "lagged"))
    assert (everywhere["swiglu"] > 0) == (model.cfg.ffn == "swiglu")
    if model.encoder is None:
        with torch.enable_grad():  # the plain way, over the whole text
            whole = model(M.rectangle(ids[:, :13])).unflatten(0, (3, 13))[:, -1:]
        torch.testing.assert_close(last, whole.detach(), rtol=1e-4, atol=1e-4)


@triton_path
@pytest.mark.parametrize("kind", ["a window", "a slope a head"])
def test_an_edited_mask_is_heard(kind, everywhere, monkeypatch):
    """What README tells a reader to edit: the kernel takes masks that say who sees whom, torch all others."""
    plain = M.Cache.begin

    def begin(cache, *args):
        plain(cache, *args)
        if cache.pos.shape[1] == 1:
            behind = cache.pos[..., None] - torch.arange(max(cache.lengths) + 1, device=DEVICE)  # (B, 1, K)
            window, slope = (behind < 3)[:, None], -behind[:, None] * torch.arange(4.0, device=DEVICE)[:, None, None]
            cache.mask = window if kind == "a window" else slope

    monkeypatch.setattr(M.Cache, "begin", begin)
    model, ids = small(), torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def run():
        cache = model.new_cache(2, 12)
        model.step(ids[:, :8], cache)
        return model.step(ids[:, 8:], cache)

    with torch.no_grad():
        hidden, asked = run(), everywhere["attend_one"]
        monkeypatch.setattr(decode_triton, "fits", lambda x: False)
        torch.testing.assert_close(hidden, run(), rtol=1e-4, atol=1e-4)
    assert asked == (2 if kind == "a window" else 0)


def test_nothing_is_asked_of_it_on_a_cpu_or_with_gradients():
    x = torch.zeros(2, 4)
    with torch.no_grad():
        assert not decode_triton.fits(x) and not decode_triton.attends(x[None], x[None])


@pytest.mark.gpu
def test_gpu_asks_the_kernels_only_where_nothing_is_trained_or_compiled():
    x, weight = torch.randn(300, 96, device="cuda").bfloat16(), torch.rand(96, device="cuda")
    assert not decode_triton.fits(x)
    with torch.no_grad():
        assert decode_triton.fits(x) and not decode_triton.fits(x.double()) and not decode_triton.fits(x.cpu())
        ours = ops.rms_norm(x, weight, 1e-6)
        compiled = torch.compile(lambda x: ops.rms_norm(x, weight, 1e-6), fullgraph=True)(x)
    torch.testing.assert_close(ours, ops.rms_norm(x, weight, 1e-6), rtol=2**-7, atol=0)
    torch.testing.assert_close(ours, compiled, rtol=2**-7, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("knobs", [{}, {"n_kv_head": 4}, {"ffn": "polyglu"}], ids=str)
def test_gpu_a_text_in_bf16_as_recorded_is_the_text_read_at_once(knobs):
    """Past 512 keys, so that the recording is renewed and attention falls into parts; both choose nearly the same tokens."""
    import sample

    keys = {"vocab_size": 500, "n_layer": 4, "n_head": 8, "d_model": 512, "max_len": 700, "init_std": 0.08}
    model, got = build(ModelConfig(**keys | knobs)).eval().cuda().set_dtype(torch.bfloat16).lean(), []
    sample.tokens(model, [[1, 2, 3]], 600, lambda row, i: got.append(i))
    ids = torch.tensor([[1, 2, 3, *got]], device="cuda")
    plain = model(M.rectangle(ids)).detach()  # with gradients: torch alone
    with torch.no_grad():
        assert (model(M.rectangle(ids)) - plain).float().norm() < 0.02 * plain.float().norm()
        logits = model.predict(plain[2:-1])
    behind = logits.amax(1) - logits.gather(1, ids[0, 3:, None])[:, 0]
    assert len(got) == 600 and (behind < 0.02 * logits.std()).float().mean() > 0.9 and behind.max() < 0.5 * logits.std()
