"""Generated fact passages and questions: a reading test whose answer cannot be guessed and whose entropy is known.

    python -m prepare.factqa --out=data/factqa                                   # train/dev/test.jsonl, lm.jsonl, natural.jsonl
    python -m prepare.factqa --out=data/factqa --bpe=1152 --shards=data/facts_a  # ... and uint32 shards under a fresh BPE of 1,152 ids
    python -m prepare.factqa --out=data/factqa --bpe=0 --shards=data/facts_b     # the same for a language model on bytes

A passage states `facts` facts about one person (six by default: about 136 bytes, of which facts * log2(values) = 30 bits are news);
`distractors` adds facts about somebody else. Every (person, attribute, value) combination belongs to one split, by hash: no fact of dev
or test is ever true in train, so a model that remembers people instead of reading scores nothing.

`lm.jsonl` is what the frozen language models are pretrained on: a passage, then its questions and answers, each answer closed by EOS.
In the shards every answer is trained, the passage only in one document of `passage_every` (its values are noise: all of their gradient
tells the model to guess). `natural.jsonl` holds short English paragraphs (docstrings, or --natural=FILE). Read next: latentwire.py.
"""

import ast
import contextlib
import functools
import hashlib
import json
import math
import random
import sys
import sysconfig
from pathlib import Path

import numpy as np

import configurator
import tokenizer
from data import UNTRAINED
from files import write_json, write_rows
from prepare import shards, sources

# attribute | two ways to say it, of a subject {s} or of its owner {p} | the question about {n}; then 32 values
FACTS = """
city | {s} lives in {v}. | {p} home is in {v}. | Where does {n} live?
  Oslo Paris Rome Cairo Lima Quito Delhi Seoul Tokyo Milan Turin Basel Ghent Lyon Porto Split Riga Minsk Kiev Accra Dakar Tunis Perth
  Leeds York Derry Cork Bonn Graz Linz Brno Sofia
job | {s} works as a {v}. | {p} job is {v}. | What is the job of {n}?
  baker nurse pilot judge miner tailor farmer singer dancer sailor driver welder painter barber butcher banker teacher lawyer doctor cook
  clerk guard porter mason potter weaver writer editor actor coach broker plumber
pet | {s} has a pet {v}. | {p} pet is a {v}. | Which pet does {n} have?
  cat dog goat hen duck horse mouse rat snake frog toad crab fish swan crow hawk owl parrot lizard turtle rabbit ferret pig cow sheep mule
  spider beetle hamster pony goose fox
food | {s} likes {v}. | {p} favourite food is {v}. | What does {n} like to eat?
  rice soup bread pasta pizza plums pears grapes figs dates beans peas corn cheese salad curry tofu stew pie cake honey nuts olives onions
  carrots melons mango toast bacon ham noodles lentils
music | {s} plays the {v}. | {p} instrument is the {v}. | Which instrument does {n} play?
  flute piano violin guitar drum harp cello trumpet tuba organ banjo lute oboe clarinet viola horn fiddle bugle zither sitar kazoo gong
  bells lyre trombone bassoon recorder ukulele mandolin cymbal whistle accordion
car | {s} drives a {v} car. | {p} car is {v}. | Which colour is the car of {n}?
  red blue green black white grey pink brown purple orange yellow violet cyan gold silver beige ivory teal navy coral amber maroon khaki
  lilac olive bronze copper indigo lime scarlet crimson turquoise
sport | {s} enjoys {v}. | {p} sport is {v}. | Which sport does {n} do?
  tennis golf rugby boxing judo hockey rowing sailing diving surfing skiing skating cycling running fencing archery cricket karate polo
  squash chess darts bowling hiking climbing wrestling swimming football netball handball curling badminton
month | {s} was born in {v}. | {p} birth year is {v}. | When was {n} born?
  1950 1951 1952 1953 1954 1955 1956 1957 1958 1959 1960 1961 1962 1963 1964 1965 1966 1967 1968 1969 1970 1971 1972 1973 1974 1975 1976
  1977 1978 1979 1980 1981
"""
ATTRIBUTES, VALUES = {}, {}
for _line in FACTS.strip().splitlines():
    if "|" in _line:
        _name, *_ways, _question = _line.split(" | ")
        ATTRIBUTES[_name], VALUES[_name] = (_ways, _question), []
    else:
        VALUES[_name] += _line.split()
FILES = ("train", "dev", "test", "lm", "natural")
WOMEN = "Anna Maria Clara Nina Lena Eva Olga Irma Rosa Vera Ida Tina Emma Lucy Jane Alice Sara Ruth Julia Laura".split()
MEN = "Ivan Hugo Otto Karl Paul Omar Juan Luis Erik Lars Tom Jack Adam Noah Leon Felix Max Emil Oscar Peter".split()
FAMILY = """Lind Berg Holm Ward Cole Reed Shaw Webb Hill Ford Lane Nash Park Rios Vega Diaz Luna Soto Cruz Ruiz Mora Silva Costa Rossi
    Bruno Conti Greco Meyer Weber Koch Wolf Braun Stein Novak Horak Kovac Toth Nagy Varga Popov""".split()
