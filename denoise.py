"""UL2 denoising: which tokens of a text are hidden, and what the two sides of an encoder-decoder then see.

Everything here is a pure function of (ids, rng) in vectorised numpy: no torch, no files, no state.

    d = mixture("recommended").denoisers[0]                         # spans of 3, 15 % of the text, mode R
    enc, targets = corrupt(ids, d, 0.15, rng, special_ids(152036, 100, eos=151645, start=151643))
    restore(enc, targets, special) == ids                           # always: nothing is ever cut off

A denoiser is drawn first, then `longest` says how much text it can take so that both sides fit, then that much is cut from a document
and corrupted. (Cutting after corruption, as others do, loses two thirds of the targets.) Read next: denoise_stream.py, model.py.
"""

import functools
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from configurator import die

MODES = "RXSI"  # regular, extreme, sequential, infilling: ids mode0 .. mode0+3 in this order
MIN_DOC = 16  # tokens; shorter documents are dropped, shorter rests are never left behind


@dataclass(frozen=True)
class DenoiseConfig:
    # objective=denoise (denoise.py)
    mixture: str | tuple = "recommended"
    mixture_end: tuple[float, ...] | None = None  # weights at the last step
    mode_tokens: bool = True
    max_enc: int = 512
    max_dec: int = 256
    closing_sentinel: bool = False
    length_adaptive: bool = False
    snap: bool = False


class Denoiser(NamedTuple):
    kind: str  # span | middle | suffix | infill
    mu: float  # mean span length; 0 where there is one span
    r: tuple[float, float]  # share of the text that is hidden, drawn uniformly per example; rows may give one number
    mode: str | None  # R, X, S, I or no mode token at all
    weight: float  # share of examples


# A config file may assign `mixture` a tuple of such rows: (kind, mean span, share hidden, mode or None, weight).
# fmt: off
MIXTURES = {
    "recommended": (
        ("span", 3, 0.15, "R", 0.10), ("span", 8, 0.25, "R", 0.10), ("middle", 12, 0.20, "X", 0.10), ("suffix", 0, (0.2, 0.8), "S", 0.20),
        ("suffix", 0, (0.05, 0.15), "S", 0.15), ("suffix", 0, (0.80, 0.95), "S", 0.15), ("infill", 0, 0.30, "I", 0.20)),
    "t5gemma2": (
        ("span", 3, 0.15, "R", 1), ("span", 12, 0.50, "R", 1), ("span", 32, 0.15, "X", 1), ("span", 32, 0.50, "X", 1),
        ("suffix", 0, 0.75, "S", 4)),
    "ul2": (  # the denoisers are the paper's table; its weights are not in it, these (R/S/X 33/34/33) are customary
        ("span", 3, 0.15, "R", 0.165), ("span", 8, 0.15, "R", 0.165), ("suffix", 0, 0.25, "S", 0.34), ("span", 3, 0.5, "X", 0.0825),
        ("span", 8, 0.5, "X", 0.0825), ("span", 64, 0.15, "X", 0.0825), ("span", 64, 0.5, "X", 0.0825)),
    "span_heavy": (
        ("span", 3, 0.15, "R", 0.20), ("span", 8, 0.15, "R", 0.20), ("span", 3, 0.5, "X", 0.15), ("span", 64, 0.15, "X", 0.15),
        ("suffix", 0, (0.2, 0.8), "S", 0.30)),
    "minimal": (("span", 3, 0.15, None, 0.5), ("suffix", 0, (0.2, 0.8), None, 0.5)),
    "t5": (("span", 3, 0.15, None, 1),),
}
# fmt: on
_FIRST = (0.25, 0.25, 0.10, 0.15, 0.10, 0.10, 0.05)
MIXTURES["recommended_curriculum"] = tuple((*d[:4], w) for d, w in zip(MIXTURES["recommended"], _FIRST, strict=True))
CURRICULA = {"recommended_curriculum": (0.05, 0.05, 0.10, 0.25, 0.20, 0.20, 0.15)}


# Special ids: the last n_sentinels logical rows are sentinels, the four before them are modes.


