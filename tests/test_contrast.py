"""InfoNCE by hand, and gradient caching: one number whatever the micro-batches and ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import contrast
import model as M
import tokenizer
import train
from eval import embedding
from model import ModelConfig
from train import Config

TOK = tokenizer.load("bytes")


def keys(*values):
    return torch.tensor(values)


def test_worked_examples():
    eye = torch.eye(2, dtype=torch.float64)
    loss = contrast.info_nce(eye, eye, keys(0, 1), keys(10, 11), keys(0, 1), 1.0)
    assert torch.allclose(loss.mean(), torch.tensor(0.313262, dtype=torch.float64), atol=1e-6)  # ln(1 + 1/e)
    assert torch.allclose(contrast.info_nce(eye, eye, keys(0, 1), keys(10, 11), keys(0, 1), 1.0, symmetric=True).mean(), loss.mean())
    c = torch.tensor([[1.0, 0], [0, 1], [0, 1], [-1, 0]])
    q = c[:2] * 3  # lengths do not matter
    want = -math.log(math.exp(2) / (math.exp(2) + 1 + 1 + math.exp(-2)))
    assert abs(float(contrast.info_nce(q, c, keys(0, 1), keys(8, 9), keys(0, 1, 2, 3), 0.5)[0]) - want) < 1e-6
    masked = contrast.info_nce(
        q, c, keys(0, 1), keys(8, 9), keys(0, 1, 1, 3), 0.5
    )  # candidate 2 is a twin of 1: never a negative of query 1
    assert abs(float(masked[0]) - want) < 1e-6
    assert abs(float(masked[1]) + math.log(math.exp(2) / (math.exp(2) + 2))) < 1e-6
    echo = contrast.info_nce(q, c, keys(0, 1), keys(3, 9), keys(0, 1, 2, 3), 0.5)  # candidate 3 is the text of query 0
    assert float(echo[0]) < want


def pairs_file(folder, n=40):
    rng = np.random.default_rng(0)
    words = lambda: " ".join(rng.choice(["cat", "dog", "sun", "rain", "tree", "stone", "blue", "red"], 5))  # noqa: E731
    rows = [{"query": words(), "positive": words(), "negatives": [words()] * (i % 3)} for i in range(n)]
    rows[3]["positive"] = rows[4]["positive"]  # a twin
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(data, **changes):
    base = {"arch": "encdec", "vocab_size": 361, "n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 48, "max_len": 64, "max_enc": 48}
    base |= {"objective": "contrast", "data": str(data), "contrast_pairs": 16, "contrast_micro": 4, "init_std": 0.1}
    return Config(**(base | changes))


@pytest.fixture(autouse=True)
def bytes_for_everybody(monkeypatch):
    monkeypatch.setattr(contrast.tokenizer, "load", lambda path: TOK)


def gradients(cfg, symmetric=False):
    model = contrast.build(cfg).double().set_dtype(torch.float64)
    plan = SimpleNamespace(steps=5)
    stream = contrast.PairStream(cfg, plan, 0, 1)
    batches = next(stream)
    contrast.prepare(model, model, batches)
    total = 0
    for batch in batches:
        term = contrast.sums(model, model, batch)[0]["loss"]
        total += float(term.detach())
        term.backward()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"contrast_symmetric": True}, {"contrast_pooling": "weighted_mean"}, {"ffn": "polyglu"}])
def test_any_cut_into_micro_batches_gives_the_same(tmp_path, changes):
    data = pairs_file(tmp_path)
    want, grads = gradients(config(data, contrast_micro=16, **changes))
    model = contrast.build(config(data, contrast_micro=16, **changes)).double().set_dtype(torch.float64)
    batch = next(contrast.PairStream(config(data, contrast_micro=16), SimpleNamespace(steps=1), 0, 1))[0]  # without any caching
    x = contrast.vectors(model, batch, changes.get("contrast_pooling", "mean"))
    n, c = batch["queries"], config(data)
    direct = contrast.info_nce(
        x[:n], x[n:], torch.arange(n), batch["key"][:n], batch["key"][n:], c.contrast_tau, "contrast_symmetric" in changes
    ).sum()
    direct.backward()
    assert abs(float(direct.detach()) - want) < 1e-9
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12)
    for micro in (8, 4, 1):
        got, theirs = gradients(config(data, contrast_micro=micro, **changes))
        assert abs(got - want) < 1e-9
        for name in grads:
            torch.testing.assert_close(theirs[name], grads[name], rtol=1e-8, atol=1e-11)
    assert not any(name.startswith("decoder.") for name in grads) and any(name.startswith("encoder.") for name in grads)


RANKS = """
import sys, torch, torch.distributed as dist
sys.path[:0] = ["tests", "."]
import contrast, test_contrast as T
from types import SimpleNamespace
contrast.tokenizer.load = lambda path: T.TOK
dist.init_process_group("gloo")
cfg = T.config(sys.argv[1], contrast_micro=4)
model = contrast.build(cfg).double().set_dtype(torch.float64)
wrapped = torch.nn.parallel.DistributedDataParallel(model)
batches = next(contrast.PairStream(cfg, SimpleNamespace(steps=5), dist.get_rank(), 2))
contrast.prepare(wrapped, model, batches)
total = torch.zeros(1, dtype=torch.float64)
for i, batch in enumerate(batches):
    wrapped.require_backward_grad_sync = i == len(batches) - 1
    term = contrast.sums(wrapped, model, batch)[0]["loss"]
    total += term.detach()
    (term * 2).backward()  # the wrapper averages over ranks
