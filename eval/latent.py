"""What a packet is worth: every arm and control that could refute it, in tokens and in bytes on the wire.

    python -m eval.latent --ckpt=out/latent_toy [--data=data/factqa/test.jsonl] [--samples=512] [--bits=16,8,6,4] [--out=DIR]
    python -m eval.latent --lms="('out/a', 'out/b')" --data=data/factqa/dev.jsonl --require=0.95     # can they answer from text?

Arms, per frozen model, all decoded greedily alike: the text; the same through input embeddings (must be equal); no context; the
packet at each width, as decoded from its bytes, and of each the first --slots alone (latent4@6: 4 bits, 6 slots); a zero packet; another
passage's packet; a packet without its private slots (shared); text cut to as many tokens as the packet has slots; text cut to as many
bytes as it has (head, tail, or the sentences that share most words with the question). With compress=context the question stands in
text after all of them; with compress=all it is part of the budget. Differences come with paired bootstrap intervals. Files in --out:
metrics.json, training_stats.json, metrics.csv, predictions.jsonl, table.md, two plots. Finished arms are kept there; --fresh runs them
again. Read next: eval/answers.py (measures and budgets), latentwire.py.
"""

import collections
import json
import random
import statistics
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import configurator
import latent_data
import latentwire
import machine
import tokenizer
from eval import write_json
from eval.answers import budget_arms, cut_bytes, cut_tokens, exact, f1, normalise, zstd_size
from eval.latent_report import differences, summary, table, training_stats, write
from wire import WIDTHS

DEFAULTS = dict(
    ckpt="",  # a latent run ...
    lms=(),  # ... or language models alone: can they answer from text at all?
    require=0.0,  # with lms: stop when the exact match of one of them is below
    data="",  # jsonl of {context, question, answers}; "": test.jsonl beside the training questions
    samples=512,  # questions; a seeded choice when there are more
    bits=(16, 8, 6, 4),  # widths on the wire; the first one also serves zero, shuffled and joint arms
    slots=(),  # further arms: only so many first slots of each packet, at every width
    prefix_gain=1.0,  # what slots are multiplied by, after their calibration ...
    calibration="",  # ... which is the run's; train_stats: every slot at the mean rms that slots had in training
    bytes=(),  # further byte budgets for text, beside those of the packets
    max_new_tokens=16,
    batch=64,
    resamples=2000,
    seed=1,
    device="auto",
    out="",  # "": CKPT/eval
    fresh=False,
)

# ---- one arm ------------------------------------------------------------------------------------------------------------


def teacher_forced(model, m, prompts, golds, packets=None, by_ids=False):
    """Summed log-likelihood (n,), tokens (n,), and rank of the first gold token (n,), all from one forward."""
    z_at = np.cumsum([0] + [len(p) for p in packets]) if packets else [0] * len(prompts)
    docs = [(p, int(z), g, "ans") for p, z, g in zip(prompts, z_at, golds, strict=False)]
    batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in latent_data.pack(docs).items()}
    lm = model.lms[m]
    if not by_ids:
        vectors = model.adapters[m](torch.cat(packets))[batch["slot_z"]] if packets else None
        batch["embeds"] = model.embeds(m, batch["ids"], batch["slot_at"], vectors)
    logits = lm.predict(lm(batch)[batch["ans.at"]])
    ce = F.cross_entropy(logits, batch["ans.goal"], reduction="none").double()
    first = batch["ans.step"] == 0
    who = first.long().cumsum(0) - 1
    nll = torch.zeros(len(docs), dtype=torch.float64, device=ce.device).index_add(0, who, ce)
    at = logits[first]
    rank = (at > at.gather(1, batch["ans.goal"][first][:, None])).sum(1)
    return (-nll).tolist(), [len(g) for g in golds], rank.tolist()


