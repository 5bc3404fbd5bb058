"""FP8 against fp64, and everything that may go wrong around it. The CPU runs the same torch._scaled_mm path as a GPU."""

import contextlib
import copy
import dataclasses
import functools
import re
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fp8
import monitor
import precision
from eval import fp8_table as measured
from fp8 import E4M3, E5M2, MAX
from model import build, compile_blocks, merged_rectangle, rectangle
from train import Config

TINY = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 64, "d_ff": 96, "vocab_size": 61, "max_len": 64, "qk_norm": False}
H200 = SimpleNamespace(cuda=True, name="NVIDIA H200", capability=(9, 0), toolkit=(13, 0), cudnn=True, te=True)


def config(**keys):
    return Config(**({"precision": "fp8", "fp8_emulate": True, "fp8_filter": "all", "max_steps": 1, "out": "unused"} | TINY | keys))


def model_of(**keys):
    cfg = config(**keys)
    model = build(cfg).train()
    return model, cfg, fp8.apply(model, cfg, "cpu")


def batch(seed=0, rows=3, width=13):
    ids = torch.randint(0, 61, (rows, width), generator=torch.Generator().manual_seed(seed))
    return rectangle(ids) | {"targets": ids.flatten().roll(-1)}


def loss(model, b):
    with fp8.scope(model):
        return model.nll(model(b), b["targets"])[0] / len(b["targets"])


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def linear(model):
    return model.decoder.blocks[0].ffn.gate_up  # (192, 64)


# ---- the three GEMMs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 37, 64, 2047])
@pytest.mark.parametrize("keys", [{}, {"fp8_format": "e4m3"}, {"fp8_recipe": "delayed"}, {"fp8_mode": "forward"}], ids=str)
def test_gemms_against_fp64(m, keys):
    model, cfg, _ = model_of(**keys)
    layer, g = linear(model), torch.Generator().manual_seed(m)
    x, dy = torch.randn(m, 64, generator=g, requires_grad=True), torch.randn(m, 192, generator=g) * 1e-6
    y = layer(x)
    y.backward(dy)
    w = layer.weight.double()
    assert 0.005 < error(y, x.double() @ w.T) <= 0.05  # below: this was no FP8 product
    limits = (1e-6, 1e-6) if cfg.fp8_mode == "forward" else (0.08, 0.08)
    assert error(x.grad, dy.double() @ w) <= limits[0]
    assert error(layer.weight.grad, dy.double().T @ x.detach().double()) <= limits[1]
    assert layer.weight.grad.dtype == torch.float32 and y.shape == (m, 192)


