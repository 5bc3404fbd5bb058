"""Does routing do anything? PolyGLU against what it has to beat: same rows, same order, same schedule, several initialisations.

    python -m eval.controls --data=data/stdlib,data/sotu,data/enwik8 --out=out/controls            trains what is missing, prints the table
    python -m eval.controls --data=... --out=out/controls --minutes=5                              stops between runs; run again to go on

Arms: SwiGLU; SwiGLU with as many parameters; a fixed activation per layer in the published pattern; PolyGLU with a static gate, with a
running gate without and with noise, with a per-token and with a lagged gate. Held-out nats per token of fixed windows, in fp32, noise-free.
A difference is paired by seed (same rows); its interval is Student's over seeds, and an interval that holds 0 is called no effect.
A finished run is a line of OUT/runs.jsonl, with its settings, and is never repeated. CPU seconds are of one thread.
Read next: eval/routing.py, LOG.md.
"""

import contextlib
import io
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import configurator
import train
from configurator import die
from eval import OPEN, open_run
from eval.perplexity import score, window_batches

OPTIONS = {"data": str, "out": str, "seeds": 3, "steps": 400, "n_layer": 4, "d_model": 128, "lr": 3e-3, "tokens": 2048, "seq_len": 256}
OPTIONS |= {"windows": 200, "minutes": 0.0, "arms": ""}
RUN = ("data", "steps", "n_layer", "d_model", "lr", "tokens", "seq_len", "windows")  # what makes two lines comparable
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def arms(layers, width):
    """name: settings. The routing of a layer costs 4f + 4 + 32 (d + 1) + 132 parameters; a SwiGLU neuron costs 3d."""
    f = 4 * width
    more = round((4 * f + 4 + 32 * (width + 1) + 132) / (3 * width))
    published = ["silu"] * 3 + ["gelu"] * 7 + ["silu"] * 6 + ["tanh"] * 12
    fixed = [published[int((i + 0.5) * 28 / layers)] for i in range(layers)]
    poly = {"ffn": "polyglu", "d_ff": f, "gate_noise": False}
    return {
        "swiglu": {"d_ff": f},
        "swiglu-iso": {"d_ff": f + more},
        "fixed": {"d_ff": f, "act": tuple(fixed)},
        "static": poly | {"gate": "static"},
        "running": poly,
        "running+noise": poly | {"gate_noise": True},
        "token": poly | {"gate": "token"},
        "lagged": poly | {"gate": "lagged", "gate_block": 32},
    }


def run(o, name, settings, seed):
    """Train one arm with one seed -> a row of the table."""
    out = Path(o.out, f"{name}-{seed}")
    sources = {Path(p).name: p for p in o.data.split(",")}
    vocab = json.loads(Path(next(iter(sources.values())), "manifest.json").read_text())["tokenizer"]["vocab_size"]
    settings = settings | {
        "out": str(out),
        "data": sources,
        "mix": dict.fromkeys(sources, 1 / len(sources)),
        "vocab_size": vocab,
        "seed": seed,
    }
    settings |= {"n_layer": o.n_layer, "d_model": o.d_model, "n_head": o.d_model // 32, "max_len": o.seq_len, "seq_len": o.seq_len}
    settings |= {
        "tokens_per_step": o.tokens,
        "max_steps": o.steps,
        "warmup": o.steps // 10,
        "lr": o.lr,
        "eval_tokens": o.seq_len,
        "keep": 1,
    }
    began, text = time.process_time(), io.StringIO()
    with contextlib.redirect_stdout(text):
        train.main([f"--{k}={v}" for k, v in settings.items()] + ["--resume=auto"])
    seconds = time.process_time() - began
    model, state, device, _ = open_run(SimpleNamespace(**OPEN | {"ckpt": str(out)}))
    sets = window_batches(out, "", sources, o.seq_len, o.windows, 4096)
    sums = {source: score(model, batches, device)[0].sum(0).tolist() for source, batches in sets.items()}
    loss = {source: nats / tokens for source, (nats, tokens, *_) in sums.items()}
    row = {"arm": name, "seed": seed, "parameters": model.num_params(), "cpu_seconds": seconds, "steps": state["step"]}
    row["settings"] = {key: getattr(o, key) for key in RUN}
    return row | {"loss": loss | {"mean": sum(loss.values()) / len(loss)}}


def spread(values):
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.4f}"


