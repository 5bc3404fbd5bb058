"""Tokenizers: bytes, tiktoken rank files (Qwen's, GPT-2's, cl100k), any Hugging Face tokenizer.json, and SuperBPE folders.

    tok = tokenizer.load("bytes" | FILE.tiktoken | tokenizer.json | DIR)        DIR may be a run or a shards directory
    tok = tokenizer.load("ids:500")    no text: ids written as numbers, "12 7 499"; one more, 500, ends a document
    ids = tok.encode("text");  text = tok.decode(ids);  tok.special["<|im_end|>"];  tok.save(dir)

Text is only text: a marker such as <|im_end|> inside it is encoded as the characters it is made of. Markers enter by id, through
`special`. `fingerprint` hashes what the ids mean (bytes of every id, and how a sample is split), not the files: Qwen's rank file and
its tokenizer.json share one. Read next: prepare/text.py, which turns text into shards with one of these."""

import base64
import functools
import hashlib
import json
import os
import pathlib
import re
import unicodedata

import numpy as np

from configurator import die

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SUPER = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]{2,}[\r\n/]*| +(?!\S)"  # SuperBPE's second split: whitespace stays inside
EOS = "<|endoftext|>"
MARKS = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end
    vision_pad image_pad video_pad <tool_call> </tool_call> fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep <tool_response>
    </tool_response> <think> </think>"""
QWEN_SPECIAL = {s if s[0] == "<" else f"<|{s}|>": 151643 + i for i, s in enumerate(MARKS.split())}
CL100K_SPECIAL = {EOS: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
RANKS = {  # a rank file holds no split rule and no specials: known ones are recognised by sha256, others bring a .json
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": ("qwen", QWEN, QWEN_SPECIAL, True),
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": ("gpt2", GPT2, {EOS: 50256}, False),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": ("cl100k_base", CL100K, CL100K_SPECIAL, False),
}
SAMPLE = (
    "The quick brown fox isn't 12345.678 km away; it'll be\tback by 9 o'clock.\n\n  def f(x):\n        return x ** 2  # naïve\r\n"
    "cafe\u0301 Ελλάδα россия 日本語 한국어 🙂👍🏽 ½ ﬁ  \n\n\n{'a': [1, 2]} https://x.org/a_b?c=d <|endoftext|> ... !!! on the other hand"
)
SUPERWORD = re.compile("[a-z]Ġ[a-z]")
LONG = 1 << 18  # characters encoded in one go; longer texts are cut, so that memory and regex stacks stay bounded
CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")  # where plain splits always break, so the cut moves no token there


def pieces(text):
    """`text` in slices of at most LONG characters, cut after a line or before a word where one is near."""
    start = 0
    while len(text) - start > LONG:
        cut = CUT.search(text, start + LONG // 2, start + LONG)
        stop = cut.start() if cut else start + LONG
        yield text[start:stop]
        start = stop
    yield text[start:]


def scalar(text):
    """Lone surrogates, which no UTF-8 can hold, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """`run`: text -> ids of one piece; `table`: bytes of every id; `files`: {name: bytes} that load() reads back."""

    def __init__(self, name, kind, special, eos, run, table, files, decode=None, run_many=None):
        self.name, self.kind, self.special, self.eos_id = name, kind, special, special[eos]
        self.run, self.table, self.files, self.whole, self.vocab_size = run, table, files, decode, len(table)
        self.run_many = run_many or (lambda texts: map(run, texts))
        self.config, self.chat_template = {}, None

    def __str__(self):
        ratio = len(SAMPLE) / len(self.encode(SAMPLE))
        return f"{self.name} ({self.kind}): {self.vocab_size:,} ids, {ratio:.2f} chars/token on mixed scripts, {self.fingerprint[:12]}"

    @functools.cached_property
    def fingerprint(self):
        sample = json.dumps([[len(b) for b in self.table], self.special, self.eos_id, self.encode(SAMPLE)], sort_keys=True)
        return hashlib.sha256(b"".join(self.table) + sample.encode()).hexdigest()

    def encode_array(self, text):
        return np.concatenate([np.asarray(self.run(piece), dtype=np.uint32) for piece in pieces(scalar(text))])

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_many(self, texts):
        """[encode(text), ...], on all cores where the library has a way to."""
        parts = [list(pieces(scalar(text))) for text in texts]
        ids = iter(self.run_many([piece for some in parts for piece in some]))
        return [[i for _ in some for i in np.asarray(next(ids), np.uint32).tolist()] for some in parts]

    def decode(self, ids):
        ids = [i for i in ids if i < self.vocab_size]  # a model may have rows that no text ever used
        return self.whole(ids) if self.whole else b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i):
        return self.table[i]

    def configure(self, **config):
        """Itself, with more of what tokenizer_config.json says (the chat template above all); save() keeps it."""
        self.config |= config
        self.chat_template = self.config.get("chat_template")
        self.files["tokenizer_config.json"] = json.dumps(self.config, indent=1, ensure_ascii=False).encode()
        return self

    def save(self, folder):
        os.makedirs(folder, exist_ok=True)
        for name, content in self.files.items():
            new = pathlib.Path(folder, f".tmp-{os.urandom(4).hex()}-{name}")  # other processes may be reading, or saving the same
            new.write_bytes(content)
            os.replace(new, pathlib.Path(folder, name))


