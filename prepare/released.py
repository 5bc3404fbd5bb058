"""Foreign weight files as (ModelConfig fields, tensors under their own names, facts): the reading half of hub.py.

Three sources: a transformers folder, a GGUF file of llama.cpp (dequantised, its tokenizer rebuilt), the published PolyGLU weights. A
field that would change what the model computes and that we do not have is refused by name. Read next: hub.py, which renames and checks.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configurator import die
from prepare.tokenizer import from_gguf
from tokenizer import foreign

GGUF = {  # GGUF -> transformers
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip

# Fields of config.json. A key that stands nowhere below may change the model, so it is refused by name.
USED = """model_type vocab_size num_hidden_layers num_attention_heads num_key_value_heads hidden_size head_dim intermediate_size hidden_act
    max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings is_causal layer_types""".split()
SIZES = "vocab_size num_hidden_layers num_attention_heads hidden_size intermediate_size".split()
KINDS = dict.fromkeys([*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"], int) | {"rope_theta": (int, float)}
KINDS |= {"rope_parameters": dict, "rope_scaling": dict, "layer_types": list, "hidden_act": str, "tie_word_embeddings": bool}
FIXED = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0, "use_sliding_window": False, "use_mrope": False}
FIXED |= {"rope_interleaved": False, "pretraining_tp": 1, "partial_rotary_factor": 1}
HARMLESS = """architectures transformers_version torch_dtype dtype use_cache initializer_range bos_token_id eos_token_id pad_token_id
    unk_token_id _name_or_path max_window_layers sliding_window is_llama_config transformers.js_config""".split()
ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "tanh": "tanh"}
TOKENIZER_FILES = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja vocab.json
    merges.txt generation_config.json""".split()


def read(path) -> dict:
    """The tensors of a safetensors file or the object of a json file, or one line about what it holds instead."""
    try:
        value = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_bytes())
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        die(f"{path}: cannot be read ({str(error)[:200]}); copy it again")
    return value if isinstance(value, dict) else die(f"{path}: holds no object but {str(value)[:40]}")


