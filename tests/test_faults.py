"""Nothing is ever lost: kill -9 anywhere, signals, full disks, damaged files, numbers that are not finite. Every promise has its test.

    python -m pytest tests/test_faults.py                   about a minute
    KILLS=100 python -m pytest tests/test_faults.py         the long loop: 100 kills, one at every file operation, 10,000 steps

Runs are real runs of train.py on a tiny model, in processes forked from one that has imported torch already.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_data import write_shards

import checkpoint
import configurator
import data
import hub
import optim
import tokenizer
import train
from model import build
from prepare import text as text_job

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(train.__file__).parent), str(Path(__file__).parent)])
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["train", "test_data", "prepare.text", "torch.distributed.tensor", "torch._dynamo"])

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
    try:
        train.main(argv)
    except OSError:
        sys.excepthook(*sys.exc_info())  # as at the end of a program


def start(argv, log, *fault):
    process = forks.Process(target=child, args=(argv, str(log), fault))
    process.start()
    return process


def run(argv, log, *fault, code=0):
    """A whole run -> what it said."""
    process, before = start(argv, log, *fault), Path(log).stat().st_size if Path(log).exists() else 0
    process.join(400)
    said = Path(log).read_text()[before:]
    assert process.exitcode == code, (process.exitcode, said[-3000:])
    return said


def wait_for(condition, seconds=240):
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
    folders = sorted(path.name for path in out.glob("step-*")) + [digest(path) for path in sorted(out.glob("tokenizer/*"))]
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


CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.listdir")


def kill_at_file_operation(out, number, power_cut=False):
    """SIGKILL right before the number-th operation on a file of the run: between any two steps of a save, a rotation, a link.
    A power cut leaves no more than a file system promises, see `Disk`."""
    seen, disk = [0], Disk(out) if power_cut else None

    def hook(event, args):
        if event in CHANGES and any(path.startswith(str(out)) for path in paths(event, args)):
            seen[0] += 1
            if seen[0] == number:
                if disk:
                    disk.cut(random.Random(number))
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def paths(event, args):
    """What an operation names, also where it names it relative to an open folder, as shutil.rmtree does."""
    if event in ("os.remove", "os.rmdir") and args[1] != -1:
        return [os.readlink(f"/proc/self/fd/{args[1]}") + "/" + os.fsdecode(args[0])]
    return [os.fsdecode(a) for a in args[:2] if isinstance(a, (str, bytes, os.PathLike))]


class Disk:
    """What a power cut leaves: of a file what it held when it was last synced, of a folder the names it held when it was last synced.
    Everything else may be there or not: half of the cuts lose all of it, the others what chance decides, folder by folder."""

    def __init__(self, out):
        self.out, self.store = str(out), f"{out}.disk"  # links in the store keep what is deleted, and its inode number
        self.sizes, self.names, self.held = {}, {}, []
        os.makedirs(self.store, exist_ok=True)
        self.known = os.path.isdir(out)
        for folder, _, files in os.walk(out):
            for name in files:
                self.synced(os.path.join(folder, name))
            self.synced(folder)
        plain = os.fsync
        os.fsync = lambda handle: (plain(handle), self.synced(os.readlink(f"/proc/self/fd/{handle}")))

    def keep(self, path, ino):
        if not os.path.exists(f"{self.store}/{ino}"):
            os.link(path, f"{self.store}/{ino}")

    def synced(self, path):
        if path == os.path.dirname(self.out):
            self.known = os.path.isdir(self.out)
        if not path.startswith(self.out) or os.path.islink(path):
            return
        ino = os.stat(path).st_ino
        if os.path.isdir(path):
            self.names[ino] = self.list(path)
            self.held.append(os.open(path, os.O_PATH))  # while it is open no other folder gets its number
        else:
            self.keep(path, ino)
            self.sizes[ino] = os.path.getsize(path)

    def list(self, path):
        """{name: (kind, inode or target of the link)} of a folder; its files are kept."""
        found = {}
        for entry in os.scandir(path):
            kind = "link" if entry.is_symlink() else "folder" if entry.is_dir() else "file"
            found[entry.name] = kind, os.readlink(entry.path) if kind == "link" else entry.inode()
            if kind == "file":
                self.keep(entry.path, entry.inode())
        return found

    def cut(self, rng):
        """Rebuild the folder as the disk has it."""
        self.rng, self.all = rng, rng.random() < 0.5
        self.now = {os.stat(folder).st_ino: self.list(folder) for folder, _, _ in os.walk(self.out)} if os.path.isdir(self.out) else {}
        if self.now:
            new, root = self.out + ".cut", os.stat(self.out).st_ino
            if self.known or not self.lost():
                self.rebuild(root, new)
            os.rename(self.out, f"{self.store}/old")
            if os.path.isdir(new):
                os.rename(new, self.out)
        shutil.rmtree(self.store)

    def lost(self):
        return self.all or self.rng.random() < 0.5

    def rebuild(self, ino, new):
        os.mkdir(new)
        at_last_sync, now = self.names.get(ino, {}), self.now.get(ino)
        for name, (kind, what) in (at_last_sync if now is None or self.lost() else now).items():
            if kind == "link":
                os.symlink(what, f"{new}/{name}")
            elif kind == "folder":
                self.rebuild(what, f"{new}/{name}")
            else:
                size, safe = os.path.getsize(f"{self.store}/{what}"), self.sizes.get(what, 0)
                shutil.copyfile(f"{self.store}/{what}", f"{new}/{name}")
                os.truncate(f"{new}/{name}", safe if self.lost() or size <= safe else self.rng.randint(safe, size))


def test_kill_9_anywhere_loses_nothing(shards, reference, tmp_path, record_property):
    rng, kills, chain, newest = random.Random(time.time_ns() if "KILLS" in os.environ else 0), 0, 0, -1
    wanted = int(os.environ.get("KILLS", 16))
    while kills < wanted or newest >= 0:
        out, log = tmp_path / f"run{chain}", tmp_path / f"log{chain}"
        argv = settings(out, shards, resume="auto")
        if kills >= wanted:
            process = start(argv, log)
        elif rng.random() < 0.5:
            process = start(argv, log, kill_at_file_operation, out, rng.randint(1, 250), rng.random() < 0.5)
        else:
            process = start(argv, log)
            process.join(rng.uniform(0.02, 1.0))
            process.kill()
        process.join(400)
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
    record_property("figure", f"training: {kills} kills, {chain} runs finished, each equal to the bit")


def test_every_file_operation_of_a_save_may_be_the_last(shards, reference, tmp_path, record_property):
    """Not at random: one kill at each operation between the second save and the third, always resumed and finished."""
    if "KILLS" not in os.environ:
        pytest.skip("part of the long loop: set KILLS")
    count, number = 0, 1
    while True:
        out, log = tmp_path / f"run{number}", tmp_path / "log"
        process = start(settings(out, shards), log, kill_at_file_operation, out, number, number % 2)
        process.join(240)
        if process.exitcode == 0:
            break
        run(settings(out, shards, resume="auto"), log)
        same(outcome(out), reference)
        shutil.rmtree(out)
        number, count = number + 1, count + 1
    assert count > 50
    record_property("figure", f"training: killed at each of {count} file operations, every run equal to the bit")


def prepare_child(argv, log, note_every, *fault):
    os.dup2(handle := os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(handle, 2)
    text_job.shards.CHUNK = text_job.sources.CHUNK = 3000
    text_job.shards.NOTE_EVERY = note_every
    if fault:
        fault[0](*fault[1:])
    text_job.main(argv)


def test_shards_are_the_same_bytes_after_kills_and_power_cuts(tmp_path, record_property):
    """Right before any operation on a file, or at any time; alone, or as one part of two. The same command goes on to the same bytes."""
    rng, wanted, kills, jobs = random.Random(3), int(os.environ.get("KILLS", 12)), 0, 0
    lines = [json.dumps({"text": "".join(rng.choices("abc déf", k=rng.randint(5, 90)))}) for _ in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    argv = [f"--from={tmp_path}/a.jsonl", "--val=0.1", "--shard_tokens=9000", "--tokenizer=bytes"]
    content = lambda out: {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}  # noqa: E731
    log = str(tmp_path / "log")

    def start_job(out, part, *fault):
        more = [f"--out={out}", f"--workers={rng.choice([1, 1, 1, 2])}", f"--part={part}"]
        process = forks.Process(target=prepare_child, args=(argv + more, log, rng.choice([0, 0.05, 2]), *fault))
        process.start()
        return process

    start_job(tmp_path / "whole", "0/1").join()
    want = content(tmp_path / "whole")
    while kills < wanted:
        out, todo, jobs = tmp_path / f"out{jobs}", rng.choice([["0/1"], ["0/2", "1/2"]]), jobs + 1
        while todo:
            fault = (kill_at_file_operation, out, rng.randint(1, 120), rng.random() < 0.5) if rng.random() < 0.8 and kills < wanted else ()
            process = start_job(out, todo[0], *fault)
            if not fault and kills < wanted:
                process.join(rng.uniform(0.1, 1.0))
                process.kill()
            process.join(240)
            assert process.exitcode in (0, -signal.SIGKILL), Path(log).read_text()[-3000:]
            kills += process.exitcode != 0
            todo = todo[process.exitcode == 0 :]
            if not out.exists():  # a power cut before the folder's own name was safe: every part of it is to be done again
                todo = sorted({*todo, "0/2"} if "1/2" in todo else todo)
        assert content(out) == want, f"after {kills} kills"
        shutil.rmtree(out)
    record_property("figure", f"preparing: {kills} kills, {jobs} data sets finished, each equal to the byte")


# ---- signals -------------------------------------------------------------------------------------------------------------


def rows(out):
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_within_a_step_and_stops(shards, tmp_path, name):
    out, log = tmp_path / "run", tmp_path / "log"
    keys = {"max_steps": 100_000, "save_every": 0, "eval_every": 0, "seq_len": 32}
    process = start(settings(out, shards, **keys), log)
    wait_for(lambda: len(rows(out)) > 3)
    seen = rows(out)[-1]["step"]
    os.kill(process.pid, getattr(signal, name))
    process.join(240)
    assert process.exitcode == 0
    step = checkpoint.read_state(checkpoint.resolve(out, "latest"))
    assert seen <= step["step"] == step["stream"]["step"] == rows(out)[-1]["step"]
    assert "stopped by a signal" in log.read_text() and len(checkpoint.steps(out)) == 1


def test_a_stopped_run_goes_on_to_the_same_end(shards, reference, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    run(settings(out, shards), log, signal_at_step, 5)
    assert checkpoint.read_state(checkpoint.resolve(out, "latest"))["step"] == 5
    run(settings(out, shards, resume="latest"), log)
    got = outcome(out)
    got["history"] = [row for row in got["history"] if row["step"] != 5]
    assert same(got, reference)


def test_equal_runs_leave_equal_files(shards, tmp_path):
    """Byte for byte, the optimizer's file and the state with its random numbers included; only logs tell the time."""
    for name in ("a", "b"):
        run(settings(tmp_path / "run", shards, max_steps=4), tmp_path / "log")
        (tmp_path / "run").rename(tmp_path / name)
    files = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("step-*/*")}
    assert len(files) == 3 * 2
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def signal_at_step(step):
    """SIGTERM while the step-th step is computed."""
    plain, seen = train.token_sums, [0]

    def token_sums(*args):
        seen[0] += 1
        if seen[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    train.token_sums = token_sums


# ---- numbers that are not finite ------------------------------------------------------------------------------------------


def poison(kind, *at):
    """Spoil the steps `at` (counted from 1): the loss, a gradient, or a weight."""
    plain, seen = train.token_sums, [int(os.environ.get("FIRST_STEP", 0))]

    def token_sums(model, raw, batch):
        seen[0] += 1
        if seen[0] in at and kind == "weight":
            with torch.no_grad():
                raw.decoder.blocks[0].ffn.down.weight[3, 3] = float("nan")
        sums, each = plain(model, raw, batch)
        if seen[0] in at and kind == "loss":
            return {"loss": sums["loss"] * float("nan")}, each * float("nan")
        if seen[0] in at and kind == "gradient":
            raw.decoder.blocks[0].attn.out.weight.register_hook(lambda g: g * float("nan"))
        if seen[0] in at and kind.startswith("times"):
            return {"loss": sums["loss"] * float(kind[5:])}, each
        return sums, each

    train.token_sums = token_sums


@pytest.mark.parametrize(
    "kind, words",
    [
        ("loss", ["term loss", "data from words"]),
        ("gradient", ["gradient of decoder.blocks.0.attn.out"]),
        ("weight", ["weight decoder.blocks.0.ffn"]),
    ],
)
def test_what_is_not_finite_stops_before_the_step_and_is_named(shards, tmp_path, kind, words):
    out, log = tmp_path / "run", tmp_path / "log"
    said = run(settings(out, shards), log, poison, kind, 5, code=2)
    line = said.splitlines()[-1]
    assert "step 4: not finite" in line and all(word in line for word in words) and "Traceback" not in said
    model, state = checkpoint.load(out)
    assert state["step"] == 4 and all(torch.isfinite(p).all() for p in model.parameters())


def test_a_damaged_weight_is_not_skipped(shards, tmp_path):
    said = run(settings(tmp_path / "run", shards, on_nonfinite="skip"), tmp_path / "log", poison, "weight", 5, code=2)
    assert "weight decoder.blocks.0.ffn.down" in said.splitlines()[-1]


def test_an_exploding_gradient_is_clipped_and_one_beyond_fp32_is_caught(shards, tmp_path):
    assert "done: 12 steps" in run(settings(tmp_path / "a", shards), tmp_path / "log", poison, "times1e9", 5)
    said = run(settings(tmp_path / "b", shards), tmp_path / "log", poison, "times1e30", 5, code=2)
    assert "step 4: not finite: the norm of the gradients" in said.splitlines()[-1]
    assert "done: 12 steps" in run(settings(tmp_path / "c", shards, on_nonfinite="skip"), tmp_path / "log", poison, "times1e30", 5)


def test_skipped_steps_are_counted_and_reproduced_by_resume(shards, tmp_path):
    keys, log = {"on_nonfinite": "skip"}, tmp_path / "log"
    said = run(settings(tmp_path / "a", shards, **keys), log, poison, "loss", 3, 7)
    assert "2 so far" in said
    whole = outcome(tmp_path / "a")
    assert whole["state"][0]["skipped"] == 2 and whole["metrics"][-2]["train/skipped"] == 2
    process = start(settings(tmp_path / "b", shards, **keys), log, poison, "loss", 3, 7)
    wait_for(lambda: (tmp_path / "b" / "step-000004").exists())
    process.kill()
    process.join()
    first = checkpoint.read_state(checkpoint.resolve(tmp_path / "b", "latest"))["step"]
    run(settings(tmp_path / "b", shards, resume="latest", **keys), log, poison, "loss", *(n - first for n in (3, 7) if n > first))
    assert same(outcome(tmp_path / "b"), whole)
    assert all(torch.isfinite(torch.tensor(list(v for v in row.values() if isinstance(v, float)))).all() for row in whole["metrics"])


# ---- the disk and the folder ------------------------------------------------------------------------------------------------


def test_two_processes_on_one_folder_are_refused(shards, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    first = start(settings(out, shards, max_steps=100_000, eval_every=0), log)
    wait_for(lambda: len(rows(out)) > 1)
    for resume in ("auto", "latest"):
        said = run(settings(out, shards, resume=resume), tmp_path / "other", code=2)
        assert f"process {first.pid} is training here" in said.splitlines()[-1] and "Traceback" not in said
    first.kill()
    first.join()
    run(settings(out, shards, resume="latest", max_steps=rows(out)[-1]["step"] + 10, save_every=1000), log)  # the lock died with it


def full_disk(function, number):
    """The number-th call of os.FUNCTION finds the disk full."""
    plain, seen = getattr(os, function), [0]

    def fails(*args, **keys):
        seen[0] += 1
        if seen[0] >= number:
            raise OSError(28, os.strerror(28), str(args[0]))
        return plain(*args, **keys)

    setattr(os, function, fails)


@pytest.mark.parametrize("function, number", [("fsync", 20), ("replace", 9), ("symlink", 3)])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(shards, reference, tmp_path, function, number):
    out, log = tmp_path / "run", tmp_path / "log"
    said = run(settings(out, shards), log, full_disk, function, number, code=2)
    assert "No space left" in said.splitlines()[-1] and "Traceback" not in said
    checkpoint.load(out)
    run(settings(out, shards, resume="latest"), log)
    assert same(outcome(out), reference)


def small_disk(tmp_path, size, options=""):
    """A real file system of so many bytes, where we may mount one."""
    tmp_path.mkdir()
    if os.system(f"mount -t tmpfs -o size={size}{options} tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("mounting is not allowed here")
    return tmp_path


def test_a_really_full_disk(shards, tmp_path):
    disk, log = small_disk(tmp_path / "disk", 1 << 20), tmp_path / "log"
    try:
        said = run(settings(disk / "run", shards, keep=3, d_model=64, max_steps=60), log, code=2)
        assert "No space left" in said.splitlines()[-1] and "Traceback" not in said
        checkpoint.load(disk / "run")
    finally:
        os.system(f"umount {disk}")


def test_a_folder_that_cannot_be_written(shards, tmp_path):
    disk, log = small_disk(tmp_path / "disk", 1 << 20, ",ro"), tmp_path / "log"
    try:
        said = run(settings(disk / "run", shards), log, code=2)
        assert "Read-only file system" in said.splitlines()[-1] and "Traceback" not in said
    finally:
        os.system(f"umount {disk}")
    (tmp_path / "file").write_text("")
    said = run(settings(tmp_path / "file" / "run", shards), log, code=2)
    assert "Not a directory" in said.splitlines()[-1]


# ---- several processes ------------------------------------------------------------------------------------------------------


def rank_child(rank, world, port, *rest):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    child(*rest)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(world, argv, log, *fault, only=None):
    """What torchrun starts, without its ten seconds. `only`: the rank that the fault befalls."""
    port = free_port()
    faults = [fault if only in (None, rank) else () for rank in range(world)]
    ranks = [forks.Process(target=rank_child, args=(rank, world, port, argv, f"{log}{rank}", faults[rank])) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def join_ranks(ranks, log, code=0):
    for process in ranks:
        process.join(400)
    said = [Path(f"{log}{rank}").read_text() for rank in range(len(ranks))]
    assert [process.exitcode for process in ranks] == [code] * len(ranks), "\n".join(text[-2000:] for text in said)
    return said


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Most of it is not trained, in long stretches: micro-batches, ranks and whole steps without a single target."""
    dir, rng, tok = tmp_path_factory.mktemp("data") / "uneven", random.Random(1), tokenizer.load("bytes")
    tok.save(dir / "tokenizer")
    for split, n in (("train", 150), ("val", 40)):
        docs = [[ord(c) for c in rng.choices("abc def", k=rng.randint(5, 70))] + [tok.eos_id] for _ in range(n)]
        if split == "train":
            docs = [[i | 1 << 31 for i in doc] if rng.random() < 0.7 else doc for doc in docs]
        write_shards(dir, docs, split, vocab=tok.vocab_size, eos=tok.eos_id, tokenizer=tok.fingerprint)
    return dir


def close(a, b, tolerance):
    """Two runs agree: the loss of every step, the held-out losses, every weight."""
    for x, y in zip(rows(a), rows(b), strict=True):
        assert x["step"] == y["step"]
        for key in x:
            if "loss" in key:
                assert abs(x[key] - y[key]) <= tolerance * max(1, abs(y[key])), (x["step"], key, x[key], y[key])
    (first, one), (second, two) = checkpoint.load(a), checkpoint.load(b)
    assert one["stream"] == two["stream"] and one["tokens"] == two["tokens"]
    for (name, p), q in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=10 * tolerance), (name, (p - q).abs().max())
    return True


@pytest.mark.parametrize("parallel, ffn", [("ddp", "swiglu"), ("fsdp", "swiglu"), ("fsdp", "polyglu")])
def test_two_ranks_equal_one_process_though_their_tokens_are_unequal(uneven, tmp_path, parallel, ffn):
    # sgd-like settings: a large eps, so that rounding in a gradient near 0 is not blown up to a step of size lr
    keys = {"ffn": ffn, "eps": 1e-3, "micro_tokens": 16, "packing": "windows", "max_steps": 14}
    run(settings(tmp_path / "one", uneven, **keys), tmp_path / "log")
    ranks = start_ranks(2, settings(tmp_path / "two", uneven, parallel=parallel, **keys), tmp_path / "log")
    join_ranks(ranks, tmp_path / "log")
    assert close(tmp_path / "two", tmp_path / "one", 2e-5)
    if (parallel, ffn) == ("ddp", "swiglu"):
        cfg, _ = configurator.load(train.Config, settings("unused", uneven, **keys))
        steps = [[int((b["targets"] >= 0).sum()) for b in micros] for micros in data.open_stream(cfg, optim.Plan(cfg), log=lambda _: 0)]
        per_rank = [(sum(counts[0::2]), sum(counts[1::2])) for counts in steps]
        assert any(a == 0 != b for a, b in per_rank) and any(a != 0 == b for a, b in per_rank) and any(a != b for a, b in per_rank)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_ranks(shards, tmp_path, parallel):
    keys = {"eps": 1e-3, "micro_tokens": 16, "keep": 9, "parallel": parallel}
    run(settings(tmp_path / "one", shards, **keys), tmp_path / "log")
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=True)
    argv = settings(tmp_path / "two", shards, **keys)
    join_ranks(start_ranks(2, argv + [f"--resume={tmp_path}/two/step-000004"], tmp_path / "log"), tmp_path / "log")
    assert close(tmp_path / "two", tmp_path / "one", 2e-5)
    run(argv + [f"--resume={tmp_path}/two/step-000008"], tmp_path / "log")
    assert close(tmp_path / "two", tmp_path / "one", 2e-5)


def test_a_signal_to_one_rank_stops_all_of_them_at_one_step(shards, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(2, settings(out, shards, max_steps=100_000, save_every=0, eval_every=0), log)
    wait_for(lambda: len(rows(out)) > 3)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    said = join_ranks(ranks, log)
    state = checkpoint.read_state(checkpoint.resolve(out, "latest"))
    assert state["step"] == state["stream"]["step"] == rows(out)[-1]["step"] and "stopped by a signal" in said[0]


def test_a_loss_that_is_not_finite_is_named_with_its_rank(shards, tmp_path):
    ranks = start_ranks(2, settings(tmp_path / "run", shards), tmp_path / "log", poison, "loss", 3, only=1)
    line = join_ranks(ranks, tmp_path / "log", code=2)[0].splitlines()[-1]
    assert "step 2: not finite: rank 1: term loss, data from words" in line
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 2


def test_torchrun_comes_back_after_a_killed_worker_and_stops_cleanly(shards, tmp_path):
    out = tmp_path / "run"
    argv = settings(out, shards, max_steps=100_000, save_every=20, eval_every=0, resume="auto")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=2",
        "--monitor-interval=0.2",
    ]
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen([*command, train.__file__, *argv], stdout=log, stderr=log, cwd=Path(train.__file__).parent)
    try:
        wait_for(lambda: len(checkpoint.steps(out)) > 1)
        first = int((out / ".lock").read_text())
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: "resumed from" in (tmp_path / "log").read_text())
        came_back = checkpoint.read_state(checkpoint.resolve(out, "latest"))["step"]
        wait_for(lambda: rows(out)[-1]["step"] > came_back + 5)
        agent.send_signal(signal.SIGTERM)
        agent.wait(240)
    finally:
        agent.kill()
    state, steps = checkpoint.read_state(checkpoint.resolve(out, "latest")), [row["step"] for row in rows(out)]
    assert steps == list(range(1, state["step"] + 1)), "each step is logged once, as if nothing had happened"
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.kill(int((out / ".lock").read_text()), 0), 10)


def agent(pids, *args):
    """A launcher whose workers outlive it, as torchrun's do."""
    workers = []
    for rank in range(2):
        if not (pid := os.fork()):
            rank_child(rank, *args[rank])
            os._exit(0)
        workers.append(pid)
    Path(pids).write_text(" ".join(map(str, workers)))
    time.sleep(600)


def test_ranks_whose_launcher_was_killed_save_and_leave(shards, tmp_path):
    out = tmp_path / "run"
    argv = settings(out, shards, max_steps=100_000, save_every=0, eval_every=0)
    port = free_port()
    launcher = forks.Process(target=agent, args=(str(tmp_path / "pids"), *[(2, port, argv, f"{tmp_path}/log{r}", ()) for r in range(2)]))
    launcher.start()
    wait_for(lambda: len(rows(out)) > 3)
    launcher.kill()
    wait_for(lambda: "stopped by a signal" in (tmp_path / "log0").read_text())
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_for(lambda: not any(alive(pid) for pid in workers))
    assert checkpoint.load(out)[1]["step"] == rows(out)[-1]["step"]


def alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


# ---- files from elsewhere -----------------------------------------------------------------------------------------------------


def refused(capsys, act):
    """-> what `act` gave, or None if it was refused in one line (a note on what was read before may stand above it)."""
    capsys.readouterr()
    try:
        return act()
    except SystemExit as stop:
        said = capsys.readouterr().err.splitlines()
        assert stop.code == 2 and said and len(said[-1]) < 700, said
    return None


def mutate(raw, rng):
    """Cut, flip, repeat, insert: bytes as a bad disk, a bad network or a bad neighbour leaves them."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(raw) + 1), rng.randrange(6)
        if kind == 0:
            del raw[at:]
        elif kind == 1 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            raw[at:at] = raw[: rng.randrange(64)]
        elif kind == 3:
            raw[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, (1 << 63).to_bytes(8, "little"), b"99999999", b'"NaN", 1'])
        elif kind == 4:
            del raw[at : at + rng.randrange(1, 9)]
        else:
            raw[at:at] = rng.choice([b"null", b"-1", b"1e999", b"[[[[", b'"\\u0000"', b"../../x", b"\xc3\x28", b"true"])
    return bytes(raw)


def read_everything(dir, cfg, plan):
    """A training stream and the held-out set; what comes out is well-formed."""
    stream = data.open_stream(cfg(dir), plan, log=lambda _: 0)
    for micros in stream:
        for batch in micros:
            cu, n = batch["cu"], len(batch["ids"])
            assert (
                cu[0] == 0 and cu[-1] == n and (cu.diff() > 0).all() and (0 <= batch["pos"]).all() and batch["pos"].max() < batch["max_len"]
            )
            assert 0 <= batch["ids"].min() and batch["ids"].max() < stream.shards[0].tokenizer["vocab_size"]
    data.Shards(dir, "val")
    return True


@pytest.mark.parametrize("file, rounds", [("manifest.json", 400), ("train-00001.idx", 150), ("train-00001.bin", 100)])
@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_shards_of_any_content_are_read_or_refused(shards, tmp_path, capsys, file, rounds, packing):
    dir, rng, kept = shutil.copytree(shards, tmp_path / "d"), random.Random(file), 0
    base = configurator.load(train.Config, settings("unused", shards, packing=packing, seq_len=128, max_len=128, tokens_per_step=2048))[0]
    cfg = lambda dir: dataclasses.replace(base, data=str(dir))  # noqa: E731
    plan, good = optim.Plan(base), (dir / file).read_bytes()
    for _ in range(rounds):
        (dir / file).write_bytes(mutate(good, rng))
        kept += bool(refused(capsys, lambda: read_everything(dir, cfg, plan)))
    assert kept < rounds
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_checkpoints_of_any_content_are_loaded_or_refused(shards, tmp_path, capsys):
    run(settings(tmp_path / "run", shards, max_steps=2), tmp_path / "log")
    step, rng = checkpoint.resolve(tmp_path / "run"), random.Random(0)
    for file in ("model.safetensors", "optim.safetensors", "state.json"):
        good = (step / file).read_bytes()
        for _ in range(60):
            bad = mutate(good, rng)
            (step / file).write_bytes(bad)
            model = build(checkpoint.load(step)[0].cfg) if file == "optim.safetensors" else None
            train_on = lambda: checkpoint.load_training(step, model, torch.optim.AdamW(model.parameters()))  # noqa: E731, B023
            act = train_on if model else lambda: checkpoint.load(step)
            assert refused(capsys, act) is None or bad == good or file == "state.json"
        (step / file).write_bytes(good)
    checkpoint.load(step)


def test_released_weights_of_any_content_are_imported_or_refused(shards, tmp_path, capsys):
    run(settings(tmp_path / "run", shards, max_steps=1, head_dim=16), tmp_path / "log")
    model, _ = checkpoint.load(tmp_path / "run")
    fields = hub.full_fields(model.cfg)
    (tmp_path / "hf").mkdir()
    save_file(hub.to_theirs(model.state_dict(), fields, hub.HF), tmp_path / "hf" / "model.safetensors")
    hub.write_json(tmp_path / "hf" / "config.json", hub.hf_config(fields, torch.float32, {}))
    rng, folder, values = (
        random.Random(0),
        tmp_path / "hf",
        [None, -1, 0, "x", [], {}, 1e999, True, 3.5, 1 << 40, {"rope_type": "llama3", "factor": "x"}],
    )
    capsys.readouterr()

    def act():
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        hub.main(["import", f"--from={folder}", f"--out={tmp_path}/in"])
        return True

    for file in ("model.safetensors", "config.json"):
        good, kept = (folder / file).read_bytes(), 0
        for i in range(60):
            bad = mutate(good[:2000], rng) + good[2000:]
            if file == "config.json" and i % 2:
                fields = json.loads(good)
                bad = json.dumps(fields | {rng.choice(list(fields)): rng.choice(values)}).encode()
            (folder / file).write_bytes(bad)
            kept += bool(refused(capsys, act))
        (folder / file).write_bytes(good)
        assert kept < 60 and act()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "in", "log", "run"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_pickle_is_ever_loaded(shards, tmp_path):
    root = Path(train.__file__).parent
    for path in [*root.glob("*.py"), *root.glob("prepare/*.py"), *root.glob("eval/*.py")]:
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|joblib|dill|shelve)|allow_pickle\s*=\s*True", text, re.M), path
        for call in re.findall(r"torch\.load\([^)]*\)?", text):
            assert "weights_only=True" in call, (path, call)
    run(settings(tmp_path / "run", shards, max_steps=2), tmp_path / "log")
    for file in checkpoint.FILES:
        torch.save({"x": Bomb(tmp_path / "boom")}, checkpoint.resolve(tmp_path / "run") / file)
    said = run(settings(tmp_path / "run", shards, resume="latest", max_steps=4), tmp_path / "log", code=2)
    assert "Traceback" not in said and not (tmp_path / "boom").exists()


# ---- long runs -----------------------------------------------------------------------------------------------------------------


def test_memory_and_step_time_stay_flat(shards, tmp_path, record_property):
    """Three hundred steps; ten thousand in the long loop. Time is that of the process's own CPU: others may use the machine."""
    steps, out = 10_000 if "KILLS" in os.environ else 300, tmp_path / "run"
    keys = {"max_steps": steps, "eval_every": steps // 20, "save_every": steps // 20, "log_every": steps // 100, "lr": 1e-4}
    process, seen = start(settings(out, shards, **keys), tmp_path / "log"), {}
    while process.is_alive():
        process.join(0.2)
        if (found := rows(out)) and process.is_alive():
            seen[found[-1]["step"]] = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().split()[13:15])) / os.sysconf("SC_CLK_TCK")
    assert process.exitcode == 0
    peak = {row["step"]: row["train/peak_mem"] for row in rows(out) if "train/peak_mem" in row}
    growth = peak[steps] / peak[steps // 10] - 1
    assert growth < 0.01
    if steps == 10_000:
        cost = lambda a, b: (seen[b] - seen[a]) / (b - a)  # noqa: E731
        at = [min(seen, key=lambda step: abs(step - share * steps)) for share in (0.1, 0.4, 0.7, 1)]
        thirds = [cost(a, b) for a, b in zip(at, at[1:], strict=False)]
        times = " ".join(f"{1000 * t:.2f}" for t in thirds)
        record_property("figure", f"{steps} steps: memory grew by {growth:.2%} after the first tenth; ms of CPU a step, by thirds: {times}")
        assert thirds[-1] < 1.1 * thirds[0]
    assert not children_of(process.pid) and not [p for p in Path("/dev/shm").glob("*") if str(process.pid) in p.name]


def children_of(parent):
    """Processes that say this one started them, or that it led."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [stat.parent.name] if str(parent) in fields[1:4] and fields[0] != "Z" else []
    return found
