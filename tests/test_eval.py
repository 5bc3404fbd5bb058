"""The evaluations on models whose answers are known, and lm-eval through our adapter against its own transformers back end."""

import csv
import dataclasses
import importlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_run

import checkpoint
import data
import hub
import monitor
import tokenizer
import train
from eval import OPEN, bootstrap, open_run, perplexity, plots, routing
from kernels import ACTIVATIONS
from model import ModelConfig, build
from prepare import text as prepare_text

os.environ["HF_HUB_OFFLINE"] = "1"
WORDS = "the cat sat on a mat and looked at 12 dogs, while the sun went down behind 7 hills. def f(x): return x + 1\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two small sources of bytes and a PolyGLU of two layers trained on them for a moment."""
    home = tmp_path_factory.mktemp("eval")
    for name, unit in (("words", WORDS), ("digits", "0123456789 " * 9 + "\n")):
        rows = [json.dumps({"text": unit * 4 + f"{name} {i}"}) for i in range(40)]
        (home / f"{name}.jsonl").write_text("\n".join(rows))
        prepare_text.main([f"--from={home / name}.jsonl", f"--out={home / name}", "--val=0.3", "--workers=1"])
    sources = {name: str(home / name) for name in ("words", "digits")}
    train.main(
        ["--vocab_size=257", "--n_layer=2", "--n_head=2", "--d_model=32", "--d_ff=48", "--max_len=128", "--seq_len=64", "--ffn=polyglu"]
        + [
            f"--data={sources}",
            "--tokens_per_step=512",
            "--max_steps=30",
            "--warmup=5",
            "--lr=1e-2",
            f"--out={home / 'run'}",
            "--log_every=5",
        ]
        + ["--device=cpu", "--dtype=float32", "--eval_tokens=128", "--init_std=0.1"]
    )
    return home


# ---- perplexity


def test_bootstrap_covers_and_is_a_ratio():
    top, bottom = torch.full((50,), 6.0), torch.full((50,), 3.0)
    assert bootstrap(top, bottom) == [2.0, 2.0]
    low, high = bootstrap(torch.randn(400, generator=torch.Generator().manual_seed(0)))
    assert low < 0 < high and 0.15 < high - low < 0.25
    assert all(math.isnan(v) for v in bootstrap([1.0]))


def test_window_scores_equal_a_plain_computation(home, capsys):
    out = home / "ppl.json"
    perplexity.main([f"--ckpt={home / 'run'}", "--windows=6", f"--out={out}"])
    report = json.loads(out.read_text())
    model, _ = checkpoint.load(home / "run")
    assert (
        report["causal"] is True and report["gate"] == "running" and report["tau"] == pytest.approx(0.13, abs=0.01) and report["step"] == 30
    )
    for name in ("words", "digits"):
        nats, count, right = 0.0, 0, 0
        for batch in data.val_batches(home / name, 64, 6 * 64, 10**6):
            cu = batch["cu"].tolist()
            for a, b in zip(cu, cu[1:], strict=False):  # every document alone
                logp = model.logits(batch["ids"][None, a:b]).log_softmax(-1)[0]
                for row, target in zip(logp, batch["targets"][a:b].tolist(), strict=True):
                    if target >= 0:
                        nats, count, right = nats - row[target].item(), count + 1, right + (row.argmax().item() == target)
        row = report["results"][name]
        assert (
            row["tokens"] == count and row["loss"] == pytest.approx(nats / count, rel=1e-6) and row["top1"] == pytest.approx(right / count)
        )
        assert row["ppl"] == pytest.approx(math.exp(nats / count), rel=1e-5) and row["loss_low"] <= row["loss"] <= row["loss_high"]
        assert row["bpb"] == pytest.approx(nats / math.log(2) / row["bytes"], rel=1e-6) and row["units"] == 6
    assert "words" in capsys.readouterr().out
    perplexity.main([f"--ckpt={home / 'run'}", "--windows=6", f"--out={out}.2", "--batch_tokens=64"])
    again = json.loads(Path(f"{out}.2").read_text())["results"]
    for name, row in report["results"].items():
        assert again[name]["loss"] == pytest.approx(row["loss"], abs=1e-6)


