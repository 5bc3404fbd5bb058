"""The training loop, once, for every objective.

    python train.py config/shakespeare_char.py                        one process
    python train.py config/shakespeare_char.py --lr=2e-3 --max_steps=500
    torchrun --nproc_per_node=8 train.py config/polyglu_a100.py       data parallel; the same batches in the same order
    python train.py config/shakespeare_char.py --resume               go on where the newest checkpoint stands, to the bit
    python train.py --help                                            every setting with its default

A run is a folder, out/RUN: config.json, metrics.jsonl, checkpoints. Ctrl-C, SIGTERM and SIGUSR1 save and stop. The loss of a step is the
exact mean over all trained tokens of the global batch: how it is cut into micro-batches and ranks changes nothing.
Read next: model.py (what is trained), data.py (the batches), optim.py (the plan of a run), checkpoint.py (what is saved).
"""

import prelude  # isort: skip  # noqa: F401

import functools
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import configurator
import contrast
import data
import fp8
import machine as hardware
import mix
import monitor
import needs
import optim
from configurator import die
from denoise import DenoiseConfig
from flash import flash
from kernels import polyglu_backend
from latent_data import LatentConfig
from machine import gather, to_device, total
from model import ModelConfig, build, compile_blocks
from precision import PrecisionConfig


@dataclass(frozen=True)
class Config(ModelConfig, DenoiseConfig, contrast.ContrastConfig, PrecisionConfig, LatentConfig):
    # what and where
    out: str = "out/debug"
    objective: Literal["lm", "denoise", "contrast", "latent"] = "lm"  # another begins in find_objective
    init_from: str = ""  # a run whose weights to start from; step, data and optimizer start afresh
    parameters: int = 0  # what the model must count, padding apart; 0: whatever it does
    resume: str = ""  # latest | best | a step folder; auto: latest if there is one. Bare --resume is latest
    # data
    data: str | dict[str, str] = "data/stdlib"  # a folder of shards, or {name: folder}
    mix: dict[str, float] | None = None  # share of each source; None: by size
    mix_end: dict[str, float] | None = None  # the shares at the last step, reached linearly
    mix_decay_start: float = 0.8  # from this share of the run on
    auto_mix: bool = False  # shares of `mix` follow the surprise of the domains, see mix.py; it tunes on half of their text
    domain_source: dict[str, str] | None = None  # auto_mix: which source serves a domain
    packing: Literal["windows", "documents"] = "windows"  # documents: whole conversations packed into rows, never cut
    doc_mask: bool = True  # a document never sees its neighbours in the row
    chunk: int = 0  # shuffle unit in tokens; 0: the stages' least common multiple, else seq_len
    prefetch: int = 2  # steps built ahead of time, at least one
    # the arithmetic of a step
    seq_len: int = 256
    tokens_per_step: int = 2048  # over all ranks and accumulations
    micro_tokens: int = 0  # tokens of one forward; 0: tokens_per_step / world
    auto_batch: bool = False  # out of memory, one process begins again with micro_tokens (contrast_micro) halved, the step as it was
    max_steps: int = 0  # exactly one of max_steps, max_tokens, epochs
    max_tokens: int = 0
    epochs: float = 0.0
    stages: tuple[dict, ...] = ()  # rows {tokens | start, seq_len, mult, clip, rows, accum, warmup, mix, note}: see optim.py
    # optimisation
    optimizer: Literal["adamw", "muon"] = "adamw"  # another is named in build_optimizer (optim.py)
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup: int = 100
    warmup_from: float = 0.0  # first lr as a share of the peak; 0: peak / warmup
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # another is a curve in Plan._lr (optim.py)
    decay_share: float = 0.2  # of the run, for wsd
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embed: bool = True  # False: the embedding does not decay either; norms and biases never do
    clip: float = 1.0  # of the global gradient norm; 0: none
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    tau_max: float = 1.0  # temperature of polyglu's routing, linear over the run
    tau_min: float = 0.1
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite never reaches the weights
    # reports
    stats_every: int = 0  # gradients, weights, activations, dead neurons (monitor.py); 0: never
    analyze_batch: int = 0  # objective=denoise: print this many examples and exit
    log_every: int = 10  # 0: only the first step and the last
    eval_every: int = 0  # 0: only at the end
    eval_tokens: int = 65536  # per source
    domains: str = ""  # a folder of NAME.jsonl (prepare.val) whose documents are scored too
    domains_every: int = 1  # at every so many evaluations, and at the end
    eval_stage: bool = False  # a second pass at the stage's own length, as val_L/*
    benchmark: int = 0  # time so many steps after five of warm-up, print a line of a table per precision and stage, save nothing
    save_every: int = 0  # 0: only at the end
    keep: int = 2  # newest checkpoints kept, besides the best; 0: all
    best_metric: str = "val/mean/loss"  # lower is better; "-NAME": higher is
    wandb: bool = False
    tensorboard: bool = False
    progress: bool = True  # a bar, when stderr is a terminal
    # machine
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of activations; masters are fp32
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"


