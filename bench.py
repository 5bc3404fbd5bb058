"""Speed and memory against named peers, as ratios inside one run: both sides interleaved, medians, and the spread of the ratio.

    python bench.py --suite=cpu [--only=train,decode1] [--out=results.json] [--rounds=20] [--clock=cpu]
    python bench.py --suite=gpu --rounds=10 --budget=360 --out=gpu.json      on a GPU: eval/gpu.py and eval/operators.py, compiled
    python bench.py --suite=tiny                     the same rows at tiny shapes, on any machine: to see that all of it runs here
    python bench.py --profile                        on a GPU: the kernels of a step
    python bench.py --info                           the machine and its libraries
    python bench.py --fp8_table [config/A.py ..]     on a GPU: measure which FP8 products pay, rewrite config/fp8_table.py

Peers are transformers' Qwen3ForCausalLM of the same shape (its own `generate` for decoding) and T5Gemma2 (padded, as its users train it),
with the same fused AdamW, clipping and dtype: fp32 masters and bf16 matmuls, which is torch.autocast there. A row that fails, its
peer missing perhaps, is reported with its error and makes the exit code 1. The floor of a row is the time its matrix products would
take, or its weights to be read, at the rates that this machine reached in this run with nothing else to do. `--clock=cpu` counts the
process's CPU seconds instead of the wall's: for --threads=1 on a machine that others are using. --out is written anew after every row
(--append: behind the rows that it holds); no row begins once --budget seconds are over. Read next: LOG.md for what was measured.
"""

import prelude  # isort: skip  # noqa: F401

import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import configurator
import lean
import machine
import precision
import sample
from configurator import die
from eval import encode, fp8_table, gpu, operators, write_json
from eval.peers import (
    ceilings,
    child_cost,
    encoder_folder,
    fresh,
    in_turn,
    middle,
    one_line,
    our_step,
    peer_step,
    qwen3,
    race,
    ragged_pairs,
    rows_of_text,
    t5gemma2,
)
from model import Embedder, build
from prepare.sources import find
from train import Config

# shape of each row: Config keys, rows x tokens of a step; training steps on a GPU: eval/gpu.py
SHAPES = {
    "cpu": {
        "train": ({"vocab_size": 4096, "n_layer": 6, "n_head": 6, "d_model": 384, "d_ff": 1024}, 8, 256),
        "vocab": ({"vocab_size": 151_936, "n_layer": 2, "n_head": 4, "d_model": 256, "d_ff": 768}, 8, 256),
        "encdec": ({"vocab_size": 4096, "n_layer": 4, "n_head": 4, "d_model": 256, "d_ff": 768}, 16),
        "polyglu": ({"vocab_size": 4096, "n_layer": 4, "n_head": 4, "d_model": 256, "d_ff": 1024}, 8, 256),
        "decode": ({"vocab_size": 4096, "n_layer": 6, "n_head": 6, "d_model": 384, "d_ff": 1024}, 64, 128),
        "smollm": ({"vocab_size": 49_152, "n_layer": 30, "n_head": 9, "n_kv_head": 3, "d_model": 576, "d_ff": 1536}, 32, 64),
        "embed": ({"vocab_size": 4096, "n_layer": 6, "n_head": 6, "n_kv_head": 2, "d_model": 384, "d_ff": 1024}, 192),
    },
    "gpu": {
        "decode": ({"vocab_size": 50_304, "n_layer": 12, "n_head": 12, "d_model": 768, "d_ff": 3072}, 64, 256),
        "embed": ({"vocab_size": 4096, "n_layer": 28, "n_head": 16, "n_kv_head": 8, "d_model": 1024, "d_ff": 3072}, 10_000),
    },
    "tiny": {"decode": (gpu.TINY, 8, 8), "embed": (gpu.TINY | {"max_len": 1024}, 8)},
}


# ---- measuring ----------------------------------------------------------------------------------------------------------


