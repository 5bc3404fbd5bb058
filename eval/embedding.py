"""How good sentence vectors are: plumbing, semantic similarity, retrieval, MTEB, and a table against baselines.

    python -m eval.embedding --ckpt=RUN|FOLDER [--quick] [--run_stsb] [--run_sts] [--run_retrieval] [--run_mteb] [--compare_baselines]
        [--run_all] [--data=data/sts] [--output_dir=DIR] [--pooling=cls] [--causal=False] [--query_prefix=] [--doc_prefix=]

A run of prism is read by model.Embedder: the encoder of an encoder-decoder; a decoder causally, or with --causal=False its mask removed.
Any sentence-transformers folder is read by that library, unless --pooling or --causal asks for another reading. --data holds jsonl, tsv,
csv or parquet: stsb-test and sickr-test of sentence1, sentence2, score (prepare.sts writes them); retrieval/corpus of id, text and perhaps
title, retrieval/queries of id, text, retrieval/qrels of query, doc and perhaps score. --quick proves plumbing, not quality: a random model
passes its similarity part. Missing data: exit code 2. Read next: eval/mteb.py, prepare/sts.py, eval/sample_retrieval.json.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import configurator
import files
import model as M
from configurator import die
from machine import find, git_commit
from prepare import Checks, no_bars, sources

OPTIONS = {
    "ckpt": str, "data": "data/sts", "output_dir": "", "pooling": "", "causal": None, "dtype": "float32", "batch_size": 0,
    "device": "auto", "quiet": False, "query_prefix": "", "doc_prefix": "", "split": "test", "quick": False, "run_stsb": False,
    "run_sts": False, "run_retrieval": False, "run_mteb": False, "mteb_tasks": "", "mteb_categories": "", "compare_baselines": False,
    "run_all": False, "qwen3_baseline": "", "e5": "", "gte": "", "bge": "", "others": "",
}  # fmt: skip
WANTS = {"mteb_tasks": "run_mteb", "mteb_categories": "run_mteb", "split": "run_stsb run_sts"}  # without these an option does nothing
WANTS |= dict.fromkeys(("query_prefix", "doc_prefix"), "run_retrieval run_mteb compare_baselines")
WANTS |= dict.fromkeys(("qwen3_baseline", "e5", "gte", "bge", "others"), "compare_baselines")
STS, RETRIEVAL = ("sentence1", "sentence2", "score"), {"corpus": ("id", "text"), "queries": ("id", "text"), "qrels": ("query", "doc")}
COLUMNS = ("params", "stsb", "sickr", "MRR@10", "Recall@1", "Recall@10", "Recall@100", "NDCG@10", "texts/s")
BGE_QUERY = "Represent this sentence for searching relevant passages: "
NEAR = [  # (anchor, near, far)
    ("A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply today."),
    ("How do I bake bread?", "A recipe for baking bread at home.", "The capital of France is Paris."),
    ("The cat sleeps on the sofa.", "A cat is asleep on the couch.", "Quantum computers use superposition."),
]
ALL = [text for triple in NEAR for text in triple][:8]


# ---- reading ----------------------------------------------------------------------------------------------------------------


class Encoder:
    """texts -> float32 (n, d), whatever holds the weights."""

    def __init__(self, path, device, batch_size=0, pooling="", causal=None, prefixes=("", ""), dtype="float32"):
        self.path, self.prefixes, self.dtype, self.ours, self.theirs = Path(path), prefixes, dtype, None, None
        path, dtype = self.path, getattr(torch, dtype)
        self.size = {"batch_size": batch_size} if batch_size else {}  # else what each library thinks best
        if (path / "modules.json").is_file() and not pooling and causal is None:
            from sentence_transformers import SentenceTransformer

            self.theirs = SentenceTransformer(str(path), device=str(device), model_kwargs={"dtype": dtype})
            self.params = sum(p.numel() for p in self.theirs.parameters())
            self.unit = any("Normalize" in type(module).__name__ for module in self.theirs)
            said = lambda name: next((getattr(m, name) for m in self.theirs.modules() if hasattr(m, name)), None)  # noqa: E731
            self.how = {"pooling": said("pooling_mode"), "causal": getattr(said("config"), "is_causal", None)}
            return
        self.ours = M.Embedder.load(path, device=device, dtype=dtype, causal=causal, **{"pooling": pooling} if pooling else {})
        self.unit, self.how, m = self.ours.normalize, {"pooling": self.ours.pooling, "causal": self.ours.causal}, self.ours.model
        self.params = m.num_params()
        if m.cfg.arch == "encdec":  # what a text does not pass through, and an export leaves behind
            self.params -= sum(p.numel() for p in m.decoder.parameters()) + m.cfg.n_sentinels * m.embed.weight.shape[1]

    def facts(self) -> dict:
        """What was measured: in every file of results, so that none needs its command beside it."""
        run = checkpoint.steps(self.path) or (self.path / "state.json").is_file()
        step = checkpoint.read_state(checkpoint.resolve(self.path))["step"] if run else None
        return {"ckpt": str(self.path), "step": step, "commit": git_commit(), "dtype": self.dtype, "prefixes": self.prefixes} | self.how

    def encode(self, texts, kind=None):
        """kind: query, doc or None (symmetric tasks get no prefix)."""
        texts = [self.prefixes[kind == "doc"] + text if kind else text for text in texts]
        if self.ours:
            return self.ours.encode(texts, **self.size)
        return self.theirs.encode(texts, **self.size, show_progress_bar=False, convert_to_tensor=True).float().cpu().numpy()


def read_rows(stem: Path, *columns) -> list[dict]:
    """`stem`, or it with .jsonl, .tsv, .csv or .parquet behind; one line and exit code 2 if none is there, or if a row lacks a column."""
    for kind in ("", ".jsonl", ".tsv", ".csv", ".parquet"):
        path = stem.with_name(stem.name + kind)
        if path.is_file():
            rows = sources.read(path)
            bad = [f"row {n} has {list(r)}" for n, r in enumerate(rows, 1) if any(r.get(c) is None for c in columns)]
            return rows if rows and not bad else die(f"{path}: wants rows of {', '.join(columns)}; {bad[0] if bad else 'it has none'}")
    die(f"{stem} (or .jsonl, .tsv, .csv, .parquet) is missing: prepare.sts makes it; --data=DIR, in training --eval_sts=FILE, says where")


# ---- metrics ----------------------------------------------------------------------------------------------------------------


def ranks(x):
    """1..n, ties sharing their mean rank."""
    values, where, count = np.unique(np.asarray(x, np.float64), return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[where] if len(values) else values


def pearson(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def spearman(a, b):
    return pearson(ranks(a), ranks(b))


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def interval(a, b, draws):
    """95 % bootstrap interval of Spearman over pairs, fixed draws."""
    rng, a, b = np.random.default_rng(0), np.asarray(a), np.asarray(b)
    picks = (rng.integers(0, len(a), len(a)) for _ in range(draws))
    return np.percentile([spearman(a[i], b[i]) for i in picks], [2.5, 97.5]).tolist()


def top_k(queries, docs, k=100, chunk=256):
    """Exact neighbours by inner product, (Q, min(k, D)): chunks of queries, ties to the lower index."""
    out = []
    for at in range(0, len(queries), chunk):
        out.append(np.argsort(-(queries[at : at + chunk] @ docs.T), axis=1, kind="stable")[:, :k])
    return np.concatenate(out) if out else np.zeros((0, min(k, len(docs))), int)


def retrieval_metrics(found: list[list], relevant: list[list]) -> dict:
    """MRR@10, Recall@1/10/100, NDCG@10 (binary). Ids count once on both sides; queries without a relevant one are left out and counted."""
    rows, empty = [], 0
    for got, want in zip(found, relevant, strict=True):
        want, got = set(want), list(dict.fromkeys(got))
        if not want:
            empty += 1
            continue
        hits = [rank for rank, doc in enumerate(got, 1) if doc in want]
        ideal = sum(1 / np.log2(rank + 1) for rank in range(1, min(len(want), 10) + 1))
        recall = [sum(rank <= k for rank in hits) / len(want) for k in (1, 10, 100)]
        first = hits[0] if hits else 11
        rows.append([1 / first if first <= 10 else 0.0, *recall, sum(1 / np.log2(rank + 1) for rank in hits if rank <= 10) / ideal])
    means = dict(zip(COLUMNS[3:8], np.mean(rows, 0).tolist() if rows else [0.0] * 5, strict=True))
    return means | {"queries": len(rows), "without_relevant": empty}


# ---- tasks ------------------------------------------------------------------------------------------------------------------


def score_pairs(encoder, rows, draws=0) -> dict:
    start = time.perf_counter()
    a, b = (unit(encoder.encode([row[f"sentence{i}"] for row in rows])) for i in (1, 2))
    seconds, cosine, gold = time.perf_counter() - start, (a * b).sum(1), [float(row["score"]) for row in rows]
    score = {"spearman": spearman(cosine, gold), "pearson": pearson(cosine, gold), "pairs": len(rows), "texts/s": 2 * len(rows) / seconds}
    return score | ({"interval": interval(cosine, gold, draws)} if draws else {})


def score_retrieval(encoder, folder) -> dict:
    """folder/{corpus,queries,qrels}; without a folder the built-in sample of 5 queries x 10 documents."""
    if folder.is_dir():
        corpus, queries, qrels = (read_rows(folder / name, *columns) for name, columns in RETRIEVAL.items())
        triples = [(str(q["query"]), str(q["doc"]), float(q.get("score", 1))) for q in qrels]
    else:
        sample = json.loads(Path(__file__).with_name("sample_retrieval.json").read_text())
        corpus, queries, triples = sample["corpus"], sample["queries"], [(q, d, 1) for q, d in sample["qrels"]]
    ids = [str(doc["id"]) for doc in corpus]
    docs = unit(encoder.encode([f"{doc.get('title') or ''} {doc['text']}".strip() for doc in corpus], "doc"))
    found = top_k(unit(encoder.encode([q["text"] for q in queries], "query")), docs)
    relevant = {str(q["id"]): [] for q in queries}
    for query, doc, gain in triples:
        if gain > 0 and query in relevant:
            relevant[query].append(doc)
    scores = retrieval_metrics([[ids[i] for i in row] for row in found], list(relevant.values()))
    return scores | {"documents": len(ids), "data": str(folder) if folder.is_dir() else "sample"}


def quick(encoder, say) -> bool:
    """Shape, order, spread, norm, bidirectionality, determinism, padding and batch invariance."""
    check, coarse = Checks("quick", say), encoder.dtype != "float32"
    x = encoder.encode(ALL)
    check("finite vectors of one shape", np.isfinite(x).all() and x.ndim == 2 and len(x) == len(ALL), str(x.shape))
    cosine = unit(x) @ unit(x).T
    off = cosine[~np.eye(len(x), dtype=bool)]
    check("8 sentences are told apart", off.max() < 0.99 and off.mean() < 0.9 and off.min() < off.max(), f"mean cosine {off.mean():.3f}")
    order = [unit(encoder.encode(list(triple))) for triple in NEAR]
    check("3 triplets are in order", all(a @ b > a @ c for a, b, c in order))
    if encoder.unit:
        check("unit norm", np.abs(np.linalg.norm(x, axis=1) - 1).max() < (1e-2 if coarse else 1e-5))
    check("the same again", np.array_equal(x, encoder.encode(ALL)))
    alone = np.concatenate([encoder.encode([text]) for text in ALL])
    gap, least = np.abs(alone - x).max() / np.abs(x).max(), (unit(alone) * unit(x)).sum(1).min()
    good, note = (least >= 0.9999, f"smallest cosine {least:.6f}") if coarse else (gap < 1e-4, f"{gap:.1e}")
    check("padding and batch mates do not matter", good, note)
    check("a later token moves earlier states, the first of them too", *later_token(encoder))
    return check.end()


def later_token(encoder) -> tuple[bool, str]:
    """Does it, and by how much: where it moves least."""
    from prepare import later_token as test

    if not encoder.ours:
        moved = {k: v for k, v in test.later_token(encoder.path).items() if not k.startswith("causal")}
        return test.holds(moved), f"by at least {min(moved.values()):.1e}"
    rows = [[*range(40, 51), last] for last in (60, 61)]
    with torch.no_grad():
        a, b = (encoder.ours(M.flat([row], encoder.ours.model.embed.weight.device))[0] for row in rows)
    moved = (a - b)[:-1].abs().amax(1)
    most, first = float(moved.max()), float(moved[0])
    return test.holds({"any": most, "position 0": first}), f"by {most:.1e}, the first by {first:.1e}"


# ---- the table --------------------------------------------------------------------------------------------------------------


def baselines(opt):
    """(name, folder, settings of Encoder): every row of the table, also those whose folder was not given."""
    qwen, prefixes = opt.qwen3_baseline, {"e5": ("query: ", "passage: "), "bge": (BGE_QUERY, "")}
    rows = [("Qwen3, causal, mean", qwen, {"pooling": "mean"}), ("Qwen3, causal, last token", qwen, {"pooling": "last"})]
    rows += [("Qwen3, mask removed, untrained", qwen, {"pooling": "mean", "causal": False})]
    rows += [(name.upper() + "-base", getattr(opt, name), {"prefixes": prefixes.get(name, ("", ""))}) for name in ("e5", "gte", "bge")]
    rows += [(Path(path).name, path, {}) for path in opt.others.split(",") if path]
    if lost := [path for _, path, _ in rows if path and not Path(path).is_dir()]:
        die(f"{lost[0]}: no such folder; give the folders of the baselines, or leave them out")
    return rows


def table_row(encoder, data) -> dict:
    row = {"params": encoder.params}
    for task in ("stsb", "sickr"):
        if any(data.glob(f"{task}-test.*")):
            scores = score_pairs(encoder, read_rows(data / f"{task}-test", *STS))
            row |= {task: scores["spearman"], "texts/s": scores["texts/s"]}
    return row | score_retrieval(encoder, data / "retrieval")


def compare(opt, encoder, device, data) -> tuple[dict, str]:
    rows = {Path(opt.ckpt).name: encoder.facts() | table_row(encoder, data)}
    for name, path, settings in baselines(opt):
        other = Encoder(path, device, opt.batch_size, dtype=opt.dtype, **settings) if path else None
        rows[path if name in rows else name] = other.facts() | table_row(other, data) if other else {}
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = ["n/a" if c not in row else f"{row[c]:,.0f}" if c in ("params", "texts/s") else f"{row[c]:.4f}" for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    asked = next(iter(rows.values()))["data"]  # a folder, or the built-in sample
    return rows, "\n".join([*lines, "", f"STS: Spearman on the test split of {data}; retrieval: {asked}; n/a: not given."])


def main(argv):
    opt = configurator.args(OPTIONS, argv, __doc__)
    if not any(value is True for key, value in vars(opt).items() if key != "quiet"):
        die("nothing to do: add --quick, --run_stsb, --run_sts, --run_retrieval, --run_mteb, --compare_baselines or --run_all")
    for key, wants in WANTS.items():
        if getattr(opt, key) != OPTIONS[key] and not any(getattr(opt, want) for want in ("run_all", *wants.split())):
            die(f"--{key}={getattr(opt, key)}: would do nothing; add --{wants.replace(' ', ' or --')}")
    device, data = find(opt.device, "auto").device, Path(opt.data)
    if opt.causal not in (None, "True", "False") or opt.dtype not in ("float32", "bfloat16"):
        die(f"--causal={opt.causal} --dtype={opt.dtype}: True or False; float32 or bfloat16")
    baselines(opt)  # a lost folder is found before anything is encoded, and so are missing pairs
    tasks = {f"stsb-{opt.split}": opt.run_stsb or opt.run_sts or opt.run_all}
    tasks["sickr-test"] = opt.run_sts or (opt.run_all and any(data.glob("sickr-test.*")))
    pairs = {task: read_rows(data / task, *STS) for task, wanted in tasks.items() if wanted}
    no_bars()
    causal, prefixes = None if opt.causal is None else opt.causal == "True", (opt.query_prefix, opt.doc_prefix)
    encoder = Encoder(opt.ckpt, device, opt.batch_size, opt.pooling, causal, prefixes, opt.dtype)
    out = Path(opt.output_dir or (opt.ckpt if Path(opt.ckpt).is_dir() else "."))
    passed = quick(encoder, (lambda text: None) if opt.quiet else print) if opt.quick or opt.run_all else True
    results = encoder.facts()
    for task, rows in pairs.items():
        score = results[task] = score_pairs(encoder, rows, draws=1000)
        low, high = score["interval"]
        print(f"{task}: Spearman {score['spearman']:.4f} [{low:.4f}, {high:.4f}], Pearson {score['pearson']:.4f}, {score['pairs']} pairs")
        files.write_json(out / "sts_results.json", results)
    if opt.run_retrieval or opt.run_all:
        scores = score_retrieval(encoder, data / "retrieval")
        print("retrieval: " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in scores.items()))
        files.write_json(out / "retrieval_results.json", encoder.facts() | scores)
    if opt.run_mteb or opt.run_all:
        from eval.mteb import run

        run(encoder, data, out / "mteb", opt.mteb_tasks, opt.mteb_categories, print)
    if opt.compare_baselines or opt.run_all:
        rows, text = compare(opt, encoder, device, data)
        print(text)
        files.write_json(out / "baseline_comparison.json", rows)
        files.write(out / "baseline_comparison.md", text + "\n")
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
