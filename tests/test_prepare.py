"""prepare.text: any input, any number of processes and any kill give the same shards; nothing is lost, doubled or on both sides."""

import gc
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib

import numpy as np
import pytest

import data
import files
import hub
import tokenizer
from prepare import chat, compare, factqa, parts, prompts, shards, sources, sts, superbpe, text, val
from prepare import tokenizer as converter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MARKED = "a <|endoftext|> b <|im_end|>"


def corpus(path, n=400, seed=0):
    """jsonl of n documents, every 50th one text again, some blank."""
    rng, lines = random.Random(seed), []
    for i in range(n):
        words = " ".join(rng.choice(["of", "the", "naïve", "日本", "x = 1\n", "🙂", MARKED]) for _ in range(rng.randrange(1, 60)))
        lines.append({"text": words if i % 50 else "the same again", "n": i} if i % 37 else {"text": " \n"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [line["text"] for line in lines]


def run(*args):
    text.main([a if a.startswith("--") else f"--{a}" for a in args])


def digests(folder):
    return {p: hashlib.sha256((folder / p).read_bytes()).hexdigest() for p in sorted(os.listdir(folder)) if (folder / p).is_file()}


def read(folder, split):
    """Every document of a split as text, its EOS checked and cut off."""
    found, tok = data.Shards(folder, split), tokenizer.load(folder)
    starts, sizes = found.documents(np.arange(found.n_documents))
    whole = [found.tokens(a, a + n).tolist() for a, n in zip(starts, sizes, strict=True)]
    assert all(ids[-1] == tok.eos_id and tok.eos_id not in ids[:-1] for ids in whole)
    return [tok.decode(ids[:-1]) for ids in whole]


def test_the_dummy_data_set_is_always_the_same_and_easy(tmp_path, dies):
    """No network and no file; a pattern that a model can learn; cut off in the middle it goes on, as any data set does."""
    run(f"--out={tmp_path / 'a'}", "--dataset=dummy", "--workers=1")
    run(f"--out={tmp_path / 'b'}", "--dataset=dummy", "--workers=2")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    texts = read(tmp_path / "a", "train") + read(tmp_path / "a", "val")
    assert len(texts) == len(set(texts)) == 2000 and all(" and " in found and len(found) > 100 for found in texts)
    assert len(zlib.compress("".join(texts).encode())) < 0.25 * sum(map(len, texts))
    assert [row["text"] for (_, rows), _ in text.dummy(1990) for row in rows] == [row["text"] for row in text.dummy(0)[0][0][1][1990:]]
    assert text.dummy(2000) == []
    dies(lambda: run(f"--out={tmp_path / 'c'}", "--dataset=dummy", "--split=validation"), "--split", "--dataset of the hub")
    dies(lambda: run(f"--out={tmp_path / 'c'}", "--dataset=dummy", "--separator=x"), "--separator", "files of plain text")


@pytest.fixture
def small(monkeypatch):
    for module in (sources, shards):
        monkeypatch.setattr(module, "CHUNK", 3000)


def test_every_text_once_and_no_text_on_both_sides(tmp_path, small, capsys):
    texts = corpus(tmp_path / "a.jsonl")
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/out", "val=0.2", "workers=1", "shard_tokens=5000")
    train, val = read(tmp_path / "out", "train"), read(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(t for t in texts if t.strip()) and not set(train) & set(val)
    assert 0.1 < len(val) / len(texts) < 0.3 and [t for t in texts if t in set(train)] == train  # and in their order
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = [s["name"] for s in manifest["shards"] if s["split"] == "train"]
    assert names == [f"train-{i:05d}" for i in range(len(names))] and len(names) > 3
    assert all(s["tokens"] <= 5000 for s in manifest["shards"]) and manifest["dropped"]["blank"] == 11
    assert sum(s["bytes"] for s in manifest["shards"]) == sum(len(t.encode()) for t in train + val)
    assert not [p for p in os.listdir(tmp_path / "out") if p.startswith(("progress", "scratch"))]
    before = digests(tmp_path / "out")
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/out", "val=0.2", "workers=1", "shard_tokens=5000")
    assert digests(tmp_path / "out") == before and "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # other settings never mix into the same directory
        run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/out", "val=0.3", "workers=1", "shard_tokens=5000")
    assert "another val" in capsys.readouterr().err


def test_a_few_documents_hold_one_out_whoever_reads_them(tmp_path, small):
    (tmp_path / "in").mkdir()
    for i in range(9):
        (tmp_path / "in" / f"{i}.txt").write_text(f"text number {i} " * 90)
    args = [f"from={tmp_path}/in", "val=1e-9", "tokenizer=bpe:259"]
    for out, more in (("1", ["workers=1"]), ("2", ["workers=2"]), ("p", ["part=0/2"]), ("p", ["part=1/2"])):
        run(*args, f"out={tmp_path}/{out}", *more)
    assert len(read(tmp_path / "1", "val")) == 1 and len(read(tmp_path / "1", "train")) == 8
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "p")
    for some, share, n in (("0", "1e-9", 0), ("*", "0", 0), ("[01]", "1e-9", 1)):  # a single text is for training
        run(f"from={tmp_path}/in/{some}.txt", f"val={share}", f"out={tmp_path}/{n}{share}{len(some)}", "workers=1")
        assert sum(s["documents"] for s in data.read_manifest(tmp_path / f"{n}{share}{len(some)}")["shards"] if s["split"] == "val") == n


def test_any_number_of_processes_gives_the_same_files(tmp_path, small):
    corpus(tmp_path / "a.jsonl")
    for n in (1, 2, 3):
        run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/{n}", "val=0.1", f"workers={n}", "shard_tokens=6000")
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3")


DYING = """
import os, sys
from prepare import shards, sources, text
shards.CHUNK = sources.CHUNK = 3000
shards.NOTE_EVERY = float(sys.argv[2])
add, left = shards.Writer.add, [int(sys.argv[1])]
def dying(self, *args):
    left[0] -= 1
    add(self, *args)
    if left[0] == 0:
        for f in self.files:
            f.flush()  # some of it reaches the disk, unnoted
        os.kill(os.getpid(), 9)
shards.Writer.add = dying
text.main(sys.argv[3:])
"""


def test_killed_in_the_middle_goes_on_to_the_same_bytes(tmp_path, small):
    corpus(tmp_path / "a.jsonl")
    args = [f"--from={tmp_path}/a.jsonl", "--val=0.1", "--shard_tokens=3000"]
    run(*args, f"out={tmp_path}/whole", "workers=1")
    for kill, every, workers in (5, 0, 1), (17, 0, 2), (30, 1e9, 1), (41, 0, 1):
        out = tmp_path / f"killed{kill}"
        end = [*args, f"--out={out}", f"--workers={workers}"]
        died = subprocess.run([sys.executable, "-c", DYING, str(kill), str(every), *end], cwd=ROOT, capture_output=True)
        assert died.returncode == -9 and not (out / "manifest.json").exists()
        assert (out / "progress.json").exists() == (every == 0)
        if kill == 17:  # killed again while going on
            assert subprocess.run([sys.executable, "-c", DYING, "9", "0", *end], cwd=ROOT, capture_output=True).returncode == -9
        (out / "tokenizer" / ".tmp-0-bytes.json").touch()  # killed as it saved the tokenizer
        run(*end)
        assert os.listdir(out / "tokenizer") == os.listdir(tmp_path / "whole" / "tokenizer")
        assert digests(out) == digests(tmp_path / "whole") and sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at processes in /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    corpus(tmp_path / "a.jsonl", n=60_000)
    parent = subprocess.Popen(
        [sys.executable, "-m", "prepare.text", f"--from={tmp_path}/a.jsonl", f"--out={tmp_path}/out", "--workers=2"],
        cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    children, deadline = [], time.monotonic() + 20
    while not (tmp_path / "out").exists() or len(children) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        children = open(f"/proc/{parent.pid}/task/{parent.pid}/children").read().split()
        time.sleep(0.01)
    parent.kill()
    parent.wait()

    def alive(pid):
        return os.path.exists(f"/proc/{pid}/stat") and open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"

    while any(map(alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_format_gives_the_same_documents(tmp_path, small):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [t for t in corpus(tmp_path / "a.jsonl") if t.strip()]
    raw = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    table = pa.table({"body": texts, "n": list(range(len(texts)))})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=150)
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "e.txt").write_bytes(b"\n--\n".join(t.encode() for t in texts))
    (tmp_path / "f").mkdir()
    for i, t in enumerate(texts):
        (tmp_path / "f" / f"{i:04d}.txt").write_bytes(t.encode())
    for name, more in [
        ("a.jsonl", []), ("b.jsonl.gz", []), ("c.parquet", ["text_field=body"]), ("d.arrow", ["text_field=body"]),
        ("e.txt", [r"separator=\n--\n"]), ("f", []),
    ]:  # fmt: skip
        run(f"from={tmp_path / name}", f"out={tmp_path}/out-{name}", "val=0", "workers=1", *more)
        assert read(tmp_path / f"out-{name}", "train") == texts


def test_broken_input_is_repaired_or_dropped_and_counted(tmp_path, capsys):
    lines = [
        b'{"text": "good"}',
        b'{"text": "b\xff\xfed"}',
        b"{broken",
        b'{"other": 1}',
        b'{"text": "\\ud800x"}',
        b"",
        b'{"text": null}',
        b"[1]",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(b"PNG\0" + bytes(range(256)))
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"\0" * 9))
    run(f"from={tmp_path}/*", f"out={tmp_path}/out", "val=0", "min_chars=2")
    assert read(tmp_path / "out", "train") == ["good", "b\ufffd\ufffdd", "\ufffdx"]
    dropped = json.loads((tmp_path / "out" / "manifest.json").read_text())["dropped"]
    found = {"repaired": 2, "not a JSON object": 2, "no text in 'text'": 2, "blank": 1, "binary file": 2}
    assert {k: n for k, n in dropped.items() if n} == found
    assert "2 repaired" in capsys.readouterr().out


def test_nothing_to_write_is_said_in_words_and_a_number_of_ids_that_is_named_works(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 40)  # a binary file of several ranges is one file
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "b.bin").write_bytes(b"\0\n" * 90)
    (tmp_path / "c.txt").write_text(" \n")
    for name, more, said in (
        ("a.jsonl", [], "(1 no text in 'text'); --text_field=NAME"), ("b.bin", ["separator=\\n"], "(1 binary file); --from needs files"),
        ("c.txt", [], "(1 blank); --from"), ("c.txt", ["tokenizer=bpe:300"], "no text in it to learn from"),
        ("c.txt", ["tokenizer=bpe300"], "write bpe:8192"), (__file__, ["tokenizer=bpe:9000"], "no more than --tokenizer=bpe:"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            run(f"from={tmp_path / name}", f"out={tmp_path}/{name[0]}", "val=0", "workers=1", *more)
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1, line
    most = re.search(r"--tokenizer=bpe:\d+", line)[0]
    run(f"from={__file__}", f"out={tmp_path}/out", "val=0", "workers=1", most[2:])


def test_a_long_line_and_a_long_file_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "LONG", 1000)
    long = "é日x <|endoftext|>" * 20_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": "after"}))
    (tmp_path / "b.txt").write_text(long, encoding="utf-8")
    run(f"from={tmp_path}/*", f"out={tmp_path}/out", "val=0", "workers=1", "shard_tokens=100")
    assert read(tmp_path / "out", "train") == [long, "after", long]
    assert [s["documents"] for s in data.Shards(tmp_path / "out", "train").infos] == [1, 1, 1]


def killed_once(o, held_out, task, tok, out, count):
    """The job of a worker whose machine runs out of memory, the first time: the flag is gone then."""
    flag = os.path.join(o.out, "kill-me")
    if os.path.exists(flag) and out.tell() == 0 and "b.txt" in str(task):
        os.unlink(flag)
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(o, held_out, task, tok, out, count)


encode = text.encode


def test_a_killed_worker_is_one_line_and_loses_nothing(tmp_path, small, monkeypatch, capfd):
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("a text that costs a worker its life")
    job = [f"from={tmp_path}/a.jsonl,{tmp_path}/b.txt", "val=0.1", "workers=2", "shard_tokens=4000"]
    run(*job, f"out={tmp_path}/one")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kill-me").touch()
    monkeypatch.setattr(text, "encode", killed_once)
    with pytest.raises(SystemExit) as stop:
        run(*job, f"out={tmp_path}/out")
    said = capfd.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "a worker process was killed" in said and "--workers=1" in said
    del stop  # its traceback holds the lock of the folder
    gc.collect()
    assert not (tmp_path / "out" / "manifest.json").exists() and not (tmp_path / "out" / "kill-me").exists()
    run(*job, f"out={tmp_path}/out")
    assert digests(tmp_path / "out") == digests(tmp_path / "one")


def test_cap_is_never_exceeded_and_exclusions_hold(tmp_path, small, monkeypatch):
    texts = corpus(tmp_path / "a.jsonl")
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/all", "val=0", "workers=1")
    sizes = [len(t.encode()) + 1 for t in texts if t.strip()]
    i = next(i for i in range(30, 99) if sizes[i] > sizes[i + 1] + 20)  # where one document does not fit and the next one would
    cap = f"max_tokens={sum(sizes[: i + 1]) - 1}"
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/cap", "val=0", "workers=1", cap)
    whole, cut = data.Shards(tmp_path / "all", "train"), data.Shards(tmp_path / "cap", "train")
    assert cut.n_tokens == sum(sizes[:i]) and np.array_equal(whole.tokens(0, cut.n_tokens), cut.tokens(0, cut.n_tokens))
    with monkeypatch.context() as patch:  # dies between the cap and the manifest
        write = shards.write_json
        patch.setattr(shards, "NOTE_EVERY", -1)
        patch.setattr(sources, "CHUNK", 1)  # a document is a task: the next one may well fit where this one did not
        patch.setattr(shards, "write_json", lambda path, value: 1 / 0 if "manifest" in path else write(path, value))
        with pytest.raises(ZeroDivisionError):
            run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/cap2", "val=0", "workers=1", cap)
        patch.setattr(shards, "write_json", write)
        run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/cap2", "val=0", "workers=1", cap)
    assert digests(tmp_path / "cap2")["train-00000.bin"] == digests(tmp_path / "cap")["train-00000.bin"]
    held = [t for t in texts if t.strip()][5:9]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in held))
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/ex", "val=0", f"exclude={tmp_path}/held.jsonl", "workers=2")
    assert not set(read(tmp_path / "ex", "train")) & set(held)
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/vf", f"val_from={tmp_path}/held.jsonl", "workers=1")
    assert read(tmp_path / "vf", "val") == held and not set(read(tmp_path / "vf", "train")) & set(held)