class Special(NamedTuple):
    start: int  # first decoder input (the pad id of the family; may equal eos)
    eos: int
    mode: int  # id of mode R; X, S, I follow
    sentinel: int  # id of <extra_id_0>; ascending
    n_sentinels: int


def special_ids(vocab_size: int, n_sentinels: int, eos: int, start: int | None = None) -> Special:
    first = vocab_size - n_sentinels
    return Special(eos if start is None else start, eos, first - len(MODES), first, n_sentinels)


def is_sentinel(ids, sp: Special):
    return (ids >= sp.sentinel) & (ids < sp.sentinel + sp.n_sentinels)


class Mixture(NamedTuple):
    denoisers: tuple[Denoiser, ...]
    first: np.ndarray  # (n,) weights at step 0, normalised
    last: np.ndarray  # (n,) weights at the last step


def mixture(rows: str | tuple, end: tuple[float, ...] | None = None, mode_tokens: bool = True) -> Mixture:
    """A named mixture, or rows of a config file; `end` makes any of them a curriculum."""
    if isinstance(rows, str):
        if rows not in MIXTURES:
            die(f"mixture={rows!r}: known are {', '.join(MIXTURES)}, or a tuple of (kind, mu, r, mode, weight)")
        end = CURRICULA.get(rows) if end is None else end
        rows = MIXTURES[rows]
    denoisers = []
    for row in rows:
        d = Denoiser(*row) if isinstance(row, (tuple, list)) and len(row) == 5 else Denoiser("", 0, 0, None, 0)
        r = d.r if isinstance(d.r, (tuple, list)) else (d.r, d.r)
        numbers = len(r) == 2 and all(isinstance(x, (int, float)) for x in (d.mu, *r, d.weight))
        known = d.kind in ("suffix", "infill") and d.mu == 0 or d.kind in ("span", "middle") and numbers and d.mu >= 1
        if not (numbers and known and 0 < r[0] <= r[1] < 1) or d.mode not in (None, *MODES):
            die(f"mixture row {row!r}: wants (span|middle, mean span >= 1, ...) or (suffix|infill, 0, ...), and then "
                "0 < share < 1 or two such as its range, one of R X S I or None, weight")  # fmt: skip
        denoisers.append(d._replace(r=tuple(r), mode=d.mode if mode_tokens else None))
    if same := [n for n in names(denoisers) if names(denoisers).count(n) > 1]:
        die(f"mixture: two rows are the same denoiser {same[0]} (mode_tokens={mode_tokens}); make them one, with the sum of their weights")

    def weights(key, values):
        w = np.asarray(values, np.float64)
        if len(w) != len(denoisers) or (w < 0).any() or not 0 < w.sum() < math.inf:
            die(f"{key}={list(values)}: wants {len(denoisers)} weights, none negative, one per denoiser of the mixture")
        return w / w.sum()

    first = weights("mixture weights", [d.weight for d in denoisers])
    return Mixture(tuple(denoisers), first, first if end is None else weights("mixture_end", end))


def weights(mix: Mixture, progress: float, n: int = 0, length_adaptive: bool = False) -> np.ndarray:
    """Weights over examples at `progress` in 0..1; long documents (n tokens) may lean towards the long-range tasks."""
    progress = min(max(progress, 0.0), 1.0)
    w = mix.first * (1 - progress) + mix.last * progress
    if length_adaptive and n >= 1024:
        w = w * [1 + min(0.3, (n - 1024) / 8192) * (d.kind != "span") for d in mix.denoisers]
    return w / w.sum()


def name(d: Denoiser) -> str:
    share = f"{d.r[0]:g}" if d.r[0] == d.r[1] else "{:g}-{:g}".format(*d.r)  # no slash: metrics are named by it
    return f"{d.kind}{d.mu:g}@{share}" if d.mu else f"{d.kind}@{share}"


def names(denoisers) -> list[str]:
    """What metrics call them; the mode is part of a name where nothing else tells two apart."""
    plain = [name(d) for d in denoisers]
    return [f"{n}-{d.mode or 'none'}" if plain.count(n) > 1 else n for n, d in zip(plain, denoisers, strict=True)]


