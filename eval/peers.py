"""Both sides of the races in bench.py and eval/gpu.py: a step of ours, and the same shapes in transformers, trained as its users train
them; and the race itself: sides interleaved, medians, quartiles, and what failed named beside what did not.

Qwen3ForCausalLM for decoders, T5Gemma2 for encoder-decoders (merged attention as ours, batches padded), with the fused AdamW,
clipping and dtypes that prism has: fp32 masters, and bf16 matmuls under torch.autocast. Read next: bench.py, eval/gpu.py.
"""

import contextlib
import functools
import gc
import io
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import checkpoint
import configurator
import fp8
import machine
import monitor
import optim
from configurator import die
from denoise_stream import collate
from model import ModelConfig, Transformer, build, compile_blocks, rectangle
from train import Config

# ---- the race -----------------------------------------------------------------------------------------------------------


def race(sides, opt, where, warm=2, repeat=1):
    """{name: callable} -> {name: seconds per call}, `repeat` calls of each in turn, so that a noisy minute hits all alike."""
    clock, seconds = time.process_time if opt.clock == "cpu" else time.perf_counter, {name: [] for name in sides}
    for n in range(warm + opt.rounds):
        for name, call in sides.items():
            start = clock()
            for _ in range(repeat):
                call()
            machine.wait(where.device)
            if n >= warm:
                seconds[name].append((clock() - start) / repeat)
    return seconds


@functools.cache
def ceilings(where, clock):
    """(FLOP/s of a large product, bytes/s of reading a large matrix once, on a GPU of copying 4 GB): what is there to be had."""
    cuda = where.device.type == "cuda"
    a = torch.randn((8192 if cuda else 2048,) * 2, device=where.device, dtype=where.dtype)
    big = torch.randn((32768, 32768) if cuda else (8192, 4096), device=where.device)
    to = torch.empty_like(big) if cuda else None
    move = (lambda: to.copy_(big)) if cuda else (lambda: big.sum(1))  # a CPU's product with one column reads at half of this rate
    seconds = race({"mm": lambda: a @ a, "move": move}, SimpleNamespace(rounds=10, clock=clock), where)
    return 2 * len(a) ** 3 / min(seconds["mm"]), big.nbytes * (1 + cuda) / min(seconds["move"])


def middle(values):
    """Median and quartiles."""
    low, high = (min(values), max(values)) if len(values) < 4 else statistics.quantiles(values, n=4)[::2]
    return statistics.median(values), low, high


def warm_sides(makers, where):
    """{name: () -> callable} -> ({name: callable}, {name: GiB at the peak of a call, above what stood before}, {name: its error}).
    Each is made and called until it is warm; one that fails, out of memory or not installed, is named and leaves the race."""
    cuda, calls, peaks, failed = where.device.type == "cuda", {}, {}, {}
    if cuda:
        gc.collect()  # a compiled module holds on to itself
    for name, make in makers.items():
        before, said = torch.cuda.memory_allocated() if cuda else 0, io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                call = make()
            for _ in range(3):
                call()
                machine.wait(where.device)
                if cuda:
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
                    torch.cuda.reset_peak_memory_stats()
            calls[name] = call
        except (Exception, SystemExit) as error:  # told in the row, and by bench.py in its exit code when it is ours
            text = str(error) if isinstance(error, Exception) else said.getvalue()
            failed[name] = f"{type(error).__name__}: {' '.join(text.split())[:300]}"
        call = None
        if name in failed:
            peaks.pop(name, None)
            if cuda:
                gc.collect()
                torch.cuda.empty_cache()
    return calls, peaks, failed


