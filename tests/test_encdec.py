"""The encoder-decoder against an independent dense fp64 reference, against transformers, and against itself cut differently."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import configurator
import data
import denoise
import denoise_stream
import hub
import tokenizer
import train
from eval import denoising, sanity
from eval.trace import trace
from model import ModelConfig, build
from tests.test_denoise_stream import documents, padded, write_shards

CROSS = ("none", "enc", "continue")
SMALL = ModelConfig(
    arch="encdec", vocab_size=211, n_layer=3, n_head=4, n_kv_head=2, head_dim=10, d_model=32, d_ff=48, max_len=64, n_sentinels=20
)
SP = denoise.special_ids(211, 20, eos=7)


def model_of(double=True, **changes):
    model = build(dataclasses.replace(SMALL, **changes))
    with torch.no_grad():
        for name, p in model.named_parameters():  # nothing at its neutral start: norms, biases and gates must matter
            generator = torch.Generator().manual_seed(len(name))
            p.add_(torch.randn(p.shape, generator=generator) * (0.1 if "norm" in name else 0.15 / math.sqrt(p.shape[-1]) * 3))
        model.embed.weight[model.cfg.vocab_size :] = 0
    return model.double().set_dtype(torch.float64) if double else model


def examples(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 180, s), rng.integers(0, 180, t), rng.integers(0, 180, t), 0) for s, t in sizes]


SIZES = [(9, 5), (1, 7), (0, 6), (12, 0), (4, 1), (17, 11)]


# ---- an independent reference: one example, dense masks, one softmax ------------------------------------------------------


def rms(x, w, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w


def rope(x, pos, theta):
    n = x.shape[-1] // 2
    angle = pos.double()[:, None] * (theta ** (-torch.arange(n) / n)).double()  # frequencies are rounded to fp32, as released models do
    cos, sin = (torch.cat((t, t), -1)[:, None] for t in (angle.cos(), angle.sin()))
    return x * cos + torch.cat((-x[..., n:], x[..., :n]), -1) * sin


def attention(sd, at, cfg, x, pos, enc=None, enc_pos=None, causal=False):
    """x (T, D) normed -> (T, D); enc (S, D): states of the encoder, whose keys come first under the same softmax."""
    H, G, E = cfg.n_head, cfg.kv_heads, cfg.width_head
    wq, wk, wv = sd[at + "attn.qkv.weight"].split((H * E, G * E, G * E))
    qn, kn = sd[at + "attn.q_norm.weight"], sd[at + "attn.k_norm.weight"]
    q = rope(rms((x @ wq.T).unflatten(-1, (H, E)), qn, cfg.norm_eps), pos, cfg.rope_theta)
    k = rope(rms((x @ wk.T).unflatten(-1, (G, E)), kn, cfg.norm_eps), pos, cfg.rope_theta)
    v = (x @ wv.T).unflatten(-1, (G, E))
    mask = torch.ones(len(x), len(x), dtype=torch.bool)
    mask = mask.tril() if causal else mask
    if enc is not None:
        ke = rms((enc @ wk.T).unflatten(-1, (G, E)), kn, cfg.norm_eps)
        ke = ke if enc_pos is None else rope(ke, enc_pos, cfg.rope_theta)
        k, v = torch.cat((ke, k)), torch.cat(((enc @ wv.T).unflatten(-1, (G, E)), v))
        mask = torch.cat((torch.ones(len(x), len(enc), dtype=torch.bool), mask), 1)
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    score = torch.einsum("qhe,khe->hqk", q, k) / math.sqrt(E)
    p = score.masked_fill(~mask, -math.inf).softmax(-1)
    assert torch.allclose(p.sum(-1), torch.ones(1, dtype=p.dtype))
    return torch.einsum("hqk,khe->qhe", p, v).flatten(1) @ sd[at + "attn.out.weight"].T


def stack(sd, side, cfg, ids, pos, **kw):
    x = sd["embed.weight"][ids]
    for i in range(cfg.n_layer):
        at = f"{side}.blocks.{i}."
        x = x + attention(sd, at, cfg, rms(x, sd[at + "norm1.weight"], cfg.norm_eps), pos, **kw)
        n = rms(x, sd[at + "norm2.weight"], cfg.norm_eps)
        a, u = (n @ sd[at + "ffn.gate_up.weight"].T).chunk(2, -1)
        x = x + (F.silu(a) * u) @ sd[at + "ffn.down.weight"].T
    return rms(x, sd[f"{side}.norm.weight"], cfg.norm_eps)


def reference(model, enc_ids, dec_ids):
    sd, cfg = model.state_dict(), model.cfg
    S, T = len(enc_ids), len(dec_ids)
    hidden = stack(sd, "encoder", cfg, torch.as_tensor(enc_ids), torch.arange(S))
    pos = torch.arange(T) + (S if cfg.cross_rope == "continue" else 0)
    enc_pos = None if cfg.cross_rope == "none" else torch.arange(S)
    return hidden, stack(sd, "decoder", cfg, torch.as_tensor(dec_ids), pos, enc=hidden, enc_pos=enc_pos, causal=True)


@pytest.mark.parametrize("cross", CROSS)
def test_merged_attention_is_one_softmax_over_both_sides(cross):
    """Packed, with empty encoders and empty decoders among the examples; S > T, S < T, T = 1."""
    model, batch = model_of(cross_rope=cross), examples(SIZES)
    pack = denoise_stream.collate(batch)
    hidden, out = model.encode(pack), model(pack)
    for b, (enc, dec, *_) in enumerate(batch):
        want_hidden, want = reference(model, enc, dec)
        e, d = pack["cu"], pack["dec_cu"]
        torch.testing.assert_close(hidden[e[b] : e[b + 1]], want_hidden, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(out[d[b] : d[b + 1]], want, atol=1e-12, rtol=1e-10)


def test_the_three_geometries_differ_and_fp32_is_close():
    pack = denoise_stream.collate(examples([(9, 5), (6, 8)]))
    outs = [model_of(cross_rope=cross)(pack) for cross in CROSS]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(outs, [*outs[1:], outs[0]], strict=True))
    for cross, out in zip(CROSS, outs, strict=True):
        assert (model_of(double=False, cross_rope=cross)(pack) - out).norm() < 1e-6 * out.norm()


@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize(
    "knobs",
    [{}, {"ffn": "polyglu", "gate_noise": False}, {"embed_rank": 8, "remat": 1}, {"n_kv_head": 4, "qk_norm": False, "qkv_bias": True}],
)
def test_packed_equals_unpacked_equals_padded(cross, knobs):
    """Forward, loss and every gradient in fp64; padding on either side, and in any order of the examples."""
    model = model_of(cross_rope=cross, **knobs)
    batch = examples(SIZES, seed=1)

    def run(packs):
        model.zero_grad()
        total = sum(model.nll(model(p), p["targets"])[0].double() for p in packs)
        total.backward()
        return total.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, grads = run([denoise_stream.collate([x]) for x in batch])
    assert {n for n in grads if grads[n].abs().max() > 0} == {n for n, _ in model.named_parameters()}
    layouts = {
        "packed": [denoise_stream.collate(batch)],
        "reversed": [denoise_stream.collate(batch[::-1])],
        "right": [denoise_stream.collate(padded(batch, 8, SP))],
        "left": [denoise_stream.collate(padded(batch, 4, SP, "left"))],
    }
    for name, packs in layouts.items():
        other, theirs = run(packs)
        # nll sums in fp32 chunks at least; everything else is fp64
        torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-9, msg=name)
        for n in grads:
            torch.testing.assert_close(theirs[n], grads[n], rtol=1e-7, atol=1e-9, msg=f"{name} {n}")


def test_what_sees_what():
    """Encoder both ways, decoder backwards only and to the bit, an encoder token every decoder token of its example, nobody a neighbour."""
    model = model_of(cross_rope="enc")
    batch = examples([(9, 5), (8, 6)])
    base = denoise_stream.collate(batch)
    h0, y0 = model.encode(base), model(base)

    def changed(key, at):
        other = {k: v.clone() if torch.is_tensor(v) else v for k, v in base.items()}
        other[key][at] = (other[key][at] + 1) % 180
        return (model.encode(other) - h0).abs().amax(1), (model(other) - y0).abs().amax(1)

    for at in (0, 4, 8):
        dh, dy = changed("ids", at)
        assert (dh[:9] > 1e-6).all() and (dh[9:] == 0).all()
        assert (dy[:5] > 1e-8).all() and (dy[5:] == 0).all()
    for at in (0, 2, 4):
        dh, dy = changed("dec_ids", at)
        assert (dh == 0).all() and (dy[:at] == 0).all() and (dy[at:5] > 1e-8).all() and (dy[5:] == 0).all()


def test_shared_matrix_gets_gradients_from_all_three_uses():
    model = model_of()
    enc, dec, goal = np.array([1, 2]), np.array([3, 4]), np.array([5, 6])
    pack = denoise_stream.collate([(enc, dec, goal, 0)])
    model.nll(model(pack), pack["targets"])[0].backward()
    grad = model.embed.weight.grad
    assert all(grad[i].abs().max() > 0 for i in (1, 2, 3, 4, 5, 6, 150))  # 150 only as a logit
    assert grad[model.cfg.vocab_size :].abs().max() == 0
    assert sum("embed" in n or "head" in n for n in model.state_dict()) == 1


def test_counts_of_the_published_size():
    """Qwen3-0.6B with 100 sentinels; the numbers of the literature, not those of repositories."""
    cfg = ModelConfig(
        arch="encdec", vocab_size=152_036, n_layer=28, n_head=16, n_kv_head=8, head_dim=128, d_model=1024, d_ff=3072, max_len=40_960,
        rope_theta=1e6,
    )  # fmt: skip
    model = build(cfg, device="meta")
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert size(model.encoder.blocks[0]) == 15_730_944 and size(model.encoder) == size(model.decoder) == 440_467_456
    assert model.num_params() == 1_036_619_776 and size(model) == 1_036_648_448
    assert 152_036 * 1024 == 155_684_864
    encoder = build(dataclasses.replace(cfg, arch="encoder", vocab_size=151_936), device="meta")
    assert encoder.num_params() == 596_049_920
    assert 28 * (size(model.decoder.blocks[0].attn) + 1024) == 176_196_608  # what a separate cross-attention would add
    sp = denoise.special_ids(cfg.vocab_size, cfg.n_sentinels, 151_645, 151_643)
    assert (sp.mode, sp.sentinel) == (151_932, 151_936)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_phases_run_in_order_and_stop_at_a_failure(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $@"\ncase "$*" in *sanity*validation*) exit 1;; esac\n')
    python.chmod(0o755)

    def go(phases):
        command = ["make", "-s", "-o", ".venv/.plot", "encdec", f"PY={python}", f"PHASES={phases}", "ARGS=--data=data/mine"]
        done = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True, text=True)
        return done.returncode, [line[4:] for line in done.stdout.splitlines() if line.startswith("ran ")]

    start = "train.py config/encdec_ul2.py {}--init_from=out/encdec_init --resume=auto --data=data/mine".format
    sanity = [start("config/encdec_phase_sanity.py "), "-m eval.sanity --ckpt=out/encdec_sanity"]
    assert go("sanity full") == (0, [*sanity, start(""), "-m eval.sanity --ckpt=out/encdec_ul2"])
    code, ran = go("sanity validation full")
    assert code and ran == [*sanity, start("config/encdec_phase_validation.py "), "-m eval.sanity --ckpt=out/encdec_validation --learned"]
    for phase in ("sanity", "validation", "medium"):  # whose folder the check after it looks into
        assert configurator.load(train.Config, [f"config/encdec_phase_{phase}.py"])[0].out == f"out/encdec_{phase}"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A random Qwen3 folder as transformers writes it: grouped queries, head_dim free of the width."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=20, max_position_embeddings=128, rope_theta=1e6, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen")
    model = transformers.Qwen3ForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.2)
    model.save_pretrained(folder)
    return folder, model


def as_encdec(folder):
    fields, state, _ = hub.read_model(folder)
    cfg = ModelConfig(**(fields | {"arch": "encdec", "rope_scaling": None}))
    both = {k.replace("decoder.", "encoder."): v for k, v in state.items()} | state
    model = build(cfg)
    model.load_state_dict(both)
    return model.eval()


def test_parity_with_transformers(qwen):
    """Encoder = Qwen3 with is_causal=False; the decoder without encoder tokens = causal Qwen3, logits included."""
    transformers = pytest.importorskip("transformers")
    folder, causal = qwen
    model = as_encdec(folder)
    ids = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(1))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.is_causal = False
    config._attn_implementation = "eager"
    encoder = transformers.Qwen3Model.from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        want = encoder(ids).last_hidden_state
        pack = denoise_stream.collate([(row.numpy(), np.zeros(0, int), np.zeros(0, int), 0) for row in ids])
        assert (model.encode(pack).unflatten(0, (3, 17)) - want).abs().max() < 1e-5
        logits = causal(ids).logits
        ours = model.logits(ids, torch.zeros(3, 0, dtype=torch.long))
        assert (ours - logits).abs().max() / logits.abs().max() < 1e-5
        assert (causal.model(ids).last_hidden_state - want).abs().max() > 0.1  # the mask was really gone


@pytest.mark.parametrize("cross", CROSS)
def test_cached_decoding_equals_one_forward(cross):
    """Different encoder lengths in one batch, any chunking of the decoder input."""
    model = model_of(cross_rope=cross).eval()
    encs = [np.arange(9), np.arange(3, 7), np.arange(5, 20)]
    dec = torch.randint(0, 180, (3, 8), generator=torch.Generator().manual_seed(3))
    want = torch.stack([reference(model, e, d)[1] for e, d in zip(encs, dec, strict=True)])
    side = denoise_stream.collate([(e, np.zeros(0, int), np.zeros(0, int), 0) for e in encs])
    for chunks in ((8,), (3, 3, 2), (1,) * 8, (5, 1, 2)):
        cache = model.new_cache(3, 8)
        with torch.no_grad():
            model.read_encoder(side, cache)
            keep = [k.clone() for layer in cache.enc for k in layer]
            got = torch.cat([model.step(part, cache) for part in dec.split(chunks, 1)], 1)
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)
        assert all(torch.equal(a, b) for a, b in zip(keep, [k for layer in cache.enc for k in layer], strict=True))


def test_logits_of_rectangles_agree_with_packs():
    model = model_of()
    enc, dec = torch.randint(0, 180, (2, 6)), torch.randint(0, 180, (2, 4))
    got = model.logits(dec, enc)
    want = model.predict(model(denoise_stream.collate([(e.numpy(), d.numpy(), d.numpy(), 0) for e, d in zip(enc, dec, strict=True)])))
    torch.testing.assert_close(got.flatten(0, 1), want)
    assert got.shape == (2, 4, 211)


def test_loss_at_the_start_and_overfitting_one_pack():
    """ln V at first; then one pack is learned by heart, which needs both sides."""
    model = build(dataclasses.replace(SMALL, init_std=0.002))
    rng = np.random.default_rng(0)
    d = denoise.Denoiser("span", 3, 0.3, "R", 1)
    pairs = [denoise.corrupt(rng.integers(0, 180, 30), d, 0.3, rng, SP) for _ in range(4)]
    pack = denoise_stream.collate([(e, np.append(SP.start, t[:-1]), t, 0) for e, t in pairs])
    n = int((pack["targets"] >= 0).sum())
    assert abs(float(model.nll(model(pack), pack["targets"])[0].detach()) / n - math.log(211)) < 0.05
    model = build(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model.nll(model(pack), pack["targets"])[0] / n
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.detach() < 0.7, loss
    with torch.no_grad():
        strangers = denoising.shuffled(pack)  # what was learned of one encoder text is of no use with another
        assert float(model.nll(model(strangers), strangers["targets"])[0]) / n > loss + 0.3


def test_flops_are_those_of_the_paper_arithmetic(monkeypatch):
    """Qwen3-0.6B by hand: 440,401,920 weights a stack, 58,720,256 for the decoder's keys and values of each encoder token."""
    import configurator
    import monitor

    cfg, _ = configurator.load(train.Config, ["config/encdec_ul2.py"])
    model = build(cfg, "meta")
    S, T = [395, 100], [183, 50]
    pack = denoise_stream.collate([*examples(zip(S, T, strict=True)), denoise_stream.blank(300, 9, SP)])  # padding costs, but is no work
    pack |= {"tokens": sum(S) + sum(T), "source_tokens": 600}
    sides = sum(S) * (440_401_920 + 58_720_256) + sum(T) * (440_401_920 + 155_684_864)
    pairs = sum(s * s + t * s + t * t / 2 for s, t in zip(S, T, strict=True))
    assert monitor.flops(model, pack) == 6 * sides + 12 * 2048 * 28 * pairs
    texts = {"cu": torch.tensor([0, 40, 100])}  # contrast: neither decoder nor head
    assert monitor.flops(model, texts) == 6 * 100 * 440_401_920 + 12 * 2048 * 28 * (40**2 + 60**2)
    decoder = build(train.Config(n_layer=2, n_head=4, d_model=64, vocab_size=300), "meta")
    windows = {"cu": torch.tensor([0, 40, 100]), "tokens": 100, "targets": None}
    assert monitor.flops(decoder, windows) == 40 * decoder.flops_per_token(40) + 60 * decoder.flops_per_token(60)
    where = train.hardware.find("cpu")._replace(peak=1e15)
    meter, row = monitor.Meter(cfg, model, [], where), train.optim.Plan(cfg, 1)(0)
    meter.expect([pack, pack])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: meter.clock + 2.0)
    record, line = meter.read(row, ["loss"], torch.zeros(1), {"loss": 1.0}, {})
    assert record["train/mfu"] == pytest.approx(monitor.flops(model, pack) / 1e15) and "ALERT" not in line
    assert record["train/encoder_tokens"] == 2 * sum(S) and record["train/target_tokens"] == 2 * sum(T)
    assert record["train/fill"] == (sum(S) + sum(T)) / row.micro_tokens
    for _ in range(3):
        meter.expect([pack, pack])
        meter.accept(1, 0.0, True, False)
    assert "train/alert" not in record
    meter.norm, meter.norms = 11.0, [5.0] * 10
    record, _ = meter.read(row, ["loss"], torch.zeros(1), {"loss": 1.0}, {})  # of a step, whatever log_every is
    assert record["train/alert"] == 1
    meter.accept(1, 0.0, True, False), meter.accept(1, 0.0, True, False)
    assert " | 1000 ms | 1:23:20 left" in meter.read(row, ["loss"], torch.zeros(1), {"loss": 1.0}, {}, left=5000)[1]
    assert record["train/source_tokens"] == 1200 and record["train/encoder_tokens"] == 2 * sum(S)
    assert record["train/fill"] == (sum(S) + sum(T)) / row.micro_tokens


