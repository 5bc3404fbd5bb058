"""A model of 0.1M parameters for tests and for trying an idea in seconds on a CPU. Expected loss: nothing to be proud of.

python -m prepare.text --from=stdlib --out=data/stdlib_bytes
python train.py config/debug.py --data=data/stdlib_bytes
"""

out = "out/debug"
vocab_size = 257
n_layer, n_head, n_kv_head, d_model = 2, 4, 2, 64
max_len = 256
seq_len, tokens_per_step = 64, 1024
max_steps, warmup, lr = 100, 10, 3e-3
log_every, eval_every, eval_tokens = 10, 50, 4096
