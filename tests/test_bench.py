"""bench.py: its arithmetic, its refusals and its account of a child's memory; the speeds themselves are no test."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import machine
from model import ModelConfig, build


def dies(capsys, call, *words):
    with pytest.raises(SystemExit) as stop:
        call()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and all(w in message for w in words), message


def test_ratios_and_spread(capsys):
    seconds = {"prism": [1.0, 1.0, 2.0, 1.0, 1.0], "peer": [2.0, 3.0, 4.0, 2.0, 2.0]}
    row = bench.report("x", "what", seconds, "tokens/s", 100)
    assert (row["prism"], row["peer"], row["ratio"], row["rounds"]) == (100.0, 50.0, 2.0, 5) and row["low"] <= 2 <= row["high"]
    assert bench.report("x", "what", seconds, "tokens/s", 100, higher=False)["ratio"] == 0.5
    assert "ratio 2.00" in capsys.readouterr().out


def test_a_missing_peer_stops_the_bench(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="transformers"):  # which prelude.py says in one line
        bench.qwen3({}, None)


def test_a_row_that_fails_loses_no_other(monkeypatch, tmp_path, capsys):
    def sick(opt, where):
        raise torch.OutOfMemoryError("of memory")

    rows = {"first": sick, "second": lambda *a: bench.die("no peer"), "third": lambda *a: [{"name": "third", "ratio": 2.0}]}
    monkeypatch.setattr(bench, "ROWS", rows)
    with pytest.raises(SystemExit) as stop:
        bench.main(["--suite=cpu", f"--out={tmp_path}/r.json"])
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())["rows"]
    assert stop.value.code == 1 and "failed: first, second" in said and "first      FAILED OutOfMemoryError: of memory" in said
    assert [row.get("ratio") for row in kept] == [None, None, 2.0] and "OutOfMemoryError" in kept[0]["failed"]


@pytest.mark.parametrize("arg", ["--suite=tpu", "--only=nothing", "--clock=sun", "--rounds=0", "--round=3"])
def test_refusals(capsys, arg):
    dies(capsys, lambda: bench.main([arg]), arg[2:].split("=")[0])


def test_a_childs_memory_is_its_own(capsys):
    here = bytearray(400 << 20)  # this process is big; its child must not look it
    here[::4096] = b"x" * len(here[::4096])
    small, big = (bench.child_cost(["-c", f"b = bytearray({n} << 20); b[::4096] = b'x' * len(b[::4096])"])[1] for n in (1, 200))
    assert small < 100 << 20 and 180 << 20 < big - small < 220 << 20
    dies(capsys, lambda: bench.child_cost(["-c", "raise ValueError('sick')"]), "sick")


def test_both_sides_are_the_same_model(monkeypatch):
    pytest.importorskip("transformers")
    keys = {"vocab_size": 128, "n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 64}
    where = machine.find("cpu")
    peer = bench.qwen3(keys, where)
    assert sum(p.numel() for p in peer.parameters()) == build(ModelConfig(**keys)).num_params()
    batch, inputs = bench.rows_of_text(keys, 2, 16)
    sides = {"prism": bench.our_step(keys, batch, where), "transformers": bench.peer_step(peer, inputs, where)}
    seconds = bench.race(sides, SimpleNamespace(clock="cpu", rounds=2), where, warm=0)
    assert all(len(s) == 2 and min(s) > 0 for s in seconds.values())


def test_both_sides_of_an_encoder_decoder_learn_the_same_tokens():
    pytest.importorskip("transformers")
    keys, where = {"vocab_size": 128, "n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 64}, machine.find("cpu")
    batch, inputs = bench.ragged_pairs(keys, 3)
    peer = bench.t5gemma2(keys, where)
    vision = sum(p.numel() for name, p in peer.named_parameters() if any(s in name for s in ("vision", "multi_modal", "eoi")))
    ours = build(ModelConfig(**keys, arch="encdec"))
    extra = 2 * 2 * 2 * keys["d_model"]  # a second norm around each branch
    assert sum(p.numel() for p in peer.parameters()) - vision == ours.num_params() + extra
    assert int((inputs["labels"] != -100).sum()) == len(batch["targets"]) and int(inputs["attention_mask"].sum()) == len(batch["ids"])
    assert bench.peer_step(peer, inputs, where)() is None and bench.our_step(keys | {"arch": "encdec"}, batch, where)() is None


def test_both_sides_of_an_encoder_read_alike(monkeypatch):
    pytest.importorskip("sentence_transformers")
    keys = {"vocab_size": 300, "n_layer": 1, "n_head": 2, "d_model": 32, "d_ff": 64}
    monkeypatch.setitem(bench.SHAPES["cpu"], "embed", (keys, 8))
    rows = bench.embed(SimpleNamespace(suite="cpu", clock="cpu", rounds=1), machine.find("cpu", "bfloat16"))
    assert [row["name"] for row in rows] == ["embed", "embed16", "embed_auto"]
    least = [float(row["what"].rpartition(" ")[2]) for row in rows]
    assert least[0] > 0.99995 and min(least) > 0.99 and all(0 < row["of_floor"] < 1 for row in rows)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    assert stop.value.code == 0 and "--suite=cpu" in capsys.readouterr().out


def test_a_device_is_held_to_its_own_peak():
    """Names as torch reports them; several contain the name of another card."""
    names = {"NVIDIA GB200": 2500, "NVIDIA B200": 2250, "NVIDIA GH200 480GB": 989, "NVIDIA H200 NVL": 835, "NVIDIA H100 PCIe": 756}
    names |= {"NVIDIA H100 80GB HBM3": 989, "NVIDIA L40S": 362, "NVIDIA L4": 121, "Tesla T4": 0}
    for name, peak in names.items():
        assert next((v for k, v in machine.PEAKS.items() if k in name), 0.0) == peak * 1e12, name
