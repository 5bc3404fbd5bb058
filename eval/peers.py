"""The same shapes in transformers, trained as its users train them: what bench.py races against.

Qwen3ForCausalLM for decoders, T5Gemma2 for encoder-decoders (merged attention as ours, batches padded), with the fused AdamW,
clipping and dtypes that prism has: fp32 masters, and bf16 matmuls under torch.autocast. Read next: bench.py.
"""

import torch

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
