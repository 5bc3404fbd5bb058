"""`make quickstart`: a 2.4M-parameter PolyGLU decoder learns Python from Python's own standard library.

python -m prepare.text --from=stdlib --out=data/stdlib --tokenizer=bpe:4096 --val=0.02
python train.py config/quickstart.py

Batch: 8 rows x 256 tokens = 2,048 tokens a step, 1,000 steps = 2M tokens, seven tenths of a pass over the corpus (2.9M).
Two minutes on two CPU cores with bf16; expect 1.43 to 1.51 bits per held-out byte (seeds 1337, 1, 2: 1.489 and 1.506, 1.426, 1.442).
"""

out = "out/quickstart"
data = "data/stdlib"
vocab_size = 4096
n_layer, n_head, n_kv_head, d_model, d_ff = 4, 6, 2, 192, 512
ffn = "polyglu"
seq_len, max_len = 256, 1024
tokens_per_step, max_steps = 2048, 1000
optimizer, lr, muon_lr, warmup, schedule = "muon", 3e-3, 0.02, 40, "wsd"
decay_share, min_lr_ratio = 0.4, 0.02
weight_decay = 0.05
log_every, eval_every, eval_tokens, save_every, keep = 20, 200, 40960, 200, 1
