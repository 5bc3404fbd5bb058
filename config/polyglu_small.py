"""PolyGLU at 143M parameters on one GPU, in minutes: does a choice of activations help, at a size where an afternoon holds many runs?

    python -m prepare.parts enwik8 gpt2
    python -m prepare.text --from=.parts/enwik8/train.txt --separator='</page>' --val=0.01 --tokenizer=.parts/gpt2 --out=data/wiki
    python -m prepare.text --from='YOUR/PYTHON/**/*.py' --val=0.01 --tokenizer=.parts/gpt2 --out=data/code
    python train.py config/polyglu_small.py                                       then its controls, in the same order of data:
    python train.py config/polyglu_small.py --ffn=swiglu --out=out/swiglu_small
    python train.py config/polyglu_small.py --gate=static --out=out/static_small

131,072 tokens a step, 450 steps: 59M tokens of English and Python, half of each. LOG.md has what an H200 made of it.
"""

out = "out/polyglu_small"
data = {"wiki": "data/wiki", "code": "data/code"}
mix = {"wiki": 0.5, "code": 0.5}
vocab_size = 50_257
n_layer, n_head, n_kv_head, d_model, head_dim, d_ff = 12, 12, 4, 768, 64, 3072
max_len = 2048
ffn, gate, gate_noise = "polyglu", "running", True
tau_max, tau_min = 1.0, 0.1
seq_len, tokens_per_step, micro_tokens, max_steps = 2048, 131_072, 131_072, 450
lr, warmup, schedule, min_lr_ratio = 1e-3, 45, "cosine", 0.0
compile = True
log_every, eval_every, eval_tokens = 10, 150, 500_000
