"""One process, two, four, several nodes: the same run. Every architecture under DDP and FSDP2, two torchrun agents, the Slurm file, parts.

    python -m pytest tests/test_scale.py                       the pairs that differ most
    KILLS=1 python -m pytest tests/test_scale.py               every architecture x DDP, FSDP2 x 2, 4 ranks, with the largest difference

`uneven` holds so few trained tokens that ranks, micro-batches and whole steps have none.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_faults import (
    free_port,
    join_ranks,
    rows,
    run,
    settings,
    shards,  # noqa: F401
    start_ranks,
    uneven,  # noqa: F401
    wait_for,
)
from test_latentwire import arguments as latent_arguments
from test_latentwire import models  # noqa: F401

import checkpoint
import machine
import sample
import train

ROOT = Path(train.__file__).parent
TOLERANCE = {"loss": 5e-6, "weight": 2e-6}  # relative to max(1, loss); absolute, of weights of size 0.02 to 1

# a large eps, as in sgd: rounding in a gradient near 0 must not become a step of size lr
PLAIN = {"eps": 1e-3, "micro_tokens": 16, "max_steps": 4, "save_every": 2, "keep": 9}
DENOISE = {"arch": "encdec", "objective": "denoise", "vocab_size": 361, "max_len": 128, "max_enc": 48, "max_dec": 32, "micro_tokens": 128}
CONTRAST = {"objective": "contrast", "vocab_size": 361, "max_enc": 32, "contrast_pairs": 16, "contrast_micro": 4}
KINDS = {
    "decoder": {},
    "polyglu": {"ffn": "polyglu", "gate_noise": True},
    "encdec": DENOISE | {"tokens_per_step": 512},
    "encdec polyglu": DENOISE | {"tokens_per_step": 512, "ffn": "polyglu", "gate_noise": True},
    "contrast": CONTRAST | {"arch": "encdec"},
    "encoder": CONTRAST | {"arch": "encoder"},
}
USUAL = [("decoder", "fsdp", 4), ("encdec", "ddp", 4), ("encdec", "fsdp", 2), ("contrast", "ddp", 4), ("contrast", "fsdp", 2)]
ALL = [(kind, parallel, world) for kind in KINDS for parallel in ("ddp", "fsdp") for world in (2, 4)]


def arguments(out, folder, kind, **more):
    given = settings(out, folder, **PLAIN | KINDS[kind] | more)
    quiet = {"denoise": ("--seq_len",), "contrast": ("--seq_len", "--eval_", "--tokens_per_step", "--micro_tokens")}  # would do nothing
    return [argument for argument in given if not argument.startswith(quiet.get(KINDS[kind].get("objective"), ()))]


def differences(a, b):
    """-> the largest difference of a loss at any step, and of a weight at the end; what must be equal is."""
    (first, one), (second, two) = ((load(checkpoint.resolve(run)), checkpoint.read_state(checkpoint.resolve(run))) for run in (a, b))
    worst = {"loss": 0.0, "weight": 0.0}
    assert one["stream"] == two["stream"] and one["tokens"] == two["tokens"] > 0
    for x, y in zip(rows(a), rows(b), strict=True):
        assert x["step"] == y["step"] and x.keys() == y.keys()
        for key in x:
            if "loss" in key or key.count("/") == 2:  # LatentWire logs train/TERM/READER
                worst["loss"] = max(worst["loss"], abs(x[key] - y[key]) / max(1, abs(y[key])))
    for (name, p), (same, q) in zip(first.items(), second.items(), strict=True):
        assert name == same
        worst["weight"] = max(worst["weight"], float((p - q).abs().max()))
    return worst


def within(worst):
    return all(worst[k] <= TOLERANCE[k] for k in TOLERANCE)


@pytest.fixture(scope="module")
def one(uneven, tmp_path_factory):  # noqa: F811
    """kind -> its run in one process, made when it is first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("one") / "run"
            run(arguments(made[kind], uneven, kind), made[kind].parent / "log")
        return made[kind]

    return get


@pytest.mark.parametrize("kind, parallel, world", ALL if "KILLS" in os.environ else USUAL, ids=lambda x: str(x))
def test_any_number_of_ranks_is_one_run(one, uneven, tmp_path, record_property, kind, parallel, world):  # noqa: F811
    want, argv = one(kind), arguments(tmp_path / "run", uneven, kind, parallel=parallel)
    ranks = start_ranks(world, argv, tmp_path / "log")
    join_ranks(ranks, tmp_path / "log")
    worst = differences(tmp_path / "run", want)
    if "KILLS" in os.environ:
        record_property(
            "figure", f"{kind}, {parallel}, {world} ranks: losses within {worst['loss']:.1e}, weights within {worst['weight']:.1e}"
        )
    assert within(worst), worst
    before, after = (load(want / name) for name in ("step-000002", "step-000004"))
    assert any(not torch.equal(p, after[name]) for name, p in before.items()), "nothing was trained"
    # whole weights of a sharded run: resumed by one process, evaluated and sampled as they lie there
    run([*argv, f"--resume={tmp_path}/run/step-000002"], tmp_path / "log")
    assert within(differences(tmp_path / "run", want))


