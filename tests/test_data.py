"""Streams: every token a target once per epoch, the same order for any world size, exact resumption, and one clear line for damaged shards.

Shards are written here token by token. Mostly the id of a token is its own place in the source, so that a batch tells where it is from.
"""

import hashlib
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data


def write_shards(dir, docs, split="train", per_shard=40, vocab=1 << 20, eos=0, tokenizer="bytes-test"):
    """docs: lists of token ids, each closed by its EOS already. Called again with another split, it adds to the manifest."""
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    path = dir / "manifest.json"
    about = {"name": "test", "fingerprint": tokenizer, "vocab_size": vocab, "eos_id": eos}
    manifest = {"format": 1, "dtype": "uint32", "tokenizer": about, "source": "test", "shards": []}
    if path.exists():
        manifest = json.loads(path.read_text())
    for i in range(0, len(docs), per_shard):
        part, name = docs[i : i + per_shard], f"{split}-{i // per_shard:05d}"
        raw = np.concatenate([np.asarray(doc, "<u4") for doc in part]).tobytes()
        idx = np.cumsum([0] + [len(doc) for doc in part]).astype("<u8").tobytes()
        (dir / f"{name}.bin").write_bytes(raw)
        (dir / f"{name}.idx").write_bytes(idx)
        sha = {"sha256_bin": hashlib.sha256(raw).hexdigest(), "sha256_idx": hashlib.sha256(idx).hexdigest()}
        size = {"tokens": len(raw) // 4, "documents": len(part), "bytes": len(raw)}
        manifest["shards"].append({"name": name, "split": split, **size, **sha})
    path.write_text(json.dumps(manifest))
    return dir


def make_docs(n_tokens, seed=0, mean=50, first=0):
    """Documents of random length whose token i has the id first + i: a token tells its place."""
    rng, docs, at = np.random.default_rng(seed), [], 0
    while at < n_tokens:
        n = min(int(rng.integers(2, 2 * mean)), n_tokens - at)
        docs.append(np.arange(at, at + n) + first)
        at += n
    return docs


def make_cfg(dir, **keys):
    base = dict(
        data=dir if isinstance(dir, dict) else str(dir),
        packing="windows",
        doc_mask=True,
        chunk=0,
        seq_len=16,
        stages=(),
        seed=1,
        compile=False,
    )
    return SimpleNamespace(**{**base, **keys})


def make_plan(stages, world=1, micro=None, mix=None):
    """stages: [(steps, seq_len, tokens per step)]; mix: a dict, or a function of the step."""
    steps = sum(n for n, _, _ in stages)

    def plan(step):
        ends = np.cumsum([n for n, _, _ in stages])
        _, seq_len, tokens = stages[int(np.searchsorted(ends, step, "right"))]
        m = micro or tokens // world
        shares = mix(step) if callable(mix) else mix or {}
        return SimpleNamespace(step=step, seq_len=seq_len, tokens=tokens, micro_tokens=m, accum=tokens // (m * world), mix=shares)

    plan.steps = steps
    return plan


def quiet(text):
    pass


def open_stream(cfg, plan, rank=0, world=1, log=quiet):
    return data.open_stream(cfg, plan, rank, world, log)


def digest(batches):
    sha = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch.keys() - {"docs", "window"}):  # what `cu` says too
            sha.update(key.encode() + np.asarray(batch[key]).tobytes())
    return sha.hexdigest()


def all_micros(stream):
    return [batch for step in stream for batch in step]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 4096, 5001])
def test_permutation_is_a_bijection_that_depends_on_its_key(n):
    orders = [data.permute(np.arange(n), n, key) for key in ("a", "b")]
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
    assert n < 7 or (orders[0] != orders[1]).any()
    parts = [data.permute(np.arange(i, min(i + 10, n)), n, "a") for i in range(0, n, 10)]
    assert np.concatenate(parts).tolist() == orders[0].tolist()