def run_arm(model, m, rows, prompts, packets=None, by_ids=False, opt=None):
    """-> {em, f1, ll, tokens, rank, text}: a list per measure, one entry per question."""
    side, lm, out = model.sides[m], model.lms[m], collections.defaultdict(list)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # alike lengths together; the answers do not depend on it
    for start in range(0, len(rows), opt.batch):
        which = order[start : start + opt.batch]
        part, golds = [prompts[i] for i in which], [side.gold(rows[i]["question"], rows[i]["answers"][0]) for i in which]
        mine = [packets[i] for i in which] if packets else None
        ll, tokens, rank = teacher_forced(model, m, part, golds, mine, by_ids)
        if by_ids:
            inputs = [torch.tensor(p, device=model.device) for p in part]
        else:
            inputs = [model.prompt_embeds(m, p, mine[j] if mine else None) for j, p in enumerate(part)]
        texts = [side.tok.decode(ids).strip() for ids in latentwire.greedy(lm, inputs, side.stops, opt.max_new_tokens)]
        pairs = [(t, rows[i]["answers"]) for t, i in zip(texts, which, strict=True)]
        scores = {"em": [exact(*pair) for pair in pairs], "f1": [f1(*pair) for pair in pairs]}
        for name, values in (scores | {"ll": ll, "tokens": tokens, "rank": rank, "text": texts}).items():
            out[name] += values
    back = np.argsort(order)
    return {name: [values[i] for i in back] for name, values in out.items()}


def seconds(model, m, rows, bits, opt):
    """Median seconds of one question, all included: tokenising, encoder, codec, reading, answering, words. -> (text, packet)"""
    side, times = model.sides[m], ([], [])

    def by_text(row):
        ids = torch.tensor(side.prompt(row["question"], context=row["context"]), device=model.device)
        side.tok.decode(latentwire.greedy(model.lms[m], [ids], side.stops, opt.max_new_tokens)[0])

    def by_packet(row):
        latentwire.answers(model, row["context"], row["question"], bits, opt.max_new_tokens, only=m)

    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    for row in rows[:17]:
        for kind, answer in enumerate((by_text, by_packet)):
            side.short.cache_clear()  # both tokenise what they read
            wait()
            start = time.perf_counter()
            answer(row)
            wait()
            times[kind].append(time.perf_counter() - start)
    return [statistics.median(t[1:] or t) for t in times]  # the first is warm-up


# ---- all of them --------------------------------------------------------------------------------------------------------


def arms_of(model, m, rows, packets, payload_bytes, opt):
    """{name: (prompts, packets or None, read by ids)}"""
    side, n = model.sides[m], len(rows)
    first, private = next(iter(packets.values())), model.cfg.latent_private
    slots = [len(p) for p in first]
    other = [next(j % n for j in range(i + 1, i + n) if rows[j % n]["context"] != rows[i]["context"]) for i in range(n)]
    text = [side.prompt(r["question"], context=r["context"]) for r in rows]
    asked = lambda packets: [side.prompt(r["question"], slots=len(p)) for r, p in zip(rows, packets, strict=True)]  # noqa: E731
    arms = {"text": (text, None, True), "replay": (text, None, False)}
    arms["none"] = ([side.prompt(r["question"], context="") for r in rows], None, True)
    read = {f"latent{form}": packet for form, packet in packets.items()}
    read |= {"zero": [torch.zeros_like(p) for p in first], "shuffled": [first[j] for j in other]}
    read |= {"shared": [p[:-private] for p in first]} if private else {}
    arms |= {name: (asked(packet), packet, False) for name, packet in read.items()}
    budgets = {"tokens": (slots, cut_tokens, lambda q: len(side.tok.encode(q)))}
    for few in opt.slots:
        budgets[f"tokens@{few}"] = ([min(few, s) for s in slots], *budgets["tokens"][1:])
    for form, sizes in payload_bytes.items():
        budgets[f"bytes@{form}bit"] = (sizes, cut_bytes, lambda q: len(q.encode()))
    for size in opt.bytes:
        budgets[f"bytes@{size}"] = ([size] * n, cut_bytes, lambda q: len(q.encode()))
    for name, (sizes, cut, measure) in budgets.items():
        fits = [budget_arms(side, r, k, cut, measure) for r, k in zip(rows, sizes, strict=True)]
        for kind in fits[0]:
            arms[f"{name}:{kind}"] = ([side.prompt(f[kind][1], context=f[kind][0]) for f in fits], None, True)
    return arms


