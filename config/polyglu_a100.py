"""PolyGLU 600M from scratch on one A100 80 GB: 10.24B tokens of mathematics, STEM and code, with a causal gate.

    python -m prepare.parts qwen && python -m prepare.text --source=all --out=data --tokenizer=.parts/qwen/qwen.tiktoken
    python train.py config/polyglu_a100.py                         one GPU; torchrun --nproc_per_node=8 for more, same batches
    python train.py config/polyglu_a100.py --resume                goes on to the bit
    python train.py config/polyglu_a100.py --max_steps=200 --eval_every=0     a look at speed and memory

597,153,888 parameters: embedding 155,309,056 (tied) + 28 x (attention 3,145,728 + FFN 12,582,912) + routing 28 x 49,320 + norms 61,952.
A step is 128 windows of 4,096 = 524,288 tokens: 16 accumulations of 8 windows (32,768 tokens, about 40 KB each per layer and token).
19,531 steps = 10,239,868,928 tokens at 4.279 GFLOP each: 4.38e19 FLOP, 78 hours at 50 % of 312 TFLOP/s (an estimate, not measured here).
Loss at init 12.13 = ln 151,669 + 0.2. The published run logs 4.20 at step 1,000, 2.08 at 10,000 and 1.5 at the end, with a gate that
sees the future and data replayed after step 10,000: an indication, not a bar. Its behaviour is --gate=sequence --allow_noncausal.
Read next: config/polyglu_sft.py, config/swiglu_baseline.py.
"""

out = "out/polyglu_a100"
data = {"math": "data/math", "stem": "data/stem", "code": "data/code"}
mix = {"math": 0.70, "stem": 0.25, "code": 0.05}
mix_end = {"math": 0.85, "stem": 0.10, "code": 0.05}  # walked to over the last fifth: steps 15,624 to 19,531
mix_decay_start = 0.8

vocab_size, parameters = 151_669, 597_153_888
n_layer, n_head, n_kv_head, d_model, head_dim, d_ff = 28, 16, 8, 1024, 64, 4096
max_len = 4096
ffn, gate, gate_noise = "polyglu", "running", True
tau_max, tau_min = 1.0, 0.1

seq_len, tokens_per_step, micro_tokens = 4096, 524_288, 32_768
max_steps = 19_531
lr, warmup, schedule, min_lr_ratio = 1e-4, 2000, "cosine", 0.0
betas, eps, weight_decay, clip = (0.9, 0.95), 1e-8, 0.1, 1.0  # alpha, norms and biases never decay
compile = True
log_every, eval_every, save_every, keep = 10, 1000, 1000, 3
eval_tokens = 999_424  # 244 windows per source
