"""The Transformer against itself cut differently, against torch's plain ops in float64, and against the published counts."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import model as M
from model import ROPE, ModelConfig, Segments, attention, build, merged_rectangle, rectangle
from replay import Replay

SMALL = dict(vocab_size=100, n_layer=2, n_head=4, d_model=32, max_len=64, init_std=0.1, gate_noise=False)
KNOBS = {
    "plain": {},
    "gqa": dict(n_kv_head=2),
    "wide heads": dict(head_dim=12),
    "bias, no qk-norm": dict(qkv_bias=True, qk_norm=False),
    "untied": dict(tie=False),
    "factorised": dict(embed_rank=8),
    "llama3 rope": dict(rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
    "activation per layer": dict(act=("silu", "tanh")),
    "running": dict(ffn="polyglu"),
    "lagged": dict(ffn="polyglu", gate="lagged", gate_block=4),
    "token": dict(ffn="polyglu", gate="token"),
    "static": dict(ffn="polyglu", gate="static"),
    "two acts": dict(ffn="polyglu", acts=("relu", "gelu")),
}


def make(double=True, **kw):
    model = build(ModelConfig(**SMALL | kw)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith(("alpha", "bias", "beta")) or "norm" in name:
            p.data += torch.randn(p.shape, generator=generator)  # what init leaves constant must matter too
    return model.double().set_dtype(torch.float64) if double else model


def pack(lengths, vocab=100, seed=0):
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.randint(0, vocab, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    pos = torch.cat([torch.arange(n) for n in lengths])
    return {"ids": ids, "pos": pos, "cu": cu, "max_len": max(lengths), "rows": torch.arange(1)}


def merge(enc, dec):
    return enc | {f"dec_{k}": dec[k] for k in ("ids", "pos", "cu", "max_len")}


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a, b, tolerance=1e-10):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arch", ["decoder", "encoder"])
@pytest.mark.parametrize("name", KNOBS)
def test_packed_equals_alone(name, arch):
    """Documents in one pack, forward and every gradient, as if each were read by itself."""
    model = make(arch=arch, **KNOBS[name])
    batch = pack([5, 17, 1, 30, 9, 30])
    weight = torch.randn(len(batch["ids"]), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = model(batch)
    ends = batch["cu"].tolist()
    alone = torch.cat([model(rectangle(batch["ids"][a:b][None])) for a, b in zip(ends, ends[1:], strict=False)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    same(grads(model, (together * weight).sum()), grads(model, (alone * weight).sum()))


@pytest.mark.parametrize("cross", ["none", "enc", "continue"])
def test_merged_packed_equals_alone(cross):
    model = make(arch="encdec", cross_rope=cross, n_kv_head=2)
    enc, dec = pack([5, 9, 1, 20]), pack([3, 1, 8, 6], seed=1)
    together = model(merge(enc, dec))
    e, d = enc["cu"].tolist(), dec["cu"].tolist()
    pairs = [(enc["ids"][e[i] : e[i + 1]][None], dec["ids"][d[i] : d[i + 1]][None]) for i in range(4)]
    alone = torch.cat([model(merged_rectangle(*pair)) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    same(grads(model, together.square().sum()), grads(model, alone.square().sum()))
    cache = model.new_cache(4, 16)
    model.read_encoder(enc, cache)
    rows = torch.zeros(4, 8, dtype=torch.long)
    for i, (_, ids) in enumerate(pairs):
        rows[i, : ids.shape[1]] = ids
    counts = [ids.shape[1] for _, ids in pairs]
    chunks = [model.step(rows[:, :3], cache, [min(3, n) for n in counts]), model.step(rows[:, 3:], cache, [max(0, n - 3) for n in counts])]
    cached = torch.cat([torch.cat([chunks[0][i, : min(3, n)], chunks[1][i, : max(0, n - 3)]]) for i, n in enumerate(counts)])
    torch.testing.assert_close(cached, together, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KNOBS)
def test_cache_in_any_chunks(name):
    """Rows of unequal length, fed in ragged random chunks, give the states of one forward."""
    model, generator = make(**KNOBS[name]), torch.Generator().manual_seed(3)
    texts = [torch.randint(0, 100, (n,), generator=generator) for n in (13, 29, 7)]
    whole = [model(rectangle(ids[None])) for ids in texts]
    cache, done, parts = model.new_cache(3, 64), [0, 0, 0], [[], [], []]
    while any(d < len(ids) for d, ids in zip(done, texts, strict=True)):
        width = int(torch.randint(1, 7, (1,), generator=generator))
        count = [min(int(torch.randint(0, width + 1, (1,), generator=generator)), len(ids) - d) for d, ids in zip(done, texts, strict=True)]
        chunk = torch.full((3, width), 99)
        for r, ids in enumerate(texts):
            chunk[r, : count[r]] = ids[done[r] : done[r] + count[r]]
        hidden = model.step(chunk, cache, count)
        for r in range(3):
            parts[r].append(hidden[r, : count[r]])
            done[r] += count[r]
    for part, states in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.cat(part), states, rtol=1e-10, atol=1e-10)


EDITS = """RMSNorm.forward Linear.forward Attention.forward Attention.turn SwiGLU.forward PolyGLU.forward Block.forward Stack.forward
    Embedding.forward Transformer.rope Transformer.head_input Transformer.predict"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("edit", EDITS.split())
