"""Chat fine-tuning of the 600M PolyGLU on conversations with worked mathematics: the same loop, another stream.

    python -m prepare.parts qwen
    python -m prepare.chat --dataset=nvidia/Nemotron-Math-v2 --split=high_part00 --out=data/nemotron_math \
                           --tokenizer=.parts/qwen/qwen.tiktoken --max_len=4096
    python train.py config/polyglu_sft.py [--init_from=out/polyglu_h200]          a few steps only: --epochs=0 --max_steps=50
    python sample.py --ckpt=out/polyglu_sft --chat --prompt='What is 17 * 24?'

Whole conversations are packed into rows of 4,096 and never cut; each is alone in attention and gate. Only what the assistant says is
trained: its text, <|im_end|>, the newline, and the closing <|endoftext|>, so that the model learns to stop.
16 rows x 4,096 = 65,536 packed tokens a step, about 32 conversations of 2,000 tokens. tau stays where pretraining ended.
The published run: 13,067 steps, loss 1.77 to 0.84 (mean of the last 100), with the closing <|endoftext|> left out.
Read next: prepare/chat.py.
"""

out = "out/polyglu_sft"
init_from = "out/polyglu_a100"
data = "data/nemotron_math"
packing = "documents"

vocab_size, parameters = 151_669, 597_153_888
n_layer, n_head, n_kv_head, d_model, head_dim, d_ff = 28, 16, 8, 1024, 64, 4096
max_len = 4096
ffn, gate, gate_noise = "polyglu", "running", True
tau_max, tau_min = 0.1, 0.1

seq_len, tokens_per_step, micro_tokens = 4096, 65_536, 32_768
epochs = 1.0
lr, warmup, schedule, min_lr_ratio = 2e-5, 100, "cosine", 0.0
betas, weight_decay, clip = (0.9, 0.95), 0.1, 1.0
compile = True
log_every, eval_every, save_every, keep = 10, 500, 500, 2
eval_tokens = 262_144
