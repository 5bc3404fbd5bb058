"""What a run tells about itself: logs, a step's worth and its alerts, statistics of weights and routing, benchmark lines.

All but `Log` and `Meter` runs at evaluations, logged steps or every `stats_every`, on the raw uncompiled module; no other step pays for it.
Read next: train.py, which logs what these return; fp8.py, whose operands `fp8_statistics` measures.
"""

import itertools
import json
import math
import os
import statistics as stats
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import configurator
import data
import denoise
import files
import fp8
from configurator import die
from machine import peak_memory, total, uncompiled
from model import Linear, Transformer

# ---- a step -------------------------------------------------------------------------------------------------------------


def group_of(batch):
    """What each target's loss is also logged under: its data source, or its denoiser."""
    if "task" in batch:
        return torch.repeat_interleave(batch["task"], batch["dec_cu"].diff(), output_size=len(batch["targets"]))
    return batch["source"].repeat_interleave(len(batch["targets"]) // len(batch["source"]))


def linear_weights(stack):
    return sum(m.weight.numel() for m in stack.modules() if isinstance(m, Linear))


def flops(model, batch) -> float:
    """Of one batch, forward and backward: each document at its own length, padding left out, causal attention at half, the embedding
    look-up not at all."""
    cfg, enc, cross, head = model.cfg, batch["cu"].diff().double(), 0, 0
    per_pair, dec = 12 * cfg.n_layer * cfg.n_head * cfg.width_head, 0 * enc
    if model.encoder is None:
        each = model.flops_per_token(0) if "targets" in batch else 6 * linear_weights(model.decoder)
        return batch["tokens"] * each + per_pair * float((enc * enc / 2).sum())
    if "dec_ids" in batch:
        real = F.pad((batch["targets"] >= 0).cumsum(0), (1, 0))[batch["dec_cu"].long()].diff() > 0
        enc, dec = enc * real, batch["dec_cu"].diff() * real
        cross = cfg.n_layer * 2 * cfg.kv_heads * cfg.width_head * cfg.d_model  # every decoder layer's keys and values of the encoder
        head = linear_weights(model.decoder) + cfg.vocab_size * model.head_weight.shape[1]
    pairs = (enc * enc + dec * enc + dec * dec / 2).sum()
    linear = enc.sum() * (linear_weights(model.encoder) + cross) + dec.sum() * head
    return float(6 * linear + per_pair * pairs)


class Meter:
    """What a step was worth: losses by term and by source, speed without evaluations and saves, memory, time spent waiting for data."""

    def __init__(self, cfg, model, names, machine, sizes=None, seen=None):
        """sizes: bytes of every id, where there are any; seen: {name: bytes trained on before this process}."""
        self.cfg, self.model, self.names, self.machine, self.seen = cfg, model, names, machine, dict(seen or {})
        self.sizes = None if sizes is None else torch.from_numpy(sizes).to(machine.device, torch.float64)
        self.groups = torch.zeros(max(len(names), 1), 3, dtype=torch.float64, device=machine.device)  # nats, targets, bytes of these
        self.here = torch.zeros_like(self.groups)  # of this step, which may yet be refused
        self.losses, self.norms, self.alerts = [], [], 0  # of the logged steps
        self.norm, self.targets = 0.0, 0.0  # since the last of them
        self.restart()

    def restart(self):
        self.clock, self.tokens, self.waited, self.steps, self.clipped = time.perf_counter(), 0, 0.0, 0, 0
        self.work = [0.0] * 5  # flops; denoise: packs, source, encoder and target tokens

    def expect(self, batches):
        """What there is to do depends on the lengths of the texts: counted before these leave for the device."""
        for batch in batches if isinstance(self.model, Transformer) else ():
            seen = [flops(self.model, batch) if self.machine.peak else 0.0]
            if "dec_ids" in batch:
                targets = int((batch["targets"] >= 0).sum())  # as many as the decoder reads
                seen += [1, batch["source_tokens"], batch["tokens"] - targets, targets]
            self.work = [a + b for a, b in itertools.zip_longest(self.work, seen, fillvalue=0.0)]

    def add(self, batch, each):
        real = batch["targets"] != -100
        size = real if self.sizes is None else self.sizes[batch["targets"].clamp(min=0)] * real
        self.here.index_add_(0, group_of(batch), torch.stack((each.double() * real, real.double(), size.double()), dim=1))

    def accept(self, tokens, waited, good, clipped, norm=0.0, targets=0.0):
        self.norm, self.targets = max(self.norm, norm), self.targets + targets * good
        self.tokens, self.waited = self.tokens + tokens, self.waited + waited
        self.steps, self.clipped = self.steps + 1, self.clipped + clipped
        self.groups += self.here if good else 0
        self.here.zero_()

    def bytes(self, new=None):
        """{name: bytes of text that were trained on}, over all ranks, which must all ask."""
        new = total(self.groups[:, 2].tolist(), self.machine) if new is None else new
        return {n: self.seen.get(n, 0) + int(b) for n, b in zip(self.names, new, strict=False)} if self.sizes is not None else {}

    def read(self, row, terms, sums, count, weights, left=0):
        """-> (the record of metrics.jsonl, one line for people, with what `left` steps will take). Every rank must ask."""
        *values, work, packs, source, enc, dec = total([*sums.tolist(), *self.groups.flatten().tolist(), *self.work], self.machine)
        losses = {t: v / max(count[t], 1.0) for t, v in zip(terms, values, strict=False)}
        by_name = zip(self.names, values[len(terms) :: 3], values[len(terms) + 1 :: 3], strict=False)
        self.seen = self.bytes(values[len(terms) + 2 :: 3])
        seconds = time.perf_counter() - self.clock
        speed, mfu = self.tokens / seconds, work / seconds / (self.machine.peak * self.machine.world) if self.machine.peak else 0.0
        suffix = "" if self.cfg.causal else "_noncausal"
        record = {f"train/{t}{suffix}": v for t, v in losses.items() if count[t] or self.cfg.objective != "latent"}
        if len(self.names) > 1:
            record |= {f"train/{name}/loss{suffix}": nats / n for name, nats, n in by_name if n}
        record |= {f"data/{name}/bytes": size for name, size in self.seen.items()}
        record |= {"train/lr": row.lr, "train/seq_len": row.seq_len, "train/stage": row.stage, "train/tokens_per_sec": speed}
        record |= {"train/step_tokens": row.tokens, "train/accum": row.accum, "train/clip": row.clip}
        record |= {f"train/mix/{name}": share for name, share in row.mix.items()}
        record |= {"train/wait": self.waited / seconds, "train/peak_mem": peak_memory(self.machine.device)}
        record |= {"train/clipped": self.clipped / max(self.steps, 1)}  # share of the steps since the last line or save
        record |= {"train/mfu": mfu} if mfu else {}
        record |= {"train/targets": self.targets} if self.targets else {}  # since the last line: all that a fine-tuning batch is about
        self.targets = 0.0
        if packs:
            seen = {"train/source_tokens": source, "train/encoder_tokens": enc, "train/target_tokens": dec}
            record |= {name: count / max(self.steps, 1) for name, count in seen.items()}  # of a step
            record |= {"train/fill": (enc + dec) / (packs * row.micro_tokens), "train/progress": row.eta}
            mix = denoise.mixture(self.cfg.mixture, self.cfg.mixture_end, self.cfg.mode_tokens)
            record |= {f"train/{n}/weight": w for n, w in zip(self.names, denoise.weights(mix, row.eta).tolist(), strict=False)}
        for m, adapter in enumerate(getattr(self.model, "adapters", ())):
            record |= {f"train/gain/{m}": float(adapter.gain.detach())}
        record |= {"train/tau": row.tau} if self.cfg.ffn == "polyglu" else {}
        loss = losses.get("loss", sum(weights.get(t, 1.0) * v for t, v in losses.items()))
        record.setdefault(f"train/loss{suffix}", loss)
        each = seconds / max(self.steps, 1)
        line = f"loss {loss:.4f} | lr {row.lr:.2e} | {speed / 1e3:.1f}k tok/s | {1e3 * each:.0f} ms"
        line += f" | {timedelta(seconds=round(each * left))} left" * (left > 0 and self.steps > 1)  # of the first step most is warming up
        line += f" | MFU {mfu:.1%}" * bool(mfu) + f" | {record['train/peak_mem'] / 1e9:.1f} GB" * (self.machine.device.type == "cuda")
        self.groups.zero_()
        self.restart()
        said = self.alert(loss)
        record |= {"train/alert": 1} if said else {}
        return record, line + (f" | T {row.seq_len}" if self.cfg.stages else "") + said

    def alert(self, loss):
        """What has leapt beyond twice the mean of the hundred logged before it, ten at least; a norm, before clipping, beyond 10, too."""
        found, norm, self.norm = [], self.norm, 0.0
        for seen, value, least, what in ((self.norms, norm, 10, f"norm up to {norm:.1f}"), (self.losses, loss, 0, "loss")):
            window = seen[-100:]
            if len(window) >= 10 and value > max(least, 2 * stats.fmean(window)):
                found.append(f"{what} more than twice the mean of {len(window)}")
            seen += [value] if math.isfinite(value) else []
        self.alerts += bool(found)
        return " | ALERT: " + ", ".join(found) if found else ""

    def summary(self, out: Path | None) -> str:
        """One line on all losses that this process logged; rank 0 names the folder in which they are left as summary.json, too."""
        if not (x := self.losses):
            return "logged losses: none that is finite"
        facts = {"first": x[0], "last": x[-1], "mean": stats.fmean(x), "sd": stats.pstdev(x), "min": min(x), "max": max(x)}
        how = "too few to say more" if len(x) < 5 else "falling" if x[-1] < x[0] else "NOT falling"
        if out:
            files.write_json(out / "summary.json", {"logged": len(x)} | facts | {"alerts": self.alerts, "verdict": how})
        first, last, mean, sd, low, high = (f"{value:.4f}" for value in facts.values())
        return f"logged losses: first {first}, last {last}, {how}; mean {mean}, sd {sd}, {low} to {high}; {self.alerts} alerts"


def conversations(name, manifest):
    """One line on a source of whole documents: what its preparation left out and why, and how much of the rest is trained on."""
    kept, out = sum(s["documents"] for s in manifest["shards"]), manifest.get("dropped", {})
    share = manifest.get("trained", 0) / max(sum(s["tokens"] for s in manifest["shards"]), 1)
    dropped = ", ".join(f"{n:,} {why}" for why, n in sorted(out.items()) if n) or "none"
    return f"{name}: {kept:,} conversations, dropped: {dropped}" + (f"; trained: {share:.1%} of the tokens" if share else "")


class Log:
    """stdout and metrics.jsonl always, wandb and TensorBoard when asked for. Only rank 0 has one."""

    def __init__(self, cfg, out: Path, start: int):
        self.path, self.bar, self.sinks = out / "metrics.jsonl", None, []
        self.always = {} if cfg.causal else {"causal": False}  # no row may pass for one of likelihoods
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() and start else []
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]  # not what came after the last save
        if cfg.wandb:
            import wandb

            kept, ask = out / "wandb_id", os.environ.get  # what the environment says goes first
            known = ask("WANDB_RUN_ID") or (kept.read_text() if kept.exists() and start else None)
            where = {"project": ask("WANDB_PROJECT", "prism"), "name": ask("WANDB_NAME", out.name), "dir": ask("WANDB_DIR", str(out))}
            try:
                run = wandb.init(**where, config=configurator.to_dict(cfg), resume="allow", id=known)
            except wandb.errors.Error as error:  # no key, a wrong one, no network: before anything of the run is written
                die(f"wandb=True: {str(error).rstrip('.')}; without a network WANDB_MODE=offline will do")
            files.write(kept, run.id)
            self.sinks.append((lambda row: run.log(row, step=row["step"]), run.finish))
        files.write(self.path, "".join(lines))
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(out), purge_step=start or None)
            self.sinks.append((lambda row: [board.add_scalar(k, v, row["step"]) for k, v in row.items() if k != "step"], board.close))

    def say(self, text):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def row(self, row: dict):
        row = {k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and not math.isfinite(v))}  # JSON has no NaN
        row |= self.always | {"time": round(time.time(), 2)}
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        for write, _ in self.sinks:
            write(row)

    def close(self):
        for _, close in self.sinks:
            close()


