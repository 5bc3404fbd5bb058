"""enwik8, a byte at a time: 41M parameters against the 12-layer Transformers of the literature. It has not been run yet.

Published bits per byte of the test split: 1.11 (12 layers, 44M; Al-Rfou et al. 2018), 1.06 (Transformer-XL, 12 layers, 41M). 65,536 tokens
a step, 24,000 steps: 1.6 billion bytes, 17 times the training split; 0.28 GFLOP a byte make 4.5e17: half an hour at 250 TFLOP/s.

    python -m prepare.parts enwik8                                                     # the standard 90/5/5 split
    python -m prepare.text --from=.parts/enwik8/train.txt --val_from=.parts/enwik8/val.txt --out=data/enwik8
    python train.py config/enwik8.py
    python -m prepare.text --from=.parts/enwik8/val.txt --val_from=.parts/enwik8/test.txt --out=data/enwik8_test
    python -m eval.perplexity --ckpt=out/enwik8 --data=data/enwik8_test --windows=4882      # every window of 1,024, no overlap
"""

out = "out/enwik8"
data = "data/enwik8"
n_layer, n_head, d_model, d_ff, max_len = 12, 8, 512, 1536, 1024
seq_len, tokens_per_step, micro_tokens, max_steps = 1024, 65_536, 65_536, 24_000
optimizer, lr, muon_lr, warmup, schedule, decay_share, min_lr_ratio = "muon", 2e-3, 0.02, 500, "wsd", 0.4, 0.0
weight_decay, compile = 0.1, True
eval_every, eval_tokens, log_every, save_every = 1000, 1_000_000, 50, 1000
