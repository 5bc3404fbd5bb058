"""Question answering over passages -> jsonl of {context, question, answers, id}: SQuAD v1 and v2, HotpotQA, or rows of one's own.

    python -m prepare.squad --source=train-v1.1.json --out=data/squad                  # the official files of SQuAD v1 and v2
    python -m prepare.squad --source=hotpot_dev_distractor_v1.json --out=data/hotpot --split=dev
    python -m prepare.squad --source=rows.parquet --out=data/mine                      # .json .jsonl .jsonl.gz .parquet
    python -m prepare.squad --source=rows.jsonl --out=data/mine --passages=600                    # one file, two splits: no passage in both
    python -m prepare.squad --source=rows.jsonl --out=data/mine --split=test --skip_passages=600
    python -m prepare.squad --source=rajpurkar/squad_v2 --out=data/squad2 --split=validation    # a name that `datasets` knows

Every reference answer is kept; a question without an answer has answers [""]. Hotpot's context is all of its paragraphs as given, each
"Title: sentences", in either layout ([[title, sentences], ...] or {"title": [...], "sentences": [...]}); --oracle keeps the gold
supporting sentences only and marks every row with "oracle": true, for that is no longer the task. `read_rows` is how training and
evaluation read what is written here. Read next: latent_data.py.
"""

import sys
from pathlib import Path

import configurator
from files import write_rows
from prepare import sources
from tokenizer import scalar

DEFAULTS = dict(
    source=str,  # file, or name of a dataset
    out=str,  # folder
    split="train",  # OUT/SPLIT.jsonl; and the split that is asked of `datasets`
    oracle=False,  # hotpot: supporting sentences only
    limit=0,  # questions kept, the first ones; 0: all
    passages=0,  # passages kept, the first ones; 0: all
    skip_passages=0,  # the first ones are left out: those that went into another split
)


def read(source: str, split: str):
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".json", ".jsonl", ".gz", ".parquet", ".csv", ".tsv"):
            configurator.die(f"{source} does not exist; give an existing file or the name of a dataset")
        import datasets

        try:
            return list(datasets.load_dataset(source, split=split))
        except (ValueError, OSError) as error:
            configurator.die(f"--source={source} --split={split}: neither a file nor a dataset that can be had: {error}")
    return sources.read(path)


def listed(rows, where):
    if not isinstance(rows, list):
        configurator.die(f"{where} holds {str(rows)[:40]!r}, no list of rows")
    return rows


def field(row, key, where, kind=str):
    """row[key], or one line that says what stands in its place."""
    if not isinstance(row, dict):
        configurator.die(f"{where} is {str(row)[:40]!r}; a row is an object of context, question, answers")
    if key not in row:
        configurator.die(f"{where} has no {key!r}, only {', '.join(sorted(map(str, row)))}")
    if not isinstance(row[key], kind):
        configurator.die(f"{where}: {key}={str(row[key])[:40]!r} is {'no text' if kind is str else 'no list'}")
    row[key] = scalar(row[key]) if kind is str else row[key]  # half a surrogate pair, which JSON can write, is no character
    return row[key]


def references(given, where):
    """A list of strings or numbers, of {text}, SQuAD's {text: [...]}, or a single one -> strings; [""]: a question without an answer."""
    a = given.get("text", given) if isinstance(given, dict) else given
    a = [x.get("text") if isinstance(x, dict) else x for x in (a if isinstance(a, list) else [] if a is None else [a])]
    if not all(isinstance(x, (str, int, float)) for x in a):
        configurator.die(f"{where}: answers={str(given)[:40]} holds no text: give a list of strings")
    return [scalar(str(x)) for x in a] or [""]


def read_rows(path):
    """{context, question, answers, id} and {text} rows of a jsonl, json or parquet file, or of a folder's train.jsonl."""
    path = Path(path)
    path = path / "train.jsonl" if path.is_dir() else path
    if not path.is_file():
        configurator.die(f"{path} does not exist; write it with `python -m prepare.factqa` or `python -m prepare.squad`")
    for n, row in enumerate(rows := listed(sources.read(path), path), 1):
        where = f"{path}: row {n}"
        if isinstance(row, dict) and "text" in row and not {"context", "question", "answers"} <= set(row):
            field(row, "text", where)
            continue
        row.pop("text", None) if isinstance(row, dict) else None
        field(row, "context", where), field(row, "question", where)
        row["answers"] = references(field(row, "answers", where, object), where)
    return rows


