"""A causal decoder becomes an encoder-decoder: the same weights twice, one embedding, new rows for modes and sentinels.

    python -m prepare.encdec --from=Qwen3-0.6B --out=out/encdec [--num_sentinels=100] [--dtype=float32|bfloat16] [--verify]

`--from` is whatever hub.py can import (a Qwen3, Llama, SmolLM2 ... folder, a GGUF file) or a run of prism itself. Both stacks are copies of
the decoder's blocks: the encoder loses its mask, the decoder reads [encoder keys ; own keys] under one softmax, and nothing else
is new, so both start from what the language model knows. The last four rows of the vocabulary that no token uses become modes
(<|mode_R|> X S I), the n_sentinels rows behind it sentinels (<extra_id_0> ...). Both sides of an example end with what the release calls
its EOS (<|im_end|> of Qwen3, <|endoftext|> of its Base): `eos_id` in the run's config, which training, sampling and export go by. Shards
keep their own. --verify proves all of it, exit code 1 if it cannot.
Read next: denoise.py (what is trained on it), train.py with config/encdec_ul2.py, prepare/sentence.py (its encoder for everybody).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import checkpoint
import configurator
import denoise
import denoise_stream
import hub
import sample
import tokenizer
from configurator import die
from files import write_json
from model import ModelConfig, build, rectangle
from prepare import Checks
from prepare.prompts import release
from prepare.tokenizer import convert


def read(source: Path, dtype) -> tuple[dict, dict, dict]:
    """-> (ModelConfig fields, state dict, info with `tokenizer` files) of a run of prism or of anything hub imports."""
    if checkpoint.steps(source) or (source / "state.json").is_file():
        folder = checkpoint.resolve(source)
        model, state = checkpoint.load(folder, build=hub.load_anyway)
        tok = tokenizer.load(folder.parent)
        info = {"family": "prism", "tau": float(model.tau), "tokenizer": tok.files, "source": {"path": str(source), "step": state["step"]}}
        info["source"]["sha256"] = {"model.safetensors": checkpoint.digest(folder / "model.safetensors")}
        return configurator.to_dict(model.cfg), {k: v.to(dtype) for k, v in model.state_dict().items()}, info
    return hub.read_model(source, dtype=dtype)


def tokenizer_json(files: dict) -> bytes:
    """Of a tokenizer's files, whatever their kind."""
    if not any(name in ("tokenizer.json", "bytes.json", "merges.txt") or name.endswith(".tiktoken") for name in files):
        die("the source has no tokenizer: put its tokenizer.json beside the weights")
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            Path(scratch, name).write_bytes(content)
        return convert(tokenizer.load(scratch))


def ending(tok, info) -> int:
    """What the release itself ends with: the marker that its tokenizer_config.json names, else the first that its config.json does."""
    stated = info.get("eos")
    ids = [tok.special.get(release(tok)), *(stated if isinstance(stated, list) else [stated]), tok.eos_id]
    return next(i for i in ids if i in tok.special.values())


def extend(raw: bytes, sp: denoise.Special, tok) -> bytes:
    """tokenizer.json with fillers, modes and sentinels as markers: markers take the next free id, so no gap may stay."""
    data, names = json.loads(raw), [f"<|unused_{k}|>" for k in range(sp.mode - tok.vocab_size)]
    names += [f"<|mode_{m}|>" for m in denoise.MODES] + [f"<extra_id_{i}>" for i in range(sp.n_sentinels)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] += [{"id": tok.vocab_size + i, "content": name} | flags for i, name in enumerate(names)]
    return json.dumps(data, ensure_ascii=False).encode()


