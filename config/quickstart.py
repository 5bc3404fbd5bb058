"""`make quickstart`: a 3M-parameter PolyGLU decoder learns Python from Python's own standard library, two minutes on two CPU cores.

python train.py config/quickstart.py

Batch: 16 rows x 256 tokens = 4,096 tokens a step, 800 steps = 3.3M tokens, about one pass over the corpus (3.5M tokens).
"""

out = "out/quickstart"
data = "data/stdlib"
vocab_size = 4096
n_layer, n_head, n_kv_head, d_model, d_ff = 4, 6, 2, 192, 512
ffn = "polyglu"
seq_len, max_len = 256, 1024
tokens_per_step, max_steps = 2048, 600
optimizer, lr, muon_lr, warmup, schedule = "muon", 3e-3, 0.02, 40, "wsd"
decay_share, min_lr_ratio = 0.4, 0.02
weight_decay = 0.05
log_every, eval_every, eval_tokens, save_every, keep = 20, 200, 40960, 200, 1
