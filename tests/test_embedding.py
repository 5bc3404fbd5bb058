"""From a causal checkpoint to sentence vectors that anybody can load: poolings, metrics, export, and the whole chain once."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

import checkpoint
import eval.embedding as E
import hub
import tokenizer
from eval import denoising, encode, sanity
from model import Embedder, ModelConfig, build, flat, pool
from prepare import encdec, later_token, sentence, sts

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A random Qwen3 folder with a byte-level tokenizer: 257 tokens, 300 rows, so that 43 rows have no token."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("parts") / "qwen"
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, max_position_embeddings=512, rope_theta=1e6, tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.bpe(tokenizer.byte_alphabet(), [], tokenizer.GPT2, {"<|endoftext|>": 256}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def run(qwen, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "encdec"
    encdec.main([f"--from={qwen}", f"--out={out}"])
    return out


# ---- initialisation ---------------------------------------------------------------------------------------------------------


def test_special_rows_and_ids(qwen, run):
    tok = tokenizer.load(run)
    assert tok.vocab_size == 400 and tok.special["<|mode_R|>"] == 296 and tok.special["<|mode_I|>"] == 299
    assert tok.special["<extra_id_0>"] == 300 and tok.special["<extra_id_99>"] == 399 and tok.special["<|unused_38|>"] == 295
    assert tok.encode("<extra_id_0>") == list(b"<extra_id_0>")  # in a text it stays text
    again = Path(run) / "again"
    tok.save(again)
    assert tokenizer.load(again).special == tok.special
    hf = pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_file=str(run / "tokenizer/tokenizer.json"))
    assert hf.convert_tokens_to_ids(["<|unused_0|>", "<|mode_S|>", "<extra_id_7>"]) == [257, 298, 307]
    hf.save_pretrained(run / "hf")
    back = type(hf).from_pretrained(run / "hf")
    assert back.encode("<extra_id_7>") == [307] and back.decode([307]) == "<extra_id_7>"
    facts = json.loads((run / "init.json").read_text())
    assert facts["modes"] == [296, 299] and facts["sentinels"] == [300, 399] and facts["parameters"]["layer"] == 43_184
    model, _ = checkpoint.load(run)
    source = hub.read_model(qwen)[1]
    assert torch.equal(model.embed.weight[:296], source["embed.weight"][:296])
    std = model.embed.weight[296:400].std() / model.embed.weight[:257].std()
    assert 0.8 < std < 1.2 and not model.embed.weight[400:].any()


def test_verify_passes_and_every_damage_is_found(qwen, run, capsys):
    fields, state, _ = encdec.read(qwen, torch.float32)
    assert encdec.verify(fields, state, run, 257)
    for name, damage in (
        ("encoder.blocks.1.ffn.down.weight", lambda t: t.add_(1e-3)),
        ("decoder.norm.weight", lambda t: t.mul_(1.01)),
        ("embed.weight", lambda t: t[5].zero_()),
        ("embed.weight", lambda t: t[310].copy_(t[311])),
    ):
        model, saved = checkpoint.load(run)
        with torch.no_grad():
            damage(model.state_dict()[name])
        bad = run.parent / f"bad-{len(os.listdir(run.parent))}"
        checkpoint.save(bad, 0, model, None, saved, keep=1)
        (bad / "tokenizer").symlink_to(run / "tokenizer")
        assert not encdec.verify(fields, state, bad, 257), name
    capsys.readouterr()


def test_a_run_of_prism_is_a_source_too(tmp_path, capsys):
    """A decoder on bytes: no unused rows, a tokenizer that is no json; and what cannot be a source."""
    cfg = ModelConfig(vocab_size=257, n_layer=1, n_head=2, d_model=16, max_len=64)
    state = {"config": {**cfg.__dict__}, "metrics": {}, "tokens": 0}
    checkpoint.save(tmp_path / "lm", 3, build(cfg), None, state, keep=1)
    tokenizer.load("bytes").save(tmp_path / "lm" / "tokenizer")
    encdec.main([f"--from={tmp_path / 'lm'}", f"--out={tmp_path / 'both'}", "--num_sentinels=10", "--verify"])
    model, _ = checkpoint.load(tmp_path / "both")
    assert model.cfg.vocab_size == 257 + 4 + 10 and tokenizer.load(tmp_path / "both").encode("é") == [195, 169]
    # a trained PolyGLU: its tau is not 1
    poly = ModelConfig(**{**cfg.__dict__, "ffn": "polyglu", "init_std": 0.5})
    checkpoint.save(tmp_path / "poly", 3, build(poly), None, state | {"config": {**poly.__dict__}, "tau": 0.1}, keep=1)
    tokenizer.load("bytes").save(tmp_path / "poly" / "tokenizer")
    encdec.main([f"--from={tmp_path / 'poly'}", f"--out={tmp_path / 'poly2'}", "--num_sentinels=10", "--verify"])
    untied = build(ModelConfig(**{**cfg.__dict__, "tie": False}))
    checkpoint.save(tmp_path / "untied", 0, untied, None, state | {"config": {**cfg.__dict__, "tie": False}}, keep=1)
    tokenizer.load("bytes").save(tmp_path / "untied" / "tokenizer")
    for source in (tmp_path / "untied", tmp_path / "both", tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            encdec.main([f"--from={source}", f"--out={tmp_path / 'x'}"])
    capsys.readouterr()


# ---- pooling and the embedder -----------------------------------------------------------------------------------------------


def test_poolings_by_hand():
    h = torch.arange(5.0)[:, None].expand(5, 3)  # mask 0 0 1 1 1: the text is h[2:]
    batch = {"cu": torch.tensor([0, 3], dtype=torch.int32), "pos": torch.arange(3)}
    for how, want in (("mean", 3), ("cls", 2), ("last", 4), ("weighted_mean", 20 / 6)):
        assert torch.allclose(pool(h[2:], batch, how, normalize=False), torch.full((1, 3), float(want)))
        assert torch.allclose(pool(h[2:], batch, how).norm(), torch.ones(1))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "weighted_mean"])
def test_embedder_does_not_care_about_batches(run, pooling):
    embedder = Embedder.load(run, dtype=torch.float32, pooling=pooling)
    texts = ["a", "", "some words", "x" * 700, "two men pushed carts"] * 3
    all_at_once = embedder.encode(texts)
    assert all_at_once.shape == (15, 64) and all_at_once.dtype == np.float32 and np.isfinite(all_at_once).all()
    for one_by_one in (
        embedder.encode(texts, batch_size=1),
        embedder.encode(texts, batch_tokens=600),
        np.stack([embedder.encode(t) for t in texts]),
    ):
        assert np.abs(one_by_one - all_at_once).max() < 1e-5
    assert embedder.encode("a").shape == (64,) and embedder.encode([]).shape == (0, 64)
    [row] = embedder.rows(["x" * 700])
    assert len(row) == 512 and row[-1] == 256
    assert embedder.encode(texts, max_length=4)[3] == pytest.approx(embedder.encode("xxx"), abs=1e-6)
    hidden, pooled = embedder(flat([[1, 2, 3]]))
    assert hidden.shape == (3, 64) and pooled.shape == (1, 64)


def test_an_embedder_of_a_decoder_is_causal_unless_told(qwen, tmp_path, capsys):
    hub.main(["import", f"--from={qwen}", f"--out={tmp_path / 'lm'}"])
    moved = []
    for settings in ({}, {"causal": False}):
        embedder, said = Embedder.load(tmp_path / "lm", dtype=torch.float32, **settings), capsys.readouterr().err
        assert said == "" if settings else said.count("\n") == 1 and "causal=False removes its mask" in said
        with torch.no_grad():
            a, b = (embedder(flat([[1, 2, 3, last]]))[0] for last in (4, 5))
        moved.append(float((a - b)[:-1].abs().max()))
    assert moved[0] == 0 and moved[1] > 1e-3


# ---- export -----------------------------------------------------------------------------------------------------------------


def options(**changes):
    plain = {k: v for k, v in sentence.OPTIONS.items() if not isinstance(v, type)}
    return SimpleNamespace(**(plain | {"to": "sentence-transformers"} | changes))


def test_later_token_test_fails_a_causal_model(qwen, run, tmp_path):
    """The released causal folder must fail what the exported one passes: a test that any model passes proves nothing."""
    good = sentence.export(options(ckpt=str(run), out=str(tmp_path / "st")))
    assert later_token.holds(later_token.later_token(good))
    causal = later_token.later_token(qwen)
    assert not later_token.holds(causal) and max(causal.values()) == 0


@pytest.mark.parametrize("pooling", list(sentence.POOLING))
def test_export_import_export_is_the_same_folder(run, tmp_path, pooling):
    pytest.importorskip("sentence_transformers")
    arguments = ["--to=sentence-transformers", "--max_seq_length=64"]
    hub.main(["export", f"--ckpt={run}", f"--out={tmp_path / 'one'}", *arguments, f"--pooling={pooling}"])
    hub.main(["import", f"--from={tmp_path / 'one'}", f"--out={tmp_path / 'run'}"])
    hub.main(["export", f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'two'}", *arguments])
    for name in ("model.safetensors", "config.json", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    texts = ["one text", "another <|endoftext|>", "x" * 90]
    a, b = (Embedder.load(tmp_path / name).encode(texts) for name in ("one", "two"))
    assert np.array_equal(a, b)


def test_stock_folders_are_read_as_their_authors_meant_or_not_at_all(run, tmp_path, capsys):
    """Flags in place of a pooling's name; a ByteLevel post-processor adds no EOS; markers that we would not add are refused."""
    sentence.export(options(ckpt=str(run), out=str(tmp_path / "st"), pooling="last"))
    pooling, stored = tmp_path / "st/1_Pooling/config.json", tmp_path / "st/tokenizer.json"
    plain = json.loads(stored.read_text())
    template, byte = plain["post_processor"], {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False}
    flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    pooling.write_text(json.dumps({"word_embedding_dimension": 64} | flags))
    for post, eos in ((template, True), (byte, False), ({"type": "Sequence", "processors": [byte, template]}, True), (None, False)):
        stored.write_text(json.dumps(plain | {"post_processor": post}))
        found = sentence.read(tmp_path / "st")[2]
        assert found == {"pooling": "last", "append_eos": eos, "normalize": True, "max_length": 512}
    stored.write_text(json.dumps(plain | {"post_processor": template | {"single": template["single"][::-1]}}))
    with pytest.raises(SystemExit):
        sentence.read(tmp_path / "st")
    stored.write_text(json.dumps(plain))
    pooling.write_text(json.dumps(flags | {"pooling_mode_mean_tokens": True}))
    with pytest.raises(SystemExit):
        sentence.read(tmp_path / "st")
    assert "EOS behind it" in (said := capsys.readouterr().err) and "['mean', 'lasttoken']" in said


