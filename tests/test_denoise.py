"""UL2 by its promises: exact rates, sides that fit, sentinels in order, and a source that always comes back."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

import denoise as D

QWEN = D.special_ids(152_036, 100, eos=151_645, start=151_643)
ENC, DEC = 512, 256


def rng_of(*key):
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


def draw(mix, g, closing=False, n_sentinels=100):
    rng = rng_of(3, g)
    task = int(rng.choice(len(mix.denoisers), p=mix.first))
    d = mix.denoisers[task]
    share = float(rng.uniform(*d.r))
    longest = D.longest(d, share, ENC, DEC, n_sentinels, closing)
    L = longest if g % 3 == 0 else int(math.exp(rng.uniform(math.log(3), math.log(longest))))
    ids = rng.integers(0, 151_669, L)
    return task, d, share, longest, ids, rng


def test_special_ids():
    assert (QWEN.mode, QWEN.sentinel) == (151_932, 151_936)
    assert [bool(D.is_sentinel(i, QWEN)) for i in (151_935, 151_936, 152_035, 152_036)] == [False, True, True, False]


def test_worked_layouts():
    sp = D.Special(0, 1, 90, 100, 10)
    lay = lambda ids, s, e, **k: [x.tolist() for x in D.layout(np.array(ids), np.array(s), np.array(e), None, sp, **k)]  # noqa: E731
    assert lay([10, 20, 30, 40, 50, 60, 70], [1, 5], [3, 6]) == [[10, 100, 40, 50, 101, 70, 1], [100, 20, 30, 101, 60, 1]]
    assert lay([1, 2, 3, 4, 5, 6], [0, 4], [2, 5]) == [[100, 3, 4, 101, 6, 1], [100, 1, 2, 101, 5, 1]]
    assert lay([1, 2, 3], [1], [2], closing=True) == [[1, 100, 3, 1], [100, 2, 101, 1]]
    for starts, ends in (([3, 1], [4, 2]), ([0, 2], [3, 4]), ([0], [9]), ([-1], [2]), ([1], [1]), ([], [])):
        with pytest.raises(ValueError):
            lay([1, 2, 3, 4, 5, 6], starts, ends)
    with pytest.raises(ValueError, match="sentinels"):
        lay(list(range(30)), list(range(0, 22, 2)), list(range(1, 23, 2)))


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("name", sorted(D.MIXTURES))
def test_ten_thousand_documents(name, closing):
    """Every statement about one example, for 10,000 of them (2,000 with the closing sentinel)."""
    mix = D.mixture(name)
    for g in range(2_000 if closing else 10_000):
        _, d, share, longest, ids, rng = draw(mix, g, closing)
        L = len(ids)
        N, n = D.counts(d, share, L, 100 - closing)
        assert N == min(max(math.floor(share * L + 0.5), 1), L - 1) and 1 <= n <= min(N, L - N, 100 - closing)
        enc, targets = D.corrupt(ids, d, share, rng, QWEN, closing)
        assert (len(enc), len(targets)) == D.sides(L, N, n, d.mode is not None, closing)
        assert len(enc) <= ENC and len(targets) <= DEC and enc[-1] == targets[-1] == QWEN.eos
        if d.mode:
            assert enc[0] == QWEN.mode + "RXSI".index(d.mode)
        marks = targets[D.is_sentinel(targets, QWEN)]
        assert len(marks) == n + closing and marks[0] == QWEN.sentinel and (np.diff(marks) == 1).all()
        assert np.array_equal(enc[D.is_sentinel(enc, QWEN)], marks[:n]) and targets[0] == QWEN.sentinel
        assert not closing or targets[-2] == marks[-1]
        hidden = len(targets) - n - closing - 1
        assert hidden == N  # density exactly N / L, mean span exactly N / n
        assert np.array_equal(D.restore(enc, targets, QWEN), ids)


@pytest.mark.parametrize("name", sorted(D.MIXTURES))
def test_frequencies_and_ranges(name):
    """Denoisers come at their weights (chi-squared) and paired shares are uniform, in the words of the mixture table."""
    mix = D.mixture(name)
    tasks, shares = [], []
    for g in range(10_000):
        rng = rng_of(3, g)
        tasks.append(int(rng.choice(len(mix.denoisers), p=mix.first)))
        d = mix.denoisers[tasks[-1]]
        if d.r[0] < d.r[1]:
            shares.append((rng.uniform(*d.r) - d.r[0]) / (d.r[1] - d.r[0]))
    seen = np.bincount(tasks, minlength=len(mix.denoisers))
    assert len(seen) == 1 or stats.chisquare(seen, mix.first * len(tasks)).pvalue > 1e-4
    assert not shares or stats.kstest(shares, "uniform").pvalue > 1e-4


def test_restore_refuses_what_does_not_invert():
    d = D.mixture("t5").denoisers[0]
    enc, targets = D.corrupt(np.arange(100), d, 0.15, rng_of(1, 1), QWEN)
    marks = np.flatnonzero(D.is_sentinel(targets, QWEN))
    for broken in (targets[:-1], np.delete(targets, 0), np.delete(targets, marks[1])):
        with pytest.raises(ValueError):
            D.restore(enc, broken, QWEN)
    swapped = targets.copy()
    swapped[marks[[0, 1]]] = swapped[marks[[1, 0]]]
    with pytest.raises(ValueError):
        D.restore(enc, swapped, QWEN)


def test_span_compositions_are_uniform():
    """4 hidden tokens in 2 parts (3 ways), 4 kept in 2 parts (3), which comes first (2): 18 outcomes, all equally likely."""
    d = D.Denoiser("span", 2, 0.5, None, 1)
    seen = {}
    for g in range(9_000):
        starts, ends = D.spans(d, 0.5, 8, rng_of(5, g), 100)
        key = (*starts.tolist(), *ends.tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 18 and stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_middle_gathers_in_the_middle():
    """Gaps follow a normal density of sigma K/4 (one span: the first Gumbel draw is the density itself)."""
    d = D.Denoiser("middle", 100, 0.2, None, 1)
    L, K = 100, 80
    gaps = np.array([D.spans(d, 0.2, L, rng_of(6, g), 100)[0][0] for g in range(8_000)])
    p = np.exp(-((np.arange(K + 1) - K / 2) ** 2) / (2 * (K / 4) ** 2))
    p /= p.sum()
    bins = np.arange(K + 1) // 9
    expected = np.bincount(bins, p) * len(gaps)
    assert stats.chisquare(np.bincount(gaps // 9, minlength=len(expected)), expected).pvalue > 1e-4
    many = D.Denoiser("middle", 12, 0.2, None, 1)
    starts, ends = D.spans(many, 0.2, 600, rng_of(7, 0), 100)
    assert len(starts) == 10 and (starts[1:] > ends[:-1]).all() and (ends - starts).sum() == 120  # never fused spans


def test_infill_is_placed_uniformly_inside():
    d = D.Denoiser("infill", 0, 0.3, "I", 1)
    starts = np.array([D.spans(d, 0.3, 100, rng_of(8, g), 100)[0][0] for g in range(6_000)])
    assert starts.min() == 10 and starts.max() == 60  # rnd(.1 L) .. rnd(.9 L) - T
    assert stats.chisquare(np.bincount(starts - 10, minlength=51)).pvalue > 1e-4
    for L, share in itertools.product(range(3, 40), (0.05, 0.3, 0.95)):
        s, e = D.spans(d, share, L, rng_of(9, L), 100)
        assert 0 <= s[0] < e[0] <= L


TABLE = [  # p=1, c=0: denoiser, (L, enc, dec) at 512/256, L at 4096/2048
    (("span", 3, 0.15), (567, 512, 114), 2009),
    (("span", 8, 0.25), (653, 512, 184), 3213),
    (("middle", 12, 0.20), (625, 512, 136), 5013),
    (("span", 12, 0.5), (470, 257, 256), 2410),
    (("span", 32, 0.15), (597, 512, 94), 4791),
    (("span", 32, 0.5), (494, 257, 256), 3970),
    (("span", 3, 0.5), (382, 257, 256), 602),
    (("suffix", 0, 0.75), (339, 88, 256), 2728),
    (("suffix", 0, 0.25), (679, 512, 172), 5458),
    (("infill", 0, 0.30), (727, 512, 220), 5847),
]


@pytest.mark.parametrize(("row", "small", "large"), TABLE)
def test_length_table(row, small, large):
    d = D.Denoiser(*row, "R", 1)
    L = D.longest(d, d.r, 512, 256, 100)
    assert (L, *D.sides(L, *D.counts(d, d.r, L, 100), True, False)) == small
    assert D.longest(d, d.r, 4096, 2048, 100) == large
    for shorter in range(3, L):  # both sides grow with L: every shorter text fits too
        a = D.sides(shorter, *D.counts(d, d.r, shorter, 100), True, False)
        assert a[0] <= 512 and a[1] <= 256


@pytest.mark.parametrize(("name", "mean"), [("recommended", (562, 395, 183)), ("t5gemma2", (436, 236, 218)), ("ul2", (581, 449, 165))])
def test_mean_lengths_of_long_documents(name, mean):
    mix, total = D.mixture(name), np.zeros(3)
    for d, w in zip(mix.denoisers, mix.first, strict=True):
        grid = np.linspace(*d.r, 401) if d.r[0] < d.r[1] else d.r[:1]
        for share in grid:
            L = D.longest(d, share, 512, 256, 100)
            total += w / len(grid) * np.array([L, *D.sides(L, *D.counts(d, share, L, 100), d.mode is not None, False)])
    assert np.abs(total - mean).max() < 2


def test_weights_and_curricula(capsys):
    mix = D.mixture("recommended_curriculum")
    assert np.allclose(D.weights(mix, 0), [0.25, 0.25, 0.10, 0.15, 0.10, 0.10, 0.05])
    assert np.allclose(D.weights(mix, 2.0), [0.05, 0.05, 0.10, 0.25, 0.20, 0.20, 0.15])
    assert np.allclose(D.weights(mix, 0.25)[0], 0.20)
    assert np.allclose(D.mixture("t5gemma2").first, [0.125] * 4 + [0.5])
    own = D.mixture((("span", 3, 0.15, "R", 1), ("suffix", 0, [0.2, 0.4], "S", 3)), end=(1, 0))
    assert np.allclose(D.weights(own, 0.5), [0.625, 0.375]) and own.denoisers[1].r == (0.2, 0.4) and own.denoisers[0].r == (0.15, 0.15)
    assert all(d.mode is None for d in D.mixture("ul2", mode_tokens=False).denoisers)
    long = D.weights(mix, 0, n=1024 + 4096, length_adaptive=True)  # suffix, middle, infill: times 1.3
    base = D.weights(mix, 0) * [1, 1, 1.3, 1.3, 1.3, 1.3, 1.3]
    assert np.allclose(long, base / base.sum())
    assert np.allclose(D.weights(mix, 0, n=1023, length_adaptive=True), mix.first)
    for bad in (
        lambda: D.mixture("recommended", end=(1, 2, 3)),
        lambda: D.mixture("minimal", end=(1, -1)),
        lambda: D.mixture("minimal", end=(1, math.inf)),
        lambda: D.mixture("nonsense"),
        lambda: D.mixture((("span", 3, 1.5, "R", 1),)),
        lambda: D.mixture((("span", 3, 0.15, "Q", 1),)),
        lambda: D.mixture((("span", 3, 0.15, "R"),)),
        lambda: D.mixture((("suffix", 3, 0.25, "S", 1),)),  # a mean span length where there is one span
        lambda: D.mixture((("span", 3, "0.15", "R", 1),)),
        lambda: D.mixture((("span", 3, (0.1, 0.2, 0.3), "R", 1),)),
        lambda: D.mixture(("span", 3)),
    ):
        with pytest.raises(SystemExit):
            bad()
        assert capsys.readouterr().err.count("\n") == 1


def test_snap_moves_to_words_and_keeps_counts():
    class Words:
        vocab_size = 50

        def token_bytes(self, i):
            return b" a" if i % 3 == 0 else b"b"

    word = D.word_starts(Words())
    assert word.tolist() == [i % 3 == 0 for i in range(50)]
    d, moved, at_word = D.Denoiser("span", 8, 0.25, None, 1), 0, 0
    for g in range(500):
        ids = rng_of(11, g).integers(0, 50, 200)
        starts, ends = D.spans(d, 0.25, 200, rng_of(12, g), 100)
        s, e = D.snap(ids, starts, ends, word)
        assert ((e - s) == (ends - starts)).all() and ((s - starts) >= 0).all() and ((s - starts) <= 3).all()
        assert (s[1:] > e[:-1]).all() and e[-1] <= 200
        moved += (s != starts).sum()
        at_word += word[ids[s]].mean() / 500
    assert moved > 0 and at_word > 0.7  # 0.34 without; the rest had no room or no word within reach
    sp = D.Special(0, 1, 60, 64, 100)
    enc, targets = D.corrupt(ids, d, 0.25, rng_of(13, 0), sp, word=word)
    assert np.array_equal(D.restore(enc, targets, sp), ids)


def test_short_sources_are_refused():
    with pytest.raises(ValueError, match="too short"):
        D.spans(D.Denoiser("span", 3, 0.15, None, 1), 0.15, 2, rng_of(1, 1), 100)