# ---- objectives: plain functions of (model, batch) -----------------------------------------------------------------------


def token_counts(batch) -> dict[str, float]:
    """How much each loss term of this micro-batch weighs; known on the host before the forward."""
    real = batch["targets"] != -100
    return {"loss": float(real.sum())}


def token_sums(model, raw, batch):
    """Next-token loss, denoising, fine-tuning: they differ in the stream alone. -> {term: sum}, (nll, group) of each target."""
    sum_, each = raw.nll(model(batch), batch["targets"])
    return {"loss": sum_}, each


class Objective(NamedTuple):
    build: object  # cfg -> model
    open_stream: object  # cfg, plan, rank, world -> stream
    counts: object  # batch -> {term: float}, what each of the terms of `sums` is divided by
    sums: object  # wrapped model, raw model, batch -> {term: sum}, per-target nll or None
    prepare: object = None  # wrapped model, raw model, batches -> None: work over the whole step's batches before the first backward
    weights: dict = {}  # of terms in the loss, 1 unless named; a term of weight 0 is only logged
    held_out: object = lambda cfg, length: {}  # cfg, a window's length or 0 -> {name: batches that `evaluate` scores}


def find_objective(cfg) -> Objective:
    if cfg.objective == "lm":
        return Objective(build, data.open_stream, token_counts, token_sums, held_out=held_out)
    if cfg.objective == "denoise":
        import denoise_stream

        return Objective(build, denoise_stream.open_stream, token_counts, token_sums, held_out=denoise_stream.val_batches)
    if cfg.objective == "contrast":
        return Objective(contrast.build, contrast.open_stream, contrast.counts, contrast.sums, contrast.prepare)
    import latentwire

    return Objective(latentwire.build, latentwire.open_stream, latentwire.counts, latentwire.sums, weights=latentwire.weights(cfg))


# ---- evaluation ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, val, machine, shares: bool) -> dict[str, float]:
    """Loss per token and bits per byte of each held-out set, noise-free; ranks score shares, or all of it where a forward is collective."""
    model.eval()
    rows, suffix = {}, "" if model.cfg.causal else "_noncausal"
    for name, batches in val.items():
        nats, right, count, size = 0.0, 0, 0, 0
        for batch in batches[machine.rank :: machine.world] if shares else batches:
            batch = to_device(batch, machine.device)
            hidden = model(batch)
            nats = nats + model.nll(hidden, batch["targets"])[0].double()
            right += model.hits(hidden, batch["targets"]) if "task" in batch else 0  # of UL2, whose losses compare badly between denoisers
            count, size = count + token_counts(batch)["loss"], size + batch.get("bytes", 0)
        nats, right, count, size = total([float(nats), right, count, size], machine)
        rows |= {f"val/{name}/loss{suffix}": nats / max(count, 1), f"val/{name}/ppl{suffix}": math.exp(min(nats / max(count, 1), 700))}
        if "task" in batches[0]:
            rows[f"val/{name}/accuracy"] = right / max(count, 1)
        if size:
            rows[f"val/{name}/bpb{suffix}"] = nats / (math.log(2) * size)
    if model.cfg.ffn == "polyglu" and model.cfg.arch == "decoder" and val:
        rows |= monitor.probe(model, to_device(next(iter(val.values()))[0], machine.device))
    model.train()
    return rows | mix.over_domains(rows, suffix)


