"""Is this checkpoint in working order? Load, forward, loss, backward, gradients, the tie, generation, memory.

    python -m eval.sanity --ckpt=out/RUN [--learned] [--batch_size=2] [--device=auto]

For any run of prism, an encoder-decoder above all. Every check counts in the exit code. It says nothing about quality: a freshly
initialised model passes, with a loss near ln V. --learned reads the run's own log, too, and asks whether it is worth prolonging.
Read next: eval/denoising.py, eval/embedding.py, eval/perplexity.py for quality.
"""

import math
import sys

import numpy as np
import torch

import checkpoint
import configurator
import denoise
import denoise_stream
import sample
import tokenizer
from configurator import die
from eval.plots import read_metrics
from machine import find, peak_memory, to_device
from model import rectangle
from prepare import Checks

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun until the evening comes and the air grows cool. "


def batch_of(model, tok, count: int) -> dict:
    """`count` examples of what the model was made for, from one English sentence."""
    cfg, ids = model.cfg, np.array(tok.encode(TEXT * 3))[: min(96, model.cfg.max_len - 8)]
    if cfg.arch == "decoder":
        rows = torch.from_numpy(np.stack([np.roll(ids, i) for i in range(count)]))
        return rectangle(rows[:, :-1]) | {"targets": rows[:, 1:].flatten()}
    if cfg.arch == "encoder":
        return rectangle(torch.from_numpy(np.stack([np.roll(ids, i) for i in range(count)])))
    sp, rng = denoise_stream.special_of(cfg, tok), np.random.default_rng(0)
    rows = [d for d in denoise.mixture("recommended").denoisers if d.kind in ("span", "infill")]
    pairs = [denoise.corrupt(ids, rows[i % len(rows)], rows[i % len(rows)].r[0], rng, sp) for i in range(count)]
    return denoise_stream.collate([(e, np.append(sp.start, t[:-1]), t, 0) for e, t in pairs])


def learned(run, warmup: int, check):
    """The bars of config/encdec_phase_validation.py: a loss of at most 8 at the end, 0.5 below the first, and at most 5 alerts."""
    rows = [row for row in read_metrics(run) if "train/loss" in row]
    late = [row["train/loss"] for row in rows if row["step"] > warmup]
    last = float(np.mean(late[-max(1, len(late) // 10) :])) if late else math.inf
    fall, alerts = rows[0]["train/loss"] - last if rows else 0.0, sum(row.get("train/alert", 0) for row in rows)
    check("the loss after warm-up is at most 8", last <= 8, f"{last:.3f}, mean of the last tenth of {len(late)} logged losses")
    check("it fell by at least 0.5", fall >= 0.5, f"by {fall:.3f} since the first logged step")
    check("at most 5 logged steps raised an alert", alerts <= 5, alerts)


def main(argv):
    opt = configurator.args({"ckpt": str, "batch_size": 2, "device": "auto", "learned": False}, argv, __doc__, positive="batch_size")
    machine, check = find(opt.device, "auto"), Checks("sanity")
    model, state = checkpoint.load(opt.ckpt)
    run = checkpoint.resolve(opt.ckpt).parent
    tok = tokenizer.load(run)
    if opt.learned and not (run / "metrics.jsonl").is_file():
        die(f"--learned: {run} has no metrics.jsonl, it was not trained here; leave it out")
    model.set_dtype(machine.dtype).to(machine.device)
    check("loads", True, f"{model.cfg.arch}, step {state['step']}, {model.num_params():,} parameters, {machine.why}")
    check("every weight is finite", all(bool(torch.isfinite(p).all()) for p in model.parameters()))
    batch = to_device(batch_of(model, tok, opt.batch_size), machine.device)
    hidden = model(batch)
    check("forward", bool(torch.isfinite(hidden).all()), f"hidden states {tuple(hidden.shape)}")
    if "targets" in batch:
        n = int((batch["targets"] >= 0).sum())
        loss = model.nll(hidden, batch["targets"])[0] / n
        check(
            "loss in (0, 100)",
            0 < float(loss.detach()) < 100,
            f"{float(loss.detach()):.3f} nats, ln V = {math.log(model.cfg.vocab_size):.2f}",
        )
    else:
        loss = hidden.float().square().mean()
    loss.backward()
    sides = {"encoder": model.encoder, "decoder": model.decoder, "embedding": model.embed}
    for name, module in ((name, module) for name, module in sides.items() if module is not None):
        grads = [p.grad for p in module.parameters()]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))
        check(f"gradients of the {name}", math.isfinite(norm) and norm > 0 and all(g is not None for g in grads), f"norm {norm:.2e}")
    names = [name for name in model.state_dict() if name.startswith(("embed.weight", "head."))]
    check("embedding and head are one matrix" if model.cfg.tie else "embedding and head are two", len(names) == (1 if model.cfg.tie else 2))
    model.zero_grad()
    if model.decoder is not None and model.cfg.causal:
        text = sample.generate(model, tok, "The quick brown", max_new_tokens=8)
        check("generates", isinstance(text, str), repr(text))
    if opt.learned:
        learned(run, state["config"].get("warmup", 0), check)
    check("memory", True, f"peak {peak_memory(machine.device) / 1e9:.2f} GB")
    raise SystemExit(0 if check.end() else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
