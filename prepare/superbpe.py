"""Train a SuperBPE tokenizer (subwords first, then superwords that span blanks) or a plain byte-level BPE, with stock `tokenizers`.

    python -m prepare.superbpe --from='text/*.parquet' --out=data/superbpe16k --vocab=16384 --transition=10240
    python -m prepare.superbpe --from=stdlib --out=data/bpe4k --vocab=4096 --transition=4096        (one stage: plain BPE)

Stage 1 learns `transition` subwords inside words. Stage 2 splits text into sentences instead, writes every stage-1 id as one character,
and learns BPE on those strings: its merges are superwords. Both run over the same merges list at the end, under the second split.
Three markers follow the `vocab` ids: <|endoftext|>, <|im_start|>, <|im_end|>. The same input gives the same file, byte for byte.
Read next: prepare/compare.py, which says what a tokenizer saves; tokenizer.py, which loads both kinds."""

import base64
import json
import os
import re
import sys
import time
from collections import Counter

import numpy as np

import configurator
import tokenizer
from configurator import die
from files import write, write_json
from prepare import sources
from prepare.utf8 import unescaped

STAGE1 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKERS = (tokenizer.EOS, "<|im_start|>", "<|im_end|>")
WORDS = 4  # a superword spans at most so many
BASE = 0x10000  # stage 2 writes the stage-1 id i as the character BASE + i
OPTIONS = {"from": str, "out": str, "vocab": int, "transition": int, "text_field": "text", "separator": "", "max_docs": 0, "max_bytes": 1e9}


def learn(texts, size, alphabet, split=None):
    """Byte-pair merges -> [(left, right)], in order; the split None takes each text as one word."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    if split:
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), plain])
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    fast.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(fast.to_str())["model"]["merges"]]


def subwords(texts, size, split=STAGE1):
    """Stage 1 -> ({token: id}, merges)."""
    alphabet = sorted(tokenizer.byte_alphabet())
    merges = learn(texts, size, alphabet, split)
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))}
    if len(vocab) < size:
        most = f"--tokenizer=bpe:{len(vocab) + len(MARKERS)} (prepare.text) or --transition={len(vocab)} (prepare.superbpe)"
        die(f"this text gives only {len(vocab):,} ids of the {size:,} wanted: bring more text, or ask for no more than {most}")
    return vocab, merges


def spell(texts, vocab, merges):
    """Every stretch between stage-2 splits as a string of stage-1 ids."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(tokenizer.bpe(vocab, merges, tokenizer.SUPER, {}).decode())
    for text in texts:
        coded = fast.encode(text)
        if coded.ids:
            line = (np.array(coded.ids, "<u4") + BASE).tobytes().decode("utf-32-le")
            edges = [0, *(np.flatnonzero(np.diff(coded.word_ids)) + 1).tolist(), len(line)]
            yield from (line[a:b] for a, b in zip(edges, edges[1:], strict=False))


def allowed(token):
    """At most WORDS words, and nothing beyond a colon. `token` in the byte alphabet, where blanks are Ġ, Ċ, ĉ and č."""
    return len(re.findall("[^ĠĊĉč]+", token)) <= WORDS and ":" not in token[:-1]


def superwords(texts, size, vocab, merges):
    """Stage 2: adds to `vocab` and `merges` until there are `size` tokens."""
    tokens, first = list(vocab), len(vocab)
    lines = list(spell(texts, vocab, merges))
    for surplus in (1.02, 1.1, 1.5, 3.0):  # what the limits take away is not known before
        found = learn(lines, first + int((size - first) * surplus) + 1, [chr(BASE + i) for i in range(first)])
        vocab, more = dict(zip(tokens, range(first), strict=True)), []
        for pair in found:
            left, right = ("".join(tokens[ord(c) - BASE] for c in side) for side in pair)
            if allowed(left + right):  # what is built on a token that is not allowed is not allowed either
                if left + right not in vocab and len(vocab) == size:
                    break
                vocab.setdefault(left + right, len(vocab))
                more.append((left, right))
        if len(vocab) == size:
            return vocab, merges + more
    die(f"this text gives only {len(vocab):,} ids of the {size:,} wanted: bring more text, or ask for no more than --vocab={len(vocab)}")


def train(texts, size, transition, split=STAGE1):
    """-> the tokenizer.json of `size` ids and the three markers. Deterministic."""
    vocab, merges = subwords(texts, min(size, transition), split)
    if transition < size:
        vocab, merges = superwords(texts, size, vocab, merges)
    return tokenizer.bpe(vocab, merges, tokenizer.SUPER if transition < size else split, {m: size + i for i, m in enumerate(MARKERS)})


def save(raw, folder, name):
    write(os.path.join(folder, "tokenizer.json"), raw)
    write_json(os.path.join(folder, "tokenizer_config.json"), {"name": name, "eos_token": tokenizer.EOS})
    return tokenizer.load(folder)


def save_ranks(vocab, folder, name):
    """A one-stage BPE as a rank file: the same ids as its tokenizer.json would give, seven times as fast."""
    table = {c: bytes([b]) for c, b in tokenizer.byte_alphabet().items()}
    special = {m: len(vocab) + i for i, m in enumerate(MARKERS)}
    rule = {"name": name, "pattern": STAGE1, "special": special, "nfc": False, "eos": tokenizer.EOS}
    lines = (base64.b64encode(b"".join(table[c] for c in token)) + b" %d\n" % i for token, i in vocab.items())
    write(os.path.join(folder, f"{name}.tiktoken"), b"".join(lines))
    write_json(os.path.join(folder, f"{name}.json"), rule)
    return tokenizer.load(folder)


def read(spec, field="text", separator=b"", max_docs=0, max_bytes=1e9, keep=None):
    """Texts of local files, at most so many or so much of them; `keep(text)` may refuse some."""
    texts, held = [], 0
    for task, _ in sources.tasks(sources.find(spec), field, separator):
        for slices in sources.documents(task, Counter(), field):
            text = "".join(slices)
            if text.strip() and (keep is None or keep(text)):
                texts.append(text)
                held += len(text.encode())
            if held >= max_bytes or 0 < max_docs == len(texts):
                return texts
    return texts or die(f"--from={spec}: no text in it to learn from (in tables and jsonl, in the field '{field}': see --text_field)")


def main(argv):
    o = configurator.args(OPTIONS, argv, __doc__, positive="max_bytes")
    if not 256 < o.transition <= o.vocab or o.transition > 0xFFFF:
        die(f"--transition={o.transition}: more than 256, at most --vocab={o.vocab} and 65,535")
    start = time.monotonic()
    texts = read(getattr(o, "from"), o.text_field, unescaped(o.separator), o.max_docs, o.max_bytes)
    size = sum(map(len, texts))
    if sum(len(t.encode()) for t in texts) >= o.max_bytes:
        print(f"stopped reading at --max_bytes={o.max_bytes:.0f}: stage 2 holds whole sentences, about 20 bytes of memory per byte of text")
    if o.transition < o.vocab:  # few long documents would fill the memory and decide the superwords
        longest = int(np.percentile([len(t) for t in texts], 99))
        texts = [t[:longest] for t in texts]
    tok = save(train(texts, o.vocab, o.transition), o.out, os.path.basename(os.path.normpath(o.out)))
    ids = sum(len(tok.encode_array(t)) for t in texts[:: max(1, len(texts) // 1000)])
    chars = sum(map(len, texts[:: max(1, len(texts) // 1000)]))
    print(tok)
    print(
        f"{o.out}: {len(texts):,} documents, {size:,} characters, {time.monotonic() - start:.1f} s; {chars / ids:.3f} chars/token on them"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
