"""Nine stages from 128 to 2,048 tokens with steep multipliers, 12 down to 0.3: 150,000 steps, 5.48B tokens.

    python train.py config/superbpe_197m.py config/curriculum_nine.py

Untested: in the public code these multipliers were overwritten a step later and never took effect. Here they do.
"""

max_steps, max_tokens = 150_000, 0
lr, warmup = 1e-3, 1500
stages = tuple(
    {"start": 1000 * _start, "seq_len": _length, "rows": _rows, "mult": _mult, "clip": _clip, "warmup": _warmup}
    for _start, _length, _rows, _mult, _clip, _warmup in (
        (0, 128, 256, 12.0, 5.0, 500),
        (3, 256, 128, 8.0, 2.0, 300),
        (6, 512, 64, 4.0, 1.0, 200),
        (10, 768, 42, 2.5, 0.5, 100),
        (15, 1024, 32, 1.5, 0.4, 100),
        (25, 1536, 21, 1.0, 0.3, 100),
        (40, 2048, 16, 0.7, 0.3, 100),
        (60, 2048, 18, 0.5, 0.3, 50),
        (100, 2048, 20, 0.3, 0.3, 50),
    )
)
