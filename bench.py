"""Speed and memory against named peers, as ratios inside one run: both sides interleaved, medians, and the spread of the ratio.

    python bench.py --suite=cpu [--only=train,decode1] [--out=results.json] [--rounds=20] [--clock=cpu]
    python bench.py --suite=gpu                      the same rows at GPU shapes
    python bench.py --info                           the machine and its libraries
    python bench.py --fp8_table                      on a GPU: measure which FP8 products pay, rewrite config/fp8_table.py

Peers are transformers' Qwen3ForCausalLM of the same shape (its own `generate` for decoding) with the same fused AdamW, clipping and
dtype: fp32 masters and bf16 matmuls, which is torch.autocast there. A missing peer stops the bench. `--clock=cpu` counts the
process's CPU seconds instead of the wall's: the figure to use with --threads=1 on a machine that others are using.
Read next: LOG.md for what was measured, model.py and kernels.py for what is being measured.
"""

import prelude  # isort: skip  # noqa: F401

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import configurator
import machine
import optim
import precision
import sample
from configurator import die
from eval import fp8_table
from model import build
from train import Config

# shape of each row: Config keys, rows x tokens of a step; GPU shapes are those of the presets
SHAPES = {
    "cpu": {
        "train": ({"vocab_size": 4096, "n_layer": 6, "n_head": 6, "d_model": 384, "d_ff": 1024}, 8, 256),
        "vocab": ({"vocab_size": 151_936, "n_layer": 2, "n_head": 4, "d_model": 256, "d_ff": 768}, 8, 256),
        "polyglu": ({"vocab_size": 4096, "n_layer": 4, "n_head": 4, "d_model": 256, "d_ff": 1024}, 8, 256),
        "decode": ({"vocab_size": 4096, "n_layer": 6, "n_head": 6, "d_model": 384, "d_ff": 1024}, 64, 128),
    },
    "gpu": {
        "train": ({"vocab_size": 50_304, "n_layer": 12, "n_head": 12, "d_model": 768, "d_ff": 3072}, 16, 2048),
        "vocab": ({"vocab_size": 151_936, "n_layer": 4, "n_head": 16, "d_model": 1024, "d_ff": 3072}, 4, 2048),
        "polyglu": ({"vocab_size": 151_936, "n_layer": 28, "n_head": 16, "n_kv_head": 8, "d_model": 1024, "d_ff": 4096}, 8, 2048),
        "decode": ({"vocab_size": 50_304, "n_layer": 12, "n_head": 12, "d_model": 768, "d_ff": 3072}, 64, 256),
    },
}


# ---- both sides ---------------------------------------------------------------------------------------------------------


