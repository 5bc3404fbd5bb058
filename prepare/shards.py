"""Tasks -> shards, on every core, the same bytes for any number of them, and resumable after kill -9.

Workers encode one task each into a temporary file; this process copies those, in order, into train-00000.bin, val-00000.bin, ... of at
most `shard_tokens` tokens, and notes every few seconds, in progress.json, up to where everything is on disk. A run that died is started
again with the same command: the open shards are cut back to that note and go on. manifest.json is written last: without it the
directory is no data set. The format is described at `data.Shards`, which reads it."""

import collections
import glob
import hashlib
import io
import json
import os
import pathlib
import shutil
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

import files
import tokenizer
from configurator import die
from files import sync
from prepare.pool import encoded
from prepare.sources import CHUNK

NOTE_EVERY = 2.0  # seconds


class Writer:
    """The open shard of one split, and the list of those that are done."""

    def __init__(self, out, split, limit, state):
        self.out, self.split, self.limit = out, split, limit
        self.done, (self.tokens, self.documents, self.bytes) = state or ([], (0, 0, 0))
        self.open()

    def open(self):
        self.name = f"{self.split}-{len(self.done):05d}"
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


def write(out, splits, tok="bytes", shard_tokens=100_000_000):
    """Your own ids -> shards: write("data/mine", {"train": arrays, "val": arrays}, "ids:500"). A 1-D array of integers is a document; what
    ends it, such as tok.eos_id, is part of it. With data.UNTRAINED added an id is read, not predicted. tok: what tokenizer.load takes."""
    tok, done, manifest = tokenizer.load(tok), [], os.path.join(out, "manifest.json")
    if "train" not in splits or set(splits) - {"train", "val"}:
        die(f"{out}: splits are train and, to measure with, val; not {', '.join(splits) or 'none'}")
    if any(map(os.path.exists, (manifest, os.path.join(out, "config.json")))):
        die(f"{out}: holds shards, a run or a model already: choose another folder, or remove it")
    tok.save(os.path.join(out, "tokenizer"))
    size = np.array([0 if i in tok.special.values() else len(raw) for i, raw in enumerate(tok.table)])
    for split, arrays in splits.items():
        writer = Writer(out, split, shard_tokens, None)
        for ids in map(np.asarray, arrays):
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
                die(f"{split}: a document of {ids.dtype} and shape {ids.shape}: give 1-D arrays of integers, none of them empty")
            plain = (ids := ids.astype(np.int64)) & 0x7FFFFFFF
            if (ids >> 32).any() or plain.max() >= tok.vocab_size:
                die(f"{split}: ids from {ids.min()} to {ids.max()}: those of {tok.name} go from 0 to {tok.vocab_size - 1}")
            writer.add(io.BytesIO(ids.astype("<u4").tobytes()), np.array([len(ids)]), size[plain].sum(keepdims=True))
        writer.close()
        done += writer.done or die(f"{out}: {split} has no document")
    write_json(manifest, {"format": 1, "dtype": "uint32", "tokenizer": about(tok), "settings": {}, "dropped": {}, "shards": done})


