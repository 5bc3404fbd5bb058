"""Data in flight: shards of tokens on disk -> the micro-batches of a step, in an order that nothing but the config decides.

    stream = open_stream(cfg, plan, rank, world)   # next(stream): this rank's micro-batches of the next step
    stream = Prefetch(stream)                      # the same, built ahead of time by a thread
    stream.state                                   # small, JSON-able, after the last delivered step; stream.load(state) goes on

Every rank computes the same schedule, a few hundred integers: which windows (or documents) fill the rows of the step. The rows, cut
into micro-batches m = 0, 1, ..., are the global order; rank r of `world` reads only m = i * world + r from disk. So neither the order
nor the state depends on the world size: a run may be resumed on any number of GPUs.

packing="windows" (pretraining): the unit of shuffling is a chunk of consecutive tokens; a stage of the curriculum cuts it into windows
of its own length, and targets read one token further. N tokens are N - 1 inputs: chunks tile them, the last chunk is shorter and its
last row filled up with padding. So every token but the very first is a target exactly once per epoch, whatever the table of stages.
packing="documents" (fine-tuning): whole documents in shuffled order, packed into rows, never cut; longer ones are dropped and counted.
The files are described at `Shards`; prepare/text.py writes them, `write` in prepare/shards.py from arrays. Read next: optim.py.
"""

import functools
import hashlib
import itertools
import json
import math
import queue
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from configurator import die

UNTRAINED = np.uint32(1 << 31)  # bit 31 of a stored token: predicting it is not trained (the prompts of a chat)
IGNORE = -100
BLOCK = 1024  # places of the shuffled order that are computed at once
WAITING = 128  # documents that wait for a row they fit in: enough to fill rows to ~98 %, few enough to be part of the state


def ramp(start, size):
    """Index ranges [start_0, start_0 + size_0), [start_1, ...) ... one behind the other."""
    return np.repeat(start - (np.cumsum(size) - size), size) + np.arange(size.sum())


def permute(index, n, key):
    """The pseudo-random order `key` of range(n), at the places `index`: a bijection without a table, so that an epoch of any size
    costs no memory. A Feistel network permutes the next power of four; what leaves range(n) goes through again until it is back."""
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    low, high = np.uint64((1 << int(half)) - 1), np.uint64(64 - int(half))
    rounds = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=48).digest(), "<u8")
    out, todo = np.array(index, np.uint64), np.arange(len(index))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & low
        for k in rounds:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> high)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


