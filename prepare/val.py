"""Validation domains: C4, GSM8K, HumanEval and the like, parquet or jsonl, as one jsonl of {"text": ...} each.

    python -m prepare.val --from=DIR_OR_GLOB --out=data/val [--max_rows=2000]

The domain is named by its file, up to the first underscore (c4_validation_2k.parquet -> c4.jsonl). What a row's text is follows from its
columns, see SHAPES; a further kind of set is one more entry there. `prepare.text --exclude=data/val` keeps these texts out of training.
Read next: eval/perplexity.py, which scores them."""

import os
import re
import sys
from collections import Counter

import configurator
from configurator import die
from files import write_rows
from prepare import sources
from tokenizer import scalar

SHAPES = (  # the first whose columns are all there
    ("text", "{text}"),
    ("question answer", "Question: {question}\nAnswer: {answer}"),
    ("prompt canonical_solution", "{prompt}{canonical_solution}"),
    ("problem solution", "Question: {problem}\nAnswer: {solution}"),
    ("content", "{content}"),
)


def main(argv):
    o = configurator.args({"from": str, "out": str, "max_rows": 0}, argv, __doc__)
    domains = {}
    for path, size in sources.find(getattr(o, "from")):
        if path.endswith(sources.LINES + sources.TABLES):
            name = re.split(r"[_.]", os.path.basename(path))[0].lower()
            domains.setdefault(name, []).append((path, size))
    if not domains:
        die(f"--from={getattr(o, 'from')}: no {', '.join(sources.LINES + sources.TABLES)} file there")
    for name, files in sorted(domains.items()):
        texts, count = [], Counter()
        for task, _ in sources.tasks(files):
            for row in sources.rows(task, count):
                shape = next((form for columns, form in SHAPES if all(isinstance(row.get(c), str) for c in columns.split())), None)
                if shape is None:
                    die(f"{files[0][0]}: a row has {', '.join(row)}, none of the known shapes; add one to SHAPES in prepare/val.py")
                texts.append(scalar(shape.format(**row)))
        texts = [t for t in texts if t.strip()][: o.max_rows or None]
        if not texts:
            die(f"{files[0][0]}: no text in it to score; bring another file")
        path = os.path.join(o.out, f"{name}.jsonl")
        write_rows(path, ({"text": t} for t in texts))
        nbytes = sum(len(t.encode()) for t in texts)
        print(f"{path}: {len(texts):,} documents, {nbytes:,} bytes" + (f"; skipped: {dict(count)}" if count else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