def test_parts_on_many_machines_write_what_one_job_writes(tmp_path, small, capsys, dies):
    corpus(tmp_path / "a.jsonl")
    args = [f"--from={tmp_path}/a.jsonl", "--val=0.1", "--workers=1", "--shard_tokens=4000"]
    run(*args, f"out={tmp_path}/one")
    for i in (2, 0, 2, 1):
        assert not (tmp_path / "out" / "manifest.json").exists()
        run(*args, f"out={tmp_path}/out", f"part={i}/3")
    assert digests(tmp_path / "out") == digests(tmp_path / "one") and sorted(os.listdir(tmp_path / "out")) == sorted(
        os.listdir(tmp_path / "one")
    )
    run(f"out={tmp_path}/out", "--verify")
    run(*args, f"out={tmp_path}/out", "part=0/3")
    assert "nothing to do" in capsys.readouterr().out
    for end, i in (("--max_tokens=20000", 0), ("--max_tokens=20000", 1)):  # another number of parts, and a cap
        run(*args, end, f"out={tmp_path}/two", f"part={i}/2")
    run(*args, "--max_tokens=20000", f"out={tmp_path}/cap")
    assert digests(tmp_path / "two") == digests(tmp_path / "cap")
    run(*args, f"out={tmp_path}/mix", "part=0/2")
    dies(lambda: run(*args[:-1], f"out={tmp_path}/mix", "part=1/2", "shard_tokens=9"), "another shard_tokens")