def report(name, what, seconds, unit, amount, higher=True, floor=0.0):
    """First side is ours, second the peer. The ratio is taken round by round, median and quartiles; floor: seconds nobody can beat."""
    (us, ours), (peer, theirs) = seconds.items()
    ratios = sorted(b / a if higher else a / b for a, b in zip(ours, theirs, strict=True))
    ratio, low, high = middle(ratios)
    a, b = middle(ours)[0], middle(theirs)[0]
    rates = [amount / t if amount else t for t in (a, b)]
    row = {"name": name, "what": what, us: rates[0], peer: rates[1], "unit": unit}
    row |= {"ratio": ratio, "low": low, "high": high, "rounds": len(ratios), "floor_s": floor, "of_floor": floor / a}
    spread = f"ratio {row['ratio']:.2f} ({low:.2f} to {high:.2f}, {len(ratios)} rounds)"
    line = f"{us} {rates[0]:,.4g} {unit}, {peer} {rates[1]:,.4g}: {spread}"
    print(f"{name:<10} {line}{f', {floor / a:.0%} of the floor' if floor else ''}  {what}", flush=True)
    return row


# ---- rows ---------------------------------------------------------------------------------------------------------------


def train(opt, where, shape="train"):
    keys, rows, length = SHAPES[opt.suite][shape]
    batch, inputs = rows_of_text(keys, rows, length)
    sides = {"prism": our_step(keys, batch, where, opt.compile), "transformers": peer_step(qwen3(keys, where), inputs, where)}
    what = f"training step, {gpu.text(keys, rows, length)}, {str(where.dtype)[6:]}"
    floor = build(Config(**keys, max_steps=1), "meta").flops_per_token(length) * rows * length / ceilings(where, opt.clock)[0]
    return [report(shape, what, race(sides, opt, where), "tokens/s", rows * length, floor=floor)]


def encdec(opt, where):
    """Ragged examples; both sides' rate counts real tokens."""
    keys, count = SHAPES[opt.suite]["encdec"]
    batch, inputs = ragged_pairs(keys, count)
    ours = our_step(keys | {"arch": "encdec"}, batch, where)
    sides = {"prism": ours, "transformers": peer_step(t5gemma2(keys, where), inputs, where)}
    real, padded = len(batch["ids"]) + len(batch["dec_ids"]), inputs["input_ids"].numel() + inputs["labels"].numel()
    shape = f"2 x {keys['n_layer']} x {keys['d_model']}"
    what = f"encoder-decoder training step, {shape}, {count} ragged examples, {real} of {padded} tokens real"
    return [report("encdec", what, race(sides, opt, where), "tokens/s", real)]


def vocab(opt, where):
    """Speed at a 152k vocabulary, then each side's peak memory, alone in a process of its own."""
    rows = train(opt, where, "vocab")
    one = lambda side: f"import bench; bench.one_side({side!r}, {opt.suite!r}, {opt.threads})"  # noqa: E731
    peaks = {side: child_cost(["-c", one(side)])[1] for side in ("our", "peer")}
    ratio = peaks["our"] / peaks["peer"]
    what = f"peak memory of {gpu.text(*SHAPES[opt.suite]['vocab'])}, lower is better"
    print(f"{'memory':<10} prism {peaks['our'] / 2**30:.2f} GiB, transformers {peaks['peer'] / 2**30:.2f}: ratio {ratio:.2f}  {what}")
    sizes = {"prism": peaks["our"] / 2**30, "transformers": peaks["peer"] / 2**30}
    return [*rows, {"name": "memory", "what": what, **sizes, "unit": "GiB", "ratio": ratio, "low": ratio, "high": ratio, "rounds": 1}]


def one_side(side, suite, threads):
    if threads:
        torch.set_num_threads(threads)
    where, (keys, rows, length) = machine.find("cpu"), SHAPES[suite]["vocab"]
    batch, inputs = rows_of_text(keys, rows, length)
    step = our_step(keys, batch, where) if side == "our" else peer_step(qwen3(keys, where), inputs, where)
    for _ in range(2):
        step()


