"""Released weights in, the ecosystem out: the only place that knows how other people name their tensors.

    python -m hub import --from=DIR|FILE.gguf --out=out/RUN [--gate=running] [--dtype=float32|bfloat16]
    python -m hub export --ckpt=out/RUN --to=transformers|safetensors|sentence-transformers --out=DIR [--dtype=float32|bfloat16]

Import reads dense Qwen3, Qwen2.5, Llama 3.x, SmolLM2 and TinyLlama folders (safetensors), GGUF files of these (dequantised), and the
published PolyGLU weights, and writes a normal run directory: train, sample and evaluate it like any other. Export writes SwiGLU models
as stock Qwen3, Qwen2 or Llama classes and PolyGLU models with modeling_polyglu.py beside the weights (trust_remote_code).
`layout` is the whole map between the names, read in both directions; nothing is dropped, defaulted or renamed outside of it: a tensor
left over, a parameter left empty or a config field that would change the model stops with one line. What an edited model.py computes
otherwise with the same tensors goes out as if it did not. Read next: checkpoint.py.
"""

import prelude  # isort: skip

import dataclasses
import json
import shutil
import sys
import typing
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoint
import configurator
import tokenizer
from configurator import die
from files import write, write_json
from model import Gate, ModelConfig, Transformer
from prepare.prompts import stop_ids
from prepare.released import ACTS, TOKENIZER_FILES, hf_fields, load_tensors, read, read_gguf, read_published

