"""What each step does, and what applies it: the plan (length, batch, lr, clip, mix, tau) and the optimizer.

    plan = Plan(cfg, world)                     # plan(step) -> Row; plan.steps, plan.table()
    optimizer = build_optimizer(model, cfg)

A row is a function of the step alone, so that resuming, prefetching and logging cannot disagree about it.
A run without `stages` is a table of one row. Every knob of lr is one product: peak x warm-up x decay x the row's mult.
Read next: train.py, which walks the plan; data.py, which cuts batches by it; checkpoint.py, which names the state.
"""

import bisect
import math
import os
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from configurator import die, typed

# tokens: how long a stage is, or start: the step it begins at, one of the two throughout a table. mult: of the scheduled lr, reached over
# `warmup` steps from the previous stage's. rows: of seq_len, per micro-batch, over all ranks; without it tokens_per_step is constant.
STAGE = {"tokens": int, "start": int, "seq_len": int, "mult": float, "clip": float, "rows": int, "accum": int, "warmup": int}
STAGE |= {"mix": dict[str, float], "note": str}


@dataclass(frozen=True)
class Row:
    """One optimizer step. `tokens` is over all ranks, `micro_tokens` one rank's share of one micro-batch."""

    step: int
    stage: int
    seq_len: int
    tokens: int
    micro_tokens: int
    accum: int
    lr: float
    clip: float
    mix: dict  # source -> share, summing to 1; {} when the config names no shares
    tau: float
    eta: float  # step / steps

    def __str__(self):  # a line for the log where a stage begins
        rows, mix = self.tokens // self.seq_len // self.accum, "".join(f", {name} {share:.3g}" for name, share in self.mix.items())
        shape = f"L {self.seq_len}, {rows} rows x {self.accum} = {self.tokens:,} tokens"
        return f"step {self.step}: stage {self.stage}: {shape}, lr {self.lr:.2e}, clip {self.clip:g}{mix}"


def shares(mix, cfg, where):
    """A dict of non-negative weights of the configured sources, normalised."""
    names = cfg.data if isinstance(cfg.data, dict) else ()
    for name, share in mix.items():
        if name not in names or not 0 <= share < math.inf:
            die(f"{where}: {name}={share} must be a share >= 0 of a source of --data ({', '.join(names) or 'a single folder'})")
    if not 0 < sum(mix.values()) < math.inf:
        die(f"{where}: the shares {mix} sum to {sum(mix.values())}; give one source a share")
    return {name: share / sum(mix.values()) for name, share in mix.items()}


