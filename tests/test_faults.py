"""Nothing is ever lost: kill -9 anywhere, signals, full disks, damaged files, numbers that are not finite. Every promise has its test.

    python -m pytest tests/test_faults.py                            about a minute
    KILLS=100 python -m pytest tests/test_faults.py -k kill_9        the long loop: 100 kills, half of them inside saves

Runs are real runs of train.py on a tiny model, in processes forked from one that has imported torch already.
"""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_data import write_shards

import checkpoint
import data
import tokenizer
import train

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(train.__file__).parent), str(Path(__file__).parent)])
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["train", "test_data", "torch.distributed.tensor", "torch._dynamo"])

TINY = {
    "n_layer": 1,
    "n_head": 2,
    "d_model": 32,
    "max_len": 32,
    "seq_len": 16,
    "tokens_per_step": 64,
    "max_steps": 12,
    "save_every": 2,
    "eval_every": 4,
    "eval_tokens": 128,
    "warmup": 2,
    "log_every": 1,
    "keep": 2,
    "dtype": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    dir, rng, tok = tmp_path_factory.mktemp("data") / "words", random.Random(0), tokenizer.load("bytes")
    tok.save(dir / "tokenizer")
    texts = ["".join(rng.choices("abc def", k=rng.randint(5, 60))) for _ in range(200)]
    docs = [tok.encode(text) + [tok.eos_id] for text in texts]
    for split, part in (("train", docs[:160]), ("val", docs[160:])):
        write_shards(dir, part, split, vocab=tok.vocab_size, eos=tok.eos_id, tokenizer=tok.fingerprint)
    return dir


def settings(out, shards, **keys):
    return [f"--{k}={v}" for k, v in (TINY | {"out": out, "data": shards} | keys).items()]


def child(argv, log, fault):
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if fault:
        fault[0](*fault[1:])
    train.command(argv)


def start(argv, log, *fault):
    process = forks.Process(target=child, args=(argv, str(log), fault))
    process.start()
    return process


def run(argv, log, *fault, code=0):
    """A whole run -> what it said."""
    process, before = start(argv, log, *fault), Path(log).stat().st_size if Path(log).exists() else 0
    process.join(120)
    said = Path(log).read_text()[before:]
    assert process.exitcode == code, (process.exitcode, said[-3000:])
    return said


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, "waited in vain"
        time.sleep(0.005)
    return found


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def outcome(out):
    """All that a run leaves behind, but for times: weights, optimizer, stream, losses, best."""
    step = checkpoint.resolve(out, "latest")
    state = json.loads((step / "state.json").read_text())
    drop = ("sha256_state", "sha256", "config", "train/tokens_per_sec", "train/wait", "train/peak_mem", "time", "bytes")
    clean = lambda rows: [{k: v for k, v in row.items() if k not in drop} for row in rows]  # noqa: E731
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    history = clean(json.loads((out / "history.json").read_text()))
    links = {name: os.readlink(out / name) for name in ("latest", "best")}
    folders = sorted(path.name for path in out.glob("step-*"))
    tensors = [
        hashlib.sha256(t.numpy().tobytes()).hexdigest() for file in checkpoint.FILES for _, t in sorted(load_file(step / file).items())
    ]
    return {"state": clean([state]), "metrics": clean(metrics), "history": history, "links": links, "folders": folders, "tensors": tensors}


def same(got, want):
    for key in want:
        assert got[key] == want[key], key
    return True


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    """The run that nothing ever happened to."""
    out = tmp_path_factory.mktemp("reference") / "run"
    run(settings(out, shards), out.parent / "log")
    return outcome(out)


# ---- kill -9 ------------------------------------------------------------------------------------------------------------


def kill_at_file_operation(out, number):
    """SIGKILL right before the number-th operation on a file of the run: between any two steps of a save, a rotation, a link."""
    seen = [0]

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.listdir") and args:
            if any(isinstance(a, (str, bytes, os.PathLike)) and os.fsdecode(a).startswith(str(out)) for a in args[:2]):
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_kill_9_anywhere_loses_nothing(shards, reference, tmp_path):
    rng, kills, chain, newest = random.Random(time.time_ns() if "KILLS" in os.environ else 0), 0, 0, -1
    wanted = int(os.environ.get("KILLS", 16))
    while kills < wanted or newest >= 0:
        out, log = tmp_path / f"run{chain}", tmp_path / f"log{chain}"
        argv = settings(out, shards, resume="auto")
        if kills >= wanted:
            process = start(argv, log)
        elif rng.random() < 0.5:
            process = start(argv, log, kill_at_file_operation, out, rng.randint(1, 250))
        else:
            process = start(argv, log)
            process.join(rng.uniform(0.02, 1.0))
            process.kill()
        process.join(120)
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            found = checkpoint.steps(out)
            if found or newest >= 0:
                step = checkpoint.resolve(out, "latest")
                checkpoint.load(step)  # whole, by its hashes
                assert int(step.name[5:]) >= newest
                newest = int(step.name[5:])
            continue
        assert process.exitcode == 0, log.read_text()[-3000:]
        assert same(outcome(out), reference), f"after {kills} kills"
        assert not list(out.glob(".tmp-step*"))
        shutil.rmtree(out)
        chain, newest = chain + 1, -1
    print(f"{kills} kills, {chain} runs finished, each equal to the bit")


def test_every_file_operation_of_a_save_may_be_the_last(shards, reference, tmp_path):
    """Not at random: one kill at each operation between the second save and the third, always resumed and finished."""
    if "KILLS" not in os.environ:
        pytest.skip("part of the long loop: set KILLS")
    count, number = 0, 1
    while True:
        out, log = tmp_path / f"run{number}", tmp_path / "log"
        process = start(settings(out, shards), log, kill_at_file_operation, out, number)
        process.join(60)
        if process.exitcode == 0:
            break
        run(settings(out, shards, resume="auto"), log)
        same(outcome(out), reference)
        shutil.rmtree(out)
        number, count = number + 1, count + 1
    assert count > 50
