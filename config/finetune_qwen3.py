"""Continued pretraining of Qwen3-0.6B (or its Base) on text of your own, on one 24 GB GPU.

    python -m hub import --from=Qwen3-0.6B-Base --out=out/qwen3                   a downloaded folder: config.json, safetensors, tokenizer
    python -m prepare.text --from='notes/*.txt' --tokenizer=out/qwen3 --out=data/notes
    python train.py config/finetune_qwen3.py [--data=data/notes]
    python -m hub export --ckpt=out/qwen3_notes --to=transformers --out=qwen3-notes

596M parameters: fp32 masters, gradients and Adam moments take 9.5 GB; `remat = 1` keeps activations of 8 x 1,024 tokens near 3 GB.
8 rows x 1,024 x 4 micro-batches = 32,768 tokens a step. A tenth of the pretraining rate and a short warmup: higher forgets more.
For chats: shards of prepare.chat and --packing=documents. For UL2: config/encdec_ul2.py after prepare.encdec --from=Qwen3-0.6B-Base.
Other sizes: out/qwen3/config.json holds the shape to write here. Not run here at this scale: no Qwen weights are in reach of this machine;
import, training and export of random Qwen3 folders are tested in tests/test_hub.py. Read next: config/sft_smollm2.py, which was run.
"""

out = "out/qwen3_notes"
init_from = "out/qwen3"
data = "data/notes"

vocab_size = 151_936
n_layer, n_head, n_kv_head, d_model, head_dim, d_ff = 28, 16, 8, 1024, 128, 3072
rope_theta, max_len = 1e6, 32_768

seq_len, tokens_per_step, micro_tokens = 1024, 32_768, 8192
epochs = 1.0
lr, warmup, schedule, min_lr_ratio = 2e-5, 50, "cosine", 0.1
betas, weight_decay, clip = (0.9, 0.95), 0.1, 1.0
remat = 1
log_every, eval_every, save_every, keep = 10, 200, 200, 2
