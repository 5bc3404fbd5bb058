"""tokenizer.py: round trips, markers in text, the files it reads and writes. Real vocabularies are checked where .parts/ holds them."""

import base64
import json
import os
import random
import unicodedata

import pytest

import tokenizer
from prepare import tokenizer as converter

PARTS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".parts")
MARKED = "a <|im_start|>system <|endoftext|><think> b <|im_end|>\n"


def real(name):
    path = os.path.join(PARTS, name)
    return path if os.path.exists(path) else pytest.skip(f"no .parts/{name}; python -m prepare.parts lists what can be fetched")


def unicode_strings(n=60, seed=0):
    rng = random.Random(seed)
    blocks = [(9, 127), (0, 0x250), (0x300, 0x370), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0xD800), (0xE000, 0x110000)]
    for _ in range(n):
        spans = [rng.choice(blocks) for _ in range(rng.randrange(1, 30))]
        yield "".join(chr(rng.randrange(*s)) for s in spans for _ in range(rng.randrange(1, 8)))


def ranks(path, merges=("he", "ll", "hell", "o ", " w", " wo", "in", "ing", "\n\n")):
    tokens = [bytes([b]) for b in range(256)] + [m.encode() for m in merges]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    n = len(tokens)
    special = {"<|endoftext|>": n, "<|im_start|>": n + 1, "<|im_end|>": n + 2}
    rule = {"name": "mine", "pattern": tokenizer.GPT2, "special": special, "nfc": False, "eos": "<|endoftext|>"}
    path.with_suffix(".json").write_text(json.dumps(rule))
    return str(path)


def folder(path, merges, special, config=None, **files):
    """A GPT-2-like vocab.json + merges.txt folder."""
    path.mkdir()
    tokens = [*tokenizer.byte_alphabet(), *(a + b for a, b in merges), *special]
    (path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps(config or {"tokenizer_class": "GPT2Tokenizer"}))
    return str(path)


MERGES = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("Ġw", "o"), ("he", "ll"), ("o", "f"), ("Ġ", "of"), ("t", "he"), ("Ġ", "the")]


def every(tmp_path):
    yield tokenizer.load("bytes")
    yield tokenizer.load(ranks(tmp_path / "mine.tiktoken"))
    yield tokenizer.load(folder(tmp_path / "plain", MERGES, ["<|endoftext|>"]))
    yield tokenizer.load(folder(tmp_path / "super", [*MERGES, ("Ġof", "Ġthe")], ["<|endoftext|>", "|||IP|||"]))


def test_any_text_comes_back_and_bytes_are_exact(tmp_path):
    for tok in every(tmp_path):
        for text in [*unicode_strings(), "", " ", "\r\n\r\n  x", MARKED, "of the world of the hell"]:
            ids = tok.encode(text)
            assert tok.decode(ids) == tok.decode([*ids, tok.vocab_size]) == text  # an id that no token has is no text
            assert b"".join(map(tok.token_bytes, ids)) == text.encode()
            assert max(ids, default=0) < tok.vocab_size and not set(ids) & set(tok.special.values())
        assert tok.decode(tok.encode("x\ud800y")) == "x\ufffdy"  # no UTF-8 holds a lone surrogate


def test_markers_enter_by_id_only(tmp_path):
    for tok in every(tmp_path):
        for marker, i in tok.special.items():
            assert i not in tok.encode(f"a{marker}b") and tok.decode([i]) == marker
        assert tok.eos_id == tok.special["<|endoftext|>"]


def test_saved_folders_load_as_the_same_tokenizer(tmp_path):
    seen = set()
    for tok in every(tmp_path):
        seen.add(tok.fingerprint)
        tok.save(tmp_path / tok.fingerprint / "tokenizer")  # as in a run or a shards directory
        again = tokenizer.load(tmp_path / tok.fingerprint)
        assert again.fingerprint == tok.fingerprint and again.special == tok.special and again.eos_id == tok.eos_id
        assert again.encode(MARKED) == tok.encode(MARKED)
    assert len(seen) == 4


