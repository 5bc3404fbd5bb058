"""What is a published "15x" made of? Every factor alone, every factor missing, all and none, at equal bytes; bits per byte decide.

    python -m eval.ablation --out=out/ablation                      CPU size: a small model, stdlib text, three repeats, half an hour
    python -m eval.ablation --out=out/ablation --texts=DIR          the same on DIR/NAME.jsonl, scored on DIR/val/NAME.jsonl
    python -m eval.ablation --out=data/three --prepare              its data alone, for config/superbpe_debug.py
    python -m eval.ablation --size=gpu --data='{"super": {"web": "data/web_t80k"}, "plain": {"web": "data/web_bpe200k"}}' --domains=data/val

T  SuperBPE instead of a plain BPE of the same size on the same text
F  FP8 instead of bf16. On a CPU it is emulated: its losses mean something, its speed nothing
C  the sequence-length curriculum instead of one length
K  compiled instead of eager, M  large micro-batches instead of 6,144 tokens (4,096, as published, are no whole windows of 768); GPU only

Steps are equal between arms, and bytes per step as nearly as whole windows allow: tokens per step follow the tokenizer. Loss per token
never crosses tokenizers. A finished run is kept in --out and not repeated: interrupt and go on at will. Read next: eval/perplexity.py;
LOG.md has the verdicts."""

import ast
import contextlib
import hashlib
import io
import json
import math
import random
import statistics
import sys
from pathlib import Path

import configurator
import data
import train
from configurator import die
from eval.controls import paired
from files import write_json

OPTIONS = {"out": str, "prepare": False, "size": "cpu", "data": {}, "domains": "", "seeds": 3, "bytes": 0.0, "lrs": (1.0,), "only": ""}
OPTIONS |= {"texts": "", "vocab": 2048}
SIZES = {  # argv of every arm; factors that exist; bytes seen
    "cpu": (
        ["--n_layer=4", "--n_head=4", "--n_kv_head=2", "--d_model=128", "--d_ff=384", "--embed_rank=64", "--qk_norm=False"]
        + ["--max_len=256", "--keep=1", "--device=cpu", "--weight_decay=0.1", "--eval_tokens=256"],
        "TFC",
        1e6,
    ),
    "gpu": (["config/superbpe_197m.py", "--save_every=0", "--keep=1", "--parameters=0"], "TFCKM", 3.5e9),
}
LONGEST = {"cpu": 256, "gpu": 2048}
SHARES = (0.004, 0.006, 0.01, 0.02, 0.03, 0.04, 0.05, 0.18, 0.18, 0.48)  # of the run, per stage of the ten-stage table
ULTRA = tuple(
    zip((8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048), (0.3, 0.4, 0.5, 0.6, 0.75, 0.85, 0.95, 1.0, 1.0, 1.0), SHARES, strict=True)
)
CLAIMS = {"T": 1.6, "F": 2.0, "C": 3.0, "K": 1.2, "M": 1.3}


# ---- text for a machine without any: three kinds, from the standard library and a generator --------------------------------


