"""bench.py: its arithmetic, its refusals and its account of a child's memory; the speeds themselves are no test."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import bench
import kernels
import machine
from eval import gpu, operators, peers
from model import ModelConfig, build


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

    def slow(opt, where):  # the first of its rows is on disk before the second is begun
        yield {"name": "third", "ratio": 2.0}
        assert read()[-1]["ratio"] == 2.0
        yield {"name": "fourth", "ratio": 3.0}

    read = lambda: json.loads((tmp_path / "r.json").read_text())["rows"]  # noqa: E731
    monkeypatch.setattr(bench, "ROWS", {"cpu": {"first": sick, "second": lambda *a: bench.die("no peer"), "third": slow}})
    with pytest.raises(SystemExit) as stop:
        bench.main(["--suite=cpu", f"--out={tmp_path}/r.json"])
    said, kept = capsys.readouterr().out, read()
    assert stop.value.code == 1 and "failed: first, second" in said and "first      FAILED OutOfMemoryError: of memory" in said
    assert [row.get("ratio") for row in kept] == [None, None, 2.0, 3.0] and "OutOfMemoryError" in kept[0]["failed"]


def test_a_budget_leaves_rows_and_says_which(monkeypatch, tmp_path, capsys):
    rows = {name: lambda *a, name=name: [time.sleep(0.06), {"name": name, "ratio": 1.0}][1:] for name in ("one", "two", "three")}
    monkeypatch.setattr(bench, "ROWS", {"cpu": rows})
    bench.main(["--budget=0.05", f"--out={tmp_path}/r.json"])
    assert "not measured: two,three" in capsys.readouterr().out
    bench.main(["--only=two", "--append", f"--out={tmp_path}/r.json"])
    assert [row["name"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["one", "two"]


def test_a_lost_device_costs_no_other_row(monkeypatch, tmp_path, capsys):
    """After an illegal access every call of CUDA fails: what is left is measured by a new process, behind the rows that are there."""
    lost, began = [], []

    def wait(device):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def anew(program, argv):
        began.append(argv[2:])
        raise SystemExit(0)  # this process is no more

    monkeypatch.setattr(bench.machine, "wait", wait)
    monkeypatch.setattr(bench.os, "execv", anew)
    monkeypatch.setattr(bench, "ROWS", {"cpu": {"one": lambda *a: lost.append(1) or wait(None), "two": None, "three": None}})
    with pytest.raises(SystemExit):
        bench.main(["--rounds=3", "--budget=100", f"--out={tmp_path}/r.json"])
    assert began[0][:2] == ["--rounds=3", f"--out={tmp_path}/r.json"] and began[0][3:] == ["--only=two,three", "--append"]
    assert 90 < float(began[0][2].partition("=")[2]) < 100
    assert "illegal" in json.loads((tmp_path / "r.json").read_text())["rows"][0]["failed"]


@pytest.mark.parametrize("arg", ["--suite=tpu", "--only=nothing", "--clock=sun", "--rounds=0", "--round=3", "--compile=no"])
def test_refusals(dies, arg):
    dies(lambda: bench.main([arg]), arg[2:].split("=")[0])


def test_a_childs_memory_is_its_own(dies):
    here = bytearray(400 << 20)  # this process is big; its child must not look it
    here[::4096] = b"x" * len(here[::4096])
    small, big = (bench.child_cost(["-c", f"b = bytearray({n} << 20); b[::4096] = b'x' * len(b[::4096])"])[1] for n in (1, 200))
    assert small < 100 << 20 and 180 << 20 < big - small < 220 << 20
    dies(lambda: bench.child_cost(["-c", "raise ValueError('sick')"]), "sick")


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
    rows = list(bench.embed(SimpleNamespace(suite="cpu", clock="cpu", rounds=1), machine.find("cpu", "bfloat16")))
    assert [row["name"] for row in rows] == ["embed16", "embed_auto", "embed"]
    least = [float(row["what"].rpartition(" ")[2]) for row in rows]
    assert least[2] > 0.99995 and min(least) > 0.99 and all(0 < row["of_floor"] < 1 for row in rows)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    assert stop.value.code == 0 and "--suite=cpu" in capsys.readouterr().out


# ---- the rows of a GPU, at tiny shapes ------------------------------------------------------------------------------------

TINY = SimpleNamespace(suite="tiny", clock="wall", rounds=1, compile=False)
OURS = {"curriculum": ["L=32", "L=8"], "fp8": ["bf16", "fp8 all"], "small": ["prism"], "encdec": ["prism", "padded"], "head": ["prism"]}
OURS |= {"polyglu": ["polyglu", "swiglu"], "attention": ["prism"], "operator": ["polyglu", "swiglu", "polyglu, from its formula"]}
OURS |= {"optimizer": ["adamw", "muon", "norm and clipping"]}


@pytest.mark.parametrize("name", OURS)
def test_a_row_runs(name, monkeypatch):
    monkeypatch.setattr(operators, "ceilings", lambda *a: (1e12, 1e10))
    monkeypatch.setattr(gpu, "qwen3", lambda *a: bench.die("no peer"))  # transformers takes ten seconds to import
    monkeypatch.setattr(gpu, "t5gemma2", lambda *a: bench.die("no peer"))
    where = machine.find("cpu")._replace(peak=1e12)
    for row in bench.ROWS["tiny"][name](TINY, where):
        json.dumps(row)
        assert "failed" not in row and set(OURS[name]) <= set(row["sides"]), row
        assert all(side["ms"] > 0 for side in row["sides"].values()) and row["name"] in bench.one_line(row)
        stepping = name in gpu.ROWS
        assert not stepping or all(0 < side["MFU"] < 1 and side["tokens/s"] > 0 for side in row["sides"].values())
    if name == "small":
        assert row["missing"]["transformers"] == "SystemExit: no peer"


def test_the_profile_adds_up():
    for row in gpu.profile(TINY, machine.find("cpu"), steps=1):
        json.dumps(row)
        assert 0 <= row["idle"] < 1 and row["classes_ms"]["GEMM"] > 0 and len(row["kernels"]) == 25
    kinds = {"void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention backward"}
    kinds |= {"cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention forward", "_backward_kernel": "polyglu"}
    kinds |= {"void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>": "attention forward"}
    kinds |= {
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN": "GEMM",
        "triton_poi_fused__to_copy_3": "copy and cast",
        "_dw_kernel": "head, its products apart",
    }
    kinds |= {"triton_red_fused__to_copy_add_mul_pow_2": "Triton reduction", "triton_poi_fused_add_mul_1": "Triton pointwise"}
    kinds |= {"void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": "optimizer and norm"}
    assert {name: gpu.class_of(name) for name in kinds} == kinds


def test_the_race_names_who_is_missing_and_who_is_faster(capsys, monkeypatch):
    now = [0.0]  # a clock that only naps move
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    where, nap = machine.find("cpu"), lambda seconds: lambda: lambda: now.append(now.pop() + seconds)
    makers = {"ours": nap(0.004), "slow": nap(0.02), "quick": nap(0.002), "absent": lambda: bench.die("not installed")}
    row = peers.compare("x", "what", makers, SimpleNamespace(clock="wall", rounds=5), where, amount=10, flops={"ours": 1e6}, nbytes=1e6)
    assert row["against"] == "quick" and row["ratio"] == pytest.approx(0.5) and row["low"] == pytest.approx(0.5)
    assert row["missing"] == {"absent": "SystemExit: not installed"} and "failed" not in row and "not installed" in capsys.readouterr().out
    ours, slow = row["sides"]["ours"], row["sides"]["slow"]
    assert slow["speed"] == pytest.approx(0.2) and ours["tokens/s"] == pytest.approx(1e4 / ours["ms"]) and "TFLOP/s" not in slow
    sick = peers.compare("x", "what", {"ours": makers["absent"], "slow": nap(0.001)}, SimpleNamespace(clock="wall", rounds=1), where)
    assert sick["failed"] == "SystemExit: not installed" and "ratio" not in sick


def test_the_formula_for_the_compiler_is_polyglus():
    torch.manual_seed(0)
    au, al, s = (torch.randn(*shape, dtype=torch.float64) for shape in ((12, 10), (3, 5, 4), (12, 4)))
    torch.testing.assert_close(operators.plain_polyglu(au, al, s), kernels.polyglu_reference(au, al, s))


def test_a_device_is_held_to_its_own_peak():
    """Names as torch reports them; several contain the name of another card."""
    names = {"NVIDIA GB200": 2500, "NVIDIA B200": 2250, "NVIDIA GH200 480GB": 989, "NVIDIA H200 NVL": 835, "NVIDIA H100 PCIe": 756}
    names |= {"NVIDIA H100 80GB HBM3": 989, "NVIDIA L40S": 362, "NVIDIA L4": 121, "Tesla T4": 0}
    for name, peak in names.items():
        assert next((v for k, v in machine.PEAKS.items() if k in name), 0.0) == peak * 1e12, name