def test_parts_killed_and_at_once(tmp_path, small):
    corpus(tmp_path / "a.jsonl")
    args = [f"--from={tmp_path}/a.jsonl", "--val=0.1", "--workers=1", "--shard_tokens=4000"]
    run(*args, f"out={tmp_path}/one")
    parts = [[sys.executable, "-c", DYING, "0", "0", *args, f"--out={tmp_path}/out", f"--part={i}/3"] for i in range(3)]
    died = subprocess.Popen(parts[1], cwd=ROOT)
    while not list((tmp_path / "out").glob("parts/*.json")):
        assert died.poll() is None
    died.kill()
    died.wait()
    assert [p.wait() for p in [subprocess.Popen(part, cwd=ROOT) for part in parts]] == [0, 0, 0]
    assert digests(tmp_path / "out") == digests(tmp_path / "one")


def test_two_processes_on_one_directory_are_refused(tmp_path, dies):
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "out").mkdir()
    held = files.hold(tmp_path / "out" / ".lock")
    dies(lambda: run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/out", "workers=1"), "another process")
    held.close()
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/out", "workers=1")


def test_verify_finds_a_flipped_byte_and_check_shows_a_sample(tmp_path, capsys, dies):
    corpus(tmp_path / "a.jsonl")
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/out", "val=0.1", "workers=1")
    run(f"out={tmp_path}/out", "--check")
    assert "<|endoftext|>'" in capsys.readouterr().out
    run(f"from={tmp_path}/a.jsonl", "--check")
    assert "400 documents" in capsys.readouterr().out
    path = tmp_path / "out" / "train-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    dies(lambda: run(f"out={tmp_path}/out", "--verify"), "train-00000.bin")
    path.write_bytes(raw[:-4])
    with pytest.raises(SystemExit):
        run(f"out={tmp_path}/out", "--verify")


def test_a_full_disk_ends_in_one_line_and_goes_on(tmp_path, small):
    corpus(tmp_path / "a.jsonl")
    args = [f"--from={tmp_path}/a.jsonl", "--val=0.1", "--workers=1"]
    run(*args, f"out={tmp_path}/whole")
    limit = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); from prepare import text; text.main(sys.argv[1:])"
    )
    full = subprocess.run([sys.executable, "-c", limit, *args, f"--out={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 2 and full.stderr.count("\n") == 1 and "goes on" in full.stderr, full.stderr
    run(*args, f"out={tmp_path}/out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_learnt_tokenizer_never_saw_the_validation_text(tmp_path, monkeypatch):
    texts = corpus(tmp_path / "a.jsonl")
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/1", "tokenizer=bpe:300", "val=0.2", "workers=1")
    run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/2", "tokenizer=bpe:300", "val=0.2", "workers=2")
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert sorted(read(tmp_path / "1", "train") + read(tmp_path / "1", "val")) == sorted(t for t in texts if t.strip())
    tok, val = tokenizer.load(tmp_path / "1"), set(read(tmp_path / "1", "val"))
    assert tok.vocab_size == 300 and "<|im_end|>" in tok.special
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts if t not in val))
    run(f"from={tmp_path}/b.jsonl", f"out={tmp_path}/3", "tokenizer=bpe:300", "val=0", "workers=1")
    assert tokenizer.load(tmp_path / "3").fingerprint == tok.fingerprint


def test_a_learnt_tokenizer_belongs_to_its_shards(tmp_path, capsys):
    """Another one never enters a finished folder, and that of an attempt which wrote nothing does not stay."""
    texts, out = corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    job = [f"from={tmp_path}/a.jsonl", f"out={out}", "val=0", "workers=1"]
    with pytest.raises(SystemExit):
        run(*job, "text_field=body")
    assert (out / "tokenizer" / "bytes.json").exists()
    run(*job, "tokenizer=bpe:300")
    assert read(out, "train") == [t for t in texts if t.strip()] and tokenizer.load(out).vocab_size == 300
    before = digests(out / "tokenizer")
    with pytest.raises(SystemExit):
        run(*job, "tokenizer=bpe:280")
    assert "another tokenizer" in capsys.readouterr().err and digests(out / "tokenizer") == before


def test_what_is_held_out_may_name_its_text_otherwise(tmp_path):
    texts = [t for t in corpus(tmp_path / "held.jsonl") if t.strip()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in [*texts, "one more"]))
    job = [f"from={tmp_path}/a.jsonl", "text_field=body", "val=0", "workers=1"]
    run(*job, f"out={tmp_path}/out", f"exclude={tmp_path}/held.jsonl")
    assert read(tmp_path / "out", "train") == ["one more"]
    (tmp_path / "other.jsonl").write_text('{"colour": "red"}\n')
    with pytest.raises(SystemExit):
        run(*job, f"out={tmp_path}/none", f"exclude={tmp_path}/other.jsonl")