def test_every_product_is_one_that_hopper_takes(monkeypatch):
    """A CPU multiplies anything; a GPU wants row-major by column-major, sixteens everywhere and one fp32 scale each."""
    real, seen = torch._scaled_mm, []

    def strict(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0])
        assert not any(n % 16 for n in (*a.shape, *b.shape))
        assert all(s.dtype == torch.float32 and s.numel() == 1 for s in (scale_a, scale_b))
        assert not (a.dtype == b.dtype == E5M2)
        seen.append(use_fast_accum)
        return real(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    model, _, _ = model_of()
    x = torch.randn(37, 64, requires_grad=True)
    linear(model)(x).sum().backward()  # the gradient arrives expanded, stride 0
    assert seen == [True, False, False] and x.grad.shape == (37, 64)


def test_gradients_in_hybrid_are_e5m2():
    """One gradient spans 2^-13 of its largest: E5M2 keeps it, E4M3 (2^-9 subnormal / 448) flushes it."""
    dy = torch.zeros(16, 192)
    dy[0, 0], dy[1, 1] = 1.0, 2.0**-20
    for form, kept in (("hybrid", True), ("e4m3", False)):
        model, _, _ = model_of(fp8_format=form)
        x = torch.ones(16, 64, requires_grad=True)
        linear(model)(x).backward(dy)
        assert bool(x.grad[1].abs().sum() > 0) is kept


def test_zeros_and_outliers():
    model, _, _ = model_of()
    layer = linear(model)
    x = torch.zeros(16, 64, requires_grad=True)
    y = layer(x)
    y.backward(torch.zeros_like(y))
    assert not y.any() and not x.grad.any() and not layer.weight.grad.any()
    x = torch.randn(32, 64)
    x[3, 5] = 1e4
    assert error(layer(x), x.double() @ layer.weight.double().T) <= 0.05


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_nonfinite_stays_nonfinite(bad, recipe):
    """A clamp alone would turn an infinity into 448 and the loop's guard would never know."""
    model, _, _ = model_of(fp8_recipe=recipe)
    layer = linear(model)
    for _ in range(2):  # the second time delayed scaling uses its history
        x = torch.randn(16, 64, requires_grad=True)
        layer(x).backward(torch.randn(16, 192))
        fp8.refresh(model)
    scales = model.fp8.scale.clone()
    x = torch.randn(16, 64)
    x[2, 3] = bad
    assert not layer(x).isfinite().all()
    x, dy = torch.randn(16, 64, requires_grad=True), torch.randn(16, 192)
    dy[1, 1] = bad
    layer.weight.grad = None
    layer(x).backward(dy)
    assert not layer.weight.grad.isfinite().all() and not x.grad.isfinite().all()
    fp8.refresh(model)  # a skipped step: the history must not remember it
    assert model.fp8.scale.isfinite().all() and model.fp8.history.isfinite().all()
    assert torch.equal(model.fp8.scale, scales) or recipe == "delayed"


def test_scale_is_divided_in_fp64_and_margin_halves_it():
    amax = torch.tensor(3.0)
    assert fp8.scale_of(amax, E4M3).item() == torch.tensor(448 / 3, dtype=torch.float64).float().item()
    assert fp8.scale_of(amax, E5M2, 2).item() == pytest.approx(57344 / 3 / 4)
    assert fp8.cast(torch.tensor([1e9, -1e9]), torch.tensor(1.0), E4M3).float().tolist() == [448, -448]
    for seed in range(20):  # amax itself lands on the maximum, never beyond
        x = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        assert fp8.cast(x, fp8.scale_of(x.abs().amax(), E5M2), E5M2).float().abs().max() == MAX[E5M2]


# ---- steps: casts, histories, phases ------------------------------------------------------------------------------------


def train(model, steps, micro=2, first=0, lr=1e-2, same=False):
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for step in range(first, first + steps):
        fp8.set_step(model, step)
        for i in range(micro):
            value = loss(model, batch(0 if same else 10 * step + i))
            value.backward()
            losses.append(value.item())
        opt.step()
        opt.zero_grad()
        fp8.refresh(model)
    return losses


def test_one_weight_cast_per_step_whatever_the_micro_batches():
    model, _, _ = model_of()
    assert len(model.fp8.ones) == 8 and model.fp8.casts == 8
    train(model, steps=3, micro=4)
    assert model.fp8.casts == 8 * 4
    one = model.fp8.ones[3]
    assert torch.equal(one.wq.float(), fp8.cast(one.linear.weight, 1 / one.inv, E4M3).float()) and torch.equal(one.wqt, one.wq.t())


def test_a_weight_that_changed_without_refresh_is_noticed():
    model, _, _ = model_of()
    with torch.no_grad():
        linear(model).weight.mul_(2)
    with pytest.raises(RuntimeError, match="gate_up"):
        loss(model, batch())
    fp8.refresh(model)
    loss(model, batch())


@pytest.mark.parametrize("length", [1, 3])
def test_a_skipped_step_keeps_the_last_amax(length):
    model, _, _ = model_of(fp8_recipe="delayed", fp8_history=length)
    for value in (2.0, float("nan")):
        for heard in model.fp8.heard:
            heard.fill_(value)
        fp8.refresh(model)
        assert (model.fp8.history[0] == 2).all()


@pytest.mark.parametrize("algo", ["max", "most_recent"])
def test_delayed_scale_is_the_maximum_over_the_history(algo):
    """Amaxes recorded by hand at one Linear: each the max over a step's micro-batches, then over the last 3 steps."""
    model, _, _ = model_of(fp8_recipe="delayed", fp8_history=3, fp8_algo=algo, fp8_margin=1)
    layer, one = linear(model), next(o for o in model.fp8.ones if o.linear is linear(model))
    seen = []
    for size in (5.0, 1.0, 3.0, 0.5, 0.25):
        amaxes = []
        for share in (0.5, 1.0, 0.75):
            x, dy = torch.randn(16, 64, requires_grad=True), torch.randn(16, 192) * size * share
            with torch.no_grad():
                x.mul_(size * share / x.abs().max())
            layer(x).backward(dy)
            amaxes.append((x.abs().max().item(), dy.abs().max().item()))
        seen.append(tuple(map(max, zip(*amaxes, strict=True))))
        fp8.refresh(model)
        for i, kind in enumerate((E4M3, E5M2)):
            window = [s[i] for s in seen][-3:] if algo == "max" else [seen[-1][i]]
            assert model.fp8.scale[one.slot + i].item() == pytest.approx(MAX[kind] / max(window) / 2, rel=1e-6)
    assert model.fp8.saturated[one.slot] == (0 if algo == "max" else 1)  # from 1 to 3: margin 1 holds a doubling
    used = fp8.operand(torch.full((16, 64), 1e3), E4M3, model.fp8, *one.inputs)[0]
    assert used.float().max() == 448  # clamped by the old scale, not rescaled by this tensor's own amax


def test_delayed_state_resumes_to_the_bit():
    model, cfg, _ = model_of(fp8_recipe="delayed", fp8_history=4)
    train(model, 3)
    weights, memory = copy.deepcopy(model.state_dict()), fp8.memory(model)
    assert set(memory) == {"history", "scale", "saturated"} and not any("fp8" in k for k in weights)
    rest = train(model, 3, first=3)
    again = build(cfg).train()
    again.load_state_dict(weights)
    fp8.apply(again, cfg, "cpu")
    fp8.load_memory(again, memory)
    assert train(again, 3, first=3) == rest
    fresh = build(cfg).train()
    fresh.load_state_dict(weights)
    fp8.apply(fresh, cfg, "cpu")
    fp8.load_memory(fresh, {})  # a bf16 checkpoint: current scaling for one step
    assert not fresh.fp8.warm and train(fresh, 3, first=3) != rest
    assert fp8.memory(model_of()[0]) == {}


def test_delayed_state_saved_before_its_first_step_is_no_state():
    keys = {"fp8_recipe": "delayed", "fp8_history": 4, "fp8_start_step": 3}
    model, cfg, _ = model_of(**keys)
    train(model, 2)
    weights, memory = copy.deepcopy(model.state_dict()), fp8.memory(model)
    rest = train(model, 3, first=2)
    again = build(cfg).train()
    again.load_state_dict(weights)
    fp8.apply(again, cfg, "cpu")
    fp8.load_memory(again, memory)
    assert not again.fp8.warm and train(again, 3, first=2) == rest


def test_start_step():
    plain, _, _ = model_of(precision="bf16")
    model, _, _ = model_of(fp8_start_step=2)
    assert fp8.set_step(model, 0) is None
    assert train(model, 2) == train(plain, 2)
    assert "step 2: fp8 on" in fp8.set_step(model, 2) and fp8.set_step(model, 3) is None
    assert train(model, 1, first=2) != train(plain, 1, first=2)


def test_learns_like_bf16():
    keys = {"steps": 40, "micro": 1, "lr": 0.1, "same": True}
    plain = train(model_of(precision="bf16")[0], **keys)
    for variant in ({}, {"fp8_recipe": "delayed"}, {"fp8_mode": "forward"}):
        got = train(model_of(**variant)[0], **keys)
        assert sum(got[-5:]) / 5 == pytest.approx(sum(plain[-5:]) / 5, abs=0.05) and got != plain and got[-1] < 1.4


# ---- the same module in bf16 --------------------------------------------------------------------------------------------


def test_evaluation_is_bf16_to_the_bit():
    model, cfg, _ = model_of()
    plain, b = build(cfg), batch()
    with fp8.evaluation(model), torch.no_grad():
        assert torch.equal(model(b), plain(b))
        with fp8.evaluation(model):
            pass
        assert torch.equal(model(b), plain(b))
    with torch.no_grad():
        assert not torch.equal(model(b), plain(b))
    assert not [k for k in model.state_dict() if k not in plain.state_dict()]


def test_apply_again_starts_from_the_default():
    model, cfg, _ = model_of()
    fp8.apply(model, config(precision="bf16"), "cpu")
    assert torch.equal(model(batch()), build(cfg)(batch()))
    fp8.apply(model, cfg, "cpu")
    assert len(model.fp8.ones) == 8 and isinstance(linear(model).matmul, functools.partial)


def test_composes_with_polyglu_and_merged_attention():
    """A PolyGLU encoder-decoder in FP8; the row slice of qkv that merged attention reads runs unquantised."""
    model, _, _ = model_of(arch="encdec", ffn="polyglu", gate_noise=False, qk_norm=True)
    ids = torch.randint(0, 61, (2, 11))
    hidden = model(merged_rectangle(ids, ids[:, :7]))
    value = model.nll(hidden, ids[:, :7].flatten())[0]
    value.backward()
    assert len(model.fp8.ones) == 16 and value.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    qkv = model.decoder.blocks[0].attn.qkv
    x = torch.randn(5, 64)
    rows = slice(64, None)
    assert torch.equal(qkv.matmul(x, qkv.weight[rows], None), x @ qkv.weight[rows].t())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_recomputed_blocks_give_the_same_gradients_and_histories():
    grads, memories = [], []
    for every in (0, 1):
        model, _, _ = model_of(remat=every, fp8_recipe="delayed")
        for _ in range(2):
            loss(model, batch()).backward()
            fp8.refresh(model)
        grads.append([p.grad for p in model.parameters()])
        memories.append(fp8.memory(model))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and same(*memories)


def test_bias_is_added_once():
    model, cfg, _ = model_of(qkv_bias=True)
    qkv, x = model.decoder.blocks[0].attn.qkv, torch.zeros(16, 64)
    with torch.no_grad():
        qkv.bias.normal_()
    assert torch.equal(qkv(x), qkv.bias.expand(16, -1))


# ---- choosing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, hw, line",
    [
        ({"fp8_emulate": False}, None, "precision: fp8 requested, fp32 used; no CUDA GPU"),
        ({"precision": "te"}, None, "precision: te requested, fp8 used; transformer_engine is not installed"),
        (
            {"precision": "te", "fp8_emulate": False},
            None,
            "precision: te requested, fp32 used; transformer_engine is not installed; no CUDA GPU",
        ),
        (
            {},
            {"name": "NVIDIA A100", "capability": (8, 0)},
            "precision: fp8 requested, fp32 used; NVIDIA A100, capability 8.0: FP8 begins at 8.9",
        ),
        (
            {"fp8_filter": "static"},
            None,
            "precision: fp8 requested, fp32 used; fp8_filter=static leaves 0 % of matmul FLOPs in FP8 at width 64",
        ),
        ({"precision": "bf16"}, None, "precision: bf16 requested, fp32 used"),
        ({}, None, "precision: fp8 requested, fp8 used"),
    ],
)
def test_fallback_lines(keys, hw, line, dies):
    cfg = config(**keys)
    hw = SimpleNamespace(**vars(H200) | hw) if hw else precision.hardware("cpu")
    hw.te = False
    assert fp8.apply(build(cfg), cfg, "cpu", hw=hw).splitlines()[0] == line
    if "fp8 used" in line and cfg.precision == "fp8" or cfg.precision == "bf16":
        return
    dies(lambda: fp8.apply(build(cfg), config(**keys, precision_required=True), "cpu", hw=hw), line)


