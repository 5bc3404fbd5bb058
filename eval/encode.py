"""Texts per second against sentence-transformers: the same exported folder, texts, dtype, device and limit; strings in, arrays out.

    python -m eval.encode --ckpt=FOLDER [--texts=10000] [--repeats=3] [--dtype=float32] [--best=False] [--out=result.json]

Lengths are log-normal (median about 40 tokens, cut at 512), all texts distinct; both sides warm, interleaved, median of the repeats and the
range of the ratio. sentence-transformers runs at its defaults; with --best also at batch sizes 64, 128 and 256, of which the best counts.
Where the machine multiplies bf16 and --dtype=float32, prism is timed in bf16 too: what a user may choose, but not the same arithmetic.
`--clock=cpu` counts CPU seconds of this process, the honest figure on a machine that others are using. Read next: model.py (Embedder).
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import configurator
from configurator import die
from eval import write_json
from files import writable
from machine import find
from model import Embedder

WORDS = """time year people way day man thing woman life child world school state family student group country problem hand part
    place case week company system program question work government number night point home water room mother area money story fact
    month lot right study book eye job word business issue side kind head house service friend father power hour game line""".split()


def texts_of(count: int, tok, limit: int) -> list[str]:
    rng = np.random.default_rng(0)
    per_word = len(tok.encode(" ".join(WORDS))) / len(WORDS)
    words = (np.clip(np.exp(rng.normal(np.log(40), 0.8, count)), 2, limit) / per_word).astype(int) + 1
    return [f"{i} " + " ".join(rng.choice(WORDS, n)) for i, n in enumerate(words)]


def main(argv):
    defaults = {"ckpt": str, "texts": 10_000, "repeats": 3, "dtype": "float32", "device": "auto", "best": False, "clock": "wall", "out": ""}
    opt = configurator.args(defaults, argv, __doc__, positive="texts repeats")
    writable(opt.out)
    for key, known in {"dtype": ("float32", "bfloat16"), "clock": ("wall", "cpu")}.items():
        if getattr(opt, key) not in known:
            die(f"--{key}={getattr(opt, key)}: one of {', '.join(known)}")
    if not list(Path(opt.ckpt).glob("*.safetensors")) or (Path(opt.ckpt) / "state.json").is_file():
        die(f"--ckpt={opt.ckpt}: no exported folder; python -m hub export --ckpt=out/RUN --to=sentence-transformers --out=DIR writes one")
    from sentence_transformers import SentenceTransformer

    device, dtype = find(opt.device, "auto").device, getattr(torch, opt.dtype)
    ours = Embedder.load(opt.ckpt, device=device, dtype=dtype)
    theirs = SentenceTransformer(opt.ckpt, device=str(device), model_kwargs={"dtype": dtype})
    texts = texts_of(opt.texts, ours.tok, ours.max_length)
    now = time.process_time if opt.clock == "cpu" else time.perf_counter
    sides = {"prism": lambda: ours.encode(texts), "sentence-transformers": lambda: theirs.encode(texts, show_progress_bar=False)}
    if (fast := find(opt.device, "auto").dtype) != dtype and opt.dtype == "float32":
        short = Embedder.load(opt.ckpt, device=device, dtype=fast)
        sides["prism in bfloat16"] = lambda: short.encode(texts)
    if opt.best:
        for size in (64, 128, 256):
            sides[f"sentence-transformers, batch {size}"] = lambda size=size: theirs.encode(texts, batch_size=size, show_progress_bar=False)
    seconds, vectors = {name: [] for name in sides}, {}
    ours.encode(texts[:64]), theirs.encode(texts[:64], show_progress_bar=False)
    for _ in range(opt.repeats):
        for name, encode in sides.items():
            start = now()
            vectors[name] = np.asarray(encode(), np.float32)
            seconds[name].append(now() - start)
    length = list(map(len, ours.rows(texts)))
    print(f"{opt.texts} texts, {np.median(length):.0f} tokens median, {max(length)} longest; {opt.dtype} on {device}, {opt.clock} seconds")
    result = {}
    for name in sides:
        ratio = [b / a for a, b in zip(seconds["prism"], seconds[name], strict=True)]
        sides_of = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors[name], vectors["prism"])]
        same = float((sides_of[0] * sides_of[1]).sum(1).min())
        result[name] = {
            "texts/s": opt.texts / statistics.median(seconds[name]),
            "seconds": seconds[name],
            "ratio": statistics.median(ratio),
        }
        print(f"{name:34} {result[name]['texts/s']:9.1f} texts/s   {statistics.median(ratio):.2f}x [{min(ratio):.2f}, {max(ratio):.2f}]"
              f"   smallest cosine with prism {same:.6f}")  # fmt: skip
    write_json(opt.out, result)


if __name__ == "__main__":
    main(sys.argv[1:])