def test_a_card_says_what_was_trained_and_no_more(qwen, run, tmp_path, dies):
    model, saved = checkpoint.load(run)
    for name, more in (
        ("contrast", {"objective": "contrast", "mixture": "recommended"}),
        ("denoise", {"objective": "denoise", "mixture": "ul2"}),
    ):
        checkpoint.save(tmp_path / name, 0, model, None, saved | {"config": saved["config"] | more}, keep=1)
        (tmp_path / name / "tokenizer").symlink_to(run / "tokenizer")
        for to in ("transformers", "sentence-transformers"):
            hub.main(["export", f"--ckpt={tmp_path / name}", f"--to={to}", f"--out={tmp_path / name / to}"])
            card = (tmp_path / name / to / "README.md").read_text()
            st = to[0] == "s"
            assert [card.startswith("---\nlib"), "SentenceTransformer(" in card, "mean pooling, unit length" in card] == [st] * 3
            assert ("mixture ul2" in card) == (name == "denoise") and "recommended" not in card
            assert "class is Qwen3Model" in card and "transformers >= 5.2" in card and "up to 512 tokens" in card
    for typed in ("--pooling=cls", "--normalize=False"):
        dies(lambda: hub.main(["export", f"--ckpt={run}", "--to=transformers", f"--out={tmp_path / 'x'}", typed]), typed)