class Shards:
    """One split of a directory of shards, memory-mapped, as one long array of tokens with document borders.

    DIR/manifest.json lists the shards; DIR/NAME.bin holds uint32 token ids (little-endian, bit 31: see UNTRAINED), DIR/NAME.idx the
    uint64 offsets of its documents (one more than documents, from 0 to the number of tokens), DIR/tokenizer/ what encoded them.
    """

    def __init__(self, dir, split):
        self.dir, self.split = Path(dir), split
        manifest = read_manifest(self.dir)
        self.tokenizer = manifest["tokenizer"]  # {"name", "fingerprint", "vocab_size", "eos_id"}
        infos = [shard for shard in manifest["shards"] if shard["split"] == split]
        if not infos:
            have = ", ".join(sorted({shard["split"] for shard in manifest["shards"]}))
            how = "prepare it again with more documents, --separator='\\n\\n' or --val_from=FILES"
            die(f"{self.dir} holds no split '{split}' (only: {have or 'nothing'}): {how}")
        self.bytes = sum(shard["bytes"] for shard in infos)
        self.id = hashlib.sha256(json.dumps([[s["sha256_bin"], s["sha256_idx"]] for s in infos]).encode()).hexdigest()[:16]
        self.infos = [shard for shard in infos if shard["tokens"]]  # an empty file cannot be mapped
        self.base = np.cumsum([0] + [shard["tokens"] for shard in self.infos])  # (S + 1,) first token of each shard
        self.doc_base = np.cumsum([0] + [shard["documents"] for shard in self.infos])
        self.n_tokens, self.n_documents = int(self.base[-1]), int(self.doc_base[-1])
        if self.n_tokens < 2:
            die(f"{self.dir}: split '{split}' holds {self.n_tokens} tokens, too few to predict one: prepare more text")
        self.bins = [self.open(s["name"] + ".bin", "<u4", s["tokens"]) for s in self.infos]
        self.idxs = [self.open(s["name"] + ".idx", "<i8", s["documents"] + 1) for s in self.infos]
        for s, idx in enumerate(self.idxs):
            self.expect(s, idx[[0, -1]] == [0, self.infos[s]["tokens"]])

    def open(self, name, dtype, count):
        path, want = self.dir / name, np.dtype(dtype).itemsize * count
        if not path.is_file():
            die(f"{path} is missing though the manifest lists it: copy it there or prepare {self.dir} again")
        if path.stat().st_size != want:
            self.damaged(name, f"holds {path.stat().st_size:,} bytes where the manifest says {want:,}")
        return np.memmap(path, dtype, "r")

    def damaged(self, name, what):
        die(f"{self.dir / name} {what}: damaged or not finished; copy it again or prepare {self.dir} again")

    def expect(self, s, good):
        if not good.all():
            self.damaged(self.infos[s]["name"] + ".idx", "holds offsets that do not rise from 0 to the number of tokens")

    def verify(self):
        """Every byte against the hashes of the manifest (slow, for --verify) -> the number of files read."""
        for shard, kind in itertools.product(self.infos, ("bin", "idx")):
            name, digest = f"{shard['name']}.{kind}", hashlib.sha256()
            with open(self.dir / name, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            if digest.hexdigest() != shard["sha256_" + kind]:
                self.damaged(name, "does not have the sha256 that the manifest says")
        return 2 * len(self.infos)

    def tokens(self, start, stop):
        """Tokens [start, stop) of the split, bit 31 included -> (stop - start,) uint32."""
        out = np.empty(stop - start, np.uint32)
        self.read(np.array([start]), np.array([stop - start]), np.array([0]), out)
        return out

    def documents(self, ids):
        """Documents by number (K,) -> their first token (K,), their length (K,)."""
        start, size = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        shard = np.searchsorted(self.doc_base, ids, "right") - 1
        for s in np.unique(shard):
            here = shard == s
            lo, hi = (self.idxs[s][ids[here] - self.doc_base[s] + i] for i in (0, 1))
            self.expect(s, (lo >= 0) & (hi >= lo) & (hi <= self.infos[s]["tokens"]))
            start[here], size[here] = self.base[s] + lo, hi - lo
        return start, size

    def read(self, start, size, at, out, new=None):
        """Pieces, tokens [start, start + size) -> out[at:], all arrays (P,). Sets new[i] where out[i] is the first token of a document."""
        while len(start):
            shard = np.searchsorted(self.base, start, "right") - 1
            here = np.minimum(size, self.base[shard + 1] - start)
            for s in np.unique(shard):
                p = shard == s
                first, n, to, idx = start[p] - self.base[s], here[p], at[p], self.idxs[s]
                out[ramp(to, n)] = self.bins[s][ramp(first, n)]
                if new is not None:
                    lo = np.searchsorted(idx, first, "right")
                    k = np.maximum(np.searchsorted(idx, first + n, "left") - lo, 0)
                    border = idx[ramp(lo, k)] - np.repeat(first, k)
                    self.expect(s, (border > 0) & (border < np.repeat(n, k)))
                    new[np.repeat(to, k) + border] = True
            more = size > here  # what runs over the end of a shard goes on in the next, which begins with a document
            start, size, at = (start + here)[more], (size - here)[more], (at + here)[more]
            if new is not None:
                new[at] = True


@functools.cache
def byte_lengths(dir):
    """(vocab,) UTF-8 bytes of each id. Special tokens, EOS among them, are no text and count none."""
    import tokenizer

    tok = tokenizer.load(dir)
    lengths = np.array([len(tok.token_bytes(i)) for i in range(tok.vocab_size)])
    lengths[[tok.eos_id, *tok.special.values()]] = 0
    return lengths


def read_manifest(dir):
    """DIR/manifest.json, or one clear line about what is wrong with it."""
    if not (path := dir / "manifest.json").is_file():
        way = f"`python -m prepare.text --from=FILES --out={dir}`, prepare.chat for chats, or see the top of the config"
        die(f"{dir} is no directory of shards (no manifest.json): correct --data or write one: {way}")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        die(f"{path} is not JSON ({error}): prepare {dir} again")
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("dtype")) != (1, "uint32"):
        die(f"{path} does not say format 1, dtype uint32: prepare {dir} again with this version")
    tok, shards = manifest.get("tokenizer"), manifest.get("shards")
    if not (isinstance(tok, dict) and isinstance(tok.get("fingerprint"), str) and tok["fingerprint"] and count(tok.get("vocab_size"))):
        die(f"{path} does not say which tokenizer (fingerprint, vocab_size): prepare {dir} again")
    for shard in shards if isinstance(shards, list) else [None]:
        good = isinstance(shard, dict) and all(count(shard.get(key)) for key in ("tokens", "documents", "bytes"))
        good = good and all(isinstance(shard.get(key), str) for key in ("name", "split", "sha256_bin", "sha256_idx"))
        # A name is that of a file in this very directory, and says its split: nothing called val-* is ever trained on.
        if not good or not re.fullmatch(rf"{re.escape(shard['split'])}-\d+", shard["name"]) or not shard["split"].isidentifier():
            die(f"{path} has an incomplete or misnamed entry, {str(shard)[:80]}: prepare {dir} again")
    len({shard["name"] for shard in shards}) == len(shards) or die(f"{path} lists a shard twice: prepare {dir} again")
    return manifest


