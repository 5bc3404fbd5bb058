"""MTEB on an encoder of ours: official tasks when they can be downloaded, local tasks from --data when not.

    python -m eval.embedding --ckpt=RUN --run_mteb [--mteb_tasks=STSBenchmark,SICK-R] [--mteb_categories=STS,Retrieval]

Without names the local tasks run: STS over every DATA/NAME-test.jsonl and retrieval over DATA/retrieval. SICKRelatedness is SICK-R. The
official STSBenchmark and SICK-R read DATA/{stsb,sickr}-test.jsonl where these exist, and so need no network.
Writes one json per task and summary.json, the mean per task type as MTEB's own metadata name it. Read next: eval/embedding.py.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

import files
from configurator import die

ALIASES = {"SICKRelatedness": "SICK-R"}
FILES = {"STSBenchmark": "stsb-test", "SICK-R": "sickr-test"}  # official tasks whose test split may lie in --data


def adapter(encoder):
    """An object of MTEB's encoder protocol around ours."""
    import torch
    from mteb.models.model_meta import ModelMeta

    def norm(x):
        return torch.nn.functional.normalize(torch.as_tensor(np.asarray(x), dtype=torch.float32), dim=-1)

    class Adapter:
        mteb_model_meta = ModelMeta.create_empty({"name": f"prism/{encoder.path.name or 'model'}", "revision": "local"})

        def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
            kind = {"query": "query", "document": "doc", "passage": "doc"}.get(getattr(prompt_type, "value", prompt_type))
            return encoder.encode([text for batch in inputs for text in batch["text"]], kind)

        def similarity(self, a, b):
            return norm(a) @ norm(b).T

        def similarity_pairwise(self, a, b):
            return (norm(a) * norm(b)).sum(-1)

    return Adapter()


def describe(name, kind, score):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name, type=kind, main_score=score, description=f"local data: {name}", dataset={"path": "local", "revision": "1"},
        eval_splits=["test"], eval_langs=["eng-Latn"], modalities=["text"], category="t2t", reference=None, date=None, domains=None,
        task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
    )  # fmt: skip


def sts_split(stem: Path):
    """stem's file as the dataset of an MTEB task."""
    import datasets

    from eval.embedding import STS, read_rows

    rows = [{"sentence1": r["sentence1"], "sentence2": r["sentence2"], "score": float(r["score"])} for r in read_rows(stem, *STS)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def local_tasks(data: Path) -> list:
    """MTEB task objects whose load_data reads our files."""
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.sts import AbsTaskSTS

    from eval.embedding import RETRIEVAL, read_rows

    def sts(stem):
        class Local(AbsTaskSTS):
            metadata = describe(f"Local{stem.name.removesuffix('-test').upper()}", "STS", "cosine_spearman")
            min_score, max_score = (1, 5) if "sick" in stem.name else (0, 5)

            def load_data(self, **kwargs):
                self.dataset, self.data_loaded = sts_split(stem), True

        return Local()

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = describe("LocalRetrieval", "Retrieval", "ndcg_at_10")

        def load_data(self, **kwargs):
            corpus, queries, qrels = (read_rows(data / "retrieval" / name, *columns) for name, columns in RETRIEVAL.items())
            relevant = defaultdict(dict)
            for row in qrels:
                gain = float(row.get("score", 1))  # grades are integers to MTEB, and a share of relevance is relevance
                relevant[str(row["query"])][str(row["doc"])] = int(gain) if gain.is_integer() else int(gain > 0)
            docs = [{"id": str(d["id"]), "title": d.get("title") or "", "text": d["text"]} for d in corpus]
            asked = [{"id": str(q["id"]), "text": q["text"]} for q in queries]
            split = {
                "corpus": datasets.Dataset.from_list(docs),
                "queries": datasets.Dataset.from_list(asked),
                "relevant_docs": dict(relevant),
            }
            self.dataset, self.data_loaded = {"default": {"test": split | {"top_ranked": None}}}, True

    tasks = [sts(path.with_suffix("")) for path in sorted(data.glob("*-test.*"))]
    return tasks + ([LocalRetrieval()] if (data / "retrieval").is_dir() else [])


def run(encoder, data: Path, out: Path, names="", categories="", say=print) -> dict:
    import mteb

    wanted = [ALIASES.get(name, name) for name in names.split(",") if name]
    if wanted and categories:
        die("--mteb_tasks and --mteb_categories: MTEB heeds the names alone; choose one")
    if wanted or categories:
        types = [c for c in categories.split(",") if c]
        try:
            tasks = list(mteb.get_tasks(tasks=wanted or None, task_types=types or None, languages=["eng"]))
        except KeyError as error:  # the only way to ask whether it knows a name
            die(f"--mteb_tasks={names}: {error.args[0]}")
        for task in tasks:
            if any(data.glob(f"{(stem := FILES.get(task.metadata.name, 'none'))}.*")):
                task.dataset, task.data_loaded = sts_split(data / stem), True
    else:
        tasks = local_tasks(data)
    if not tasks:
        die(f"--run_mteb: no task; --data={data} holds no *-test.jsonl and no retrieval/, and --mteb_tasks names none")
    result = mteb.evaluate(adapter(encoder), tasks, cache=None, encode_kwargs={}, co2_tracker=False, overwrite_strategy="always")
    groups, types = defaultdict(list), {task.metadata.name: task.metadata.type for task in tasks}
    for task in result.task_results:
        score = float(task.get_score())
        files.write_json(out / f"{task.task_name}.json", task.to_dict(), default=str)
        groups[types[task.task_name]].append(score)
        say(f"mteb {task.task_name} ({types[task.task_name]}): {score:.4f}")
    summary = {kind: {"tasks": len(scores), "mean": float(np.mean(scores))} for kind, scores in groups.items()}
    files.write_json(out / "summary.json", summary)
    return summary
