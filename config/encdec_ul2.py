"""Qwen3-0.6B as an encoder-decoder under UL2 denoising on one GPU: 1,036,619,776 parameters, half of them new only in what they attend to.

python -m prepare.text --dataset=HuggingFaceFW/fineweb-edu --config=sample-10BT --tokenizer=Qwen3-0.6B --out=data/fineweb_edu
python -m prepare.encdec --from=Qwen3-0.6B --out=out/encdec_init --verify
python train.py config/encdec_ul2.py --init_from=out/encdec_init          # without init_from: the same shape from random weights
make encdec PHASES="sanity validation full"                               # 100 steps, then 5,000, then all, each if the one before held

Batch: sources of about 562 tokens become 395 encoder + 183 decoder tokens, so 16,384 per step are about 28 examples; caps 512/256.
EOS is the release's, kept with the weights that prepare.encdec writes: <|im_end|> (151,645), of Qwen3-0.6B-Base <|endoftext|> (151,643),
where the decoder starts in both. --eos_id=151643 asks for the latter from either.
Memory: fp32 weights, gradients and AdamW are 16.6 GB before activations. Out of memory: halve micro_tokens (the step keeps its size),
then remat = 1. A loss that does not fall: --analyze_batch=8, then lr 5e-5, then look at train/grad_norm.
"""

out = "out/encdec_ul2"
arch, objective, mixture = "encdec", "denoise", "recommended"
data = "data/fineweb_edu"
vocab_size = 151_936 + 100  # modes sit in rows 151,932..151,935, which no token uses
n_layer, n_head, n_kv_head, head_dim, d_model, d_ff = 28, 16, 8, 128, 1024, 3072
rope_theta, max_len = 1e6, 40_960
max_enc, max_dec = 512, 256
tokens_per_step = micro_tokens = 16_384
max_steps, warmup, warmup_from = 100_000, 1000, 0.01
lr, schedule, min_lr_ratio = 1e-4, "cosine", 0.1
betas, weight_decay, decay_embed, clip = (0.9, 0.999), 0.01, False, 1.0
log_every, eval_every, save_every, keep = 10, 500, 5000, 5
