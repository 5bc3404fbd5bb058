"""Text -> shards of tokens: local txt, jsonl, parquet, arrow, the standard library, or a hub dataset, on every core, resumable.

    python -m prepare.text --from=stdlib --out=data/stdlib
    python -m prepare.text --from='web/*.parquet,more.jsonl' --out=data/web --tokenizer=qwen.tiktoken --val=0.005
    python -m prepare.text --source=math --out=data/math --tokenizer=DIR            (streams; HF_TOKEN comes from the environment)
    python -m prepare.text --out=data/web --verify                                  (every hash; --check also decodes a sample)

A file of plain text is one document (or several, with --separator='\\n\\n'); a line of jsonl and a row of a table are one each. EOS ends
every document. A hash of its text decides whether a document is validation, so the same text is never on both sides; of two or more one is.
Read next: prepare/sources.py (reading), prepare/shards.py (writing, resuming), data.py (what training does with it)."""

import functools
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
from collections import Counter

import numpy as np

import configurator
import tokenizer
from configurator import die
from prepare import shards, sources, utf8

OPTIONS = {
    "from": "", "out": "", "tokenizer": "bytes", "text_field": "text", "separator": "", "val": 0.01, "val_from": "", "exclude": "",
    "min_chars": 0, "max_tokens": 0, "shard_tokens": 100_000_000, "workers": 0, "part": "0/1", "source": "", "dataset": "",
    "config": "", "split": "train", "verify": False, "check": False,
}  # fmt: skip
NOTES = """

--separator   text between documents of a plain text file ('\\n' a line each); without it a file is one document
--val         share of documents for validation, of two or more at least one; --val_from=FILES makes those the validation split instead
--exclude     files (as from prepare.val) whose texts must not be trained on: dropped and counted
--max_tokens  stop before the document that would exceed it (0: no limit)
--part        i/n: every n-th task of the input; n machines fill one --out, and the last to end writes what one job would have
--tokenizer   bytes, ids:N, a rank file, a tokenizer.json, a folder, or bpe:N: N ids learnt from the first 32 MB of what is trained on
--workers     processes (0: all cores); the output is the same for any number
--dataset     a name on the hub, streamed; dummy: 2,000 texts of sums, from nowhere and always the same, for a run that only has to run
--source      math, stem or code: the published mixture, as dataset, config, split, text_field and max_tokens; all: three directories
"""
SOURCES = {  # what the published run really used
    "math": {"dataset": "nvidia/Nemotron-CC-Math-v1", "config": "4plus", "text_field": "text", "max_tokens": 7_000_000_000},
    "stem": {"dataset": "openbmb/Ultra-FineWeb", "split": "en", "text_field": "content", "max_tokens": 2_500_000_000},
    "code": {"dataset": "lumees/github-code-2025-language-split", "config": "python", "text_field": "content", "max_tokens": 500_000_000},
}


def read(slices, write=None):
    """-> (hash of a text, its characters, its bytes, whether it is blank); `write` gets every slice of it on the way."""
    key, chars, nbytes, blank = hashlib.blake2b(digest_size=8), 0, 0, True
    for text in slices:
        raw = text.encode()
        key.update(raw)
        chars, nbytes, blank = chars + len(text), nbytes + len(raw), blank and not text.strip()
        if write:
            write(text)
    return key.digest(), chars, nbytes, blank


def unfit(o, chars, blank):
    return "blank" if blank else f"under {o.min_chars} characters" if chars < o.min_chars else ""


def is_val(key, limit):
    return int.from_bytes(key, "big") < limit


def limit_of(o, files, held_out):
    """What the hash of a held-out document lies below: --val of all hashes, or, where no document has one so low, just above the lowest.
    Reads up to the first that has, a hundred or so; whoever asks gets the same answer."""
    limit, keys = o.val * 2**64, set()
    for task, _ in sources.tasks(files, o.text_field, o.separator) if o.val else ():
        for slices in sources.documents(task, Counter(), o.text_field):
            key, chars, _, blank = read(slices)
            if not unfit(o, chars, blank) and key not in held_out:
                keys.add(key)
                if is_val(key, limit):
                    return limit
    return int.from_bytes(min(keys), "big") + 1 if len(keys) > 1 else limit  # a single text is for training