@pytest.mark.parametrize(
    "keys, hw, word",
    [
        ({"fp8_format": "mxfp8"}, {}, "Blackwell"),
        ({"fp8_format": "mxfp8", "precision": "te"}, {"name": "RTX 5090", "capability": (12, 0)}, "RTX 5090"),
        ({"fp8_recipe": "block"}, {}, "precision=te"),
        ({"fp8_recipe": "block", "precision": "te"}, {"toolkit": (12, 4)}, "12.4"),
        ({"fp8_recipe": "block", "precision": "te"}, {"name": "B200", "capability": (10, 0)}, "B200"),
        ({"fp8_recipe": "block", "precision": "te"}, {"te": False}, "not installed"),
        ({"fp8_attention": True, "precision": "te"}, {}, "te_block"),
        ({"fp8_attention": True, "precision": "te", "te_block": True}, {"name": "RTX 4090", "capability": (8, 9)}, "RTX 4090"),
        ({"fp8_attention": True, "precision": "te", "te_block": True}, {"cudnn": False}, "cuDNN"),
        ({"fp8_attention": True, "precision": "te", "te_block": True, "fp8_recipe": "block"}, {}, "block scaling"),
    ],
)
def test_settings_without_an_honest_fallback_stop(keys, hw, word, dies):
    dies(lambda: precision.resolve(config(**keys), SimpleNamespace(**vars(H200) | hw)), word)


