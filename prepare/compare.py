"""Tokenizers side by side, on named texts: how much they shorten, how fast, and what their ids cost to predict.

    python -m prepare.compare --tokenizers=data/bpe200k,data/superbpe200k --texts=data/val [--max_docs=2000] [--out=compare.json]
    python -m prepare.compare --tokenizers=out/plain,out/super --texts=data/val           # runs: what their models say, too

--texts takes jsonl, parquet or text files, a domain each. Columns: ids, chars and bytes per token, tokens, tokens saved against the
first tokenizer, bits per byte of a unigram model fitted on the odd documents and scored on the even ones (the fair comparison: a longer
token says more and is harder to guess), of the model where a run is named (the figure that decides), speed, round trip; above the tables,
how many words the tokens of the vocabulary span. Read next: prepare/superbpe.py, eval/perplexity.py."""

import itertools
import os
import re
import sys
import time
from collections import Counter

import numpy as np

import checkpoint
import configurator
import machine
import tokenizer
from configurator import die
from eval import perplexity
from files import writable, write_json
from prepare import sources


def texts_of(path, size, field, limit):
    """The documents of a file; a single one, as a plain text file is, in blocks of lines: one half is fitted on, one is scored."""
    every = ("".join(slices) for task, _ in sources.tasks([(path, size)]) for slices in sources.documents(task, Counter(), field))
    found = list(itertools.islice(filter(None, every), limit or None))
    if len(found) == 1:
        lines = found[0].splitlines(keepends=True)
        step = max(1, len(lines) // 100)
        found = ["".join(lines[i : i + step]) for i in range(0, len(lines), step)]
    if not found:
        die(f"{path}: no text in it (field '{field}'); --text_field=NAME says which holds it")
    if len(found) == 1:
        die(f"{path}: one document of one line cannot be halved, to fit a model and to score it; bring more text")
    return found


def names_of(paths):
    """c4_validation_2k.parquet is c4, unless another file would be, too."""
    short = [re.split(r"[_.]", os.path.basename(path))[0] for path in paths]
    return [name if name and short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def unigram_bits(coded, sizes, vocab):
    """Bits per byte of a unigram model with one count added for every id: fitted on odd documents, scored on even ones."""
    counts = np.ones(vocab)
    for ids in coded[1::2]:
        np.add.at(counts, ids, 1)
    bits = -np.log2(counts / counts.sum())
    return float(sum(bits[ids].sum() for ids in coded[::2]) / max(1, sum(sizes[::2])))


def words(tok):
    """{words: tokens of the vocabulary that span so many}."""
    plain = [b.decode("utf-8", "replace") for i, b in enumerate(tok.table) if b and i not in tok.special.values()]
    return dict(sorted(Counter(max(1, len(re.findall(r"\S+", t))) for t in plain).items()))


def open_model(path, device):
    """-> what scores texts, where `path` is a run and no folder of a tokenizer alone."""
    if not checkpoint.steps(path):
        return None
    model, _ = checkpoint.load(path, device=device)
    if model.cfg.arch != "decoder" or not model.cfg.causal:
        die(f"{path}: gives texts no likelihood, its arch is {model.cfg.arch} and its gate {model.cfg.gate}; name {path}/tokenizer")
    return model


def model_bits(model, tok, texts, device):
    """Bits per byte, every text alone as eval/perplexity.py scores it."""
    batches = perplexity.text_batches(texts, tok, min(2048, model.cfg.max_len))
    return perplexity.summary(*perplexity.score(model, batches, device))["bpb"]


def measure(tok, texts):
    sizes = [len(t.encode()) for t in texts]
    start = time.perf_counter()
    coded = [tok.encode_array(t) for t in texts]
    seconds = time.perf_counter() - start
    tokens = sum(map(len, coded))
    same = sum(tok.decode(ids.tolist()) == t for ids, t in zip(coded, texts, strict=True))
    return {"chars_per_token": sum(map(len, texts)) / tokens, "bytes_per_token": sum(sizes) / tokens, "tokens": tokens,
            "unigram_bits_per_byte": unigram_bits(coded, sizes, tok.vocab_size), "mb_per_s": sum(sizes) / 1e6 / seconds,
            "round_trip": same / len(texts)}  # fmt: skip


def main(argv):
    defaults = {"tokenizers": str, "texts": str, "text_field": "text", "max_docs": 2000, "device": "auto", "out": ""}
    o = configurator.args(defaults, argv, __doc__)
    writable(o.out)
    device, paths, found = machine.find(o.device).device, o.tokenizers.split(","), sources.find(o.texts, "texts")
    toks, models = [tokenizer.load(path) for path in paths], [open_model(path, device) for path in paths]
    every = [texts_of(path, size, o.text_field, o.max_docs) for path, size in found]  # what is missing is said before anything else
    result = {"tokenizers": [], "texts": {}}
    for tok in toks:
        spans = words(tok)
        print(tok)
        print("  words per token: " + ", ".join(f"{k}: {n:,}" for k, n in spans.items() if k <= 4 or n > 99))
        result["tokenizers"].append({"name": tok.name, "vocab_size": tok.vocab_size, "fingerprint": tok.fingerprint, "words": spans})
    for texts, name in zip(every, names_of([path for path, _ in found]), strict=True):
        rows = [measure(tok, texts) for tok in toks]
        for row, tok, model in zip(rows, toks, models, strict=True):
            row["model_bits_per_byte"] = model_bits(model, tok, texts, device) if model else None
        result["texts"][name] = {"documents": len(texts), "chars": sum(map(len, texts)), "rows": rows}
        print(f"\n{name}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")
        print(
            f"  {'':24} {'ids':>8} {'chars/tok':>9} {'bytes/tok':>9} {'tokens':>11} {'saved':>7} {'unigram b/B':>11}"
            f" {'model b/B':>9} {'MB/s':>6} round trip"
        )
        for tok, row in zip(toks, rows, strict=True):
            saved = 1 - row["tokens"] / rows[0]["tokens"]
            shown = "{chars_per_token:9.3f} {bytes_per_token:9.3f} {tokens:11,}".format(**row)
            bits = f"{row['model_bits_per_byte']:9.3f}" if row["model_bits_per_byte"] else f"{'-':>9}"
            shown += f" {saved:7.1%} {row['unigram_bits_per_byte']:11.3f} {bits} {row['mb_per_s']:6.1f} {row['round_trip']:.1%}"
            print(f"  {tok.name[:24]:24} {tok.vocab_size:8,} {shown}")
    if o.out:
        write_json(o.out, result)


if __name__ == "__main__":
    main(sys.argv[1:])