def test_a_run_is_pooled_as_it_was_trained(run, tmp_path):
    """contrast_pooling=cls: evaluation, embedder and export follow it; --pooling overrules it; --to=transformers is an encoder too."""
    model, saved = checkpoint.load(run)
    saved["config"] |= {"objective": "contrast", "contrast_pooling": "cls"}
    checkpoint.save(tmp_path / "run", 0, model, None, saved, keep=1)
    (tmp_path / "run/tokenizer").symlink_to(run / "tokenizer")
    cls, mean = (Embedder.load(tmp_path / "run", dtype=torch.float32, **more).encode(["one text"]) for more in ({}, {"pooling": "mean"}))
    assert np.abs(cls - mean).max() > 1e-2
    assert np.array_equal(E.Encoder(tmp_path / "run", "cpu").encode(["one text"]), cls)
    hub.main(["export", f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'st'}", "--to=sentence-transformers"])
    assert json.loads((tmp_path / "st/1_Pooling/config.json").read_text())["pooling_mode"] == "cls"
    assert np.abs(E.Encoder(tmp_path / "st", "cpu").encode(["one text"]) - cls).max() < 1e-5
    hub.main(["export", f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}", "--to=transformers", "--verify"])
    assert (
        json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["Qwen3Model"]
        and not (tmp_path / "hf/modules.json").exists()
    )
    assert np.abs(E.Encoder(tmp_path / "hf", "cpu", pooling="cls").encode(["one text"]) - cls).max() < 1e-5  # a plain folder


def test_settings_of_an_evaluation_reach_what_they_name(run, tmp_path, monkeypatch):
    """--dtype, --batch_size and --causal, for a folder that sentence-transformers reads and for one of ours."""
    st = pytest.importorskip("sentence_transformers").SentenceTransformer
    sentence.export(options(ckpt=str(run), out=str(tmp_path / "st"), pooling="last"))
    theirs = E.Encoder(tmp_path / "st", "cpu", batch_size=3, dtype="bfloat16")
    sizes, real = [], st.encode
    monkeypatch.setattr(st, "encode", lambda self, texts, **more: sizes.append(more.get("batch_size")) or real(self, texts, **more))
    assert theirs.encode(["a", "b"]).dtype == np.float32 and sizes == [3]
    assert {p.dtype for p in theirs.theirs.parameters()} == {torch.bfloat16}
    causal = E.Encoder(tmp_path / "st", "cpu", causal=True)  # read by ours, which can
    assert causal.ours.pooling == "last" and causal.ours.causal and np.abs(causal.encode(["a b"]) - theirs.encode(["a b"])).max() > 0.1
    monkeypatch.setattr(Embedder, "encode", lambda self, texts, **more: sizes.append(more))
    causal.encode(["a"]), E.Encoder(run, "cpu", batch_size=5).encode(["a"])
    assert sizes[-2:] == [{}, {"batch_size": 5}]


def test_a_first_token_that_hears_nothing_is_found(run, monkeypatch):
    """All states but the first move: a causal mask with an exception would look bidirectional otherwise."""
    encoder = E.Encoder(run, "cpu")
    assert E.later_token(encoder)[0]
    real = encoder.ours.forward
    monkeypatch.setattr(encoder.ours, "forward", lambda batch: (real(batch)[0].index_fill(0, torch.tensor([0]), 0.0), None))
    assert not E.later_token(encoder)[0]


def test_a_polyglu_decoder_is_not_sent_to_make_an_encoder_that_is_refused_too(tmp_path, dies):
    model = build(ModelConfig(vocab_size=257, n_layer=1, n_head=2, d_model=16, ffn="polyglu"))
    tokenizer.load("bytes").save(tmp_path / "run" / "tokenizer")
    state = {"config": hub.configurator.to_dict(model.cfg), "metrics": {}, "tokens": 0}
    checkpoint.save(tmp_path / "run", 0, model, None, state, keep=1)
    dies(lambda: sentence.export(options(ckpt=str(tmp_path / "run"), out=str(tmp_path / "st"))), "ffn=polyglu", "no stock class")


def test_a_short_and_untrained_model_is_exported_and_verified(qwen, tmp_path):
    """Without --max_seq_length what it takes is the limit; EOS has the row of zeros that transformers gives a padding token."""
    pytest.importorskip("sentence_transformers")
    shutil.copytree(qwen, tmp_path / "short")
    config = json.loads((qwen / "config.json").read_text()) | {"max_position_embeddings": 64}
    (tmp_path / "short/config.json").write_text(json.dumps(config))
    tensors = load_file(qwen / "model.safetensors")
    tensors["model.embed_tokens.weight"][256] = 0
    save_file(tensors, tmp_path / "short/model.safetensors")
    encdec.main([f"--from={tmp_path / 'short'}", f"--out={tmp_path / 'run'}"])
    sentence.main([f"--ckpt={tmp_path / 'run'}", "--to=sentence-transformers", f"--out={tmp_path / 'st'}", "--verify"])
    assert json.loads((tmp_path / "st/sentence_bert_config.json").read_text())["max_seq_length"] == 64


def test_export_refuses(qwen, run, tmp_path, capsys, monkeypatch, dies):
    hub.main(["import", f"--from={qwen}", f"--out={tmp_path / 'lm'}"])
    for changes in (
        {"ckpt": str(tmp_path / "lm")},
        {"average_last": 3},
        {"average_best": 1},
        {"average_best": 1, "average_last": 1},
        {"average_last": -1},
        {"max_seq_length": 10**6},
    ):
        with pytest.raises(SystemExit):
            sentence.export(options(**({"ckpt": str(run), "out": str(tmp_path / "st")} | changes)))
    with pytest.raises(SystemExit):
        hub.main(["export", f"--ckpt={run}", "--to=sentence-transformers", f"--out={tmp_path / 'st'}", "--pooling=max"])
    to = ["export", f"--ckpt={run}", "--to=sentence-transformers", f"--out={tmp_path / 'st'}"]
    dies(lambda: hub.main([*to, "--metric=val/x"]), "--metric=val/x: would do nothing", "--average_best")
    dies(lambda: hub.main([*to, "--average_last=9"]), "--average_last=9: ", "ask for fewer")
    for option in ("--texts=0", "--repeats=0", "--dtype=fp16", "--clock=sun", f"--out={tmp_path}"):
        dies(lambda option=option: encode.main([f"--ckpt={run}", option]), option)
    dies(lambda: encode.main([f"--ckpt={run}"]), f"--ckpt={run}: no exported folder", "hub export")
    dies(lambda: sanity.main([f"--ckpt={run}", "--batch_size=0"]), "--batch_size=0")
    dies(lambda: sanity.main([f"--ckpt={run}", "--learned"]), "--learned", "no metrics.jsonl")
    dies(lambda: denoising.main([f"--ckpt={run}", "--data=gone"]), "gone is no directory of shards")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # not installed
    with pytest.raises(ModuleNotFoundError):
        sentence.export(options(ckpt=str(run), out=str(tmp_path / "st")))
    assert not (tmp_path / "st").exists()
    capsys.readouterr()
    dies(lambda: E.main(["--ckpt=x"]), "nothing to do")


def test_averaging(tmp_path):
    cfg = ModelConfig(vocab_size=20, n_layer=1, n_head=2, d_model=16, max_len=64)
    for step, value in ((2, 1.0), (10, 2.0), (9, 3.0), (100, 4.0)):
        model = build(cfg)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        state = {"config": dict(cfg.__dict__), "metrics": {"val/mean/loss": value}, "tokens": 0}
        checkpoint.save(tmp_path / "run", step, model, None, state, keep=9, metric=value, is_best=value == 1)
    at = lambda **changes: [f.name for f in sentence.chosen(options(ckpt=str(tmp_path / "run"), metric="val/mean/loss", **changes))]  # noqa: E731
    folders = sorted((tmp_path / "run").glob("step-*"))
    value = lambda some: float(sentence.average(some)["decoder.norm.weight"][0])  # noqa: E731
    if len(folders) == 4:  # saving an older step later drops newer ones: then there are fewer
        assert value(folders) == 2.5
    assert at(average_last=2)[-1] == "step-000100" and value([tmp_path / "run" / n for n in at(average_last=2)]) in (3.0, 3.5)
    best = at(average_best=1)
    assert best == ["step-000002"] and at(average_best=1, higher_is_better=True) == ["step-000100"]
    other = build(ModelConfig(vocab_size=20, n_layer=2, n_head=2, d_model=16, max_len=64))
    checkpoint.save(tmp_path / "odd", 0, other, None, {"config": {}, "metrics": {}}, keep=1)
    with pytest.raises(SystemExit):
        sentence.average([folders[0], tmp_path / "odd/step-000000"])


# ---- metrics ----------------------------------------------------------------------------------------------------------------


def test_correlations_against_scipy_and_by_hand():
    gold, cosine = [0, 1, 2, 3, 5], [0.1, 0.4, 0.35, 0.8, 0.9]
    assert E.spearman(cosine, gold) == pytest.approx(0.9, abs=5e-5) and E.pearson(cosine, gold) == pytest.approx(0.9344, abs=5e-5)
    assert E.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=5e-5)
    rng = np.random.default_rng(0)
    for n in (5, 50, 500):
        a, b = rng.integers(0, n // 2, n), rng.normal(size=n)
        assert E.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        assert E.pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)


def test_retrieval_metrics_by_hand():
    names = ("MRR@10", "Recall@1", "Recall@10", "NDCG@10")
    rest = [f"n{i}" for i in range(20)]
    score = lambda found, want: [round(E.retrieval_metrics(found, want)[n], 4) for n in names]  # noqa: E731
    assert score([["a", *rest]], [["a"]]) == [1, 1, 1, 1]
    three = [["a", *rest], ["n0", "b", *rest[1:]], [*rest[:3], "c", *rest[3:]]]
    assert score(three, [["a"], ["b"], ["c"]]) == [0.5833, 0.3333, 1.0, 0.6872]
    assert score([["a", "n0", "b", *rest[1:]]], [["a", "b", "c"]]) == [1.0, 0.3333, 0.6667, 0.7039]
    assert score([["d0", "d0", "d0"]], [["d0", "d0"]]) == [1, 1, 1, 1]  # an id counts once on both sides
    found = E.retrieval_metrics([["a"], ["b"]], [["a"], []])
    assert found["queries"] == 1 and found["without_relevant"] == 1


def test_top_k_is_exact_and_stable():
    docs = np.array([[1, 0], [0, 1], [1, 0], [0.5, 0]], np.float32)
    assert E.top_k(np.array([[1, 0]], np.float32), docs, 10).tolist() == [[0, 2, 3, 1]]  # ties to the lower index, k > corpus
    rng = np.random.default_rng(0)
    q, d = rng.normal(size=(9, 8)), rng.normal(size=(50, 8))
    assert np.array_equal(E.top_k(q, d, 5, chunk=2), np.argsort(-(q @ d.T), 1)[:, :5])


def test_sts_reader(tmp_path, dies):
    (tmp_path / "raw").mkdir()
    row = 'main\tx\t2012\t1\t{}\tHe said "hi\tShe said hi.\tlicence\tmore\n'
    for split, score in (("train", 4.5), ("dev", 1.0), ("test", 2.0)):
        (tmp_path / "raw" / f"sts-{split}.csv").write_text(row.format(score))
    sts.main([f"--from={tmp_path / 'raw'}", f"--out={tmp_path / 'sts'}"])
    assert E.read_rows(tmp_path / "sts" / "stsb-test") == [{"sentence1": 'He said "hi', "sentence2": "She said hi.", "score": 2.0}]
    dies(lambda: E.read_rows(tmp_path / "sts" / "sickr-test"))


def test_tables_are_read_as_their_kind_says(tmp_path):
    """A lone quote in a tsv is text; in a csv a quoted cell may hold a line break; only a line feed ends a line of jsonl."""
    (tmp_path / "a.tsv").write_text('sentence1\tsentence2\tscore\n"Hello, he said.\tb\t1\nc"\td\u2028e\t2\n')
    assert [r["sentence1"] for r in E.read_rows(tmp_path / "a")] == ['"Hello, he said.', 'c"']
    (tmp_path / "b.csv").write_text('sentence1,sentence2\n"one\ntwo","a ""b"""\n')
    assert E.read_rows(tmp_path / "b") == [{"sentence1": "one\ntwo", "sentence2": 'a "b"'}]
    (tmp_path / "c.jsonl").write_text('{"sentence1": "x\u2028y"}\n')
    assert E.read_rows(tmp_path / "c") == [{"sentence1": "x\u2028y"}]


def test_nothing_of_dev_or_test_is_trained_on(tmp_path):
    lines = {
        "train": ["A dog runs.\tThe dog is running.", "A cat sits!\tOne cat sits there.", "Same.\tsame"],
        "dev": [],
        "test": ["a cat sits\tx"],
    }
    for split, pairs in lines.items():
        (tmp_path / f"sts-{split}.csv").write_text("".join(f"main\tx\t2012\t1\t5.0\t{pair}\n" for pair in pairs))
    sts.main([f"--from={tmp_path}", f"--out={tmp_path / 'sts'}"])
    assert json.loads((tmp_path / "sts/pairs.jsonl").read_text()) == {"query": "A dog runs.", "positive": "The dog is running."}
    head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tSemEval_set\n"
    (tmp_path / "SICK.txt").write_text(head + "1\tThe dog is RUNNING\tz\t1.0\tTEST\n")
    sts.main([f"--from={tmp_path / 'SICK.txt'}", f"--out={tmp_path / 'sts'}"])
    assert not (tmp_path / "sts/pairs.jsonl").read_text()  # SICK-R scores a sentence of the other pair: nothing is left


def test_official_tasks_read_local_files(tmp_path):
    """MTEB's own STSBenchmark and SICK-R, offline, against scipy; SICK comes from its own file."""
    pytest.importorskip("mteb")
    from eval import mteb

    rng = np.random.default_rng(0)
    head = "pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score\tSemEval_set\n"
    rows = [(f"a{i}", f"b{i}", round(float(rng.uniform(1, 5)), 2), "TEST" if i % 4 else "TRAIN") for i in range(40)]
    (tmp_path / "SICK.txt").write_text(head + "".join(f"{i}\t{a}\t{b}\tNEUTRAL\t{s}\t{part}\n" for i, (a, b, s, part) in enumerate(rows)))
    sts.main([f"--from={tmp_path / 'SICK.txt'}", f"--out={tmp_path}"])
    (tmp_path / "stsb-test.jsonl").write_text((tmp_path / "sickr-test.jsonl").read_text())
    table = {text: rng.normal(size=8) for a, b, *_ in rows for text in (a, b)}
    encoder = SimpleNamespace(path=Path("table"), encode=lambda texts, kind=None: np.array([table[t] for t in texts], np.float32))
    summary = mteb.run(encoder, tmp_path, tmp_path / "out", "STSBenchmark,SICKRelatedness", say=lambda line: None)
    unit = lambda text: table[text] / np.linalg.norm(table[text])  # noqa: E731
    held = [(unit(a) @ unit(b), s) for a, b, s, part in rows if part == "TEST"]
    assert len(held) == 30 and summary["STS"]["tasks"] == 2
    assert summary["STS"]["mean"] == pytest.approx(stats.spearmanr(*zip(*held, strict=True)).statistic, abs=1e-6)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"STSBenchmark.json", "SICK-R.json", "summary.json"}