def seen(position) -> dict:
    """What a stream's state tells of the data: documents too short to use; of each source its tokens and epochs so far."""
    known = {name: s for name, s in position.get("sources", {}).items() if "epochs" in s}
    rows = {f"data/{name}/{key}": s[key] for name, s in known.items() for key in ("tokens", "epochs")}
    return rows | ({"data/dropped": position["dropped"]} if "dropped" in position else {})


# ---- statistics ---------------------------------------------------------------------------------------------------------


def inspect(cfg, step, model, batch, loss) -> dict:
    """What `stats_every` and `fp8_stats_every` ask of this step, between its gradients and their end."""
    rows = statistics(model, batch) if cfg.stats_every and step % cfg.stats_every == 0 else {}
    for row in fp8_statistics(model, loss) if cfg.fp8_stats_every and step % cfg.fp8_stats_every == 0 else ():
        rows |= {f"fp8/{row['name']}/{k}": v for k, v in row.items() if k != "name"}
    return rows


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
    state, rows = getattr(model, "fp8", None), {}
    if not state or not state.ones or not state.on:
        return []

    def look(name, x, kind, slot):
        old = state.delayed and state.warm and slot is not None
        if name not in rows:  # a recomputed block is met twice
            scale = state.scale[slot] if old else fp8.scale_of(x.detach().abs().amax(), kind, state.margin)
            rows[name] = measure(name, x, kind, scale)
            if state.delayed and slot is not None:  # steps so far in which the amax outgrew the scale
                rows[name]["saturated"] = float(state.saturated[slot])

    def watch(one, x, weight, y):
        look(f"{one.name}.x", x, fp8.E4M3, one.slot)
        look(f"{one.name}.weight", weight, fp8.E4M3, None)
        if y.requires_grad and any(one.use[1:]):
            y.register_hook(lambda g: look(f"{one.name}.grad", g, state.grad_kind, one.slot + 1))

    heard, state.watch = [t.clone() for t in state.heard], watch
    with uncompiled():
        torch.autograd.grad(loss(), next(p for p in model.parameters() if p.requires_grad))
    state.watch = None
    torch._foreach_copy_(state.heard, heard)
    return sorted(rows.values(), key=lambda row: row["snr_db"])