def pairs(row, key, second, where):
    """[[title, x], ...], also where it is written {"title": [...], second: [...]}"""
    found = field(row, key, where, (list, dict))
    if isinstance(found, dict):
        titles, others = (field(found, name, f"{where}: {key}", list) for name in ("title", second))
        found = list(zip(titles, others, strict=False)) if len(titles) == len(others) else [None]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in found):
        configurator.die(f"{where}: {key} is no list of [title, {second}]")
    return [tuple(pair) for pair in found]


def squad_article(article, where: str, number: int):
    """The official nesting: data -> paragraphs -> qas."""
    for i, paragraph in enumerate(field(article, "paragraphs", where, list)):
        for j, qa in enumerate(field(paragraph, "qas", here := f"{where}, paragraph {i}", list)):
            question = field(qa, "question", there := f"{here}, question {j}")
            answers = [] if qa.get("is_impossible") else qa.get("answers")
            row = {"context": field(paragraph, "context", here), "question": question, "answers": references(answers, there)}
            yield row | {"id": str(qa.get("id", f"{number}-{i}-{j}"))}


def hotpot_row(row, where: str, number: int, oracle: bool):
    question, answer = field(row, "question", where), field(row, "answer", where)
    wanted, parts = pairs(row, "supporting_facts", "sent_id", where) if oracle else (), []
    for title, sentences in pairs(row, "context", "sentences", where):
        if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
            configurator.die(f"{where}: the paragraph {title!r} is no list of sentences")
        kept = [s for i, s in enumerate(sentences) if not oracle or (title, i) in wanted]
        if kept:
            parts.append(f"{title}: " + " ".join(s.strip() for s in kept))
    out = {"context": scalar("\n".join(parts)), "question": question, "answers": [answer], "id": str(row.get("_id", row.get("id", number)))}
    return out | ({"oracle": True} if oracle else {})


def flat_row(row, where: str, number: int):
    """Rows of `datasets`, of the evaluation packages ({"doc": {"query", "answers_text"}}) or of one's own."""
    row, name = row.get("doc", row), str(row.get("id", number))
    if isinstance(row, dict) and "query" in row:
        context, _, question = field(row, "query", where).partition("Background: ")[2].rpartition("\nQuestion: ")
        out = {"context": context, "question": question.removesuffix("\nAnswer:"), "answers": field(row, "answers_text", where, object)}
    else:
        out = {key: field(row, key, where) for key in ("context", "question")} | {"answers": row.get("answers", row.get("answer"))}
    return out | {"answers": references(out["answers"], where), "id": str(row.get("id", name))}


def convert(data, source, oracle: bool):
    for number, row in enumerate(listed(data["data"] if isinstance(data, dict) and "data" in data else data, source)):
        where = f"{source}: row {number}"
        if not isinstance(row, dict):
            field(row, "context", where)
        if oracle and "supporting_facts" not in row:
            configurator.die("--oracle needs rows with supporting_facts; drop it")
        if "paragraphs" in row:
            found = squad_article(row, where, number)
        else:  # Hotpot's context is paragraphs of sentences
            hotpot = isinstance(row.get("context"), (list, dict))
            found = [hotpot_row(row, where, number, oracle) if hotpot else flat_row(row, where, number)]
        for out in found:
            if not out["context"].strip():
                configurator.die(f"{where}: the context of {out['question'][:60]!r} is empty; leave it out")
            yield out


def main(argv=None) -> None:
    cfg = configurator.args(DEFAULTS, sys.argv[1:] if argv is None else argv, __doc__)
    rows, passages, seen, skipped = [], set(), set(), set()
    for row in convert(read(cfg.source, cfg.split), cfg.source, cfg.oracle):
        if len(skipped) < cfg.skip_passages or row["context"] in skipped:
            skipped.add(row["context"])
            continue
        if cfg.limit and len(rows) == cfg.limit:
            break
        if cfg.passages and len(passages | {row["context"]}) > cfg.passages:
            continue
        if row["id"] in seen:
            configurator.die(f"{cfg.source}: the id {row['id']} stands there twice")
        seen.add(row["id"])
        passages.add(row["context"])
        row["answers"] = list(dict.fromkeys(row["answers"]))
        rows.append(row)
    if not rows:
        more = f" left after {len(skipped)} passages; lower --skip_passages={cfg.skip_passages}" if skipped else " in it"
        configurator.die(f"{cfg.source}: no question{more}")
    out = Path(cfg.out)
    write_rows(out / f"{cfg.split}.jsonl", rows)
    empty = sum(row["answers"] == [""] for row in rows)
    print(f"{out}/{cfg.split}.jsonl: {len(rows):,} questions on {len(passages):,} passages, {empty:,} of them without an answer")


if __name__ == "__main__":
    main()
