"""The 197M model's arithmetic and every curriculum table, from the config files as a user loads them."""

import functools
import gc
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import configurator
import data
import fp8
import machine
import mix
import monitor
import needs
import optim
import prepare.text
import tokenizer
import train
from eval import ablation, speed
from eval.perplexity import domain_batches, score
from model import build, rectangle
from tests.test_data import make_docs, write_shards
from train import Config

BASE = "config/superbpe_197m.py"


def load(*argv):
    return configurator.load(Config, list(argv))[0]


# ---- the model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, count",
    [
        ([], 196_398_464),
        (["--tie=False"], 350_002_304),
        (["--qk_norm=True"], 196_398_464 + 3_584),
        (["config/superbpe_270m.py"], 293_684_736),
        (["config/superbpe_270m.py", "--tie=False"], 472_889_216),
        (["config/superbpe_270m.py", "--d_ff=2400"], 290_932_224),
        (["config/superbpe_270m.py", "--d_ff=2400", "--tie=False"], 470_136_704),
        (["config/superbpe_270m.py", "--d_model=640", "--n_layer=28", "--n_head=10", "--d_ff=1712"], 145_281_280),
        (["config/superbpe_270m.py", "--d_model=640", "--n_layer=28", "--n_head=10", "--d_ff=1712", "--tie=False"], 273_284_480),
    ],
)
def test_parameter_counts(argv, count):
    model = build(load(BASE, *argv), "meta")
    assert model.num_params() == count
    padding = (200_064 - 200_005) * (128 if model.head is None else 128 + model.cfg.d_model)
    assert sum(p.numel() for p in model.parameters()) == count + padding


def test_breakdown_of_197m():
    model = build(load(BASE), "meta")
    size = {n: p.numel() for n, p in model.named_parameters()}
    block = {n.split(".", 3)[3]: c for n, c in size.items() if n.startswith("decoder.blocks.5.")}
    assert sum(block.values()) == 6_096_384 and block["attn.qkv.weight"] == 589_824 + 196_608 and block["attn.out.weight"] == 589_824
    assert block["ffn.gate_up.weight"] + block["ffn.down.weight"] == 4_718_592
    assert size["embed.proj.weight"] == 98_304 and size["decoder.norm.weight"] == 768 and "head.weight" not in size
    assert 6 * 196_452_992 == 1_178_717_952
    for length, attention in ((8, 0.001e9), (512, 0.066e9), (2048, 0.264e9)):
        assert model.flops_per_token(length) == pytest.approx(6 * 196_452_992 + attention, abs=5e5)


@pytest.fixture(scope="module")
def full():
    return build(load(BASE)).eval()