def test_the_settings_that_fit_pass():
    for keys in ({"fp8_recipe": "block"}, {"te_block": True, "fp8_attention": True}):
        assert precision.resolve(config(precision="te", **keys), H200) == ("te", [])
    blackwell = SimpleNamespace(**vars(H200) | {"capability": (10, 0)})
    assert precision.resolve(config(precision="te", fp8_format="mxfp8"), blackwell) == ("te", [])


def test_fsdp_and_unknown_filter_stop(dies):
    for keys, word in (({"parallel": "fsdp"}, "ddp"), ({"fp8_filter": ("gate_upp",)}, "did you mean 'gate_up'"),
                       ({"fp8_filter": ("table", "down")}, "table, static and all stand alone")):  # fmt: skip
        dies(lambda: model_of(**keys), word)


def test_filter(monkeypatch):
    pick = functools.partial(precision.choose, m=98304, device="NVIDIA H200")
    yes, no = (True,) * 3, (False,) * 3
    static = config(fp8_filter="static")
    assert pick(static, "gate_up", k=768, n=4096) == yes
    assert pick(static, "down", k=2048, n=768) == no and pick(static, "down", k=6144, n=1536) == yes
    assert precision.choose(static, "gate_up", 4096, 768, 4096, "") == no  # too few tokens
    assert pick(config(), "proj", k=128, n=768) == no and pick(config(), "head", k=768, n=200064) == no
    assert pick(config(), "gate_up", k=760, n=4096) == no  # 760 % 16
    assert pick(config(fp8_filter=("down",)), "down", k=768, n=64) == yes and pick(config(fp8_filter="down"), "qkv", k=768, n=64) == no
    assert [pick(config(fp8_filter="gate_up,down"), role, k=768, n=64) for role in precision.ROLES] == [no, no, yes, yes]
    table = config(fp8_filter="table")
    monkeypatch.setattr(
        precision.fp8_table, "SPEEDUP", {("down", 98304, 2048, 768, g): s for g, s in zip(precision.GEMMS, (1.2, 1.02, 1.03), strict=True)}
    )
    monkeypatch.setattr(precision.fp8_table, "DEVICE", "NVIDIA H200")
    assert pick(table, "down", k=2048, n=768) == (True, False, True)
    assert pick(table, "gate_up", k=768, n=4096) == yes  # not measured: the static rule
    assert precision.choose(table, "down", 98304, 2048, 768, "NVIDIA H100") == no  # measured on another device
    assert pick(config(fp8_filter="table", fp8_mode="forward"), "down", k=2048, n=768) == (True, False, False)
    precision.fp8_table.SPEEDUP["down", 32768, 2048, 768, "forward"] = 0.9
    near = [precision.choose(table, "down", m, 2048, 768, "NVIDIA H200") for m in (81920, 49152, 16384, 4096)]
    assert near == [(True, False, True), (False, False, True), (False, False, False), no]  # the nearest M, unless it is far away