def test_parts_are_unpacked_beside_their_place(tmp_path, monkeypatch):
    def download(command, **how):
        scratch = command[command.index("-d") + 1]
        assert os.path.dirname(scratch) == str(tmp_path)
        shutil.copy(whl, scratch)
        return subprocess.CompletedProcess(command, 0)

    whl = tmp_path / "probe.whl"
    with zipfile.ZipFile(whl, "w") as box:
        box.writestr(zipfile.ZipInfo("inside/file.txt"), "text")
    known = {"mine": ("mine==1", "inside/", hashlib.sha256(whl.read_bytes()).hexdigest(), "")}
    monkeypatch.setattr(parts, "PARTS", known)
    monkeypatch.setattr(parts, "HERE", tmp_path)
    monkeypatch.setattr(parts.subprocess, "run", download)
    parts.fetch("mine")
    assert (tmp_path / "mine" / "file.txt").read_text() == "text"


def test_wrong_arguments_end_in_one_line(tmp_path, dies):
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.zst").write_bytes(b"packed")
    (tmp_path / "t.txt").write_text("a€b€c")
    for bad in [
        ["from=nowhere*", "out=x"], ["out=x"], [f"from={tmp_path}", "out=x", "val=1.5"], [f"from={tmp_path}", "out=x", "part=3/3"],
        [f"from={tmp_path}", "out=x", "tokenizer=nowhere"], ["source=poems", "out=x"], [f"from={tmp_path}", "out=x", "tokenizer=bpe:9"],
        [f"from={tmp_path}", f"out={tmp_path}/o", "text_field=body", "workers=1"], [f"out={tmp_path}/none", "--verify"],
        [f"from={tmp_path}/b.jsonl.zst", f"out={tmp_path}/z", "workers=1"], [f"from={tmp_path}/t.txt", "out=x", "separator=\\x"],
        [f"from={tmp_path}/a.jsonl", "out=x", "separator=;"], [f"from={tmp_path}/t.txt", "out=x", "text_field=body"],
        [f"from={tmp_path}/t.txt", "out=x", "split=train"], [f"from={tmp_path}/t.txt", "out=x", "val=0.1", f"val_from={tmp_path}/a.jsonl"],
    ]:  # fmt: skip
        dies(lambda: run(*bad))
    for sign in ("€", "\\u20ac"):
        run(f"from={tmp_path}/t.txt", f"out={tmp_path}/{len(sign)}", f"separator={sign}", "val=0", "workers=1")
        assert read(tmp_path / str(len(sign)), "train") == ["a", "b", "c"]


