"""Continued pretraining of Qwen3-0.6B (or its Base) on text of your own, on one 24 GB GPU.

    python -m hub import --from=Qwen3-0.6B-Base --out=out/qwen3                   a downloaded folder: config.json, safetensors, tokenizer
    python -m prepare.text --from='notes/*.txt' --tokenizer=out/qwen3 --out=data/notes
    python train.py config/finetune_qwen3.py [--data=data/notes]
    python -m hub export --ckpt=out/qwen3_notes --to=transformers --out=qwen3-notes

596M parameters: fp32 masters, gradients and Adam moments take 9.5 GB; `remat = 1` keeps activations of 8 x 1,024 tokens near 3 GB.
8 rows x 1,024 x 4 micro-batches = 32,768 tokens a step. A tenth of the pretraining rate and a short warmup: higher forgets more.
The same file for every other objective (tests/test_finetune.py runs each on a random Qwen3 folder):

    chats       python -m prepare.chat --from=chats.jsonl --tokenizer=out/qwen3 --out=data/chats
                python train.py config/finetune_qwen3.py --data=data/chats --packing=documents --lr=1e-5
    UL2         python -m prepare.encdec --from=Qwen3-0.6B-Base --out=out/qwen3_encdec
                python train.py config/encdec_ul2.py --init_from=out/qwen3_encdec
    embeddings  python train.py config/encdec_ul2.py config/encdec_contrast.py --init_from=out/encdec_ul2 --data=pairs.jsonl
    packets     --objective=latent --lms="('out/qwen3',)", see config/latent_squad.py

Other sizes: out/qwen3/config.json holds the shape to write here. Not run at this scale: no Qwen weights were in reach.
Read next: config/sft_smollm2.py, which was run.
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
