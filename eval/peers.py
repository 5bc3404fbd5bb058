"""Both sides of the races in bench.py: a step of ours, and the same shapes in transformers, trained as its users train them.

Qwen3ForCausalLM for decoders, T5Gemma2 for encoder-decoders (merged attention as ours, batches padded), with the fused AdamW,
clipping and dtypes that prism has: fp32 masters, and bf16 matmuls under torch.autocast. Read next: bench.py.
"""

import shutil
from pathlib import Path

import numpy as np
import torch

import checkpoint
import configurator
import optim
from denoise_stream import collate
from model import build, rectangle
from train import Config

NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "d_model": "hidden_size", "d_ff": "intermediate_size"}


def qwen3(keys, where):
    """The peer: the same architecture in transformers, fp32 masters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    same = {NAMES.get(k, k): v for k, v in keys.items() if k != "n_kv_head"}
    same |= {"num_key_value_heads": keys.get("n_kv_head", keys["n_head"]), "head_dim": keys["d_model"] // keys["n_head"]}
    config = Qwen3Config(**same, tie_word_embeddings=True, max_position_embeddings=4096, attn_implementation="sdpa")
    torch.manual_seed(1)
    return Qwen3ForCausalLM(config).to(where.device)


def t5gemma2(keys, where):
    """The peer of an encoder-decoder, merged attention included; its vision tower is as small as it can be and never used."""
    import transformers as hf

    heads = {"head_dim": keys["d_model"] // keys["n_head"], "query_pre_attn_scalar": keys["d_model"] // keys["n_head"]}
    drop = {"attention_dropout": 0.0, "dropout_rate": 0.0}
    stack = {NAMES.get(k, k): v for k, v in keys.items()} | heads | drop | {"num_key_value_heads": keys["n_head"]}
    stack |= {"layer_types": ["full_attention"] * keys["n_layer"], "hidden_activation": "silu"}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = hf.SiglipVisionConfig(**sizes, image_size=16, patch_size=16)
    image = {f"{name}_token_index": keys["vocab_size"] - 1 for name in ("image", "boi", "eoi")}
    text = hf.T5Gemma2TextConfig(**stack)
    encoder = hf.T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=1, **image, **drop)
    torch.manual_seed(1)
    decoder = hf.T5Gemma2DecoderConfig(**stack)
    config = hf.T5Gemma2Config(encoder=encoder, decoder=decoder, **drop, attn_implementation="sdpa")
    return hf.T5Gemma2ForConditionalGeneration(config).to(where.device)


def step_of(loss, params, optimizer):
    """What both sides do with a loss."""

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(model, inputs, where):
    """A training step as a user of transformers writes it: model(input_ids, labels).loss under autocast."""
    params = list(model.train().parameters())
    groups = [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs = {k: t.to(where.device) for k, t in inputs.items()}

    def loss():
        with torch.autocast(where.device.type, torch.bfloat16, enabled=where.dtype == torch.bfloat16):
            return model(**inputs, use_cache=False).loss

    return step_of(loss, params, optimizer)


def our_step(keys, batch, where, compiled=False):
    """The body of train.py's loop for one micro-batch."""
    cfg = Config(**keys, max_len=4096, max_steps=1, lr=1e-4)
    raw = build(cfg).set_dtype(where.dtype).to(where.device).train()
    model = torch.compile(raw, dynamic=False) if compiled else raw
    batch = {k: t.to(where.device) if isinstance(t, torch.Tensor) else t for k, t in batch.items()}
    count = int((batch["targets"] != -100).sum())
    return step_of(lambda: raw.nll(model(batch), batch["targets"])[0] / count, list(raw.parameters()), optim.build_optimizer(raw, cfg))


def rows_of_text(keys, rows, length):
    """The same random rows for both sides."""
    ids = torch.randint(keys["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))
    return rectangle(ids) | {"targets": ids.flatten().roll(-1)}, {"input_ids": ids, "labels": ids}


def ragged_pairs(keys, count):
    """Examples of an encoder-decoder, 16 to 256 and 8 to 96 tokens: packed for us, padded to the longest for the peer."""
    rng = np.random.default_rng(1)
    draw = lambda low, high: [rng.integers(keys["vocab_size"] - 1, size=n) for n in rng.integers(low, high + 1, count)]  # noqa: E731
    enc, dec = draw(16, 256), draw(8, 96)
    pad = lambda some, fill: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in some], True, fill)  # noqa: E731
    peer = {"input_ids": pad(enc, 0), "attention_mask": pad([x * 0 + 1 for x in enc], 0), "labels": pad(dec, -100)}
    return collate([(e, d, d, 0) for e, d in zip(enc, dec, strict=True)]), peer


def encoder_folder(keys, folder, tokens):
    """A random encoder that reads with the tokenizer of the shards `tokens`, as sentence-transformers loads it."""
    from prepare import sentence

    run, out = Path(folder, "run"), Path(folder, "encoder")
    cfg = Config(**keys, arch="encoder")
    checkpoint.save(run, 0, build(cfg), None, {"config": configurator.to_dict(cfg), "metrics": {}}, keep=1)
    shutil.copytree(Path(tokens, "tokenizer"), run / "tokenizer")
    sentence.main([f"--ckpt={run}", "--to=sentence-transformers", f"--out={out}"])
    return str(out)
