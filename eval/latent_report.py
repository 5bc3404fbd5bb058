"""The files of eval/latent.py: metrics.json, metrics.csv, predictions.jsonl, table.md and two plots."""

import csv
import importlib.util
import json
import re


def table(metrics) -> str:
    wire, lms = metrics["wire"], list(metrics["arms"])
    sizes = {f"latent{b}": n for b, n in wire["payload"].items()} | {"text": wire["text_bytes"], "replay": wire["text_bytes"]}
    lines = ["| arm | bytes | " + " | ".join(f"{lm} EM | F1 | NLL/token" for lm in lms) + " |"]
    lines.append("|---|---|" + "---|" * 3 * len(lms))
    for arm in metrics["arms"][lms[0]]:
        budget = re.match(r"bytes@(\d+)(bit)?:", arm)
        size = sizes.get(arm) or (budget and (wire["payload"][budget[1]] if budget[2] else float(budget[1])))
        cells = [f"{row['em']:.3f} | {row['f1']:.3f} | {row['nll_token']:.3f}" for row in (metrics["arms"][lm][arm] for lm in lms)]
        lines.append(f"| {arm} | {f'{size:.0f}' if size else ''} | " + " | ".join(cells) + " |")
    j = metrics["joint"]
    lines += ["", f"joint EM {j['em']:.3f}, agreement {j['agreement']:.3f}, oracle {j['oracle']:.3f}; n = {metrics['samples']}"]
    unread = f"; {metrics['cut']} passages were longer than the encoder reads" if metrics["cut"] else ""
    left = f"; {metrics['dropped']} questions left out, whose answer begins inside a token" if metrics["dropped"] else ""
    lines += [f"M = {metrics['latent_len']:g}, {metrics['tokens_per_slot']:.1f} source tokens per slot{unread}{left}"]
    zstd = f"{wire['zstd']:.0f}" if wire["zstd"] else "not measured (it comes with pyarrow)"
    lines += [f"text {wire['text_bytes']:.0f} bytes, zlib {wire['zlib']:.0f}, zstd {zstd}", ""]
    for lm in lms:
        lines += [
            f"{lm}: {name}: EM {v['em'][0]:+.3f} [{v['em'][1]:+.3f}, {v['em'][2]:+.3f}]" for name, v in metrics["intervals"][lm].items()
        ]
    return "\n".join(lines) + "\n"


def write(out, metrics, rows, results):
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
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

    wire, m = metrics["wire"], metrics["latent_len"]
    for unit in ("tokens", "bytes"):
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for colour, (lm, arms) in zip("rbgmck", metrics["arms"].items(), strict=False):
            text, packet = {}, {}
            for arm, row in arms.items():
                budget = re.match(r"(tokens|bytes@(\d+)(bit)?):", arm)
                if budget and arm.startswith(unit):
                    x = m if unit == "tokens" else wire["payload"][budget[2]] if budget[3] else float(budget[2])
                    text[x] = max(text.get(x, 0), row["em"])
                elif arm.startswith("latent"):
                    x = m if unit == "tokens" else wire["payload"][arm[6:]]
                    packet[x] = max(packet.get(x, 0), row["em"])
            axes.plot(*zip(*sorted(text.items()), strict=True), colour + "o--", label=f"{lm}: text cut, best kind")
            axes.plot(*zip(*sorted(packet.items()), strict=True), colour + "s-", label=f"{lm}: packet")
            axes.axhline(arms["text"]["em"], color=colour, lw=0.5)
        axes.set(xlabel=f"{unit} of context", ylabel="exact match", ylim=(0, 1.02))
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(out / f"em_by_{unit}.png", dpi=120)
        pyplot.close(figure)