def compare_gradients(model, backward):
    """FP8's gradients beside bf16's of the same batch, before the first step -> a line to log; stops where one is wrong. A scale that does
    not belong to its product, in a library or a compiler, leaves the loss as it was and trains towards nothing: seen once (LOG.md)."""
    state, found = model.fp8, []
    for state.live in (False, True):
        backward()
        found.append({name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None})  # moments fill a GPU
        model.zero_grad(set_to_none=True)
    plain, ours = found
    floor = 0.01 * torch.nn.utils.get_total_norm(list(plain.values()))  # a tiny gradient may be noise
    far = {name: float((ours[name] - g).norm() / (g.norm() + floor)) for name, g in plain.items()}
    worst = max(far, key=lambda name: far[name] if math.isfinite(far[name]) else math.inf)
    if not far[worst] < 1:
        die(f"precision=fp8: the gradient of {worst} is {far[worst]:.3g} of its length off bf16's: use --precision=bf16 here")
    return f"fp8: gradients {sorted(far.values())[len(far) // 2]:.1%} from bf16's, {worst} furthest, {far[worst]:.1%}"


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


def part_gradients(model):
    """{metric: gradient norm after clipping} of what may stop learning unseen: PolyGLU's alpha by layer, frozen models' adapters."""
    parts = {}
    for name, p in model.named_parameters():
        alpha, adapter = name.endswith(".ffn.alpha"), name.startswith("adapters.")
        if p.grad is not None and (alpha or adapter):
            part = name.removesuffix(".ffn.alpha").replace("decoder.blocks.", "layer_") if alpha else name.split(".")[1]
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            parts.setdefault(f"{'alpha' if alpha else 'adapter'}_grad/{part}", []).append(grad)
    norms = [torch.nn.utils.get_total_norm(grads) for grads in parts.values()]
    return dict(zip(parts, torch.stack(norms).tolist(), strict=True)) if norms else {}