def test_an_edit_reaches_every_path(edit, dtype, way, monkeypatch):
    """What a reader changes in model.py is seen by training, by evaluation, by decoding, and where `lean` has laid the weights out."""
    kind, method = edit.split(".")
    before, ids = getattr(getattr(M, kind), method), pack([25])["ids"][None]
    fresh = lambda: make(False, n_kv_head=2, d_model=64, ffn="polyglu" if kind == "PolyGLU" else "swiglu").set_dtype(dtype)  # noqa: E731

    def edited(self, *args):
        y = before(self, *args)
        return tuple(3 * t for t in y) if isinstance(y, tuple) else 3 * y

    def decoded(model):
        cache = model.new_cache(1, 32)
        chunks = [model.step(ids[:, :9], cache), *(model.step(ids[:, [t]], cache) for t in range(9, 25))]
        return model.predict(torch.cat(chunks, 1))

    def embedded(model):
        return M.Embedder(model, SimpleNamespace(eos_id=0, special={}), normalize=False)(M.flat(ids.tolist()))[1]

    def same(got, want):  # in bf16 `want` rounds what `lean` keeps in fp32
        assert (got - want).norm() < (1e-5 if dtype == torch.float32 else 0.1) * want.norm()

    with monkeypatch.context() as patch:
        untouched = fresh().logits(ids).detach()
        patch.setattr(getattr(M, kind), method, edited)
        want = fresh().logits(ids).detach()
        assert (want - untouched).norm() > 0.2 * want.norm()
        if method != "predict":  # which says so
            trained = fresh().nll(fresh()(rectangle(ids))[:-1], ids[0, 1:])[1]
            same(trained, F.cross_entropy(want[0, :-1], ids[0, 1:], reduction="none"))
        vectors = embedded(fresh()).detach()
        with torch.no_grad():
            for got in (fresh().logits(ids), decoded(fresh()), decoded(fresh().lean(1)), decoded(fresh().lean(64))):
                same(got, want)
            same(embedded(fresh().lean(2048, head=False)), vectors)


def test_a_laid_out_layer_asked_for_another_weight_multiplies_by_that(monkeypatch):
    x, masked = torch.randn(3, 32), lambda self, x: self.matmul(x, self.weight * 0.5, self.bias)
    want = make(False).decoder.blocks[0].attn.out(x) / 2
    monkeypatch.setattr(M.Linear, "forward", masked)
    torch.testing.assert_close(make(False).lean(64).decoder.blocks[0].attn.out(x), want)