def end_of(cfg, tok):
    """What ends a text that an encoder reads or a decoder fills: of a chat model often another marker than what ends a document."""
    return cfg.eos_id if cfg.eos_id in tok.special.values() else tok.eos_id


def expect_same(run, shards):
    """Stops unless the ids of text mean the same in both folders. Markers may differ: a run may have added some."""
    a, b = load(run), load(shards)
    marks = {*a.special.values(), *b.special.values()}
    text = lambda tok: [token for i, token in enumerate(tok.table[: min(len(a.table), len(b.table))]) if i not in marks]  # noqa: E731
    if a.fingerprint != b.fingerprint and (text(a) != text(b) or a.encode(SAMPLE) != b.encode(SAMPLE)):
        die(f"{shards} is in another tokenizer ({b.name}) than {run} ({a.name}): prepare it again with --tokenizer={run}")


def foreign(read):
    """What a reader trips over in a file from elsewhere is that file's fault, and said in one line."""

    @functools.wraps(read)
    def careful(path, *more):
        try:
            return read(path, *more)
        except ModuleNotFoundError:  # no fault of the file: prelude.py says what to install
            raise
        except Exception as error:
            die(f"{path}: damaged, or not what its name says ({type(error).__name__}: {' '.join(str(error).split())[:200]}); copy it again")

    return careful


@foreign
def load(path):
    if str(path) == "bytes":
        table = [bytes([i]) for i in range(256)] + [EOS.encode()]
        run = lambda text: np.frombuffer(text.encode(), np.uint8)  # noqa: E731
        return Tokenizer("bytes", "bytes", {EOS: 256}, EOS, run, table, {"bytes.json": b'{"eos": 256}\n'})
    if re.fullmatch(r"ids:[1-9]\d{0,6}", str(path)):
        n = int(str(path)[4:])
        run = lambda text: [i for i in map(int, re.findall(r"\d+", text)) if i < n]  # noqa: E731
        table = [b" %d" % i for i in range(n)] + [EOS.encode()]
        return Tokenizer(path, "ids", {EOS: n}, EOS, run, table, {"ids.json": json.dumps(path).encode()})
    path = os.path.normpath(path)
    inside = sorted(os.listdir(path)) if os.path.isdir(path) else []
    if "tokenizer" in inside:
        return load(os.path.join(path, "tokenizer"))
    if "bytes.json" in inside:
        return load("bytes").configure(**config_beside(path))
    if "ids.json" in inside:
        return load(json.loads(read(os.path.join(path, "ids.json"))))
    if found := [f for f in inside if f == "tokenizer.json" or f.endswith(".tiktoken")]:
        return load(os.path.join(path, found[0]))
    if os.path.isfile(path):
        return rank_file(path) if path.endswith(".tiktoken") else hf(read(path), os.path.dirname(path))
    if {"vocab.json", "merges.txt"} <= set(inside):
        return hf(from_merges(path), path)
    die(f"no tokenizer at '{path}': give bytes, ids:N, a .tiktoken rank file, a tokenizer.json, or a folder that holds one")


def read(path, missing=None):
    return missing if missing is not None and not os.path.exists(path) else pathlib.Path(path).read_bytes()


def config_beside(folder):
    return json.loads(read(os.path.join(folder, "tokenizer_config.json"), b"{}"))


def rank_file(path):
    import tiktoken

    raw, beside = read(path), os.path.splitext(path)[0] + ".json"
    ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in raw.splitlines() if line)}
    if {bytes([i]) for i in range(256)} - set(ranks) or len(set(ranks.values())) < len(ranks):
        die(f"{path}: a single byte has no rank, or a rank has two tokens; copy it again")
    known, eos = RANKS.get(hashlib.sha256(raw).hexdigest()), EOS
    if known:
        name, pattern, special, nfc = known
    elif os.path.exists(beside):
        name, pattern, special, nfc, eos = (json.loads(read(beside))[k] for k in ("name", "pattern", "special", "nfc", "eos"))
    else:
        rule = '{"name": "mine", "pattern": "regex", "special": {"<|endoftext|>": %d}, "nfc": false, "eos": "<|endoftext|>"}'
        die(f"{path}: an unknown rank file does not say how to split text; write {beside} with {rule % len(ranks)}")
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    table = [b""] * (max([*ranks.values(), *special.values()]) + 1)
    for token, i in [*ranks.items(), *((s.encode(), i) for s, i in special.items())]:
        table[i] = token

    def run(text):  # never reads a special out of the text
        return encoding.encode_to_numpy(unicodedata.normalize("NFC", text) if nfc else text, disallowed_special=())

    rule = {"name": name, "pattern": pattern, "special": special, "nfc": nfc, "eos": eos}
    files = {f"{name}.tiktoken": raw, f"{name}.json": json.dumps(rule, indent=1).encode()}
    return Tokenizer(name, "tiktoken", special, eos, run, table, files).configure(**config_beside(os.path.dirname(path)))