def polyglu(opt, where):
    keys, length = SHAPES[opt.suite]["polyglu"][0], SHAPES[opt.suite]["polyglu"][1:]
    batch = rows_of_text(keys, *length)[0]
    for name, dtype in (("polyglu", torch.float32), ("polyglu16", where.dtype)):
        here = where._replace(dtype=dtype)
        sides = {ffn: our_step(keys | {"ffn": ffn}, batch, here, opt.compile) for ffn in ("polyglu", "swiglu")}
        what = f"training step of prism, {gpu.text(keys, *length)}, {str(dtype)[6:]}: polyglu's time over swiglu's"
        yield report(name, what, race(sides, opt, here), "tokens/s", length[0] * length[1], higher=False)


def decode(opt, where, batch, shape="decode"):
    """Greedy, no end token, after a prompt; both sides hold their weights in the activation dtype."""
    keys, prompt, new = SHAPES[opt.suite][shape]
    model = fresh(Config(**{"max_len": 1024} | keys, max_steps=1), where).eval().lean(batch)
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
    flops, rate = ceilings(where, opt.clock)
    weight = model.head_weight
    size = (lean.squeezed(weight) if lean.streams(weight, batch) else weight).nbytes / weight.numel() * model.num_params()
    step = max(size / rate, 2 * model.num_params() * batch / flops)  # every weight is read once
    floor = new * step + 2 * model.num_params() * batch * prompt / flops
    brief = SimpleNamespace(**vars(opt) | {"rounds": min(opt.rounds, 4) if opt.suite == "gpu" else opt.rounds})
    row = report(f"{shape}{batch}", what, race(sides, brief, where, warm=1), "tokens/s", batch * new, floor=floor)
    row["GB/s"] = size * row["prism"] / batch / 1e9
    print(f"  weights read at {row['GB/s']:,.0f} GB/s, {row['GB/s'] * 1e9 / rate:.0%} of the {rate / 1e9:,.0f} measured")
    return [row]


def embed(opt, where):
    """Strings in, arrays out, of one exported folder: in fp32, in the dtype that the machine is fast in, and each at its own default."""
    from sentence_transformers import SentenceTransformer

    keys, count = SHAPES[opt.suite]["embed"]
    with tempfile.TemporaryDirectory() as folder:
        child_cost(["-m", "prepare.text", "--from=*.md,*.py,*/*.py", f"--tokenizer=bpe:{keys['vocab_size']}", f"--out={folder}/d"])
        path = encoder_folder(keys, folder, f"{folder}/d")
        wide, fast = torch.float32, where.dtype
        brief = SimpleNamespace(**vars(opt) | {"rounds": 3 if opt.suite == "gpu" else opt.rounds})
        kinds = (("embed16", fast, fast), ("embed_auto", fast, wide), ("embed", wide, wide))
        for name, mine, theirs in kinds[: 2 if opt.suite == "gpu" else 3]:
            ours, peer = Embedder.load(path, where.device, mine), SentenceTransformer(path, device=str(where.device)).to(theirs)
            texts = encode.texts_of(count, ours.tok, ours.max_length)
            sides = {
                "prism": partial(ours.encode, texts),
                "sentence-transformers": partial(peer.encode, texts, show_progress_bar=False, convert_to_tensor=True),
            }
            few = texts[:500]
            same = peer.encode(few, show_progress_bar=False, convert_to_tensor=True).float().cpu()
            same = float((torch.from_numpy(ours.encode(few)) * same).sum(1).min())
            weights = ours.model.num_params() - ours.model.embed.weight.numel()
            floor = 2 * weights * sum(map(len, ours.rows(texts))) / ceilings(where._replace(dtype=mine), opt.clock)[0]
            what = f"{count} texts, encoder of {keys['n_layer']} x {keys['d_model']}, {str(mine)[6:]} against {str(theirs)[6:]}"
            what = f"encoding {what}, cosine of the two >= {same:.4f}"
            yield report(name, what, race(sides, brief, where, warm=opt.suite == "cpu"), "texts/s", count, floor=floor)


