"""How good sentence vectors are: plumbing, semantic similarity, retrieval, MTEB, and a table against baselines.

    python -m eval.embedding --ckpt=RUN|FOLDER [--quick] [--run_stsb] [--run_sts] [--run_retrieval] [--run_mteb] [--compare_baselines]
        [--run_all] [--data=data/sts] [--output_dir=DIR] [--pooling=cls] [--causal=False] [--query_prefix=] [--doc_prefix=]

A run of prism is read by model.Embedder: the encoder of an encoder-decoder; a decoder causally, or with --causal=False its mask removed.
Any sentence-transformers folder is read by that library, unless --pooling or --causal asks for another reading. --data holds
stsb-test.jsonl, sickr-test.jsonl (or tsv, csv, parquet of sentence1, sentence2, score; prepare.sts writes them) and
retrieval/{corpus,queries,qrels}.jsonl. --quick proves plumbing, not quality: a random model passes its similarity part. Missing data:
exit code 2. Read next: eval/mteb.py, prepare/sts.py, eval/sample_retrieval.json.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import configurator
import model as M
from configurator import die
from machine import find
from prepare import Checks, sources

OPTIONS = {
    "ckpt": str, "data": "data/sts", "output_dir": "", "pooling": "", "causal": None, "dtype": "float32", "batch_size": 0,
    "device": "auto", "quiet": False, "query_prefix": "", "doc_prefix": "", "split": "test", "quick": False, "run_stsb": False,
    "run_sts": False, "run_retrieval": False, "run_mteb": False, "mteb_tasks": "", "mteb_categories": "", "compare_baselines": False,
    "run_all": False, "qwen3_baseline": "", "e5": "", "gte": "", "bge": "", "others": "",
}  # fmt: skip
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
        path, dtype = Path(path), getattr(torch, dtype)
        self.path, self.prefixes, self.ours, self.theirs = path, prefixes, None, None
        self.size = {"batch_size": batch_size} if batch_size else {}  # else what each library thinks best
        if (path / "modules.json").is_file() and not pooling and causal is None:
            from sentence_transformers import SentenceTransformer

            self.theirs = SentenceTransformer(str(path), device=str(device), model_kwargs={"dtype": dtype})
            self.params = sum(p.numel() for p in self.theirs.parameters())
            return
        settings = {"causal": causal} | ({"pooling": pooling} if pooling else {})
        self.ours = M.Embedder.load(path, device=device, dtype=dtype, **settings)
        self.params = self.ours.model.num_params()

    def encode(self, texts, kind=None):
        """kind: query, doc or None (symmetric tasks get no prefix)."""
        texts = [self.prefixes[kind == "doc"] + text if kind else text for text in texts]
        if self.ours:
            return self.ours.encode(texts, **self.size)
        return self.theirs.encode(texts, **self.size, show_progress_bar=False, convert_to_tensor=True).float().cpu().numpy()


def read_rows(stem: Path) -> list[dict]:
    """stem.jsonl, .tsv, .csv or .parquet, whichever is there; one line and exit code 2 if none is."""
    for kind in ("jsonl", "tsv", "csv", "parquet"):
        path = stem.with_name(f"{stem.name}.{kind}")
        if path.is_file():
            return sources.read(path)
    die(f"{stem}.jsonl (or tsv, csv, parquet) is missing: python -m prepare.sts --help says how to get it, --data=DIR where it is")


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


def interval(a, b, draws=1000):
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
    names = ("MRR@10", "Recall@1", "Recall@10", "Recall@100", "NDCG@10")
    return dict(zip(names, np.mean(rows, 0).tolist() if rows else [0.0] * 5, strict=True)) | {
        "queries": len(rows),
        "without_relevant": empty,
    }


# ---- tasks ------------------------------------------------------------------------------------------------------------------


def score_pairs(encoder, rows) -> dict:
    a, b = (unit(encoder.encode([row[f"sentence{i}"] for row in rows])) for i in (1, 2))
    cosine, gold = (a * b).sum(1), [float(row["score"]) for row in rows]
    return {"spearman": spearman(cosine, gold), "interval": interval(cosine, gold), "pearson": pearson(cosine, gold), "pairs": len(rows)}


def score_retrieval(encoder, folder) -> dict:
    """folder/{corpus,queries,qrels}; without a folder the built-in sample of 5 queries x 10 documents."""
    if folder.is_dir():
        corpus, queries, qrels = (read_rows(folder / name) for name in ("corpus", "queries", "qrels"))
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
    check = Checks("quick", say)
    x = encoder.encode(ALL)
    check("finite vectors of one shape", np.isfinite(x).all() and x.ndim == 2 and len(x) == len(ALL), str(x.shape))
    cosine = unit(x) @ unit(x).T
    off = cosine[~np.eye(len(x), dtype=bool)]
    check("8 sentences are told apart", off.max() < 0.99 and off.mean() < 0.9 and off.min() < off.max(), f"mean cosine {off.mean():.3f}")
    order = [unit(encoder.encode(list(triple))) for triple in NEAR]
    check("3 triplets are in order", all(a @ b > a @ c for a, b, c in order))
    check("unit norm", np.abs(np.linalg.norm(x, axis=1) - 1).max() < 1e-5)
    check("the same again", np.array_equal(x, encoder.encode(ALL)))
    alone = np.concatenate([encoder.encode([text]) for text in ALL])
    gap = np.abs(alone - x).max() / np.abs(x).max()
    check("padding and batch mates do not matter", gap < 1e-4, f"{gap:.1e}")
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


def baselines(opt, device):
    """(name, Encoder or None): every row of the table, also those whose folder was not given."""
    qwen, prefixes = opt.qwen3_baseline, {"e5": ("query: ", "passage: "), "bge": (BGE_QUERY, "")}
    rows = [("Qwen3, causal, mean", qwen, {"pooling": "mean"}), ("Qwen3, causal, last token", qwen, {"pooling": "last"})]
    rows += [("Qwen3, mask removed, untrained", qwen, {"pooling": "mean", "causal": False})]
    rows += [(name.upper() + "-base", getattr(opt, name), {"prefixes": prefixes.get(name, ("", ""))}) for name in ("e5", "gte", "bge")]
    rows += [(Path(path).name, path, {}) for path in opt.others.split(",") if path]
    for name, path, settings in rows:
        yield name, Encoder(path, device, opt.batch_size, dtype=opt.dtype, **settings) if path else None


def table_row(encoder, data) -> dict:
    row = {"params": encoder.params}
    for task in ("stsb", "sickr"):
        stem = data / f"{task}-test"
        if any(stem.with_name(f"{stem.name}.{kind}").is_file() for kind in ("jsonl", "tsv", "csv", "parquet")):
            rows, start = read_rows(stem), time.perf_counter()
            row[task] = score_pairs(encoder, rows)["spearman"]
            row["texts/s"] = 2 * len(rows) / (time.perf_counter() - start)
    scores = score_retrieval(encoder, data / "retrieval")
    return row | {k: v for k, v in scores.items() if "@" in k}


COLUMNS = ("params", "stsb", "sickr", "MRR@10", "Recall@1", "Recall@10", "Recall@100", "NDCG@10", "texts/s")


def compare(opt, encoder, device, data) -> tuple[dict, str]:
    rows = {Path(opt.ckpt).name: table_row(encoder, data)}
    for name, other in baselines(opt, device):
        rows[name] = table_row(other, data) if other else {}
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:,.0f}" if c in ("params", "texts/s") else f"{row[c]:.4f}" for c in COLUMNS if c in row] if row else []
        cells = [cells.pop(0) if c in row else "n/a" for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows, "\n".join(
        [*lines, "", "STS: Spearman on the test split; retrieval: --data/retrieval or a built-in sample; n/a: not given."]
    )


def main(argv):
    opt = configurator.args(OPTIONS, argv, __doc__)
    if not any(value is True for key, value in vars(opt).items() if key != "quiet"):
        die("nothing to do: add --quick, --run_stsb, --run_sts, --run_retrieval, --run_mteb, --compare_baselines or --run_all")
    say = (lambda text: None) if opt.quiet else print
    device, data = find(opt.device, "auto").device, Path(opt.data)
    if opt.causal not in (None, "True", "False") or opt.dtype not in ("float32", "bfloat16"):
        die(f"--causal={opt.causal} --dtype={opt.dtype}: True or False; float32 or bfloat16")
    causal = None if opt.causal is None else opt.causal == "True"
    encoder = Encoder(opt.ckpt, device, opt.batch_size, opt.pooling, causal, (opt.query_prefix, opt.doc_prefix), opt.dtype)
    out = Path(opt.output_dir or (opt.ckpt if Path(opt.ckpt).is_dir() else "."))
    out.mkdir(parents=True, exist_ok=True)
    save = lambda name, value: (out / name).write_text(json.dumps(value, indent=1) + "\n")  # noqa: E731
    passed = quick(encoder, say) if opt.quick or opt.run_all else True
    tasks = {f"stsb-{opt.split}": opt.run_stsb or opt.run_sts or opt.run_all, "sickr-test": opt.run_sts}
    if opt.run_all and any(data.glob("sickr-test.*")):
        tasks["sickr-test"] = True
    results = {}
    for task in [task for task, wanted in tasks.items() if wanted]:
        results[task] = score_pairs(encoder, read_rows(data / task))
        low, high = results[task]["interval"]
        print(f"{task}: Spearman {results[task]['spearman']:.4f} [{low:.4f}, {high:.4f}], "
              f"Pearson {results[task]['pearson']:.4f}, {results[task]['pairs']} pairs")  # fmt: skip
        save("sts_results.json", results)
    if opt.run_retrieval or opt.run_all:
        scores = score_retrieval(encoder, data / "retrieval")
        print("retrieval: " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in scores.items()))
        save("retrieval_results.json", scores)
    if opt.run_mteb or opt.run_all:
        from eval.mteb import run

        run(encoder, data, out / "mteb", opt.mteb_tasks, opt.mteb_categories, print)
    if opt.compare_baselines or opt.run_all:
        rows, text = compare(opt, encoder, device, data)
        print(text)
        save("baseline_comparison.json", rows)
        (out / "baseline_comparison.md").write_text(text + "\n")
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