HF = {  # transformers' names: Qwen3, Qwen2 and Llama share them
    "embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight", "layer": "model.layers.",
    "norm1": "input_layernorm.weight", "norm2": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
PUBLISHED = {  # the PolyGLU release, `gama` included
    "embed": "embeddings.weight", "head": "output_head.weight", "norm": "rmsnorm.gama", "layer": "model_core.",
    "norm1": "rmsnorm_1.gama", "norm2": "rmsnorm_2.gama",
    "q": "gqa.W_q", "k": "gqa.W_k", "v": "gqa.W_v", "o": "gqa.W_o",
    "q_norm": "gqa.rmsnorm_q.gama", "k_norm": "gqa.rmsnorm_k.gama",
    "gate": "polyglu.W_gate", "up": "polyglu.W_up", "down": "polyglu.W_down",
}  # fmt: skip


def layout(c, names):
    """[(our name, [(their name, shape), ...])], ours being theirs stacked along dimension 0; embedding and head stand apart."""
    d, f, k, hd = c["d_model"], c["d_ff"], len(c.get("acts", "")), c["head_dim"]
    side = "encoder" if c.get("arch") == "encoder" else "decoder"
    q, kv = c["n_head"] * hd, c["n_kv_head"] * hd
    rows = [(f"{side}.norm.weight", [(names["norm"], (d,))])]
    for i in range(c["n_layer"]):
        ours, theirs = f"{side}.blocks.{i}.", f"{names['layer']}{i}."

        def put(name, *parts, ours=ours, theirs=theirs):
            rows.append((ours + name, [(theirs + part, shape) for part, shape in parts]))

        put("norm1.weight", (names["norm1"], (d,)))
        put("norm2.weight", (names["norm2"], (d,)))
        qkv = (("q", q), ("k", kv), ("v", kv))
        put("attn.qkv.weight", *((names[n] + ".weight", (size, d)) for n, size in qkv))
        if c["qkv_bias"]:
            put("attn.qkv.bias", *((names[n] + ".bias", (size,)) for n, size in qkv))
        put("attn.out.weight", (names["o"] + ".weight", (d, q)))
        if c["qk_norm"]:
            put("attn.q_norm.weight", (names["q_norm"], (hd,)))
            put("attn.k_norm.weight", (names["k_norm"], (hd,)))
        put("ffn.gate_up.weight", (names["gate"] + ".weight", (f, d)), (names["up"] + ".weight", (f, d)))
        put("ffn.down.weight", (names["down"] + ".weight", (d, f)))
        if c["ffn"] == "polyglu":
            put("ffn.alpha", ("polyglu.alpha", (f, k)))
            net = [("beta", (k,)), ("gate_net.0.weight", (32, d)), ("gate_net.0.bias", (32,))]
            net += [("gate_net.2.weight", (k, 32)), ("gate_net.2.bias", (k,))]
            for name, shape in net if c["gate"] != "static" else ():
                put("ffn." + name, ("polyglu." + name, shape))
    return rows


def to_ours(tensors, c, names, dtype=torch.float32):
    """Their tensors -> our state dict. Everything is consumed, everything is filled, or it stops."""
    left = dict(tensors)

    def take(name, shape):
        if name not in left:
            die(f"{name}: missing from the weights; expected {list(shape)}")
        if tuple(left[name].shape) != tuple(shape):
            die(f"{name}: shape {list(left[name].shape)}, but the config says {list(shape)}")
        return left.pop(name).to(dtype)

    v, d = c["vocab_size"], c["d_model"]
    pad = torch.zeros(-v % 128, d, dtype=dtype)  # rows beyond the vocabulary: masked in the loss, never exported
    embed = take(names["embed"], (v, d))
    state = {"embed.weight": torch.cat((embed, pad))}
    if not c["tie"]:
        state["head.weight"] = torch.cat((take(names["head"], (v, d)), pad))
    elif names["head"] in left and not torch.equal(embed, take(names["head"], (v, d))):
        message = f"{names['head']}: differs from the embedding that the model ties it to"
        if names is PUBLISHED:
            die(message)
        print(f"{message}; dropped, as transformers does", file=sys.stderr)
    for ours, parts in layout(c, names):
        got = [take(name, shape) for name, shape in parts]
        state[ours] = torch.cat(got) if len(got) > 1 else got[0]
    if left:
        die(f"{min(left)}: a tensor this architecture has no place for ({len(left)} left over); is the config of other weights?")
    return state


def to_theirs(state, c, names, dtype=torch.float32):
    """Our state dict -> their tensors: the same table backwards, padding rows cut, a tied head left out. Nothing else stays behind."""
    table, aside = layout(c, names), ("embed.", "head.") + ("decoder.",) * (c["arch"] == "encoder")
    if left := sorted(name for name in state if name not in dict(table) and not name.startswith(aside)):
        die(f"{left[0]}: no exported class has a place for this tensor, and without it ({len(left)} such) this would be another model")
    embed = state["embed.weight"]
    if "embed.proj.weight" in state:  # factorised: no stock class holds it, so the product goes out
        embed = (embed.double() @ state["embed.proj.weight"].double().T).to(embed.dtype)
    tensors = {names["embed"]: embed[: c["vocab_size"]]}
    if not c["tie"]:
        tensors[names["head"]] = state["head.weight"][: c["vocab_size"]]
    for ours, parts in table:
        sizes = [shape[0] for _, shape in parts]
        tensors |= zip((name for name, _ in parts), state[ours].split(sizes), strict=True)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def read_model(path, gate=None, dtype=torch.float32):
    """-> (dict of ModelConfig fields, state dict in our names, info {family, source, tokenizer: {file: bytes}, ...})."""
    path = Path(path)
    if not path.exists():
        die(f"--from={path}: no such file or folder")
    if checkpoint.steps(path) or (path / "state.json").is_file():
        die(f"--from={path}: a run of prism already; sample, evaluate or --init_from it as it is")
    home = path if path.is_dir() else path.parent
    source = read(home / "config.json") if (home / "config.json").is_file() else None
    if path.is_file() and (path.suffix != ".safetensors" or (source or {}).get("model_type") != "prism_polyglu"):
        source = None  # of a single file only our own export speaks beside it: gate, tau and tables are in no tensor
    files = sorted(home.iterdir()) if path.is_dir() or source else [path]
    gguf = [file for file in files if file.suffix == ".gguf"]
    if not source and len(gguf) == 1:
        fields, tensors, info = read_gguf(gguf[0])
    elif source and source.get("model_type") != "prism_polyglu":
        fields, tensors = hf_fields(source, path / "config.json"), load_tensors(path)
        if not any(name.startswith("model.") for name in tensors):  # a headless class, such as Qwen3Model
            tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}  # the config says it
        info = {"family": source["model_type"], "eos": source.get("eos_token_id")}
    else:
        fields, tensors, info = read_published(path, source)
    if "tokenizer" not in info:
        taken = {file.name: file.read_bytes() for file in files if file.name in TOKENIZER_FILES}
        info["tokenizer"] = taken if {"tokenizer.json", "merges.txt"} & set(taken) else {}
    if gate:
        if fields["ffn"] != "polyglu":
            die(f"--gate={gate}: {path} has no gate; leave it out")
        info |= {"gate": f"{fields['gate']} -> {gate}"} if gate != fields["gate"] else {}
        fields["gate"] = gate
    names = PUBLISHED if fields["ffn"] == "polyglu" else HF
    weights = [file for file in files if file.suffix in (".safetensors", ".gguf", ".pt") and path in (home, file)]
    info["source"] = {"path": path.name, "sha256": {file.name: checkpoint.digest(file) for file in weights}} | info.pop("source", {})
    return fields, to_ours(tensors, fields, names, dtype), info


