"""What a run tells about itself, and how its data mix may answer: statistics, surprise ratios, auto_mix.

All of it runs at evaluations or every `stats_every` steps, on the raw uncompiled module; no other step pays for it.
Read next: train.py, which logs what these return; fp8.py, whose operands `fp8_statistics` measures.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

import data
import fp8
from configurator import die
from machine import peak_memory

# ---- statistics ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def statistics(model, batch):
    """Gradients as they are now, weights, and one forward of `batch` for what the first and last blocks put out."""
    grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
    n = sum(g.numel() for g in grads)
    finite = [torch.where(g.isfinite(), g, 0.0) for g in grads]
    mean = sum(g.sum(dtype=torch.float64) for g in finite) / n
    square = sum(g.square().sum(dtype=torch.float64) for g in finite)
    rows = {
        "grad/norm": square.sqrt(),
        "grad/mean": mean,
        "grad/std": (square / n - mean**2).clamp(min=0).sqrt(),
        "grad/min": min(g.min() for g in finite),
        "grad/max": max(g.max() for g in finite),
        "grad/zeros": sum((g == 0).sum() for g in grads) / n,
        "grad/nonfinite": sum(g.numel() - g.isfinite().sum() for g in grads),
        "weight/norm": math.sqrt(sum(p.float().square().sum(dtype=torch.float64) for p in model.parameters())),
    }
    stack, hooks = model.decoder or model.encoder, []
    for place, block in (("first", stack.blocks[0]), ("last", stack.blocks[-1])):

        def output(module, args, y, place=place):
            rows[f"activation/{place}/std"] = y.float().std()

        def neurons(module, args, place=place):  # what enters the down projection; dead: nothing for any token of the batch
            rows[f"activation/{place}/dead"] = (args[0].abs().amax(0) < 1e-6).float().mean()

        hooks += [block.register_forward_hook(output), block.ffn.down.register_forward_pre_hook(neurons)]
    with fp8.evaluation(model):
        model(batch)
    for hook in hooks:
        hook.remove()
    return {f"stats/{k}": float(v) for k, v in rows.items()}


@torch.no_grad()
def measure(name, x, kind, scale):
    """How well one tensor survives its cast: shares of elements, signal to noise in dB."""
    x, scale = x.detach().double(), scale.double()
    q = fp8.cast(x, scale, kind).double()
    noise, limit = (q / scale - x).square().sum(), fp8.MAX[kind] * (1 + 1e-6)
    row = {"name": name, "amax": x.abs().amax(), "scale": scale, "saturation": (x.abs() * scale > limit).double().mean()}
    row |= {"underflow": ((x != 0) & (q == 0)).double().mean(), "snr_db": 10 * torch.log10(x.square().sum() / noise)}
    return {k: v if k == "name" else float(v) for k, v in row.items()}


def fp8_statistics(model, loss):
    """One row per FP8 operand, worst signal-to-noise first, from a forward and backward of `loss()`. Touches neither .grad nor the
    histories: a run that looks is the run that does not."""
    state, rows = getattr(model, "fp8", None), []
    if not state or not state.ones or not state.on:
        return rows

    def look(name, x, kind, slot):
        old = state.delayed and state.warm and slot is not None
        rows.append(measure(name, x, kind, state.scale[slot] if old else fp8.scale_of(x.detach().abs().amax(), kind, state.margin)))

    def watch(one, x, weight, y):
        look(f"{one.name}.x", x, fp8.E4M3, one.slot)
        look(f"{one.name}.weight", weight, fp8.E4M3, None)
        if y.requires_grad and any(one.use[1:]):
            y.register_hook(lambda g: look(f"{one.name}.grad", g, state.grad_kind, one.slot + 1))

    now, state.watch = state.now.clone(), watch
    torch.autograd.grad(loss(), next(p for p in model.parameters() if p.requires_grad))
    state.watch = None
    state.now.copy_(now)
    return sorted(rows, key=lambda row: row["snr_db"])


def entropy(p):
    return -(p * p.clamp(min=1e-30).log()).sum(-1)


@torch.no_grad()
def observe(model, batch, see):
    """One forward; `see(layer, alpha (f, K), s (N, K))` hears what every layer is about to route by."""
    hooks = []
    for layer, block in enumerate(model.decoder.blocks):

        def hook(ffn, args, layer=layer):
            alpha, s = ffn.route(*args)
            see(layer, alpha[0], torch.zeros(len(args[0]), alpha.shape[-1], device=alpha.device) if s is None else s.float())

        hooks.append(block.ffn.register_forward_pre_hook(hook))
    model(batch)
    for hook in hooks:
        hook.remove()


def probe(model, batch, tokens=1024):
    """{metric: nats} for the training log, of about `tokens` tokens of one held-out micro-batch; no head, no synchronisation per layer.
    The first two leave tau out and so compare with the published figures; gate_entropy is that of the gates that really act."""
    rows, tau = {"routing_entropy": [], "dynamic_routing_entropy": [], "gate_entropy": [], "alpha_spread": []}, model.tau

    def see(i, alpha, s):
        z = alpha + s[:: max(1, len(s) // tokens), None]  # (n, f, K)
        values = (entropy(alpha.softmax(-1)).mean(), entropy(z.softmax(-1)).mean(), entropy((z / tau).softmax(-1)).mean(), alpha.std())
        for row, value in zip(rows.values(), values, strict=True):
            row.append(value)

    observe(model, batch, see)
    rows = {name: torch.stack(row).tolist() for name, row in rows.items()}
    layers = {f"{name}/layer_{i}": value for name, row in rows.items() for i, value in enumerate(row)}
    return layers | {f"{name}/mean": sum(row) / len(row) for name, row in rows.items()}


# ---- the mix ------------------------------------------------------------------------------------------------------------

LIMITS = {"ppl": (0.85, 1.3), "bpb": (0.90, 1.10)}  # below: reduce, above: increase; those of bpb are our choice, untested


def surprise(values, metric="bpb", reference=None):
    """{domain: perplexity or bits per byte} -> {domain: (ratio to the mean, advice)}. Bits per byte are first divided by those of a
    reference model, because code is easier than prose for every model; perplexities are compared as published."""
    relative = {d: v / (reference or {}).get(d, 1.0) for d, v in values.items()}
    mean = sum(relative.values()) / len(relative)
    low, high = LIMITS[metric]
    advice = {d: "increase" if v / mean > high else "reduce" if v / mean < low else "balanced" for d, v in relative.items()}
    return {d: (v / mean, advice[d]) for d, v in relative.items()}


def auto_mix(mix, ema, ratios, sources, eta=0.5, keep=0.5, limit=0.2, floor=0.02, cap=0.9):
    """Shares move towards the domains that lag: w *= ratio^eta, on a moving average of ratios. No share changes by more than `limit` of
    itself per call, and the sum stays 1, because all move the same part of the way. -> (new mix, new average).

    `sources`: {domain: source}. A source that serves several domains takes the mean of their ratios; one that serves none keeps 1."""
    ema = {d: keep * ema.get(d, 1.0) + (1 - keep) * r for d, r in ratios.items()}
    pull = {}
    for domain, source in sources.items():
        pull.setdefault(source, []).append(ema[domain])
    target = {s: w * (sum(pull[s]) / len(pull[s]) if s in pull else 1.0) ** eta for s, w in mix.items()}
    for _ in range(20):  # clamping and rescaling in turn, until both hold
        target = {s: min(max(w, floor), cap) if mix[s] else 0.0 for s, w in target.items()}
        total = sum(target.values())
        target = {s: w / total for s, w in target.items()}
    part = min([1.0, *(limit * w / abs(target[s] - w) for s, w in mix.items() if target[s] != w)])
    return {s: w + part * (target[s] - w) for s, w in mix.items()}, ema


class MixedPlan:
    """A plan whose shares follow the surprise of the domains. The stream reads the plan ahead of the loop, so a change takes effect
    only behind everything that may have been read; state: the changes so far [first step, mix], and the moving average."""

    def __init__(self, plan, cfg):
        if not (cfg.mix and cfg.domains and cfg.domain_source):
            die("auto_mix needs mix (the shares to start from), domains (what is scored) and domain_source ({domain: source})")
        if wrong := set(cfg.domain_source.values()) - set(cfg.mix):
            die(f"domain_source: {min(wrong)} is no source of mix ({', '.join(cfg.mix)})")
        self.plan, self.sources, self.lag, self.state = plan, cfg.domain_source, cfg.prefetch + 2, {"changes": [], "ema": {}}

    def __getattr__(self, name):
        return getattr(self.plan, name)

    def __call__(self, step):
        row, mix = self.plan(step), [mix for first, mix in self.state["changes"] if first <= step]
        return replace(row, mix=mix[-1]) if mix else row

    def answer(self, step, scores):
        """`scores`: {domain: bits per byte} of the tune halves, after `step` steps -> one line for the log."""
        first, ratios = min(step + self.lag, self.steps), {d: r for d, (r, _) in surprise(scores).items()}
        if unknown := set(self.sources) - set(ratios):
            die(f"domain_source: {min(unknown)} is none of the domains ({', '.join(ratios)})")
        mix, self.state["ema"] = auto_mix(self(first).mix, self.state["ema"], ratios, self.sources)
        self.state["changes"].append([first, mix])
        return f"auto_mix from step {first}: " + ", ".join(f"{s} {w:.3f}" for s, w in mix.items())


# ---- benchmark ----------------------------------------------------------------------------------------------------------

WARM = 5  # steps before the clock: compilation, allocator, first kernels


def benchmark(laps, tokens, length, model, machine, sources):
    """Two lines of a table, from the wall clock after each synchronised step; tokens are real ones, accumulation included."""
    if len(laps) < WARM + 2:
        die(f"benchmark: {len(laps)} steps are too few, {WARM} of them warm up; raise --max_steps")
    shards = [s for path in sources.values() for s in data.read_manifest(Path(path))["shards"]]
    per_token = sum(s["bytes"] for s in shards) / sum(s["tokens"] for s in shards)
    times = sorted(b - a for a, b in zip(laps[WARM:], laps[WARM + 1 :], strict=False))
    middle, low, high = (times[int(q * (len(times) - 1))] for q in (0.5, 0.25, 0.75))
    speed = tokens / middle
    mfu = f"{speed * model.flops_per_token(length) / (machine.peak * machine.world):.1%}" if machine.peak else "unknown"
    heads = ("L", "tokens", "ms", "quartiles", "tok/s", "bytes/s", "MFU", "GiB", "h per 1B")
    values = [length, tokens, f"{1e3 * middle:.1f}", f"{1e3 * low:.1f}-{1e3 * high:.1f}", f"{speed:,.0f}", f"{speed * per_token:,.0f}", mfu]
    values += [f"{peak_memory(machine.device) / 2**30:.2f}", f"{1e9 / speed / 3600:.2f}"]
    form = "{:>6} {:>8} {:>9} {:>15} {:>10} {:>11} {:>8} {:>7} {:>9}"
    return form.format(*heads) + "\n" + form.format(*values)
