"""The encoder of an encoder-decoder learns to tell texts apart: InfoNCE over 1024 pairs a step, on top of encdec_ul2's model.

python train.py config/encdec_ul2.py config/encdec_contrast.py --init_from=out/encdec_ul2 --data=pairs.jsonl --max_steps=300
One epoch is the number of pairs / 1024 steps; warm up for a tenth of them. Without labels --data=data/fineweb_edu: crops of documents.
"""

out = "out/encdec_contrast"
objective = "contrast"
max_enc = 128
contrast_pairs, contrast_micro = 1024, 64
lr, warmup, warmup_from, schedule, min_lr_ratio = 2e-5, 30, 0.0, "linear", 0.0
max_steps, eval_every, save_every, log_every = 300, 0, 0, 10
