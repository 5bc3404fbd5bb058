"""The loop as a user runs it: exact resumption, exact means, golden losses, every config file, every refusal."""

import glob
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_data import write_shards

import checkpoint
import configurator
import optim
import tokenizer
import train
from eval import perplexity
from model import ModelConfig, build, merged_rectangle, rectangle
from prepare import text

TINY = ["config/debug.py", "--n_layer=2", "--d_model=32", "--dtype=float32", "--progress=False", "--eval_tokens=1024"]


def run(corpus, out, *argv, steps=12):
    train.main([*TINY, f"--data={corpus}", f"--out={out}", f"--max_steps={steps}", *argv])
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(rows):
    return [row["train/loss"] for row in rows if "train/loss" in row]


def weights(out, step):
    return load_file(f"{out}/step-{step:06d}/model.safetensors")


STAGES = ['--stages=({"start": 0, "seq_len": 32}, {"start": 5, "seq_len": 64, "clip": 0.5, "mult": 0.5})']


@pytest.mark.parametrize(
    "extra", [STAGES, ["--ffn=polyglu"], ["--optimizer=muon", "--micro_tokens=256"]], ids=["stages", "polyglu", "muon"]
)
def test_resume_is_bitwise_the_run_never_interrupted(corpus, tmp_path, extra):
    """Saved before, at and after the change of sequence length (step 5), and continued from each."""
    whole = run(corpus, tmp_path / "whole", "--save_every=1", "--keep=20", "--log_every=1", "--eval_every=4", *extra)
    for step in (4, 5, 6):
        out = tmp_path / f"from-{step}"
        resumed = run(corpus, out, f"--resume={tmp_path}/whole/step-{step:06d}", "--log_every=1", "--eval_every=4", "--prefetch=3", *extra)
        assert losses(resumed) == losses(whole)[step:]
        a, b = weights(tmp_path / "whole", 12), weights(out, 12)
        assert all(torch.equal(a[k], b[k]) for k in a)
        a, b = (load_file(f"{d}/step-000012/optim.safetensors") for d in (tmp_path / "whole", out))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_loss_is_the_same_mean_however_the_batch_is_cut(corpus, tmp_path):
    """Micro-batches hold unequal numbers of trained targets here, so a mean of means would differ."""
    one = losses(run(corpus, tmp_path / "one", "--log_every=1", "--seq_len=128"))
    four = losses(run(corpus, tmp_path / "four", "--log_every=1", "--seq_len=128", "--micro_tokens=128"))
    assert one == pytest.approx(four, rel=2e-5)


def test_bytes_trained_on_are_counted_exactly(tmp_path):
    """One epoch is every byte once, but for the first of each document, which nothing predicts; also when resumed between two log lines."""
    tok, left, docs = tokenizer.load("bytes"), 5 * 1024 + 1, []
    tok.save(tmp_path / "words" / "tokenizer")
    while left:
        docs.append(tok.encode("naïve text "[: left - 1])[: left - 1] + [tok.eos_id])
        left -= len(docs[-1])
    for split in ("train", "val"):
        write_shards(tmp_path / "words", docs, split, vocab=tok.vocab_size, eos=tok.eos_id, tokenizer=tok.fingerprint)
    argv = [*TINY, f"--data={tmp_path}/words", f"--out={tmp_path}/run", "--max_steps=0", "--epochs=1", "--eval_every=0", "--save_every=2"]
    train.main([*argv, "--keep=9", "--log_every=1000"])
    train.main([*argv, "--keep=9", "--log_every=1000", f"--resume={tmp_path}/run/step-000002"])
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "data/" in line][-1]
    assert last["step"] == 5 and last["data/words/epochs"] == 1
    assert last["data/words/bytes"] == sum(len(doc) - 2 for doc in docs if len(doc) > 1)
    assert checkpoint.read_state(checkpoint.resolve(tmp_path / "run", "latest"))["bytes"] == {"words": last["data/words/bytes"]}