def count(value):
    return type(value) is int and 0 <= value < 1 << 48


def collate(shards, source, rows, seq_len, pieces, doc_mask=True, fixed_cu=False, byte_lengths=None):
    """Pieces (row, col, start, size), arrays (P,) -> a flat micro-batch. source, rows (R,): each row's data source and global number.
    Rows are laid out one column wider: inputs are columns 0..L-1, targets 1..L. What no piece covers is padding, an untrained document."""
    n, width = len(rows) * seq_len, seq_len + 1
    raw, new = np.full(len(rows) * width, UNTRAINED, np.uint32), np.zeros(len(rows) * width, bool)
    row, col, start, size = pieces
    at, end = row * width + col, row * width + col + size
    for s in np.unique(source):
        p = source[row] == s
        shards[s].read(start[p], size[p], at[p], raw, new if doc_mask else None)
    new[at] = True
    new[end[end % width > 0]] = True
    untrained = (raw >= UNTRAINED) | new  # what begins another document is not predicted from the one before it
    raw, new, untrained = (a.reshape(-1, width) for a in ((raw & ~UNTRAINED).astype(np.int64), new, untrained))  # (R, L + 1)
    if raw.max() >= shards[0].tokenizer["vocab_size"]:
        names = ", ".join(str(shards[s].dir) for s in np.unique(source))
        die(f"{names}: token id {raw.max()} lies outside the vocabulary of {shards[0].tokenizer['vocab_size']}: damaged, see --verify")
    targets = np.where(untrained[:, 1:], IGNORE, raw[:, 1:]).reshape(-1)
    length = np.diff(cu := np.append(np.flatnonzero(new[:, :-1]), n))
    batch = {
        "ids": torch.from_numpy(raw[:, :-1].reshape(-1)),  # (N,)
        "targets": torch.from_numpy(targets),  # (N,)
        "pos": torch.from_numpy(np.arange(n) - np.repeat(cu[:-1], length)),  # (N,)
        "cu": torch.from_numpy(np.pad(cu.astype(np.int32), (0, (n - len(length)) * fixed_cu), "edge")),  # (S + 1,); one shape: (N + 1,)
        "docs": len(length),  # S
        "max_len": int(length.max()),
        "window": seq_len,  # which no document leaves
        "rows": torch.from_numpy(rows),  # (R,)
        "source": torch.from_numpy(source),  # (R,)
        "tokens": int(np.minimum(size, seq_len).sum()),
    }
    if byte_lengths is not None:
        batch["bytes"] = int(byte_lengths[targets[targets >= 0]].sum())
    return batch


