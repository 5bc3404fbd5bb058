"""checkpoint.py: bitwise round trips, atomicity under kill, rotation, and one clear line for every kind of damage."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import checkpoint
import configurator
import optim
from model import build
from train import Config

TINY = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32, "d_ff": 48, "vocab_size": 100, "max_steps": 9}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def make(seed=1, **change):
    cfg = Config(**TINY | {"seed": seed, "ffn": "polyglu"} | change)
    model = build(cfg)
    return cfg, model, optim.build_optimizer(model, cfg)


def train(model, optimizer, steps):
    """Steps whose data comes from the global generators, so that a resume must restore them."""
    for _ in range(steps):
        ids = (torch.randint(0, 100, (24,)) + np.random.randint(100) + random.randrange(100)) % 100
        batch = {"ids": ids, "pos": torch.arange(24), "cu": torch.tensor([0, 24], dtype=torch.int32), "max_len": 24}
        model.nll(model(batch | {"rows": torch.zeros(1, dtype=torch.int64)}), ids.roll(-1))[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def save(run, step, trio, **more):
    cfg, model, optimizer = trio
    state = {"config": configurator.to_dict(cfg), "stream": {"at": step}, "tau": 0.25, "metrics": {"val/loss": 1.5}}
    return checkpoint.save(run, step, model, optimizer, state, **{"keep": 2} | more)


def names(run):
    return sorted(p.name for p in Path(run).glob("step-*"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_bitwise(tmp_path, optimizer):
    _, straight, opt = trio = make(optimizer=optimizer)
    random.seed(3)
    random.gauss(0, 1)  # leaves a cached second value, which is part of the state
    train(straight, opt, 3)
    save(tmp_path, 3, trio)
    train(straight, opt, 3)
    after = (torch.rand(2), np.random.rand(2), random.random(), random.gauss(0, 1))

    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    _, resumed, opt2 = make(optimizer=optimizer)
    train(resumed, opt2, 1)  # other weights and moments, to be replaced
    state = checkpoint.load_training(tmp_path, resumed, opt2)
    assert state["step"] == 3 and state["stream"] == {"at": 3} and state["tau"] == 0.25
    train(resumed, opt2, 3)
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        for kind, value in opt.state[a].items():
            assert torch.equal(value, opt2.state[b][kind]), (name, kind)
    assert torch.equal(after[0], torch.rand(2)) and (after[1] == np.random.rand(2)).all()
    assert after[2:] == (random.random(), random.gauss(0, 1))


@pytest.mark.parametrize("change", [{}, {"tie": False}, {"arch": "encdec", "ffn": "swiglu"}, {"arch": "encoder"}, {"embed_rank": 8}])
def test_load_builds_the_same_model(tmp_path, change):
    trio = make(**change)
    save(tmp_path, 5, trio)
    model, state = checkpoint.load(tmp_path)
    assert not model.training and state["step"] == 5 and state["metrics"] == {"val/loss": 1.5} and float(model.tau) == 0.25
    assert all(torch.equal(a, b) for a, b in zip(trio[1].parameters(), model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
    stored = load_file(tmp_path / "step-000005" / "model.safetensors")
    assert len(stored) == len({id(p) for p in trio[1].parameters()}) and len(stored["embed.weight"]) == 128  # tied once, padded as it is
    assert not any("inv_freq" in name for name in stored)


def test_files_of_a_step_are_plain(tmp_path):
    trio = make()
    train(*trio[1:], 1)
    size = save(tmp_path, 1, trio, metric=0.5, is_best=True)
    folder = tmp_path / "step-000001"
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "optim.safetensors", "state.json"]
    assert size == sum(p.stat().st_size for p in folder.iterdir())
    assert json.loads((folder / "state.json").read_text())["config"]["n_layer"] == 2
    with safe_open(folder / "optim.safetensors", "pt") as file:
        assert "embed.weight.exp_avg" in file.keys() and "embed.weight.step" in file.keys()
    for link in ("latest", "best"):
        assert os.readlink(tmp_path / link) == "step-000001"
    assert not list(tmp_path.glob(".tmp*"))


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    trio = make()
    for step, best in ((2, False), (10, True), (9, False)):
        save(tmp_path, step, trio, is_best=best, metric=float(step))
    assert names(tmp_path) == ["step-000002", "step-000009"]  # 9 after 10: a resume from an older step abandons what came later
    assert not (tmp_path / "best").is_symlink()
    save(tmp_path, 11, trio, is_best=True)
    for step in (12, 100, 1000):
        save(tmp_path, step, trio)
        os.utime(tmp_path / "step-000011")  # the order is by number, whatever the clock says
    assert names(tmp_path) == ["step-000011", "step-000100", "step-001000"]
    save(tmp_path, 1_000_000, trio, keep=1)
    assert names(tmp_path) == ["step-000011", "step-1000000"]
    assert [h["step"] for h in json.loads((tmp_path / "history.json").read_text())] == [2, 9, 11, 12, 100, 1000, 1_000_000]
    assert json.loads((tmp_path / "history.json").read_text())[2]["best"] is True


def test_saving_a_step_again_replaces_it(tmp_path):
    trio = make()
    save(tmp_path, 1, trio)
    train(*trio[1:], 1)
    save(tmp_path, 1, trio)
    assert torch.equal(checkpoint.load(tmp_path)[0].embed.weight, trio[1].embed.weight) and names(tmp_path) == ["step-000001"]
    assert not list(tmp_path.glob(".tmp*"))


def test_resolve(tmp_path, dies):
    trio = make()
    dies(lambda: checkpoint.resolve(tmp_path / "none"), "no checkpoint")
    save(tmp_path, 1, trio)
    dies(lambda: checkpoint.resolve(tmp_path, "best"), "best")
    assert checkpoint.resolve(tmp_path).name == "step-000001"
    save(tmp_path, 2, trio, is_best=True)
    save(tmp_path, 3, trio)
    assert checkpoint.resolve(tmp_path).name == checkpoint.resolve(tmp_path, "best").name == "step-000002"
    assert checkpoint.resolve(tmp_path, "latest").name == "step-000003"
    assert checkpoint.resolve(tmp_path / "step-000003", "best").name == "step-000003"
    wide = make(vocab_size=101)  # as many rows in memory, another softmax
    dies(lambda: checkpoint.load_training(tmp_path, *wide[1:]), "vocab_size 100 -> 101")
    shutil.copytree(tmp_path, copy := tmp_path / "copy")  # scp -r and others make folders of links
    assert checkpoint.load(copy)[1]["step"] == 2 and checkpoint.read_state(checkpoint.find_resume(copy, "latest"))["step"] == 3
    save(copy, 4, trio, is_best=True)
    assert os.readlink(copy / "latest") == os.readlink(copy / "best") == "step-000004"
    (tmp_path / "best").unlink()
    (tmp_path / "latest").unlink()  # links are a convenience: the newest step is still found
    assert checkpoint.resolve(tmp_path).name == "step-000003"


def test_find_resume(tmp_path, dies):
    run = tmp_path / "run"
    assert checkpoint.find_resume(run, "") is None and checkpoint.find_resume(run, "auto") is None
    dies(lambda: checkpoint.find_resume(run, "latest"), "no checkpoint")
    trio = make()
    save(run, 1, trio, is_best=True)
    save(run, 2, trio)
    dies(lambda: checkpoint.find_resume(run, ""), "--resume", "--out")
    assert checkpoint.find_resume(run, "auto").name == checkpoint.find_resume(run, "latest").name == "step-000002"
    assert checkpoint.find_resume(run, "best").name == "step-000001"
    assert checkpoint.find_resume(tmp_path / "other", str(run / "step-000001")).name == "step-000001"
    assert checkpoint.find_resume(tmp_path / "other", str(run)).name == "step-000002"
    save(tmp_path / "other", 9, trio)  # its checkpoints are later than those of `run`: rotation would delete them
    dies(lambda: checkpoint.find_resume(run, "latests"), "--resume=latests", "latest")
    dies(lambda: checkpoint.resolve(tmp_path / "none"), "none: no checkpoint here", "the top of the config")
    for how in (run, run / "step-000001", run / "best"):
        dies(lambda how=how: checkpoint.find_resume(tmp_path / "other", str(how)), f"--resume={how}", "another run", "--out")
    assert checkpoint.find_resume(run, str(run / "best")).name == "best" and names(tmp_path / "other") == ["step-000009"]


@pytest.mark.parametrize("file", ["model.safetensors", "optim.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_one_line(tmp_path, dies, file, harm):
    trio = make()
    train(*trio[1:], 1)
    save(tmp_path, 1, trio)
    folder = tmp_path / "step-000001"
    data = bytearray((folder / file).read_bytes())
    if harm == "flip":
        at = data.index(b'"tau": 0.25') + 7 if file == "state.json" else len(data) - 5
        data[at] ^= 1
    (folder / file).write_bytes(data if harm == "flip" else data[: len(data) // 2])
    if harm == "remove":
        (folder / file).unlink()
    dies(lambda: checkpoint.load_training(folder, *trio[1:]), file if (file, harm) != ("state.json", "remove") else "no checkpoint")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layer": 3}, ["n_layer=3, but ", " has n_layer=2: set --n_layer=2, or choose another --"]),
        ({"n_layer": 1, "d_ff": 64}, ["n_layer=1, d_ff=64, but ", " has n_layer=2, d_ff=48: set --n_layer=2 --d_ff=48, or"]),
        ({"d_ff": 64}, ["d_ff=64, but"]),
        ({"arch": "encoder"}, ["arch=encoder, but"]),
        ({"optimizer": "muon"}, ["AdamW", "--optimizer"]),
    ],
)
def test_another_architecture_is_one_line(tmp_path, dies, change, words):
    trio = make()
    save(tmp_path, 1, trio)
    _, model, optimizer = make(**change)
    before = [p.clone() for p in model.parameters()]
    dies(lambda: checkpoint.load_training(tmp_path, model, optimizer), *words)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if "optimizer" not in change:
        dies(lambda: checkpoint.load_weights(tmp_path, model), *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate": "token"}, ["gate running -> token"]),
        ({"rope_bf16": True, "norm_eps": 1e-5}, ["norm_eps 1e-06 -> 1e-05, rope_bf16 False -> True"]),
        ({"rope_scaling": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
         ["rope_scaling None -> {'factor': 2.0"]),
        ({"acts": ("relu", "tanh", "silu", "silu")}, ["acts ['relu', 'tanh', 'silu', 'gelu'] -> "]),
    ],
)  # fmt: skip
def test_the_same_tensors_as_another_function_are_never_taken_silently(tmp_path, dies, change, words):
    trio = make()
    save(tmp_path, 1, trio)
    _, model, optimizer = make(**change, lr=3e-4, act="gelu", seed=2)  # what changes no function of this model is nobody's business
    before = model.embed.weight.clone()
    dies(lambda: checkpoint.load_training(tmp_path, model, optimizer), *words, "--init_from")
    assert torch.equal(before, model.embed.weight)
    assert words[0] in checkpoint.load_weights(tmp_path, model) and torch.equal(trio[1].embed.weight, model.embed.weight)
    assert checkpoint.load_weights(tmp_path, make()[1]) == f"started from step 1 of {tmp_path}"


def test_a_setting_of_your_own_counts_unless_it_is_said_to_change_no_function(monkeypatch):
    more = make_dataclass("More", [("softcap", float, 0.0)], bases=(checkpoint.ModelConfig,), frozen=True)
    monkeypatch.setattr(checkpoint, "ModelConfig", more)
    there = {"config": dict.fromkeys(more.__dataclass_fields__, "another")}
    always = {"vocab_size", "n_head", "norm_eps", "rope_theta", "rope_scaling", "rope_bf16", "cross_rope", "eos_id", "softcap"}
    for ffn, its_own in (("swiglu", {"act"}), ("polyglu", {"acts", "gate", "gate_enc", "gate_block"})):
        assert {key for key, *_ in checkpoint.differing(there, more(ffn=ffn))} == always | its_own
    assert checkpoint.differing({"config": {}}, more(softcap=30.0)) == []  # older than the setting


def test_init_from_takes_weights_only(tmp_path):
    trio = make()
    train(*trio[1:], 1)
    save(tmp_path, 1, trio)
    _, model, optimizer = make(seed=7)
    state = torch.get_rng_state()
    checkpoint.load_weights(tmp_path, model)
    assert all(torch.equal(a, b) for a, b in zip(trio[1].parameters(), model.parameters(), strict=True))
    assert not optimizer.state and torch.equal(state, torch.get_rng_state())


def test_two_processes_on_one_run_are_refused(tmp_path, dies):
    held = checkpoint.lock(tmp_path)
    dies(lambda: checkpoint.lock(tmp_path), str(os.getpid()), "--out")
    dies(lambda: checkpoint.find_resume(tmp_path, "latest"), str(os.getpid()), "is training here")
    held.close()
    dies(lambda: checkpoint.find_resume(tmp_path, "latest"), "no checkpoint here")
    checkpoint.lock(tmp_path).close()


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, dies, monkeypatch):
    trio = make()
    save(tmp_path, 1, trio)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    dies(lambda: save(tmp_path, 2, trio), "No space left", "GB", "untouched")
    assert names(tmp_path) == ["step-000001"] and not list(tmp_path.glob(".tmp*"))
    checkpoint.load(tmp_path)


def test_kill_9_in_the_middle_of_a_save(tmp_path):
    """A child saves without end, keeping one; killed at several moments, the previous checkpoint always loads."""
    trio = make(n_head=2, n_kv_head=2, d_model=256, d_ff=512, vocab_size=2000)
    torn = 0
    for delay in (0.0, 0.003, 0.006, 0.009, 0.012, 0.02, 0.03, 0.04):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            for step in range(1, 10_000):
                os.write(writer, b"." if step > 2 else b"")
                save(tmp_path, step, trio, keep=1)
            os._exit(0)
        os.read(reader, 1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += bool(list(tmp_path.glob(".tmp-step*")))
        model, state = checkpoint.load(tmp_path)
        assert state["step"] >= 2 and torch.equal(model.embed.weight, trio[1].embed.weight)
        checkpoint.lock(tmp_path).close()
        os.close(reader), os.close(writer)
    assert torn  # at least one kill fell into a save


def test_what_only_the_first_rank_keeps_and_a_gpu_that_nobody_uses(monkeypatch):
    gathered = []
    shard = SimpleNamespace(detach=lambda: shard, full_tensor=lambda: gathered.append(1) or torch.ones(2))
    assert checkpoint.whole(shard, keep=False) is None and torch.equal(checkpoint.whole(shard), torch.ones(2)) and len(gathered) == 2
    text = checkpoint.random_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a run on its CPU must not take a context and memory there
    assert checkpoint.random_state() == text and "cuda" not in json.loads(text)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: 1 / 0)
    checkpoint.set_random_state(json.dumps(json.loads(text) | {"cuda": "00"}))


def test_start_run_makes_the_folder_stand_alone(tmp_path):
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "run").mkdir()
    cfg = Config(**TINY, data={"a": str(tmp_path / "data")})
    checkpoint.start_run(tmp_path / "run", cfg, {"torch": torch.__version__})
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert configurator.from_dict(Config, saved["config"]) == cfg and saved["torch"] == torch.__version__
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "arch, data, want", [("encdec", "data", "markers"), ("decoder", "data", "template"), ("encdec", "x.jsonl", "markers")]
)
def test_the_tokenizer_that_knows_more_is_kept(tmp_path, arch, data, want):
    """Modes and sentinels are in the one that an encoder-decoder starts from, a chat template in the data's, pairs in jsonl have none."""
    for folder, text in (("start", "markers"), ("data", "template")):
        (tmp_path / folder / "tokenizer").mkdir(parents=True)
        (tmp_path / folder / "tokenizer" / "tokenizer.json").write_text(text)
    (tmp_path / "start/step-000000").mkdir()
    (tmp_path / "start/step-000000/state.json").write_text("{}")
    (tmp_path / "run").mkdir()
    cfg = Config(**TINY | {"arch": arch}, data=str(tmp_path / data), init_from=str(tmp_path / "start"))
    checkpoint.start_run(tmp_path / "run", cfg, {})
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_text() == want


def test_an_exported_folder_is_told_from_a_run(tmp_path, dies):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    dies(lambda: checkpoint.resolve(tmp_path), "an exported folder")