def test_permutation_mixes():
    order = data.permute(np.arange(10000), 10000, "a")
    assert abs(np.corrcoef(order, np.arange(10000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.01


@pytest.mark.parametrize("n_tokens", [1601, 1600, 1593, 1590, 100])
@pytest.mark.parametrize("doc_mask", [True, False])
def test_every_token_is_a_target_once_per_epoch(tmp_path, n_tokens, doc_mask):
    docs = make_docs(n_tokens)
    dir = write_shards(tmp_path / "d", docs, per_shard=5)
    epoch_rows = -(-(n_tokens - 1) // 16)
    cfg = make_cfg(dir, chunk=48, doc_mask=doc_mask)
    first = {int(doc[0]) for doc in docs} if doc_mask else {0}
    stream = open_stream(cfg, make_plan([(3 * epoch_rows, 16, 16)]))
    orders = []
    for _ in range(3):
        seen, inputs = [], []
        for _ in range(epoch_rows):
            [batch] = next(stream)
            valid = batch["targets"] >= 0
            seen += batch["targets"][valid].tolist()
            inputs += batch["ids"][: batch["tokens"]].tolist()
            assert (batch["targets"][valid] == batch["ids"][valid] + 1).all()
        assert sorted(seen) == [i for i in range(n_tokens) if i not in first]
        assert sorted(set(inputs)) == list(range(n_tokens - ((n_tokens - 1) % 16 == 0)))
        orders.append(seen)
    assert orders[0] != orders[1] and orders[1] != orders[2] or n_tokens == 100


def test_windows_end_at_documents_and_the_token_after_eos_is_no_target(tmp_path):
    docs = make_docs(3000, mean=9)
    dir = write_shards(tmp_path / "d", docs, per_shard=7)
    of = np.repeat(np.arange(len(docs)), [len(doc) for doc in docs])
    for batch in all_micros(open_stream(make_cfg(dir, chunk=96), make_plan([(20, 32, 128)]))):
        cu, ids, pos, targets = (batch[key].numpy() for key in ("cu", "ids", "pos", "targets"))
        assert cu.dtype == np.int32 and cu[0] == 0 and cu[-1] == len(ids) == 128 and (np.diff(cu) > 0).all()
        assert set(range(0, 128, 32)) <= set(cu.tolist())
        assert batch["max_len"] == np.diff(cu).max()
        for a, b in zip(cu[:-1], cu[1:], strict=True):
            assert (pos[a:b] == np.arange(b - a)).all()
            assert len(set(of[ids[a:b]])) == 1
            assert b % 32 == 0 or of[ids[b]] != of[ids[a]] or b >= batch["tokens"]
        follows = np.minimum(ids + 1, 2999)
        inside = (of[follows] == of[ids]) & (follows > ids)
        inside[batch["tokens"] :] = False
        assert (targets == np.where(inside, follows, -100)).all()


def test_without_doc_mask_only_windows_are_segments(tmp_path):
    dir = write_shards(tmp_path / "d", make_docs(1601, mean=9))
    [batch] = next(open_stream(make_cfg(dir, doc_mask=False), make_plan([(2, 16, 64)])))
    assert batch["cu"].tolist() == [0, 16, 32, 48, 64] and (batch["targets"] == batch["ids"] + 1).all()
    [fixed] = next(open_stream(make_cfg(dir, compile=True), make_plan([(2, 16, 64)])))
    assert len(fixed["cu"]) == 65 and fixed["docs"] < 64 and (fixed["cu"].diff() >= 0).all()  # one shape: empty documents at the end


def test_bit_31_is_not_trained_and_never_seen_by_the_model(tmp_path):
    docs = make_docs(800)
    marked = [np.where(doc % 3 == 0, doc + (1 << 31), doc) for doc in docs]
    plain, masked = (write_shards(tmp_path / name, d, per_shard=3) for name, d in (("a", docs), ("b", marked)))
    for packing in ("windows", "documents"):
        plan = make_plan([(5, 128, 256)])
        a, b = (all_micros(open_stream(make_cfg({"x": dir}, packing=packing, seq_len=128), plan)) for dir in (plain, masked))
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x["ids"], y["ids"]) and torch.equal(x["cu"], y["cu"])
            assert torch.equal(torch.where(x["targets"] % 3 == 0, -100, x["targets"]), y["targets"])
        assert sum((y["targets"] >= 0).sum() for y in b) > 0


def test_documents_are_whole_packed_tight_and_once_per_epoch(tmp_path):
    docs = make_docs(60_000, mean=30) + [np.arange(200) + 100_000]
    dir = write_shards(tmp_path / "d", docs, per_shard=100)
    cfg, said = make_cfg(dir, packing="documents", seq_len=128), []
    rows = data.epoch_tokens(cfg) // 128
    stream = open_stream(cfg, make_plan([(2 * rows, 128, 128)]), log=said.append)
    assert "1 are longer than 128 tokens and dropped" in said[0]
    by_first = {int(doc[0]): doc for doc in docs}
    orders = []
    for _ in range(2):
        seen, real = [], 0
        for _ in range(rows):
            [batch] = next(stream)
            ids, cu, targets = batch["ids"].numpy(), batch["cu"].tolist(), batch["targets"].numpy()
            real += batch["tokens"]
            for a, b in zip(cu[:-1], cu[1:], strict=True):
                if a < batch["tokens"]:
                    doc = by_first[int(ids[a])]
                    assert (ids[a:b] == doc).all() and (targets[a : b - 1] == doc[1:]).all() and targets[b - 1] == -100
                    seen.append(int(ids[a]))
                else:
                    assert (targets[a:b] == -100).all() and b == 128
            assert (batch["pos"].numpy()[cu[:-1]] == 0).all()
        assert sorted(seen) == sorted(first for first in by_first if first < 100_000)
        assert real / (rows * 128) > 0.97
        orders.append(seen)
    assert orders[0] != orders[1]
    assert stream.state["sources"]["d"]["epochs"] == 2
    assert stream.state["sources"]["d"]["dropped"] == 2 and "epoch 2 begins" in said[1]


STAGES = [(7, 8, 96), (6, 16, 192), (9, 32, 96), (4, 16, 96)]


def mixed(tmp_path, packing="windows"):
    a = write_shards(tmp_path / "a", make_docs(3001, mean=6), per_shard=20)
    b = write_shards(tmp_path / "b", make_docs(1777, seed=1, mean=6, first=100_000), per_shard=9)
    return make_cfg({"a": a, "b": b}, packing=packing, seq_len=32, stages=tuple({"seq_len": n} for n in (8, 16, 32)))


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_order_is_the_same_for_any_world_size(tmp_path, packing):
    cfg = mixed(tmp_path, packing)
    stages = STAGES if packing == "windows" else [(12, 32, 192)]
    want = [batch for batch in all_micros(open_stream(cfg, make_plan(stages, micro=32, mix={"a": 0.7, "b": 0.3})))]
    for world in (3, 1):
        streams = [open_stream(cfg, make_plan(stages, world, 32, {"a": 0.7, "b": 0.3}), rank, world) for rank in range(world)]
        got = []
        for steps in zip(*streams, strict=True):
            got += [batch for micros in zip(*steps, strict=True) for batch in micros]
            assert len({json.dumps(stream.state) for stream in streams}) == 1
        assert digest(got) == digest(want)
    rows = torch.cat([batch["rows"] for batch in want])
    assert rows.tolist() == list(range(len(rows)))


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_state_round_trips_at_every_step_and_across_world_sizes(tmp_path, packing):
    cfg, mix = mixed(tmp_path, packing), {"a": 0.6, "b": 0.4}
    stages = STAGES if packing == "windows" else [(12, 32, 192)]
    plan = make_plan(stages, micro=32, mix=mix)
    stream = open_stream(cfg, plan)
    states, digests = [json.dumps(stream.state)], []
    for micros in stream:
        digests.append(digest(micros))
        states.append(json.dumps(stream.state))
    assert max(map(len, states)) < 6000
    for step, state in enumerate(states[:-1]):
        again = open_stream(cfg, plan)
        again.load(json.loads(state))
        assert json.dumps(again.state) == state
        assert digest(next(again)) == digests[step]
        assert json.dumps(again.state) == states[step + 1]
        ranks = [open_stream(cfg, make_plan(stages, 3, 32, mix), rank, 3) for rank in range(3)]
        for one in ranks:
            one.load(json.loads(state))
        both = [batch for micros in zip(*map(next, ranks), strict=True) for batch in micros]
        assert digest(both) == digests[step]


def test_golden_order(tmp_path):
    """The order is part of every published run: if this hash changes, no old checkpoint continues its data."""
    batches = all_micros(open_stream(mixed(tmp_path), make_plan(STAGES, micro=32, mix={"a": 0.7, "b": 0.3})))
    assert digest(batches)[:16] == "e5026caeab374731"
    batches = all_micros(open_stream(mixed(tmp_path / "d", "documents"), make_plan([(12, 32, 192)], micro=32)))
    assert digest(batches)[:16] == "6aaee703c151fcf2"


def test_switching_length_drops_less_than_a_window_and_says_so(tmp_path):
    said = []
    dir = write_shards(tmp_path / "d", make_docs(4801))
    cfg = make_cfg(dir, stages=({"seq_len": 8}, {"seq_len": 48}), doc_mask=False)
    stream = open_stream(cfg, make_plan([(1, 8, 104), (98, 48, 48)]), log=said.append)
    targets = [t for batch in all_micros(stream) for t in batch["targets"].tolist() if t >= 0]
    # 104 tokens are two chunks of 48 and a window of the third, whose other 40 tokens fill no window of 48
    assert any("drops 40 tokens" in line for line in said) and stream.state["sources"]["d"]["dropped"] == 40
    assert len(set(targets)) == 4800 - 40 and len(targets) == 104 + 98 * 48


def test_mix_within_one_percent_of_any_million_tokens_and_changes_without_lag(tmp_path):
    dirs = {}
    for i, name in enumerate(("x", "y", "z")):
        dirs[name] = write_shards(tmp_path / name, [np.arange(50_000) + i * 100_000], tokenizer="same")
    steps, tokens = 30, 98_304
    cfg = make_cfg(dirs, seq_len=2048, chunk=6144, doc_mask=False)

    def mix(step):
        return {"x": 0.65, "y": 0.25, "z": 0.10} if step < 20 else {"x": 0.2, "y": 0.8}

    said = []
    stream = open_stream(cfg, make_plan([(steps, 2048, tokens)], mix=mix), log=said.append)
    batches = all_micros(stream)
    source = torch.cat([batch["source"] for batch in batches]).numpy()
    real = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
    rows = 1_000_000 // 2048
    for first in range(0, 20 * 48 - rows, 7):
        share = np.bincount(source[first : first + rows], minlength=3) / rows
        assert np.abs(share - [0.65, 0.25, 0.10]).max() < 0.01
    late = source[20 * 48 + 3 :]  # one chunk may be carried over the switch
    assert np.abs(np.bincount(late, minlength=3) / len(late) - [0.2, 0.8, 0]).max() < 0.02 and (late != 2).all()
    state = stream.state["sources"]
    rest = stream.state["rest"][2] if stream.state["rest"] else 0
    assert sum(s["tokens"] for s in state.values()) == real + rest
    assert any("x: epoch 2 begins" in line for line in said)


def test_without_a_mix_sources_are_seen_in_proportion_to_their_length(tmp_path):
    stream = open_stream(mixed(tmp_path), make_plan([(60, 32, 96)]))
    share = torch.cat([batch["source"] for batch in all_micros(stream)]).float().mean()
    assert abs(share - 1777 / 4778) < 0.03


def one_line(dies, dir, word, use=lambda shards: None):
    dies(lambda: use(data.Shards(dir, "train")), word)


def test_damaged_shards_stop_with_one_line(tmp_path, dies):
    def fresh(name):
        return write_shards(tmp_path / name, make_docs(900), per_shard=5)

    one_line(dies, tmp_path / "nowhere", "prepare.text")
    dir = fresh("truncated")
    file = dir / "train-00001.bin"
    file.write_bytes(file.read_bytes()[:-3])
    one_line(dies, dir, "train-00001.bin")
    dir = fresh("missing")
    (dir / "train-00002.idx").unlink()
    one_line(dies, dir, "train-00002.idx")
    for kind in ("bin", "idx"):
        dir = fresh("flipped" + kind)
        file = dir / f"train-00001.{kind}"
        raw = bytearray(file.read_bytes())
        raw[20] ^= 4
        file.write_bytes(raw)
        one_line(dies, dir, f"train-00001.{kind}", use=lambda shards: shards.verify())
    assert data.Shards(fresh("good"), "train").verify() == 8
    dir = fresh("wild")  # an id outside the vocabulary is noticed without --verify, before an embedding sees it
    file = dir / "train-00001.bin"
    raw = np.fromfile(file, "<u4")
    raw[5] = 1 << 25
    raw.tofile(file)
    dies(lambda: all_micros(open_stream(make_cfg(dir), make_plan([(60, 16, 16)]))), str(1 << 25))
    dir = fresh("unsorted")
    file = dir / "train-00000.idx"
    idx = np.fromfile(file, "<u8")
    idx[2] = 1 << 60
    idx.tofile(file)
    for packing in ("windows", "documents"):
        dies(
            lambda: all_micros(open_stream(make_cfg(dir, packing=packing, seq_len=128), make_plan([(9, 128, 128)]))),
            "train-00000.idx holds offsets",
        )


def test_manifests_that_lie_stop_with_one_line(tmp_path, dies):
    dir = write_shards(tmp_path / "d", make_docs(300))
    good = json.loads((dir / "manifest.json").read_text())

    def change(**keys):
        (dir / "manifest.json").write_text(json.dumps({**good, **keys}))

    def entry(**keys):
        change(shards=[{**good["shards"][0], **keys}])

    for text in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000):
        (dir / "manifest.json").write_bytes(text)
        one_line(dies, dir, "manifest.json")
    for keys in ({"format": 2}, {"dtype": "uint16"}, {"tokenizer": {}}, {"tokenizer": None}, {"shards": None}, {"shards": {"a": 1}}):
        change(**keys)
        one_line(dies, dir, "manifest.json")
    for keys in ({"name": "../x-00000"}, {"name": "val-00000"}, {"tokens": -1}, {"tokens": 1e3}, {"tokens": True}, {"tokens": 1 << 62}):
        entry(**keys)
        one_line(dies, dir, "manifest.json")
    change(shards=good["shards"] * 2)
    one_line(dies, dir, "twice")
    entry(tokens=299)
    one_line(dies, dir, "train-00000.bin")


def test_a_training_stream_cannot_open_the_validation_split(tmp_path, dies):
    dir = write_shards(tmp_path / "d", make_docs(300), split="val")
    dies(lambda: open_stream(make_cfg(dir), make_plan([(1, 16, 16)])), "no split 'train'")
    write_shards(dir, make_docs(400, first=1000))
    seen = torch.cat([b["ids"] for b in all_micros(open_stream(make_cfg(dir), make_plan([(25, 16, 16)])))])
    assert seen.min() >= 1000 or (seen[seen < 1000] == 0).all()


def test_a_checkpoint_of_other_data_is_refused(tmp_path, dies):
    a, b = (write_shards(tmp_path / name, make_docs(500, seed=i)) for i, name in enumerate("ab"))
    plan = make_plan([(3, 16, 16)])
    state = open_stream(make_cfg({"x": a}), plan).state
    for cfg in (make_cfg({"x": b}), make_cfg({"y": a}), make_cfg({"x": a}, seed=2), make_cfg({"x": a}, chunk=32)):
        dies(lambda: open_stream(cfg, plan).load(state))
    open_stream(make_cfg({"x": a}), plan).load(state)


def test_settings_that_contradict_stop(tmp_path, dies):
    dir = write_shards(tmp_path / "d", make_docs(500, mean=50))
    for keys in ({"chunk": 24}, {"packing": "documents", "doc_mask": False}, {"packing": "documents", "seq_len": 1}):
        with pytest.raises(SystemExit):
            open_stream(make_cfg(dir, **keys), make_plan([(1, 16, 16)]))
    other = write_shards(tmp_path / "o", make_docs(500), tokenizer="other")
    dies(lambda: open_stream(make_cfg({"a": dir, "b": other}), make_plan([(1, 16, 16)])), "different tokenizers")


class Counter:
    """A stream of numbers that may fail."""

    def __init__(self, stop=10, fail=None):
        self.state, self.stop, self.fail, self.gate = 0, stop, fail, threading.Event()
        self.gate.set()

    def __next__(self):
        if self.state == self.fail:
            self.gate.wait()
            raise SystemExit(2)
        if self.state == self.stop:
            raise StopIteration
        self.state += 1
        return self.state - 1

    def load(self, state):
        self.state = state


def test_prefetch_keeps_order_and_the_state_of_what_was_delivered():
    ahead = data.Prefetch(Counter(), depth=3, pin=False)
    assert ahead.state == 0
    for i in range(5):
        assert next(ahead) == i and ahead.state == i + 1 and ahead.wait >= 0
    ahead.load(2)
    assert list(ahead) == list(range(2, 10)) and ahead.state == 10
    with pytest.raises(StopIteration):
        next(ahead)
    thread = ahead.thread
    ahead.close()
    assert not thread.is_alive()
    never = data.Prefetch(Counter())
    never.close()


def test_prefetch_closes_while_its_queue_is_full():
    ahead = data.Prefetch(Counter(1000), depth=1, pin=False)
    next(ahead)
    time.sleep(0.05)
    thread = ahead.thread
    ahead.close()
    assert not thread.is_alive()


def test_prefetch_raises_at_once():
    broken = Counter(fail=3)
    broken.gate.clear()
    ahead = data.Prefetch(broken, depth=8, pin=False)
    assert next(ahead) == 0
    broken.gate.set()
    deadline = time.time() + 5
    while not ahead.error and time.time() < deadline:
        time.sleep(0.01)
    assert ahead.ready.qsize() >= 2  # what was built before the error is not waited for
    for _ in range(2):
        with pytest.raises(SystemExit):
            next(ahead)
    ahead.close()
    empty = data.Prefetch(Counter(fail=0), depth=1, pin=False)
    with pytest.raises(SystemExit):
        next(empty)


def test_prefetched_training_stream_equals_the_plain_one(tmp_path):
    cfg, plan = mixed(tmp_path), make_plan(STAGES, micro=32, mix={"a": 0.5, "b": 0.5})
    plain, ahead = open_stream(cfg, plan), data.Prefetch(open_stream(cfg, plan), pin=False)
    for step, micros in enumerate(plain):
        assert digest(next(ahead)) == digest(micros) and ahead.state == plain.state
        if step == 9:
            ahead.load(json.loads(json.dumps(ahead.state)))
    ahead.close()


def bytes_tokenizer(dir):
    import tokenizer

    tok = tokenizer.load("bytes")
    tok.save(Path(dir) / "tokenizer")
    return tok


def test_validation_is_deterministic_and_counts_bytes(tmp_path):
    text = "Zwölf Boxkämpfer jagen Viktor. " * 20
    tok = bytes_tokenizer(tmp_path / "d")
    docs = [tok.encode(text) + [tok.eos_id] for _ in range(6)]
    dir = write_shards(tmp_path / "d", docs, split="val", vocab=tok.vocab_size, eos=tok.eos_id)
    whole = data.val_batches(dir, 64)
    assert digest(whole) == digest(data.val_batches(dir, 64))
    n = sum(len(doc) for doc in docs)
    assert sum(batch["tokens"] for batch in whole) in (n - 1, n)
    assert sum(int((batch["targets"] >= 0).sum()) for batch in whole) == n - len(docs)
    # all text but the first byte of each document, which nothing predicts; EOS is scored and is no text
    assert sum(batch["bytes"] for batch in whole) == sum(len(text.encode()) - 1 for _ in docs)
    few = data.val_batches(dir, 64, tokens=640, micro_tokens=256)
    assert [len(batch["ids"]) for batch in few] == [256, 256, 128]
    assert torch.cat([batch["rows"] for batch in few]).tolist() == list(range(10))
    assert all(len(batch["cu"]) == 5 for batch in data.val_batches(dir, 64, tokens=640, micro_tokens=256, doc_mask=False)[:2])  # 4 rows
    tiny = data.val_batches(dir, 8192, tokens=64)
    assert len(tiny) == 1 and len(tiny[0]["ids"]) == 8192 and int((tiny[0]["targets"] >= 0).sum()) == n - len(docs)


def test_a_large_batch_takes_milliseconds_and_memory_stays_constant(tmp_path):
    import tracemalloc

    rng = np.random.default_rng(0)
    docs = [rng.integers(1, 50_000, n) for n in rng.integers(20, 800, 5000)]
    dir = write_shards(tmp_path / "d", docs, per_shard=500)
    for seq_len, chunk, packing, limit in ((8, 6144, "windows", 0.03), (1024, 6144, "windows", 0.03), (1024, 0, "documents", 0.06)):
        cfg = make_cfg(dir, seq_len=seq_len, chunk=chunk, packing=packing)
        stream = open_stream(cfg, make_plan([(1000, seq_len, 98_304)]))
        next(stream)
        seconds = []
        for _ in range(8):
            began = time.perf_counter()
            next(stream)
            seconds.append(time.perf_counter() - began)
        assert min(seconds) < limit, (seq_len, packing, seconds)
        tracemalloc.start()
        next(stream)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(30):
            next(stream)
        assert tracemalloc.get_traced_memory()[0] - before < 200_000
        tracemalloc.stop()


def test_whole_documents_are_held_out_as_they_are_trained(tmp_path, dies):
    """No conversation of the split val is cut: each is in one row, once; those longer than a row are left out, as in training."""
    rng = np.random.default_rng(0)
    docs, tok = [[i + 1] * int(n - 1) + [256] for i, n in enumerate(rng.integers(3, 40, 60))], bytes_tokenizer(tmp_path / "d")
    write_shards(tmp_path / "d", docs, "val", vocab=tok.vocab_size, eos=tok.eos_id, tokenizer=tok.fingerprint)
    found = []
    for batch in data.val_batches(tmp_path / "d", 32, micro_tokens=64, packing="documents"):
        cuts = batch["cu"].tolist()
        assert len(batch["ids"]) % 32 == 0 and all(a // 32 == (b - 1) // 32 for a, b in zip(cuts, cuts[1:], strict=False))
        found += [batch["ids"][a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False) if 256 in batch["ids"][a:b]]
    assert sorted(found) == sorted(doc for doc in docs if len(doc) <= 32) and len(found) < len(docs)
    few = data.val_batches(tmp_path / "d", 32, tokens=96, packing="documents")
    assert len(few[0]["ids"]) == 96
    dies(lambda: data.val_batches(tmp_path / "d", 2, packing="documents"), "longer than seq_len")
