"""What PolyGLU's neurons chose, whether context had a say, and whether any of it matters to the loss.

    python -m eval.routing --ckpt=out/RUN [--data=DIR,..] [--windows=16] [--skip_ablations] [--skip_dynamic] [--prompts=FILE] [--out=DIR]

Writes routing.json, .csv and .png (--out=FILE.json: FILE.*). On held-out windows of each domain, noise-free, at the saved temperature:
    H1  mean entropy of a gate (1: undecided, 0: one activation), H2 of a neuron's mean gate, H3 of the layer's mean gate; all / ln K.
        H1 is sharpness, H2 - H1 what context decides, H3 - H2 what the neuron's identity decides.
    map the activation that really acts, argmax of the mean gate; argmax alpha, which the published maps show, decides nothing when the
        shared logits s are larger, and is titled "static only".
Ablations in held-out nats/token against the intact model, paired by window, 95 % intervals: (a) each layer frozen to its commonest
activation, (b) each neuron to its own, (c) each gate to its neuron's mean, (d) s taken from another document of the batch, where there is
one (`shuffled`: the share of tokens), (e) noise, (f) one-hot gates.
Near-zero entropy is no evidence of specialisation: growing s is the cheapest way to silence the noise. Read next: eval/plots.py.
"""

import json
import math
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

import configurator
from configurator import die
from eval import OPEN, bootstrap, load_tokenizer, open_run, suffix, write_json
from eval.perplexity import score, sources, window_batches, window_length
from kernels import gumbel
from machine import to_device
from model import rectangle
from monitor import entropy, observe

OPTIONS = OPEN | {"data": "", "windows": 16, "seq_len": 0, "prompts": "", "skip_dynamic": False, "skip_ablations": False, "draws": 5}
CLASSES = ("letters", "digits", "space", "punctuation", "other")
PROMPTS = {  # replaced by --prompts=FILE, the same shape in json
    "arithmetic": ["What is 347 + 589?", "Compute 24 * 17 - 96.", "Divide 1,440 by 12 and add 7."],
    "algebra": ["Solve for x: 3x + 7 = 22.", "Factor x^2 - 5x + 6.", "If 2a + b = 10 and a - b = 2, find a."],
    "geometry": [
        "What is the area of a circle of radius 5?",
        "A right triangle has legs 6 and 8. Find the hypotenuse.",
        "Sum of the angles of a hexagon?",
    ],
}


def token_classes(tok, vocab):
    """(V,) what a token is made of, by its bytes without surrounding blanks."""
    kinds = []
    for i in range(vocab):
        text = tok.token_bytes(i).decode("utf-8", "replace") if i < tok.vocab_size else ""
        core = text.strip()
        tests = (core.isalpha(), core.isdigit(), not core and bool(text), bool(core) and not any(map(str.isalnum, core)), True)
        kinds.append(tests.index(True))
    return torch.tensor(kinds)