def encode(o, held_out, task, tok, out, count):
    """The job of a worker, see pool.work: every document of `task` is encoded, or dropped and counted."""
    docs, forced, broken = [], task[0] == "val", sources.repaired[0]
    for slices in sources.documents(task[1] if forced else task, count, o.text_field):
        start = out.tell()
        key, chars, nbytes, blank = read(slices, lambda text: out.write(tok.encode_array(text).astype("<u4").tobytes()))
        out.write(np.uint32(tok.eos_id).tobytes())
        count["repaired"] += sources.repaired[0] > broken
        broken, reason = sources.repaired[0], unfit(o, chars, blank)
        if reason or (not forced and key in held_out):
            count[reason or "held out"] += 1
            out.seek(start)
            out.truncate()
        else:
            docs.append(((out.tell() - start) // 4, nbytes, int(forced or is_val(key, o.limit))))
    return docs


def trained(o, local, held_out):
    """--tokenizer=bpe:4096: a plain byte-level BPE of that many ids, markers included, learnt from the training documents."""
    from prepare import superbpe

    size = o.tokenizer[4:]
    if not local or not size.isdigit() or int(size) < 259 or o.tokenizer[3] != ":":
        die(f"--tokenizer={o.tokenizer}: write bpe:8192 for 8,192 ids (259 or more), and --from=FILES to learn them from")

    def keep(text):
        return not is_val(key := read([text])[0], o.limit) and key not in held_out

    texts = superbpe.read(local, o.text_field, o.separator, 0, 32e6, keep)
    print(f"learning {size} ids from {len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f}M characters", flush=True)
    vocab, _ = superbpe.subwords(texts, int(size) - len(superbpe.MARKERS))
    with tempfile.TemporaryDirectory() as scratch:  # build() keeps it, once it knows that --out may be written
        return superbpe.save_ranks(vocab, scratch, o.tokenizer.replace(":", ""))


def dummy(skip):
    """The rows of --dataset=dummy, in one task: a pattern that a model of any kind learns in a minute."""
    rows = [{"text": "".join(f"{i} and {j} make {i + j}. " for j in range(i % 7, i % 7 + 12))} for i in range(skip, 2000)]
    return [(("given", rows), sum(len(row["text"]) for row in rows))] if rows else []


def report(out, manifest, seconds=0, read=0):
    wanted = manifest.get("settings", {})
    for split in ("train", "val"):
        mine = [s for s in manifest["shards"] if s["split"] == split]
        tokens, documents, nbytes = (sum(s[k] for s in mine) for k in ("tokens", "documents", "bytes"))
        ratio = f", {nbytes / tokens:.3f} bytes/token" if tokens else ""
        print(f"{split:5} {documents:>12,} documents {tokens:>15,} tokens {nbytes:>15,} bytes in {len(mine)} shards{ratio}")
    if tokens < 20_000 and (wanted.get("val") or wanted.get("val_from")):  # of val, the last; training refuses an empty one
        way = "give --val_from more text" if wanted.get("val_from") else "raise --val" if documents > 1 else "bring more documents"
        way += ", cut with --separator, or give --val_from=FILES" * bool("separator" in wanted and not wanted["val_from"])
        print(f"val holds {documents:,} documents, {tokens:,} tokens, few to measure with: remove {out}, then {way}")
    dropped = {k: n for k, n in manifest["dropped"].items() if n}
    print(f"counted: {', '.join(f'{n:,} {k}' for k, n in sorted(dropped.items())) or 'nothing blank, broken or dropped'}")
    print(f"{out}: {read / 1e6:.1f} MB in {seconds:.1f} s, {read / 1e6 / seconds:.1f} MB/s" if read else f"{out}: complete, nothing to do")


def check(o):
    """--verify: sizes and hashes of a prepared directory; --check: that and a sample, or, with --from, counts of the raw text."""
    if getattr(o, "from") and o.check:
        count, n, nbytes, longest = Counter(), 0, 0, 0
        for task, _ in sources.tasks(sources.find(getattr(o, "from")), o.text_field, o.separator):
            for slices in sources.documents(task, count, o.text_field):
                size = sum(len(text.encode()) for text in slices)
                n, nbytes, longest = n + 1, nbytes + size, max(longest, size)
        count["repaired characters"] = sources.repaired[0]
        return print(f"{n:,} documents, {nbytes:,} bytes, longest {longest:,}; {dict(count)}")
    import data

    manifest, tok = data.read_manifest(data.Path(o.out)), tokenizer.load(o.out)
    if tok.fingerprint != manifest["tokenizer"]["fingerprint"]:
        die(f"{o.out}/tokenizer is not the one of its manifest ({tok.fingerprint[:12]}): prepare {o.out} again")
    files = 0
    for split in dict.fromkeys(s["split"] for s in manifest["shards"]):
        found = data.Shards(o.out, split)
        files += found.verify()
        (start,), (size,) = found.documents(np.array([0]))
        ids = found.tokens(start, start + size) & 0x7FFFFFFF
        if ids.max() >= tok.vocab_size or ids[-1] != tok.eos_id:
            die(f"{o.out}: the first document of {split} does not end with id {tok.eos_id}, or has ids that {tok.name} lacks")
        if o.check:
            print(f"{split}: {tok.decode(ids[:40].tolist())!r} ... {tok.decode(ids[-8:].tolist())!r}")
    print(tok)
    report(o.out, manifest)
    print(f"{files} files hold what the manifest says")


def main(argv):
    o = configurator.args(OPTIONS, argv, __doc__ + NOTES, positive="shard_tokens")
    given = {arg[2:].partition("=")[0] for arg in argv}
    if o.source == "all":
        for name in SOURCES:
            rest = [arg for arg in argv if not arg.startswith(("--source", "--out"))]
            main([*rest, f"--source={name}", f"--out={os.path.join(o.out, name)}"])
        return
    if o.source:
        if o.source not in SOURCES:
            die(f"--source={o.source}: one of {', '.join(SOURCES)}, all")
        vars(o).update({k: v for k, v in SOURCES[o.source].items() if k not in given})
    o.separator = utf8.unescaped(o.separator)
    if o.verify or o.check:
        return check(o)
    local = getattr(o, "from")
    if not o.out or bool(local) == bool(o.dataset):
        die("give --out=DIR and either --from=FILES (or stdlib) or --dataset=NAME; --help lists every key")
    if o.val >= 1:
        die(f"--val={o.val} must be below 1: it is a share of the documents")
    part = re.fullmatch(r"(\d+)/(\d+)", o.part) or die(f"--part={o.part}: write i/n")
    this, parts = map(int, part.groups())
    if this >= parts or (parts > 1 and o.dataset):
        die(f"--part={o.part}: i/n with i < n, for local files")
    files, vals = (sources.find(spec, name) if spec else [] for name, spec in (("from", local), ("val_from", o.val_from)))
    tabled = [path.endswith(sources.LINES + sources.TABLES) for path, _ in files + vals]
    text_field = not o.exclude and tabled and not any(tabled)
    from_hub = files or o.dataset == "dummy", "a --dataset of the hub"
    needs = {"val": (vals, "no --val_from"), "config": from_hub, "split": from_hub}
    needs |= {"text_field": (text_field, "jsonl or tables"), "separator": (all(tabled) and not o.exclude, "files of plain text")}
    if idle := [key for key, (vain, _) in needs.items() if vain and key in given]:
        die(f"--{idle[0]} would do nothing here: it needs {needs[idle[0]][1]}")
    o.val = 0.0 if vals else o.val
    held = list(sources.tasks(vals + (sources.find(o.exclude, "exclude") if o.exclude else []), None, o.separator))
    fields = {o.text_field, "text"}  # the second is prepare.val's, whatever the training text calls its own
    held_out = frozenset(read(slices)[0] for f in fields for task, _ in held for slices in sources.documents(task, Counter(), f))
    if held and not held_out:
        die(f"--val_from={o.val_from} --exclude={o.exclude}: no text there in a field '{o.text_field}' or 'text'")
    o.limit = limit_of(o, files, held_out)
    if re.match(r"bpe:|bpe\d*$", o.tokenizer):
        tok = trained(o, local, held_out)
    else:
        tok = tokenizer.load(o.tokenizer)
    print(tok)

    def tasks(done, rows):
        if o.dataset:
            return dummy(rows) if o.dataset == "dummy" else sources.hub(o.dataset, o.config, o.split, rows)
        valid = ((("val", task), size) for task, size in sources.tasks(vals, o.text_field, o.separator))
        return itertools.islice(itertools.chain(sources.tasks(files, o.text_field, o.separator), valid), done, None)

    settings = {k: getattr(o, k) for k in ("from", "dataset", "config", "split", "text_field", "val", "val_from", "exclude", "min_chars")}
    settings |= {"separator": o.separator.decode(), "tokenizer": tok.fingerprint, "files": hash_of([files, vals, len(held_out)])}
    job, total = functools.partial(encode, o, held_out), sum(size for _, size in files + vals)
    result = shards.build(o.out, tok, tasks, job, settings, o.shard_tokens, o.max_tokens, 0, o.workers, (this, parts), total)
    report(o.out, *result) if result else print(f"{o.out}: part {o.part} is encoded; the last part to end writes the shards")


def hash_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main(sys.argv[1:])