def compare(name, what, makers, opt, where, amount=0, unit="tokens/s", flops=0, nbytes=0, against="", repeat=1):
    """A row of any number of sides, ours first, from {name: () -> callable}. amount, flops, nbytes of one call: a number, or one per side.
    ratio: how often ours is done while `against` (else the fastest of the others) is done once, median and quartiles over the rounds."""
    of = lambda value, side: value.get(side, 0) if isinstance(value, dict) else value  # noqa: E731
    calls, peaks, failed = warm_sides(makers, where)
    seconds, sides, first = race(calls, opt, where, warm=0, repeat=repeat), {}, next(iter(makers))
    print(f"{name}: {what}", flush=True)
    for side, times in seconds.items():
        t, low, high = middle(times)
        row = {"ms": 1e3 * t, "low": 1e3 * low, "high": 1e3 * high}
        row |= {unit: of(amount, side) / t} if amount else {}
        row |= {"TFLOP/s": of(flops, side) / t / 1e12} if of(flops, side) else {}
        row |= {"MFU": of(flops, side) / t / where.peak} if of(flops, side) and where.peak else {}
        row |= {"GB/s": of(nbytes, side) / t / 1e9} if of(nbytes, side) else {}
        row |= {"peak GiB": peaks[side]} if side in peaks else {}
        row |= {"speed": middle(seconds[first])[0] / t} if first in seconds else {}
        sides[side] = row
        figures = ", ".join(f"{key} {v:.1%}" if key == "MFU" else f"{key} {v:,.4g}" for key, v in row.items() if key not in ("low", "high"))
        print(f"  {side:<24} {figures} ({row['low']:,.4g} to {row['high']:,.4g})", flush=True)
    for side, error in failed.items():
        print(f"  {side:<24} not measured: {error}", flush=True)
    out = {"name": name, "what": what, "unit": unit, "rounds": opt.rounds, "sides": sides}
    out |= {"missing": {k: v for k, v in failed.items() if k != first}} | ({"failed": failed[first]} if first in failed else {})
    others = [side for side in seconds if side != first and against in ("", side)]
    if first in seconds and others:
        out["against"] = min(others, key=lambda side: sides[side]["ms"])
        ratios = [b / a for a, b in zip(seconds[first], seconds[out["against"]], strict=True)]
        out |= dict(zip(("ratio", "low", "high"), middle(ratios), strict=True))
    return out


def one_line(row):
    """Of `compare`, for the end of a long log."""
    best = lambda one: f"{one['ms']:,.4g} ms" + (f", MFU {one['MFU']:.1%}" if "MFU" in one else "")  # noqa: E731
    sides = "; ".join(f"{side} {best(one)}" for side, one in row["sides"].items())
    ratio = f" | {row['ratio']:.3f} of {row['against']} ({row['low']:.3f} to {row['high']:.3f})" if "ratio" in row else ""
    return f"{row['name']:<20} {sides}{ratio}"


# ---- the sides ----------------------------------------------------------------------------------------------------------


def fresh(cfg, where):
    """A model with random weights drawn where it will run: `build`, which is the same on every machine, takes seconds for a billion."""
    torch.manual_seed(cfg.seed)
    with where.device, torch.no_grad():
        model = Transformer(cfg)
        for name, p in model.named_parameters():
            if name.endswith("weight") and p.ndim > 1:
                p.normal_(0.0, cfg.init_std)
    return model.set_dtype(where.dtype)


def same_shape(keys):
    cfg = ModelConfig(**{k: v for k, v in keys.items() if k in ModelConfig.__dataclass_fields__})
    return {
        "vocab_size": cfg.vocab_size, "num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.n_head, "head_dim": cfg.width_head,
        "num_key_value_heads": cfg.kv_heads, "hidden_size": cfg.d_model, "intermediate_size": cfg.width_ff,
    }  # fmt: skip


