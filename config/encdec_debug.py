"""An encoder-decoder of 0.2M parameters on bytes: the whole of UL2 in a minute on one core, for tests and for looking at.

python -m prepare.text --from=stdlib --out=data/stdlib_bytes
python train.py config/encdec_debug.py                        # --analyze_batch=8 shows what it sees
The loss starts at ln 361 = 5.89 and must fall below the unigram entropy of the text (3.3 nats a byte).
"""

out = "out/encdec_debug"
arch, objective = "encdec", "denoise"
data = "data/stdlib_bytes"
vocab_size = 257 + 4 + 100  # bytes and EOS, modes, sentinels
n_layer, n_head, n_kv_head, d_model = 2, 4, 2, 64
init_std = 0.06
max_len, max_enc, max_dec = 512, 160, 96
tokens_per_step, max_steps, warmup, lr = 4096, 200, 20, 4e-3
decay_embed = False
log_every, eval_every, eval_tokens = 20, 100, 4096