def breakdown(model):
    """The parameters by what they are for, as published: padding rows of the vocabulary not counted."""
    parts, rows = {}, model.cfg.vocab_rows - model.cfg.vocab_size if hasattr(model, "embed") else 0
    for name, p in model.named_parameters():
        words = name.split(".")
        part = ".".join(words[3:-1]) if "blocks" in words else ".".join(words[:-1]) or name
        part = "norms" if "norm" in part else "routing" if "gate_net" in part or words[-1] in ("alpha", "beta") else part
        count = p.numel() - (rows * p.shape[1] if name in ("embed.weight", "head.weight") else 0)
        parts[part] = parts.get(part, 0) + count
    return f"{model.num_params():,} parameters = " + " + ".join(f"{part} {n:,}" for part, n in parts.items())


def footprint(model):
    """What a step holds besides activations, under AdamW: Muon keeps one moment of a matrix."""
    every, trained = (sum(p.nbytes for p in model.parameters() if p.requires_grad or x) / 1e9 for x in (True, False))
    return f"{every + 3 * trained:.3g} GB of weights, gradients and moments, activations apart; a checkpoint {every + 2 * trained:.3g} GB"


# ---- benchmark ----------------------------------------------------------------------------------------------------------

WARM = 5  # steps before the clock: compilation, allocator, first kernels