def qwen3(keys, where):
    """The peer: the same architecture in transformers, fp32 masters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**same_shape(keys), tie_word_embeddings=True, max_position_embeddings=4096, attn_implementation="sdpa")
    torch.manual_seed(1)
    with where.device:
        return Qwen3ForCausalLM(config)


def t5gemma2(keys, where):
    """The peer of an encoder-decoder, merged attention included; its vision tower is as small as it can be and never used."""
    import transformers as hf

    drop, shape = {"attention_dropout": 0.0, "dropout_rate": 0.0}, same_shape(keys)
    stack = shape | drop | {"query_pre_attn_scalar": shape["head_dim"], "hidden_activation": "silu"}
    stack |= {"layer_types": ["full_attention"] * shape["num_hidden_layers"]}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = hf.SiglipVisionConfig(**sizes, image_size=16, patch_size=16)
    image = {f"{name}_token_index": shape["vocab_size"] - 1 for name in ("image", "boi", "eoi")}
    text = hf.T5Gemma2TextConfig(**stack)
    encoder = hf.T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=1, **image, **drop)
    torch.manual_seed(1)
    decoder = hf.T5Gemma2DecoderConfig(**stack)
    config = hf.T5Gemma2Config(encoder=encoder, decoder=decoder, **drop, attn_implementation="sdpa")
    with where.device:
        return hf.T5Gemma2ForConditionalGeneration(config)


def step_of(loss, params, optimizer, after=lambda: None):
    """What both sides do with a loss."""

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        after()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(model, inputs, where, compiled=False):
    """A training step as a user of transformers writes it: model(input_ids, labels).loss under autocast."""
    params, call = list(model.train().parameters()), torch.compile(model) if compiled else model
    groups = [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs = {k: t.to(where.device) for k, t in inputs.items()}

    def loss():
        with torch.autocast(where.device.type, torch.bfloat16, enabled=where.dtype == torch.bfloat16):
            return call(**inputs, use_cache=False).loss

    return step_of(loss, params, optimizer)


def optimizer_of(raw, cfg):
    with contextlib.redirect_stdout(io.StringIO()):  # its table of parameters
        return optim.build_optimizer(raw, cfg)


def our_step(keys, batch, where, compiled=False):
    """The body of train.py's loop for one micro-batch, in the precision of `keys`; `.model` is the model, `.flops` those of a step."""
    cfg = Config(**{"max_len": 4096, "max_steps": 1, "lr": 1e-4} | keys)
    raw = fresh(cfg, where).train()
    if compiled and "dec_ids" not in batch:  # as data.py lays it out for compiled runs: one shape, however many documents
        ends = torch.full((len(batch["ids"]) + 1 - len(batch["cu"]),), len(batch["ids"]), dtype=torch.int32)
        batch = batch | {"docs": len(batch["cu"]) - 1, "cu": torch.cat((batch["cu"], ends))}
    fp8.apply(raw, cfg, where.device, [(batch["max_len"], len(batch["ids"]))])
    model = compile_blocks(raw) if compiled else raw
    optimizer = optimizer_of(raw, cfg)
    work = monitor.flops(raw, {"tokens": len(batch["ids"])} | batch)
    batch = {k: t.to(where.device) if isinstance(t, torch.Tensor) else t for k, t in batch.items()}
    count = int((batch["targets"] != -100).sum())

    def loss():
        with fp8.scope(raw):
            return raw.nll(model(batch), batch["targets"])[0] / count

    step = step_of(loss, list(raw.parameters()), optimizer, partial(fp8.refresh, raw))
    step.model, step.flops = raw, work
    return step


def rows_of_text(keys, rows, length):
    """The same random rows for both sides."""
    ids = torch.randint(keys["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))
    return rectangle(ids) | {"targets": ids.flatten().roll(-1)}, {"input_ids": ids, "labels": ids}


def ragged_pairs(keys, count, sizes=()):
    """Examples of an encoder-decoder, of these (encoder, decoder) sizes, else 16 to 256 and 8 to 96 tokens: packed for us, padded to the
    longest for the peer."""
    rng = np.random.default_rng(1)
    sizes = sizes or list(zip(rng.integers(16, 257, count), rng.integers(8, 97, count), strict=True))
    enc, dec = ([rng.integers(keys["vocab_size"] - 1, size=n) for n in side] for side in zip(*sizes, strict=True))
    pad = lambda some, fill: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in some], True, fill)  # noqa: E731
    peer = {"input_ids": pad(enc, 0), "attention_mask": pad([x * 0 + 1 for x in enc], 0), "labels": pad(dec, -100)}
    return collate([(e, d, d, 0) for e, d in zip(enc, dec, strict=True)]), peer


def encoder_folder(keys, folder, tokens):
    """A random encoder that reads with the tokenizer of the shards `tokens`, as sentence-transformers loads it."""
    from prepare import sentence

    run, out = Path(folder, "run"), Path(folder, "encoder")
    cfg = Config(**keys, arch="encoder")
    checkpoint.save(run, 0, build(cfg), None, {"config": configurator.to_dict(cfg), "metrics": {}}, keep=1)
    shutil.copytree(Path(tokens, "tokenizer"), run / "tokenizer")
    sentence.main([f"--ckpt={run}", "--to=sentence-transformers", f"--out={out}"])
    return str(out)


# ---- whole processes --------------------------------------------------------------------------------------------------

# Linux carries the peak of a parent over fork and exec into its child: a small process in between measures, not this big one
RELAY = """import resource, subprocess, sys, time
start = time.perf_counter()
child = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(child.returncode)"""


def child_cost(argv):
    """Wall seconds and peak memory in bytes of a Python process."""
    done = subprocess.run([sys.executable, "-c", RELAY, *argv], capture_output=True, text=True)
    if done.returncode:
        die(f"bench: {' '.join(argv)[:80]} failed: {done.stderr[-300:]}")
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak) * (1 if sys.platform == "darwin" else 1024)


def in_turn(runs, rounds, out):
    """{name: argv} -> {name: wall seconds}, one process of each after the other; each finds no folder `out`."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, argv in runs.items():
            shutil.rmtree(out, ignore_errors=True)
            seconds[name].append(child_cost(argv)[0])
    return seconds
