"""The control that PolyGLU has to beat: the same shape, data, order and schedule with a plain SwiGLU feed-forward.

    python train.py config/swiglu_baseline.py                    595,772,928 parameters
    python train.py config/swiglu_baseline.py --d_ff=4112        597,149,184: as many as PolyGLU's 597,153,888
    python train.py config/swiglu_baseline.py --act=silu,silu,silu,gelu,..     a fixed activation per layer

Same seed, so the same rows in the same order as config/polyglu_h200.py; only the feed-forward differs. A claim needs three initialisations
of each (--seed), a paired difference with its interval, and the wall-clock. `python -m eval.controls` does that at small scale.
A step: 8 accumulations of 16 windows of 4,096 = 524,288 tokens (80 GB: --micro_tokens=32768); 19,531 steps = 10,239,868,928 tokens.
"""

out = "out/swiglu_baseline"
data = {"math": "data/math", "stem": "data/stem", "code": "data/code"}
mix = {"math": 0.70, "stem": 0.25, "code": 0.05}
mix_end = {"math": 0.85, "stem": 0.10, "code": 0.05}
mix_decay_start = 0.8

vocab_size, parameters = 151_669, 595_772_928
n_layer, n_head, n_kv_head, d_model, head_dim, d_ff = 28, 16, 8, 1024, 64, 4096
max_len = 4096
ffn, act = "swiglu", "silu"

seq_len, tokens_per_step, micro_tokens = 4096, 524_288, 65_536
max_steps = 19_531
lr, warmup, schedule, min_lr_ratio = 1e-4, 2000, "cosine", 0.0
betas, eps, weight_decay, clip = (0.9, 0.95), 1e-8, 0.1, 1.0
compile = True
log_every, eval_every, save_every, keep = 10, 1000, 1000, 3
eval_tokens = 999_424