def joint(model, rows, results, packets, opt):
    """Every model's packet answer, scored by all models, each under the packet that it gets; the likeliest one is the joint answer."""
    arm, n_lms = f"latent{opt.bits[0]}", range(len(model.lms))
    answers = [[results[arm, m]["text"][i] for m in n_lms] for i in range(len(rows))]
    total = np.zeros((len(model.lms), len(rows)))
    for c in n_lms:
        for m in n_lms:
            side = model.sides[m]
            prompts = [side.prompt(r["question"], slots=len(p)) for r, p in zip(rows, packets[m], strict=True)]
            for at in (slice(i, i + opt.batch) for i in range(0, len(rows), opt.batch)):
                golds = [side.gold(r["question"], a[c]) for r, a in zip(rows[at], answers[at], strict=True)]
                total[c, at] += teacher_forced(model, m, prompts[at], golds, packets[m][at])[0]
    chosen = [a[c] for a, c in zip(answers, total.argmax(0), strict=True)]
    em = [exact(a, r["answers"]) for a, r in zip(chosen, rows, strict=True)]
    return {
        "em": float(np.mean(em)),
        "f1": float(np.mean([f1(a, r["answers"]) for a, r in zip(chosen, rows, strict=True)])),
        "agreement": float(np.mean([len({normalise(x) for x in a}) == 1 for a in answers])),
        "oracle": float(np.mean([max(exact(x, r["answers"]) for x in a) for a, r in zip(answers, rows, strict=True)])),
    }


def read_from_text(opt) -> None:
    """Exact match of plain language models with and without the passage; what is not understood as text cannot be asked of a packet."""
    cfg = SimpleNamespace(compress="context", anchor="auto", bos="first")
    sides = [latent_data.Side(tokenizer.load(path), cfg) for path in opt.lms]
    where = machine.find(opt.device, "auto")
    lms = [latentwire.frozen(path).set_dtype(where.dtype).to(where.device) for path in opt.lms]
    model = SimpleNamespace(sides=sides, lms=lms, device=where.device)
    rows = [r for r in latent_data.read_rows(opt.data) if "question" in r][: opt.samples]
    for m, path in enumerate(opt.lms):
        em = []
        for hidden in (False, True):
            prompts = [sides[m].prompt(r["question"], context="" if hidden else r["context"]) for r in rows]
            em.append(summary(run_arm(model, m, rows, prompts, None, True, opt))["em"])
        print(f"{path}: exact match from text {em[0]:.3f}, without the passage {em[1]:.3f}; {len(rows)} questions")
        if em[0] < opt.require:
            configurator.die(f"{path} answers {em[0]:.3f} of the questions from text, {opt.require} are needed: train it longer")


