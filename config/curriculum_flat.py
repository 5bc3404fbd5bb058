"""The control of every curriculum: 2,048 tokens from the first step to the last, 2.048B in 20,834 steps.

python train.py config/superbpe_197m.py config/curriculum_flat.py
"""

max_steps = max_tokens = 0
warmup = 208  # 1 %
stages = ({"tokens": 2048000000, "seq_len": 2048, "mult": 1.0, "clip": 1.0, "note": "control"},)
