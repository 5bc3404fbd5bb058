"""SmolLM2-135M as an encoder-decoder of 241M parameters: the smallest released model that can be adapted on a CPU.

python -m prepare.parts smollm2 && python -m prepare.encdec --from=.parts/smollm2 --out=out/smollm2_encdec --verify
python -m prepare.text --from='*.parquet' --tokenizer=out/smollm2_encdec --out=data/smol
python train.py config/encdec_smollm2.py --init_from=out/smollm2_encdec --data=data/smol       # then config/encdec_smollm2_contrast.py
A quarter of an hour of one core; LOG.md has what 28 of the 50 steps are worth. Twice the rate collapsed in two runs of three.
"""

out = "out/encdec_smollm2"
arch, objective, mixture = "encdec", "denoise", "recommended"
vocab_size = 49_152 + 4 + 100
eos_id = 0  # <|endoftext|>, as in README's table; the release's own, <|im_end|> (2), was no better (LOG.md)
n_layer, n_head, n_kv_head, d_model, d_ff = 30, 9, 3, 576, 1536
qk_norm, norm_eps, rope_theta, max_len = False, 1e-5, 1e5, 8192
max_enc, max_dec = 128, 64
tokens_per_step, micro_tokens = 2048, 2048
lr, warmup, schedule = 1e-4, 5, "linear"
betas, weight_decay, decay_embed = (0.9, 0.999), 0.01, False
max_steps, log_every, eval_every, eval_tokens = 50, 5, 50, 2048