def load(step):
    return load_file(step / "model.safetensors")


@pytest.mark.parametrize("world", (2, 4) if "KILLS" in os.environ else (4,))
def test_packets_learnt_by_any_number_of_ranks(models, tmp_path, record_property, world):  # noqa: F811
    """LatentWire: an encoder and adapters are trained, and every rank holds the same frozen readers."""
    plain = {"optimizer": "adamw", "eps": 1e-3, "micro_tokens": 48, "w_kd": 0.5}
    run(latent_arguments(models, tmp_path / "one", **plain), tmp_path / "log")
    ranks = start_ranks(world, latent_arguments(models, tmp_path / "all", sequential=True, **plain), tmp_path / "log")  # the same sums
    join_ranks(ranks, tmp_path / "log")
    worst = differences(tmp_path / "all", tmp_path / "one")
    record_property("figure", f"latent, ddp, {world} ranks: losses within {worst['loss']:.1e}, weights within {worst['weight']:.1e}")
    assert within(worst), worst
    before, after = (load(tmp_path / "all" / name) for name in ("step-000002", "step-000006"))
    assert any(not torch.equal(p, after[name]) for name, p in before.items()), "nothing was trained"


def test_a_sharded_run_samples_as_it_lies_there(shards, tmp_path, capsys):  # noqa: F811
    ranks = start_ranks(2, settings(tmp_path / "run", shards, parallel="fsdp", max_steps=2), tmp_path / "log")
    join_ranks(ranks, tmp_path / "log")
    from eval import perplexity

    sample.main([f"--ckpt={tmp_path}/run", "--prompt=abc", "--max_new_tokens=4"])
    perplexity.main([f"--ckpt={tmp_path}/run", f"--data={shards}"])
    assert "abc" in capsys.readouterr().out


# ---- several nodes -----------------------------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
for node in $(seq $SLURM_NNODES); do "$@" & done
for job in $(jobs -p); do wait $job || exit 1; done
"""


def start_job(folder, argv, log):
    """config/slurm.sh as a job of two nodes: an srun that starts each of them here, as an agent of its own on the loopback address."""
    for name, text in ("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\necho 127.0.0.2\n"):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"NNODES": 2, "JOB_ID": free_port(), "JOB_NODELIST": "node[1-2]", "GPUS_ON_NODE": 1}
    env = os.environ | {"PATH": path} | {f"SLURM_{key}": str(value) for key, value in slurm.items()}
    job = subprocess.Popen(["bash", "config/slurm.sh", *argv], stdout=log, stderr=log, cwd=ROOT, env=env, start_new_session=True)
    job.number = slurm["JOB_ID"]
    return job


def workers_of(job):
    """{rank: pid} of the processes that train for it."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            env = dict(line.split("=", 1) for line in file.read_text(errors="replace").split("\0") if "=" in line)
            if env.get("TORCHELASTIC_RUN_ID") == env.get("SLURM_JOB_ID") == str(job.number):
                found[int(env["RANK"])] = int(file.parent.name)
    return found


def test_the_slurm_file_on_two_agents(shards, tmp_path):  # noqa: F811
    out, argv = tmp_path / "run", settings(tmp_path / "run", shards, max_steps=100_000, save_every=20, eval_every=0)
    with open(tmp_path / "log", "w") as log:
        job = start_job(tmp_path, [a for a in argv if not a.startswith("--eval_every")] + ["--eval_every=0"], log)
    try:
        wait_for(lambda: len(checkpoint.steps(out)) > 1)
        assert sorted(workers_of(job)) == [0, 1]
        for rank in (1, 0) if "KILLS" in os.environ else ():  # a node comes back with the other, whichever it was, and where it stood
            before = (tmp_path / "log").read_text().count("resumed from")
            os.kill(workers_of(job)[rank], signal.SIGKILL)
            wait_for(lambda: (tmp_path / "log").read_text().count("resumed from") > before)  # noqa: B023
            last = rows(out)[-1]["step"]
            wait_for(lambda: rows(out)[-1]["step"] > last + 5)  # noqa: B023
        for pid in workers_of(job).values():
            os.kill(pid, signal.SIGUSR1)
        os.killpg(job.pid, signal.SIGUSR1)  # script and agents too, as Slurm does before the time is up
        assert job.wait(240) == 0, (tmp_path / "log").read_text()[-2000:]
    finally:
        for pid in (*workers_of(job).values(), -job.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    state, steps = checkpoint.read_state(checkpoint.resolve(out, "latest")), [row["step"] for row in rows(out)]
    assert state["step"] == state["stream"]["step"] and steps == list(range(1, state["step"] + 1))
    assert "stopped by a signal" in (tmp_path / "log").read_text() and not workers_of(job)


def test_restarts_over_nodes_that_could_not_meet_are_refused(monkeypatch, dies):
    for key, value in {
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 1,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_MAX_RESTARTS": 3,
    }.items():
        monkeypatch.setenv(key, str(value))
    dies(lambda: machine.join(machine.Machine(0, 2, torch.device("cpu"), torch.float32, "", 0.0)), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