# ---------------------------------------------------------------------------------------------------------------- writing


def full_fields(cfg):
    """ModelConfig -> a dict with every derived size spelt out, as `layout` reads it."""
    return configurator.to_dict(cfg) | {"n_kv_head": cfg.kv_heads, "head_dim": cfg.width_head, "d_ff": cfg.width_ff}


def hf_config(c, dtype, ids):
    """config.json of the stock class that computes what the model does, or one line that says which knob it lacks."""
    kind = "qwen3" if c["qk_norm"] else "qwen2" if c["qkv_bias"] else "llama"
    act = c["act"] if isinstance(c["act"], str) else "silu"
    checks = {
        "qkv_bias=True with qk_norm=True": c["qk_norm"] and c["qkv_bias"],
        "rope_bf16=True": c["rope_bf16"],
        "one activation per layer (act)": not isinstance(c["act"], str),
        f"act={act!r}": act not in ACTS,
        f"{c['n_head']} heads that do not divide d_model={c['d_model']}": kind != "qwen3" and c["d_model"] % c["n_head"],
        "arch='encdec' (its encoder alone goes out, by --to=transformers or sentence-transformers)": c["arch"] == "encdec",
    }
    for what, refused in checks.items():
        if refused:
            die(f"{what}: no stock class computes this model" + "; train without it to export" * (c["arch"] != "encdec"))
    names = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}
    rope = {"rope_type": "llama3"} | c["rope_scaling"] if c["rope_scaling"] else {"rope_type": "default"}
    rope |= {key: int(n) for key, n in rope.items() if key == "original_max_position_embeddings"}  # a float there is a warning at each load
    return (
        {
            "architectures": [names[kind] + ("Model" if c["arch"] == "encoder" else "ForCausalLM")],
            "model_type": kind,
            "vocab_size": c["vocab_size"],
            "hidden_size": c["d_model"],
            "num_hidden_layers": c["n_layer"],
            "num_attention_heads": c["n_head"],
            "num_key_value_heads": c["n_kv_head"],
            "head_dim": c["head_dim"],
            "intermediate_size": c["d_ff"],
            "hidden_act": act,
            "max_position_embeddings": c["max_len"],
            "rms_norm_eps": c["norm_eps"],
            "rope_theta": c["rope_theta"],  # transformers 4 reads these two, 5 reads rope_parameters
            "rope_scaling": rope if c["rope_scaling"] else None,
            "rope_parameters": rope | {"rope_theta": c["rope_theta"]},
            "tie_word_embeddings": c["tie"],
            "attention_bias": False,
            "use_cache": c["arch"] != "encoder",
            "dtype": str(dtype).removeprefix("torch."),
        }
        | ids
        | ({"is_causal": False} if c["arch"] == "encoder" else {})
    )


