"""Chat fine-tuning of SmolLM2-135M-Instruct on worked arithmetic: the smallest released model, on a CPU, in minutes.

    python -m prepare.parts smollm2
    python -m hub import --from=.parts/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out=out/smollm2
    python -m prepare.chat --from=gsm8k_train.jsonl --tokenizer=out/smollm2 --max_len=512 --val=0.02 --out=data/gsm8k_smollm2
    python train.py config/sft_smollm2.py
    python sample.py --ckpt=out/sft_smollm2 --chat --temperature=0 --prompt="Tom has 3 boxes of 4 pens. He loses 5. How many are left?"

gsm8k_train.jsonl: lines of {"question", "answer"}; any file that prepare.chat reads will do. Whole conversations are packed into rows of
512 and never cut; only the answers are trained. 4 rows x 512 = 2,048 packed tokens a step, about 10 conversations.
Held-out loss over whole conversations: 1.424 before, 0.803 after 20 steps, 0.771 after 40 (LOG.md).
Read next: prepare/chat.py, then config/polyglu_sft.py for the same at 600M.
"""

out = "out/sft_smollm2"
init_from = "out/smollm2"
data = "data/gsm8k_smollm2"
packing = "documents"

vocab_size = 49_152  # the shape of the release; `hub import` prints it into out/smollm2/config.json
n_layer, n_head, n_kv_head, d_model, head_dim, d_ff = 30, 9, 3, 576, 64, 1536
qk_norm, norm_eps, rope_theta, max_len = False, 1e-5, 1e5, 8192

seq_len, tokens_per_step, micro_tokens = 512, 2048, 2048
max_steps = 40
lr, warmup, schedule, min_lr_ratio = 1e-4, 4, "cosine", 0.1
betas, weight_decay, clip = (0.9, 0.95), 0.01, 1.0
log_every, eval_every, eval_tokens, save_every, keep = 5, 20, 16_384, 0, 1