def counts(d: Denoiser, share: float, L: int, n_sentinels: int) -> tuple[int, int]:
    """Hidden tokens N and spans n of a source of L tokens."""
    N = min(max(math.floor(share * L + 0.5), 1), L - 1)
    n = math.floor(N / d.mu + 0.5) if d.mu else 1
    return N, min(max(n, 1), N, L - N, n_sentinels)


def sides(L: int, N: int, n: int, mode: bool, closing: bool) -> tuple[int, int]:
    """Encoder and decoder tokens: kept text, sentinels, EOS | hidden text, sentinels, EOS."""
    return mode + L - N + n + 1, N + n + closing + 1


@functools.lru_cache(maxsize=4096)
def longest(d: Denoiser, share: float, max_enc: int, max_dec: int, n_sentinels: int, closing: bool = False) -> int:
    """Most source tokens whose two sides fit and whose spans have a sentinel each. Both sides grow with L: bisect."""

    def too_long(L):
        N, n = counts(d, share, L, 1 << 30)
        enc, dec = sides(L, N, n, d.mode is not None, closing)
        return enc > max_enc or dec > max_dec or n + closing > n_sentinels

    return 2 + bisect_left(range(3, max_enc + max_dec), True, key=too_long)


def table(mix: Mixture, max_enc: int, max_dec: int, n_sentinels: int, closing: bool = False) -> str:
    """What is printed at start: per denoiser its longest source and the two sides that source becomes."""
    lines = [f"{'denoiser':20} mode  first   last   source  encoder  decoder"]
    for d, a, b in zip(mix.denoisers, mix.first, mix.last, strict=True):
        for share in sorted(set(d.r)):
            L = longest(d, share, max_enc, max_dec, n_sentinels, closing)
            enc, dec = sides(L, *counts(d, share, L, n_sentinels - closing), d.mode is not None, closing)
            label = name(d._replace(r=(share, share))) + (" (an end)" if d.r[0] < d.r[1] else "")
            lines.append(f"{label:20.20} {d.mode or '-':4} {a:6.3f} {b:6.3f} {L:8d} {enc:8d} {dec:8d}")
    return "\n".join(lines)


# Spans: (starts, ends), sorted and disjoint


def _cut(total: int, parts: int, rng) -> np.ndarray:
    """Uniform composition of `total` into non-empty parts: parts-1 distinct dividers out of total-1. (parts,)"""
    out = np.empty(parts + 1, np.int64)
    out[0], out[-1] = 0, total
    if parts > 1:  # the indices of the parts-1 smallest of total-1 iid uniforms are a uniform subset
        pick = rng.random(total - 1).argpartition(parts - 2)[: parts - 1]
        pick.sort()
        out[1:-1] = pick + 1
    return out[1:] - out[:-1]