def test_init_of_197m(full):
    """Stds as designed, and a loss of ln V + d 0.02^2 / 2 before any step."""
    assert sum(p.numel() for p in full.parameters()) == 196_398_464 + 59 * 128
    std = {n: p.std().item() for n, p in full.named_parameters() if p.dim() > 1 and (n[:5] == "embed" or ".blocks.7." in n)}
    for name, want in {
        "embed.proj": 128**-0.5,
        "attn.out": 0.002673,
        "ffn.down": 0.002673,
        "embed.weight": 0.02,
        "qkv": 0.02,
        "gate_up": 0.02,
    }.items():
        got = next(s for n, s in std.items() if name in n)
        assert got == pytest.approx(want, rel=0.02), name
    ids = torch.randint(0, 200_005, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert full.embed_tokens(ids.flatten()).std().item() == pytest.approx(0.02, rel=0.05)
        loss = full.nll(full(rectangle(ids)), ids.flatten().roll(-1))[0].item() / 64
        assert loss == pytest.approx(12.36, abs=0.05)
        hidden = torch.randn(3, 768)
        want = hidden.double() @ full.embed.proj.weight.double() @ full.embed.weight[:200_005].double().T
        torch.testing.assert_close(full.predict(hidden).double(), want, rtol=0, atol=1e-4)


def small(**keys):
    shape = {
        "n_layer": 3,
        "n_head": 6,
        "n_kv_head": 2,
        "d_model": 48,
        "head_dim": 8,
        "d_ff": 64,
        "vocab_size": 61,
        "embed_rank": 16,
        "max_len": 4096,
    }
    return build(Config(**shape | {"qk_norm": False} | keys)).train()


def test_grouped_queries_equal_repeated_heads():
    """Two KV heads serving six queries are six KV heads of which three are copies of each."""
    model, wide = small().double().set_dtype(torch.float64), small(n_kv_head=6).double().set_dtype(torch.float64)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("qkv.weight"):
            q, k, v = value.split((48, 16, 16))
            repeat = lambda t: t.unflatten(0, (2, 8)).repeat_interleave(3, 0).flatten(0, 1)  # noqa: E731
            state[name] = torch.cat((q, repeat(k), repeat(v)))
    wide.load_state_dict(state)
    b = rectangle(torch.randint(0, 61, (2, 33)))
    torch.testing.assert_close(model(b), wide(b), rtol=1e-12, atol=1e-12)
    assert model.decoder.blocks[0].attn.qkv.weight.shape == (48 + 2 * 16, 48) and model.new_cache(1, 8).k.shape[2] == 2


def test_recomputation_changes_no_gradient():
    ids, grads = torch.randint(0, 61, (2, 17)), []
    for every in (0, 1, 2):
        model = small(remat=every)
        model.nll(model(rectangle(ids)), ids.flatten().roll(-1))[0].backward()
        grads.append([p.grad for p in model.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_length_4096_runs_and_no_more():
    model = small()
    assert model(rectangle(torch.zeros(1, 4096, dtype=torch.long))).isfinite().all()
    with pytest.raises(SystemExit):
        model(rectangle(torch.zeros(1, 4097, dtype=torch.long)))


# ---- the tables ---------------------------------------------------------------------------------------------------------

TEN = (8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048)
MULT = (0.3, 0.4, 0.5, 0.6, 0.75, 0.85, 0.95, 1.0, 1.0, 1.0)
CLIP = (0.5, 0.5, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0)
ONE = (1,) * 10
NINE = (128, 256, 512, 768, 1024, 1536, 2048, 2048, 2048)
# file: (files before it, first steps, steps, lengths, rows, accum, mult, clip, tokens)
TABLES = {
    "ultra": ([], (0, 84, 209, 417, 834, 1459, 2292, 3334, 7084, 10834), 20834, TEN, [98304 // n for n in TEN], ONE, MULT, CLIP, 2.048e9),
    "ultra_steps": (
        [], (0, 2000, 5000, 10000, 20000, 35000, 55000, 80000, 110000, 140000), 200000, TEN,
        (512, 256, 128, 64, 32, 16, 8, 16, 8, 8), (1,) * 10, MULT, CLIP, 2.048e9,
    ),
    "h200": (
        [], (0, 3000, 8000, 15000, 30000, 50000, 80000, 120000, 170000, 220000), 300000, TEN,
        (4096, 2048, 1024, 512, 256, 128, 64, 48, 24, 16), (1,) * 10, MULT, CLIP, 10.24e9,
    ),
    "progressive": (
        ["config/superbpe_270m.py"], None, None, TEN, (512, 256, 128, 64, 32, 16, 8, 8, 4, 4), (1,) * 8 + (2, 2), ONE, ONE, 1e9,
    ),
    "nine": (
        [], (0, 3000, 6000, 10000, 15000, 25000, 40000, 60000, 100000), 150000, NINE, (256, 128, 64, 42, 32, 21, 16, 18, 20), (1,) * 9,
        (12, 8, 4, 2.5, 1.5, 1, 0.7, 0.5, 0.3), (5, 2, 1, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3), 5.48e9,
    ),
    "eight": (
        [], (0, 3000, 6000, 10000, 15000, 25000, 40000, 60000), 150000, NINE[:8], (256, 128, 64, 42, 32, 21, 16, 16), (1,) * 8,
        (8, 5, 3, 2, 1.5, 1, 0.7, 0.5), (5, 2, 1, 0.5, 0.4, 0.3, 0.3, 0.3), 4.905e9,
    ),
    "flat": ([], (0,), 20834, (2048,), (48,), (1,), (1.0,), (1.0,), 2.048e9),
}  # fmt: skip


@functools.cache
def plan_of(name, *more):
    cfg = load(BASE, *TABLES[name][0], f"config/curriculum_{name}.py", *more)
    return cfg, optim.Plan(cfg, 1)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_at_both_edges(name):
    _, firsts, steps, lengths, rows, accums, mults, clips, tokens = TABLES[name]
    cfg, plan = plan_of(name)
    firsts = firsts or [s.first for s in plan.stages]
    assert plan.steps == (steps or plan.steps) and len(plan.stages) == len(firsts)
    assert plan.total == pytest.approx(tokens, rel=1e-3) and f"{plan.steps:,} steps, {plan.total:,} tokens" in plan.table()
    total = 0
    for i, (first, end) in enumerate(zip(firsts, [*firsts[1:], plan.steps], strict=True)):
        for step in (first, end - 1):
            row = plan(step)
            shape = (i, lengths[i], rows[i] * lengths[i] * accums[i], rows[i] * lengths[i], accums[i], clips[i])
            assert (row.stage, row.seq_len, row.tokens, row.micro_tokens, row.accum, row.clip) == shape
        warmed = cfg.stages[i].get("warmup", 0)
        assert plan(end - 1).lr == pytest.approx(formula(cfg, plan, end - 1, mults[i]), rel=1e-9)
        if first and not warmed:
            assert plan(first).lr == pytest.approx(formula(cfg, plan, first, mults[i]), rel=1e-9)
        total += (end - first) * row.tokens
    assert total == plan.total
    assert cfg.chunk == 6144 and all(cfg.chunk % length == 0 for length in lengths)  # the order of the data is that of every other table


def formula(cfg, plan, step, mult):
    """lr x warm-up x cosine to a tenth x mult, progress in the table's own unit, written out once more."""

    def unit(s):
        seen = sum(plan(t.first).tokens * (min(s, e) - t.first) for t, e in ends(plan) if s > t.first)
        return seen / plan.total if plan.by_tokens else s / plan.steps

    warm = unit(cfg.warmup)
    past = max(0.0, unit(step) - warm) / (1 - warm)
    return cfg.lr * min(1, (step + 1) / cfg.warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * past))) * mult


def ends(plan):
    return list(zip(plan.stages, [*[s.first for s in plan.stages[1:]], plan.steps], strict=True))


@pytest.mark.parametrize("name", TABLES)
def test_lr_is_continuous_but_for_the_multiplier(name):
    """A switch changes the multiplier alone; after warm-up the rest falls smoothly and ends at a tenth, with the run."""
    cfg, plan = plan_of(name)
    mults = TABLES[name][6]
    bare = lambda step: plan(step).lr / mults[plan(step).stage]  # noqa: E731
    for stage in plan.stages[1:]:
        if not stage.warmup and stage.first > cfg.warmup:
            assert bare(stage.first) == pytest.approx(bare(stage.first - 1), rel=2e-3)
    assert bare(cfg.warmup) <= cfg.lr and bare(plan.steps - 1) == pytest.approx(cfg.lr / 10, rel=1e-3)
    assert plan(0).lr < cfg.lr / 50


def test_a_row_may_slide_into_its_multiplier():
    _, plan = plan_of("nine")
    slide = [plan(step).lr for step in range(2999, 3310)]
    assert max(abs(a / b - 1) for a, b in zip(slide, slide[1:], strict=False)) < 0.01  # 12 -> 8 over 300 steps, no jump


def test_published_accumulation_is_one_line_away(tmp_path):
    text = open("config/curriculum_ultra_steps.py").read()
    path = tmp_path / "with_accumulation.py"
    path.write_text(text.replace("_accumulate = False", "_accumulate = True"))
    plan = optim.Plan(load(BASE, str(path)), 1)
    assert plan.total == 8_593_408_000 and plan(199_999).accum == 4 and plan(110_000).tokens == 73_728


def test_progressive_mix_and_the_h100_rows(tmp_path):
    cfg, plan = plan_of("progressive")
    assert plan(0).mix == {"fineweb": 0.95, "math": 0.05, "code": 0.0} and plan(plan.steps - 1).mix == {
        "fineweb": 0.55,
        "math": 0.25,
        "code": 0.20,
    }
    assert [row["tokens"] // 10**6 for row in cfg.stages] == [10, 20, 30, 40, 75, 100, 125, 150, 200, 250]
    path = tmp_path / "h100.py"
    path.write_text(open("config/curriculum_progressive.py").read().replace("_h100 = False", "_h100 = True"))
    big = load(BASE, "config/superbpe_270m.py", str(path))
    assert big.lr == 8e-4 and [row["rows"] for row in big.stages] == [8192, 4096, 2048, 1024, 512, 256, 128, 96, 48, 40]
    for c in (cfg, big):
        assert c.warmup == round(optim.Plan(c, 1).steps / 100)


@pytest.mark.parametrize("micro, world", [(98304, 1), (49152, 1), (49152, 2), (12288, 8), (12288, 1)])
def test_micro_batches_divide_exactly(micro, world):
    cfg = load(BASE, "config/curriculum_ultra.py", f"--micro_tokens={micro}")
    plan = optim.Plan(cfg, world)
    for stage in plan.stages:
        assert stage.tokens == 98304 and stage.accum * stage.micro_tokens * world == 98304 and stage.micro_tokens % stage.seq_len == 0


@pytest.mark.parametrize(
    "argv, words",
    [
        (["config/curriculum_ultra.py", "--micro_tokens=10000"], ["10000", "--micro_tokens="]),
        (["config/curriculum_ultra.py", "--max_len=1024"], ["1536", "1024"]),
        (["config/curriculum_progressive.py", '--data={"fineweb": "a", "maths": "b"}'], ["math", "maths"]),
        (["config/curriculum_ultra.py", "--stages=({'tokens': 5, 'seq': 8},)"], ["seq", "seq_len"]),
    ],
)
def test_mistakes_stop_with_one_line(argv, words, dies):
    dies(lambda: optim.Plan(load(BASE, *argv), 1), *words)


# ---- a run through a table ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    for name in ("one", "two"):
        words = [f"{name}{i}" for i in range(40)]
        texts = [" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(120)]
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
        prepare.text.main([f"--from={root / name}.jsonl", f"--out={root / name}", "--val=0.1", "--workers=1"])
    return {name: str(root / name) for name in ("one", "two")}


def short(shards, out, *more):
    """Three stages of four steps; the last one changes the mix."""
    stages = (
        {"start": 0, "seq_len": 16, "mult": 0.5},
        {"start": 4, "seq_len": 32, "clip": 0.5},
        {"start": 8, "seq_len": 64, "mix": {"two": 1.0}},
    )
    argv = [
        "config/debug.py",
        f"--data={shards}",
        "--tokens_per_step=256",
        "--micro_tokens=128",
        "--max_steps=12",
        f"--stages={stages}",
        f"--out={out}",
    ]
    argv += [
        "--n_layer=1",
        "--d_model=32",
        "--log_every=1",
        "--eval_every=0",
        "--eval_tokens=512",
        "--device=cpu",
        "--dtype=float32",
        "--keep=9",
    ]
    return list({arg.partition("=")[0]: arg for arg in [*argv, *more]}.values())


def rows_of(out):
    skip = ("train/tokens_per_sec", "train/wait", "train/peak_mem", "time")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in skip} for row in rows]


FP8 = ("--precision=fp8", "--fp8_emulate=True", "--fp8_filter=all", "--fp8_recipe=delayed", "--fp8_start_step=2")


def test_resume_around_a_switch_is_bitwise(shards, tmp_path, capsys):
    """One step before the switch, at it and after it, with FP8's delayed histories; logged lr is the plan's at every step."""
    argv = short(shards, tmp_path / "whole", *FP8, "--save_every=1", "--keep=12")
    train.main(argv)
    said = capsys.readouterr().out
    assert "precision: fp8 requested, fp8 used" in said and "step 2: fp8 on" in said and "L=16, 128 tokens: % of matmul FLOPs FP8" in said
    used = [json.loads((tmp_path / "whole" / f"step-00000{n}" / "state.json").read_text())["precision"] for n in (2, 3)]
    assert used == ["fp8 requested, fp8 used (not before fp8_start_step)", "fp8 requested, fp8 used"]
    whole = rows_of(tmp_path / "whole")
    plan = optim.Plan(load(*argv), 1)
    logged = {row["step"]: row["train/lr"] for row in whole if "train/lr" in row}
    assert logged == {step + 1: plan(step).lr for step in range(12)}
    for stop in (7, 8, 9):  # the switch is at step 8
        part = tmp_path / f"part{stop}"
        shutil.copytree(tmp_path / "whole", part, symlinks=True)
        train.main(short(shards, part, *FP8, f"--resume={part}/step-{stop:06d}"))
        assert rows_of(part)[-1] == whole[-1]
        a, b = (load_file(d / "step-000012" / "model.safetensors") for d in (tmp_path / "whole", part))
        assert all(torch.equal(a[k], b[k]) for k in a)
        states = [json.loads((d / "step-000012" / "state.json").read_text()) for d in (tmp_path / "whole", part)]
        a, b = (load_file(d / "step-000012" / "optim.safetensors") for d in (tmp_path / "whole", part))
        assert all(torch.equal(a[k], b[k]) for k in a) and a["fp8/history"].any() and "fp8" not in states[0]
        assert states[0]["stream"] == states[1]["stream"]


@pytest.mark.filterwarnings("ignore")
def test_warming_up_compiles_every_stage(shards, tmp_path, monkeypatch, capsys):
    """After it no switch of stage compiles a graph."""
    real, graphs, seen = torch.compile, [], []

    def warm(*args, warm_up=train.warm_up):
        line = warm_up(*args)
        seen.append(len(graphs))
        return line

    keep = lambda graph, inputs: graphs.append(1) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda model, **keys: real(model, backend=keep, **keys))
    monkeypatch.setattr(train, "warm_up", warm)
    torch._dynamo.reset()
    stages = "--stages=({'start': 0, 'seq_len': 16}, {'start': 2, 'seq_len': 32})"
    train.main(short(shards, tmp_path, "--compile=True", stages, "--max_steps=4"))
    assert seen and 1 < seen[0] == len(graphs)
    assert "warmed up 2 stages x 1 phases of precision in" in capsys.readouterr().out


def test_warming_up_changes_nothing(shards, tmp_path, monkeypatch, capsys):
    """bf16 steps, FP8's first one, delayed scaling: the run is the same to the bit, histories and stream too."""
    monkeypatch.setattr(torch, "compile", lambda model, **keys: model)
    for name in ("warm", "cold"):
        train.main(short(shards, tmp_path / name, *FP8, "--compile=True"))
        monkeypatch.setattr(train, "warm_up", lambda *args: "no warm-up")
    assert "warmed up 3 stages x 3 phases of precision in" in capsys.readouterr().out
    for file in ("model.safetensors", "optim.safetensors"):
        a, b = (load_file(tmp_path / d / "step-000012" / file) for d in ("warm", "cold"))
        assert all(torch.equal(a[k], b[k]) for k in a) and (file[0] == "m" or a["fp8/history"].any())
    streams = [json.loads((tmp_path / d / "step-000012" / "state.json").read_text())["stream"] for d in ("warm", "cold")]
    assert streams[0] == streams[1] and rows_of(tmp_path / "warm") == rows_of(tmp_path / "cold")


def test_a_wrong_product_of_fp8_stops_before_the_first_step(shards, tmp_path, monkeypatch, capsys, dies):
    """The loss would not tell: a weight's gradient a thousand times too long."""
    monkeypatch.setattr(torch, "compile", lambda model, **keys: model)
    train.main(short(shards, tmp_path / "right", *FP8, "--compile=True"))
    off = float(re.search(r"fp8: gradients .* furthest, ([\d.]+)%", capsys.readouterr().out)[1])
    assert 0 < off < 50
    gemm = fp8.gemm  # `fast` is said in the forward alone
    monkeypatch.setattr(fp8, "gemm", lambda *args, **keys: gemm(*args, **keys) * (1 if keys else 1000))
    dies(lambda: train.main(short(shards, tmp_path / "wrong", *FP8, "--compile=True")), "of its length off bf16's: use --precision=bf16")


def run_out_of_memory(cfg):
    with machine.enough_memory(cfg, optim.Plan(cfg)(0)):
        raise torch.OutOfMemoryError


def test_out_of_memory_names_the_stage_and_the_remedy(shards, tmp_path, monkeypatch, dies):
    def full(model, raw, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "token_sums", full)
    said = "stage 0: L=16, 8 rows per micro-batch, precision=bf16; try --micro_tokens=64"
    dies(lambda: train.main(short(shards, tmp_path / "out")), said)
    monkeypatch.setattr(os, "execv", None)  # --micro_tokens says nothing of a stage with `accum`: begun again, it would never end
    argv = short(shards, tmp_path / "accum", "--auto_batch=True", "--stages=({'start': 0}, {'start': 4, 'accum': 2})")
    dies(lambda: train.main(argv), "2 rows per micro-batch, precision=bf16; try half the rows, twice the accum")
    for micro, remat, remedy in ((2048, 0, "--micro_tokens=1024"), (1024, 0, "--remat=1"), (1024, 1, "--max_enc=256")):
        keys = dict(arch="encdec", objective="denoise", max_enc=512, max_dec=256, tokens_per_step=2048, auto_batch=micro < 2048)
        cfg = train.Config(**keys, micro_tokens=micro, remat=remat, max_steps=1)  # a pack of less than max_enc + max_dec would be refused
        dies(lambda: run_out_of_memory(cfg), f"try {remedy}")


def test_auto_batch_takes_the_remedy_until_it_fits(shards, tmp_path):
    """As on a device that holds 64 tokens: 128 and 256 begin again, and from a checkpoint where one is; the step keeps its size."""
    script = tmp_path / "small.py"
    script.write_text(
        "import glob, sys, torch, train\n"
        "sums = train.token_sums\n"
        "def small(model, raw, batch):\n"
        "    if len(batch['ids']) > (64 if glob.glob(open(sys.argv[0] + '.room').read()) else 256):\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    return sums(model, raw, batch)\n"
        "train.token_sums = small\n"
        "train.main(sys.argv[1:])\n"
    )
    root, room = Path(train.__file__).parent, Path(f"{script}.room")

    def go(out, *more):
        argv = [sys.executable, str(script), *short(shards, tmp_path / out, "--auto_batch=True", *more)]
        env = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.run(argv, cwd=root, env=env, capture_output=True, text=True, check=True).stdout

    room.write_text(little := str(root))
    said = go("halved", "--micro_tokens=256")
    assert said.count("once more, with") == 2 and "once more, with --micro_tokens=128" in said and "done: 12 steps" in said
    config = json.loads((tmp_path / "halved" / "config.json").read_text())["config"]
    assert (config["micro_tokens"], config["tokens_per_step"]) == (64, 256)
    room.write_text("")
    assert "once more" not in go("whole", "--micro_tokens=64")
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "halved")
    go("later", "--micro_tokens=256", "--max_steps=6", "--stages=()", "--save_every=6")
    room.write_text(little)
    said = go("later", "--micro_tokens=256", "--max_steps=8", "--stages=()", "--resume")
    assert "resumed from" in said and "once more, with --micro_tokens=64" in said and "done: 8 steps" in said
    room.write_text(f"{tmp_path}/moved/step-*")  # once there is a checkpoint of its own, the run goes on from that one
    argv = ["--micro_tokens=256", "--stages=()", "--save_every=1", f"--resume={tmp_path / 'later'}"]
    assert f"resumed from {tmp_path}/moved/step-000009" in go("moved", "--max_steps=10", *argv)
    room.write_text(little)
    assert "with --micro_tokens=64" in (said := go("anew", "--max_steps=9", *argv)) and said.count(f"resumed from {tmp_path}/later") == 3


def test_any_precision_resumes_any(shards, tmp_path, capsys):
    """A bf16 run goes on in FP8 and back; masters and names are the same."""
    train.main(short(shards, tmp_path, "--max_steps=10"))
    train.main(short(shards, tmp_path, *FP8, "--resume", "--max_steps=11"))
    train.main(short(shards, tmp_path, "--resume"))
    losses = [row["train/loss"] for row in rows_of(tmp_path) if "train/loss" in row]
    assert len(losses) >= 12 and all(map(math.isfinite, losses))
    assert "precision: fp8 requested, fp8 used" in capsys.readouterr().out


def test_looking_changes_nothing(shards, tmp_path):
    """Statistics of every kind, at every step, leave the run to the bit."""
    outs = tmp_path / "a", tmp_path / "b"
    train.main(short(shards, outs[0], *FP8, "--max_steps=10"))
    train.main(short(shards, outs[1], *FP8, "--max_steps=10", "--stats_every=1", "--fp8_stats_every=4"))
    a, b = (load_file(out / "step-000010" / "model.safetensors") for out in outs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    rows = {k: v for row in rows_of(outs[1]) for k, v in row.items()}
    assert rows["stats/grad/nonfinite"] == 0 and rows["stats/grad/norm"] > 0 and 0 <= rows["stats/activation/last/dead"] <= 1
    assert any(k.startswith("fp8/decoder.blocks.0.attn.qkv.grad/snr_db") for k in rows)


# ---- surprise, auto_mix, benchmark --------------------------------------------------------------------------------------


def test_surprise_and_advice(dies):
    """The published rule on perplexities, ours on bits per byte over a reference."""
    ppl = mix.surprise({"c4": 20.0, "gsm8k": 10.0, "humaneval": 30.0}, "ppl")
    assert ppl == {"c4": (1.0, "balanced"), "gsm8k": (0.5, "reduce"), "humaneval": (1.5, "increase")}
    bpb = mix.surprise({"a": 1.0, "b": 2.2}, reference={"a": 1.0, "b": 2.0})
    assert bpb["b"][0] == pytest.approx(1.1 / 1.05) and bpb["a"][1] == "balanced"
    assert mix.surprise({"a": 1.0, "b": 1.5})["a"][1] == "reduce"
    dies(lambda: mix.surprise({"a": 1.0, "b": 2.2}, reference={"a": 1.0}), "has no bpb of b")  # bits over bits beside bare bits


def test_auto_mix_moves_a_little_and_keeps_the_sum():
    shares, ema = {"web": 0.7, "math": 0.2, "code": 0.1, "never": 0.0}, {}
    for _ in range(30):
        new, ema = mix.auto_mix(
            shares, ema, {"c4": 1.0, "gsm8k": 4.0, "humaneval": 0.1}, {"c4": "web", "gsm8k": "math", "humaneval": "code"}
        )
        assert sum(new.values()) == pytest.approx(1) and new["never"] == 0
        assert all(abs(new[s] - shares[s]) <= 0.2 * shares[s] + 1e-12 for s in shares)
        shares = new
    assert shares["math"] > 0.8 and shares["code"] == pytest.approx(0.02, abs=5e-3) and shares["math"] <= 0.9 + 1e-9
    same, _ = mix.auto_mix({"a": 0.5, "b": 0.5}, {}, {"x": 1.0, "y": 1.0}, {"x": "a", "y": "b"})
    assert same == {"a": 0.5, "b": 0.5}


def test_auto_mix_resumes_to_the_bit(shards, tmp_path, capsys):
    """With FP8 on, half of each domain steers, the other is reported, and a resumed run draws the same batches."""
    for name, word in (("first", "one"), ("second", "two")):
        rng = random.Random(name)
        texts = [" ".join(f"{word}{rng.randrange(40)}" for _ in range(30)) for _ in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    keys = [*FP8, "--mix={'one': 0.5, 'two': 0.5}", "--stages=()", "--seq_len=64", "--auto_mix=True", f"--domains={tmp_path}"]
    keys += ["--domain_source={'first': 'one', 'second': 'two'}", "--eval_every=2", "--save_every=6", "--lr=0.02"]
    train.main(short(shards, tmp_path / "whole", *keys))
    said = capsys.readouterr().out
    assert "auto_mix from step 6: one 0." in said and "val/first/bpb" in said
    shutil.copytree(tmp_path / "whole", tmp_path / "part", symlinks=True)
    train.main(short(shards, tmp_path / "part", *keys, f"--resume={tmp_path}/part/step-000006"))
    states = [json.loads((tmp_path / d / "step-000012" / "state.json").read_text()) for d in ("whole", "part")]
    assert states[0]["auto_mix"] == states[1]["auto_mix"] and states[0]["stream"] == states[1]["stream"]
    assert [first for first, _ in states[0]["auto_mix"]["changes"]] == [6, 8, 10, 12, 12] and states[0]["auto_mix"]["changes"][0][1][
        "one"
    ] != 0.5
    a, b = (load_file(tmp_path / d / "step-000012" / "model.safetensors") for d in ("whole", "part"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_evaluation_says_what_it_saw(shards, tmp_path, capsys):
    """Domains at every second evaluation only, a second pass at the stage's length, spread and surprise, the share of clipped steps."""
    folder = tmp_path / "domains"
    folder.mkdir()
    for name in ("one", "both"):
        texts = [" ".join(f"one{i * j % 40}" for i in range(30)) for j in range(1, 9)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    stages = ({"start": 0, "seq_len": 64, "clip": 1e-6}, {"start": 3, "seq_len": 16, "clip": 0.0})
    keys = [f"--stages={stages}", f"--domains={folder}", "--domains_every=2", "--eval_stage=True", "--eval_every=2", "--max_steps=6"]
    keys += ["--ffn=polyglu", "--best_metric=val/mean/bpb", "--save_every=2"]
    train.main(short(shards, tmp_path / "out", *keys))
    said = capsys.readouterr().out
    rows = {}
    for row in rows_of(tmp_path / "out"):
        rows.setdefault(row["step"], {}).update(row)
    assert [("val/both/bpb" in rows[s], "val/mean/bpb" in rows[s]) for s in (2, 4, 6)] == [(False,) * 2, (True,) * 2, (True,) * 2]
    assert "val/sd/bpb" in rows[4] and not any(key.startswith(("val/sd", "surprise")) for key in rows[2])  # not of other sets each time
    state = [json.loads((tmp_path / "out" / f"step-{step:06d}" / "state.json").read_text()) for step in (2, 4)]
    assert [(s["stage"], s["precision"]) for s in state] == [(0, "bf16 requested, fp32 used"), (1, "bf16 requested, fp32 used")]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["precision"] == "bf16 requested, fp32 used"
    assert f"step 3: stage 1: L 16, 8 rows x 2 = 256 tokens, lr {rows[4]['train/lr']:.2e}, clip 0\n" in said
    assert [rows[s][f"train/{k}"] for s in (1, 4) for k in ("step_tokens", "accum", "clip")] == [256, 2, 1e-6, 256, 2, 0.0]
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert [h["metric"] is not None for h in history] == [False, True, True]  # without domains there is no mean to be the best by
    values = [rows[6][f"val/{name}/bpb"] for name in ("one", "two", "both")]
    mean = sum(values) / 3
    assert rows[6]["val/sd/bpb"] == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    assert rows[6]["surprise_bpb/both"] == pytest.approx(values[2] / mean) and "surprise_ppl/both" in rows[6]
    assert [rows[s]["train/clipped"] for s in range(1, 7)] == [1, 1, 1, 0, 0, 0]
    model, _ = checkpoint.load(tmp_path / "out" / "step-000006")
    for key, length in (("val/both/loss", 64), ("val_L/both/loss", 16)):  # scored here by eval.perplexity, not by the loop
        length = min(2048, model.cfg.max_len) if length == 64 else 16
        batches = domain_batches(folder, tokenizer.load(shards["one"]), length)["both"]
        nats, tokens = score(model, batches, torch.device("cpu"))[0].sum(0)[:2].tolist()
        assert rows[6][key] == pytest.approx(nats / tokens, rel=1e-5), key
    assert rows[6]["val_L/both/loss"] != rows[6]["val/both/loss"]
    assert all(0 < rows[s]["alpha_grad/layer_0"] < math.inf for s in range(1, 7)) and "CPU, 1 threads, " in said


def test_overlapping_windows_score_every_token_once_and_with_more_before_it(shards, tmp_path):
    tok, texts = tokenizer.load(shards["one"]), ["x" * 5, "abcdefghij" * 3 + "k", "y" * 16, "z" * 17]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    for length, stride in ((8, 1.0), (8, 0.5), (8, 0.25), (16, 0.5)):
        (batch,) = domain_batches(tmp_path, tok, length, stride=stride)["a"]
        kept = batch["targets"] >= 0
        document = batch["document"].repeat_interleave(batch["cu"].diff().long())
        assert [tok.decode(batch["targets"][kept & (document == i)].tolist()) for i in range(4)] == texts
        first = torch.tensor([int(batch["pos"][lo:hi][kept[lo:hi]][0]) for lo, hi in itertools.pairwise(batch["cu"].tolist())])
        assert set(first.tolist()) == (
            {0} if stride == 1 else {0, length - int(length * stride)}
        )  # what stands before the first scored one
        assert batch["bytes"] == sum(map(len, texts))


def test_the_shape_is_asserted_at_the_start(shards, tmp_path, capsys):
    argv, model = short(shards, tmp_path / "out"), build(load(*short(shards, tmp_path / "out")), "meta")
    with pytest.raises(SystemExit):
        train.main([*argv, "--parameters=12345"])
    assert f"--parameters={model.num_params()}" in capsys.readouterr().err and not (tmp_path / "out" / "metrics.jsonl").exists()
    for name, count in (("superbpe_197m", 196_398_464), ("superbpe_270m", 293_684_736), ("polyglu_h200", 597_153_888)):
        cfg = load(*[BASE] * (name == "superbpe_270m"), f"config/{name}.py")
        assert cfg.parameters == build(cfg, "meta").num_params() == count
    text, size = (tell(build(load(BASE), "meta")) for tell in (monitor.breakdown, monitor.footprint))
    assert size.startswith("3.14 GB of weights") and size.endswith("a checkpoint 2.36 GB")  # 16 and 12 bytes a parameter
    assert text.startswith("196,398,464 parameters = embed 25,600,640 + embed.proj 98,304 + norms 43,776 + attn.qkv 22,020,096")
    assert sum(int(part.split()[-1].replace(",", "")) for part in text.split(" = ")[1].split(" + ")) == 196_398_464


def test_auto_mix_mistakes(shards, tmp_path, dies):
    (tmp_path / "c4.jsonl").write_text('{"text": "a"}')
    good = ["--mix={'one': 1.0}", f"--domains={tmp_path}", "--domain_source={'c4': 'one'}"]
    for keys, word in (
        ([], "domain_source"),
        ([*good[:2], "--domain_source={'c4': 'three'}"], "three is no source of mix"),
        ([*good[:2], "--domain_source={'c4': 'one', 'c5': 'one'}"], "c5 is none of the domains"),  # before the first step
        ([*good, "--mix_end={'two': 1.0}"], "drop mix_end"),
        ([*good, "--stages=({'start': 0, 'mix': {'two': 1.0}},)"], "drop mix_end and the stages' mix"),
    ):
        dies(lambda: train.main(short(shards, tmp_path / "out", "--stages=()", "--auto_mix=True", "--eval_every=1", *keys)), word)


def test_benchmark_prints_a_table_and_leaves_nothing(shards, tmp_path, capsys):
    train.main(short(shards, tmp_path / "out", "--benchmark=4"))
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "tok/s" in line and "h per 1B" in line)
    row = dict(zip(lines[at].replace("h per 1B", "hours").split(), lines[at + 1].split(), strict=True))
    assert row["L"] == "64" and row["tokens"] == "256" and row["MFU"] == "unknown" and float(row["ms"]) > 0
    rate = float(row["tok/s"].replace(",", ""))
    assert rate == pytest.approx(256 / float(row["ms"]) * 1e3, rel=0.03) and not (tmp_path / "out").exists()
    assert "precision: bf16 requested, fp32 used" in "\n".join(lines)
    found = {name: monitor.bytes_per_token({name: path}, {}) for name, path in shards.items()}
    mixed = monitor.bytes_per_token(shards, {"one": 0.25, "two": 0.75})
    assert mixed == pytest.approx(0.25 * found["one"] + 0.75 * found["two"]) and monitor.bytes_per_token({"qa": "rows.jsonl"}, {}) is None
    byte, two = float(row["bytes/s"].replace(",", "")), data.read_manifest(Path(shards["two"]))["shards"]
    (train_part,) = [s["bytes"] / s["tokens"] for s in two if s["split"] == "train"]
    assert found["two"] == train_part and byte / rate == pytest.approx(
        train_part, rel=1e-4
    )  # the last stage reads `two` alone, and not its held-out text


def test_a_refused_benchmark_leaves_nothing_either(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for more in (["--parameters=1"], ["--max_steps=5", "--stages=()"]):
        with pytest.raises(SystemExit):
            train.main(short(shards, tmp_path / "out", "--benchmark=1", *more))
        gc.collect()
        assert capsys.readouterr().err and not list(tmp_path.glob("benchmark-*"))


def test_speed_table_keeps_what_ran_and_says_what_did_not(shards, tmp_path, capsys, dies):
    """Two stages by two precisions, each in a process of its own; TransformerEngine is not here, so the exit code says 1."""
    settings = [
        a for a in short(shards, tmp_path / "run", "--fp8_emulate=True") if not a.startswith(("--log_every", "--eval_", "--keep", "--out"))
    ]
    argv = [*settings, "--steps=2", "--precisions=bf16,te", "--lengths=64", f"--out={tmp_path}/speed.json"]
    assert speed.main(argv) == 1
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(r["precision"], r["L"], "failed" in r) for r in rows] == [(p, n, p == "te") for n in ("64",) for p in ("bf16", "te")]
    assert "transformer_engine is not installed" in rows[1]["failed"] and float(rows[0]["ms"]) > 0 and rows[0]["tokens"] == "256"
    assert "failed: precision: te requested" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert speed.here("cpu") == ["bf16"]
    dies(lambda: speed.main([*settings, "--lengths=17"]), "17 is no stage")
    dies(lambda: speed.main([*settings, "--precisions=fp32"]), "fp32 is none of bf16, fp8, te")
    bare = [a for a in settings if not a.startswith("--data")]  # said once, not for every stage
    dies(lambda: speed.main([*bare, "--precisions=bf16", f"--data={tmp_path}"]), "no directory of shards")


def test_speed_measures_stages_of_one_length_that_differ():
    found = [arg for _, arg in speed.stages(load(BASE, "config/curriculum_nine.py"), [2048])]
    assert [rows in arg for rows, arg in zip(("'rows': 16", "'rows': 18", "'rows': 20"), found, strict=True)] == [True] * 3
    assert len(speed.stages(load(BASE, "config/curriculum_eight.py"), [])) == 7  # two of the eight are the same step


# ---- the ablation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_corpora(tmp_path):
    """One text under two tokenizers: 3 bytes per token, and 4."""
    made = {"domains": ""}
    for name, per_token in (("plain", 3), ("super", 4)):
        folder = write_shards(tmp_path / name, make_docs(1200), vocab=2051)
        manifest = json.loads((folder / "manifest.json").read_text())
        for shard in manifest["shards"]:
            shard["bytes"] = per_token * shard["tokens"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        made[name] = {"web": str(folder)}
    return made


@pytest.mark.parametrize("size, factors", [("cpu", "TFC"), ("gpu", "TFCKM")])
def test_arms_of_the_ablation_see_the_same_bytes(two_corpora, size, factors):
    total, seen = (0.4e6, {}) if size == "cpu" else (3.5e9, {})
    for arm in ("", *factors, factors):
        cfg = load(*ablation.arguments(arm, size, two_corpora, total, 1.0))
        needs.idle(cfg, ablation.arguments(arm, size, two_corpora, total, 1.0))  # stops at a setting that would do nothing
        plan = optim.Plan(cfg, 1)
        per_token = 4 if "T" in arm else 3
        seen[arm] = (plan.steps, plan.total * per_token)
        assert cfg.precision == ("fp8" if "F" in arm else "bf16") and (len(plan.stages) > 1) == ("C" in arm)
        if size == "gpu":
            assert cfg.compile == ("K" in arm) and plan.stages[0].micro_tokens == (cfg.tokens_per_step if "M" in arm else 6144)
        assert plan.total * per_token == pytest.approx(total, rel=0.02)
    assert len({steps for steps, _ in seen.values()}) == 1, seen


def test_account_of_the_ablation():
    """A factor that halves the time to the target without moving the end, one that does nothing."""

    def runs(speed, end):
        rates = {"tokens_per_sec": 1.0, "bytes_per_sec": 3.0}
        ends = (end - 0.01, end, end + 0.01)
        return [rates | {"final": {"web": e, "mean": e}, "curve": [[10 / speed, 4.0], [20 / speed, e]]} for e in ends]

    assert ablation.time_to([[1, 4.0], [3, 2.0]], 3.0) == 2 and ablation.time_to([[1, 4.0]], 3.0) == math.inf
    assert ablation.effect([1.0, 1.02, 1.01], [1.2, 1.21, 1.23])[:2] == pytest.approx((-0.2033, 4.303 * 0.01528 / 3**0.5), rel=1e-3)
    assert ablation.effect([1.0, 1.01], [1.2, 1.21])[2] == "better" and ablation.effect([1.2, 1.3], [1.25, 1.3])[2] == "no effect"
    assert ablation.effect([1.0], [1.2])[2] == "one run: no verdict"
    results = {"": runs(1, 2.0), "T": runs(2, 1.5), "F": runs(1, 2.0), "TF": runs(2, 1.5)}
    text = "\n".join(ablation.account(results, "TF"))
    assert "T: alone -0.5000 +- 0.0000 bits/byte: better" in text and "F: alone +0.0000 +- 0.0000 bits/byte: no effect" in text
    assert "   web: -0.5000 +- 0.0000: better" in text
    assert "claimed 3.2x for these" in text and "together measured 2." in text


def test_an_arm_of_the_ablation_runs_and_is_not_run_twice(corpus, tmp_path):
    made = {"domains": "", "plain": {"web": corpus}, "super": {"web": corpus}}
    first = ablation.run("F", "cpu", made, 1.5e4, 1.0, 1, tmp_path)
    assert first["curve"] and first["precision"].endswith("fp8 used") and first["final"].keys() == {"web", "mean"}
    assert first["bytes"] == pytest.approx(1.5e4, rel=0.2) and ablation.run("F", "cpu", made, 1.5e4, 1.0, 1, tmp_path) == first


def test_an_ablation_keeps_to_its_settings_and_its_arms(corpus, tmp_path, monkeypatch, dies):
    """Runs and tokenizers of other text, or of another size, are not taken for those that were asked for."""
    ran = []
    monkeypatch.setattr(ablation, "run", lambda arm, *a: ran.append(arm) or {"final": {"mean": 1.0}, "precision": "bf16"})
    out, texts = f"--out={tmp_path}/out", tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text('{"text": "one"}\n')
    monkeypatch.setattr(ablation, "prepare", lambda out, *a: (tmp_path / "out" / "plain").mkdir(parents=True, exist_ok=True) or {})
    ablation.main([out, f"--texts={texts}", "--only=none,T", "--seeds=1"])
    assert ran == ["", "T"]
    (texts / "a.jsonl").write_text('{"text": "two"}\n')
    for argv, said in (
        ([f"--texts={texts}"], "was made with texts="),
        (["--vocab=999"], "was made with texts="),
        ([f"--texts={texts}", "--data={'plain': {'a': 'x'}}"], "would do nothing beside --data"),
        (["--only=TX"], "TX is no arm; there are none,T,F,C,FC,TC,TF,TFC"),
    ):
        dies(lambda: ablation.main([out, *argv]), said)