def copy_tokenizer(run, out):
    """The run's tokenizer folder as transformers reads it, file by file; -> the ids that config.json repeats."""
    tok = tokenizer.load(run) if (run / "tokenizer").is_dir() else None
    if tok is None or "ids.json" in tok.files:
        print(f"{run} has {'ids that are no text' if tok else 'no tokenizer folder'}: no tokenizer is exported", file=sys.stderr)
        return {"eos_token_id": tok.eos_id, "pad_token_id": tok.eos_id} if tok else {}
    if not (run / "tokenizer" / "tokenizer.json").is_file():  # a rank file or bytes, which transformers could not read
        from prepare import tokenizer as converter

        converter.main([f"--from={run}", f"--out={out}"])  # stops before it writes if the ids would not be the same
    for file in sorted((run / "tokenizer").iterdir()):
        if not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
    if not (out / "tokenizer_config.json").is_file():
        eos = {i: name for name, i in tok.special.items()}[tok.eos_id]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos, "clean_up_tokenization_spaces": False}
        write_json(out / "tokenizer_config.json", config | ({"chat_template": tok.chat_template} if tok.chat_template else {}))
    if not (out / "generation_config.json").is_file():
        stops = sorted(stop_ids(tok, chat=bool(tok.chat_template)))
        write_json(out / "generation_config.json", {"eos_token_id": stops, "pad_token_id": tok.eos_id})
    generation = json.loads((out / "generation_config.json").read_text())
    return {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in generation}


def card(model, state, kind):
    """What these weights are and where they come from: facts of this run only."""
    lines = [
        f"# {kind}, exported from prism",
        "",
        f"- {model.num_params():,} parameters, step {state['step']}",
        f"- causal: {model.cfg.causal and model.decoder is not None}",
    ]
    if model.cfg.ffn == "polyglu":
        lines += [f"- PolyGLU, gate `{model.cfg.gate}`, tau {float(model.tau):g}, evaluated without routing noise"]
        if not model.cfg.causal:
            lines += ["- its gate hears later tokens: losses and perplexities of it are not next-token likelihoods"]
    source, gate = (state.get("imported", {}).get(key, {}) for key in ("source", "gate"))
    lines += [f"- its gate was changed at import, {gate}: the weights were trained with the former"] if gate else []
    if source.get("dequantised_from"):
        lines += [f"- weights dequantised from GGUF {', '.join(source['dequantised_from'])}: not the originals"]
    lines += [f"- started from {source['path']}"] if source.get("path") else []
    lines += [f"  - sha256 of {name}: {digest}" for name, digest in source.get("sha256", {}).items()]
    return "\n".join(lines) + "\n"


