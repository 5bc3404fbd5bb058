"""SQuAD's measures of an answer, intervals, and text cut to a budget: the small change of eval/latent.py.

exact and f1 follow the official script: lower case, no punctuation, no articles, the best over all references, "" equals "".
"""

import collections
import importlib.util
import re
import string

import numpy as np

from eval import bootstrap


def normalise(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(prediction: str, references) -> float:
    return max(float(normalise(prediction) == normalise(r)) for r in references)


def f1_one(prediction: str, reference: str) -> float:
    p, r = normalise(prediction).split(), normalise(reference).split()
    if not p or not r:
        return float(p == r)
    same = sum((collections.Counter(p) & collections.Counter(r)).values())  # a multiset: a word said twice counts twice
    return 2 * same / (len(p) + len(r))


def f1(prediction: str, references) -> float:
    return max(f1_one(prediction, r) for r in references)


# ---- text within a budget -----------------------------------------------------------------------------------------------


def best_first(context: str, question: str) -> str:
    """The sentences, those with most words of the question first."""
    asked = set(normalise(question).split())
    sentences = re.split(r"(?<=[.!?])\s+", context)
    return " ".join(sorted(sentences, key=lambda s: -len(asked & set(normalise(s).split()))))


def cut_tokens(tok, text, n, tail=False):
    ids = tok.encode(text)
    return tok.decode(ids[len(ids) - min(n, len(ids)) :] if tail else ids[:n])


def cut_bytes(tok, text, n, tail=False):
    raw = text.encode()
    return (raw[len(raw) - min(n, len(raw)) :] if tail else raw[:n]).decode("utf-8", "ignore")


def budget_arms(side, row, n, cut, size):
    """{kind: (context, question)} that fit n tokens or bytes."""
    c, q = row["context"], row["question"]
    if not side.all:
        return {"head": (cut(side.tok, c, n), q), "tail": (cut(side.tok, c, n, True), q), "best": (cut(side.tok, best_first(c, q), n), q)}
    room = max(0, n - size(q))
    kept = cut(side.tok, q, n)
    return {
        "head": (cut(side.tok, c, n), ""),
        "tail": ("", cut(side.tok, f"{c}\n{q}", n, True)),
        "question+head": (cut(side.tok, c, room), kept),
        "question+best": (cut(side.tok, best_first(c, q), room), kept),
    }


def interval(a, b, resamples, seed, group=None):
    """Mean of a - b and its paired bootstrap 95 % interval; questions of one `group`, a passage, are drawn together."""
    d = np.array(a) - np.array(b)
    return [float(d.mean()), *bootstrap(d, None, resamples, seed, group)]


def zstd_size(raw: bytes):
    """Bytes under zstd level 19, where pyarrow is installed; else None."""
    if importlib.util.find_spec("pyarrow") is None:
        return None
    import pyarrow

    return len(pyarrow.Codec("zstd", 19).compress(raw, asbytes=True))