def test_superword_folders_get_the_second_split(tmp_path):
    path = folder(tmp_path / "super", [*MERGES, ("Ġof", "Ġthe")], ["<|endoftext|>"])
    tok = tokenizer.load(path)
    assert tok.kind == "superbpe" and len(tok.encode(" of the")) == 1
    stage1 = json.loads(tok.files["tokenizer.json"])
    stage1["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = tokenizer.GPT2
    (tmp_path / "super" / "tokenizer.json").write_text(json.dumps(stage1))
    with pytest.raises(SystemExit):  # the words would come apart in silence
        tokenizer.load(path)


def test_unknown_files_stop_with_a_line(tmp_path, dies):
    path = ranks(tmp_path / "mine.tiktoken")
    (tmp_path / "mine.json").unlink()
    for bad in [path, str(tmp_path / "nowhere"), folder(tmp_path / "odd", MERGES, ["<|endoftext|>"], {"tokenizer_class": "X"})]:
        dies(lambda: tokenizer.load(bad))
    with pytest.raises(SystemExit):  # a folder that names no end of a document
        tokenizer.load(folder(tmp_path / "endless", MERGES, []))


def test_chat_template_and_end_of_document(tmp_path):
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": {"content": "</d>"}, "chat_template": "{{ x }}"}
    tok = tokenizer.load(folder(tmp_path / "chat", MERGES, ["</d>"], config))
    assert tok.chat_template == "{{ x }}" and tok.eos_id == tok.special["</d>"]
    tok.save(tmp_path / "kept")
    assert tokenizer.load(tmp_path / "kept").chat_template == "{{ x }}"


def test_long_texts_are_cut_where_no_token_moves(tmp_path, monkeypatch):
    text = "".join(f"line {i} of the world, hello's\n" + "\n" * (i % 3) + "  x = 12\n" * (i % 5) for i in range(400))
    monkeypatch.setattr(tokenizer, "LONG", 1 << 30)
    toks = list(every(tmp_path))[:3]
    whole = [tok.encode(text) for tok in toks]
    monkeypatch.setattr(tokenizer, "LONG", 256)
    assert "".join(tokenizer.pieces(text)) == text and max(map(len, tokenizer.pieces(text))) <= 256
    assert [tok.encode(text) for tok in toks] == whole
    assert tokenizer.load("bytes").decode(tokenizer.load("bytes").encode("é" * 1000)) == "é" * 1000


def test_many_texts_are_encoded_as_each_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "LONG", 40)
    texts = ["", "hello world", *unicode_strings(20), "in hell\n" * 30, MARKED, "\ud800 alone"]
    for tok in every(tmp_path):
        many = tok.encode_many(texts)
        assert many == [tok.encode(text) for text in texts] and {type(i) for ids in many for i in ids} == {int}


def test_rank_files_and_bytes_become_the_same_tokenizer_json(tmp_path, capsys):
    for source in "bytes", ranks(tmp_path / "mine.tiktoken"):
        converter.main([f"--from={source}", f"--out={tmp_path}/json", "--max_docs=5"])
        ours, theirs = tokenizer.load(source), tokenizer.load(tmp_path / "json")
        assert theirs.kind == "hf" and ours.fingerprint == theirs.fingerprint and "the same" in capsys.readouterr().out
        assert all(ours.encode(t) == theirs.encode(t) for t in [*unicode_strings(), MARKED, "hello world, telling"])
    ours.save(tmp_path / "run" / "tokenizer")
    converter.main([f"--from={tmp_path}/run", "--max_docs=1"])  # beside what a run already has
    assert {"mine.tiktoken", "tokenizer.json"} <= set(os.listdir(tmp_path / "run" / "tokenizer"))
    with pytest.raises(SystemExit):  # no two earlier tokens make this one
        converter.main([f"--from={ranks(tmp_path / 'odd.tiktoken', ['he', 'xyz'])}", f"--out={tmp_path}/no"])
    assert not (tmp_path / "no").exists()


def test_qwen_rank_file_is_the_official_tokenizer():
    ours, official = tokenizer.load(real("qwen")), tokenizer.load(real("qwen3"))
    assert ours.vocab_size == official.vocab_size == 151669 and ours.special == official.special
    assert ours.eos_id == 151643 and ours.special["<|im_end|>"] == 151645 and ours.special["</think>"] == 151668
    assert ours.fingerprint == official.fingerprint and "im_start" in official.chat_template
    for text in [*unicode_strings(200), open(__file__, encoding="utf-8").read(), MARKED, "cafe\u0301", "it'LL 1234\r\n"]:
        ids = ours.encode(text)
        assert ids == official.encode(text) and ours.decode(ids) == unicodedata.normalize("NFC", text)


def test_gpt2_is_known_without_a_tokenizer_json():
    path = real("gpt2")
    data = json.load(open(os.path.join(path, "tokenizer.json"), encoding="utf-8"))
    tok = tokenizer.load(path)
    assert tok.vocab_size == 50257 and tok.eos_id == 50256 and len(data["model"]["merges"]) == 50000
    assert tok.encode("Hello world") == [15496, 995]
