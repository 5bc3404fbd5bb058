"""Tiny Shakespeare, a byte at a time: 1.589 nats per held-out character after 30 seconds on two CPU cores, everything included.

nanoGPT's CPU recipe (4 layers, 128 wide, 2,000 iterations of 12 x 64; published 1.88) took 63 s there and reached 1.91 (LOG.md).
With the text (1,115,394 characters) cut into train.txt, its first 90 %, and val.txt, the rest:

    python -m prepare.text --from=train.txt --val_from=val.txt --out=data/shakespeare
    python train.py config/shakespeare_char.py
"""

out = "out/shakespeare_char"
data = "data/shakespeare"
n_layer, n_head, d_model, d_ff, max_len = 4, 4, 128, 384, 512
seq_len, tokens_per_step, max_steps = 128, 2048, 600
optimizer, lr, muon_lr, warmup, schedule, decay_share, min_lr_ratio = "muon", 4e-3, 0.03, 20, "wsd", 0.5, 0.0
weight_decay = 0.1
eval_every, eval_tokens, log_every, save_every = 600, 0, 50, 0
