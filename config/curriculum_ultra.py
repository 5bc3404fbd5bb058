"""Ten stages from windows of 8 tokens to 2,048, in tokens, every step 98,304 of them: 20,834 steps, 2.048B tokens.

    python train.py config/superbpe_197m.py config/curriculum_ultra.py

Shapes never change: a switch costs no recompilation and no reload, only `cu` says where windows end. The share of tokens per
stage is the published one. Control: config/curriculum_flat.py, the same tokens at 2,048 throughout.
"""

max_steps = max_tokens = 0  # the table says where the run ends
warmup = 208  # 1 %
stages = (
    {"tokens": 8192000, "seq_len": 8, "mult": 0.30, "clip": 0.5, "note": "phrases"},
    {"tokens": 12288000, "seq_len": 16, "mult": 0.40, "clip": 0.5, "note": "short sentences"},
    {"tokens": 20480000, "seq_len": 32, "mult": 0.50, "clip": 0.7, "note": "sentences"},
    {"tokens": 40960000, "seq_len": 64, "mult": 0.60, "clip": 0.8, "note": "short paragraphs"},
    {"tokens": 61440000, "seq_len": 128, "mult": 0.75, "clip": 0.9, "note": "paragraphs"},
    {"tokens": 81920000, "seq_len": 256, "mult": 0.85, "clip": 1.0, "note": "several paragraphs"},
    {"tokens": 102400000, "seq_len": 512, "mult": 0.95, "clip": 1.0, "note": "sections"},
    {"tokens": 368640000, "seq_len": 768, "mult": 1.0, "clip": 1.0, "note": "half documents"},
    {"tokens": 368640000, "seq_len": 1536, "mult": 1.0, "clip": 1.0, "note": "long range"},
    {"tokens": 983040000, "seq_len": 2048, "mult": 1.0, "clip": 1.0, "note": "full documents"},
)
