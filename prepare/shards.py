"""Tasks -> shards, on every core, the same bytes for any number of them, and resumable after kill -9.

Workers encode one task each into a temporary file; this process copies those, in order, into train-00000.bin, val-00000.bin, ... of at
most `shard_tokens` tokens, and notes every few seconds, in progress.json, up to where everything is on disk. A run that died is started
again with the same command: the open shards are cut back to that note and go on. manifest.json is written last: without it the
directory is no data set. The format is described at `data.Shards`, which reads it."""

import collections
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

import tokenizer
from configurator import die
from prepare.sources import CHUNK

NOTE_EVERY = 2.0  # seconds
worker = {}  # what a worker process holds: the job, the tokenizer, the folder for its files


def begin(job, folder, scratch):
    worker.update(job=job, tok=tokenizer.load(folder), scratch=scratch)


def begin_process(*what):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism: no pool of threads in each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    parent = multiprocessing.parent_process()  # and if it is killed, nobody would
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    begin(*what)


def work(number, task):
    """job(task, tok, out, count) writes uint32 ids to `out` -> [(tokens, bytes, split)] of its documents, split 0 train, 1 val."""
    count = collections.Counter()
    with open(os.path.join(worker["scratch"], str(number)), "wb") as out:
        docs = worker["job"](task, worker["tok"], out, count)
    return np.array(docs, dtype=np.int64).reshape(-1, 3), count


