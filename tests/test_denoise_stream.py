"""The denoise stream: every token once per epoch, one order for any number of ranks, exact resumption, full packs."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import denoise
import denoise_stream as S
import tokenizer

TOK = tokenizer.load("bytes")


def write_shards(folder, docs, tok=TOK):
    """{split: list of id lists without EOS} -> a directory of shards, in the layout of data.Shards."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for split, texts in docs.items():
        name = f"{split}-00000"
        flat = np.concatenate([np.append(np.asarray(t), tok.eos_id) for t in texts]).astype("<u4")
        flat.tofile(folder / f"{name}.bin")
        np.cumsum([0] + [len(t) + 1 for t in texts]).astype("<u8").tofile(folder / f"{name}.idx")
        sha = {f"sha256_{kind}": hashlib.sha256((folder / f"{name}.{kind}").read_bytes()).hexdigest() for kind in ("bin", "idx")}
        shards.append({"name": name, "split": split, "tokens": len(flat), "documents": len(texts), "bytes": len(flat), **sha})
    info = {"name": tok.name, "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size, "eos_id": tok.eos_id}
    manifest = {"format": 1, "dtype": "uint32", "tokenizer": info, "source": "test", "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    tok.save(folder / "tokenizer")


def config(data, **changes):
    base = {"data": str(data), "vocab_size": 361, "n_sentinels": 100, "mixture": "recommended", "mixture_end": None, "mode_tokens": True}
    base |= {"max_enc": 128, "max_dec": 64, "closing_sentinel": False, "length_adaptive": False, "snap": False, "seed": 1, "compile": False}
    base |= {"eos_id": None}
    return SimpleNamespace(**(base | changes))


def plan_of(micro=2048, accum=2, steps=50):
    plan = lambda step: SimpleNamespace(micro_tokens=micro, accum=accum, eta=step / steps, mix={})  # noqa: E731
    plan.steps = steps
    return plan


def documents(n, seed=0, mean=5.0, spread=1.2, top=3000):
    rng = np.random.default_rng(seed)
    return [rng.integers(32, 120, int(min(top, max(2, rng.lognormal(mean, spread))))) for _ in range(n)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    docs = documents(600)
    write_shards(folder, {"train": docs, "val": documents(20, seed=9)})
    return folder, docs


def padded(examples, multiple: int, sp, side: str = "right") -> list:
    """The layout of a padded batch, every example as wide as the widest: what packs are compared with."""
    wide = [-(-max(len(example[i]) for example in examples) // multiple) * multiple for i in (0, 1)]
    pairs = [(example, S.blank(wide[0] - len(example[0]), wide[1] - len(example[1]), sp)) for example in examples]
    return [half for pair in pairs for half in (pair if side == "right" else pair[::-1])]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_every_token_of_every_document_trains_once_per_epoch(shards):
    folder, docs = shards
    stream = S.DenoiseStream(config(folder), plan_of(steps=10**6))
    row, source = stream.plan(0), stream.sources[0]
    start = np.cumsum([0] + [len(d) + 1 for d in docs])
    want = {int(a): len(d) for a, d in zip(start, docs, strict=False) if len(d) >= 16}
    cuts = {}
    while source.state["taken"] < 2 * len(docs):  # documents of the first epoch that are still open are finished below
        item = stream.draw(row)
        cuts.setdefault(item[2], []).append(item[3])
    first = {}
    for a, n in want.items():  # follow the cuts from the start of each document; a second epoch repeats the starts
        at = a
        while at < a + n and at in cuts:
            first[a] = first.get(a, 0) + cuts[at][0]
            assert all(m >= 16 or m == n for m in cuts[at])  # no rest shorter than 16 tokens
            at += cuts[at][0]
    done = [first.get(a) == n for a, n in want.items()]
    assert np.mean(done) > 0.9 and all(first.get(a, 0) <= n for a, n in want.items())
    assert stream.dropped == 2 * (len(docs) - len(want)) > 0
    assert not any(a not in want and len(docs[i]) < 16 and a in cuts for i, a in enumerate(start[:-1]))


def test_one_epoch_is_a_partition(tmp_path):
    """With all documents open and none refilled the cuts of one epoch tile the text exactly."""
    docs = documents(300, seed=3, mean=6)
    write_shards(tmp_path, {"train": docs})
    stream = S.DenoiseStream(config(tmp_path), plan_of())
    seen = np.zeros(sum(len(d) + 1 for d in docs), int)
    refills = []
    take = stream.next_document
    stream.next_document = lambda s: take(s) if stream.sources[0].state["taken"] < len(docs) else refills.append(1) or [0, 10**9, 0]
    while len(refills) < 256:
        *_, start, length, _, _, _, _ = stream.draw(stream.plan(0))
        if start < len(seen) and length < 10**6 and not (refills and start + length > len(seen)):
            seen[start : start + length] += 1
        if refills and start < 10**9:  # a finished slot only yields the endless dummy
            stream.open[0] = [d for d in stream.open[0] if d[1] < 10**9]
            if not stream.open[0]:
                break
    ends = np.cumsum([len(d) + 1 for d in docs]) - 1
    want = np.ones(len(seen), int)
    want[ends] = 0
    for d, e in zip(docs, ends, strict=True):
        if len(d) < 16:
            want[e - len(d) : e] = 0
    assert np.array_equal(seen, want)


def test_same_packs_for_any_number_of_ranks_and_after_resuming(shards, capsys):
    folder, _ = shards
    cfg = config(folder, mixture="recommended_curriculum")
    one = S.DenoiseStream(cfg, plan_of(accum=4))
    steps = [next(one) for _ in range(6)]
    ranks = [S.DenoiseStream(cfg, plan_of(accum=2), r, 2) for r in range(2)]
    for step in steps:
        theirs = [next(r) for r in ranks]
        assert all(same(a, b) for a, b in zip(step, [theirs[p % 2][p // 2] for p in range(4)], strict=True))
    stream = S.DenoiseStream(cfg, plan_of(accum=4))
    for _ in range(3):
        next(stream)
    state = json.loads(json.dumps(stream.state))
    resumed = [S.DenoiseStream(cfg, plan_of(accum=2), r, 2) for r in range(2)]  # on two ranks, across the curriculum
    for r in resumed:
        r.load(state)
    for step in steps[3:]:
        theirs = [next(r) for r in resumed]
        assert all(same(a, b) for a, b in zip(step, [theirs[p % 2][p // 2] for p in range(4)], strict=True))
    assert resumed[0].state == resumed[1].state
    with pytest.raises(SystemExit):
        S.DenoiseStream(config(folder, mixture="t5"), plan_of()).load(state)
    assert "the checkpoint read mixture=recommended_curriculum, not mixture=t5: resume" in capsys.readouterr().err


def test_packs_invert_and_lie_in_order(shards):
    folder, docs = shards
    stream = S.DenoiseStream(config(folder, closing_sentinel=True), plan_of())
    text = np.concatenate([np.append(d, TOK.eos_id) for d in docs])
    row = stream.plan(0)
    enc, dec = stream.budgets(row)
    items = stream.fill(row, enc, dec)
    pack = stream.materialise(items, 7, enc, dec)
    e, d = (pack[k].tolist() for k in ("cu", "dec_cu"))
    assert len(e) == len(items) + 1 and pack["tokens"] == e[-1] + d[-1] <= 2048 and pack["rows"].tolist() == [7]
    for b, item in enumerate(items):
        ids, targets = pack["ids"][e[b] : e[b + 1]].numpy(), pack["targets"][d[b] : d[b + 1]].numpy()
        assert np.array_equal(denoise.restore(ids, targets, stream.special), text[item[2] : item[2] + item[3]])
        decoder = pack["dec_ids"][d[b] : d[b + 1]].numpy()
        assert decoder[0] == stream.special.start and np.array_equal(decoder[1:], targets[:-1])
        assert pack["task"][b] == item[4]
        assert pack["pos"][e[b] : e[b + 1]].tolist() == list(range(len(ids)))
    assert pack["max_len"] == max(np.diff(e)) and pack["dec_max_len"] == max(np.diff(d)) and pack["dec_cu"].dtype == torch.int32


@pytest.mark.parametrize("name", ["recommended", "t5gemma2", "ul2"])
def test_fill_fairness_and_waiting(tmp_path, name):
    """Both sides nearly full on long and on mixed documents; tasks at their weights though the packer reorders; nobody waits long."""
    for kind, docs in (
        ("long", documents(200, mean=8.5, spread=0.1, top=9000)),
        ("mixed", documents(2000, mean=5.5, spread=1.2, top=6000)),
    ):
        write_shards(tmp_path / kind, {"train": docs})
        stream = S.DenoiseStream(config(tmp_path / kind, mixture=name, max_enc=512, max_dec=256), plan_of(16384, 1, 1000))
        row = stream.plan(0)
        enc, dec = stream.budgets(row)
        assert enc % 128 == 0 and enc + dec == 16384
        used, tasks, order = np.zeros(2), np.zeros(len(stream.mix.denoisers)), []
        packs = 300 if kind == "long" else 60
        for p in range(packs):
            head = stream.queue[0][0] if stream.queue else 0
            items = stream.fill(row, enc, dec)
            assert items[0][0] == head  # the oldest example always goes first
            used += [sum(i[-2] for i in items) / enc / packs, sum(i[-1] for i in items) / dec / packs]
            order += [(i[0], p) for i in items]
            tasks += np.bincount([i[4] for i in items], minlength=len(tasks))
            assert all(i[-2] <= 512 and i[-1] <= 256 for i in items)
        assert used.min() >= 0.95, (kind, used)
        assert stats.chisquare(tasks, stream.mix.first * tasks.sum()).pvalue > 1e-4
        drawn = {g for g, _ in order} | {i[0] for i in stream.queue}
        assert drawn == set(range(stream.drawn)) and len(order) + len(stream.queue) == stream.drawn  # none dropped, none twice


def test_curriculum_follows_the_step(shards):
    rows = (("span", 3, 0.15, "R", 1), ("suffix", 0, 0.75, "S", 0))
    stream = S.DenoiseStream(config(shards[0], mixture=rows, mixture_end=(0, 1)), plan_of(steps=80))
    share = np.array([np.mean([t for batch in step for t in batch["task"].tolist()]) for step in stream])  # of suffix, 0 -> 1
    assert len(share) == 80
    error = (share - np.arange(80) / 80).reshape(4, 20).mean(1)
    assert np.abs(error).max() < 0.07, error  # looking ahead neither delays nor hurries the curriculum


def test_padding_and_fixed_shapes(shards):
    shapes = set()
    stream = S.DenoiseStream(config(shards[0], compile=True), plan_of())
    for _ in range(5):
        for pack in next(stream):
            shapes.add(
                tuple(
                    (k, tuple(v.shape) if torch.is_tensor(v) else v)
                    for k, v in sorted(pack.items())
                    if k not in ("tokens", "source_tokens")
                )
            )
            real = int((pack["targets"] >= 0).sum())
            assert pack["cu"][-1] == len(pack["ids"]) and pack["dec_cu"].diff().max() <= 64 and pack["cu"].diff().max() <= 128
            assert real < pack["tokens"] <= 2048
    assert len(shapes) == 1
    sp = stream.special
    pair = [(np.arange(5), np.arange(3), np.arange(3), 0), (np.arange(2), np.arange(4), np.arange(4), 1)]
    for side, real in (("right", 0), ("left", 1)):
        pack = S.collate(padded(pair, 8, sp, side))
        assert pack["cu"].tolist()[::2] == [0, 8, 16] and pack["dec_cu"].tolist()[::2] == [0, 8, 16]
        assert pack["task"].tolist()[real::2] == [0, 1] and (pack["targets"] >= 0).sum() == 7


def test_user_errors(shards, tmp_path, capsys):
    folder, _ = shards
    write_shards(tmp_path / "short", {"train": [[1, 2, 3]] * 5})
    for make in (
        lambda: S.DenoiseStream(config(folder, vocab_size=300), plan_of()),
        lambda: S.DenoiseStream(config(folder, max_dec=8), plan_of()),
        lambda: S.DenoiseStream(config(tmp_path / "short"), plan_of()),
        lambda: next(S.DenoiseStream(config(folder), plan_of(micro=100))),
    ):
        with pytest.raises(SystemExit):
            make()
        assert capsys.readouterr().err.count("\n") == 1


def test_packs_of_another_shape_are_named_by_the_settings_that_shape_them(shards, dies):
    old = S.DenoiseStream(config(shards[0]), plan_of()).state
    new = S.DenoiseStream(config(shards[0], compile=True, precision="bf16"), plan_of())
    dies(lambda: new.load(old), "compile=True", "precision=bf16", "--init_from")


def test_a_tokenizer_that_has_the_markers_says_how_many(dies):
    """The remedy it names is the one that works; without markers there is room to be made."""
    marks = (
        {tokenizer.EOS: 256} | {f"<|mode_{m}|>": 257 + i for i, m in enumerate("RXSI")} | {f"<extra_id_{i}>": 261 + i for i in range(50)}
    )
    for special, size, remedy in ((marks, 311, (311, 50)), ({tokenizer.EOS: 256}, 257, (361, 100))):
        tok = SimpleNamespace(name="t", special=special, vocab_size=size, eos_id=256)
        dies(
            lambda: S.special_of(SimpleNamespace(vocab_size=300, n_sentinels=100, eos_id=None), tok),
            "set --vocab_size={} --n_sentinels={}\n".format(*remedy),
        )
        assert S.special_of(SimpleNamespace(vocab_size=remedy[0], n_sentinels=remedy[1], eos_id=None), tok).sentinel == 261


def test_too_few_sentinels_are_named_where_they_cut_a_source_short(shards, dies):
    dies(lambda: S.DenoiseStream(config(shards[0], n_sentinels=1), plan_of()), "n_sentinels=1", "raise")


def test_every_denoiser_is_held_out_under_a_name_of_its_own(shards):
    """Rows that differ in their mode only, and one that begins with weight 0: each has its own packs of the held-out split."""
    from train import Config

    rows = (("span", 3, 0.15, "R", 1), ("span", 3, 0.15, "X", 1), ("suffix", 0, 0.75, "S", 0))
    keys = {"arch": "encdec", "vocab_size": 361, "max_enc": 128, "max_dec": 64, "eval_tokens": 512, "data": str(shards[0])}
    cfg = Config(objective="denoise", mixture=rows, mixture_end=(0, 1, 1), **keys)
    packs = S.val_batches(cfg)
    assert {name: p[0]["ids"][0].item() for name, p in packs.items()} == {"span3@0.15-R": 257, "span3@0.15-X": 258, "suffix@0.75": 259}
    assert S.DenoiseStream(cfg, plan_of()).names == list(packs)
    for bad in (rows[:1] * 2, rows[:2]):
        with pytest.raises(SystemExit):
            denoise.mixture(bad, mode_tokens=bad[0] == bad[1])  # without modes the two are one


def test_strangers_are_read_by_examples_only(shards):
    """Padding documents of packs of one shape are nobody's encoder text; one example alone has no stranger."""
    from eval.denoising import shuffled

    pack = next(S.DenoiseStream(config(shards[0], compile=True), plan_of()))[0]
    texts = lambda pack: [t.tolist() for t in pack["ids"].split(pack["cu"].diff().tolist())]  # noqa: E731
    n = sum(bool((t != -100).any()) for t in pack["targets"].split(pack["dec_cu"].diff().tolist()))
    before, after = texts(pack), texts(shuffled(pack))
    assert 1 < n < len(before) and after == [before[n - 1], *before[: n - 1], *before[n:]]
    one = S.collate([(np.arange(5), np.arange(3), np.arange(3), 0), S.blank(3, 5, denoise.special_ids(361, 100, eos=7))])
    assert shuffled(one) is None


def test_snap_runs_in_the_stream(shards):
    stream = S.DenoiseStream(config(shards[0], snap=True, length_adaptive=True), plan_of())
    assert sum(int(b["source_tokens"]) for b in next(stream)) > 1000


def test_a_million_tokens_per_second(shards):
    """A floor far below the measured figure (1.3-2.8 M/s per core alone), so that only a real loss of speed fails here."""
    import time

    stream = S.DenoiseStream(config(shards[0], max_enc=512, max_dec=256), plan_of(16384, 1, 10**6))
    next(stream)
    began = time.process_time()
    tokens = sum(b["source_tokens"] for _ in range(20) for b in next(stream))
    assert tokens / (time.process_time() - began) > 3e5


def test_special_ids_are_shown_wherever_eos_stands():
    """Qwen's and SmolLM2's EOS lie far from the modes; showing one must not look for a mode of that number."""
    from eval.denoising import show

    for eos in (0, 7, 256):
        sp = denoise.special_ids(361, 100, eos=eos)
        assert (
            show(np.array([sp.mode + 2, 65, 66, sp.sentinel, sp.sentinel + 9, 67, eos]), sp, tokenizer.load("bytes"))
            == "'[S]AB<0><9>C<eos>'"
        )