class Source:
    """One set of shards in shuffled order, for ever; each unit (a chunk, or a document if chunk is 0) once per epoch."""

    def __init__(self, name, shards, seed, chunk, log):
        self.name, self.shards, self.seed, self.chunk, self.log = name, shards, seed, chunk, log
        self.units = math.ceil((shards.n_tokens - 1) / chunk) if chunk else shards.n_documents
        self.state = {"id": shards.id, "taken": 0, "tokens": 0, "credit": 0.0, "dropped": 0, "waiting": []}
        self.place, self.block = None, []

    def take(self):
        """-> (first token, length) of the next unit."""
        epoch, i = divmod(self.state["taken"], self.units)
        if i == 0 and epoch:
            self.log(f"data: {self.name}: epoch {epoch + 1} begins, with a new shuffle")
        if self.place != (epoch, i // BLOCK):
            self.place, first = (epoch, i // BLOCK), i // BLOCK * BLOCK
            unit = permute(np.arange(first, min(first + BLOCK, self.units)), self.units, f"{self.seed}/{self.name}/{epoch}")
            if self.chunk:
                start, size = unit * self.chunk, np.minimum(self.chunk, self.shards.n_tokens - 1 - unit * self.chunk)
            else:
                start, size = self.shards.documents(unit)
            self.block = list(zip(start.tolist(), size.tolist(), strict=True))
        self.state["taken"] += 1
        return self.block[i % BLOCK]

    def take_row(self, seq_len):
        """-> (col, start, size) of a row's documents: the one that waited longest, then the longest that fits. Epochs are used up first."""
        waiting, row, room = self.state["waiting"], [], seq_len
        while not row:
            while len(waiting) < WAITING and (not waiting or self.state["taken"] % self.units):
                piece = self.take()
                if 0 < piece[1] <= seq_len:
                    waiting.append(piece)
                else:
                    self.state["dropped"] += 1
            while fits := [piece for piece in waiting if piece[1] <= room]:
                best = max(fits, key=lambda piece: piece[1]) if row else fits[0]
                waiting.remove(best)
                row.append((seq_len - room, *best))
                room -= best[1]
        return row


def expect_order(theirs: str, ours: str):
    """A checkpoint's stream goes on only as what it was: `key=value` words, all that decides its order."""
    was, now = (" ".join(sorted(set(a.split()) - set(b.split()))) for a, b in ((theirs, ours), (ours, theirs)))
    if was or now:
        die(f"the checkpoint read {was or 'fewer sources'}, not {now or 'fewer'}: resume with its data and settings, or use --init_from")


class Stream:
    """next() -> this rank's micro-batches of the next step of the plan, until its end; .state and .load(state) resume exactly."""

    def __init__(self, sources, plan, rank, world, cfg, order):
        self.sources, self.plan, self.rank, self.world, self.cfg = sources, plan, rank, world, cfg
        self.order = order  # in words, all that decides the order besides the sources
        self.shards, self.n_tokens = [src.shards for src in sources], sum(src.shards.n_tokens for src in sources)
        self.names = [src.name for src in sources]  # what batch["source"] counts in
        self.step = self.rows = 0
        self.rest = None  # (source, first token, length) that the last step left of its last chunk

    @property
    def state(self):
        more = lambda src: {"waiting": [list(piece) for piece in src.state["waiting"]], "epochs": src.state["taken"] / src.units}  # noqa: E731
        sources = {src.name: src.state | more(src) for src in self.sources}
        return {"step": self.step, "rows": self.rows, "rest": self.rest and list(self.rest), "order": self.order, "sources": sources}

    def load(self, state):
        expect_order(*(" ".join([x["order"], *(f"{name}={s['id']}" for name, s in x["sources"].items())]) for x in (state, self.state)))
        self.step, self.rows, self.rest = state["step"], state["rows"], state["rest"] and tuple(state["rest"])
        for src in self.sources:
            saved = state["sources"][src.name]
            src.state = {**saved, "waiting": [tuple(piece) for piece in saved["waiting"]]}

    def __iter__(self):
        return self

    def __next__(self):
        if self.step >= self.plan.steps:
            raise StopIteration
        row = self.plan(self.step)
        n_rows, per_micro = row.tokens // row.seq_len, row.micro_tokens // row.seq_len
        assert per_micro * row.seq_len * row.accum * self.world == row.tokens, row
        weights = [row.mix.get(src.name, 0.0) if row.mix else float(src.shards.n_tokens) / self.n_tokens for src in self.sources]
        fill = self.fill_documents if self.cfg.packing == "documents" else self.fill_windows
        source, pieces = fill(n_rows, row.seq_len, weights)
        micros = []
        for first in range(self.rank * per_micro, n_rows, self.world * per_micro):
            mine = slice(*np.searchsorted(pieces[0], [first, first + per_micro]))
            here = (pieces[0][mine] - first, *(array[mine] for array in pieces[1:]))
            rows = self.rows + np.arange(first, first + per_micro)
            where, cfg = source[first : first + per_micro], self.cfg
            micros.append(collate(self.shards, where, rows, row.seq_len, here, cfg.doc_mask, cfg.compile))
        self.step, self.rows = self.step + 1, self.rows + n_rows
        return micros

    def draw(self, weights, size, take):
        """Take from the source furthest behind its share: shares are counted in tokens, by the mix of the step that uses them."""
        states = [src.state for src in self.sources]
        s = max((i for i, w in enumerate(weights) if w > 0), key=lambda i: states[i]["credit"] + weights[i] * size)
        pieces = take(self.sources[s])
        size = sum(n for *_, n in pieces)
        for state, weight in zip(states, weights, strict=True):
            state["credit"] += weight * size
        states[s]["credit"] -= size
        states[s]["tokens"] += size
        return s, pieces

    def fill_windows(self, n_rows, seq_len, weights):
        """-> source (R,), pieces (row, col, start, size): the windows of as many chunks as it takes; the next step gets the rest."""
        chunks, need = [], n_rows
        if self.rest and self.rest[1] % seq_len:  # a switch of length: the new windows begin at multiples of their own length
            s, start, size = self.rest
            drop = min(-start % seq_len, size)
            self.sources[s].log(f"data: {self.sources[s].name} drops {drop} tokens of a chunk at the switch to length {seq_len}")
            self.sources[s].state["dropped"] += drop
            self.rest = (s, start + drop, size - drop) if drop < size else None
        while need:
            if self.rest:
                s, start, size = self.rest
            else:
                s, [(start, size)] = self.draw(weights, self.sources[0].chunk, lambda src: [src.take()])
            windows = min(math.ceil(size / seq_len), need)
            use, need = min(windows * seq_len, size), need - windows
            chunks.append((s, start, use, windows))
            self.rest = (s, start + use, size - use) if use < size else None
        source, start, size, windows = np.array(chunks).T
        stop, rows = np.repeat(start + size, windows), np.arange(n_rows)
        start = np.repeat(start, windows) + seq_len * ramp(np.zeros_like(windows), windows)
        return np.repeat(source, windows), (rows, np.zeros_like(rows), start, np.minimum(seq_len, stop - start) + 1)

    def fill_documents(self, n_rows, seq_len, weights):
        """-> source (R,), pieces (row, col, start, size): whole documents."""
        drawn = [self.draw(weights, seq_len, lambda src: src.take_row(seq_len)) for _ in range(n_rows)]
        pieces = [(row, *piece) for row, (_, documents) in enumerate(drawn) for piece in documents]
        return np.array([source for source, _ in drawn]), tuple(np.array(pieces).T)


def open_sources(cfg, log):
    """-> the training split of every source of the config, and in words what else decides the order."""
    dirs = {Path(cfg.data).name: cfg.data} if isinstance(cfg.data, str) else cfg.data
    lengths = sorted({stage.get("seq_len", cfg.seq_len) for stage in cfg.stages} or {cfg.seq_len})
    documents = cfg.packing == "documents"
    chunk = 0 if documents else cfg.chunk or math.lcm(*lengths)
    if documents and not cfg.doc_mask:
        die("packing=documents isolates documents, doc_mask=False asks for the opposite: drop it, or use packing=windows")
    if any(chunk % length for length in lengths):
        die(f"chunk = {chunk} is no multiple of every seq_len {lengths}: use a multiple of {math.lcm(*lengths)}, or 0 for it")
    sources = [Source(name, Shards(dir, "train"), cfg.seed, chunk, log) for name, dir in dirs.items()]
    for src in sources:
        data, text = src.shards, f"shuffled as {src.units:,} chunks of {chunk:,}"
        if data.tokenizer["fingerprint"] != sources[0].shards.tokenizer["fingerprint"]:
            die(f"{data.dir} and {sources[0].shards.dir} are in different tokenizers: prepare one of them again")
        if documents:
            long = sum(int((np.diff(idx) > lengths[0]).sum()) for idx in data.idxs)
            text = f"{long:,} are longer than {lengths[0]:,} tokens and dropped"
            if long == data.n_documents:
                die(f"{data.dir}: all {long:,} documents are longer than seq_len = {lengths[0]}: raise it")
        log(f"data: {src.name}: {data.n_tokens:,} tokens, {data.bytes:,} bytes, {data.n_documents:,} documents; {text}")
    return sources, f"{cfg.packing} chunk={chunk} seed={cfg.seed} sources={','.join(dirs)}"


def open_stream(cfg, plan, rank=0, world=1, log=print):
    sources, order = open_sources(cfg, log if rank == 0 else lambda text: None)
    return Stream(sources, plan, rank, world, cfg, order)


def epoch_tokens(cfg):
    """Tokens of one epoch of all sources, the padding of packed rows included: what turns cfg.epochs into steps."""
    total = 0
    for src in open_sources(cfg, lambda text: None)[0]:
        total += src.shards.n_tokens - 1 if src.chunk else 0
        while not src.chunk and (src.state["taken"] < src.units or src.state["waiting"]):
            src.take_row(cfg.seq_len)
            total += cfg.seq_len
    return total


def val_batches(dir, seq_len, tokens=0, micro_tokens=0, doc_mask=True, packing="windows"):
    """About `tokens` tokens (0: all) of the split val as micro-batches: always the same windows, evenly spread, or, as they are trained,
    whole documents; each batch says its `bytes`."""
    shards, rows = Shards(dir, "val"), []
    total = math.ceil((shards.n_tokens - 1) / seq_len)
    n_rows = min(total, max(1, tokens // seq_len)) if tokens else total
    start = np.arange(n_rows) * total // n_rows * seq_len
    pieces = np.arange(n_rows), np.zeros(n_rows, np.int64), start, np.minimum(seq_len, shards.n_tokens - 1 - start) + 1
    if packing == "documents":
        source = Source("val", shards, 0, 0, lambda text: None)
        if all((np.diff(idx) > seq_len).all() for idx in shards.idxs):
            die(f"{dir}: every document of the split val is longer than seq_len = {seq_len}: raise it, or prepare val again")
        while (source.state["taken"] < source.units or source.state["waiting"]) and (not tokens or len(rows) < n_rows):
            rows.append(source.take_row(seq_len))
        pieces, n_rows = tuple(np.array([(row, *piece) for row, documents in enumerate(rows) for piece in documents]).T), len(rows)
    batches, per_micro = [], max(1, micro_tokens // seq_len) if micro_tokens else n_rows
    for first in range(0, n_rows, per_micro):
        mine, here = slice(*np.searchsorted(pieces[0], [first, first + per_micro])), np.arange(first, min(first + per_micro, n_rows))
        part = pieces[0][mine] - first, *(array[mine] for array in pieces[1:])
        batches.append(collate([shards], 0 * here, here, seq_len, part, doc_mask, byte_lengths=byte_lengths(shards.dir)))
    return batches


class Prefetch:
    """Any stream, built ahead by a thread: the same items in the same order, and the state that belongs to the last delivered one.
    An error in the thread is raised by the very next next(). `wait`: seconds that the last next() spent waiting for data."""

    def __init__(self, stream, depth=2, pin=False):
        self.stream, self.depth, self.pin = stream, depth, pin
        self.state, self.wait, self.thread = stream.state, 0.0, None

    def work(self, ready, stop):
        state = self.state
        while state is not None and not stop.is_set():
            try:
                item, state = next(self.stream), self.stream.state
                item = [{k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()} for batch in item] if self.pin else item
            except BaseException as error:  # whatever it is, SystemExit too, it belongs to the thread that trains
                item, state = error, None
                self.error = None if isinstance(error, StopIteration) else error
            while not stop.is_set():
                with suppress(queue.Full):
                    ready.put((item, state), timeout=0.05)
                    break

    def __iter__(self):
        return self

    def __next__(self):
        if self.thread is None:
            self.ready, self.stop, self.error = queue.Queue(max(1, self.depth)), threading.Event(), None
            self.thread = threading.Thread(target=self.work, args=(self.ready, self.stop), name="prefetch", daemon=True)
            self.thread.start()
        began = time.perf_counter()
        item, state = (self.error, None) if self.error else self.ready.get()
        if state is None:
            self.error = item  # asked again, it answers the same
            raise item
        self.state, self.wait = state, time.perf_counter() - began
        return item

    def load(self, state):
        self.close()
        self.stream.load(state)
        self.state = self.stream.state

    def close(self):
        if self.thread is not None:
            self.stop.set()
            self.thread.join()
            self.thread = None
