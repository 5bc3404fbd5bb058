"""The evaluation of packets: official answer measures, honest budgets, replay equal to text, files as promised, an overfit."""

import gzip
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_run

import latent_data
import latentwire as lw
import sample
import tokenizer
import train
from eval import latent, latent_report
from eval.answers import best_first, budget_arms, cut_bytes, cut_tokens, exact, f1, interval, normalise
from files import write_rows
from model import ModelConfig, build
from prepare import factqa, sources, squad


def test_measures_as_in_the_official_script():
    assert normalise("The  Eiffel-Tower, (Paris)!") == "eiffeltower paris" and normalise("An a the") == ""
    assert exact("the Broncos.", ["Denver Broncos", "broncos"]) == 1 and exact("Denver", ["Denver Broncos"]) == 0
    assert exact("", [""]) == 1 and f1("", [""]) == 1 and f1("x", [""]) == 0 and f1("", ["x"]) == 0
    assert f1("the Denver Broncos", ["Broncos", "Denver Broncos team"]) == pytest.approx(0.8)
    assert f1("new new york", ["new york"]) == pytest.approx(0.8)  # a multiset: one "new" is shared, not two
    assert f1("york york", ["new york city"]) == pytest.approx(2 * 1 / 5)
    assert f1("banana", ["an banana"]) == 1  # articles are words, not letters


def test_budgets_are_kept_and_hold_the_question_where_it_is_carried():
    tok = tokenizer.load("bytes")
    row = {"context": "Rain fell. The cat sat on a mat. Bells rang é.", "question": "Who sat on a mat?"}
    assert best_first(row["context"], row["question"]).startswith("The cat sat")
    assert cut_bytes(tok, "aé", 2) == "a" and cut_bytes(tok, "éa", 2, True) == "a" and cut_tokens(tok, "abc", 9, True) == "abc"
    for compress, kinds in (("context", {"head", "tail", "best"}), ("all", {"head", "tail", "question+head", "question+best"})):
        side = SimpleNamespace(tok=tok, all=compress == "all")
        for n in (0, 1, 5, 20, 30, 99):
            arms = budget_arms(side, row, n, cut_bytes, lambda q: len(q.encode()))
            assert set(arms) == kinds
            for context, question in arms.values():
                assert len(context.encode()) + (len(question.encode()) if compress == "all" else 0) <= n
                assert compress == "all" or question == row["question"]


def test_interval_of_a_paired_difference():
    rng = np.random.default_rng(0)
    b = rng.random(400)
    mean, low, high = interval(b + 0.1 + 0.01 * rng.normal(size=400), b, 500, 1)
    assert low < mean < high and abs(mean - 0.1) < 0.01 and high - low < 0.01  # paired: the spread of b cancels


def test_questions_of_one_passage_are_drawn_together():
    """All questions of a passage are right or wrong together: the interval is that of the passages, whatever is asked about each."""
    right = np.random.default_rng(0).random(60) < 0.5
    one = interval(right * 1.0, right * 0.0, 4000, 1)
    ten = interval(np.repeat(right, 10) * 1.0, np.zeros(600), 4000, 1, [f"passage {i // 10}" for i in range(600)])
    assert ten == pytest.approx(one, abs=0.02) and ten[2] - ten[1] > 0.2
    ragged = [0, 0, 0, 1, 2, 2]  # weighed by questions, not by passages
    assert interval(np.ones(6), [1, 1, 1, 0, 0, 0], 9, 1, ragged)[0] == 0.5


