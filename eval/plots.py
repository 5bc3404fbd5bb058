"""Pictures of a run, each with the numbers it shows as CSV beside it.

    python -m eval.plots --run=out/RUN [--events=1000:text,2000:text] [--out=DIR]     loss.png, entropy.png; routing.png
    python -m eval.plots --run=out/RUN --against=out/SFT                      the loss of a second run in the same picture
    python -m eval.plots --run=out/RUN --clock='nanoGPT, published:180:1.88'  clock.png: loss against seconds, beside points of others
    python -m eval.plots --harness=a.json,b.json --out=DIR                    tasks.png: benchmarks against chance
    python -m eval.plots --perplexity=a.json,b.json --out=DIR                 domains.png: bits per byte, with intervals

Read next: eval/routing.py, which draws its own report with `routing_figure`.
"""

import csv
import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

import configurator
from configurator import die

OPTIONS = {"run": "", "against": "", "events": "", "clock": "", "harness": "", "perplexity": "", "out": ""}
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
CHANCE = {"hellaswag": 0.25, "arc_easy": 0.25, "arc_challenge": 0.25, "piqa": 0.5, "winogrande": 0.5, "boolq": 0.5, "mmlu_stem": 0.25}
CHANCE |= {"lambada_openai": 0.0, "openbookqa": 0.25, "sciq": 0.25, "gsm8k": 0.0, "minerva_math": 0.0, "minerva_math500": 0.0}