def bytes_per_token(sources, mix):
    """Of what is trained on, each source at its share, or by its size; None where the data is no shards."""
    if not all(Path(path, "manifest.json").is_file() for path in sources.values()):
        return None
    shards = {name: [s for s in data.read_manifest(Path(path))["shards"] if s["split"] == "train"] for name, path in sources.items()}
    tokens, size = ({name: sum(s[key] for s in some) for name, some in shards.items()} for key in ("tokens", "bytes"))
    mix = mix or tokens
    return sum(share * size[name] / tokens[name] for name, share in mix.items() if share) / sum(mix.values())


def benchmark(laps, tokens, work, row, machine, sources):
    """Two lines of a table, from the wall clock after each synchronised step; tokens are real ones, accumulation included; work: FLOPs of
    a step on one rank."""
    if len(laps) < WARM + 2:
        die(f"benchmark: {len(laps)} steps are too few, {WARM} of them warm up; raise --max_steps")
    per_token = bytes_per_token(sources, row.mix)
    times = sorted(b - a for a, b in zip(laps[WARM:], laps[WARM + 1 :], strict=False))
    middle, low, high = (times[int(q * (len(times) - 1))] for q in (0.5, 0.25, 0.75))
    speed = tokens / middle
    mfu = f"{work / middle / machine.peak:.1%}" if work else "unknown"
    heads = ("L", "tokens", "ms", "quartiles", "tok/s", "bytes/s", "MFU", "GiB", "h per 1B")
    values = [row.seq_len, tokens, f"{1e3 * middle:.1f}", f"{1e3 * low:.1f}-{1e3 * high:.1f}", f"{speed:,.0f}"]
    values += [f"{speed * per_token:,.0f}" if per_token else "-", mfu]
    values += [f"{peak_memory(machine.device) / 2**30:.2f}", f"{1e9 / speed / 3600:.2f}"]
    form = "{:>6} {:>8} {:>9} {:>15} {:>10} {:>11} {:>8} {:>7} {:>9}"
    return form.format(*heads) + "\n" + form.format(*values)
