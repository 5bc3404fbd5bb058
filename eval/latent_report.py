"""What eval/latent.py says of its arms: measures, differences with intervals, what training saw; its table, files and plots."""

import csv
import importlib.util
import json

import numpy as np

import checkpoint
from eval.answers import interval


def summary(arm):
    rank = np.array(arm["rank"])
    return {
        "em": float(np.mean(arm["em"])),
        "f1": float(np.mean(arm["f1"])),
        "nll_token": -sum(arm["ll"]) / sum(arm["tokens"]),
        "first_top1": float((rank < 1).mean()),
        "first_top5": float((rank < 5).mean()),
    }


def differences(results, m, rows, forms, opt):
    """The comparisons that decide; budgets are represented by their best kind on this very set, which favours them."""

    def best(prefix):
        return max((name for name, k in results if k == m and name.startswith(prefix + ":")), key=lambda n: np.mean(results[n, m]["em"]))

    first, out, passage = f"latent{forms[0]}", {}, [r["context"] for r in rows]
    pairs = [(first, "text"), (first, "none"), (first, best("tokens")), ("zero", "none"), ("shuffled", "none"), ("replay", "text")]
    pairs += [(f"latent{f}", best(f"bytes@{f}bit")) for f in forms] + [(f"latent{f}", first) for f in forms[1:]]
    pairs += [(f"latent{forms[0]}@{s}", best(f"tokens@{s}")) for s in opt.slots] + [("shared", first)] * (("shared", m) in results)
    for a, b in pairs:
        out[f"{a} - {b}"] = {k: interval(results[a, m][k], results[b, m][k], opt.resamples, opt.seed, passage) for k in ("em", "f1")}
    return out


def training_stats(run, step, model) -> dict:
    """{model: rms of its slots before and after calibration, mean over the `count` logged steps of training; rms of its word vectors}"""
    path = checkpoint.resolve(run).parent / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    out = {}
    for m, (name, adapter) in enumerate(zip(model.cfg.lms, model.adapters, strict=True)):
        keys = f"train/rms_raw/{m}", f"train/rms_cal/{m}"
        if found := [[row[key] for key in keys] for row in rows if row["step"] <= step and keys[0] in row]:
            raw, cal = np.mean(found, axis=0)
            out[name] = {"rms_mean_raw": raw, "rms_mean_cal": cal, "embed_rms": adapter.words_rms, "count": len(found)}
    return out


def cost(arm, unit, metrics):
    """The tokens or bytes of context that a packet takes, or that text was cut to; None of other arms."""
    wire, (budget, _, kind) = metrics["wire"], arm.partition(":")
    if arm.startswith("latent"):
        return wire["slots" if unit == "tokens" else "payload"][arm.removeprefix("latent")]
    if not kind or not budget.startswith(unit):
        return None
    at = budget.removeprefix(unit).removeprefix("@")  # of tokens: "" or a number; of bytes: a number or, with `bit`, a packet's
    return wire["payload"][at.removesuffix("bit")] if at.endswith("bit") else float(at or metrics["latent_len"])


def table(metrics) -> str:
    wire, lms = metrics["wire"], list(metrics["arms"])
    lines = ["| arm | bytes | " + " | ".join(f"{lm} EM | F1 | NLL/token" for lm in lms) + " |"]
    lines.append("|---|---|" + "---|" * 3 * len(lms))
    for arm in metrics["arms"][lms[0]]:
        size = wire["text_bytes"] if arm in ("text", "replay") else cost(arm, "bytes", metrics)
        cells = [f"{row['em']:.3f} | {row['f1']:.3f} | {row['nll_token']:.3f}" for row in (metrics["arms"][lm][arm] for lm in lms)]
        lines.append(f"| {arm} | {f'{size:.0f}' if size else ''} | " + " | ".join(cells) + " |")
    j = metrics["joint"]
    lines += ["", f"joint EM {j['em']:.3f}, agreement {j['agreement']:.3f}, oracle {j['oracle']:.3f}; n = {metrics['samples']}"]
    unread = f"; {metrics['cut']} passages were longer than the encoder reads" if metrics["cut"] else ""
    left = f"; {metrics['dropped']} questions left out, whose answer begins inside a token" if metrics["dropped"] else ""
    lines += [f"M = {metrics['latent_len']:g}, {metrics['tokens_per_slot']:.1f} source tokens per slot{unread}{left}"]
    if private := metrics["config"].get("latent_private"):
        lines += [f"private slots in each packet: {private}; shared: the packet without them"]
    for lm, kept in metrics["training_stats"].items():
        rms = "rms of slots {rms_mean_raw:.3f}, calibrated {rms_mean_cal:.3f} (mean of {count} steps of training), of words {embed_rms:.3f}"
        lines += [f"{lm}: {rms.format(**kept)}"]
    zstd = f"{wire['zstd']:.0f}" if wire["zstd"] else "not measured (it comes with pyarrow)"
    lines += [f"text {wire['text_bytes']:.0f} bytes, zlib {wire['zlib']:.0f}, zstd {zstd}", ""]
    for lm in lms:
        lines += [
            f"{lm}: {name}: EM {v['em'][0]:+.3f} [{v['em'][1]:+.3f}, {v['em'][2]:+.3f}]" for name, v in metrics["intervals"][lm].items()
        ]
    return "\n".join(lines) + "\n"


def write(out, metrics, rows, results):
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (out / "training_stats.json").write_text(json.dumps(metrics["training_stats"], indent=1) + "\n")
    (out / "table.md").write_text(table(metrics))
    with open(out / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = ("em", "f1", "nll_token", "first_top1", "first_top5")
        writer.writerow(("lm", "arm", *names))
        for lm, arms in metrics["arms"].items():
            writer.writerows((lm, arm, *(row[k] for k in names)) for arm, row in arms.items())
    lms = list(metrics["arms"])
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            said = {lm: {arm: results[arm, m]["text"][i] for arm in metrics["arms"][lm]} for m, lm in enumerate(lms)}
            line = {"id": row.get("id", i), "question": row["question"], "answers": row["answers"], "predictions": said}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if importlib.util.find_spec("matplotlib"):
        plots(out, metrics)


def plots(out, metrics):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    for unit in ("tokens", "bytes"):
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for colour, (lm, arms) in zip("rbgmck", metrics["arms"].items(), strict=False):
            text, packet = {}, {}
            for arm, row in arms.items():
                if x := cost(arm, unit, metrics):
                    curve = packet if arm.startswith("latent") else text
                    curve[x] = max(curve.get(x, 0), row["em"])
            axes.plot(*zip(*sorted(text.items()), strict=True), colour + "o--", label=f"{lm}: text cut, best kind")
            axes.plot(*zip(*sorted(packet.items()), strict=True), colour + "s-", label=f"{lm}: packet")
            axes.axhline(arms["text"]["em"], color=colour, lw=0.5)
        axes.set(xlabel=f"{unit} of context", ylabel="exact match", ylim=(0, 1.02))
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(out / f"em_by_{unit}.png", dpi=120)
        pyplot.close(figure)