def test_documents_from_an_eos_context_each_token_once(home, tmp_path, capsys):
    folder = tmp_path / "domains"
    folder.mkdir()
    texts = ["short", WORDS * 3, "é" * 20 + "\u2028"]  # a line separator inside a text ends no row
    (folder / "mixed.jsonl").write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts))
    (folder / "other.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    model, _ = checkpoint.load(home / "run")
    nats, size = 0.0, 0
    for t in texts:
        ids = [256, *t.encode()]
        for at in range(0, len(ids) - 1, 100):
            window = torch.tensor(ids[at : at + 101])
            logp = model.logits(window[None, :-1]).log_softmax(-1)[0]
            nats -= logp.gather(1, window[1:, None]).sum().item()
        size += len(t.encode())
    rows = []
    for batch_tokens in (100, 16384):
        out = tmp_path / f"{batch_tokens}.json"
        perplexity.main(
            [f"--ckpt={home / 'run'}", f"--domains={folder}", "--eval_len=100", f"--batch_tokens={batch_tokens}", f"--out={out}"]
        )
        rows.append(json.loads(out.read_text())["results"]["mixed"])
    assert rows[0]["tokens"] == size and rows[0]["bytes"] == size and rows[0]["units"] == 3
    assert rows[0]["loss"] == pytest.approx(nats / size, rel=1e-6) and rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-6)
    assert rows[0]["bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert "surprise by bpb" in capsys.readouterr().out and {"surprise_ppl", "advice_bpb"} <= rows[0].keys()


def test_a_text_that_was_trained_on_is_not_scored(home, tmp_path, dies, monkeypatch):
    shards = data.Shards(home / "digits", "train")
    (start,), (size,) = shards.documents(np.array([3]))
    seen = bytes(shards.tokens(start, start + size - 1).astype("u1")).decode()
    argv = [f"--ckpt={home / 'run'}", f"--domains={tmp_path}", f"--out={tmp_path / 'r.json'}"]
    for texts in (["news", seen], ["news", seen[:-1] + "x", seen[1:]]):
        (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        if seen in texts:
            dies(lambda: perplexity.main(argv), "d.jsonl: text 1 is a document", str(home / "digits"), "--exclude")
    coded, encode = [], tokenizer.Tokenizer.encode
    monkeypatch.setattr(tokenizer.Tokenizer, "encode", lambda tok, text: coded.append(text) or encode(tok, text))
    perplexity.main(argv)
    assert sorted(coded) == sorted(texts)  # each once, though it is scored and looked for
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["results"]["d"]["units"] == 3 and report["unseen_in"] == [str(home / "words"), str(home / "digits")]


def test_uniform_model_is_as_surprised_as_it_must_be():
    model = build(ModelConfig(vocab_size=257, n_layer=1, n_head=2, d_model=16))
    model.embed.weight.data.zero_()
    batch = perplexity.pack([(0, [256, *b"hello"], 5, 0)])
    sums, size = perplexity.score(model, [batch], torch.device("cpu"))
    row = perplexity.summary(sums, size)
    assert row["bits_per_token"] == pytest.approx(math.log2(257)) and row["entropy"] == pytest.approx(math.log(257), rel=1e-6)


def test_training_split_is_never_opened_and_mistakes_are_one_line(home, tmp_path, dies, monkeypatch):
    opened, init = [], data.Shards.__init__
    monkeypatch.setattr(data.Shards, "__init__", lambda self, dir, split: opened.append(split) or init(self, dir, split))
    perplexity.main([f"--ckpt={home / 'run'}", "--windows=1"])
    assert set(opened) == {"val"}
    (tmp_path / "odd").mkdir()
    model = build(ModelConfig(n_layer=1, n_head=2, d_model=16))  # as imported: it knows no shards
    save_run(tmp_path / "alone", model)
    (tmp_path / "part.json").write_text('{"results": {"digits": {"bpb": 1.0}, "windows": {"loss": 2.0}}}')
    (tmp_path / "odd" / "a.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    for argv, word in (
        ([f"--ckpt={home / 'run'}", "--data=nowhere"], "nowhere"),
        ([f"--ckpt={home / 'run'}", f"--domains={tmp_path}"], "jsonl"),
        ([f"--ckpt={home / 'run'}", "--windws=3"], "windows"),
        ([f"--ckpt={home / 'run'}", f"--domains={tmp_path / 'odd'}"], "a row has no text"),
        ([f"--ckpt={home / 'run'}", "--eval_len=64"], "--eval_len would do nothing"),
        ([f"--ckpt={home / 'run'}", f"--domains={tmp_path / 'odd'}", "--eval_len=0"], "--eval_len=0 must be above 0"),
        ([f"--ckpt={home / 'run'}", f"--reference={home / 'run' / 'config.json'}"], "no results in it"),
        ([f"--ckpt={home / 'run'}", f"--reference={tmp_path / 'odd' / 'a.jsonl'}"], "no results in it"),
        ([f"--ckpt={home / 'run'}", "--data=a", f"--out={tmp_path}"], "is a folder"),
        ([f"--ckpt={home / 'run'}", f"--out={tmp_path / 'part.json' / 'x'}"], "part.json is no folder"),
        ([f"--ckpt={home / 'run'}", "--seq_len=99999"], "--seq_len=99999"),
        ([f"--ckpt={home / 'run'}", "--seq_len=-1"], "--seq_len=-1"),
        ([f"--ckpt={tmp_path / 'alone'}"], "give --data=DIR"),
        ([f"--ckpt={home / 'run'}", f"--reference={tmp_path / 'part.json'}"], "the reference has no bpb of words"),
        ([f"--ckpt={home / 'run'}", f"--domains={tmp_path / 'odd'}", "--windows=3"], "--windows would do nothing"),
    ):
        dies(lambda: perplexity.main(argv), word)


def test_sets_of_one_name_are_all_there(home, tmp_path, capsys):
    """A source that is called like a domain, and two folders of one name."""
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": WORDS}))
    (tmp_path / "digits").symlink_to(home / "digits")
    out = tmp_path / "out.json"
    argv = [f"--ckpt={home / 'run'}", "--windows=1", f"--domains={tmp_path}", f"--data=words,{home}/digits,{tmp_path}/digits"]
    perplexity.main([*argv, f"--out={out}"])
    assert list(json.loads(out.read_text())["results"]) == ["words", "words_split", f"{home}/digits", f"{tmp_path}/digits"]


# ---- routing


def survey(alpha, s, labels=None, tau=1.0):
    acc = {}
    routing.accumulate(acc, alpha, s, tau, 0, labels or {})
    return routing.finish(acc, ("relu", "tanh", "silu", "gelu"))


def test_report_of_known_gates():
    f, n = 40, 600
    choice = torch.arange(f) % 4
    decided = survey(50.0 * torch.nn.functional.one_hot(choice, 4).float(), torch.zeros(n, 4))
    assert decided["map"] == "".join(map(str, choice.tolist())) == decided["static_map"] and decided["neurons"] == [10] * 4
    assert (
        decided["H1"] == pytest.approx(0, abs=1e-6)
        and decided["H3"] == pytest.approx(1)
        and decided["identity"] == pytest.approx(1, abs=1e-5)
    )
    assert decided["variance_from_alpha"] == pytest.approx(1)
    undecided = survey(torch.zeros(f, 4), torch.zeros(n, 4))
    assert undecided["H1"] == pytest.approx(1) and undecided["context"] == pytest.approx(0, abs=1e-6)
    kind = torch.arange(n) % 4
    labels = {"token class": (kind, 4), "permuted": (kind[torch.randperm(n, generator=torch.Generator().manual_seed(0))], 4)}
    driven = survey(torch.zeros(f, 4), 50.0 * torch.nn.functional.one_hot(kind, 4).float(), labels)
    assert driven["H2"] > driven["H1"] + 0.9 and driven["variance_from_alpha"] == pytest.approx(0)
    assert driven["mi token class"] == pytest.approx(math.log(4), rel=1e-3) and driven["mi permuted"] < 0.05
    assert driven["gap"] == pytest.approx(50, rel=1e-5)


def test_routing_report_and_its_pictures(home, capsys, dies):
    routing.main([f"--ckpt={home / 'run'}", "--windows=3", "--draws=2"])
    report = json.loads((home / "run" / "routing.json").read_text())
    assert len(report["layers"]) == 2 and all(len(r["map"]) == 48 for r in report["layers"])
    for row in report["layers"]:
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-6) and 0 <= row["H1"] <= row["H2"] <= row["H3"] <= 1 + 1e-6
    assert all(report["overall"][k] == pytest.approx(sum(r[k] for r in report["layers"]) / 2) for k in ("H1", "H2", "H3", "mi domain"))
    table = report["ablations"]["words"]
    assert 1 < table.pop("intact") < 6 and table.pop("shuffled") == 1
    assert {k[0] for k in table} == set("abcdef") and all(low <= mean <= high for mean, low, high in table.values())
    for name in ("routing.png", "routing.csv"):
        assert (home / "run" / name).stat().st_size > 100
    assert report["verdict"] in capsys.readouterr().out
    argv = [f"--ckpt={home / 'run'}", "--windows=1", "--skip_ablations", "--data=words"]
    routing.main([*argv, f"--out={home / 'r.json'}", "--skip_dynamic"])
    assert json.loads((home / "r.json").read_text())["domains"] == ["words"] and (home / "r.png").exists() and (home / "r.csv").exists()
    for text in ('{"text": "a"}\n{"text": "b"}\n', '{"text": "a"}', "[]", '{"a": []}'):
        (home / "prompts.jsonl").write_text(text)
        dies(lambda: routing.main([*argv, f"--prompts={home / 'prompts.jsonl'}"]), "is not one JSON object of {category: [texts]}")
    plots.main([f"--run={home / 'run'}", "--events=10:ten", "--clock=they:9:2.5;others, slow:90:2"])
    clock = list(csv.reader((home / "run" / "clock.csv").read_text().splitlines()[1:]))
    assert clock[-2:] == [["they", "9.0", "", "2.5"], ["others, slow", "90.0", "", "2.0"]] and (home / "run" / "clock.png").exists()
    assert [row[2] for row in clock if row[0].startswith("val/")][-1] == "30" and 0 <= float(clock[0][1]) <= float(clock[2][1]) < 999
    assert (home / "run" / "loss.png").stat().st_size > 5000
    assert (home / "run" / "loss.csv").read_text().count("\n") == 1 + sum(
        "train/loss" in x for x in (home / "run" / "metrics.jsonl").read_text().splitlines()
    )


def test_golden_losses_of_a_routed_model(home):
    """What 30 steps gave on the day they were written; a change of meaning anywhere between text and optimizer moves them."""
    rows = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}
    assert (
        losses[1] == pytest.approx(5.8749, abs=2e-3)
        and losses[10] == pytest.approx(2.637, abs=0.02)
        and losses[30] == pytest.approx(1.125, abs=0.03)
    )
    assert rows[-1]["val/mean/loss"] == pytest.approx(0.969, abs=0.03)