class Writer:
    """The open shard of one split, and the list of those that are done."""

    def __init__(self, out, split, first, limit, state):
        self.out, self.split, self.first, self.limit = out, split, first, limit
        self.done, (self.tokens, self.documents, self.bytes) = state or ([], (0, 0, 0))
        self.open()

    def open(self):
        self.name = f"{self.split}-{self.first + len(self.done):05d}"
        self.files, self.hashes = [], []
        for kind, size in ("bin", 4 * self.tokens), ("idx", 8 * (self.documents + 1) if self.documents else 0):
            path = os.path.join(self.out, f"{self.name}.{kind}")
            if size and os.path.getsize(path) < size:
                die(f"{path} is shorter than its own progress note: remove {self.out} and begin again")
            file = open(path, "r+b" if size else "w+b", buffering=1 << 20)
            file.truncate(size)  # what a killed run wrote after its last note
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            self.files.append(file)
            self.hashes.append(digest)
        if not self.documents:
            self.put(1, np.zeros(1, "<u8").tobytes())

    def put(self, which, data):
        self.files[which].write(data)
        self.hashes[which].update(data)

    def add(self, source, lengths, nbytes):
        """The next len(lengths) documents of the file `source`. A shard ends where the next document does not fit."""
        while len(lengths):
            ends = self.tokens + np.cumsum(lengths)
            fit = int(np.searchsorted(ends, self.limit, "right")) or (not self.tokens)  # one longer than a shard has its own
            for start in range(0, 4 * int(lengths[:fit].sum()), 1 << 20):
                self.put(0, source.read(min(1 << 20, 4 * int(lengths[:fit].sum()) - start)))
            self.put(1, ends[:fit].astype("<u8").tobytes())
            self.tokens, self.documents = int(ends[fit - 1]) if fit else self.tokens, self.documents + fit
            self.bytes += int(nbytes[:fit].sum())
            lengths, nbytes = lengths[fit:], nbytes[fit:]
            if len(lengths):
                self.close()
                self.open()

    def note(self):
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        return self.done, (self.tokens, self.documents, self.bytes)

    def close(self):
        self.note()
        for file in self.files:
            file.close()
        if self.documents:
            entry = {"name": self.name, "split": self.split, "tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
            self.done.append(entry | {f"sha256_{k}": h.hexdigest() for k, h in zip(("bin", "idx"), self.hashes, strict=True)})
        else:
            for file in self.files:
                os.unlink(file.name)
        self.tokens = self.documents = self.bytes = 0


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(path, value):
    """Whole or not at all, and after the files that it speaks of: their names, too, must outlive a power cut."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, sort_keys=True)
    sync(path + ".tmp")
    sync(os.path.dirname(path))
    os.replace(path + ".tmp", path)
    sync(os.path.dirname(path))


def build(out, tok, tasks, job, settings, shard_tokens, max_tokens=0, max_documents=0, workers=0, part=(0, 1), total=0):
    """-> (manifest, seconds, bytes read now). `tasks(done, rows)` yields (task, bytes of input) from this part's task number `done`
    on; `settings` is all that decides the output."""
    mark = "-{}-of-{}".format(*part) if part[1] > 1 else ""
    note_path, manifest_path = os.path.join(out, f"progress{mark}.json"), os.path.join(out, f"manifest{mark}.json")
    settings = json.loads(
        json.dumps(settings | {"shard_tokens": shard_tokens, "max_tokens": max_tokens, "max_documents": max_documents, "parts": part[1]})
    )
    note = {"settings": settings, "tasks": 0, "rows": 0, "count": {}, "writers": [None, None]}
    if path := next((p for p in (manifest_path, note_path) if os.path.exists(p)), None):
        note = json.loads(tokenizer.read(path))
        if other := [k for k in settings if note.get("settings", {}).get(k) != settings[k]]:
            die(f"{out} was written with another {', '.join(other)}: choose another --out, or remove it")
        if path == manifest_path:
            return note, 0, 0
    os.makedirs(out, exist_ok=True)
    tok.save(folder := os.path.join(out, "tokenizer"))
    for path in (*(os.path.join(folder, name) for name in os.listdir(folder)), folder, os.path.dirname(os.path.abspath(out))):
        sync(path)
    for old in glob.glob(os.path.join(out, f"scratch{mark}.*")):
        shutil.rmtree(old)
    scratch = os.path.join(out, f"scratch{mark}.{os.getpid()}")
    os.mkdir(scratch)
    first = part[0] * 100_000 if part[1] > 1 else 0
    writers = [Writer(out, split, first, shard_tokens, state) for split, state in zip(("train", "val"), note["writers"], strict=True)]
    count = collections.Counter(note["count"])
    seen = sum(sum(s["tokens"] for s in w.done) + w.tokens for w in writers)
    workers = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    workers = min(workers, total // CHUNK + 1) if total else workers
    bar = tqdm(total=total or None, unit="B", unit_scale=True, disable=None, desc=os.path.basename(os.path.normpath(out)))
    what = (job, folder, scratch)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_process, what) if workers > 1 else None
    waiting, started, noted, read, full = collections.deque(), time.monotonic(), time.monotonic(), 0, False

    def take(number, task, size, result):
        """Append the next task's documents; -> whether max_tokens leaves no room for one of them."""
        nonlocal seen, noted, read
        docs, counted = result.result() if pool else result
        fit = int(np.searchsorted(seen + np.cumsum(docs[:, 0]), max_tokens, "right")) if max_tokens else len(docs)
        if max_documents:
            fit = min(fit, max_documents - sum(sum(s["documents"] for s in w.done) + w.documents for w in writers))
        path = os.path.join(scratch, str(number))
        with open(path, "rb") as source:
            for run in np.split(docs[:fit], np.flatnonzero(np.diff(docs[:fit, 2])) + 1) if fit else ():
                writers[run[0, 2]].add(source, run[:, 0], run[:, 1])
        os.unlink(path)
        seen, read = seen + int(docs[:fit, 0].sum()), read + size
        count.update(counted)
        note["tasks"], note["rows"] = number + 1, note["rows"] + (len(task[1]) if task[0] == "given" else 0)
        if fit == len(docs) and time.monotonic() - noted > NOTE_EVERY:  # never after a cut task: what follows must stay out
            write_json(note_path, note | {"count": count, "writers": [w.note() for w in writers]})
            noted = time.monotonic()
        bar.set_postfix_str(f"{seen / 1e6:.1f}M tokens", refresh=False)
        bar.update(int(size))
        return fit < len(docs)

    try:
        if not pool:
            begin(*what)
        for number, (task, size) in enumerate(tasks(note["tasks"], note["rows"]), note["tasks"]):
            waiting.append((number, task, size, pool.submit(work, number, task) if pool else work(number, task)))
            full = len(waiting) > (2 * workers if pool else 0) and take(*waiting.popleft())
            if full:
                break
        while waiting and not full:
            full = take(*waiting.popleft())
        for w in writers:
            w.close()
        shards = [s for w in writers for s in w.done]
        if not shards and part[1] == 1:
            die(f"{out}: no document was left to write; dropped: {dict(count)}")
        about = {"name": tok.name, "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size, "eos_id": tok.eos_id}
        manifest = {"format": 1, "dtype": "uint32", "tokenizer": about, "settings": settings, "dropped": count, "shards": shards}
        write_json(manifest_path, manifest)
    except KeyboardInterrupt:
        die(f"{out}: stopped after {seen:,} tokens; the same command goes on from its last note")
    except BrokenProcessPool:
        die(f"{out}: a worker process was killed, most likely for memory; the same command goes on, --workers={workers // 2} uses less")
    except OSError as error:
        die(f"{out}: {error}; what is written stays, and the same command goes on from its last note")
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
        shutil.rmtree(scratch, ignore_errors=True)
    if os.path.exists(note_path):
        os.unlink(note_path)
    return merge(out, part[1]) or manifest, time.monotonic() - started, read


def merge(out, parts):
    """manifest.json of all parts, once the last of them is done."""
    paths = [os.path.join(out, f"manifest-{i}-of-{parts}.json") for i in range(parts)]
    if parts == 1 or not all(map(os.path.exists, paths)):
        return None
    each = [json.loads(tokenizer.read(p)) for p in paths]
    dropped = sum((collections.Counter(m["dropped"]) for m in each), collections.Counter())
    manifest = each[0] | {"dropped": dropped, "shards": [s for m in each for s in m["shards"]]}
    write_json(os.path.join(out, "manifest.json"), manifest)
    return manifest