@pytest.mark.parametrize("name", ["gqa", "lagged", "running", "llama3 rope"])
def test_a_step_to_be_recorded_is_the_same_step(name):
    """What a CUDA graph would record: positions in a tensor, a fixed number of keys behind a mask."""
    model, ids = make(**KNOBS[name]), torch.randint(100, (3, 24), generator=torch.Generator().manual_seed(2))
    plain, fixed = (model.new_cache(3, 40) for _ in "ab")
    for cache in (plain, fixed):
        model.step(ids[:, :9], cache, [9, 4, 7])
    recorded = Replay(model, fixed, 32)
    for t in range(9, 24):
        recorded.pos.copy_(torch.tensor(fixed.lengths)[:, None])
        recorded.ids.copy_(ids[:, t : t + 1])
        hidden = recorded.run(model, fixed)
        fixed.end()
        torch.testing.assert_close(hidden, model.step(ids[:, t : t + 1], plain))
    assert fixed.lengths == plain.lengths == [24, 19, 22]


@pytest.mark.parametrize("name", KNOBS)
def test_causality_by_perturbation(name):
    ids = pack([40])["ids"][None]
    other = ids.clone()
    other[0, 25] += 1
    decoder, encoder = make(**KNOBS[name]), make(arch="encoder", **KNOBS[name])
    before, after = decoder.logits(ids), decoder.logits(other)
    assert torch.equal(before[:, :25], after[:, :25])
    assert (before[:, 25:] != after[:, 25:]).any(-1).all()
    moved = encoder(rectangle(ids)) != encoder(rectangle(other))
    assert moved.any(-1).all(), "in an encoder every position must hear of every token"


def test_merged_attention_is_one_softmax_over_encoder_and_own_keys():
    """Against a dense mask and an explicit softmax in float64."""
    torch.manual_seed(0)
    lq, lk, q_heads, kv_heads = [3, 1, 6], [8, 9, 26], 4, 2
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((sum(lq), q_heads), (sum(lk), kv_heads), (sum(lk), kv_heads)))
    cu = [torch.tensor([0, *n]).cumsum(0).int() for n in (lq, lk)]
    ours = Segments(cu[0], 6, cu[1], 26).attend(q, k, v)
    at_q, at_k = 0, 0
    for nq, nk in zip(lq, lk, strict=True):
        ks, vs = (t[at_k : at_k + nk].repeat_interleave(2, 1) for t in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q[at_q : at_q + nq], ks) / math.sqrt(8)
        visible = torch.arange(nk)[None] <= torch.arange(nq)[:, None] + nk - nq
        dense = torch.einsum("hqk,khe->qhe", scores.masked_fill(~visible, -math.inf).softmax(-1), vs)
        torch.testing.assert_close(ours[at_q : at_q + nq], dense, rtol=1e-12, atol=1e-12)
        at_q, at_k = at_q + nq, at_k + nk


@pytest.mark.parametrize("arch", ["decoder", "encdec"])
@pytest.mark.parametrize("kw", [{}, dict(tie=False), dict(embed_rank=16), dict(embed_rank=16, tie=False)], ids=str)
def test_loss_at_init_is_that_of_a_uniform_guess(arch, kw):
    model = build(ModelConfig(vocab_size=1000, n_layer=2, n_head=4, d_model=64, arch=arch, **kw))
    ids = torch.randint(0, 1000, (4, 64))
    logits = model.logits(ids, ids if arch == "encdec" else None)
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(0, 1000, (256,)))
    assert logits.shape == (4, 64, 1000)
    assert abs(loss.item() - math.log(1000)) < 0.1