def qwen3(keys, where):
    """The peer: the same architecture in transformers, fp32 masters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    names = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "d_model": "hidden_size", "d_ff": "intermediate_size"}
    same = {names.get(k, k): v for k, v in keys.items() if k != "n_kv_head"}
    same |= {"num_key_value_heads": keys.get("n_kv_head", keys["n_head"]), "head_dim": keys["d_model"] // keys["n_head"]}
    config = Qwen3Config(**same, tie_word_embeddings=True, max_position_embeddings=4096, attn_implementation="sdpa")
    torch.manual_seed(1)
    return Qwen3ForCausalLM(config).to(where.device)


def peer_step(keys, rows, length, where):
    """A training step as a user of transformers writes it: model(input_ids, labels).loss under autocast."""
    model = qwen3(keys, where).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decay}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(keys["vocab_size"], (rows, length), device=where.device)
    params = list(model.parameters())

    def step():
        with torch.autocast(where.device.type, torch.bfloat16, enabled=where.dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(keys, rows, length, where, compiled=False):
    """The body of train.py's loop for one micro-batch of whole rows."""
    cfg = Config(**keys, max_len=max(length, 1024), max_steps=1, lr=1e-4)
    raw = build(cfg).set_dtype(where.dtype).to(where.device).train()
    model = torch.compile(raw, dynamic=False) if compiled else raw
    optimizer = optim.build_optimizer(raw, cfg)
    ids = torch.randint(cfg.vocab_size, (rows * length,), device=where.device)
    cu = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=where.device)
    batch = {"ids": ids, "pos": torch.arange(length).repeat(rows).to(where.device), "cu": cu, "max_len": length}
    batch["rows"], targets, params = torch.arange(rows, device=where.device), ids.roll(-1), list(raw.parameters())

    def step():
        loss, _ = raw.nll(model(batch), targets)
        (loss / len(targets)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- measuring ----------------------------------------------------------------------------------------------------------


def race(sides, opt, where, warm=2):
    """{name: callable} -> {name: seconds per call}, one call of each in turn, so that a noisy minute hits all alike."""
    clock, seconds = time.process_time if opt.clock == "cpu" else time.perf_counter, {name: [] for name in sides}
    for n in range(warm + opt.rounds):
        for name, call in sides.items():
            start = clock()
            call()
            if where.device.type == "cuda":
                torch.cuda.synchronize()
            if n >= warm:
                seconds[name].append(clock() - start)
    return seconds


def report(name, what, seconds, unit, amount, higher=True):
    """First side is ours, second the peer. Quartiles of the round-by-round ratio are its spread."""
    (us, ours), (peer, theirs) = seconds.items()
    ratios = sorted(b / a if higher else a / b for a, b in zip(ours, theirs, strict=True))
    low, high = (ratios[0], ratios[-1]) if len(ratios) < 4 else statistics.quantiles(ratios, n=4)[::2]
    a, b = statistics.median(ours), statistics.median(theirs)
    row = {"name": name, "what": what, us: amount / a, peer: amount / b, "unit": unit}
    row |= {"ratio": b / a if higher else a / b, "low": low, "high": high, "rounds": len(ratios)}
    line = (
        f"{us} {amount / a:,.4g} {unit}, {peer} {amount / b:,.4g}: ratio {row['ratio']:.2f} ({low:.2f} to {high:.2f}, {len(ratios)} rounds)"
    )
    print(f"{name:<10} {line}  {what}", flush=True)
    return row


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


# ---- rows ---------------------------------------------------------------------------------------------------------------


def shape_text(keys, rows, length):
    return f"{keys['n_layer']} x {keys['d_model']}, vocabulary {keys['vocab_size']:,}, {rows} x {length} tokens"


def train(opt, where, shape="train"):
    keys, rows, length = SHAPES[opt.suite][shape]
    sides = {"prism": our_step(keys, rows, length, where, opt.compile), "transformers": peer_step(keys, rows, length, where)}
    what = f"training step, {shape_text(keys, rows, length)}, {str(where.dtype)[6:]}"
    return [report(shape, what, race(sides, opt, where), "tokens/s", rows * length)]


def vocab(opt, where):
    """Speed at a 152k vocabulary, then each side's peak memory, alone in a process of its own."""
    rows = train(opt, where, "vocab")
    peaks = {}
    for side in ("our", "peer"):
        one = f"bench.one_side({side!r}, {opt.suite!r}, {opt.threads})"
        if where.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            one_side(side, opt.suite, opt.threads)
            peaks[side] = torch.cuda.max_memory_allocated()
        else:
            peaks[side] = child_cost(["-c", f"import bench; {one}"])[1]
    ratio = peaks["our"] / peaks["peer"]
    what = f"peak memory of {shape_text(*SHAPES[opt.suite]['vocab'])}, lower is better"
    print(f"{'memory':<10} prism {peaks['our'] / 2**30:.2f} GiB, transformers {peaks['peer'] / 2**30:.2f}: ratio {ratio:.2f}  {what}")
    sizes = {"prism": peaks["our"] / 2**30, "transformers": peaks["peer"] / 2**30}
    return [*rows, {"name": "memory", "what": what, **sizes, "unit": "GiB", "ratio": ratio, "low": ratio, "high": ratio, "rounds": 1}]


def one_side(side, suite, threads):
    if threads:
        torch.set_num_threads(threads)
    keys, rows, length = SHAPES[suite]["vocab"]
    step = (our_step if side == "our" else peer_step)(keys, rows, length, machine.find())
    for _ in range(2):
        step()


def polyglu(opt, where):
    keys, rows, length = SHAPES[opt.suite]["polyglu"]
    where = where if where.device.type == "cuda" else where._replace(dtype=torch.float32)
    sides = {ffn: our_step(keys | {"ffn": ffn}, rows, length, where, opt.compile) for ffn in ("polyglu", "swiglu")}
    what = f"training step of prism, {shape_text(keys, rows, length)}, {str(where.dtype)[6:]}: polyglu's time over swiglu's"
    return [report("polyglu", what, race(sides, opt, where), "tokens/s", rows * length, higher=False)]


def decode(opt, where, batch):
    """Greedy, no end token, after a prompt; both sides hold their weights in the activation dtype."""
    keys, prompt, new = SHAPES[opt.suite]["decode"]
    model = sample.lean(build(Config(**keys, max_steps=1)).set_dtype(where.dtype).to(where.device).eval(), batch)
    peer = qwen3(keys, where).to(where.dtype).eval()
    ids = torch.randint(keys["vocab_size"], (batch, prompt), generator=torch.Generator().manual_seed(1))
    mask, rows, ids = torch.ones_like(ids).to(where.device), ids.tolist(), ids.to(where.device)
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    sides = {
        "prism": lambda: sample.tokens(model, rows, new, lambda row, i: False),
        "generate": lambda: peer.generate(ids, attention_mask=mask, **fixed),
    }
    assert sides["generate"]().shape == (batch, prompt + new)
    what = f"greedy decoding of {new} tokens after {prompt}, batch {batch}, {keys['n_layer']} x {keys['d_model']}, {str(where.dtype)[6:]}"
    return [report(f"decode{batch}", what, race(sides, opt, where, warm=1), "tokens/s", batch * new)]


def prepare(opt, where):
    """The standard library into byte shards by two processes, against one. Wall time, whatever the clock."""
    seconds, tokens = {"2 processes": [], "1 process": []}, 0
    for _ in range(3):
        for name in seconds:
            with tempfile.TemporaryDirectory() as folder:
                cost = child_cost(["-m", "prepare.text", "--from=stdlib", f"--out={folder}/d", f"--workers={name[0]}"])
                seconds[name].append(cost[0])
                with open(f"{folder}/d/manifest.json") as file:
                    tokens = sum(s["tokens"] for s in json.load(file)["shards"])
    return [report("prepare", "prepare.text of the standard library, bytes, start-up included", seconds, "tokens/s", tokens)]


def startup(opt, where):
    seconds = {"train.py --help": [], "import torch": []}
    for _ in range(5):
        seconds["train.py --help"].append(child_cost(["train.py", "--help"])[0])
        seconds["import torch"].append(child_cost(["-c", "import torch"])[0])
    return [report("startup", "start-up against importing torch alone, lower is better", seconds, "starts/s", 1, higher=False)]


ROWS = {"train": train, "vocab": vocab, "polyglu": polyglu, "decode1": lambda *a: decode(*a, 1), "decode8": lambda *a: decode(*a, 8)}
ROWS |= {"prepare": prepare, "startup": startup}


def about(where, opt):
    wanted = ("transformers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in wanted if importlib.util.find_spec(name)}
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return {"machine": where.why, "cpu": f"{cpu_name()}, {cores}", "torch": torch.__version__, **versions, "clock": opt.clock,
            "commit": machine.git_commit(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def cpu_name():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return platform.processor() or platform.machine()


def main(argv):
    keys = {
        "suite": "cpu",
        "only": "",
        "out": "",
        "rounds": 20,
        "clock": "wall",
        "threads": 0,
        "compile": False,
        "info": False,
        "fp8_table": False,
    }
    opt = configurator.args(keys, argv, __doc__)
    if opt.info:
        return print(precision.info())
    if opt.fp8_table:
        return print(fp8_table.write_table(device=machine.find("cuda").device))
    chosen = opt.only.split(",") if opt.only else list(ROWS)
    if opt.suite not in SHAPES or opt.clock not in ("wall", "cpu") or not set(chosen) <= set(ROWS) or opt.rounds < 1:
        die(f"bench: --suite is cpu or gpu, --clock wall or cpu, --rounds positive, --only some of {','.join(ROWS)}; got {' '.join(argv)}")
    if opt.threads:
        torch.set_num_threads(opt.threads)
    where = machine.find("cuda" if opt.suite == "gpu" else "cpu")
    facts, rows = about(where, opt), []
    print("\n".join(f"{k}: {v}" for k, v in facts.items()), flush=True)
    for name in chosen:
        rows += ROWS[name](opt, where)
    if opt.out:
        with open(opt.out, "w") as file:
            json.dump({"command": ["bench.py", *argv], **facts, "rows": rows}, file, indent=1)
    print(f"peak memory of the bench {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main(sys.argv[1:])