def spans(d: Denoiser, share: float, L: int, rng, n_sentinels: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the hidden spans of a source of L >= 3 tokens: exactly N tokens in exactly n spans."""
    if L < 3:
        raise ValueError(f"a source of {L} tokens is too short to corrupt: drop it")
    N, n = counts(d, share, L, n_sentinels)
    if d.kind == "suffix":
        return np.array([L - N]), np.array([L])
    if d.kind == "infill":
        lo = min(math.floor(0.1 * L + 0.5), L - N)
        hi = max(lo, min(math.floor(0.9 * L + 0.5) - N, L - N))
        start = int(rng.integers(lo, hi + 1))
        return np.array([start]), np.array([start + N])
    size, kept = _cut(N, n, rng), L - N
    if d.kind == "span":
        gap = _cut(kept, n, rng)
        ends = np.cumsum(size + gap)  # kept text first: gap, span, gap, span
        if rng.random() < 0.5:  # hidden text first: span, gap, span, gap
            ends -= gap
        return ends - size, ends
    # middle: distinct gaps between kept tokens, Gumbel top-n of a normal density around the middle of the text
    z = (np.arange(kept + 1) - kept / 2) * (4 / kept)
    at = (-0.5 * z * z - np.log(rng.standard_exponential(kept + 1))).argpartition(kept + 1 - n)[-n:]
    at.sort()
    ends = at + np.cumsum(size)
    return ends - size, ends


def snap(ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, word: np.ndarray, reach: int = 3):
    """Move each span forward, by at most `reach` tokens and as a whole (N and n stay exact), until it starts a word."""
    starts, ends, room = starts.copy(), ends.copy(), len(ids)
    for i in range(len(starts) - 1, -1, -1):  # from the right: the next span has already moved
        for j in range(min(reach, room - int(ends[i])) + 1):
            if word[ids[starts[i] + j]]:
                starts[i] += j
                ends[i] += j
                break
        room = int(starts[i]) - 1  # one kept token stays between two spans
    return starts, ends


def word_starts(tokenizer) -> np.ndarray:
    """(vocab_size,) bool: tokens whose text begins a word."""
    return np.array([tokenizer.token_bytes(i).startswith((b" ", b"<", b"\xc4\xa0", b"\xe2\x96\x81")) for i in range(tokenizer.vocab_size)])


def layout(ids, starts, ends, mode: str | None, sp: Special, closing: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """encoder = [mode] kept_0 s_0 kept_1 s_1 .. EOS, targets = s_0 span_0 s_1 span_1 .. [s_n] EOS; never clamps."""
    L, n = len(ids), len(starts)
    sizes = ends - starts
    if n == 0 or starts[0] < 0 or ends[-1] > L or (sizes <= 0).any() or (starts[1:] < ends[:-1]).any():
        raise ValueError(f"spans {starts}..{ends} are not sorted, disjoint, non-empty and inside 0..{L}")
    if n + closing > sp.n_sentinels:
        raise ValueError(f"{n + closing} sentinels needed, {sp.n_sentinels} exist")
    flip = np.zeros(L + 1, np.int8)
    flip[starts] += 1
    flip[ends] -= 1
    hidden = flip[:-1].cumsum(dtype=np.int8).view(bool)  # (L,)
    sentinels = np.arange(sp.sentinel, sp.sentinel + n)

    keep = ~hidden
    keep[starts] = True  # a span's first slot carries its sentinel
    text = ids.astype(np.int64)
    text[starts] = sentinels
    enc = np.concatenate([[] if mode is None else [sp.mode + MODES.index(mode)], text[keep], [sp.eos]]).astype(np.int64)

    N = int(sizes.sum())
    targets = np.empty(N + n + closing + 1, np.int64)
    at = sizes.cumsum() - sizes + np.arange(n)
    body = np.ones(N + n, bool)
    body[at] = False
    targets[: N + n][body] = ids[hidden]
    targets[at] = sentinels
    if closing:
        targets[-2] = sp.sentinel + n
    targets[-1] = sp.eos
    return enc, targets


def corrupt(ids, d: Denoiser, share: float, rng, sp: Special, closing: bool = False, word: np.ndarray | None = None):
    """One example: (encoder ids, decoder targets). Decoder inputs are the targets shifted right behind sp.start."""
    starts, ends = spans(d, share, len(ids), rng, sp.n_sentinels - closing)
    if word is not None and d.kind in ("span", "middle"):
        starts, ends = snap(ids, starts, ends, word)
    return layout(ids, starts, ends, d.mode, sp, closing)


def restore(enc: np.ndarray, targets: np.ndarray, sp: Special) -> np.ndarray:
    """The source of an example; whatever is not exactly invertible is an error."""
    left, right = enc[int(sp.mode <= enc[0] < sp.sentinel) : -1], targets[:-1]
    slots, marks = np.flatnonzero(is_sentinel(left, sp)), np.flatnonzero(is_sentinel(right, sp))
    if len(marks) == len(slots) + 1 and marks[-1] == len(right) - 1:  # the closing sentinel
        right, marks = right[:-1], marks[:-1]
    order = np.arange(len(slots)) + sp.sentinel
    good = enc[-1] == targets[-1] == sp.eos and len(marks) == len(slots) > 0 and marks[0] == 0
    if not good or (left[slots] != order).any() or (right[marks] != order).any():
        raise ValueError("the two sides do not carry the same ascending sentinels, each span behind its own, EOS last")
    kept, hidden = np.split(left, slots), np.split(right, marks[1:])  # each but kept_0 behind its s_i
    out = [kept[0]] + [part[1:] for pair in zip(hidden, kept[1:], strict=True) for part in pair]
    return np.concatenate(out)