def byte_alphabet():
    """{character: byte}: the printable stand-ins by which byte-level BPE files spell bytes (space is written as U+0120)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(rest)}


def hf(raw, folder):
    """A tokenizer.json. Added tokens are markers, matched never; only those of blanks alone (GPT-NeoX) are part of text."""
    from tokenizers import Tokenizer as Fast

    data = json.loads(raw)
    config = config_beside(folder)
    special = {t["content"]: t["id"] for t in data["added_tokens"] if t["content"].strip()}
    for t in data["added_tokens"]:
        t["special"] = t["content"] in special
    data |= {"truncation": None, "padding": None, "post_processor": None}
    fast = Fast.from_str(json.dumps(data))
    fast.encode_special_tokens = True  # that is: as text
    vocab = fast.get_vocab(with_added_tokens=True)
    byte_level = "ByteLevel" in json.dumps([data["pre_tokenizer"], data["decoder"]])
    latin = str.maketrans({c: chr(b) for c, b in byte_alphabet().items()})
    added = {t["id"] for t in data["added_tokens"]}
    table = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        code = None if byte_level else re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        spelled = token.translate(latin).encode("latin-1") if byte_level and i not in added else token.replace("▁", " ").encode()
        table[i] = bytes.fromhex(code[1]) if code else spelled
    named = config["eos_token"]["content"] if isinstance(config.get("eos_token"), dict) else config.get("eos_token")
    eos = next((s for s in (EOS, "<|end_of_text|>", named, "</s>", "<eos>") if s in special), None)  # chats end turns with `named`
    if eos is None:
        die(f"{folder}: no token ends a document; name an added token as eos_token in {folder}/tokenizer_config.json")
    superwords = [t.replace("Ġ", " ") for t in vocab if SUPERWORD.search(t)][-64:] if byte_level else []
    run_many = lambda texts: [e.ids for e in fast.encode_batch_fast(texts, add_special_tokens=False)]  # noqa: E731 (1.3x encode(), which finds offsets)
    run = lambda text: run_many([text])[0]  # noqa: E731
    if superwords and all(len(run(t)) > 1 for t in superwords):
        die(f"{folder}: the split in tokenizer.json never makes the token {superwords[-1]!r}; keep vocab.json and merges.txt alone")
    if leaks := [s for s in special if special[s] in run(f"a {s} b")]:
        die(f"{folder}: this model reads the marker {leaks[0]} inside text as its id; byte-level BPE tokenizers do not")
    template = read(os.path.join(folder, "chat_template.jinja"), b"").decode() or config.get("chat_template")
    decode = None if byte_level else functools.partial(fast.decode, skip_special_tokens=False)
    name, kind = config.get("name", os.path.basename(os.path.abspath(folder))), "superbpe" if superwords else "hf"
    tok = Tokenizer(name, kind, special, eos, run, table, {"tokenizer.json": raw}, decode, run_many)
    return tok.configure(name=name, eos_token=named, chat_template=template)


def from_merges(folder):
    """vocab.json + merges.txt -> tokenizer.json. They hold no split rule: it follows from superwords or the tokenizer's class."""
    vocab = json.loads(read(os.path.join(folder, "vocab.json")))
    config = config_beside(folder)
    lines = read(os.path.join(folder, "merges.txt")).decode().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    made = set(byte_alphabet()) | {a + b for a, b in merges}
    added = {t: i for t, i in vocab.items() if t not in made} | json.loads(read(os.path.join(folder, "added_tokens.json"), b"{}"))
    added |= {t["content"]: int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
    kind = config.get("tokenizer_class", "")
    split = GPT2 if kind.startswith("GPT2") or len(vocab) == 50257 else QWEN if kind.startswith("Qwen2") else None
    split = SUPER if any(map(SUPERWORD.search, vocab)) else split  # the first-stage split would undo every superword without a word
    if split is None:
        die(f"{folder}: merges.txt does not say how to split text and tokenizer_class is '{kind}'; bring its tokenizer.json")
    return bpe(vocab, merges, split, added, nfc=split is QWEN)


def bpe(vocab, merges, split, added, nfc=False):
    """The tokenizer.json of a byte-level BPE that splits text by the pattern `split`; `added`: {marker: id}."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.normalizer = normalizers.NFC() if nfc else None
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), plain])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(t, normalized=False) for t in sorted(added, key=added.get)])
    if moved := [t for t in added if fast.token_to_id(t) != added[t]]:
        die(f"{moved[0]}: the files give it id {added[moved[0]]}, which does not follow the {len(vocab)} ids of vocab.json")
    return fast.to_str().encode()
