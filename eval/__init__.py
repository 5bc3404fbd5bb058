"""What the evaluations share: opening a run and saying exactly what it is, intervals by bootstrap, results on disk.

Each is run as a module: `python -m eval.perplexity --ckpt=out/RUN`. Read next: perplexity.py, the simplest of them.
"""

import prelude  # isort: skip  # noqa: F401

import dataclasses
import math
import os
import sys

if "eval.harness" in sys.orig_argv and not sys.stderr.isatty():  # lm-eval's own bars; tqdm asks once, when torch imports it
    os.environ.setdefault("TQDM_DISABLE", "1")
import numpy as np
import torch

import checkpoint
import files
import machine
import tokenizer
from configurator import die
from model import Transformer

OPEN = {"ckpt": str, "device": "auto", "dtype": "float32", "tau": 0.0, "allow_noncausal": False, "gate_hard": False, "out": ""}
HARD = 1e-6  # a softmax at this temperature is the one-hot argmax to the last bit


def open_run(o):
    """The options OPEN -> model (eval mode, its activation dtype and tau set), state, device, and a dict that says what was measured."""
    found = machine.find(o.device, o.dtype)
    at = lambda cfg: Transformer(dataclasses.replace(cfg, allow_noncausal=cfg.allow_noncausal or o.allow_noncausal))  # noqa: E731
    model, state = checkpoint.load(o.ckpt, str(found.device), at)
    model.set_dtype(found.dtype)
    cfg = model.cfg
    if o.tau and cfg.ffn != "polyglu":
        die(f"--tau={o.tau}: {o.ckpt} has ffn={cfg.ffn!r} and so no gate")
    if o.tau and (o.gate_hard or o.tau < HARD):
        die(f"--tau={o.tau}: " + (f"must be above 0, at least {HARD}" if o.tau < HARD else "would do nothing beside --gate_hard"))
    if o.tau:
        model.tau.fill_(o.tau)
    if o.gate_hard:
        if cfg.ffn != "polyglu":
            die(f"--gate_hard: {o.ckpt} has ffn={cfg.ffn!r} and so no gate")
        model.tau.fill_(HARD)
    facts = {"ckpt": o.ckpt, "step": state.get("step"), "commit": machine.git_commit(), "torch": torch.__version__}
    facts |= {"device": found.why, "dtype": str(found.dtype)[6:], "causal": cfg.causal, "ffn": cfg.ffn}
    if cfg.ffn == "polyglu":
        facts |= {"gate": cfg.gate, "tau": float(model.tau), "gate_hard": o.gate_hard}
    return model, state, found.device, facts


def load_tokenizer(ckpt):
    """Of the run that holds a checkpoint, whether the run or one of its steps was named."""
    return tokenizer.load(ckpt if os.path.isdir(os.path.join(ckpt, "tokenizer")) else os.path.dirname(os.path.normpath(ckpt)))


def suffix(model) -> str:
    """Of every metric's name: a gate that hears later tokens gives no likelihood, and no table may hide that."""
    return "" if model.cfg.causal else "_noncausal"


def bootstrap(top, bottom=None, draws=1000, seed=0, group=None):
    """95 % interval of sum(top) / sum(bottom) (of the mean without `bottom`) over resampled documents, windows or runs; what shares a
    `group`, as questions about one passage do, is drawn together."""
    top = np.asarray(top, float)
    bottom = np.ones_like(top) if bottom is None else np.asarray(bottom, float)
    if group is not None:
        group = np.unique(group, return_inverse=True)[1]
        top, bottom = np.bincount(group, top), np.bincount(group, bottom)
    if len(top) < 2:
        return [math.nan, math.nan]
    rng, values = np.random.default_rng(seed), []
    for _ in range(draws):
        weight = np.bincount(rng.integers(0, len(top), len(top)), minlength=len(top))
        values.append(weight @ top / max(weight @ bottom, 1e-300))
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def write_json(path, value):
    """To --out, where one was given."""
    if path:
        files.write_json(path, value)