DEFAULTS = dict(
    out="data/factqa",  # folder of the jsonl files
    facts=6,  # facts about the person asked about
    values=32,  # values per attribute, at most 32: chance is 1 / values
    value_words=1,  # words per value: 2 joins two values with "and"
    distractors=0,  # facts about another person, placed before
    train=20000,  # passages of train.jsonl, each with all its questions
    dev=512,  # passages of dev.jsonl, one question each
    test=1024,  # passages of test.jsonl, one question each
    lm_docs=20000,  # documents of lm.jsonl (train combinations only)
    natural="",  # text file for natural.jsonl; "": docstrings of the standard library
    natural_docs=6000,  # paragraphs of natural.jsonl, 80 to 400 bytes each
    passage_every=8,  # shards: the passage itself is trained in one document of this many
    shards="",  # write shards here, in two folders: facts and text
    bpe=0,  # ids of the BPE trained for the shards; 0: bytes
    seed=1337,
)


def values(attribute: str, cfg, rng: random.Random) -> str:
    return " and ".join(rng.sample(VALUES[attribute][: cfg.values], cfg.value_words))


def split_of(name: str, attribute: str, value: str, seed: int) -> str:
    """The one split in which `name` may have this value: 80 % train, 10 % dev, 10 % test of all combinations, words in any order."""
    value = " and ".join(sorted(value.split(" and ")))
    n = int.from_bytes(hashlib.blake2b(f"{seed}|{name}|{attribute}|{value}".encode(), digest_size=4).digest(), "little") % 10
    return "dev" if n == 8 else "test" if n == 9 else "train"


def person(rng: random.Random) -> tuple[str, str]:
    woman = rng.random() < 0.5
    return rng.choice(WOMEN if woman else MEN) + " " + rng.choice(FAMILY), "She" if woman else "He"


def statements(rng, cfg, split: str, count: int, avoid: str = "") -> tuple[str, str, list[tuple[str, str]]]:
    """One person: (full name, text, [(attribute, value)]); the name stands in the first sentence, a pronoun in the others."""
    for _ in range(1000):
        if found := attempt(rng, cfg, split, count, avoid):
            return found
    configurator.die(f"values={cfg.values} facts={cfg.facts}: hardly anybody has so many facts of the {split} split; raise --values")


def attempt(rng, cfg, split, count, avoid):
    name = avoid
    while name.split()[:1] == avoid.split()[:1]:  # questions use the first name
        name, pronoun = person(rng)
    facts, sentences = [], []
    for i, attribute in enumerate(rng.sample(list(ATTRIBUTES), count)):
        tries = (values(attribute, cfg, rng) for _ in range(201))
        value = next((v for v in tries if split_of(name, attribute, v, cfg.seed) == split), None)
        if value is None:  # a combination of this split need not exist for this person when there are few values
            return None
        facts.append((attribute, value))
        subject, owner = (name, name + "'s") if i == 0 else (pronoun, "Her" if pronoun == "She" else "His")
        sentences.append(rng.choice(ATTRIBUTES[attribute][0]).format(s=subject, p=owner, v=value))
    return name, " ".join(sentences), facts


def passage(rng, cfg, split: str, facts: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """(passage, [(question, answer)] in the order of a shuffle)."""
    name, text, pairs = statements(rng, cfg, split, facts or cfg.facts)
    if cfg.distractors:
        text = statements(rng, cfg, split, cfg.distractors, avoid=name)[1] + " " + text
    rng.shuffle(pairs)
    return text, [(ATTRIBUTES[a][1].format(n=name.split()[0]), v) for a, v in pairs]


def paragraphs(path: str, count: int) -> list[str]:
    """Short English paragraphs of 80 to 400 bytes, from one text file or from the docstrings every machine has."""
    with sources.damaged(path, UnicodeDecodeError):
        texts = [Path(path).read_text(encoding="utf-8")] if path else []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) if not path else ():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    out = [p for p in (" ".join(p.split()) for text in texts for p in text.split("\n\n")) if 80 <= len(p.encode()) <= 400]
    out or configurator.die(f"natural={path}: no paragraph of 80 to 400 bytes between empty lines; give another text")
    random.Random(0).shuffle(out)
    return out[:count]


def settings_of(cfg) -> dict:
    """All that decides the jsonl files."""
    rule = {"split_of": "any order"} if cfg.value_words > 1 else {}  # older ones may hold a pair in two splits: made anew
    return {k: v for k, v in vars(cfg).items() if k not in ("out", "shards", "bpe", "passage_every")} | rule