dist.all_reduce(total)
if dist.get_rank() == 0:
    torch.save({"total": total, "grads": {n: p.grad for n, p in model.named_parameters() if p.grad is not None}}, sys.argv[2])
dist.destroy_process_group()
"""


def test_two_ranks_equal_one(tmp_path):
    data = pairs_file(tmp_path)
    want, grads = gradients(config(data))
    out, env = (
        tmp_path / "out.pt",
        os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 500)},
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(data), str(out)], env=env | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"}
        )
        for r in range(2)
    ]
    assert [r.wait(120) for r in ranks] == [0, 0]
    got = torch.load(out, weights_only=True)
    assert abs(float(got["total"]) - want) < 1e-8
    for name in grads:
        torch.testing.assert_close(got["grads"][name], grads[name], rtol=1e-7, atol=1e-10)


def test_stream_is_resumable_and_covers_an_epoch(tmp_path, dies):
    cfg, plan = config(pairs_file(tmp_path, 32)), SimpleNamespace(steps=4)
    one = [batch for step in contrast.PairStream(cfg, plan, 0, 1) for batch in step]
    texts = [tuple(row) for b in one[:8] for row in b["ids"].split(b["cu"].diff().tolist())[:4] for row in [row.tolist()]]
    assert len(texts) == 32 and len(set(texts)) == 32  # two steps of 16: every query once
    later = contrast.PairStream(cfg, plan, 1, 2)
    later.load(later.state | {"step": 2})
    assert torch.equal(next(later)[0]["ids"], one[9]["ids"])
    dies(lambda: contrast.PairStream(config(cfg.data, contrast_pairs=10), plan, 0, 1), "contrast_pairs=10", "set --contrast_pairs=12")
    for change in ({"contrast_pairs": 8}, {"seed": 2}, {"max_enc": 40}):
        with pytest.raises(SystemExit):
            contrast.PairStream(config(cfg.data, **change), plan, 0, 1).load(later.state)
    with pytest.raises(SystemExit):
        contrast.build(ModelConfig(arch="decoder"))


def test_rows_that_are_no_pairs_are_named(tmp_path, dies):
    """A text of negatives would be a negative per character, and null no text at all."""
    good, plan = {"query": "a", "positive": "b"}, SimpleNamespace(steps=1)
    for bad in (good | {"negatives": "words"}, good | {"positive": None}, good | {"negatives": ["a", None]}, {"query": "a"}, ["a", "b"]):
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [good | {"negatives": ["x"]}] * 16 + [bad]))
        dies(lambda: contrast.PairStream(config(tmp_path / "pairs.jsonl"), plan, 0, 1), "row 17 is not")
    dies(lambda: contrast.open_stream(config(tmp_path / "pairs.jsonl"), plan, 0, 1), "set --init_from=RUN")


def test_crops_of_documents(tmp_path):
    from tests.test_denoise_stream import documents, write_shards

    write_shards(tmp_path / "shards", {"train": documents(50)})
    for shortest in (2, 17):  # a crop is no longer than the encoder reads, however short that is
        few = next(contrast.PairStream(config(tmp_path / "shards", max_enc=shortest), SimpleNamespace(steps=1), 0, 1))
        assert all(1 < b["cu"].diff().min() <= b["cu"].diff().max() <= shortest for b in few)
    batches = next(contrast.PairStream(config(tmp_path / "shards"), SimpleNamespace(steps=1), 0, 1))
    assert all(torch.equal(b["key"][:4], b["key"][4:]) and b["cu"].diff().max() <= 48 for b in batches)
    model = contrast.build(config(tmp_path / "shards"))
    contrast.prepare(model, model, batches)
    assert all(torch.isfinite(b["value"]) for b in batches)


def test_out_of_memory_names_what_makes_it_smaller(capsys):
    from machine import enough_memory

    for micro, remedy in ((12, "--contrast_micro=6"), (9, "--contrast_micro=3"), (1, "--max_enc=24")):
        with pytest.raises(SystemExit), enough_memory(config("x", contrast_micro=micro), None):
            raise torch.OutOfMemoryError
        assert capsys.readouterr().err.endswith(f"try {remedy}\n")


def test_through_the_loop(tmp_path, capsys):
    """train.py runs it, saves it, and leaves the decoder as it was, to the bit; the run can be embedded with."""
    import checkpoint
    from model import Embedder, build

    cfg, data = config("none"), pairs_file(tmp_path)
    shape = {k: getattr(cfg, k) for k in ModelConfig.__dataclass_fields__}
    checkpoint.save(tmp_path / "init", 0, build(ModelConfig(**shape)), None, {"config": shape, "metrics": {}, "tokens": 0}, keep=1)
    TOK.save(tmp_path / "init" / "tokenizer")
    keys = {**shape, "contrast_pairs": 16, "contrast_micro": 4, "max_enc": 48, "max_steps": 3, "warmup": 1, "lr": 1e-2, "log_every": 1}
    keys = {k: v for k, v in keys.items() if v is not None} | {"objective": "contrast", "init_from": str(tmp_path / "init")}
    arguments = [f"--{k}={v}" for k, v in keys.items()] + [f"--data={data}", f"--out={tmp_path / 'run'}", "--dtype=float32"]
    done = subprocess.run(
        [sys.executable, "train.py", *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (before, _), (after, _) = checkpoint.load(tmp_path / "init"), checkpoint.load(tmp_path / "run")
    old, new = before.state_dict(), after.state_dict()
    assert all(torch.equal(old[k], new[k]) for k in old if k.startswith("decoder."))
    assert any(not torch.equal(old[k], new[k]) for k in old if k.startswith("encoder."))
    assert Embedder.load(tmp_path / "run").encode(["a"]).shape == (1, 32)


def test_pairs_with_human_scores_choose_the_best_step(tmp_path, corpus, monkeypatch, dies):
    """val/sts/spearman is scipy's, of the checkpoint as saved; "-NAME" makes the highest the best; training goes on as without."""
    rng = np.random.default_rng(1)
    rows = [{"sentence1": f"the {i} apples", "sentence2": f"{rng.integers(9)} pears", "score": float(rng.integers(6))} for i in range(30)]
    file = tmp_path / "dev.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, run = pairs_file(tmp_path), tmp_path / "run"
    base = ["--arch=encoder", "--ffn=polyglu", "--vocab_size=257", "--n_layer=2", "--n_head=2", "--d_model=32", "--d_ff=48", "--max_enc=48"]
    base += ["--objective=contrast", "--contrast_pairs=16", "--contrast_micro=4", "--lr=1e-3", "--warmup=0", "--log_every=1"]
    base += ["--dtype=float32", "--device=cpu"]
    train.main([*base, f"--out={tmp_path}/start", f"--data={corpus}", "--max_steps=1"])
    base += [f"--data={pairs}", f"--init_from={tmp_path}/start", "--max_steps=6"]
    read_rows, read_tok, opened = embedding.read_rows, contrast.tokenizer.load, []
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "read_rows", lambda stem, *columns: opened.append(stem) or read_rows(stem, *columns))
        patch.setattr(contrast.tokenizer, "load", lambda path: opened.append(Path(path)) or read_tok(path))
        patch.setattr(embedding, "interval", None)  # nobody would hear of it
        train.main(
            [*base, f"--out={run}", f"--eval_sts={file}", "--eval_every=2", "--save_every=2", "--keep=0", "--best_metric=-val/sts/spearman"]
        )
    assert opened.count(file) == opened.count(run) == 1  # at three evaluations
    train.main([*base, f"--out={tmp_path}/blind"])
    read = lambda out: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]  # noqa: E731
    found = {row["step"]: row["val/sts/spearman"] for row in read(run) if "val/sts/spearman" in row}
    assert sorted(found) == [2, 4, 6]
    for step, value in found.items():
        a, b = (
            M.Embedder.load(run / f"step-{step:06d}", dtype=torch.float32, max_length=48).encode([row[side] for row in rows])
            for side in ("sentence1", "sentence2")
        )
        assert abs(spearmanr((a * b).sum(1), [row["score"] for row in rows]).statistic - value) < 2e-3  # two near values may change places
    assert (run / "best").resolve().name == f"step-{max(found, key=found.get):06d}"
    kept = json.loads((run / "latest" / "state.json").read_text())["best"]
    longer = [f"--out={run}", f"--eval_sts={file}", "--save_every=1", "--eval_every=1", "--keep=0", "--resume", "--max_steps=8"]
    train.main([*base[:-1], *longer, "--best_metric=-val/sts/pearson"])
    again = {row["step"]: row["val/sts/pearson"] for row in read(run) if row["step"] > 6 and "val/sts/pearson" in row}
    assert kept == max(found.values()) and (run / "best").resolve().name == f"step-{max(again, key=again.get):06d}"  # of two measures
    losses = [[row["train/loss"] for row in read(out) if "train/loss" in row][:6] for out in (run, tmp_path / "blind")]
    assert losses[0] == losses[1]
    (other := tmp_path / "pairs.py").write_text(f"eval_sts = '{file}'\n")  # a file of settings may go before any objective
    few = ["--vocab_size=257", "--n_layer=1", "--n_head=2", "--d_model=16", "--seq_len=16", "--tokens_per_step=32", "--max_steps=1"]
    train.main([str(other), *few, f"--data={corpus}", f"--out={tmp_path}/decoder", "--device=cpu"])
    assert not any("sts" in key for row in read(tmp_path / "decoder") for key in row)
    table = file.with_suffix(".csv")  # beside dev.jsonl: what was named is read
    table.write_text("sentence1,sentence2,score\na,b,1\nc,d,2.5\n")
    assert contrast.ranking(Config(objective="contrast", eval_sts=str(table))) and not contrast.ranking(Config(eval_sts="of no use here"))
    table.write_text("sentence1,sentence2,score\na,b,high\n")
    dies(lambda: train.main([*base, f"--eval_sts={table}"]), "dev.csv", "'high'; a score is a number")  # not at the first evaluation
    dies(lambda: train.main([*base, f"--eval_sts={tmp_path}/none.jsonl"]), "none.jsonl", "--eval_sts", "prepare.sts")