def examine(cfg, model, sets, rank, row, step, end, machine) -> dict[str, float]:
    """One evaluation, in bf16. Domains take part in every `domains_every`-th; without them there is no mean to be the best by."""
    whole = end or not cfg.eval_every or step // cfg.eval_every % max(1, cfg.domains_every) == 0
    shares, some = cfg.parallel == "ddp", lambda sets: {k: v for k, v in sets.items() if whole or "document" not in v[0]}
    with fp8.evaluation(model):
        metrics = evaluate(model, some(sets(0)), machine, shares)
        if cfg.eval_stage:
            again = evaluate(model, some(sets(row.seq_len)), machine, shares)
            metrics |= {k.replace("val/", "val_L/", 1): v for k, v in again.items() if k.startswith("val/")}
        metrics |= rank(model) if rank else {}
    return metrics if whole else {k: v for k, v in metrics.items() if not re.search("/mean/|/sd/|^surprise_", k)}


def sources(cfg) -> dict[str, str]:
    return cfg.data if isinstance(cfg.data, dict) else {Path(cfg.data).name: cfg.data}


def check_vocabulary(cfg, resumed=None):
    """The data's ids fit the model, and mean what they meant to the weights that it starts from -> what shards say of their tokenizer."""
    shards = cfg.objective in ("lm", "denoise") or (cfg.objective == "contrast" and not str(cfg.data).endswith(".jsonl"))
    ids = {"fingerprint": None, "vocab_size": 0}
    for path in sources(cfg).values() if shards else ():
        ids = data.read_manifest(Path(path))["tokenizer"]
        if (tokens := ids["vocab_size"]) > cfg.vocab_size:
            die(f"vocab_size={cfg.vocab_size} is too small for the {tokens} tokens of {path}; set --vocab_size={tokens}")
        if cfg.init_from and not resumed and (checkpoint.resolve(cfg.init_from).parent / "tokenizer").is_dir():
            import tokenizer

            tokenizer.expect_same(checkpoint.resolve(cfg.init_from).parent, path)
    return ids


def held_out(cfg, length) -> dict[str, list]:
    """The val split of every source, and whole documents of domains."""
    longest = length or max([row.get("seq_len", cfg.seq_len) for row in cfg.stages], default=cfg.seq_len)
    micro = max(min(cfg.micro_tokens or cfg.tokens_per_step, 16384), longest)
    how = {"packing": "windows" if length else cfg.packing, "doc_mask": cfg.doc_mask}
    val = {name: data.val_batches(path, longest, cfg.eval_tokens, micro, **how) for name, path in sources(cfg).items()}
    texts = domains(cfg, 1 if cfg.auto_mix else None, length or 2048)
    return {f"{k}_split" if k in texts else k: v for k, v in val.items()} | texts


def domains(cfg, half, window=2048) -> dict[str, list]:
    """Whole documents, domain by domain; under auto_mix one half of each is reported and the other one steers."""
    if not cfg.domains:
        return {}
    import tokenizer
    from eval.perplexity import domain_batches

    return domain_batches(cfg.domains, tokenizer.load(next(iter(sources(cfg).values()))), min(window, cfg.max_len), half=half)


# ---- around the steps ----------------------------------------------------------------------------------------------------