def test_the_tokenizer_of_a_run_is_never_replaced(tmp_path, dies):
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    dies(lambda: run(f"from={tmp_path}/a.jsonl", f"out={tmp_path}/run", "workers=1"), f"{tmp_path}/run: holds a run", "--out")
    dies(lambda: shards.write(str(tmp_path / "run"), {"train": [np.arange(9)]}, "ids:9"), f"{tmp_path}/run: holds shards, a run")
    assert not os.listdir(tmp_path / "run" / "tokenizer")


def test_other_commands_refuse_before_they_write(tmp_path, capsys, dies):
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "sts-train.csv").write_text("a\tb\n")
    a, out = f"{tmp_path}/a.jsonl", f"--out={tmp_path}/out"
    dies(lambda: val.main([f"--from={tmp_path}/none.jsonl", out]), "none.jsonl: no text")
    dies(lambda: val.main([f"--from={a}", out, "--max_rows=-3"]), "--max_rows=-3")  # it took the last three away
    dies(lambda: sts.main([f"--from={tmp_path}", out]), "sts-train.csv")
    dies(lambda: chat.main([f"--from={a}", out, "--tokenizer=bytes", "--split=x"]), "--split=x would do nothing")
    dies(lambda: factqa.main([out, "--bpe=400"]), "--bpe=400 would do nothing", "--shards")
    dies(lambda: superbpe.main([f"--from={a}", out, "--vocab=400", "--transition=300", "--separator=\\x"]), "--separator")
    for wrong, word in (
        (f"texts={tmp_path}/gone", "gone"),
        (f"texts={tmp_path}/none.jsonl", "--text_field"),
        (f"texts={a}", "is a folder"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            compare.main(["--tokenizers=bytes", f"--{wrong}", f"--out={tmp_path}/{'' if word == 'is a folder' else 'c.json'}"])
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and word in said.err
    assert not (tmp_path / "out").exists()


def test_standard_library_is_a_corpus_everywhere():
    files = sources.find("stdlib")
    assert sum(size for _, size in files) > 5e6 and not any("/test/" in f or "site-packages" in f for f, _ in files)
    assert sum(size for _, size in sources.tasks(files)) == sum(size for _, size in files)


CHATS = [
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi <|im_end|>"},
                  {"role": "assistant", "content": "see <|im_start|>x<|endoftext|> 日本", "reasoning_content": "no"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "last"}]},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
    {"question": "2+2?", "answer": "4"},
    {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]},
    {"messages": [{"role": "user", "content": "nobody answers"}]},
    {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "y"}]},
    {"messages": ["no dict"]},
    {"text": "no chat"},
    {"question": "long " * 99, "answer": "4"},
]  # fmt: skip
ANSWERS = ["see <|im_start|>x<|endoftext|> 日本{end}\n{eos}", "b{end}\n", "3{end}\n{eos}", "r{end}\n{eos}", "4{end}\n{eos}"]


