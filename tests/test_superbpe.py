"""prepare.superbpe, compare, val: superwords exist and keep their limits, training repeats itself, text comes back, figures add up."""

import json
import math
import os
import random
import re

import numpy as np
import pytest
import torch
from conftest import save_run
from test_tokenizer import MARKED, real, unicode_strings

import checkpoint
import tokenizer
from model import ModelConfig, build
from prepare import compare, superbpe, val

V, T = 700, 400


WORDS = """the of and in to a is it that was he for on are with as his they be at one have this from or had by hot word but what some we can
    out other were all there when up use your how said an each she which do their time if will way about many then them""".split()


def sentences(n=800, seed=0):
    """Every word is followed by one of two, so that pairs and threes of words repeat."""
    rng, lines = random.Random(seed), []
    for _ in range(n):
        i, words = rng.randrange(len(WORDS)), []
        for _ in range(rng.randrange(4, 14)):
            words.append(WORDS[i] + (":" if rng.random() < 0.05 else ""))
            i = (7 * i + rng.choice([1, 1, 1, 5])) % len(WORDS)
        lines.append(f"{' '.join(words).capitalize()}, {rng.randrange(9999)}.\n")
    return lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("superbpe")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences()))
    superbpe.main([f"--from={folder}/text.jsonl", f"--out={folder}/super", f"--vocab={V}", f"--transition={T}"])
    superbpe.main([f"--from={folder}/text.jsonl", f"--out={folder}/plain", f"--vocab={T}", f"--transition={T}"])
    return folder


def test_superwords_are_there_within_their_limits(trained):
    tok, plain = tokenizer.load(trained / "super"), tokenizer.load(trained / "plain")
    assert tok.vocab_size == V + 3 and plain.vocab_size == T + 3 and (tok.kind, plain.kind) == ("superbpe", "hf")
    assert tok.special == {"<|endoftext|>": V, "<|im_start|>": V + 1, "<|im_end|>": V + 2} and tok.eos_id == V
    assert tok.table[:T] == plain.table[:T]  # stage 1 is plain BPE, and stage 2 keeps its ids
    spans = [len(t.split()) for t in (b.decode("utf-8", "replace") for b in tok.table[T:V])]
    assert max(spans) == 4 and sum(s > 1 for s in spans) > 50 and max(len(t.split()) for t in map(bytes, plain.table[:T])) == 1
    assert not [t for t in tok.table[T:V] if b":" in t[:-1]] and [t for t in tok.table[T:V] if t.endswith(b":")]
    assert any(t.count(b" ") > 1 for t in map(tok.token_bytes, tok.encode("".join(sentences(9, seed=1)))))
    text = "".join(sentences(seed=1))
    assert len(tok.encode(text)) < 0.75 * len(plain.encode(text))
    assert len(set(tok.table)) == len(tok.table)


def test_any_text_comes_back_and_markers_stay_text(trained):
    tok = tokenizer.load(trained / "super")
    for text in [*unicode_strings(), MARKED, "|||IP|||", "a  b\r\n\r\nc 123456 !!! //\n", " ", "of the and in " * 99]:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and max(ids) < V


def test_training_twice_gives_the_same_file(trained):
    superbpe.main([f"--from={trained}/text.jsonl", f"--out={trained}/again", f"--vocab={V}", f"--transition={T}"])
    assert (trained / "again" / "tokenizer.json").read_bytes() == (trained / "super" / "tokenizer.json").read_bytes()
    texts = superbpe.read(f"{trained}/text.jsonl")
    vocab, _ = superbpe.subwords(texts, T)
    ranks, plain = superbpe.save_ranks(vocab, trained / "ranks", "ranks"), tokenizer.load(trained / "plain")
    assert ranks.fingerprint == plain.fingerprint and all(ranks.encode(t) == plain.encode(t) for t in [*texts[:50], *unicode_strings()])