def complain(cfg, step, losses, groups, model, machine) -> str:
    """Name what is not finite, in one line and on the rank where it began: a weight, a term of the loss, a source of data, a gradient.
    The run ends here, unless such steps are to be skipped; a damaged weight is what no skipping can mend."""
    shard = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    odd = {
        "weight": [n for n, p in model.named_parameters() if not torch.isfinite(shard(p.detach())).all()],
        "term": [k for k, v in losses.items() if not math.isfinite(v)],
        "data from": [k for k, v in groups.items() if not math.isfinite(v)],
        "gradient of": [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(shard(p.grad)).all()],
    }
    everywhere = gather(odd, machine)
    found = [", ".join(f"{kind} {names[0]}" for kind, names in each.items() if names) for each in everywhere]
    cause = [f"rank {r}: {found[r]}" for r, each in enumerate(everywhere) if each["weight"] or each["term"]]
    text = "; ".join(cause) or max(found) or "the norm of the gradients, though each of them is finite"
    line, damaged = f"step {step}: not finite: {text}", any(each["weight"] for each in everywhere)
    if cfg.on_nonfinite == "skip" and not damaged:
        return line
    if machine.rank:
        raise SystemExit(2)
    way = "nothing was changed, the last checkpoint stands; a step may be passed over with --on_nonfinite=skip"
    die(f"{line}; " + ("an earlier step did it: --resume from a checkpoint before, with a lower --lr" if damaged else way))


def warm_up(cfg, objective, call, raw, plan, step, machine) -> str:
    """Every stage's shapes, in each phase of precision, compiled and met by the allocator before the clock runs. On a stream of its own
    and without a step: parameters, optimizer, random states, the stream and FP8's histories stay what they are, to the bit."""
    began, state = time.perf_counter(), getattr(raw, "fp8", None)
    stream, phases = objective.open_stream(cfg, plan, machine.rank, machine.world, log=lambda text: None), {()}
    if state and state.used == "fp8":
        phases = {(state.on, state.warm), (True, state.warm), (True, state.delayed)}
    elif state and state.used == "te" and state.delayed:
        phases = set()  # its histories would hear these batches
    kept = (state.on, state.warm, [t.clone() for t in state.heard]) if state else ()
    stages, lines = plan.stages[plan(step).stage :], []

    def backward():
        hardware.sync_gradients(call, cfg.parallel, machine, now=cfg.parallel == "fsdp")
        with hardware.enough_memory(cfg, plan(stage.first)), fp8.scope(raw):
            sum(objective.sums(call, raw, batch)[0].values()).backward()

    for stage in stages:
        stream.step = stage.first
        batch = to_device(next(stream)[0], machine.device)
        if state and state.used == "fp8" and stage is stages[0]:
            state.on = True
            lines.append(monitor.compare_gradients(raw, backward))
        for phase in sorted(phases):
            if phase:
                state.on, state.warm = phase
            backward()
            raw.zero_grad(set_to_none=True)
    if state:
        state.on, state.warm = kept[:2]
        torch._foreach_copy_(state.heard, kept[2])
    hardware.wait(machine.device)
    return "\n".join([f"warmed up {len(stages)} stages x {len(phases)} phases of precision in {time.perf_counter() - began:.1f} s", *lines])


def introduce(log, cfg, model, plan, machine, precision, idle):
    """What this run is, before its first step: settings, machine, parameters, the plan, and the way in which each thing is computed."""
    default = configurator.to_dict(Config())
    log.say("  ".join(f"{k}={v}" for k, v in configurator.to_dict(cfg).items() if v != default[k]))
    if idle:
        log.say(f"without effect here: {idle}")
    log.say(f"{machine.why}; {machine.world} process{'es' * (machine.world > 1)}; {monitor.breakdown(model)}")
    log.say(monitor.footprint(model))
    texts = cfg.objective in ("denoise", "contrast")  # no rows of one length: the table has nothing to say but the stages
    log.say(f"{plan.steps:,} steps{plan.note}" if texts and not cfg.stages else plan.table())
    if cfg.precision != "bf16":
        log.say(precision)
    if machine.device.type == "cuda":
        slow, tf32 = not cfg.compile and cfg.objective != "latent", torch.get_float32_matmul_precision() != "highest"
        log.say(f"attention: {flash()}; TF32 {'on' if tf32 else 'off'}" + "; not compiled: --compile=True is faster, once started" * slow)
    way = polyglu_backend(machine.device, cfg.acts, machine.dtype)
    if cfg.ffn == "polyglu" and way[0] != "cpu.c":  # of which the line on the machine speaks
        log.say("polyglu: {}, {}".format(*way))
    for name, path in sources(cfg).items() if cfg.packing == "documents" and cfg.objective == "lm" else ():
        log.say(monitor.conversations(name, data.read_manifest(Path(path))))


