"""Training steps on a GPU, for bench.py: by model, window and precision, against peers; and where a step's time goes.

    python bench.py --suite=gpu --out=gpu.json      every row, the weightiest first; --suite=tiny: the same code in seconds, on any machine
    python bench.py --suite=gpu --only=polyglu,small
    python bench.py --profile                       the kernels of a step by class, and the largest by name

A row is a race (eval/peers.py): sides interleaved, each built and warm before the clock runs; a peer that is not installed or does not
fit is named. FLOPs are the model's own, `flops_per_token`: causal attention at half, no recomputation, the look-up not at all; MFU is of
the data sheet's dense bf16 rate. Read next: eval/peers.py for the sides, eval/operators.py for what a step is made of.
"""

import json
import re
import tempfile
from collections import defaultdict
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

import configurator
import denoise
import machine
from config import fp8_table
from eval.peers import compare, our_step, peer_step, qwen3, ragged_pairs, rows_of_text, t5gemma2, warm_sides
from model import ModelConfig
from train import Config

# a config file or Config keys, then sizes
TINY = {"vocab_size": 300, "n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 64, "max_len": 64}
WIDE = {"vocab_size": 200_005, "embed_rank": 128, "head_dim": 64}
SHAPES = {
    "gpu": {
        "polyglu": ("config/polyglu_h200.py", ((16, 4096), (32, 2048))),  # rows x tokens of a micro-batch
        "small": ({"vocab_size": 50_304, "n_layer": 12, "n_head": 12, "d_model": 768, "d_ff": 2048}, 64, 1024),  # 124M, as GPT-2
        "curriculum": ("config/superbpe_197m.py", 98_304, (2048, 512, 128, 8)),
        "profile": (("config/polyglu_h200.py", 16, 4096), ("config/superbpe_197m.py", 48, 2048)),
        "fp8": (
            (WIDE | {"n_layer": 8, "n_head": 24, "n_kv_head": 4, "d_model": 1536, "d_ff": 4096}, 48, 2048),
            ("config/superbpe_197m.py", 48, 2048),
            (WIDE | {"n_layer": 6, "n_head": 32, "n_kv_head": 8, "d_model": 2048, "d_ff": 5376}, 48, 2048),
        ),
        "encdec": ("config/encdec_ul2.py", 16_384),
    },
    "tiny": {
        "polyglu": (TINY, ((2, 32), (4, 16))),
        "small": (TINY, 2, 16),
        "curriculum": (TINY, 64, (32, 8)),
        "profile": ((TINY | {"ffn": "polyglu"}, 2, 16), (TINY, 2, 16)),
        "fp8": ((TINY | {"n_kv_head": 2}, 2, 32),),
        "encdec": (TINY | {"arch": "encdec", "max_len": 1024}, 2048),
    },
}


def keys_of(shape):
    """Config keys; of a config file, those of its model."""
    if not isinstance(shape, str):
        return shape
    cfg = configurator.load(Config, [str(Path(__file__).parent.parent / shape)])[0]
    return {f.name: getattr(cfg, f.name) for f in fields(ModelConfig)}


def text(keys, rows, length):
    return f"{keys['n_layer']} x {keys['d_model']}, vocabulary {keys['vocab_size']:,}, {rows} x {length} tokens"


def race_steps(name, what, makers, opt, where, **more):
    """compare, for training steps that know their own FLOPs; a peer of the same shape does as many."""
    work = {}

    def made(side, make):
        step = make()
        work[side] = getattr(step, "flops", next(iter(work.values()), 0))
        return step

    return compare(name, what, {side: partial(made, side, make) for side, make in makers.items()}, opt, where, flops=work, **more)


# ---- training steps -----------------------------------------------------------------------------------------------------


def polyglu(opt, where):
    """Against the same model with SwiGLU; the routing's temperature only matters to the kernel's two softmax paths."""
    shape, sizes = SHAPES[opt.suite]["polyglu"]
    for n, (rows, length) in enumerate(sizes):
        keys = keys_of(shape)
        batch = rows_of_text(keys, rows, length)[0]

        def side(ffn, tau=1.0, keys=keys, batch=batch):
            step = our_step(keys | {"ffn": ffn}, batch, where, opt.compile)
            step.model.tau.fill_(tau)
            return step

        makers = {"polyglu": partial(side, "polyglu"), "swiglu": partial(side, "swiglu")}
        makers |= {"polyglu, tau 0.1": partial(side, "polyglu", 0.1)} if n == 0 else {}
        what = f"training step, {text(keys, rows, length)}; target: at most 1.03 of swiglu's time and 1.02 of its memory, 50 % MFU"
        row = race_steps(f"polyglu{length}", what, makers, opt, where, amount=rows * length, against="swiglu")
        if {"polyglu", "swiglu"} <= set(row["sides"]):
            theirs = row["sides"]["swiglu"]
            for one in row["sides"].values():
                one["of swiglu"] = {key: one[key] / theirs[key] for key in ("ms", "peak GiB") if key in one}
            shares = (f"{name} {' '.join(f'{k} {v:.3f}' for k, v in one['of swiglu'].items())}" for name, one in row["sides"].items())
            print(f"  over swiglu: {'; '.join(shares)}", flush=True)
        yield row


def small(opt, where):
    keys, rows, length = SHAPES[opt.suite]["small"]
    batch, inputs = rows_of_text(keys, rows, length)
    peer = lambda compiled: peer_step(qwen3(keys, where), inputs, where, compiled)  # noqa: E731
    makers = {"prism": partial(our_step, keys, batch, where, opt.compile), "transformers": partial(peer, False)}
    makers |= {"transformers, compiled": partial(peer, True)} if opt.compile else {}
    what = f"training step, {text(keys, rows, length)}; published, 124M on 8 x H100: llm.c 40.6 % MFU; nanoGPT about 33 %"
    yield race_steps("small", what, makers, opt, where, amount=rows * length)


def curriculum(opt, where):
    """The same tokens in shorter and shorter windows; `speed` is that of the longest, and is to stay above 0.9."""
    shape, tokens, windows = SHAPES[opt.suite]["curriculum"]
    keys = keys_of(shape)
    batches = {f"L={n}": rows_of_text(keys, tokens // n, n)[0] for n in windows}
    makers = {side: partial(our_step, keys, batch, where, opt.compile) for side, batch in batches.items()}
    what = f"training step, {text(keys, 'N', 'L')}, {tokens:,} in all; target: 45 % MFU at 2048, every window >= 0.9 of its tokens/s"
    yield race_steps("curriculum", what, makers, opt, where, amount=tokens)


def fp8(opt, where):
    """bf16 first, so that `speed` is what a precision gains."""
    forms = {"fp8 static": ("fp8", "static"), "fp8 all": ("fp8", "all"), "te all": ("te", "all")}
    if where.device.type == "cuda" and fp8_table.DEVICE == torch.cuda.get_device_name():
        forms = {"fp8 table": ("fp8", "table")} | forms
    for shape, rows, length in SHAPES[opt.suite]["fp8"]:
        keys, makers = keys_of(shape), {}
        batch = rows_of_text(keys, rows, length)[0]
        for side, (precision, wanted) in ({"bf16": ("bf16", "table")} | forms).items():
            more = {"precision": precision, "fp8_filter": wanted, "precision_required": precision != "bf16"}
            more |= {"fp8_emulate": True} if precision == "fp8" and where.device.type == "cpu" else {}
            makers[side] = partial(our_step, keys | more, batch, where, opt.compile)
        what = f"training step, {text(keys, rows, length)}; target: never slower than bf16, 1.2x from 1,536 wide on"
        yield race_steps(f"fp8_{keys['d_model']}", what, makers, opt, where, amount=rows * length)


def ul2_sizes(tokens, cfg):
    """(encoder, decoder) sizes of examples of the recommended mixture, cut from long documents, that fill `tokens`."""
    rng, sizes = np.random.default_rng(1), []
    mix = denoise.mixture(cfg.mixture, cfg.mixture_end, cfg.mode_tokens)
    while True:
        d = mix.denoisers[rng.choice(len(mix.denoisers), p=mix.first)]
        share = rng.uniform(*d.r)
        length = denoise.longest(d, share, cfg.max_enc, cfg.max_dec, cfg.n_sentinels, cfg.closing_sentinel)
        counts = denoise.counts(d, share, length, cfg.n_sentinels - cfg.closing_sentinel)
        sizes.append(denoise.sides(length, *counts, d.mode is not None, cfg.closing_sentinel))
        if sum(map(sum, sizes)) > tokens:
            return sizes[:-1]


def encdec(opt, where):
    """The rate counts real tokens. `padded` is the same model on the layout of those who pad: every example as long as the longest."""
    shape, tokens = SHAPES[opt.suite]["encdec"]
    keys = keys_of(shape)
    sizes = ul2_sizes(tokens, Config(**keys, max_enc=512, max_dec=256))
    longest = tuple(max(side) for side in zip(*sizes, strict=True))
    (batch, inputs), (padded, _) = (ragged_pairs(keys, len(some), some) for some in (sizes, [longest] * len(sizes)))
    makers = {"prism": partial(our_step, keys, batch, where, opt.compile), "padded": partial(our_step, keys, padded, where, opt.compile)}
    makers["T5Gemma2, padded"] = lambda: peer_step(t5gemma2(keys, where), inputs, where)
    real = sum(map(sum, sizes))
    what = f"UL2 step, 2 x {keys['n_layer']} x {keys['d_model']}, {len(sizes)} examples, {real} of {len(sizes) * sum(longest)} tokens real"
    yield race_steps("encdec", f"{what}; target: 1.3 times the padded layout", makers, opt, where, amount=real, against="padded")


# ---- where the time goes ------------------------------------------------------------------------------------------------

CLASSES = (  # the first that is found in a kernel's name, lower case
    ("Triton reduction", r"^triton_(red|per)"),
    ("Triton pointwise", r"^triton_poi_(?!fused__to_copy_\d+$)"),
    ("attention backward", r"(flash|fmha|sdpa|attn).*(bwd|bprop|backward)|varlen_backward|flash_attention_backward"),
    ("attention forward", r"(flash|fmha|sdpa|attn).*(fwd|fprop|forward)|varlen|flash_attention"),
    ("head, its products apart", r"^_(dh|dw|row)_kernel|cross_entropy|nll|softmax|aten::(log|exp)"),
    ("polyglu", r"^_(forward|backward)_kernel|polyglu"),
    ("GEMM", r"gemm|^triton_tem|nvjet|cutlass|cublas|xmma|splitk|gemv|aten::(mm|addmm|bmm|matmul|linear|_scaled_mm)"),
    ("optimizer and norm", r"adam|multi_tensor|foreach|lpnorm"),
    ("copy and cast", r"memcpy|memset|copy|fill|catarray|aten::(to|empty|zero)"),
    ("scan and index", r"scan|cumsum|index|gather|scatter|embedding|sort"),
    ("torch reduction", r"reduce"),
    ("torch pointwise", r"elementwise"),
)


def class_of(name):
    return next((kind for kind, found in CLASSES if re.search(found, name.lower())), "other")


def trace_of(step, where, steps):
    """[(name, start, end)] in microseconds of every kernel and copy (on a CPU: of every operator)."""
    cuda = where.device.type == "cuda"
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"} if cuda else {"cpu_op"}
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[activity]) as profiler:
            for _ in range(steps):
                step()
            machine.wait(where.device)
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text("utf-8", "replace"))["traceEvents"]
    return sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in kinds)