def test_merges_alone_get_the_second_split_and_the_first_is_refused(trained):
    whole = json.loads((trained / "super" / "tokenizer.json").read_text())
    folder = trained / "released"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"] | {"<|endoftext|>": V, "EMAIL": V + 1}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in whole["model"]["merges"]) + "\n")
    tok, before = tokenizer.load(folder), tokenizer.load(trained / "super")
    text = "".join(sentences(seed=2))
    assert tok.encode(text) == before.encode(text) and tok.eos_id == V and tok.special["EMAIL"] == V + 1
    whole["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = superbpe.STAGE1
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(SystemExit):
        tokenizer.load(folder)


def test_allowed():
    assert superbpe.allowed("aĠbĠcĠd") and superbpe.allowed("Ġinch:") and not superbpe.allowed("aĠbĠcĊdĠe") and not superbpe.allowed("a:Ġb")


def test_too_little_text_or_wrong_sizes_end_in_one_line(trained, dies):
    for vocab, transition in (60_000, 10_000), (400, 500), (300, 100), (9_000, 400):
        argv = [f"--from={trained}/text.jsonl", f"--out={trained}/no", f"--vocab={vocab}", f"--transition={transition}"]
        dies(lambda: superbpe.main(argv))


def test_compare_adds_up(trained, capsys):
    out = trained / "new" / "compare.json"
    compare.main([f"--tokenizers=bytes,{trained}/plain,{trained}/super", f"--texts={trained}/text.jsonl", f"--out={out}"])
    result = json.loads(out.read_text())
    rows, texts = result["texts"]["text"]["rows"], superbpe.read(f"{trained}/text.jsonl")
    tok = tokenizer.load(trained / "super")
    assert rows[2]["tokens"] == sum(len(tok.encode(t)) for t in texts) and rows[2]["round_trip"] == 1
    assert rows[0]["bytes_per_token"] == 1 and rows[2]["chars_per_token"] > rows[1]["chars_per_token"] > 1
    assert list(result["tokenizers"][2]["words"]) == ["1", "2", "3", "4"] and "saved" in capsys.readouterr().out
    uniform = [np.arange(256)] * 4  # every byte as often as every other: 8 bits each
    assert compare.unigram_bits(uniform, [256] * 4, 256) == pytest.approx(8)


def test_a_run_in_the_comparison_is_asked_for_its_bits(tmp_path, capsys, dies):
    """Every text alone after an EOS, nats / (ln 2 x UTF-8 bytes): worked out here from the model's own logits."""
    texts = ["one two three", "four", "fünf, sechs und sieben", "acht"]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, more in (("run", {}), ("future", {"ffn": "polyglu", "gate": "sequence", "allow_noncausal": True})):
        model = build(ModelConfig(vocab_size=257, n_layer=1, n_head=2, d_model=16, init_std=0.5, **more)).eval()
        save_run(tmp_path / name, model, "bytes", step=1)
    model, _ = checkpoint.load(tmp_path / "run")
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[256, *text.encode()]])
        nats += float(torch.nn.functional.cross_entropy(model.logits(ids[:, :-1])[0].double(), ids[0, 1:], reduction="sum").detach())
    compare.main([f"--tokenizers=bytes,{tmp_path}/run", f"--texts={tmp_path}/words.jsonl", "--device=cpu", f"--out={tmp_path}/out.json"])
    plain, asked = json.loads((tmp_path / "out.json").read_text())["texts"]["words"]["rows"]
    assert plain["model_bits_per_byte"] is None and plain["tokens"] == asked["tokens"]
    want = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert abs(asked["model_bits_per_byte"] - want) < 1e-5 and f" {want:.3f} " in capsys.readouterr().out
    dies(lambda: compare.main([f"--tokenizers={tmp_path}/future", f"--texts={tmp_path}/words.jsonl"]), "future", "likelihood")


def test_compare_halves_one_document_and_keeps_every_file(trained, tmp_path, dies):
    lines = [f"the cat number {i % 7} sat on the mat\n" for i in range(500)]
    for name, text in (("my_code.txt", "".join(lines)), ("my_sums.txt", "".join(lines[::-1])), ("more.txt", "".join(lines))):
        (tmp_path / name).write_text(text)
    compare.main([f"--tokenizers=bytes,{trained}/plain", f"--texts={tmp_path}", f"--out={tmp_path}/out.json"])
    found = json.loads((tmp_path / "out.json").read_text())["texts"]
    assert list(found) == ["more", f"{tmp_path}/my_code.txt", f"{tmp_path}/my_sums.txt"] and found["more"]["chars"] == sum(map(len, lines))
    assert all(row["unigram_bits_per_byte"] < 5 and row["round_trip"] == 1 for row in found["more"]["rows"])  # not the 8 of knowing nothing
    for name, text in (("empty.txt", ""), ("one.txt", "a line")):
        (tmp_path / name).write_text(text)
        dies(lambda: compare.main(["--tokenizers=bytes", f"--texts={tmp_path}/{name}", "--max_docs=1"]))


def test_max_bytes_counts_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": "é" * 50}, ensure_ascii=False)] * 9))
    assert len(superbpe.read(f"{tmp_path}/a.jsonl", max_bytes=250)) == 3


def test_validation_domains(tmp_path, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["one", " ", "two"], "url": ["u"] * 3}), tmp_path / "c4_validation_2k.parquet")
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "4"}) + "\n")
    (tmp_path / "humaneval.jsonl").write_text(
        json.dumps({"task_id": "1", "prompt": "def f():\n", "canonical_solution": "    pass\n"}) + "\n"
    )
    val.main([f"--from={tmp_path}", f"--out={tmp_path}/val"])
    found = {p: [json.loads(x)["text"] for x in open(tmp_path / "val" / p, encoding="utf-8")] for p in sorted(os.listdir(tmp_path / "val"))}
    assert found == {"c4.jsonl": ["one", "two"], "gsm8k.jsonl": ["Question: 2+2?\nAnswer: 4"], "humaneval.jsonl": ["def f():\n    pass\n"]}
    (tmp_path / "odd.jsonl").write_text('{"colour": "red"}\n')
    with pytest.raises(SystemExit):
        val.main([f"--from={tmp_path}/odd.jsonl", f"--out={tmp_path}/val"])
    assert re.search("colour", capsys.readouterr().err)


GOLDEN = {  # tokens of the published tokenizers on the public validation sets
    "t80k": {"c4": 616_810, "gsm8k": 166_346, "humaneval": 26_880},
    "t180k": {"c4": 668_704, "gsm8k": 176_732, "humaneval": 28_704},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_tokenizers_give_the_published_counts(name):
    tok, texts = tokenizer.load(real(name)), real("val")  # both are put there by hand: the second by prepare.val
    assert tok.vocab_size == 200_005 and tok.eos_id == 200_004
    for domain, tokens in GOLDEN[name].items():
        assert sum(len(tok.encode(t)) for t in superbpe.read(f"{texts}/{domain}.jsonl")) == tokens