def test_what_leaps_is_said(tmp_path):
    """Ten lines make a window; then a loss beyond twice its mean, and a norm beyond that and 10, are said and counted."""
    import monitor

    meter = monitor.Meter(train.Config(), None, [], train.hardware.find("cpu"))
    lines = [meter.alert(loss) for loss in (9.0, *[2.0] * 9)]  # no window yet, whatever comes
    meter.accept(1, 0.0, True, True, 10.5)
    meter.accept(1, 0.0, True, False, 0.5)
    lines += [meter.alert(2.0), meter.alert(4.9), meter.alert(5.9)]  # the mean is 2.7, then 2.6, then 2.8
    alert = " | ALERT: {} more than twice the mean of {}".format
    assert lines == [""] * 10 + [alert("norm up to 10.5", 10), "", alert("loss", 12)]
    said, facts = meter.summary(tmp_path), json.loads((tmp_path / "summary.json").read_text())
    assert "first 9.0000, last 5.9000, falling" in said and "2.0000 to 9.0000; 2 alerts" in said
    assert facts["logged"] == 13 and facts["max"] == 9.0 and facts["alerts"] == 2 and facts["verdict"] == "falling"
    wild = monitor.Meter(train.Config(), None, [], train.hardware.find("cpu"))  # whose norms are always so leaps no more
    for norm in [40.0] * 10 + [70.0]:
        wild.accept(1, 0.0, True, True, norm)
        assert wild.alert(2.0) == ""
    wild.losses = wild.losses[:4]
    assert "too few to say more" in wild.summary(None)