def test_golden_losses(corpus, tmp_path):
    """The debug model's path on a fixed text; it moves only when the mathematics of a step does."""
    rows = run(corpus, tmp_path / "run", "--log_every=4", "--eval_every=12")
    assert losses(rows) == pytest.approx(GOLDEN, abs=2e-3)
    assert rows[-1]["val/mean/bpb"] == pytest.approx(rows[-1]["val/mean/loss"] / math.log(2), rel=0.02)  # bytes: EOS is the difference


GOLDEN = [5.5650, 5.4716, 5.1006, 4.6538]


def test_what_a_run_leaves_behind(corpus, tmp_path):
    run(corpus, tmp_path / "run", "--eval_every=6", "--save_every=6", steps=12)
    out = tmp_path / "run"
    about = json.loads((out / "config.json").read_text())
    assert about["config"]["d_model"] == 32 and about["files"] == ["config/debug.py"] and about["torch"] == torch.__version__
    assert {"commit", "machine", "world"} <= about.keys()
    model, state = checkpoint.load(out)
    assert state["step"] == 12 and not model.training and state["metrics"]["val/mean/loss"] > 0
    assert model.logits(torch.tensor([[1, 2, 3]])).shape == (1, 3, 257)
    assert (out / "tokenizer").is_dir()
    assert state["tokenizer"] == json.loads(Path(corpus, "manifest.json").read_text())["tokenizer"]["fingerprint"]


def test_no_line_of_a_run_that_sees_the_future_may_pass_for_a_likelihood(corpus, tmp_path):
    polyglu = ["--ffn=polyglu", "--gate=sequence", "--allow_noncausal", "--eval_every=6"]
    rows = run({"a": corpus, "b": corpus}, tmp_path / "run", *polyglu, "--log_every=6")
    assert len(rows) == 5 and all(row["causal"] is False for row in rows)
    measured = [key for row in rows for key in row if key.startswith(("val/", "surprise", "train/loss", "train/a/"))]
    assert len(measured) > 20 and all(key.endswith("_noncausal") for key in measured), measured


def test_init_from_takes_the_weights_and_starts_afresh(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "first", steps=6)
    rows = run(corpus, tmp_path / "second", f"--init_from={tmp_path}/first", "--log_every=1", "--lr=1e-9", steps=2)
    assert rows[0]["step"] == 1
    a, b = weights(tmp_path / "first", 6), weights(tmp_path / "second", 2)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    assert f"new run in {tmp_path}/second; started from step 6 of {tmp_path}/first" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "first")  # what a resumed run started from is no longer asked for, wherever it goes on
    for out in ("second", "third"):
        how = [f"--init_from={tmp_path}/first", f"--resume={tmp_path}/second/step-000002"]
        assert run(corpus, tmp_path / out, *how, "--lr=1e-9", steps=3)[-1]["step"] == 3 and (tmp_path / out / "tokenizer").is_dir()


def test_weights_are_not_started_from_under_another_tokenizer(corpus, tmp_path, dies):
    run(corpus, tmp_path / "first", steps=1)
    (tmp_path / "text.txt").write_text("the same again and again and again " * 400)
    text.main(
        [f"--from={tmp_path}/text.txt", f"--out={tmp_path}/other", "--tokenizer=bpe:260", "--separator=again", "--val=0.1", "--workers=1"]
    )
    contrast = dict(objective="contrast", data=f"{tmp_path}/other", init_from=f"{tmp_path}/first", vocab_size=263)
    for call in (
        lambda: run(tmp_path / "other", tmp_path / "second", f"--init_from={tmp_path}/first", "--vocab_size=263", steps=1),
        lambda: perplexity.main([f"--ckpt={tmp_path}/first", f"--data={tmp_path}/other"]),
        lambda: train.check_vocabulary(train.Config(**contrast)),
    ):
        dies(call, "is in another tokenizer")