def test_the_loop_logs_what_routing_does(home):
    last = json.loads((home / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        last["step"] == 30 and 1.3 < last["routing_entropy/mean"] <= math.log(4) + 1e-6 and 0 < last["gate_entropy/layer_1"] < math.log(4)
    )
    assert last["gate_entropy/mean"] < last["dynamic_routing_entropy/mean"] and last["alpha_spread/layer_0"] > 0  # tau is below 1
    assert plots.entropy_figure(home / "run").stat().st_size > 5000
    model, _ = checkpoint.load(home / "run")
    batch = data.val_batches(home / "words", 64, 128, 128)[0]
    a, b = monitor.probe(model, batch), monitor.probe(model, batch, tokens=10**6)
    assert a == b and a.keys() == {k for k in last if "/layer_" in k or "entropy" in k or "alpha" in k}


def test_freezing_what_is_already_frozen_costs_nothing(home):
    """And leaves the model as it was."""
    model, state = checkpoint.load(home / "run")
    for block in model.decoder.blocks:
        block.ffn.alpha.data = 1e4 * torch.tensor([0.0, 0, 1, 0]).expand_as(block.ffn.alpha).clone()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    sets = perplexity.window_batches(home / "run", "", perplexity.sources(state), 64, 2, 256)
    layers = routing.survey(model, sets, routing.token_classes(tokenizer.load("bytes"), 257), torch.device("cpu"))
    result = routing.ablations(model, sets, layers, torch.device("cpu"), 1)
    for table in result.values():
        assert table["a layer frozen"][0] == pytest.approx(0, abs=1e-6) and table["f one-hot"][0] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and model.noise is None


def test_a_document_alone_is_not_its_own_mate(home, tmp_path):
    """A batch of one document is left out of (d), and said: it dilutes nothing."""
    model, state = checkpoint.load(home / "run")
    sets = perplexity.window_batches(home / "run", "words", perplexity.sources(state), 64, 4, 256)
    (batch,) = sets["words"]
    ids, alone = batch["ids"][:64], torch.arange(64)
    single = {"ids": ids, "targets": batch["targets"][:64], "pos": alone, "cu": torch.tensor([0, 64], dtype=torch.int32), "max_len": 64}
    single |= {"rows": batch["rows"][:1], "source": batch["source"][:1], "tokens": 64, "bytes": 64}
    layers = routing.survey(model, sets, routing.token_classes(tokenizer.load("bytes"), 257), torch.device("cpu"))
    name, both = "d s of another document", {"one": [single], "mixed": [single, batch], "batch": [batch]}
    found = routing.ablations(model, both, layers, torch.device("cpu"), 1)
    assert found["one"]["shuffled"] == 0 and name not in found["one"] and found["mixed"]["shuffled"] == pytest.approx(256 / 320)
    assert found["mixed"][name][0] == pytest.approx(found["batch"][name][0], rel=1e-6) and found["batch"][name][0] != 0


def test_gate_hard_is_the_one_hot_argmax(home, capsys):
    options = SimpleNamespace(**OPEN | {"ckpt": str(home / "run"), "gate_hard": True})
    model, _, _, facts = open_run(options)
    ffn, seen = model.decoder.blocks[1].ffn, []
    ffn.register_forward_pre_hook(lambda module, args: seen.append((module.gate_up(args[0]), *module.route(*args))))
    ffn.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.logits(torch.tensor([list(WORDS[:60].encode())]))
    (au, alpha, s), y = seen
    a, u = au.chunk(2, -1)
    choice = (alpha[0] + s[:, None]).argmax(-1)  # (N, f)
    values = torch.stack([ACTIVATIONS[name](a) for name in model.cfg.acts], -1)
    torch.testing.assert_close(y, values.gather(-1, choice[..., None])[..., 0] * u)
    assert facts["gate_hard"] and len(choice.unique()) > 1


def test_plots_go_where_they_are_sent_and_refuse_what_they_cannot_read(home, tmp_path, dies):
    plots.main([f"--run={home / 'run'}", f"--out={tmp_path / 'new'}", "--clock=they:9:2.5"])
    assert {"loss.png", "loss.csv", "entropy.png", "clock.png"} <= {p.name for p in (tmp_path / "new").iterdir()}
    (tmp_path / "other.json").write_text('{"results": {"a": 1}}')
    (tmp_path / "list.json").write_text("[1]")
    for arg, said in (
        (f"--run={home / 'run'} --events=foo:bar", "'foo' is no number; it is written STEP:TEXT"),
        (f"--run={home / 'run'} --clock=they:9", "--clock: 'they:9' is no number"),
        (f"--harness={tmp_path / 'other.json'}", "is no result of eval.harness"),
        (f"--harness={tmp_path / 'list.json'}", "is no result of eval.harness"),
        (f"--perplexity={tmp_path / 'other.json'} --out={tmp_path / 'more'}", "is no result of eval.perplexity"),
    ):
        dies(lambda: plots.main([*arg.split(), *([] if "--out" in arg else [f"--out={tmp_path}"])]), said)


def test_a_temperature_that_means_nothing_is_refused(home, tmp_path, capsys, dies):
    model = build(ModelConfig(vocab_size=257, n_layer=1, n_head=2, d_model=16))
    save_run(tmp_path / "plain", model)
    for ckpt, tau, said in ((home / "run", -1.0, "must be above 0"), (tmp_path / "plain", 0.5, "has ffn='swiglu' and so no gate")):
        with pytest.raises(SystemExit):
            open_run(SimpleNamespace(**OPEN | {"ckpt": str(ckpt), "tau": tau}))
        assert f"--tau={tau}: " in (line := capsys.readouterr().err) and said in line
    for some, said in ({"tau": 1e-30}, "must be above 0"), ({"tau": 0.5, "gate_hard": True}, "beside --gate_hard"):
        dies(lambda some=some: open_run(SimpleNamespace(**OPEN | {"ckpt": str(home / "run")} | some)), said)
    for option in ("--draws=0", "--windows=0", "--seq_len=-1"):
        dies(lambda option=option: routing.main([f"--ckpt={home / 'run'}", option]), option)
    dies(lambda: routing.main([f"--ckpt={home / 'run'}", "--skip_dynamic", "--prompts=x"]), "--prompts=x would do nothing beside")


def test_benchmark_bars(tmp_path):
    rows = [{"task": "hellaswag", "value": 0.3, "stderr": 0.01}, {"task": "gsm8k", "value": 0.02, "stderr": None}]
    (tmp_path / "a.json").write_text(json.dumps({"tasks": rows}))
    plots.main([f"--harness={tmp_path / 'a.json'}"])  # beside it
    assert (tmp_path / "tasks.csv").read_text().splitlines()[1].startswith("a,hellaswag,0.3,0.28")


# ---- controls


def test_controls_train_resume_and_say_no_effect(home, capsys, dies):
    from eval import controls

    argv = [
        f"--data={home / 'words'},{home / 'digits'}",
        f"--out={home / 'controls'}",
        "--seeds=2",
        "--steps=3",
        "--n_layer=2",
        "--d_model=32",
    ]
    argv += ["--tokens=128", "--seq_len=64", "--windows=2", "--arms=swiglu-iso,running"]
    controls.main(argv)
    lines = (home / "controls" / "runs.jsonl").read_text()
    controls.main(argv)
    assert (home / "controls" / "runs.jsonl").read_text() == lines and lines.count("\n") == 4
    assert "running against swiglu-iso" in capsys.readouterr().out
    for change, said in (
        ("--steps=4", "was measured with steps=3, not 4"),
        ("--lr=1e-2", "was measured with lr=0.003, not 0.01"),
        ("--arms=runing", "no arm 'runing'"),
        ("--seeds=0", "--seeds=0"),
    ):
        dies(lambda: controls.main([arg for arg in argv if arg.partition("=")[0] != change.partition("=")[0]] + [change]), said)
    table = controls.arms(28, 1024)
    assert table["swiglu-iso"]["d_ff"] == 4112 and table["fixed"]["act"] == ("silu",) * 3 + ("gelu",) * 7 + ("silu",) * 6 + ("tanh",) * 12
    losses = {"swiglu": (2.0, 2.2), "swiglu-iso": (2.0, 2.2), "running": (1.0, 1.201), "token": (1.9, 2.4)}
    blank = {"parameters": 1, "cpu_seconds": 1}
    rows = [blank | {"arm": arm, "seed": seed, "loss": {"mean": v}} for arm, values in losses.items() for seed, v in enumerate(values)]
    text = controls.report(rows, table)
    assert "running against swiglu-iso: -0.9995 ± 0.0064 nats/token, better" in text
    assert "token against swiglu-iso: +0.0500 ± 1.9059 nats/token, no effect" in text
    assert "swiglu against swiglu-iso: +0.0000 ± 0.0000 nats/token, no effect" in text


# ---- the harness


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    """Three task files over local json: choices, rolling likelihood, generation."""
    pytest.importorskip("lm_eval")
    home = tmp_path_factory.mktemp("tasks")
    words, same = ("sat", "looked", "", "on", "and then", "a"), {"choices": [" sat", " ran off", " 12"], "answer": "on a"}
    rows = [same | {"q": f"the cat {w}", "gold": i % 3, "text": f"the {w} sun went down {i}" * (i + 1)} for i, w in enumerate(words)]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    head = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {home / 'rows.jsonl'}\ntest_split: test\nmetadata:\n  version: 1\n"
    )
    (home / "choice.yaml").write_text(
        "task: local_choice\noutput_type: multiple_choice\n"
        + head
        + 'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (home / "roll.yaml").write_text(
        "task: local_roll\noutput_type: loglikelihood_rolling\n"
        + head
        + 'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n'
    )
    (home / "gen.yaml").write_text(
        "task: local_gen\noutput_type: generate_until\n" + head + 'doc_to_text: "{{q}} x"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs:\n  until: ["e", "\\n"]\n  do_sample: false\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n'
    )
    return home