def test_a_run_that_did_not_learn_is_not_prolonged(tmp_path, capsys):
    """eval.sanity --learned: the end of the log, its fall and its alerts each count in the exit code."""
    cfg = train.Config(vocab_size=257, n_layer=1, n_head=2, d_model=16, max_len=64, warmup=20)
    checkpoint.save(tmp_path, 100, build(cfg), None, {"config": configurator.to_dict(cfg)}, keep=1)
    tokenizer.load("bytes").save(tmp_path / "tokenizer")
    steps = range(10, 101, 10)
    for first, last, alerts, word in (
        (9.0, 7.9, 5, ""),
        (9.0, 8.1, 0, "at most 8"),
        (8.0, 7.6, 0, "at least 0.5"),
        (9.0, 5.0, 6, "at most 5"),
    ):
        rows = [
            {"step": s, "train/loss": first if s <= 20 else last} | ({"train/alert": 1} if i < alerts else {}) for i, s in enumerate(steps)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 100, "val/mean/loss": 1.0}]))
        with pytest.raises(SystemExit) as end:
            sanity.main([f"--ckpt={tmp_path}", "--learned", "--device=cpu"])
        failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
        assert end.value.code == bool(word) and len(failed) == bool(word) and all(word in line for line in failed)


FLAGS = (
    ("--ffn=swiglu", "--ffn=polyglu"),
    ("--precision=bf16", "--precision=fp8 --fp8_emulate=True"),
    ("--cross_rope=none", "--cross_rope=continue"),
    ("--mixture=recommended_curriculum", "--mixture=t5"),
    ("--optimizer=adamw", "--optimizer=muon"),
    ("--dtype=float32", "--dtype=bfloat16"),
    *[
        ("", flag)
        for flag in ("--remat=1", "--qk_norm=False", "--embed_rank=16", "--mode_tokens=False", "--closing_sentinel=True", "--snap=True")
    ],
)