def test_prepare_factqa_splits_by_person_and_value(tmp_path):
    sizes = ["--train=60", "--dev=30", "--test=30", "--lm_docs=40", "--natural_docs=5", "--facts=3", "--distractors=2", "--bpe=300"]
    factqa.main([f"--out={tmp_path}", f"--shards={tmp_path}/s", *sizes])
    facts = {}
    for split in ("train", "dev", "test"):
        rows = sources.read(tmp_path / f"{split}.jsonl")
        assert len(rows) == (180 if split == "train" else 30) and len({r["id"] for r in rows}) == len(rows)
        for row in rows:
            value = row["answers"][0]
            attribute = next(a for a, vs in factqa.VALUES.items() if value in vs)
            first = next(w for w in row["question"].rstrip("?").split() if w in factqa.WOMEN + factqa.MEN)
            words = row["context"].replace("'s", "").split()
            people = [f"{a} {b}" for a, b in zip(words, words[1:], strict=False) if a == first]
            assert value in [w.strip(".") for w in words] and len(people) == 1
            assert factqa.split_of(people[0], attribute, value, 1337) == split
            facts.setdefault(split, set()).add((people[0], value))
    assert not facts["train"] & facts["test"] and not facts["train"] & facts["dev"]
    tok = tokenizer.load(tmp_path / "s" / "facts")
    ids = np.fromfile(tmp_path / "s" / "facts" / "train-00000.bin", "<u4")
    idx = np.fromfile(tmp_path / "s" / "facts" / "train-00000.idx", "<u8")
    doc = ids[int(idx[0]) : int(idx[1])]
    trained = tok.decode(doc[doc < 1 << 31].tolist())
    row = sources.read(tmp_path / "lm.jsonl")[1]
    assert trained == "".join(f" {a}<|endoftext|>" for _, a in row["qa"])  # answers only, but in one document of eight


def test_a_pair_of_values_is_in_one_split_in_either_order(tmp_path):
    some = ["--train=150", "--dev=60", "--test=60", "--lm_docs=1", "--natural_docs=1", "--facts=1", "--value_words=2", "--values=6"]
    factqa.main([f"--out={tmp_path}", *some])
    facts = {}
    for split in ("train", "dev", "test"):
        for row in sources.read(tmp_path / f"{split}.jsonl"):
            name = " ".join(row["context"].replace("'s", "").split()[:2])
            facts.setdefault((name, frozenset(row["answers"][0].split(" and "))), set()).add(split)
    assert {len(where) for where in facts.values()} == {1}
    assert all(factqa.split_of("Anna Lind", "pet", f"{a} and {b}", 1) == factqa.split_of("Anna Lind", "pet", f"{b} and {a}", 1)
               for a in ("cat", "dog", "hen") for b in ("pig", "cow", "fox"))  # fmt: skip


def test_factqa_stops_in_time(tmp_path, monkeypatch, dies):
    """Too few values for that many facts: one line. And rows cut off in the middle of new settings do not pass for the old ones."""
    small_sizes = ("train", "dev", "test", "lm_docs", "natural_docs")
    small = [f"--out={tmp_path}", *(f"--{key}=1" for key in small_sizes)]
    (tmp_path / "short.txt").write_text("too short")
    wrong = {"--values=2 --facts=6": "raise --values", "--distractors=9": "distractors=9", "--distractors=-1": "distractors=-1"}
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    wrong |= {f"--natural={tmp_path}/latin.txt": "latin.txt: damaged", "--bpe=100": "bpe=100: ", "--bpe=-5": "bpe=-5 must be"}
    wrong |= {"--facts=9": "facts=9"} | {f"--{key}=0": f"{key}=0 must be above 0" for key in small_sizes}
    wrong |= {"--passage_every=0": "passage_every=0", f"--natural={tmp_path}/short.txt": "no paragraph", "--value_words=0": "value_words=0"}
    for arg, said in wrong.items():
        given = {word.partition("=")[0]: word for word in [*small, *arg.split()]}  # the last of each
        dies(lambda: factqa.main([*given.values()]), said)
    factqa.main(small)
    (tmp_path / "test.jsonl").unlink()
    factqa.main(small)  # what is missing comes back
    (tmp_path / "settings.json").write_text("{")
    factqa.main(small)  # nobody knows what those rows were made by
    monkeypatch.setattr(factqa, "generate", lambda cfg: 1 / 0)
    factqa.main(small)  # what is done is not done twice
    with pytest.raises(ZeroDivisionError):
        factqa.main([*small, "--seed=2"])
    with pytest.raises(ZeroDivisionError):
        factqa.main(small)