def test_skipped_steps_are_counted_and_change_no_weight(corpus, tmp_path, monkeypatch):
    sums, calls = train.token_sums, []

    def poisoned(model, raw, batch):
        terms, each = sums(model, raw, batch)
        calls.append(1)
        return ({k: v * math.nan for k, v in terms.items()} if len(calls) == 3 else terms), each

    monkeypatch.setattr(train, "token_sums", poisoned)
    run(corpus, tmp_path / "run", "--on_nonfinite=skip", "--save_every=1", "--keep=9", steps=4)
    assert checkpoint.load(tmp_path / "run" / "step-000004")[1]["skipped"] == 1
    a, b, c = (weights(tmp_path / "run", s) for s in (2, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(b[k], c[k]) for k in b)


def test_a_step_that_is_not_finite_stops_the_run_and_names_the_weight(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "run", steps=4)
    model = build(ModelConfig(vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, d_model=32, max_len=256))
    state = checkpoint.read_state(tmp_path / "run/step-000004")
    checkpoint.load_weights(tmp_path / "run", model)
    model.decoder.blocks[1].ffn.down.weight.data[0, 0] = math.nan
    checkpoint.save(tmp_path / "bad", 4, model, None, state, keep=1)
    with pytest.raises(SystemExit) as stop:
        run(corpus, tmp_path / "next", f"--init_from={tmp_path}/bad")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "step 0" in line and "decoder.blocks.1.ffn.down.weight" in line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--learning_rate=1"], ["learning_rate", "did you mean"]),
        (["--n_layer=2.5"], ["n_layer"]),
        (["--data=/nowhere"], ["/nowhere"]),
        (["--vocab_size=200"], ["vocab_size=200", "257"]),
        (["--seq_len=512"], ["max_len"]),
        (["--tokens_per_step=1000"], ["tokens"]),
        (["--device=tpu"], ["tpu"]),
        (["--init_from=/nowhere"], ["/nowhere"]),
        (["--ffn=polyglu", "--gate=sequence"], ["allow_noncausal"]),
    ],
    ids=lambda v: v[0] if v[0].startswith("--") else "",
)
def test_errors_of_the_user_are_one_line(corpus, tmp_path, dies, argv, words):
    given = argv if "--data" in argv[0] else [f"--data={corpus}", f"--out={tmp_path / 'run'}", "--max_steps=12", *argv]
    dies(lambda: train.main([*TINY, *given]), *words)


def test_a_second_run_never_overwrites_the_first(corpus, tmp_path, dies):
    run(corpus, tmp_path / "run", steps=4)
    dies(lambda: run(corpus, tmp_path / "run", steps=4), "--resume")


@pytest.mark.parametrize("path", sorted(set(glob.glob("config/*.py")) - {"config/fp8_table.py"}))
def test_the_launch_line_of_every_config_is_a_whole_recipe(path):
    """The first `train.py ...` line that a config file shows loads, plans, and builds on the meta device."""
    words = re.search(r"train\.py ((?:config/\w+\.py ?|--\w+=[\w./]+ ?)+)", Path(path).read_text())[1].split()
    assert path in words
    cfg, files = configurator.load(train.Config, words)
    assert optim.Plan(cfg, 1, epoch_tokens=10**7).steps > 0
    if cfg.objective != "latent":
        assert build(cfg, "meta").num_params() > 0


OVERFIT = {
    "plain": {},
    "gqa, factorised": dict(n_kv_head=2, embed_rank=32),
    "untied, bias": dict(tie=False, qkv_bias=True, qk_norm=False),
    "polyglu": dict(ffn="polyglu"),
    "polyglu lagged": dict(ffn="polyglu", gate="lagged", gate_block=4),
    "polyglu static": dict(ffn="polyglu", gate="static"),
    "encdec": dict(arch="encdec"),
    "encdec polyglu": dict(arch="encdec", ffn="polyglu", cross_rope="continue"),
    "recomputed": dict(ffn="polyglu", remat=1),
}


@pytest.mark.parametrize("name", OVERFIT)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overfits_one_batch(name, optimizer):
    cfg = train.Config(
        vocab_size=50, n_layer=2, n_head=4, d_model=64, max_len=32, optimizer=optimizer, lr=5e-3, weight_decay=0.0, **OVERFIT[name]
    )
    model = build(cfg).train()
    ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = merged_rectangle(ids[:, 8:], ids[:, :-1]) | {"rows": torch.arange(1)} if cfg.arch == "encdec" else rectangle(ids[:, :-1])
    targets = ids[:, 1:].flatten()
    opt = optim.build_optimizer(model, cfg)
    for _ in range(80):
        loss = model.nll(model(batch), targets)[0] / len(targets)
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert loss < 0.1