def profile(opt, where, steps=2, top=25):
    """ms per step by class and by kernel; idle: the share of the time between the first kernel and the last in which none ran."""
    for shape, rows, length in SHAPES[opt.suite]["profile"]:
        keys = keys_of(shape)
        batch = rows_of_text(keys, rows, length)[0]
        calls, _, failed = warm_sides({"step": partial(our_step, keys, batch, where, opt.compile)}, where)
        if failed:
            yield {"name": "profile", "what": text(keys, rows, length), "failed": failed["step"]}
            continue
        trace_of(calls["step"], where, 1)  # the profiler's own first time
        events = trace_of(calls["step"], where, steps)
        busy, until, names, classes = 0.0, events[0][0], defaultdict(lambda: [0.0, 0]), defaultdict(float)
        for start, end, name in events:
            busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
            names[name][0] += (end - start) / 1e3 / steps
            names[name][1] += 1 / steps
            classes[class_of(name)] += (end - start) / 1e3 / steps
        wall, total = (until - events[0][0]) / 1e3 / steps, sum(classes.values())
        largest = sorted(((ms, n, name) for name, (ms, n) in names.items()), reverse=True)[:top]
        order = dict(sorted(classes.items(), key=lambda item: -item[1]))
        row = {
            "name": f"profile_{keys.get('ffn', 'swiglu')}",
            "what": text(keys, rows, length),
            "wall_ms": wall,
            "idle": 1 - busy / 1e3 / steps / wall,
        }
        row |= {"classes_ms": order, "kernels": [{"name": name, "ms": ms, "calls": n, "class": class_of(name)} for ms, n, name in largest]}
        print(f"{row['name']}: {row['what']}: {wall:.1f} ms a step, idle {row['idle']:.1%}, {len(events) // steps} kernels")
        print("\n".join(f"  {kind:<26} {ms:9.2f} ms {ms / total:6.1%}" for kind, ms in order.items()))
        print("\n".join(f"    {ms:8.3f} ms {n:6.0f} x  {name[:72]}" for ms, n, name in largest), flush=True)
        yield row


ROWS = {"polyglu": polyglu, "small": small, "curriculum": curriculum, "profile": profile, "fp8": fp8, "encdec": encdec}