def canvas(rows, columns, size):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def finish(figure, path, header, rows):
    """The picture and its numbers."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
    with open(Path(path).with_suffix(".csv"), "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return path


def read_metrics(run):
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        die(f"{path}: not there; --run names the folder of a training run")
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(text, option, form):
    """Of an option that a figure is marked by."""
    with suppress(ValueError):
        return float(text)
    die(f"--{option}: {text!r} is no number; it is written {form}")


def series(rows, key):
    """(steps, values) of the lines that hold `key`."""
    found = [(r["step"], r[key]) for r in rows if key in r]
    return tuple(np.array(list(zip(*found, strict=True)) or [(), ()], float))


def smooth(values, width=50):
    """Mean of the `width` points around each: one of those before it would lag behind, and held-out losses seem to lie below."""
    total, here = np.concatenate(([0.0], np.cumsum(values))), np.arange(len(values))
    reach = np.minimum(width // 2, np.minimum(here, len(values) - 1 - here))  # as many on both sides
    start, end = here - reach, here + reach + 1
    return (total[end] - total[start]) / (end - start)


def loss_figure(run, against="", events="", out=""):
    """Loss (raw, smoothed, held out), learning rate, temperature, throughput."""
    figure, axes = canvas(2, 2, (12, 8))
    loss, rate, speed, norm = axes.flat
    table, tau = [], None
    for n, (name, rows) in enumerate([(Path(p).name, read_metrics(p)) for p in (run, against) if p]):
        key = next((k for k in ("train/loss", "train/loss_noncausal") if any(k in r for r in rows)), None)
        if key is None:
            die(f"{run}/metrics.jsonl logs no train/loss")
        steps, values = series(rows, key)
        mean = smooth(values, min(50, max(1, len(values) // 10)))
        loss.plot(steps, values, color=COLORS[n], alpha=0.3, lw=0.8)
        loss.plot(steps, mean, color=COLORS[n], lw=1.8, label=f"{name}: training")
        held = sorted({k for r in rows for k in r if k.startswith("val/") and "loss" in k and k.split("/")[1] not in ("mean", "sd")})
        for i, k in enumerate(held):
            color = COLORS[(n + 1 + i) % len(COLORS)]
            loss.plot(*series(rows, k), "o--", ms=4, lw=1.2, color=color, label=f"{name}: {k.split('/')[1]}, held out")
        rate.plot(*series(rows, "train/lr"), color=COLORS[n], label=f"{name}: learning rate")
        if any("train/tau" in r for r in rows):
            tau = tau or rate.twinx()
            tau.plot(*series(rows, "train/tau"), color=COLORS[3 + n], ls=":", label=f"{name}: tau (right)")
            tau.set_ylabel("tau")
        speed.plot(*[a / b for a, b in zip(series(rows, "train/tokens_per_sec"), (1, 1e3), strict=True)], color=COLORS[n], label=name)
        norm.plot(*series(rows, "train/grad_norm"), color=COLORS[n], lw=0.9, label=name)
        table += [(name, int(s), v, m) for s, v, m in zip(steps, values, mean, strict=True)]
    for mark in filter(None, events.split(",")):
        at, _, text = mark.partition(":")
        at = number(at, "events", "STEP:TEXT,STEP:TEXT")
        loss.axvline(at, color="grey", lw=0.8, ls="--")
        loss.text(at, loss.get_ylim()[1], text, rotation=90, va="top", fontsize=8)
    for axis, title in ((loss, "nats per token"), (rate, "learning rate"), (speed, "thousand tokens per second"), (norm, "gradient norm")):
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.25)
        lines = axis.get_lines() + (tau.get_lines() if axis is rate and tau else [])
        lines = [line for line in lines if not line.get_label().startswith("_")]
        axis.legend(lines, [line.get_label() for line in lines], fontsize=7)
    return finish(figure, Path(out or run, "loss.png"), ("run", "step", "loss", "smoothed"), table)


def clock_figure(run, points, out=""):
    """Held-out and training loss against seconds since the run began, evaluations included; `points`: LABEL:SECONDS:LOSS;... of others."""
    figure, axes = canvas(1, 1, (8, 5))
    axis, rows = axes[0, 0], read_metrics(run)
    began, table = json.loads(Path(run, "config.json").read_text())["started"], []
    if rows and rows[0].get("time", 0) < began:
        die(f"{run}: was resumed, and a clock that stood still between says nothing; draw a run in one piece")
    held = sorted({k for r in rows for k in r if k.startswith("val/") and k.endswith("/loss") and "/mean/" not in k})
    for n, key in enumerate(["train/loss", *held]):
        seen = [(r["time"] - began, r["step"], r[key]) for r in rows if key in r]
        style = {"ms": 4, "color": COLORS[n], "label": f"{Path(run).name}: {key}"}
        axis.plot([s for s, _, _ in seen], [v for _, _, v in seen], "-" if n == 0 else "o-", **style)
        table += [(key, round(s, 1), step, v) for s, step, v in seen]
    others: dict = {}  # points of one label are one line
    for point in points.split(";"):
        label, *marks = point.rsplit(":", 2) if point.count(":") > 1 else (point, point, "")
        second, value = (number(mark, "clock", "'LABEL:SECONDS:LOSS;LABEL:SECONDS:LOSS'") for mark in marks)
        others.setdefault(label, []).append((second, value))
        table.append((label, second, "", value))
    for n, (label, marks) in enumerate(others.items()):
        said = f"{label}: {marks[-1][1]:g} at {marks[-1][0]:g} s"
        axis.plot(*zip(*marks, strict=True), "*--", ms=9, color=COLORS[(len(held) + 1 + n) % len(COLORS)], label=said)
    if held:  # the first steps would fill the picture
        axis.set_ylim(top=1.3 * max(v for what, *_, v in table if what != "train/loss"))
    axis.set(xlabel="seconds since train.py set up its run, evaluations included", ylabel="nats per token")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return finish(figure, Path(out or run, "clock.png"), ("what", "seconds", "step", "loss"), table)


def entropy_figure(run, out=""):
    """Routing entropies per layer, first against last evaluation, when the run logged them."""
    rows = read_metrics(run)
    kinds = ("routing_entropy", "dynamic_routing_entropy", "gate_entropy")
    logged = [r for r in rows if any(k.startswith("gate_entropy/layer_") for k in r)]
    if not logged:
        return None
    figure, axes = canvas(1, 3, (13, 4))
    table = []
    for axis, kind in zip(axes[0], kinds, strict=True):
        for row, color, label in ((logged[0], COLORS[7], "first"), (logged[-1], COLORS[0], "last")):
            values = {int(k.rpartition("_")[2]): v for k, v in row.items() if k.startswith(f"{kind}/layer_")}
            axis.plot(sorted(values), [values[i] for i in sorted(values)], "o-", ms=4, color=color, label=f"{label}, step {row['step']}")
            table += [(kind, row["step"], i, v) for i, v in sorted(values.items())]
        axis.set(xlabel="layer", ylabel="nats", title=kind.replace("_", " "), ylim=(0, 1.15 * max(v for _, _, _, v in table)))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
    return finish(figure, Path(out or run, "entropy.png"), ("kind", "step", "layer", "nats"), table)


def routing_figure(report, path):
    """Effective map, static map, usage, sharpness, histogram over neurons, shift between prompt categories."""
    from matplotlib.colors import ListedColormap

    acts, layers = report["acts"], report["layers"]
    figure, axes = canvas(2, 3, (16, 8.5))
    colors, x = ListedColormap(COLORS[: len(acts)]), np.arange(len(layers))
    titles = {
        "map": "what each neuron really acts as: argmax of its mean gate",
        "static_map": "static only: argmax of alpha\n(decides nothing where s is larger)",
    }
    for axis, key in zip((axes[0, 0], axes[0, 1]), titles, strict=True):
        grid = np.array([sorted(map(int, r[key])) for r in layers])  # (L, f), neurons sorted
        axis.imshow(grid, aspect="auto", cmap=colors, vmin=-0.5, vmax=len(acts) - 0.5, interpolation="nearest")
        axis.set(title=titles[key], xlabel="neurons, sorted", ylabel="layer")
    usage, sharp, hist, shift = axes[0, 2], axes[1, 0], axes[1, 1], axes[1, 2]
    bottom = np.zeros(len(layers))
    for k, act in enumerate(acts):
        share = np.array([r["shares"][act] for r in layers])
        usage.bar(x, share, bottom=bottom, color=COLORS[k], width=0.9, label=act)
        bottom += share
    usage.set(title="share of the mean gate", xlabel="layer", ylim=(0, 1))
    figure.legend(*usage.get_legend_handles_labels(), loc="outside upper right", ncols=len(acts))
    for i, (key, label) in enumerate((("H1", "H1 of a gate"), ("H2", "H2 of a neuron's mean"), ("H3", "H3 of the layer's mean"))):
        bars, error = [r[key] for r in layers], [r.get(key + "_std", 0.0) for r in layers]
        sharp.bar(
            x + 0.27 * (i - 1), bars, 0.25, yerr=error if any(error) else None, color=COLORS[4 + i], label=label, error_kw={"lw": 0.8}
        )
    unit = np.log(len(acts)) if len(acts) > 1 else 1.0
    for key, style in (("routing_entropy", "k:"), ("dynamic_routing_entropy", "k--")):
        sharp.plot(x, [r[key] / unit for r in layers], style, lw=1.2, label=key.replace("_", " "))
    sharp.set(title="entropy / ln K, mean ± std over neurons", xlabel="layer", ylim=(0, 1.4))
    sharp.legend(fontsize=7, ncols=2, loc="upper center")
    counts = np.array([r["H2_histogram"] for r in layers])
    image = hist.imshow(counts / counts.sum(1, keepdims=True), aspect="auto", extent=(0, 1, len(layers) - 0.5, -0.5), cmap="viridis")
    figure.colorbar(image, ax=hist, label="share of the layer's neurons")
    hist.set(title="H2 / ln K over neurons", xlabel="entropy of a neuron's mean gate", ylabel="layer")
    styles = dict(zip(report.get("categories", {}), ("-", "--", ":", "-.") * 9, strict=False))
    for category, style in styles.items():
        for k in range(len(acts)):
            shift.plot(x, [g[k] for g in report["categories"][category]], style, marker=".", color=COLORS[k], lw=1.3)
        shift.plot([], [], style, color="black", label=category)
    shift.set(title="share of the mean gate per prompt category", xlabel="layer", ylim=(0, 1.05))
    if report.get("categories"):
        shift.legend(fontsize=7)
    for axis in (usage, sharp, shift):
        axis.set_xticks(x[:: max(1, len(x) // 14)])
    for axis in (*axes[0, :2], hist):
        axis.set_yticks(x[:: max(1, len(x) // 14)])
    axes[0, 0].set_title(
        f"{Path(report['ckpt']).name}, step {report['step']}, gate {report['gate']}, tau {report['tau']:.3g}\n" + titles["map"]
    )
    columns = ("activation", "H1", "H2", "H3", "context", "identity", "gap", "variance_from_alpha", "mi domain", "mi token class")
    return finish(figure, Path(path), ("layer", *columns), [(i, *(r[c] for c in columns)) for i, r in enumerate(layers)])


def bars(option, files, out, name, read, label, chance=None):
    """Groups of bars with intervals: `read` makes {group: (value, low, high)} of one result file of eval.`option`."""
    results = {}
    for path in map(Path, files.split(",")):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            results[path.stem] = read(json.loads(path.read_text(encoding="utf-8")))
        if not results.get(path.stem):
            die(f"--{option}={path}: is no result of eval.{option}, or an empty one")
    out = out or Path(files.split(",")[0]).parent  # beside the first result
    figure, axes = canvas(1, 1, (11, 4.5))
    axis = axes[0, 0]
    groups = list(dict.fromkeys(g for r in results.values() for g in r))
    width, table = 0.8 / len(results), []
    for n, (run, values) in enumerate(results.items()):
        at = [groups.index(g) + width * (n - (len(results) - 1) / 2) for g in values]
        error = np.array([(v - low, high - v) for v, low, high in values.values()]).T
        axis.bar(at, [v for v, _, _ in values.values()], width * 0.95, yerr=np.maximum(error, 0), color=COLORS[n], label=run, capsize=2)
        table += [(run, g, *v) for g, v in values.items()]
    for i, g in enumerate(groups):
        if chance and g in chance:
            axis.plot([i - 0.45, i + 0.45], [chance[g]] * 2, "k--", lw=1, label="chance" if i == 0 else None)
    axis.set_xticks(range(len(groups)), groups, rotation=25, ha="right")
    axis.set_ylabel(label)
    axis.legend(fontsize=8)
    return finish(figure, Path(out, name), ("run", "group", "value", "low", "high"), table)


def main(argv):
    o = configurator.args(OPTIONS, argv, __doc__)
    made = []
    if not o.run and (idle := [key for key in ("against", "events", "clock") if getattr(o, key)]):
        die(f"--{idle[0]}={getattr(o, idle[0])} would do nothing here: it needs --run=out/RUN")
    if o.out:
        Path(o.out).mkdir(parents=True, exist_ok=True)
    if o.run:
        made += [loss_figure(o.run, o.against, o.events, o.out), entropy_figure(o.run, o.out)]
        made += [clock_figure(o.run, o.clock, o.out)] if o.clock else []
        report = Path(o.run, "routing.json")
        if report.is_file():
            made.append(routing_figure(json.loads(report.read_text()), Path(o.out or o.run, "routing.png")))
    if o.harness:
        read = lambda r: {t["task"]: (t["value"], *(t["value"] + d * 1.96 * (t["stderr"] or 0) for d in (-1, 1))) for t in r["tasks"]}  # noqa: E731
        made.append(bars("harness", o.harness, o.out, "tasks.png", read, "score", CHANCE))
    if o.perplexity:
        read = lambda r: {k: (v["bpb"], v["bpb_low"], v["bpb_high"]) for k, v in r["results"].items() if "bpb" in v}  # noqa: E731
        made.append(bars("perplexity", o.perplexity, o.out, "domains.png", read, "bits per byte"))
    if not made:
        die("nothing to draw: give --run=out/RUN, --harness=FILES or --perplexity=FILES")
    print("\n".join(str(p) for p in made if p))


if __name__ == "__main__":
    main(sys.argv[1:])