def export(opt):
    """One folder: weights, config, tokenizer, generation config, card."""
    model, state = checkpoint.load(opt.ckpt, build=load_anyway)
    step_dir = checkpoint.resolve(opt.ckpt)
    run, out, dtype = step_dir.parent, Path(opt.out), getattr(torch, opt.dtype)
    c, poly = full_fields(model.cfg), model.cfg.ffn == "polyglu"
    c |= {"embed_rank": 0, "allow_noncausal": False}  # a factorised embedding goes out as its product; consent stays at home
    if poly and c["arch"] != "decoder":
        die(f"arch={c['arch']!r} with ffn='polyglu': no exported class holds it; export a decoder, or train with ffn='swiglu'")
    config = None if poly else hf_config(c, dtype, {})  # refuses before anything is written, as the next line does
    tensors = to_theirs(model.state_dict(), c, PUBLISHED if poly else HF, dtype)
    if out.exists() and any(out.iterdir()):
        die(f"--out={out}: is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    ids = copy_tokenizer(run, out)
    if poly:
        config = {"model_type": "prism_polyglu", "architectures": ["PolyGLUForCausalLM"], "dtype": opt.dtype, "use_cache": False} | ids
        config |= {"vocab_size": c["vocab_size"], "hidden_size": c["d_model"], "num_hidden_layers": c["n_layer"]}
        config |= {"num_attention_heads": c["n_head"], "tie_word_embeddings": c["tie"], "gate": c["gate"], "tau": float(model.tau)}
        config |= {"step": state["step"], "prism": c}
        if opt.to == "transformers":
            shutil.copyfile(Path(__file__).with_name("prepare") / "modeling_polyglu.py", out / "modeling_polyglu.py")
            classes = {"AutoConfig": "PolyGLUConfig", "AutoModelForCausalLM": "PolyGLUForCausalLM"}
            config["auto_map"] = {auto: f"modeling_polyglu.{name}" for auto, name in classes.items()}
    else:
        config |= ids
    if c["arch"] == "encoder":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", config)
    (out / "README.md").write_text(card(model, state, config["architectures"][0]), encoding="utf-8")
    print(f"{out}: {config['architectures'][0]}, {sum(t.numel() for t in tensors.values()):,} parameters in {opt.dtype}")


def import_(opt):
    """A run directory that train, sample and eval take like any other; its step is 0, or what the release says."""
    source, out = Path(getattr(opt, "from")), Path(opt.out)
    if checkpoint.steps(out):
        die(f"--out={out}: holds a run already; name a new folder")
    fields, weights, info = read_model(source, opt.gate or None, getattr(torch, opt.dtype))
    cfg = configurator.from_dict(ModelConfig, fields, str(source))
    model = load_anyway(cfg)
    checkpoint.fit(model, weights, source)  # every parameter filled
    model.load_state_dict(weights, assign=True)
    facts = {key: info[key] for key in ("family", "source", "epoch", "gate") if key in info}
    config = configurator.to_dict(cfg)
    if (source / "1_Pooling/config.json").is_file():
        from prepare import sentence

        config["contrast_pooling"] = sentence.stored_pooling(source)
    write_json(out / "config.json", {"config": config, "imported": facts})
    for name, content in (info["tokenizer"] or {}).items():
        write(out / "tokenizer" / name, content)
    state = {"config": config, "tau": info.get("tau", 1.0), "imported": facts, "metrics": {}, "tokens": 0}
    checkpoint.save(out, info.get("step", 0), model, None, state, keep=1)
    where = f"tokenizer of {tokenizer.load(out).vocab_size:,} ids" if info["tokenizer"] else "NO tokenizer: no tokenizer.json there"
    print(f"{out}: {info['family']}, {model.num_params():,} parameters in {opt.dtype}, {where}")
    if not cfg.causal:
        print("its gate hears later tokens: --allow_noncausal=True runs it as published, hub import --gate=running makes it causal")


def load_anyway(cfg):
    """Weights may be moved around in a form that nobody should evaluate without saying so."""
    return Transformer(dataclasses.replace(cfg, allow_noncausal=True))


def main(argv):
    commands = {"import": import_, "export": export}
    if {"--help", "-h"} & set(argv[:1]):
        return print(__doc__.strip())
    if not argv or argv[0] not in commands:
        near = prelude.nearest(" ".join(argv[:1]), commands)
        way = f"did you mean {near[0]}?" if near else "import or export comes first; --help shows how"
        die(f"{' '.join(['python -m hub', *argv])}: {way}")
    defaults = {
        "import": {"from": str, "out": str, "gate": "", "dtype": "float32"},
        "export": {"ckpt": str, "to": str, "out": str, "dtype": "float32"},
    }
    ckpt = next((Path(arg[7:]) for arg in argv if arg.startswith("--ckpt=")), None)
    encoder = "--to=transformers" in argv and ckpt and "enc" in checkpoint.read_state(checkpoint.resolve(ckpt))["config"].get("arch", "")
    if argv[0] == "export" and (encoder or "--to=sentence-transformers" in argv):  # an encoder's own writer, with options of its own
        from prepare import sentence

        return sentence.main(argv[1:])
    opt = configurator.args(defaults[argv[0]], argv[1:], __doc__)
    allowed = {"dtype": ("float32", "bfloat16"), "to": ("transformers", "safetensors", "sentence-transformers")}
    for key, values in (allowed | {"gate": ("", *typing.get_args(Gate))}).items():
        if hasattr(opt, key) and getattr(opt, key) not in values:
            die(f"--{key}={getattr(opt, key)}: expected one of {', '.join(filter(None, values))}")
    commands[argv[0]](opt)


if __name__ == "__main__":
    main(sys.argv[1:])