LIBRARY = """import json, sys; from tokenizers import Tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[2])]
Tokenizer.from_file(sys.argv[1]).encode_batch_fast(texts)"""


def prepare(opt, where):
    """The standard library four times over into shards, by two processes and a BPE: against the tokenizer's own threads, which write
    nothing, and against one process. Wall time, whatever the clock."""
    with tempfile.TemporaryDirectory() as folder:
        child_cost(["-m", "prepare.text", "--from=stdlib", "--tokenizer=bpe:4096", f"--out={folder}/d"])
        child_cost(["-m", "prepare.tokenizer", f"--from={folder}/d", f"--out={folder}/hf"])
        texts = [Path(path).read_text("utf-8", "replace") for path, _ in find("stdlib")] * 4
        Path(folder, "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        ours = ["-m", "prepare.text", f"--from={folder}/texts.jsonl", f"--tokenizer={folder}/hf", f"--out={folder}/out"]
        runs = {"prism": [*ours, "--workers=2"], "1 process": [*ours, "--workers=1"]}
        runs["tokenizers"] = ["-c", LIBRARY, f"{folder}/hf/tokenizer.json", f"{folder}/texts.jsonl"]
        seconds = in_turn(runs, 3, f"{folder}/out")
    size = sum(len(text.encode()) for text in texts) / 1e6
    what = f"prepare.text on two processes, {size:.0f} MB of jsonl, BPE of 4,096 ids, start-up included"
    pairs = ({name: seconds[name] for name in ("prism", other)} for other in ("tokenizers", "1 process"))
    return [report(name, what, pair, "MB/s", size) for name, pair in zip(("prepare", "prepare2"), pairs, strict=True)]


def startup(opt, where):
    """Wall time, whatever the clock. The floor of a first step is the import of torch."""
    with tempfile.TemporaryDirectory() as folder:
        child_cost(["-m", "prepare.text", f"--from={__file__}", "--separator=\n\n", "--val=0.1", f"--out={folder}/d"])
        small = ["config/debug.py", f"--data={folder}/d", f"--out={folder}/r", "--max_steps=1", "--eval_every=0", "--resume=auto"]
        runs = {"first": ["train.py", *small], "torch": ["-c", "import torch"], "help": ["train.py", "--help"], "python": ["-c", "pass"]}
        seconds = in_turn(runs, 5, f"{folder}/r")
    ours, empty = ({"prism": seconds[a], b: seconds[b]} for a, b in (("first", "torch"), ("help", "python")))
    return [
        report("first", "train.py over one step and its checkpoint, against import torch; lower is better", ours, "s", None, higher=False),
        report("help", "train.py --help, against an empty program; lower is better", empty, "s", None, higher=False),
    ]


DECODE = {"decode1": lambda *a: decode(*a, 1), "decode8": lambda *a: decode(*a, 8)}
GPU = gpu.ROWS | operators.ROWS | DECODE | {"embed": embed}
ORDER = "polyglu,small,curriculum,profile,head,attention,operator,fp8,decode1,decode8,optimizer,encdec,embed"  # the weightiest first
ROWS = {"cpu": {"train": train, "vocab": vocab, "encdec": encdec, "polyglu": polyglu} | DECODE}
ROWS["cpu"] |= {"smollm1": lambda *a: decode(*a, 1, "smollm"), "smollm8": lambda *a: decode(*a, 8, "smollm")}
ROWS["cpu"] |= {"embed": embed, "prepare": prepare, "startup": startup}
ROWS["gpu"] = ROWS["tiny"] = {name: GPU[name] for name in ORDER.split(",")}


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


def healthy(where):
    """False when a kernel has failed in such a way that no other will run in this process."""
    try:
        machine.wait(where.device)
    except RuntimeError:
        return False
    return True


def measure(chosen, opt, where, rows, keep):
    """Row by row, each kept as soon as it is there -> the names that time or a broken device left unmeasured."""
    left = list(chosen)
    over = lambda: 0 < opt.budget < time.perf_counter() - opt.began  # noqa: E731
    while left and healthy(where) and not over():
        name = left.pop(0)
        try:
            for row in ROWS[opt.suite][name](opt, where):
                rows.append(row)
                keep()
                if over():
                    break
        except (Exception, SystemExit) as error:  # it is reported, it makes the exit code 1, and the other rows are measured all the same
            rows.append({"name": name, "failed": f"{type(error).__name__}: {error}"})
            print(f"{name:<10} FAILED {rows[-1]['failed']}\n{traceback.format_exc()}", flush=True)
        print(f"-- {name}, {time.perf_counter() - opt.began:.0f} s in all", flush=True)
        keep()
        if where.device.type == "cuda" and healthy(where):
            gc.collect()
            torch.cuda.empty_cache()
        if opt.compile:
            torch._dynamo.reset()  # models of other rows are guards to pass and, past a limit, a reason to go on uncompiled
    return left


def main(argv):
    if "--help" not in argv and (rest := [arg for arg in argv if arg not in ("--fp8_table", "--fp8_table=True")]) != argv:
        return print(fp8_table.write_table(device=machine.find("cuda").device, argv=rest))
    keys = {"suite": "cpu", "only": "", "out": "", "rounds": 20, "clock": "wall", "threads": 0, "compile": "auto", "budget": 0.0}
    opt = configurator.args(keys | {"info": False, "fp8_table": False, "profile": False, "append": False}, argv, __doc__)
    if opt.info:
        return print(precision.info())
    if opt.profile:
        opt.suite, opt.only = "gpu" if opt.suite == "cpu" else opt.suite, "profile"
    known = ROWS.get(opt.suite, ())
    chosen = opt.only.split(",") if opt.only else list(known)
    if not known or opt.clock not in ("wall", "cpu") or opt.compile not in ("auto", "True", "False") or opt.rounds < 1:
        die(f"bench: --suite is cpu, gpu or tiny, --clock wall or cpu, --compile auto, True or False, --rounds > 0; got {' '.join(argv)}")
    if not set(chosen) <= set(known):
        die(f"bench: --only is some of {','.join(known)}; got {opt.only}")
    not opt.append or opt.out or die("bench: --append needs --out=FILE, to whose rows it adds")
    if opt.threads:
        torch.set_num_threads(opt.threads)
    where = machine.find({"gpu": "cuda", "cpu": "cpu"}.get(opt.suite, "auto"))
    opt.compile = where.device.type == "cuda" if opt.compile == "auto" else opt.compile == "True"
    facts, rows = about(where, opt), json.loads(Path(opt.out).read_text())["rows"] if opt.append else []
    print("\n".join(f"{k}: {v}" for k, v in facts.items()), flush=True)
    opt.began = time.perf_counter()
    left = measure(chosen, opt, where, rows, lambda: write_json(opt.out, {"command": ["bench.py", *argv], **facts, "rows": rows}))
    if left and opt.out and not healthy(where):  # a new process can go on where this one cannot
        rest = [arg for arg in argv if arg.partition("=")[0] not in ("--only", "--append", "--profile", "--budget")]
        rest += [f"--budget={max(1.0, opt.budget - time.perf_counter() + opt.began)}"] * bool(opt.budget)
        print(f"the device is lost to this process; {','.join(left)} in a new one", flush=True)
        os.execv(sys.executable, [sys.executable, __file__, *rest, f"--only={','.join(left)}", "--append"])
    print("\n".join(one_line(row) for row in rows if "sides" in row), f"\nnot measured: {','.join(left)}" if left else "")
    print(f"peak memory of the bench {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    if failed := [row["name"] for row in rows if "failed" in row]:
        print(f"failed: {', '.join(failed)}")
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