def double(fields: dict, state: dict, n_text: int, n_sentinels: int, seed: int):
    """Decoder fields and weights -> those of the encoder-decoder, and its special ids but for EOS."""
    if fields.get("arch", "decoder") != "decoder" or not fields.get("tie", True):
        what = "an untied head" if not fields.get("tie", True) else f"arch={fields['arch']}"
        die(f"--from holds {what}: an encoder-decoder shares one matrix between both inputs and the head; start from a tied decoder")
    rows = fields["vocab_size"]
    if n_text > rows:
        die(f"--from: its tokenizer has {n_text} ids, its embedding {rows} rows; they do not belong together")
    mode = max(n_text, rows - len(denoise.MODES))
    vocab = mode + len(denoise.MODES) + n_sentinels
    old = state["embed.weight"]
    trained = old[:n_text].double()
    draw = torch.randn(vocab - mode, old.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    embed = old.new_zeros(-(-vocab // 128) * 128, old.shape[1])
    embed[:mode] = old[:mode]
    embed[mode:vocab] = (trained.mean(0) + draw * trained.std(0)).to(old.dtype)
    stacks = {k: v for k, v in state.items() if k.startswith("decoder.")}
    both = {k.replace("decoder.", "encoder.", 1): v.clone() for k, v in stacks.items()}
    both["encoder.norm.weight"] *= quiet(fields, state)
    cfg = fields | {"arch": "encdec", "vocab_size": vocab, "n_sentinels": n_sentinels}
    return cfg, {"embed.weight": embed, **both, **{k: v for k, v in state.items() if k != "embed.weight"}}


def quiet(fields, state) -> float:
    """Encoder states enter the decoder's k and v without the layer's own norm. Where k has none of its own either (Llama, SmolLM2,
    Qwen2.5), the encoder's last norm is scaled to the quietest of those norms, or attention is all noise: SmolLM2 starts UL2 at 7.3
    nats instead of 17.7. Vectors of unit length do not feel a scale."""
    rms = lambda weight: float(weight.double().square().mean().sqrt())  # noqa: E731
    inputs = [rms(v) for k, v in state.items() if k.endswith("norm1.weight")]
    return 1.0 if fields.get("qk_norm", True) else min(inputs) / rms(state["decoder.norm.weight"])


def verify(fields, state, run: Path, n_text: int) -> bool:
    """Every claim of this file, on what stands on disk. Returns whether all hold."""
    check = Checks("verify")
    model, _ = checkpoint.load(run)
    cfg, own, tok = model.cfg, model.state_dict(), tokenizer.load(run)
    sp = denoise_stream.special_of(cfg, tok)
    stacks = [k for k in own if k.startswith(("encoder.", "decoder."))]
    want, scale = {k: state[k.replace("encoder.", "decoder.", 1)] for k in stacks}, quiet(fields, state)
    want["encoder.norm.weight"] = want["encoder.norm.weight"] * scale
    same = [k for k in stacks if torch.equal(own[k], want[k])]
    parts = (
        sum(len(p) for _, p in hub.layout(hub.full_fields(cfg) | {"arch": "decoder"}, hub.HF)) * 2 if cfg.ffn == "swiglu" else len(stacks)
    )
    note = f"{len(stacks)} stored" + (f", the encoder's last norm scaled by {scale:.4f}" if scale != 1 else "")
    check(f"{parts} layer and norm tensors are the source's, bit for bit", len(same) == len(stacks), note)
    check(
        f"embedding rows 0..{sp.mode - 1} are the source's", torch.equal(own["embed.weight"][: sp.mode], state["embed.weight"][: sp.mode])
    )
    new = own["embed.weight"][sp.mode : cfg.vocab_size]
    check(
        f"{len(new)} new rows are distinct, padding rows zero",
        len(new.unique(dim=0)) == len(new) and not own["embed.weight"][cfg.vocab_size :].any(),
    )
    check("one matrix: no head, one embedding", sum("head" in k or k.startswith("embed.weight") for k in own) == 1)
    names = [f"<extra_id_{i}>" for i in range(sp.n_sentinels)]
    check("sentinels keep their ids in the stored tokenizer", [tok.special.get(n) for n in names] == [*range(sp.sentinel, cfg.vocab_size)])

    source = build(ModelConfig(**{k: v for k, v in fields.items() if k in ModelConfig.__dataclass_fields__}))
    source.load_state_dict(state)
    source.tau.fill_(float(model.tau))  # no weight: it travels in state.json
    source.eval()
    ids = torch.randint(0, n_text, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if cfg.ffn == "swiglu":
            want, got = source(rectangle(ids)) * scale, model.read(model.encoder, rectangle(ids), causal=True)
            gap = float((want - got).abs().max() / want.abs().max())
            check("encoder under a causal mask = the source's hidden states", gap <= 1e-4, f"{gap:.1e}")
        want, got = source.logits(ids), model.logits(ids, ids[:, :0])[..., : fields["vocab_size"]]
        gap = float((want - got)[..., : sp.mode].abs().max() / want.abs().max())
        check("decoder without encoder tokens = the source's logits", gap <= 1e-4, f"{gap:.1e}")
    del source
    d = denoise.Denoiser("span", 3, 0.3, "R", 1)
    rng = torch.Generator().manual_seed(1)
    enc, targets = denoise.corrupt(torch.randint(0, n_text, (64,), generator=rng).numpy(), d, 0.3, np.random.default_rng(0), sp)
    pack = denoise_stream.collate([(enc, np.append(sp.start, targets[:-1]), targets, 0)])
    model.nll(model(pack), pack["targets"])[0].backward()
    queries = cfg.n_head * cfg.width_head
    grads = {f"{side} layer 0 queries": getattr(model, side).blocks[0].attn.qkv.weight.grad[:queries] for side in ("encoder", "decoder")}
    for name, grad in (grads | {"shared embedding": model.embed.weight.grad}).items():
        check(f"gradient of one denoise step reaches {name}", float(grad.norm()) > 0, f"norm {float(grad.norm()):.2e}")
    model.zero_grad()
    text = sample.generate(model, tok, "The", max_new_tokens=8)
    check("greedy generation of 8 tokens", isinstance(text, str), repr(text))
    again = checkpoint.load(run)[0].state_dict()
    check("a second reload is the same, bit for bit", all(torch.equal(own[k], again[k]) for k in own))
    return check.end()


def main(argv):
    opt = configurator.args(
        {"from": str, "out": str, "num_sentinels": 100, "dtype": "float32", "seed": 1337, "verify": False}, argv, __doc__
    )
    source, run = Path(getattr(opt, "from")), Path(opt.out)
    if opt.dtype not in ("float32", "bfloat16"):
        die(f"--dtype={opt.dtype}: float32 or bfloat16")
    if not 1 <= opt.num_sentinels <= 10_000:
        die(f"--num_sentinels={opt.num_sentinels}: at least 1")
    if checkpoint.steps(run):
        die(f"--out={run}: holds a run already; name a new folder")
    fields, state, info = read(source, getattr(torch, opt.dtype))
    raw = tokenizer_json(info["tokenizer"])
    (run / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, content in (info["tokenizer"] | {"tokenizer.json": raw}).items():
        if name.startswith(("tokenizer", "special", "added", "chat", "generation")):  # what stands beside a tokenizer.json
            (run / "tokenizer" / name).write_bytes(content)
    tok = tokenizer.load(run)
    doubled, weights = double(fields, state, tok.vocab_size, opt.num_sentinels, opt.seed % 2**63)
    cfg = configurator.from_dict(ModelConfig, doubled | {"eos_id": ending(tok, info)}, str(source))
    sp = denoise_stream.special_of(cfg, tok)
    (run / "tokenizer" / "tokenizer.json").write_bytes(extend(raw, sp, tok))
    denoise_stream.special_of(cfg, tokenizer.load(run))  # the ids survived

    model = hub.load_anyway(cfg)
    checkpoint.fit(model, weights, source)
    model.load_state_dict(weights, assign=True)
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    counts = {"layer": size(model.encoder.blocks[0]), "stack": size(model.encoder), "total": model.num_params(), "stored": size(model)}
    facts = {"source": info["source"], "family": info["family"], "seed": opt.seed, "parameters": counts, "text_ids": tok.vocab_size}
    facts |= {"start": sp.start, "eos": sp.eos, "modes": [sp.mode, sp.sentinel - 1], "sentinels": [sp.sentinel, cfg.vocab_size - 1]}
    write_json(run / "init.json", facts)
    saved = {"config": configurator.to_dict(cfg), "tau": info.get("tau", 1.0), "imported": facts, "metrics": {}, "tokens": 0}
    write_json(run / "config.json", {"config": saved["config"], "imported": facts})
    checkpoint.save(run, 0, model, None, saved, keep=1)
    print(f"{run}: encoder-decoder of {info['family']} {source.name}: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
    print(f"ids: text 0..{tok.vocab_size - 1}, modes {facts['modes']}, sentinels {facts['sentinels']}, start {sp.start}, EOS {sp.eos}")
    if opt.verify and not verify(fields, state, run, tok.vocab_size):
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