def paired(a, b):
    """Mean and half-width of the 95 % interval of a - b, over seeds."""
    diff = [x - y for x, y in zip(a, b, strict=True)]
    half = T975.get(len(diff) - 1, 1.96) * statistics.stdev(diff) / math.sqrt(len(diff)) if len(diff) > 1 else math.nan
    return statistics.mean(diff), half


def report(rows, order):
    """The table, and one plain sentence per arm."""
    by = {name: sorted((r for r in rows if r["arm"] == name), key=lambda r: r["seed"]) for name in order}
    by = {name: runs for name, runs in by.items() if runs}
    domains = list(next(iter(by.values()))[0]["loss"])
    lines = [f"| arm | parameters | {' | '.join(domains)} | - swiglu | - swiglu-iso | CPU s |", "|---" * (len(domains) + 5) + "|"]
    verdicts = []
    for name, runs in by.items():
        cells = [spread([r["loss"][d] for r in runs]) for d in domains]
        for base in ("swiglu", "swiglu-iso"):
            seeds = {r["seed"]: r for r in by.get(base, [])}
            mates = [(r["loss"]["mean"], seeds[r["seed"]]["loss"]["mean"]) for r in runs if r["seed"] in seeds]
            if name == base or not mates:
                cells.append("")
                continue
            mean, half = paired(*zip(*mates, strict=True))
            cells.append(f"{mean:+.4f} ± {half:.4f}")
            if base == "swiglu-iso":
                what = "no effect that these seeds can show" if not abs(mean) > half else "better" if mean < 0 else "worse"
                verdicts.append(f"{name} against {base}: {mean:+.4f} ± {half:.4f} nats/token, {what}")
        cpu = statistics.median(r["cpu_seconds"] for r in runs)
        lines.append(f"| {name} | {runs[0]['parameters']:,} | {' | '.join(cells)} | {cpu:.0f} |")
    return "\n".join(lines + ["", *verdicts])


def main(argv):
    o = configurator.args(OPTIONS, argv, __doc__, positive="seeds steps windows n_layer d_model seq_len tokens")
    table, began = arms(o.n_layer, o.d_model), time.time()
    names = o.arms.split(",") if o.arms else list(table)
    if unknown := sorted(set(names) - set(table)):
        die(f"--arms={o.arms}: no arm {unknown[0]!r}; there are {', '.join(table)}")
    log = Path(o.out, "runs.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for r in rows:
        if other := [key for key in RUN if r.get("settings", {}).get(key) != getattr(o, key)]:
            there = r.get("settings", {}).get(other[0], "unknown")
            die(f"{log}: was measured with {other[0]}={there}, not {getattr(o, other[0])}: give that, or another --out")
    done = {(r["arm"], r["seed"]) for r in rows}
    for seed in range(1, o.seeds + 1):
        for name in names:
            if (name, seed) in done or (o.minutes and time.time() - began > 60 * o.minutes):
                continue
            rows.append(run(o, name, table[name], seed))
            with open(log, "a") as f:
                f.write(json.dumps(rows[-1]) + "\n")
            print(f"{name} seed {seed}: {rows[-1]['loss']['mean']:.4f} nats/token, {rows[-1]['cpu_seconds']:.0f} CPU s", flush=True)
    left = len({(name, seed) for name in names for seed in range(1, o.seeds + 1)} - {(r["arm"], r["seed"]) for r in rows})
    print(report(rows, table))
    if left > 0:
        print(f"{left} runs are missing; the same command goes on")


if __name__ == "__main__":
    main(sys.argv[1:])
