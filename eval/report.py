"""One HTML page about one run or several: everything a reader asks first, in a file that needs no network.

    python -m eval.report --run=out/RUN                             writes out/RUN/report.html
    python -m eval.report --run=out/A,out/B --out=compare.html      the same pictures with the runs laid over one another
    python -m eval.report --run=out/RUN --prompts="def |class "     what the best checkpoint writes after these (a | between prompts)

Loss, bits per byte of every domain, learning rate, stages, throughput, memory, whatever else metrics.jsonl holds, routing maps (after
eval.routing), samples, settings and environment. Pictures are matplotlib's, as SVG inside the page. Read next: eval/plots.py.
"""

import base64
import html
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

import configurator
from configurator import die
from eval.plots import COLORS, canvas, read_metrics, routing_figure, series, smooth

OPTIONS = {"run": str, "out": "", "prompts": "", "samples": 2, "max_new_tokens": 120, "temperature": 0.8, "seed": 1337}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1f24; background: #fff; margin: 0 auto; padding: 1rem; max-width: 84rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d5d9de }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .75rem }
figure { margin: 0; min-width: 0 } figure img { width: 100%; height: auto; display: block } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem } th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 6rem } th { font-weight: 600 }
tr + tr { border-top: 1px solid #e7eaee }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f6f8; padding: .75rem; border-radius: .3rem; font-size: .85rem }
.warn { background: #fff3d6; padding: .5rem .75rem; border-radius: .3rem } .key { display: inline-block; width: .8em; height: .8em }
b.drawn { font-weight: inherit; color: #174ea6 } summary { cursor: pointer }
"""


def read_run(path):
    """Everything a run directory says about itself."""
    path = Path(path)
    rows = read_metrics(path)
    if not rows:
        die(f"{path}/metrics.jsonl: is empty; the run has not logged yet")
    about = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {"config": {}}
    routing = next((p for p in (path / "routing.json", path / "routing" / "routing.json") if p.is_file()), None)
    return {"path": path, "name": path.name or str(path), "rows": rows, "config": about.pop("config"), "about": about, "routing": routing}


def keys(runs, test):
    """Names in the log that pass the test, in the order of first appearance."""
    return list(dict.fromkeys(key for run in runs for row in run["rows"] for key in row if test(key)))


# ---- pictures


def picture(figure, title):
    """A figure as an image inside the page; its text stays text."""
    import matplotlib
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "prism"}):
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return image(out.getvalue(), "svg+xml", title)


def image(data, kind, title):
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{html.escape(title, quote=True)}" src="{source}"></figure>'


def curve(runs, names, title, unit, scale=1.0, against="step", average=False, log=False, steps=False):
    """One axes: every name of every run. Runs differ by colour, names by line style; a single run uses colours for names."""
    figure, axes = canvas(1, 1, (4.7, 3.2))
    axis, styles, drawn = axes[0, 0], ("-", "--", ":", "-."), 0
    for r, run in enumerate(runs):
        for n, name in enumerate(names):
            rows = run["rows"] if against == "step" else [row | {"step": row[against] / 1e6} for row in run["rows"] if against in row]
            x, y = series(rows, name)
            keep = np.isfinite(y)
            x, y = x[keep], y[keep] * scale
            if not len(x):
                continue
            color = COLORS[(r if len(runs) > 1 else n) % len(COLORS)]
            part = name.split("/")[1] if name.count("/") > 1 else name.rpartition("/")[2]
            label = " ".join(([run["name"]] if len(runs) > 1 else []) + ([part] if len(names) > 1 else []))
            width = max(1, len(y) // 20) if average else 1
            if width > 1:
                axis.plot(x, y, color=color, alpha=0.25, lw=0.8)
            style = styles[n % 4] if len(runs) > 1 else "-"
            look = {"drawstyle": "steps-post"} if steps else {"marker": "o" if len(x) < 12 else None, "ms": 3}
            axis.plot(x, smooth(y, width), color=color, ls=style, lw=1.6, label=label or None, **look)
            drawn += bool(label)
    axis.set(title=title, xlabel="step" if against == "step" else "million tokens", ylabel=unit)
    if log:
        axis.set_yscale("log")
    high = max((abs(y).max() for line in axis.lines if len(y := line.get_ydata())), default=0.0)
    show = lambda v, _: f"{v / 1e6:g}M" if high >= 1e6 else f"{v / 1e3:g}k" if high >= 1e4 else f"{v:g}"  # noqa: E731
    if log or high >= 1e4:  # 30 and 2M, not 3 x 10^1 and 2.0 with a 1e6 in the corner
        axis.yaxis.set_major_formatter(show)
    if log:
        axis.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else "")
    axis.grid(alpha=0.25)
    axis.ticklabel_format(axis="x", useOffset=False, style="plain")
    if drawn:
        axis.legend(fontsize=7, loc="best")
    return picture(figure, title)


def plots(runs, progress):
    """[(heading, [pictures])], names that have one value: known metrics first, then all else, so that nothing logged goes unseen."""
    train = lambda *ends: keys(runs, lambda k: k.startswith("train/") and k.count("/") == 1 and k.removesuffix("_noncausal")[6:] in ends)  # noqa: E731
    loss = train("loss") or keys(runs, lambda k: k.startswith("train/") and k.removesuffix("_noncausal").endswith("loss"))
    moving = lambda key: [k for k in train(key) if len({row[k] for run in runs for row in run["rows"] if k in row}) > 1]  # noqa: E731
    by_source = [k for k in keys(runs, lambda k: k.startswith("train/") and k.count("/") == 2 and "loss" in k) if k not in loss]
    bytes_ = keys(runs, lambda k: k.startswith("val/") and "/bpb" in k and not re.search("/(mean|sd)/", k))
    held = keys(runs, lambda k: k.startswith("val/") and "/loss" in k and not re.search("/(mean|sd)/", k))
    kinds = {"nats per pair" if run["config"].get("objective") == "contrast" else "nats per token" for run in runs}
    unit = kinds.pop() if len(kinds) == 1 else "nats"
    other = keys(runs, lambda k: k.startswith("val/") and k not in bytes_ and k not in held and not re.search("/(mean|sd)/", k))
    plan = [
        ("Loss", loss, "Training loss", unit, {"average": True}),
        ("Loss", loss, "Training loss by tokens seen", unit, {"average": True, "against": "tokens"}),
        ("Loss", by_source, "Training loss by source", unit, {"average": True}),
        ("Loss", bytes_, "Held-out bits per byte", "bits per byte", {}),
        ("Loss", held, "Held-out loss", unit, {}),
        ("Loss", other, "Held out, other", "", {}),
        ("Schedule and health", train("lr"), "Learning rate", "", {}),
        ("Schedule and health", moving("seq_len"), "Sequence length", "tokens", {"steps": True}),
        ("Schedule and health", moving("stage"), "Stage", "number", {"steps": True}),
        ("Schedule and health", train("tau"), "Routing temperature", "tau", {}),
        ("Schedule and health", train("grad_norm"), "Gradient norm before clipping", "", {"average": True, "log": True}),
        ("Schedule and health", train("clipped"), "Clipped gradients", "% of the steps", {"scale": 100.0}),
        ("Speed and memory", train("source_tokens", "encoder_tokens", "target_tokens"), "Tokens of a step", "tokens", {"average": True}),
        ("Speed and memory", train("fill"), "How full the packs are", "%", {"scale": 100.0}),
        ("Speed and memory", train("tokens_per_sec"), "Throughput", "thousand tokens/s", {"scale": 1e-3}),
        ("Speed and memory", train("mfu"), "Model FLOPs utilisation", "% of the dense bf16 peak", {"scale": 100.0}),
        ("Speed and memory", train("peak_mem"), "Peak memory", "GB", {"scale": 1e-9}),
        ("Speed and memory", train("wait"), "Waiting for data", "% of the time", {"scale": 100.0}),
    ]
    seen = {name for _, names, *_ in plan for name in names} | {"step", "time", "tokens", "train/seq_len", "train/stage"}
    rest = keys(runs, lambda k: k not in seen and not re.search("/(mean|sd)/", k))
    groups = {}
    for name in rest:
        if any(isinstance(row.get(name), (int, float)) and not isinstance(row[name], bool) for run in runs for row in run["rows"]):
            first, _, last = name.rpartition("/")  # data/NAME/epochs: one picture of epochs; gate_entropy/layer_3: one of gate_entropy
            groups.setdefault(f"{first.split('/')[0]}: {last}" if name.count("/") > 1 else first or name, []).append(name)
    titles = {group: names[0] if len(names) == 1 else group for group, names in groups.items()}
    plan += [("Everything else that was logged", names, titles[group], "", {"average": True}) for group, names in groups.items()]
    sections, single = {}, []
    for heading, names, title, unit, options in tqdm(plan, desc="pictures", unit="plot", disable=not progress):
        most = max((sum(name in row for row in run["rows"]) for run in runs for name in names), default=0)
        if most == 1:
            single += [name for name in names if name not in single]
        elif most:
            sections.setdefault(heading, []).append(curve(runs, names, title, unit, **options))
    return list(sections.items()), single


def routing(run):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "routing.png")
        routing_figure(json.loads(run["routing"].read_text()), path)
        return image(path.read_bytes(), "png", f"Routing of {run['name']}")


# ---- words


def table(header, rows):
    cell = lambda tag, value: f"<{tag}>{value}</{tag}>"  # noqa: E731
    lines = [header, *rows]
    body = "".join("<tr>" + "".join(cell("th" if i == 0 else "td", v) for v in line) + "</tr>" for i, line in enumerate(lines))
    return f'<div class="wide"><table>{body}</table></div>'


def text(value):
    return html.escape(f"{value:.6g}" if isinstance(value, float) else str(value))


def summary(runs):
    """One column per run. A final loss is a mean over the last tenth of the log, with its spread: never one line of it."""
    columns = []
    for r, run in enumerate(runs):
        loss = max((series(run["rows"], k)[1] for k in ("train/loss", "train/loss_noncausal")), key=len)
        last = loss[-max(1, len(loss) // 10) :]
        held = [(row[k], row["step"]) for row in run["rows"] for k in row if k.startswith("val/mean/loss")]
        speed, memory = (series(run["rows"], f"train/{k}")[1] for k in ("tokens_per_sec", "peak_mem"))
        tokens = max((row["tokens"] for row in run["rows"] if "tokens" in row), default=0)
        columns.append(
            {
                "": f'<span class="key" style="background:{COLORS[r % len(COLORS)]}"></span> {text(run["name"])}',
                "steps": f"{run['rows'][-1]['step']:,}",
                "tokens": f"{tokens:,}",
                "final training loss": f"{last.mean():.4f} ± {last.std():.4f} ({len(last)} values)" if len(last) else "",
                "best held-out loss": "{:.4f} at step {:,}".format(*min(held)) if held else "",
                "tokens/s, median": f"{np.median(speed):,.0f}" if len(speed) else "",
                "peak memory": f"{memory.max() / 1e9:.2f} GB" if len(memory) else "",
            }
        )
    head, *rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table(head, rows)


def settings(runs):
    """What differs between the runs, in the open; everything, folded."""
    names = list(dict.fromkeys(key for run in runs for key in run["config"]))
    value = lambda run, key: text(json.dumps(run["config"].get(key)))  # noqa: E731
    differ = [key for key in names if len({value(run, key) for run in runs}) > 1]
    head = ["setting", *(text(run["name"]) for run in runs)]
    out = table(head, [[key, *(value(run, key) for run in runs)] for key in differ]) if len(runs) > 1 else ""
    everything = table(head, [[text(key), *(value(run, key) for run in runs)] for key in names])
    return out + f"<details><summary>all {len(names)} settings</summary>{everything}</details>"


def samples(run, opt):
    """What the best checkpoint writes: the prompt, and what it drew, set apart."""
    import checkpoint
    import sample
    import tokenizer

    model, state = checkpoint.load(run["path"])
    if model.cfg.arch == "encoder":
        return f"<p>{text(run['name'])}: an encoder writes no text.</p>"
    tok, blocks = tokenizer.load(run["path"]), []
    for prompt in opt.prompts.split("|"):
        options = {"temperature": opt.temperature, "num_samples": opt.samples, "seed": opt.seed, "max_new_tokens": opt.max_new_tokens}
        for answer in sample.generate(model, tok, [prompt], **options):
            blocks.append(f"<pre>{html.escape(prompt)}<b class=drawn>{html.escape(answer)}</b></pre>")
    return f"<p>{text(run['name'])}, step {state['step']:,}, temperature {opt.temperature:g}, seed {opt.seed}</p>" + "".join(blocks)


def page(runs, opt, progress=False):
    title = "Run " + " and ".join(run["name"] for run in runs)
    body = [f"<h1>{text(title)}</h1>", summary(runs)]
    if keys(runs, lambda k: k.endswith("_noncausal")):
        body.append("<p class=warn>_noncausal: the gate hears later tokens, so those losses are not next-token likelihoods.</p>")
    drawn, single = plots(runs, progress)
    for heading, pictures in drawn:
        body.append(f"<h2>{text(heading)}</h2><div class=plots>{''.join(pictures)}</div>")
    if single:  # evaluated once: a number is a number
        value = lambda run, name: next((text(row[name]) for row in run["rows"] if name in row), "")  # noqa: E731
        rows = [[text(name), *(value(run, name) for run in runs)] for name in single]
        body.append("<h2>Measured once</h2>" + table(["", *(text(run["name"]) for run in runs)], rows))
    maps = [routing(run) for run in runs if run["routing"]]
    body += [f"<h2>Routing</h2>{''.join(maps)}"] if maps else []
    if opt.samples:
        able = [run for run in runs if run["config"] and run["config"].get("objective") not in ("latent", "contrast")]  # encoders
        written = [samples(run, opt) for run in able if next(run["path"].glob("step-*/state.json"), None)]
        body += [f"<h2>Samples</h2>{''.join(written)}"] if any(written) else []
    body.append(f"<h2>Settings</h2>{settings(runs)}<h2>Environment</h2>")
    facts = list(dict.fromkeys(key for run in runs for key in run["about"]))
    head = ["", *(text(run["name"]) for run in runs)]
    fact = lambda value: text(", ".join(value) if isinstance(value, list) else value)  # noqa: E731
    body.append(table(head, [[text(key), *(fact(run["about"].get(key, "")) for run in runs)] for key in facts]))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(body)}</body></html>\n'


def main(argv):
    opt = configurator.args(OPTIONS, argv, __doc__, positive="max_new_tokens")
    runs = [read_run(path) for path in opt.run.split(",")]
    out = Path(opt.out or runs[0]["path"] / "report.html")
    out.write_text(page(runs, opt, sys.stderr.isatty()), encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {len(runs)} run{'s' * (len(runs) > 1)}")


if __name__ == "__main__":
    main(sys.argv[1:])