def write_texts(folder):
    """code: modules; prose: their docstrings; sums: worded arithmetic. jsonl, the same on every machine with this Python."""
    from prepare import sources

    rng, folder = random.Random(0), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"code": [], "prose": [], "sums": []}
    for path, _ in sources.find("stdlib"):
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        kinds["code"].append(text)
        with contextlib.suppress(SyntaxError):
            nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
            kinds["prose"].append("\n\n".join(d for d in map(ast.get_docstring, nodes) if d and len(d) > 60))
    things, people = ("apples", "books", "coins", "stamps", "pencils", "cards"), ("Tom", "Ada", "Lin", "Sam", "Eva", "Max")
    for _ in range(4000):
        (a, b, c), who, what = (rng.randint(2, 99) for _ in range(3)), rng.choice(people), rng.choice(things)
        story = f"{who} has {a} {what} and buys {b} more every day for {c} days. How many {what} does {who} have then?"
        kinds["sums"].append(f"Question: {story}\nAnswer: {who} buys {b} x {c} = {b * c} {what}. {a} + {b * c} = {a + b * c}.")
    for kind, texts in kinds.items():
        texts = [t for t in texts if len(t) >= 100]
        rng.shuffle(texts)
        for part, longest, most in ((folder / "val", 2000, 20e3), (folder, 5000, 1.5e6)):  # the first documents are never trained on
            lines, size = [], 0
            while texts and size < most:
                lines.append(json.dumps({"text": texts.pop()[:longest]}))
                size += len(lines[-1])
            part.mkdir(exist_ok=True)
            (part / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    return {kind: str(folder / f"{kind}.jsonl") for kind in kinds}


def prepare(out, folder, vocab):
    """-> {"super": {kind: shards}, "plain": {...}}: one corpus under two tokenizers of the same size."""
    from prepare import superbpe, text

    texts = {path.stem: str(path) for path in sorted(Path(folder).glob("*.jsonl"))} if folder else write_texts(Path(out) / "text")
    if not texts:
        die(f"--texts={folder}: no NAME.jsonl there; each is a kind of text, and val/NAME.jsonl is what it is scored on")
    made = {"domains": str(Path(folder or Path(out) / "text") / "val")}
    for name, transition in (("super", vocab * 5 // 8), ("plain", vocab)):
        where = Path(out) / name
        made[name] = {kind: str(where / kind) for kind in texts}
        if not (where / "tokenizer.json").exists():
            superbpe.main([f"--from={','.join(texts.values())}", f"--out={where}", f"--vocab={vocab}", f"--transition={transition}"])
        for kind, path in texts.items():
            if not (where / kind / "manifest.json").exists():
                text.main([f"--from={path}", f"--out={where / kind}", f"--tokenizer={where}", "--val=0.05", "--workers=1"])
    return made


def keep_settings(o):
    """What the tokenizers, shards and runs in OUT were made of, which their names do not say: anything else needs another folder."""
    note, texts = Path(o.out) / "settings.json", sorted(Path(o.texts).glob("**/*.jsonl")) if o.texts else []
    digest = hashlib.blake2b(sys.version.encode() if not o.texts else b"", digest_size=8)  # without texts: the standard library of it
    for path in texts:
        digest.update(str(path.relative_to(o.texts)).encode() + hashlib.blake2b(path.read_bytes()).digest())
    now = {"texts": f"{o.texts or 'stdlib'} {digest.hexdigest()}", "vocab": o.vocab, "size": o.size, "domains": o.domains}
    now["data"] = json.dumps(o.data) if o.data else ""
    made = any((note.parent / name).exists() for name in ("super", "plain", "runs"))  # a mistyped first try leaves none of them
    old = json.loads(note.read_text()) if made and note.exists() else now
    if differ := [key for key in now if now[key] != old.get(key)]:
        die(f"{o.out} was made with {differ[0]}={old.get(differ[0])}, not {now[differ[0]]}: choose another --out")
    write_json(note, now)


# ---- runs ---------------------------------------------------------------------------------------------------------------


def bytes_per_token(folders):
    shards = [s for d in folders.values() for s in data.read_manifest(Path(d))["shards"] if s["split"] == "train"]
    return sum(s["bytes"] for s in shards) / sum(s["tokens"] for s in shards)


def arguments(arm, size, made, total, lr):
    """argv of one arm. Steps and bytes per step are the same for all; a SuperBPE step has fewer tokens."""
    base, _, _ = SIZES[size]
    longest, folders = LONGEST[size], made["super" if "T" in arm else "plain"]
    unit, most = (256, 8) if size == "cpu" else (12288, 16)
    ratio = bytes_per_token(made["plain"]) / bytes_per_token(made["super"])
    # so many windows of plain tokens that a whole number of SuperBPE's holds as many bytes, as nearly as can be
    windows = min(range(most // 2, most + 1), key=lambda n: abs(n * ratio - round(n * ratio)) / n)
    steps = round(total / (windows * unit * bytes_per_token(made["plain"])))
    tokens = (round(windows * ratio) if "T" in arm else windows) * unit
    micro = 0 if size == "cpu" else tokens if "M" in arm else 6144
    table = [(n, mult, s) for n, mult, s in ULTRA if n <= longest] if "C" in arm else [(longest, 1.0, 1.0)]
    whole = sum(s for *_, s in table)
    stages = [{"tokens": max(1, round(steps * s / whole)) * tokens, "seq_len": n, "mult": mult} for n, mult, s in table]
    stages[-1]["tokens"] += steps * tokens - sum(row["tokens"] for row in stages)
    vocab = data.read_manifest(Path(next(iter(folders.values()))))["tokenizer"]["vocab_size"]
    beat = max(1, steps // 60)  # every evaluation falls on a logged step, whose clock it takes
    argv = [
        *base,
        f"--log_every={beat}",
        f"--data={folders}",
        f"--vocab_size={vocab}",
        f"--tokens_per_step={tokens}",
        f"--micro_tokens={micro}",
        "--max_tokens=0",
    ]
    argv += [f"--stages={tuple(stages)}", f"--warmup={max(1, steps // 20)}", f"--eval_every={beat * max(1, round(steps / 6 / beat))}"]
    fp8 = ["--precision=fp8", "--fp8_filter=all", "--fp8_emulate=True"] if size == "cpu" else ["--precision=fp8", "--fp8_filter=table"]
    argv += fp8 if "F" in arm else ["--precision=bf16"]
    argv += [f"--domains={made['domains']}"] if made["domains"] else []
    argv += [f"--lr={lr * (3e-3 if size == 'cpu' else 6e-4)}", "--best_metric=val/mean/bpb"]
    return argv + ([f"--compile={'K' in arm}"] if size == "gpu" else [])


def run(arm, size, made, total, lr, seed, out):
    """-> {"final": {domain: bpb}, "curve": [[seconds, mean bpb]], "tokens_per_sec": median, "bytes"}; cached."""
    folder = Path(out) / "runs" / f"{''.join(sorted(arm)) or 'none'}-lr{lr:g}-{total:.0f}-{seed}"
    done = folder / "ablation.json"
    if done.exists():
        return json.loads(done.read_text())
    argv = arguments(arm, size, made, total, lr)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main([*argv, f"--out={folder}", f"--seed={seed}", "--resume=auto", "--progress=False"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    per_token = bytes_per_token(made["super" if "T" in arm else "plain"])
    seconds, seen, curve, speeds, final = 0.0, 0, [], [], {}
    for row in rows:  # time of training alone: evaluation and saving are outside the clock of tokens per second
        if "train/tokens_per_sec" in row:
            seconds += (row["tokens"] - seen / per_token) / row["train/tokens_per_sec"]
            seen = row["tokens"] * per_token
            speeds.append(row["train/tokens_per_sec"])
        if "val/mean/bpb" in row:
            curve.append([seen / 1e3 if size == "cpu" else seconds, row["val/mean/bpb"]])
            final = {k.split("/")[1]: v for k, v in row.items() if k.endswith("/bpb") and not k.endswith(("_split/bpb", "/sd/bpb"))}
    speed = statistics.median(speeds)
    result = {
        "arm": arm,
        "seed": seed,
        "lr": lr,
        "final": final,
        "curve": curve,
        "tokens_per_sec": speed,
        "bytes_per_sec": speed * per_token,
    }
    result |= {"bytes": seen, "seconds": seconds, "precision": next((x for x in said.getvalue().splitlines() if "precision:" in x), "bf16")}
    done.write_text(json.dumps(result))
    return result


def time_to(curve, target):
    """Seconds (CPU: kilobytes read) until bits per byte first reach `target`, between evaluations by straight line; inf if never."""
    before = None
    for seconds, value in curve:
        if value <= target:
            if before is None:
                return seconds
            part = (before[1] - target) / (before[1] - value)
            return before[0] + part * (seconds - before[0])
        before = (seconds, value)
    return math.inf


# ---- the account --------------------------------------------------------------------------------------------------------


def spread(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def effect(with_, without):
    """Mean difference in bits per byte, paired by seed, the half-width of its 95 % interval (Student's, over seeds), and a verdict: under
    two standard deviations between repeats it is none."""
    (mean, half), sd = paired(with_, without), math.sqrt((spread(with_)[1] ** 2 + spread(without)[1] ** 2) / 2)
    if math.isnan(sd):
        return mean, half, "one run: no verdict"
    return mean, half, "no effect" if not abs(mean) > 2 * sd else "better" if mean < 0 else "worse"


def account(results, factors):
    """{arm: [results]} -> the lines of the table and of the verdicts."""
    joint, last = "".join(factors), lambda runs: [r["final"]["mean"] for r in runs]  # noqa: E731
    domains = [d for d in results[""][0]["final"] if d != "mean"]
    lines = [f"{'arm':<10} {'bits/byte':>18} {' '.join(f'{d:>8}' for d in domains)} {'tok/s':>9} {'bytes/s':>9} {'to target':>12}"]
    for arm, runs in results.items():
        mean, sd = spread(last(runs))
        each = " ".join(f"{statistics.mean(r['final'][d] for r in runs):8.4f}" for d in domains)
        times = [time_to(r["curve"], none["final"]["mean"]) for none, r in zip(results[""], runs, strict=True)]
        speed, rate = (statistics.median(r[k] for r in runs) for k in ("tokens_per_sec", "bytes_per_sec"))
        lines.append(f"{arm or 'none':<10} {mean:9.4f} +- {sd:6.4f} {each} {speed:9.0f} {rate:9.0f} {statistics.mean(times):12.1f}")
    lines.append(
        "target: where the arm without any factor ended with the same seed; to it: seconds, on a CPU kilobytes of text; inf: never"
    )
    ratio = lambda a, b: [x["curve"][-1][0] / time_to(y["curve"], x["final"]["mean"]) for x, y in zip(a, b, strict=True)]  # noqa: E731
    product = 1.0
    for f in factors:
        rest = last(results[joint.replace(f, "")])
        (alone, half1, verdict1), (more, half2, verdict2) = effect(last(results[f]), last(results[""])), effect(last(results[joint]), rest)
        speed = statistics.mean(ratio(results[""], results[f]))
        product *= speed
        lines += [
            f"{f}: alone {alone:+.4f} +- {half1:.4f} bits/byte: {verdict1}; in the full system {more:+.4f} +- {half2:.4f}: {verdict2};",
            f"   way to target alone {speed:.2f}x, claimed {CLAIMS[f]}x",
        ]
        for d in domains:
            mean, half, verdict = effect(*([r["final"][d] for r in results[arm]] for arm in (f, "")))
            lines.append(f"   {d}: {mean:+.4f} +- {half:.4f}: {verdict}")
    both, claimed = ratio(results[""], results[joint]), math.prod(CLAIMS[f] for f in factors)
    lines.append(f"product of single factors {product:.2f}x; claimed {claimed:.1f}x for these, 15x for all")
    lines.append(f"together measured {statistics.mean(both):.2f}x, interval {min(both):.2f} to {max(both):.2f}")
    return lines


def main(argv):
    o = configurator.args(OPTIONS, argv, __doc__, positive="seeds")
    all(type(lr) in (int, float) and lr > 0 for lr in o.lrs or "?") or die(f"--lrs={o.lrs}: factors of the rate above 0, as 0.5,1,2")
    o.vocab * 5 // 8 > 256 or die(f"--vocab={o.vocab}: 412 ids or more, of which 5 in 8 are subwords")
    o.data or not o.domains or die(f"--domains={o.domains} would do nothing here: it needs --data")
    not (o.data and o.texts) or die(f"--texts={o.texts} would do nothing beside --data, which is prepared already: drop one")
    if o.size not in SIZES:
        die(f"--size={o.size}: cpu or gpu")
    if o.size == "gpu" and not o.data:
        die('--size=gpu needs --data=\'{"super": {name: shards}, "plain": {name: shards}}\', the same text under both tokenizers')
    _, factors, total = SIZES[o.size]
    joint = "".join(factors)
    arms = list(dict.fromkeys(["", *factors, *(joint.replace(f, "") for f in factors), joint]))
    if o.only:
        wanted = ["" if arm == "none" else arm for arm in o.only.split(",")]
        if unknown := [arm for arm in wanted if arm not in arms]:
            die(f"--only: {unknown[0]} is no arm; there are {','.join(arm or 'none' for arm in arms)}")
        arms = [arm for arm in arms if arm in wanted]
    keep_settings(o)
    total, made = o.bytes or total, o.data | {"domains": o.domains} if o.data else prepare(o.out, o.texts, o.vocab)
    if o.prepare:
        return
    results = {}
    for arm in arms:
        tried = {lr: run(arm, o.size, made, total / 10, lr, 1, o.out)["final"]["mean"] for lr in o.lrs} if len(o.lrs) > 1 else {o.lrs[0]: 0}
        lr = min(tried, key=tried.get)
        results[arm] = [run(arm, o.size, made, total, lr, seed, o.out) for seed in range(1, o.seeds + 1)]
        mean, sd = spread([r["final"]["mean"] for r in results[arm]])
        print(f"{arm or 'none'}: {mean:.4f} +- {sd:.4f} bits/byte, lr x {lr:g}, {results[arm][0]['precision'].strip()}", flush=True)
    if not o.only:
        lines = account(results, factors)
        (Path(o.out) / "ablation.txt").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
        if o.size == "cpu":
            print("emulated FP8 and a shared CPU: no speed of F and no wall clock here says anything of a GPU")


if __name__ == "__main__":
    main(sys.argv[1:])
