"""Files from elsewhere, damaged or malicious: text, tables, archives, tokenizers, weights. Each is read correctly or refused in one line.

    python -m pytest tests/test_fuzz.py                some seconds
    FUZZ=20 python -m pytest tests/test_fuzz.py        twenty times as many mutations

Shards, checkpoints, safetensors and manifests are in test_faults.py, which also holds `mutate` and `refused`.
"""

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_faults import Bomb, mutate, refused

import data
import hub
import tokenizer
from prepare import sources, text, utf8

ROOT = Path(text.__file__).parents[1]
ROUNDS = int(os.environ.get("FUZZ", 1))


@contextlib.contextmanager
def within(seconds):
    """What hangs is an error, and one that no reader may take for its own."""

    def late(*_):
        raise KeyboardInterrupt(f"no answer within {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def figure(record_property, text):
    if "FUZZ" in os.environ:
        record_property("figure", text)


def written(folder):
    """Every document of the split train as text."""
    if not any(s["split"] == "train" and s["tokens"] > 1 for s in data.read_manifest(folder)["shards"]):
        return []
    found, tok = data.Shards(folder, "train"), tokenizer.load(folder)
    starts, sizes = found.documents(np.arange(found.n_documents))
    return [tok.decode(found.tokens(a, a + n).tolist()[:-1]) for a, n in zip(starts, sizes, strict=True)]


def prepare(source, out, *more):
    text.main([f"--from={source}", f"--out={out}", "--val=0", "--workers=1", *more])
    return written(out)


def expected(lines):
    """What a reader of jsonl must find, said once more and simply."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line.decode("utf-8", "replace"))
            if isinstance(row, dict) and isinstance(row.get("text"), str) and row["text"].strip():
                found.append(row["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return found


ODD = ["plain", "naïve 日本 🙂", 'a\nb\t\\"', "\u2028\x00\x1f", "<|endoftext|>", "x" * 3000, "\ufffd", "é" * 700]
ENTRIES = [
    b'{"text": "\\ud83d\\ude42 \\ud800 \\udc80"}', b'{"text": "\xed\xa0\x80 \xff\xfe"}', b'{"text": "a", "text": "b"}',
    b'{"t\xc3\xa9xt": 1}',
    b'{"text": 1e999}', b'{"text": NaN}', b"NaN", b"[" * 5000, b"\xef\xbb\xbf{}", b"\0" * 40, b'{"text": "' + b"9" * 5000 + b'"}',
]  # fmt: skip
BYTES = [b"a ", b"\n", "é".encode(), "日".encode(), "🙂".encode(), b"\xff", b"\xf0\x9f", b"\x80"]


@pytest.mark.parametrize("long", [1 << 18, 100])
def test_jsonl_of_any_content(tmp_path, monkeypatch, capsys, record_property, long):
    """Every line that is an object with a text is written as it stands, every other one is counted; lines over `long` go another way."""
    monkeypatch.setattr(sources, "LONG", long)
    rng, seen = random.Random(long), Counter()
    for i in range(25 * ROUNDS):
        lines = [json.dumps({"n": rng.random(), "text": rng.choice(ODD)}, ensure_ascii=rng.random() < 0.5).encode() for _ in range(12)]
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(lines))
            lines[at] = rng.choice(ENTRIES) if rng.random() < 0.4 else mutate(lines[at], rng)
        raw = b"\n".join(lines)
        (tmp_path / "a.jsonl").write_bytes(raw)
        with within(20):
            found = refused(capsys, lambda: prepare(tmp_path / "a.jsonl", tmp_path / f"o{i}"))  # noqa: B023
        assert found == expected(raw.split(b"\n")), i
        seen.update(json.loads((tmp_path / f"o{i}" / "manifest.json").read_text())["dropped"])
    assert min(seen["not a JSON object"], seen["no text in 'text'"], seen["repaired"]) > 1
    figure(record_property, f"{25 * ROUNDS} files of jsonl: each as a plain reader sees it; {dict(seen)}")


def test_text_that_is_cut_anywhere_is_decoded_as_if_it_were_whole(monkeypatch):
    monkeypatch.setattr(utf8, "LONG", 5)
    rng = random.Random(0)
    for _ in range(150 * ROUNDS):
        raw = b"".join(rng.choice(BYTES) for _ in range(30))
        before, whole = utf8.repaired[0], raw.decode("utf-8", "replace")
        cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(4))
        parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        assert "".join(utf8.texts(parts)) == whole
        assert utf8.repaired[0] - before == whole.count("\ufffd")


@pytest.mark.parametrize("body", [b"ab " * 1_350_000 + "🙂".encode() + b"\\ud83d\\ude42", "🙂".encode() * 1_000_000, b"\xff" * 4_000_000])
def test_memory_of_a_long_line(tmp_path, body):
    """4 MB of a line take less than 45 MB above those of the interpreter; 100 MB, then, less than 1 GB."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + body + b'"}\n{"text": "after"}\n')
    act = (
        "import resource, sys; from prepare import text; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10;"
        "base = peak(); text.main(sys.argv[1:]); print('PEAK', peak() - base)"
    )
    command = [sys.executable, "-c", act, f"--from={tmp_path}/a.jsonl", f"--out={tmp_path}/o", "--val=0", "--workers=1"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(said.split("PEAK")[1]) < 45
    shards = data.Shards(tmp_path / "o", "train")
    assert (
        shards.tokens(0, shards.n_tokens - 7).astype(np.uint8).tobytes()
        == json.loads(b'"' + body.decode("utf-8", "replace").encode() + b'"').encode()
    )


def test_a_line_beyond_the_limit_is_counted_and_its_neighbours_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 1 << 20)
    for extra in (-1, 0, 1, 1 << 20):  # bytes, its line feed included, more than the limit
        body = b'{"text": "' + b"x" * ((1 << 20) + extra - 13) + b'"}\n'
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + body + b'{"text": "after"}\n')
        found = prepare(tmp_path / "a.jsonl", tmp_path / f"o{extra}")
        assert [t[:6] for t in found] == ["before", *(["xxxxxx"] if extra <= 0 else []), "after"]
        assert json.loads((tmp_path / f"o{extra}" / "manifest.json").read_text())["dropped"].get("lines over 1 MB", 0) == (extra > 0)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.gz", "txt.gz"])
