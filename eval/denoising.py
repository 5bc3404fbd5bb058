"""What a denoising model sees and how well it does: per denoiser, on a held-out set that is the same for every checkpoint.

    python -m eval.denoising --ckpt=out/RUN [--tokens=65536] [--out=result.json]
    python train.py config/encdec_ul2.py --analyze_batch=8          # prints `analyze` of the first pack and exits

`shuffled` is the loss with every example reading its neighbour's encoder text: a decoder that learned to use the encoder loses by it.
Read next: denoise.py, denoise_stream.py.
"""

import sys

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import configurator
import data
import denoise
import denoise_stream
import tokenizer
from configurator import die
from eval import write_json
from files import writable
from machine import find, to_device


def show(ids, sp, tok) -> str:
    """Text with its special ids in brackets."""
    out, run = [], []
    for i in [*ids.tolist(), None]:
        if i is not None and i < sp.mode and i != sp.eos:
            run.append(i)
            continue
        out.append(tok.decode(run) if run else "")
        run = []
        if i is not None:
            out.append("<eos>" if i == sp.eos else f"<{i - sp.sentinel}>" if i >= sp.sentinel else f"[{denoise.MODES[i - sp.mode]}]")
    return repr("".join(out))


def analyze(stream, count: int = 8) -> str:
    """Examples of the next pack in words, and how full and how dense the pack is."""
    row, sp, cfg = stream.plan(stream.step), stream.special, stream.cfg
    enc, dec = stream.budgets(row)
    items, lines, total = stream.fill(row, enc, dec), [], np.zeros(4, int)  # source, hidden, spans, restored
    for k, item in enumerate(items):
        text = stream.sources[item[1]].shards.tokens(item[2], item[2] + item[3]).astype(np.int64) & 0x7FFFFFFF
        left, _, right, task = stream.example(item, text)
        d, same = stream.mix.denoisers[task], np.array_equal(denoise.restore(left, right, sp), text)
        n = int(denoise.is_sentinel(left, sp).sum())
        N = len(right) - n - 1 - cfg.closing_sentinel
        total += [len(text), N, n, same]
        if k < count:
            want = denoise.counts(d, item[5], len(text), sp.n_sentinels - cfg.closing_sentinel)
            lines += [
                f"--- example {item[0]}: {denoise.name(d)} [{d.mode or '-'}]",
                f"    source {len(text)}, encoder {len(left)}, targets {len(right)}",
                f"    hidden {N} tokens in {n} spans (promised {want[0]} in {want[1]}); restored == source: {same}",
                f"    encoder {show(left, sp, stream.tokenizer)}",
                f"    targets {show(right, sp, stream.tokenizer)}",
            ]
    full = sum(i[-2] for i in items) / enc, sum(i[-1] for i in items) / dec
    tasks = np.bincount([i[4] for i in items], minlength=len(stream.mix.denoisers))
    source, hidden, spans, good = total.tolist()
    lines += [
        f"pack: {len(items)} examples, restored {good}; fill {full[0]:.3f} of {enc} encoder and {full[1]:.3f} of {dec} decoder tokens",
        f"density {hidden / source:.3f}, mean span {hidden / spans:.2f} tokens",
        "tasks: " + ", ".join(f"{name} {n}" for name, n in zip(stream.names, tasks, strict=True)),
    ]
    return "\n".join(lines)


def shuffled(batch) -> dict | None:
    """The same decoders, each reading the encoder text of the example before it; None where one example is alone."""
    cut = lambda x, cu: list(x.split(cu.diff().tolist()))  # noqa: E731
    enc = [e.numpy() for e in cut(batch["ids"], batch["cu"])]
    dec, goal = ([d.numpy() for d in cut(batch[key], batch["dec_cu"])] for key in ("dec_ids", "targets"))
    real = [i for i, g in enumerate(goal) if (g != -100).any()]  # packs of one shape end in documents of padding
    source = list(range(len(enc)))
    for i, before in zip(real, real[-1:] + real[:-1], strict=True):
        source[i] = before
    pairs = zip([enc[i] for i in source], dec, goal, batch["task"].tolist(), strict=True)
    return denoise_stream.collate(list(pairs)) if len(real) > 1 else None


@torch.no_grad()
def evaluate(model, val: dict, device) -> dict:
    """{denoiser: {loss, accuracy, shuffled, tokens}}; accuracy by the largest logit."""
    rows = {}
    for name, packs in tqdm(val.items(), unit="denoiser", disable=not sys.stderr.isatty()):
        sums = np.zeros(5)  # nats, hits, nats when shuffled, targets, targets when shuffled
        for pack in packs:
            for column, batch in ((0, pack), (2, shuffled(pack))):
                if batch is None:
                    continue
                batch = to_device(batch, device)
                hidden = model(batch)
                sums[column] += float(model.nll(hidden, batch["targets"])[0])
                sums[3 + column // 2] += int((batch["targets"] != -100).sum())
                sums[1] += model.hits(hidden, batch["targets"]) if column == 0 else 0
        nats, hits, other, n, n_other = sums.tolist()
        rows[name] = {
            "loss": nats / max(n, 1),
            "accuracy": hits / max(n, 1),
            "shuffled": other / n_other if n_other else None,
            "tokens": int(n),
        }
    return rows


def main(argv):
    from train import Config, sources

    opt = configurator.args({"ckpt": str, "data": "", "tokens": 65536, "device": "auto", "out": ""}, argv, __doc__, positive="tokens")
    writable(opt.out)
    machine = find(opt.device, "auto")
    model, state = checkpoint.load(opt.ckpt)
    if model.cfg.arch != "encdec":
        die(f"arch={model.cfg.arch!r} denoises nothing; python -m eval.perplexity --ckpt={opt.ckpt} measures a decoder")
    known = {k: v for k, v in state["config"].items() if k in Config.__dataclass_fields__}
    changes = {"data": opt.data} if opt.data else {}
    cfg = configurator.from_dict(Config, known | changes | {"eval_tokens": opt.tokens}, opt.ckpt)
    home = checkpoint.resolve(opt.ckpt).parent
    for path in sources(cfg).values() if (home / "tokenizer").is_dir() else ():
        data.read_manifest(data.Path(path))
        tokenizer.expect_same(home, path)
    model.set_dtype(machine.dtype).to(machine.device)
    rows = evaluate(model, denoise_stream.val_batches(cfg), machine.device)
    print(f"{'denoiser':20} {'loss':>8} {'accuracy':>9} {'shuffled':>9} {'targets':>9}")
    for name, r in rows.items():
        shuffled_loss = "-" if r["shuffled"] is None else f"{r['shuffled']:.4f}"
        print(f"{name:20} {r['loss']:8.4f} {r['accuracy']:9.4f} {shuffled_loss:>9} {r['tokens']:9,}")
    write_json(opt.out, {"ckpt": opt.ckpt, "step": state["step"], "denoisers": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