def test_without_key_norms_the_encoder_speaks_as_softly_as_the_decoder_listens(tmp_path, capsys):
    """Llama has no norm on k: encoder states enter k and v at the scale of the quietest layer's own norm, and cosines do not change."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.06, eos_token_id=256, bos_token_id=256,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    llama.model.norm.weight.data.fill_(8.0)
    llama.model.layers[1].input_layernorm.weight.data.fill_(0.25)
    llama.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama/tokenizer.json").write_bytes(tokenizer.bpe(tokenizer.byte_alphabet(), [], tokenizer.GPT2, {"<|endoftext|>": 256}))
    encdec.main([f"--from={tmp_path / 'llama'}", f"--out={tmp_path / 'run'}", "--verify"])
    assert "12 of 12 checks hold" in (out := capsys.readouterr().out) and "scaled by 0.0312" in out
    model = checkpoint.load(tmp_path / "run")[0]
    assert model.encoder.norm.weight.unique().tolist() == [0.25] and model.decoder.norm.weight.unique().tolist() == [8.0]


def test_the_table_counts_alike_and_loses_no_row(run, tmp_path, capsys):
    """A run and its export have as many parameters; two folders of one name are two rows; every row says what it is."""
    st = sentence.export(options(ckpt=str(run), out=str(tmp_path / "one/st"), pooling="cls", normalize=False))
    (tmp_path / "two").mkdir()
    (tmp_path / "two/st").symlink_to(st)
    assert E.Encoder(run, "cpu").params == E.Encoder(st, "cpu").params == E.Encoder(st, "cpu", pooling="cls").params
    E.main(
        [f"--ckpt={st}", "--compare_baselines", f"--others={tmp_path / 'two/st'},{run}", f"--data={tmp_path}", f"--output_dir={tmp_path}"]
    )
    rows = json.loads((tmp_path / "baseline_comparison.json").read_text())
    ours, twin, trained = rows["st"], rows[str(tmp_path / "two/st")], rows["encdec"]
    assert ours["ckpt"] == str(st) and ours["NDCG@10"] == twin["NDCG@10"] and ours["params"] == trained["params"]
    assert [row["step"] for row in (ours, twin, trained)] == [None, None, 0] and trained["commit"] == ours["commit"]
    assert [(row["pooling"], row["causal"], row["dtype"]) for row in (ours, trained)] == [
        ("cls", False, "float32"),
        ("mean", False, "float32"),
    ]
    assert "retrieval: sample;" in (tmp_path / "baseline_comparison.md").read_text()
    capsys.readouterr()
    for dtype in ("float32", "bfloat16"):  # bf16 moves a vector by more than fp32's tolerances, and nobody asked for unit length
        E.main([f"--ckpt={st}", "--quick", f"--dtype={dtype}", f"--output_dir={tmp_path}"])
        said = capsys.readouterr().out
        assert "ok   padding and batch mates" in said and "unit norm" not in said
    said = []
    E.quick(E.Encoder(run, "cpu", dtype="bfloat16"), said.append)
    assert [line[:4] for line in said if "unit norm" in line or "padding" in line] == ["ok  "] * 2


def test_mistakes_of_an_evaluation_are_one_line(run, tmp_path, dies):
    """Options that would do nothing, folders that are not there, rows without their columns, no rows at all, tasks that nobody knows."""
    mteb = pytest.importorskip("eval.mteb")
    (tmp_path / "stsb-test.csv").write_text("a,b,score\nx,y,1\n")
    (tmp_path / "stsb-dev.jsonl").write_text("")
    (tmp_path / "retrieval").mkdir()
    (tmp_path / "retrieval/corpus.jsonl").write_text('{"id": 1, "text": null}\n')
    for argv, word in (
        (["--quick", "--mteb_tasks=STS12"], "--mteb_tasks=STS12: would do nothing; add --run_mteb"),
        (["--quick", f"--e5={run}"], "add --compare_baselines"),
        (["--run_stsb", "--query_prefix=q: "], "add --run_retrieval or --run_mteb or --compare_baselines"),
        (["--quick", "--split=dev"], "--split=dev"),
        (["--compare_baselines", "--others=gone"], "gone: no such folder"),
        (["--run_stsb"], "wants rows of sentence1, sentence2, score; row 1 has ['a', 'b', 'score']"),
        (["--run_stsb", "--split=dev"], "stsb-dev.jsonl: wants rows of sentence1, sentence2, score; it has none"),
        (["--run_retrieval"], "corpus.jsonl: wants rows of id, text"),
        (["--run_mteb", "--mteb_tasks=nonsense"], "'nonsense' not found"),
    ):
        dies(lambda: E.main([f"--ckpt={run}", f"--data={tmp_path}", f"--output_dir={tmp_path / 'out'}", *argv]), word)
    rows = {"corpus": {"id": 1, "text": "a"}, "queries": {"id": 2, "text": "b"}, "qrels": {"query": 2, "doc": 1, "score": 0.5}}
    for name, row in rows.items():
        (tmp_path / "retrieval" / f"{name}.jsonl").write_text(json.dumps(row))
    (task,) = [task for task in mteb.local_tasks(tmp_path) if task.metadata.type == "Retrieval"]
    task.load_data()
    assert task.dataset["default"]["test"]["relevant_docs"] == {"2": {"1": 1}}


# ---- the chain ----------------------------------------------------------------------------------------------------------------


def command(*args, code=0):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def sentences(n, seed):
    rng = np.random.default_rng(seed)
    who, does = ["a man", "the girl", "my dog", "one cat", "the teacher"], ["eats", "carries", "paints", "watches", "sells"]
    what, where = ["bread", "a small box", "the red bus", "an apple"], ["in the park", "at home", "near the river", "every day"]
    return [" ".join(rng.choice(words) for words in (who, does, what, where)) + "." for _ in range(n)]


def test_an_evaluation_without_its_data_says_so_in_one_line(qwen, tmp_path, dies):
    """Before a model is loaded; and transformers draws no bars where nobody sees them move."""
    dies(lambda: E.main([f"--ckpt={tmp_path}", "--run_stsb", f"--data={tmp_path}"]), "stsb-test", "--data=DIR")
    load = "import transformers, sys; transformers.AutoModel.from_pretrained(sys.argv[1])"
    code = f"from prepare import no_bars; no_bars(); {load}"
    assert not subprocess.run([sys.executable, "-c", code, str(qwen)], cwd=ROOT, capture_output=True, text=True, check=True).stderr


def test_the_whole_chain(qwen, tmp_path):
    """Qwen3 folder -> prepare --verify -> UL2 -> average, export --verify -> fresh process -> quick, STS, retrieval, MTEB, table."""
    pytest.importorskip("sentence_transformers")
    texts = tmp_path / "text.jsonl"
    texts.write_text("".join(json.dumps({"text": " ".join(sentences(12, seed))}) + "\n" for seed in range(300)))
    command("-m", "prepare.text", f"--from={texts}", f"--tokenizer={qwen}", f"--out={tmp_path / 'data'}", "--val=0.1", "--workers=1")
    assert "12 of 12 checks hold" in command("-m", "prepare.encdec", f"--from={qwen}", f"--out={tmp_path / 'init'}", "--verify")
    shape = "vocab_size=400 n_layer=2 n_head=4 n_kv_head=2 head_dim=24 d_model=64 d_ff=128 rope_theta=1000000.0 max_len=512".split()
    steps = "max_steps=60 warmup=6 eval_every=30 save_every=30 eval_tokens=2048 tokens_per_step=2048 log_every=10".split()
    where = [f"--data={tmp_path / 'data'}", f"--init_from={tmp_path / 'init'}", f"--out={tmp_path / 'ul2'}"]
    command("train.py", "config/encdec_debug.py", *where, *[f"--{s}" for s in shape + steps])
    metrics = [json.loads(line) for line in (tmp_path / "ul2/metrics.jsonl").read_text().splitlines()]
    loss = [m["train/loss"] for m in metrics if "train/loss" in m]
    raw = np.frombuffer(" ".join(sentences(5000, 1)).encode(), np.uint8)
    p = np.bincount(raw) / len(raw)
    assert loss[0] > 4.5 and loss[-1] < -(p[p > 0] * np.log(p[p > 0])).sum() < math.log(400)  # below the unigram entropy

    out = command(
        "-m",
        "hub",
        "export",
        f"--ckpt={tmp_path / 'ul2'}",
        "--to=sentence-transformers",
        f"--out={tmp_path / 'st'}",
        "--average_last=2",
        "--verify",
    )
    assert "11 of 11 checks hold" in out
    assert len(json.loads((tmp_path / "st/averaging.json").read_text())["sources"]) == 2
    config = json.loads((tmp_path / "st/config.json").read_text())
    assert config["architectures"] == ["Qwen3Model"] and config["is_causal"] is False and config["vocab_size"] == 300
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6 and config["head_dim"] == 24

    data, rng = tmp_path / "sts", np.random.default_rng(0)
    (data / "retrieval").mkdir(parents=True)
    a = sentences(60, 5)
    rows = [
        {"sentence1": x, "sentence2": x[:-1] + " now." if i % 2 else y, "score": 5.0 if i % 2 else float(rng.integers(0, 4))}
        for i, (x, y) in enumerate(zip(a, sentences(60, 6), strict=True))
    ]
    (data / "stsb-test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sample = json.loads((ROOT / "eval/sample_retrieval.json").read_text())
    sample["qrels"] = [{"query": q, "doc": d, "score": 1} for q, d in sample["qrels"]]
    for name, part in sample.items():
        (data / "retrieval" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    wanted = ["--run_stsb", "--run_retrieval", "--run_mteb", "--compare_baselines", f"--qwen3_baseline={qwen}"]
    out = command("-m", "eval.embedding", f"--ckpt={tmp_path / 'st'}", *wanted, f"--data={data}", f"--output_dir={tmp_path / 'scores'}")
    ours = json.loads((tmp_path / "scores/sts_results.json").read_text())["stsb-test"]["spearman"]
    assert ours > 0.5  # sentences of the same words lie together
    mteb = json.loads((tmp_path / "scores/mteb/summary.json").read_text())
    assert mteb["STS"]["mean"] == pytest.approx(ours, abs=5e-3) and set(mteb) == {"STS", "Retrieval"}  # near ties change places
    retrieval = json.loads((tmp_path / "scores/retrieval_results.json").read_text())
    assert mteb["Retrieval"]["mean"] == pytest.approx(retrieval["NDCG@10"], abs=1e-4)
    table = (tmp_path / "scores/baseline_comparison.md").read_text()
    assert "| Qwen3, mask removed, untrained | 105,632" in table and "| BGE-base | n/a" in table
    assert np.abs(Embedder.load(tmp_path / "st").encode(a) - Embedder.load(tmp_path / "st").encode(a)).max() == 0
    command("-m", "eval.sanity", f"--ckpt={tmp_path / 'ul2'}")
    assert "infill@0.3" in command("-m", "eval.denoising", f"--ckpt={tmp_path / 'ul2'}", "--tokens=1024")
