"""Shards -> documents -> denoise examples -> two-sided packs: the stream behind objective=denoise.

    stream = denoise_stream.open_stream(cfg, plan, rank, world)    # next(stream): this rank's packs of the next step; .state, .load(state)
    packs = denoise_stream.val_batches(cfg)    # {denoiser: held-out packs}, the same corruption for every checkpoint

Every rank does the whole bookkeeping (which document, denoiser, length, pack: integers, microseconds) and reads and corrupts only the
packs that are its own: with micro_tokens set, the same order for any number of ranks, resumable anywhere. Example g is a pure function of
(seed, g), the 256 documents then open, and the progress of the step in which it should train (the packer looks ahead 256 examples, and so
do we). Not part of denoise.py: that file is pure functions of (ids, rng), this is files and state. Read next: data.py (Shards, Source).
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import denoise
import tokenizer
from configurator import die

OPEN = 256  # documents a source keeps open; an example is cut from one of them at random
LOOK = 256  # drawn examples among which the packer may choose; the oldest always goes first
DRAW, TEXT = range(2)  # what a random key is for


def _rng(seed: int, use: int, n: int):
    return np.random.Generator(np.random.Philox(key=np.array([seed << 1 | use, n], np.uint64)))


def special_of(cfg, tok) -> denoise.Special:
    """Special ids of this model over this tokenizer; ids of text and special ids must not meet."""
    sp = denoise.special_ids(cfg.vocab_size, cfg.n_sentinels, tokenizer.end_of(cfg, tok), tok.special.get("<|endoftext|>", tok.eos_id))
    if cfg.eos_id not in (None, sp.eos):
        die(f"eos_id={cfg.eos_id}: no marker of {tok.name}; give the id of one, such as {tok.eos_id}, or leave it out")
    if tok.special.get("<extra_id_0>", sp.sentinel) != sp.sentinel or ("<extra_id_0>" not in tok.special and tok.vocab_size > sp.mode):
        first = tok.special.get("<extra_id_0>")  # a tokenizer that has the markers says how many there are
        more, n = (4 + cfg.n_sentinels, cfg.n_sentinels) if first is None else (0, tok.vocab_size - first)
        die(f"vocab_size={cfg.vocab_size}, n_sentinels={cfg.n_sentinels}: {tok.name} has {tok.vocab_size} ids"
            f"{', modes and sentinels last' if first else ', then come 4 modes and the sentinels'}; "
            f"set --vocab_size={tok.vocab_size + more} --n_sentinels={n}")  # fmt: skip
    return sp


class DenoiseStream:
    def __init__(self, cfg, plan, rank=0, world=1, split="train", log=print):
        paths = {Path(cfg.data).name: cfg.data} if isinstance(cfg.data, str) else cfg.data
        self.cfg, self.plan, self.rank, self.world, self.log = cfg, plan, rank, world, log if rank == 0 else lambda text: None
        self.sources = [data.Source(name, data.Shards(path, split), cfg.seed, 0, lambda text: None) for name, path in paths.items()]
        self.tokenizer = tokenizer.load(next(iter(paths.values())))
        self.special = special_of(cfg, self.tokenizer)
        for src in self.sources:
            if src.shards.tokenizer["fingerprint"] != self.tokenizer.fingerprint:
                die(f"{src.shards.dir}: written with another tokenizer than {self.tokenizer.name}: prepare it again with that one")
        self.word = denoise.word_starts(self.tokenizer) if cfg.snap else None
        self.mix = denoise.mixture(cfg.mixture, cfg.mixture_end, cfg.mode_tokens)
        self.caps = cfg.max_enc, cfg.max_dec, cfg.n_sentinels, cfg.closing_sentinel
        least = min(denoise.longest(d, share, *self.caps) for d in self.mix.denoisers for share in d.r)
        if least < 2 * denoise.MIN_DOC:
            sizes = ", ".join(f"{key}={getattr(cfg, key)}" for key in ("max_enc", "max_dec", "n_sentinels"))
            die(f"{sizes}: some denoiser could take only {least} tokens of text; raise them")
        settings = [f"{key}={getattr(cfg, key)}" for key in (*denoise.DenoiseConfig.__dataclass_fields__, "seed")]
        settings += [f"fixed={fixed_shapes(cfg)}"] + [f"eos_id={self.special.eos}"] * (self.special.eos != self.tokenizer.eos_id)
        self.order = " ".join([*settings, *(f"{src.name}={src.shards.id}" for src in self.sources)])  # all that decides it
        self.names = denoise.names(self.mix.denoisers)
        # of examples of these very documents, at both ends of the curriculum: mean encoder and decoder tokens; text per each
        self.need, self.text = [], []
        for row in (plan(0), plan(plan.steps)):
            self.begin()
            length, *_, enc, dec = np.mean([self.draw(row)[3:] for _ in range(4096)][2048:], axis=0)  # long documents stay open longer
            self.need.append(np.array([enc, dec]))
            self.text.append(length / (enc + dec))
        self.begin()
        for src in self.sources:
            src.log = self.log

    def begin(self):
        self.step = self.packs = self.drawn = self.dropped = 0
        self.block, self.queue = (-1, None), []  # queue of (g, source, first token, length, task, share, encoder, decoder tokens)
        for src in self.sources:
            src.state |= {"taken": 0, "credit": 0.0}
        self.open = [[self.next_document(s) for _ in range(min(OPEN, src.units))] for s, src in enumerate(self.sources)]

    def next_document(self, s):
        """[first token, text tokens, tokens used] of the next document worth using; its EOS is not text."""
        for _ in range(self.sources[s].units + 1):
            start, size = self.sources[s].take()
            if size > denoise.MIN_DOC:
                return [start, size - 1, 0]
            self.dropped += 1
        die(f"{self.sources[s].shards.dir}: no document has {denoise.MIN_DOC} tokens; prepare longer texts")

    def draw(self, row) -> tuple:
        """Example `self.drawn`: a denoiser first, then as much of an open document as it can take. Integers only."""
        g, cfg = self.drawn, self.cfg
        if self.block[0] != g // 256:
            self.block = g // 256, _rng(cfg.seed, DRAW, g // 256).random((256, 3)).tolist()
        slot, pick, where = self.block[1][g % 256]
        total = sum(src.shards.n_tokens for src in self.sources)
        shares = [row.mix.get(src.name, 0.0) if row.mix else src.shards.n_tokens / total for src in self.sources]
        credit = [src.state["credit"] for src in self.sources]  # tokens that a source is behind its share
        s = max((i for i, share in enumerate(shares) if share), key=lambda i: credit[i] + shares[i] * cfg.max_enc)
        slot = int(slot * len(self.open[s]))
        start, size, used = document = self.open[s][slot]
        weights = denoise.weights(self.mix, row.eta, size, cfg.length_adaptive)
        task = min(int(np.searchsorted(weights.cumsum(), pick, "right")), len(weights) - 1)
        d = self.mix.denoisers[task]
        share = d.r[0] + (d.r[1] - d.r[0]) * where
        length = min(denoise.longest(d, share, *self.caps), size - used)
        if 0 < size - used - length < denoise.MIN_DOC:  # no rest too short to use
            length = size - used - denoise.MIN_DOC
        document[2] += length
        if document[2] == size:
            self.open[s][slot] = self.next_document(s)
        for i, src in enumerate(self.sources):
            src.state["credit"] += shares[i] * length - (i == s) * length
        self.drawn += 1
        counts = denoise.counts(d, share, length, cfg.n_sentinels - cfg.closing_sentinel)
        return g, s, start + used, length, task, share, *denoise.sides(length, *counts, d.mode is not None, cfg.closing_sentinel)

    def budgets(self, row) -> tuple[int, int]:
        """Encoder and decoder tokens of a pack: micro_tokens split as the mixture needs it, in multiples of 128."""
        cfg, total = self.cfg, row.micro_tokens
        if total < cfg.max_enc + cfg.max_dec:
            die(f"micro_tokens={total}: a pack must hold max_enc + max_dec = {cfg.max_enc + cfg.max_dec}; raise it or tokens_per_step")
        eta = 0.5 if fixed_shapes(cfg) else row.eta
        need = self.need[0] * (1 - eta) + self.need[1] * eta
        enc = round(total * float(need[0] / need.sum()) / 128) * 128
        return (enc := min(max(enc, cfg.max_enc), total - cfg.max_dec)), total - enc

    def fill(self, row, enc: int, dec: int) -> list[tuple]:
        """The next pack: in order while there is room, then what keeps the two sides level, at last the pair that leaves least."""
        chosen, e, d, taken = [], enc, dec, LOOK
        while taken == LOOK:  # a large pack empties the queue more than once
            while len(self.queue) < LOOK:  # drawn for the step in which it will train, as far as the length of the queue tells
                later = int(len(self.queue) * self.need[0].sum() / (row.micro_tokens * row.accum * self.world))
                self.queue.append(self.draw(self.plan(min(self.step + later, self.plan.steps))))
            taken = 0
            for item in self.queue:
                if (chosen or taken) and min(e / self.cfg.max_enc, d / self.cfg.max_dec) < 8:
                    break
                taken, e, d = taken + 1, e - item[-2], d - item[-1]
            chosen, self.queue = chosen + self.queue[:taken], self.queue[taken:]
        need, free = np.array([item[-2:] for item in self.queue]), np.ones(len(self.queue), bool)  # (Q, 2), (Q,)
        while len(fits := np.flatnonzero(free & (need <= (e, d)).all(1))):
            n = need[fits]
            if e > 2 * self.cfg.max_enc and d > 2 * self.cfg.max_dec:
                take = [np.abs((e - n[:, 0]) / enc - (d - n[:, 1]) / dec).argmin()]
            else:  # (F, F): one example on the diagonal, two beside it
                both = n[:, None] + n * ~np.eye(len(n), dtype=bool)[..., None]
                score = np.where((both <= (e, d)).all(-1), both[..., 0] / enc + both[..., 1] / dec, -1)
                take = sorted(set(divmod(int(score.argmax()), len(n))))
            free[fits[take]] = False
            e, d = e - int(n[take, 0].sum()), d - int(n[take, 1].sum())
        chosen += [item for item, kept in zip(self.queue, free, strict=True) if not kept]
        self.queue = [item for item, kept in zip(self.queue, free, strict=True) if kept]
        return chosen

    def example(self, item, text):
        """Raw text of an example -> (encoder, decoder inputs, targets, task)."""
        g, task, share = item[0], item[4], item[5]
        rng, sp = _rng(self.cfg.seed, TEXT, g), self.special
        enc, targets = denoise.corrupt(text, self.mix.denoisers[task], share, rng, sp, self.cfg.closing_sentinel, self.word)
        return enc, np.append(sp.start, targets[:-1]), targets, task

    def materialise(self, items, number, enc, dec) -> dict:
        cfg, sizes = self.cfg, np.array([item[3] for item in items])
        at, raw = sizes.cumsum() - sizes, np.empty(sizes.sum(), np.uint32)
        for s, src in enumerate(self.sources):
            mine = np.array([item[1] == s for item in items])
            src.shards.read(np.array([item[2] for item in items])[mine], sizes[mine], at[mine], raw)
        raw &= ~data.UNTRAINED
        if raw.max() >= self.special.mode:
            die(f"{cfg.data}: token id {raw.max()} is not text (modes begin at {self.special.mode}); verify the shards")
        examples = [self.example(item, raw[a : a + n].astype(np.int64)) for item, a, n in zip(items, at, sizes, strict=True)]
        batch = collate(fixed(examples, enc, dec, cfg, self.special) if fixed_shapes(cfg) else examples, number)
        if fixed_shapes(cfg):
            batch |= {"max_len": cfg.max_enc, "dec_max_len": cfg.max_dec}
        return batch | {"tokens": sum(item[-2] + item[-1] for item in items), "source_tokens": int(sizes.sum())}

    def __iter__(self):
        return self

    def __next__(self):
        if self.step >= self.plan.steps:
            raise StopIteration
        row, out = self.plan(self.step), []
        enc, dec = self.budgets(row)
        for p in range(row.accum * self.world):
            items = self.fill(row, enc, dec)
            if p % self.world == self.rank:
                out.append(self.materialise(items, self.packs, enc, dec))
            self.packs += 1
        self.step += 1
        return out

    @property
    def state(self):
        opened = [[list(document) for document in documents] for documents in self.open]
        sources = {src.name: {**src.state, "open": docs} for src, docs in zip(self.sources, opened, strict=True)}
        counts = {key: getattr(self, key) for key in ("step", "packs", "drawn", "dropped", "order")}
        return {**counts, "sources": sources, "queue": [list(item) for item in self.queue]}

    def load(self, state):
        if f"fixed={not fixed_shapes(self.cfg)}" in state["order"].split():  # a word that no user knows
            die(f"compile={self.cfg.compile}, precision={self.cfg.precision}: packs of one shape or not, unlike the checkpoint's; "
                "resume with both as they were, or use --init_from")  # fmt: skip
        data.expect_order(state["order"], self.order)
        self.step, self.packs, self.drawn, self.dropped = (state[key] for key in ("step", "packs", "drawn", "dropped"))
        self.queue = [tuple(item) for item in state["queue"]]
        for s, src in enumerate(self.sources):
            src.state = {key: value for key, value in state["sources"][src.name].items() if key != "open"}
            self.open[s] = [list(document) for document in state["sources"][src.name]["open"]]


# ---- packs ----------------------------------------------------------------------------------------------------------------


def collate(examples, number: int = 0) -> dict:
    """Examples (encoder, decoder inputs, targets, task) -> one flat two-sided pack."""
    enc, dec, targets, task = zip(*examples, strict=True)
    sizes = np.array([[len(a), len(b)] for a, b in zip(enc, dec, strict=True)]).T  # (2, S)
    cu = np.concatenate([np.zeros((2, 1), np.int64), sizes.cumsum(1)], 1)  # (2, S + 1)
    out = {"task": np.array(task), "rows": np.array([number])}
    out |= {"ids": np.concatenate(enc), "dec_ids": np.concatenate(dec), "targets": np.concatenate(targets)}
    out |= {"pos": data.ramp(0 * cu[0, :-1], sizes[0]), "dec_pos": data.ramp(0 * cu[1, :-1], sizes[1])}
    out = {key: torch.from_numpy(np.asarray(value, np.int64)) for key, value in out.items()}
    for name, c in zip(("", "dec_"), cu, strict=True):
        out |= {f"{name}cu": torch.from_numpy(c.astype(np.int32)), f"{name}max_len": int(np.diff(c).max())}
    return out


def blank(n_enc: int, n_dec: int, sp) -> tuple:
    """A document of padding: nothing is predicted from it and nobody sees it."""
    return np.full(n_enc, sp.start), np.full(n_dec, sp.start), np.full(n_dec, data.IGNORE), 0


def fixed_shapes(cfg) -> bool:
    return cfg.compile or getattr(cfg, "precision", "bf16") != "bf16"


def fixed(examples, enc: int, dec: int, cfg, sp) -> list:
    """Padding documents behind the examples, up to the pack's budgets and a fixed number of documents: one shape for the whole run."""
    e, d = enc - sum(len(x[0]) for x in examples), dec - sum(len(x[1]) for x in examples)
    more = max(-(-e // cfg.max_enc), -(-d // cfg.max_dec))
    cut = lambda n: np.diff(np.linspace(0, n, more + 1).astype(int)).tolist()  # noqa: E731
    blanks = [blank(a, b, sp) for a, b in zip(cut(e), cut(d), strict=True)] if more else []
    count = (enc + dec) // (denoise.MIN_DOC + 4) + 3  # no example is shorter than 16 tokens of text, 2 sentinels, 2 EOS
    return examples + blanks + [blank(0, 0, sp)] * (count - len(examples) - len(blanks))


# ---- for train.py ---------------------------------------------------------------------------------------------------------


def open_stream(cfg, plan, rank=0, world=1, log=print):
    stream = DenoiseStream(cfg, plan, rank, world, log=log)
    enc, dec = stream.budgets(plan(0))
    text = plan.total * sum(stream.text) / 2
    epochs = text / sum(src.shards.n_tokens for src in stream.sources)
    stream.log(denoise.table(stream.mix, cfg.max_enc, cfg.max_dec, cfg.n_sentinels, cfg.closing_sentinel))
    stream.log(
        f"packs of {enc + dec} tokens: {enc} encoder + {dec} decoder; documents are cut, never dropped, from {denoise.MIN_DOC} tokens on; "
        f"in all {plan.total:,} tokens, made of about {text:,.0f} of text: {epochs:.3g} epochs"
    )
    if cfg.analyze_batch:
        from eval.denoising import analyze

        stream.log(analyze(stream, cfg.analyze_batch))
        raise SystemExit(0)
    return stream


def val_batches(cfg, length=0) -> dict[str, list]:
    """About cfg.eval_tokens of the split val under each denoiser alone: {name: packs}, the same for every checkpoint and stage."""
    micro, out = max(min(cfg.eval_tokens, 16384), cfg.max_enc + cfg.max_dec), {}
    row = SimpleNamespace(micro_tokens=micro, accum=1, eta=0.0, mix={})
    plan = lambda step: row  # noqa: E731
    plan.steps = max(1, cfg.eval_tokens // micro)
    denoisers = denoise.mixture(cfg.mixture, cfg.mixture_end, cfg.mode_tokens).denoisers
    for name, d in zip(denoise.names(denoisers), denoisers, strict=True):
        one = dataclasses.replace(cfg, mixture=(tuple(d._replace(weight=1)),), mixture_end=None, seed=0)  # also what begins with weight 0
        out[name] = [batch for step in DenoiseStream(one, plan, split="val", log=lambda text: None) for batch in step]
    return out