def covering(knobs):
    """Few choices of one value for every knob such that each value of one meets each value of any other."""
    pairs = lambda row: set(itertools.combinations(enumerate(row), 2))  # noqa: E731
    missing = {((i, x), (j, y)) for (i, a), (j, b) in itertools.combinations(enumerate(knobs), 2) for x in a for y in b}
    rng, rows = np.random.default_rng(0), []
    while missing:
        tries = [[values[rng.integers(len(values))] for values in knobs] for _ in range(300)]
        rows.append(max(tries, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


def test_every_pair_of_knobs_trains(corpus, tmp_path):
    """A PolyGLU encoder in FP8 under UL2, and all that lies between, through the loop as a user runs it."""
    rows = covering(FLAGS)
    assert len(rows) < 12
    base = ["config/encdec_debug.py", f"--data={corpus}", "--d_model=32", "--n_head=2", "--n_kv_head=1", "--max_enc=64", "--max_dec=64"]
    base += [
        "--tokens_per_step=256",
        "--max_steps=3",
        "--n_layer=1",
        "--warmup=1",
        "--log_every=1",
        "--eval_every=0",
        "--save_every=0",
        "--progress=False",
    ]
    for i, row in enumerate(rows):
        train.main([*base, f"--out={tmp_path / str(i)}", *" ".join(row).split()])
        loss = [json.loads(line).get("train/loss") for line in (tmp_path / str(i) / "metrics.jsonl").read_text().splitlines()]
        loss = [value for value in loss if value is not None]
        assert len(loss) == 3 and max(loss) < 7 and loss[2] < loss[0], (row, loss)


def test_a_curriculum_of_denoisers_resumes_to_the_bit_and_its_losses_are_golden(corpus, tmp_path, capsys):
    def run(name, *argv):
        base = [
            "config/encdec_debug.py",
            f"--data={corpus}",
            "--mixture=recommended_curriculum",
            "--dtype=float32",
            "--max_steps=6",
            "--lr=1e-3",
        ]
        base += ["--tokens_per_step=1024", "--n_layer=1", "--log_every=1", "--eval_every=0", "--eval_tokens=512", "--save_every=3", *argv]
        train.main([*base, f"--out={tmp_path / name}"])
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row], (tmp_path / name / "step-000006/model.safetensors").read_bytes()

    whole, weights = run("whole")
    text, epochs = re.search(r"in all 6,144 tokens, made of about ([\d,]+) of text: ([\d.]+) epochs", capsys.readouterr().out).groups()
    size = data.read_manifest(Path(corpus))["shards"]
    n = sum(shard["tokens"] for shard in size if shard["split"] == "train")
    assert 0.6 * 6144 < int(text.replace(",", "")) < 0.98 * 6144 and float(epochs) == pytest.approx(
        int(text.replace(",", "")) / n, abs=0.006
    )
    later, same = run("later", f"--resume={tmp_path}/whole/step-000003")
    assert later == whole[3:] and same == weights
    assert whole == pytest.approx(GOLDEN, abs=3e-3), whole


GOLDEN = [6.0652, 5.9873, 5.9797, 5.8853, 5.7583, 5.6717]


def test_a_run_logs_its_mixture_and_how_often_each_denoiser_is_right(corpus, tmp_path):
    """Weights move with the curriculum; the accuracy of a run's evaluations is the one that eval.denoising measures."""
    sizes = "--n_layer=1 --tokens_per_step=1024 --eval_tokens=512 --max_steps=2 --warmup=1 --log_every=1 --dtype=float32".split()
    train.main(["config/encdec_debug.py", f"--data={corpus}", f"--out={tmp_path}", "--mixture=recommended_curriculum", *sizes])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = (row for row in rows if "train/loss" in row)
    assert (first["train/progress"], second["train/progress"]) == (0.0, 0.5)
    assert (first["train/infill@0.3/weight"], second["train/infill@0.3/weight"]) == pytest.approx((0.05, 0.10))
    model, state = checkpoint.load(tmp_path)
    packs = denoise_stream.val_batches(configurator.from_dict(train.Config, state["config"], "config"))
    found = denoising.evaluate(model, packs, torch.device("cpu"))
    assert len(found) == 7 and all(rows[-1][f"val/{name}/accuracy"] == row["accuracy"] for name, row in found.items())
    assert max(row["accuracy"] for row in found.values()) > 0


def test_denoisers_of_a_checkpoint_are_measured_and_a_decoder_has_none(corpus, tmp_path, capsys, dies):
    keys = dict(vocab_size=371, n_layer=1, n_head=2, d_model=16, max_len=64, max_enc=64, max_dec=64, objective="denoise", data=corpus)
    for arch in ("encdec", "decoder"):
        cfg = train.Config(**keys, arch=arch)
        checkpoint.save(tmp_path / arch, 0, build(cfg), None, {"config": configurator.to_dict(cfg)}, keep=1)
    out = tmp_path / "new" / "result.json"
    denoising.main([f"--ckpt={tmp_path / 'encdec'}", "--tokens=512", "--device=cpu", f"--out={out}"])
    assert all(5 < row["loss"] < 7 for row in json.loads(out.read_text())["denoisers"].values()) and "infill" in capsys.readouterr().out
    tokenizer.load("bytes").save(tmp_path / "encdec/tokenizer")
    mirrored = {c: 255 - b for c, b in tokenizer.byte_alphabet().items()}
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.bpe(mirrored, [], tokenizer.GPT2, {tokenizer.EOS: 256}))
    write_shards(tmp_path / "strange", {"val": documents(20)}, tokenizer.load(tmp_path / "tokenizer.json"))
    with pytest.raises(SystemExit):  # as many ids, but they mean something else
        denoising.main([f"--ckpt={tmp_path / 'encdec'}", "--tokens=512", "--device=cpu", f"--data={tmp_path / 'strange'}"])
    assert "another tokenizer" in capsys.readouterr().err
    dies(lambda: denoising.main([f"--ckpt={tmp_path / 'decoder'}", "--device=cpu"]), "eval.perplexity")


