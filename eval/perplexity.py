"""Held-out loss: of fixed windows of the val split, and of whole documents, domain by domain, in bits per byte.

    python -m eval.perplexity --ckpt=out/RUN                          the val split of what the run was trained on
    python -m eval.perplexity --ckpt=out/RUN --data=data/math,code    folders of shards, or names from the run's config
    python -m eval.perplexity --ckpt=out/RUN --domains=data/val       every NAME.jsonl of {"text": ...} there (prepare.val)
            [--windows=244] [--seq_len=0] [--eval_len=2048] [--window_stride=1.0] [--reference=other.json] [--out=result.json]

Windows: `windows` rows of `seq_len` tokens, evenly spread over the split, documents isolated. Domains: every document alone, from an EOS
context, longer ones in windows that begin every window_stride x eval_len tokens, each text token scored once, no EOS target. Only the
val split is ever scored; a text of a domain that is a document of the run's training split stops it, where those shards are at hand.
bits per byte = nats / (ln 2 x UTF-8 bytes) is the one figure that compares tokenizers. Intervals: bootstrap over windows or documents.
Read next: eval/harness.py (tasks), eval/routing.py (what the neurons chose).
"""

import functools
import hashlib
import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import configurator
import data
import mix
from checkpoint import resolve
from configurator import die
from eval import OPEN, bootstrap, load_tokenizer, open_run, suffix, write_json
from files import writable
from machine import to_device
from prepare.sources import read as read_rows
from tokenizer import expect_same

OPTIONS = OPEN | {
    "data": "",
    "domains": "",
    "windows": 244,
    "seq_len": 0,
    "eval_len": 2048,
    "batch_tokens": 16384,
    "window_stride": 1.0,
    "reference": "",
}
COLUMNS = ("nats", "tokens", "top1", "top5", "entropy")


@torch.no_grad()
def token_scores(model, hidden, targets, chunk=512):
    """(N, 5): nats, 1, is it the likeliest, is it among five, entropy of the prediction; zero where nothing is scored."""
    rows = []
    for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logp = model.predict(h).log_softmax(-1)  # (chunk, V)
        right = logp.gather(1, target.clamp(min=0)[:, None])
        rank = (logp > right).sum(1)
        entropy = -(logp.exp() * logp).sum(1)
        row = torch.stack([-right[:, 0], torch.ones_like(entropy), (rank < 1).float(), (rank < 5).float(), entropy], 1)
        rows.append(row.double() * (target != -100)[:, None])
    return torch.cat(rows)


def read_texts(path):
    texts = [row.get("text") for row in read_rows(path)]
    return die(f"{path}: a row has no text; python -m prepare.val makes such files") if None in texts else texts


