"""Domains that surprise the model, and a data mix that may answer: surprise ratios, means over domains, auto_mix.

`MixedPlan` wraps the plan of a run: the shares of `mix` follow the ratios, and a change takes effect behind everything that was read ahead.
Read next: train.py, which evaluates domains; data.py, which keeps to the shares; eval/perplexity.py, which prints the advice.
"""

import math
import statistics as stats
from dataclasses import replace
from pathlib import Path

from configurator import die

LIMITS = {"ppl": (0.85, 1.3), "bpb": (0.90, 1.10)}  # below: reduce, above: increase; those of bpb are our choice, untested


def surprise(values, metric="bpb", reference=None):
    """{domain: perplexity or bits per byte} -> {domain: (ratio to the mean, advice)}. Bits per byte are first divided by those of a
    reference model, because code is easier than prose for every model; perplexities are compared as published."""
    if reference is not None and (missing := sorted(set(values) - set(reference))):
        die(f"the reference has no {metric} of {', '.join(missing)}: score it on the same domains, or leave these out")
    relative = {d: v / (reference[d] if reference else 1.0) for d, v in values.items()}
    mean = sum(relative.values()) / len(relative)
    low, high = LIMITS[metric]
    advice = {d: "increase" if v / mean > high else "reduce" if v / mean < low else "balanced" for d, v in relative.items()}
    return {d: (v / mean, advice[d]) for d, v in relative.items()}


def over_domains(rows, suffix=""):
    """Mean and standard deviation over the held-out sets of an evaluation, and by which of them the model is surprised."""
    more = {}
    for metric in ("loss", "bpb"):
        each = {k.split("/")[1]: v for k, v in rows.items() if k.startswith("val/") and k.endswith(metric + suffix)}
        each = {k: v for k, v in each.items() if k[-6:] != "_split" or k[:-6] not in each}  # a source has a domain of its name
        if each:
            more[f"val/mean/{metric}{suffix}"] = sum(each.values()) / len(each)
        if len(each) > 1:
            more[f"val/sd/{metric}{suffix}"] = stats.stdev(each.values())
            kind, each = ("ppl", {k: math.exp(min(v, 700)) for k, v in each.items()}) if metric == "loss" else (metric, each)
            more |= {f"surprise_{kind}/{name}{suffix}": ratio for name, (ratio, _) in surprise(each, kind).items()}
    return more


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
        if cfg.mix_end or any(row.get("mix") for row in cfg.stages):
            die("auto_mix starts from mix alone: drop mix_end and the stages' mix")
        if unknown := set(cfg.domain_source) - (known := {path.stem for path in Path(cfg.domains).glob("*.jsonl")}):
            die(f"domain_source: {min(unknown)} is none of the domains of {cfg.domains} ({', '.join(sorted(known)) or 'no NAME.jsonl'})")
        self.plan, self.sources, self.lag, self.state = plan, cfg.domain_source, cfg.prefetch + 2, {"changes": [], "ema": {}}

    def __getattr__(self, name):
        return getattr(self.plan, name)

    def __call__(self, step):
        row, mix = self.plan(step), [mix for first, mix in self.state["changes"] if first <= step]
        return replace(row, mix=mix[-1]) if mix else row

    def answer(self, step, scores):
        """`scores`: {domain: bits per byte} of the tune halves, after `step` steps -> one line for the log."""
        first, ratios = min(step + self.lag, self.steps), {d: r for d, (r, _) in surprise(scores).items()}
        mix, self.state["ema"] = auto_mix(self(first).mix, self.state["ema"], ratios, self.sources)
        self.state["changes"].append([first, mix])
        return f"auto_mix from step {first}: " + ", ".join(f"{s} {w:.3f}" for s, w in mix.items())