def about(tok):
    return {"name": tok.name, "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size, "eos_id": tok.eos_id}


def write_json(path, value):
    """After the files that it speaks of: their names, too, must outlive a power cut."""
    sync(os.path.dirname(path))
    files.write_json(path, value, sort_keys=True)


def tidy(note, parts):
    """Away with what led to a manifest."""
    note = pathlib.Path(note)
    for path in (note, note.with_name(f".tmp-{note.name}"), *note.parent.glob("tokenizer/.tmp-*")):  # the last of a save that was killed
        path.unlink(missing_ok=True)
    shutil.rmtree(parts, ignore_errors=True)


def stored(todo, folder):
    """The same, of tasks that parts of the job encoded before."""
    for number, task, size in todo:
        found = json.loads(tokenizer.read(os.path.join(folder, f"{number}.json")))
        yield number, task, size, os.path.join(folder, f"{number}.bin"), np.array(found["docs"], np.int64).reshape(-1, 3), found["count"]


def build(out, tok, tasks, job, settings, shard_tokens, max_tokens=0, max_documents=0, workers=0, part=(0, 1), total=0):
    """-> (manifest, seconds, bytes read now), or None from a part of a job that is not the last one to end. `tasks(done, rows)` yields
    (task, bytes of input) from task number `done` on; `settings` is all that decides the output. Part (i, n) encodes every n-th task
    into out/parts; the last one to end writes them all as one job would have."""
    note_path, manifest_path, parts = (os.path.join(out, name) for name in ("progress.json", "manifest.json", "parts"))
    settings = json.loads(json.dumps(settings | {"shard_tokens": shard_tokens, "max_tokens": max_tokens, "max_documents": max_documents}))
    mark = "{}-of-{}".format(*part)
    note = {"settings": settings, "tasks": 0, "rows": 0, "count": {}, "writers": [None, None]}
    for path in (*glob.glob(os.path.join(parts, "settings-*.json")), note_path, manifest_path):
        found = json.loads(tokenizer.read(path, "{}"))
        if other := [k for k in settings if found and found.get("settings", {}).get(k) != settings[k]]:
            die(f"{out} was written with another {', '.join(other)}: choose another --out, or remove it")
        if found and path == manifest_path:
            tidy(note_path, parts)
            return found, 0, 0
        note |= found
    if os.path.exists(os.path.join(out, "config.json")):  # whose tokenizer folder would become ours
        die(f"{out}: holds a run or a model, not shards; choose another --out")
    os.makedirs(parts if part[1] > 1 else out, exist_ok=True)
    lock = files.hold(os.path.join(parts, f"lock-{mark}") if part[1] > 1 else os.path.join(out, ".lock"))
    if not lock:
        die(f"{out}: another process is writing {'this part' if part[1] > 1 else 'here'}; wait for it, or choose another --out")
    tok.save(folder := os.path.join(out, "tokenizer"))
    for name in {name for name in os.listdir(folder) if name[0] != "."} - set(tok.files):  # of an attempt that wrote no shard:
        pathlib.Path(folder, name).unlink(missing_ok=True)  # workers would load it instead
    for path in (*glob.glob(os.path.join(folder, "*")), folder, out, os.path.dirname(os.path.abspath(out))):
        sync(path)
    for old in glob.glob(os.path.join(out, f"scratch-{mark}.*")):
        shutil.rmtree(old)
    scratch = os.path.join(out, f"scratch-{mark}.{os.getpid()}")
    os.mkdir(scratch)
    workers = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    workers = min(workers, total // CHUNK + 1) if total else workers
    bar = tqdm(total=total // part[1] or None, unit="B", unit_scale=True, disable=None, desc=os.path.basename(os.path.normpath(out)))
    started, seen, read = time.monotonic(), 0, 0

    def numbered(done=0, rows=0):
        return ((number, task, size) for number, (task, size) in enumerate(tasks(done, rows), done))

    def is_stored(number):
        return os.path.exists(os.path.join(parts, f"{number}.json"))

    try:
        if part[1] > 1:
            write_json(os.path.join(parts, f"settings-{mark}.json"), {"settings": settings})
            mine = (item for item in numbered() if item[0] % part[1] == part[0] and not is_stored(item[0]))
            for number, _, size, path, docs, counted in encoded(mine, job, folder, scratch, workers):
                sync(path)
                os.replace(path, os.path.join(parts, f"{number}.bin"))
                write_json(os.path.join(parts, f"{number}.json"), {"docs": docs.tolist(), "count": counted})
                bar.update(int(size))
            lock = all(is_stored(number) for number, _, _ in numbered()) and files.hold(os.path.join(out, ".lock"))
            if not lock or os.path.exists(manifest_path):
                return None
        writers = [Writer(out, split, shard_tokens, state) for split, state in zip(("train", "val"), note["writers"], strict=True)]
        count, noted = collections.Counter(note["count"]), time.monotonic()
        seen = sum(sum(s["tokens"] for s in w.done) + w.tokens for w in writers)
        todo = numbered(note["tasks"], note["rows"])
        each = stored(todo, parts) if part[1] > 1 else encoded(todo, job, folder, scratch, workers)
        for number, task, size, path, docs, counted in each:
            fit = int(np.searchsorted(seen + np.cumsum(docs[:, 0]), max_tokens, "right")) if max_tokens else len(docs)
            if max_documents:
                fit = min(fit, max_documents - sum(sum(s["documents"] for s in w.done) + w.documents for w in writers))
            with open(path, "rb") as source:
                for run in np.split(docs[:fit], np.flatnonzero(np.diff(docs[:fit, 2])) + 1) if fit else ():
                    writers[run[0, 2]].add(source, run[:, 0], run[:, 1])
            seen, read = seen + int(docs[:fit, 0].sum()), read + size
            count.update(counted)
            note["tasks"], note["rows"] = number + 1, note["rows"] + (len(task[1]) if task[0] == "given" else 0)
            if fit < len(docs):  # max_tokens leaves no room; no note after a cut task: what follows must stay out
                break
            if time.monotonic() - noted > NOTE_EVERY:
                write_json(note_path, note | {"count": count, "writers": [w.note() for w in writers]})
                noted = time.monotonic()
            bar.set_postfix_str(f"{seen / 1e6:.1f}M tokens", refresh=False)
            bar.update(int(size) if part[1] == 1 else 0)
        each.close()
        for w in writers:
            w.close()
        shards = [s for w in writers for s in w.done]
        if not shards:
            dropped = ", ".join(f"{n:,} {why}" for why, n in count.items() if n) or "the input is empty"
            field = "; --text_field=NAME says which field holds the text" * any(why.startswith("no text in") for why in count)
            die(f"{out}: no document was left to write ({dropped}){field or '; --from needs files with text in them'}")
        manifest = {"format": 1, "dtype": "uint32", "tokenizer": about(tok), "settings": settings, "dropped": count, "shards": shards}
        write_json(manifest_path, manifest)
    except KeyboardInterrupt:
        die(f"{out}: stopped after {seen:,} tokens; the same command goes on from its last note")
    except BrokenProcessPool:
        die(f"{out}: a worker process was killed, most likely for memory; the same command goes on, --workers={workers // 2} uses less")
    except OSError as error:
        die(f"{out}: {error}; what is written stays, and the same command goes on from its last note")
    finally:
        bar.close()
        shutil.rmtree(scratch, ignore_errors=True)
    tidy(note_path, parts)
    return manifest, time.monotonic() - started, read