def tiny_transformers(folder):
    """A random Llama with a byte-level tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[AddedToken("<|endoftext|>", special=True)]
    )
    fast.train_from_iterator([WORDS] * 20, trainer)
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tok.save_pretrained(folder)
    torch.manual_seed(3)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(
        vocab_size=len(tok), max_position_embeddings=64, eos_token_id=tok.eos_token_id, bos_token_id=None, **shape
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.dim() > 1 else 0.1) + (p.dim() == 1))
    model.save_pretrained(folder)


def test_agrees_with_lm_evals_own_back_end_per_document(local_tasks, tmp_path):
    from lm_eval.models.huggingface import HFLM

    from eval import harness

    tiny_transformers(tmp_path / "hf")
    hub.main(["import", f"--from={tmp_path / 'hf'}", f"--out={tmp_path / 'run'}"])
    model, _ = checkpoint.load(tmp_path / "run")
    ours = harness.PrismLM(model, tokenizer.load(tmp_path / "run"), batch_size=4)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4, max_length=64)
    theirs.chat = False
    tasks = ["local_choice", "local_roll", "local_gen"]
    a, b = (harness.evaluate(lm, tasks, include=str(local_tasks)) for lm in (ours, theirs))
    for task in tasks:
        assert len(a["samples"][task]) == 6
        for x, y in zip(*(sorted(r["samples"][task], key=lambda s: s["doc_id"]) for r in (a, b)), strict=True):
            if task == "local_gen":
                assert x["resps"] == y["resps"] and x["exact_match"] == y["exact_match"]
                continue
            left, right = (
                torch.tensor([float(v[0]) if isinstance(v, list | tuple) else float(v) for v in s["filtered_resps"]]) for s in (x, y)
            )
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
        for key, value in b["results"][task].items():
            if isinstance(value, float) and "stderr" not in key:
                assert a["results"][task][key] == pytest.approx(value, rel=1e-4)
    assert any(r["resps"][0][0] for r in a["samples"]["local_gen"])


class Bigram(torch.nn.Module):
    """Next byte = this byte + 1, with probability 0.9: what it says and scores is known. Looks like a Transformer to the harness."""

    def __init__(self):
        super().__init__()
        self.inner = build(ModelConfig(vocab_size=257, n_layer=1, n_head=2, d_model=16, max_len=32))
        self.cfg, self.embed = self.inner.cfg, self.inner.embed

    def forward(self, batch):
        return torch.nn.functional.one_hot((batch["ids"] + 1) % 257, 257).float()

    def predict(self, hidden):
        return torch.where(hidden > 0, math.log(0.9), math.log(0.1 / 256))

    def new_cache(self, rows, length):
        return type(
            "Cache",
            (),
            {"k": torch.zeros(1, rows), "v": torch.zeros(1, rows), "sums": torch.zeros(1, 1, rows), "lengths": [0] * rows, "enc": None},
        )()

    def step(self, ids, cache, count=None):
        return self({"ids": ids})


def requests(*args):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, a, 0) for a in args]


def test_known_probabilities(tmp_path):
    pytest.importorskip("lm_eval")
    from eval import harness

    tok = tokenizer.load("bytes")
    for batch_size in (1, 3):
        lm = harness.PrismLM(Bigram(), tok, batch_size)
        asked = requests(("ab", "cd"), ("ab", "cx"), ("", "b"), ("z" * 100 + "a", "bc"), ("a ", "b"))
        answers = lm.loglikelihood(asked)
        hit, miss = math.log(0.9), math.log(0.1 / 256)
        expected = [(2 * hit, True), (hit + miss, False), (miss, False), (2 * hit, True), (2 * miss, False)]  # the last scores " b"
        for (score, greedy), (want, same) in zip(answers, expected, strict=True):
            assert score == pytest.approx(want, rel=1e-6) and greedy is same
        long = "abcdefgh" * 10  # longer than the model: every byte once, the window's first from the byte before it
        rolling = lm.loglikelihood_rolling(requests((long,), ("",)))
        assert (
            rolling[0] == pytest.approx(70 * hit + 10 * miss, rel=1e-6) and rolling[1] == 0 and all(isinstance(x, float) for x in rolling)
        )
        texts = lm.generate_until(
            requests(("xa", {"until": ["fg", "zz"]}), ("a", {"until": "d"}), ("k", {"until": [], "max_gen_toks": 5})) if batch_size else []
        )
        assert texts == ["bcde", "bc", "lmnop"]
    budgets = requests(*(("z" * 200 + "a", {"until": [], "max_gen_toks": most}) for most in (4, 20)))
    assert [len(text) for text in lm.generate_until(budgets)] == [4, 20]  # the longer answer has less of the prompt, not less of itself


def test_a_row_without_a_token_is_never_drawn():
    """A vocabulary is rounded up: what the model thinks of ids beyond the tokenizer's is no text."""
    pytest.importorskip("lm_eval")
    from eval import harness

    model = Bigram()
    model.cfg = dataclasses.replace(model.cfg, vocab_size=300)
    model.predict = lambda hidden: torch.nn.functional.pad(hidden, (0, 43), value=9.0)
    assert harness.PrismLM(model, tokenizer.load("bytes")).generate_until(requests(("xa", {"until": "e"}))) == ["bcd"]