def test_chat_trains_on_the_assistant_alone(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    marked = tmp_path / "marked"
    run(f"from={tmp_path}/a.jsonl", f"out={marked}", "tokenizer=bpe:260", "text_field=question", "val=0")
    for name in "bytes", str(marked):
        out = tmp_path / f"out-{name[-4:]}"
        chat.main([f"--from={tmp_path}/a.jsonl", f"--out={out}", f"--tokenizer={name}", "--val=0", "--max_len=200", "--workers=1"])
        found, tok = data.Shards(out, "train"), tokenizer.load(out)
        starts, sizes = found.documents(np.arange(found.n_documents))
        rows = [found.tokens(a, a + n) for a, n in zip(starts, sizes, strict=True)]
        end = "<|im_end|>"
        for ids, answer in zip(rows, ANSWERS, strict=True):
            assert tok.decode(ids[ids < 1 << 31].tolist()) == answer.format(end=end, eos="<|endoftext|>")
            plain = (ids & 0x7FFFFFFF).tolist()
            assert ids[0] >= 1 << 31 and plain.count(tok.eos_id) == 1
            if end in tok.special:  # what is said inside a message never opens or closes one
                assert plain.count(tok.special["<|im_start|>"]) == plain.count(tok.special[end]) in (2, 3)
        asked = prompts.chat_ids(tok, CHATS[0]["messages"][:2])  # sampling asks in the very form that was trained
        assert asked == (rows[0] & 0x7FFFFFFF).tolist()[: len(asked)] and (rows[0][: len(asked)] >= 1 << 31).all()
        assert rows[0][len(asked)] < 1 << 31
        whole = tok.decode((rows[0] & 0x7FFFFFFF).tolist())
        said = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
        assert whole == said + ANSWERS[0].format(end=end, eos="<|endoftext|>")
        dropped = json.loads((out / "manifest.json").read_text())["dropped"]
        assert sorted(n for n in dropped.values() if n) == [1, 1, 1, 1, 2] and dropped["over 200 tokens"] == 1
        assert "the assistant's" in capsys.readouterr().out
        about, again = json.loads((out / "manifest.json").read_text()), [f"--out={out}", f"--tokenizer={name}", "--val=0", "--max_len=200"]
        assert about["trained"] == sum(int((ids < 1 << 31).sum()) for ids in rows)
        chat.main([f"--from={tmp_path}/a.jsonl", *again])
        assert json.loads((out / "manifest.json").read_text()) == about and f"trained: {about['trained']} of" in capsys.readouterr().out
    chat.main([f"--from={tmp_path}/a.jsonl", f"--out={tmp_path}/two", "--tokenizer=bytes", "--val=0", "--max_examples=2"])
    assert data.Shards(tmp_path / "two", "train").n_documents == 2


def test_streamed_dataset_resumes_by_rows(tmp_path, small, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    texts = corpus(tmp_path / "set" / "train.jsonl")
    args = [f"--dataset={tmp_path}/set", "--val=0.1", "--max_tokens=40000"]
    run(*args, f"out={tmp_path}/whole", "workers=2")
    got = [t for split in ("train", "val") for t in read(tmp_path / "whole", split)]
    assert 35_000 < sum(len(t.encode()) + 1 for t in got) <= 40_000 and set(got) < set(texts)
    end = [*args, f"--out={tmp_path}/killed", "--workers=1"]
    assert subprocess.run([sys.executable, "-c", DYING, "9", "0", *end], cwd=ROOT, capture_output=True).returncode == -9
    assert json.loads((tmp_path / "killed" / "progress.json").read_text())["rows"] > 20
    run(*end)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_arrays_of_ids_become_shards_that_train_and_write(tmp_path, dies, capsys):
    """What is no text, from numpy to a run: the stream gives the ids back, numbers are the prompt and the answer."""
    import sample
    import train as train_run

    out, rng = tmp_path / "moves", np.random.default_rng(0)
    docs = [np.append(rng.integers(0, 300, 40), 300).astype(kind) for kind in ("u2", "<i4", "<u4", "<i8") * 3]
    docs[2][1] += data.UNTRAINED
    shards.write(str(out), {"train": docs[:9], "val": iter(docs[9:])}, "ids:300", shard_tokens=100)
    train = data.Shards(out, "train")
    assert train.verify() == 2 * 5 and (train.tokens(0, 9 * 41) == np.concatenate([d.astype("<u4") for d in docs[:9]])).all()
    tok = tokenizer.load(out)
    assert tok.encode("12 7 299, 300") == [12, 7, 299] and tok.decode([12, 7]) == " 12 7" and (tok.vocab_size, tok.eos_id) == (301, 300)
    assert tok.fingerprint == train.tokenizer["fingerprint"] != tokenizer.load("ids:299").fingerprint
    text.main([f"--out={out}", "--verify"])
    size = ["--vocab_size=301", "--n_layer=1", "--n_head=2", "--d_model=16", "--seq_len=32", "--tokens_per_step=64", "--max_steps=2"]
    train_run.main([f"--data={out}", f"--out={tmp_path / 'run'}", "--device=cpu", *size])
    capsys.readouterr()
    sample.main([f"--ckpt={tmp_path / 'run'}", "--prompt=5 6", "--max_new_tokens=3", "--device=cpu", "--seed=1"])
    assert re.fullmatch(r"5 6( \d+){1,3}\n", capsys.readouterr().out)
    hub.main(["export", f"--ckpt={tmp_path / 'run'}", "--to=transformers", f"--out={tmp_path / 'hf'}"])  # a model, and no tokenizer
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 300 and not list(tmp_path.glob("hf/*token*"))
    dies(lambda: converter.main([f"--from={out}"]), "ids:300: numbers and no text")
    pairs = ["--arch=encoder", "--objective=contrast", "--contrast_pairs=2", "--contrast_micro=2"]
    train_run.main([f"--data={out}", f"--out={tmp_path / 'enc'}", "--device=cpu", *pairs, *size[:4], "--max_steps=1"])
    to = ["--to=sentence-transformers", f"--out={tmp_path / 'st'}"]
    dies(lambda: hub.main(["export", f"--ckpt={tmp_path / 'enc'}", *to]), "numbers and no text")
    assert not (tmp_path / "st").exists()
    dies(lambda: shards.write(str(out), {"train": docs}, "ids:300"), "holds shards, a run")
    for odd in (np.arange(301), np.array([-1]), np.array([1 << 32]), np.array([0.5]), np.zeros((2, 2), int), np.array([], int)):
        splits = {"train": docs[:1], "val": [odd + (odd.size == 301)]}
        dies(lambda splits=splits: shards.write(str(tmp_path / "odd"), splits, "ids:300"), "val: ")
    for splits, said in (({"tran": docs}, "not tran"), ({}, "not none"), ({"train": docs, "val": []}, "val has no document")):
        dies(lambda splits=splits: shards.write(str(tmp_path / "odd"), splits, "ids:300"), said)
