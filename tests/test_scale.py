"""One process, two, four, several nodes: the same run. Every architecture under DDP and FSDP2, two torchrun agents, the Slurm file, parts.

    python -m pytest tests/test_scale.py                       the pairs that differ most
    KILLS=1 python -m pytest -s tests/test_scale.py            every architecture x DDP, FSDP2 x 2, 4 ranks, with the largest difference

`uneven` holds so few trained tokens that ranks, micro-batches and whole steps have none.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_faults import (
    alive,
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

import checkpoint
import sample
import tokenizer
import train
from model import ModelConfig, build

ROOT = Path(train.__file__).parent
TOLERANCE = {"loss": 2e-5, "weight": 2e-4}  # relative to max(1, loss); absolute, of weights of size 0.02 to 1

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
USUAL = [("decoder", "fsdp", 4), ("encdec", "ddp", 4), ("encdec", "fsdp", 2), ("contrast", "ddp", 2), ("contrast", "fsdp", 4)]
ALL = [(kind, parallel, world) for kind in KINDS for parallel in ("ddp", "fsdp") for world in (2, 4)]


def arguments(out, folder, kind, **more):
    given = settings(out, folder, **PLAIN | KINDS[kind] | more)
    quiet = () if KINDS[kind].get("objective") != "contrast" else ("--seq_len", "--eval_", "--tokens_per_step", "--micro_tokens")
    return [argument for argument in given if not argument.startswith(quiet)] if quiet else given  # they would do nothing


def differences(a, b):
    """-> the largest difference of a loss at any step, and of a weight at the end; what must be equal is."""
    (first, one), (second, two), worst = checkpoint.load(a), checkpoint.load(b), {"loss": 0.0, "weight": 0.0}
    assert one["stream"] == two["stream"] and one["tokens"] == two["tokens"] > 0
    for x, y in zip(rows(a), rows(b), strict=True):
        assert x["step"] == y["step"] and x.keys() == y.keys()
        for key in x:
            if "loss" in key:
                worst["loss"] = max(worst["loss"], abs(x[key] - y[key]) / max(1, abs(y[key])))
    for (name, p), (same, q) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
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
def test_any_number_of_ranks_is_one_run(one, uneven, tmp_path, kind, parallel, world):  # noqa: F811
    want, argv = one(kind), arguments(tmp_path / "run", uneven, kind, parallel=parallel)
    ranks = start_ranks(world, argv, tmp_path / "log")
    join_ranks(ranks, tmp_path / "log")
    worst = differences(tmp_path / "run", want)
    print(f"{kind}, {parallel}, {world} ranks: losses {worst['loss']:.1e}, weights {worst['weight']:.1e}")
    assert within(worst), worst
    before, after = (load(want / name) for name in ("step-000002", "step-000004"))
    assert any(not torch.equal(p, after[name]) for name, p in before.items()), "nothing was trained"
    # whole weights of a sharded run: resumed by one process, evaluated and sampled as they lie there
    run([*argv, f"--resume={tmp_path}/run/step-000002"], tmp_path / "log")
    assert within(differences(tmp_path / "run", want))


def load(step):
    return checkpoint.load(step)[0].state_dict()


def test_a_sharded_run_samples_as_it_lies_there(shards, tmp_path, capsys):  # noqa: F811
    ranks = start_ranks(2, settings(tmp_path / "run", shards, parallel="fsdp", max_steps=2), tmp_path / "log")
    join_ranks(ranks, tmp_path / "log")
    from eval import perplexity

    sample.main([f"--ckpt={tmp_path}/run", "--prompt=abc", "--max_new_tokens=4"])
    perplexity.main([f"--ckpt={tmp_path}/run", f"--data={shards}"])
    assert "abc" in capsys.readouterr().out
