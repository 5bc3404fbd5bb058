"""A rank file or the byte tokenizer as a tokenizer.json, which transformers and other tools read. The ids stay the same.

    python -m prepare.tokenizer --from=qwen.tiktoken --out=DIR
    python -m prepare.tokenizer --from=out/RUN                 writes it beside the run's own (`hub export` converts by itself)

A rank file names tokens in the order they were learnt; the merge that made a token is what BPE of its bytes leaves with earlier tokens
alone. The result is loaded and compared on the standard library before anything is written. Read next: tokenizer.py, hub.py."""

import json
import os
import sys
import tempfile

import configurator
import tokenizer
from configurator import die


def halves(token, ranks):
    """The two tokens that were merged into `token`."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        best = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)))
        if best[0] >= limit:
            die(f"{token!r} is no merge of two earlier tokens: this rank file has no tokenizer.json")
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
    return parts


def convert(tok):
    """-> tokenizer.json as bytes."""
    if "tokenizer.json" in tok.files:
        return tok.files["tokenizer.json"]
    rule = json.loads(tok.files.get(f"{tok.name}.json", b"{}"))
    letters = {b: c for c, b in tokenizer.byte_alphabet().items()}
    spell = lambda token: "".join(letters[b] for b in token)  # noqa: E731
    ranks = {token: i for i, token in enumerate(tok.table) if token and i not in tok.special.values()}
    merges = [tuple(map(spell, halves(token, ranks))) for token in ranks if len(token) > 1]
    vocab = {spell(token): i for token, i in ranks.items()}
    return tokenizer.bpe(vocab, merges, rule.get("pattern", tokenizer.GPT2), tok.special, rule.get("nfc", False))


def main(argv):
    o = configurator.args({"from": str, "out": "", "max_docs": 200}, argv, __doc__)
    source = getattr(o, "from")
    tok = tokenizer.load(source)
    out = o.out or (os.path.join(source, "tokenizer") if os.path.isdir(os.path.join(source, "tokenizer")) else source)
    if not o.out and not os.path.isdir(out):
        die(f"--from={source} is a file: say --out=DIR")
    files = {
        "tokenizer.json": convert(tok),
        "tokenizer_config.json": json.dumps({"eos_token": tok.decode([tok.eos_id])} | tok.config).encode(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            with open(os.path.join(scratch, name), "wb") as f:
                f.write(content)
        again = tokenizer.load(scratch)
    from prepare import superbpe

    texts = superbpe.read("stdlib", max_docs=o.max_docs)
    if again.fingerprint != tok.fingerprint or any(again.encode(t) != tok.encode(t) for t in texts):
        die(f"{source}: its tokenizer.json would not give the same ids; nothing was written")
    os.makedirs(out, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(out, name), "wb") as f:
            f.write(content)
    print(f"{out}/tokenizer.json: the same {tok.vocab_size:,} ids, also on {len(texts)} files of the standard library")


if __name__ == "__main__":
    main(sys.argv[1:])
