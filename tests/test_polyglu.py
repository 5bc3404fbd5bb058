"""PolyGLU in the model: counts, limits, what each gate may see, noise that is a function, the toy task that shows the published leak."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import configurator
import optim
import sample
from kernels import gumbel
from model import ModelConfig, Packed, borders, build, merged_rectangle, rectangle
from ops import WindowMean
from train import Config

CAUSAL = ("running", "lagged", "token", "static")
GATES = (*CAUSAL, "sequence")
SMALL = dict(vocab_size=50, n_layer=2, n_head=2, d_model=16, d_ff=24, max_len=64, ffn="polyglu", init_std=0.2, gate_block=4)
FULL = dict(vocab_size=151_669, n_layer=28, n_head=16, n_kv_head=8, d_model=1024, head_dim=64, d_ff=4096, max_len=4096)


def make(gate="running", double=True, **kw):
    model = build(ModelConfig(**SMALL | dict(gate=gate, allow_noncausal=gate == "sequence", gate_noise=False) | kw)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(("alpha", "bias", "beta")):
            p.data += torch.randn(p.shape, generator=generator)  # routing must matter
    return model.double().set_dtype(torch.float64) if double else model


def draw(*shape, seed=0, top=50):
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


# ---- 1: counts, init, limits


def test_counts_of_the_600m_shape():
    model = build(ModelConfig(**FULL, ffn="polyglu"), device="meta")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    group = lambda *words: sum(n for name, n in sizes.items() if any(w in name for w in words))  # noqa: E731
    assert group("attn.qkv", "attn.out") == 88_080_384
    assert group("gate_up", "down") == 352_321_536
    assert group("norm") == 61_952
    assert group("alpha", "beta", "gate_net") == 28 * (16_384 + 4 + 32_932) == 1_380_960
    assert sum(sizes.values()) == 597_165_152 and model.num_params() == 597_153_888
    assert model.num_params() - 151_669 * 1024 == 441_844_832
    assert build(ModelConfig(**FULL), device="meta").num_params() == 595_772_928
    assert build(ModelConfig(**FULL | dict(d_ff=4112)), device="meta").num_params() == 597_149_184
    assert model.flops_per_token(4096) == pytest.approx(4.279e9, rel=2e-4)
    decayed, plain = 0, 0
    for name, p in model.named_parameters():
        if optim.role(name, p) in ("vector", "alpha"):
            plain += p.numel()
        else:
            decayed += p.numel()
    assert (decayed - (151_680 - 151_669) * 1024, plain) == (596_632_064, 521_824)


def test_init_statistics():
    model = build(ModelConfig(vocab_size=300, n_layer=8, n_head=4, d_model=256, d_ff=1024, ffn="polyglu"))
    for name, p in model.named_parameters():
        if name.endswith(("alpha", "bias")):
            assert not p.any()
        elif name.endswith("beta") or "norm" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(16) if name.endswith(("attn.out.weight", "ffn.down.weight")) else 0.02
            assert p[:300].std().item() == pytest.approx(std, rel=0.15 if p.numel() < 1000 else 0.03), name
    ffn = model.decoder.blocks[0].ffn
    entropy = torch.distributions.Categorical(logits=ffn.alpha).entropy()
    assert torch.equal(entropy, torch.full_like(entropy, math.log(4))) or (entropy - math.log(4)).abs().max() < 1e-6


@pytest.mark.slow
def test_loss_at_init_of_the_600m_shape():
    model = build(ModelConfig(**FULL, ffn="polyglu")).eval()
    ids = draw(1, 129, top=151_000)
    with torch.no_grad():
        total, _ = model.nll(model(rectangle(ids[:, :-1])), ids[0, 1:])
    assert total.item() / 128 == pytest.approx(12.13, abs=0.1)


@pytest.mark.parametrize("k", range(4))
def test_a_decided_gate_is_the_plain_glu(k):
    """tau -> 0 and one-hot alpha: ReGLU, tanh-GLU, SwiGLU, GEGLU."""
    poly = make("static")
    plain = make("static", ffn="swiglu", act=poly.cfg.acts[k])
    plain.load_state_dict({n: p for n, p in poly.state_dict().items() if not n.endswith("alpha")})
    for block in poly.decoder.blocks:
        block.ffn.alpha.data = F.one_hot(torch.full((24,), k), 4).double()
    poly.tau.fill_(1e-3)
    ids = draw(2, 9)
    torch.testing.assert_close(poly.logits(ids), plain.logits(ids), rtol=1e-12, atol=1e-12)


def test_running_ends_where_sequence_is():
    p = torch.randn(30, 32, dtype=torch.float64)
    batch = {"pos": torch.cat([torch.arange(11), torch.arange(19)]), "cu": torch.tensor([0, 11, 30], dtype=torch.int32)}
    pooled = {gate: pool(gate, p, **batch) for gate in ("running", "sequence")}
    for last in (10, 29):
        torch.testing.assert_close(pooled["running"][last], pooled["sequence"][last], rtol=1e-13, atol=1e-13)


def pool(gate, p, pos, cu, block=4):
    return Packed.pool(SimpleNamespace(pos=pos, borders=borders(pos, cu)), SimpleNamespace(gate=gate, gate_block=block), p)


@pytest.mark.parametrize("gate", ["running", "lagged", "sequence"])
def test_pool_is_the_mean_it_says_and_its_gradient(gate):
    pos = torch.cat([torch.arange(n) for n in (5, 1, 14, 8)])
    cu = torch.tensor([0, 5, 6, 20, 28], dtype=torch.int32)
    p = torch.randn(28, 3, dtype=torch.float64, requires_grad=True)
    rows = []
    for t in range(28):
        start, at = t - int(pos[t]), int(pos[t])
        end = {"running": t + 1, "lagged": start + at // 4 * 4, "sequence": int(cu[cu > t][0])}[gate]
        rows.append(p[start:end].mean(0) if end > start else torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(pool(gate, p, pos, cu), torch.stack(rows), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: pool(gate, x, pos, cu), p)


@pytest.mark.parametrize("gate", ["running", "lagged", "sequence"])
def test_pool_in_fp32_is_that_in_fp64(gate, way):
    cu = torch.tensor([0, 5, 6, 300, 700], dtype=torch.int32)
    pos = torch.cat([torch.arange(n) for n in cu.diff()])
    p, dy = torch.randn(32, 700).t().requires_grad_(), torch.randn(700, 32)  # not contiguous
    mean, exact = pool(gate, p, pos, cu), pool(gate, p.double(), pos, cu)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=1e-7)
    (got,), (want,) = torch.autograd.grad(mean, p, dy), torch.autograd.grad(exact, p, dy.double())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_pool_survives_a_loud_neighbour(way):
    p = torch.randn(2 * 4096, 32)
    p[:4096] = (p[:4096] + 1) * 1000
    here = torch.arange(8192)
    start = torch.where(here < 4096, 0, 4096)
    mean = WindowMean.apply(p, start, here + 1, here, start + 4096)[4096:]
    right = p[4096:].double().cumsum(0) / torch.arange(1, 4097)[:, None]
    assert (mean - right).abs().max() <= 1e-5


# ---- 2, 3: the future


@pytest.mark.parametrize("gate", GATES)
def test_a_later_token_moves_nothing_earlier_except_through_the_published_gate(gate):
    model, ids = make(gate), draw(1, 40)
    other = ids.clone()
    other[0, 25] = (other[0, 25] + 1) % 50
    moved = (model.logits(ids) != model.logits(other)).any(-1)[0]
    assert moved[25:].all()
    assert moved[:25].all() if gate == "sequence" else not moved[:25].any()


def test_sequence_is_refused_in_a_decoder_in_one_line(dies):
    dies(lambda: build(ModelConfig(**SMALL | dict(gate="sequence"))), "running", "allow_noncausal")
    model = make("sequence")
    assert not model.cfg.causal
    with pytest.raises(SystemExit):
        model.new_cache(1, 8)
    assert build(ModelConfig(**SMALL | dict(arch="encoder"))).cfg.causal  # gate_enc=sequence: an encoder hides nothing


def toy(gate, steps):
    """Rows BOS c c .. c, c uniform over 4: nothing causal beats ln 4 at position 0. -> held-out loss there."""
    cfg = dict(vocab_size=8, n_layer=1, n_head=2, d_model=32, d_ff=64, max_len=16, ffn="polyglu", gate=gate, gate_noise=False)
    model = build(ModelConfig(**cfg, allow_noncausal=gate == "sequence", gate_block=4, init_std=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)

    def batch(rows):
        c = torch.randint(1, 5, (rows, 1), generator=generator).expand(-1, 8)
        return torch.cat((torch.zeros(rows, 1, dtype=torch.long), c[:, :-1]), 1), c

    for _ in range(steps):
        ids, targets = batch(64)
        total, _ = model.nll(model(rectangle(ids)), targets.flatten())
        (total / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, targets = batch(2000)
    with torch.no_grad():
        _, each = model.nll(model.eval()(rectangle(ids)), targets.flatten())
    return each.view(2000, 8)[:, 0].mean().item()


@pytest.mark.parametrize("gate", GATES)
def test_toy_task_shows_who_sees_the_future(gate):
    if gate == "sequence":
        assert toy(gate, 300) < 0.1
    else:
        assert toy(gate, 100) >= 1.37


# ---- 4, 5: company and caches


@pytest.mark.parametrize("gate", GATES)
def test_batch_mates_and_packing_are_irrelevant(gate):
    model = make(gate)
    a, b = draw(13, seed=1), draw(7, seed=2)
    packed = {
        "ids": torch.cat((b, a)),
        "pos": torch.cat((torch.arange(7), torch.arange(13))),
        "cu": torch.tensor([0, 7, 20], dtype=torch.int32),
        "max_len": 13,
        "rows": torch.arange(1),
    }
    alone = model(rectangle(a[None]))
    torch.testing.assert_close(model(packed)[7:], alone, rtol=1e-12, atol=1e-12)
    mates = model(rectangle(torch.stack((a, draw(13, seed=3), a))))
    torch.testing.assert_close(mates[:13], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", CAUSAL)
@pytest.mark.parametrize("chunks", [(1,) * 21, (3, 5, 1, 12), (4, 4, 4, 4, 5), (21,)])
def test_cache_across_gate_blocks(gate, chunks):
    model, ids = make(gate), draw(2, 21)
    cache, done, parts = model.new_cache(2, 32), 0, []
    for n in chunks:
        parts.append(model.step(ids[:, done : done + n], cache))
        done += n
    torch.testing.assert_close(torch.cat(parts, 1).flatten(0, 1), model(rectangle(ids)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", CAUSAL)
def test_greedy_text_equals_recomputation(gate):
    model, prompts = make(gate), [draw(5).tolist(), draw(9, seed=4).tolist()]
    cached = {0: [], 1: []}
    for row, i in greedy(model, prompts, 12):
        cached[row].append(i)
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(12):
            text.append(int(model.logits(torch.tensor([text]))[0, -1].argmax()))
        assert text[len(prompt) :] == cached[row]


def greedy(model, prompts, n):
    out = []
    sample.tokens(model, prompts, n, lambda row, i: out.append((row, i)))
    return out


# ---- 6, 7: noise and temperature


def noisy(**kw):
    return make(double=False, gate_noise=True, **kw).train()


def test_noise_is_a_function_of_the_row():
    model, ids = noisy(), draw(4, 8)
    batch = rectangle(ids) | {"rows": torch.tensor([10, 11, 12, 13])}
    whole = model(batch)
    assert torch.equal(whole, model(batch))  # no generator moves
    for half in (slice(0, 2), slice(2, 4)):  # as two ranks would see it
        part = model(rectangle(ids[half]) | {"rows": batch["rows"][half]})
        torch.testing.assert_close(part, whole.view(4, 8, -1)[half].flatten(0, 1))
    assert not torch.allclose(whole, model(batch | {"rows": batch["rows"] + 4}))
    remat = noisy(remat=1)
    again = remat(batch)
    assert torch.equal(whole, again)
    whole.square().sum().backward()
    again.square().sum().backward()
    for p, q in zip(model.parameters(), remat.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_noise_never_reaches_evaluation_and_can_be_injected():
    model, ids = noisy(), draw(2, 8)
    quiet = make(double=False, gate_noise=False)
    assert torch.equal(model.eval().logits(ids), quiet.logits(ids)) and torch.equal(model.logits(ids), model.logits(ids))
    assert torch.equal(model.train().eval()(rectangle(ids)), model.step(ids, model.new_cache(2, 8)).flatten(0, 1)) or torch.allclose(
        model(rectangle(ids)), model.step(ids, model.new_cache(2, 8)).flatten(0, 1), atol=1e-5
    )
    loud = noisy()
    drawn = loud(rectangle(ids))
    model.noise = lambda ffn: gumbel(model.cfg.seed, torch.arange(2), ffn.layer, 24, 4)
    assert torch.equal(model(rectangle(ids)), drawn)


def test_tau_of_the_plan():
    cfg = Config(ffn="polyglu", max_steps=1000, tau_max=1.0, tau_min=0.1)
    plan = optim.Plan(cfg, 1)
    assert [round(plan(s).tau, 6) for s in (0, 1, 500, 1000)] == [1.0, 0.9991, 0.55, 0.1]
    flat = optim.Plan(Config(ffn="polyglu", max_steps=10, tau_max=0.1, tau_min=0.1), 1)
    assert {flat(s).tau for s in range(11)} == {0.1}
    model, ids = make(), draw(1, 9)
    warm = model.logits(ids)
    model.tau.fill_(0.1)
    assert not torch.allclose(warm, model.logits(ids))


def test_alpha_and_gate_net_stay_out_of_muon_and_alpha_out_of_decay():
    roles = {name: optim.role(name, p) for name, p in make().named_parameters()}
    assert all((role == "alpha") == name.endswith("ffn.alpha") for name, role in roles.items())
    assert {role for name, role in roles.items() if "gate_net" in name and name.endswith("weight")} == {"other matrix"}


# ---- 13: in company with the other knobs


@pytest.mark.parametrize(
    "knobs",
    [{}, dict(arch="encoder"), dict(arch="encdec", n_sentinels=1), dict(optimizer="muon"), dict(remat=1), dict(acts=("silu", "tanh"))],
)
def test_overfits_one_batch_in_any_company(knobs, capsys):
    cfg = Config(**SMALL | dict(init_std=0.05, max_steps=1, lr=1e-2, muon_lr=0.02, weight_decay=0.0) | knobs)
    model = build(cfg).train()
    optimizer = optim.build_optimizer(model, cfg)
    ids, other, targets = draw(4, 10), draw(4, 6, seed=5), draw(4, 10, seed=6)
    batch = merged_rectangle(other, ids) if cfg.arch == "encdec" else rectangle(ids)
    model.tau.fill_(0.5)
    for _ in range(120):
        total, _ = model.nll(model(batch), targets.flatten())
        loss = total / targets.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.15


def kept_for_backward(ffn, n=512):
    """Bytes that one feed-forward of the 600M shape keeps, weights and their bf16 casts apart."""
    model = build(ModelConfig(**FULL | dict(n_layer=1, vocab_size=300), ffn=ffn)).train().set_dtype(torch.bfloat16)
    pos, cu = torch.arange(n // 2).repeat(2), torch.tensor([0, n // 2, n], dtype=torch.int32)
    ctx = Packed(model, pos, cu, n // 2, True, torch.arange(2))
    weights, kept = {p.shape for p in model.parameters()} | {(1024, 8192), (4096, 1024)}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t):
        model.decoder.blocks[0].ffn(torch.randn(n, 1024).bfloat16().requires_grad_(), ctx)
    return sum(t.untyped_storage().nbytes() for t in kept.values() if t.shape not in weights)


def test_the_routing_keeps_two_percent_more_than_swiglu_at_most():
    plain, poly = kept_for_backward("swiglu"), kept_for_backward("polyglu")
    noise = 2 * 4096 * 4 * 4  # per row and not per token: 0.4 % at 4,096 tokens a row
    assert plain >= 512 * 2 * (1024 + 8192 + 4096) and poly - noise <= 1.02 * plain


@pytest.mark.parametrize("name", ["polyglu_a100", "polyglu_h100", "polyglu_h200", "polyglu_sft", "polyglu_debug", "swiglu_baseline"])
def test_every_config_builds_and_plans(name):
    cfg, _ = configurator.load(Config, [f"config/{name}.py"])
    model = build(cfg, device="meta")
    if name in ("polyglu_a100", "polyglu_h100", "polyglu_h200"):
        plan = optim.Plan(cfg, 1)
        assert (plan.steps, plan.total, model.num_params()) == (19_531, 10_239_868_928, 597_153_888)
        assert (
            plan(0).lr == pytest.approx(1e-4 / 2000)
            and plan(2000).lr == pytest.approx(1e-4)
            and plan(19_531).lr == pytest.approx(0, abs=1e-12)
        )
        assert plan(15_624).mix == pytest.approx({"math": 0.70, "stem": 0.25, "code": 0.05})
        assert plan(19_531).mix == pytest.approx({"math": 0.85, "stem": 0.10, "code": 0.05})
        assert plan(0).tau == 1.0 and plan(19_531).tau == pytest.approx(0.1)
        assert plan(0).accum * plan(0).micro_tokens == 524_288
    elif name == "swiglu_baseline":
        assert model.num_params() == 595_772_928 and cfg.ffn == "swiglu"
    elif name == "polyglu_sft":
        assert optim.Plan(cfg, 1, 1_000_000)(0).tau == 0.1 and model.num_params() == 597_153_888


def test_sft_and_pretraining_shapes_train_a_step_at_reduced_depth():
    cfg, _ = configurator.load(
        Config, ["config/polyglu_h200.py", "--n_layer=1", "--vocab_size=300", "--d_model=64", "--d_ff=128", "--head_dim=4"]
    )
    model = build(cfg).train()
    ids = draw(2, 64, top=300)
    total, _ = model.nll(model(rectangle(ids)), ids.flatten().roll(-1))
    total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