def test_answers_are_kept_and_a_killed_run_goes_on(home, local_tasks, capsys):
    from eval import harness

    out = home / "h.json"
    argv = [f"--ckpt={home / 'run'}", "--tasks=local_choice,local_gen", f"--include={local_tasks}", f"--out={out}", "--batch_size=4"]
    harness.main(argv)
    first, log = json.loads(out.read_text()), home / "h.requests.jsonl"
    assert [r["task"] for r in first["tasks"]] == ["local_choice", "local_gen"] and first["tasks"][0]["metric"] == "acc_norm,none"
    assert first["lm_eval"] and first["causal"] and first["tasks"][0]["n"] == 6 and first["tasks"][0]["shots"] == 0
    lines = log.read_text().splitlines(keepends=True)
    other = json.dumps({"key": "other", "answer": "a\u2028b\x85c", "request": "\u2029"}, ensure_ascii=False) + "\n"
    log.write_text("".join(lines[:7]) + other + lines[7][:20], encoding="utf-8")  # killed in the middle of a line
    computed = []
    original = harness.PrismLM.remember
    harness.PrismLM.remember = lambda self, *a: computed.append(a) or original(self, *a)
    harness.main(argv)
    harness.PrismLM.remember = original
    assert json.loads(out.read_text())["tasks"] == first["tasks"] and len(computed) == len(lines) - 7
    kept = [json.loads(x)["key"] for x in log.read_text(encoding="utf-8").split("\n")[:-1]]
    assert set(kept) == {"other", *(json.loads(x)["key"] for x in lines)}
    assert "local_choice" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        harness.main(argv + ["--tau=0.7"])  # other answers: not to be mixed
    with pytest.raises(SystemExit):
        harness.main([f"--ckpt={home / 'run'}", "--tasks=no_such", f"--include={local_tasks}"])
    for arg in ("--batch_size=0", "--limit=-1", "--max_gen_toks=0"):
        with pytest.raises(SystemExit):
            harness.main([f"--ckpt={home / 'run'}", "--tasks=local_choice", f"--include={local_tasks}", arg])
        assert arg in capsys.readouterr().err.splitlines()[-1]


