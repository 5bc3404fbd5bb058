"""The whole system on a CPU in under three minutes and without a network: SuperBPE, ten stages, emulated FP8, three domains.

    python train.py config/superbpe_debug.py

First the text and the tokenizers (code, docstrings and sums, out of Python's own library), then the run, then a look at it:

    python -m eval.ablation --out=data/three --prepare
    python train.py config/superbpe_debug.py
    python train.py config/superbpe_debug.py --resume                      nothing left to do; after Ctrl-C: the rest
    python sample.py --ckpt=out/superbpe_debug --prompt="Question: Tom has" --max_new_tokens=40
    python -m eval.perplexity --ckpt=out/superbpe_debug --domains=data/three/text/val

250 steps, 483,840 tokens, 0.2M parameters; 31 s of one core. It ends at 2.371 bits per byte (code 2.99, prose 2.96, sums 1.17): a model
that has learnt which superwords are frequent, not yet to read; the machinery is what is shown. Emulation shows FP8's
arithmetic, not its speed.
"""

out = "out/superbpe_debug"
data = {"code": "data/three/super/code", "prose": "data/three/super/prose", "sums": "data/three/super/sums"}
domains = "data/three/text/val"
mix = {"code": 0.4, "prose": 0.4, "sums": 0.2}
vocab_size = 2051
n_layer, n_head, n_kv_head, d_model, d_ff = 2, 4, 2, 64, 192
embed_rank = 32
qk_norm = False
max_len = 2048
tokens_per_step = 2048
lr, warmup, weight_decay = 1e-2, 10, 0.1
precision, fp8_emulate, fp8_filter = "fp8", True, "all"
stages = tuple(
    {"start": _start, "seq_len": _length, "rows": max(1, 2048 // _length), "mult": _mult, "clip": _clip}
    for _start, _length, _mult, _clip in (
        (0, 8, 0.30, 0.5),
        (10, 16, 0.40, 0.5),
        (20, 32, 0.50, 0.7),
        (35, 64, 0.60, 0.8),
        (55, 128, 0.75, 0.9),
        (80, 256, 0.85, 1.0),
        (110, 512, 0.95, 1.0),
        (145, 768, 1.0, 1.0),
        (180, 1536, 1.0, 1.0),
        (200, 2048, 1.0, 1.0),
    )
)
max_steps = 250
log_every, eval_every, save_every, eval_tokens = 25, 125, 125, 4096
best_metric = "val/mean/bpb"
device, dtype = "cpu", "float32"