def marks(tokens, start, size):
    """A number per document, of its length and two of its tokens: most documents differ in it, equal ones never do."""
    first, middle = (tokens[start + size * k // 2].astype(np.int64) & 0x7FFFFFFF for k in (0, 1))
    return (size << 40) ^ (first << 20) ^ middle


def expect_unseen(folder, tok, dirs):
    """Stops at a text that is to be scored and is a document of a training split, token for token. Reads one page of a shard per
    document of equal length."""
    for path in sorted(Path(folder).glob("*.jsonl")):
        coded = [np.array([*tok.encode(text), tok.eos_id], np.uint32) for text in read_texts(path)]
        number, sizes = {ids.tobytes(): i for i, ids in enumerate(coded)}, np.array([len(ids) for ids in coded])
        mine = marks(np.concatenate(coded), sizes.cumsum() - sizes, sizes)
        for dir in dirs:
            shards = data.Shards(dir, "train")
            for tokens, idx in zip(shards.bins, shards.idxs, strict=True):
                start, size = idx[:-1], np.diff(idx)
                like = np.isin(size, sizes)
                start, size = start[like], size[like]
                like = np.isin(marks(tokens, start, size), mine)
                for at, n in zip(start[like].tolist(), size[like].tolist(), strict=True):
                    if (i := number.get((tokens[at : at + n] & 0x7FFFFFFF).tobytes())) is not None:
                        die(f"{path}: text {i} is a document that {dir} trains on; prepare that again with --exclude={folder}, or drop it")


def text_batches(texts, tok, eval_len=2048, batch_tokens=16384, stride=1.0) -> list[dict]:
    """Flat micro-batches of whole texts; besides what every batch holds, `document` (S,) names each segment's text, and `bytes` counts
    the texts whose first window is here."""
    pieces, batches, held = [], [], 0  # (document, ids with one more in front, bytes, targets scored before)
    for i, text in enumerate(texts):
        ids = [tok.eos_id, *tok.encode(text)]
        step, done = max(1, int(stride * eval_len)), 0  # targets before `done` were scored by an earlier window
        for at in range(0, max(1, len(ids) - 1 - eval_len + step), step):
            piece = ids[at : at + eval_len + 1]
            if pieces and held + len(piece) - 1 > batch_tokens:
                batches.append(pack(pieces))
                pieces, held = [], 0
            pieces.append((i, piece, 0 if at else len(text.encode()), done - at))
            held, done = held + len(piece) - 1, at + len(piece) - 1
    return batches + ([pack(pieces)] if pieces else [])


def domain_batches(folder, tok, eval_len=2048, batch_tokens=16384, half=None, stride=1.0):
    """{domain: micro-batches} of every NAME.jsonl in `folder`. train.py's evaluation reads these as it reads the val split.
    `half`: 0 the documents of even hash (what auto_mix may look at), 1 the others."""
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        die(f"--domains={folder}: no NAME.jsonl there; python -m prepare.val --from=DIR --out={folder} writes them")
    domains = {}
    for path in files:
        texts = [t for t in read_texts(path) if half is None or hashlib.blake2b(t.encode()).digest()[0] % 2 == half]
        domains[path.stem] = text_batches(texts, tok, eval_len, batch_tokens, stride) or die(f"{path}: holds no text")
    return domains


def pack(pieces):
    lengths = torch.tensor([len(ids) - 1 for _, ids, *_ in pieces])
    return {
        "ids": torch.tensor([i for _, ids, *_ in pieces for i in ids[:-1]]),
        "targets": torch.tensor([-100 if k < seen else i for _, ids, _, seen in pieces for k, i in enumerate(ids[1:])]),
        "pos": torch.cat([torch.arange(n) for n in lengths.tolist()]),
        "cu": torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int(),
        "max_len": int(lengths.max()),
        "rows": torch.zeros(1, dtype=torch.long),
        "source": torch.zeros(1, dtype=torch.long),
        "tokens": int(lengths.sum()),
        "document": torch.tensor([i for i, *_ in pieces]),
        "bytes": sum(size for _, _, size, _ in pieces),
    }


@torch.no_grad()
def score(model, batches, device, note=""):
    """-> (units, 5) sums of COLUMNS per document (or per row of a windows batch), and the bytes of their text."""
    rows, ids, size, first = [], [], 0, 0
    for batch in tqdm(batches, desc=note, unit="batch", disable=not sys.stderr.isatty(), leave=False):
        each = token_scores(model, model(to_device(batch, device)), batch["targets"].to(device)).cpu()
        if "document" in batch:
            unit = batch["document"].repeat_interleave(batch["cu"].diff().long())
        else:
            unit = first + torch.arange(len(each)) // (len(each) // len(batch["rows"]))
        ids.append(unit)
        rows.append(each)
        first, size = int(unit.max()) + 1, size + batch["bytes"]
    ids = torch.cat(ids)
    return torch.zeros(int(ids.max()) + 1, len(COLUMNS), dtype=torch.float64).index_add_(0, ids, torch.cat(rows)), size


def summary(sums, size):
    """What a table shows, from `score`."""
    sums = sums[sums[:, 1] > 0]
    nats, tokens, top1, top5, entropy = sums.sum(0).tolist()
    low, high = bootstrap(sums[:, 0], sums[:, 1])
    row = {
        "loss": nats / tokens,
        "loss_low": low,
        "loss_high": high,
        "ppl": math.exp(nats / tokens),
        "bits_per_token": nats / tokens / math.log(2),
    }
    if size:
        row |= {f"bpb{k}": v * tokens / (math.log(2) * size) for k, v in (("", nats / tokens), ("_low", low), ("_high", high))}
    return row | {
        "top1": top1 / tokens,
        "top5": top5 / tokens,
        "entropy": entropy / tokens,
        "tokens": int(tokens),
        "bytes": size,
        "units": len(sums),
    }


def window_batches(ckpt, names, known, seq_len, windows, batch_tokens):
    """{name: batches} of val splits; a name is a folder or a source of the run's config."""
    found, names = {}, [name for name in names.split(",") if name] if names else list(known)
    if not names:
        die(f"{ckpt}: was trained on no shards that it knows of; give --data=DIR")
    for name in names:
        path = known.get(name, name)
        if not Path(path, "manifest.json").is_file():
            die(f"--data={name}: {path} is no folder of shards; known to this run: {', '.join(known) or 'nothing'}")
        expect_same(resolve(ckpt).parent, path)
        short = name if [Path(other).name for other in names].count(Path(name).name) > 1 else Path(name).name
        found[short] = data.val_batches(path, seq_len, windows * seq_len, max(batch_tokens, seq_len))
    return found


def window_length(o, state, cfg):
    """--seq_len, or what the run was trained on, where the model takes as much."""
    if o.seq_len > cfg.max_len:
        die(f"--seq_len={o.seq_len}: {o.ckpt} takes at most {cfg.max_len}")
    return o.seq_len or min(state["config"].get("seq_len", cfg.max_len), cfg.max_len)


def sources(state):
    known = state["config"].get("data", {})
    return known if isinstance(known, dict) else {Path(known).name: known}


def read_reference(path):
    """An --out of ours -> {name: bits per byte}."""
    rows = None
    with suppress(ValueError, AttributeError):
        rows = json.loads(Path(path).read_text(encoding="utf-8")).get("results")
    rows or die(f"--reference={path}: no results in it; give an --out of this program")
    return {name.removesuffix("_noncausal"): row["bpb"] for name, row in rows.items() if "bpb" in row}


def main(argv):
    o = configurator.args(OPTIONS, argv, __doc__, positive="windows eval_len batch_tokens")
    writable(o.out)
    idle = {"eval_len", "window_stride"} if not o.domains else {"windows", "seq_len"} if not o.data else set()
    if idle := sorted(idle & {arg[2:].partition("=")[0] for arg in argv}):
        die(f"--{idle[0]} would do nothing here: it needs {'--data' if o.domains else '--domains'}")
    reference = read_reference(o.reference) if o.reference else None
    model, state, device, facts = open_run(o)
    if model.cfg.arch != "decoder":
        way = "denoising" if model.cfg.arch == "encdec" else "embedding"
        die(f"arch={model.cfg.arch!r} predicts no next token; python -m eval.{way} --ckpt={o.ckpt} measures it")
    if not 0 < o.window_stride <= 1:
        die(f"--window_stride={o.window_stride}: a share of eval_len above 0, at most 1")
    seq_len = window_length(o, state, model.cfg)
    sets, results, began = {}, {}, time.time()
    if o.domains:
        tok, trained = load_tokenizer(o.ckpt), [path for path in sources(state).values() if Path(path, "manifest.json").is_file()]
        tok.encode = functools.cache(tok.encode)  # what is scored is then looked for in training shards
        sets |= domain_batches(o.domains, tok, min(o.eval_len, model.cfg.max_len), o.batch_tokens, stride=o.window_stride)
        expect_unseen(o.domains, tok, trained)
        facts["unseen_in"] = trained  # none of these texts is a document there; []: the shards that it was trained on are not here
    if o.data or not o.domains:
        windows = window_batches(o.ckpt, o.data, sources(state), seq_len, o.windows, o.batch_tokens)
        sets |= {f"{name}_split" if name in sets else name: batches for name, batches in windows.items()}
    if o.reference and len(sets) < 2:
        die(f"--reference={o.reference} would do nothing here: it compares domains, of which there is one")
    if len(sets) > 1:  # says now, not after the scoring, what the reference lacks
        mix.surprise({n: 1.0 for n, batches in sets.items() if any(b["bytes"] for b in batches)}, "bpb", reference)
    for name, batches in sets.items():
        start = time.time()
        results[name] = summary(*score(model, batches, device, name)) | {"seconds": round(time.time() - start, 2)}
    end = suffix(model)
    heads = ("nats/token", "95 % interval", "ppl", "bits/byte", "top-1", "top-5", "tokens", "s")
    print("{:<20} {:>10} {:>19} {:>10} {:>9} {:>6} {:>6} {:>11} {:>6}".format("domain" + end, *heads))
    for name, r in results.items():
        bpb = f"{r['bpb']:9.4f}" if "bpb" in r else f"{'-':>9}"
        line = f"{name:<20} {r['loss']:10.4f} {r['loss_low']:9.4f} {r['loss_high']:9.4f} {r['ppl']:10.2f} {bpb}"
        print(f"{line} {r['top1']:6.3f} {r['top5']:6.3f} {r['tokens']:11,} {r['seconds']:6.1f}")
    if not model.cfg.causal:
        print("this gate hears later tokens: none of these is a next-token likelihood")
    if len(results) > 1:
        for metric, ref in (("ppl", None), ("bpb", reference)):
            ratios = mix.surprise({n: r[metric] for n, r in results.items() if metric in r}, metric, ref)
            print(f"surprise by {metric}: " + ", ".join(f"{n} {ratio:.2f} {advice}" for n, (ratio, advice) in ratios.items()))
            for name, (ratio, advice) in ratios.items():
                results[name][f"surprise_{metric}"], results[name][f"advice_{metric}"] = ratio, advice
    write_json(o.out, facts | {"seconds": time.time() - began, "results": {name + end: r for name, r in results.items()}})


if __name__ == "__main__":
    main(sys.argv[1:])