def test_prepare_squad_and_hotpot(tmp_path, dies):
    qas = [{"id": "1", "question": "q1", "answers": [{"text": "x"}, {"text": "y"}, {"text": "x"}]},
           {"id": "2", "question": "q2", "answers": [], "is_impossible": True}]  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": qas}]}]}))
    squad.main([f"--source={tmp_path}/s.json", f"--out={tmp_path}/o"])
    rows = sources.read(tmp_path / "o" / "train.jsonl")
    assert [r["answers"] for r in rows] == [["x", "y"], [""]] and rows[0]["context"] == "c"
    lists = {"_id": "h", "question": "q", "answer": "yes", "context": [["T", ["a.", "b."]], ["U", ["c."]]], "supporting_facts": [["T", 1]]}
    dicts = {"id": "h", "question": "q", "answer": "yes", "context": {"title": ["T", "U"], "sentences": [["a.", "b."], ["c."]]},
             "supporting_facts": {"title": ["T"], "sent_id": [1]}}  # fmt: skip
    for name, row in (("l", lists), ("d", dicts)):
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
        squad.main([f"--source={tmp_path}/{name}.json", f"--out={tmp_path}/{name}"])
        squad.main([f"--source={tmp_path}/{name}.json", f"--out={tmp_path}/{name}", "--split=gold", "--oracle"])
        assert sources.read(tmp_path / name / "train.jsonl") == [
            {"context": "T: a. b.\nU: c.", "question": "q", "answers": ["yes"], "id": "h"}
        ]
        (gold,) = sources.read(tmp_path / name / "gold.jsonl")
        assert gold["context"] == "T: b." and gold["oracle"] is True
    for source in ("none.json", "none.csv"):
        dies(lambda: squad.main([f"--source={tmp_path}/{source}", f"--out={tmp_path}/x"]), "does not exist")