def test_nll_is_the_cross_entropy_of_the_logits():
    for kw in ({}, dict(tie=False), dict(embed_rank=8), dict(embed_rank=8, tie=False)):
        model = make(**kw)
        ids = pack([50])["ids"][None]
        targets = torch.randint(0, 100, (50,))
        targets[::7] = -100
        total, each = model.nll(model(rectangle(ids)), targets)
        expected = F.cross_entropy(model.logits(ids)[0], targets, reduction="none")
        torch.testing.assert_close(each.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total.double(), expected.sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputation_changes_nothing(every):
    kw = dict(ffn="polyglu", gate_noise=True, n_layer=3)
    plain = make(**kw).train()
    again = make(remat=every, **kw).train()
    batch = pack([20, 30])
    losses = [m.nll(m(batch), batch["ids"])[0] for m in (plain, again)]
    assert losses[0] == losses[1]
    same(grads(plain, losses[0]), grads(again, losses[1]), 1e-12)


def test_published_counts():
    def count(**kw):
        return build(ModelConfig(**kw), "meta").num_params()

    polyglu = dict(vocab_size=151669, d_model=1024, n_layer=28, n_head=16, n_kv_head=8, head_dim=64)
    assert count(**polyglu, d_ff=4096, ffn="polyglu") == 597_153_888
    assert count(**polyglu, d_ff=4096) == 595_772_928
    assert count(**polyglu, d_ff=4112) == 597_149_184
    small = dict(vocab_size=200005, d_model=768, d_ff=2048, n_layer=28, n_head=12, n_kv_head=2, qk_norm=False)
    assert count(**small, embed_rank=128) == 196_398_464
    assert (
        count(arch="encdec", vocab_size=152036, d_model=1024, d_ff=3072, n_layer=28, n_head=16, n_kv_head=8, head_dim=128) == 1_036_619_776
    )


def test_flops_as_published():
    big = dict(vocab_size=151669, d_model=1024, d_ff=4096, n_layer=28, n_head=16, n_kv_head=8, head_dim=64, ffn="polyglu")
    assert round(build(ModelConfig(**big), "meta").flops_per_token(4096) / 1e9, 3) == 4.279
    small = dict(vocab_size=200005, d_model=768, d_ff=2048, n_layer=28, n_head=12, n_kv_head=2, embed_rank=128)
    assert round(build(ModelConfig(**small), "meta").flops_per_token(2048) / 1e9, 3) == 1.443


def test_same_seed_same_weights_and_padding_rows_are_zero():
    a, b, c = (build(ModelConfig(**SMALL | dict(seed=s))) for s in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)
    assert a.embed.weight.shape == (128, 32) and not a.embed.weight[100:].any()


def test_bf16_activations_stay_close():
    model = make(double=False, ffn="polyglu")
    ids = pack([60])["ids"][None]
    exact = model.logits(ids)
    rough = model.set_dtype(torch.bfloat16).logits(ids)
    assert rough.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "kw, word",
    [
        (dict(n_head=5), "n_head"),
        (dict(n_kv_head=3), "n_kv_head"),
        (dict(act="swish"), "swish"),
        (dict(ffn="polyglu", gate="sequence"), "allow_noncausal"),
        (dict(ffn="polygu"), "ffn = 'polygu'"),
        (dict(ffn="polyglu", gate="runing"), "gate = 'runing'"),
        (dict(arch="decodr"), "arch = 'decodr'"),
        (dict(n_layer=2.0), "n_layer = 2.0"),
        (dict(rope_scaling={"factor": 8.0}), "low_freq_factor"),
        (dict(rope_scaling=dict.fromkeys(ROPE, 1.0) | {"factor": 0.0}), "above 0"),
        (dict(rope_scaling=dict.fromkeys(ROPE, 1.0) | {"factor": "8"}), "above 0"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(kw, word, dies):
    dies(lambda: build(ModelConfig(**SMALL | kw)), word)


def test_a_document_longer_than_the_model_allows_is_refused(dies):
    dies(lambda: make().logits(torch.zeros(1, 65, dtype=torch.long)), "max_len=64")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().n_layer = 3


@pytest.mark.parametrize("heads, causal", [(4, True), (2, True), (2, False), (1, False)])
def test_attention_for_training_in_bf16_on_a_cpu(heads, causal):
    """The path of two matmuls and a softmax, value and gradients, against float64."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(3, h, n, 16, generator=generator, dtype=torch.float64) for h, n in ((4, 20), (heads, 20), (heads, 20))]
    rough = [t.bfloat16().requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in rough]
    mask = None if causal else torch.rand(3, 1, 20, 20, generator=generator) < 0.6
    if mask is not None:
        mask[..., 0] = True
    results = []
    for q, k, v in (rough, exact):
        y = attention(q, k, v, mask, causal)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16 and (got.double() - want).abs().max() < 0.03 * want.abs().max()