def test_trace_keeps_every_state_and_map():
    """Maps of merged attention rebuild the layer's output; states are what the model itself computes."""
    model = model_of(cross_rope="continue")
    pack = denoise_stream.collate(examples([(9, 5), (4, 1), (17, 11)]))
    found = trace(model, pack)
    assert torch.equal(found["decoder"]["states"][-1], model(pack)) and torch.equal(found["encoder"]["states"][-1], model.encode(pack))
    for stack, shapes in (("encoder", [(4, 9, 9), (4, 4, 4), (4, 17, 17)]), ("decoder", [(4, 5, 14), (4, 1, 5), (4, 11, 28)])):
        assert len(found[stack]["states"]) == 4 and len(found[stack]["maps"]) == 3
        for layer in found[stack]["maps"]:
            assert [tuple(m.shape) for m in layer] == shapes
            assert all(torch.allclose(m.sum(-1), torch.ones((), dtype=m.dtype)) for m in layer)
    assert not found["decoder"]["maps"][0][0][:, 0, 10:].any()  # the first decoder token sees its encoder and itself
    block, x = model.decoder.blocks[0], found["decoder"]["states"][0]
    v_own = block.attn.qkv(block.norm1(x)).unflatten(-1, (-1, 10))[:5, -2:]
    v_enc = block.attn.encoder_keys(found["encoder"]["states"][-1], None)[1][:9]
    v = torch.cat((v_enc, v_own)).repeat_interleave(2, 1).transpose(0, 1)  # (H, S + T, E)
    h = x[:5] + block.attn.out((found["decoder"]["maps"][0][0] @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(h + block.ffn(block.norm2(h), None), found["decoder"]["states"][1][:5])


def test_neither_side_may_be_longer_than_max_len(dies):
    model = build(ModelConfig(arch="encdec", vocab_size=50, n_layer=1, n_head=2, d_model=16, max_len=16, n_sentinels=4))
    for enc, dec in ((17, 4), (4, 17)):
        dies(
            lambda: model.logits(torch.zeros(1, dec, dtype=torch.long), torch.zeros(1, enc, dtype=torch.long)),
            "17 tokens is longer than max_len=16",
        )