def test_the_smallest_micro_batch_of_the_table_decides():
    cfg = config(d_model=256, d_ff=1024, fp8_filter="static", n_layer=1)
    for tokens, picked in ((98304, 1), (4096, 0)):
        model = build(cfg)
        fp8.apply(model, cfg, "cpu", [(8, tokens), (2048, 98304)])
        assert len(model.fp8.ones if model.fp8 else ()) == picked


def test_the_table_that_is_written_is_the_table_that_is_read(tmp_path):
    """Its keys are those `choose` asks for; the figures of a CPU mean nothing."""
    path = tmp_path / "fp8_table.py"
    run = ["--d_model=32", "--n_head=2", "--d_ff=64", "--n_layer=2", "--tokens_per_step=96", "--seq_len=32", "--max_steps=1"]
    measured.write_table(path, "cpu", run, tokens=64, widths=(48,), repeats=1, backend="eager")
    space = {}
    exec(path.read_text(), space)
    wide = {(64, 48, 1024), (64, 48, 48), (64, 48, 256), (64, 128, 48)}
    assert wide | {(96, 32, 96), (96, 32, 32), (96, 32, 128), (96, 64, 32)} == {key[1:4] for key in space["SPEEDUP"]}
    assert len(space["SPEEDUP"]) == 24
    assert {key[4] for key in space["SPEEDUP"]} == set(precision.GEMMS) and space["DEVICE"] == "CPU" and space["TORCH"] == torch.__version__


