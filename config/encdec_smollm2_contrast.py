"""SmolLM2's encoder from UL2 to sentence vectors in a few minutes of one core: 16 steps of 64 labelled pairs, about 30,000 tokens.

python -m prepare.parts sts && python -m prepare.sts --from=.parts/sts --out=data/sts          # 1,249 pairs of STS-B's train split
python train.py config/encdec_smollm2.py config/encdec_smollm2_contrast.py --init_from=out/encdec_smollm2 --data=data/sts/pairs.jsonl
python -m eval.embedding --ckpt=out/encdec_smollm2_contrast --run_stsb --data=data/sts --dtype=bfloat16
All pairs of a step are one micro-batch, so that every text is read once (3 GB). LOG.md has what it is worth after UL2 and without.
"""

out = "out/encdec_smollm2_contrast"
objective = "contrast"
max_enc = 32
contrast_pairs = contrast_micro = 64
contrast_symmetric = True
lr, warmup, schedule = 1e-4, 2, "linear"
max_steps, eval_every, save_every, log_every = 16, 4, 4, 1
eval_sts, best_metric = "data/sts/stsb-dev.jsonl", "-val/sts/spearman"  # sample and export then take the best step by the dev split