def listen() -> list:
    """Signals that ask for the end land in this list: it is read between steps, and agreed on by all ranks."""
    asked = []

    def on_signal(number, frame):
        asked.append(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends it where it stands; whole checkpoints survive that
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, on_signal)
    return asked


# ---- the loop ------------------------------------------------------------------------------------------------------------


def main(argv):
    cfg, files = configurator.load(Config, argv, __doc__)
    needs.possible(cfg)
    machine = hardware.find(cfg.device, cfg.dtype)
    hardware.join(machine)
    if machine.device.type == "cuda" and machine.dtype == torch.float32:  # TF32, for a run in fp32 alone: beside bf16, fp32 means fp32
        torch.set_float32_matmul_precision("high")
    lead, objective = machine.rank == 0, find_objective(cfg)
    scratch = tempfile.TemporaryDirectory(prefix="benchmark-") if cfg.benchmark else None  # goes, too, where the run is refused
    out = Path(scratch.name if scratch else cfg.out)
    ids = check_vocabulary(cfg, checkpoint.find_resume(out, cfg.resume))  # this and the next two say no before the folder is touched
    idle, rank = needs.idle(cfg, argv, ids["vocab_size"]), contrast.ranking(cfg)
    lock = checkpoint.lock(out) if lead else None  # held until the process ends: two runs in one folder would destroy each other
    resume_from = checkpoint.find_resume(out, cfg.resume)
    if cfg.eos_id is None and (begun := resume_from or (cfg.init_from and checkpoint.resolve(cfg.init_from))):
        cfg = replace(cfg, eos_id=checkpoint.read_state(begun)["config"].get("eos_id"))  # kept with the weights, in no config file

    for seed in (torch.manual_seed, np.random.seed, random.seed):  # the last two for your own code: equal runs leave equal files
        seed(cfg.seed % 2**32)
    raw = objective.build(cfg)
    if cfg.parameters not in (0, raw.num_params()):
        die(f"parameters={cfg.parameters:,}, but this model has {raw.num_params():,}: set --parameters={raw.num_params()}, or 0")
    start = "; " + checkpoint.load_weights(cfg.init_from, raw) if cfg.init_from and not resume_from else ""
    raw.set_dtype(machine.dtype).to(machine.device).train()
    plan = optim.Plan(cfg, machine.world, data.epoch_tokens(cfg) if cfg.epochs else 0)
    plan = mix.MixedPlan(plan, cfg) if cfg.auto_mix else plan
    call = hardware.wrap(compile_blocks(raw) if cfg.compile else raw, cfg.parallel, machine)
    optimizer = optim.build_optimizer(raw, cfg)
    stream = objective.open_stream(cfg, plan, machine.rank, machine.world)
    names = stream.names
    sizes = data.byte_lengths(stream.shards[0].dir) if cfg.objective == "lm" and not cfg.benchmark else None

    step, state = 0, {"tokens": 0, "skipped": 0, "best": None, "metrics": {}}
    if resume_from:
        state = checkpoint.load_training(resume_from, raw, optimizer)
        step = state["step"]
        if state["config"].get("best_metric") != cfg.best_metric:  # of another measure, with which none of this one compares
            state["best"] = None
        stream.load(state["stream"])
    precision = fp8.apply(raw, cfg, machine.device, [(s.seq_len, s.micro_tokens) for s in plan.stages])
    used = precision.splitlines()[0].removeprefix("precision: ")
    fp8.load_memory(raw, state.pop("fp8", {}))
    if cfg.auto_mix:
        plan.state = state.pop("auto_mix", None) or plan.state
    stream, tune = data.Prefetch(stream, cfg.prefetch, machine.device.type == "cuda"), domains(cfg, 0) if cfg.auto_mix else {}
    sets = functools.cache(functools.partial(objective.held_out, cfg))  # by window length: 0 is the usual one
    val = {} if cfg.benchmark else sets(0)

    log = monitor.Log(cfg, out, step) if lead else None
    say = log.say if lead else lambda text: None
    if lead:
        about = {"commit": hardware.git_commit(), "torch": torch.__version__, "machine": machine.why, "world": machine.world}
        about |= {"files": files, "started": time.time(), "precision": used}
        checkpoint.start_run(out, cfg, about, resume_from)
        introduce(log, cfg, raw, plan, machine, precision, idle)
        log.say(f"resumed from {resume_from}" if resume_from else f"new run in {out}{start}")
    asked, parent = listen(), os.getppid()

    def save(step, metrics):
        name = cfg.best_metric.removeprefix("-")
        score, sign = metrics.get(name), 1 if name == cfg.best_metric else -1
        best = score is not None and math.isfinite(score) and (state["best"] is None or sign * score < sign * state["best"])
        state["best"] = score if best else state["best"]
        now = {"step": step, "stream": position, "bytes": meter.bytes(), "metrics": metrics, "tau": float(raw.tau), "fp8": fp8.memory(raw)}
        now |= {"stage": plan(step - 1).stage, "tokenizer": ids["fingerprint"]}
        now |= {"precision": used + " (not before fp8_start_step)" * bool(raw.fp8 and not raw.fp8.on)}
        full = state | now | {"config": configurator.to_dict(cfg)} | ({"auto_mix": plan.state} if cfg.auto_mix else {})
        if lead:
            checkpoint.sync(log.path)  # what a resumed run keeps of it must be there after a power cut, too
        size = checkpoint.save(out, step, raw, optimizer, full, cfg.keep, metric=score, is_best=best)
        say(f"saved {out}/step-{step:06d}, {size / 1e6:,.1f} MB{' (best so far)' if best else ''}")

    if cfg.objective in ("lm", "denoise") and (cfg.compile or machine.device.type == "cuda") and step < plan.steps:
        say(warm_up(cfg, objective, call, raw, plan, step, machine))
    params = [p for p in raw.parameters() if p.requires_grad]
    bar = tqdm(total=plan.steps, initial=step, unit="step", dynamic_ncols=True, disable=not (lead and cfg.progress and sys.stderr.isatty()))
    meter = monitor.Meter(cfg, raw, names, machine, sizes, state.get("bytes"))
    first, saved_at, position, laps = step, step, stream.state, []  # position: of the stream, after the last step that was taken

    while step < plan.steps:
        row, batches = plan(step), next(stream)

        # how many targets each loss term has over the whole step is known before any forward; a rank's signal travels along
        counts = [objective.counts(batch) for batch in batches]
        terms = sorted({t for c in counts for t in c})
        tokens = sum(int(batch["tokens"]) for batch in batches)
        if machine.world > 1 and os.getppid() != parent:
            asked.append("torchrun is gone")
        *count, tokens, stop = total([sum(c.get(t, 0.0) for c in counts) for t in terms] + [tokens, len(asked)], machine)
        count = dict(zip(terms, count, strict=True))
        if stop:
            break
        for group in optimizer.param_groups:
            group["lr"] = row.lr
        raw.tau.fill_(row.tau)
        if step and row.stage != plan(step - 1).stage:
            say(f"{row}")
        if line := fp8.set_step(raw, step):
            say(line)
        if objective.prepare:
            with hardware.enough_memory(cfg, row, saved_at > first), fp8.scope(raw):
                objective.prepare(call, raw, batches)

        meter.expect(batches)

        # forward and backward; the loss is the token mean of the global batch, the wrapper averages over ranks
        sums = torch.zeros(len(terms), dtype=torch.float64, device=machine.device)
        for i, batch in enumerate(batches):
            hardware.sync_gradients(call, cfg.parallel, machine, now=i == len(batches) - 1)
            batch = to_device(batch, machine.device)
            with hardware.enough_memory(cfg, row, saved_at > first):
                with fp8.scope(raw):
                    term, each = objective.sums(call, raw, batch)
                loss = sum(objective.weights.get(t, 1.0) * term[t] / max(count[t], 1.0) for t in term)
                (loss * machine.world).backward()
            sums += torch.stack([term[t].detach().double() if t in term else sums.new_zeros(()) for t in terms])
            if each is not None:
                meter.add(batch, each)

        # a gradient that is not finite never reaches the weights
        whole = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        norm = float(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)
        good = math.isfinite(norm)
        if good:
            if row.clip:
                torch.nn.utils.clip_grads_with_norm_(params, row.clip, whole)
            with hardware.enough_memory(cfg, row, saved_at > first):  # the first step makes the moments
                optimizer.step()
            fp8.refresh(raw)
        else:
            by_term, by_name = dict(zip(terms, sums.tolist(), strict=True)), dict(zip(names, meter.here[:, 0].tolist(), strict=False))
            line = complain(cfg, step, by_term, by_name, raw, machine)
            state["skipped"] += 1
            say(f"{line}; step skipped, {state['skipped']} so far")
        end = step + 1 == plan.steps
        reporting = end or step == first or bool(cfg.log_every and (step + 1) % cfg.log_every == 0)
        watched = monitor.part_gradients(raw) if reporting else {}
        if lead and (extra := monitor.inspect(cfg, step, raw, batch, lambda: objective.sums(raw, raw, batch)[0][terms[0]])):
            log.row({"step": step + 1} | extra)
        optimizer.zero_grad(set_to_none=True)
        step, position = step + 1, stream.state
        state["tokens"] += int(tokens)
        meter.accept(int(tokens), stream.wait, good, bool(0 < row.clip < norm), norm, count.get("loss", 0.0))
        bar.update()
        if cfg.benchmark:
            hardware.wait(machine.device)
            laps.append(time.perf_counter())
            if len(laps) > cfg.benchmark + monitor.WARM or step == plan.steps:
                break
            continue

        # reports, evaluation, checkpoint
        if reporting:
            record, line = meter.read(row, terms, sums, count, objective.weights, plan.steps - step)
            record |= {"train/grad_norm": norm} | ({"train/skipped": state["skipped"]} if state["skipped"] else {})
            say(f"step {step:>6}/{plan.steps} | {line} | norm {norm:.2f}")
            if lead:
                log.row({"step": step, "tokens": state["tokens"]} | record | monitor.seen(position) | watched)
        evaluating = (val or rank) and (end or (cfg.eval_every and step % cfg.eval_every == 0))
        if evaluating:
            state["metrics"] = examine(cfg, raw, sets, rank, row, step, end, machine)
            if lead:
                log.row({"step": step} | state["metrics"])
            say("  ".join(f"{k} {v:.4f}" for k, v in state["metrics"].items() if not re.search("/layer_|^surprise|/ppl|/acc", k)))
            if cfg.best_metric.removeprefix("-") not in state["metrics"] and cfg.domains_every < 2:
                say(f"best_metric={cfg.best_metric} is not measured here, so no step is marked best; metrics.jsonl has the names")
            if tune and not end:
                with fp8.evaluation(raw):
                    scores = evaluate(raw, tune, machine, shares=cfg.parallel == "ddp")
                say(plan.answer(step, {name: scores[f"val/{name}/bpb{'' if raw.cfg.causal else '_noncausal'}"] for name in tune}))
        if end or (cfg.save_every and step % cfg.save_every == 0):
            save(step, state["metrics"] if evaluating else {})
            saved_at = step
        if evaluating or saved_at == step:
            meter.restart()

    bar.close(), stream.close()
    if step > saved_at and not cfg.benchmark:
        save(step, {})
    if cfg.benchmark:
        scratch.cleanup()
        say(f"{precision.splitlines()[0]}; compile={cfg.compile}, {machine.why}")
        say(monitor.benchmark(laps, int(tokens), meter.work[0] / len(laps), row, machine, sources(cfg)))
    else:
        say(meter.summary(out if lead else None) if meter.losses else f"no step was taken: the run stands at {step} of {plan.steps}")
        stopped = step < plan.steps
        say(f"stopped by a signal at step {step}; --resume goes on" if stopped else f"done: {step} steps, {state['tokens']:,} tokens")
    if lead:
        log.close()
    if machine.world > 1:
        torch.distributed.barrier()  # rank 0 still saves and logs when the others are done; a peer that left would hang it
        del call
        hardware.leave()
    del lock


if __name__ == "__main__":
    main(sys.argv[1:])