def test_products_are_timed_several_in_a_row(monkeypatch):
    """Else a GPU would wait for Python, which has more to start of FP8 than of bf16, and the table would speak of that."""
    between = [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            between[-1] += op is torch.ops.aten.mm.default
            return op(*args, **kwargs or {})

    monkeypatch.setattr(measured, "wait", lambda device: between.append(0))
    with Count():
        measured.measure_table("cpu", tokens=32, widths=(48,), repeats=1, calls=5, backend="eager")
    assert set(between) == {0, 5}


def test_mixed_directions_of_one_linear(monkeypatch):
    """forward and wgrad in FP8, dgrad not: each direction takes its own operands."""
    monkeypatch.setattr(fp8, "choose", lambda *a: (False, True, True))
    model, _, _ = model_of()
    layer, x, dy = linear(model), torch.randn(16, 64, requires_grad=True), torch.randn(16, 192)
    y = layer(x)
    y.backward(dy)
    w = layer.weight.double()
    assert error(y, x.double() @ w.T) < 1e-6
    assert 0.01 < error(x.grad, dy.double() @ w) <= 0.08 and 0.01 < error(layer.weight.grad, dy.double().T @ x.detach().double()) <= 0.08


def test_report_of_the_197m_model(monkeypatch):
    """The shares of M4: gate_up is 44.8 % of linear FLOPs, all four roles 86.9 %."""
    cfg = config(
        n_layer=28,
        n_head=12,
        n_kv_head=2,
        d_model=768,
        head_dim=64,
        d_ff=2048,
        vocab_size=200005,
        embed_rank=128,
        max_len=4096,
        fp8_filter="static",
    )
    model = build(cfg, "meta")
    report = fp8.apply(model, cfg, "meta", [(8, 98304), (2048, 98304)], hw=H200)
    assert (
        "L=8, 98304 tokens: % of matmul FLOPs FP8 44.8 / " in report
        and "gate_up 4096 x 768: forward FP8, dgrad FP8, wgrad FP8; static" in report
    )
    assert "compile=False" in report and "qkv 1024 x 768: forward fp32" in report
    assert "% of matmul FLOPs FP8 86.9 / " in fp8.apply(model, dataclasses.replace(cfg, fp8_filter="all"), "meta", hw=H200)
    monkeypatch.setattr(precision.fp8_table, "SPEEDUP", {("o", 98304, 768, 768, g): 1.1 for g in precision.GEMMS})
    monkeypatch.setattr(precision.fp8_table, "DEVICE", H200.name)
    report = fp8.apply(model, dataclasses.replace(cfg, fp8_filter="table"), "meta", [(2048, 49152)], hw=H200)
    assert "o 768 x 768: forward FP8, dgrad FP8, wgrad FP8; measured" in report and "gate_up 4096 x 768" in report.split("static")[1]


# ---- statistics ---------------------------------------------------------------------------------------------------------


def test_statistics_name_the_worst_operand_and_leave_no_trace():
    model, _, _ = model_of(fp8_recipe="delayed")
    train(model, 2)
    before = fp8.memory(model)
    with torch.no_grad():
        linear(model).weight[0, 0] = 1e6
    fp8.refresh(model, step=False)
    rows = monitor.fp8_statistics(model, lambda: loss(model, batch()))
    assert len(rows) == 3 * 8 and all(p.grad is None for p in model.parameters())
    planted = next(r for r in rows if r["name"] == "decoder.blocks.0.ffn.gate_up.weight")
    assert planted["amax"] == 1e6 and planted["underflow"] > 0.9
    assert [r["snr_db"] for r in rows] == sorted(r["snr_db"] for r in rows)
    usual = next(r for r in rows if r["name"] == "decoder.blocks.1.ffn.down.x")
    assert 20 < usual["snr_db"] < 40 and usual["saturation"] < 0.01
    slot = next(one.slot for one in model.fp8.ones if one.name == "decoder.blocks.1.ffn.down")
    model.fp8.saturated[slot] += 7
    rows = {r["name"]: r for r in monitor.fp8_statistics(model, lambda: loss(model, batch()))}
    assert rows[usual["name"]]["saturated"] == usual["saturated"] + 7 and "saturated" not in rows[planted["name"]]
    model.fp8.saturated[slot] -= 7
    assert same(fp8.memory(model), before) and not any(model.fp8.heard)
    assert monitor.fp8_statistics(model_of(precision="bf16")[0], None) == []


def test_compiled_is_the_same(tmp_path):
    """The autograd function and delayed scaling's writes to its history survive tracing."""
    model, _, _ = model_of(fp8_recipe="delayed", n_layer=1)
    other = copy.deepcopy(model)
    assert next(o.linear for o in other.fp8.ones if "gate_up" in o.name) is linear(other)
    layer = torch.compile(linear(other), backend="aot_eager")
    for step in range(3):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        for run in (linear(model), layer):
            run(x).square().sum().backward()
        fp8.refresh(model)
        fp8.refresh(other)
        assert torch.equal(linear(model).weight.grad, linear(other).weight.grad)
        assert torch.equal(model.fp8.history, other.fp8.history) and model.fp8.history.any()


def test_compiled_blocks_hear_what_eager_ones_hear(monkeypatch):
    """Several blocks are several graphs: what the backward of one writes to must not be what another has saved for its own."""
    model, _, _ = model_of(fp8_recipe="delayed", n_layer=3)
    other, real = copy.deepcopy(model), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **keys: real(call, backend="aot_eager", **keys))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(other)
    graphs = []
    for step in range(4):
        for each in (model, other):
            fp8.refresh(each, step=step > 0)
            value = loss(each, batch(step))
            value.backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        heard = [torch.cat(each.fp8.heard) for each in (model, other)]
        assert torch.allclose(*heard, rtol=1e-5) and heard[0].all()
        assert torch.allclose(*(linear(each).weight.grad for each in (model, other)), rtol=1e-3, atol=1e-6)
    assert graphs[0] < graphs[1] == graphs[3], graphs  # before the first histories, and after
    assert torch.allclose(model.fp8.history, other.fp8.history, rtol=1e-5) and model.fp8.warm