def generate(cfg) -> None:
    out, natural = Path(cfg.out), paragraphs(cfg.natural, cfg.natural_docs)
    for split, count in (("train", cfg.train), ("dev", cfg.dev), ("test", cfg.test)):
        rng, rows = random.Random(f"{cfg.seed}-{split}"), []
        for i in range(count):
            text, qa = passage(rng, cfg, split)
            for j, (question, answer) in enumerate(qa if split == "train" else qa[:1]):
                rows.append({"context": text, "question": question, "answers": [answer], "id": f"{split}-{i}-{j}"})
        write_rows(out / f"{split}.jsonl", rows)
    rng = random.Random(f"{cfg.seed}-lm")  # half of the documents are easier: with few facts the lookup is learned sooner
    drawn = (passage(rng, cfg, "train", cfg.facts if i % 2 else rng.randint(1, cfg.facts)) for i in range(cfg.lm_docs))
    write_rows(out / "lm.jsonl", ({"context": text, "qa": qa} for text, qa in drawn))
    write_rows(out / "natural.jsonl", ({"text": p} for p in natural))


def train_bpe(texts, size: int, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = dict(special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, **alphabet))
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))


def encode_rows(passage_every, n_val, task, tok, out, count):
    """The job of shards.build: numbered rows -> documents, bit 31 where nothing is trained; the first n_val are the validation split."""
    docs, end = [], np.array([tok.eos_id], np.uint32)
    for i, row in task:
        hidden = np.uint32(0 if i % passage_every == 0 else UNTRAINED)
        parts = [tok.encode_array("Context: " + row["context"]) | hidden] if "qa" in row else [tok.encode_array(row["text"]), end]
        for question, answer in row.get("qa", ()):
            parts += [tok.encode_array(f"\nQuestion: {question}\nAnswer:") | hidden, tok.encode_array(" " + answer), end]
        ids = np.concatenate(parts)
        out.write(ids.astype("<u4").tobytes())
        docs.append((len(ids), sum(len(tok.token_bytes(t)) for t in (ids & ~UNTRAINED).tolist() if t != tok.eos_id), int(i < n_val)))
    return docs


def write_shards(cfg) -> None:
    out, dest = Path(cfg.out), Path(cfg.shards)
    rows = {name: sources.read(out / f"{file}.jsonl") for name, file in (("facts", "lm"), ("text", "natural"))}
    if cfg.bpe:
        sample = ["Context: {}\nQuestion: {}\nAnswer: {}".format(r["context"], *r["qa"][0]) for r in rows["facts"]]
        train_bpe(sample + [r["text"] for r in rows["text"]], cfg.bpe, dest / "tokenizer")
    tok = tokenizer.load(str(dest / "tokenizer") if cfg.bpe else "bytes")
    for name, docs in rows.items():
        job = functools.partial(encode_rows, cfg.passage_every, max(1, len(docs) // 50))
        settings = {"kind": "factqa", "tokenizer": tok.fingerprint, "source": settings_of(cfg), "passage_every": cfg.passage_every}
        tasks = lambda done, seen, docs=docs: iter([(list(enumerate(docs)), 0)][done:])  # noqa: E731
        shards.build(str(dest / name), tok, tasks, job, settings, 1 << 28, workers=1)


def main(argv) -> None:
    cfg = configurator.args(DEFAULTS, argv, __doc__, positive="train dev test lm_docs natural_docs passage_every")
    if not 2 <= cfg.values <= 32 or not 1 <= cfg.facts <= len(ATTRIBUTES) or not 1 <= cfg.value_words < cfg.values:
        configurator.die(f"--values={cfg.values} --facts={cfg.facts} --value_words={cfg.value_words}: 2 to 32, 1 to 8, 1 to values - 1")
    if not 0 <= cfg.distractors <= len(ATTRIBUTES) or (cfg.bpe and cfg.bpe < 257):
        configurator.die(f"--distractors={cfg.distractors} --bpe={cfg.bpe}: 0 to 8; 257 ids or more, or 0 for bytes")
    if not cfg.shards and (idle := [arg for arg in argv if arg.startswith(("--bpe=", "--passage_every="))]):
        configurator.die(f"{idle[0]} would do nothing here: it needs --shards=DIR")
    note, done = Path(cfg.out) / "settings.json", None
    with contextlib.suppress(OSError, ValueError):
        done = json.loads(note.read_text())
    if done != settings_of(cfg) or not all((note.parent / f"{name}.jsonl").is_file() for name in FILES):  # what is done is not done twice
        note.unlink(missing_ok=True)  # a kill below must not leave the old settings beside the new rows
        generate(cfg)
        write_json(note, settings_of(cfg))
    size = sum(len(row["context"].encode()) for row in sources.read(Path(cfg.out) / "test.jsonl")) / cfg.test
    bits = cfg.facts * math.log2(math.comb(cfg.values, cfg.value_words))
    print(f"{cfg.out}: {cfg.train}/{cfg.dev}/{cfg.test} passages, {size:.0f} bytes each, of which {bits:.0f} bits are values")
    if cfg.shards:
        write_shards(cfg)
        print(f"{cfg.shards}: facts and text shards, {'BPE of ' + str(cfg.bpe) + ' ids' if cfg.bpe else 'bytes'}")


if __name__ == "__main__":
    main(sys.argv[1:])