def test_a_table_of_tasks_counts_groups_and_names_the_future(local_tasks, tmp_path, monkeypatch, dies):
    from eval import harness

    (local_tasks / "group.yaml").write_text(
        "group: local_group\ntask:\n  - local_choice\n  - local_gen\n"
        "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n    filter_list: none\n"
    )
    model = build(
        ModelConfig(vocab_size=257, n_layer=1, n_head=2, d_model=16, max_len=64, ffn="polyglu", gate="sequence", allow_noncausal=True)
    )
    save_run(tmp_path / "run", model, "bytes")
    harness.main([f"--ckpt={tmp_path / 'run'}", "--tasks=local_group", f"--include={local_tasks}", f"--out={tmp_path / 'h.json'}"])
    rows = {row["task"]: row for row in json.loads((tmp_path / "h.json").read_text())["tasks"]}
    assert rows["local_group"]["n"] == 12 and rows["local_choice"]["n"] == 6
    assert all(name.endswith("_noncausal") for row in rows.values() for name in (row["metric"], *row["all"]))
    row = {"chance": 0.25, "stderr": 0.0, "value": 0.0, "n": 5}
    assert harness.verdict(row) == "all 5 answers alike: no interval" and harness.verdict(row | {"stderr": None}) == ""
    assert harness.verdict(row | {"chance": None}) == "" and "below chance" in harness.verdict(row | {"stderr": 0.01})

    def unreachable(*args, **how):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr("lm_eval.simple_evaluate", unreachable)
    dies(
        lambda: harness.main(
            [f"--ckpt={tmp_path / 'run'}", "--tasks=local_gen", f"--include={local_tasks}", f"--out={tmp_path / 'h.json'}"]
        ),
        "Couldn't reach 'Rowan/hellaswag' on the Hub; run it once where there is a network",
    )


def test_a_suite_scores_text_under_the_same_settings(home, tmp_path, monkeypatch, dies):
    pytest.importorskip("lm_eval")
    from eval import harness

    asked = []
    monkeypatch.setattr(perplexity, "main", asked.extend)
    argv = [f"--ckpt={home / 'run'}", "--suite=ppl", "--tau=0.7", f"--out={tmp_path / 'h.json'}"]
    harness.main(argv)
    assert "--tau=0.7" in asked and f"--out={tmp_path / 'h-perplexity.json'}" in asked
    dies(lambda: harness.main([*argv, "--num_fewshot=0"]), "--num_fewshot=0 would do nothing")


@pytest.mark.parametrize("name", ["perplexity", "routing", "plots", "controls", "harness"])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"eval.{name}").main(["--help"])
    assert end.value.code == 0 and f"python -m eval.{name}" in capsys.readouterr().out