def accumulate(acc, alpha, s, tau, domain, labels, domains=1):
    """Add n tokens of one domain: alpha (f, K), s (n, K) before tau; labels {name: ((n,) ints, how many values)} are counted by route."""
    f, K = alpha.shape
    step = max(1, (1 << 22) // (f * K))
    acc.setdefault("gate", torch.zeros(domains, f, K, dtype=torch.float64))
    for lo in range(0, len(s), step):
        z = alpha + s[lo : lo + step, None]  # (n, f, K)
        g = torch.softmax(z / tau, -1)
        acc["gate"][domain] += g.sum(0)
        top = (z / tau).topk(2, -1).values if K > 1 else z.new_zeros(1, 1, 2)
        sums = {
            "n": len(z),
            "sharp": entropy(g).sum(0),
            "dynamic": entropy(z.softmax(-1)).sum(0),
            "gap": (top[..., 0] - top[..., 1]).mean() * len(z),
        }
        centred = s[lo : lo + step] - s[lo : lo + step].mean(-1, keepdim=True)
        sums |= {"s1": centred.sum(0).double(), "s2": centred.square().sum(0).double()}
        route = F.one_hot(g.argmax(-1), K).flatten(1).float()
        for name, (label, size) in labels.items():
            counts = F.one_hot(label[lo : lo + step], size).float().t() @ route
            sums["mi " + name] = counts.double().view(-1, f, K)
        for key, value in sums.items():
            acc[key] = acc.get(key, 0) + value
    acc["alpha"] = alpha


def mutual_information(counts):
    """counts (C, f, K) -> mean over neurons of I(route; label) in nats."""
    p = counts / counts.sum((0, 2), keepdim=True)
    independent = p.sum(0, keepdim=True) * p.sum(2, keepdim=True)
    return (p * (p.clamp(min=1e-30) / independent.clamp(min=1e-30)).log()).sum((0, 2)).mean().item()


def finish(acc, acts):
    """One layer's row of the report."""
    n, K, alpha = acc["n"], len(acts), acc["alpha"].double()
    unit = math.log(K) if K > 1 else 1.0
    mean = acc["gate"].sum(0) / n  # (f, K)
    shares = mean.mean(0)
    h1, h2, h3 = acc["sharp"].double() / n / unit, entropy(mean) / unit, entropy(shares) / unit
    static = torch.distributions.Categorical(logits=alpha).entropy()
    from_alpha = (alpha - alpha.mean(-1, keepdim=True)).var(0, unbiased=False).sum().item()
    from_s = (acc["s2"] / n - (acc["s1"] / n).square()).clamp(min=0).sum().item()
    row = {"activation": acts[int(shares.argmax())], "shares": dict(zip(acts, shares.tolist(), strict=True))}
    for name, h in (("H1", h1), ("H2", h2)):
        row |= {name: h.mean().item(), name + "_std": h.std(unbiased=False).item()}
    row |= {
        "H3": h3.item(),
        "context": (h2 - h1).mean().item(),
        "identity": (h3 - h2.mean()).item(),
        "gate_entropy": h1.mean().item() * unit,
    }
    row |= {
        "routing_entropy": static.mean().item(),
        "dynamic_routing_entropy": acc["dynamic"].mean().item() / n,
        "gap": float(acc["gap"]) / n,
    }
    row |= {"alpha_spread": alpha.std().item(), "variance_from_alpha": from_alpha / max(from_alpha + from_s, 1e-30)}
    row |= {key: mutual_information(value) for key, value in acc.items() if key.startswith("mi ")}
    modal = mean.argmax(-1)
    row |= {"neurons": torch.bincount(modal, minlength=K).tolist(), "map": "".join(map(str, modal.tolist()))}
    row |= {"static_map": "".join(map(str, alpha.argmax(-1).tolist())), "H2_histogram": torch.histc(h2.float(), 20, 0, 1).int().tolist()}
    per_domain = acc["gate"].sum(1) / acc["gate"].sum((1, 2))[:, None]
    return row | {"shares_by_domain": per_domain.tolist()}


def survey(model, sets, classes, device):
    """Accumulators per layer over all domains."""
    layers, generator = [{} for _ in model.decoder.blocks], torch.Generator().manual_seed(0)
    share = torch.tensor([float(sum(len(b["ids"]) for b in batches)) for batches in sets.values()])
    for d, batches in enumerate(sets.values()):
        for batch in batches:
            kind = classes[batch["ids"]]
            domain, mixed = torch.full_like(kind, d), torch.multinomial(share, len(kind), True, generator=generator)
            labels = {"domain": (domain, len(sets)), "domain, permuted": (mixed, len(sets)), "token class": (kind, len(CLASSES))}
            labels["token class, permuted"] = (kind[torch.randperm(len(kind), generator=generator)], len(CLASSES))
            tau = float(model.tau)
            see = lambda i, alpha, s: accumulate(layers[i], alpha.cpu(), s.cpu(), tau, d, labels, len(sets))  # noqa: E731
            observe(model, to_device(batch, device), see)
    return layers


def ablations(model, sets, layers, device, draws):
    """{domain: {name: (nats/token more than intact, low, high)}}"""
    acts, tau = model.cfg.acts, float(model.tau)
    mean = [acc["gate"].sum(0).float() / acc["n"] for acc in layers]  # (f, K) each
    force = lambda k: 1e6 * F.one_hot(k, len(acts)).float()  # noqa: E731
    betas = [block.ffn.beta for block in model.decoder.blocks if hasattr(block.ffn, "beta")]
    kept = [beta.detach().clone() for beta in betas]

    def measure(batches, noise=None, mute=False, tau_now=tau):
        """noise(ffn) is added to alpha; mute takes s away."""
        model.noise = (lambda ffn: noise(ffn).to(device)) if noise else None
        model.tau.fill_(tau_now)
        with torch.no_grad():
            for beta, old in zip(betas, kept, strict=True):
                beta.copy_(torch.zeros_like(old) if mute else old)
            sums, _ = score(model, batches, device)
            for beta, old in zip(betas, kept, strict=True):
                beta.copy_(old)
        model.noise = None
        model.tau.fill_(tau)
        return sums

    def other_documents(batch):
        """s of the intact model, each token reading it at the same place of the next document."""
        seen = {}
        observe(model, to_device(batch, device), lambda i, alpha, s: seen.__setitem__(i, s.cpu()))
        cu = batch["cu"].long()
        doc = torch.searchsorted(cu, torch.arange(len(batch["ids"])), right=True) - 1
        mate = (doc + 1) % (len(cu) - 1)
        index = cu[mate] + batch["pos"] % (cu[mate + 1] - cu[mate])
        return lambda ffn: seen[ffn.layer][index][:, None].expand(-1, ffn.alpha.shape[0], -1)

    plan = {
        "a layer frozen": lambda b: measure(
            b, lambda ffn: force(mean[ffn.layer].mean(0).argmax())[None, None].expand(1, ffn.alpha.shape[0], -1)
        ),
        "b neuron frozen": lambda b: measure(b, lambda ffn: force(mean[ffn.layer].argmax(-1))[None]),
        "c neuron's mean": lambda b: measure(
            b, lambda ffn: (tau * mean[ffn.layer].clamp(min=1e-30).log() - ffn.alpha.detach().cpu())[None], mute=True
        ),
        "d s of another document": lambda b: torch.cat([measure([x], other_documents(x), mute=True) for x in b]),
        "f one-hot": lambda b: measure(b, tau_now=1e-6),
    }
    for i in range(draws):
        plan[f"e noise {i}"] = lambda b, i=i: torch.cat(
            [measure([x], lambda ffn, x=x: gumbel(i, x["rows"], ffn.layer, *ffn.alpha.shape)) for x in b]
        )
    result = {}
    for name, batches in sets.items():
        intact, rows = measure(batches), {}
        several = [batch for batch in batches if len(batch["cu"]) > 2]  # a document alone would be its own mate
        shuffled = sum(len(batch["ids"]) for batch in several) / sum(len(batch["ids"]) for batch in batches)
        for what, go in plan.items():
            used = several if what[0] == "d" else batches
            if not used:
                continue
            before = measure(used) if used is several and shuffled < 1 else intact
            more = (go(used)[:, 0] - before[:, 0]).numpy()
            rows[what] = [more.sum() / float(before[:, 1].sum()), *bootstrap(more, before[:, 1].numpy())]
        result[name] = {"intact": float(intact[:, 0].sum() / intact[:, 1].sum()), "shuffled": shuffled} | rows
    return result


def read_prompts(path):
    found = None
    with suppress(ValueError):
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    texts = list(found.values()) if isinstance(found, dict) else []
    if not texts or not all(isinstance(some, list) and some and all(isinstance(text, str) for text in some) for some in texts):
        die(f"--prompts={path}: is not one JSON object of {{category: [texts]}}, like PROMPTS in eval/routing.py")
    return found


def by_category(model, tok, prompts, device):
    """{category: mean gate (L, K)} over the tokens of a few prompts."""
    result = {}
    for category, texts in prompts.items():
        total, n = [0.0] * len(model.decoder.blocks), 0
        for text in texts:
            ids = torch.tensor([[tok.eos_id, *tok.encode(text)]], device=device)
            n += ids.numel()

            def see(i, alpha, s, total=total):
                total[i] = total[i] + torch.softmax((alpha + s[:, None]) / float(model.tau), -1).mean(1).sum(0).cpu()

            observe(model, rectangle(ids), see)
        result[category] = [(t / n).tolist() for t in total]
    return result


def runs(names):
    """L0-2 silu, L3-9 gelu"""
    out, first = [], 0
    for i in range(1, len(names) + 1):
        if i == len(names) or names[i] != names[first]:
            out.append(f"L{first}{'' if i - 1 == first else f'-{i - 1}'} {names[first]}")
            first = i
    return ", ".join(out)


def main(argv):
    o = configurator.args(OPTIONS, argv, __doc__, positive="windows draws")
    for key, vain in (("prompts", o.skip_dynamic and "skip_dynamic"), ("draws", o.skip_ablations and "skip_ablations")):
        if vain and getattr(o, key) != OPTIONS[key]:
            die(f"--{key}={getattr(o, key)} would do nothing beside --{vain}")
    prompts = read_prompts(o.prompts) if o.prompts else PROMPTS
    model, state, device, facts = open_run(o)
    if model.cfg.ffn != "polyglu" or model.cfg.arch != "decoder":
        die(f"{o.ckpt}: ffn={model.cfg.ffn!r}, arch={model.cfg.arch!r}; only a decoder with ffn='polyglu' has routing to report")
    tok, cfg = load_tokenizer(o.ckpt), model.cfg
    seq_len = window_length(o, state, cfg)
    sets = window_batches(o.ckpt, o.data, sources(state), seq_len, o.windows, max(4096, 2 * seq_len))  # two rows at least: (d) needs a mate
    layers = survey(model, sets, token_classes(tok, cfg.vocab_size), device)
    rows = [finish(acc, cfg.acts) for acc in layers]
    report = facts | {
        "acts": list(cfg.acts),
        "domains": list(sets),
        "tokens": int(layers[0]["n"]),
        "layers": rows,
        "metrics" + suffix(model): True,
    }
    columns = ("H1", "H2", "H3", "context", "identity", "gap", "variance_from_alpha", "mi domain", "mi domain, permuted", "mi token class")
    heads = ("H1", "H2", "H3", "context", "identity", "gap", "alpha/z", "I(domain)", "permuted", "I(class)")
    print(("{:>5} {:>8}" + " {:>9}" * len(heads)).format("layer", "acts as", *heads))
    report["overall"] = {key: sum(r[key] for r in rows) / len(rows) for key, value in rows[0].items() if isinstance(value, float)}
    for i, r in [*enumerate(rows), ("all", {"activation": ""} | report["overall"])]:
        print(f"{i:>5} {r['activation']:>8}" + "".join(f" {r[c]:9.4f}" for c in columns))
    one = [i for i, r in enumerate(rows) if max(r["neurons"]) == sum(r["neurons"])]
    print(f"by layer: {runs([r['activation'] for r in rows])}; one activation for every neuron in {len(one)} of {len(rows)} layers")
    unused = [a for a in cfg.acts if all(r["neurons"][cfg.acts.index(a)] == 0 for r in rows)]
    print(f"never the first choice of any neuron: {', '.join(unused) or 'none'}")
    if not o.skip_dynamic:
        report["categories"] = by_category(model, tok, prompts, device)
        gates = torch.tensor(list(report["categories"].values()))  # (C, L, K)
        shift = (gates.amax(0) - gates.amin(0)).amax(-1)
        report["largest_shift"] = {"layer": int(shift.argmax()), "share": float(shift.max())}
        print(f"largest shift of a share between prompt categories: {float(shift.max()):.4f} in layer {int(shift.argmax())}")
    if not o.skip_ablations:
        report["ablations"] = ablations(model, sets, layers, device, o.draws)
        for name, table in report["ablations"].items():
            print(f"{name}: intact {table['intact']:.4f} nats/token, {table['shuffled']:.1%} of the tokens shuffled by d; more by")
            for what, (mean, low, high) in ((k, v) for k, v in table.items() if k not in ("intact", "shuffled")):
                print(f"    {what:<24} {mean:+.4f}  [{low:+.4f}, {high:+.4f}]")
        low, high = (max(table["a layer frozen"][end] for table in report["ablations"].values()) for end in (1, 2))
        costs = "freezing each layer to one activation costs"
        report["verdict"] = f"decorative: {costs} less than 0.005 nats/token" if high < 0.005 else f"{costs} at most {high:.4f} nats/token"
        report["verdict"] += ", and more than nothing in some domain" if low > 0 else ", and in no domain measurably more than nothing"
        print(f"verdict: {report['verdict']}")
    path = Path(o.out) if o.out.endswith(".json") else Path(o.out or o.ckpt, "routing.json")
    write_json(str(path), report)
    from eval.plots import routing_figure

    routing_figure(report, path.with_suffix(".png"))
    print(f"{path}, and beside it {path.stem}.csv, {path.stem}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