def batch_shape(cfg, world, row, where):
    """-> (tokens per step, one rank's tokens per micro-batch, accumulation): whole windows, all divisions exact. `rows`: of all ranks."""
    length, accum = row.get("seq_len", cfg.seq_len), row.get("accum", 1)
    window = length if cfg.objective == "lm" else 1  # other objectives cut no rows
    given = 0 if row.keys() & {"rows", "accum"} else cfg.micro_tokens
    tokens = row["rows"] * length * accum if "rows" in row else cfg.tokens_per_step
    unit = world * (given or accum * window)
    if tokens % unit and "rows" in row:
        die(f"{where}: rows={row['rows']} do not divide over {world} processes; take a multiple of {world}")
    if given % window:
        die(f"{where}: micro_tokens {given} is not a multiple of seq_len {length}; try --micro_tokens={-(-given // length) * length}")
    if tokens % unit:
        parts, fit = f"micro_tokens {given}" if given else f"accum {accum} x seq_len {length}", math.gcd(tokens // world, given)
        way = f"--micro_tokens={fit} or " * bool(given and fit and fit % window == 0 and tokens % (fit * world) == 0)
        way += f"--tokens_per_step={-(-tokens // unit) * unit}"
        die(f"{where}: tokens_per_step {tokens} is no multiple of world {world} x {parts}; try {way}")
    if window > cfg.max_len:
        die(f"{where}: seq_len {length} exceeds max_len {cfg.max_len}; raise --max_len")
    micro = given or tokens // world // accum
    return tokens, micro, tokens // world // micro


class Plan:
    """Holds the resolved stages; calling it computes a row from the step alone. epoch_tokens: of one pass, for a config in `epochs`."""

    def __init__(self, cfg, world=1, epoch_tokens=0):
        self.cfg, table = cfg, cfg.stages or ({"start": 0},)
        unit = "tokens" if "tokens" in table[0] else "start"
        limits = {k: getattr(cfg, k) for k in ("max_steps", "max_tokens", "epochs") if getattr(cfg, k)}
        closed = unit == "tokens" and "tokens" in table[-1]  # the table itself says where the run ends
        if len(limits) != (0 if closed else 1):
            die(f"set exactly one of --max_steps, --max_tokens, --epochs (0: unset), or `tokens` in every stage; got {limits or 'none'}")
        self.by_tokens, self.stages, border = unit == "tokens", [], 0
        for i, row in enumerate(table):
            where = f"stages[{i}]" if cfg.stages else "config"
            row = {key: typed(STAGE, key, [value], where) for key, value in row.items()}
            if {"tokens": "start", "start": "tokens"}[unit] in row or (unit not in row and not (self.by_tokens and i == len(table) - 1)):
                die(f"{where}: needs `{unit}`, like the first stage, and not both")
            first, start = self._end(border if self.by_tokens else row["start"], self.by_tokens)
            border += row.get("tokens", 0)
            if (i == 0 and first) or (i and first <= self.stages[-1].first):
                die(f"{where}: begins at step {first}; the first stage begins at 0 and every stage lasts at least one step")
            stage = {"seq_len": cfg.seq_len, "mult": 1.0, "clip": cfg.clip, "warmup": 0, "mix": None, "note": ""} | row
            stage["tokens"], stage["micro_tokens"], stage["accum"] = batch_shape(cfg, world, row, where)
            stage["mix"] = stage["mix"] and shares(stage["mix"], cfg, f"{where}.mix")
            self.stages.append(SimpleNamespace(**stage | {"first": first, "start": start}))  # its first step, the tokens before it
        if cfg.epochs and not epoch_tokens:
            die(f"epochs = {cfg.epochs}: the data's length is unknown here; set --max_steps or --max_tokens")
        total = border if closed else cfg.max_tokens or math.ceil(cfg.epochs * epoch_tokens)
        self.steps, self.total = self._end(total, True) if total else self._end(cfg.max_steps, False)
        if self.steps <= self.stages[-1].first:
            die(f"the run ends at step {self.steps}, before its last stage begins at {self.stages[-1].first}; raise the limit {limits}")
        self.note = f"; warmup={cfg.warmup} is not over before the end" * (cfg.warmup >= self.steps)
        self.mix = shares(cfg.mix, cfg, "mix") if cfg.mix else {}
        self.mix_end = shares(cfg.mix_end, cfg, "mix_end") if cfg.mix_end else self.mix
        if cfg.mix_end and (not cfg.mix or any(s.mix for s in self.stages)):
            die("mix_end: needs `mix` to start from, and no `mix` in the stages")

    def _end(self, amount, tokens):
        """-> (first step that begins at or after `amount` tokens, or steps; the tokens before that step)."""
        last = self.stages[-1] if self.stages else SimpleNamespace(first=0, start=0, tokens=1)
        steps = -(-(amount - last.start) // last.tokens) if tokens else amount - last.first
        return last.first + steps, last.start + steps * last.tokens

    def _seen(self, step):
        """Progress at `step` in the table's own unit, 0..1."""
        stage = self.stages[bisect.bisect([s.first for s in self.stages], step) - 1]
        return (stage.start + (step - stage.first) * stage.tokens) / self.total if self.by_tokens else step / self.steps

    def _lr(self, step):
        cfg, x = self.cfg, self._seen(step)
        done = (step if cfg.warmup_from else step + 1) / max(cfg.warmup, 1)
        warm = self._seen(min(cfg.warmup, self.steps))
        past = min(max((x - warm) / (1 - warm), 0.0), 1.0) if warm < 1 else 0.0  # share of the run after warm-up
        fall = {"cosine": (1 + math.cos(math.pi * past)) / 2, "linear": 1 - past, "constant": 1.0,
                "wsd": min(1.0, (1 - x) / cfg.decay_share)}[cfg.schedule]  # fmt: skip
        return cfg.lr * min(1.0, cfg.warmup_from + (1 - cfg.warmup_from) * done) * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * fall)

    def __call__(self, step):
        if not 0 <= step <= self.steps:
            die(f"step {step} lies outside the plan of {self.steps} steps")
        cfg, i = self.cfg, bisect.bisect([s.first for s in self.stages], step) - 1
        stage, before = self.stages[i], self.stages[i - 1].mult if i else 0.0
        mult = before + (stage.mult - before) * min(1.0, (step - stage.first + 1) / stage.warmup) if stage.warmup else stage.mult
        hold = int(cfg.mix_decay_start * self.steps)
        w = max(0.0, (step - hold) / (self.steps - hold)) if self.steps > hold else 0.0
        mix = {k: (1 - w) * self.mix.get(k, 0.0) + w * self.mix_end.get(k, 0.0) for k in {**self.mix, **self.mix_end}}
        tau = max(cfg.tau_min, cfg.tau_max - (cfg.tau_max - cfg.tau_min) * step / self.steps)
        return Row(step, i, stage.seq_len, stage.tokens, stage.micro_tokens, stage.accum, self._lr(step) * mult,
                   stage.clip, stage.mix or mix, tau, step / self.steps)  # fmt: skip

    def table(self):
        heads = ("stage", "L", "rows", "accum", "mult", "clip", "first step", "steps", "tokens", "share")
        lines = ["{:>5} {:>6} {:>7} {:>5} {:>5} {:>5} {:>10} {:>9} {:>15} {:>6}".format(*heads)]
        for i, s in enumerate(self.stages):
            steps = ([t.first for t in self.stages] + [self.steps])[i + 1] - s.first
            mix = " ".join(f"{k}={v:.3g}" for k, v in (s.mix or {}).items())
            rows = s.tokens // s.seq_len // s.accum
            line = f"{i:5} {s.seq_len:6,} {rows:7,} {s.accum:5} {s.mult:5.2f} {s.clip:5.2f} {s.first:10,} {steps:9,}"
            lines.append(f"{line} {steps * s.tokens:15,} {steps * s.tokens / self.total:6.1%}  {mix} {s.note}".rstrip())
        return "\n".join([*lines, f"total {self.steps:,} steps, {self.total:,} tokens{self.note}"])


# ---- the optimizer ------------------------------------------------------------------------------------------------------


def newton_schulz(g):
    """Five quintic iterations towards the nearest orthogonal matrix, for a batch (B, m, n) at once, in bf16 as published."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x.mT if g.size(-2) > g.size(-1) else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g.size(-2) > g.size(-1) else x


class Muon(torch.optim.AdamW):
    """AdamW, except for groups with `muon`: their momentum is orthogonalised, each part of a fused matrix by itself."""

    @torch.no_grad()
    def step(self, closure=None):
        every, self.param_groups = self.param_groups, [g for g in self.param_groups if not g["muon"]]
        super().step()
        self.param_groups = every
        for group in every:
            if group["muon"]:
                self.muon_step(group, group["lr"] * group["muon"])

    def muon_step(self, group, lr):
        shapes = {}  # (m, n) -> [(slice of a parameter, its update)]: equal shapes go through Newton-Schulz together
        for p, parts in zip(group["params"], group["parts"], strict=True):
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buf = self.state[p]["momentum_buffer"]
            buf.lerp_(p.grad, 1 - group["momentum"])
            p.mul_(1 - lr * group["weight_decay"])
            for w, u in zip(p.split(parts), p.grad.lerp(buf, group["momentum"]).split(parts), strict=True):
                shapes.setdefault(w.shape, []).append((w, u))
        for (m, n), pairs in shapes.items():
            updates = newton_schulz(torch.stack([u for _, u in pairs]))
            for (w, _), u in zip(pairs, updates, strict=True):
                w.add_(u, alpha=-lr * max(1, m / n) ** 0.5)


def role(name, p):
    """What a parameter is, from whole words of its name and its shape: the optimizer treats a kind alike."""
    last = name.rpartition(".")[2]
    if p.ndim < 2 or last == "alpha" or name == "embed.weight":  # alpha, per-neuron routing logits, is a matrix in shape only
        return "vector" if p.ndim < 2 else "alpha" if last == "alpha" else "embedding"
    return "hidden" if "blocks" in name.split(".") and "gate_net" not in name.split(".") else "other matrix"


def build_optimizer(model, cfg):
    """Groups by role, each printed; `group["lr"]` is the plan's lr for every group (Muon scales it by muon_lr / lr). Another optimizer is a
    class in the last line and its name in train.py: whatever tensors it keeps in `state[p]` are saved and resumed."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}  # a tied weight appears once
    groups, roles, lines = [], {}, [f"{'parameters':<14} {'tensors':>7} {'elements':>14} {'decay':>6}  by"]
    for name, p in params.items():
        roles.setdefault(role(name, p), []).append(name)
    for kind, names in roles.items():
        decay = 0.0 if kind in ("vector", "alpha") or (kind == "embedding" and not cfg.decay_embed) else cfg.weight_decay
        by = "adamw" if cfg.optimizer == "muon" and kind != "hidden" else cfg.optimizer
        group = {"params": [params[n] for n in names], "names": names, "role": kind, "weight_decay": decay, "muon": 0.0}
        if by == "muon":
            if any(hasattr(params[n], "full_tensor") for n in names):
                die("optimizer=muon needs whole matrices; use --parallel=ddp, or --optimizer=adamw with fsdp")
            group |= {"muon": cfg.muon_lr / cfg.lr, "momentum": cfg.muon_momentum, "parts": [fused_parts(model, n) for n in names]}
        groups.append(group)
        lines.append(f"{kind:<14} {len(names):7} {sum(params[n].numel() for n in names):14,} {decay:6g}  {by}")
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(lines), flush=True)
    return (Muon if cfg.optimizer == "muon" else torch.optim.AdamW)(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def fused_parts(model, name):  # row counts of the separate matrices that a fused weight holds; a copied reader has heads of its own
    at, rows = model.get_submodule(name.rsplit(".", 2)[0]), len(model.get_parameter(name))
    return [n * at.width for n in (at.n_head, at.n_kv, at.n_kv)] if ".qkv." in name else [rows // 2] * 2 if ".gate_up." in name else [rows]
