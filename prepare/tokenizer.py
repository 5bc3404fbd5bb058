"""A rank file, the byte tokenizer or the vocabulary of a GGUF file as a tokenizer.json, which other tools read. The ids stay the same.

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
from files import write

NORMAL, CONTROL, USER = 1, 3, 4  # types of tokens in a GGUF file


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
    if "ids.json" in tok.files:
        die(f"{tok.name}: numbers and no text, for which there is no tokenizer.json")
    rule = json.loads(tok.files.get(f"{tok.name}.json", b"{}"))
    letters = {b: c for c, b in tokenizer.byte_alphabet().items()}
    spell = lambda token: "".join(letters[b] for b in token)  # noqa: E731
    ranks = {token: i for i, token in enumerate(tok.table) if token and i not in tok.special.values()}
    merges = [tuple(map(spell, halves(token, ranks))) for token in ranks if len(token) > 1]
    vocab = {spell(token): i for token, i in ranks.items()}
    return tokenizer.bpe(vocab, merges, rule.get("pattern", tokenizer.GPT2), tok.special, rule.get("nfc", False))


def from_gguf(meta, path):
    """The vocabulary inside a GGUF file as {tokenizer.json, tokenizer_config.json}."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split, model, kind = pre_tokenizers.Split, meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre", "default")
    steps = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "qwen2": [split(Regex(words % ""), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
        "llama-bpe": [split(Regex(words % "{1,3}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
    }
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    vocab = {t: i for i, t in enumerate(tokens)}
    if model == "llama":  # sentencepiece: no merges but scores; the pair whose union scores best goes first, bytes are the last resort
        ranked = sorted(zip(meta["tokenizer.ggml.scores"], tokens, types, strict=True), key=lambda row: -row[0])
        plain = {t for t, n in zip(tokens, types, strict=True) if n == NORMAL}
        cuts = [(t[:i], t[i:]) for _, t, n in ranked if n == NORMAL for i in range(1, len(t))]
        merges = [pair for pair in cuts if pair[0] in plain and pair[1] in plain]
        unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
        fast = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        front = [normalizers.Prepend("▁")] if meta.get("tokenizer.ggml.add_space_prefix", True) else []
        fast.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
        back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        fast.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if front else [])])
    elif model == "gpt2" and kind in steps:
        merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
        fast = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind == "llama-bpe"))
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence(steps[kind]), decoders.ByteLevel()
        fast.normalizer = normalizers.NFC() if kind == "qwen2" else None
    else:
        die(f"{path}: tokenizer {model}/{kind} inside; put the model's tokenizer.json beside the file")
    for special, number in ((True, CONTROL), (False, USER)):
        fast.add_tokens([AddedToken(t, special=special, normalized=False) for t, n in zip(tokens, types, strict=True) if n == number])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config = {key: tokens[meta[f"tokenizer.ggml.{n}_token_id"]] for key, n in names.items() if f"tokenizer.ggml.{n}_token_id" in meta}
    if meta.get("tokenizer.ggml.add_bos_token", model == "llama"):
        bos = (config["bos_token"], meta["tokenizer.ggml.bos_token_id"])
        fast.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    return {"tokenizer.json": fast.to_str().encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def main(argv):
    o = configurator.args({"from": str, "out": "", "max_docs": 200}, argv, __doc__)
    source = getattr(o, "from")
    tok = tokenizer.load(source)
    out = o.out or (os.path.join(source, "tokenizer") if os.path.isdir(os.path.join(source, "tokenizer")) else source)
    if not o.out and not os.path.isdir(out):
        die(f"--from={source} is no folder to write into: say --out=DIR")
    files = {
        "tokenizer.json": convert(tok),
        "tokenizer_config.json": json.dumps({"eos_token": tok.decode([tok.eos_id])} | tok.config).encode(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            write(os.path.join(scratch, name), content)
        again = tokenizer.load(scratch)
    from prepare import superbpe

    texts = superbpe.read("stdlib", max_docs=o.max_docs)
    if again.fingerprint != tok.fingerprint or any(again.encode(t) != tok.encode(t) for t in texts):
        die(f"{source}: its tokenizer.json would not give the same ids; nothing was written")
    for name, content in files.items():
        write(os.path.join(out, name), content)
    print(f"{out}/tokenizer.json: the same {tok.vocab_size:,} ids, also on {len(texts)} files of the standard library")


if __name__ == "__main__":
    main(sys.argv[1:])