def evaluate(opt) -> dict:
    model, state = latentwire.load(opt.ckpt)
    cfg, where = state["config"], machine.find(opt.device, state["config"]["dtype"])
    if not (stats := training_stats(opt.ckpt, state["step"], model)) and opt.calibration:
        configurator.die(f"{opt.ckpt}: its metrics.jsonl has no rms of slots in training; train it again, or drop --calibration")
    for path, adapter in zip(cfg["lms"], model.adapters, strict=True):
        if opt.calibration:
            adapter.rms, adapter.gain.data = stats[path]["rms_mean_cal"], torch.ones(())
        adapter.gain.data *= opt.prefix_gain
    model.set_dtype(where.dtype).to(where.device)
    qa = cfg["data"].get("qa") if isinstance(cfg["data"], dict) else cfg["data"]
    data = opt.data or str(Path(qa or "").parent / "test.jsonl")
    rows = [r for r in latent_data.read_rows(data) if "question" in r]
    usable = [r for r in rows if all(s.aligned(r["question"], r["answers"][0]) for s in model.sides)]
    dropped = len(rows) - len(usable)
    rows = random.Random(opt.seed).sample(usable, min(opt.samples, len(usable)))
    if len({r["context"] for r in rows}) < 2:
        configurator.die(f"{data}: {len(rows)} questions of --samples={opt.samples} remain; two passages are needed, to swap their packets")
    (out := Path(opt.out or Path(opt.ckpt) / "eval")).mkdir(parents=True, exist_ok=True)
    asks = [[r["context"], r["question"], r["answers"]] for r in rows]
    how = [opt.max_new_tokens, opt.bits[0], str(where.dtype), where.device.type, opt.prefix_gain, opt.calibration]  # bits: of most arms
    key = checkpoint.digest_json([state["sha256"], asks, *how])
    cache = out / "arms.json"
    kept = json.loads(cache.read_text()) if cache.exists() and not opt.fresh else {}
    kept = kept["arms"] if kept.get("key") == key else {}

    sources = [model.reader.source(r["context"], r["question"] if cfg["compress"] == "all" else None) for r in rows]
    cut, packets, payload_bytes = model.reader.cut, [{} for _ in model.lms], {}
    batches = [model.latents(sources[i : i + opt.batch]) for i in range(0, len(rows), opt.batch)]
    forms = {str(b): (b, None) for b in opt.bits} | {f"{b}@{n}": (b, n) for n in opt.slots for b in opt.bits}
    for m, parts in enumerate(zip(*batches, strict=True)):
        for form, way in forms.items():
            payloads, packets[m][form] = model.sent([z for part in parts for z in part], *way)
            payload_bytes[form] = [len(p) for p in payloads]  # as many for every model
    slots = {form: [len(p) for p in packets[0][form]] for form in forms}
    if opt.slots and max(opt.slots) >= (most := max(slots[str(opt.bits[0])])):
        configurator.die(f"slots={opt.slots}: no packet has more than {most}, and fewer are to be kept")

    results, metrics = {}, {"arms": {}, "intervals": {}}
    with torch.no_grad():
        for m, path in enumerate(cfg["lms"]):
            arms = arms_of(model, m, rows, packets[m], payload_bytes, opt)
            for name, (prompts, vectors, by_ids) in tqdm(arms.items(), desc=path, disable=not sys.stderr.isatty()):
                if f"{name}/{m}" not in kept:
                    kept[f"{name}/{m}"] = run_arm(model, m, rows, prompts, vectors, by_ids, opt)
                    write_json(str(cache), {"key": key, "arms": kept})
                results[name, m] = kept[f"{name}/{m}"]
            metrics["arms"][path] = {name: summary(results[name, m]) for name in arms}
            for name, time_ in zip(("text", f"latent{opt.bits[0]}"), seconds(model, m, rows, opt.bits[0], opt), strict=True):
                metrics["arms"][path][name]["seconds"] = time_
            metrics["intervals"][path] = differences(results, m, rows, list(forms), opt)
        metrics["joint"] = joint(model, rows, results, [mine[str(opt.bits[0])] for mine in packets], opt)
    raw = [r["context"].encode() if cfg["compress"] == "context" else f"{r['context']}\n{r['question']}".encode() for r in rows]
    zstd, mine = [zstd_size(r) for r in raw], slots[str(opt.bits[0])]
    metrics = {
        "samples": len(rows),
        "dropped": dropped,  # their answer begins inside a token
        "cut": cut,  # sources longer than seq_len, whose end was not read
        "latent_len": statistics.mean(mine),
        "tokens_per_slot": sum(map(len, sources)) / sum(mine),
        "bits": list(opt.bits),
        **metrics,
        "wire": {
            "text_bytes": statistics.mean(map(len, raw)),
            "zlib": statistics.mean(len(zlib.compress(r, 9)) for r in raw),
            "zstd": statistics.mean(zstd) if zstd[0] else None,
            "payload": {form: statistics.mean(sizes) for form, sizes in payload_bytes.items()},
            "slots": {form: statistics.mean(sizes) for form, sizes in slots.items()},
        },
        "training_stats": stats,
        "calibration": opt.calibration or cfg["calibration"],
        "prefix_gain": opt.prefix_gain,
        "data": data,
        "seed": opt.seed,
        "config": cfg,
    }
    write(out, metrics, rows, results)
    return metrics


def main(argv=None):
    opt = configurator.args(DEFAULTS, argv := sys.argv[1:] if argv is None else argv, __doc__)
    if not opt.bits or set(opt.bits) - set(WIDTHS):
        configurator.die(f"bits={opt.bits}: at least one of {WIDTHS}")
    for name in ("samples", "batch", "resamples", "max_new_tokens", "bytes", "slots"):
        if min(np.atleast_1d(getattr(opt, name)), default=1) < 1:
            configurator.die(f"{name}={getattr(opt, name)} must be above 0")
    if opt.prefix_gain <= 0 or opt.calibration not in ("", "train_stats"):
        configurator.die(f"prefix_gain={opt.prefix_gain}, calibration={opt.calibration}: a gain above 0, and train_stats or nothing")
    if bool(opt.ckpt) == bool(opt.lms):
        configurator.die("give --ckpt=RUN of a latent run, or --lms of language models")
    if opt.lms:
        vain = "bits bytes slots prefix_gain calibration out fresh seed resamples".split()
        if idle := {arg.partition("=")[0][2:] for arg in argv} & {*vain}:
            configurator.die(f"--{min(idle)} does nothing with --lms, which sends no packets: drop it")
        return read_from_text(opt)
    print(f"{table(evaluate(opt))}\nwritten to {opt.out or Path(opt.ckpt) / 'eval'}")


if __name__ == "__main__":
    main()