# ---- TransformerEngine: no kernel runs here. A stand-in records what it is told: shapes, borrowed weights, state, stops --------


class Twin(torch.nn.Module):
    """The parts of te.Linear that precision.py touches."""

    def __init__(self, k, n, bias, params_dtype, device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(n, k, dtype=params_dtype, device=device))
        self.fp8_meta, self.rows = {}, []

    def forward(self, x):
        self.rows.append(len(x))
        return torch.nn.functional.linear(x, self.weight)

    def init_fp8_metadata(self, num_gemms):
        self.fp8_meta["num_gemms"] = n = num_gemms
        for side, count in (("fwd", 3 * n), ("bwd", 2 * n)):
            self.fp8_meta[f"scaling_{side}"] = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(16, count))

    def get_extra_state(self):
        raise AssertionError("a pickle would be saved")


class Layer(torch.nn.Module):
    def __init__(self, *sizes, **keys):
        super().__init__()
        self.sizes, self.keys, self.calls = sizes, keys, []
        part = lambda: torch.nn.Module()  # noqa: E731
        self.self_attention, self.layernorm_mlp = part(), part()
        for name in ("layernorm_qkv", "proj", "q_norm", "k_norm"):
            setattr(self.self_attention, name, part())

    def forward(self, x, **keys):
        self.calls.append((x, keys))
        return x


@pytest.fixture
def te(monkeypatch):
    scopes = []
    recipe = types.ModuleType("transformer_engine.common.recipe")
    recipe.Format = SimpleNamespace(HYBRID="hybrid", E4M3="e4m3")
    for name in ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "DelayedScaling"):
        kind = type(name, (), {"__init__": lambda self, **keys: vars(self).update(keys)} | {"backward_override": None})
        setattr(recipe, name, kind)
    pytorch = types.ModuleType("transformer_engine.pytorch")
    pytorch.Linear, pytorch.TransformerLayer, pytorch.autocast = Twin, Layer, lambda **keys: scopes.append(keys) or contextlib.nullcontext()
    root, common = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.common")
    root.pytorch, common.recipe = pytorch, recipe
    for module in (root, common, pytorch, recipe):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return scopes


def te_model(**keys):
    cfg = config(precision="te", **keys)
    model = build(cfg).train()
    report = fp8.apply(model, cfg, "cpu", hw=H200)
    return model, cfg, report


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
def test_te_linear_borrows_our_weights(te):
    model, cfg, report = te_model(fp8_start_step=1, fp8_recipe="delayed")
    plain = build(cfg)
    assert report.startswith("precision: te requested, te used") and len(model.fp8.twins) == 8
    assert {id(t.weight) for t in model.fp8.twins} <= {id(p) for p in model.parameters()}
    assert model.state_dict().keys() == plain.state_dict().keys()
    fp8.set_step(model, 0)
    value = loss(model, batch())
    fp8.set_step(model, 1)
    loss(model, batch()).backward()
    assert [(s["enabled"], s["calibrating"]) for s in te] == [(False, True), (True, False)]
    told = {"fp8_format": "hybrid", "fp8_dpa": False, "margin": 0, "amax_history_len": 16, "amax_compute_algo": "max", "reduce_amax": True}
    assert vars(te[0]["recipe"]) == told
    assert value.isfinite() and model.fp8.twins[0].rows == [64, 64]  # 39 tokens padded to 32
    assert model.decoder.blocks[0].attn.qkv.weight.grad is not None
    with fp8.evaluation(model), torch.no_grad():
        assert torch.equal(model(batch()), plain(batch()))