def load_tensors(path):
    index = path / "model.safetensors.index.json"
    listed = read(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    names = {str(name) for name in listed.values()} if isinstance(listed, dict) else die(f"{index}: has no weight_map")
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            die(f"{path / name}: not there; import reads safetensors, one file or an index beside its files")
    return {key: tensor for name in sorted(names) for key, tensor in read(path / name).items()}


def hf_fields(source, where):
    """config.json -> ModelConfig fields; refuses by name what we would compute differently."""
    kind = source.get("model_type")
    if kind not in ("qwen3", "qwen2", "llama"):
        die(f"{where}: model_type = {kind!r}; supported: qwen3, qwen2, llama (SmolLM2 and TinyLlama are llama)")
    for key, kind_of in KINDS.items():
        value = source.get(key)
        sound = isinstance(value, kind_of) and (kind_of is not int or (0 < value < 1 << 31 and value is not True))
        if not sound and (value is not None or key in SIZES):
            die(f"{where}: {key} = {value!r} cannot be right")
    for key, value in source.items():
        if key in FIXED and value is not None and value != FIXED[key]:
            die(f"{where}: {key} = {value!r} is not supported, only {FIXED[key]!r}")
        if key == "layer_types" and set(value or ()) - {"full_attention"}:
            die(f"{where}: {key} = {sorted(set(value))} is not supported, only full_attention")
        if key not in USED and key not in FIXED and key not in HARMLESS and value not in (None, False, {}, []):
            die(f"{where}: {key} = {value!r} is not supported; delete the line if it does not change the model's function")
    act = source.get("hidden_act", "silu")
    if act not in ACTS:
        die(f"{where}: hidden_act = {act!r} is not supported, only {', '.join(sorted(ACTS))}")
    rope = dict(source.get("rope_parameters") or source.get("rope_scaling") or {})
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if not all(isinstance(value, (int, float)) for value in rope.values()):
        die(f"{where}: the rope parameters {rope} are not all numbers")
    theta = float(rope.pop("rope_theta", source.get("rope_theta", 10000.0)))
    if rope_type not in ("default", "llama3"):
        die(f"{where}: rope_type = {rope_type!r} is not supported, only default and llama3")
    heads, d = source["num_attention_heads"], source["hidden_size"]
    ends = None if source.get("is_causal", True) else source.get("eos_token_id")  # a decoder's stands with its tokenizer
    return {
        "arch": "decoder" if source.get("is_causal", True) else "encoder", "ffn": "swiglu", "act": ACTS[act],
        "vocab_size": source["vocab_size"], "tie": source.get("tie_word_embeddings", False),
        "n_layer": source["num_hidden_layers"], "d_model": d, "d_ff": source["intermediate_size"],
        "n_head": heads, "n_kv_head": source.get("num_key_value_heads") or heads,
        "head_dim": source.get("head_dim") or (128 if kind == "qwen3" else d // heads),
        "max_len": source.get("max_position_embeddings", 2048 if kind == "llama" else 32768),
        "norm_eps": source.get("rms_norm_eps", 1e-6), "qk_norm": kind == "qwen3", "qkv_bias": kind == "qwen2", "rope_theta": theta,
        "rope_scaling": {key: float(value) for key, value in rope.items()} if rope_type == "llama3" else None,
        "eos_id": ends if isinstance(ends, int) else None,
    }  # fmt: skip


@foreign
def read_published(path, source):
    """The PolyGLU release (.safetensors, or .pt read without ever unpickling objects), and our own export of that layout."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pt"))
    if len(files) != 1 or files[0].suffix not in (".safetensors", ".pt"):
        what = f"{len(files)} weight files and no config.json" if path.is_dir() else "no weights"
        die(f"--from={path}: {what}; name a folder of transformers, or one .gguf, .safetensors or .pt file")
    saved = {}
    if files[0].suffix == ".pt":
        try:
            saved = torch.load(files[0], map_location="cpu", weights_only=True)
        except (torch.serialization.pickle.UnpicklingError, RuntimeError):
            die(f"{files[0]}: holds more than tensors and is not opened; where you trust it, save its 'model' as .safetensors")
        key = next((key for key in ("model", "model_state_dict") if key in saved), None)
        tensors = saved[key] if key else die(f"{files[0]}: neither 'model' nor 'model_state_dict' inside")
    else:
        tensors = read(files[0])
    info = {"family": "polyglu", "step": int(saved.get("step", 0)), "tau": float(saved.get("tau", 0.1)), "epoch": saved.get("epoch")}
    tables = [tensors.pop(name, None) for name in ("rope.cosines", "rope.sins")]
    if source:  # ours: the whole config is there
        info |= {"step": source["step"], "tau": source["tau"]}
        return source["prism"], tensors, info
    for name in ("embeddings.weight", "model_core.0.polyglu.alpha", "model_core.0.gqa.rmsnorm_q.gama", "model_core.0.gqa.W_q.weight"):
        if name not in tensors:
            die(f"{name}: missing from {files[0]}; not the published PolyGLU layout: other weights are read as a folder with config.json")
    (v, d), (f, k) = tensors["embeddings.weight"].shape, tensors["model_core.0.polyglu.alpha"].shape
    hd, wk = len(tensors["model_core.0.gqa.rmsnorm_q.gama"]), tensors.get("model_core.0.gqa.W_k.weight")
    if k != 4:
        die(f"model_core.0.polyglu.alpha: {k} activations; the published layout has relu, tanh, silu, gelu")
    fields = {"arch": "decoder", "vocab_size": v, "d_model": d, "d_ff": f, "head_dim": hd, "tie": True, "qk_norm": True, "qkv_bias": False}
    fields |= {"n_layer": 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("model_core."))}
    fields |= {"n_head": tensors["model_core.0.gqa.W_q.weight"].shape[0] // hd, "n_kv_head": 1 if wk is None else wk.shape[0] // hd}
    fields |= {"ffn": "polyglu", "acts": ("relu", "tanh", "silu", "gelu"), "gate": "sequence", "gate_noise": True}
    fields |= {"rope_theta": 10000.0, "norm_eps": 1e-6, "max_len": 4096 if tables[0] is None else len(tables[0])}
    for name, table, function in zip(("rope.cosines", "rope.sins"), tables, (torch.cos, torch.sin), strict=True):
        if table is None:
            continue
        inv_freq = 10000.0 ** (-torch.arange(hd // 2, dtype=torch.float64) * 2 / hd)
        exact = function(torch.arange(len(table), dtype=torch.float64)[:, None] * inv_freq)
        if table.shape != exact.shape or (table.double() - exact).abs().max() > 4e-3:  # bf16 rounds by up to 2e-3
            die(f"{name}: not the rotary table of theta 10000 for head_dim {hd}")
        fields["rope_bf16"] = torch.equal(table, table.bfloat16().to(table.dtype))
    return fields, tensors, info


@foreign
def read_gguf(path):
    """A llama.cpp file -> the transformers names and config, dequantised to fp32."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, **more):  # theirs reads on behind the end of the file, for as long as a list claims to be
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends in the middle")
            return super()._get(offset, dtype, count, **more)

    reader = Reader(path)
    meta = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    arch = meta["general.architecture"]
    if arch not in ("llama", "qwen2", "qwen3"):
        die(f"{path}: general.architecture = {arch!r}; supported: llama, qwen2, qwen3")
    get = {key.removeprefix(arch + "."): value for key, value in meta.items() if key.startswith(arch + ".")}
    heads, kv = get["attention.head_count"], get.get("attention.head_count_kv", get["attention.head_count"])
    known = """block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv rope.freq_base
        attention.layer_norm_rms_epsilon vocab_size rope.dimension_count attention.key_length attention.value_length""".split()
    for key, value in get.items():
        if key not in known and value not in (0, "none", 1.0):
            die(f"{path}: {arch}.{key} = {value!r} is not supported")
    head_dim = get.get("attention.key_length", get["embedding_length"] // heads)
    if get.get("rope.dimension_count", head_dim) != head_dim:
        die(f"{path}: {arch}.rope.dimension_count = {get['rope.dimension_count']} is not supported, only head_dim {head_dim}")
    tensors, kinds = {}, set()
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        if tensor.name != "rope_freqs.weight" and (not match or match[2] not in GGUF):
            die(f"{tensor.name}: a tensor this architecture has no place for")
        if tensor.tensor_type.name not in ("F32", "F16", "BF16"):
            kinds.add(tensor.tensor_type.name)
        if arch == "llama" and match[2] in ("attn_q", "attn_k"):  # llama.cpp rotates neighbours, everyone else halves
            n = heads if match[2] == "attn_q" else kv
            values = values.view(n, head_dim // 2, 2, -1).transpose(1, 2).reshape(values.shape)
        name = f"model.layers.{match[1]}." if match[1] else ""
        tensors[f"{name}{GGUF.get(match[2], match[2])}.{match[3]}"] = values
    factors = tensors.pop("rope_freqs.weight", None)
    source = {
        "model_type": arch, "vocab_size": len(tensors["model.embed_tokens.weight"]), "num_hidden_layers": get["block_count"],
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "hidden_size": get["embedding_length"],
        "intermediate_size": get["feed_forward_length"], "max_position_embeddings": get["context_length"],
        "rms_norm_eps": float(f"{get['attention.layer_norm_rms_epsilon']:.6g}"),  # stored as fp32: 9.99999975e-06
        "rope_theta": get.get("rope.freq_base", 10000.0), "tie_word_embeddings": "lm_head.weight" not in tensors,
    }  # fmt: skip
    if factors is not None:  # Llama 3: the file holds the factors, we need the rule; every 3.x has these three constants
        rope = {"factor": factors.max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
        turns = 8192 * source["rope_theta"] ** (-torch.arange(head_dim // 2) * 2 / head_dim) / (2 * math.pi)
        smooth = ((turns - 1) / 3).clamp(0, 1)
        if not torch.allclose(1 / (smooth + (1 - smooth) / rope["factor"]), factors, rtol=1e-3):
            die(f"{path}: rope_freqs.weight does not follow the Llama 3 rule (low 1, high 4, original context 8192)")
        source["rope_scaling"] = rope | {"rope_type": "llama3"}
    beside = [path.parent / name for name in TOKENIZER_FILES if (path.parent / name).is_file()]  # wins over what is inside
    vocabulary = {file.name: file.read_bytes() for file in beside if path.parent / "tokenizer.json" in beside} or from_gguf(meta, path)
    info = {"family": arch, "source": {"dequantised_from": sorted(kinds)}, "tokenizer": vocabulary}
    return hf_fields(source, path), tensors, info