def test_prepare_squad_takes_or_names_what_rows_may_look_like(tmp_path, monkeypatch, capsys, dies):
    plain = {"context": "c", "question": "q", "answers": None, "id": "1"}
    hotpot = {"context": [["T", ["a.", "b."]]], "question": "q", "answer": "x", "id": "2"}  # nobody says which sentences support it
    (tmp_path / "flat.json").write_text(json.dumps({"version": "2", "data": [plain, hotpot]}))
    squad.main([f"--source={tmp_path}/flat.json", f"--out={tmp_path}/o"])
    assert [(r["context"], r["answers"]) for r in sources.read(tmp_path / "o" / "train.jsonl")] == [("c", [""]), ("T: a. b.", ["x"])]
    (tmp_path / "bare.json").write_text(json.dumps([{k: v for k, v in hotpot.items() if k != "answer"}]))
    write = lambda name, value: (tmp_path / f"{name}.json").write_text(json.dumps(value))  # noqa: E731
    article = lambda **qa: {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "id": "1"} | qa]}]}]}  # noqa: E731
    write("words", {"version": "2"}), write("number", 3), write("deep", {"data": {"a": 1}}), write("letters", ["abc"]), write("none", [])
    write("article", [{"paragraphs": {}}]), write("paragraph", [{"paragraphs": [{"context": "c"}]}]), write("qa", article(question=None))
    write("spans", article(answers=[{"start": 3}])), write("null", [plain | {"context": None}]), write("empty", [plain | {"context": " "}])
    write("titles", [hotpot | {"context": {"title": ["T"], "sentences": []}}]), write("flatly", [hotpot | {"context": ["T"]}])
    (
        write("facts", [hotpot | {"supporting_facts": [["U", 0]]}]),
        write("doc", [{"doc": 3}]),
        write("letter", [hotpot | {"context": [["T", "ab"]]}]),
    )
    write("query", [{"doc": {"query": "Background: c\nQuestion: q\nAnswer:"}}])
    for argv, said in (
        (["flat.json", "--oracle"], "supporting_facts"),
        (["flat.json", "--skip_passages=9"], "lower --skip_passages=9"),
        (["bare.json"], "row 0 has no 'answer'"),
        (["flat.json", "--passages=-1"], "--passages=-1 must be 0 or more"),
        (["words.json"], """words.json holds "{'version': '2'}", no list of rows"""),
        (["number.json"], "number.json holds '3', no list"),
        (["deep.json"], "no list of rows"),
        (["letters.json"], "row 0 is 'abc'"),
        (["none.json"], "none.json: no question in it"),
        (["article.json"], "row 0: paragraphs='{}' is no list"),
        (["paragraph.json"], "row 0, paragraph 0 has no 'qas', only context"),
        (["qa.json"], "row 0, paragraph 0, question 0: question='None' is no text"),
        (["spans.json"], "question 0: answers=[{'start': 3}] holds no text"),
        (["null.json"], "row 0: context='None' is no text"),
        (["empty.json"], "row 0: the context of 'q' is empty"),
        (["titles.json"], "context is no list of [title, sentences]"),
        (["flatly.json"], "context is no list of [title, sentences]"),
        (["letter.json"], "the paragraph 'T' is no list of sentences"),
        (["facts.json", "--oracle"], "the context of 'q' is empty"),
        (["doc.json"], "row 0 is '3'"),
        (["query.json"], "row 0 has no 'answers_text'"),
    ):
        with pytest.raises(SystemExit):
            squad.main([f"--source={tmp_path}/{argv[0]}", f"--out={tmp_path}/x", *argv[1:]])
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "x").exists()
    datasets = SimpleNamespace(load_dataset=lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no\nnetwork")))
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    dies(lambda: squad.main(["--source=no/such", f"--out={tmp_path}/x"]), "--source=no/such --split=train: neither a file nor a dataset")


def test_two_splits_of_one_file_share_no_passage(tmp_path):
    """Passages come back later in the file, and still stand on one side only."""
    rows = [{"context": f"c{i * i % 7}", "question": "q", "answers": ["a"], "id": str(i)} for i in range(20)]
    write_rows(tmp_path / "rows.jsonl", rows)
    squad.main([f"--source={tmp_path}/rows.jsonl", f"--out={tmp_path}", "--passages=2"])
    squad.main([f"--source={tmp_path}/rows.jsonl", f"--out={tmp_path}", "--split=test", "--skip_passages=2"])
    train, test = ({r["context"] for r in sources.read(tmp_path / f"{name}.jsonl")} for name in ("train", "test"))
    assert train == {"c0", "c1"} and test == {"c2", "c4"} and len(sources.read(tmp_path / "train.jsonl")) == 8


@pytest.fixture(scope="module")
def overfit(tmp_path_factory):
    """Two tiny readers that know nothing, steered by packets alone to eight one-letter answers in some seconds."""
    root = tmp_path_factory.mktemp("overfit")
    for name, width in (("a", 48), ("b", 64)):
        cfg = ModelConfig(vocab_size=257, n_layer=2, n_head=2, d_model=width, max_len=256, init_std=0.2, tie=False, seed=width)
        save_run(root / name, build(cfg), "bytes", tau=1.0)
    rows = [
        {"context": f"case {i * 37 % 11}{i}: {w}", "question": "Which?", "answers": [w], "id": str(i)} for i, w in enumerate("bdfhjlnp")
    ]
    write_rows(root / "train.jsonl", rows)
    keys = dict(
        objective="latent",
        out=str(root / "run"),
        data={"qa": str(root / "train.jsonl")},
        lms=(str(root / "a"), str(root / "b")),
        seq_len=32,
        tokens_per_step=256,
        latent_len=4,
        latent_dim=16,
        max_steps=300,
        lr=5e-3,
        warmup=10,
        log_every=50,
        dtype="float32",
        weight_decay=0.0,
        anchor="none",
        progress=False,
    )
    train.main([f"--{k}={v}" for k, v in keys.items()])
    more = dict(out=str(root / "nested"), latent_private=1, wire_slots=(2, 5), calibration="none")
    train.main([f"--{k}={v}" for k, v in (keys | more).items()])
    return root


def test_overfit_answers_and_the_controls_do_not(overfit, capsys):
    latent.main(
        [
            f"--ckpt={overfit}/run",
            f"--data={overfit}/train.jsonl",
            "--bits=16,8",
            "--resamples=50",
            "--max_new_tokens=6",
            f"--out={overfit}/e",
        ]
    )
    metrics = json.loads((overfit / "e" / "metrics.json").read_text())
    for arms in metrics["arms"].values():
        assert arms["latent16"]["em"] == arms["latent8"]["em"] == 1.0
        assert arms["shuffled"]["em"] == 0 and arms["zero"]["em"] <= 1 / 8 and arms["none"]["em"] == 0 and arms["text"]["em"] == 0
        assert arms["text"] | {"seconds": 0} == arms["replay"] | {"seconds": 0}
        assert arms["latent16"]["nll_token"] < 0.5 < arms["shuffled"]["nll_token"] and arms["latent16"]["first_top1"] == 1
        assert arms["text"]["seconds"] > 0 and arms["latent16"]["seconds"] > 0
    assert metrics["samples"] == 8 and metrics["latent_len"] == 4 and metrics["joint"]["em"] == 1 and metrics["joint"]["agreement"] == 1
    assert metrics["wire"]["payload"] == {"16": 16 + 128, "8": 16 + 64 + 4} and metrics["wire"]["zlib"] > 0
    for pairs in metrics["intervals"].values():
        assert pairs["latent16 - none"]["em"] == [1.0, 1.0, 1.0] and "latent8 - latent16" in pairs
    assert metrics["config"]["latent_len"] == 4 and metrics["data"].endswith("train.jsonl")
    lines = [json.loads(line) for line in open(overfit / "e" / "predictions.jsonl")]
    assert len(lines) == 8 and all(
        line["predictions"][lm]["latent16"] == line["answers"][0] for line in lines for lm in line["predictions"]
    )
    assert (overfit / "e" / "table.md").read_text() in capsys.readouterr().out and (overfit / "e" / "metrics.csv").read_text().count(
        "\n"
    ) > 20


def test_fewer_slots_private_ones_and_other_gains(overfit, capsys, dies):
    """A run that was trained on cut packets answers from them, another does not; without their private slots they are others."""
    found = []
    for run, *more in (("run",), ("nested",), ("nested", "--calibration=train_stats"), ("nested", "--prefix_gain=9")):
        args = [f"--ckpt={overfit}/{run}", f"--data={overfit}/train.jsonl", "--resamples=9", "--max_new_tokens=6", "--bits=8", "--slots=2"]
        latent.main([*args, *more, "--bytes=40", f"--out={overfit}/n"])
        found.append(json.loads((overfit / "n" / "metrics.json").read_text()))
    plain, nested, stats, loud = ([*m["arms"].values()] for m in found)
    assert all(
        a["latent8"]["em"] == b["latent8"]["em"] == 1 and a["latent8@2"]["em"] < 0.5 < b["latent8@2"]["em"]
        for a, b in zip(plain, nested, strict=True)
    )
    metrics = found[1]
    assert metrics["wire"]["payload"] == {"8": 16 + 80 + 2 * 3, "8@2": 16 + 32 + 2} and metrics["wire"]["slots"] == {"8": 5, "8@2": 2}
    pairs = next(iter(metrics["intervals"].values()))
    assert {"shared - latent8", "latent8@2 - tokens@2:head", "latent8@2 - bytes@8@2bit:head"} <= set(pairs)
    assert all(len({arms["shared"]["nll_token"], arms["latent8"]["nll_token"], arms["zero"]["nll_token"]}) == 3 for arms in nested)
    for kept, a, b, c in zip(metrics["training_stats"].values(), nested, stats, loud, strict=True):
        assert kept["rms_mean_raw"] == kept["rms_mean_cal"] > 0 < kept["embed_rms"] and kept["count"] == 7  # calibration=none
        assert len({arms["latent8"]["nll_token"] for arms in (a, b, c)}) == 3 and a["text"]["nll_token"] == c["text"]["nll_token"]
    assert json.loads((overfit / "n" / "training_stats.json").read_text()) == metrics["training_stats"]
    early = latent_report.training_stats(overfit / "nested", 60, lw.load(overfit / "nested")[0])  # of a checkpoint before the last
    assert [kept["count"] for kept in early.values()] == [2, 2]
    table = capsys.readouterr().out
    assert (
        "| latent8@2 | 50 |" in table
        and "| bytes@8@2bit:head | 50 |" in table
        and "private slots in each packet: 1;" in table
        and "(mean of 7 steps of training)" in table
    )
    for wrong, said in (
        ("--slots=5", "more than 5"),
        ("--slots=0", "slots=(0,)"),
        ("--prefix_gain=0", "a gain above 0"),
        ("--calibration=x", "train_stats"),
    ):
        dies(lambda: latent.main([*args[:5], wrong]), said)
    sample.main([f"--ckpt={overfit}/nested", "--prompt=case 00: b\nWhich?", "--max_new_tokens=4", "--device=cpu", "--dtype=float32"])
    assert capsys.readouterr().out == f"10 bytes of text, 176 on the wire at 16 bits to each model\n{overfit}/a: b\n{overfit}/b: b\n"
    (overfit / "nested" / "metrics.jsonl").rename(overfit / "nested" / "away")
    dies(lambda: latent.main([*args, "--calibration=train_stats"]), "no rms of slots in training")


def test_sample_answers_from_a_packet(overfit, capsys, dies):
    sample.main([f"--ckpt={overfit}/run", "--prompt=case 00: b\nWhich?", "--max_new_tokens=4", "--device=cpu", "--dtype=float32"])
    assert capsys.readouterr().out == f"10 bytes of text, 144 on the wire at 16 bits\n{overfit}/a: b\n{overfit}/b: b\n"
    sample.main([f"--ckpt={overfit}/run", f"--prompt=case 00: b{'.' * 40}\nWhich?", "--max_new_tokens=4", "--device=cpu"])
    assert capsys.readouterr().err == "of 50 characters the first 31 were read: seq_len=32\n"
    with pytest.raises(SystemExit):
        sample.main([f"--ckpt={overfit}/run", "--prompt=only one line"])
    capsys.readouterr()
    dies(lambda: sample.main([f"--ckpt={overfit}/run", "--prompt=case 00: b\nWhich?", "--top_k=3"]), "--top_k would do nothing")


def test_a_passage_is_encoded_once_and_timed_from_its_letters(overfit, tmp_path, monkeypatch):
    """Whatever widths are asked for; and the clock runs while both arms tokenise, though other arms have read the same text before."""
    encoded, tokenised, real = [], [], lw.Encoder.forward
    monkeypatch.setattr(lw.Encoder, "forward", lambda self, batch: encoded.append(len(batch["z_cu"]) - 1) or real(self, batch))
    monkeypatch.setattr(latent, "seconds", lambda *a: (0.0, 0.0))
    args = [f"--ckpt={overfit}/run", f"--data={overfit}/train.jsonl", "--bits=16,8,4", "--resamples=9", "--max_new_tokens=1"]
    latent.main([*args, f"--out={tmp_path}", "--batch=5"])
    assert encoded == [5, 3]
    monkeypatch.undo()
    model, rows = lw.load(overfit / "run")[0], sources.read(overfit / "train.jsonl")[:3]
    run = model.sides[0].tok.run
    monkeypatch.setattr(model.sides[0].tok, "run", lambda text: tokenised.append(text) or run(text))
    text = [model.sides[0].prompt(row["question"], context=row["context"]) for row in rows]
    assert len(tokenised) == len(text) == 3
    times = latent.seconds(model, 0, rows, 16, SimpleNamespace(max_new_tokens=1))
    assert sum("Context: case" in text for text in tokenised) == 6 and min(times) > 0


def test_arms_are_cached_until_something_changes(overfit, monkeypatch):
    runs = []
    real = latent.run_arm
    monkeypatch.setattr(latent, "run_arm", lambda *a, **k: runs.append(1) or real(*a, **k))
    args = [
        f"--ckpt={overfit}/run",
        f"--data={overfit}/train.jsonl",
        "--bits=(8,)",
        "--resamples=9",
        "--max_new_tokens=2",
        f"--out={overfit}/c",
    ]
    latent.main(args)
    first = len(runs)
    latent.main(args)
    assert len(runs) == first > 0
    latent.main([*args, "--fresh"])
    assert len(runs) == 2 * first
    latent.main([*args[:4], "--max_new_tokens=3", args[-1]])
    assert len(runs) == 3 * first
    latent.main([*args[:2], "--bits=(16,8)", args[3], "--max_new_tokens=3", args[-1]])  # other zero and shuffled packets
    assert len(runs) == 4 * first + 2 * 4  # and for each model one width more, with its three budgets of bytes


def test_a_killed_evaluation_keeps_the_arms_it_has(overfit, monkeypatch, dies):
    real, left = latent.run_arm, iter("ab")
    monkeypatch.setattr(latent, "run_arm", lambda *a, **k: real(*a, **k) if next(left, None) else 1 / 0)
    args = [f"--ckpt={overfit}/run", f"--data={overfit}/train.jsonl", "--bits=(8,)", "--max_new_tokens=2", f"--out={overfit}/k"]
    with pytest.raises(ZeroDivisionError):
        latent.main(args)
    assert len(json.loads((overfit / "k" / "arms.json").read_text())["arms"]) == 2
    dies(lambda: latent.main([*args, "--samples=1"]), "two passages")


def test_few_at_a_time_and_what_was_left_out_is_counted(overfit, tmp_path, monkeypatch):
    sizes, real = [], latent.teacher_forced
    monkeypatch.setattr(latent, "teacher_forced", lambda model, m, prompts, *a: sizes.append(len(prompts)) or real(model, m, prompts, *a))
    monkeypatch.setattr(latent_data.Side, "aligned", lambda self, question, answer: answer != "b")
    rows = sources.read(overfit / "train.jsonl")
    write_rows(tmp_path / "x.jsonl", [*rows, rows[1] | {"context": "long " * 20, "answers": []}])
    args = f"--ckpt={overfit}/run --data={tmp_path}/x.jsonl --bits=(8,) --resamples=9 --max_new_tokens=2 --out={tmp_path}".split()
    latent.main([*args, "--batch=3"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert max(sizes) == 3 and metrics["samples"] == 8 and metrics["dropped"] == 1 and metrics["cut"] == 1
    assert "; 1 passages were longer" in (table := (tmp_path / "table.md").read_text()) and "; 1 questions left out" in table
    latent.main([*args, "--batch=64", "--samples=5"])
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["samples"] == 5 and again["dropped"] == 1 and max(sizes) == 5


def test_readers_that_cannot_read_are_named(overfit, capsys, monkeypatch, dies):
    lms = f"--lms=('{overfit}/a', '{overfit}/b')"
    latent.main([lms, f"--data={overfit}/train.jsonl", "--max_new_tokens=2"])
    ran, real = [], latent.run_arm
    monkeypatch.setattr(latent, "run_arm", lambda model, *a: ran.append(str(model.lms[0].dtype)) or real(model, *a))
    latent.main([lms, f"--data={overfit}/train.jsonl", "--max_new_tokens=2"])
    fast = latent.machine.find("auto", "auto").dtype
    assert set(ran) == {str(fast)}  # as every other evaluation of it, on the device that was asked for
    assert "exact match from text 0.000" in capsys.readouterr().out
    dies(lambda: latent.main([lms, f"--data={overfit}/train.jsonl", "--max_new_tokens=2", "--require=0.95"]), "train it longer")
    with pytest.raises(SystemExit):
        latent.main([])
    model = build(ModelConfig(vocab_size=4096, n_layer=1, n_head=2, d_model=16, max_len=256, tie=False))  # most of whose ids are no text
    save_run(overfit / "wide", model, "bytes", tau=1.0)
    latent.main([f"--lms='{overfit}/wide'", f"--data={overfit}/train.jsonl", "--max_new_tokens=2"])
    assert "exact match from text 0.000" in capsys.readouterr().out


def test_what_every_arm_reads_went_over_the_wire(overfit, monkeypatch):
    """Scramble the decoder: if any packet arm still answered, it would be reading numbers that were never sent."""
    real = lw.decode
    monkeypatch.setattr(lw, "decode", lambda payload: real(payload).flip(0) * -1)
    latent.main(
        [
            f"--ckpt={overfit}/run",
            f"--data={overfit}/train.jsonl",
            "--bits=16,8",
            "--resamples=9",
            "--max_new_tokens=6",
            f"--out={overfit}/w",
        ]
    )
    for arms in json.loads((overfit / "w" / "metrics.json").read_text())["arms"].values():
        assert max(arms[a]["em"] for a in ("latent16", "latent8", "shuffled")) < 1


def test_only_a_line_feed_ends_a_row(tmp_path):
    """U+2028 and U+0085 may stand inside a JSON string; a file of no rows at all is named in one line."""
    rows = [{"context": "one\u2028two\x85three\u2029", "question": "q", "answers": []}, {"text": "t\u2028"}]
    write_rows(tmp_path / "x.jsonl", rows)
    assert latent_data.read_rows(tmp_path / "x.jsonl") == [rows[0] | {"answers": [""]}, rows[1]]
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    assert sources.read(tmp_path / "y.jsonl.gz") == rows
    (tmp_path / "z.jsonl").write_text("{broken\n")
    with pytest.raises(SystemExit):
        sources.read(tmp_path / "z.jsonl")


def test_half_a_character_is_none(tmp_path):
    (tmp_path / "x.json").write_text(r'[{"context": "a\ud800", "question": "b\ud800?", "answers": ["c\udc00"], "id": "1"}]')
    want = [{"context": "a\ufffd", "question": "b\ufffd?", "answers": ["c\ufffd"], "id": "1"}]
    assert latent_data.read_rows(tmp_path / "x.json") == want
    squad.main([f"--source={tmp_path}/x.json", f"--out={tmp_path}"])
    assert sources.read(tmp_path / "train.jsonl") == want


def test_rows_without_what_is_needed_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"context": "c"}\n')
    with pytest.raises(SystemExit):
        latent_data.read_rows(tmp_path / "x.jsonl")
    assert torch.equal(lw.decode(lw.encode(torch.zeros(2, 3), 4)), torch.zeros(2, 3))


def test_answers_are_whole_however_they_are_written(tmp_path, capsys, dies):
    squad_way = {"text": ["Oslo", "in Oslo"], "answer_start": [1, 2]}
    given = ["Oslo", squad_way, {"text": [], "answer_start": []}, None, [1950], 1950, [{"text": "Oslo"}], []]
    write_rows(tmp_path / "x.jsonl", [{"context": "c", "question": "q", "answers": a} for a in given])
    want = [["Oslo"], ["Oslo", "in Oslo"], [""], [""], ["1950"], ["1950"], ["Oslo"], [""]]
    assert [row["answers"] for row in latent_data.read_rows(tmp_path / "x.jsonl")] == want
    mine = '{"context": "c", "question": "q", "answers": %s}'
    for bad in (
        "3",
        mine % '{"spans": ["Oslo"]}',
        mine % "[null]",
        '{"text": null}',
        (mine % "[]").replace('"q"', "5"),
        '{"context": "c"}',
    ):
        (tmp_path / "y.jsonl").write_text('{"text": "t"}\n' + bad + "\n")
        with pytest.raises(SystemExit):
            latent_data.read_rows(tmp_path / "y.jsonl")
        assert "y.jsonl: row 2" in (error := capsys.readouterr().err) and error.count("\n") == 1
    (tmp_path / "z.json").write_text('{"data": []}')
    dies(lambda: latent_data.read_rows(tmp_path / "z.json"), "no list of rows")


@pytest.mark.parametrize("setting", ["samples=0", "batch=-1", "resamples=0", "max_new_tokens=0", "bytes=-5"])
def test_what_measures_nothing_is_refused(setting, dies):
    dies(lambda: latent.main(["--ckpt=out/none", f"--{setting}"]), "must be")


def test_what_reading_text_ignores_is_refused(dies):
    dies(lambda: latent.main(["--lms=out/a", "--bits=4"]), "--bits does nothing with --lms")