def test_te_state_is_plain_tensors(te):
    model, cfg, _ = te_model(fp8_recipe="delayed")
    assert fp8.memory(model) == {}  # before the first step there is none
    for i, twin in enumerate(model.fp8.twins):
        twin.init_fp8_metadata(1)
        twin.fp8_meta["scaling_bwd"].scale.fill_(i + 2.0)
    tensors = fp8.memory(model)
    assert len(tensors) == 8 * 4 and tensors["te.3.bwd.scale"].tolist() == [5.0, 5.0]
    other, _, _ = te_model(fp8_recipe="delayed")
    fp8.load_memory(other, tensors)
    assert te[-1]["enabled"] and vars(te[-1]["recipe"])["amax_history_len"] == 16  # inside the scope that the forward will have
    assert other.fp8.twins[3].fp8_meta["scaling_bwd"].scale.tolist() == [5.0, 5.0] and other.fp8.twins[3].fp8_meta["num_gemms"] == 1
    assert fp8.memory(te_model()[0]) == {}


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
def test_te_runs_outside_of_compiled_graphs(te):
    """Inside one, 2.20.2 refuses delayed scaling and breaks the graph at most of its modules."""
    model, _, report = te_model(fp8_recipe="delayed", compile=True, fp8_filter=("gate_up",), n_layer=1)
    assert "between compiled parts" in report
    seen, twin = [], model.fp8.twins[0]
    twin.register_forward_pre_hook(lambda *args: seen.append(torch.compiler.is_compiling()))
    compiled, b = torch.compile(model, backend="eager"), batch()
    with fp8.scope(model):
        assert torch.allclose(compiled(b), model(b), atol=1e-6)  # compiled norms are the plain formula
    assert seen == [False, False] and len(twin.rows) == 2


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
@pytest.mark.parametrize("doc_mask", [True, False])
def test_te_block_is_told_the_layout(te, doc_mask):
    model, cfg, report = te_model(te_block=True, doc_mask=doc_mask, micro_tokens=64, seq_len=16, qk_norm=True)
    layer, block = model.fp8.twins[1], model.decoder.blocks[1]
    assert layer.sizes == (64, 96, 4) and layer.keys["num_gqa_groups"] == 2 and layer.keys["kv_channels"] == 16
    assert layer.keys["attn_input_format"] == ("thd" if doc_mask else "bshd")
    assert layer.keys["fuse_qkv_params"] and not layer.keys["qkv_weight_interleaved"] and layer.keys["qk_norm_before_rope"]
    assert layer.self_attention.layernorm_qkv.weight is block.attn.qkv.weight and layer.layernorm_mlp.fc1_weight is block.ffn.gate_up.weight
    assert layer.self_attention.q_norm.weight is block.attn.q_norm.weight
    b = batch(rows=4, width=16)
    with fp8.scope(model):
        hidden = model(b)
    x, told = layer.calls[0]
    assert hidden.shape == (64, 64) and x.shape == ((64, 64) if doc_mask else (4, 16, 64))
    assert told["self_attn_mask_type"] == ("padding_causal" if doc_mask else "causal")
    if doc_mask:
        assert torch.equal(told["cu_seqlens_q"], b["cu"]) and told["max_seqlen_kv"] == 16
    cos, _ = model.rope(torch.arange(16))
    assert torch.equal(told["rotary_pos_emb"][:16, 0, 0, :8].cos(), cos[:, 0, :8]) and told["rotary_pos_emb"].shape[1:] == (1, 1, 16)
    assert "gate_up 192 x 64: forward FP8, dgrad FP8, wgrad FP8" in report
    plain = build(cfg)
    with fp8.evaluation(model), torch.no_grad():
        assert torch.equal(model(b), plain(b))
    fp8.apply(model, config(precision="bf16", qk_norm=True), "cpu", hw=H200)
    assert torch.equal(model(b), plain(b))


@pytest.mark.parametrize(
    "keys, word",
    [
        ({"te_block": True, "ffn": "polyglu", "micro_tokens": 64}, "ffn=polyglu"),
        ({"te_block": True, "qkv_bias": True, "micro_tokens": 64}, "qkv_bias"),
        ({"te_block": True, "micro_tokens": 48}, "micro_tokens"),
        ({"remat": 1}, "--remat=0"),
        ({"fp8_margin": 1}, "--fp8_margin=0"),
        ({"fp8_mode": "forward", "fp8_recipe": "delayed"}, "high-precision backward"),
    ],
)
def test_te_stops(te, keys, word, dies):
    dies(lambda: te_model(**keys), word)


def test_te_that_does_not_load_names_the_pair(monkeypatch, tmp_path, dies):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise ImportError('undefined symbol: cublasLtGroupedMatrixLayoutInit')")
    monkeypatch.syspath_prepend(tmp_path)
    dies(te_model, "cublasLtGroupedMatrixLayoutInit", f"torch {torch.__version__}", "2.20.2")


def test_info_names_the_machine_and_the_choice():
    assert re.findall("precision: (.*?) requested", precision.info()) == ["fp8", "te"]  # bench.py --info
    text = precision.info(config(fp8_emulate=False))
    assert f"torch {torch.__version__}" in text and "precision: fp8 requested" in text
