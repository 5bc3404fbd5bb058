"""Question answering over passages -> jsonl of {context, question, answers, id}: SQuAD v1 and v2, HotpotQA, or rows of one's own.

    python -m prepare.squad --source=train-v1.1.json --out=data/squad                  # the official files of SQuAD v1 and v2
    python -m prepare.squad --source=hotpot_dev_distractor_v1.json --out=data/hotpot --split=dev
    python -m prepare.squad --source=rows.parquet --out=data/mine                      # .json .jsonl .jsonl.gz .parquet
    python -m prepare.squad --source=rows.jsonl --out=data/mine --passages=600                    # one file, two splits: no passage in both
    python -m prepare.squad --source=rows.jsonl --out=data/mine --split=test --skip_passages=600
    python -m prepare.squad --source=rajpurkar/squad_v2 --out=data/squad2 --split=validation    # a name that `datasets` knows

Every reference answer is kept; a question without an answer has answers [""]. Hotpot's context is all of its paragraphs as given, each
"Title: sentences", in either layout ([[title, sentences], ...] or {"title": [...], "sentences": [...]}); --oracle keeps the gold
supporting sentences only and marks every row with "oracle": true, for that is no longer the task. Read next: latentwire.py.
"""

import sys
from pathlib import Path

import configurator
from files import write_rows
from prepare import sources

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


def squad_article(article):
    """The official nesting: data -> paragraphs -> qas."""
    for paragraph in article["paragraphs"]:
        for qa in paragraph["qas"]:
            answers = [] if qa.get("is_impossible") else [a["text"] for a in qa["answers"] or ()]
            yield {"context": paragraph["context"], "question": qa["question"], "answers": answers or [""], "id": str(qa["id"])}


def hotpot_row(row, number: int, oracle: bool):
    if missing := {"question", "answer"} - set(row):
        configurator.die(f"row {number} has no {min(missing)!r}, only {', '.join(sorted(row))}")
    context, facts = row["context"], row["supporting_facts"] if oracle else ()
    if isinstance(context, dict):
        context = list(zip(context["title"], context["sentences"], strict=True))
    if isinstance(facts, dict):
        facts = list(zip(facts["title"], facts["sent_id"], strict=True))
    wanted, parts = {(title, i) for title, i in facts}, []
    for title, sentences in context:
        kept = [s for i, s in enumerate(sentences) if not oracle or (title, i) in wanted]
        if kept:
            parts.append(f"{title}: " + " ".join(s.strip() for s in kept))
    out = {"context": "\n".join(parts), "question": row["question"], "answers": [row["answer"]], "id": str(row.get("_id", row.get("id")))}
    return out | ({"oracle": True} if oracle else {})


def flat_row(row, number: int):
    """Rows of `datasets`, of the evaluation packages ({"doc": {"query", "answers_text"}}) or of one's own."""
    row = row.get("doc", row)
    if "query" in row:
        context, _, question = row["query"].partition("Background: ")[2].rpartition("\nQuestion: ")
        return {"context": context, "question": question.removesuffix("\nAnswer:"), "answers": row["answers_text"], "id": str(row["id"])}
    if missing := {"context", "question"} - set(row):
        configurator.die(f"row {number} has no {sorted(missing)[0]!r}, only {', '.join(sorted(row))}; a row is context, question, answers")
    answers = row.get("answers", row.get("answer", []))
    answers = answers["text"] if isinstance(answers, dict) else [answers] if isinstance(answers, str) else answers
    return {"context": row["context"], "question": row["question"], "answers": list(answers or [""]), "id": str(row.get("id", number))}


def convert(data, oracle: bool):
    data = data["data"] if isinstance(data, dict) and "data" in data else data
    for number, row in enumerate(data):
        if not isinstance(row, dict):
            configurator.die(f"row {number} is {row!r}; a row is an object of context, question, answers")
        if oracle and "supporting_facts" not in row:
            configurator.die("oracle=True needs rows with supporting_facts; drop it")
        if "paragraphs" in row:
            yield from squad_article(row)
        else:  # Hotpot's context is paragraphs of sentences
            yield hotpot_row(row, number, oracle) if isinstance(row.get("context"), (list, dict)) else flat_row(row, number)


def main(argv=None) -> None:
    cfg = configurator.args(DEFAULTS, sys.argv[1:] if argv is None else argv, __doc__)
    rows, passages, seen, skipped = [], set(), set(), set()
    for row in convert(read(cfg.source, cfg.split), cfg.oracle):
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
        configurator.die(f"{cfg.source}: no question left after {len(skipped)} passages; lower --skip_passages={cfg.skip_passages}")
    out = Path(cfg.out)
    write_rows(out / f"{cfg.split}.jsonl", rows)
    empty = sum(row["answers"] == [""] for row in rows)
    print(f"{out}/{cfg.split}.jsonl: {len(rows):,} questions on {len(passages):,} passages, {empty:,} of them without an answer")


if __name__ == "__main__":
    main()
