"""A PolyGLU of 1.1M parameters on bytes, for a CPU and a few minutes: every step of the 600M recipe in small.

    python -m prepare.text --from=stdlib --out=data/stdlib_bytes        Python's own standard library, as bytes
    python train.py config/polyglu_debug.py
    python -m eval.routing --ckpt=out/polyglu_debug                     what its neurons chose, as a picture

4 layers of 128, f = 512: 4 x (qkv and o 65,536 + FFN 196,608 + routing 6,312) + embedding 49,152 counting padding rows.
A step is 8 windows of 256 = 2,048 tokens; 400 steps = 819,200 bytes. Loss at init 5.6 = ln 257 + 0.05.
"""

out = "out/polyglu_debug"
data = "data/stdlib_bytes"
vocab_size = 257
n_layer, n_head, n_kv_head, d_model, d_ff = 4, 4, 2, 128, 512
max_len = 512
ffn, gate, gate_noise = "polyglu", "running", True
seq_len, tokens_per_step = 256, 2048
max_steps, warmup, lr, min_lr_ratio = 400, 40, 3e-3, 0.1
log_every, eval_every, eval_tokens = 10, 100, 16_384