def test_tables_and_archives_of_any_content(tmp_path, capsys, record_property, kind):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng, kept, source = random.Random(kind), 0, tmp_path / f"a.{kind}"
    texts = [f"{i} {rng.choice(ODD)}".replace("\0", "\0" * (kind != "txt.gz")) for i in range(60)]  # with a zero byte a file is binary
    table, file = pa.table({"text": texts, "n": list(range(60))}), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, file, row_group_size=25, write_page_checksum=True)
    elif kind == "arrow":
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    else:
        lines = [json.dumps({"text": t}) for t in texts] if kind == "jsonl.gz" else texts
        file.write(gzip.compress("\n".join(lines).encode(), mtime=0))
    good, rounds = file.getvalue(), 30 * ROUNDS
    source.write_bytes(good)
    whole = prepare(source, tmp_path / "whole")
    assert whole == (texts if kind != "txt.gz" else ["\n".join(texts)])
    for i in range(rounds):
        source.write_bytes(mutate(good, rng))
        with within(20):
            found = refused(capsys, lambda: prepare(source, tmp_path / f"o{i}"))  # noqa: B023
        kept += found is not None
        if kind != "arrow":  # its bytes are under checksums
            assert not set(found or ()) - set(whole), i
    assert kept < rounds
    figure(record_property, f"{kind}: {rounds} mutations, {kept} read, the others refused in one line")


# ---- tokenizers and weights ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The files of a small byte-level BPE: tokenizer.json, and the same as ranks."""
    from prepare import superbpe

    dir = tmp_path_factory.mktemp("tokenizer")
    vocab, _ = superbpe.subwords([" the thin 12 thing, then some " * 20], 260)
    superbpe.save_ranks(vocab, str(dir), "small")
    assert {p.suffix for p in dir.iterdir()} >= {".tiktoken", ".json"}
    return dir


def test_tokenizers_of_any_content(tmp_path, capsys, record_property, vocabulary):
    from prepare import tokenizer as converter

    converter.main([f"--from={vocabulary}", f"--out={tmp_path}/json"])
    for folder in (vocabulary, tmp_path / "json"):
        for file in sorted(folder.iterdir()):
            rng, good, kept = random.Random(file.name), file.read_bytes(), 0
            for _ in range(15 * ROUNDS):
                file.write_bytes(mutate(good, rng))
                with within(20):
                    act = lambda: (tok := tokenizer.load(folder)) and (tok.encode("the thin 12 <|endoftext|>"), tok.fingerprint)  # noqa: B023, E731
                    kept += refused(capsys, act) is not None
            file.write_bytes(good)
            figure(record_property, f"{file.name}: {15 * ROUNDS} mutations, {kept} read, the others refused in one line")


def imported(source, out):
    hub.main(["import", f"--from={source}", f"--out={out}"])
    return True


def weights(tmp_path, kind):
    if kind == "gguf":
        pytest.importorskip("gguf", reason="pip install prism[export]: gguf reads llama.cpp files")
        from test_hub import FAMILIES, small_bpe, theirs, write_gguf

        bpe = small_bpe()
        FAMILIES["fuzz"] = (FAMILIES["smollm2"][0], FAMILIES["smollm2"][1] | {"vocab_size": len(bpe[0])}, torch.float32)
        model = theirs("fuzz")
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
        write_gguf(tmp_path / "in" / "a.gguf", model, "llama", bpe)
        return tmp_path / "in" / "a.gguf"
    from test_hub import published

    torch.save({"model": published(), "step": 3, "tau": 0.1}, tmp_path / "in" / "a.pt")
    return tmp_path / "in" / "a.pt"


@pytest.mark.parametrize("kind", ["gguf", "pt"])
def test_weights_of_any_content(tmp_path, capsys, record_property, kind):
    """Headers above all: half of the mutations fall into the first 3,000 bytes, and into the last ones, where a zip has its directory."""
    (tmp_path / "in").mkdir()
    source, rng, kept = weights(tmp_path, kind), random.Random(kind), 0
    good = source.read_bytes()
    assert imported(source, tmp_path / "out")
    for _ in range(25 * ROUNDS):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        head, tail = rng.choice([(3000, 0), (0, 3000), (len(good), 0)])
        bad = mutate(good[:head], rng) + good[head:] if head else good[:-tail] + mutate(good[-tail:], rng)
        source.write_bytes(bad)
        with within(30):
            kept += refused(capsys, lambda: imported(source, tmp_path / "out")) is not None
    figure(record_property, f"{kind}: {25 * ROUNDS} mutations, {kept} read, the others refused in one line")
    assert kept < 25 * ROUNDS and sorted(p.name for p in tmp_path.iterdir() if p.name != "out") == ["in"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == [source.name]


def test_a_pickle_that_would_act_is_refused_unopened(tmp_path, capsys):
    for name, what in ("model", Bomb(tmp_path / "boom")), ("step", Bomb(tmp_path / "boom")):
        torch.save({"model": {}, name: what}, tmp_path / "a.pt")
        assert refused(capsys, lambda: imported(tmp_path / "a.pt", tmp_path / "out")) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]
