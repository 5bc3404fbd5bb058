"""Every setting does something: it is read, a test touches it, and where it could do nothing (needs.py) it is refused or named."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import configurator
import fp8
import latentwire
import machine
import needs
import prelude
import train
from model import build
from train import Config

os.environ["WANDB_MODE"] = "offline"
ROOT = Path(__file__).parents[1]
TINY = ["--vocab_size=257", "--n_layer=1", "--n_head=2", "--d_model=16", "--seq_len=64", "--max_len=64", "--tokens_per_step=128",
        "--max_steps=2", "--eval_tokens=64", "--device=cpu", "--dtype=float32", "--log_every=1"]  # fmt: skip


def test_every_setting_is_read_by_the_code_and_touched_by_a_test():
    files = [f for f in (*ROOT.glob("*.py"), *ROOT.glob("prepare/*.py"), *ROOT.glob("eval/*.py")) if f.name != "needs.py"]
    code = "\n".join(f.read_text() for f in files)
    tests = "\n".join(f.read_text() for f in ROOT.glob("tests/*.py"))
    for key in (f.name for f in fields(Config)):
        assert re.search(rf'\.{key}\b|(?<!\w)"{key}"', code), f"{key}: no file reads it"
        assert re.search(rf"\b{key}\b", tests), f"{key}: no test touches it"


def test_numbers_that_no_run_can_have_are_refused(dies):
    impossible = {"micro_tokens": -64, "seq_len": 0, "n_layer": 0, "gate_block": 0, "lr": -1.0, "decay_share": 0.0, "betas": (1.5, 0.9)}
    impossible |= {"chunk": -1, "remat": -1, "tau_min": 0.0, "fp8_history": 0, "tau_max": 0.05, "mix_decay_start": 1.0}
    impossible |= {
        "latent_len": 0,
        "first_k": 0,
        "min_lr_ratio": 2.5,
        "warmup_from": 2.5,
        "eps": 0.0,
        "rope_theta": 0.0,
        "domains_every": 0,
    }
    impossible |= {"muon_momentum": 1.0, "fp8_margin": 100, "seed": 1 << 63, "weight_decay": 1e9, "data": {}}
    pairs = [(key, bad) for key in ("lr", "clip", "norm_eps", "init_std", "decay_share", "epochs") for bad in (math.nan, math.inf)]
    pairs += [("data", {name: "x"}) for name in ("", "mean", "a/b")]  # metrics called val/mean, or cut at the slash
    rows = ({"rows": 0}, {"clip": -1.0}, {"clip": math.nan}, {"mult": -1.0}, {"warmup": -3}, {"seq_len": "a"})
    for key, value in (*impossible.items(), *pairs, *(("stages", ({"seq_len": 64}, row)) for row in rows)):
        dies(lambda: needs.possible(Config(**{"mix": {"a": 1.0}, "mix_end": {"a": 1.0}} | {key: value})), key)
    sizes = "vocab_size n_layer n_head d_model d_ff head_dim max_len seq_len tokens_per_step micro_tokens contrast_pairs latent_len"
    for key, value in itertools.product(sizes.split(), (1 << 40, 1 << 50)):  # which would be planned and built for hours
        dies(lambda: needs.possible(Config(**{key: value})), f"{key}={value} must be", "or less")
    for size in (dict(rows=1 << 24, accum=1 << 24), dict(seq_len=1 << 20, rows=1 << 10)):
        dies(lambda: needs.possible(Config(stages=({"start": 0, **size},))), "stages[0]: in all tokens_per_step=", "67,108,864 or less")
    for file in ROOT.glob("config/*.py"):
        if not re.search("^(fp8_table|sweep)", file.name):
            needs.possible(configurator.load(Config, [str(file)])[0])


def test_a_device_or_dtype_that_is_not_there_is_one_line(monkeypatch, dies):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for (device, dtype), said in (
        (("cpu", "float8"), "dtype=float8"), (("cpu", "half"), "dtype=half"), (("cuda:1", "auto"), "there are 1 GPUs"),
        (("cuda:", "auto"), "device=cuda: is not known"), (("cuda:x", "auto"), "device=cuda:x is not known"),
    ):  # fmt: skip
        dies(lambda: machine.find(device, dtype), said)


def test_what_would_do_nothing_is_refused_when_typed_and_named_when_inherited(capsys, monkeypatch):
    keys = {f.name for f in fields(Config)}
    for need, some in needs.NEEDS:
        assert set(some.split()) <= keys and {part.partition("=")[0] for part in need.split(" or ")} <= keys, need
    for changes, key, need in (
        ({"objective": "denoise", "domains": "data/val"}, "domains", "objective=lm"),
        ({"cross_rope": "enc"}, "cross_rope", "arch=encdec"),
        ({"eos_id": 5}, "eos_id", "arch=encoder|encdec"),
        ({"ffn": "polyglu", "act": "gelu"}, "act", "ffn=swiglu"),
        ({"objective": "latent", "compile": True}, "compile", "objective=lm|denoise|contrast"),
        ({"objective": "latent", "n_layer": 3}, "n_layer", "latent_encoder=pool|byte"),
        ({"objective": "contrast", "eval_every": 3}, "eval_every", "objective=lm|denoise"),
        ({"fp8_margin": 1}, "fp8_margin", "precision=fp8|te"),
        ({"objective": "denoise", "seq_len": 64}, "seq_len", "objective=lm|latent"),
        ({"objective": "contrast", "tokens_per_step": 64}, "tokens_per_step", "objective=lm|denoise|latent"),
        ({"objective": "latent", "decay_embed": False}, "decay_embed", "objective=lm|denoise|contrast"),
        ({"objective": "latent", "latent_ratio": 4, "latent_len": 9}, "latent_len", "latent_ratio=0"),
        ({"objective": "latent", "kd_tau": 2.0}, "kd_tau", "w_kd"),
        ({"objective": "latent", "latent_encoder": "pool", "latent_layers": 1}, "latent_layers", "latent_encoder=lm|query|sent"),
        ({"objective": "latent", "adapter": "linear", "adapter_hidden": 8}, "adapter_hidden", "adapter=mlp"),
        ({"objective": "latent", "ffn": "polyglu", "tau_max": 2.0}, "tau_max", "objective=lm|denoise|contrast"),
        ({"arch": "encoder", "ffn": "polyglu", "gate": "static"}, "gate", "arch=decoder|encdec"),
        ({"precision": "te", "fp8_stats_every": 9}, "fp8_stats_every", "precision=fp8"),
        ({"packing": "documents", "chunk": 64}, "chunk", "packing=windows"),
        ({"ffn": "polyglu", "allow_noncausal": True}, "allow_noncausal", "gate=sequence"),
        ({"auto_mix": True, "domains": "x"}, "auto_mix", "eval_every"),
        ({"domains": "x", "domains_every": 2}, "domains_every", "eval_every"),
        ({"objective": "latent", "max_len": 64}, "max_len", "objective=lm|denoise|contrast"),
    ):
        cfg = Config(**changes)
        assert key in needs.idle(cfg) and need in needs.idle(cfg)
        with pytest.raises(SystemExit) as end:
            needs.idle(cfg, [f"--{key}=x"])
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.startswith(f"--{key}=") and need in line and line.count("\n") == 1
    own = {"objective": "mlm", "arch": "encoder", "d_model": 64, "seq_len": 64, "eval_every": 5, "max_enc": 64}
    own |= {"schedule": "rsqrt", "min_lr_ratio": 0.0, "ffn": "geglu", "act": "gelu"}
    assert needs.idle(Config(**own), [f"--{key}=x" for key in own]) == ""  # of which the table has never heard
    assert needs.idle(Config(parallel="fsdp"), ["--parallel=fsdp"]) == "parallel (needs torchrun with several processes)"
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert needs.idle(Config(auto_batch=True), ["--auto_batch=True"]) == "auto_batch (needs one process)"
    for changes in (
        {},
        {"objective": "latent", "latent_encoder": "byte", "n_layer": 3, "wire_bits": (8,), "wire_start": 0.5},
        {"arch": "encdec", "objective": "denoise", "cross_rope": "enc", "ffn": "polyglu", "gate_enc": "lagged", "gate_block": 8},
        {
            "precision": "fp8",
            "fp8_recipe": "delayed",
            "fp8_history": 4,
            "optimizer": "muon",
            "muon_lr": 0.1,
            "domains": "x",
            "mix": {"a": 1.0},
        },
    ):
        assert needs.idle(Config(**changes), [f"--{key}=x" for key in changes]) == ""


def test_what_every_stage_says_itself_is_not_asked_of_the_run():
    stages = ({"start": 0, "rows": 8, "clip": 0.5}, {"start": 9, "rows": 2})
    found = needs.idle(Config(stages=stages, micro_tokens=64, clip=3.0))
    assert "micro_tokens (needs a stage without `rows`)" in found and "clip" not in found
    mixed = {"mix": {"a": 1.0}, "stages": ({"start": 0, "mix": {"a": 1.0}},)}
    assert "mix" in needs.idle(Config(**mixed)) and needs.idle(Config(**mixed, auto_mix=True, eval_every=1)) == ""  # it starts from `mix`


def test_no_config_that_stands_alone_sets_anything_in_vain():
    for file in sorted(ROOT.glob("config/*.py")):
        if f"train.py config/{file.name}" in file.read_text():  # a recipe; others follow one
            assert needs.idle(configurator.load(Config, [str(file)])[0]) == "", file.name


def test_what_was_typed_in_vain_stops_before_anything_is_written(corpus, tmp_path, capsys):
    for arg, said in (("--max_enc=64", "--max_enc=64"), ("--lr=-1.0", "lr=-1.0 must be 0 or more")):
        with pytest.raises(SystemExit):
            train.main([f"--data={corpus}", f"--out={tmp_path / 'run'}", arg, *TINY])
        assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---- settings that nothing else would notice


def test_wandb_and_tensorboard_get_what_the_log_gets(corpus, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="pip install -e '.[log]'")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="pip install -e '.[log]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "left.py").write_text("max_enc = 64\n")  # from a config that stood before
    train.main([str(tmp_path / "left.py"), f"--data={corpus}", f"--out={tmp_path / 'run'}", "--wandb=True", "--tensorboard=True", *TINY])
    assert "without effect here: max_enc (needs objective=denoise|contrast)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    board = events.EventAccumulator(str(tmp_path / "run")).Reload()
    for key in ("train/loss", "val/mean/bpb"):
        logged = [(row["step"], row[key]) for row in rows if key in row]
        assert logged and [(e.step, e.value) for e in board.Scalars(key)] == [(s, pytest.approx(v)) for s, v in logged]
    (kept,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(100):  # its own process writes it, and may be late on a busy machine
        content = kept.read_bytes()
        if b"val/mean/bpb" in content and b"tokens_per_step" in content:  # metrics, and the config
            break
        time.sleep(0.2)
    else:
        raise AssertionError("wandb never got the metrics and the config")


def test_wandb_without_a_key_is_one_line_and_writes_nothing(corpus, tmp_path):
    pytest.importorskip("wandb", reason="pip install -e '.[log]'")
    env = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"} | {"WANDB_MODE": "online", "NETRC": str(tmp_path / "none")}
    command = [sys.executable, "train.py", f"--data={corpus}", f"--out={tmp_path / 'run'}", "--wandb=True", *TINY]
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("wandb=True: ") and "WANDB_MODE=offline" in last and "Traceback" not in done.stderr
    assert last.count("wandb login") == 1  # as wandb itself says it
    assert not list((tmp_path / "run").glob("*.json*"))


def test_analyze_batch_prints_examples_and_ends(corpus, tmp_path, capsys):
    size = ["--arch=encdec", "--objective=denoise", "--vocab_size=371", "--n_sentinels=110", "--max_enc=64", "--max_dec=64"]
    rest = [arg for arg in TINY if "vocab" not in arg and "tokens_per" not in arg and "seq_len" not in arg]
    with pytest.raises(SystemExit) as end:
        train.main([f"--data={corpus}", f"--out={tmp_path / 'run'}", "--analyze_batch=3", "--tokens_per_step=512", *size, *rest])
    text = capsys.readouterr().out
    assert not end.value.code and text.count("targets") >= 3 and not list((tmp_path / "run").glob("step-*"))


@pytest.mark.parametrize("reduce", [True, False])
def test_fp8_reduce_amax_is_what_lets_ranks_agree(reduce, monkeypatch):
    cfg = Config(vocab_size=61, n_layer=1, n_head=2, d_model=32, d_ff=64, precision="fp8", fp8_emulate=True, fp8_filter="all",
                 fp8_recipe="delayed", fp8_reduce_amax=reduce)  # fmt: skip
    model = build(cfg)
    fp8.apply(model, cfg, "cpu")
    monkeypatch.setattr(fp8.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(fp8.dist, "all_reduce", lambda x, op: x.fill_(7.0))  # another rank has seen larger values
    for heard in model.fp8.heard:
        heard.fill_(3.0)
    fp8.refresh(model)
    assert model.fp8.history.max() == (7.0 if reduce else 3.0)


def test_every_weight_of_a_latent_loss_is_its_own():
    values = dict(w_ans=2.0, w_first=3.0, w_k=5.0, w_kd=7.0, w_ae=11.0, w_lm=13.0, w_ae_qa=17.0)
    found = latentwire.weights(Config(lms=("a", "b"), **values))
    logged = {f"{term}/{m}": 0.0 for term in ("first_right", "rms_raw", "rms_cal") for m in range(2)}
    assert found == {f"{k[2:]}/{m}": v for k, v in values.items() for m in range(2)} | logged


def test_adapter_hidden_is_a_width():
    lm = build(Config(n_layer=1, n_head=2, d_model=16))
    for adapter_hidden, width in ((0, 32), (24, 24)):
        assert latentwire.Adapter(Config(latent_dim=8, adapter_hidden=adapter_hidden), lm).net[0].out_features == width


def test_an_objective_trains_the_architecture_that_it_is_made_for(dies):
    for objective, arch, fit in (("lm", "encoder", "decoder"), ("lm", "encdec", "decoder"), ("denoise", "decoder", "encdec")):
        dies(
            lambda: needs.possible(Config(objective=objective, arch=arch, max_steps=1)),
            f"objective={objective} trains no arch={arch}: set --arch={fit}",
        )


def test_what_every_stage_sets_itself_is_named():
    stages = ({"start": 0, "seq_len": 64, "accum": 2}, {"start": 9, "seq_len": 128, "accum": 1})
    found = needs.idle(Config(stages=stages, seq_len=512, micro_tokens=64))
    for objective, keys in (("contrast", ("accum", "seq_len")), ("denoise", ("seq_len",)), ("latent", ())):  # what no stage can set there
        named = needs.idle(Config(stages=stages, objective=objective, arch="encdec"))
        assert [key for key in ("accum", "seq_len") if f"stages.{key} (needs " in named] == list(keys)
    assert "seq_len (needs a stage without `seq_len`)" in found and "micro_tokens (needs a stage without `accum`)" in found


def test_texts_longer_than_the_model_reads_are_refused_before_the_first_of_them(dies):
    for objective, key in (("denoise", "max_enc"), ("denoise", "max_dec"), ("contrast", "max_enc")):
        for value in (1, 65):
            keys = {"objective": objective, "arch": "encdec", "max_len": 64, "max_enc": 8, "max_dec": 8} | {key: value}
            dies(lambda: needs.possible(Config(**keys)), f"{key}={value}", "2..64", "--max_len")


def test_a_length_is_given_in_what_the_objective_counts(dies):
    keys = {"objective": "contrast", "arch": "encoder"}
    for changes in (keys | {"max_tokens": 9}, keys | {"stages": ({"tokens": 9},)}, {"objective": "latent", "epochs": 1.0}):
        dies(lambda: needs.possible(Config(**changes)), f"objective={changes['objective']} counts steps", "--max_steps")


def test_what_does_not_fit_into_memory_is_one_line(dies):
    for error in (torch.OutOfMemoryError("of memory"), MemoryError(), RuntimeError("alloc_cpu.cpp:127: can't allocate memory: 9 bytes")):
        dies(lambda: prelude.last_words(type(error), error, None), "out of memory", "--d_model", "--micro_tokens")


def test_a_run_without_a_folder_is_refused(dies):
    dies(lambda: needs.possible(Config(out="", max_steps=1)), "--out= names no folder")
    dies(lambda: needs.possible(Config(data="x/a,x/b", max_steps=1)), "data=x/a,x/b", "{'a': 'x/a', 'b': 'x/b'}")


def test_rows_of_the_vocabulary_that_no_token_has_are_named(corpus):
    named = lambda *argv, **keys: needs.idle(cfg := Config(**keys), argv, train.check_vocabulary(cfg)["vocab_size"])  # noqa: E731
    assert named(data=corpus, vocab_size=257 + needs.SPARE) == ""
    found = named("--vocab_size=8192", data={"a": corpus}, vocab_size=8192)
    assert found == "vocab_size (needs a tokenizer of more than 257 ids)"  # no reason to stop
    assert named(data=corpus, vocab_size=361 + needs.SPARE, arch="encdec", objective="denoise") == ""  # modes and sentinels
